"""What the columns of an Arrow schema are to a record; shared by Parquet and Arrow files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from codebind_jax.data.formats.record import TEXT, add_rows, modality_keys, renamed
from codebind_jax.data.index import IndexBuilder
from codebind_jax.data.index_cache import Bad
from codebind_jax.files import check_form, from_json

if TYPE_CHECKING:
  import pyarrow as pa


@dataclasses.dataclass(frozen=True)
class Columns:
  """The columns that mean something.

  Attributes:
    fields: column -> key, of those that are small: id, label, text, split, and further plain ones.
    items: modality -> column of paths, bytes or both.
    names: key -> class names of a column of class numbers.
    aside: keys of columns that are never read.
  """

  fields: Mapping[str, str]
  items: Mapping[str, str]
  names: Mapping[str, Sequence[str]]
  aside: tuple[str, ...]


def columns_of(schema: pa.Schema, columns: Mapping[str, str], name: str) -> Columns:
  """What the columns of a schema are.

  Args:
    schema: of the file.
    columns: key -> column, for those that are called otherwise.
    name: of the file, for errors.

  Raises:
    ValueError: naming file and column, for a type that cannot be, or if no column is of a modality.
  """
  if doubled := [one for one in schema.names if schema.names.count(one) > 1]:
    raise ValueError(f"{name}: column {doubled[0]!r} is there twice")
  keys = renamed(columns, schema.names, name)
  classes = class_names(schema, name)
  fields, items, names, aside = {}, {}, {}, []
  for field in schema:
    key, kind = keys[field.name], _plain(field.type)
    is_of = f"{name}: column {field.name!r} is of type {field.type}; allowed: "
    if str(field.type) == "null":
      continue
    if key in modality_keys():
      if not _is_item(kind):
        raise ValueError(is_of + "strings (paths), binary (the files' bytes), or a struct of bytes and path")
      items[key] = field.name
    elif key in TEXT:
      if not (_is_string(kind) or _is_list(kind) and _is_string(_plain(kind.value_type))):
        raise ValueError(is_of + "strings or lists of strings")
      fields[field.name] = key
    elif key in ("id", "label", "split"):
      if not (_is_string(kind) or _is_integer(kind) and key != "split"):
        raise ValueError(is_of + ("strings" if key == "split" else "strings or integers"))
      fields[field.name] = key
      if key == "label" and field.name in classes and _is_integer(kind):
        names[key] = classes[field.name]
    elif _is_string(kind) or _is_number(kind):
      fields[field.name] = key
    else:
      aside.append(key)
  if not items and not set(TEXT) & set(fields.values()):
    allowed = ", ".join(sorted({*modality_keys(), *TEXT}))
    raise ValueError(f"{name}: no column of a modality; it has {', '.join(schema.names)}; one of {allowed} is needed, "
                     "or columns={'image': ...} to say what is what")  # fmt: skip
  return Columns(fields, items, names, tuple(aside))


def class_names(schema: pa.Schema, name: str) -> dict[str, list[str]]:
  """Column -> names of the classes that its numbers stand for, from what Hugging Face's datasets wrote beside it.

  Raises:
    ValueError: naming the file, if what they wrote is damaged.
  """
  what = f"{name}: its description by Hugging Face's datasets"
  found = from_json((schema.metadata or {}).get(b"huggingface", b"{}"), what)
  for key in ("info", "features"):
    check_form(found, {}, what)
    found = {} if found.get(key) is None else found[key]
  check_form(found, {}, what)
  classes = {column: feature["names"] for column, feature in found.items()  # fmt: skip
             if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")}
  check_form(classes, {str: [str]}, what)
  return classes


def rows_of(table: Any, columns: Columns) -> list[dict[str, Any]]:
  """Fields of each row of a table or batch of `Columns.fields`."""
  keys = [columns.fields[name] for name in table.schema.names]
  values = []
  for key, column in zip(keys, table.columns):
    column = column.to_pylist()
    if names := columns.names.get(key):
      column = [_named(number, names) for number in column]
    elif str(table.schema.field(len(values)).type) in ("string", "large_string") and key not in TEXT:
      column = [value or None for value in column]  # an empty id or label is none
    values.append(column)
  return [dict(zip(keys, row)) for row in zip(*values)] if values else [{} for _ in range(table.num_rows)]


def _named(number: int | None, names: Sequence[str]) -> Any:
  """A class's name; -1 is no class, as in test sets without labels."""
  if number is None or number == -1:
    return None
  return names[number] if 0 <= number < len(names) else (number,)  # parse says what is wrong


def filled(column: Any) -> tuple[np.ndarray, np.ndarray]:
  """Which items of a column of paths, bytes or both are there, and which of those have neither bytes nor path."""
  import pyarrow as pa
  import pyarrow.compute as pc

  there = pc.is_valid(column).to_numpy(zero_copy_only=False)
  if not pa.types.is_struct(column.type):
    lengths = pc.fill_null(pc.binary_length(_undictionary(column)), 0).to_numpy(zero_copy_only=False)
    return there, there & (lengths == 0)
  some = np.zeros(len(column), bool)
  for part in ("bytes", "path"):
    if column.type.get_field_index(part) >= 0:
      values = pc.struct_field(column, part)
      if str(values.type) != "null":
        some |= pc.fill_null(pc.binary_length(values), 0).to_numpy(zero_copy_only=False) > 0
  return there, there & ~some


def add_table(
  builder: IndexBuilder, bad: Bad, fields: Any, there: Mapping[str, tuple[np.ndarray, np.ndarray]], columns: Columns,
  path: PurePath, name: str, start: int, where: Any,
) -> dict[str, None]:  # fmt: skip
  """Adds the rows of a table to an index.

  Args:
    builder: of the index.
    bad: takes what is wrong.
    fields: table or batch of `Columns.fields`.
    there: modality -> `filled` of its column.
    columns: what the columns are.
    path: of the file, for errors.
    name: of the file, in ids of rows that name none.
    start: number of the first row in the file.
    where: the index's `where` of each row.

  Returns:
    The further keys.
  """
  rows = rows_of(fields, columns)
  wrong: dict[int, str] = {}
  if lengths := {len(where), *(len(have) for have, _ in there.values())} - {len(rows)}:
    raise ValueError(f"{path}: columns of {len(rows)} and {min(lengths)} rows; the file is damaged")
  for modality, (have, empty) in there.items():
    for at in np.flatnonzero(have).tolist():
      rows[at][modality] = "there"
    for at in np.flatnonzero(empty).tolist():
      wrong[at] = f"{modality}: column {columns.items[modality]!r} has neither bytes nor path"
  kept = [at for at in range(len(rows)) if at not in wrong]
  unfit, further = add_rows(builder, [{k: v for k, v in rows[at].items() if v is not None} for at in kept],
                            lambda at: f"{name}:{start + kept[at]}", where[kept])  # fmt: skip
  wrong |= {kept[at]: message for at, message in unfit.items()}
  for at in sorted(wrong):
    bad.add(f"{path}: row {start + at}: {wrong[at]}")
  return dict.fromkeys(further)


def item_of(value: Any) -> str | bytes:
  """A path, or bytes, of one item that is there."""
  if isinstance(value, Mapping):
    return value.get("bytes") or value["path"]
  return value


def _plain(kind: Any) -> Any:
  """The type behind an extension or a dictionary."""
  import pyarrow as pa

  while True:
    if isinstance(kind, pa.BaseExtensionType):
      kind = kind.storage_type
    elif pa.types.is_dictionary(kind):
      kind = kind.value_type
    else:
      return kind


def _undictionary(column: Any) -> Any:
  import pyarrow as pa

  return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _is_string(kind: Any) -> bool:
  return str(kind) in ("string", "large_string", "string_view")


def _is_binary(kind: Any) -> bool:
  return str(kind) in ("binary", "large_binary", "binary_view") or str(kind).startswith("fixed_size_binary")


def _is_integer(kind: Any) -> bool:
  import pyarrow as pa

  return pa.types.is_integer(kind)


def _is_number(kind: Any) -> bool:
  import pyarrow as pa

  return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _is_list(kind: Any) -> bool:
  import pyarrow as pa

  return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_item(kind: Any) -> bool:
  import pyarrow as pa

  if not pa.types.is_struct(kind):
    return _is_string(kind) or _is_binary(kind)
  parts = {kind.field(at).name: kind.field(at).type for at in range(kind.num_fields)}
  fits = {"bytes": lambda t: _is_binary(t) or str(t) == "null", "path": lambda t: _is_string(t) or str(t) == "null"}
  return bool(parts) and set(parts) <= set(fits) and all(fits[part](t) for part, t in parts.items())

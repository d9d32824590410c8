"""One record as its file gives it, a mapping of keys to plain values: fields, and items of modalities."""

from __future__ import annotations

import codecs
import functools
import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Int64

from codebind_jax.data import transforms
from codebind_jax.data.index import SPLITS, IndexBuilder, known_modalities
from codebind_jax.schema import NonemptyLine, Rule, shaped


def _is_encoding(name: str) -> bool:
  try:
    "".encode(codecs.lookup(name).name)
  except (LookupError, ValueError, UnicodeError):
    return False
  return True


# Types of the formats' options.
Names = Mapping[NonemptyLine, NonemptyLine]
Letter = Annotated[str, shaped(r"[^\n]?", "one letter, or ''")]
Encoding = Annotated[str, Rule(_is_encoding, "an encoding of texts, such as utf-8")]

SPLIT_NAMES = {split: split for split in SPLITS} | {"validation": "val"}
FILE_SPLITS = SPLIT_NAMES | {"valid": "val", "dev": "val"}  # of folders and files
TEXT = ("text", "caption")
# Plain endings of files -> modality; depth, thermal, tactile and others share these endings and are never guessed.
BY_ENDING = {
  ending: modality
  for modality, endings in {
    "image": "jpg jpeg jpe jfif png webp avif bmp gif tif tiff ppm pgm jp2",
    "audio": "wav flac mp3 ogg opus",
    "video": "mp4 webm mov avi mkv m4v mpg mpeg wmv flv ogv 3gp",
    "points": "ply off glb obj stl pcd",
    "eeg": "edf bdf",
  }.items()
  for ending in endings.split()
}


class Record(NamedTuple):
  """A parsed record.

  Attributes:
    fields: `id`, `label` (None where there is none), `text` and `split` where given, and further keys.
    items: modality -> path as written, or a file's bytes.
    further: keys that are neither a modality nor a known field.
  """

  fields: dict[str, Any]
  items: dict[str, str | bytes]
  further: tuple[str, ...] = ()

  @property
  def modalities(self) -> list[str]:
    """Those that the record has."""
    return ["text", *self.items] if "text" in self.fields else list(self.items)


def parse(record: Mapping[str, Any], default_id: str) -> Record:
  """The record of a mapping.

  `id` and `label` may be integers, a null is an absent key, `validation` is split val, `caption` is `text`.

  Args:
    record: keys and values.
    default_id: id of a record that names none.

  Raises:
    ValueError: naming the key that is wrong.
  """
  fields: dict[str, Any] = {"id": default_id, "label": None}
  items: dict[str, str | bytes] = {}
  further: tuple[str, ...] = ()
  known = modality_keys()
  for key, value in record.items():
    if value is None or type(value) is float and value != value:  # pandas' word for absent
      continue
    if key in known:
      items[key] = value if type(value) is str and value.strip() else _item(key, value)
    elif key in _NAMES:
      fields[key] = _name(key, value)
    elif key in TEXT:
      if "text" in fields:
        raise ValueError("text and caption are both there; one of them is needed")
      fields["text"] = [_text(key, v) for v in value] if isinstance(value, list) else [_text(key, value)]
      if not fields["text"]:
        raise ValueError(f"{key}: an empty list")
    elif key == "split":
      if _text(key, value) not in SPLIT_NAMES:
        raise ValueError(f"unknown split {value!r}; allowed: {list(SPLIT_NAMES)}")
      fields[key] = SPLIT_NAMES[value]
    else:
      further += (key,)
      fields.setdefault(key, value)
  if not items and "text" not in fields:
    there = ", ".join(map(repr, list(record)[:8])) or "nothing"
    raise ValueError(f"no modality; at least one of {list(known_modalities())} is needed, there is {there} (other "
                     "names: --config.data.options=\"{'columns': {'image': 'img_path'}}\")")  # fmt: skip
  return Record(fields, items, further)


def refuse_repeated(text: str, record: Mapping[str, Any]) -> None:
  """Raises a ValueError that names a key that is there twice in one object of a JSON text.

  Args:
    text: of the whole record.
    record: what was parsed, which has the last of equal keys; as many keys as the text has colons have no repetition.
  """
  if text.count('":') != len(record):
    json.loads(text, object_pairs_hook=_pairs)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice; allowed: each key once")
  return found


_NAMES = frozenset(("id", "label"))


@functools.cache
def _known(folders: tuple[str, ...]) -> frozenset[str]:
  """Modalities that are read from files; `folders` are those of the transforms, which a test or a user may add to."""
  return frozenset(known_modalities()) - {"text"}


def add_rows(
  builder: IndexBuilder, rows: Sequence[Mapping[str, Any]], default_id: Callable[[int], str],
  where: Int64[np.ndarray, "n 2"], paths: bool = False,
) -> tuple[dict[int, str], tuple[str, ...]]:  # fmt: skip
  """Adds records to an index as `parse` takes them; those with the same keys and types are taken together.

  Args:
    builder: of the index.
    rows: keys and values of each record.
    default_id: id of a row that names none.
    where: the format's own numbers of each.
    paths: items that are texts are paths, of which equal ones are one file.

  Returns:
    What is wrong with which rows, which are left out; and the further keys.
  """
  groups: dict[tuple[Any, ...], list[int]] = {}
  for at, row in enumerate(rows):
    groups.setdefault((*row, *map(type, row.values())), []).append(at)
  has = np.zeros(len(rows), np.uint32)
  columns: dict[str, list[Any]] = {name: [None] * len(rows) for name in ("id", "label", "split")}
  bad: dict[int, str] = {}
  further: dict[str, None] = {}
  for keys_and_types, places in groups.items():
    own = rows if len(places) == len(rows) else [rows[at] for at in places]
    plain = _plain(keys_and_types, own)
    if plain is not None:
      modalities, values, others = plain
      has[places] = builder.bits(modalities)
      further |= dict.fromkeys(others)
      if "id" not in values:
        values["id"] = [default_id(at) for at in places]
      for name, column in values.items():
        if own is rows:
          columns[name] = column
        else:
          for at, value in zip(places, column):
            columns[name][at] = value
      continue
    for at in places:
      try:
        record = parse(rows[at], default_id(at))
      except ValueError as error:
        bad[at] = str(error)
        continue
      has[at] = builder.bits(record.modalities)
      further |= dict.fromkeys(record.further)
      for name in columns:
        columns[name][at] = record.fields.get(name)
  if bad:
    kept = [at for at in range(len(rows)) if at not in bad]
    columns = {name: [column[at] for at in kept] for name, column in columns.items()}
    has, where, rows = has[kept], where[kept], [rows[at] for at in kept]
  files = {key: {at: row[key] for at, row in enumerate(rows) if type(row.get(key)) is str}
           for key in dict.fromkeys(key for keys in groups for key in keys if key in modality_keys())
           } if paths else {}  # fmt: skip
  builder.add_many(columns["id"], has, columns["label"], columns["split"], where, files)
  return dict(sorted(bad.items())), tuple(further)


def _plain(
  keys_and_types: tuple[Any, ...], rows: Sequence[Mapping[str, Any]]
) -> tuple[list[str], dict[str, list[str]], list[str]] | None:
  """Modalities, names and further keys of records that all have these keys and types; None if one may be bad."""
  known, half = modality_keys(), len(keys_and_types) // 2
  modalities, values, further = [], {}, []
  for key, kind in zip(keys_and_types[:half], keys_and_types[half:]):
    if kind is type(None):
      continue
    if key not in known and key not in _NAMES and key not in TEXT and key != "split":
      further.append(key)
      continue
    column = [row[key] for row in rows]
    if kind is int and key in _NAMES:
      values[key] = list(map(str, column))
      continue
    if kind is list and key in TEXT:
      texts = list(itertools.chain.from_iterable(column))
      if not all(column) or set(map(type, texts)) != {str} or not all(map(str.strip, texts)) or _halved(texts):
        return None
    elif kind is not str or not all(map(str.strip, column)) or key not in known and _halved(column):
      return None
    if key == "split":
      if not all(value in SPLIT_NAMES for value in column):
        return None
      values[key] = [SPLIT_NAMES[value] for value in column]
    elif key in _NAMES:
      values[key] = column
    else:
      modalities.append("text" if key in TEXT else key)
  return (modalities, values, further) if modalities and len(set(modalities)) == len(modalities) else None


def modality_keys() -> frozenset[str]:
  """Keys of what is read from files: all modalities but text."""
  return _known(tuple(transforms.__path__))


def known_splits(names: Sequence[str | None], name: str) -> list[bool]:
  """Which parts of a data set are taken: those of a known split, or all where none is; others are logged.

  Args:
    names: split of each part.
    name: of the data set, for the log.
  """
  known = [split in FILE_SPLITS for split in names]
  if others := sorted({str(split) for split, there in zip(names, known) if not there}) if any(known) else []:
    logging.info("%s: splits that are not used, kept aside: %s", name, ", ".join(others))
  return known if any(known) else [True] * len(names)


def short_names(paths: Sequence[PurePath]) -> list[str]:
  """Names of files in the ids of records that name none: the last part of each path, or as many as tell them apart.

  >>> short_names([PurePath("x/a/data.csv"), PurePath("x/b/data.csv")])
  ['a/data.csv', 'b/data.csv']
  """
  longest = max((len(path.parts) for path in paths), default=1)
  for count in range(1, longest + 1):
    names = ["/".join(path.parts[-count:]) for path in paths]
    if len(set(names)) == len(names):
      break
  return names if paths else []


def known_keys() -> tuple[str, ...]:
  """Keys that mean something."""
  return (*known_modalities(), "caption", "id", "label", "split")


def renamed(columns: Mapping[str, str], there: Collection[str], name: str) -> dict[str, str]:
  """What each column of a file is called in a record: the key that the user gives it, else its own name.

  A column whose own name is a key that another column got is called `<name> (column)`, and so kept aside.

  Args:
    columns: key -> name of the column in the file.
    there: columns of the file.
    name: of the file, for errors.

  Raises:
    ValueError: for a key that means nothing, or a column that is not there.
  """
  for key, column in columns.items():
    if key not in known_keys():
      raise ValueError(f"columns: unknown key {key!r}; allowed: {', '.join(known_keys())}")
    if column not in there:
      raise ValueError(f"{name}: no column {column!r} for {key!r}; it has {', '.join(map(str, there))}")
  taken = set(columns) | (set(TEXT) if set(TEXT) & set(columns) else set())
  keys = {column: f"{column} (column)" if column in taken else column for column in there}
  return keys | {column: key for key, column in columns.items()}


def _item(key: str, value: Any) -> str | bytes:
  """A path or a file's bytes, also as `{"bytes": ..., "path": ...}`."""
  if isinstance(value, Mapping) and set(value) <= {"bytes", "path"}:
    value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
  if isinstance(value, bytes) and value:
    return value
  return _filled(key, value)


def _name(key: str, value: Any) -> str:
  """An id or a label: a text, or a whole number, which pandas makes a float where others of its column are absent."""
  if isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  if isinstance(value, float) and value.is_integer():
    return str(int(value))
  if not isinstance(value, str):
    raise ValueError(f"{key}: a text or a whole number is needed, got {value!r:.80}")
  return _text(key, value)


def _text(key: str, value: Any) -> str:
  """A string of whole characters, which every file that is written of it can hold."""
  if _halved([_filled(key, value)]):
    raise ValueError(f"{key}: got {value!a:.80}, which has half of a surrogate pair; allowed: whole characters")
  return value


def _filled(key: str, value: Any) -> str:
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f"{key}: a string that is not empty is needed, got {value!r:.80}")
  return value


def _halved(texts: Sequence[str]) -> bool:
  """Whether a text has half of a surrogate pair, as JSON's \\ud800 is."""
  joined = "\n".join(texts)
  if joined.isascii():
    return False
  try:
    joined.encode()
  except UnicodeEncodeError:
    return True
  return False

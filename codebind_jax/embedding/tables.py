"""Parquet files whose values are verified when they are read, column by column.

Parquet's own checksums cover pages alone, not their headers and the footer, which says how they become values. So here
each column of each row group has a checksum of its values in the file's metadata: columns that are read are verified,
no others need be read for it, other programs read the file as any Parquet file, and a copy elsewhere is verified too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from codebind_jax import files
from codebind_jax.data.parquet_pages import check_pages
from codebind_jax.data.reading import arrow_errors

KEY = b"codebind_jax"  # of the file's metadata
ROW_GROUP = 1 << 16  # rows that are verified at once


def write_table(table: pa.Table, path: files.Path, about: Mapping[str, Any], row_group: int = ROW_GROUP) -> None:
  """Writes a Parquet file whole, see `files.replacing`.

  Args:
    table: columns of numbers, strings, bytes of one length, and lists of these.
    path: of the file.
    about: further metadata; JSON.
    row_group: rows of each group but the last.
  """
  starts = range(0, table.num_rows, row_group)
  columns = {
    name: [column_checksum(table[name].slice(start, row_group)) for start in starts] for name in table.column_names
  }
  content = files.sealed({**about, "rows": table.num_rows, "row_group": row_group, "columns": columns})
  with files.replacing(path) as temporary:
    pq.write_table(table.replace_schema_metadata({KEY: json.dumps(content)}), temporary, compression="zstd",
                   row_group_size=row_group)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Group:
  """Rows of a file that were read and are yet to be verified.

  Attributes:
    path: of the file.
    first: number of the first row.
    columns: by name.
    expected: the checksum of each column; None for a file without.
  """

  path: files.Path
  first: int
  columns: Mapping[str, pa.Array]
  expected: Mapping[str, str] | None

  def verify(self) -> None:
    """Compares the checksums of all columns with those that were written.

    Raises:
      ValueError: naming the file, the column and the rows that are damaged.
    """
    for name, array in self.columns.items() if self.expected is not None else ():
      what = f"{self.path}: rows {self.first} to {self.first + len(array) - 1} of column {name!r}"
      try:
        found = column_checksum(array)
      except ValueError as error:
        raise ValueError(f"{what}: damaged ({error})") from error
      files.verify(found, self.expected[name], what)


class Table:
  """An open file.

  Attributes:
    path: of the file.
    about: its metadata; {} of a file that another program wrote.
    checksum: of the metadata, and thereby of all columns; "" of a file that another program wrote.
    names: of its columns.
    rows: their number.
  """

  def __init__(self, path: files.Path, file: pq.ParquetFile, content: Any):
    """Reads and verifies the metadata.

    Args:
      path: of the file.
      file: open.
      content: its bytes, to look at the headers of its pages before they are unpacked; None for a far file, of which
        that would read all pages twice.

    Raises:
      ValueError: if they are damaged, or are not those of the columns.
    """
    self.path, self._file, self._content = path, file, content
    self._looked_at: set[str] = set()  # columns
    self.names, self.rows = list(file.schema_arrow.names), file.metadata.num_rows
    metadata = file.schema_arrow.metadata or {}
    self.about: dict[str, Any] = {}
    self.checksum = ""
    if KEY in metadata:
      self.about = files.unsealed(files.from_json(metadata[KEY], f"{path}: its metadata"), f"{path}: its metadata")
      self.checksum = files.sealed(self.about)["checksum"]
      for key, kind in (("rows", int), ("row_group", int), ("columns", dict)):
        if not isinstance(self.about.get(key), kind):
          raise ValueError(f"{path}: its metadata have no {key!r}")
      for name, there in (("rows", self.rows), ("columns", self.names)):
        said = self.about[name] if name == "rows" else list(self.about[name])
        if said != there:
          raise ValueError(f"{path}: damaged: its metadata say {name} {said}, it has {there}")

  def groups(self, names: Sequence[str], rows: int = ROW_GROUP) -> Iterator[Group]:
    """The columns of these names, as many rows at once as were written together, or `rows` of another program's file.

    Raises:
      ValueError: if there are more or fewer of them than the metadata say.
    """
    if self._content and (new := set(names) - self._looked_at):
      try:
        check_pages(self._content, new)
      except ValueError as error:
        raise ValueError(f"{self.path}: damaged: {error}") from error
      self._looked_at |= new
    if not self.about:
      first = 0
      for batch in self._file.iter_batches(rows, columns=list(names)):
        yield Group(self.path, first, {name: batch.column(name) for name in names}, None)
        first += batch.num_rows
      return
    size, sums = self.about["row_group"], self.about["columns"]
    counts = [min(size, self.rows - start) for start in range(0, self.rows, size)]
    # A file without rows may have one group without rows, or none.
    there = [self._file.metadata.row_group(n).num_rows for n in range(self._file.metadata.num_row_groups)]
    if (there or [0]) != (counts or [0]) or any(len(sums[name]) != len(counts) for name in names):
      raise ValueError(f"{self.path}: damaged: row groups of {there[:10]} rows, {counts[:10]} were written")
    for number in range(len(counts)):
      table = self._file.read_row_group(number, columns=list(names))
      if table.num_rows != counts[number]:
        raise ValueError(f"{self.path}: damaged: {table.num_rows} rows in group {number}, not {counts[number]}")
      columns = {name: _whole(table[name]) for name in names}
      yield Group(self.path, number * size, columns, {name: sums[name][number] for name in names})

  def verify(self) -> None:
    """Reads and verifies all columns, one at a time.

    Raises:
      ValueError: naming the file, the column and the rows that are damaged.
    """
    for name in self.names:
      for group in self.groups([name]):
        group.verify()


@contextlib.contextmanager
def open_table(path: files.Path, what: str) -> Iterator[Table]:
  """Opens a file; what is raised meanwhile because it is damaged is a ValueError that names it.

  Args:
    path: of the file; a far one is read by ranges.
    what: it is, such as "a readable shard", for errors.

  Raises:
    ValueError: as `Table`, or if it is no Parquet file.
  """
  with arrow_errors(f"{path}: not {what}"), contextlib.ExitStack() as stack:
    source = stack.enter_context(files.open_far(path)) if files.is_far(path) else path
    content = None if files.is_far(path) else stack.enter_context(path.open("rb"))
    try:
      file = stack.enter_context(pq.ParquetFile(source))
    except (TypeError, KeyError, IndexError, OverflowError, MemoryError) as error:  # of a damaged footer
      raise ValueError(f"{path}: not {what} ({type(error).__name__}: {error})") from error
    yield Table(path, file, content)


def column_checksum(column: pa.Array | pa.ChunkedArray) -> str:
  """The checksum of a column's values: the same however they are cut into chunks and lie in memory.

  Raises:
    ValueError: for a type that no column of ours has.
  """
  parts: list[Any] = []
  _add(_whole(column), parts)
  return files.checksum(*parts)


def fixed_bytes(array: pa.FixedSizeBinaryArray) -> np.ndarray:
  """The bytes of a column of values of one length [n, width], uint8; none of them null."""
  width = array.type.byte_width
  _, values = array.buffers()
  if not len(array):
    return np.zeros((0, width), np.uint8)
  return np.frombuffer(values, np.uint8, len(array) * width, array.offset * width).reshape(len(array), width)


def as_fixed_bytes(rows: np.ndarray) -> pa.FixedSizeBinaryArray:
  """Inverse of `fixed_bytes`."""
  rows = np.ascontiguousarray(rows, np.uint8)
  return pa.FixedSizeBinaryArray.from_buffers(pa.binary(rows.shape[1]), len(rows), [None, pa.py_buffer(rows)])


def _whole(column: pa.Array | pa.ChunkedArray) -> pa.Array:
  if isinstance(column, pa.Array):
    return column
  return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks) if column.num_chunks else (
    pa.array([], column.type))  # fmt: skip


def _add(array: pa.Array, parts: list[Any]) -> None:
  """Adds the bytes of an array: its kind, length and nulls, the lengths of its lists and strings, and their values."""
  kind, nulls = array.type, array.null_count
  parts.append(f"{len(array)},{nulls};".encode())
  if nulls:
    parts.append(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)))
    array = array.drop_null()
  if pa.types.is_fixed_size_list(kind):
    parts.append(f"list{kind.list_size};".encode())
    _add(array.flatten(), parts)
  elif pa.types.is_list(kind):
    parts += [b"list;", np.diff(array.offsets.to_numpy())]
    _add(array.flatten(), parts)
  elif pa.types.is_string(kind):
    _, offsets, values = array.buffers()
    ends = np.frombuffer(offsets, np.int32, len(array) + 1, 4 * array.offset) if len(array) else np.zeros(1, np.int32)
    parts += [b"string;", np.diff(ends), values[int(ends[0]) : int(ends[-1])] if values else b""]
  elif pa.types.is_fixed_size_binary(kind):
    parts += [f"bytes{kind.byte_width};".encode(), fixed_bytes(array)]
  elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
    parts += [f"{kind};".encode(), array.to_numpy(zero_copy_only=True)]
  else:
    raise ValueError(f"a column of type {kind}; allowed: numbers, strings, bytes of one length, and lists of these")

"""Parquet: columns are keys; items are paths, the files' bytes, or structs of both. Read by row group.

A group's column is read and decoded whole, so rows of one group are best read one after the other (`Source.block`).
The latest ones are kept, up to `KEPT` bytes in a process and one at least: a file of huge groups takes their size in
memory, which Arrow's pool holds beside Python's.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from codebind_jax import files
from codebind_jax.data import ranges
from codebind_jax.data.formats import columns as arrow
from codebind_jax.data.formats.columns import Columns
from codebind_jax.data.formats.jsonl import item
from codebind_jax.data.formats.record import Names, parse, short_names
from codebind_jax.data.index import IndexBuilder, twice
from codebind_jax.data.index_cache import Bad, Scan, scanned
from codebind_jax.data.reading import arrow_errors
from codebind_jax.data.records import Source

ENDINGS = (".parquet",)
KEPT = 256 * 2**20
_BUFFER = 1 << 16
_ROWS = 1 << 14  # whose fields are taken together
_BATCH = 256  # rows whose items are looked at together for what is not there


class Kept:
  """Values that are kept from the last time, the oldest forgotten first; safe from many threads."""

  def __init__(self, limit: int):
    """Keeps values of up to `limit` bytes (`.nbytes`), and the latest one in any case."""
    self.limit, self.total = limit, 0
    self._entries: collections.OrderedDict[Any, list[Any]] = collections.OrderedDict()
    self._lock = threading.Lock()

  def get(self, key: Any, make: Callable[[], Any]) -> Any:
    """The value of a key; made once, also if several threads ask."""
    with self._lock:
      entry = self._entries.setdefault(key, [threading.Lock(), None])
      self._entries.move_to_end(key)
    with entry[0]:
      if entry[1] is None:
        value = make()
        with self._lock:
          entry[1] = value
          if self._entries.get(key) is not entry:  # forgotten meanwhile
            return value
          self.total += value.nbytes
          for other in [other for other, (_, there) in self._entries.items() if there is not None and other != key]:
            if self.total <= self.limit:
              break
            self.total -= self._entries.pop(other)[1].nbytes
      return entry[1]


_groups = Kept(KEPT)


class ColumnsSource(Source):
  """Records that are rows of Arrow tables."""

  def __init__(self, path: PurePath, scan: Scan, columns: Columns):
    super().__init__(path.stem, scan.index, scan.mark)
    self.left_out = scan.bad
    self._path, self._places, self._stamps = path, scan.index.where, scan.stamps
    self._name = scan.notes["name"]
    self._columns = columns

  @abc.abstractmethod
  def _value(self, number: int, names: tuple[str, ...]) -> Any:
    """A record's row of these columns, as a table of one row."""

  @abc.abstractmethod
  def _row(self, number: int) -> int:
    """Number of a record's row in its file: rows that were left out count."""

  def _fields(self, number: int) -> dict[str, Any]:
    names = tuple(self._columns.fields)
    row = arrow.rows_of(self._value(number, names), self._columns)[0] if names else {}
    row = dict.fromkeys(self._columns.items, "there") | {key: value for key, value in row.items() if value is not None}
    return parse(row, f"{self._name}:{self._row(number)}").fields

  def _read(self, number: int, modality: str) -> Path | bytes:
    column = self._columns.items[modality]
    return item(self._path, arrow.item_of(self._value(number, (column,)).column(column)[0].as_py()))

  def _identity(self, number: int, modality: str) -> str:
    value = self._read(number, modality)
    own = ranges.identity(value) if isinstance(value, Path) else f"{self._path} {self._stamps} {number}"
    return f"{modality} {own}"

  def _where(self, number: int) -> str:
    return f"{self._path}: row {self._row(number)}"


class ParquetSource(ColumnsSource):
  """Records of one Parquet file."""

  def __init__(self, path: PurePath, scan: Scan):
    super().__init__(path, scan, Columns(**scan.notes["columns"] | {"aside": tuple(scan.notes["columns"]["aside"])}))
    self._starts = np.cumsum([0, *scan.notes["groups"]])
    self.block = max(scan.notes["groups"], default=1)
    self._metadata: Any = None

  def __getstate__(self) -> dict[str, Any]:
    return super().__getstate__() | {"_metadata": None}

  def _row(self, number: int) -> int:
    group, row = map(int, self._places[number])
    return int(self._starts[group]) + row

  def _value(self, number: int, names: tuple[str, ...]) -> Any:
    group, row = map(int, self._places[number])
    table = _groups.get((str(self._path), self._stamps, group, names), lambda: self._group(group, names))
    return table.slice(row, 1)

  def _group(self, group: int, names: tuple[str, ...]) -> Any:
    import pyarrow as pa

    if self._stamps and ranges.stamp(self._path) != self._stamps[0]:
      raise ranges.ChangedError(f"{self._path}: has changed since it was indexed; start again")
    pa.default_memory_pool().release_unused()  # of groups that were forgotten
    with opened(self._path, self._metadata) as file:
      self._metadata = file.metadata
      with arrow_errors(f"{self._path}: row group {group} cannot be read"):
        return file.read_row_group(group, columns=list(names), use_threads=False)


def opened(path: PurePath, metadata: Any = None, buffer: int = 0) -> Any:
  """A Parquet file.

  Args:
    path: of the file.
    metadata: of it, where it is known.
    buffer: bytes of a column that are read at once; 0 for all of a row group's.

  Raises:
    ValueError: if it is none.
    OSError: if it cannot be read.
  """
  from pyarrow import parquet

  source = ranges.open_binary(path) if files.is_far(path) else str(path)
  with arrow_errors(f"{path}: not a readable Parquet file"):
    file = parquet.ParquetFile(source, metadata=metadata, pre_buffer=False, buffer_size=buffer)
    try:
      _ = file.schema_arrow  # which is read when asked for
    except Exception:
      file.close()
      raise
    return file


def open_files(
  paths: Sequence[PurePath], *, cache: Path | None = None, max_bad_records: int = 0,
  columns: Names | None = None,
) -> list[Source]:  # fmt: skip
  """The records of each file. Indexing reads the small columns; of items, only what says whether they are there.

  Args:
    paths: the files.
    cache: folder of kept indices.
    max_bad_records: of all files together.
    columns: key -> column, for those that are called otherwise.

  Raises:
    ValueError: naming file and column or row: for a column that is not there, or is of a type that cannot be, a column
      of a modality that only some of the files have, two records of one id; for bad records, if there are more than
      `max_bad_records`.
    OSError: if a file cannot be read.
  """
  bad, columns = Bad(max_bad_records), dict(columns or {})
  scan = lambda path, name: scanned([path], lambda bad: _scan(path, name, bad, columns), bad, revision="parquet-1",
                                    options={"columns": columns, "name": name}, cache=cache)  # fmt: skip
  sources = [ParquetSource(path, scan(path, name)) for path, name in zip(paths, short_names(paths))]
  alike(sources)
  return sources


def alike(sources: Sequence[ColumnsSource]) -> None:
  """Raises a ValueError if one of several files lacks a column of a modality that another one has."""
  first: dict[str, tuple[str, PurePath]] = {}
  own = []
  for source in sources:
    texts = {key: name for name, key in source._columns.fields.items() if key in arrow.TEXT}
    own.append({**source._columns.items, **texts})
    first = {key: (name, source._path) for key, name in own[-1].items()} | first
  for source, keys in zip(sources, own):
    if lacking := [key for key in first if key not in keys]:
      name, other = first[lacking[0]]
      raise ValueError(f"{source._path}: no column {name!r}, which {other} has")


def _scan(path: PurePath, name: str, bad: Bad, columns: Mapping[str, str]) -> Scan:
  builder, further, start = IndexBuilder(), {}, 0
  with opened(path) as file:
    found = arrow.columns_of(file.schema_arrow, columns, str(path))
    _check_columns(path, file.metadata, list(found.items.values()))
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    for group, rows in enumerate(sizes):
      with arrow_errors(f"{path}: row group {group} cannot be read"):
        there = {modality: _there(file, group, column) for modality, column in found.items.items()}
        if wrong := [modality for modality, (have, _) in there.items() if len(have) != rows]:
          raise ValueError(f"{path}: row group {group} has other numbers of {wrong[0]} than its {rows} rows")
        where, at = np.stack([np.full(rows, group), np.arange(rows)], 1).astype(np.int64), 0
        for fields in _batches(file, group, list(found.fields)):
          part = slice(at, at + fields.num_rows)
          own = {modality: (have[part], empty[part]) for modality, (have, empty) in there.items()}
          further |= arrow.add_table(builder, bad, fields, own, found, path, name, start + at, where[part])
          at += fields.num_rows
      start += rows
  notes = {"name": name, "columns": dataclasses.asdict(found), "groups": sizes}
  scan = Scan(builder.build(), further=(*further, *found.aside), notes=notes)
  source = ParquetSource(path, scan)
  if pair := twice(scan.index):
    a, b = (source._row(number) for number in pair)
    raise ValueError(f"{path}: id {source.fields(pair[1])['id']!r} is there twice: row {a} and row {b}")
  return scan


def _batches(file: Any, group: int, names: list[str]) -> Iterator[Any]:
  """The rows of a group, some at a time; of no column all at once."""
  if names:
    yield from file.iter_batches(_ROWS, row_groups=[group], columns=names, use_threads=False)
  else:
    yield file.read_row_group(group, columns=[], use_threads=False)


def _check_columns(path: PurePath, metadata: Any, columns: Sequence[str]) -> None:
  """Reads the first row of each row group, by pages, as far as it is of these columns.

  What a damaged file says of a column is an error there; asked for by itself (`column`), it ends the process.

  Raises:
    ValueError: naming file and row group.
  """
  with contextlib.closing(opened(path, metadata, _BUFFER)) as file:
    for group in range(metadata.num_row_groups if columns else 0):
      with arrow_errors(f"{path}: row group {group} cannot be read"):
        next(file.iter_batches(1, row_groups=[group], columns=list(columns), use_threads=False), None)


def _there(file: Any, group: int, column: str) -> tuple[np.ndarray, np.ndarray]:
  """`columns.filled` of a column of a row group; from its statistics alone where they say that all are there."""
  import pyarrow as pa

  about = file.metadata.row_group(group)
  for number in range(about.num_columns):
    said = file.schema.column(number)
    if said.path not in (column, f"{column}.bytes", f"{column}.path"):
      continue
    leaf = about.column(number)
    if leaf.physical_type != said.physical_type:
      raise pa.ArrowInvalid(f"column {said.path!r} is {leaf.physical_type}, by the schema {said.physical_type}")
    if leaf.statistics:
      about_leaf = leaf.statistics
      blank = about_leaf.has_min_max and about_leaf.min in (b"", "")
      if about_leaf.has_null_count and about_leaf.null_count == 0 and not blank:
        return np.ones(about.num_rows, bool), np.zeros(about.num_rows, bool)
  parts = [arrow.filled(batch.column(0)) for batch in
           file.iter_batches(_BATCH, row_groups=[group], columns=[column], use_threads=False)]  # fmt: skip
  whole = [np.concatenate(part) if parts else np.zeros(0, bool) for part in zip(*parts)]
  return (whole[0], whole[1]) if parts else (np.zeros(0, bool), np.zeros(0, bool))

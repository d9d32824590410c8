"""JSON lines: one object a line, with paths relative to the file."""

from __future__ import annotations

import abc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from codebind_jax import files
from codebind_jax.data import ranges
from codebind_jax.data.formats.record import Names, Record, add_rows, parse, refuse_repeated, renamed, short_names
from codebind_jax.data.index import IndexBuilder, twice
from codebind_jax.data.index_cache import Bad, Scan, scanned
from codebind_jax.data.ranges import File
from codebind_jax.data.records import Source

ENDINGS = (".jsonl",)
_ONE_A_LINE = "; one object a line is needed, not one array and no object over several lines"
_CHUNK = 1024  # lines parsed together
_scan_once = json.JSONDecoder().scan_once


class LineSource(Source):
  """Records of one text file, of which memory holds the offsets alone."""

  def __init__(self, path: PurePath, scan: Scan):
    super().__init__(path.stem, scan.index, scan.mark)
    self.left_out = scan.bad
    self._places, self._name = scan.index.where, scan.notes["name"]
    self._size = (scan.stamps[0] if scan.stamps else ranges.stamp(path))[0]
    self._file = File(path, scan.stamps[0] if scan.stamps else None)

  def _content(self, number: int) -> bytes:
    """The bytes from a record's beginning to that of the next one."""
    offset = int(self._places[number, 0])
    end = int(self._places[number + 1, 0]) if number + 1 < len(self._places) else self._size
    return self._file.read(offset, end - offset)

  @abc.abstractmethod
  def _record(self, number: int) -> Record:
    """The parsed record."""

  def _fields(self, number: int) -> dict[str, Any]:
    return self._record(number).fields

  def _read(self, number: int, modality: str) -> Path | bytes:
    return item(self._file.path, self._record(number).items[modality])

  def _identity(self, number: int, modality: str) -> str:
    value = self._record(number).items.get(modality)
    return f"{modality} {ranges.identity(item_path(self._file.path, value))}" if isinstance(value, str) else ""

  def _where(self, number: int) -> str:
    return f"{self._file.path}:{self._places[number][1]}"

  def short_where(self, row: int) -> str:
    """Where a record is in its file."""
    return f"line {self._places[self._number(row)][1]}"


class JsonlSource(LineSource):
  """Records of one file of JSON lines."""

  def __init__(self, path: PurePath, scan: Scan, columns: Mapping[str, str]):
    super().__init__(path, scan)
    self._columns = dict(columns)

  def _record(self, number: int) -> Record:
    row = _object(self._content(number).partition(b"\n")[0])
    return parse(_renamed(row, self._columns), f"{self._name}:{self._places[number][1]}")


def item(file: PurePath, value: str | bytes) -> Path | bytes:
  """A record's item: bytes, or a path relative to the record's file, which is read whole where it is far."""
  if isinstance(value, bytes):
    return value
  path = item_path(file, value)
  return files.read_bytes(path) if files.is_far(path) else path


def item_path(file: PurePath, value: str) -> PurePath:
  """The path of an item, relative to the record's file."""
  return ranges.as_path(value) if files.is_far(value) else file.parent / value


def _object(line: bytes) -> dict[str, Any]:
  """The object of a line.

  Raises:
    ValueError: if it is none.
  """
  try:
    text = line.decode("utf-8-sig")
    record = json.loads(text)
  except (ValueError, RecursionError) as error:
    parts = line.strip().startswith((b"[", b"]")) or line.strip() in (b"{", b"}", b"},")
    raise ValueError(f"not JSON ({error}){_ONE_A_LINE if parts else ''}") from error
  if not isinstance(record, dict):
    also = _ONE_A_LINE if isinstance(record, list) else ""
    raise ValueError(f"an object is needed, got {type(record).__name__}{also}")
  refuse_repeated(text, record)
  return record


def _fast(line: bytes) -> dict[str, Any]:
  """`_object`, of a line that is nothing but an object at once."""
  try:
    text = line.decode()
    record, end = _scan_once(text, 0)
  except (ValueError, StopIteration, RecursionError):
    return _object(line)
  if type(record) is not dict or text[end:] not in ("\n", "", "\r\n"):
    return _object(line)
  refuse_repeated(text, record)
  return record


def _renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
  if not columns:
    return row
  keys = renamed({key: column for key, column in columns.items() if column in row}, row, "")
  return {keys[key]: value for key, value in row.items()}


def open_files(
  paths: Sequence[PurePath], *, cache: Path | None = None, max_bad_records: int = 0,
  columns: Names | None = None,
) -> list[Source]:  # fmt: skip
  """The records of each file; each line is parsed once, and none is kept.

  Args:
    paths: the files.
    cache: folder of kept indices.
    max_bad_records: of all files together.
    columns: key -> what the files call it.

  Raises:
    ValueError: naming file and line, for the first line that is no record if there are more than `max_bad_records`; for
      two records of one id.
    OSError: if a file cannot be read.
  """
  bad, columns = Bad(max_bad_records), columns or {}
  renamed(columns, columns.values(), "")
  scan = lambda path, name: scanned([path], lambda bad: _scan(path, name, bad, columns), bad, revision="jsonl-2",
                                    options={"columns": dict(columns), "name": name}, cache=cache)  # fmt: skip
  return [JsonlSource(path, scan(path, name), columns) for path, name in zip(paths, short_names(paths))]


def _scan(path: PurePath, name: str, bad: Bad, columns: Mapping[str, str]) -> Scan:
  builder, further, offset, number = IndexBuilder(), {}, 0, 0
  with ranges.open_binary(path) as file:
    for lines in ranges.groups_of_lines(file, str(path), _CHUNK):
      starts = offset + np.cumsum([0, *map(len, lines)])
      rows, places, wrong = [], [], []
      for at, line in enumerate(lines):
        try:
          rows.append(_renamed(_fast(line), columns))
          places.append(at)
        except ValueError as error:
          if line.strip():
            wrong.append((at, str(error)))
      where = np.stack([starts[places], number + 1 + np.array(places, np.int64)], 1)
      default_id = lambda at, number=number, places=places: f"{name}:{number + 1 + places[at]}"
      unfit, keys = add_rows(builder, rows, default_id, where, paths=True)
      further |= dict.fromkeys(keys)
      for at, message in sorted(wrong + [(places[row], message) for row, message in unfit.items()]):
        bad.add(f"{path}:{number + 1 + at}: {message}")
      offset, number = int(starts[-1]), number + len(lines)
  scan = Scan(builder.build(), further=tuple(further), notes={"name": name})
  unlike(JsonlSource(path, scan, columns))
  return scan


def unlike(source: LineSource) -> None:
  """Raises a ValueError that names both, if two records of one file have one id."""
  if pair := twice(source.index):
    first, second = pair
    name = source.fields(second)["id"]
    raise ValueError(f"{source.where(second)}: id {name!r} is there twice, first in {source.short_where(first)}")

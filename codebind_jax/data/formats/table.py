"""Tables in text, CSV and TSV: the first line names the columns, paths are relative to the file."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from codebind_jax.data import ranges
from codebind_jax.data.formats.jsonl import LineSource, unlike
from codebind_jax.data.formats.record import (
  Encoding,
  Letter,
  Names,
  Record,
  add_rows,
  known_keys,
  parse,
  renamed,
  short_names,
)
from codebind_jax.data.index import IndexBuilder
from codebind_jax.data.index_cache import Bad, Scan, scanned
from codebind_jax.data.records import Source

ENDINGS = (".csv", ".tsv")
_SEPARATORS = (",", "\t", ";", "|")
_CHUNK = 1024  # records added together
_ABSENT = frozenset(("", "nan", "NaN", "<NA>", "null", "NULL", "None", "#N/A", "N/A"))
_NAMES = {"id", "label"}
_FLOAT = re.compile(r"-?\d+\.0")


class _Lines:
  """Lines of a file as text, that counts the bytes it has given: csv takes no more of them than a record has."""

  def __init__(self, lines: Iterable[bytes], encoding: str, name: str):
    self._lines, self._encoding, self._name = iter(lines), encoding, name
    self.bytes, self.number = 0, 0

  def __iter__(self) -> Iterator[str]:
    return self

  def __next__(self) -> str:
    line = next(self._lines)
    first, self.bytes, self.number = not self.number, self.bytes + len(line), self.number + 1
    try:
      text = line.decode(self._encoding)
    except UnicodeDecodeError as error:
      raise UnicodeError(
        f"{self._name}:{self.number}: not {self._encoding} ({error.reason}, byte 0x{line[error.start]:02x}); name the "
        "file's encoding, such as encoding='latin-1' or 'cp1252'"
      ) from error
    return text.removeprefix("\ufeff") if first else text


class TableSource(LineSource):
  """Records of one table."""

  def __init__(self, path: PurePath, scan: Scan, encoding: str, quote: str):
    super().__init__(path, scan)
    self._keys, self._separator = tuple(scan.notes["keys"]), scan.notes["separator"]
    self._encoding, self._quote = encoding, quote

  def _record(self, number: int) -> Record:
    lines = io.StringIO(self._content(number).decode(self._encoding), newline="\n")  # no line ends at U+2028
    cells = next(_reader(lines, self._separator, self._quote))
    return parse(_row(self._keys, cells), f"{self._name}:{self._places[number, 1]}")


def _reader(lines: Iterable[str], separator: str, quote: str) -> Any:
  if quote:
    return csv.reader(lines, delimiter=separator, quotechar=quote, strict=True)
  return csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE)


def _row(keys: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
  """Keys and values of a record; an empty cell is an absent key, and so is what pandas writes for one.

  Whole numbers that pandas made floats, because others of the column are absent (7.0), are whole numbers again.
  """
  if len(cells) != len(keys):
    raise ValueError(f"{len(cells)} cells, where the first line names {len(keys)} columns")
  values = {key: cell for key, cell in zip(keys, cells) if cell not in _ABSENT and key}
  for key in _NAMES & values.keys():
    if _FLOAT.fullmatch(values[key]):
      values[key] = values[key].removesuffix(".0")
  return values


def open_files(
  paths: Sequence[PurePath], *, cache: Path | None = None, max_bad_records: int = 0,
  columns: Names | None = None, separator: Letter = "", encoding: Encoding = "utf-8", quote: Letter = '"',
) -> list[Source]:  # fmt: skip
  """The records of each table; memory holds their offsets alone.

  Args:
    paths: the files.
    cache: folder of kept indices.
    max_bad_records: of all files together.
    columns: key -> name of its column, for those that are called otherwise.
    separator: between cells; a tab in .tsv, else the one of `, ; |` and tab that gives most columns, unless given.
    encoding: encoding of the text.
    quote: around cells with separators or newlines, doubled inside; "" where quotes are nothing but letters.

  Raises:
    ValueError: naming file and line: for an option that cannot be, a text of another encoding, a first line that names
      no columns, a column that is not there, two records of one id; for bad records, if there are more than
      `max_bad_records`.
    OSError: if a file cannot be read.
  """
  if len(separator) > 1 or separator == "\n":
    raise ValueError(f"separator: got {separator!r}, allowed: one letter, or '' to find it")
  if len(quote) > 1:
    raise ValueError(f"quote: got {quote!r}, allowed: one letter, or '' for none")
  try:
    if "\n".encode(encoding) != b"\n":
      raise LookupError("newlines of several bytes")
  except LookupError as error:
    raise ValueError(f"encoding: got {encoding!r} ({error}); allowed: utf-8, latin-1, cp1252, ... but not utf-16, "
                     "whose lines cannot be told apart: convert the file") from error  # fmt: skip
  bad, options = Bad(max_bad_records), {"columns": dict(columns or {}), "separator": separator, "encoding": encoding,
                                        "quote": quote}  # fmt: skip
  scan = lambda path, name: scanned([path], lambda bad: _scan(path, name, bad, **options), bad, revision="table-2",
                                    options=options | {"name": name}, cache=cache)  # fmt: skip
  return [TableSource(path, scan(path, name), encoding, quote) for path, name in zip(paths, short_names(paths))]


def _scan(
  path: PurePath, name: str, bad: Bad, columns: Mapping[str, str], separator: str, encoding: str, quote: str
) -> Scan:
  builder, further = IndexBuilder(), {}
  with ranges.open_binary(path) as file:
    lines = _Lines(ranges.lines(file, str(path)), encoding, str(path))
    keys, separator = _header(lines, path, columns, separator, quote)
    rows: list[dict[str, Any]] = []
    where: list[tuple[int, int]] = []

    def flush() -> None:
      places = np.array(where, np.int64).reshape(-1, 2)
      unfit, others = add_rows(builder, rows, lambda at: f"{name}:{where[at][1]}", places, paths=True)
      further.update(dict.fromkeys(others))
      for at, message in unfit.items():
        bad.add(f"{path}:{where[at][1]}: {message}")
      rows.clear(), where.clear()

    reader = _reader(lines, separator, quote)
    while True:
      begin = (lines.bytes, lines.number + 1)
      try:
        if (cells := next(reader, None)) is None:
          break
        if cells:
          rows.append(_row(keys, cells))
          where.append(begin)
      except (csv.Error, ValueError) as error:
        if isinstance(error, UnicodeError):
          raise ValueError(str(error)) from error
        flush()
        hint = f"; is a quote left open? (quote='' takes {quote} as a letter)" if isinstance(error, csv.Error) else ""
        bad.add(f"{path}:{begin[1]}: {error}{hint}")
      if len(rows) == _CHUNK:
        flush()
    flush()
  notes = {"name": name, "keys": keys, "separator": separator}
  scan = Scan(builder.build(), further=tuple(further), notes=notes)
  unlike(TableSource(path, scan, encoding, quote))
  return scan


def _header(
  lines: _Lines, path: PurePath, columns: Mapping[str, str], separator: str, quote: str
) -> tuple[list[str], str]:
  """The key of each column, and the separator."""
  try:
    line = next(lines, "")
  except UnicodeError as error:
    raise ValueError(str(error)) from error
  while line.endswith("\n") and not line.strip():
    line = next(lines, "")
  if not line:
    raise ValueError(f"{path}: empty; the first line must name the columns")
  line = line.rstrip("\r\n")
  try:
    if not separator:
      count = {one: len(next(_reader([line], one, ""))) for one in _SEPARATORS}
      separator = "\t" if path.name.lower().endswith(".tsv") else max(_SEPARATORS, key=count.__getitem__)
    names = [name.strip() for name in next(_reader([line], separator, quote))]
  except csv.Error as error:
    raise ValueError(f"{path}:{lines.number}: {error}; the first line must name the columns") from error
  if twice := [name for name in names if name and names.count(name) > 1]:
    raise ValueError(f"{path}:{lines.number}: column {twice[0]!r} is there twice")
  keys = renamed(columns, names, str(path))
  useful = set(known_keys()) - {"id", "label", "split"}
  if not useful & set(keys.values()):
    raise ValueError(
      f"{path}:{lines.number}: the first line must name the columns, one of {', '.join(sorted(useful))} at least, or "
      f"say what is what by columns={{'text': ...}}; got {', '.join(names)[:200]!r} (separator {separator!r})"
    )
  return [keys[name] for name in names], separator

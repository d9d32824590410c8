"""A Hugging Face dataset folder: Parquet files named by split, `save_to_disk`, or media beside `metadata.csv`."""

from __future__ import annotations

import bisect
import copy
import csv
import dataclasses
import itertools
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from codebind_jax import files as file_system
from codebind_jax.data import ranges
from codebind_jax.data.formats import columns as arrow
from codebind_jax.data.formats import jsonl, parquet, table
from codebind_jax.data.formats.columns import Columns
from codebind_jax.data.formats.record import BY_ENDING, FILE_SPLITS, Names, known_splits
from codebind_jax.data.index import SPLITS, IndexBuilder, twice
from codebind_jax.data.index_cache import Bad, Scan, scanned
from codebind_jax.data.reading import arrow_errors
from codebind_jax.data.records import Source
from codebind_jax.files import check_form, from_json, read_json

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SHARD = re.compile(r"(?P<split>[\w.]+?)(-\d{5}-of-\d{5}(-[0-9a-f]+)?)?\.parquet")


def takes(path: PurePath) -> bool:
  """Whether a path is such a folder."""
  if str(path).startswith("tfds:") or not path.is_dir():
    return False
  marks = ("dataset_dict.json", "state.json", *_METADATA)
  return any((path / mark).exists() for mark in marks) or bool(_metadata(path)) or any(_shards(path))


def open_files(
  paths: Sequence[PurePath], *, cache: Path | None = None, max_bad_records: int = 0,
  columns: Names | None = None,
) -> list[Source]:  # fmt: skip
  """The records of each folder; a record's split is that of its file's name or folder, unless the record names one.

  Class numbers become names where the schema knows them.

  Args:
    paths: the folders.
    cache: folder of kept indices.
    max_bad_records: of all files of a folder.
    columns: key -> column, for those that are called otherwise.

  Raises:
    ValueError: naming file and what is wrong, as the formats of the files do; for a folder of several configurations.
    OSError: if a file cannot be read.
  """
  options = {"cache": cache, "max_bad_records": max_bad_records, "columns": dict(columns or {})}
  return [source for path in paths for source in _open(path, options)]


def _open(folder: PurePath, options: Mapping[str, Any]) -> list[Source]:
  if (folder / "dataset_dict.json").exists():
    names = _json(folder / "dataset_dict.json").get("splits", [])
    check_form(names, [str], folder / "dataset_dict.json")
    _refuse_elsewhere(names, folder / "dataset_dict.json")
    bad = Bad(options["max_bad_records"])
    taken = itertools.compress(names, known_splits(names, str(folder)))
    return [_saved(folder / name, name, bad, options) for name in taken]
  if (folder / "state.json").exists():
    split = _json(folder / "state.json").get("_split") or folder.name
    check_form(split, str, folder / "state.json")
    return [_saved(folder, split, Bad(options["max_bad_records"]), options)]
  if described := _metadata(folder):
    return _described(described, folder, options)
  shards = _shards(folder)
  if len({path.parent for path in shards if path.parent.name not in ("data", *FILE_SPLITS)}) > 1:
    names = ", ".join(sorted({path.parent.name for path in shards}))
    raise ValueError(f"{folder}: Parquet files of several configurations: {names}; name the folder of one of them")
  splits = [_split_of(path) for path in shards]
  shards = list(itertools.compress(shards, known_splits(splits, str(folder))))
  return [_in_split(part, _split_of(path)) for part, path in zip(parquet.open_files(shards, **options), shards)]


def _json(path: PurePath) -> dict[str, Any]:
  content = read_json(path)
  check_form(content, {}, path)
  return content


def _refuse_elsewhere(names: Sequence[str], path: PurePath) -> None:
  """Raises a ValueError for a name of a file or folder that does not lie beside the file that names it."""
  for name in names:
    if not re.fullmatch(r"[^/\\\0\ud800-\udfff]{1,200}", name) or name in (".", ".."):
      raise ValueError(f"{path}: names {name!a:.80}; allowed: names of what lies beside it")


def _metadata(folder: PurePath) -> list[PurePath]:
  """Metadata files in a folder or in its folders of splits."""
  places = [folder, *(folder / name for name in sorted(FILE_SPLITS))]
  return [place / name for place in places for name in _METADATA if (place / name).exists()]


def _shards(folder: PurePath) -> list[PurePath]:
  """Parquet files in a folder, in its `data`, or one folder deeper."""
  return sorted({*folder.glob("*.parquet"), *folder.glob("*/*.parquet")}, key=str)


def _split_of(path: PurePath) -> str:
  """Split of a Parquet file, by its name or else its folder's."""
  name = _SHARD.fullmatch(path.name)
  words = (name["split"] if name else path.stem, path.parent.name)
  return next((word for word in words if word in FILE_SPLITS), words[0])


def _in_split(source: Source, split: str) -> Source:
  """The same records, in a split, if it is a known one, unless they name their own."""
  if split not in FILE_SPLITS or (source.index.split >= 0).any():
    return source
  split = FILE_SPLITS[split]
  part = copy.copy(source)
  part.index = dataclasses.replace(source.index, split=np.full(len(source), SPLITS.index(split), np.int8))
  return part


def _described(paths: Sequence[PurePath], folder: PurePath, options: Mapping[str, Any]) -> list[Source]:
  """Records of metadata files, whose `file_name` is an item of the modality that its ending says."""
  if len({path.suffix for path in paths}) > 1:
    raise ValueError(f"{folder}: {paths[0].name} and {paths[-1].name} are both there; one kind of metadata is needed")
  columns = dict(options["columns"])
  if "file_name" not in columns.values():
    first = _first(paths[0])
    if "file_name" not in first:
      raise ValueError(f"{paths[0]}: no column 'file_name'; it has {', '.join(first)}")
    ending = first["file_name"].rpartition(".")[2].lower()
    if ending not in BY_ENDING:
      name = first["file_name"]
      raise ValueError(f"{paths[0]}: file_name {name!r}: unknown ending; allowed: {', '.join(BY_ENDING)}; or "
                       " say what it is by columns={'depth': 'file_name'}")  # fmt: skip
    columns[BY_ENDING[ending]] = "file_name"
  module = {".jsonl": jsonl, ".csv": table, ".parquet": parquet}[paths[0].suffix]
  parts = module.open_files(paths, **dict(options) | {"columns": columns})
  splits = (path.parent.name if path.parent != folder else "" for path in paths)
  return [_in_split(part, split) for part, split in zip(parts, splits)]


def _first(path: PurePath) -> dict[str, str]:
  """Columns of a metadata file -> their values in the first record, as strings."""
  if path.suffix == ".parquet":
    with parquet.opened(path) as file, arrow_errors(f"{path}: not a readable Parquet file"):
      names = file.schema_arrow.names
      rows = next(file.iter_batches(1, columns=["file_name"]), None) if "file_name" in names else None
      return dict.fromkeys(names, "") | ({"file_name": str(rows[0][0])} if rows else {})
  with ranges.open_binary(path) as file:
    lines = (line.decode("utf-8-sig") for line in ranges.lines(file, str(path)))
    try:
      row = from_json(next(lines, "{}"), f"{path}:1") if path.suffix == ".jsonl" else next(csv.DictReader(lines), {})
    except (UnicodeDecodeError, csv.Error) as error:
      raise ValueError(f"{path}: not readable ({error})") from error
    check_form(row, {}, f"{path}:1")
  return {str(key): str(value) for key, value in row.items()}


class SavedSource(parquet.ColumnsSource):
  """Records of Arrow files that `save_to_disk` wrote, by memory map."""

  def __init__(self, folder: PurePath, scan: Scan, files: Sequence[PurePath]):
    columns = scan.notes["columns"]
    super().__init__(folder / "-", scan, Columns(**columns | {"aside": tuple(columns["aside"])}))
    self.name, self._folder, self._files = folder.name, folder, tuple(files)
    self._opened: list[Any] | None = None
    self._lock: Any = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    return super().__getstate__() | {"_opened": None, "_lock": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    super().__setstate__(state)
    self._lock = threading.Lock()

  def _row(self, number: int) -> int:
    return int(self._places[number, 0])

  def _value(self, number: int, names: tuple[str, ...]) -> Any:
    with self._lock:
      if self._opened is None:
        for path, then in zip(self._files, self._stamps):
          if ranges.stamp(path) != then:
            raise ranges.ChangedError(f"{path}: has changed since it was indexed; start again")
        self._opened = [_batches(self._files)]
        self._opened.append(np.cumsum([0, *(batch.num_rows for batch in self._opened[0])]).tolist())
      batches, starts = self._opened
    at = bisect.bisect_right(starts, self._row(number)) - 1
    return batches[at].slice(self._row(number) - starts[at], 1).select(list(names))

  def close(self) -> None:
    """See `Source.close`."""
    with self._lock:
      self._opened = None

  def _where(self, number: int) -> str:
    return f"{self._folder}: row {self._row(number)}"


def _batches(files: Sequence[PurePath]) -> list[Any]:
  """Record batches of files in Arrow's stream format; those of local files are not read but mapped."""
  import pyarrow as pa

  batches = []
  for path in files:
    try:
      far = file_system.is_far(path)
      source = pa.BufferReader(file_system.read_bytes(path)) if far else pa.memory_map(str(path), "r")
      for batch in pa.ipc.open_stream(source):
        batch.validate(full=True)  # lengths, offsets and UTF-8, which Arrow believes otherwise
        batches.append(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
      raise ValueError(f"{path}: not a readable Arrow file ({error})") from error
  return batches


def _saved(folder: PurePath, split: str, bad: Bad, options: Mapping[str, Any]) -> Source:
  parts = _json(folder / "state.json").get("_data_files") or []
  check_form(parts, [{"filename": str}], folder / "state.json")
  names = [file["filename"] for file in parts]
  if not names:
    raise ValueError(f"{folder / 'state.json'}: names no files")
  _refuse_elsewhere(names, folder / "state.json")
  files = [folder / name for name in names]
  if lost := [file for file in files if not file.exists()]:
    raise ValueError(f"{folder / 'state.json'}: names {lost[0].name!r}, which is not there")
  columns = options["columns"]
  scan = scanned(files, lambda bad: _scan_saved(folder, files, bad, columns), bad, revision="saved-1",
                 options={"columns": columns}, cache=options["cache"])  # fmt: skip
  return _in_split(SavedSource(folder, scan, files), split)


def _scan_saved(folder: PurePath, files: Sequence[PurePath], bad: Bad, columns: Mapping[str, str]) -> Scan:
  builder, further, start = IndexBuilder(), {}, 0
  batches = _batches(files)
  if not batches:
    return Scan(builder.build(), notes={"name": folder.name, "columns": dataclasses.asdict(Columns({}, {}, {}, ()))})
  with arrow_errors(f"{folder}: not a readable Arrow file"):
    found = arrow.columns_of(batches[0].schema, columns, str(folder))
  for batch in batches:
    fields = batch.select(list(found.fields))
    there = {modality: arrow.filled(batch.column(column)) for modality, column in found.items.items()}
    rows = np.arange(start, start + batch.num_rows, dtype=np.int64)
    where = np.stack([rows, np.zeros_like(rows)], 1)
    further |= arrow.add_table(builder, bad, fields, there, found, folder, folder.name, start, where)
    start += batch.num_rows
  notes = {"name": folder.name, "columns": dataclasses.asdict(found)}
  scan = Scan(builder.build(), further=(*further, *found.aside), notes=notes)
  source = SavedSource(folder, scan, files)
  if pair := twice(scan.index):
    a, b = (source._row(number) for number in pair)
    raise ValueError(f"{folder}: id {source.fields(pair[1])['id']!r} is there twice: row {a} and row {b}")
  return scan

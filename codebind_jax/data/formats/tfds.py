"""`tfds:NAME`: a data set that TensorFlow Datasets has prepared as ArrayRecord; nothing is downloaded.

Pictures stay encoded; sounds and films need TensorFlow, as that library reads them.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from codebind_jax.data import ranges
from codebind_jax.data.formats.record import (
  SPLIT_NAMES,
  TEXT,
  Names,
  add_rows,
  known_splits,
  modality_keys,
  parse,
  renamed,
)
from codebind_jax.data.index import IndexBuilder
from codebind_jax.data.index_cache import Bad, Scan, scanned
from codebind_jax.data.reading import file_errors
from codebind_jax.data.records import Source
from codebind_jax.data.transforms import audio
from codebind_jax.files import from_json
from codebind_jax.schema import Place

_CHUNK = 256  # records added together


class TfdsSource(Source):
  """Records of one split of a data set."""

  def __init__(self, folder: str, split: str, columns: Mapping[str, str], scan: Scan):
    super().__init__(scan.notes["name"], scan.index, scan.mark)
    self.left_out = scan.bad
    self._folder, self._split, self._columns = folder, split, dict(columns)
    self._places, self._stamps, self._paths = scan.index.where, scan.stamps, tuple(scan.notes["paths"])
    self._opened: Any = None
    self._lock: Any = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    return super().__getstate__() | {"_opened": None, "_lock": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    super().__setstate__(state)
    self._lock = threading.Lock()

  def _example(self, number: int) -> tuple[dict[str, Any], Any]:
    """Keys and raw values of a record, and the set's features by key."""
    with self._lock:
      if self._opened is None:
        for path, then in zip(self._paths, self._stamps):
          if ranges.stamp(ranges.as_path(path)) != then:
            raise ranges.ChangedError(f"{path}: has changed since it was indexed; start again")
        self._opened = _Split(_builder(self._folder, ""), self._split, self._columns)
      opened = self._opened
    return opened.example(int(self._places[number, 0])), opened.features

  def close(self) -> None:
    """See `Source.close`."""
    with self._lock:
      self._opened = None

  def _fields(self, number: int) -> dict[str, Any]:
    example, features = self._example(number)
    return parse(_row(example, features), f"{self.name}:{self._places[number, 0]}").fields

  def _read(self, number: int, modality: str) -> bytes | np.ndarray:
    example, features = self._example(number)
    value = example[modality]
    if isinstance(value, bytes):
      return value
    rate = getattr(features[modality], "sample_rate", None) if modality == "audio" else None
    value = np.asarray(value)
    if rate is None or rate == audio.RATE and value.dtype in (np.int16, np.float32):
      return value
    samples = value / np.float32(32768.0) if np.issubdtype(value.dtype, np.integer) else value
    return audio.resample(samples.astype(np.float32), rate, audio.RATE, self._where(number))

  def _where(self, number: int) -> str:
    return f"tfds:{self.name}: record {self._places[number, 0]}"


class _Split:
  """A split's examples by key, pictures encoded."""

  def __init__(self, builder: Any, split: str, columns: Mapping[str, str]):
    import tensorflow_datasets as tfds

    self._name = f"tfds:{builder.data_path}"
    with file_errors(self._name, _WHAT):
      features = dict(builder.info.features)
    self._keys = renamed(columns, features, f"tfds:{builder.info.name}")
    self.features = {self._keys[name]: feature for name, feature in features.items()}
    pictures = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
    encoded = {name: tfds.decode.SkipDecoding() for name in pictures}
    try:
      with file_errors(self._name, _WHAT):
        self._source = builder.as_data_source(split=split, decoders=encoded)
        self._size = len(self._source)
    except NotImplementedError as error:
      raise ValueError(f"tfds:{builder.info.name}: is not prepared for random access; {_HOW}") from error

  def __len__(self) -> int:
    return self._size

  def example(self, number: int) -> dict[str, Any]:
    with file_errors(f"{self._name}: record {number}", "readable"):
      found = self._source[number]
    return {self._keys[name]: value for name, value in found.items()}


_WHAT = "a readable set of TensorFlow Datasets"
_HOW = "prepare it with file_format='array_record' (tfds build NAME --file_format=array_record)"


def _builder(name: str, root: str) -> Any:
  """The builder of a data set's name, or of its folder."""
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise ImportError(f"tfds:{name}: needs the package tensorflow-datasets") from error
  try:
    if (folder := ranges.as_path(name)) and (folder / "dataset_info.json").exists():
      _check_features(folder)
      with file_errors(f"tfds:{name}", _WHAT):
        return tfds.builder_from_directory(name)
    builder = tfds.builder(name, **({"data_dir": root} if root else {}))
  except ModuleNotFoundError as error:
    raise ImportError(f"tfds:{name}: {error}; TensorFlow Datasets needs it for this set's features") from error
  except (ValueError, AssertionError, KeyError, FileNotFoundError) as error:
    raise ValueError(f"tfds:{name}: {str(error.args[0] if error.args else error).splitlines()[0]}") from error
  if not (builder.data_path / "dataset_info.json").exists():
    raise ValueError(f"tfds:{name}: is not prepared in {builder.data_path.parent}; {_HOW}, or say where it is by root=")
  return builder


def _check_features(folder: PurePath) -> None:
  """Raises a ValueError for a description with features outside of TensorFlow Datasets, which imports their modules."""
  path = folder / "features.json"
  if not path.exists():
    return
  for name in _class_names(from_json(path.read_bytes(), path)):
    if not re.fullmatch(r"tensorflow_datasets(\.\w+)+", name, re.ASCII):
      raise ValueError(f"{path}: has a feature {name!a:.80}; allowed: those of tensorflow_datasets")


def _class_names(tree: Any) -> Iterator[str]:
  """The names of Python classes in a description."""
  waiting = [tree]
  while waiting:
    one = waiting.pop()
    if isinstance(one, dict):
      for key, value in one.items():
        if key in ("pythonClassName", "python_class_name", "type") and isinstance(value, str) and "." in value:
          yield value
      waiting += one.values()
    elif isinstance(one, list):
      waiting += one


def _row(example: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
  """Keys and values of a record, as `record.parse` takes them; its items are not given, only named."""
  row: dict[str, Any] = {}
  for key, value in example.items():
    if key in modality_keys():
      row[key] = "there"
    elif hasattr(features.get(key), "int2str") and getattr(features[key], "names", None):
      row[key] = None if value is None or value < 0 else features[key].int2str(int(value))
    else:
      row[key] = _plain(value)
  if all(isinstance(row.get(key), str) and not row[key].strip() for key in TEXT if key in row):
    row = {key: value for key, value in row.items() if key not in TEXT}
  return row


def _plain(value: Any) -> Any:
  if isinstance(value, bytes):
    return value.decode("utf-8", "replace")
  if isinstance(value, np.ndarray | list | tuple):
    return [_plain(one) for one in value]
  return value.item() if isinstance(value, np.generic) else value


def takes(path: PurePath) -> bool:
  """Whether a path is the name of such a set."""
  return str(path).startswith("tfds:")


def open_files(
  paths: Sequence[PurePath], *, cache: Path | None = None, max_bad_records: int = 0,
  columns: Names | None = None, root: Place = "",
) -> list[Source]:  # fmt: skip
  """The records of train, validation and test of each set, or of all splits of one that has none of these.

  Args:
    paths: `tfds:NAME`, as `tfds.builder` takes the name, or `tfds:FOLDER` of a prepared version.
    cache: folder of kept indices.
    max_bad_records: of all splits together.
    columns: key -> feature, for those that are called otherwise.
    root: folder of prepared sets; tfds's own unless given.

  Raises:
    ValueError: for an unknown or unprepared set, a feature that is not there, or a set without a modality; for bad
      records, if there are more than `max_bad_records`.
    ImportError: if tensorflow-datasets is not installed, or needs TensorFlow for the features.
  """
  bad, columns, sources = Bad(max_bad_records), dict(columns or {}), []
  for path in paths:
    builder = _builder(str(path).removeprefix("tfds:"), root)
    folder = str(builder.data_path)
    with file_errors(str(path), _WHAT):
      splits = {name: info.filepaths for name, info in builder.info.splits.items()}
    for split in itertools.compress(splits, known_splits(list(splits), str(path))):
      files = [ranges.as_path(str(file)) for file in splits[split]]
      with file_errors(str(path), _WHAT):  # of a name that no file has
        lost = [file for file in files if not file.exists()]
      if lost:
        raise ValueError(f"{path}: {lost[0]} is missing; {_HOW}")
      options = {"columns": columns, "split": split}
      make = lambda bad, builder=builder, split=split, files=files: _scan(builder, split, files, columns, bad)
      scan = scanned(files, make, bad, revision="tfds-1", options=options, cache=cache)
      sources.append(TfdsSource(folder, split, columns, scan))
  return sources


def _scan(builder: Any, split: str, files: Sequence[PurePath], columns: Mapping[str, str], bad: Bad) -> Scan:
  builder_, name = IndexBuilder(), f"{builder.info.name}/{split}"
  examples, further = _Split(builder, split, columns), {}
  known = {*modality_keys(), *TEXT}
  if not known & set(examples.features):
    raise ValueError(f"tfds:{builder.info.name}: no feature of a modality; it has {', '.join(builder.info.features)}; "
                     "say what is what by columns={'image': ...}")  # fmt: skip
  named = {"split": SPLIT_NAMES[split]} if split in SPLIT_NAMES else {}
  for start in range(0, len(examples), _CHUNK):
    numbers = np.arange(start, min(start + _CHUNK, len(examples)))
    rows = [_row(examples.example(int(number)), examples.features) | named for number in numbers]
    where = np.stack([numbers, np.zeros_like(numbers)], 1).astype(np.int64)
    unfit, others = add_rows(builder_, rows, lambda at, start=start: f"{name}:{start + at}", where)
    further |= dict.fromkeys(others)
    for at, message in unfit.items():
      bad.add(f"tfds:{name}: record {start + at}: {message}")
  notes = {"name": name, "paths": list(map(str, files))}
  return Scan(builder_.build(), further=tuple(further), notes=notes)

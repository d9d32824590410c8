"""Where rows come from: a packaged world, or a user's folder with a JSONL manifest.

A source is a picklable random-access sequence of rows `{"id": str, "label": str | None, <modality>: value, ...}`. An
image is uint8 [h, w, 3] RGB with transparency on white, another sensor's array what its transform's `read` gives; a
text is the list of captions the row may use, the main one first. A modality that a row lacks is an absent key.
"""

import abc
import copy
import hashlib
import json
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from absl import logging
from jaxtyping import Int

from codebind_jax.data import transforms

MODALITIES = ("image", "text", "audio", "video", "depth", "points", "thermal", "tactile", "eeg")
SPLITS = ("train", "val", "test")


def known_modalities() -> tuple[str, ...]:
  """`MODALITIES`, and any further one that has a module in `data.transforms`."""
  return (*MODALITIES, *(m for m in transforms.readable() if m not in MODALITIES))


class Source(abc.ABC):
  """Rows of one split. `rows[i]` is row i without its arrays, so that rows can be chosen without decoding."""

  def __init__(self, name: str, rows: Sequence[dict[str, Any]]):
    self.name = name
    self.rows = list(rows)

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    index = range(len(self))[index]
    held = [m for m in self.modalities if m != "text" and self.has(index, m)]
    return self.rows[index] | {modality: self.read(index, modality) for modality in held}

  @property
  def keys(self) -> list[str]:
    """Unique id of each row."""
    return [row["id"] for row in self.rows]

  @property
  @abc.abstractmethod
  def modalities(self) -> tuple[str, ...]:
    """Modalities that at least one row has."""

  def has(self, index: int, modality: str) -> bool:
    """Whether a row has a modality, without decoding it."""
    return modality in self.rows[index]

  @abc.abstractmethod
  def content_hash(self, index: int, modality: str) -> str:
    """Hex SHA-256 that changes when what a row holds of a modality changes."""

  @abc.abstractmethod
  def read(self, index: int, modality: str) -> np.ndarray:
    """A row's array of one modality (not text), decoded."""

  def select(self, indices: Iterable[int] | Int[np.ndarray, "n"]) -> "Source":
    """The rows at `indices`, in that order, as a source of its own.

    Raises:
      IndexError: if an index is out of range.
    """
    chosen = [range(len(self))[int(i)] for i in indices]
    part = copy.copy(self)
    part._choose(chosen)
    return part

  def _choose(self, chosen: list[int]) -> None:
    self.rows = [self.rows[i] for i in chosen]


class WorldSource(Source):
  """One split of a packaged world, read from its array_record files."""

  def __init__(self, folder: Path, split: str):
    from codebind_jax.data.worlds import store

    index = store.read_index(folder)
    if split not in index:
      raise ValueError(f"unknown split {split!r} of {folder}; allowed: {list(index)}")
    rows = [{("text" if k == "texts" else k): v for k, v in row.items()} for row in index[split]]
    super().__init__("/".join([*folder.parts[-3:-1], split]), rows)
    self._folder, self._split = folder, split
    self._records = np.arange(len(rows))
    manifest = (folder / "manifest.json").read_bytes()
    self._fingerprint = hashlib.sha256(manifest).hexdigest()
    self._held = tuple(json.loads(manifest).get("modalities", ("image",)))
    self._reader, self._lock = None, threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_reader": None, "_lock": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._lock = threading.Lock()

  @property
  def modalities(self) -> tuple[str, ...]:
    """Modalities of the world."""
    return (*self._held, "text")

  def has(self, index: int, modality: str) -> bool:
    """Whether the row's record holds the modality, by the world's index."""
    row = self.rows[index]
    return bool(row.get("text")) if modality == "text" else modality in row.get("has", self._held)

  def content_hash(self, index: int, modality: str) -> str:
    """From the world's manifest (package and table hashes, builder version) and the row's id: nothing is decoded."""
    return hashlib.sha256(f"{self._fingerprint}:{modality}:{self.rows[index]['id']}".encode()).hexdigest()

  def _choose(self, chosen: list[int]) -> None:
    super()._choose(chosen)
    self._records = self._records[chosen]

  def read(self, index: int, modality: str) -> np.ndarray:
    """The row's array, decoded from its record."""
    from codebind_jax.data.worlds import store

    with self._lock:
      if self._reader is None:
        self._reader = store.open_records(self._folder, self._split, self._held)
    record = self._reader[int(self._records[index])]
    if record["id"].decode() != self.rows[index]["id"]:
      raise ValueError(f"{self._folder}: record {self._records[index]} of split {self._split!r} is {record['id']!r}, "
                       f"its index says {self.rows[index]['id']!r}; remove the folder and run prepare again")
    return store.decode(modality, record[modality])


class ManifestSource(Source):
  """A user's data: a JSONL manifest beside its files. Use `open_source`, or `read_manifest` for the checks."""

  def __init__(self, manifest: Path, split: str, rows: Sequence[dict[str, Any]], files: Sequence[dict[str, Path]]):
    super().__init__(f"{manifest.stem}/{split or 'all'}", rows)
    self._manifest, self._files = manifest, list(files)

  @property
  def modalities(self) -> tuple[str, ...]:
    """Modalities that at least one row has."""
    held = {"text" for row in self.rows if "text" in row} | {m for files in self._files for m in files}
    return tuple(m for m in known_modalities() if m in held)

  def has(self, index: int, modality: str) -> bool:
    """Whether the record named a file or text of the modality."""
    return modality in self._files[index] or super().has(index, modality)

  def content_hash(self, index: int, modality: str) -> str:
    """Of the file's bytes, or of the captions."""
    path = self._files[index].get(modality)
    content = path.read_bytes() if path else json.dumps(self.rows[index][modality]).encode()
    return hashlib.sha256(modality.encode() + content).hexdigest()

  def _choose(self, chosen: list[int]) -> None:
    super()._choose(chosen)
    self._files = [self._files[i] for i in chosen]

  def read(self, index: int, modality: str) -> np.ndarray:
    """The array in the file that the record names, by the modality's transform."""
    try:
      return transforms.of(modality).read(self._files[index][modality])
    except ValueError as error:
      raise ValueError(f"{self._manifest}:{self.rows[index]['line']}: {modality}: {error}") from error


def open_source(spec: Any) -> Source:
  """Opens a source.

  Args:
    spec: a mapping (dict or ConfigDict). For a packaged world: `name`, `split`, and `profile` (default "auto") and
      `data_dir` (default: see `fetch.data_dir`); the world is built if it is not there. For a manifest: `manifest` (the
      path of a .jsonl file), and `split` (default "": all records) and `max_bad_records` (default 0).

  Raises:
    ValueError: for an unknown or missing key, world, profile or split, or a bad manifest; see `read_manifest`.
  """
  options = dict(spec)
  allowed = ("name", "split", "profile", "data_dir")
  if "manifest" in options:
    allowed = ("manifest", "split", "max_bad_records")
  unknown = [key for key in options if key not in allowed]
  if unknown:
    raise ValueError(f"unknown key {unknown[0]!r} in a source; allowed: {list(allowed)}")
  if "manifest" in options:
    return read_manifest(Path(options["manifest"]), split=options.get("split") or "",
                         max_bad_records=options.get("max_bad_records", 0))
  for key in ("name", "split"):
    if not options.get(key):
      raise ValueError(f"a source needs {key!r}; got {options}")
  from codebind_jax.data.worlds import registry

  module = registry.world_module(options["name"])
  if hasattr(module, "open_split"):
    return module.open_split(registry.resolve(options["name"], options.get("profile") or "auto"), options["split"])
  folder = registry.ensure(options["name"], options.get("profile") or "auto", options.get("data_dir"))
  return WorldSource(folder, options["split"])


def modalities(source: Source) -> tuple[str, ...]:
  """Modalities that at least one row of a source has."""
  return tuple(source.modalities)


def class_names(source: Source, path: Path | None = None) -> tuple[str, ...]:
  """The labels to choose among: the lines of a text file, or the labels that occur in the source, sorted.

  Raises:
    ValueError: if there are none, or a line occurs twice, or a label of the source is not among them.
  """
  found = sorted({row["label"] for row in source.rows if row.get("label")})
  if path is None:
    if not found:
      raise ValueError(f"empty class list: no row of {source.name} has a label")
    return tuple(found)
  lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
  classes = [line for line in lines if line]
  if not classes:
    raise ValueError(f"{path}: empty class list; one class a line is needed")
  first: dict[str, int] = {}
  for number, line in enumerate(lines, 1):
    if line and first.setdefault(line, number) != number:
      raise ValueError(f"{path}:{number}: class {line!r} is there twice, first in line {first[line]}")
  strange = [label for label in found if label not in first]
  if strange:
    raise ValueError(f"{path}: label {strange[0]!r} of {source.name} is not among its {len(classes)} classes")
  return tuple(classes)


def read_manifest(manifest: Path, *, split: str = "", max_bad_records: int = 0) -> ManifestSource:
  """Reads and checks a JSONL manifest: every line is parsed and every file looked at before anything else happens.

  Each line is an object with any of the modalities (a path relative to the manifest; `text`: a string or a list of
  them, the main one first) and `id`, `label`, `split` (train, val or test). If no record of the manifest has a split,
  all of them are used whatever split is asked for, which is logged.

  Args:
    manifest: the .jsonl file.
    split: "" for all records, else train, val or test.
    max_bad_records: how many bad records are left out, each named in the log, before it is an error. If above 0,
      files are decoded whole here, not only opened.

  Raises:
    ValueError: naming file and line, for the first bad record if there are more than `max_bad_records`; or if no record
      remains.
    FileNotFoundError: if there is no such manifest.
  """
  if split and split not in SPLITS:
    raise ValueError(f"unknown split {split!r} for {manifest}; allowed: {list(SPLITS)}, or '' for all")
  rows, files, bad = [], [], []
  first: dict[str, int] = {}
  lines = manifest.read_bytes().splitlines()
  for number, line in enumerate(tqdm.tqdm(lines, desc=f"checking {manifest.name}", unit="record", disable=None), 1):
    if not line.strip():
      continue
    try:
      row, paths = parse_record(line, manifest, number)
      if first.setdefault(row["id"], number) != number:
        raise ValueError(f"id {row['id']!r} is there twice, first in line {first[row['id']]}")
      for modality, path in paths.items():
        check_file(modality, path, whole=max_bad_records > 0)
    except ValueError as error:
      bad.append(f"{manifest}:{number}: {error}")
      if len(bad) > max_bad_records:
        more = f" ({len(bad)} bad records, {max_bad_records} allowed)" if max_bad_records else ""
        raise ValueError(bad[0] + more) from error
      continue
    rows.append(row)
    files.append(paths)
  for message in bad:
    logging.warning("left out %s", message)
  if bad:
    logging.warning("%s: %d bad records left out, %d kept", manifest, len(bad), len(rows))
  if not rows:
    raise ValueError(f"{manifest}: no records")
  return ManifestSource(manifest, split, *_of_split(manifest, split, rows, files))


def _of_split(manifest: Path, split: str, rows: list, files: list) -> tuple[list, list]:
  if not split:
    return rows, files
  if not any("split" in row for row in rows):
    logging.warning("%s: no record has a split; all %d are used as %r", manifest, len(rows), split)
    return rows, files
  for row in rows:
    if "split" not in row:
      raise ValueError(f"{manifest}:{row['line']}: no split, though other records have one; allowed: {list(SPLITS)}")
  chosen = [i for i, row in enumerate(rows) if row["split"] == split]
  if not chosen:
    raise ValueError(f"{manifest}: no record of split {split!r}; it has {sorted({row['split'] for row in rows})}")
  return [rows[i] for i in chosen], [files[i] for i in chosen]


def parse_record(line: bytes, manifest: Path, number: int) -> tuple[dict[str, Any], dict[str, Path]]:
  """Line `number` of a manifest as a row without arrays, and the files to read: modality -> path.

  Raises:
    ValueError: naming what is wrong with it, or the file that is not there.
  """
  try:
    record = json.loads(line.decode("utf-8-sig"))
  except ValueError as error:
    raise ValueError(f"not JSON ({error})") from error
  if not isinstance(record, dict):
    raise ValueError(f"an object is needed, got {type(record).__name__}")
  row: dict[str, Any] = {"id": f"{manifest.name}:{number}", "label": None, "line": number}
  paths = {}
  for key, value in record.items():
    if key in ("id", "label", "split"):
      if value is None:
        continue
      row[key] = _text(key, value)
      if key == "split" and value not in SPLITS:
        raise ValueError(f"unknown split {value!r}; allowed: {list(SPLITS)}")
    elif key == "text":
      row["text"] = [_text(key, v) for v in (value if isinstance(value, list) else [value])]
      if not row["text"]:
        raise ValueError("text: an empty list")
    elif key in known_modalities():
      path = manifest.parent / _text(key, value)
      if not path.is_file():
        raise ValueError(f"{key}: no such file: {path}")
      paths[key] = path
    else:
      raise ValueError(f"unknown modality {key!r}; allowed: {list(known_modalities())}, and id, label, split")
  if not any(key in record for key in known_modalities()):
    raise ValueError(f"no modality; at least one of {list(known_modalities())} is needed")
  return row, paths


def _text(key: str, value: Any) -> str:
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f"{key}: a string that is not empty is needed, got {value!r}")
  return value


def check_file(modality: str, path: Path, *, whole: bool = False) -> None:
  """Looks at a user's file, or reads it if `whole` or where the modality has no cheaper check.

  Raises:
    ValueError: naming modality and file, if it cannot be read.
  """
  module = transforms.of(modality)
  try:
    (module.read if whole or not hasattr(module, "check") else module.check)(path)
  except ValueError as error:
    raise ValueError(f"{modality}: {error}") from error

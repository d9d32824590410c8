"""A user's data: a JSONL manifest beside its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from absl import logging

from codebind_jax.data import transforms
from codebind_jax.data.records import SPLITS, Source, known_modalities


class ManifestSource(Source):
  """Rows of a manifest. Use `open_source`, or `read_manifest`, which checks them."""

  def __init__(self, manifest: Path, split: str, rows: Sequence[dict[str, Any]], files: Sequence[dict[str, Path]]):
    super().__init__(f"{manifest.stem}/{split or 'all'}", rows)
    self._manifest, self._files = manifest, list(files)

  @property
  def modalities(self) -> tuple[str, ...]:
    """Modalities that at least one row has."""
    present = {"text" for row in self.rows if "text" in row} | {m for files in self._files for m in files}
    return tuple(m for m in known_modalities() if m in present)

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

  def item(self, index: int, modality: str) -> Path:
    """The file that the record names."""
    return self._files[index][modality]

  def read(self, index: int, modality: str) -> np.ndarray:
    """The array in the file that the record names, by the modality's transform."""
    try:
      return transforms.of(modality).read(self._files[index][modality])
    except ValueError as error:
      raise ValueError(f"{self._manifest}:{self.rows[index]['line']}: {modality}: {error}") from error


def read_manifest(manifest: Path, *, split: str = "", max_bad_records: int = 0) -> ManifestSource:
  """Reads a JSONL manifest; every line is parsed and every file checked before anything else happens.

  Each line is an object with any of the modalities (a path relative to the manifest; `text`: a string or a list of
  them, the main one first) and `id`, `label`, `split` (train, val or test). If no record of the manifest has a split,
  all of them are used as the split asked for, which is logged.

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
  """Checks the head of a user's file; reads all of it if `whole`, or where the modality has no cheaper check.

  Raises:
    ValueError: naming modality and file, if it cannot be read.
  """
  module = transforms.of(modality)
  try:
    (module.read if whole or not hasattr(module, "check") else module.check)(path)
  except ValueError as error:
    raise ValueError(f"{modality}: {error}") from error

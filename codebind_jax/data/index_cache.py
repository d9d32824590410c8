"""What one pass over large files found, kept on disk and read back by memory map."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from absl import logging

from codebind_jax import files
from codebind_jax.data import ranges
from codebind_jax.data.records import Index, known_modalities

SMALLEST = 1_000_000  # bytes of the files from which on an index is kept; a smaller one is made as fast as read
_REVISION = 1
_COLUMNS = ("has", "label", "split", "group", "where", "ids")


@dataclasses.dataclass(frozen=True)
class Scan:
  """What one pass over files found.

  Attributes:
    index: of the records.
    bad: what is wrong with those that are left out.
    further: keys that are no modality.
    columns: further arrays, of the format.
    notes: further plain values, of the format; JSON.
    stamps: size and time of each file when it was read.
  """

  index: Index
  bad: tuple[str, ...] = ()
  further: tuple[str, ...] = ()
  columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  stamps: tuple[tuple[int, int], ...] = ()


class Bad:
  """Counts the bad records of all files of a source."""

  def __init__(self, limit: int):
    self.limit, self.messages = limit, []

  def add(self, message: str) -> None:
    """Adds what is wrong with one.

    Raises:
      ValueError: with the first message, if there are more than the limit.
    """
    self.messages.append(message)
    if len(self.messages) > self.limit:
      more = f" ({len(self.messages)} bad records, {self.limit} allowed)" if self.limit else ""
      raise ValueError(self.messages[0] + more)


def scanned(
  paths: Sequence[PurePath], make: Callable[[Bad], Scan], bad: Bad, *, revision: str,
  options: Mapping[str, Any] | None = None, cache: Path | None = None,
) -> Scan:  # fmt: skip
  """What a pass over files finds: kept from the last time, or made now; bad records and further keys are logged.

  It is kept under the files' absolute paths, format and options, and made anew if a file's size or time is another. One
  that is damaged is made again; a folder that cannot be written is logged.

  Args:
    paths: the files.
    make: makes the pass; adds what is wrong to the `Bad` it gets.
    bad: of the source.
    revision: of the format, changed with what `make` gives.
    options: of the format that change what `make` gives; JSON.
    cache: folder of what is kept; None keeps nothing.

  Raises:
    ValueError: as `make` does, or for too many bad records.
    ChangedError: if a file changes during the pass.
    OSError: if a file cannot be read.
  """
  stamps = tuple(ranges.stamp(path) for path in paths)
  names = [str(path) if ranges.is_far(path) else os.path.abspath(path) for path in paths]
  key = json.dumps([names, revision, _REVISION, options or {}, known_modalities()], sort_keys=True)
  folder = None
  if cache is not None and sum(size for size, _ in stamps) >= SMALLEST:
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
  scan = _read(folder, stamps) if folder else None
  if scan is None:
    before = len(bad.messages)
    scan = dataclasses.replace(make(bad), stamps=stamps)
    scan = dataclasses.replace(scan, bad=tuple(bad.messages[before:]))
    for path, then in zip(paths, stamps):
      if ranges.stamp(path) != then:
        raise ranges.ChangedError(f"{path}: has changed while it was indexed; start again")
    if folder:
      scan = _kept(folder, scan)
  else:
    for message in scan.bad:
      bad.add(message)
  for message in scan.bad:
    logging.warning("left out %s", message)
  if scan.further:
    name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    logging.info("%s: not used, kept aside: %s", name, ", ".join(scan.further))
  return scan


def _arrays(scan: Scan) -> dict[str, np.ndarray]:
  return {name: getattr(scan.index, name) for name in _COLUMNS} | {f"_{n}": a for n, a in scan.columns.items()}


def _kept(folder: Path, scan: Scan) -> Scan:
  """Writes a scan, and gives it as it reads back: by memory map."""
  new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.new")
  try:
    new.mkdir(parents=True)
    sums = {}
    for name, column in _arrays(scan).items():
      np.save(new / f"{name}.npy", column, allow_pickle=False)
      sums[name] = zlib.crc32(np.ascontiguousarray(column))
    meta = {
      "stamps": scan.stamps, "modalities": scan.index.modalities, "labels": scan.index.labels, "bad": scan.bad,
      "further": scan.further, "notes": scan.notes, "sums": sums,
    }  # fmt: skip
    (new / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    files.replace_folder(new, folder)
  except OSError as error:
    logging.warning("the index is not kept: %s", error)
    return scan
  finally:
    shutil.rmtree(new, ignore_errors=True)
  return _read(folder, scan.stamps) or scan


def _read(folder: Path, stamps: tuple[tuple[int, int], ...]) -> Scan | None:
  """A kept scan; None if there is none of these files as they are now, or it is damaged."""
  try:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if [tuple(one) for one in meta["stamps"]] != list(stamps):
      return None
    arrays = {}
    for name, total in meta["sums"].items():
      arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
      if zlib.crc32(arrays[name]) != total:
        raise ValueError(f"{name}: another checksum")
    index = Index(tuple(meta["modalities"]), labels=tuple(meta["labels"]), **{name: arrays[name] for name in _COLUMNS})
    further = {name[1:]: array for name, array in arrays.items() if name.startswith("_")}
    return Scan(index, tuple(meta["bad"]), tuple(meta["further"]), further, meta["notes"], stamps)
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
    logging.warning("the index kept in %s is damaged and is made again: %s", folder, error)
    return None

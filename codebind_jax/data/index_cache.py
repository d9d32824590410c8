"""What one pass over large files found, kept on disk and read back by memory map."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from absl import logging

from codebind_jax import files
from codebind_jax.data import ranges
from codebind_jax.data.index import Index, known_modalities
from codebind_jax.data.paged import map_file, unmap

SMALLEST = 1_000_000  # bytes of the files from which on an index is kept; a smaller one is made as fast as read
_REVISION = 3
_FILE = "columns"
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
    mark: of the files' content, see `ranges.mark`.
  """

  index: Index
  bad: tuple[str, ...] = ()
  further: tuple[str, ...] = ()
  columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  stamps: tuple[tuple[int, int], ...] = ()
  mark: str = ""


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
  names = [str(path) if files.is_far(path) else os.path.abspath(path) for path in paths]
  key = json.dumps([names, revision, _REVISION, options or {}, known_modalities()], sort_keys=True)
  folder = None
  if cache is not None and sum(size for size, _ in stamps) >= SMALLEST:
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
  scan = _read(folder, stamps) if folder else None
  if scan is None:
    before = len(bad.messages)
    scan = dataclasses.replace(make(bad), stamps=stamps)
    mark = " ".join(ranges.mark(path) for path in paths)
    scan = dataclasses.replace(scan, bad=tuple(bad.messages[before:]), mark=mark)
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


def on_disk(index: Index, folder: Path) -> Index:
  """An index whose arrays are in a file of a folder, so that processes share them; as it was if they cannot be written.

  For what is chosen from or joined of kept indices: worker processes would get copies otherwise.
  """
  arrays = {name: getattr(index, name) for name in _COLUMNS if any(getattr(index, name).strides)}
  digest = hashlib.blake2b(digest_size=16)
  for array in arrays.values():
    digest.update(np.ascontiguousarray(array))
  path = folder / f"{digest.hexdigest()}.columns"
  try:
    layout = _layout(arrays)
    whole = path.exists() and path.stat().st_size == _size(layout)
    if whole and not all(view.tobytes() == arrays[name].tobytes() for name, view in _views(path, layout).items()):
      logging.warning("the index kept in %s is damaged and is written again", path)
      whole = False
      unmap(str(path))
    if not whole:
      folder.mkdir(parents=True, exist_ok=True)
      with files.replacing(path) as temporary:
        _write(temporary, arrays, layout)
    return dataclasses.replace(index, **_views(path, layout))
  except OSError as error:
    logging.warning("the index is not kept: %s", error)
    return index


_Layout = dict[str, tuple[int, tuple[int, ...], str]]  # array -> offset in the file, shape, type


def _layout(arrays: Mapping[str, np.ndarray]) -> _Layout:
  """Where each array is in one file: one memory map of an index, as a system allows some ten thousand of a process."""
  layout, offset = {}, 0
  for name, array in arrays.items():
    layout[name] = (offset, array.shape, array.dtype.str)
    offset += -(-array.nbytes // 64) * 64
  return layout


def _size(layout: _Layout) -> int:
  ends = (offset + int(np.prod(shape)) * np.dtype(kind).itemsize for offset, shape, kind in layout.values())
  return max(ends, default=0)


def _write(path: Path, arrays: Mapping[str, np.ndarray], layout: _Layout) -> None:
  with open(path, "wb") as file:
    for name, (offset, _, _) in layout.items():
      file.seek(offset)
      file.write(np.ascontiguousarray(arrays[name]))
    file.truncate(_size(layout))


def _views(path: Path, layout: _Layout) -> dict[str, np.ndarray]:
  """The arrays of a file."""
  if not _size(layout):
    return {name: np.zeros(shape, kind) for name, (_, shape, kind) in layout.items()}
  whole = map_file(str(path))
  if len(whole) != _size(layout):
    raise ValueError(f"{path}: {len(whole)} bytes, {_size(layout)} are needed")
  length = lambda shape, kind: int(np.prod(shape)) * np.dtype(kind).itemsize
  return {
    name: whole[offset : offset + length(shape, kind)].view(kind).reshape(shape)
    for name, (offset, shape, kind) in layout.items()
  }


def _arrays(scan: Scan) -> dict[str, np.ndarray]:
  return {name: getattr(scan.index, name) for name in _COLUMNS} | {f"_{n}": a for n, a in scan.columns.items()}


def _kept(folder: Path, scan: Scan) -> Scan:
  """Writes a scan, and gives it as it reads back: by memory map."""
  new = folder.with_name(files.temporary_name(f".{folder.name}"))
  arrays = _arrays(scan)
  layout = _layout(arrays)
  try:
    new.mkdir(parents=True)
    _write(new / _FILE, arrays, layout)
    meta = {
      "stamps": scan.stamps, "modalities": scan.index.modalities, "labels": scan.index.labels, "bad": scan.bad,
      "further": scan.further, "notes": scan.notes, "mark": scan.mark, "layout": layout,
      "sum": zlib.crc32((new / _FILE).read_bytes()),
    }  # fmt: skip
    (new / "meta.json").write_text(json.dumps(files.sealed(meta)), encoding="utf-8")
    files.replace_folder(new, folder)
  except OSError as error:
    if folder.exists() and (theirs := _read(folder, scan.stamps)):  # another process was first
      return theirs
    logging.warning("the index is not kept: %s", error)
    return scan
  finally:
    shutil.rmtree(new, ignore_errors=True)
  return _read(folder, scan.stamps) or scan


def _read(folder: Path, stamps: tuple[tuple[int, int], ...]) -> Scan | None:
  """A kept scan; None if there is none of these files as they are now, or it is damaged."""
  try:
    unmap(str(folder / _FILE))
    meta = files.read_sealed(folder / "meta.json")
    if [tuple(one) for one in meta["stamps"]] != list(stamps):
      return None
    layout = {name: (offset, tuple(shape), kind) for name, (offset, shape, kind) in meta["layout"].items()}
    arrays = _views(folder / _FILE, layout)
    if _size(layout) and zlib.crc32(map_file(str(folder / _FILE))) != meta["sum"]:
      raise ValueError("another checksum")
    index = Index(tuple(meta["modalities"]), labels=tuple(meta["labels"]), **{name: arrays[name] for name in _COLUMNS})
    further = {name[1:]: array for name, array in arrays.items() if name.startswith("_")}
    return Scan(index, tuple(meta["bad"]), tuple(meta["further"]), further, meta["notes"], stamps, meta["mark"])
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
    logging.warning("the index kept in %s is damaged and is made again: %s", folder, error)
    return None

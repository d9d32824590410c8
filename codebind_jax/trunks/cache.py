"""Disk cache of a frozen trunk's token features.

A set of features is a folder `<trunk>-<key>` with `features.npy` and `chunks.jsonl` (range and CRC-32 of every finished
chunk). It is built under the name `<trunk>-<key>.part` and renamed when complete; a killed build continues after its
finished chunks. The key is a hash of everything that decides the values.
"""

import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from absl import logging

from codebind_jax import files
from codebind_jax.trunks.base import Trunk

_FORMAT = "features-1"
_CHUNKS = "chunks.jsonl"
_ITEMS_PER_CHUNK = 256
_THREADS = 2


def content_hash(value: Any) -> str:
  """Hex SHA-256 of an item's content: a string, bytes, the file of a `Path`, or anything that numpy takes as an array.

  Raises:
    ValueError: if numpy makes an object array of it.
  """
  digest = hashlib.sha256()
  if isinstance(value, str):
    digest.update(b"text" + value.encode())
  elif isinstance(value, bytes):
    digest.update(b"bytes" + value)
  elif isinstance(value, Path):
    digest.update(b"bytes" + value.read_bytes())
  else:
    array = np.ascontiguousarray(value)
    if array.dtype == object:
      raise ValueError(f"content_hash: got {type(value).__name__}, allowed are arrays, strings, bytes and paths")
    digest.update(f"array{array.dtype.str}{array.shape}".encode())
    digest.update(array.data if array.size else b"")
  return digest.hexdigest()


def cached_features(
  trunk: Trunk,
  keys: Sequence[str],
  read: Callable[[int], Any],
  *,
  cache_dir: str | files.Path,
  views: int = 1,
  augment: Callable[[Any, np.random.Generator], Any] | None = None,
  seed: int = 0,
  batch: int = 16,
  progress: bool = True,
  hashes: Sequence[str] | None = None,
  encode: bool = True,
) -> np.memmap:
  """Tokens or prepared items of all items, read from the cache or computed into it.

  View 0 is the item itself. View v > 0 is `augment(item, rng)` with a generator that depends on `seed`, the item's key
  and v alone, so that an item has the same views in every set.

  Args:
    trunk: the frozen network.
    keys: N unique ids.
    read: index -> raw value, as `trunk.preprocess` takes it; called from several threads.
    cache_dir: folder of all feature sets. Of a far one, sets are copied to `files.cache_folder`, and computed there and
      uploaded if they lack.
    views: views per item, the clean one included.
    augment: function for the other views; its `repr` must determine what it does (as a frozen dataclass's does).
    seed: of the augmentation.
    batch: items per call of the trunk.
    progress: show a bar on stderr if that is a terminal.
    hashes: the items' content hashes; without them each item is read once more to be hashed.
    encode: if False, the items as the trunk's input, for a trunk that runs in the model.

  Returns:
    float16 tokens [N, views, T, C], or items [N, views, *shape] in the input's type; memory-mapped, read-only.

  Raises:
    ValueError: if keys repeat, counts differ, views need an `augment`, or a feature is not finite (the item is named).
  """
  keys = list(keys)
  _check(keys, views, augment, hashes)
  if hashes is None:
    hashes = [content_hash(read(index)) for index in range(len(keys))]
  recipe = {
    "format": _FORMAT, "trunk": trunk.fingerprint if encode else f"{trunk.input}",
    "views": views, "augment": repr(augment) if views > 1 else "",
    "seed": seed if views > 1 else 0, "items": [[key, str(value)] for key, value in zip(keys, hashes, strict=True)],
  }  # fmt: skip
  name = f"{trunk.name}-{hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:24]}"
  place = files.path(cache_dir) / name
  folder = files.cache_folder() / "features" / name if files.is_far(place) else place
  inner = (trunk.num_tokens, trunk.width) if encode else trunk.input.shape
  shape, dtype = (len(keys), views, *inner), np.dtype(np.float16 if encode else trunk.input.dtype)
  folder.parent.mkdir(parents=True, exist_ok=True)
  with files.lock(folder.with_name(f".{name}.lock"), f"computes the features {name}"):
    there = files.is_far(place) and files.is_file(place / _CHUNKS)
    if there and not folder.exists():
      _copy(place, folder)
    array = _open_finished(folder, shape, dtype) if folder.exists() else None
    if array is not None and (there or not files.is_far(place)):
      return array
    if array is None:
      array = _Job(trunk, keys, read, views, augment, seed, batch, progress, encode).run(folder, shape, dtype)
    if files.is_far(place):
      files.replace_folder(folder, place, last=_CHUNKS)
    return array


def _copy(place: files.Path, folder: Path) -> None:
  """Copies a far set."""
  part = folder.with_name(f"{folder.name}.copy")
  part.mkdir(exist_ok=True)
  for name in ("features.npy", _CHUNKS):
    files.download(place / name, part / name)
  os.replace(part, folder)


def _check(keys: list[str], views: int, augment: Any, hashes: Sequence[str] | None) -> None:
  if not keys:
    raise ValueError("keys: got none, at least one item is needed")
  if len(set(keys)) != len(keys):
    twice = next(key for key in keys if keys.count(key) > 1)
    raise ValueError(f"keys: {twice!r} appears more than once, keys must be unique")
  if hashes is not None and len(hashes) != len(keys):
    raise ValueError(f"hashes: got {len(hashes)} for {len(keys)} keys")
  if views < 1 or (views > 1 and augment is None):
    raise ValueError(f"views: got {views}; 1 is the clean view alone, more need `augment`")
  if views > 1 and " at 0x" in repr(augment):
    raise ValueError(f"augment: {augment!r} does not say what it does; use a frozen dataclass with __call__")


def _open_array(folder: Path, shape: tuple[int, ...], dtype: np.dtype, mode: str) -> np.memmap | None:
  """The mapped array, or None where the file is missing, damaged or of another shape."""
  try:
    array = np.load(folder / "features.npy", mmap_mode=mode)
  except (OSError, ValueError):
    return None
  return array if array.shape == shape and array.dtype == dtype else None


def _finished(folder: Path, array: np.ndarray) -> list[tuple[int, int]]:
  """Row ranges whose bytes have the recorded checksum."""
  path, good = folder / _CHUNKS, []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      record = json.loads(line)
      start, stop, crc = int(record["start"]), int(record["stop"]), int(record["crc32"])
    except (ValueError, KeyError, TypeError):
      continue
    if 0 <= start < stop <= len(array) and zlib.crc32(np.ascontiguousarray(array[start:stop]).data) == crc:
      good.append((start, stop))
  return good


def _covered(ranges: list[tuple[int, int]], rows: int) -> np.ndarray:
  mask = np.zeros(rows, bool)
  for start, stop in ranges:
    mask[start:stop] = True
  return mask


def _open_finished(folder: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap | None:
  """The array of a finished set; a damaged set is moved back to `.part`, to compute only its bad chunks again."""
  array = _open_array(folder, shape, dtype, "r")
  if array is not None and _covered(_finished(folder, array), shape[0]).all():
    logging.info("features: %s read from the cache, %d items", folder.name, shape[0])
    return array
  logging.warning("features: %s is damaged, computing its bad chunks again", folder)
  part = folder.with_name(folder.name + ".part")
  if part.exists():
    shutil.rmtree(part)
  os.replace(folder, part)
  return None


class _Job:
  """The computation of a set of features, chunk by chunk."""

  def __init__(self, trunk: Trunk, keys: list[str], read: Callable, views: int, augment: Any, seed: int, batch: int,
               progress: bool, encode: bool = True):  # fmt: skip
    self.encode = encode
    self.trunk, self.keys, self.read, self.views = trunk, keys, read, views
    self.augment, self.seed, self.batch, self.progress = augment, seed, batch, progress

  def run(self, folder: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    part = folder.with_name(folder.name + ".part")
    part.mkdir(exist_ok=True)
    array = _open_array(part, shape, dtype, "r+")
    if array is None:
      (part / _CHUNKS).unlink(missing_ok=True)
      array = np.lib.format.open_memmap(part / "features.npy", mode="w+", dtype=dtype, shape=shape)
    done = _covered(_finished(part, array), shape[0])
    self._fill(part, array, done)
    array.flush()
    del array
    os.replace(part, folder)
    return np.load(folder / "features.npy", mmap_mode="r")

  def _fill(self, part: Path, array: np.memmap, done: np.ndarray) -> None:
    step = max(1, _ITEMS_PER_CHUNK // self.views)
    missing = np.flatnonzero(~done)
    chunks = [missing[i : i + step] for i in range(0, len(missing), step)]
    items, began = len(missing) * self.views, time.perf_counter()
    label = f"{self.trunk.modality} features"
    bar = tqdm.tqdm(total=items, desc=label, unit="item", disable=None if self.progress else True)
    with bar, ThreadPoolExecutor(_THREADS) as pool, open(part / _CHUNKS, "a") as log:
      log.write("\n")
      waiting = [pool.submit(self._prepare, int(row)) for row in chunks[0]] if chunks else []
      for index, rows in enumerate(chunks):
        prepared, following = waiting, chunks[index + 1] if index + 1 < len(chunks) else []
        waiting = [pool.submit(self._prepare, int(row)) for row in following]
        values = [value for future in prepared for value in future.result()]
        array[rows] = self._embed(values, rows, bar).reshape(len(rows), *array.shape[1:])
        array.flush()
        for start, stop in _runs(rows):
          crc = zlib.crc32(np.ascontiguousarray(array[start:stop]).data)
          log.write(json.dumps({"start": start, "stop": stop, "crc32": crc}) + "\n")
        log.flush()
    seconds = time.perf_counter() - began
    logging.info(
      "features: %d %s by %s in %.1f s, %.1f a second (%d were there)",
      items, label, self.trunk.name, seconds, items / max(seconds, 1e-9), int(done.sum()) * self.views,
    )  # fmt: skip

  def _prepare(self, row: int) -> list[np.ndarray]:
    """Preprocessed views of one item."""
    value = self.read(int(row))
    prepared = [self.trunk.preprocess(value)]
    for view in range(1, self.views):
      digest = hashlib.sha256(f"{self.seed}:{view}:{self.keys[row]}".encode()).digest()
      rng = np.random.default_rng(int.from_bytes(digest[:16], "little"))
      prepared.append(self.trunk.preprocess(self.augment(value, rng)))
    return prepared

  def _embed(self, values: list[np.ndarray], rows: np.ndarray, bar: tqdm.tqdm) -> np.ndarray:
    """Tokens of a chunk, float16 [len(values), T, C]; every batch has the same number of items."""
    if not self.encode:
      bar.update(len(values))
      return np.stack(values)
    pending, out = [], []
    for start in range(0, len(values), self.batch):
      part = values[start : start + self.batch]
      padded = part + [part[-1]] * (self.batch - len(part))
      pending.append((len(part), self.trunk.compiled(self.trunk.params, self.trunk.collate(padded))))
      if len(pending) > 1:
        out.append(self._collect(*pending.pop(0), bar))
    out.extend(self._collect(*item, bar) for item in pending)
    features = np.concatenate(out)
    finite = np.isfinite(features).all(axis=(1, 2))
    if not finite.all():
      key = self.keys[rows[int(np.flatnonzero(~finite)[0]) // self.views]]
      raise ValueError(f"features: trunk {self.trunk.name!r} gave a value that is not finite in float16 for {key!r}")
    return features

  @staticmethod
  def _collect(count: int, tokens: Any, bar: tqdm.tqdm) -> np.ndarray:
    with np.errstate(over="ignore"):
      features = np.asarray(tokens)[:count].astype(np.float16)
    bar.update(count)
    return features


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
  """Half-open ranges of ascending row numbers."""
  breaks = np.flatnonzero(np.diff(rows) != 1) + 1
  return [(int(part[0]), int(part[-1]) + 1) for part in np.split(rows, breaks)]

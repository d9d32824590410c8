"""Frozen tokens, kept per item on disk: one more record computes one more item.

A trunk's folder `<name>-<fingerprint>` holds shards: an ArrayRecord file of float16 tokens, and beside it `.keys.npy`,
16 bytes an item and their checksum at the end, which is written last. Any number of processes may add shards at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Int64, UInt64

from codebind_jax import files
from codebind_jax.data.ahead import ahead
from codebind_jax.data.token_reader import TokenReader
from codebind_jax.data.units import Chosen, Strings, Units
from codebind_jax.trunks.base import Trunk

REVISION = "tokens-1"
SHARD_ITEMS = 1024  # computed items that a kill can lose
_MANY = 256  # items for each worker process, from which on they are started
_BATCH = 16  # items of a trunk's batch, a device
_SUFFIX = ".array_record"


def content_hash(value: Any) -> str:
  """Hex SHA-256 of an item's content: a string, bytes, the file of a `Path`, or anything that numpy takes as an array.

  Raises:
    ValueError: if numpy makes an object array of it.
  """
  digest = hashlib.sha256()
  if isinstance(value, str):
    digest.update(b"text" + value.encode("utf-8", "surrogatepass"))
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


def key_of(*parts: str) -> tuple[int, int]:
  """Two 64-bit numbers that stand for an item: of its content, its view, and what made the view."""
  digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()
  return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def string_keys(strings: Sequence[str]) -> UInt64[np.ndarray, "n 2"]:
  """The keys of texts."""
  return np.array([key_of(REVISION, content_hash(text)) for text in strings], np.uint64).reshape(-1, 2)


class TokenCache:
  """The cached tokens of one trunk.

  Args:
    folder: of all caches; of a far one, shards are copied to `files.cache_folder` when they are read.
    trunk: frozen.
  """

  def __init__(self, folder: files.Path, trunk: Trunk):
    self._trunk, name = trunk, f"{trunk.name}-{trunk.fingerprint[:24]}"
    self._far = folder / name if files.is_far(folder) else None
    self._folder = files.cache_folder() / "features" / name if self._far else Path(folder) / name
    self.reader = TokenReader((), trunk.num_tokens, trunk.width, self._far)
    self._keys = np.zeros((0, 2), np.uint64)
    self._places = np.zeros(0, np.int64)
    self._order = np.zeros(0, np.int64)
    self._look()

  def _look(self) -> None:
    """Adds the shards that are new in the folder."""
    known = {path.name for path in self.reader.shards}
    if self._far:
      self._folder.mkdir(parents=True, exist_ok=True)
      for path in files.children(self._far, f"*{_SUFFIX}.keys.npy"):
        copy = self._folder / path.name
        if not copy.exists() or path.name.removesuffix(".keys.npy") not in known and _read_keys(copy, None) is None:
          files.download(path, copy)
    keys, places = [self._keys], [self._places]
    for path in sorted(self._folder.glob(f"*{_SUFFIX}.keys.npy")):
      shard = path.with_name(path.name.removesuffix(".keys.npy"))
      if shard.name not in known and (own := _read_keys(path, None if self._far else shard)) is not None:
        places.append((len(self.reader.shards) << 32) + np.arange(len(own)))
        keys.append(own)
        self.reader.shards.append(shard)
    if len(keys) > 1:
      self._keys, self._places = np.concatenate(keys), np.concatenate(places)
      self._order = np.argsort(self._keys[:, 0], kind="stable")

  def places(self, keys: UInt64[np.ndarray, "n 2"]) -> Int64[np.ndarray, "n"]:
    """The places of items by their keys; -1 where one is not there."""
    out = np.full(len(keys), -1, np.int64)
    if len(self._keys) and len(keys):
      at = np.searchsorted(self._keys[:, 0], keys[:, 0], sorter=self._order)
      there = self._order[np.minimum(at, len(self._order) - 1)]
      found = (self._keys[there] == keys).all(axis=1)
      out[found] = self._places[there[found]]
    return out

  def fill(
    self, keys: UInt64[np.ndarray, "n 2"], prepared: Units, *, process: int = 0, processes: int = 1,
    wait: Callable[[str], None] = lambda name: None, workers: int = 0, threads: int = 2,
  ) -> tuple[Int64[np.ndarray, "n"], list[str]]:  # fmt: skip
    """Computes what is not there; every process a part of it, on all of its devices.

    Args:
      keys: of items; those of one `prepared` are consecutive.
      prepared: number of a unit -> its prepared items, or a ValueError; picklable.
      process: number of this process.
      processes: that call this at once, with equal arguments, on one folder.
      wait: waits for all of them, by a name.
      workers: processes that prepare; 0 for threads of this one.
      threads: threads that prepare if there are no workers.

    Returns:
      (places, -1 where an item could not be read; messages of those that this process could not read).

    Raises:
      ValueError: if a token is not finite.
      OSError: if the cache cannot be written.
    """
    views = len(keys) // max(len(prepared), 1)
    units = keys.reshape(-1, views, 2)
    wait(f"looks {self._folder.name}")
    self._look()  # all at once, so that all divide the same items
    absent = np.flatnonzero(self.places(keys) < 0)
    wanted = np.zeros(len(keys), bool)
    wanted[absent[np.unique(keys[absent], axis=0, return_index=True)[1]]] = True  # of equal items one
    wanted = wanted.reshape(-1, views)
    lacking = np.flatnonzero(wanted.any(axis=1))
    wait(f"looked {self._folder.name}")  # nobody writes before all have looked
    own, bad = lacking[process::processes], []
    if len(own):
      bad = self._compute(own, units, wanted, prepared, workers, threads)
    wait(f"filled {self._folder.name}")
    self._look()
    return self.places(keys), bad

  def strings(self, strings: Sequence[str]) -> Int64[np.ndarray, "n"]:
    """The places of texts, computed by this process where they are not there."""
    return self.fill(string_keys(strings), Strings(strings, self._trunk.input.prepare))[0]

  def _compute(
    self, own: np.ndarray, units: np.ndarray, wanted: np.ndarray, prepared: Units, workers: int, threads: int
  ) -> list[str]:
    need = int(wanted[own].sum()) * self._trunk.num_tokens * self._trunk.width * 2  # float16
    files.check_space(self._folder, need, f"the {self._trunk.modality} tokens of {len(own)} items (config.data.root or "
                      f"CODEBIND_DATA chooses the disk; config.model.towers.{self._trunk.modality}.cache=False keeps "
                      "none)")  # fmt: skip
    self._folder.mkdir(parents=True, exist_ok=True)
    files.remove_left(self._folder)
    began, label, count = time.perf_counter(), f"{self._trunk.modality} tokens", int(wanted[own].sum())
    bad, waiting = [], {}
    bar = tqdm.tqdm(total=len(own), desc=label, unit="item", disable=None)
    with bar, _Writer(self._folder, self._far) as writer:
      workers = workers if len(own) >= _MANY * workers else 0
      reading = ahead(Chosen(prepared, own), workers=workers, threads=threads, stop=len(own))
      for unit, items in zip(own, reading):
        bar.update()
        if isinstance(items, ValueError):
          bad.append(str(items))
          continue
        for key, item in itertools.compress(zip(units[unit], items, strict=True), wanted[unit]):
          # Texts of one padded length at a time, so that an item's tokens do not depend on the others of its batch.
          shape = self._trunk.collate([item]).shape
          waiting.setdefault(shape, []).append((key, item))
          if len(waiting[shape]) == self._rows:
            self._encode(waiting.pop(shape), writer)
      for rest in waiting.values():
        self._encode(rest, writer)
    seconds = time.perf_counter() - began
    logging.info("%s: %d by %s in %.1f s, %.1f a second", label, count, self._trunk.name, seconds,
                 count / max(seconds, 1e-9))  # fmt: skip
    return bad

  @property
  def _rows(self) -> int:
    return _BATCH * jax.local_device_count()

  def _encode(self, entries: list, writer: _Writer) -> None:
    """Computes and writes one batch, padded to its full number of rows."""
    items = [item for _, item in entries]
    batch = self._trunk.collate([*items, *[items[-1]] * (self._rows - len(items))])
    params = self._trunk.params
    if jax.local_device_count() > 1:
      mesh = jax.make_mesh((jax.local_device_count(),), ("rows",), axis_types=(AxisType.Auto,),
                           devices=jax.local_devices())  # fmt: skip
      batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("rows")))
      params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    with np.errstate(over="ignore"):
      tokens = np.asarray(self._trunk.compiled(params, batch))[: len(items)].astype(np.float16)
    if not np.isfinite(tokens).all():
      raise ValueError(f"tokens: trunk {self._trunk.name!r} gave a value that is not finite in float16")
    for (key, _), value in zip(entries, tokens):
      writer.add(key, value)


class _Writer:
  """Writes shards, each whole or not at all; an OSError names the folder."""

  def __init__(self, folder: Path, far: files.Path | None):
    self._folder, self._far, self._name, self._keys = folder, far, "", []
    self._part, self._file, self._failed = folder, None, False

  def add(self, key: np.ndarray, tokens: np.ndarray) -> None:
    with self._named():
      if self._file is None:
        from array_record.python import array_record_module

        self._name = f"{uuid.uuid4().hex[:16]}{_SUFFIX}"
        self._part = self._folder / files.temporary_name(f".{self._name}")
        self._file = array_record_module.ArrayRecordWriter(str(self._part), "group_size:1,uncompressed")
      for part in (tokens,) if len(tokens) == 1 else (tokens[:1], tokens[1:]):
        self._file.write(part.tobytes())
    self._keys.append(key)
    if len(self._keys) == SHARD_ITEMS:
      self.close()

  @contextlib.contextmanager
  def _named(self) -> Iterator[None]:
    try:
      yield
    except (RuntimeError, OSError) as error:  # ArrayRecord's are RuntimeErrors
      self._failed = True
      raise OSError(f"{self._folder}: tokens cannot be written ({error})") from error

  def close(self) -> None:
    if self._file is None:
      return
    with self._named():
      self._file.close()
      with files.replacing(self._folder / f"{self._name}.keys.npy") as temporary:
        content = io.BytesIO()
        np.save(content, np.array(self._keys, np.uint64))
        temporary.write_bytes(content.getvalue() + files.checksum(content.getvalue()).encode())
        os.replace(self._part, self._folder / self._name)  # before the keys, after all that may find no room
    self._file, self._keys = None, []
    for name in (self._name, f"{self._name}.keys.npy") if self._far else ():
      files.upload(self._folder / name, self._far / name)

  def __enter__(self) -> _Writer:
    return self

  def __exit__(self, kind: Any, *_: Any) -> None:
    try:
      if kind is None:
        self.close()
      elif not self._failed:  # what is computed is kept, whatever else went wrong, which is the error that counts
        with contextlib.suppress(OSError):
          self.close()
    finally:
      if self._file is not None:
        self._part.unlink(missing_ok=True)


def _read_keys(path: Path, shard: Path | None) -> np.ndarray | None:
  """The keys of a shard; None, which is logged, where they are damaged or their shard, if it is near, is not there."""
  try:
    content = path.read_bytes()
    files.verify(files.checksum(content[:-8]), content[-8:].decode(errors="replace"), "its keys")
    keys = np.load(io.BytesIO(content[:-8]), allow_pickle=False)
    if keys.ndim != 2 or keys.shape[1] != 2 or keys.dtype != np.uint64:
      raise ValueError(f"shape {keys.shape}, type {keys.dtype}; allowed: [items, 2], uint64")
    if shard and not shard.is_file():
      raise ValueError(f"there is no {shard.name}")
  except (ValueError, OSError, EOFError) as error:
    logging.warning("%s is left out: %s", path, error)
    return None
  return keys


class Contents:
  """Remembers the content hash of a file by its place, size and time, so that it is read once.

  A checksum is kept with each hash: one that is damaged is not remembered.

  Args:
    path: of the data base; a folder that cannot be written only loses the memory.
  """

  def __init__(self, path: Path):
    self._path = path

  def hashes(self, identities: Sequence[str], compute: Callable[[int], str]) -> list[str]:
    """The hash of each item.

    Args:
      identities: of each item, or "" for one that is not remembered.
      compute: number of an item -> its hash; "", which is not remembered, if it cannot be read.
    """
    try:
      return self._hashes(identities, compute)
    except (sqlite3.Error, OSError) as error:
      logging.warning("%s: content hashes are not remembered (%s)", self._path, error)
      return [compute(number) for number in range(len(identities))]

  def _hashes(self, identities: Sequence[str], compute: Callable[[int], str]) -> list[str]:
    if not any(identities):
      return [compute(number) for number in range(len(identities))]
    self._path.parent.mkdir(parents=True, exist_ok=True)
    base = sqlite3.connect(self._path, timeout=60)
    try:
      base.execute("CREATE TABLE IF NOT EXISTS contents (identity BLOB PRIMARY KEY, hash TEXT) WITHOUT ROWID")
      out: list[str] = []
      for start in range(0, len(identities), 4096):
        new = []
        for number in range(start, min(start + 4096, len(identities))):
          key = hashlib.sha256(identities[number].encode("utf-8", "surrogatepass")).digest()[:16]
          found = base.execute("SELECT hash FROM contents WHERE identity = ?", (key,)).fetchone()
          value, sum_of = "", lambda value, key=key: files.checksum(key, value.encode("utf-8", "surrogatepass"))
          if found is not None and identities[number]:
            value, _, kept = str(found[0]).partition(" ")
            value = value if kept == sum_of(value) else ""
          if not value and (value := compute(number)) and identities[number]:
            new.append((key, f"{value} {sum_of(value)}"))
          out.append(value)
        base.executemany("INSERT OR REPLACE INTO contents VALUES (?, ?)", new)
        base.commit()
      return out
    finally:
      base.close()

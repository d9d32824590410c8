"""Checkpoints at gs:// and s3://: parts that processes upload by themselves, whole once `commit.json` is there.

`STEP/part-K-of-N-HEX.bin` has the bytes of the shards that process K holds (of each array's first replica), the
`.json` beside it where each of them belongs in which array, a CRC-32 of each and one of itself. Process 0 writes
`commit.json` (position, config, fingerprint, names and sizes of the parts, and a checksum) after all parts are there:
without it a checkpoint is not one. HEX is of one start of a run, so that parts of a killed one are not taken for these.
Orbax writes to no s3://, and needs a disk that the processes share.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import math
import pathlib
import re
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from codebind_jax import files
from codebind_jax.runtime import distributed
from codebind_jax.runtime.checkpoint_files import Damaged, same_on_all

COMMIT, DAMAGED = "commit.json", "damaged.json"
FORMAT = 1
_COMMIT = {"meta": None, "empty": [str], "parts": {str: int}}
_PART = {"bytes": int, "shards": [{"path": str, "dtype": str, "shape": [int], "start": [int], "stop": [int], "at": int,
                                   "bytes": int, "crc32": int}]}  # fmt: skip
_THREADS = 16  # that read at once
_PATIENCE = 600  # looks for the parts of the other processes, a second apart


class FarCheckpoints:
  """The checkpoints in a far folder; what `checkpoint.Checkpoints` does with them, but for choosing one."""

  def __init__(self, path: files.Path, *, keep: int):
    self.path, self._keep = path, keep
    self._mark = ""
    self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    self._running: concurrent.futures.Future | None = None

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, newest first."""
    return self._with(COMMIT)

  def _with(self, file: str) -> list[int]:
    return sorted((at for at in (_of_step(name, file) for name in files.contents(self.path)) if at is not None),
                  reverse=True)  # fmt: skip

  def damaged(self) -> list[str]:
    """Names of what was set aside."""
    return [f"{step}/{DAMAGED}" for step in self._with(DAMAGED) if step not in self._with(COMMIT)]

  def agreed_steps(self) -> list[int]:
    """Those that process 0 sees."""
    self.wait()
    return same_on_all(self.steps())

  def clean(self) -> None:
    """Nothing: what a killed run has left of a checkpoint goes with the next one."""

  def save(self, step: int, state: Any, meta: Mapping[str, Any], done: Any) -> None:
    """Copies this process's shards to the host's memory, and starts to write and to upload them.

    Once all is there, process 0 calls `done`.
    """
    self.wait()
    if not self._mark:
      mark = np.frombuffer(uuid.uuid4().bytes[:4], np.uint8)
      self._mark = bytes(multihost_utils.broadcast_one_to_all(mark) if jax.process_count() > 1 else mark).hex()
    shards, empty = _copied(state)
    commit = {"format": FORMAT, "meta": dict(meta), "empty": empty}
    self._running = self._pool.submit(self._upload, step, shards, commit, done)

  def _upload(
    self, step: int, shards: list[tuple[dict[str, Any], np.ndarray]], commit: dict[str, Any], done: Any
  ) -> None:
    folder, count = self.path / str(step), jax.process_count()
    names = [f"part-{k:05d}-of-{count:05d}-{self._mark}" for k in range(count)]
    own = names[jax.process_index()]
    with files.scratch() as scratch:
      part = scratch / "part"
      _write_part(shards, part)
      shards.clear()
      files.upload(part.with_suffix(".bin"), folder / f"{own}.bin")
      files.upload(part.with_suffix(".json"), folder / f"{own}.json")
    if jax.process_index() > 0:
      return
    for _ in range(_PATIENCE):
      there = files.contents(folder)
      lacking = [name for name in names if f"{name}.json" not in there]
      if not lacking:
        break
      files.far.patience.sleep(1)
    else:
      raise TimeoutError(f"{folder}: {', '.join(lacking[:4])} of other processes did not come in {_PATIENCE} s")
    commit |= {"parts": {name: there[f"{name}.bin"].size for name in names}}
    files.write_sealed(folder / COMMIT, commit)
    done()
    self._clear(step, {f"{name}.{end}" for name in names for end in ("bin", "json")})

  def _clear(self, step: int, own: set[str]) -> None:
    """Removes what a killed run has left of this checkpoint, and all but the newest ones."""
    there = list(files.contents(self.path))
    for name in there:
      if _of_step(name) == step and name.partition("/")[2] not in own | {COMMIT}:
        files.remove(self.path / name)
    found = lambda file: sorted({at for name in there if (at := _of_step(name, file)) is not None})
    kept = {*found(COMMIT)[-self._keep :], *found(DAMAGED), step}
    for old in (at for at in found("") if at < step and at not in kept):
      files.remove_folder(self.path / str(old), first=COMMIT)

  def _commit(self, step: int) -> dict[str, Any]:
    commit = self._sealed(step, COMMIT, {"format": int})
    if commit["format"] != FORMAT:
      raise ValueError(f"{self.path / str(step)} has format {commit['format']}; allowed: {FORMAT}")
    files.check_form(commit, _COMMIT, path := self.path / str(step) / COMMIT)
    if wrong := [name for name in commit["parts"] if not re.fullmatch(r"part-\d+-of-\d+-[0-9a-f]+", name, re.ASCII)]:
      raise ValueError(f"{path}: {wrong[0]!a} is no name of a part")
    return commit

  def _sealed(self, step: int, name: str, form: Any) -> dict[str, Any]:
    """A JSON object of a form whose checksum was verified."""
    path = self.path / str(step) / name
    try:
      content = files.read_sealed(path)
    except FileNotFoundError as error:
      raise Damaged(f"{name} is missing") from error
    except ValueError as error:
      raise Damaged(str(error).replace(f"{path.parent}/", "")) from error
    files.check_form(content, form, path)
    return content

  def verify(self, step: int) -> None:
    """Raises `Damaged` unless all objects are as they were written."""
    entries = [shard for shards in self._entries(step).values() for shard in shards]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      for _ in pool.map(lambda shard: self._read(step, shard) is None, entries):
        pass

  def verify_part(self, step: int) -> None:
    """What each process opens first is verified as it is read, and its shards as these are."""
    self._commit(step)

  def meta(self, step: int) -> dict[str, Any]:
    """What was saved with the arrays."""
    return self._commit(step)["meta"]

  def _entries(self, step: int) -> dict[str, list[dict[str, Any]]]:
    """Path of an array -> the saved shards of it."""
    commit, entries = self._commit(step), {}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      read = lambda name: self._sealed(step, f"{name}.json", _PART)
      for name, part in zip(commit["parts"], pool.map(read, commit["parts"])):
        if part["bytes"] != commit["parts"][name]:
          raise Damaged(f"{name}.bin has {commit['parts'][name]} bytes of {part['bytes']}")
        _check_shards(part, f"{self.path / str(step) / name}.json")
        for entry in part["shards"]:
          entries.setdefault(entry["path"], []).append(entry | {"part": name})
    _check_arrays(entries, self.path / str(step))
    return entries

  def kinds(self, step: int) -> dict[str, str]:
    """Path -> type and shape of the saved arrays."""
    return {path: f"{shards[0]['dtype']}{shards[0]['shape']}" for path, shards in self._entries(step).items()}

  def restore(self, step: int, target: Any) -> Any:
    """The saved arrays in the shardings of the target, whose paths, shapes and types are those saved."""
    entries, (leaves, tree) = self._entries(step), jax.tree_util.tree_flatten_with_path(target)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      reads = [self._start(pool, step, entries[_name(path)], _places(leaf)) for path, leaf in leaves]
      placed = [_placed(leaf, read) for (_, leaf), read in zip(leaves, reads)]
    kinds = [entries[_name(path)][0].get("key") for path, _ in leaves]
    return tree.unflatten([jax.random.wrap_key_data(x, impl=kind) if kind else x for x, kind in zip(placed, kinds)])

  def arrays(self, step: int, keys: Sequence[str]) -> dict[str, Any]:
    """Parts of the state as nested dicts of numpy arrays."""
    entries, tree = self._entries(step), {}
    wanted = {path: shards for path, shards in entries.items() if path.split("/")[0] in keys}
    for path in self._commit(step)["empty"]:
      if path.split("/")[0] in keys:
        _put(tree, path, {})
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      reads = {path: self._start(pool, step, shards, [_whole(shards[0]["shape"])]) for path, shards in wanted.items()}
      for path, read in reads.items():
        _put(tree, path, read(_whole(wanted[path][0]["shape"])))
    return {key: tree.get(key, {}) for key in keys}

  def _start(self, pool: Any, step: int, shards: Sequence[Mapping[str, Any]], places: Sequence[Any]) -> Any:
    """Starts to read the shards that places of an array need; returns place -> its values."""
    futures = [(shard, pool.submit(self._read, step, shard)) for shard in shards
               if any(_overlap(shard, place) is not None for place in places)]  # fmt: skip

    def values(place: Sequence[tuple[int, int]]) -> np.ndarray:
      out, filled = np.empty([stop - start for start, stop in place], np.dtype(shards[0]["dtype"])), 0
      for shard, future in futures:
        both = _overlap(shard, place)
        if both is not None:
          here = tuple(slice(low - start, high - start) for (low, high), (start, _) in zip(both, place))
          there = tuple(slice(low - start, high - start) for (low, high), start in zip(both, shard["start"]))
          out[here] = future.result()[there]
          filled += int(np.prod([high - low for low, high in both], dtype=np.int64))
      if filled != out.size:
        raise Damaged(f"{shards[0]['path']}: {filled} of {out.size} values are in the parts")
      return out

    return values

  def _read(self, step: int, shard: Mapping[str, Any]) -> np.ndarray:
    start, size = shard["at"], shard["bytes"]
    try:
      data = files.read_bytes(self.path / str(step) / f"{shard['part']}.bin", start, start + size)
    except FileNotFoundError as error:
      raise Damaged(f"{shard['part']}.bin is missing") from error
    if len(data) != size or zlib.crc32(data) != shard["crc32"]:
      raise Damaged(f"{shard['path']}: damaged in {shard['part']}.bin")
    shape = [stop - start for start, stop in zip(shard["start"], shard["stop"])]
    return np.frombuffer(data, np.dtype(shard["dtype"])).reshape(shape)

  def set_aside(self, step: int) -> None:
    """Makes a damaged checkpoint none: its `commit.json` becomes `damaged.json`, all else stays."""
    folder = self.path / str(step)
    if jax.process_index() == 0:
      with contextlib.suppress(FileNotFoundError):
        files.write_whole(folder / DAMAGED, files.read_bytes(folder / COMMIT).decode(errors="replace"))
      files.remove(folder / COMMIT)
    distributed.wait_for_all(f"damaged checkpoint {step}")

  def agreed(self, bad: bool) -> bool:
    """Whether any process found the checkpoint bad: each reads other parts of it."""
    return bool(np.any(multihost_utils.process_allgather(np.array(bad)))) if jax.process_count() > 1 else bad

  def wait(self) -> None:
    """Blocks until the last save is at the far disk."""
    running, self._running = self._running, None
    if running is not None:
      running.result()

  def close(self) -> None:
    """Waits for the last save and frees the thread."""
    try:
      self.wait()
    finally:
      self._pool.shutdown()


def _of_step(name: str, file: str = "") -> int | None:
  """The step of an object's name in the folder of checkpoints; None for others, and for other files than `file`."""
  match = re.fullmatch(r"(\d+)/([^/]+)", name)
  return int(match[1]) if match and file in ("", match[2]) else None


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _check_shards(part: Mapping[str, Any], what: str) -> None:
  """Checks that the shards of a part follow one another, and are of the sizes that their shapes say.

  Raises:
    ValueError: naming one that is otherwise.
  """
  at = 0
  for entry in part["shards"]:
    shape, start, stop = entry["shape"], entry["start"], entry["stop"]
    try:
      kind = np.dtype(entry["dtype"])
      size = kind.itemsize * math.prod(high - low for low, high in zip(start, stop, strict=True))
      size = size if str(kind) == entry["dtype"] and not kind.hasobject else -1
    except (TypeError, ValueError):
      size = -1
    inside = len(shape) == len(start) and all(0 <= low <= high <= most for low, high, most in zip(start, stop, shape))
    if not (inside and size == entry["bytes"] and at == entry["at"]):
      raise ValueError(f"{what}: shard of {entry['path']!a:.80} cannot be: {entry!a:.300}")
    at += size
  if at != part["bytes"]:
    raise ValueError(f"{what}: shards of {at} bytes, {part['bytes']} are said")


def _check_arrays(entries: Mapping[str, Sequence[Mapping[str, Any]]], what: files.Path) -> None:
  """Checks that each array is of one type and shape, has all its values, and is not a folder of others as well.

  Raises:
    ValueError: naming one that is otherwise.
    Damaged: naming one that lacks values.
  """
  for path, shards in entries.items():
    folders = path.split("/")[:-1]
    if len({(one["dtype"], tuple(one["shape"]), one.get("key")) for one in shards}) > 1 or any(
      "/".join(folders[:depth]) in entries for depth in range(1, len(folders) + 1)
    ):
      raise ValueError(f"{what}: {path!a:.80} is several arrays, or lies in one")
    there = sum(math.prod(high - low for low, high in zip(one["start"], one["stop"])) for one in shards)
    if there < math.prod(shards[0]["shape"]):
      raise Damaged(f"{path!a:.80}: {there} of {math.prod(shards[0]['shape'])} values are in the parts")


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
  *folders, last = path.split("/")
  for folder in folders:
    tree = tree.setdefault(folder, {})
  tree[last] = value


def _plain(leaf: Any) -> Any:
  """An array of numbers: of a typed PRNG key, its integers."""
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _is_key(leaf: Any) -> bool:
  return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _shards(leaf: Any) -> Iterator[tuple[list[tuple[int, int]], np.ndarray]]:
  """(place, values) of what this process saves of an array."""
  if not isinstance(leaf, jax.Array):
    if jax.process_index() == 0:
      yield _whole(np.shape(leaf)), np.asarray(leaf)
    return
  for shard in leaf.addressable_shards:
    if shard.replica_id == 0:
      yield _bounds(shard.index, leaf.shape), np.array(shard.data)  # a copy: the next step overwrites the state


def _copied(state: Any) -> tuple[list[tuple[dict[str, Any], np.ndarray]], list[str]]:
  """This process's shards, each with its entry of the index, and the paths of empty dicts, which hold no arrays."""
  leaves = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda x: isinstance(x, Mapping) and not x)[0]
  shards, empty = [], []
  for key, leaf in leaves:
    if isinstance(leaf, Mapping):
      empty.append(_name(key))
      continue
    kind = {"key": str(jax.random.key_impl(leaf))} if _is_key(leaf) else {}
    leaf = _plain(leaf)
    for place, values in _shards(leaf):
      entry = {"path": _name(key), "dtype": str(values.dtype), "shape": list(np.shape(leaf)),
               "start": [start for start, _ in place], "stop": [stop for _, stop in place], **kind}  # fmt: skip
      shards.append((entry, values))
  return shards, empty


def _write_part(shards: Sequence[tuple[dict[str, Any], np.ndarray]], path: pathlib.Path) -> None:
  """Writes shards and their index."""
  at, index = 0, []
  with open(path.with_suffix(".bin"), "wb") as file:
    for entry, values in shards:
      data = values.tobytes()
      file.write(data)
      index.append(entry | {"at": at, "bytes": len(data), "crc32": zlib.crc32(data)})
      at += len(data)
  path.with_suffix(".json").write_text(json.dumps(files.sealed({"bytes": at, "shards": index})))


def _whole(shape: Sequence[int]) -> list[tuple[int, int]]:
  return [(0, int(size)) for size in shape]


def _bounds(index: Sequence[slice], shape: Sequence[int]) -> list[tuple[int, int]]:
  return [slice_.indices(size)[:2] for slice_, size in zip(index, shape)]


def _overlap(shard: Mapping[str, Any], place: Sequence[tuple[int, int]]) -> list[tuple[int, int]] | None:
  """The part of a place that a shard has."""
  both = [(max(low, start), min(high, stop)) for (low, high), start, stop in zip(place, shard["start"], shard["stop"])]
  return both if all(low < high or low == high == 0 for low, high in both) else None


def _data_sharding(leaf: Any) -> tuple[tuple[int, ...], Any]:
  """Shape and sharding of an array of numbers; a typed PRNG key's integers are on the same devices."""
  plain = jax.eval_shape(_plain, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
  return plain.shape, leaf.sharding


def _places(leaf: Any) -> list[list[tuple[int, int]]]:
  """The places of an array that this process's devices hold."""
  shape, sharding = _data_sharding(leaf)
  return [_bounds(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()]


def _placed(leaf: Any, read: Any) -> Any:
  """The array of saved values in a leaf's sharding."""
  shape, sharding = _data_sharding(leaf)
  return jax.make_array_from_callback(shape, sharding, lambda index: read(_bounds(index, shape)))

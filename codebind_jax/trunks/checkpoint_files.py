"""Checkpoint files of other libraries: names -> arrays that are read one by one; no code in a file is run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from codebind_jax.trunks.torch_pickle import LazyTensor, open_torch_pickle

ENDINGS = (".safetensors", ".npz", ".pth", ".pt", ".bin")
_TYPES = {
  "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "I64": "<i8", "I32": "<i4", "I16": "<i2",
  "I8": "i1", "U8": "u1", "BOOL": "?", "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
_WRAPPERS = ("state_dict", "model", "module", "weights")  # keys under which torch files keep the state dict


@dataclasses.dataclass(frozen=True)
class Entry:
  """One array of a checkpoint: its shape and type, a function that reads it, and, where the file allows it, one that
  reads item i of its first axis alone.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray] = dataclasses.field(repr=False)
  part: Callable[[int], np.ndarray] | None = dataclasses.field(default=None, repr=False)


class Weights(Mapping[str, Entry]):
  """The arrays of a checkpoint by name; `weights[name].read()` reads one of them.

  Attributes:
    files: the files they lie in.
  """

  def __init__(self, entries: Mapping[str, Entry], files: tuple[Path, ...]):
    self._entries, self.files = dict(entries), files

  def __getitem__(self, name: str) -> Entry:
    return self._entries[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)

  @property
  def name(self) -> str:
    """Path of the (first) file, for errors."""
    return str(self.files[0])

  def renamed(self, new_name: Callable[[str], str]) -> Weights:
    """The same arrays under other names; those whose new name is "" are left out."""
    return Weights({new: entry for old, entry in self.items() if (new := new_name(old))}, self.files)

  def hash(self) -> str:
    """Hex SHA-256 of the files, remembered by path, size and time while the process lives."""
    digest = hashlib.sha256()
    for path in self.files:
      stat = path.stat()
      digest.update(_file_hash(str(path), stat.st_size, stat.st_mtime_ns).encode())
    return digest.hexdigest()


_HASHES: dict[tuple[str, int, int], str] = {}


def _file_hash(path: str, size: int, time: int) -> str:
  key = (path, size, time)
  if key not in _HASHES:
    with open(path, "rb") as file:
      _HASHES[key] = hashlib.file_digest(file, "sha256").hexdigest()
  return _HASHES[key]


def open_weights(path: str | Path, *, empty: bool = False) -> Weights:
  """The arrays of a file, or of a sharded checkpoint by its `*.index.json`.

  Args:
    path: of the file.
    empty: whether a torch file may hold no tensors (a module without parameters).

  Raises:
    ValueError: naming the file, if it is missing, cut short, of an unknown kind, or names foreign code.
  """
  path = Path(path).expanduser()
  if not path.is_file():
    raise ValueError(f"{path}: no such file")
  if path.name.endswith(".index.json"):
    return _sharded(path)
  with open(path, "rb") as file:
    head = file.read(9)
  if head[:4] == b"PK\x03\x04":
    return _npz(path) if path.suffix == ".npz" else _torch(path, empty)
  if len(head) == 9 and head[8:] == b"{":
    return _safetensors(path)
  if path.suffix in (".safetensors", ".npz"):
    raise ValueError(f"{path}: not a readable {path.suffix[1:]} file (it is damaged, or of another kind)")
  return _torch(path, empty)


def _sharded(index: Path) -> Weights:
  try:
    shard_of = json.loads(index.read_text())["weight_map"]
  except (ValueError, KeyError) as error:
    raise ValueError(f"{index}: not an index of shards ({error!r})") from error
  shards = sorted(set(shard_of.values()))
  missing = [shard for shard in shards if not (index.parent / shard).is_file()]
  if missing:
    raise ValueError(f"{index}: shards are missing: {', '.join(missing)}")
  opened = {shard: open_weights(index.parent / shard) for shard in shards}
  lost = [name for name, shard in shard_of.items() if name not in opened[shard]]
  if lost:
    raise ValueError(f"{index}: shards lack {', '.join(lost[:10])}")
  return Weights(
    {name: opened[shard][name] for name, shard in shard_of.items()}, tuple(index.parent / shard for shard in shards)
  )


def _safetensors(path: Path) -> Weights:
  size = path.stat().st_size
  with open(path, "rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, 100_000_000):
      raise ValueError(f"{path}: cut short or damaged: its header should have {length} bytes, the file has {size}")
    try:
      header = json.loads(file.read(length))
      header.pop("__metadata__", None)
      table = {name: (_TYPES[e["dtype"]], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(f"{path}: not a readable safetensors header ({error!r})") from error
  entries = {}
  for name, (kind, shape, start, stop) in table.items():
    dtype = np.dtype(kind)
    count = int(np.prod(shape, dtype=np.int64))
    if stop - start != count * dtype.itemsize or start < 0:
      raise ValueError(f"{path}: tensor {name!r} of shape {shape} does not fit its {stop - start} bytes")
    if 8 + length + stop > size:
      raise ValueError(f"{path}: cut short: tensor {name!r} ends at byte {8 + length + stop}, the file has {size}")
    entries[name] = _in_file(path, 8 + length + start, shape, dtype)
  return Weights(entries, (path,))


def _in_file(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Entry:
  size = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
  part = lambda i: _reader(path, offset + i * size, shape[1:], dtype)()
  return Entry(shape, dtype, _reader(path, offset, shape, dtype), part if shape else None)


def _reader(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Callable[[], np.ndarray]:
  def read() -> np.ndarray:
    out = np.empty(shape, dtype)
    with open(path, "rb", buffering=0) as file:
      file.seek(offset)
      view, done = memoryview(out.reshape(-1).view(np.uint8)), 0
      while done < len(view):
        got = file.readinto(view[done:])
        if not got:
          raise ValueError(f"{path}: cut short at byte {offset + done}")
        done += got
    return out

  return read


def _npz(path: Path) -> Weights:
  entries = {}
  try:
    with zipfile.ZipFile(path) as archive:
      members = [m for m in archive.namelist() if m.endswith(".npy")]
      for member in members:
        with archive.open(member) as file:
          version = np.lib.format.read_magic(file)
          header = np.lib.format
          read_header = header.read_array_header_1_0 if version == (1, 0) else header.read_array_header_2_0
          shape, by_columns, dtype = read_header(file)
          start = file.tell()
        name, info = member.removesuffix(".npy"), archive.getinfo(member)
        if dtype.hasobject:
          raise ValueError(f"array {name!r} holds pickled objects, which are refused")
        if dtype == np.dtype("V2"):  # how numpy saves bfloat16
          dtype = np.dtype(ml_dtypes.bfloat16)
        if info.compress_type == zipfile.ZIP_STORED and not by_columns and dtype.isnative:
          entries[name] = _in_file(path, _data_offset(path, info) + start, tuple(shape), dtype)
        else:
          entries[name] = Entry(tuple(shape), dtype, _npz_reader(path, name, dtype))
  except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
    raise ValueError(f"{path}: not a readable npz file ({error})") from error
  return Weights(entries, (path,))


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
  with open(path, "rb") as file:
    file.seek(info.header_offset + 26)  # lengths of name and extra field, which the directory's may differ from
    lengths = file.read(4)
  return info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _npz_reader(path: Path, name: str, dtype: np.dtype) -> Callable[[], np.ndarray]:
  def read() -> np.ndarray:
    try:
      with np.load(path, allow_pickle=False) as arrays:
        array = arrays[name]
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
      raise ValueError(f"{path}: {name}: not readable ({error})") from error
    return array.view(dtype) if array.dtype == np.dtype("V2") else array

  return read


def _torch(path: Path, empty: bool) -> Weights:
  try:
    tree: Any = open_torch_pickle(path)
  except ValueError as error:
    raise (error if str(path) in str(error) else ValueError(f"{path}: {error}")) from error
  while isinstance(tree, dict) and (inner := [k for k in _WRAPPERS if isinstance(tree.get(k), dict)]):
    tree = tree[inner[0]]
  if not isinstance(tree, dict):
    raise ValueError(f"{path}: holds no state dict, but a {type(tree).__name__}")
  tensors = {name: value for name, value in tree.items() if isinstance(name, str) and isinstance(value, LazyTensor)}
  if not tensors and not empty:
    raise ValueError(f"{path}: holds no tensors (names: {sorted(map(str, tree))[:10]})")
  return Weights({name: Entry(x.shape, x.dtype, x.read) for name, x in tensors.items()}, (path,))


def folder_weights(folder: str | Path, stems: tuple[str, ...] = ("model", "pytorch_model")) -> Weights:
  """The weights in a folder: `<stem>.safetensors`, its index of shards, or a torch file, in this order.

  Raises:
    ValueError: naming what was looked for, if the folder has none of them.
  """
  folder = Path(folder)
  wanted = [f"{stem}{ending}" for stem in stems for ending in
            (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")]  # fmt: skip
  for name in wanted:
    if (folder / name).is_file():
      return open_weights(folder / name)
  there = ", ".join(sorted(os.listdir(folder))[:20]) or "nothing"
  raise ValueError(f"{folder}: no weights; looked for {', '.join(wanted[:2])} and the like, found {there}")

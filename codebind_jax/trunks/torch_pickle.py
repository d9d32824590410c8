"""Reads the tensors of a torch checkpoint without torch and without running code that the file names.

It reads both containers: the old stream (three header pickles, the object, then raw storages) and the zip of newer
releases. The unpickler knows five kinds of name: an ordered dictionary, a storage type, the two functions that rebuild
a tensor or a parameter, which here only record where the values are, and the functions of a pickled numpy number, which
here give a Python number. Any other name in the file is refused before it is looked up.
"""

import collections
import dataclasses
import io
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_STORAGE_TYPES = {
  "DoubleStorage": np.dtype("<f8"),
  "FloatStorage": np.dtype("<f4"),
  "HalfStorage": np.dtype("<f2"),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "LongStorage": np.dtype("<i8"),
  "IntStorage": np.dtype("<i4"),
  "ShortStorage": np.dtype("<i2"),
  "CharStorage": np.dtype("i1"),
  "ByteStorage": np.dtype("u1"),
  "BoolStorage": np.dtype("bool"),
}


@dataclasses.dataclass(frozen=True)
class _StorageType:
  dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Storage:
  key: str
  dtype: np.dtype
  count: int


@dataclasses.dataclass(frozen=True)
class _TensorRecord:
  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  stride: tuple[int, ...]


def _record_tensor(storage: _Storage, offset: int, shape: tuple, stride: tuple, *_: Any) -> _TensorRecord:
  return _TensorRecord(storage, offset, tuple(shape), tuple(stride))


def _record_parameter(data: _TensorRecord, *_: Any) -> _TensorRecord:
  return data


class _NumpyType:
  """A number type as numpy pickles it: `dtype("i8", False, True)`, then a state that begins with version and order."""

  def __init__(self, code: str, *_: Any):
    self._code, self._order = code, "<"

  def __setstate__(self, state: tuple) -> None:
    self._order = state[1]

  def number(self, raw: bytes) -> int | float | bool:
    if self._order not in "<|" or self._code not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"):
      raise ValueError(f"refused a numpy number of type {self._order + self._code!r}")
    return np.frombuffer(raw, "<" + self._code)[0].item()


def _encoded(text: str, encoding: str) -> bytes:
  if encoding != "latin1":
    raise ValueError(f"refused bytes written in encoding {encoding!r}, allowed is 'latin1'")
  return text.encode(encoding)


def _number(kind: _NumpyType, raw: bytes) -> int | float | bool:
  return kind.number(raw)


_ALLOWED: dict[tuple[str, str], Any] = {
  ("collections", "OrderedDict"): collections.OrderedDict,
  ("torch._utils", "_rebuild_tensor_v2"): _record_tensor,
  ("torch._utils", "_rebuild_parameter"): _record_parameter,
  ("numpy", "dtype"): _NumpyType,
  ("numpy.core.multiarray", "scalar"): _number,
  ("numpy._core.multiarray", "scalar"): _number,
  ("_codecs", "encode"): _encoded,
  **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGE_TYPES.items()},
}


class _TensorUnpickler(pickle.Unpickler):
  """An unpickler for which only tensors, containers and plain values exist."""

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in _ALLOWED:
      allowed = ", ".join(sorted(f"{m}.{n}" for m, n in _ALLOWED))
      raise ValueError(f"refused to unpickle {module}.{name}: a checkpoint may only name {allowed}")
    return _ALLOWED[module, name]

  def persistent_load(self, pid: Any) -> _Storage:
    if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], _StorageType)):
      raise ValueError(f"refused the persistent id {pid!r}: only ('storage', type, key, device, count) is allowed")
    if len(pid) > 5 and pid[5] is not None:
      raise ValueError(f"storage {pid[2]!r} is a view of another one: such checkpoints are not supported")
    return _Storage(str(pid[2]), pid[1].dtype, int(pid[4]))


def _unpickle(stream: io.BytesIO, name: str) -> Any:
  try:
    return _TensorUnpickler(stream).load()
  except ValueError:
    raise
  except Exception as error:
    raise ValueError(f"{name}: not a readable torch checkpoint ({type(error).__name__}: {error})") from error


def _materialise(tree: Any, storage_of: Callable[[_Storage], np.ndarray], name: str) -> Any:
  """The tree with arrays in place of tensor records, each checked to lie inside its storage."""
  if isinstance(tree, _TensorRecord):
    flat = storage_of(tree.storage)
    last = tree.offset + sum((size - 1) * step for size, step in zip(tree.shape, tree.stride, strict=True))
    negative = tree.offset < 0 or min(tree.shape + tree.stride, default=0) < 0
    if negative or (math.prod(tree.shape) and last >= flat.size):
      raise ValueError(
        f"{name}: a tensor of shape {tree.shape}, stride {tree.stride}, offset {tree.offset} does not fit its storage"
        f" of {flat.size} values"
      )
    steps = tuple(step * flat.itemsize for step in tree.stride)
    return np.lib.stride_tricks.as_strided(flat[tree.offset :], tree.shape, steps).copy()
  if isinstance(tree, dict):
    return {key: _materialise(value, storage_of, name) for key, value in tree.items()}
  if isinstance(tree, (list, tuple)):
    return type(tree)(_materialise(value, storage_of, name) for value in tree)
  return tree


def _load_stream(stream: io.BytesIO, name: str) -> Any:
  magic, protocol, system = (_unpickle(stream, name) for _ in range(3))
  if magic != _MAGIC or protocol != _PROTOCOL:
    raise ValueError(f"{name}: not a torch checkpoint (magic {magic!r}, protocol {protocol!r})")
  if not system.get("little_endian", True):
    raise ValueError(f"{name}: written on a big-endian machine; only little-endian checkpoints are supported")
  tree = _unpickle(stream, name)
  keys = _unpickle(stream, name)
  types = {record.storage.key: record.storage for record in _records(tree)}
  storages = {}
  for key in keys:
    if key not in types:
      raise ValueError(f"{name}: holds a storage {key!r} that no tensor uses")
    dtype = types[key].dtype
    head = stream.read(8)
    count = int.from_bytes(head, "little")
    if len(head) < 8 or count != types[key].count:
      raise ValueError(f"{name}: storage {key!r} has {count} values, its tensors expect {types[key].count}")
    raw = stream.read(count * dtype.itemsize)
    if len(raw) != count * dtype.itemsize:
      raise ValueError(f"{name}: cut short inside storage {key!r}")
    storages[key] = np.frombuffer(raw, dtype)

  def storage_of(storage: _Storage) -> np.ndarray:
    if storage.key not in storages:
      raise ValueError(f"{name}: storage {storage.key!r} is missing")
    return storages[storage.key]

  return _materialise(tree, storage_of, name)


def _load_zip(stream: io.BytesIO, name: str) -> Any:
  try:
    archive = zipfile.ZipFile(stream)
  except zipfile.BadZipFile as error:
    raise ValueError(f"{name}: not a readable torch checkpoint ({error})") from error
  with archive:
    pickles = [member for member in archive.namelist() if member.endswith("/data.pkl")]
    if len(pickles) != 1:
      raise ValueError(f"{name}: a torch zip checkpoint holds one data.pkl, this one {len(pickles)}")
    root = pickles[0][: -len("data.pkl")]
    if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
      raise ValueError(f"{name}: written on a big-endian machine; only little-endian checkpoints are supported")
    tree = _unpickle(io.BytesIO(archive.read(pickles[0])), name)

    def storage_of(storage: _Storage) -> np.ndarray:
      member = f"{root}data/{storage.key}"
      if member not in archive.namelist():
        raise ValueError(f"{name}: storage {storage.key!r} is missing")
      raw = archive.read(member)
      if len(raw) != storage.count * storage.dtype.itemsize:
        raise ValueError(
          f"{name}: storage {storage.key!r} has {len(raw)} bytes, its tensors expect {storage.count} values"
        )
      return np.frombuffer(raw, storage.dtype)

    return _materialise(tree, storage_of, name)


def _records(tree: Any) -> list[_TensorRecord]:
  if isinstance(tree, _TensorRecord):
    return [tree]
  children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
  return [record for child in children for record in _records(child)]


def load_torch_pickle(source: str | Path | bytes, *, name: str | None = None) -> Any:
  """The object saved in a torch checkpoint, with numpy arrays for its tensors.

  Args:
    source: path of a `.pth`/`.pt` file (old stream or zip container), or its bytes.
    name: what to call the file in errors; the path where one is given.

  Returns:
    dictionaries, lists, tuples and plain values as saved, each tensor as an `np.ndarray` of its own type and shape.

  Raises:
    ValueError: if the file names anything but tensors and containers, is damaged, or is no torch checkpoint.
  """
  data = source if isinstance(source, bytes) else Path(source).read_bytes()
  name = name or ("checkpoint" if isinstance(source, bytes) else str(source))
  stream = io.BytesIO(data)
  return _load_zip(stream, name) if data[:4] == b"PK\x03\x04" else _load_stream(stream, name)

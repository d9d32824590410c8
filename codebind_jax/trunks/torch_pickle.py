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
_PIECE = 1 << 22
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
class LazyTensor:
  """A tensor of a checkpoint: its shape and type, and a function that reads it."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray] = dataclasses.field(repr=False)


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
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error
  except Exception as error:
    raise ValueError(f"{name}: not a readable torch checkpoint ({type(error).__name__}: {error})") from error


def _check(record: _TensorRecord, count: int, name: str) -> None:
  """Raises ValueError unless a tensor lies inside its storage of `count` values."""
  last = record.offset + sum((size - 1) * step for size, step in zip(record.shape, record.stride, strict=True))
  negative = record.offset < 0 or min(record.shape + record.stride, default=0) < 0
  if negative or (math.prod(record.shape) and last >= count):
    raise ValueError(
      f"{name}: a tensor of shape {record.shape}, stride {record.stride}, offset {record.offset} does not fit its"
      f" storage of {count} values"
    )


def _array(record: _TensorRecord, flat: np.ndarray, name: str, copy: bool = True) -> np.ndarray:
  _check(record, flat.size, name)
  steps = tuple(step * flat.itemsize for step in record.stride)
  view = np.lib.stride_tricks.as_strided(flat[record.offset :], record.shape, steps)
  return view.copy() if copy else view


def _read_into(flat: np.ndarray, file: zipfile.ZipExtFile) -> np.ndarray:
  """The array, filled from a file in pieces, so that no second one of its size is made."""
  raw, done = flat.view(np.uint8), 0
  while done < raw.size:
    piece = file.read(min(_PIECE, raw.size - done))
    if not piece:
      raise EOFError(f"{raw.size - done} bytes are missing")
    raw[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
    done += len(piece)
  return flat


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

  return _mapped(tree, lambda record: _array(record, storage_of(record.storage), name))


def _load_zip(source: Path | bytes, name: str) -> Any:
  """The object with a `LazyTensor` for each tensor; sizes are checked without reading any of them."""
  opened = lambda: zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source)
  try:
    archive = opened()
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
    sizes = {member.filename: member.file_size for member in archive.infolist()}

  def lazy(record: _TensorRecord) -> LazyTensor:
    storage, member = record.storage, f"{root}data/{record.storage.key}"
    if member not in sizes:
      raise ValueError(f"{name}: storage {storage.key!r} is missing")
    if sizes[member] != storage.count * storage.dtype.itemsize:
      raise ValueError(
        f"{name}: storage {storage.key!r} has {sizes[member]} bytes, its tensors expect {storage.count} values"
      )
    _check(record, storage.count, name)

    def read() -> np.ndarray:
      try:
        with opened() as archive, archive.open(member) as file:
          flat = _read_into(np.empty(storage.count, storage.dtype), file)
        return _array(record, flat, name, copy=record.offset > 0 or math.prod(record.shape) < flat.size)
      except (zipfile.BadZipFile, OSError, EOFError, KeyError) as error:
        raise ValueError(f"{name}: storage {storage.key!r} is not readable ({error})") from error

    return LazyTensor(record.shape, storage.dtype, read)

  return _mapped(tree, lazy)


def _records(tree: Any) -> list[_TensorRecord]:
  if isinstance(tree, _TensorRecord):
    return [tree]
  children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
  return [record for child in children for record in _records(child)]


def open_torch_pickle(source: str | Path | bytes, *, name: str | None = None) -> Any:
  """The object saved in a torch checkpoint, with a `LazyTensor` for each of its tensors.

  A zip container is not read but for its pickle; an old stream is read whole.

  Args:
    source: path of a `.pth`/`.pt` file (old stream or zip container), or its bytes.
    name: what to call the file in errors; the path where one is given.

  Raises:
    ValueError: naming the file, if it names anything but tensors and containers, is damaged, or is no torch checkpoint.
  """
  name = name or ("checkpoint" if isinstance(source, bytes) else str(source))
  source = source if isinstance(source, bytes) else Path(source)
  if isinstance(source, bytes):
    head = source[:4]
  else:
    with open(source, "rb") as file:
      head = file.read(4)
  if head == b"PK\x03\x04":
    return _load_zip(source, name)
  data = source if isinstance(source, bytes) else source.read_bytes()
  as_lazy = lambda tree: _mapped(tree, lambda array: LazyTensor(array.shape, array.dtype, lambda: array))
  return as_lazy(_load_stream(io.BytesIO(data), name))


def load_torch_pickle(source: str | Path | bytes, *, name: str | None = None) -> Any:
  """The object saved in a torch checkpoint, with numpy arrays for its tensors.

  Args:
    source, name: as in `open_torch_pickle`, which raises the same errors.

  Returns:
    dictionaries, lists, tuples and plain values as saved, each tensor as an `np.ndarray` of its own type and shape.
  """
  return _mapped(open_torch_pickle(source, name=name), lambda tensor: tensor.read())


def _mapped(tree: Any, leaf: Callable[[Any], Any]) -> Any:
  if isinstance(tree, (_TensorRecord, LazyTensor, np.ndarray)):
    return leaf(tree)
  if isinstance(tree, dict):
    return {key: _mapped(value, leaf) for key, value in tree.items()}
  if isinstance(tree, (list, tuple)):
    return type(tree)(_mapped(value, leaf) for value in tree)
  return tree

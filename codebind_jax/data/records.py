"""Records by number: the interface of a source of training or evaluation data, and what is known of all its records.

A record has fields (`id`, `label`, `text`: the list of captions, the main one first, and others), and items of
modalities: a path, a file's bytes or an array, which is not decoded here. A modality that a record lacks is absent.
"""

from __future__ import annotations

import abc
import copy
import ctypes
import dataclasses
import functools
import hashlib
import mmap
import os
import weakref
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int8, Int32, Int64, UInt32, UInt64

from codebind_jax.data import transforms

MODALITIES = ("image", "text", "audio", "video", "depth", "points", "thermal", "tactile", "eeg")
SPLITS = ("train", "val", "test")
_blake2b = hashlib.blake2b
_number = functools.partial(int.from_bytes, byteorder="little")


def known_modalities() -> tuple[str, ...]:
  """`MODALITIES` and all others that have a module in `data.transforms`."""
  return (*MODALITIES, *(m for m in transforms.readable() if m not in MODALITIES))


def id_hash(name: str) -> int:
  """The first 8 bytes of an id's BLAKE2b hash."""
  return _number(_blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest())


@dataclasses.dataclass(frozen=True)
class Index:
  """What is asked of all records at once: 37 bytes a record, of which the ids' 8 are rarely read.

  Attributes:
    modalities: those that the bits of `has` stand for, the lowest bit first.
    has: one bit a modality that the record has.
    label: number of its label in `labels`; -1 where it has none.
    labels: all labels.
    split: number of its split in `SPLITS`; -1 where it names none.
    group: number of its group, by first appearance; records of one group are not each other's negatives. A record
      without a label is its own group.
    where: the format's own two numbers: offset and length, file and row; zeros, which take no memory, where sources are
      joined.
    ids: `id_hash` of its id.
  """

  modalities: tuple[str, ...]
  has: UInt32[np.ndarray, "n"]
  label: Int32[np.ndarray, "n"]
  labels: tuple[str, ...]
  split: Int8[np.ndarray, "n"]
  group: Int32[np.ndarray, "n"]
  where: Int64[np.ndarray, "n 2"]
  ids: UInt64[np.ndarray, "n"]

  def __len__(self) -> int:
    return len(self.has)

  def __getstate__(self) -> dict[str, Any]:
    return _referred(self.__dict__)

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(_mapped(state))

  def take(self, rows: Int[np.ndarray, "m"]) -> Index:
    """The index of some of the records, in the order given."""
    columns = {name: getattr(self, name)[rows] for name in ("has", "label", "split", "group", "ids")}
    none = not any(self.where.strides)
    columns["where"] = _Zeros((len(rows), 2), "<i8").array() if none else self.where[rows]
    return dataclasses.replace(self, **columns)

  def bit(self, modality: str) -> int:
    """The bit of `has` that stands for a modality; 0 for one that no record has."""
    return 1 << self.modalities.index(modality) if modality in self.modalities else 0

  def label_of(self, row: int) -> str | None:
    """The label of a record."""
    return self.labels[self.label[row]] if self.label[row] >= 0 else None


@dataclasses.dataclass(frozen=True)
class _Reference:
  """A memory-mapped array in a pickle: worker processes share the file's pages, and hold no copies."""

  path: str
  size: int
  offset: int
  shape: tuple[int, ...]
  type: str

  def array(self) -> np.ndarray:
    length = int(np.prod(self.shape)) * np.dtype(self.type).itemsize
    whole = map_file(self.path)
    if len(whole) != self.size:
      raise ValueError(f"{self.path}: was replaced while the run started; start again")
    return whole[self.offset : self.offset + length].view(self.type).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class _Zeros:
  """An array of nothing but zeros in a pickle."""

  shape: tuple[int, ...]
  type: str

  def array(self) -> np.ndarray:
    return np.broadcast_to(np.zeros((), self.type), self.shape)


class Pages(np.ndarray):
  """The bytes of a file by memory map. Views of it can be pickled by reference."""

  path = ""


_maps: weakref.WeakValueDictionary[str, Pages] = weakref.WeakValueDictionary()


def map_file(path: str) -> Pages:
  """The bytes of a file, mapped once in a process; one that is replaced goes on as it was.

  Unlike `mmap` and `np.memmap` it holds no open file, of which a system allows a process a thousand.

  Raises:
    OSError: if it cannot be mapped.
  """
  there = _maps.get(path)
  if there is None:
    with open(path, "rb") as file:
      size = os.fstat(file.fileno()).st_size
      libc = ctypes.CDLL(None, use_errno=True)
      libc.mmap.restype, libc.munmap.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t)
      libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
      address = libc.mmap(None, max(size, 1), mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
      raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    memory = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(memory, libc.munmap, address, max(size, 1)).atexit = False
    there = np.frombuffer(memory, np.uint8).view(Pages)
    there.flags.writeable = False
    there.path = path
    _maps[path] = there
  return there


def unmap(path: str) -> None:
  """Lets the next `map_file` map a file anew."""
  _maps.pop(path, None)


def _referred(state: Mapping[str, Any]) -> dict[str, Any]:
  """A state to be pickled, with references to arrays that are in a file, and without zeros."""
  return {name: _in_short(value) if isinstance(value, np.ndarray) else value for name, value in state.items()}


def _in_short(array: np.ndarray) -> Any:
  if array.size and not any(array.strides):
    return _Zeros(array.shape, array.dtype.str) if not array.flat[0] else array
  root = array
  while isinstance(root.base, Pages):
    root = root.base
  if not isinstance(root, Pages) or not root.path or not array.flags.c_contiguous:
    return array
  at = [one.__array_interface__["data"][0] for one in (root, array)]
  return _Reference(root.path, root.size, at[1] - at[0], array.shape, array.dtype.str)


def _mapped(state: Mapping[str, Any]) -> dict[str, Any]:
  return {name: value.array() if isinstance(value, _Reference | _Zeros) else value for name, value in state.items()}


def groups_of(label: Int[np.ndarray, "n"]) -> Int32[np.ndarray, "n"]:
  """Numbers of groups of equal label, by first appearance; a record with label -1 is its own group.

  >>> groups_of(np.array([5, -1, 5, -1, 2])).tolist()
  [0, 1, 0, 2, 3]
  """
  own = np.where(label >= 0, label, -1 - np.arange(len(label)))
  _, first, number = np.unique(own, return_index=True, return_inverse=True)
  rank = np.empty(len(first), np.int32)
  rank[np.argsort(first, kind="stable")] = np.arange(len(first), dtype=np.int32)
  return rank[number.reshape(-1)]


def _renumbered(group: Int32[np.ndarray, "n"]) -> Int32[np.ndarray, "n"]:
  """Numbers of groups by first appearance, where some numbers may be missing."""
  first = np.full(int(group.max(initial=-1)) + 1, -1, np.int32)
  first[group[::-1]] = np.arange(len(group), dtype=np.int32)[::-1]  # of a row that is written twice, the last stays
  there = np.flatnonzero(first >= 0)
  first[there[np.argsort(first[there])]] = np.arange(len(there), dtype=np.int32)
  return first[group]


class IndexBuilder:
  """Makes an `Index` record by record."""

  def __init__(self):
    self._modalities: dict[str, int] = {}
    self._labels: dict[str, int] = {}
    self._has, self._label, self._split = array("I"), array("i"), array("b")
    self._where, self._ids = array("q"), array("Q")

  def __len__(self) -> int:
    return len(self._has)

  def add(
    self, name: str, modalities: Iterable[str], label: str | None = None, split: str | None = None,
    where: tuple[int, int] = (0, 0),
  ) -> None:  # fmt: skip
    """Adds a record.

    Args:
      name: its id.
      modalities: those it has.
      label: its label.
      split: one of `SPLITS`.
      where: the format's own numbers.
    """
    self._has.append(self.bits(modalities))
    self._label.append(-1 if label is None else self._labels.setdefault(label, len(self._labels)))
    self._split.append(-1 if split is None else SPLITS.index(split))
    self._where.extend(where)
    self._ids.append(id_hash(name))

  def bits(self, modalities: Iterable[str]) -> int:
    """The bits of `Index.has` that stand for these."""
    bits = 0
    for modality in modalities:
      bits |= 1 << self._modalities.setdefault(modality, len(self._modalities))
    return bits

  def add_many(
    self, names: Sequence[str], has: UInt32[np.ndarray, "n"], labels: Sequence[str | None],
    splits: Sequence[str | None], where: Int64[np.ndarray, "n 2"],
  ) -> None:  # fmt: skip
    """Adds records as `add` does, faster; `has` are their `bits`."""
    known, number = self._labels, {None: -1} | {split: number for number, split in enumerate(SPLITS)}
    self._has.frombytes(has.tobytes())
    self._label.extend([-1 if label is None else known.setdefault(label, len(known)) for label in labels])
    self._split.extend(map(number.__getitem__, splits))
    self._where.frombytes(where.tobytes())
    self._ids.extend([_number(_blake2b(n.encode("utf-8", "surrogatepass"), digest_size=8).digest()) for n in names])

  def build(self) -> Index:
    """The index of all records added."""
    column = lambda values, kind: np.frombuffer(values, kind) if values else np.zeros(0, kind)
    label = column(self._label, np.int32)
    unlabelled = bool(len(label)) and int(label.min()) < 0
    return Index(
      tuple(self._modalities), column(self._has, np.uint32), label, tuple(self._labels), column(self._split, np.int8),
      groups_of(label) if unlabelled else label,  # labels are numbered by first appearance, as groups are
      column(self._where, np.int64).reshape(-1, 2), column(self._ids, np.uint64),
    )  # fmt: skip


def twice(index: Index) -> tuple[int, int] | None:
  """The first two records with one id; None if all ids differ."""
  order = np.argsort(index.ids, kind="stable")
  same = np.flatnonzero(np.diff(index.ids[order]) == 0)
  if not len(same):
    return None
  later = order[same + 1]
  at = int(np.argmin(later))
  return int(order[same[at]]), int(later[at])


class Source(abc.ABC):
  """Records by number. A source is picklable, and reading is safe from many threads: pread, never seek and read.

  Attributes:
    name: for logs and errors.
    index: of its records.
    block: number of records that are read together (a row group of Parquet); 1 where any order is cheap.
  """

  block = 1

  def __init__(self, name: str, index: Index, made_from: str = ""):
    self.name, self.index = name, index
    self._made_from = made_from  # a hash of what the index does not tell, where a format knows one
    self._numbers: np.ndarray | None = None  # of the records selected, in the file

  def __getstate__(self) -> dict[str, Any]:
    return _referred(self.__dict__)

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(_mapped(state))

  def __len__(self) -> int:
    return len(self.index)

  def __getitem__(self, row: int) -> dict[str, Any]:
    """The fields of a record and its decoded arrays."""
    row = range(len(self))[row]
    items = {m: self.read(row, m) for m in self.modalities if m != "text" and self.has(row, m)}
    decoded = lambda m, item: item if isinstance(item, np.ndarray) else transforms.of(m).read(item)
    return self.fields(row) | {m: decoded(m, item) for m, item in items.items()}

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return (self[row] for row in range(len(self)))

  @property
  def modalities(self) -> tuple[str, ...]:
    """Modalities that at least one record has."""
    there = int(np.bitwise_or.reduce(self.index.has)) if len(self) else 0
    return tuple(m for m in known_modalities() if there & self.index.bit(m))

  def has(self, row: int, modality: str) -> bool:
    """Whether a record has a modality."""
    return bool(int(self.index.has[row]) & self.index.bit(modality))

  def rows_with(self, modality: str) -> Int[np.ndarray, "m"]:
    """Numbers of the records that have a modality."""
    return np.flatnonzero(self.index.has & np.uint32(self.index.bit(modality)))

  def fields(self, row: int) -> dict[str, Any]:
    """The fields of a record, parsed when asked for."""
    return self._fields(self._number(row))

  def column(self, name: str) -> list[Any]:
    """A field of every record; None where a record lacks it."""
    return [self.fields(row).get(name) for row in range(len(self))]

  def read(self, row: int, modality: str) -> str | bytes | Path | np.ndarray:
    """A record's item of a modality (not text) as `transforms.<modality>.read` takes it: path, bytes or array."""
    return self._read(self._number(row), modality)

  def content_hash(self, row: int, modality: str) -> str:
    """Hex SHA-256 that changes when a record's content of a modality changes."""
    return self._hash(self._number(row), modality)

  def identity(self, row: int, modality: str) -> str:
    """What changes with the content and costs less than its hash: path, size and time; "" where the hash is cheap."""
    return self._identity(self._number(row), modality)

  def where(self, row: int) -> str:
    """Where a record is, for messages: file and line, shard and member."""
    return self._where(self._number(row))

  def fingerprint(self) -> dict[str, str]:
    """File -> a hash of its records: ids, labels, splits, places, and of its content where that is known."""
    digest = hashlib.sha256("\0".join((self._made_from, *self.index.labels)).encode("utf-8", "surrogatepass"))
    for column in ("has", "label", "split", "where", "ids"):
      digest.update(np.ascontiguousarray(getattr(self.index, column)).data)
    return {self.name: digest.hexdigest()[:16]}

  def select(self, rows: Iterable[int] | Int[np.ndarray, "n"]) -> Source:
    """The records of these numbers, in that order, as a source of its own.

    Raises:
      IndexError: if a number is out of range.
    """
    rows = rows if isinstance(rows, np.ndarray) else np.fromiter(rows, np.int64)
    bad = rows[(rows >= len(self)) | (rows < -len(self))]
    if len(bad):
      raise IndexError(f"{self.name}: no record {bad[0]}, it has {len(self)}")
    rows = (rows % max(len(self), 1)).astype(np.int32 if len(self) < 2**31 else np.int64)
    part = copy.copy(self)
    if np.array_equal(rows, np.arange(len(self), dtype=rows.dtype)):  # all: what is memory-mapped stays so
      return part
    places = _Zeros((len(rows), 2), "<i8").array()  # a record is found by its number in the file
    columns = {name: getattr(self.index, name)[rows] for name in ("has", "label", "split", "ids")}
    group = _renumbered(self.index.group[rows])
    part.index = dataclasses.replace(self.index, where=places, group=group, **columns)
    part._numbers = rows if self._numbers is None else self._numbers[rows]
    return part

  def grouped(self, field: str) -> Source:
    """The same records, in groups of an equal value of a field; a record without it is its own group."""
    numbers: dict[Any, int] = {}
    values = (value or None for value in self.column(field))
    own = np.fromiter((-1 if v is None else numbers.setdefault(v, len(numbers)) for v in values), np.int64, len(self))
    part = copy.copy(self)
    part.index = dataclasses.replace(self.index, group=groups_of(own))
    return part

  def _number(self, row: int) -> int:
    """Number in the file of a record; IndexError beyond the last."""
    row = range(len(self))[row]
    return row if self._numbers is None else int(self._numbers[row])

  @abc.abstractmethod
  def _fields(self, number: int) -> dict[str, Any]:
    """`fields` by the number in the file."""

  @abc.abstractmethod
  def _read(self, number: int, modality: str) -> str | bytes | Path | np.ndarray:
    """`read` by the number in the file."""

  @abc.abstractmethod
  def _hash(self, number: int, modality: str) -> str:
    """`content_hash` by the number in the file."""

  def _identity(self, number: int, modality: str) -> str:
    """`identity` by the number in the file."""
    return ""

  def _where(self, number: int) -> str:
    """`where` by the number in the file."""
    return f"{self.name}: record {number}"


def index_of(rows: Iterable[Mapping[str, Any]], has: Iterable[Iterable[str]]) -> Index:
  """The index of records whose fields are in memory.

  Args:
    rows: fields of each record.
    has: modalities of each record.
  """
  builder = IndexBuilder()
  for number, (row, modalities) in enumerate(zip(rows, has, strict=True)):
    split = row.get("split")
    builder.add(row["id"], modalities, row.get("label") or None, split if split in SPLITS else None, (number, 0))
  return builder.build()


class Joined(Source):
  """The records of several sources, one after the other.

  Groups are those of the parts; parts that lie in one vocabulary of labels share groups, see `joined`.
  """

  def __init__(self, name: str, index: Index, parts: Sequence[Source]):
    super().__init__(name, index)
    self._parts = tuple(parts)
    self._starts = np.cumsum([0, *map(len, parts)])
    self.block = max(part.block for part in parts)

  def fingerprint(self) -> dict[str, str]:
    """Of every part, and of the choice of records."""
    parts = {key: value for part in self._parts for key, value in part.fingerprint().items()}
    return parts if self._numbers is None else parts | super().fingerprint()

  def _part(self, number: int) -> tuple[Source, int]:
    part = int(np.searchsorted(self._starts, number, "right")) - 1
    return self._parts[part], number - int(self._starts[part])

  def _fields(self, number: int) -> dict[str, Any]:
    part, row = self._part(number)
    return part.fields(row)

  def _read(self, number: int, modality: str) -> str | bytes | Path | np.ndarray:
    part, row = self._part(number)
    return part.read(row, modality)

  def _hash(self, number: int, modality: str) -> str:
    part, row = self._part(number)
    return part.content_hash(row, modality)

  def _identity(self, number: int, modality: str) -> str:
    part, row = self._part(number)
    return part.identity(row, modality)

  def _where(self, number: int) -> str:
    part, row = self._part(number)
    return part.where(row)


def joined(parts: Sequence[Source], *, name: str = "", field: str = "label", unique: bool = True) -> Source:
  """Several sources as one; records of equal label are one group, also across the parts.

  Args:
    parts: one and more.
    name: of the whole; the first part's unless given.
    field: whose values make the groups; "label" is known without parsing records.
    unique: refuses an id that two records have.

  Raises:
    ValueError: naming both records of one id.
  """
  if len(parts) == 1:
    return parts[0]
  modalities = tuple(dict.fromkeys(m for part in parts for m in part.index.modalities))
  labels = tuple(dict.fromkeys(label for part in parts for label in part.index.labels))
  number = {label: n for n, label in enumerate(labels)}
  columns: dict[str, list[np.ndarray]] = {"has": [], "label": []}
  for part in parts:
    bits = np.zeros(len(part), np.uint32)
    for bit, modality in enumerate(part.index.modalities):
      bits |= ((part.index.has >> np.uint32(bit)) & np.uint32(1)) << np.uint32(modalities.index(modality))
    columns["has"].append(bits)
    known = np.array([*(number[label] for label in part.index.labels), -1], np.int32)
    columns["label"].append(known[part.index.label])
  for column in ("split", "ids"):
    columns[column] = [getattr(part.index, column) for part in parts]
  whole = {column: np.concatenate(values) for column, values in columns.items()}
  whole["where"] = _Zeros((len(whole["ids"]), 2), "<i8").array()
  index = Index(modalities, labels=labels, group=groups_of(whole["label"]), **whole)
  source = Joined(name or parts[0].name, index, parts)
  if unique and (pair := twice(index)):
    a, b = pair
    raise ValueError(f"id {source.fields(a)['id']!r} is there twice: {source.where(a)} and {source.where(b)}")
  return source if field == "label" else source.grouped(field)

"""Records by number: the interface of a source of training or evaluation data.

A record has fields (`id`, `label`, `text`: the list of captions, the main one first, and others), and items of
modalities: a path, a file's bytes or an array, which is not decoded here. A modality that a record lacks is absent.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from codebind_jax.data import ranges, transforms
from codebind_jax.data.index import Index, groups_of, known_modalities, renumbered
from codebind_jax.data.paged import Zeros, mapped, referred


class Source(abc.ABC):
  """Records by number. A source is picklable, and reading is safe from many threads: pread, never seek and read.

  Attributes:
    name: for logs and errors.
    index: of its records.
    left_out: what is wrong with records that could not be parsed, which are no part of it.
    block: number of records that are read together (a row group of Parquet); 1 where any order is cheap.
  """

  block = 1

  def __init__(self, name: str, index: Index, made_from: str = ""):
    self.name, self.index = name, index
    self.left_out: tuple[str, ...] = ()
    self._made_from = made_from  # a hash of what the index does not tell, where a format knows one
    self._numbers: np.ndarray | None = None  # of the records selected, in the file

  def __getstate__(self) -> dict[str, Any]:
    return referred(self.__dict__)

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(mapped(state))

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

  def close(self) -> None:
    """Closes what reading has opened, but what a thread is reading; a later read opens it anew."""
    ranges.close()

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

  def content_of_item(self, row: int, modality: str, item: str | bytes | Path | np.ndarray) -> str:
    """Equal for items of equal content, told from an item that `read` has given; see `_item_content`."""
    return self._item_content(self._number(row), modality, item)

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
    places = Zeros((len(rows), 2), "<i8").array()  # a record is found by its number in the file
    columns = {name: getattr(self.index, name)[rows] for name in ("has", "label", "split", "ids")}
    group = renumbered(self.index.group[rows])
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

  def _hash(self, number: int, modality: str) -> str:
    """`content_hash` by the number in the file: of the captions, or of the item's bytes."""
    if modality == "text":
      content = json.dumps(self._fields(number)["text"]).encode()
    else:
      content = content_of(self._read(number, modality))
    return hashlib.sha256(modality.encode() + content).hexdigest()

  def _item_content(self, number: int, modality: str, item: str | bytes | Path | np.ndarray) -> str:
    """`content_of_item` by the number in the file: of the bytes, of a file beyond 64 MB of blocks of them."""
    if isinstance(item, str | Path) and Path(item).is_file():
      return ranges.mark(Path(item))
    return hashlib.sha256(content_of(item)).hexdigest()

  def _identity(self, number: int, modality: str) -> str:
    """`identity` by the number in the file."""
    return ""

  def _where(self, number: int) -> str:
    """`where` by the number in the file."""
    return f"{self.name}: record {number}"


def content_of(item: str | bytes | Path | np.ndarray) -> bytes:
  """The bytes of an item: of a file, of all files of a folder (a film in frames), or of an array and its form."""
  if isinstance(item, bytes):
    return item
  if isinstance(item, np.ndarray):
    return f"{item.dtype}{item.shape}".encode() + item.tobytes()
  path = Path(item)
  if path.is_dir():
    return b"".join(part.name.encode() + part.read_bytes() for part in sorted(path.iterdir()) if part.is_file())
  return path.read_bytes()

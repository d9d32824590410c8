"""Ids of an index, each once, in few bytes: as Arrow's strings, as 64-bit integers, or as ranges of integers."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_PART = 1 << 16  # ids that are laid down together; so many of the last ones are a list
_ODD = np.uint64(0x9E3779B97F4A7C15)


class Ids:
  """A growing list of ids of one kind, strings or integers.

  Strings take their bytes and 8 more: where they end, and a hash of 32 bits by which a repeated one is found. Integers
  take 12 bytes, or none where they follow one another.
  """

  def __init__(self):
    self._kind: type | None = None
    self._parts: list[pa.StringArray | np.ndarray | range] = []
    self._ends: list[int] = []
    self._tail: list[Any] = []
    self._recent: set[Any] = set()  # those of the tail
    self._hashes = np.zeros(0, np.uint32)  # of those laid down, sorted

  def __len__(self) -> int:
    return (self._ends[-1] if self._ends else 0) + len(self._tail)

  def __getitem__(self, number: int) -> str | int:
    place = bisect.bisect_right(self._ends, number)
    first = self._ends[place - 1] if place else 0
    if place == len(self._parts):
      return self._tail[number - first]
    value = self._parts[place][number - first]
    return value.as_py() if isinstance(value, pa.Scalar) else int(value)

  def checked(self, ids: Any, first: int | None = None) -> Sequence[Any]:
    """Ids that may be added, plain; a range stays one.

    Args:
      ids: strings or integers.
      first: the row of a file that the first one is in, for errors.

    Raises:
      ValueError: naming the first that is of another kind, or there already.
    """
    if isinstance(ids, np.ndarray) and ids.dtype.kind == "i" and len(ids) and (np.diff(ids) == 1).all():
      ids = range(int(ids[0]), int(ids[-1]) + 1)
    if isinstance(ids, range) and ids.step == 1 and self._kind in (int, None) and ids and not self._tail:
      if all(isinstance(part, range) and (part.stop <= ids.start or ids.stop <= part.start) for part in self._parts):
        if -(2**63) <= ids.start and ids.stop <= 2**63:
          return ids
    kind, fresh, names = self._kind, set(), []
    known = self._known(ids)
    for number, value in enumerate(ids):
      try:
        name = plain(value)
        kind = kind or type(name)
        if type(name) is not kind:
          raise ValueError(f"ids: got {name!r} in an index of {kind.__name__}; allowed: one kind alone")
        if name in fresh or name in self._recent or name in known:
          raise ValueError(f"ids: {name!r} is there twice; allowed: each id once")
      except ValueError as error:
        raise error if first is None else ValueError(f"row {first + number}: {error}") from error
      fresh.add(name)
      names.append(name)
    return names

  def _known(self, ids: Sequence[Any]) -> set[Any]:
    """Those of some ids that are laid down already."""
    if not self._parts:
      return set()
    names = [value for value in map(_same, ids) if isinstance(value, self._kind)]
    if self._kind is int:
      names = [value for value in names if -(2**63) <= value < 2**63]
    hashes = _hashes(names)
    at = np.minimum(np.searchsorted(self._hashes, hashes), max(len(self._hashes) - 1, 0))
    maybe = {names[n] for n in np.flatnonzero(self._hashes[at] == hashes)} if len(self._hashes) else set()
    found: set[Any] = set()
    for part in self._parts:
      if isinstance(part, range):
        found.update(value for value in names if value in part)
      elif maybe and isinstance(part, np.ndarray):
        found.update(part[np.isin(part, np.array(list(maybe), np.int64))].tolist())
      elif maybe:
        found.update(part.filter(pc.is_in(part, pa.array(list(maybe), pa.string()))).to_pylist())
    return found

  def add(self, names: Sequence[Any]) -> None:
    """Adds what `checked` gave."""
    if not names:
      return
    self._kind = type(names[0])
    if isinstance(names, range):
      if self._parts and isinstance(self._parts[-1], range) and self._parts[-1].stop == names.start:
        self._parts[-1] = range(self._parts[-1].start, names.stop)
        self._ends[-1] += len(names)
      else:
        self._lay(names)
      return
    self._tail += names
    self._recent.update(names)
    while len(self._tail) >= _PART:
      some, self._tail = self._tail[:_PART], self._tail[_PART:]
      self._recent = set(self._tail) if len(self._tail) < _PART else self._recent
      if self._kind is int and some == list(range(some[0], some[0] + len(some))):
        self.add(range(some[0], some[0] + len(some)))
        continue
      self._hashes = np.sort(np.concatenate([self._hashes, _hashes(some)]), kind="stable")
      self._lay(pa.array(some, pa.string()) if self._kind is str else np.array(some, np.int64))

  def _lay(self, part: pa.StringArray | np.ndarray | range) -> None:
    self._ends.append((self._ends[-1] if self._ends else 0) + len(part))
    self._parts.append(part)

  def array(self, start: int, stop: int) -> pa.Array:
    """A run of ids as a column."""
    pieces, first = [], 0
    for part, end in zip([*self._parts, self._tail], [*self._ends, len(self)]):
      some = part[max(start - first, 0) : max(stop - first, 0)]
      if len(some):
        kind = pa.string() if self._kind is str else pa.int64()
        pieces.append(some if isinstance(some, pa.Array) else pa.array(np.asarray(some) if kind == pa.int64() else some,
                                                                        kind))  # fmt: skip
      first = end
    return pa.concat_arrays(pieces) if pieces else pa.array([], pa.int64() if self._kind is int else pa.string())

  def take(self, numbers: np.ndarray) -> np.ndarray:
    """Ids by number, in the shape of the numbers."""
    return np.array([self[int(number)] for number in numbers.flat]).reshape(numbers.shape)

  @property
  def nbytes(self) -> int:
    """Bytes of what is laid down."""
    return self._hashes.nbytes + sum(part.nbytes for part in self._parts if not isinstance(part, range))


def check_list(ids: Any) -> None:
  """Refuses what is no list of ids.

  Raises:
    ValueError: naming what was given.
  """
  if not isinstance(ids, Sequence | np.ndarray) or isinstance(ids, str | bytes) or np.ndim(ids) != 1:
    raise ValueError(f"ids: got {ids!r:.60}; a list of ids is needed, [id] for one")


def plain(value: Any) -> str | int:
  """An id as Python's own string or integer.

  Raises:
    ValueError: for another type, a string of half a surrogate pair, or an integer beyond 64 bits.
  """
  if isinstance(value, str):
    name = str(value)
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
      raise ValueError(f"ids: got {name!r}, which has half a surrogate pair; allowed: strings of whole characters")
    return name
  if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
    if not -(2**63) <= value < 2**63:
      raise ValueError(f"ids: got {value!r}; allowed: integers of 64 bits, or strings")
    return int(value)
  raise ValueError(f"ids: got {value!r}; allowed: strings or integers")


def _same(value: Any) -> Any:
  return str(value) if isinstance(value, str) else int(value) if isinstance(value, np.integer) else value


def _hashes(names: Sequence[Any]) -> np.ndarray:
  if names and isinstance(names[0], str):
    return np.fromiter((hash(name) & 0xFFFFFFFF for name in names), np.uint32, len(names))
  with np.errstate(over="ignore"):
    return ((np.array(names, np.int64).view(np.uint64) * _ODD) >> np.uint64(32)).astype(np.uint32)

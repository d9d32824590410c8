"""What is known of all records of a source at once: numpy columns, made record by record."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int8, Int32, Int64, UInt32, UInt64

from codebind_jax.data import transforms
from codebind_jax.data.paged import Zeros, mapped, referred

MODALITIES = ("image", "text", "audio", "video", "depth", "points", "thermal", "tactile", "eeg")
SPLITS = ("train", "val", "test")
_blake2b = hashlib.blake2b
_number = functools.partial(int.from_bytes, byteorder="little")
_NONE: Mapping[str, Any] = {}


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
    group: number of its group, by first appearance; records of one group are not each other's negatives. They have one
      label; or no label, and an item that is one file (five captions of a picture), also over several such files. A
      record with neither is its own group. Noticed here is the same path as JSON lines, CSV and TSV write it, in one
      file of records; equal bytes of whatever source are noticed where batches are made, in tokens that are cached
      (`batches.SourceBatches`). Not noticed are one file under paths written in two ways or bytes in several records
      where nothing is cached, and records of one picture that have different labels.
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
    return referred(self.__dict__)

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(mapped(state))

  def take(self, rows: Int[np.ndarray, "m"]) -> Index:
    """The index of some of the records, in the order given."""
    columns = {name: getattr(self, name)[rows] for name in ("has", "label", "split", "group", "ids")}
    none = not any(self.where.strides)
    columns["where"] = Zeros((len(rows), 2), "<i8").array() if none else self.where[rows]
    return dataclasses.replace(self, **columns)

  def bit(self, modality: str) -> int:
    """The bit of `has` that stands for a modality; 0 for one that no record has."""
    return 1 << self.modalities.index(modality) if modality in self.modalities else 0

  def label_of(self, row: int) -> str | None:
    """The label of a record."""
    return self.labels[self.label[row]] if self.label[row] >= 0 else None


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


def unified(group: Int[np.ndarray, "n"], label: Int[np.ndarray, "n"]) -> Int32[np.ndarray, "n"]:
  """Groups of which those that hold one label (not -1) are one, by first appearance.

  >>> unified(np.array([0, 1, 2, 3, 2]), np.array([7, -1, 7, -1, -1])).tolist()
  [0, 1, 0, 2, 0]
  """
  into, labelled = np.arange(int(group.max(initial=-1)) + 1, dtype=np.int32), np.flatnonzero(label >= 0)
  first = np.full(int(label.max(initial=-1)) + 1, -1, np.int32)
  first[label[labelled[::-1]]] = group[labelled[::-1]]
  into[group[labelled]] = first[label[labelled]]
  return renumbered(into[group])


def of_contents(
  group: Int[np.ndarray, "n"], label: Int[np.ndarray, "n"], contents: Sequence[Int[np.ndarray, "n"]]
) -> Int32[np.ndarray, "n"]:
  """Groups of which those without labels that share a content are one, by first appearance.

  Groups with a label stay apart, since a picture of two labels would make its classes one; a group without labels that
  shares a content with one of them joins the first such.

  Args:
    group: of each record.
    label: of each record; -1 for none.
    contents: of each modality, number of each record's content; below 0 for none.

  >>> of_contents(np.arange(5), np.full(5, -1), [np.array([3, 4, 3, -1, -1]), np.array([-1, 8, -1, 8, 9])]).tolist()
  [0, 1, 0, 1, 2]
  >>> of_contents(np.arange(4), np.array([0, 1, -1, -1]), [np.array([3, 3, 3, 5])]).tolist()
  [0, 1, 0, 2]
  """
  ends, start = [], int(group.max(initial=-1)) + 1
  for content in contents:
    there = np.flatnonzero(content >= 0)
    names, number, count = np.unique(content[there], return_inverse=True, return_counts=True)
    repeated = count[number.reshape(-1)] > 1
    if repeated.any():
      ends.append((there[repeated], start + number.reshape(-1)[repeated]))
      start += len(names)
  if not ends:
    return group.astype(np.int32, copy=False)
  # Imported here, as few sources need it: SciPy's graphs take a while to load.
  import scipy.sparse.csgraph

  rows, places = (np.concatenate(column) for column in zip(*ends))
  fixed = np.zeros(start, bool)
  fixed[group[label >= 0]] = True
  free = ~fixed[group[rows]]
  edges = (np.ones(int(free.sum()), bool), (group[rows[free]], places[free]))
  part = scipy.sparse.csgraph.connected_components(scipy.sparse.csr_array(edges, shape=(start, start)), False)[1]
  joins = np.full(start, start, np.int64)  # component -> the first group with labels that it shares a content with
  np.minimum.at(joins, part[places[~free]], group[rows[~free]])
  first = np.full(start, start, np.int64)  # component -> its first group
  np.minimum.at(first, part[group], group)
  own = np.where(fixed[group], group, np.where(joins[part[group]] < start, joins[part[group]], first[part[group]]))
  return renumbered(own.astype(np.int32))


def renumbered(group: Int32[np.ndarray, "n"]) -> Int32[np.ndarray, "n"]:
  """Numbers of groups by first appearance, where some numbers may be missing."""
  first = np.full(int(group.max(initial=-1)) + 1, -1, np.int32)
  first[group[::-1]] = np.arange(len(group), dtype=np.int32)[::-1]  # of a row that is written twice, the last stays
  there = np.flatnonzero(first >= 0)
  first[there[np.argsort(first[there])]] = np.arange(len(there), dtype=np.int32)
  return first[group]


def of_labels(index: Index, same: Mapping[str, str]) -> Index:
  """The index whose groups of labels that are the `same` as another one are the other's.

  >>> index = index_of([{"id": n, "label": n} for n in ("cow", "Cow", "dog")], [["image"]] * 3)
  >>> of_labels(index, {"Cow": "cow"}).group.tolist()
  [0, 0, 1]
  """
  number: dict[str, int] = {}
  into = [number.setdefault(same.get(label, label), n) for n, label in enumerate(index.labels)]
  return dataclasses.replace(index, group=unified(index.group, np.array([*into, -1], np.int64)[index.label]))


class IndexBuilder:
  """Makes an `Index` record by record."""

  def __init__(self):
    self._modalities: dict[str, int] = {}
    self._labels: dict[str, int] = {}
    self._has, self._label, self._split = array("I"), array("i"), array("b")
    self._where, self._ids = array("q"), array("Q")
    self._files: dict[str, tuple[array, array]] = {}  # modality -> records, and what stands for their files' paths

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
    splits: Sequence[str | None], where: Int64[np.ndarray, "n 2"], paths: Mapping[str, Mapping[int, str]] = _NONE,
  ) -> None:  # fmt: skip
    """Adds records as `add` does, faster; `has` are their `bits`, `paths` their files by modality and place."""
    for modality, by_place in paths.items():
      records, files = self._files.setdefault(modality, (array("q"), array("q")))
      records.extend([len(self) + place for place in by_place])
      files.extend([hash(path) >> 1 & (1 << 62) - 1 for path in by_place.values()])
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
    group = groups_of(label) if unlabelled else label  # labels are numbered by first appearance, as groups are
    if unlabelled and self._files:
      contents = []
      for records, files in self._files.values():
        contents.append(np.full(len(label), -1, np.int64))
        contents[-1][column(records, np.int64)] = column(files, np.int64)
      group = of_contents(group, label, contents)
    return Index(
      tuple(self._modalities), column(self._has, np.uint32), label, tuple(self._labels), column(self._split, np.int8),
      group, column(self._where, np.int64).reshape(-1, 2), column(self._ids, np.uint64),
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

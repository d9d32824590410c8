"""Batches of rows with precomputed trunk features, as a function of the step.

A batch depends neither on earlier batches nor on the number of processes, threads or workers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import mmap
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int, Shaped

from codebind_jax.data.ahead import ahead

Batch = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class FeatureTable:
  """Tokens or prepared items of one modality for the rows of a source.

  Attributes:
    features: tokens [items, views, tokens, width], or prepared items [items, views, *shape]; may be a
      memory map, which a worker process opens again.
    choices: per row the items to draw from (the captions of a text row; one item for an image); empty if missing.
    augmented: probability of drawing one of the augmented views, which follow the clean first one.
    made_from: a hash of all that the features were computed from; "" to hash the features themselves.
  """

  features: Shaped[np.ndarray, "items views ..."]
  choices: Sequence[Sequence[int]]
  augmented: float = 0.0
  made_from: str = ""

  @property
  def fingerprint(self) -> str:
    """`made_from`, or a hash of the features."""
    return self.made_from or _hash(np.ascontiguousarray(self.features).data)

  def __reduce__(self) -> tuple[Any, ...]:
    features, rest = self.features, (self.choices, self.augmented, self.made_from)
    # A slice of a map has the map as its base instead of the file, and does not know its offset in the file.
    mapped = isinstance(features, np.memmap) and isinstance(features.base, mmap.mmap) and features.filename
    if mapped and features.flags.c_contiguous:
      return _opened, (str(features.filename), features.dtype, features.offset, features.shape, *rest)
    return FeatureTable, (features, *rest)


def _opened(path: str, dtype: np.dtype, offset: int, shape: tuple[int, ...], *rest: Any) -> FeatureTable:
  return FeatureTable(np.memmap(path, dtype, "r", offset, shape), *rest)


class _Pick(grain.transforms.RandomMap):
  """Group number -> one row's features: draws the member, the caption and the augmented view."""

  def __init__(self, tables: Mapping[str, FeatureTable], members: Sequence[Sequence[int]], groups: np.ndarray):
    self._tables, self._members, self._groups = dict(tables), members, groups

  def random_map(self, group: int, rng: np.random.Generator) -> dict:
    members = self._members[group]
    row = members[rng.integers(len(members))]
    out: dict = {"_mask": {}, "_row": np.int32(row), "_group": self._groups[row]}
    for name, table in self._tables.items():
      items, (_, views, *shape) = table.choices[row], table.features.shape
      out["_mask"][name] = np.bool_(bool(items))
      if items:
        view = 1 + rng.integers(views - 1) if views > 1 and rng.random() < table.augmented else 0
        out[name] = np.asarray(table.features[items[rng.integers(len(items))], view])
      else:
        out[name] = np.zeros(shape, table.features.dtype)
    return out


class _Order(grain.transforms.RandomMap):
  """Step -> an order of a batch's rows."""

  def __init__(self, rows: int):
    self._rows = rows

  def random_map(self, step: int, rng: np.random.Generator) -> Int[np.ndarray, "b"]:
    return rng.permutation(self._rows)


def group_rows(labels: Sequence[str | None]) -> list[list[int]]:
  """Groups of rows of equal label, in order of first appearance; a row without label is its own group."""
  groups: dict = {}
  for row, label in enumerate(labels):
    groups.setdefault(("row", row) if label is None else ("label", label), []).append(row)
  return list(groups.values())


class SourceBatches:
  """One source's rows of every batch: `{modality: [b, n, d], _mask: {modality: bool [b]}, _row, _group: int32 [b]}`.

  Rows of equal `_group` have the same label. With `unique_labels` an epoch visits every label once and draws one of its
  rows, so that no batch holds two rows that are each other's false negatives.

  The last `extra` rows are further data, which may have many more labels than the others: `extra_share` of a batch is
  drawn from those of their labels that no other row has, so that both kinds have their own epochs. Rows of both kinds
  are in random order, so that mixup also mixes rows of different kinds.

  Attributes:
    fingerprint: all that decides the batches, as JSON-ready values by description.

  Args:
    tables: modality -> FeatureTable, all over the same rows.
    labels: per row its label, or None.
    rows: of the global batch.
    seed: of the order and of every draw.
    unique_labels: at most one row of a label in a batch.
    extra: number of the last rows that are further data.
    extra_share: their share of the global batch, rounded to whole rows.
    name: of the source, for errors.
    process: number of the reading process.
    processes: number of processes that share a batch; each reads consecutive rows of it.

  Raises:
    ValueError: if a part of the batch is larger than its data or empty, or the batch does not divide over the
      processes.
  """

  def __init__(
    self, tables: Mapping[str, FeatureTable], labels: Sequence[str | None], *, rows: int, seed: int,
    unique_labels: bool = True, extra: int = 0, extra_share: float = 0.0, name: str = "source", process: int = 0,
    processes: int = 1,
  ):  # fmt: skip
    if rows < 1 or rows % processes:
      raise ValueError(f"batch_size of {name!r}: {rows} must be a positive multiple of the {processes} processes")
    self._extra = round(extra_share * rows) if extra else 0
    if extra and extra_share and not 0 < self._extra < rows:
      raise ValueError(f"config.data.extra: got {extra_share}, which is {self._extra} of the {rows} rows of {name!r}; "
                       f"allowed: 0, or a share of 1 to {rows - 1} rows")  # fmt: skip
    self._first = rows - self._extra
    self._own = range(rows)[process * (rows // processes) : (process + 1) * (rows // processes)]
    self.fingerprint = {
      "rows": len(labels), "labels": _hash(json.dumps(list(labels))), "further rows": extra, "rows of a batch": rows,
      "further rows of a batch": self._extra, "unique_labels": unique_labels, "seed": seed,
    }  # fmt: skip
    for m, table in tables.items():
      self.fingerprint |= {
        f"rows with {m}": sum(map(bool, table.choices)), f"features of {m}": table.fingerprint,
        f"choices of {m}": _hash(json.dumps(list(map(list, table.choices)))), f"augmented {m}": table.augmented,
      }  # fmt: skip
    same = group_rows(labels)
    numbers = np.empty(len(labels), np.int32)
    for number, group in enumerate(same):
      numbers[group] = number
    members = same if unique_labels else [[row] for row in range(len(labels))]

    def draws(groups: Sequence[Sequence[int]], size: int, seed: int) -> grain.MapDataset:
      if size > len(groups):
        what = "distinct labels (unique_labels is on)" if unique_labels else "rows"
        raise ValueError(f"batch_size of {name!r}: {size} is larger than its {len(groups)} {what}")
      drawn = grain.MapDataset.source(range(len(groups))).seed(seed).shuffle()
      return drawn.random_map(_Pick(tables, groups, numbers))[: len(groups) // size * size]

    self._main = draws([group for group in members if group[0] < len(labels) - extra], self._first, seed)
    if self._extra:
      self._further = draws([group for group in members if group[0] >= len(labels) - extra], self._extra, seed + 1)
      self._order = grain.MapDataset.range(sys.maxsize).seed(seed).random_map(_Order(rows))

  def __getitem__(self, step: int) -> dict[str, Any]:
    places = self._order[step][self._own] if self._extra else self._own
    return _stacked([self._row(step, int(place)) for place in places])

  def _row(self, step: int, place: int) -> dict[str, Any]:
    """Row of the global batch, before the random order: the further data is last."""
    if place < self._first:
      return self._main[step * self._first + place]
    return self._further[step * self._extra + place - self._first]


class Batches:
  """The batches of one stage: `batches[step]` is `{source: rows}`, with this process's rows as of `SourceBatches`.

  Steps count from the beginning of the stage: a stage draws from all of its data anew.

  Args:
    sources: source name -> its rows of every batch.
    keep: keeps every batch read in memory, for several runs with the same batches.
  """

  def __init__(self, sources: Mapping[str, SourceBatches], keep: bool = False):
    self._sources = dict(sources)
    self._read = functools.cache(self._drawn) if keep else self._drawn

  def __reduce__(self) -> tuple[Any, ...]:
    return Batches, (self._sources,)  # a worker process gets no kept batches

  @property
  def fingerprint(self) -> dict[str, dict[str, Any]]:
    """Source -> `SourceBatches.fingerprint`; the same on every process."""
    return {name: source.fingerprint for name, source in self._sources.items()}

  def __getitem__(self, step: int) -> Batch:
    return self._read(step)

  def _drawn(self, step: int) -> Batch:
    return {name: source[step] for name, source in self._sources.items()}

  def start(self, step: int = 0, *, workers: int = 0, threads: int = 2) -> Iterator[Batch]:
    """The batches from a step on, without end, read ahead; see `ahead`. Close the iterator when done."""
    return ahead(self, step, workers=workers, threads=threads)


def _stacked(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Rows with equal keys, stacked into one batch."""
  stack = lambda values: _stacked(values) if isinstance(values[0], dict) else np.stack(values)
  return {key: stack([row[key] for row in rows]) for key in rows[0]}


def _hash(value: Any) -> str:
  """First 16 hex digits of the SHA-256 of a string or buffer."""
  return hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()[:16]

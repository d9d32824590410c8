"""Grain input: rows with precomputed trunk features -> batches of tokens with masks, exactly resumable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Float16


@dataclasses.dataclass(frozen=True)
class FeatureTable:
  """Features of one modality for the rows of a source.

  Attributes:
    features: [items, views, tokens, width]; may be a memory map.
    choices: per row the items it may draw from (captions of a text row; one item for an image); empty = missing.
    augmented: how often one of the views after the first, which is clean, is drawn.
  """

  features: Float16[np.ndarray, "items views n d"]
  choices: Sequence[Sequence[int]]
  augmented: float = 0.0


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


class _Join(grain.transforms.RandomMap):
  """Parts of a batch -> one batch in random order, so that mixup also mixes rows of different parts."""

  def random_map(self, parts: tuple[dict, ...], rng: np.random.Generator) -> dict:
    order = rng.permutation(sum(len(part["_row"]) for part in parts))
    return jax.tree.map(lambda *columns: np.concatenate(columns)[order], *parts)


def group_rows(labels: Sequence[str | None]) -> list[list[int]]:
  """Rows that share a label form one group, in order of first appearance; a row without label is its own group."""
  groups: dict = {}
  for row, label in enumerate(labels):
    groups.setdefault(("row", row) if label is None else ("label", label), []).append(row)
  return list(groups.values())


def make_iterator(
  tables: Mapping[str, FeatureTable],
  labels: Sequence[str | None],
  *,
  batch_size: int,
  seed: int,
  unique_labels: bool = True,
  extra: int = 0,
  extra_share: float = 0.0,
  name: str = "source",
  threads: int = 2,
) -> grain.DatasetIterator:
  """Endless shuffled batches `{modality: [b, n, d], _mask: {modality: bool [b]}, _row: int32 [b], _group: int32 [b]}`.

  Rows of equal `_group` have the same label.

  With `unique_labels` an epoch visits every label once and draws one of its rows, so that no batch holds two rows
  that are each other's false negatives. Each process yields its own rows of the global batch, which is
  the same for any number of them. The iterator's state goes into the checkpoint.

  The last `extra` rows are further data, which may be many more labels than the others: `extra_share` of a batch is
  drawn from those of their labels that no other row has, so that both kinds keep their own epochs.

  Args:
    tables: modality -> FeatureTable, all over the same rows.
    labels: per row its label, or None.
    batch_size: rows of the global batch.
    seed: of the order and of every draw.
    unique_labels: at most one row of a label in a batch.
    extra: how many of the rows, the last ones, are further data.
    extra_share: their share of a batch, rounded to whole rows a process.
    name: of the source, for errors.
    threads: that draw batches ahead of the loop, in the same order however many there are.

  Raises:
    ValueError: if a part of the batch is larger than its data, or the batch does not divide over the processes.
  """
  same = group_rows(labels)
  numbers = np.empty(len(labels), np.int32)
  for number, group in enumerate(same):
    numbers[group] = number
  members = same if unique_labels else [[row] for row in range(len(labels))]
  shards = jax.process_count()
  if batch_size < 1 or batch_size % shards:
    raise ValueError(f"batch_size of {name!r}: {batch_size} must be a positive multiple of the {shards} processes")
  rows, first = batch_size // shards, len(labels) - extra
  extra_rows = round(extra_share * rows) if extra else 0

  def batches(groups: Sequence[Sequence[int]], size: int, seed: int) -> grain.MapDataset:
    if size * shards > len(groups):
      what = "distinct labels (unique_labels is on)" if unique_labels else "rows"
      raise ValueError(f"batch_size of {name!r}: {size * shards} is larger than its {len(groups)} {what}")
    # Every process draws the same global batches and reads its own consecutive rows of each, so that the batches do
    # not depend on how many processes there are.
    dataset = grain.MapDataset.source(range(len(groups))).seed(seed).shuffle()
    dataset = dataset.random_map(_Pick(tables, groups, numbers))[: len(groups) // (size * shards) * size * shards]
    return dataset.batch(size, drop_remainder=True)[jax.process_index() :: shards].repeat()

  dataset = batches([group for group in members if group[0] < first], rows - extra_rows, seed)
  if extra_rows:
    further = batches([group for group in members if group[0] >= first], extra_rows, seed + 1)
    dataset = grain.experimental.ZipMapDataset([dataset, further]).seed(seed).random_map(_Join())
  return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4)))


class Drawn:
  """The batches of an iterator, kept as they are drawn, for runs that all read the same ones.

  Args:
    make: an iterator at its beginning, the same at each call.
  """

  def __init__(self, make: Callable[[], Any]):
    self._make, self._source = make, make()
    self._batches: list[Any] = []
    self._states = [self._source.get_state()]

  def batch(self, number: int) -> Any:
    """The batch of that number, from 0."""
    while len(self._batches) <= number:
      self._batches.append(next(self._source))
      self._states.append(self._source.get_state())
    return self._batches[number]

  def state(self, number: int) -> Any:
    """The iterator's state before that batch, one of those that have been asked for or the next."""
    return self._states[number]

  def at(self, state: Any) -> int | None:
    """The number of the batch that follows a state; None where it has not been drawn."""
    return next((number for number, known in enumerate(self._states) if known == state), None)

  def fresh(self, state: Any) -> Any:
    """The iterator itself, at a state."""
    found = self._make()
    found.set_state(state)
    return found


class Replay:
  """Iterates over what `Drawn` keeps, from its beginning; its states are those of the iterator behind it."""

  def __init__(self, drawn: Drawn):
    self._drawn, self._next, self._own = drawn, 0, None

  def __iter__(self) -> Replay:
    return self

  def __next__(self) -> Any:
    if self._own is not None:
      return next(self._own)
    self._next += 1
    return self._drawn.batch(self._next - 1)

  def get_state(self) -> Any:
    """What a checkpoint keeps."""
    return self._drawn.state(self._next) if self._own is None else self._own.get_state()

  def set_state(self, state: Any) -> None:
    """Goes on from a state; from one beyond the kept batches by an iterator of its own."""
    number = self._drawn.at(state)
    self._next, self._own = (number, None) if number is not None else (0, self._drawn.fresh(state))

"""Grain input: rows with precomputed trunk features -> batches of tokens with masks, exactly resumable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

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
  workers: int = 0,
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
    workers: processes that read, each with its copy of the tables; 0 for threads of this one. The batches are the
      same, but an iterator's state is of use to one with equally many only.

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
  read = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
  return iter(read.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)) if workers else read)

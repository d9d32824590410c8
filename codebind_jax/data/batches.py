"""Batches of examples, as a function of the step.

A batch depends neither on earlier batches nor on the number of processes, threads or workers. What cannot be read is
masked, so that the order of rows never changes.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np
from absl import logging
from jaxtyping import Bool, Int, Int32, Shaped

from codebind_jax.data.ahead import ahead, spread
from codebind_jax.data.examples import Feed, Tokens, digest, stacked
from codebind_jax.data.index import of_contents
from codebind_jax.data.order import BlockOrder
from codebind_jax.data.records import Source

Batch = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Bad:
  """An item that could not be read.

  Attributes:
    source: name of its source.
    row: its number there.
    modality: which of its items.
    message: where it is, and what is wrong.
  """

  source: str
  row: int
  modality: str
  message: str


@dataclasses.dataclass(frozen=True)
class Examples:
  """A batch and how it was made.

  Attributes:
    batch: as of `Batches`.
    bad: items that could not be read, which are masked.
    seconds: modality -> time of reading, decoding, augmenting and preparing.
    read: source -> bytes read.
  """

  batch: Batch
  bad: tuple[Bad, ...] = ()
  seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
  read: Mapping[str, int] = dataclasses.field(default_factory=dict)


class _Draw(grain.transforms.RandomMap):
  """Group number -> (row, its items): draws the member, and what the feeds draw."""

  def __init__(
    self, source: Source, feeds: Mapping[str, Feed], starts: np.ndarray | range, members: np.ndarray | range
  ):  # fmt: skip
    self._source, self._feeds, self._starts, self._members = source, dict(feeds), starts, members

  def random_map(self, group: int, rng: np.random.Generator) -> dict[str, Any]:
    first, stop = int(self._starts[group]), int(self._starts[group + 1])
    row = int(self._members[first + rng.integers(stop - first)])
    items, bad, seconds, read = {}, [], {}, 0
    for name, feed in self._feeds.items():
      items[name], started = None, time.perf_counter()
      if feed.has(row):
        try:
          items[name], size = feed.draw(row, rng)
          read += size
        except ValueError as error:
          where = self._source.where(row)
          message = str(error) if where in str(error) else f"{where}: {name}: {error}"
          bad.append((row, name, message))
      seconds[name] = time.perf_counter() - started
    return {"row": row, "items": items, "bad": bad, "seconds": seconds, "read": read}


class _Order(grain.transforms.RandomMap):
  """Step -> an order of a batch's rows."""

  def __init__(self, rows: int):
    self._rows = rows

  def random_map(self, step: int, rng: np.random.Generator) -> Int[np.ndarray, "b"]:
    return rng.permutation(self._rows)


def members_of(
  group: Int32[np.ndarray, "n"],
) -> tuple[Int32[np.ndarray, "g"] | range, Int32[np.ndarray, "n"] | range]:
  """(first member of each group and the number of rows, rows by group), of groups numbered by first appearance.

  Ranges, which need no memory, where every row is its own group.
  """
  rows, block = len(group), 1 << 20
  if all((group[n : n + block] == np.arange(n, min(n + block, rows))).all() for n in range(0, rows, block)):
    return range(rows + 1), range(rows)
  starts = np.zeros(int(group.max()) + 2, np.int32)
  np.cumsum(np.bincount(group), out=starts[1:])
  return starts, np.argsort(group, kind="stable").astype(np.int32)


class SourceBatches:
  """One source's rows of every batch: `{modality: [b, ...], _mask: {modality: bool [b]}, _row, _group: int32 [b]}`.

  Rows of equal `_group` are not each other's negatives: those of one group of the index, and those without a label
  whose cached tokens are of one content. With `unique_labels` an epoch visits every group once and draws one of its
  rows, so that no batch holds two rows of one group.

  The last `extra` rows are further data, which may have many more groups than the others: `extra_share` of a batch is
  drawn from those of their groups that no other row has, so that both kinds have their own epochs. Rows of both kinds
  are in random order, so that mixup also mixes rows of different kinds.

  Attributes:
    fingerprint: all that decides the batches, as JSON-ready values by description.

  Args:
    source: the rows.
    feeds: modality -> what its items are read from.
    rows: of the global batch.
    seed: of the order and of every draw.
    unique_labels: at most one row of a group in a batch.
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
    self, source: Source, feeds: Mapping[str, Feed], *, rows: int, seed: int, unique_labels: bool = True,
    extra: int = 0, extra_share: float = 0.0, name: str = "source", process: int = 0, processes: int = 1,
  ):  # fmt: skip
    if rows < 1 or rows % processes:
      raise ValueError(f"batch_size of {name!r}: {rows} must be a positive multiple of the {processes} processes")
    self._extra = round(extra_share * rows) if extra else 0
    if extra and extra_share and not 0 < self._extra < rows:
      raise ValueError(f"config.data.extra: got {extra_share}, which is {self._extra} of the {rows} rows of {name!r}; "
                       f"allowed: 0, or a share of 1 to {rows - 1} rows")  # fmt: skip
    self._name, self._source, self._feeds, self._first = name, source, dict(feeds), rows - self._extra
    tokens = [feed for modality, feed in feeds.items() if modality != "text" and isinstance(feed, Tokens)]
    contents = [feed.places_of(np.arange(len(source))) for feed in tokens]
    self._group = of_contents(source.index.group, source.index.label, contents)
    self._own = range(rows)[process * (rows // processes) : (process + 1) * (rows // processes)]
    self.fingerprint = {
      "files": source.fingerprint(), "rows": len(source), "further rows": extra, "rows of a batch": rows,
      "further rows of a batch": self._extra, "unique_labels": unique_labels, "seed": seed,
      "groups": digest(self._group),
    } | {f"items of {m}": feed.fingerprint for m, feed in feeds.items()}  # fmt: skip
    if unique_labels:
      starts, members = members_of(self._group)
      own = int(self._group[: len(source) - extra].max(initial=-1)) + 1  # of rows other than further data
    else:
      starts, members, own = range(len(source) + 1), range(len(source)), len(source) - extra

    if source.block > 1 and not isinstance(members, range):
      advice = "set unique_labels False, or write shards by codebind_jax.tools.shards"
      logging.warning("%s: rows are read in blocks of %d, but drawn by label from all of them, which is slow; %s",
                      name, source.block, advice)  # fmt: skip

    def draws(first: int, count: int, size: int, seed: int) -> grain.MapDataset:
      if size > count:
        what = "distinct labels (unique_labels is on)" if unique_labels else "rows"
        raise ValueError(f"batch_size of {name!r}: {size} is larger than its {count} {what}")
      draw = _Draw(source, feeds, starts, members)
      if source.block > 1 and not first and isinstance(members, range):
        order = BlockOrder(count, source.block, count // size * size, seed)
        return grain.MapDataset.range(sys.maxsize).seed(seed).map(order).random_map(draw)
      drawn = grain.MapDataset.range(first, first + count).seed(seed).shuffle()
      return drawn.random_map(draw)[: count // size * size]

    self._main = draws(0, own, self._first, seed)
    if self._extra:
      self._further = draws(own, len(starts) - 1 - own, self._extra, seed + 1)
      self._order = grain.MapDataset.range(sys.maxsize).seed(seed).random_map(_Order(rows))

  def examples(self, step: int) -> Examples:
    """This process's rows of a batch."""
    places = self._order[step][self._own] if self._extra else self._own
    drawn = spread(functools.partial(self._row, step), [int(place) for place in places])
    rows = np.array([one["row"] for one in drawn], np.int32)
    batch = {m: stacked([one["items"][m] for one in drawn], feed) for m, feed in self._feeds.items()}
    batch |= {
      "_mask": {m: np.array([one["items"][m] is not None for one in drawn]) for m in self._feeds},
      "_row": rows, "_group": self._group[rows],
    }  # fmt: skip
    bad = tuple(Bad(self._name, *item) for one in drawn for item in one["bad"])
    seconds = {m: sum(one["seconds"][m] for one in drawn) for m in self._feeds}
    return Examples({self._name: batch}, bad, seconds, {self._name: sum(one["read"] for one in drawn)})

  def __getitem__(self, step: int) -> dict[str, Any]:
    return self.examples(step).batch[self._name]

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
    self.examples = functools.cache(self._drawn) if keep else self._drawn

  def __reduce__(self) -> tuple[Any, ...]:
    return Batches, (self._sources,)  # a worker process gets no kept batches

  @property
  def fingerprint(self) -> dict[str, dict[str, Any]]:
    """Source -> `SourceBatches.fingerprint`; the same on every process."""
    return {name: source.fingerprint for name, source in self._sources.items()}

  def __getitem__(self, step: int) -> Batch:
    return self.examples(step).batch

  def _drawn(self, step: int) -> Examples:
    """The batch of a step, and how it was made."""
    parts = {name: source.examples(step) for name, source in self._sources.items()}
    of_modality: dict[str, float] = {}
    for part in parts.values():
      for modality, seconds in part.seconds.items():
        of_modality[modality] = of_modality.get(modality, 0.0) + seconds
    return Examples(
      {name: rows for name, part in parts.items() for rows in part.batch.values()},
      tuple(dataclasses.replace(one, source=name) for name, part in parts.items() for one in part.bad), of_modality,
      {name: size for name, part in parts.items() for size in part.read.values()},
    )  # fmt: skip

  def start(self, step: int = 0, *, workers: int = 0, threads: int = 2) -> Iterator[Examples]:
    """The batches from a step on, without end, read ahead; see `ahead`. Close the iterator when done."""
    return ahead(_Examples(self), step, workers=workers, threads=threads, parts=True)


class _Examples:
  """`Batches.examples` by number."""

  def __init__(self, batches: Batches):
    self._batches = batches

  def __getitem__(self, step: int) -> Examples:
    return self._batches.examples(step)


@dataclasses.dataclass(frozen=True)
class Part:
  """This process's rows of one batch of `once`.

  Attributes:
    items: [b, ...], the last batch padded with zeros.
    good: rows that are neither padding nor unreadable.
    bad: (row, message) of those that could not be read.
    content: a hash of each row's content in two halves, if it was asked for.
  """

  items: Shaped[np.ndarray, "b ..."]
  good: Bool[np.ndarray, "b"]
  bad: tuple[tuple[int, str], ...]
  content: Int32[np.ndarray, "b 2"] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Once:
  """Some rows' items in order, each once, in batches that all processes share; `once[k]` is batch k.

  Attributes:
    feed: of the items.
    numbers: of the rows.
    rows: of the global batch.
    process: number of the reading process.
    processes: that share a batch; each reads consecutive rows of it.
    content: also hashes the content of items that are prepared anew (`Items`).
  """

  feed: Feed
  numbers: Int[np.ndarray, "n"] | range
  rows: int
  process: int = 0
  processes: int = 1
  content: bool = False

  def __len__(self) -> int:
    return -(-len(self.numbers) // self.rows)

  def __getitem__(self, batch: int) -> Part:
    own = self.rows // self.processes
    start = batch * self.rows + self.process * own
    numbers = [int(number) for number in self.numbers[start : start + own]]
    read = spread(self._read, numbers)
    bad = tuple((number, one) for number, one in zip(numbers, read) if isinstance(one, str))
    there = [one if isinstance(one, tuple) else (None, 0) for one in read] + [(None, 0)] * (own - len(read))
    items = [item for item, _ in there]
    content = np.array([content for _, content in there], np.int64).view(np.int32).reshape(-1, 2)
    return Part(stacked(items, self.feed), np.array([item is not None for item in items]), bad,
                content if self.content else None)  # fmt: skip

  def _read(self, number: int) -> tuple[np.ndarray, int] | str | None:
    """An item and its content, what is wrong with it, or None where there is none."""
    try:
      if not self.feed.has(number):
        return None
      return self.feed.clean_and_content(number) if self.content else (self.feed.clean(number), 0)
    except ValueError as error:
      return str(error)

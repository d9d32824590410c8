"""Retrieval between and within modalities: recall at k and the median rank of the first right answer."""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from absl import logging
from jaxtyping import Float, Int

from codebind_jax.evaluators import base
from codebind_jax.evaluators.intervals import measured
from codebind_jax.evaluators.zeroshot import TIE

Relevant = Sequence[Collection[int]] | tuple[np.ndarray, np.ndarray]

# Entries of the similarity matrix held at once: 64 MB of float32, so 50,000 x 50,000 needs no more than that.
_BLOCK = 1 << 24


def first_ranks(
  query: Float[np.ndarray, "..."],
  gallery: Float[np.ndarray, "..."],
  relevant: Relevant,
  *,
  exclude_self: bool = False,
  chunk: int = 0,
  tie: float = TIE,
) -> Int[np.ndarray, "n"]:
  """Rank (from 1) of the best-placed right answer to each query, by cosine.

  The rank is 1 + the number of wrong items that score at least as high as the best right one: ties count against the
  model, so that a collapsed space, in which all cosines are equal, gets the worst rank and not the best. Right items
  never push each other back.

  Args:
    query: [N, D].
    gallery: [M, D].
    relevant: for each query the gallery rows that are right, as N collections of indices; or a pair of id arrays (query
      ids [N], gallery ids [M]) of which equal ids are right.
    exclude_self: query i and gallery row i are one item, which is no answer (retrieval inside a modality); the gallery
      may have more rows than there are queries.
    chunk: queries compared at once; 0 keeps the block of similarities at 64 MB.
    tie: cosines closer than this are equal.

  Raises:
    ValueError: on empty or non-finite embeddings, differing widths or lengths, an index outside the gallery, or a query
      without any right answer.
  """
  query, gallery = base.unit_rows("query", query), base.unit_rows("gallery", gallery)
  base.check_widths(query=query, gallery=gallery)
  if exclude_self and len(query) > len(gallery):
    raise ValueError(
      f"exclude_self: the {len(query)} queries must be the first rows of the gallery, which has {len(gallery)}"
    )
  rows_of = _relevance(relevant, len(query), len(gallery))
  chunk = chunk or max(1, _BLOCK // len(gallery))
  ranks = np.empty(len(query), np.int64)
  for start in range(0, len(query), chunk):
    part = slice(start, min(start + chunk, len(query)))
    right, scores = rows_of(part), query[part] @ gallery.T
    if exclude_self:
      diagonal = np.arange(part.stop - start)
      right[diagonal, start + diagonal] = False
      scores[diagonal, start + diagonal] = -np.inf
    none = ~right.any(axis=1)
    if none.any():
      raise ValueError(f"query {start + int(np.argmax(none))} has no relevant item in the gallery of {len(gallery)}")
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    ranks[part] = 1 + ((scores >= best - tie) & ~right).sum(axis=1)
  return ranks


def _relevance(relevant, queries, items):
  """A function from a slice of queries to the boolean block [slice, items] of right answers."""
  if isinstance(relevant, tuple) and len(relevant) == 2 and all(isinstance(ids, np.ndarray) for ids in relevant):
    base.check_lengths(query=range(queries), query_ids=relevant[0])
    base.check_lengths(gallery=range(items), gallery_ids=relevant[1])
    _, numbers = np.unique(np.concatenate(relevant), return_inverse=True)
    of_query, of_item = numbers[:queries], numbers[queries:]
    return lambda part: of_query[part, None] == of_item[None, :]
  base.check_lengths(query=range(queries), relevant=relevant)
  for row, answers in enumerate(relevant):
    if any(not 0 <= index < items for index in answers):
      raise ValueError(f"relevant[{row}] has an index outside the gallery of {items}: {sorted(answers)}")

  def block(part):
    right = np.zeros((part.stop - part.start, items), bool)
    for row, answers in enumerate(relevant[part]):
      right[row, list(answers)] = True
    return right

  return block


def recall_at_k(
  query: Float[np.ndarray, "..."],
  gallery: Float[np.ndarray, "..."],
  relevant: Relevant,
  ks: Sequence[int] = (1, 5, 10),
  *,
  exclude_self: bool = False,
  chunk: int = 0,
) -> dict[str, float]:
  """Percentage of queries with a right answer among the k nearest, and the median rank; arguments as `first_ranks`.

  Returns:
    `{"r1": ..., "r5": ..., "r10": ..., "median_rank": ...}`; recall 0 ... 100, rank from 1.
  """
  for k in ks:
    if k < 1:
      raise ValueError(f"ks: every k must be at least 1, got {k}")
  ranks = first_ranks(query, gallery, relevant, exclude_self=exclude_self, chunk=chunk)
  recall = {f"r{k}": 100.0 * float(np.mean(ranks <= k)) for k in ks}
  return recall | {"median_rank": float(np.median(ranks))}


@dataclasses.dataclass(frozen=True)
class Retrieval:
  """Retrieval between two modalities, in both directions: `retrieval/<a>_to_<b>/r1` and so on.

  Attributes:
    a: one modality.
    b: the other.
    match: column both have; rows with equal values are right answers to each other. Texts shared by many items should
      come as one row a text (`base.unique_rows`), else frequent texts weigh more.
    part: embedding column compared.
    ks: the k of recall.
    by: part of the names, `retrieval/<a>_to_<b>/<by>/r1`, if two modalities are compared by several fields.
    intervals: also yield `n`, `ways`, `low` and `high` of each recall (`intervals.measured`), which draw the queries
      of one value of `match` together.
  """

  a: str = "text"
  b: str = "image"
  match: str = "label"
  part: str = "shared"
  ks: Sequence[int] = (1, 5, 10)
  by: str = ""
  intervals: bool = False
  name: str = "retrieval"

  def __call__(self, table: base.Table) -> Iterator[tuple[str, float]]:
    """Yields recall and median rank of both directions."""
    sides = {modality: base.columns(table, modality, [self.part, self.match]) for modality in (self.a, self.b)}
    for source, target in ((self.a, self.b), (self.b, self.a)):
      (query, of_query), (gallery, of_item) = sides[source], sides[target]
      ranks = first_ranks(query, gallery, (of_query, of_item))
      name = f"{self.name}/{source}_to_{target}/{f'{self.by}/' if self.by else ''}"
      numbers = functools.partial(measured, ways=len(gallery), groups=of_query, intervals=self.intervals)
      for k in self.ks:
        yield from numbers(f"{name}r{k}", 100.0 * (ranks <= k))
      yield f"{name}median_rank", float(np.median(ranks))


@dataclasses.dataclass(frozen=True)
class Emergent:
  """Retrieval by concept between modalities never trained together: `emergent/<a>_to_<b>/r5` and `.../chance5`.

  Only rows whose concept the other modality also has take part.

  Attributes:
    a: one modality.
    b: the other.
    match: column both have; "" stands for none.
    part: embedding column compared.
    k: of recall.
    intervals: also yield `n`, `ways`, `low` and `high` of each recall (`intervals.measured`), which draw the rows of
      one concept together.
  """

  a: str
  b: str
  match: str = "concept"
  part: str = "shared"
  k: int = 5
  intervals: bool = False
  name: str = "emergent"

  def overlap(self, table: base.Table) -> set[str]:
    """Values of `match` that both modalities have."""
    sides = [set(map(str, table[m].get(self.match, ()))) for m in (self.a, self.b)]
    return (sides[0] & sides[1]) - {""}

  def __call__(self, table: base.Table) -> Iterator[tuple[str, float]]:
    """Yields recall of both directions and its chance level, in percent."""
    common = sorted(self.overlap(table))
    sides = {}
    for modality in (self.a, self.b):
      x, values = base.columns(table, modality, [self.part, self.match])
      keep = np.isin(values, common)
      sides[modality] = x[keep], values[keep]
    for source, target in ((self.a, self.b), (self.b, self.a)):
      (query, of_query), (gallery, of_item) = sides[source], sides[target]
      hits = 100.0 * (first_ranks(query, gallery, (of_query, of_item)) <= self.k)
      name = f"{self.name}/{source}_to_{target}/r{self.k}"
      yield from measured(name, hits, ways=len(gallery), groups=of_query, intervals=self.intervals)
      right = np.array([(of_item == value).sum() for value in of_query])
      chance = 100.0 * float(np.mean(_chance(right, len(gallery), self.k)))
      yield f"{self.name}/{source}_to_{target}/chance{self.k}", chance


def _chance(right: Int[np.ndarray, "n"], items: int, k: int) -> Float[np.ndarray, "n"]:
  """Probability that k of `items` drawn without replacement hold one of the `right`."""
  drawn = np.arange(min(k, items))
  miss = np.clip(items - right[:, None] - drawn, 0, None) / (items - drawn)
  return 1.0 - miss.prod(axis=1)


@dataclasses.dataclass(frozen=True)
class WithinRetrieval:
  """Retrieval of the same label inside one modality: `retrieval/<modality>_to_<modality>/<field>/<part>/r1`.

  Rows whose label no other row has are no queries; they stay in the gallery, and the log counts them.

  Attributes:
    modality: which modality.
    field: column of the fine-grained label.
    parts: embedding columns; None takes all that the table has.
    ks: the k of recall.
    intervals: also yield `n`, `ways`, `low` and `high` of each recall (`intervals.measured`), which draw the rows of
      one label together.
  """

  modality: str
  field: str = "label"
  parts: Sequence[str] | None = None
  ks: Sequence[int] = (1, 5)
  intervals: bool = False
  name: str = "retrieval"

  def __call__(self, table: base.Table) -> Iterator[tuple[str, float]]:
    """Yields recall and median rank of each part."""
    parts = base.parts_of(table, self.modality, self.parts)
    labels, *embeddings = base.columns(table, self.modality, [self.field, *parts])
    _, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    has_partner = counts[numbers] > 1
    if not has_partner.any():
      raise ValueError(f"{self.modality}: no two rows share a {self.field!r}, so nothing can be retrieved")
    if not has_partner.all():
      logging.info("%s: %d of %d rows are alone with their %s and are not asked for",
                   self.modality, (~has_partner).sum(), len(has_partner), self.field)  # fmt: skip
    order = np.concatenate([np.flatnonzero(has_partner), np.flatnonzero(~has_partner)])
    for part, x in zip(parts, embeddings):
      x, ids, queries = x[order], numbers[order], int(has_partner.sum())
      ranks = first_ranks(x[:queries], x, (ids[:queries], ids), exclude_self=True)
      name = f"{self.name}/{self.modality}_to_{self.modality}/{self.field}/{part}"
      for k in self.ks:
        hits, groups = 100.0 * (ranks <= k), ids[:queries]
        yield from measured(f"{name}/r{k}", hits, ways=len(x) - 1, groups=groups, intervals=self.intervals)

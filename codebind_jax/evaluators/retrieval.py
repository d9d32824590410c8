"""Retrieval between and within modalities: recall at k and the median rank of the first right answer."""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from absl import logging
from jaxtyping import Float, Int

from codebind_jax.evaluators import base, contents
from codebind_jax.evaluators.answers import TOP, Answers, Keep, best, ids_of
from codebind_jax.evaluators.intervals import measured
from codebind_jax.evaluators.zeroshot import TIE

Relevant = Sequence[Collection[int]] | tuple[np.ndarray, np.ndarray] | tuple[contents.Side, contents.Side]

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
      ids [N], gallery ids [M]) of which equal ids are right; or a pair of sides, of which a common value is right.
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
  if isinstance(relevant, tuple) and len(relevant) == 2 and isinstance(relevant[0], contents.Side):
    return lambda part: contents.shared_values(*relevant, part).toarray() > 0
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
    match: column both have; rows with equal values are right answers to each other. Each content (column `_content`)
      is one query and one item. Texts shared by many items should come as one row a text (`base.unique_rows`), else
      frequent texts weigh more.
    keys: modality -> (rows, values), any number of values a row, in place of the column `match`; rows without a value
      take no part.
    part: embedding column compared.
    query: column of the queries; "" for `part`.
    ks: the k of recall.
    by: part of the names, `retrieval/<a>_to_<b>/<by>/r1`, if two modalities are compared by several fields.
    intervals: also yield `n`, `ways`, `low` and `high` of each recall (`intervals.measured`), which draw the queries
      of one main value together (`contents.groups_of`): the captions of a picture, the pictures of a concept.
    keep: takes the answers to each query: ids of items, and texts.
  """

  a: str = "text"
  b: str = "image"
  match: str = "label"
  keys: Mapping[str, contents.Keys] = dataclasses.field(default_factory=dict)
  part: str = "shared"
  query: str = ""
  ks: Sequence[int] = (1, 5, 10)
  by: str = ""
  intervals: bool = False
  keep: Keep | None = dataclasses.field(default=None, compare=False)
  name: str = "retrieval"

  def __call__(self, table: base.Table) -> Iterator[tuple[str, float]]:
    """Yields recall and median rank of both directions."""
    both = self.a, self.b
    asked, x = _queries_and_items(table, both, self.query or self.part, self.part)
    keys = [self.keys.get(modality) or _column_keys(table, modality, self.match) for modality in both]
    of = dict(zip(both, contents.sides(tuple(contents.contents_of(table, m) for m in both), tuple(keys))))
    if self.keys and max(len(side.rows) for side in of.values()) < 2:
      raise base.LeftOutError(f"{' and '.join(both)}: there is one of each, nothing to choose among")
    for source, target in (both, both[::-1]):
      query, gallery = of[source], of[target]
      ranks = first_ranks(asked[source][query.rows], x[target][gallery.rows], (query, gallery))
      name = f"{self.name}/{source}_to_{target}/{f'{self.by}/' if self.by else ''}"
      groups = contents.groups_of(query, gallery)
      if self.keep:
        self.keep(_answers(name.rstrip("/"), table, (source, target), (query, gallery), (asked[source], x[target])))
      numbers = functools.partial(measured, ways=len(gallery.rows), groups=groups, intervals=self.intervals)
      for k in self.ks:
        yield from numbers(f"{name}r{k}", 100.0 * (ranks <= k))
      yield f"{name}median_rank", float(np.median(ranks))


def _queries_and_items(table, modalities, query, item):
  """Modality -> its vectors as queries, and modality -> those as items."""
  found = {m: base.columns(table, m, [query, item]) for m in modalities}
  return {m: columns[0] for m, columns in found.items()}, {m: columns[1] for m, columns in found.items()}


def _answers(name, table, modalities, sides, embeddings):
  """The items nearest to each query."""
  (source, target), (query, gallery) = modalities, sides
  written = lambda m, side: [str(text) for text in base.columns(table, m, ["caption"])[0][side.rows]]
  names = written(target, gallery) if target == "text" else ids_of(table, target, gallery.rows)
  texts = written(source, query) if source == "text" else ()
  units = [base.unit_rows(m, x[side.rows]) for m, x, side in zip(modalities, embeddings, sides)]
  found, scores = best(*units)
  right, truth = np.zeros(found.shape, bool), []
  for start in range(0, len(found), 1024):
    block = contents.shared_values(query, gallery, slice(start, start + 1024))
    for n, (first, stop) in enumerate(zip(block.indptr, block.indptr[1:])):
      own = np.sort(block.indices[first:stop])
      right[start + n] = np.isin(found[start + n], own)
      truth.append([names[at] for at in own[:TOP]])
  return Answers(name, source, ids_of(table, source, query.rows), texts, truth, found, names, scores, right)


def _column_keys(table, modality, field):
  """The rows and values of a column."""
  (values,) = base.columns(table, modality, [field])
  return np.arange(len(values)), values


@dataclasses.dataclass(frozen=True)
class Emergent:
  """Retrieval by concept between modalities never trained together: `emergent/<a>_to_<b>/r5` and `.../chance5`.

  Only rows whose concept the other modality also has take part; each content is one query and one item.

  Attributes:
    a: one modality.
    b: the other.
    match: column both have; "" stands for none.
    part: embedding column compared.
    query: column of the queries; "" for `part`.
    k: of recall.
    intervals: also yield `n`, `ways`, `low` and `high` of each recall (`intervals.measured`), which draw the rows of
      one concept together.
  """

  a: str
  b: str
  match: str = "concept"
  part: str = "shared"
  query: str = ""
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
    both, keys = (self.a, self.b), []
    asked, x = _queries_and_items(table, both, self.query or self.part, self.part)
    for modality in both:
      (values,) = base.columns(table, modality, [self.match])
      rows = np.flatnonzero(np.isin(values, common))
      keys.append((rows, values[rows]))
    of = dict(zip(both, contents.sides(tuple(contents.contents_of(table, m) for m in both), tuple(keys))))
    for source, target in (both, both[::-1]):
      query, gallery = of[source], of[target]
      hits = 100.0 * (first_ranks(asked[source][query.rows], x[target][gallery.rows], (query, gallery)) <= self.k)
      name, groups = f"{self.name}/{source}_to_{target}/r{self.k}", contents.groups_of(query, gallery)
      yield from measured(name, hits, ways=len(gallery.rows), groups=groups, intervals=self.intervals)
      chance = 100.0 * float(np.mean(_chance(contents.right_answers(query, gallery), len(gallery.rows), self.k)))
      yield f"{self.name}/{source}_to_{target}/chance{self.k}", chance


def _chance(right: Int[np.ndarray, "n"], items: int, k: int) -> Float[np.ndarray, "n"]:
  """Probability that k of `items` drawn without replacement hold one of the `right`."""
  drawn = np.arange(min(k, items))
  miss = np.clip(items - right[:, None] - drawn, 0, None) / (items - drawn)
  return 1.0 - miss.prod(axis=1)


@dataclasses.dataclass(frozen=True)
class WithinRetrieval:
  """Retrieval of the same label inside one modality: `retrieval/<modality>_to_<modality>/<field>/<part>/r1`.

  Contents whose label no other content has are no queries; they stay in the gallery, and the log counts them.

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
    content, key = contents.contents_of(table, self.modality), (np.arange(len(labels)), labels)
    one, _ = contents.sides((content, content), (key, key))
    has_partner = contents.right_answers(one, one) > 1  # itself is one of them
    if not has_partner.any():
      raise ValueError(f"{self.modality}: no two rows share a {self.field!r}, so nothing can be retrieved")
    if not has_partner.all():
      logging.info("%s: %d of %d rows are alone with their %s and are not asked for",
                   self.modality, (~has_partner).sum(), len(has_partner), self.field)  # fmt: skip
    order = np.concatenate([np.flatnonzero(has_partner), np.flatnonzero(~has_partner)])
    for part, x in zip(parts, embeddings):
      x, queries = x[one.rows[order]], int(has_partner.sum())
      gallery = contents.Side(one.rows[order], one.values[order], one.first[order])
      query = contents.Side(gallery.rows[:queries], gallery.values[:queries], gallery.first[:queries])
      ranks = first_ranks(x[:queries], x, (query, gallery), exclude_self=True)
      name = f"{self.name}/{self.modality}_to_{self.modality}/{self.field}/{part}"
      for k in self.ks:
        hits, groups = 100.0 * (ranks <= k), query.first
        yield from measured(f"{name}/r{k}", hits, ways=len(x) - 1, groups=groups, intervals=self.intervals)

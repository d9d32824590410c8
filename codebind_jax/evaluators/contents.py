"""One content in several rows: rows that are copies of each other, and contents that answer each other.

A table's column `_content` numbers the content of each row: the same file in several records, or the same bytes. Each
content is measured once, whichever number of records it is in; without the column every row is a content of its own.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse
from jaxtyping import Int, Num, Shaped

from codebind_jax.evaluators import base

COLUMN = "_content"
Keys = tuple[np.ndarray, np.ndarray]  # (row, value) pairs, as many as there are: a row may have several values


def contents_of(table: base.Table, modality: str) -> Int[np.ndarray, "n"]:
  """Number of the content of each row that is not padding."""
  fields = [COLUMN] if COLUMN in table[modality] else list(table[modality])[:1]
  (column,) = base.columns(table, modality, fields)
  return column if fields == [COLUMN] else np.arange(len(column))


def once(content: Int[np.ndarray, "n"], cost: Num[np.ndarray, "n"] | None = None) -> Int[np.ndarray, "m"]:
  """One row of each content, ascending: that of the lowest cost, the first of equals.

  >>> once(np.array([7, 7, 3, 7]), np.array([2, 1, 0, 1])).tolist()
  [1, 2]
  """
  order = np.argsort(content, kind="stable") if cost is None else np.lexsort((cost, content))
  ordered = content[order]
  return np.sort(order[np.r_[True, ordered[1:] != ordered[:-1]]]) if len(order) else order


def once_each(content: Int[np.ndarray, "n"], values: Shaped[np.ndarray, "n"]) -> Int[np.ndarray, "m"]:
  """The first row of each content and value, ascending."""
  _, numbers = np.unique(values, return_inverse=True)
  _, both = np.unique(np.stack([content, numbers.reshape(-1)]), axis=1, return_inverse=True)
  return once(both.reshape(-1))


@dataclasses.dataclass(frozen=True)
class Side:
  """The contents of one modality, each once, and the values by which they answer others.

  Attributes:
    rows: [n] a row of each content.
    values: [n, v] sparse, 1 where a content has a value.
    first: [n] the first value of each.
  """

  rows: Int[np.ndarray, "n"]
  values: scipy.sparse.csr_array
  first: Int[np.ndarray, "n"]


def sides(content: tuple[np.ndarray, np.ndarray], keys: tuple[Keys, Keys]) -> tuple[Side, Side]:
  """The contents of two modalities that have a value, over one numbering of the values.

  Args:
    content: of each modality, the content of each row.
    keys: of each modality, its rows and their values.
  """
  ends = np.cumsum([0, *(len(values) for _, values in keys)])
  names, numbers = np.unique(np.concatenate([values for _, values in keys]), return_inverse=True)
  numbers = numbers.reshape(-1)
  return tuple(
    _side(of_row, rows, numbers[start:stop], len(names))
    for of_row, (rows, _), start, stop in zip(content, keys, ends, ends[1:])
  )


def _side(content, rows, values, size):
  used = np.unique(rows)
  kept = used[once(content[used])]
  order = np.argsort(content[kept])
  place = order[np.searchsorted(content[kept], content[rows], sorter=order)]
  ones = np.ones(len(values), np.int32)
  matrix = scipy.sparse.csr_array((ones, (place, values)), shape=(len(kept), size))
  return Side(kept, matrix, values[np.unique(place, return_index=True)[1]])


def shared_values(query: Side, gallery: Side, part: slice = slice(None)) -> scipy.sparse.csr_array:
  """[queries of the part, items] sparse, above 0 where they share a value: the right answers."""
  return (query.values[part] @ gallery.values.T).tocsr()


def right_answers(query: Side, gallery: Side, block: int = 1024) -> Int[np.ndarray, "n"]:
  """Number of right answers to each query."""
  starts = range(0, len(query.rows), block)
  return np.concatenate([np.diff(shared_values(query, gallery, slice(i, i + block)).indptr) for i in starts])


def groups_of(query: Side, gallery: Side) -> Int[np.ndarray, "n"]:
  """Queries that one interval draws together: those of one content, or of contents with one main value.

  A query of several values is in the group of its first one (a picture, of its main caption); a query of one value in
  that of the first value of its first answer (a caption, with the other captions of its picture).
  """
  places, values = gallery.values.nonzero()
  answer = np.full(gallery.values.shape[1], -1)
  answer[values[::-1]] = places[::-1]  # of a value that is written twice, the first place stays
  partner = answer[query.first]
  alone = (np.diff(query.values.indptr) > 1) | (partner < 0)
  return np.where(alone, query.first, gallery.first[np.maximum(partner, 0)])

"""The index of vectors, which are L2-normalised and compared by inner product.

With faiss it is an `IndexFlatIP`, else numpy block by block; `Index.backend` says which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from codebind_jax import files
from codebind_jax.embedding import shards, tables
from codebind_jax.search import checks
from codebind_jax.search.ids import Ids, check_list

_COLUMNS = ["id", "vector"]
_KIND = "index"
_BLOCK = 1 << 24  # scores held at once
_ROW_GROUP = 1 << 16
_MORE = 16  # candidates beyond k, among which ties are settled
_ROUNDING = 1e-5  # by which a float32 sum of a cosine may be off


class Index:
  """A searchable set of vectors with ids.

  Args:
    backend: "faiss", "numpy", or "auto": faiss where it is installed.

  Attributes:
    backend: the one in use.

  Example:
    >>> index = Index(backend="numpy")
    >>> index.add(["east", "north"], np.array([[2.0, 0.0], [0.0, 3.0]]))
    >>> ids, scores = index.search(np.array([[1.0, 0.1]]), k=1)
    >>> ids.tolist()
    [['east']]
  """

  def __init__(self, backend: str = "auto"):
    self.backend = checks.backend_of(backend)
    self._ids = Ids()
    self._store: _Blocks | _Faiss | None = None

  def __len__(self) -> int:
    return len(self._ids)

  @property
  def width(self) -> int | None:
    """Width of the vectors; None while the index is empty."""
    return self._store.width if self._store else None

  def add(self, ids: Any, vectors: Any) -> None:
    """Adds vectors: all of them, or none if one is refused.

    Args:
      ids: strings or integers, one kind in an index, each once.
      vectors: [n, d], of any norm but zero; they are normalised here.

    Raises:
      ValueError: for one id or vector where a list is needed; if counts or widths differ, an id is there already or of
        another kind, a string of half a surrogate pair or an integer beyond 64 bits, or a vector is zero or not finite.
    """
    check_list(ids)
    vectors = checks.matrix(vectors, "vectors")
    if len(ids) != len(vectors):
      raise ValueError(f"ids: got {len(ids)} for {len(vectors)} vectors")
    names = self._ids.checked(ids)
    if names:
      self._append(names, checks.unit(vectors, self.width, names))

  def _append(self, names: Sequence[Any], unit: np.ndarray) -> None:
    if self._store is None:
      self._store = (_Faiss if self.backend == "faiss" else _Blocks)(unit.shape[1])
    self._store.add(unit)
    self._ids.add(names)

  def search(self, queries: Any, k: Any = 10) -> tuple[np.ndarray, Float[np.ndarray, "q k"]]:
    """The k nearest neighbours of every query, best first; all vectors where the index holds fewer than k.

    Args:
      queries: [q, d], of any norm but zero.
      k: number of neighbours, 1 and up.

    Returns:
      (ids, cosines), both [Q, min(k, size)].

    Raises:
      ValueError: if the index is empty, k is below 1, widths differ, or a query is zero or not finite.
    """
    if self._store is None:
      raise ValueError("the index is empty; add something first")
    k = checks.neighbours(k)
    numbers, scores = self._nearest(checks.unit_queries(queries, self.width), min(k, len(self)))
    return self._ids.take(numbers), scores

  def _nearest(self, unit: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and scores of the k nearest, ties by position: a backend's candidates, compared anew in float64.

    A backend's float32 sums differ in their last bits with the place of a vector, and among equal scores faiss takes
    any. So a few more than k are asked for; where they all reach the k-th one's score, everything that reaches it.
    """
    wanted = min(k + _MORE, len(self))
    numbers, scores = np.zeros((len(unit), k), np.int64), np.zeros((len(unit), k), np.float32)
    rows = max(1, _BLOCK // (wanted * self.width))
    for start in range(0, len(unit), rows):
      some = unit[start : start + rows]
      found, rough = self._store.search(some, wanted)
      least = rough[:, k - 1] - _ROUNDING
      exact = self._exact(some, found)
      order = np.lexsort((found, -exact), axis=1)[:, :k]
      numbers[start : start + rows] = np.take_along_axis(found, order, 1)
      scores[start : start + rows] = np.take_along_axis(exact, order, 1)
      for row in np.flatnonzero(rough[:, -1] >= least) if wanted < len(self) else ():
        reached = self._store.reaching(some[row : row + 1], float(least[row]))
        parts = np.array_split(reached, -(-len(reached) * self.width // _BLOCK))
        own = np.concatenate([self._exact(some[row : row + 1], part[None])[0] for part in parts])
        order = np.lexsort((reached, -own))[:k]
        numbers[start + row], scores[start + row] = reached[order], own[order]
    return numbers, scores

  def _exact(self, unit: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Cosines [q, n] of queries and vectors [q, n], summed in float64 and in one order, as float32."""
    vectors = self._store.rows(numbers.reshape(-1)).reshape(*numbers.shape, -1)
    products = vectors.astype(np.float64) * unit[:, None].astype(np.float64)
    return products.sum(axis=-1).astype(np.float32)

  def save(self, path: str | files.Path) -> None:
    """Writes one Parquet file with the columns `id` and `vector`, whatever the backend.

    Raises:
      ValueError: if the index is empty.
    """
    if self._store is None:
      raise ValueError(f"nothing to save to {str(path)!r}: the index is empty")
    kind = pa.list_(pa.float32(), self.width)
    parts, start = [], 0
    for block in self._store.blocks():
      ids = self._ids.array(start, start + len(block))
      vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), type=kind)
      parts.append(pa.table([ids, vectors], _COLUMNS))
      start += len(block)
    tables.write_table(pa.concat_tables(parts), files.path(path), {"kind": _KIND, "width": self.width})

  @classmethod
  def load(cls, path: str | files.Path, backend: str = "auto") -> Index:
    """Reads what `save` wrote, and verifies all of it: its metadata, and each group of rows.

    A file of the same columns that another program wrote is read as well; it has no checksums, which the log says.

    Raises:
      ValueError: if there is no such file, or it is not an index, or damaged; naming the first bad row, if an id or a
        vector is null, an id is there twice, or a vector is not finite, not of unit length or of another width.
    """
    index = cls(backend)
    with checks.opened(path, _KIND, "index", foreign=True) as table:
      if table.names != _COLUMNS:
        raise ValueError(f"columns {table.names}, not {_COLUMNS}")
      for group in table.groups(_COLUMNS):
        index._add_saved(group)
      if table.about and index.width != table.about.get("width"):
        raise ValueError(f"damaged: vectors of width {index.width}; its metadata say {table.about.get('width')}")
    return index

  def _add_saved(self, group: tables.Group) -> None:
    """Adds rows of a file that was saved, whose vectors are of unit length."""
    names = shards.checked_ids(group.columns["id"], group)
    vectors = shards.checked_rows(group.columns["vector"], group, "vector", self.width)
    if group.columns["vector"].null_count:
      row = int(np.flatnonzero(group.columns["vector"].is_null().to_numpy(zero_copy_only=False))[0])
      raise ValueError(f"row {group.first + row}: column 'vector' has {group.columns['vector'].null_count} nulls; "
                       "allowed: none")  # fmt: skip
    names = self._ids.checked(names, group.first)
    unit = checks.unit(vectors, self.width, names, group.first)
    if len(other := np.flatnonzero(np.abs(unit - vectors).max(axis=1, initial=0.0) > _ROUNDING)):
      raise ValueError(f"row {group.first + other[0]}: that of {names[other[0]]!r} is not of unit length; add vectors "
                       "to an index to have them normalised")  # fmt: skip
    group.verify()
    if names:
      self._append(names, np.ascontiguousarray(vectors, np.float32))

  @classmethod
  def from_parquet(
    cls, folder: str | files.Path, modality: str, part: str = "shared", backend: str = "auto"
  ) -> Index:
    """The index of one modality of a finished job of mode `embed`; records that lack it are left out.

    Args:
      folder: the job's workdir.
      modality: such as "image".
      part: "shared" to search across modalities, "specific" or "full" within one.
      backend: of the index.

    Raises:
      ValueError: for an unfinished job, shards of several jobs, a column that is not there, a repeated or absent id, or
        a vector that is zero, not finite or of another width.
    """
    if part not in shards.PARTS:
      raise ValueError(f"part: got {part!r}; allowed: {list(shards.PARTS)}")
    index = cls(backend)
    for path, ids, vectors, _ in shards.read_parts(files.path(folder), shards.column_name(modality, part)):
      try:
        index.add(ids, vectors)
      except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return index


class _Blocks:
  """Exact search with numpy."""

  def __init__(self, width: int):
    self.width, self._parts = width, []

  def add(self, unit: np.ndarray) -> None:
    self._parts.append(unit)

  def blocks(self) -> Iterator[np.ndarray]:
    yield from self._parts

  def rows(self, numbers: np.ndarray) -> np.ndarray:
    self._join()
    return self._parts[0][numbers]

  def reaching(self, query: np.ndarray, least: float) -> np.ndarray:
    self._join()
    return np.flatnonzero(query[0] @ self._parts[0].T >= least)

  def _join(self) -> None:
    if len(self._parts) > 1:
      self._parts = [np.concatenate(self._parts)]

  def search(self, unit: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    self._join()
    rows = max(1, _BLOCK // len(self._parts[0]))
    results = [self._nearest(unit[start : start + rows], k) for start in range(0, len(unit), rows)]
    return tuple(np.concatenate(columns) for columns in zip(*results))

  def _nearest(self, unit: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = unit @ self._parts[0].T
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    best = np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable"), 1)
    return best, np.take_along_axis(scores, best, 1)


class _Faiss:
  """Exact search with faiss."""

  def __init__(self, width: int):
    import faiss

    self.width, self._index = width, faiss.IndexFlatIP(width)

  def add(self, unit: np.ndarray) -> None:
    self._index.add(unit)

  def blocks(self) -> Iterator[np.ndarray]:
    for start in range(0, self._index.ntotal, _ROW_GROUP):
      yield self._index.reconstruct_n(start, min(_ROW_GROUP, self._index.ntotal - start))

  def rows(self, numbers: np.ndarray) -> np.ndarray:
    return self._index.reconstruct_batch(numbers)

  def reaching(self, query: np.ndarray, least: float) -> np.ndarray:
    return np.sort(self._index.range_search(query, least)[2])

  def search(self, unit: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores, numbers = self._index.search(unit, k)
    return numbers, scores

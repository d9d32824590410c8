"""Nearest neighbours by cosine, exactly: ids and vectors in, ids and scores out.

Vectors are L2-normalised and compared by inner product: with faiss (`IndexFlatIP`) where it is installed (`pip install
codebind_jax[search]`), else with numpy, block by block; `Index.backend` says which. Both give the same neighbours.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Array, Float

from codebind_jax import files
from codebind_jax.embedding import shards

BACKENDS = ("auto", "faiss", "numpy")
_COLUMNS = ["id", "vector"]
_BLOCK = 1 << 24  # scores held at once
_ROW_GROUP = 1 << 16


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
    if backend not in BACKENDS:
      raise ValueError(f"backend: got {backend!r}; allowed: {list(BACKENDS)}")
    installed = importlib.util.find_spec("faiss") is not None
    if backend == "faiss" and not installed:
      raise ValueError("backend: 'faiss' is not installed (pip install codebind_jax[search]); allowed: 'numpy'")
    self.backend = "numpy" if backend == "numpy" or not installed else "faiss"
    self._ids: list[Any] = []
    self._known: set[Any] = set()
    self._store: _Blocks | _Faiss | None = None

  def __len__(self) -> int:
    return len(self._ids)

  @property
  def width(self) -> int | None:
    """Width of the vectors; None while the index is empty."""
    return self._store.width if self._store else None

  def add(self, ids: Sequence[Any] | np.ndarray, vectors: Float[np.ndarray | Array, "n d"]) -> None:
    """Adds vectors: all of them, or none if one is refused.

    Args:
      ids: strings or integers, one kind in an index, each once.
      vectors: of any norm but zero; they are normalised here.

    Raises:
      ValueError: if counts or widths differ, an id is there already or of another kind, or a vector is zero or not
        finite.
    """
    names = [_plain(value) for value in ids]
    if len(names) != len(vectors):
      raise ValueError(f"ids: got {len(names)} for {len(vectors)} vectors")
    if not names:
      return
    kind = type((self._ids or names)[0])
    fresh: set[Any] = set()
    for name in names:
      if type(name) is not kind:
        raise ValueError(f"ids: got {name!r} in an index of {kind.__name__}; allowed: one kind alone")
      if name in self._known or name in fresh:
        raise ValueError(f"ids: {name!r} is there twice; allowed: each id once")
      fresh.add(name)
    self._append(names, _unit(vectors, self.width, names))

  def _append(self, names: list[Any], unit: np.ndarray) -> None:
    if self._store is None:
      self._store = (_Faiss if self.backend == "faiss" else _Blocks)(unit.shape[1])
    self._store.add(unit)
    self._ids += names
    self._known.update(names)

  def search(
    self, queries: Float[np.ndarray | Array, "q d"], k: int = 10
  ) -> tuple[np.ndarray, Float[np.ndarray, "q k"]]:
    """The k nearest neighbours of every query, best first; all vectors where the index holds fewer than k.

    Args:
      queries: of any norm but zero.
      k: number of neighbours, 1 and up.

    Returns:
      (ids, cosines), both [Q, min(k, size)].

    Raises:
      ValueError: if the index is empty, k is below 1, or widths differ.
    """
    if self._store is None:
      raise ValueError("the index is empty; add something first")
    if k < 1:
      raise ValueError(f"k: got {k}; allowed: 1 and up")
    unit = _unit(queries, self.width, [f"query {number}" for number in range(len(queries))])
    numbers, scores = self._store.search(unit, min(k, len(self)))
    return np.array([self._ids[number] for number in numbers.flat]).reshape(numbers.shape), scores

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
      ids = pa.array(self._ids[start : start + len(block)])
      vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), type=kind)
      parts.append(pa.table([ids, vectors], _COLUMNS))
      start += len(block)
    shards.write_table(pa.concat_tables(parts), files.path(path), _ROW_GROUP)

  @classmethod
  def load(cls, path: str | files.Path, backend: str = "auto") -> Index:
    """Reads what `save` wrote.

    Raises:
      ValueError: if there is no such file, or it is not an index.
    """
    file, index = files.path(path), cls(backend)
    if not files.is_file(file):
      raise ValueError(f"{str(path)!r}: there is no such file")
    file = files.fetched(file)
    try:
      table = pq.ParquetFile(file)
      if table.schema_arrow.names != _COLUMNS:
        raise ValueError(f"columns {table.schema_arrow.names}, not {_COLUMNS}")
    except (pa.ArrowException, ValueError) as error:
      raise ValueError(f"{str(path)!r} is not an index that was saved ({error})") from error
    for batch in table.iter_batches(_ROW_GROUP):
      index._append(batch.column("id").to_pylist(), shards.vectors_of(batch.column("vector")))
    return index

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
      ValueError: for an unfinished job, shards of several jobs, a column that is not there, or a repeated id.
    """
    if part not in shards.PARTS:
      raise ValueError(f"part: got {part!r}; allowed: {list(shards.PARTS)}")
    index, path = cls(backend), files.path(folder)
    for ids, vectors in shards.read_column(path, shards.column_name(modality, part)):
      index.add(ids, vectors)
    return index


class _Blocks:
  """Exact search with numpy."""

  def __init__(self, width: int):
    self.width, self._parts = width, []

  def add(self, unit: np.ndarray) -> None:
    self._parts.append(unit)

  def blocks(self) -> Iterator[np.ndarray]:
    yield from self._parts

  def search(self, unit: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    self._parts = [np.concatenate(self._parts)]
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

  def search(self, unit: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores, numbers = self._index.search(unit, k)
    return numbers, scores


def _plain(value: Any) -> str | int:
  if isinstance(value, str):
    return str(value)
  if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
    return int(value)
  raise ValueError(f"ids: got {value!r}; allowed: strings or integers")


def _unit(vectors: Any, width: int | None, names: Sequence[Any]) -> np.ndarray:
  """Rows of norm 1, float32."""
  array = np.asarray(vectors, np.float32)
  if array.ndim != 2 or not array.shape[1]:
    raise ValueError(f"vectors: got shape {array.shape}; allowed: [rows, width]")
  if width is not None and array.shape[1] != width:
    raise ValueError(f"vectors: got width {array.shape[1]}; this index has width {width}")
  length = np.linalg.norm(array.astype(np.float64), axis=1, keepdims=True)
  wrong = np.flatnonzero(~np.isfinite(length[:, 0]) | (length[:, 0] == 0))
  if len(wrong):
    raise ValueError(f"vectors: that of {names[wrong[0]]!r} is zero or not finite; a cosine needs a direction")
  return np.ascontiguousarray(array / length, np.float32)

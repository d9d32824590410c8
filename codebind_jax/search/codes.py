"""The index of codes: items as packed codes in memory and in Parquet, queries as the vectors that they are.

The distance is asymmetric: a query is not coded. What a code adds to its inner product with an item is looked up
(`Codec.look_up_table`), so an item is never decoded. An item's norm, by which a cosine is divided, follows from its
codes and is not stored.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from codebind_jax import files
from codebind_jax.embedding import packing, shards, tables
from codebind_jax.search import checks
from codebind_jax.search.codec import Codec
from codebind_jax.search.ids import Ids, check_list
from codebind_jax.search.norm_codes import NormCodes
from codebind_jax.search.scan import Faiss, Look, Numpy

PARTS = {"shared": "codes_shared", "specific": "codes_specific"}  # of an embedding -> its codes
_KIND = "code index"
_BLOCK = 1 << 16  # items that are laid down together
_MORE = 240  # candidates beyond k, among which ties and norms are settled
_GROWTH = 4  # times as many candidates where they do not settle it
_FIRST = 1 << 15  # items of a first look
_SPARE = 10  # times k candidates for re-ranking
_ROUNDING = 2.0**-22  # of a score as float32, relative to the largest there can be


@dataclasses.dataclass
class _Part:
  """Items that are laid down: packed codes, and the numbers of their values of each field."""

  codes: np.ndarray
  fields: dict[str, np.ndarray]


@dataclasses.dataclass
class _Laid:
  """Items to scan: all of a part, or copies of those of its rows that are let through; `start` is the part's first."""

  start: int
  codes: np.ndarray
  rows: np.ndarray | None

  def number(self, local: np.ndarray) -> np.ndarray:
    """Numbers of items of the index."""
    return self.start + (local if self.rows is None else self.rows[local])


class CodeIndex:
  """A searchable set of codes with ids, and fields to choose by.

  Args:
    codec: what the codes mean.
    backend: "faiss", "numpy", or "auto": faiss where it is installed and can look the codes up (each within one byte,
      or all of the same number of bits up to 16).

  Attributes:
    codec: as given.
    backend: the one in use.

  Example:
    >>> axes = np.eye(2, dtype=np.float32)
    >>> index = CodeIndex(Codec((axes, axes)), backend="numpy")
    >>> index.add(["a", "b"], np.array([[0, 0], [1, 0]]), {"modality": ["image", "text"]})
    >>> index.search(np.array([[1.0, 0.2, 0.3, 0.1]]), k=2)[0].tolist()
    [['a', 'b']]
    >>> index.search(np.array([[1.0, 0.2, 0.3, 0.1]]), k=2, where={"modality": "text"})[0].tolist()
    [['b']]
  """

  def __init__(self, codec: Codec, backend: str = "auto"):
    self.codec, self._norm_codes = codec, NormCodes(codec)
    self._sizes = (*codec.sizes, *self._norm_codes.sizes)
    self._look = Look(self._sizes)
    self.backend = checks.backend_of(backend)
    if not self._look.faiss:
      if backend == "faiss":
        raise ValueError(f"backend: 'faiss' cannot look up codes of {sorted(set(self._look.bits))} bits; allowed: "
                         "'numpy'")  # fmt: skip
      self.backend = "numpy"
    self._scan = Faiss if self.backend == "faiss" else Numpy
    self._ids, self._parts, self._names = Ids(), [], None
    self._tail: list[_Part] = []
    self._values: dict[str, dict[str | None, int]] = {}
    self._norms = (np.inf, 0.0)  # the smallest and the largest

  def __len__(self) -> int:
    return len(self._ids)

  @property
  def width(self) -> int:
    """Width of the queries."""
    return self.codec.width

  @property
  def fields(self) -> tuple[str, ...]:
    """Names of the fields of the items."""
    return self._names or ()

  @property
  def nbytes(self) -> int:
    """Bytes of the items: codes, with those of residual codes' norms, fields and ids."""
    own = sum(part.codes.nbytes + sum(x.nbytes for x in part.fields.values()) for part in (*self._parts, *self._tail))
    return own + self._ids.nbytes

  def add(self, ids: Any, codes: Any, fields: Mapping[str, Any] | None = None) -> None:
    """Adds items: all of them, or none if one is refused.

    Args:
      ids: strings or integers, one kind in an index, each once. A range, or integers that follow one another, take no
        memory.
      codes: [n, s] integers, as of `Embeddings.codes_shared`.
      fields: name -> a string for all of them, or a list of one (or None) for each. All items have the same names.

    Raises:
      ValueError: for one id where a list is needed; if counts differ, an id is there already or of another kind, a code
        is not there, an item's vector is zero, or fields differ from those of the items before.
    """
    check_list(ids)
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu" and codes.size:
      raise ValueError(f"codes: got values of type {codes.dtype}; allowed: integers")
    if codes.ndim == 2 and len(ids) != len(codes):
      raise ValueError(f"ids: got {len(ids)} for {len(codes)} items")
    chosen = self._checked_fields(fields or {}, len(ids))
    if len(ids) or codes.ndim != 2:
      packing.check(codes, self.codec.sizes)
      self._append(self._ids.checked(ids), packing.pack(codes, self.codec.sizes), chosen)

  def _checked_fields(self, fields: Mapping[str, Any], count: int) -> dict[str, list[str | None]]:
    """Field -> a value for each item."""
    names = tuple(sorted(map(str, fields)))
    if self._names is not None and names != self._names:
      raise ValueError(f"fields: got {list(names)} in an index with {list(self._names)}; allowed: the same for all "
                       "items")  # fmt: skip
    if lost := {"id", "codes"} & set(names):
      raise ValueError(f"fields: got {sorted(lost)[0]!r}; allowed: other names than 'id' and 'codes'")
    out = {}
    for name in names:
      given = fields[name]
      values = [given] * count if given is None or isinstance(given, str) else list(given)
      if len(values) != count:
        raise ValueError(f"fields: {name!r} has {len(values)} values for {count} items")
      if wrong := [value for value in values if not isinstance(value, str | None)]:
        raise ValueError(f"fields: {name!r} has the value {wrong[0]!r}; allowed: strings, or None")
      out[name] = [None if value is None else str(value) for value in values]
    return out

  def _append(self, names: Sequence[Any], packed: np.ndarray, fields: Mapping[str, list[str | None]]) -> None:
    """Adds what was checked.

    Raises:
      ValueError: if an item's vector is zero.
    """
    (least, most), laid = self._norms, []
    for first in range(0, len(packed), _BLOCK):
      some = packed[first : first + _BLOCK]
      codes = packing.unpack(some, self.codec.sizes)
      norms = self.codec.norms(codes)
      if self.codec.score == "cosine" and not norms.all():
        raise ValueError(f"codes: the vector of {names[first + int(np.argmin(norms))]!r} is zero; a cosine needs a "
                         "direction")  # fmt: skip
      least, most = min(least, norms.min(initial=np.inf)), max(most, norms.max(initial=0.0))
      if self._norm_codes.sizes:
        some = packing.pack(np.concatenate([codes, self._norm_codes.codes(norms)], axis=1), self._sizes)
      laid.append(some)
    packed = np.concatenate(laid) if self._norm_codes.sizes and laid else packed
    self._norms, self._names = (least, most), tuple(sorted(fields))
    numbers = {}
    for name, values in fields.items():
      known = self._values.setdefault(name, {})
      numbers[name] = np.fromiter((known.setdefault(value, len(known)) for value in values), np.int64, len(values))
      numbers[name] = numbers[name].astype(np.min_scalar_type(max(len(known) - 1, 0)))
    self._ids.add(names)
    self._tail.append(_Part(packed, numbers))
    if sum(len(part.codes) for part in self._tail) >= _BLOCK:
      whole = _joined(self._tail)
      for first in range(0, len(whole.codes) - _BLOCK + 1, _BLOCK):
        self._parts.append(self._laid(whole, slice(first, first + _BLOCK)))
      rest = len(whole.codes) % _BLOCK
      self._tail = [self._laid(whole, slice(len(whole.codes) - rest, None))] if rest else []

  def _laid(self, part: _Part, rows: Any) -> _Part:
    """A copy of rows as a scan reads them."""
    return _Part(self._scan.laid(part.codes[rows]), {name: x[rows].copy() for name, x in part.fields.items()})

  def _all(self) -> list[_Part]:
    """All items; those added last are laid down as one part until there are enough of them."""
    if len(self._tail) > 1:
      self._tail = [self._laid(_joined(self._tail), slice(None))]
    return [*self._parts, *self._tail]

  def search(
    self, queries: Any, k: Any = 10, *, where: Mapping[str, Any] | None = None, rerank: Any = None, candidates: int = 0
  ) -> tuple[np.ndarray, Float[np.ndarray, "q k"]]:
    """The k nearest neighbours of every query, best first; all items where there are fewer than k.

    Args:
      queries: [q, d] as `Embeddings.query`, of any norm but zero; they are not coded.
      k: number of neighbours, 1 and up.
      where: field -> the value that items must have, or a list of values; all of the fields must fit.
      rerank: vectors [size, d] of all items in the order they were added, of any float type, or the .npy file with
        them, of which only candidates are read: the best candidates by codes are ordered by the cosine with these.
      candidates: number of candidates to re-rank; 10 k unless given.

    Returns:
      (ids, scores), both [Q, min(k, size)], size that of the items that `where` lets through: the codec's scores, or
      the cosines with the vectors of `rerank`.

    Raises:
      ValueError: if the index is empty, k is below 1, widths differ, a query is zero or not finite, there is no such
        field, or the vectors of `rerank` are others than the items'.
    """
    if not len(self):
      raise ValueError("the index is empty; add something first")
    k, unit = checks.neighbours(k), checks.unit_queries(queries, self.width)
    chosen = self._chosen(where or {})
    there = sum(len(part.codes) if rows is None else len(rows) for part, rows in zip(self._all(), chosen))
    if rerank is None:
      if candidates:
        raise ValueError(f"candidates: got {candidates} without rerank; allowed: 0")
      numbers, scores = self._nearest(unit, min(k, there), chosen, there)
      return self._ids.take(numbers), scores
    vectors = self._rerank_vectors(rerank)
    if candidates and candidates < k:
      raise ValueError(f"candidates: got {candidates} for {k} neighbours; allowed: as many or more")
    numbers, _ = self._nearest(unit, min(candidates or _SPARE * k, there), chosen, there)
    numbers, scores = _reranked(unit, numbers, vectors, min(k, there))
    return self._ids.take(numbers), scores

  def _chosen(self, where: Mapping[str, Any]) -> list[np.ndarray | None]:
    """Of each part the rows that `where` lets through; None for all of them."""
    wanted = {}
    for name, given in where.items():
      if name not in self.fields:
        raise ValueError(f"where: got {name!r}; this index has the fields {list(self.fields)}")
      values = [given] if given is None or isinstance(given, str) else list(given)
      known = self._values[name]
      wanted[name] = np.array([known[value] for value in values if value in known], np.int64)
    out: list[np.ndarray | None] = []
    for part in self._all():
      masks = [np.isin(part.fields[name], numbers) for name, numbers in wanted.items()]
      mask = functools.reduce(np.logical_and, masks) if masks else None
      out.append(None if mask is None or mask.all() else np.flatnonzero(mask))
    return out

  def _nearest(
    self, unit: np.ndarray, k: int, chosen: Sequence[np.ndarray | None], there: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and scores of the k nearest, ties by position: a scan's candidates, scored anew in float64.

    A cosine is an inner product over a norm, which a scan cannot divide by. But it can subtract: of items whose cosine
    is near t, `product - t norm` tells which is larger, and norm <= (norm^2 + m^2) / 2m, m in the middle of the norms,
    whose square is a sum over codes as the product is. This bound says how near anything can be that is no candidate;
    while that reaches the k-th score, t becomes this score and more candidates are asked for. The norms of residual
    codes, whose squares are no such sum, are further codes (`NormCodes`), and no more than rounded.
    """
    parts = self._all()
    starts = np.cumsum([0, *(len(part.codes) for part in parts)])[:-1].tolist()
    laid = [_Laid(start, part.codes if rows is None else self._scan.laid(part.codes[rows]), rows)
            for start, part, rows in zip(starts, parts, chosen) if rows is None or len(rows)]  # fmt: skip
    numbers, scores = np.zeros((len(unit), k), np.int64), np.zeros((len(unit), k), np.float32)
    if not k:
      return numbers, scores
    scan, workers = self._scan(self._look), min(len(laid), os.cpu_count() or 1)
    few = laid[0].rows if laid[0].rows is None else laid[0].rows[:_FIRST]
    first = [[_Laid(laid[0].start, laid[0].codes[:_FIRST], few)]]
    groups = [laid[worker::workers] for worker in range(workers)]
    with concurrent.futures.ThreadPoolExecutor(max(workers, 1)) as pool:
      run = pool.map if workers > 1 else map
      for row, query in enumerate(unit):
        own = self.codec.look_up_table(query)
        guess = self._best(own, k, first, starts, scan, map, 0.0)[1][-1] if self._bends and len(laid) > 1 else 0.0
        numbers[row], scores[row] = self._best(own, k, groups, starts, scan, run, float(guess), settled=True)
    return numbers, scores

  @property
  def _bends(self) -> bool:
    """Whether norms differ and scans can heed it."""
    least, most = self._norms
    return bool(self.codec.score == "cosine" and most > least * (1 + 1e-6))

  def _best(
    self, own: np.ndarray, k: int, groups: Sequence[Sequence[_Laid]], starts: Sequence[int],
    scan: Faiss | Numpy, run: Any, threshold: float, settled: bool = False,
  ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Numbers and scores of a query's k nearest of some parts; of a first look unless they are `settled`.

    Args:
      own: the query's look-up table.
      k: number of neighbours.
      groups: the parts, those of a group one after the other.
      starts: numbers of the first item of every part there is.
      scan: reads them.
      run: `map`, or that of a pool.
      threshold: t, a guess of the k-th score.
      settled: looks again until nothing else can be nearer.
    """
    least, most = self._norms if self.codec.score == "cosine" else (1.0, 1.0)
    middle = (least + most) / 2
    gap = (most - least) ** 2 / (8 * middle)  # the most by which the bound is above a norm
    there = sum(len(part.codes) for group in groups for part in group)
    rounding = _ROUNDING * float(np.maximum.reduceat(np.abs(own), self.codec.offsets).sum()) / least
    wanted = min(k + _MORE, there)
    while True:
      if self._norm_codes.sizes:
        looked = self._look.table(np.concatenate([own, self._norm_codes.table(-threshold)]))
        bent = max(-threshold, 0.0) * self._norm_codes.step
      else:
        looked = self._look.table(own - threshold / (2 * middle) * self.codec.squares if threshold else own)
        bent = max(threshold, 0.0) * gap - threshold * middle / 2
      scan.set_query(looked)
      found = [both for own in run(_scanned, *zip(*((scan, group, wanted) for group in groups))) for both in own]
      every, rough = (np.concatenate(column) for column in zip(*found))
      kept = np.argpartition(-rough, wanted - 1)[:wanted] if wanted < len(rough) else np.arange(len(rough))
      exact = self._exact(every[kept], own, starts)
      order = np.lexsort((every[kept], -exact))[:k]
      over = float(rough[kept].min()) + self._look.error(looked) + bent
      reached = threshold + over / (least if over > 0 else most)
      if not settled or wanted == there or reached < float(exact[order[-1]]) - rounding:
        return every[kept][order], exact[order]
      threshold, wanted = float(exact[order[-1]]) if self._bends else 0.0, min(wanted * _GROWTH, there)

  def _exact(self, numbers: np.ndarray, own: np.ndarray, starts: Sequence[int]) -> np.ndarray:
    """Scores of items, summed in float64 and in one order, as float32."""
    codes = packing.unpack(self._rows(numbers, starts), self._sizes)[:, : len(self.codec.sizes)]
    sums = own[codes + self.codec.offsets].sum(axis=1)
    return (sums / self.codec.norms(codes) if self.codec.score == "cosine" else sums).astype(np.float32)

  def _rows(self, numbers: np.ndarray, starts: Sequence[int]) -> np.ndarray:
    """Packed codes of items."""
    out = np.empty((len(numbers), packing.bytes_of(self._sizes)), np.uint8)
    place = np.searchsorted(starts, numbers, "right") - 1
    for number in np.unique(place):
      here = place == number
      out[here] = self._all()[number].codes[numbers[here] - starts[number]]
    return out

  def _rerank_vectors(self, rerank: Any) -> np.ndarray:
    """Vectors to re-rank by.

    Raises:
      ValueError: if they are others than the items'.
    """
    if isinstance(rerank, str | os.PathLike):
      try:
        vectors = np.load(rerank, mmap_mode="r", allow_pickle=False)
      except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{str(rerank)!r}: not a .npy file of vectors ({error})") from error
    else:
      vectors = rerank if isinstance(rerank, np.ndarray) else np.asarray(rerank)
    if vectors.shape != (len(self), self.width) or vectors.dtype.kind != "f":
      raise ValueError(f"rerank: got {vectors.dtype} of shape {vectors.shape}; this index has {len(self)} items of "
                       f"width {self.width}, and needs floats")  # fmt: skip
    return vectors

  def save(self, path: str | files.Path) -> None:
    """Writes one Parquet file: columns `id`, `codes` (packed, bytes of one length) and the fields; the codec beside.

    Raises:
      ValueError: if the index is empty.
    """
    if not len(self):
      raise ValueError(f"nothing to save to {str(path)!r}: the index is empty")
    pieces, start, words = [], 0, {name: pa.array(list(known), pa.string()) for name, known in self._values.items()}
    for part in self._all():
      packed = part.codes
      if self._norm_codes.sizes:
        packed = packing.pack(packing.unpack(packed, self._sizes)[:, : len(self.codec.sizes)], self.codec.sizes)
      columns = [self._ids.array(start, start + len(part.codes)), tables.as_fixed_bytes(packed)]
      columns += [words[name].take(pa.array(part.fields[name])) for name in self.fields]
      pieces.append(pa.table(columns, ["id", "codes", *self.fields]))
      start += len(part.codes)
    about = {"kind": _KIND, "sizes": list(self.codec.sizes), "codec": self.codec.plain()}
    tables.write_table(pa.concat_tables(pieces), files.path(path), about)

  @classmethod
  def load(cls, path: str | files.Path, backend: str = "auto") -> CodeIndex:
    """Reads what `save` wrote, and verifies all of it: its metadata, and each group of rows.

    Raises:
      ValueError: naming the file, if there is none, or it is another kind of file, or damaged; and the first bad row,
        if a code is not there, or an id or a code is null or an id there twice.
    """
    with checks.opened(path, _KIND, "index of codes", foreign=False) as table:
      codec = Codec.of_plain(table.about.get("codec"))
      index = cls(codec, backend)
      if table.names[:2] != ["id", "codes"] or table.about.get("sizes") != list(codec.sizes):
        raise ValueError(f"columns {table.names[:4]} of {str(table.about.get('sizes')):.60} codes; its tables are of "
                         f"{str(list(codec.sizes)):.60}")  # fmt: skip
      for group in table.groups(table.names):
        index._add_saved(group, table.names[2:])
    return index

  def _add_saved(self, group: tables.Group, names: Sequence[str]) -> None:
    """Adds rows of a file that was saved."""
    ids, values = shards.checked_ids(group.columns["id"], group), group.columns["codes"]
    packed, _ = shards.checked_codes(values, group, "codes", self.codec.sizes)
    if len(packed) < len(values):
      raise ValueError(f"column 'codes' has {values.null_count} nulls; allowed: none")
    for name in names:
      if not pa.types.is_string(group.columns[name].type):
        raise ValueError(f"column {name!r} is of type {group.columns[name].type}; allowed: string")
    group.verify()
    fields = self._checked_fields({name: group.columns[name].to_pylist() for name in names}, len(ids))
    self._append(self._ids.checked(ids, group.first), packed, fields)

  @classmethod
  def from_parquet(
    cls, folder: str | files.Path, codec: Codec, modalities: str | Sequence[str], part: str = "shared",
    backend: str = "auto",
  ) -> CodeIndex:  # fmt: skip
    """The index of one or several modalities of a finished job of mode `embed`; records that lack one are left out.

    Items have the fields `modality`, `label` and `split`. Of several modalities the ids are "MODALITY:ID".

    Args:
      folder: the job's workdir.
      codec: of the model that the job was of, see `Codec.of_model`.
      modalities: such as "image", or ["image", "audio"], whose shared codes are of one codebook.
      part: "shared" to search across modalities, "specific" within one.
      backend: of the index.

    Raises:
      ValueError: as `shards.read_column`; for a repeated id, or codes of other numbers than the codec's.
    """
    if part not in PARTS:
      raise ValueError(f"part: got {part!r}; allowed: {list(PARTS)}")
    several, index = not isinstance(modalities, str), cls(codec, backend)
    for modality in modalities if several else [modalities]:
      column = shards.column_name(modality, PARTS[part])
      if (sizes := shards.codes_of(files.path(folder), column)) != codec.sizes:
        raise ValueError(f"{folder}: column {column!r} has {len(sizes)} codes of {sorted(set(sizes))}; the codec "
                         f"{len(codec.sizes)} of {sorted(set(codec.sizes))}")  # fmt: skip
      for path, ids, codes, fields in shards.read_parts(files.path(folder), column, ("label", "split")):
        try:
          index.add([f"{modality}:{name}" for name in ids] if several else ids, codes, {**fields, "modality": modality})
        except ValueError as error:
          raise ValueError(f"{path}: {error}") from error
    return index


def _scanned(scan: Faiss | Numpy, parts: Sequence[_Laid], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """Numbers and sums of the k largest sums of each part."""
  found = [scan.largest(part.codes, k) for part in parts]
  return [(part.number(rows), sums) for part, (rows, sums) in zip(parts, found)]


def _joined(parts: Sequence[_Part]) -> _Part:
  if len(parts) == 1:
    return parts[0]
  fields = {name: np.concatenate([part.fields[name] for part in parts]) for name in parts[0].fields}
  return _Part(np.concatenate([part.codes for part in parts]), fields)


def _reranked(
  unit: np.ndarray, numbers: np.ndarray, vectors: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """The best k of each query's candidates by cosine with their vectors."""
  out, scores = np.zeros((len(unit), k), np.int64), np.zeros((len(unit), k), np.float32)
  for row, (query, own) in enumerate(zip(unit, numbers)):
    own = np.sort(own)  # in the file's order
    some = checks.unit(np.asarray(vectors[own], np.float64), None, own.tolist())
    cosines = (some.astype(np.float64) * query).sum(axis=1).astype(np.float32)
    order = np.lexsort((own, -cosines))[:k]
    out[row], scores[row] = own[order], cosines[order]
  return out, scores

"""What the codes of an item mean: which vector they are the sum of, and how near a query is to it."""

from __future__ import annotations

import base64
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from codebind_jax.embedding import packing

SCORES = ("cosine", "dot")
PARTS = ("shared", "specific", "full")
_ROWS = 1 << 14  # items decoded at once
_STACKED = 1 << 23  # numbers of tables of which a second copy is kept
_ORTHOGONAL = 1e-3  # by which a rotation's product with its transpose may differ from the identity


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
  """How codes become vectors: each code chooses a row of its position's table, which is added from `starts` on.

  Positions beside one another are product quantisation, several of one start are the stages of residual quantisation.

  Attributes:
    tables: of each position, [codes, width] float32. Positions that share a codebook hold the same array.
    starts: of each position, the first component that its rows are added to; one position after the other unless given.
    rotation: orthogonal [d, d], which turns vectors (`rotation @ vector`) before they are cut; None turns nothing.
    score: "cosine" of the query and the item's vector, or "dot" of the unit query and the vector as it is.

  Example:
    >>> axes = np.eye(2, dtype=np.float32)
    >>> codec = Codec((axes, axes))  # two positions of two codes
    >>> codec.width, codec.item_bytes
    (4, 1)
    >>> codec.decode(np.array([[0, 1]])).round(2).tolist()
    [[0.71, 0.0, 0.0, 0.71]]
  """

  tables: Sequence[np.ndarray]
  starts: Sequence[int] = ()
  rotation: np.ndarray | None = None
  score: str = "cosine"

  def __post_init__(self):
    """Raises ValueError for tables that are no finite matrices, positions that overlap in part or leave a gap, a
    rotation that is not orthogonal, or another score."""
    if not len(self.tables):
      raise ValueError("tables: got none; allowed: one for each of one or more positions")
    same: dict[int, np.ndarray] = {}
    for number, given in enumerate(self.tables):
      if id(given) not in same:
        table = np.array(given, np.float32)  # a copy, which nobody else changes
        if table.ndim != 2 or not table.size or not np.isfinite(table).all():
          raise ValueError(f"tables: that of position {number} has shape {table.shape}, or is not finite; allowed: "
                           "finite [codes, width]")  # fmt: skip
        same[id(given)] = table
    tables = tuple(same[id(given)] for given in self.tables)
    widths = [table.shape[1] for table in tables]
    starts = tuple(map(int, self.starts)) or (0, *np.cumsum(widths)[:-1].tolist())
    if len(starts) != len(tables):
      raise ValueError(f"starts: got {len(starts)} for {len(tables)} tables; allowed: one for each")
    spans = sorted({(start, start + width) for start, width in zip(starts, widths)})
    if [start for start, _ in spans] != [0, *(stop for _, stop in spans[:-1])]:
      raise ValueError(f"starts: got {starts[:8]} for widths {widths[:8]}; allowed: positions beside one another from "
                       "0 on, or at the same place")  # fmt: skip
    if not sum(packing.bits_of([len(table) for table in tables])):
      raise ValueError("tables: one code at every position; allowed: two or more at one of them")
    if self.score not in SCORES:
      raise ValueError(f"score: got {self.score!r}; allowed: {list(SCORES)}")
    object.__setattr__(self, "tables", tables)
    object.__setattr__(self, "starts", starts)
    if self.rotation is not None:
      turn = np.array(self.rotation, np.float32)
      if turn.shape != (self.width, self.width) or not np.allclose(turn @ turn.T, np.eye(len(turn)), atol=_ORTHOGONAL):
        raise ValueError(f"rotation: got shape {turn.shape}; allowed: an orthogonal matrix of {self.width} rows")
      object.__setattr__(self, "rotation", turn)

  @functools.cached_property
  def sizes(self) -> tuple[int, ...]:
    """Number of codes of each position."""
    return tuple(len(table) for table in self.tables)

  @functools.cached_property
  def width(self) -> int:
    """Width of the vectors."""
    return max(start + table.shape[1] for start, table in zip(self.starts, self.tables))

  @property
  def item_bytes(self) -> int:
    """Bytes of an item: its bits, filled up to whole bytes once."""
    return packing.bytes_of(self.sizes)

  @functools.cached_property
  def _groups(self) -> dict[int, list[int]]:
    """First component -> the positions that add to it."""
    groups: dict[int, list[int]] = {}
    for position, start in enumerate(self.starts):
      groups.setdefault(start, []).append(position)
    return groups

  def decode(self, codes: Int[np.ndarray, "n s"]) -> Float[np.ndarray, "n d"]:
    """The vectors of items, float32; of unit length if the score is a cosine.

    Raises:
      ValueError: for codes that are not there, or a vector that is zero where a cosine needs a direction.
    """
    packing.check(codes, self.sizes)
    out = np.empty((len(codes), self.width), np.float32)
    for first in range(0, len(codes), _ROWS):
      some = codes[first : first + _ROWS]
      rows, norms = self._turned(some), self.norms(some)
      if self.score == "cosine" and len(zero := np.flatnonzero(norms == 0)):
        raise ValueError(f"row {first + zero[0]}: its vector is zero; a cosine needs a direction")
      rows = rows if self.rotation is None else rows @ self.rotation
      out[first : first + _ROWS] = rows / norms[:, None] if self.score == "cosine" else rows
    return out

  def _turned(self, codes: np.ndarray) -> np.ndarray:
    rows = np.zeros((len(codes), self.width))
    for start, table, column in zip(self.starts, self.tables, codes.T):
      rows[:, start : start + table.shape[1]] += table[column]
    return rows

  @functools.cached_property
  def squares(self) -> Float[np.ndarray, "k"] | None:
    """What each code of each position adds to the square of an item's norm, float64, as in `look_up_table`; None with
    several stages, whose rows are not orthogonal."""
    return None if len(self._groups) < len(self.tables) else np.concatenate(self._squares)

  @functools.cached_property
  def _squares(self) -> list[np.ndarray]:
    """Squares of the norms of each position's rows."""
    of_book = {id(table): np.square(table.astype(np.float64)).sum(axis=1) for table in self.tables}
    return [of_book[id(table)] for table in self.tables]

  def norms(self, codes: Int[np.ndarray, "n s"]) -> Float[np.ndarray, "n"]:
    """Norms of the vectors, float64: of positions side by side the root of a sum that is looked up."""
    if self.squares is not None:
      return np.sqrt(self.squares[codes + self.offsets].sum(axis=1))
    squares = np.zeros(len(codes))
    for positions in self._groups.values():
      for first in range(0, len(codes), _ROWS):
        rows = sum(self.tables[p].astype(np.float64)[codes[first : first + _ROWS, p]] for p in positions)
        squares[first : first + _ROWS] += np.square(rows).sum(axis=1)
    return np.sqrt(squares)

  def look_up_table(self, query: Float[np.ndarray, "d"]) -> Float[np.ndarray, "k"]:
    """What each code of each position adds to the inner product of a query and an item, float64.

    The sum over an item's codes is the inner product of the query and the item's vector as it is; for a cosine it is
    divided by the item's norm, see `norms`.

    Args:
      query: as the items before they were coded, of unit length.

    Returns:
      [sum of `sizes`], the codes of one position after those of another; `offsets` says where each position begins.
    """
    turned = query.astype(np.float64)
    turned = turned if self.rotation is None else self.rotation.astype(np.float64) @ turned
    if self._stacked is not None:
      tables, components = self._stacked
      return np.matmul(tables, turned[components][..., None]).reshape(-1)
    return np.concatenate([table.astype(np.float64) @ turned[start : start + table.shape[1]]
                           for start, table in zip(self.starts, self.tables)])  # fmt: skip

  @functools.cached_property
  def offsets(self) -> Int[np.ndarray, "s"]:
    """Where each position begins in `look_up_table` and `squares`."""
    return np.cumsum((0, *self.sizes[:-1]))

  @functools.cached_property
  def _stacked(self) -> tuple[np.ndarray, np.ndarray] | None:
    """(tables [s, k, w] float64, their components [s, w]), if all have one shape and they are not large."""
    shapes = {table.shape for table in self.tables}
    if len(shapes) > 1 or len(self.tables) * self.tables[0].size > _STACKED:
      return None
    return np.stack(self.tables).astype(np.float64), np.array(self.starts)[:, None] + np.arange(self.tables[0].shape[1])

  @classmethod
  def of_model(cls, model: Any, part: str = "shared", modality: str = "") -> Codec:
    """The codec of a model's codes: of `Embeddings.codes_shared`, `codes_specific` or `codes`.

    Args:
      model: a `codebind_jax.load`ed one.
      part: "shared", whose codes all modalities have in common, "specific" or "full".
      modality: of the items; needed for the last two.

    Raises:
      ValueError: for another part, a modality that is not there or has no such part, or a model without codebooks for
        the positions of an embedding.
    """
    if part not in PARTS:
      raise ValueError(f"part: got {part!r}; allowed: {list(PARTS)}")
    spec = getattr(model.method, "spec", None)
    if spec is None:
      raise ValueError("the model has no compositional codes; allowed: one of method 'codebind' that quantises")
    if modality not in model.modalities and (part != "shared" or modality):
      raise ValueError(f"modality: got {modality!r}; allowed: one of {list(model.modalities)}")
    if part != "shared" and not spec.specific_width(modality):
      raise ValueError(f"part: {modality!r} has no specific part; allowed: 'shared'")
    name = modality or model.modalities[0]
    if not modality and len({spec.codebook_names(m)[0] for m in model.modalities}) > 1:
      raise ValueError("modality: got '', and each has a codebook of its own; allowed: one of "
                       f"{list(model.modalities)}")  # fmt: skip
    widths = {"shared": spec.shared_dim, "specific": spec.specific_width(name)}
    books = dict(zip(("shared", "specific"), spec.codebook_names(name)))
    dims = dict(zip(("shared", "specific"), spec.code_dims))
    chosen = ("shared", "specific") if part == "full" else (part,)
    chunk = sum(dims.values())
    interleaved = part == "full" and spec.layout == "interleaved"
    tables, starts, rotation, before = [], [], np.eye(sum(widths[p] for p in chosen), dtype=np.float32), 0
    turns = model.method.rotations(model.params)
    for one in chosen:
      count, dim = widths[one] // dims[one], dims[one]
      first = [before + dim * n for n in range(count)]
      if interleaved:
        first = [chunk * n + (dims["shared"] if one == "specific" else 0) for n in range(count)]
      codes = np.asarray(model.codebooks[books[one]].codes, np.float32)
      stages = codes if spec.stages > 1 else codes[None]
      for stage in stages:
        tables += list(stage) if spec.positions == "own" else [stage] * count
        starts += first
      if books[one] in turns:
        at = np.concatenate([np.arange(start, start + dim) for start in first])
        rotation[np.ix_(at, at)] = np.asarray(turns[books[one]])
      before += widths[one]
    return cls(tuple(tables), tuple(starts), rotation if turns else None)

  def plain(self) -> dict[str, Any]:
    """As JSON holds it; `of_plain` reads it."""
    books = {id(table): table for table in self.tables}
    number = {key: n for n, key in enumerate(books)}
    return {
      "books": [_text(table) for table in books.values()],
      "positions": [[number[id(table)], start] for table, start in zip(self.tables, self.starts)],
      "rotation": None if self.rotation is None else _text(self.rotation), "score": self.score,
    }  # fmt: skip

  @classmethod
  def of_plain(cls, content: Any) -> Codec:
    """What `plain` gave.

    Raises:
      ValueError: if it is something else.
    """
    try:
      books = [_matrix(book) for book in content["books"]]
      tables, starts = [books[number] for number, _ in content["positions"]], [s for _, s in content["positions"]]
      rotation = None if content["rotation"] is None else _matrix(content["rotation"])
      return cls(tuple(tables), tuple(starts), rotation, content["score"])
    except (KeyError, TypeError, IndexError) as error:
      raise ValueError(f"no tables of codes ({type(error).__name__}: {error})") from error


def _text(array: np.ndarray) -> dict[str, Any]:
  return {"shape": list(array.shape), "float32": base64.b64encode(array.astype("<f4").tobytes()).decode()}


def _matrix(content: Mapping[str, Any]) -> np.ndarray:
  values = np.frombuffer(base64.b64decode(content["float32"], validate=True), "<f4")
  return values.reshape(content["shape"]).astype(np.float32)

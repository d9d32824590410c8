"""The largest sums of looked-up numbers over packed codes: with faiss, or with numpy.

A query's numbers (`Codec.look_up_table`) are all that a scan needs, whatever the codes' widths, rotation and stages.
To faiss they are a product quantiser of width 1 for the query 1: its `search_ip` reads packed codes where they lie.
Codes that lie within one byte each, such as two of 4 bits, are looked up by the byte, in tables of 256 sums.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int, UInt8

from codebind_jax.embedding import packing
from codebind_jax.search import checks
from codebind_jax.search.codec import Codec

_MOST_BITS = 16  # of a code that faiss looks up
_EPSILON = 2.0**-23


class Look:
  """Where the codes of an item lie, and what numbers they choose.

  Attributes:
    by_byte: whether each code lies within one byte.
    bits: of each code that is looked up: 8 of bytes, else those of the positions.
    faiss: whether faiss can look these up.
  """

  def __init__(self, sizes: Sequence[int]):
    """sizes: of each position's codebook."""
    self._ends = np.cumsum(sizes)[:-1]
    bits = packing.bits_of(sizes)
    self._starts = np.cumsum((0, *bits))[:-1].tolist()
    self.by_byte = all(start // 8 == (start + max(n, 1) - 1) // 8 for start, n in zip(self._starts, bits) if n)
    self._of_bits, self._bytes = bits, packing.bytes_of(sizes)
    self.bits = (8,) * self._bytes if self.by_byte else bits
    self._whole = tuple(sizes) == tuple(1 << bits for bits in self.bits) and len(set(self.bits)) == 1
    self.faiss = len(set(self.bits)) == 1 and 1 <= self.bits[0] <= _MOST_BITS

  def table(self, table: Float[np.ndarray, "every"]) -> Float[np.ndarray, "s k"] | list[Float[np.ndarray, "_"]]:
    """A query's numbers [2^bits] of each that is looked up, float64; 0 for codes that are not there.

    Args:
      table: as of `Codec.look_up_table`.
    """
    if self._whole:
      return table.reshape(len(self.bits), -1)
    tables = np.split(table, self._ends)
    if not self.by_byte:
      return [np.concatenate([own, np.zeros((1 << bits) - len(own))]) for own, bits in zip(tables, self.bits)]
    out = np.zeros((self._bytes, 256))
    for own, start, bits in zip(tables, self._starts, self._of_bits):
      code = (np.arange(256) >> start % 8) & ((1 << bits) - 1)
      out[min(start // 8, self._bytes - 1)] += np.concatenate([own, np.zeros((1 << bits) - len(own))])[code]
    return out

  def column(self, packed: UInt8[np.ndarray, "n b"], number: int) -> Int[np.ndarray, "n"] | UInt8[np.ndarray, "n"]:
    """What is looked up first, second, and so on, of all items."""
    return packed[:, number] if self.by_byte else packing.unpack_one(packed, self._starts[number], self.bits[number])

  @staticmethod
  def error(tables: Sequence[Float[np.ndarray, "_"]] | Float[np.ndarray, "s k"]) -> float:
    """By how much a float32 sum of looked-up numbers may be off."""
    if isinstance(tables, np.ndarray):
      return (len(tables) + 2) * _EPSILON * float(np.abs(tables).max(axis=1).sum())
    return (len(tables) + 2) * _EPSILON * float(sum(np.abs(table).max() for table in tables))


class Numpy:
  """Scans with numpy, column by column."""

  def __init__(self, look: Look):
    self._look, self._tables = look, []

  @staticmethod
  def laid(packed: UInt8[np.ndarray, "n b"]) -> UInt8[np.ndarray, "n b"]:
    """A copy of packed codes as `largest` reads them: columns in one piece."""
    return np.array(packed, order="F")

  def set_query(self, tables: Sequence[Float[np.ndarray, "_"]] | Float[np.ndarray, "s k"]) -> None:
    """Takes the numbers of a query."""
    self._tables = [table.astype(np.float32) for table in tables]

  def largest(
    self, packed: UInt8[np.ndarray, "n b"], k: int
  ) -> tuple[Int[np.ndarray, "k"], Float[np.ndarray, "k"]]:
    """Rows and sums of the k largest sums, or of all, in any order."""
    k = min(k, len(packed))
    sums = np.zeros(len(packed), np.float32)
    for number, table in enumerate(self._tables):
      sums += table[self._look.column(packed, number)]
    rows = np.arange(len(sums)) if k == len(sums) else np.argpartition(-sums, k - 1)[:k]
    return rows, sums[rows]


class Faiss:
  """Scans with faiss."""

  def __init__(self, look: Look):
    self._pq = _faiss().ProductQuantizer(len(look.bits), len(look.bits), look.bits[0])
    self._query = np.ones((1, len(look.bits)), np.float32)

  @staticmethod
  def laid(packed: UInt8[np.ndarray, "n b"]) -> UInt8[np.ndarray, "n b"]:
    """A copy of packed codes as `largest` reads them: items in one piece."""
    return np.array(packed, order="C")

  def set_query(self, tables: Sequence[Float[np.ndarray, "_"]] | Float[np.ndarray, "s k"]) -> None:
    """Takes the numbers of a query."""
    _faiss().copy_array_to_vector(np.concatenate(list(tables)).astype(np.float32), self._pq.centroids)

  def largest(
    self, packed: UInt8[np.ndarray, "n b"], k: int
  ) -> tuple[Int[np.ndarray, "k"], Float[np.ndarray, "k"]]:
    """As `Numpy.largest`."""
    faiss, k = _faiss(), min(k, len(packed))
    sums, rows = np.empty((1, k), np.float32), np.empty((1, k), np.int64)
    found = faiss.float_minheap_array_t()
    found.nh, found.k, found.ids, found.val = 1, k, faiss.swig_ptr(rows), faiss.swig_ptr(sums)
    packed = np.ascontiguousarray(packed)
    self._pq.search_ip(faiss.swig_ptr(self._query), 1, faiss.swig_ptr(packed), len(packed), found)
    return rows[0], sums[0]


@functools.cache
def _faiss():
  import faiss

  return faiss


def byte_table(codec: Codec, query: Float[np.ndarray, "d"]) -> pa.Table:
  """A query's look-up table for an engine that knows bytes alone, such as a database with the file of an index.

  Over an item's bytes, `sum(product) / sqrt(sum(square))` is its cosine, `sum(product)` its inner product.

  Args:
    codec: of the items, whose codes lie within one byte each.
    query: as of `Embeddings.query`, of any norm but zero.

  Returns:
    A row for each value of each byte of an item: `position` from 1 on, `byte` as two upper-case hex digits, and what
    it adds: `product` to the inner product of the unit query and the item, `square` to the square of the item's norm.

  Raises:
    ValueError: if a code is spread over two bytes, or items have stages, whose squares do not add up; for a query of
      another width, zero or not finite.
  """
  look = Look(codec.sizes)
  if not look.by_byte or codec.squares is None:
    raise ValueError(f"codec: codes of {sorted(set(packing.bits_of(codec.sizes)))} bits that are spread over bytes, or "
                     "residual stages; allowed: one stage of codes within one byte each")  # fmt: skip
  unit = checks.unit_queries(np.asarray(query)[None], codec.width)[0]
  products, squares = look.table(codec.look_up_table(unit)), look.table(codec.squares)
  return pa.table({
    "position": np.repeat(np.arange(1, len(products) + 1, dtype=np.int32), 256),
    "byte": [f"{byte:02X}" for byte in range(256)] * len(products),
    "product": np.concatenate(products), "square": np.concatenate(squares),
  })  # fmt: skip

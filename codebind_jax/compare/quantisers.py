"""Quantisers of float vectors at a number of bytes, by faiss: what codes of a trained codebook are compared with.

Product quantisation (PQ): Jegou et al. 2011; OPQ: Ge et al., CVPR 2013; residual (RQ): Chen et al. 2010; local search
(LSQ): Martinez et al., ECCV 2018. Codes are of 8 bits, those of `rq10`, residual ones, of 10. RQ and LSQ are wanted at
many bytes too, where one sequence of stages takes hours: there the vector is cut into parts, each of which has its own
stages (faiss' product-residual and product-local-search quantisers).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from codebind_jax.codebook.spec import stages_within
from codebind_jax.config import QUANTISERS
from codebind_jax.search.checks import backend_of

FLOATS = {"float32": np.float32, "float16": np.float16}  # have a size of their own
Quantiser = Literal[QUANTISERS]
BITS = {"pq": 8, "opq": 8, "rq": 8, "rq10": 10, "lsq": 8}  # of a code


@dataclasses.dataclass(frozen=True)
class Fitted:
  """A quantiser that has seen its training rows.

  Attributes:
    item_bytes: of a vector's code.
    decoded: vectors [n, d] -> what their codes stand for, [n, d].
  """

  item_bytes: int
  decoded: Callable[[Float[np.ndarray, "n d"]], Float[np.ndarray, "n d"]]


def fitting(name: Quantiser, width: int, size: int) -> bool:
  """Whether a quantiser has a form of `size` bytes for vectors of a width; those of floats have one size alone."""
  if name in FLOATS:
    return size == width * np.dtype(FLOATS[name]).itemsize
  if name in ("sq8", "sq4"):
    return size * 8 // int(name[2:]) <= width
  return width % size == 0


def rows_needed(name: Quantiser, size: int) -> int:
  """The fewest training rows that a quantiser can be fitted to."""
  if name in FLOATS:
    return 0
  return size * 8 // int(name[2:]) if name in ("sq8", "sq4") else 1 << BITS[name]


def fit(name: Quantiser, size: int, rows: Float[np.ndarray, "n d"], seed: int = 0) -> Fitted:
  """Fits a quantiser.

  Scalar quantisers of 8 or 4 bits take as many dimensions as the bytes allow: the first principal ones, where the
  vectors have more.

  Args:
    name: of the quantiser.
    size: bytes of a code; that of floats is `width` times 4 or 2.
    rows: vectors to train on.
    seed: of all random draws.

  Raises:
    ValueError: without faiss, for a size that does not fit (`fitting`), or fewer rows than a codebook has codes.
  """
  width = rows.shape[1]
  if not fitting(name, width, size):
    raise ValueError(f"{name}: got {size} bytes for vectors of width {width}; allowed: a divisor of the width, for "
                     "floats their own size, for sq8 and sq4 at most a code for each dimension")  # fmt: skip
  if name in FLOATS:
    return Fitted(size, lambda x: x.astype(FLOATS[name]).astype(np.float32))
  faiss = library()
  if len(rows) < rows_needed(name, size):
    raise ValueError(f"{name}: got {len(rows)} training rows for {size} bytes; allowed: {rows_needed(name, size)} and "
                     "more")  # fmt: skip
  threads = faiss.omp_get_max_threads()
  faiss.omp_set_num_threads(1)  # sums are the same in every run
  try:
    turn, codec = _made(faiss, name, width, size, seed)
    rows = np.ascontiguousarray(rows, np.float32)
    if turn is not None:
      turn.train(rows)
    codec.train(turn.apply(rows) if turn is not None else rows)
  finally:
    faiss.omp_set_num_threads(threads)
  mean = rows.mean(0, keepdims=True)
  # What of the mean lies outside the dimensions kept: faiss' way back leaves it out.
  outside = 0.0 if turn is None else mean - turn.reverse_transform(turn.apply(mean))

  def decoded(x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x, np.float32)
    codes = codec.compute_codes(turn.apply(x) if turn is not None else x)
    found = codec.decode(codes)
    return found if turn is None else turn.reverse_transform(found) + outside

  return Fitted(int(codec.code_size), decoded)


def library() -> Any:
  """The module faiss.

  Raises:
    ValueError: if it is not installed.
  """
  backend_of("faiss")
  import faiss

  return faiss


def _made(faiss: Any, name: str, width: int, size: int, seed: int) -> tuple[Any, Any]:
  """(a linear transform or None, a quantiser), not yet trained."""
  if name in ("sq8", "sq4"):
    bits = int(name[2:])
    kept = size * 8 // bits
    kind = faiss.ScalarQuantizer.QT_8bit if bits == 8 else faiss.ScalarQuantizer.QT_4bit
    return faiss.PCAMatrix(width, kept) if kept < width else None, faiss.ScalarQuantizer(kept, kind)
  if name in ("pq", "opq"):
    codec = faiss.ProductQuantizer(width, size, BITS[name])
    codec.cp.seed = seed + 1
    codec.cp.min_points_per_centroid = 1  # a small world has few rows, and says so in the number of its rows
    if name == "pq":
      return None, codec
    turn = faiss.OPQMatrix(width, size)
    turn.pq, turn.niter = codec, 20  # of 50; it takes most of the time, and the error hardly falls in the last ones
    return turn, codec
  parts, stages = stages_within(width, size, BITS[name])
  kinds = {
    (False, True): faiss.ResidualQuantizer, (True, True): faiss.LocalSearchQuantizer,
    (False, False): faiss.ProductResidualQuantizer, (True, False): faiss.ProductLocalSearchQuantizer,
  }  # fmt: skip
  sizes = (width, stages, BITS[name]) if parts == 1 else (width, parts, stages, BITS[name])
  codec = kinds[name == "lsq", parts == 1](*sizes)
  for each in [codec] if parts == 1 else [faiss.downcast_Quantizer(codec.subquantizer(n)) for n in range(parts)]:
    if name == "lsq":
      each.random_seed = seed + 1
    else:
      each.cp.seed, each.cp.min_points_per_centroid = seed + 1, 1
  return None, codec

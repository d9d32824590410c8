"""Norms of items as further codes, where they are no sum over codes: those of residual stages."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from codebind_jax.embedding import packing
from codebind_jax.search.codec import Codec

_BITS = 10  # of a norm, at least


class NormCodes:
  """A norm's digits, rounded down, of as many bits as the codec's widest codes: a scan looks them up as it does codes.

  Attributes:
    sizes: number of values of each digit; empty where norms need none.
    step: what the last digit counts.
  """

  def __init__(self, codec: Codec):
    self.sizes: tuple[int, ...] = ()
    self.step = 0.0
    if codec.score == "cosine" and codec.squares is None:
      bits = max(packing.bits_of(codec.sizes))
      self.sizes = (1 << bits,) * -(-_BITS // bits)
      most = sum(np.linalg.norm(table.astype(np.float64), axis=1).max() for table in codec.tables)
      self.step = float(most) * (1 + 1e-9) / float(np.prod(self.sizes, dtype=np.float64))

  def codes(self, norms: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n s"]:
    """The digits of norms, the first first."""
    rest, found = np.floor(norms / self.step).astype(np.int64) if self.sizes else np.zeros(len(norms), np.int64), []
    for size in reversed(self.sizes):
      rest, digit = np.divmod(rest, size)
      found.append(digit)
    return np.stack(found[::-1], axis=1) if found else np.zeros((len(norms), 0), np.int64)

  def table(self, factor: float) -> Float[np.ndarray, "k"]:
    """What each value of each digit adds to `factor` times the norm, those of one digit after those of another."""
    weights = self.step * np.cumprod((1.0, *self.sizes[:0:-1]))[::-1] if self.sizes else ()
    own = [factor * weight * np.arange(size) for weight, size in zip(weights, self.sizes)]
    return np.concatenate([np.zeros(0), *own])

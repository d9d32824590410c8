"""Training-free optimisation of a codebook (TOC): the choice of the codes' channels to keep, for any trained run.

Huang et al., arXiv 2403.05168. The body of the paper was not read: score and selection follow the released code.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from codebind_jax.methods.base import EXTRA
from codebind_jax.norm import unit, wide


def channel_scores(
  codes: Float[Array | np.ndarray, "k d"], *, similarity: float = 0.7, variance: float = 0.3
) -> Float[Array, "d"]:
  """C_d = -similarity S_d + variance V_d: high where a channel tells codes apart.

  S_d is the mean over ordered pairs of different codes of e_id e_jd, V_d the unbiased variance over codes. In closed
  form S_d = mean_d^2 - V_d / k, so the cost is that of a mean.

  Args:
    codes: the codebook, as stored.
    similarity: weight of S. (Three of the release's scripts have 0.7 and leave out the variance.)
    variance: weight of V.

  Raises:
    ValueError: for fewer than two codes.
  """
  codes = wide(codes)
  if codes.shape[0] < 2:
    raise ValueError(f"codes must be at least two, got {codes.shape[0]}")
  mean, var = jnp.mean(codes, axis=0), jnp.var(codes, axis=0, ddof=1)
  return -similarity * (mean * mean - var / codes.shape[0]) + variance * var


def select_channels(
  codes: Float[Array | np.ndarray, "k d"], q: int, ratio: tuple[int, int] = (1, 0), *, similarity: float = 0.7,
  variance: float = 0.3,
) -> Int[Array, "q"]:
  """Channels to keep: the best by `channel_scores`, best first, then the worst, worst first; lowest index on ties.

  Args:
    codes: the codebook.
    q: channels wanted.
    ratio: parts of best and of worst; floor(q / (p + r)) times each are taken, so their number can be less than q.
    similarity: as for `channel_scores`.
    variance: likewise.

  Raises:
    ValueError: if q is not between 1 and the width, or no channel would be left.
  """
  best, worst = ratio
  if not 1 <= q <= codes.shape[1] or min(ratio) < 0 or not 1 <= best + worst <= q:
    raise ValueError(f"q must be 1 to {codes.shape[1]} and ratio two counts with a sum of 1 to q, got {q} and {ratio}")
  scores, unit_size = channel_scores(codes, similarity=similarity, variance=variance), q // (best + worst)
  highest = jnp.argsort(-scores, stable=True)[: unit_size * best]
  lowest = jnp.argsort(scores, stable=True)[: unit_size * worst]
  return jnp.concatenate([highest, lowest]).astype(jnp.int32)


def redundancy(codes: Float[Array | np.ndarray, "k d"]) -> Float[Array, ""]:
  """Mean cosine between different codes, which the selection should lower."""
  units, count = unit(codes), codes.shape[0]
  total = jnp.sum(units, axis=0)
  # A zero code has no direction; its cosines count as 0.
  return (jnp.sum(total * total) - jnp.sum(units * units)) / (count * (count - 1))


def codes_of(model: Any) -> Float[np.ndarray, "k d"]:
  """The shared codebook of a trained model.

  Raises:
    ValueError: if its method has none.
  """
  if "shared" in model.codebooks:
    codes = np.asarray(model.codebooks["shared"].codes, np.float32)
    return codes.reshape(-1, codes.shape[-1])  # of all positions and stages
  if "codes" in model.params.get(EXTRA, {}):
    return np.asarray(model.params[EXTRA]["codes"], np.float32)
  raise ValueError(f"method {model.config.method!r} has no shared codebook")


def keep_channels(x: Float[np.ndarray, "n d"], channels: Int[np.ndarray, "q"], width: int) -> Float[np.ndarray, "n _"]:
  """Embeddings with only the chosen channels of each of their segments, which are `width` wide; normalised again.

  Raises:
    ValueError: if the embeddings are not made of such segments.
  """
  if x.shape[1] % width:
    raise ValueError(f"embeddings of width {x.shape[1]} are not made of codes of width {width}")
  kept = x.reshape(len(x), -1, width)[:, :, channels].reshape(len(x), -1)
  return kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-12)


def choose(codes: Float[np.ndarray, "k d"], count: int, ratio: tuple[int, int]) -> dict[str, Any]:
  """The `count` best channels (0 for three quarters), all scores, and the codes' redundancy before and after."""
  channels = np.asarray(select_channels(codes, count or max(1, codes.shape[1] * 3 // 4), ratio))
  return {
    "channels": channels.tolist(), "of": codes.shape[1], "scores": np.asarray(channel_scores(codes)).tolist(),
    "redundancy_before": float(redundancy(codes)), "redundancy_after": float(redundancy(codes[:, channels])),
  }  # fmt: skip

"""Losses of the unified codebook (DCID, FCID): commitment to partners' codes, and matching of code distributions.

Xia et al., "Achieving Cross Modal Generalization with Multimodal Unified Representation", NeurIPS 2023.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from codebind_jax.losses.code_contrast import safe_sqrt
from codebind_jax.losses.masks import MASKED_LOGIT, distinct, masked_mean
from codebind_jax.norm import wide

Features = Mapping[str, Float[Array | np.ndarray, "b t d"]]
Masks = Mapping[str, Bool[Array | np.ndarray, "b"]]
_HIGH = jax.lax.Precision.HIGHEST


def unified_commitment(
  features: Features,
  quantized: Features,
  *,
  beta: float = 0.25,
  partner: float = 0.5,
  reduce: str = "sum",
  masks: Masks | None = None,
) -> dict[str, Float[Array, ""]]:
  """beta |z_m - sg e_m|^2 + partner beta |z_m - sg e_p|^2, the second split evenly over the partners p (eq. 8).

  Args:
    features: modality -> vectors z_m.
    quantized: modality -> codes e_m chosen for them.
    beta: weight. The release has 2 beta.
    partner: weight of all partners' codes together, relative to a vector's own code.
    reduce: over the width: "sum", a squared norm as the paper prints, or "mean" as the release.
    masks: modality -> rows that have it; a partner's term counts where both have.

  Returns:
    One loss a modality, mean over rows and steps.

  Raises:
    ValueError: for an unknown `reduce`.
  """
  if reduce not in ("sum", "mean"):
    raise ValueError(f"reduce must be 'sum' or 'mean', got {reduce!r}")
  out = {}
  for name, z in features.items():
    z, losses = wide(z), []
    for other, q in quantized.items():
      square = (z - jax.lax.stop_gradient(wide(q))) ** 2
      terms = (jnp.sum(square, -1) if reduce == "sum" else jnp.mean(square, -1)).mean(-1)
      mean = masked_mean(terms, None if masks is None else masks[name] & masks[other])
      weight = 1.0 if other == name else partner / max(len(quantized) - 1, 1)
      losses.append(beta * weight * mean)
    out[name] = sum(losses)
  return out


@jax.jit
def code_distribution(
  z: Float[Array | np.ndarray, "b t d"], codes: Float[Array | np.ndarray, "k d"]
) -> Float[Array, "b k"]:
  """P: mean over steps of the softmax over codes of minus the Euclidean distance."""
  z, codes = wide(z), jax.lax.stop_gradient(wide(codes))
  product = jnp.einsum("btd,kd->btk", z, codes, precision=_HIGH)
  square = jnp.sum(z * z, -1, keepdims=True) + jnp.sum(codes * codes, -1) - 2 * product
  return jnp.mean(jax.nn.softmax(-safe_sqrt(square), axis=-1), axis=1)


@functools.partial(jax.jit, static_argnames="symmetric")
def distribution_matching(
  p: Float[Array | np.ndarray, "b k"],
  q: Float[Array | np.ndarray, "_b _k"],
  *,
  symmetric: bool = False,
  mask: Bool[Array | np.ndarray, "b"] | None = None,
  groups: Int[Array | np.ndarray, "b"] | None = None,
) -> Float[Array, ""]:
  """Code matching (L_cmcm) of DCID: paired sequences should use codes with the same probabilities.

  S_ij = <p_i, log q_j> + <q_i, log p_j>; the loss is the cross-entropy of the diagonal. This S is the release's;
  Liu et al., whom the paper cites for it, was not read.

  Args:
    p: code distributions of one modality; row i belongs to row i of `q`.
    q: those of the other.
    symmetric: <q_j, log p_i> in the second term, the negative symmetric cross-entropy (`losses.code_matching`).
    mask: True for rows that count.
    groups: rows of one group are not each other's negatives.
  """
  p, q = wide(p), wide(q)
  cross = lambda a, b: jnp.einsum("ik,jk->ij", a, jnp.log(b + 1e-10), precision=_HIGH)
  second = cross(q, p)
  score = cross(p, q) + (second.T if symmetric else second)
  rows = jnp.ones(p.shape[0], jnp.bool_) if mask is None else jnp.asarray(mask, jnp.bool_)
  keys = rows[None] if groups is None else rows & distinct(groups)
  # The release adds the largest of -S and divides by a sum + 1e-5; this equals it without its overflow.
  floor = np.log(1e-5) + jnp.min(jnp.where(rows[:, None] & rows, score, 0.0))
  total = jnp.logaddexp(jax.nn.logsumexp(jnp.where(keys, score, MASKED_LOGIT), axis=1), floor)
  return masked_mean(total - jnp.diagonal(score), rows)

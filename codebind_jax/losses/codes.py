"""Losses on codes: commitment, uniformity, and matching of code distributions across modalities."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from codebind_jax.losses.code_contrast import safe_sqrt
from codebind_jax.losses.masks import MASKED_LOGIT, masked_mean
from codebind_jax.norm import unit


def commitment(
  z: Float[Array | np.ndarray, "*lead d"], q: Float[Array | np.ndarray, "*lead d"], *, beta: float = 0.25
) -> Float[Array, ""]:
  """beta * mean (sg(q) - z)^2: pulls segments to their codes (van den Oord et al., 2017, eq. 3).

  Args:
    z: segments as quantised.
    q: their code vectors.
    beta: weight.
  """
  difference = jax.lax.stop_gradient(jnp.asarray(q, jnp.float32)) - jnp.asarray(z, jnp.float32)
  return beta * jnp.mean(difference * difference)


def code_uniform(codes: Float[Array | np.ndarray, "k d"]) -> Float[Array, ""]:
  """Log of the mean over code pairs of exp(-|ê_i - ê_j|^2), ê normalised (Wang and Isola, 2020, eq. 2 with t = 1)."""
  return uniformity(unit(codes), None)


def code_matching(
  sim_a: Float[Array | np.ndarray, "b s k"],
  sim_b: Float[Array | np.ndarray, "_b _s _k"],
  *,
  temperature: float = 1.0,
  mask: Bool[Array | np.ndarray, "b"] | None = None,
  release_axis: bool = False,
) -> Float[Array, ""]:
  """Cross-modal code matching: paired items should use codes with the same probabilities (Liu et al., 2022, eq. 4-6).

  P = softmax over codes of the similarities; for each segment score[i, j] = sum_k P_a[i] log P_b[j] + log P_a[i]
  P_b[j]; the loss is the cross-entropy of the diagonal, mean over segments and batch.

  Args:
    sim_a: class-token similarities of one modality; row i belongs to row i of `sim_b`.
    sim_b: those of the other.
    temperature: divides the similarities.
    mask: True for rows that count.
    release_axis: the release's form where no similarity of the pair is negative: softmax of square roots over the
      segments.

  Raises:
    ValueError: if shapes differ.
  """
  if sim_a.shape != sim_b.shape:
    raise ValueError(f"sim_a and sim_b must have one shape, got {sim_a.shape} and {sim_b.shape}")
  a, b = jnp.asarray(sim_a, jnp.float32) / temperature, jnp.asarray(sim_b, jnp.float32) / temperature
  p_a, p_b = jax.nn.softmax(a, axis=2), jax.nn.softmax(b, axis=2)
  if release_axis:
    no_negative = ~(jnp.any(a < 0) | jnp.any(b < 0))
    root = lambda x: jax.nn.softmax(safe_sqrt(x), axis=1)
    p_a, p_b = jnp.where(no_negative, root(a), p_a), jnp.where(no_negative, root(b), p_b)
  log_a, log_b = jnp.log(p_a + 1e-10), jnp.log(p_b + 1e-10)
  high = jax.lax.Precision.HIGHEST
  score = jnp.einsum("isk,jsk->sij", p_a, log_b, precision=high) + jnp.einsum(
    "isk,jsk->sij", log_a, p_b, precision=high
  )
  if mask is not None:
    score = jnp.where(jnp.asarray(mask, jnp.bool_)[None, None], score, MASKED_LOGIT)
  terms = jax.nn.logsumexp(score, axis=2) - jnp.diagonal(score, axis1=1, axis2=2)
  return masked_mean(jnp.mean(terms, axis=0), mask)


def uniformity(x: Float[Array, "b d"], mask: Bool[Array | np.ndarray, "b"] | None) -> Float[Array, ""]:
  """Log of the mean over pairs of exp(-|x_i - x_j|^2); 0 if there is no pair."""
  square = jnp.sum(x * x, axis=1)
  product = jnp.einsum("id,jd->ij", x, x, precision=jax.lax.Precision.HIGHEST)
  distance = jnp.maximum(square[:, None] + square[None] - 2 * product, 0.0)
  valid = jnp.ones(x.shape[0], jnp.bool_) if mask is None else jnp.asarray(mask, jnp.bool_)
  pairs = jnp.triu(valid[:, None] & valid[None], 1)
  count = jnp.sum(pairs)
  value = jax.nn.logsumexp(jnp.where(pairs, -distance, -jnp.inf), where=pairs) - jnp.log(jnp.maximum(count, 1))
  return jnp.where(count > 0, value, 0.0)

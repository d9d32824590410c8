"""Contrastive alignment of two sets of embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from codebind_jax.norm import unit


def info_nce(
  a: Float[Array | np.ndarray, "b d"],
  b: Float[Array | np.ndarray, "_b _d"],
  *,
  temperature: float | jax.Array,
  logit_scale_a: float | jax.Array = 1.0,
  logit_scale_b: float | jax.Array = 1.0,
  mask: Bool[Array | np.ndarray, "b"] | None = None,
  chunk: int = 0,
  scale_inside_cosine: bool = False,
) -> Float[Array, ""]:
  """InfoNCE over cosines: cross-entropy of the diagonal in both directions, summed, mean over the batch.

  Args:
    a: embeddings; row i belongs to row i of `b`. Any float type; computed in float32.
    b: embeddings of the other modality.
    temperature: divides the cosines.
    logit_scale_a: multiplies the cosine.
    logit_scale_b: likewise.
    mask: True for rows that count; others are neither positives nor negatives.
    chunk: rows of the [b, b] logits held at once in both passes; 0 for all.
    scale_inside_cosine: the release's order, in which the cosine cancels the scales and they get no gradient.

  Raises:
    ValueError: if shapes differ or `chunk` is negative.
  """
  if a.shape != b.shape or chunk < 0:
    raise ValueError(f"a and b must have one shape and chunk be >= 0, got {a.shape}, {b.shape} and {chunk}")
  scale = 1.0 if scale_inside_cosine else jnp.asarray(logit_scale_a, jnp.float32) * logit_scale_b
  scale = jnp.asarray(scale / temperature, jnp.float32)
  valid = jnp.ones(a.shape[0], jnp.bool_) if mask is None else jnp.asarray(mask, jnp.bool_)
  # Masked rows may hold anything; zeros keep their gradient finite.
  a, b = (unit(jnp.where(valid[:, None], jnp.asarray(x, jnp.float32), 0.0)) for x in (a, b))
  logits = scale * jnp.einsum("id,jd->ij", a, b, precision=jax.lax.Precision.HIGHEST)
  positive = jnp.diagonal(logits)
  logits = jnp.where(valid[:, None] & valid[None], logits, -1e30)
  terms = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0) - 2 * positive
  return jnp.sum(jnp.where(valid, terms, 0.0)) / jnp.maximum(jnp.sum(valid), 1)

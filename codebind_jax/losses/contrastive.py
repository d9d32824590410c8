"""Contrastive alignment of two sets of embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from codebind_jax.losses.chunked import chunked_sum
from codebind_jax.norm import unit

_NEGATIVE = -1e30


def distinct(groups: Int[Array | np.ndarray, "b"]) -> Bool[Array, "b b"]:
  """Which rows are each other's negatives: those of different groups; a row is its own positive in any case."""
  groups = jnp.asarray(groups)
  return (groups[:, None] != groups) | jnp.eye(groups.shape[0], dtype=bool)


def info_nce(
  a: Float[Array | np.ndarray, "b d"],
  b: Float[Array | np.ndarray, "_b _d"],
  *,
  temperature: float | jax.Array,
  logit_scale_a: float | jax.Array = 1.0,
  logit_scale_b: float | jax.Array = 1.0,
  mask: Bool[Array | np.ndarray, "b"] | None = None,
  chunk: int = 0,
  axes: tuple[str, ...] = (),
  scale_inside_cosine: bool = False,
  groups: Int[Array | np.ndarray, "b"] | None = None,
) -> Float[Array, ""]:
  """InfoNCE over cosines: cross-entropy of the diagonal in both directions, summed, mean over the batch.

  Args:
    a: embeddings; row i belongs to row i of `b`. Any float type; computed in float32.
    b: embeddings of the other modality.
    temperature: divides the cosines.
    logit_scale_a: multiplies the cosine.
    logit_scale_b: likewise.
    mask: True for rows that count; others are neither positives nor negatives.
    chunk: rows and columns of the tile of logits held at once in both passes; 0 for the whole matrix.
    axes: axes of the current mesh (`jax.set_mesh`) over which the rows are split. The other rows then come by in a
      ring of neighbouring devices, `chunk` at a time (0: a device's rows at once), and none holds the whole batch.
      Without, the compiler decides what is gathered.
    scale_inside_cosine: the release's order, in which the cosine cancels the scales and they get no gradient.
    groups: rows of one number are not each other's negatives (several items of one caption in a batch).

  Raises:
    ValueError: if shapes differ or `chunk` is negative.
  """
  if a.shape != b.shape or chunk < 0:
    raise ValueError(f"a and b must have one shape and chunk be >= 0, got {a.shape}, {b.shape} and {chunk}")
  scale = 1.0 if scale_inside_cosine else jnp.asarray(logit_scale_a, jnp.float32) * logit_scale_b
  scale = jnp.asarray(scale / temperature, jnp.float32)
  valid = jnp.ones(a.shape[0], jnp.bool_) if mask is None else jnp.asarray(mask, jnp.bool_)
  count = jnp.maximum(jnp.sum(valid), 1)
  a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
  if axes or 0 < chunk < a.shape[0]:
    no_marks = jnp.zeros((a.shape[0], 0), jnp.int32)
    marks = no_marks if groups is None else jnp.stack([jnp.asarray(groups, jnp.int32), jnp.arange(a.shape[0])], axis=1)
    return chunked_sum(a, b, scale, valid, marks, chunk or a.shape[0], axes) / count
  # Masked rows may hold anything; zeros keep their gradient finite.
  a, b = (unit(jnp.where(valid[:, None], x, 0.0)) for x in (a, b))
  logits = scale * jnp.dot(a, b.T, precision=jax.lax.Precision.HIGHEST)
  counts = valid[:, None] & valid
  if groups is not None:
    counts &= distinct(groups)
  logits = jnp.where(counts, logits, _NEGATIVE)
  positive = scale * jnp.sum(a * b, axis=1)
  terms = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0) - 2 * positive
  return jnp.sum(jnp.where(valid, terms, 0.0)) / count

"""Contrastive alignment of two sets of embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from codebind_jax.losses.chunked import chunked_sum
from codebind_jax.losses.masks import MASKED_LOGIT, distinct, masked_mean
from codebind_jax.norm import unit


def diagonal_cross_entropy(
  logits: Float[Array, "*lead b _b"],
  mask: Bool[Array | np.ndarray, "b"] | None,
  groups: Int[Array | np.ndarray, "b"] | None = None,
) -> Float[Array, "*lead b"]:
  """InfoNCE of each row, whose positive is the diagonal; `mask` and `groups` leave out columns (`masks.distinct`)."""
  positive = jnp.diagonal(logits, axis1=-2, axis2=-1)
  if groups is not None:
    logits = jnp.where(distinct(groups), logits, MASKED_LOGIT)
  if mask is not None:
    logits = jnp.where(jnp.asarray(mask, jnp.bool_), logits, MASKED_LOGIT)
  return jax.nn.logsumexp(logits, axis=-1) - positive


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
    logit_scale_b: as `logit_scale_a`.
    mask: True for rows that count; others are neither positives nor negatives.
    chunk: rows and columns of the tile of logits held at once in both passes; 0 for the whole matrix.
    axes: axes of the current mesh (`jax.set_mesh`) over which the rows are split. Rows then travel around the ring of
      devices, `chunk` at a time (0: all of a device), and none holds the whole batch. () leaves gathering to the
      compiler.
    scale_inside_cosine: the release's order, in which the cosine cancels the scales and they get no gradient.
    groups: rows of one group are not each other's negatives (several items of one caption in a batch).

  Raises:
    ValueError: if shapes differ or `chunk` is negative.
  """
  if a.shape != b.shape or chunk < 0:
    raise ValueError(f"a and b must have one shape and chunk be >= 0, got {a.shape}, {b.shape} and {chunk}")
  scale = 1.0 if scale_inside_cosine else jnp.asarray(logit_scale_a, jnp.float32) * logit_scale_b
  scale = jnp.asarray(scale / temperature, jnp.float32)
  valid = jnp.ones(a.shape[0], jnp.bool_) if mask is None else jnp.asarray(mask, jnp.bool_)
  a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
  if axes or 0 < chunk < a.shape[0]:
    no_marks = jnp.zeros((a.shape[0], 0), jnp.int32)
    marks = no_marks if groups is None else jnp.stack([jnp.asarray(groups, jnp.int32), jnp.arange(a.shape[0])], axis=1)
    return chunked_sum(a, b, scale, valid, marks, chunk or a.shape[0], axes) / jnp.maximum(jnp.sum(valid), 1)
  # Masked rows may hold anything; zeros keep their gradient finite.
  a, b = (unit(jnp.where(valid[:, None], x, 0.0)) for x in (a, b))
  logits = scale * jnp.dot(a, b.T, precision=jax.lax.Precision.HIGHEST)
  counts = valid[:, None] & valid
  if groups is not None:
    counts &= distinct(groups)
  logits = jnp.where(counts, logits, MASKED_LOGIT)
  positive = scale * jnp.sum(a * b, axis=1)
  terms = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0) - 2 * positive
  return masked_mean(terms, valid)

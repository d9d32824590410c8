"""Contrastive alignment of two sets of embeddings."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from codebind_jax.norm import unit

_NEGATIVE = -1e30
_STRIPES = 64


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
    chunk: rows of the [b, b] logits held at once in both passes; 0 for all.
    scale_inside_cosine: the release's order, in which the cosine cancels the scales and they get no gradient.
    groups: rows of one number are not each other's negatives (several items of one caption in a batch); not chunked.

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
  if groups is not None and chunk:
    raise ValueError(f"groups need whole logits, got chunk {chunk}; allowed: 0")
  if chunk and chunk < a.shape[0]:
    total = _chunked(a, b, scale, valid, chunk)
  else:
    logits = _logits(a, b, scale, valid, valid)
    if groups is not None:
      same = jnp.asarray(groups)[:, None] == jnp.asarray(groups)
      logits = jnp.where(same & ~jnp.eye(a.shape[0], dtype=bool), _NEGATIVE, logits)
    positive = scale * jnp.sum(a * b, axis=1)
    terms = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0) - 2 * positive
    total = jnp.sum(jnp.where(valid, terms, 0.0))
  return total / jnp.maximum(jnp.sum(valid), 1)


def _logits(a, b, scale, rows, columns):
  """[..., i, j] logits, very negative where a row or column does not count."""
  logits = scale * jnp.einsum("...id,jd->...ij", a, b, precision=jax.lax.Precision.HIGHEST)
  return jnp.where(rows[..., None] & columns, logits, _NEGATIVE)


# The chunked sum holds `chunk` rows of the logits in either pass and keeps the row and column normalisers in between.
# A block takes a stripe from each of several equal parts of the batch, so that a batch sharded over devices is worked
# on in place; the last block overlaps the one before it, with the rows already done masked.


def _blocks(a, valid, chunk):
  """The batch in stripes, and a function from the number of a block to (start, its rows, which of them count)."""
  stripes = math.gcd(a.shape[0], 2 ** int(math.log2(min(chunk, _STRIPES))))
  length = a.shape[0] // stripes
  rows = min(length, chunk // stripes)
  a, valid = a.reshape(stripes, length, -1), valid.reshape(stripes, length)

  def block(i):
    start = jnp.minimum(i * rows, length - rows)
    new = start + jnp.arange(rows) >= i * rows
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows, axis=1)
    return start, cut(a), cut(valid) & new

  return block, -(-length // rows), (stripes, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(a, b, scale, valid, chunk):
  return _chunked_forward(a, b, scale, valid, chunk)[0]


def _chunked_forward(a, b, scale, valid, chunk):
  block, count, shape = _blocks(a, valid, chunk)

  def step(carry, i):
    rows_lse, highest, total = carry
    start, part, counts = block(i)
    logits = _logits(part, b, scale, counts, valid)
    old = jax.lax.dynamic_slice_in_dim(rows_lse, start, part.shape[1], axis=1)
    new = jnp.where(counts, jax.nn.logsumexp(logits, axis=-1), old)
    rows_lse = jax.lax.dynamic_update_slice_in_dim(rows_lse, new, start, axis=1)
    higher = jnp.maximum(highest, jnp.max(logits, axis=(0, 1)))
    exponents = jnp.where(counts[..., None], jnp.exp(logits - higher), 0.0)
    total = total * jnp.exp(highest - higher) + jnp.sum(exponents, axis=(0, 1))
    return (rows_lse, higher, total), None

  size = a.shape[0]
  start = (jnp.zeros(shape), jnp.full(size, _NEGATIVE), jnp.zeros(size))
  (rows_lse, highest, total), _ = jax.lax.scan(step, start, jnp.arange(count))
  rows_lse = rows_lse.reshape(size)
  columns_lse = highest + jnp.log(jnp.where(valid, total, 1.0))
  terms = rows_lse + columns_lse - 2 * scale * jnp.sum(a * b, axis=1)
  return jnp.sum(jnp.where(valid, terms, 0.0)), (a, b, scale, valid, rows_lse, columns_lse)


def _chunked_backward(chunk, residuals, cotangent):
  a, b, scale, valid, rows_lse, columns_lse = residuals
  block, count, shape = _blocks(a, valid, chunk)
  rows_lse = rows_lse.reshape(shape)

  def step(carry, i):
    grad_a, grad_b, grad_scale = carry
    start, part, counts = block(i)
    logits = _logits(part, b, scale, counts, valid)
    lse = jax.lax.dynamic_slice_in_dim(rows_lse, start, part.shape[1], axis=1)
    pairs = counts[..., None] & valid
    weights = jnp.where(pairs, jnp.exp(logits - lse[..., None]) + jnp.exp(logits - columns_lse), 0.0)
    old = jax.lax.dynamic_slice_in_dim(grad_a, start, part.shape[1], axis=1)
    new = scale * jnp.einsum("pij,jd->pid", weights, b, precision=jax.lax.Precision.HIGHEST)
    grad_a = jax.lax.dynamic_update_slice_in_dim(grad_a, jnp.where(counts[..., None], new, old), start, axis=1)
    grad_b = grad_b + scale * jnp.einsum("pij,pid->jd", weights, part, precision=jax.lax.Precision.HIGHEST)
    grad_scale = grad_scale + jnp.sum(jnp.where(pairs, weights * logits, 0.0)) / scale
    return (grad_a, grad_b, grad_scale), None

  start = (jnp.zeros((*shape, a.shape[1])), jnp.zeros_like(b), jnp.zeros(()))
  (grad_a, grad_b, grad_scale), _ = jax.lax.scan(step, start, jnp.arange(count))
  positive = jnp.where(valid, 2.0, 0.0)[:, None]
  grad_a = cotangent * (grad_a.reshape(a.shape) - scale * positive * b)
  grad_b = cotangent * (grad_b - scale * positive * a)
  grad_scale = cotangent * (grad_scale - jnp.sum(positive * a * b))
  return grad_a, grad_b, grad_scale, np.zeros(valid.shape, jax.dtypes.float0)


_chunked.defvjp(_chunked_forward, _chunked_backward)

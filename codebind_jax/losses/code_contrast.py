"""Contrast of near against far codes, without a sort, over given similarities or over all segments of a batch."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from codebind_jax.codebook.nearest import Distance
from codebind_jax.codebook.segments import similarity as similarities
from codebind_jax.losses.masks import masked_mean

# Steps of the bisection of a row's range. The rest is far below what a mean over the selected entries resolves.
_EXACT, _FAST = 26, 16
_STRIPES = 64
_CPU_BLOCK = 256  # segments of a block on CPU
_SCORES = 2**24  # similarities of a block elsewhere (64 MB)


class Bound(NamedTuple):
  """Selects a number of largest entries: all above `high`, and of those from `low` to `high` each by `share`."""

  low: jax.Array
  high: jax.Array
  share: jax.Array


def code_contrast(
  similarity: Float[Array | np.ndarray, "n k"],
  *,
  double_softmax: bool = False,
  mask: Bool[Array | np.ndarray, "n"] | None = None,
) -> Float[Array, ""]:
  """Contrast of the nearest codes of a segment against the farthest (CVQ-VAE's contrastive loss).

  The positive is the mean of a row's int(k / 10) largest similarities (at least one), the negatives are its k // 2
  smallest; the loss is the cross-entropy of [positive, negatives] with target 0. The two thresholds are found by
  bisection, without a sort.

  Args:
    similarity: of segments and codes.
    double_softmax: the release's form: a softmax (of square roots if no similarity is negative) before the
      cross-entropy's own, and the whole row as positive where k < 10.
    mask: True for rows that count.
  """
  x = jnp.asarray(similarity, jnp.float32)
  bounds = extreme_bounds(jax.lax.stop_gradient(x), *_selected_numbers(x.shape[1], double_softmax))
  terms = _terms(x, *bounds, double_softmax)
  return masked_mean(terms, mask)


def code_contrast_segments(
  z: Float[Array, "s d n"],
  codes: Float[Array, "k d"],
  *,
  distance: Distance = "cosine",
  double_softmax: bool = False,
  weights: Float[Array, "n"] | None = None,
  block: int = 0,
) -> Float[Array, ""]:
  """`code_contrast` of all segments against all codes, whose similarities are never held at once.

  The backward pass computes the similarities again and takes the thresholds of the forward pass. Whether the
  release's square roots apply (no similarity negative anywhere) is decided by block.

  Args:
    z: segments as quantised, with tokens on the last axis.
    codes: the codebook; gets a gradient.
    distance: "cosine" or "l2".
    double_softmax: as in `code_contrast`.
    weights: of the tokens; 0 masks.
    block: segments of a block; 0 chooses for the backend.
  """
  terms = _all_terms(z, codes, distance, double_softmax, block)
  if weights is None:
    return jnp.mean(terms)
  total = jnp.sum(jnp.where(weights > 0, terms * weights, 0.0))
  return total / jnp.maximum(z.shape[0] * jnp.sum(weights), 1.0)


def extreme_bounds(x: Float[Array, "n k"], above: int, below: int, steps: int = _EXACT) -> tuple[Bound, Bound]:
  """The bounds that select the `above` largest entries of each row of x, and the `below` largest of each row of -x.

  Bisection for the value of the last selected entry; entries that are equal to it, or closer than the bisection
  resolves, share the remaining places. Both bounds are found at once, because reading the rows is the cost.
  """
  k = x.shape[1]
  least, most = jnp.min(x, axis=1, keepdims=True), jnp.max(x, axis=1, keepdims=True)

  def count(over, under):
    over, under = over.astype(jnp.int32), under.astype(jnp.int32)
    if k < 2**15:  # both counts fit in one number
      both = jnp.sum(over + (under << 16), axis=1, keepdims=True)
      return both & 0xFFFF, both >> 16
    return jnp.sum(over, axis=1, keepdims=True), jnp.sum(under, axis=1, keepdims=True)

  def halve(_, bounds):
    low, high, first, last = bounds
    middle, centre = low + 0.5 * (high - low), first + 0.5 * (last - first)
    over, under = count(x > middle, x < centre)
    top, bottom = over >= above, under >= below
    return (jnp.where(top, middle, low), jnp.where(top, high, middle),
            jnp.where(bottom, first, centre), jnp.where(bottom, centre, last))  # fmt: skip

  # Fewer than `above` entries exceed `high` and at least as many are >= `low`; likewise under `first` and <= `last`.
  low, high, first, last = jax.lax.fori_loop(0, steps, halve, (least, most, least, most))
  sure, sure_below = count(x > high, x < first)
  some, some_below = count(x >= low, x <= last)
  share = (above - sure) / jnp.maximum(some - sure, 1)
  share_below = (below - sure_below) / jnp.maximum(some_below - sure_below, 1)
  return Bound(low, high, share), Bound(-last, -first, share_below)


def selected(x: Float[Array, "..."], bound: Bound) -> Float[Array, "..."]:
  """Weights in [0, 1] of the selected entries; they add up to the number asked for."""
  return jnp.where(x > bound.high, 1.0, jnp.where(x >= bound.low, bound.share, 0.0))


def _selected_numbers(k, double_softmax):
  above = k // 10
  return above or (k if double_softmax else 1), k // 2


def _terms(x, top_bound, low_bound, double_softmax):
  """Cross-entropy of each row, given the bounds of the selection. x [n, k] -> [n]."""
  above, _ = _selected_numbers(x.shape[1], double_softmax)
  constant = jax.lax.stop_gradient(x)
  top, low = selected(constant, top_bound), selected(-constant, low_bound)
  positive = jnp.sum(top * x, axis=1, keepdims=True) / above
  if double_softmax:
    negative = jnp.any(jnp.where(low > 0, x, positive) < 0)
    positive, x = jnp.where(negative, positive, safe_sqrt(positive)), jnp.where(negative, x, safe_sqrt(x))
  largest = jnp.max(jnp.where(low > 0, x, -jnp.inf), axis=1, keepdims=True)
  shift = jax.lax.stop_gradient(jnp.maximum(positive, largest))
  exp_positive, exp_negative = jnp.exp(positive - shift), low * jnp.exp(jnp.where(low > 0, x - shift, 0.0))
  total = exp_positive + jnp.sum(exp_negative, axis=1, keepdims=True)
  if double_softmax:
    positive = exp_positive / total
    # A negative that a tie takes in part counts as that part of a class.
    negative = jnp.where(low > 0, exp_negative / (total * jnp.where(low > 0, low, 1.0)), 0.0)
    every = jnp.exp(positive) + jnp.sum(low * jnp.exp(negative), axis=1, keepdims=True)
    return (jnp.log(every) - positive)[:, 0]
  return (jnp.log(total) - (positive - shift))[:, 0]


def safe_sqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """Square root of positive numbers, 0 for others, with a finite gradient."""
  return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


# All segments, in blocks of tokens. A block takes a stripe from each of several equal parts of the batch, so that a
# batch sharded over devices stays in place; the last block overlaps the one before it.


def _blocks(z, block):
  s, d, n = z.shape
  stripes = math.gcd(n, _STRIPES)
  length = n // stripes
  size = max(1, min(length, block // (s * stripes)))
  starts = jnp.minimum(jnp.arange(-(-length // size)) * size, length - size)
  return z.reshape(s, d, stripes, length), starts, size


def _cut(x, start, size):
  return jax.lax.dynamic_slice_in_dim(x, start, size, axis=x.ndim - 1)


def _block_similarity(z, codes, distance):
  """[s, d, stripes, size] -> [s * stripes * size, k]."""
  s, d = z.shape[:2]
  x = similarities(z.reshape(s, d, -1), codes, distance=distance, codes_last=True)
  return x.reshape(-1, x.shape[-1])


def _for_backend(run, block, codes, *arguments):
  """Calls run(*arguments, block=...) with the block that suits the backend, unless one is given."""
  if block:
    return run(*arguments, block=block)
  segments = max(1, _SCORES // codes.shape[0])
  cpu, default = functools.partial(run, block=_CPU_BLOCK), functools.partial(run, block=segments)
  return jax.lax.platform_dependent(*arguments, cpu=cpu, default=default)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _all_terms(z, codes, distance, double_softmax, block):
  return _all_terms_forward(z, codes, distance, double_softmax, block)[0]


def _all_terms_forward(z, codes, distance, double_softmax, block):
  def run(z, codes, block):
    parts, starts, size = _blocks(z, block)
    s, _, stripes, length = parts.shape

    def step(stored, start):
      x = _block_similarity(_cut(parts, start, size), codes, distance)
      bounds = extreme_bounds(x, *_selected_numbers(x.shape[1], double_softmax), steps=_FAST)
      terms = _terms(x, *bounds, double_softmax)
      flat = [terms, *(b[:, 0] for bound in bounds for b in bound)]
      values = jnp.stack(flat).reshape(7, s, stripes, size)
      return jax.lax.dynamic_update_slice_in_dim(stored, values, start, axis=3), None

    return jax.lax.scan(step, jnp.zeros((7, s, stripes, length)), starts)[0].reshape(7, s, -1)

  stored = _for_backend(run, block, codes, z, codes)
  return stored[0], (z, codes, stored[1:])


def _all_terms_backward(distance, double_softmax, block, residuals, cotangent):
  def run(z, codes, stored, cotangent, block):
    parts, starts, size = _blocks(z, block)
    s, _, stripes, length = parts.shape
    stored, cotangent = stored.reshape(6, s, stripes, length), cotangent.reshape(s, stripes, length)
    first_new = jnp.concatenate([jnp.zeros(1, starts.dtype), starts[:-1] + size])

    def step(carry, block):
      grad_z, grad_codes = carry
      start, first_new = block
      bounds = _cut(stored, start, size).reshape(6, -1, 1)
      bounds = Bound(*bounds[:3]), Bound(*bounds[3:])
      # Entries that the block before has done get no second cotangent.
      new = start + jnp.arange(size) >= first_new
      block_cotangent = jnp.where(new, _cut(cotangent, start, size), 0.0).reshape(-1)
      terms = lambda z, codes: _terms(_block_similarity(z, codes, distance), *bounds, double_softmax)
      block_z, block_codes = jax.vjp(terms, _cut(parts, start, size), codes)[1](block_cotangent)
      merged = jnp.where(new, block_z, _cut(grad_z, start, size))
      return (jax.lax.dynamic_update_slice_in_dim(grad_z, merged, start, axis=3), grad_codes + block_codes), None

    zero = jnp.zeros_like(parts), jnp.zeros_like(codes)
    (grad_z, grad_codes), _ = jax.lax.scan(step, zero, (starts, first_new))
    return grad_z.reshape(z.shape), grad_codes

  return _for_backend(run, block, residuals[1], *residuals, cotangent)


_all_terms.defvjp(_all_terms_forward, _all_terms_backward)

"""Losses that keep shared and specific parts apart and the specific part informative."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from codebind_jax.losses.codes import uniformity
from codebind_jax.losses.masks import masked_mean
from codebind_jax.norm import unit


def decomposition(
  shared: Float[Array | np.ndarray, "b t d"],
  specific: Float[Array | np.ndarray, "_b _t _d"],
  *,
  segment: int = 0,
  mask: Bool[Array | np.ndarray, "..."] | None = None,
) -> Float[Array, ""]:
  """Frobenius norm of (shared tokens)(specific tokens)^T, mean over the batch: 0 if the parts are orthogonal.

  Args:
    shared: shared parts of the tokens, as `quantize_modalities` returns them.
    specific: specific parts, of the same width unless `segment` is set.
    segment: for parts of different widths: a token pair then counts with the root mean square of the cosines between
      the segments of this width of the two tokens. (With the whole width and unit tokens, that is the plain form.)
    mask: [b] or [b, t], True for rows or tokens that count.

  Raises:
    ValueError: if the shapes differ (widths may, with `segment`), or a width is no multiple of `segment`.
  """
  if shared.shape[:2] != specific.shape[:2] or not segment and shared.shape != specific.shape:
    raise ValueError(f"shared and specific must have one shape, got {shared.shape} and {specific.shape}; "
                     "`segment` allows widths that differ")  # fmt: skip
  if segment and (shared.shape[2] % segment or specific.shape[2] % segment):
    raise ValueError(f"widths {shared.shape[2]} and {specific.shape[2]} must be multiples of the segment {segment}")
  shared, specific = jnp.asarray(shared, jnp.float32), jnp.asarray(specific, jnp.float32)
  rows = None
  if mask is not None:
    mask = jnp.asarray(mask, jnp.bool_)
    rows = mask if mask.ndim == 1 else jnp.any(mask, axis=1)
    tokens = mask[:, None, None] if mask.ndim == 1 else mask[:, :, None]
    shared, specific = jnp.where(tokens, shared, 0.0), jnp.where(tokens, specific, 0.0)
  if segment:
    # Segments become tokens; the square root of their number makes the sum of squares a mean.
    shared, specific = (
      unit(x.reshape(x.shape[0], -1, segment)) / (x.shape[2] // segment) ** 0.5 for x in (shared, specific)
    )
  product = jnp.einsum("btd,bud->btu", shared, specific, precision=jax.lax.Precision.HIGHEST)
  # Divided by the largest entry, so that the squares of huge features do not overflow.
  largest = jax.lax.stop_gradient(jnp.max(jnp.abs(product), axis=(1, 2)))
  zero = largest == 0
  relative = product / jnp.where(zero, 1.0, largest)[:, None, None]
  square = jnp.sum(relative * relative, axis=(1, 2))
  norm = jnp.where(zero, 0.0, largest * jnp.sqrt(jnp.where(zero, 1.0, square)))
  return masked_mean(norm, rows)


def decorrelation(
  shared: Float[Array | np.ndarray, "b d"], specific: Float[Array | np.ndarray, "b p"], *,
  mask: Bool[Array | np.ndarray, "b"] | None = None,
) -> Float[Array, ""]:
  """Sum of the squared correlations over the batch of every shared with every specific feature, over sqrt(d p).

  `decomposition` asks that the two vectors of one item are orthogonal, which two different maps of the same factor can
  be. This loss removes linear dependence: at 0, no linear probe finds in one part a factor that is a linear function of
  the other. Independent features give about sqrt(d p) / b by chance; the loss helps where that is well under 1. Not in
  the paper.

  Args:
    shared: shared parts of the class tokens.
    specific: specific parts.
    mask: True for rows that count; 0 for fewer than two.
  """
  weight = jnp.ones(shared.shape[0], jnp.float32) if mask is None else jnp.asarray(mask, jnp.float32)
  count = jnp.maximum(weight.sum(), 1.0)

  def standard(x):
    x = jnp.where(weight[:, None] > 0, jnp.asarray(x, jnp.float32), 0.0)
    x = (x - x.sum(0) / count) * weight[:, None]
    # Features that do not vary have no correlation: the small number only keeps their division finite.
    return x / jnp.sqrt(jnp.sum(x * x, axis=0) + 1e-6 * jnp.sum(x * x) / x.shape[1] + 1e-12)

  correlation = jnp.matmul(standard(shared).T, standard(specific), precision=jax.lax.Precision.HIGHEST)
  return jnp.sum(jnp.square(correlation)) / (shared.shape[1] * specific.shape[1]) ** 0.5


def specific_uniform(
  s: Float[Array | np.ndarray, "b d"], *, mask: Bool[Array | np.ndarray, "b"] | None = None
) -> Float[Array, ""]:
  """Log of the mean over batch pairs of exp(-|s_i - s_j|^2) (Wang and Isola, 2020); 0 for fewer than two rows.

  Args:
    s: specific parts of the class tokens, L2-normalised.
    mask: True for rows that count.
  """
  return uniformity(jnp.asarray(s, jnp.float32), mask)

"""CLUB: an upper bound of mutual information, to be minimised (Cheng et al., arXiv 2006.12013; DCID eq. 4-5)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from codebind_jax.losses.masks import masked_mean
from codebind_jax.norm import wide


def club_estimate(
  mu: Float[Array | np.ndarray, "b *t d"],
  logvar: Float[Array | np.ndarray, "b *t d"],
  y: Float[Array | np.ndarray, "b *t d"],
  permutation: Int[Array | np.ndarray, "b"] | None,
  *,
  per_step: bool = False,
  release_axis: bool = False,
  mask: Bool[Array | np.ndarray, "b"] | None = None,
) -> Float[Array, ""]:
  """Mean log-likelihood of pairs less that of shuffled pairs, in nats; q(y|x) is a diagonal Gaussian.

  (1/2) mean_b sum_d [ -mean_t (mu - y)^2 / exp(mean_t logvar) + the same with y of row permutation[b] ]: the time means
  stand where the release of DCID has them. The log-variance alone cancels.

  Args:
    mu: mean of q(y|x), [b, d] or, for sequences, [b, t, d].
    logvar: its log-variance.
    y: the sample that belongs to x.
    permutation: the row whose y is the negative of each row; None averages over all rows (the double sum of eq. 5).
    per_step: the mean over time of the log-likelihood of every step, as eq. 5 prints it.
    release_axis: the form of FCID's release for [b, d]: mean over d, sum over b.
    mask: True for rows that count.

  Raises:
    ValueError: for `release_axis` with sequences or without a permutation.
  """
  mu, logvar, y = wide(mu), wide(logvar), wide(y)
  if release_axis:
    if mu.ndim != 2 or permutation is None:
      raise ValueError(f"release_axis is defined for [b, d] and a permutation only, got {mu.shape} and {permutation}")
    variance = jnp.exp(jnp.mean(logvar, axis=1))
    likelihood = lambda target: -jnp.mean((mu - target) ** 2, axis=1) / variance
    return 0.5 * jnp.sum(likelihood(y) - likelihood(y[permutation]))
  if mu.ndim == 2:
    mu, logvar, y = mu[:, None], logvar[:, None], y[:, None]

  def likelihood(m, v, target):
    square = (m - target) ** 2
    ratio = jnp.mean(square * jnp.exp(-v), axis=-2) if per_step else jnp.mean(square, -2) * jnp.exp(-jnp.mean(v, -2))
    return -0.5 * jnp.sum(ratio, axis=-1)

  positive = likelihood(mu, logvar, y)
  rows = jnp.ones(mu.shape[0], jnp.bool_) if mask is None else jnp.asarray(mask, jnp.bool_)
  if permutation is None:
    # Expanding (m - y_j)^2 over j would lose digits; one row at a time keeps the memory at [b, t, d].
    negative = jax.lax.map(lambda row: masked_mean(likelihood(row[0][None], row[1][None], y), rows), (mu, logvar))
    return masked_mean(positive - negative, rows)
  negative = likelihood(mu, logvar, y[permutation])
  return masked_mean(positive - negative, rows & rows[permutation])


def club_likelihood(
  mu: Float[Array | np.ndarray, "b *t d"],
  logvar: Float[Array | np.ndarray, "b *t d"],
  y: Float[Array | np.ndarray, "b *t d"],
  *,
  mask: Bool[Array | np.ndarray, "b"] | None = None,
) -> Float[Array, ""]:
  """(1/2) sum_d [ -(mu - y)^2 / exp(logvar) - logvar ], mean over rows and steps: the objective of q's training.

  Args:
    mu: mean of q(y|x).
    logvar: its log-variance.
    y: the sample that belongs to x; pass both without gradient.
    mask: True for rows that count.
  """
  mu, logvar, y = wide(mu), wide(logvar), wide(y)
  terms = -0.5 * jnp.sum((mu - y) ** 2 * jnp.exp(-logvar) + logvar, axis=-1)
  terms = terms.reshape(terms.shape[0], -1).mean(axis=1)
  return masked_mean(terms, mask)

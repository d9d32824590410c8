"""k-means on segments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from codebind_jax.codebook.nearest import Distance, check_distance, nearest_segments
from codebind_jax.codebook.segments import Segments, statistics
from codebind_jax.norm import unit


@functools.partial(jax.jit, static_argnames=("num_codes", "iterations", "distance", "normalize"))
def kmeans(
  rng: jax.Array,
  z: Float[Array | np.ndarray, "n d"],
  num_codes: int,
  *,
  iterations: int = 10,
  distance: Distance = "cosine",
  init: Float[Array | np.ndarray, "_k _d"] | None = None,
  normalize: bool | None = None,
  weights: Float[Array | np.ndarray, "n"] | None = None,
) -> tuple[Float[Array, "k d"], Float[Array, "k"]]:
  """Lloyd's algorithm; empty clusters keep their mean.

  Args:
    rng: key of the first means, drawn far from each other as in k-means++ (Arthur and Vassilvitskii, 2007).
    z: vectors.
    num_codes: k.
    iterations: rounds of assignment and mean.
    distance: "cosine" or "l2".
    init: first means, instead of drawn ones.
    normalize: L2-normalise the means after each round. None normalises if all vectors are unit vectors.
    weights: how often each row counts; 0 masks padding.

  Returns:
    The means, and the counts of the last assignment (made with the means before the last round's).

  Raises:
    ValueError: if a size is not positive, `init` has another shape or `distance` is unknown.
  """
  check_distance(distance)
  if num_codes < 1 or iterations < 1 or z.shape[0] < 1:
    raise ValueError(f"num_codes, iterations and rows of z must be positive, got {num_codes}, {iterations}, {z.shape}")
  if init is not None and init.shape != (num_codes, z.shape[1]):
    raise ValueError(f"init must be {(num_codes, z.shape[1])}, got {init.shape}")
  lanes = jnp.asarray(z, jnp.float32).T[None]
  weights = None if weights is None else jnp.asarray(weights, jnp.float32)
  if normalize is None:
    error = jnp.abs(jnp.sum(lanes * lanes, axis=1) - 1.0)
    on_sphere = jnp.max(error if weights is None else jnp.where(weights > 0, error, 0.0)) < 1e-3
  else:
    on_sphere = jnp.asarray(normalize)
  shift = jnp.where(on_sphere, 0.0, _far_mean(lanes, weights)) if distance == "l2" else jnp.zeros(z.shape[1])
  lanes = lanes - shift[:, None]
  if init is None:
    means = _distant_rows(rng, unit(lanes, axis=1) if distance == "cosine" else lanes, weights, num_codes)
  else:
    means = jnp.asarray(init, jnp.float32) - shift

  def iterate(_, carry):
    means, _ = carry
    indices = nearest_segments(lanes, means, distance=distance)
    counts, sums = statistics([Segments(lanes, indices, weights)], num_codes)
    new = sums / jnp.maximum(counts, 1e-30)[:, None]
    new = jnp.where(on_sphere, unit(new), new)
    return jnp.where((counts > 0)[:, None], new, means), counts

  means, counts = jax.lax.fori_loop(0, iterations, iterate, (means, jnp.zeros(num_codes, jnp.float32)))
  return means + shift, counts


def _far_mean(lanes, weights):
  """The mean [d] of rows far from the origin, where squared distances would be lost to float32; else 0."""
  weights = jnp.ones(lanes.shape[2]) if weights is None else weights
  total = jnp.maximum(jnp.sum(weights), 1e-30)
  z = jnp.where(weights > 0, lanes[0], 0.0)
  mean = jnp.sum(z * weights, axis=1) / total
  spread = jnp.sum(jnp.where(weights > 0, (z - mean[:, None]) ** 2, 0.0) * weights) / total
  return jnp.where(jnp.sum(mean * mean) > 100.0 * spread, mean, 0.0)


def _distant_rows(rng, z, weights, k):
  """k rows of z [1, d, n], each drawn with probability proportional to its squared distance to those before it."""
  z = z[0]
  weights = jnp.ones(z.shape[1]) if weights is None else weights

  def draw(i, carry):
    rows, nearest = carry
    mass = jnp.where(weights > 0, nearest * weights, 0.0)
    # If every remaining row equals a chosen one, any row will do.
    cumulative = jnp.cumsum(jnp.where(jnp.sum(mass) > 0, mass, weights))
    position = (1.0 - jax.random.uniform(jax.random.fold_in(rng, i))) * cumulative[-1]
    row = z[:, jnp.searchsorted(cumulative, position, side="left")]
    distance = jnp.sum((z - row[:, None]) ** 2, axis=0)
    return rows.at[i].set(row), jnp.minimum(nearest, distance)

  rows, _ = jax.lax.fori_loop(0, k, draw, (jnp.zeros((k, z.shape[0])), jnp.full(z.shape[1], 1e30)))
  return rows

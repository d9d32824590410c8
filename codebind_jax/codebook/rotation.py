"""Orthogonal matrices as products of reflections, and the start of one by optimised product quantisation (OPQ).

Any orthogonal matrix is a product of reflections but for the signs of its columns, and a product of reflections is
orthogonal whatever their vectors are: a gradient step on the vectors leaves it so.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from codebind_jax.codebook.clustering import kmeans
from codebind_jax.codebook.nearest import Distance, nearest_segments
from codebind_jax.codebook.segments import Segments, look_up, statistics
from codebind_jax.norm import unit

_HIGH = jax.lax.Precision.HIGHEST


def orthogonal(vectors: Float[Array | np.ndarray, "w _w"]) -> Float[Array, "w _w"]:
  """The orthogonal matrix -H_1 H_2 ... H_w of the reflections H_i = I - 2 v_i v_i' / |v_i|^2; the identity's gives I.

  By the compact form I - V T^-1 V', T the upper triangle of V'V with half its diagonal (Joffrain et al., "Accumulating
  Householder transformations, revisited", 2006).

  Args:
    vectors: v_i in column i, none of them zero; their lengths do not matter.
  """
  v = jnp.asarray(vectors, jnp.float32)
  v = v / jnp.linalg.norm(v, axis=0)
  triangle = jnp.triu(jnp.dot(v.T, v, precision=_HIGH), 1) + 0.5 * jnp.eye(len(v))
  inner = jax.scipy.linalg.solve_triangular(triangle, v.T)
  return jnp.dot(v, inner, precision=_HIGH) - jnp.eye(len(v))


def reflections(matrix: Float[np.ndarray | Array, "w _w"]) -> Float[Array, "w _w"]:
  """Vectors whose `orthogonal` is an orthogonal matrix but for the signs of its rows, by Householder's elimination.

  A row's sign turns a coordinate of what the matrix gives around, which no quantiser heeds.

  Args:
    matrix: orthogonal.
  """
  size = len(matrix)

  def eliminate(i, carry):
    rest, vectors = carry
    v = jnp.where(jnp.arange(size) >= i, rest[:, i], 0.0)
    length = jnp.linalg.norm(v)
    v = v.at[i].add(jnp.where(rest[i, i] < 0, -length, length))
    v = v / jnp.linalg.norm(v)
    return rest - 2.0 * jnp.outer(v, jnp.dot(v, rest, precision=_HIGH)), vectors.at[:, i].set(v)

  # The product's transpose is eliminated, so that the signs are those of the matrix's rows.
  start = jnp.asarray(matrix, jnp.float32).T, jnp.zeros((size, size))
  vectors = jax.lax.fori_loop(0, size, eliminate, start)[1]
  return vectors[:, ::-1]  # the transpose's product the other way around


def balanced(rows: Float[Array, "n w"], weights: Float[Array, "n"] | None, width: int) -> Float[Array, "w _w"]:
  """The orthogonal matrix whose segments of `width` rows have equal products of variances (Ge et al., 2013, section
  3.2): principal axes, from the largest variance on, each given to the segment of the smallest product that has room.
  """
  weights = jnp.ones(len(rows)) if weights is None else weights
  rows = jnp.where(weights[:, None] > 0, rows, 0.0)
  covariance = jnp.dot((rows * weights[:, None]).T, rows, precision=_HIGH) / jnp.maximum(jnp.sum(weights), 1e-30)
  values, axes = jnp.linalg.eigh(covariance)
  size, segments = len(values), len(values) // width
  smallest = 1e-12 * jnp.maximum(values[-1], 1e-12)
  logs = jnp.log(jnp.maximum(values[::-1], smallest) / smallest)

  def give(i, carry):
    sums, counts, places = carry
    segment = jnp.argmin(jnp.where(counts < width, sums, jnp.inf))
    place = segment * width + counts[segment]
    return sums.at[segment].add(logs[i]), counts.at[segment].add(1), places.at[place].set(i)

  start = jnp.zeros(segments), jnp.zeros(segments, jnp.int32), jnp.zeros(size, jnp.int32)
  places = jax.lax.fori_loop(0, size, give, start)[2]
  return axes[:, ::-1].T[places]


@functools.partial(jax.jit, static_argnames=("num_codes", "width", "own", "distance", "normalize", "iterations"))
def opq(
  rng: jax.Array,
  rows: Float[Array, "n w"],
  num_codes: int,
  width: int,
  *,
  own: bool = True,
  distance: Distance = "l2",
  normalize: bool = False,
  iterations: int = 30,
  weights: Float[Array, "n"] | None = None,
) -> Float[Array, "w _w"]:
  """The rotation before product quantisation that loses least (Ge et al., "Optimized Product Quantization", 2013).

  From `balanced` on, rounds of one step of k-means in the turned segments and of the rotation that brings the rows
  nearest to their codes, turned back (Procrustes).

  Args:
    rng: key of the first codes.
    rows: vectors.
    num_codes: codes of a codebook.
    width: of a segment.
    own: every position has its own codebook, else one serves all.
    distance: as in `nearest_code`.
    normalize: segments and codes are of unit length.
    iterations: rounds.
    weights: how often each row counts; 0 masks padding.
  """
  weight = jnp.ones(len(rows)) if weights is None else weights
  rows = jnp.where(weight[:, None] > 0, jnp.asarray(rows, jnp.float32), 0.0)
  size = rows.shape[1]
  positions = size // width

  def turned(rotation):
    z = jnp.dot(rotation, rows.T, precision=_HIGH).reshape(positions, width, -1)
    return unit(z, axis=1) if normalize or distance == "cosine" else z

  def start(rotation):
    z = turned(rotation)
    first = lambda key, z: kmeans(
      key, z.T, num_codes, iterations=1, distance=distance, normalize=normalize, weights=weight
    )[0]
    if own:
      return jax.lax.map(lambda of: first(*of), (jax.random.split(rng, positions), z))
    flat = jnp.moveaxis(z, 2, 0).reshape(-1, width)
    return kmeans(
      rng, flat, num_codes, iterations=1, distance=distance, normalize=normalize, weights=jnp.repeat(weight, positions)
    )[0]

  def iterate(_, carry):
    rotation, codes = carry
    z = turned(rotation)
    indices = nearest_segments(z, codes, distance=distance)
    counts, sums = statistics([Segments(z, indices, weight)], num_codes, own)
    means = sums / jnp.maximum(counts, 1e-30)[..., None]
    means = unit(means) if normalize else means
    codes = jnp.where((counts > 0)[..., None], means, codes)
    coded = look_up(codes, indices).reshape(size, -1) * weight
    left, _, right = jnp.linalg.svd(jnp.dot(coded, rows, precision=_HIGH), full_matrices=False)
    return jnp.dot(left, right, precision=_HIGH), codes

  rotation = balanced(rows, weight, width)
  return jax.lax.fori_loop(0, iterations, iterate, (rotation, start(rotation)))[0]

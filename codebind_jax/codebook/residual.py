"""Several codes of one segment, each of which quantises what the ones before it left: their search and their start.

The nearest code of each stage by itself is seldom the best sum. Both are those of residual quantisation by a beam
(Babenko and Lempitsky, CVPR 2014, section 3; Liu et al., "Improved Residual Vector Quantization", 2015, arXiv
1509.05195), as in faiss' `ResidualQuantizer`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jaxtyping import Array, Float, Int

from codebind_jax.codebook.clustering import kmeans

_EXACT = jax.lax.Precision.HIGHEST
_SCORES = 1 << 22  # distances held at once (16 MB)
_STEPS = 6  # numbers of principal axes with which a clustering begins, in a geometric series
_ROWS = 256  # rows a code to which a start is fitted, at most (as in faiss)
_BEAM = 5  # sums of codes that a stage of the start is fitted to, of every row, at most


@functools.partial(jax.jit, static_argnames="beam")
def beam_codes(z: Float[Array, "s d n"], codes: Float[Array, "m *own k d"], *, beam: int) -> Int[Array, "m s n"]:
  """Codes of every stage whose sum is near to each segment: the best of `beam` sums that are kept from stage to stage.

  With a beam of 1 these are each stage's nearest codes. A segment that holds NaN gets codes 0.

  Args:
    z: segments.
    codes: of m stages, for all segments or of each position.
    beam: sums that are kept.
  """
  z, codes = jax.lax.stop_gradient((z.astype(jnp.float32), codes.astype(jnp.float32)))
  return _partitioned(codes.ndim == 4, beam)(z, codes)


@functools.cache
def _partitioned(own, beam):
  search = lambda z, codes: _search(z, codes, beam)

  def partition(mesh, arguments, result):
    return mesh, search, result.sharding, tuple(argument.sharding for argument in arguments)

  # The compiler would gather the batch to order its sums: the rule tells it that every segment is searched by itself.
  partitioned = custom_partitioning(search)
  rule = "s d n, m s k d -> m s n" if own else "s d n, m k d -> m s n"
  partitioned.def_partition(partition, sharding_rule=rule, need_replication_factors=("d", "m", "k"))
  return partitioned


def _search(z, codes, beam):
  """`beam_codes` of float32 arrays, by blocks of rows."""
  codes, x = codes if codes.ndim == 4 else codes[:, None], jnp.moveaxis(z, 2, 0)
  search = functools.partial(_beam, codes=codes, beam=beam)
  n, s, d = x.shape
  if n == 0:
    return jnp.zeros((len(codes), s, 0), jnp.int32)
  rows = max(1, min(n, _SCORES // (s * beam * codes.shape[2])))
  full = n // rows
  cut = lambda i: search(jax.lax.dynamic_slice_in_dim(x, i * rows, rows))
  found = jnp.moveaxis(jax.lax.map(cut, jnp.arange(full)), 0, 1).reshape(len(codes), full * rows, s)
  if full * rows < n:
    found = jnp.concatenate([found, search(x[full * rows :])], axis=1)
  return jnp.moveaxis(found, 2, 1)


def _beam(x, codes, beam):
  """`beam_codes` of rows x [n, s, d] and codes [m, s or 1, k, d] -> [m, n, s]."""
  n, s, _ = x.shape
  rest = jnp.broadcast_to(x[:, :, None], (n, s, beam, x.shape[2]))
  error = jnp.broadcast_to(jnp.where(jnp.arange(beam) == 0, 0.0, jnp.inf), (n, s, beam))

  def stage(carry, book):
    (rest, error), parent, index = _extended(*carry, book, beam)
    return (rest, error), (parent, index)

  (rest, error), (parents, indices) = jax.lax.scan(stage, (rest, error), codes)
  last = jnp.argmin(error, axis=-1)

  def back(at, of):
    parent, index = (jnp.take_along_axis(part, at[..., None], axis=-1)[..., 0] for part in of)
    return parent, index

  found = jax.lax.scan(back, last, (parents, indices), reverse=True)[1]
  return jnp.where(jnp.isnan(x).any(axis=-1), 0, found)


def _extended(rest, error, book, beam):
  """The best sums with one more code: ((what they leave [n, s, beam, d], its square), the sums they extend, the codes).

  Args:
    rest: what the sums before leave [n, s, b, d].
    error: its square, or infinity for a sum that is not there.
    book: codes [s or 1, k, d].
    beam: sums to keep.
  """
  k = book.shape[1]
  form = "nsbd,skd->nsbk" if len(book) > 1 else "nsbd,xkd->nsbk"
  inner = jnp.einsum(form, rest, book, precision=_EXACT)
  cost = jnp.sum(rest * rest, axis=-1)[..., None] - 2.0 * inner + jnp.sum(book * book, axis=-1)[:, None]
  cost = jnp.where(jnp.isinf(error)[..., None] | jnp.isnan(cost), jnp.inf, cost)
  flat = cost.reshape(*cost.shape[:2], -1)
  kept = min(beam, flat.shape[-1])
  cost, at = jax.lax.top_k(-flat, kept)
  parent, index = at // k, (at % k).astype(jnp.int32)
  chosen = book[0][index] if len(book) == 1 else book[jnp.arange(len(book))[None, :, None], index]
  rest = jnp.take_along_axis(rest, parent[..., None], axis=2) - chosen
  error = jnp.where(jnp.isinf(cost), jnp.inf, jnp.sum(rest * rest, axis=-1))
  return (rest, error), parent, index


def start_stages(
  rng: jax.Array,
  rows: Float[Array, "n d"],
  weights: Float[Array, "n"] | None,
  num_codes: int,
  stages: int,
  *,
  beam: int,
  iterations: int,
) -> tuple[Float[Array, "m k d"], Float[Array, "m k"]]:
  """Codes of every stage, and how many rows chose each: clusters of what the sums that the search keeps leave.

  Args:
    rng: key.
    rows: segments.
    weights: how often each row counts; 0 masks padding.
    num_codes: k.
    stages: m.
    beam: sums that the search keeps, of which a start takes no more than 5: each is a row more to cluster.
    iterations: rounds of a clustering for each number of axes.
  """
  beam = min(beam, _BEAM)
  weights = jnp.ones(len(rows)) if weights is None else weights
  rows = jnp.where(weights[:, None] > 0, jnp.asarray(rows, jnp.float32), 0.0)
  if len(rows) > _ROWS * num_codes:
    some = _drawn(jax.random.fold_in(rng, stages), weights)[: _ROWS * num_codes]
    rows, weights = rows[some], weights[some]
  rest = jnp.broadcast_to(rows[:, None], (len(rows), beam, rows.shape[1]))
  error = jnp.broadcast_to(jnp.where(jnp.arange(beam) == 0, 0.0, jnp.inf), rest.shape[:2])

  def stage(carry, number):
    rest, error = carry
    there = jnp.where(jnp.isinf(error), 0.0, weights[:, None]).reshape(-1)
    codes, counts = progressive_kmeans(
      jax.random.fold_in(rng, number), rest.reshape(-1, rest.shape[-1]), there, num_codes, iterations=iterations
    )
    counts = counts * (jnp.sum(weights) / jnp.maximum(jnp.sum(there), 1e-30))
    extend = lambda of: _extended(of[0][None, None], of[1][None, None], codes[None], beam)[0]
    rest, error = jax.lax.map(extend, carry, batch_size=max(1, _SCORES // (beam * num_codes)))
    return (rest[:, 0, 0], error[:, 0, 0]), (codes, counts)

  return jax.lax.scan(stage, (rest, error), jnp.arange(stages))[1]


@functools.partial(jax.jit, static_argnames=("num_codes", "iterations"))
def progressive_kmeans(
  rng: jax.Array, rows: Float[Array, "n d"], weights: Float[Array, "n"], num_codes: int, *, iterations: int
) -> tuple[Float[Array, "k d"], Float[Array, "k"]]:
  """k-means along a few principal axes first, then along more of them (Liu et al., 2015, section 3.2), and counts.

  Where rows are few and wide, means that begin at rows far from one another, as in k-means++, take single rows for
  themselves. A cluster without a row begins anew beside the largest.

  Args:
    rng: key of the first means, rows drawn at random.
    rows: vectors, finite.
    weights: how often each row counts.
    num_codes: k.
    iterations: rounds for each number of axes.
  """
  width = rows.shape[1]
  covariance = jnp.dot((rows * weights[:, None]).T, rows, precision=_EXACT) / jnp.maximum(jnp.sum(weights), 1e-30)
  axes = jnp.linalg.eigh(covariance)[1][:, ::-1]
  turned = jnp.dot(rows, axes, precision=_EXACT)
  first, split = jax.random.split(rng)
  order = _drawn(first, weights)
  there = jnp.maximum(jnp.sum(weights > 0), 1)
  means = turned[order[jnp.arange(num_codes) % there]]
  noise = jax.random.rademacher(split, (num_codes, width), jnp.float32)
  for dims in sorted({round(width ** ((1 + step) / _STEPS)) for step in range(_STEPS)}):
    means = jnp.where(jnp.arange(width) < dims, means, 0.0) if dims < width else means
    part, counts = kmeans(
      rng, turned[:, :dims], num_codes, iterations=iterations, distance="l2", init=means[:, :dims], normalize=False,
      weights=weights,
    )  # fmt: skip
    largest = part[jnp.argsort(-counts)] * (1.0 + 1e-3 * noise[:, :dims])
    empty = counts == 0
    part = jnp.where(empty[:, None], largest[jnp.cumsum(empty) - 1], part)
    means = jnp.zeros((num_codes, width)).at[:, :dims].set(part)
  return jnp.dot(means, axes.T, precision=_EXACT), counts


def _drawn(rng, weights):
  """Numbers of rows in a random order, masked ones last."""
  return jnp.argsort(jnp.where(weights > 0, jax.random.uniform(rng, weights.shape), 2.0))

"""Segments with vectors on lanes: their codes, their similarities to codes and their statistics.

A batch's segments are `[s, d, n]`: s segments of width d of each of n tokens (`nearest.py` explains this order).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from codebind_jax.codebook.nearest import Distance
from codebind_jax.norm import unit


class Segments(NamedTuple):
  """Segments that one codebook has quantised, with vectors on the last axis.

  Attributes:
    vectors: [s, d, n] float32, s segments of each of n tokens.
    indices: [s, n] int32 codes.
    weights: [n] float32 weights of the tokens, or None for ones; a weight of 0 marks padding.
  """

  vectors: jax.Array
  indices: jax.Array
  weights: jax.Array | None = None


@jax.custom_vjp
def transposed(x: Float[Array, "a b"]) -> Float[Array, "b a"]:
  """The transpose of a large matrix: how features become segments with vectors on lanes, and back."""
  return jax.lax.platform_dependent(x, cpu=_transposed_in_blocks, default=jnp.transpose)


transposed.defvjp(lambda x: (transposed(x), None), lambda _, cotangent: (transposed(cotangent),))

_ROWS = 16  # rows transposed at once on CPU: a cache line fetched for one entry still serves the next
_CACHED = 2**17  # entries of a matrix that fits into the cache


def _transposed_in_blocks(x):
  """The transpose by blocks: XLA on CPU would fuse it with its neighbours and read the whole matrix for each row."""
  a, b = x.shape
  # One stripe a device, so that rows split over devices stay in place.
  stripes = math.gcd(a, jax.device_count())
  length = a // stripes
  size = max(1, _ROWS // stripes)
  if length <= size or x.size <= _CACHED:
    return x.T
  x = x.reshape(stripes, length, b)

  def block(i, out):
    start = jnp.minimum(i * size, length - size)
    part = jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(out, jnp.transpose(part, (2, 0, 1)), start, axis=2)

  return jax.lax.fori_loop(0, -(-length // size), block, jnp.zeros((b, stripes, length), x.dtype)).reshape(b, a)


def look_up(codes: Float[Array, "*own k d"], indices: Int[Array, "s n"]) -> Float[Array, "s d n"]:
  """Code vectors by index, with vectors on lanes; codes [k, d], or [s, k, d] where each position has its own."""
  return jax.lax.platform_dependent(codes, indices, tpu=_one_hot_look_up, default=_take)


def _as_one_book(indices, num_codes):
  """Indices [s, n] into the codebooks of s positions as indices into all of them, one after the other."""
  return indices + num_codes * jnp.arange(len(indices), dtype=indices.dtype)[:, None]


def _take(codes, indices):
  if codes.ndim == 3:
    codes, indices = codes.reshape(-1, codes.shape[-1]), _as_one_book(indices, codes.shape[1])
  return jnp.moveaxis(jnp.take(codes.T, indices, axis=1, mode="clip"), 0, 1)


def _one_hot_look_up(codes, indices):
  """`_take` as a product with one-hot codes, which TPU's compiler never writes; a gather there makes rows of 8.

  The product is exact, because a float32 is the sum of three bfloat16.
  """
  if codes.ndim == 3:
    return jax.vmap(lambda codes, indices: _one_hot_look_up(codes, indices[None])[0])(codes, indices)
  one_hot = (indices[:, None] == jnp.arange(codes.shape[0], dtype=jnp.int32)[:, None]).astype(jnp.float32)
  contract = (((0,), (1,)), ((), ()))  # not an einsum, which would put the narrow axis last
  return jnp.moveaxis(jax.lax.dot_general(codes, one_hot, contract, precision=jax.lax.Precision.HIGHEST), 0, 1)


def straight_through(z: Float[Array, "..."], q: Float[Array, "..."]) -> Float[Array, "..."]:
  """The value of q with the gradient of z."""
  # q + (z - sg(z)) rather than z + sg(q - z): the value is q to the last bit.
  return jax.lax.stop_gradient(q) + (z - jax.lax.stop_gradient(z))


def rotation_trick(z: Float[Array, "s d n"], q: Float[Array, "s d n"]) -> Float[Array, "s d n"]:
  """The value of q; z gets the gradient turned and scaled as z is turned and scaled to q, segment by segment.

  The rotation trick of Fifty et al., "Restructuring Vector Quantization with the Rotation Trick" (2024, arXiv
  2410.06424, eq. 4): q = |q| / |z| (I - 2 r r' + 2 q' z') z with unit z', q' and r' = (z' + q') / |z' + q'|, in which
  all but the last z is constant. A segment of length zero is not scaled.
  """
  from_, to = jax.lax.stop_gradient((unit(z, axis=1), unit(q, axis=1)))
  middle = unit(from_ + to, axis=1)
  length, wanted = (jnp.linalg.norm(jax.lax.stop_gradient(x), axis=1, keepdims=True) for x in (z, q))
  scale = jnp.where(length > 1e-12, wanted / jnp.where(length > 1e-12, length, 1.0), 1.0)
  along = lambda axis: jnp.sum(axis * z, axis=1, keepdims=True)
  turned = scale * (z - 2.0 * middle * along(middle) + 2.0 * to * along(from_))
  return straight_through(turned, q)


def through_both(z: Float[Array, "..."], q: Float[Array, "..."]) -> Float[Array, "..."]:
  """The value of q with the gradient of z and of q: codes that are parameters learn from what their vectors serve.

  As the centroids of JPQ (Zhan et al., "Jointly Optimizing Query Encoder and Product Quantization", CIKM 2021).
  """
  return q + (z - jax.lax.stop_gradient(z))


THROUGH = {"straight_through": straight_through, "rotation_trick": rotation_trick, "both": through_both}


@functools.partial(jax.jit, static_argnames=("distance", "codes_last"))
def similarity(
  z: Float[Array, "s d n"], codes: Float[Array, "*own k d"], *, distance: Distance = "cosine", codes_last: bool = False
) -> Float[Array, "s _ _"]:
  """Similarity of segments and codes: z . unit(code) for "cosine" (z as given), minus the squared distance for "l2".

  Args:
    z: segments.
    codes: one codebook for all segments, or one for each position s.
    distance: as in `nearest_code`.
    codes_last: order of the axes.

  Returns:
    [s, k, n], or [s, n, k] with `codes_last`.
  """
  form = f"{'s' * (codes.ndim == 3)}kd,sdn->{'snk' if codes_last else 'skn'}"
  if distance == "cosine":
    return jnp.einsum(form, unit(codes), z, precision=jax.lax.Precision.HIGHEST)
  of_codes, of_segments = jnp.sum(codes * codes, axis=-1), jnp.sum(z * z, axis=1)
  if codes_last:
    norms = of_codes[..., None, :] + of_segments[:, :, None]
  else:
    norms = of_codes[..., None] + of_segments[:, None]
  return 2 * jnp.einsum(form, codes, z, precision=jax.lax.Precision.HIGHEST) - norms


@functools.partial(jax.jit, static_argnames=("num_codes", "own"))
def statistics(
  parts: Sequence[Segments], num_codes: int, own: bool = False
) -> tuple[Float[Array, "*s k"], Float[Array, "*s k d"]]:
  """Number n_k and sum s_k of the segments assigned to each code, over all parts and all devices.

  Args:
    parts: segments that the codebook has quantised in this step.
    num_codes: k.
    own: each position has its own codebook, so that statistics are [s, k] and [s, k, d].
  """
  counts, sums = zip(*(_part_statistics(part, num_codes, own) for part in parts))
  return sum(counts), sum(sums)


def _part_statistics(part, num_codes, own):
  vectors, indices, weights = part
  s, _, n = vectors.shape
  ones = jnp.ones((s, 1, n), jnp.float32)
  if weights is not None:
    # A product alone would not do, because padding may hold NaN.
    vectors = jnp.where(weights > 0, vectors * weights, 0.0)
    ones = ones * jnp.maximum(weights, 0.0)
  rows = num_codes * s if own else num_codes  # all positions' codebooks, one after the other
  one_book = lambda i: _as_one_book(i, num_codes) if own else i
  sums = jax.lax.platform_dependent(
    jax.lax.stop_gradient(jnp.concatenate([vectors, ones], axis=1)),
    indices,
    cpu=lambda v, i: _scatter_sums(v, one_book(i), rows),
    tpu=lambda v, i: _by_position(v, i, num_codes) if own else _one_hot_sums(v, i, num_codes),
    default=lambda v, i: _integer_sums(v, one_book(i), rows),
  )
  sums = sums.reshape(s, num_codes, -1) if own else sums
  return sums[..., -1], sums[..., :-1]


def _scatter_sums(vectors, indices, num_codes):
  # Tokens first, because the axis that is split over devices must be the major one of those that are merged.
  s, d, n = vectors.shape
  rows = transposed(vectors.reshape(s * d, n)).reshape(-1, d)
  return jax.ops.segment_sum(rows, indices.T.reshape(-1), num_codes)


def _one_hot_sums(vectors, indices, num_codes, block=128):
  """Sums by products with one-hot blocks of codes: scatters are slow on TPU."""

  def sums(codes):
    one_hot = (indices[None] == codes[:, None, None]).astype(jnp.float32)
    return jnp.einsum("ksn,sdn->kd", one_hot, vectors, precision=jax.lax.Precision.HIGHEST)

  blocks = jnp.arange(num_codes + -num_codes % block, dtype=jnp.int32).reshape(-1, block)
  return jax.lax.map(sums, blocks).reshape(-1, vectors.shape[1])[:num_codes]


def _by_position(vectors, indices, num_codes):
  sums = jax.vmap(lambda v, i: _one_hot_sums(v[None], i[None], num_codes))(vectors, indices)
  return sums.reshape(-1, vectors.shape[1])


_BITS = 26  # bits of a number that are added, relative to the largest number
_COPIES, _COPIES_SIZE = 64, 2**20  # most copies of the sums that a GPU adds to in parallel, and most numbers in them


def _copied(indices, num_codes, width=1):
  """(copies, [m] indices into copies x codes): additions to one address wait, so neighbours go to different copies."""
  copies = max(1, min(_COPIES, _COPIES_SIZE // (num_codes * width)))
  flat = indices.reshape(-1)
  return copies, flat + num_codes * (jnp.arange(flat.size, dtype=flat.dtype) % copies)


def code_counts(indices: Int[Array, "..."], num_codes: int) -> Float[Array, "k"]:
  """How often each code was chosen."""

  def gpu(indices):
    copies, where = _copied(indices, num_codes)
    counts = jnp.zeros(copies * num_codes, jnp.int32).at[where].add(1)
    return counts.reshape(copies, num_codes).sum(0).astype(jnp.float32)

  plain = lambda indices: jnp.zeros(num_codes, jnp.float32).at[indices.reshape(-1)].add(1.0)
  return jax.lax.platform_dependent(indices, cpu=plain, tpu=plain, default=gpu)


def _integer_sums(vectors, indices, num_codes):
  """Sums by scatters of integers: a GPU adds in any order, which changes sums of floats but not of integers.

  A number becomes an integer relative to the largest of its component, in parts of so few bits that no sum overflows.
  A number that is not finite makes all sums of its component NaN.
  """
  s, d, n = vectors.shape
  values = jnp.moveaxis(vectors, 1, 0).reshape(d, s * n)
  largest = jnp.max(jnp.abs(values), axis=1, keepdims=True, initial=0.0)
  # A power of two, so that dividing and multiplying by it is exact.
  scale = jnp.where(largest > 0, 2.0 ** jnp.ceil(jnp.log2(jnp.where(largest > 0, largest, 1.0))), 1.0)
  finite = jnp.isfinite(values)
  remainder = jnp.where(finite, values / scale, 0.0)
  copies, where = _copied(indices, num_codes, d)
  bits = max(1, min(_BITS // 2, 30 - math.ceil(math.log2(max(1, -(-s * n // copies))))))
  total = 0.0
  for part in range(1, math.ceil(_BITS / bits) + 1):
    unit_of_part = 2.0 ** (-bits * part)
    rounded = jnp.round(remainder / unit_of_part)
    remainder = remainder - rounded * unit_of_part
    sums = jax.vmap(lambda x: jax.ops.segment_sum(x, where, copies * num_codes))(rounded.astype(jnp.int32))
    high, low = ((x.reshape(d, copies, -1).sum(1)).astype(jnp.float32) for x in (sums >> 15, sums & 0x7FFF))
    total = total + (high * 2.0**15 + low) * unit_of_part
  return jnp.where(jnp.all(finite, axis=1, keepdims=True), total * scale, jnp.nan).T

"""The nearest-code search: one function, several programs, chosen by the backend that compiles it.

Segments are held as `[s, d, n]`: vectors on the last axis ("on lanes"). The width of a code is small (8), and an array
whose last axis is 8 is padded to 128 in TPU memory; on CPU, the vector units work along the lanes.

The fastest program differs by backend. CPU: a scan over the codes with a running best for every lane when codes are
narrow, blocks of a matrix product with `max`, then the first equal column, when they are wide (XLA's argmax is slow
there). TPU: a plain argmax of a matrix product, which the compiler fuses, so that the similarities are never written.
GPU: an argmax by blocks (not fused there), or a Triton program when codes are narrow and the GPU is NVIDIA's.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from codebind_jax.norm import unit

# A plain string to the type checker, so that a wrong option gives a ValueError that names the allowed ones.
Distance = str
DISTANCES = ("cosine", "l2")

_NARROW = 32  # widest code for which the scan over codes is used
_UNROLLED_PRODUCTS = 256  # products unrolled in one step of the scan
_CHAIN = 8  # codes compared one after the other in a step
_CPU_BLOCK = 128  # rows of the similarity matrix held at once on CPU
_GPU_SCORES = 2**24  # similarities held at once on GPU (64 MB)
# A row block takes a stripe from each of this many equal parts of the batch, so that a batch sharded over as many
# devices stays in place.
_STRIPES = 64


def check_distance(distance: str) -> None:
  """Raises ValueError unless `distance` is known."""
  if distance not in DISTANCES:
    raise ValueError(f"distance must be {' or '.join(map(repr, DISTANCES))}, got {distance!r}")


def nearest_code(
  z: Float[Array | np.ndarray, "n d"],
  codes: Float[Array | np.ndarray, "k _d"],
  *,
  distance: Distance = "cosine",
  block: int = 0,
) -> Int[Array, "n"]:
  """Index of the code nearest to each vector; the lowest index wins ties.

  Args:
    z: vectors, any float type; compared in float32.
    codes: the codebook.
    distance: "cosine" (largest cosine) or "l2" (smallest squared distance).
    block: rows of the similarity matrix held at once; 0 chooses the program and the rows for the backend.

  Returns:
    int32 indices below k. A row that holds NaN gives 0.

  Raises:
    ValueError: if widths differ, the codebook is empty, `block` is negative or `distance` is unknown.
  """
  check_distance(distance)
  if z.ndim != 2 or codes.ndim != 2 or z.shape[1] != codes.shape[1]:
    raise ValueError(f"z and codes must be [n, d] and [k, d] with one width, got {z.shape} and {codes.shape}")
  if 0 in codes.shape or block < 0:
    raise ValueError(f"codes must not be empty and block be >= 0, got codes {codes.shape} and block={block}")
  traced = isinstance(z, jax.core.Tracer) or isinstance(codes, jax.core.Tracer)
  search = _search_rows if traced else _compiled_search(jax.default_backend())
  return search(jnp.asarray(z), jnp.asarray(codes), distance, block)


@functools.partial(jax.jit, static_argnames="distance")
def nearest_segments(
  z: Float[Array, "s d n"], codes: Float[Array, "*own k d"], *, distance: Distance = "cosine"
) -> Int[Array, "s n"]:
  """`nearest_code` for segments held with vectors on lanes.

  Args:
    z: segments.
    codes: one codebook [k, d] for all segments, or [s, k, d], one for each position s.
    distance: as in `nearest_code`.

  Raises:
    ValueError: if `distance` is unknown, or there are not as many codebooks as positions.
  """
  check_distance(distance)
  if codes.ndim == 3 and len(codes) != len(z):
    raise ValueError(f"codes of shape {codes.shape} must have one codebook for each of {len(z)} positions")
  z, codes, bias = _prepare(z, codes, distance)
  if z.shape[1] > _NARROW:
    return _lane_blocks(z, codes, bias)
  return jax.lax.platform_dependent(
    z, codes, bias, cpu=_scan_codes, tpu=_argmax_lanes, cuda=_by_triton, default=_lane_blocks
  )


@functools.cache
def _compiled_search(backend: str):
  """The compiled search for calls outside of jit."""
  # XLA's CPU backend prefers 256-bit vectors; 512-bit ones halve the time of the scan where the machine has them.
  options = {"xla_cpu_prefer_vector_width": 512} if backend == "cpu" else None
  return jax.jit(_search_rows, static_argnums=(2, 3), compiler_options=options)


def _prepare(z, codes, distance):
  """Float32 operands of score = <z, code> - bias, whose largest value marks the nearest code; no gradient."""
  z, codes = jax.lax.stop_gradient((z.astype(jnp.float32), codes.astype(jnp.float32)))
  if distance == "cosine":
    return z, unit(codes), jnp.zeros(codes.shape[:-1], jnp.float32)
  return z, codes, 0.5 * jnp.sum(codes * codes, axis=-1)


def _search_rows(z, codes, distance, block):
  n, d = z.shape
  if n == 0:
    return jnp.zeros(0, jnp.int32)
  if d <= _NARROW and not block:
    return nearest_segments(z.T[None], codes, distance=distance)[0]
  return _blocks_for_backend(*_prepare(z, codes, distance), block)


def _blocks_for_backend(z, codes, bias, block=0):
  return jax.lax.platform_dependent(
    z,
    codes,
    bias,
    cpu=functools.partial(_row_blocks, block=block or _CPU_BLOCK, pick=_first_of_max),
    tpu=functools.partial(_row_blocks, block=block or len(z), pick=_argmax),
    default=functools.partial(_row_blocks, block=block or max(1, _GPU_SCORES // len(codes)), pick=_argmax),
  )


def _lane_blocks(z, codes, bias):
  """The search by blocks of rows for vectors on lanes. z [s, d, n] -> [s, n]."""
  s, d, n = z.shape
  if codes.ndim == 3:
    # One position after the other: XLA on CPU has no fast product of batches, and elsewhere a position fills a device.
    return jax.lax.map(lambda of: _blocks_for_backend(of[0].T, *of[1:]), (z, codes, bias))
  # Tokens first: the axis that is split over devices must be the major one of those that are merged.
  rows = jnp.transpose(z, (2, 0, 1)).reshape(n * s, d)
  return _blocks_for_backend(rows, codes, bias).reshape(n, s).T


def _by_triton(z, codes, bias):
  from codebind_jax.codebook.nearest_triton import nearest_by_triton  # imports Pallas, which no other backend needs

  return nearest_by_triton(z, codes, bias)


def _scan_codes(z, codes, bias):
  """Scan over codes with a running best for every lane. z [s, d, n] -> [s, n]."""
  s, d, n = z.shape
  k = codes.shape[-2]
  unroll = max(1, min(k, _UNROLLED_PRODUCTS // max(d, 1)))
  # A copy of code 0 fills the last step: it never beats the original, because a later equal score does not win.
  fill = -k % unroll
  table = jnp.concatenate([codes, bias[..., None]], axis=-1)
  table = jnp.concatenate([table, jnp.broadcast_to(table[..., :1, :], (*table.shape[:-2], fill, d + 1))], axis=-2)
  table = table.reshape(*table.shape[:-2], -1, unroll, d + 1)
  if codes.ndim == 3:
    table = jnp.moveaxis(table, 0, -1)[..., None]  # a number of each position
  rows = [z[:, j] for j in range(d)]

  def step(carry, block):
    best_and_index, first = carry
    best, index = jnp.real(best_and_index), jnp.imag(best_and_index)
    for start in range(0, unroll, _CHAIN):
      # The best of a few codes comes first, because each comparison waits for the one before it.
      chain_best, chain_index = -jnp.inf, jnp.float32(0)
      for u in range(start, min(start + _CHAIN, unroll)):
        score = block[u, 0] * rows[0] - block[u, d]
        for j in range(1, d):
          score = score + block[u, j] * rows[j]
        better = score > chain_best
        chain_best = jnp.where(better, score, chain_best)
        chain_index = jnp.where(better, jnp.float32(u), chain_index)
      better = chain_best > best
      best = jnp.where(better, chain_best, best)
      index = jnp.where(better, first + chain_index, index)
    return (jax.lax.complex(best, index), first + unroll), None

  # Score and index travel as one complex number: a kernel of XLA's CPU backend writes one array, so two arrays would
  # need two kernels, each of which computes every score. Float32 holds any index of up to 2^24 codes.
  start = jax.lax.complex(jnp.full((s, n), -jnp.inf), jnp.zeros((s, n)))
  return jnp.imag(jax.lax.scan(step, (start, jnp.float32(0)), table)[0][0]).astype(jnp.int32)


def _argmax_lanes(z, codes, bias):
  """Argmax of the product, with vectors on lanes. z [s, d, n] -> [s, n]."""
  form = "kd,sdn->skn" if codes.ndim == 2 else "skd,sdn->skn"
  score = jnp.einsum(form, codes, z, precision=jax.lax.Precision.HIGHEST) - bias[..., None]
  return _argmax(score, axis=1)


def _argmax(score, axis=-1):
  # argmax alone returns the first NaN. Only one operation reads the score, else TPU's compiler writes it to memory.
  return jnp.argmax(jnp.where(jnp.isnan(score), -jnp.inf, score), axis=axis).astype(jnp.int32)


def _first_of_max(score):
  k = score.shape[-1]
  best = jnp.max(score, axis=-1, keepdims=True)
  first = jnp.min(jnp.where(score == best, jnp.arange(k, dtype=jnp.int32), k), axis=-1)
  return jnp.where(first == k, 0, first)


def _row_blocks(z, codes, bias, *, block, pick):
  """Blocks of the similarity matrix [rows, k], one after the other. z [n, d] -> [n]."""
  n, d = z.shape
  stripes = math.gcd(n, _STRIPES)
  length = n // stripes
  rows = max(1, min(length, block // stripes))
  z = z.reshape(stripes, length, d)

  def search(part):
    score = jnp.einsum("pld,kd->plk", part, codes, precision=jax.lax.Precision.HIGHEST) - bias
    return pick(score)

  full = length // rows
  if full == 1 and rows == length:
    return search(z).reshape(n)
  indices = jax.lax.map(lambda i: search(jax.lax.dynamic_slice_in_dim(z, i * rows, rows, axis=1)), jnp.arange(full))
  indices = jnp.moveaxis(indices, 0, 1).reshape(stripes, full * rows)
  if full * rows < length:
    indices = jnp.concatenate([indices, search(z[:, full * rows :])], axis=1)
  return indices.reshape(n)

"""The search for narrow codes on NVIDIA GPUs: one Triton program, written with Pallas, that never writes a score.

A program holds some segments in registers and walks over all codes. XLA's own programs write the similarities, all at
once or in blocks, and are bound by memory (benchmarks/README.md has the times).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

_ROWS = 512  # segments of one program
_UNROLL = 8  # codes compared in one step of its loop
_WARPS = 4  # groups of 32 threads of one program


def nearest_by_triton(
  z: Float[Array, "s d n"], codes: Float[Array, "*own k d"], bias: Float[Array, "*own k"], *, interpret: bool = False
) -> Int[Array, "s n"]:
  """Index of the largest <z, code> - bias; the lowest wins ties, NaN gives 0. A batch split over devices stays so.

  Args:
    z: segments with vectors on lanes.
    codes: the codebook, of any size, or one for each of s positions.
    bias: subtracted from each code's score.
    interpret: run without a GPU, slowly, for tests.
  """
  return _partitioned(interpret, codes.ndim == 3)(z, codes, bias)


@functools.cache
def _partitioned(interpret, own):
  def search(z, codes, bias):
    return _search(z, codes, bias, interpret)

  def partition(mesh, arguments, result):
    return mesh, search, result.sharding, tuple(argument.sharding for argument in arguments)

  # The compiler cannot see into the program: the rule tells it that every segment is searched independently.
  partitioned = custom_partitioning(search)
  rule = "s d n, s k d, s k -> s n" if own else "s d n, k d, k -> s n"
  partitioned.def_partition(partition, sharding_rule=rule, need_replication_factors=("d", "k"))
  return partitioned


def _search(z, codes, bias, interpret):
  s, d, n = z.shape
  # Copies of code 0 fill the last step. A later equal score does not win; one that is rounded otherwise counts as 0's.
  size = codes.shape[-2]
  codes, bias = (x if codes.ndim == 3 else x[None] for x in (codes, bias))  # a codebook, or one for each position
  tables, fill = len(codes), -codes.shape[1] % _UNROLL
  codes = jnp.concatenate([codes, jnp.broadcast_to(codes[:, :1], (tables, fill, d))], axis=1)
  bias = jnp.concatenate([bias, jnp.broadcast_to(bias[:, :1], (tables, fill))], axis=1)
  k = codes.shape[1]
  pad = -n % _ROWS
  indices = pl.pallas_call(
    functools.partial(_program, d=d, k=k),
    grid=(s, (n + pad) // _ROWS),
    in_specs=[
      pl.BlockSpec((1, d, _ROWS), lambda i, j: (i, 0, j)),
      pl.BlockSpec((1, k, d), lambda i, j: (i if tables > 1 else 0, 0, 0)),
      pl.BlockSpec((1, k), lambda i, j: (i if tables > 1 else 0, 0)),
    ],
    out_specs=pl.BlockSpec((1, _ROWS), lambda i, j: (i, j)),
    out_shape=jax.ShapeDtypeStruct((s, n + pad), jnp.int32),
    compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
    interpret=interpret,
  )(jnp.pad(z, ((0, 0), (0, 0), (0, pad))), codes, bias)
  return jnp.where(indices[:, :n] < size, indices[:, :n], 0)


def _program(z, codes, bias, out, *, d, k):
  rows = [z[0, j, :] for j in range(d)]

  def step(i, carry):
    best, index = carry
    for u in range(_UNROLL):
      code = i * _UNROLL + u
      score = codes[0, code, 0] * rows[0] - bias[0, code]
      for j in range(1, d):
        score = score + codes[0, code, j] * rows[j]
      better = score > best
      best, index = jnp.where(better, score, best), jnp.where(better, code, index)
    return best, index

  start = jnp.full((_ROWS,), -jnp.inf, jnp.float32), jnp.zeros((_ROWS,), jnp.int32)
  out[0, :] = jax.lax.fori_loop(0, k // _UNROLL, step, start)[1]

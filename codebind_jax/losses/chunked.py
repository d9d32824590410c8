"""InfoNCE over the global batch in memory linear in the batch: tiles of the logits, alone or in a ring of devices.

The softmax denominators are taken online (Milakov and Gimelshein, arXiv 1805.02867), so that no more than one tile of
logits exists at a time; the backward pass computes the tiles again from the denominators. Over several devices a piece
of `b` goes around the ring of neighbours with the statistics (and, backwards, the gradient) of its columns, and is back
after one round: no device ever holds the whole batch.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from codebind_jax.losses.masks import MASKED_LOGIT
from codebind_jax.norm import unit

_EXACT = jax.lax.Precision.HIGHEST


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def chunked_sum(
  a: Float[Array, "b d"], b: Float[Array, "b d"], scale: Float[Array, ""], valid: Bool[Array, "b"],
  marks: Int[Array, "b m"], chunk: int, axes: tuple[str, ...],
) -> Float[Array, ""]:
  """Sum over valid rows of both directions' cross-entropies of the diagonal of `scale * cosine(a, b)`.

  Args:
    a: float32 embeddings, not yet normalised.
    b: those of the other modality.
    scale: multiplies the cosines.
    valid: rows that count; the others may hold anything and get a zero gradient.
    marks: [b, 2] (group, row); different rows of one group are not each other's negatives. [b, 0] for no groups.
    chunk: rows and columns of a tile.
    axes: mesh axes of the current mesh (`jax.set_mesh`) that the rows are split over; () for one device.
  """
  return _forward(a, b, scale, valid, marks, chunk, axes)[0]


def _forward(a, b, scale, valid, marks, chunk, axes):
  local = functools.partial(_local_forward, chunk=chunk, axes=axes)
  total, rows, columns = _over_devices(local, axes, "rrsrr", "srr")(a, b, scale, valid, marks)
  return total, (a, b, scale, valid, marks, rows, columns)


def _backward(chunk, axes, residuals, cotangent):
  a, b, scale, valid, marks, rows, columns = residuals
  local = functools.partial(_local_backward, chunk=chunk, axes=axes)
  grads = _over_devices(local, axes, "rrsrrrrs", "rrs")(a, b, scale, valid, marks, rows, columns, cotangent)
  return *grads, *(np.zeros(x.shape, jax.dtypes.float0) for x in (valid, marks))


chunked_sum.defvjp(_forward, _backward)


def _over_devices(function, axes, inputs, outputs):
  """`function` on each device's rows; `r` marks arguments and results split by rows, `s` scalars."""
  if not axes:
    return function
  specs = lambda kinds: tuple(P(axes) if kind == "r" else P() for kind in kinds)
  return jax.shard_map(function, in_specs=specs(inputs), out_specs=specs(outputs), check_vma=False)


class _Blocks(NamedTuple):
  """Equal blocks of rows; where they do not divide, the last overlaps the one before it."""

  rows: int
  size: int

  @property
  def number(self):
    return -(-self.rows // self.size)

  def at(self, i, *arrays):
    """(start, which rows are not in an earlier block, the rows of each array)."""
    start = jnp.minimum(i * self.size, self.rows - self.size)
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, self.size)
    return start, start + jnp.arange(self.size) >= i * self.size, *map(cut, arrays)


def _put(array, part, start):
  return jax.lax.dynamic_update_slice_in_dim(array, part, start, axis=0)


def _clean(x, valid):
  """Unit rows; zero for a row that does not count, whatever it holds."""
  return unit(jnp.where(valid[:, None], x, 0.0))


def _tile(a, b, scale, rows, columns, marks_a, marks_b):
  """Logits of a tile, and which of them count."""
  counts = rows[:, None] & columns
  if marks_a.shape[1]:
    same_group, same_row = (marks_a[:, None, i] == marks_b[:, i] for i in range(2))
    counts &= ~same_group | same_row
  return scale * jnp.dot(a, b.T, precision=_EXACT), counts


def _around(body, carry, axes):
  """`body(moving, resident)` once on every device's piece; the pieces are back on their devices afterwards."""
  if not axes:
    return body(*carry)
  size = jax.lax.axis_size(axes)
  ring = [(i, (i + 1) % size) for i in range(size)]

  def step(carry, _):
    moving, resident = body(*carry)
    return (jax.tree.map(lambda x: jax.lax.ppermute(x, axes, ring), moving), resident), None

  return jax.lax.scan(step, carry, length=size)[0]


def _online(highest, total, logits, counts, axis):
  """Running maximum and scaled sum of exponentials along `axis`, updated with a tile of logits."""
  new_highest = jnp.maximum(highest, jnp.max(jnp.where(counts, logits, MASKED_LOGIT), axis=axis))
  exponents = jnp.where(counts, jnp.exp(logits - jnp.expand_dims(new_highest, axis)), 0.0)
  return new_highest, total * jnp.exp(highest - new_highest) + jnp.sum(exponents, axis=axis)


def _log_sum(highest, total):
  return highest + jnp.log(jnp.where(total > 0, total, 1.0))


def _local_forward(a, b, scale, valid, marks, *, chunk, axes):
  blocks = _Blocks(len(a), min(chunk, len(a)))
  start = lambda n: (jnp.full(n, MASKED_LOGIT), jnp.zeros(n))

  def visit(moving, rows):
    piece, counts, piece_marks, *columns = moving

    def block(carry, i):
      (high, total), columns = carry
      at, new, part, ok, block_marks, old_high, old_total = blocks.at(i, a, valid, marks, high, total)
      logits, pairs = _tile(_clean(part, ok), piece, scale, ok & new, counts, block_marks, piece_marks)
      new_high, new_total = _online(old_high, old_total, logits, pairs, 1)
      return ((_put(high, new_high, at), _put(total, new_total, at)), _online(*columns, logits, pairs, 0)), None

    (rows, columns), _ = jax.lax.scan(block, (rows, tuple(columns)), jnp.arange(blocks.number))
    return (piece, counts, piece_marks, *columns), rows

  def one_piece(carry, j):
    rows, columns = carry
    at, new, part, ok, piece_marks = blocks.at(j, b, valid, marks)
    moving = (_clean(part, ok), ok & new, piece_marks, *start(blocks.size))
    (_, _, _, *statistics), rows = _around(visit, (moving, rows), axes)
    old = jax.lax.dynamic_slice_in_dim(columns, at, blocks.size)
    return (rows, _put(columns, jnp.where(new, _log_sum(*statistics), old), at)), None

  (rows, columns), _ = jax.lax.scan(one_piece, (start(len(a)), jnp.zeros(len(a))), jnp.arange(blocks.number))
  rows = _log_sum(*rows)
  positive = scale * jnp.sum(_clean(a, valid) * _clean(b, valid), axis=1)
  total = jnp.sum(jnp.where(valid, rows + columns - 2 * positive, 0.0))
  return jax.lax.psum(total, axes) if axes else total, rows, columns


def _local_backward(a, b, scale, valid, marks, rows, columns, cotangent, *, chunk, axes):
  blocks = _Blocks(len(a), min(chunk, len(a)))

  def visit(moving, resident):
    piece, counts, piece_marks, normaliser, grad_piece = moving

    def block(carry, i):
      grad_a, grad_scale, grad_piece = carry
      at, new, part, ok, block_marks, lse, old = blocks.at(i, a, valid, marks, rows, grad_a)
      part = _clean(part, ok)
      logits, pairs = _tile(part, piece, scale, ok & new, counts, block_marks, piece_marks)
      weights = jnp.where(pairs, jnp.exp(logits - lse[:, None]) + jnp.exp(logits - normaliser), 0.0)
      grad_a = _put(grad_a, old + jnp.dot(weights, piece, precision=_EXACT), at)
      grad_scale += jnp.sum(jnp.where(pairs, weights * logits, 0.0))
      return (grad_a, grad_scale, grad_piece + jnp.dot(weights.T, part, precision=_EXACT)), None

    start = (*resident, grad_piece)
    (*resident, grad_piece), _ = jax.lax.scan(block, start, jnp.arange(blocks.number))
    return (piece, counts, piece_marks, normaliser, grad_piece), tuple(resident)

  def finished(grad, x, other, ok):
    """Gradient of the raw rows from the sum over tiles: the positives' part, then through the normalisation."""
    grad = cotangent * scale * (grad - 2.0 * _clean(other, ok))
    return jax.vjp(lambda x: _clean(x, ok), x)[1](jnp.where(ok[:, None], grad, 0.0))[0]

  def one_piece(carry, j):
    grad_b, *resident = carry
    at, new, part, ok, piece_marks, normaliser, other, old = blocks.at(j, b, valid, marks, columns, a, grad_b)
    moving = (_clean(part, ok), ok & new, piece_marks, normaliser, jnp.zeros_like(part))
    (_, _, _, _, grad), resident = _around(visit, (moving, tuple(resident)), axes)
    return (_put(grad_b, jnp.where(new[:, None], finished(grad, part, other, ok), old), at), *resident), None

  def finish_rows(grad_a, i):
    at, new, part, ok, other, grad = blocks.at(i, a, valid, b, grad_a)
    return _put(grad_a, jnp.where(new[:, None], finished(grad, part, other, ok), grad), at), None

  start = (jnp.zeros_like(b), jnp.zeros_like(a), jnp.zeros(()))
  (grad_b, grad_a, grad_scale), _ = jax.lax.scan(one_piece, start, jnp.arange(blocks.number))
  grad_a, _ = jax.lax.scan(finish_rows, grad_a, jnp.arange(blocks.number))
  positive = jnp.sum(jnp.where(valid, jnp.sum(_clean(a, valid) * _clean(b, valid), axis=1), 0.0))
  grad_scale = cotangent * (grad_scale / scale - 2.0 * positive)
  return grad_a, grad_b, jax.lax.psum(grad_scale, axes) if axes else grad_scale

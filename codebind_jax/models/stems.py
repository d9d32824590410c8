"""Stems: raw input -> tokens with class token and learned positions; images, clips, spectrograms, time series."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from codebind_jax.data.interpolation import antialias_matrix, cubic_matrix
from codebind_jax.models.transformer import layer_norm
from codebind_jax.runtime.sharding import keep_rows

STEM_EPS = 1e-5


def resize_positions(
  positions: Float[Array, "n d"], grid: tuple[int, ...], new_grid: tuple[int, ...], prefix: int = 1,
  filter: str = "cubic",
) -> Float[Array, "m d"]:  # fmt: skip
  """Positions of a class token and a patch grid, interpolated to another grid of the same rank.

  Args:
    positions: `prefix` rows, such as the class token's, then the grid in row-major order.
    grid: grid of `positions`.
    new_grid: grid of the result.
    prefix: rows before the grid, which stay as they are.
    filter: "cubic", or "antialias" for one that is wider where the new grid is coarser (DINOv2 with registers).

  Raises:
    ValueError: if the ranks of the grids differ.
  """
  if len(grid) != len(new_grid):
    raise ValueError(f"new_grid: {new_grid} has another rank than the stem's grid {grid}")
  if grid == new_grid:
    return positions
  cells = positions[prefix:].reshape(*grid, -1)
  for axis, (size, new_size) in enumerate(zip(grid, new_grid)):
    if size != new_size:
      weights = antialias_matrix(size, new_size) if filter == "antialias" else cubic_matrix(size, new_size)
      matrix = jnp.asarray(weights, cells.dtype)
      cells = jnp.moveaxis(jnp.tensordot(matrix, cells, axes=(1, axis)), 0, axis)
  return jnp.concatenate([positions[:prefix], cells.reshape(-1, positions.shape[-1])])


def patch_grid(size: tuple[int, ...], patch: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
  """Number of patches along each axis of an input of `size`.

  Raises:
    ValueError: if an axis is shorter than the patch, or the ranks differ.
  """
  if not len(size) == len(patch) == len(stride) or any(n < p for n, p in zip(size, patch)):
    raise ValueError(f"input size {size} does not fit patches {patch} with stride {stride}")
  return tuple((n - p) // s + 1 for n, p, s in zip(size, patch, stride))


class PatchStem(nn.Module):
  """Strided convolution to patches, optional LayerNorm, class token in front, learned positions added.

  One class for every sensor: the rank of `patch` says whether the input is a series [b, t, c] (EEG, IMU), an image
  [b, h, w, c] (depth, thermal, tactile, log-mel) or a clip [b, t, h, w, c] (image and video).

  Attributes:
    width: token width d.
    size: input size without channels of the learned positions; for other sizes they are interpolated.
    patch: patch size along each axis.
    stride: step between patches; () means `patch`, so that they do not overlap.
    norm: LayerNorm on the patch tokens (all ImageBind stems but the image's).
    bias: bias of the convolution (EEG).
    class_token: whether there is one.
    registers: learned tokens after the class token, without positions (DINOv2 with registers, DINOv3).
    learned: whether there are learned positions.
    class_position: whether one of them is the class token's.
    position_filter: `filter` of `resize_positions`.
    dtype: compute type.
  """

  width: int
  size: tuple[int, ...]
  patch: tuple[int, ...]
  stride: tuple[int, ...] = ()
  norm: bool = True
  bias: bool = False
  class_token: bool = True
  registers: int = 0
  learned: bool = True
  class_position: bool = True
  position_filter: str = "cubic"
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Float[Array, "b *size c"]) -> tuple[Float[Array, "b n d"], Float[Array, "m d"] | None]:
    """Embeds a batch; a single image given to a clip stem is repeated along time.

    Returns:
      tokens (class token, registers, patches; positions added) and the positions alone, for the decoder, or None.

    Raises:
      ValueError: if the input's rank or size does not fit the patches.
    """
    rank, stride = len(self.patch), self.stride or self.patch
    if rank == 3 and x.ndim == 4:
      x = jnp.broadcast_to(x[:, None], (x.shape[0], self.patch[0], *x.shape[1:]))
    if x.ndim != rank + 2:
      raise ValueError(f"stem input: shape {x.shape}, allowed [b, {rank} axes, channels] for patches {self.patch}")
    grid = patch_grid(x.shape[1:-1], self.patch, stride)
    stem_grid = patch_grid(self.size, self.patch, stride)
    conv = nn.Conv(self.width, self.patch, stride, padding="VALID", use_bias=self.bias, dtype=self.dtype, name="patch")
    tokens = keep_rows(conv(x)).reshape(x.shape[0], -1, self.width)
    if self.norm:
      tokens = layer_norm("norm", dtype=self.dtype, eps=STEM_EPS)(tokens)
    first = lambda value: jnp.broadcast_to(value.astype(tokens.dtype), (x.shape[0], *value.shape[-2:]))
    positions, prefix = None, int(self.class_token and self.class_position)
    if self.class_token:
      cls_token = first(self.param("cls_token", nn.initializers.normal(self.width**-0.5), (self.width,))[None])
    if self.learned:
      shape = (prefix + math.prod(stem_grid), self.width)
      positions = self.param("positions", nn.initializers.truncated_normal(0.02), shape)
      positions = resize_positions(positions, stem_grid, grid, prefix, self.position_filter).astype(tokens.dtype)
      if prefix:
        tokens = jnp.concatenate([cls_token, tokens], axis=1) + positions
      else:
        tokens = tokens + positions
    if self.class_token and not (prefix and self.learned):
      tokens = jnp.concatenate([cls_token, tokens], axis=1)
    if self.registers:
      registers = first(self.param("registers", nn.initializers.normal(0.02), (self.registers, self.width)))
      at = int(self.class_token)
      tokens = jnp.concatenate([tokens[:, :at], registers, tokens[:, at:]], axis=1)
    return tokens, positions

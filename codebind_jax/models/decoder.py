"""Decoder of a modality: quantised tokens (and the trunk's) -> the input at about half its resolution."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from codebind_jax.models.encoder import EncoderSpec
from codebind_jax.models.stems import patch_grid
from codebind_jax.models.transformer import Block, BlockSpec, layer_norm


class Decoder(nn.Module):
  """Linear to the trunk's width, plus the trunk's tokens and positions, narrow blocks, transposed convolution.

  x = norm(linear(tokens)); x = x + norm(trunk) + positions with the same norm; linear to `width`; `depth` blocks;
  norm; class token dropped; transposed convolution (spec section 1.8).

  Attributes:
    grid: patches along each axis; the tokens are the class token followed by the grid in row-major order.
    channels: channels of the reconstruction.
    patch, stride: kernel and step of the transposed convolution along each axis; `stride` () means `patch`.
    trunk_dim: width of the trunk; 0 decodes the tokens without the trunk, with positions of the decoder's own.
    cls_token: whether tokens begin with the class token.
    width, depth, heads: of the blocks.
    remat: recompute activations in the backward pass.
    dtype: compute type; the reconstruction is float32.
  """

  grid: tuple[int, ...]
  channels: int
  patch: tuple[int, ...]
  stride: tuple[int, ...] = ()
  trunk_dim: int = 0
  cls_token: bool = True
  width: int = 512
  depth: int = 8
  heads: int = 8
  remat: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(
    self,
    tokens: Float[Array, "b n d"],
    trunk: Float[Array, "b n c"] | None = None,
    positions: Float[Array, "n c"] | None = None,
  ) -> Float[Array, "b *size k"]:
    """Reconstructs a batch.

    Args:
      tokens: `full` embedding of all tokens, clips averaged.
      trunk: trunk output of the encoder, clips averaged (`encoder.mean_clips`); needed when `trunk_dim` > 0.
      positions: the stem's positions (`Encoded.positions`); needed when `trunk_dim` > 0.

    Raises:
      ValueError: if the token count does not fit `grid`, or trunk and positions do not fit `trunk_dim`.
    """
    count = math.prod(self.grid) + self.cls_token
    if tokens.shape[1] != count:
      raise ValueError(f"tokens: {tokens.shape[1]}, allowed {count} for grid {self.grid}, cls_token {self.cls_token}")
    if (self.trunk_dim > 0) != (trunk is not None and positions is not None):
      raise ValueError(f"trunk, positions: needed with trunk_dim > 0 and only then, got trunk_dim {self.trunk_dim}")
    dense = lambda dim, name: nn.Dense(dim, dtype=self.dtype, name=name)
    if self.trunk_dim:
      norm = layer_norm("input_norm", dtype=self.dtype)
      x = norm(dense(self.trunk_dim, "input_proj")(tokens)) + norm(trunk) + positions
    else:
      x = tokens + self.param("positions", nn.initializers.truncated_normal(0.02), tokens.shape[1:])
    x = dense(self.width, "embed")(x if self.dtype is None else x.astype(self.dtype))
    block = nn.remat(Block) if self.remat else Block
    for i in range(self.depth):
      x = block(BlockSpec(self.heads, qkv_bias=False), self.dtype, name=f"blocks_{i}")(x)
    x = layer_norm("norm", dtype=self.dtype)(x[:, int(self.cls_token):])
    x = x.reshape(x.shape[0], *self.grid, self.width)
    stride = self.stride or self.patch
    deconv = nn.ConvTranspose(self.channels, self.patch, stride, padding="VALID", dtype=self.dtype, name="deconv")
    return deconv(x).astype(jnp.float32)


def decoder_for(spec: EncoderSpec, **options: Any) -> Decoder:
  """The decoder of an encoder: half the stem's patch and stride (one at least) along space and time, frames kept whole.

  Args:
    spec: the encoder's shape.
    **options: further attributes of `Decoder`, such as `width` or `depth`.

  Raises:
    ValueError: for text, which has no grid.
  """
  if spec.is_text:
    raise ValueError("decoder_for: text has one pooled token and cannot be reconstructed")
  stride = spec.stride or spec.patch
  frames = spec.patch[:1] if len(spec.patch) == 3 else ()
  half = lambda sizes: frames + tuple(max(1, n // 2) for n in sizes[len(frames):])
  options = {"trunk_dim": spec.width, **options}
  return Decoder(patch_grid(spec.size, spec.patch, stride), spec.channels, half(spec.patch), half(stride), **options)

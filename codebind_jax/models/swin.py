"""Swin transformer (arXiv 2103.14030): attention inside windows that shift between blocks, tokens merged in stages."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from codebind_jax.models.transformer import BlockSpec, Mlp, layer_norm

_EPS = 1e-5  # of all LayerNorms outside the blocks


@dataclasses.dataclass(frozen=True)
class SwinSpec:
  """Shape of a Swin transformer.

  Attributes:
    width: of the first stage's tokens; each further stage doubles it.
    depths, heads: blocks and attention heads of each stage.
    size: (height, width) of the picture.
    patch, stride: of the first convolution, which is padded where they differ.
    window: side of a window in tokens.
    mlp_ratio: width of the blocks' hidden layers over the tokens'.
    act: their activation, see `models.transformer.BlockSpec`.
    eps: of the blocks' LayerNorms.
    qkv_bias: whether queries, keys and values have a bias.
    patch_norm: LayerNorm after the convolution.
  """

  width: int
  depths: tuple[int, ...]
  heads: tuple[int, ...]
  size: tuple[int, int]
  patch: tuple[int, int] = (4, 4)
  stride: tuple[int, int] = (4, 4)
  window: int = 8
  mlp_ratio: float = 4.0
  act: str = "gelu"
  eps: float = 1e-5
  qkv_bias: bool = True
  patch_norm: bool = True


def relative_index(window: int) -> np.ndarray:
  """Row [n, n] of the table of biases for each pair of a window's n tokens: their distance along both axes."""
  at = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij")).reshape(2, -1)
  rows, columns = at[:, :, None] - at[:, None, :] + window - 1
  return rows * (2 * window - 1) + columns


def shifted_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
  """[windows, n, n]: which pairs of a window's n tokens were neighbours before the picture was shifted."""
  region = lambda n: (np.arange(n) >= n - window).astype(int) + (np.arange(n) >= n - shift)
  regions = _windows(np, (region(height)[:, None] * 3 + region(width))[None, :, :, None], window)[..., 0]
  return regions[:, :, None] == regions[:, None, :]


def _windows(np_: Any, x: Any, window: int) -> Any:
  """[b, h, w, c] -> [b * windows, window * window, c]."""
  b, h, w, c = x.shape
  x = np_.transpose(x.reshape(b, h // window, window, w // window, window, c), (0, 1, 3, 2, 4, 5))
  return x.reshape(-1, window * window, c)


def _picture(x: Array, window: int, height: int, width: int) -> Array:
  """The inverse of `_windows`."""
  x = x.reshape(-1, height // window, width // window, window, window, x.shape[-1])
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, x.shape[-1])


class WindowAttention(nn.Module):
  """Self-attention inside windows, with a learned bias for each distance.

  Attributes:
    spec: form of the block; only `heads` and `qkv_bias` matter.
    window: side of a window.
    dtype: compute type; parameters keep theirs.
  """

  spec: BlockSpec
  window: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"], mask: Bool[Array, "b 1 n n"] | None = None) -> Float[Array, "b n d"]:
    """Attends inside each window of n tokens."""
    width, heads = x.shape[-1], self.spec.heads
    if width % heads:
      raise ValueError(f"heads: {heads} does not divide the width {width}")
    qkv = nn.Dense(3 * width, self.spec.qkv_bias, dtype=self.dtype, name="qkv")(x)
    q, k, v = (part.reshape(*x.shape[:2], heads, -1) for part in jnp.split(qkv, 3, axis=-1))
    table = self.param("table", nn.initializers.truncated_normal(0.02), ((2 * self.window - 1) ** 2, heads))
    bias = table[relative_index(self.window)].transpose(2, 0, 1)[None].astype(q.dtype)
    out = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask)
    return nn.Dense(width, dtype=self.dtype, name="out")(out.reshape(x.shape))


class SwinBlock(nn.Module):
  """x + attention(norm(x)) inside windows, then x + mlp(norm(x)).

  Attributes:
    spec: form of the block.
    window: side of a window.
    shift: how far the picture is rolled before it is cut into windows.
    dtype: compute type.
  """

  spec: BlockSpec
  window: int
  shift: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    """One block; a picture that the windows do not fill is padded with zeros."""
    b, h, w, d = x.shape
    y = layer_norm("norm1", dtype=self.dtype, eps=self.spec.eps)(x)
    y = jnp.pad(y, ((0, 0), (0, -h % self.window), (0, -w % self.window), (0, 0)))
    high, wide = y.shape[1:3]
    mask = None
    if self.shift:
      y = jnp.roll(y, (-self.shift, -self.shift), (1, 2))
      mask = jnp.tile(jnp.asarray(shifted_mask(high, wide, self.window, self.shift))[:, None], (b, 1, 1, 1))
    y = WindowAttention(self.spec, self.window, self.dtype, name="attn")(_windows(jnp, y, self.window), mask)
    y = _picture(y, self.window, high, wide)
    if self.shift:
      y = jnp.roll(y, (self.shift, self.shift), (1, 2))
    x = x + y[:, :h, :w]
    flat = layer_norm("norm2", dtype=self.dtype, eps=self.spec.eps)(x).reshape(b, h * w, d)
    return x + Mlp(self.spec, self.dtype, name="mlp")(flat).reshape(x.shape)


class Swin(nn.Module):
  """Stages of Swin blocks under the names `stage_0/block_0`, ...; `merge` at the end of each stage but the last.

  Attributes:
    spec: its shape.
    remat: recompute activations in the backward pass instead of keeping them.
    dtype: compute type; parameters keep theirs.
  """

  spec: SwinSpec
  remat: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
    """Tokens of the last stage, normalised.

    Raises:
      ValueError: if the picture has another size, or a stage is smaller than a window.
    """
    spec = self.spec
    if x.shape[1:3] != spec.size:
      raise ValueError(f"picture: {x.shape[1:3]}, allowed {spec.size}")
    margin = [((p - s) // 2, (p - s) // 2) for p, s in zip(spec.patch, spec.stride)]
    x = nn.Conv(spec.width, spec.patch, spec.stride, padding=margin, dtype=self.dtype, name="patch")(x)
    norm = lambda name: layer_norm(name, dtype=self.dtype, eps=_EPS)
    x = norm("patch_norm")(x) if spec.patch_norm else x
    for i, (depth, heads) in enumerate(zip(spec.depths, spec.heads)):
      x = SwinStage(spec, i, depth, heads, self.remat, self.dtype, name=f"stage_{i}")(x)
    return norm("norm")(x.reshape(x.shape[0], -1, x.shape[-1]))


class SwinStage(nn.Module):
  """One stage: its blocks, and the merging of 2 x 2 tokens into one of twice the width where another stage follows."""

  spec: SwinSpec
  number: int
  depth: int
  heads: int
  remat: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b i j e"]:
    """The stage's tokens."""
    spec, width, side = self.spec, x.shape[-1], min(x.shape[1:3])
    if side < spec.window:
      raise ValueError(f"window: {spec.window} is larger than stage {self.number}, {x.shape[1]} x {x.shape[2]} tokens")
    form = BlockSpec(self.heads, int(spec.mlp_ratio * width), spec.act, spec.eps, spec.qkv_bias)
    block = nn.remat(SwinBlock) if self.remat else SwinBlock
    for i in range(self.depth):
      shift = spec.window // 2 if i % 2 and side > spec.window else 0
      x = block(form, spec.window, shift, self.dtype, name=f"block_{i}")(x)
    if self.number == len(spec.depths) - 1:
      return x
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    x = jnp.concatenate([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], axis=-1)
    x = layer_norm("merge_norm", dtype=self.dtype, eps=_EPS)(x)
    return nn.Dense(2 * width, use_bias=False, dtype=self.dtype, name="merge")(x)

"""Pre-LN transformer of the ImageBind family: exact GELU, optional learned key/value token, optional causal mask."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from codebind_jax.runtime.sharding import keep_rows

TRUNK_EPS = 1e-6


def layer_norm(name: str, *, dtype: Any = None, eps: float = TRUNK_EPS) -> nn.LayerNorm:
  """LayerNorm over the last axis with statistics in float32 whatever `dtype` is."""
  return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


class Linear(nn.Module):
  """Dense layer that can carry a low-rank adapter: y = x W + b + (x A) B (LoRA, arXiv 2106.09685, equation 3).

  x A is computed first, so that a frozen W needs no gradient of its size.

  Attributes:
    features: width of the output.
    use_bias: whether there is a bias b.
    rank: of the adapter; 0 for none. B starts at 0, so that nothing changes at first.
    dtype: compute type; parameters stay float32.
  """

  features: int
  use_bias: bool = True
  rank: int = 0
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
    """Applies the layer to the last axis."""
    width = x.shape[-1]
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (width, self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
    cast = lambda value: value if self.dtype is None else jnp.asarray(value, self.dtype)
    y = cast(x) @ cast(kernel)
    if self.rank:
      bound = width**-0.5
      draw = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
      a = self.param("lora_a", draw, (width, self.rank))
      y = y + cast(x) @ cast(a) @ cast(self.param("lora_b", nn.initializers.zeros, (self.rank, self.features)))
    return y if bias is None else y + cast(bias)


class Attention(nn.Module):
  """Multi-head self-attention with a fused projection `qkv` [d, 3d]; softmax in float32.

  Attributes:
    heads: number of heads; must divide the width.
    bias_kv: adds one learned key and value, appended last, which every token attends to.
    qkv_bias: whether `qkv` has a bias (towers: yes, decoder: no).
    dtype: compute type; parameters stay float32.
    lora_rank: of the adapters of `qkv` and `out`; 0 for none.
  """

  heads: int
  bias_kv: bool = False
  qkv_bias: bool = True
  dtype: Any = None
  lora_rank: int = 0

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"], mask: Bool[Array, "n n"] | None = None) -> Float[Array, "b n d"]:
    """Attends over the tokens; `mask` is True where a row may attend to a column.

    Raises:
      ValueError: if `heads` does not divide the width.
    """
    width = x.shape[-1]
    if width % self.heads:
      raise ValueError(f"heads: {self.heads} does not divide the width {width}")
    qkv = Linear(3 * width, self.qkv_bias, self.lora_rank, self.dtype, name="qkv")(x)
    q, k, v = (part.reshape(*x.shape[:2], self.heads, -1) for part in jnp.split(qkv, 3, axis=-1))
    if self.bias_kv:
      k, v = (self._append(part, name) for part, name in ((k, "bias_k"), (v, "bias_v")))
      if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (0, 1)), constant_values=True)
    out = jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[None, None])
    return Linear(width, True, self.lora_rank, self.dtype, name="out")(out.reshape(x.shape))

  def _append(self, x: Array, name: str) -> Array:
    token = self.param(name, nn.initializers.normal(x[0, 0].size ** -0.5), (x[0, 0].size,))
    token = jnp.broadcast_to(token.astype(x.dtype).reshape(x.shape[2:]), (x.shape[0], 1, *x.shape[2:]))
    return jnp.concatenate([x, token], axis=1)


class Mlp(nn.Module):
  """Two linear layers with the exact (erf) GELU between them."""

  ratio: int = 4
  dtype: Any = None
  lora_rank: int = 0

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Applies the layers to every token."""
    hidden = Linear(self.ratio * x.shape[-1], True, self.lora_rank, self.dtype, name="fc1")(x)
    return Linear(x.shape[-1], True, self.lora_rank, self.dtype, name="fc2")(nn.gelu(hidden, approximate=False))


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)). Attributes as in `Attention`."""

  heads: int
  bias_kv: bool = False
  qkv_bias: bool = True
  dtype: Any = None
  lora_rank: int = 0

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"], mask: Bool[Array, "n n"] | None = None) -> Float[Array, "b n d"]:
    """One block; see `Attention` for `mask`."""
    attention = Attention(self.heads, self.bias_kv, self.qkv_bias, self.dtype, self.lora_rank, name="attn")
    x = x + attention(layer_norm("norm1", dtype=self.dtype)(x), mask)
    return x + Mlp(dtype=self.dtype, lora_rank=self.lora_rank, name="mlp")(layer_norm("norm2", dtype=self.dtype)(x))


class Transformer(nn.Module):
  """Stack of `depth` blocks under the names `blocks_0`, `blocks_1`, ... (with `scan`: `blocks`); no norm at the end.

  Attributes:
    depth: number of blocks.
    heads, bias_kv, qkv_bias, dtype, lora_rank: as in `Attention`.
    pre_norm: LayerNorm before the first block (vision).
    causal: a token attends to itself and earlier tokens (text).
    remat: recompute activations in the backward pass instead of keeping them.
    scan: one block compiled once, its parameters [depth, ...] under `blocks`: deep trunks compile many times faster.
  """

  depth: int
  heads: int
  bias_kv: bool = False
  qkv_bias: bool = True
  pre_norm: bool = False
  causal: bool = False
  remat: bool = False
  scan: bool = False
  dtype: Any = None
  lora_rank: int = 0

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Maps tokens (with positions added) to tokens."""
    x = x if self.dtype is None else x.astype(self.dtype)
    mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool)) if self.causal else None
    if self.pre_norm:
      x = layer_norm("pre_norm", dtype=self.dtype)(x)
    options = (self.heads, self.bias_kv, self.qkv_bias, self.dtype, self.lora_rank)
    if self.scan:
      # A loop already keeps the recomputation separate; the barrier of `prevent_cse` would only cost memory.
      block = nn.remat(Block, prevent_cse=False) if self.remat else Block
      run = nn.scan(lambda block, x, mask: (block(keep_rows(x), mask), None), variable_axes={"params": 0},
                    split_rngs={"params": True}, in_axes=nn.broadcast, length=self.depth)  # fmt: skip
      return run(block(*options, name="blocks"), x, mask)[0]
    block = nn.remat(Block) if self.remat else Block
    for i in range(self.depth):
      x = block(*options, name=f"blocks_{i}")(keep_rows(x), mask)
    return x

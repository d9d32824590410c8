"""Transformer blocks of the published encoders: one form for all, described by a `BlockSpec`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from codebind_jax.runtime.sharding import keep_rows

TRUNK_EPS = 1e-6

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "swiglu": lambda x: nn.silu(x),  # of the gate, which multiplies the value
}


def layer_norm(name: str, *, dtype: Any = None, eps: float = TRUNK_EPS) -> nn.LayerNorm:
  """LayerNorm over the last axis with statistics in float32 whatever `dtype` is."""
  return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


@dataclasses.dataclass(frozen=True)
class BlockSpec:
  """Form of a block.

  Attributes:
    heads: attention heads; must divide the width.
    mlp: width of the hidden layer; 0 for 4 times the width.
    act: activation of the hidden layer: exact GELU, its tanh form, x sigmoid(1.702 x) (OpenAI's CLIP), or SwiGLU,
      where `fc1` has 2 `mlp` outputs, the gate first.
    eps: of the LayerNorms.
    qkv_bias: whether `qkv` has a bias.
    bias_kv: adds one learned key and value, appended last, which every token attends to (ImageBind's sensors).
    layer_scale: a learned factor a channel on what attention and MLP add (DINOv2).
    sub_norm: LayerNorm before the last layer of attention and MLP (EVA02-CLIP).
    mlp_norm: LayerNorm before the last layer of the MLP alone (EVA02).
    frames: of an item, which follow one another along the batch: each place first attends over them (LanguageBind's
      video); 0 for none.
    post_norm: x + norm(attention(x)) instead of x + attention(norm(x)), and so with the MLP (EVA02-CLIP enormous).
    sum_norm: norm(x + attention(x)) instead, and so with the MLP (BERT, RoBERTa).
  """

  heads: int
  mlp: int = 0
  act: Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"] = "gelu"
  eps: float = TRUNK_EPS
  qkv_bias: bool = True
  bias_kv: bool = False
  layer_scale: bool = False
  sub_norm: bool = False
  mlp_norm: bool = False
  frames: int = 0
  post_norm: bool = False
  sum_norm: bool = False


@flax.struct.dataclass
class Rope:
  """Rotary positions: each token's queries and keys are turned, channel pair by channel pair (arXiv 2104.09864).

  Attributes:
    sin, cos: [n, d] of a head's channels; 0 and 1 leave a token as it is (class tokens, registers).
    interleaved: pairs are neighbouring channels (EVA, Perception Encoder), else channels i and i + d / 2 (DINOv3).
  """

  sin: Any
  cos: Any
  interleaved: bool = flax.struct.field(pytree_node=False, default=False)

  def __call__(self, x: Float[Array, "b n h d"]) -> Float[Array, "b n h d"]:
    """The turned queries or keys, computed in float32."""
    wide = x.astype(jnp.float32)
    if self.interleaved:
      turned = jnp.stack([-wide[..., 1::2], wide[..., ::2]], axis=-1).reshape(x.shape)
    else:
      first, second = jnp.split(wide, 2, axis=-1)
      turned = jnp.concatenate([-second, first], axis=-1)
    return (wide * self.cos[:, None] + turned * self.sin[:, None]).astype(x.dtype)


def attend(
  q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"],
  mask: Bool[Array, "..."] | None = None, *, causal: bool = False,
) -> Float[Array, "b n h d"]:  # fmt: skip
  """Softmax attention; the softmax is in float32.

  cuDNN's fused kernel computes it in 16-bit types on an NVIDIA GPU, where there is no mask but the causal one. Its
  training takes even lengths alone: an odd one gets a padding token that nobody attends to.

  Args:
    q, k, v: queries, keys and values of each head.
    mask: broadcastable to [b, h, n, m], True where a query may attend to a key.
    causal: a query attends to keys up to its own place alone.
  """
  small = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
  if mask is not None or not small or not _has_cudnn():
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation="xla")
  queries, keys = q.shape[1], k.shape[1]
  if not (queries % 2 or keys % 2):
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
  even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
  lengths = lambda count: jnp.full((q.shape[0],), count, jnp.int32)
  return jax.nn.dot_product_attention(
    even(q), even(k), even(v), is_causal=causal, query_seq_lengths=lengths(queries),
    key_value_seq_lengths=lengths(keys), implementation="cudnn",
  )[:, :queries]  # fmt: skip


@functools.cache
def _has_cudnn() -> bool:
  return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version.lower()


class Attention(nn.Module):
  """Multi-head self-attention with a fused projection `qkv` [d, 3d]; softmax in float32.

  Attributes:
    spec: form of the block.
    dtype: compute type; parameters keep theirs.
    causal: a token attends to itself and earlier tokens, and to the learned one.
  """

  spec: BlockSpec
  dtype: Any = None
  causal: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], mask: Bool[Array, "..."] | None = None, rope: Rope | None = None
  ) -> Float[Array, "b n d"]:
    """Attends over the tokens; `mask` [n, n] or [b, 1, n, n] is True where a row may attend to a column.

    Raises:
      ValueError: if `heads` does not divide the width.
    """
    spec, width = self.spec, x.shape[-1]
    if width % spec.heads:
      raise ValueError(f"heads: {spec.heads} does not divide the width {width}")
    qkv = nn.Dense(3 * width, spec.qkv_bias, dtype=self.dtype, name="qkv")(x)
    q, k, v = (part.reshape(*x.shape[:2], spec.heads, -1) for part in jnp.split(qkv, 3, axis=-1))
    if rope is not None:
      q, k = rope(q), rope(k)
    causal = self.causal
    if causal and (spec.bias_kv or mask is not None):
      earlier, causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool)), False
      mask = earlier if mask is None else earlier & mask
    if spec.bias_kv:
      k, v = (self._append(part, name) for part, name in ((k, "bias_k"), (v, "bias_v")))
      if mask is not None:
        mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, 1)], constant_values=True)
    mask = mask[None, None] if mask is not None and mask.ndim == 2 else mask
    out = attend(q, k, v, mask, causal=causal).reshape(x.shape)
    if spec.sub_norm:
      out = layer_norm("norm", dtype=self.dtype, eps=spec.eps)(out)
    return nn.Dense(width, dtype=self.dtype, name="out")(out)

  def _append(self, x: Array, name: str) -> Array:
    token = self.param(name, nn.initializers.normal(x[0, 0].size ** -0.5), (x[0, 0].size,))
    token = jnp.broadcast_to(token.astype(x.dtype).reshape(x.shape[2:]), (x.shape[0], 1, *x.shape[2:]))
    return jnp.concatenate([x, token], axis=1)


class Mlp(nn.Module):
  """Two linear layers with the spec's activation between them; attributes as in `Attention`."""

  spec: BlockSpec
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Applies the layers to every token."""
    spec, width = self.spec, x.shape[-1]
    hidden, gated = spec.mlp or 4 * width, spec.act == "swiglu"
    h = nn.Dense((1 + gated) * hidden, dtype=self.dtype, name="fc1")(x)
    act = ACTIVATIONS[spec.act]
    h = act(h[..., :hidden]) * h[..., hidden:] if gated else act(h)
    if spec.sub_norm or spec.mlp_norm:
      h = layer_norm("norm", dtype=self.dtype, eps=spec.eps)(h)
    return nn.Dense(width, dtype=self.dtype, name="fc2")(h)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)), in the form of `spec`. Attributes as in `Attention`."""

  spec: BlockSpec
  dtype: Any = None
  causal: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], mask: Bool[Array, "..."] | None = None, rope: Rope | None = None
  ) -> Float[Array, "b n d"]:
    """One block; see `Attention` for `mask` and `rope`."""
    x = self._over_frames(x) if self.spec.frames else x
    attention = Attention(self.spec, self.dtype, self.causal, name="attn")
    x = self._added(x, 1, lambda y: attention(y, mask, rope))
    return self._added(x, 2, Mlp(self.spec, self.dtype, name="mlp"))

  def _over_frames(self, x: Array) -> Array:
    spec, (rows, places, width) = self.spec, x.shape
    y = x.reshape(-1, spec.frames, places, width).swapaxes(1, 2).reshape(-1, spec.frames, width)
    if spec.frames > 1:
      embedding = self.param("time_embedding", nn.initializers.normal(width**-0.5), (spec.frames, width))
      y = y + embedding.astype(y.dtype)
    norm = layer_norm("time_norm", dtype=self.dtype, eps=spec.eps)
    y = y + Attention(spec, self.dtype, name="time_attn")(norm(y))
    return y.reshape(-1, places, spec.frames, width).swapaxes(1, 2).reshape(rows, places, width)

  def _added(self, x: Array, number: int, branch: Callable[[Array], Array]) -> Array:
    norm = layer_norm(f"norm{number}", dtype=self.dtype, eps=self.spec.eps)
    if self.spec.sum_norm:
      return norm(x + branch(x))
    y = norm(branch(x)) if self.spec.post_norm else branch(norm(x))
    if self.spec.layer_scale:
      y = y * self.param(f"scale{number}", nn.initializers.ones, (x.shape[-1],)).astype(y.dtype)
    return x + y


class Transformer(nn.Module):
  """Stack of `depth` blocks under the names `blocks_0`, `blocks_1`, ... (with `scan`: `blocks`); no norm at the end.

  Attributes:
    depth: number of blocks.
    spec: form of the blocks.
    pre_norm: LayerNorm before the first block (CLIP's images).
    causal: a token attends to itself and earlier tokens (CLIP's text).
    remat: recompute activations in the backward pass instead of keeping them.
    scan: one block compiled once, its parameters [depth, ...] under `blocks`: deep trunks compile many times faster.
    dtype: compute type; parameters keep theirs.
  """

  depth: int
  spec: BlockSpec
  pre_norm: bool = False
  causal: bool = False
  remat: bool = False
  scan: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], mask: Bool[Array, "..."] | None = None, rope: Rope | None = None
  ) -> Float[Array, "b n d"]:
    """Maps tokens (with positions added) to tokens; `mask` is beside the causal one, see `Attention`."""
    # Blocks add to the tokens in float32: in 16 bits the sum would round what every block adds.
    x = x if self.dtype is None else x.astype(jnp.float32)
    if self.pre_norm:
      x = layer_norm("pre_norm", eps=self.spec.eps)(x)
    if self.scan:
      # A loop already keeps the recomputation separate; the barrier of `prevent_cse` would only cost memory.
      block = nn.remat(Block, prevent_cse=False) if self.remat else Block
      run = nn.scan(lambda block, x, mask, rope: (block(keep_rows(x), mask, rope), None), variable_axes={"params": 0},
                    split_rngs={"params": True}, in_axes=nn.broadcast, length=self.depth)  # fmt: skip
      return run(block(self.spec, self.dtype, self.causal, name="blocks"), x, mask, rope)[0]
    block = nn.remat(Block) if self.remat else Block
    for i in range(self.depth):
      x = block(self.spec, self.dtype, self.causal, name=f"blocks_{i}")(keep_rows(x), mask, rope)
    return x


class AttentionPool(nn.Module):
  """A learned query that attends to all tokens, and an MLP with a residual after it (the MAP head of SigLIP).

  Parameters: `probe` [d], `q` [d, d], `kv` [d, 2d], `out`, `norm`, `mlp`. Attributes as in `Attention`.
  """

  spec: BlockSpec
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b 1 d"]:
    """The pooled token."""
    width, dense = x.shape[-1], lambda dim, name: nn.Dense(dim, dtype=self.dtype, name=name)
    probe = self.param("probe", nn.initializers.normal(0.02), (width,)).astype(x.dtype)
    split = lambda y: y.reshape(*y.shape[:-1], self.spec.heads, -1)
    q = split(dense(width, "q")(jnp.broadcast_to(probe, (x.shape[0], 1, width))))
    k, v = (split(part) for part in jnp.split(dense(2 * width, "kv")(x), 2, axis=-1))
    pooled = dense(width, "out")(attend(q, k, v).reshape(x.shape[0], 1, width))
    normed = layer_norm("norm", dtype=self.dtype, eps=self.spec.eps)(pooled)
    return pooled + Mlp(self.spec, self.dtype, name="mlp")(normed)

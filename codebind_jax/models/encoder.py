"""One modality's encoder, stem -> trunk, described by a spec; a new sensor is a new spec (heads: `towers.py`)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from codebind_jax.models.rope import TABLES
from codebind_jax.models.stems import PatchStem
from codebind_jax.models.text import TextStem, pool_at_end
from codebind_jax.models.transformer import AttentionPool, BlockSpec, Transformer, layer_norm


@dataclasses.dataclass(frozen=True)
class EncoderSpec(BlockSpec):
  """Shape of an encoder; the fields of `BlockSpec` describe its blocks.

  Attributes:
    width, depth: of the trunk.
    size: input size without channels: (224, 224) pixels, (128, 204) mel bins x frames, (2, 224, 224) with frames
      first, (2000,) samples; (77,) tokens for text.
    patch, stride: of the stem; `patch` () means text, `stride` () means `patch`.
    channels: channels of one input; unused for text.
    stem_norm, stem_bias: LayerNorm and convolution bias of the stem.
    class_token: whether the stem puts a class token in front of the patches.
    registers: learned tokens between class token and patches, without positions.
    positions: whether the stem adds learned positions; `class_position`: also to the class token.
    position_filter: of learned positions that are resized, see `models.stems.resize_positions`.
    rope: rotary positions of the patches, a key of `models.rope.TABLES`; "" for none.
    rope_theta: base of their frequencies, where it is not the table's own.
    pre_norm: LayerNorm before the trunk.
    vocab: number of token ids, text only.
    causal: whether a text's token attends to earlier ones alone.
    pad_id: of text whose padding is masked out of the attention; -1 for none.
    out_norm: LayerNorm after the trunk, before the pooling, and so on all tokens (SigLIP's images).
    pool: the first of the encoder's tokens: the class token, the mean of the patches, an `AttentionPool`; of text, the
      token at the end mark, the last or the first one.
    pool_heads, pool_mlp: of an `AttentionPool`, where they differ from `heads` and `mlp`.
    end_id: of the end mark; -1 for the largest id in the text.
    mean_of: of a video, its number of frames, each encoded like an image (but for `frames`): tokens are the mean of
      their pooled tokens, and then all others; 0 for none.
    mean, std: of pixels in [0, 1], by channel: uint8 inputs are normalised by them, others are taken as they are.
  """

  width: int = dataclasses.field(kw_only=True)
  depth: int = dataclasses.field(kw_only=True)
  size: tuple[int, ...] = dataclasses.field(kw_only=True)
  patch: tuple[int, ...] = ()
  stride: tuple[int, ...] = ()
  channels: int = 1
  stem_norm: bool = True
  stem_bias: bool = False
  class_token: bool = True
  registers: int = 0
  positions: bool = True
  class_position: bool = True
  position_filter: Literal["cubic", "antialias"] = "cubic"
  rope: str = ""
  rope_theta: float = 100.0
  pre_norm: bool = False
  vocab: int = 49408
  causal: bool = True
  pad_id: int = -1
  out_norm: bool = False
  pool: Literal["class", "mean", "map", "end", "last", "first"] = "class"
  pool_heads: int = 0
  pool_mlp: int = 0
  end_id: int = -1
  mean_of: int = 0
  mean: tuple[float, ...] = ()
  std: tuple[float, ...] = ()

  @property
  def is_text(self) -> bool:
    """Whether inputs are token ids."""
    return not self.patch

  @property
  def blocks(self) -> BlockSpec:
    """The form of the blocks alone."""
    return BlockSpec(**{field.name: getattr(self, field.name) for field in dataclasses.fields(BlockSpec)})

  @property
  def prefix(self) -> int:
    """Number of tokens before the patches: class token and registers."""
    return self.class_token + self.registers

  def stem(self, **options: Any) -> nn.Module:
    """The stem's module."""
    if self.is_text:
      return TextStem(self.width, *self.size, self.vocab, **options)
    return PatchStem(
      self.width, self.size, self.patch, self.stride, self.stem_norm, self.stem_bias, class_token=self.class_token,
      registers=self.registers, learned=self.positions, class_position=self.class_position,
      position_filter=self.position_filter, **options,
    )  # fmt: skip

  def trunk(self, **options: Any) -> Transformer:
    """The trunk's module; causal for text."""
    options = {"causal": self.is_text and self.causal, **options}
    return Transformer(self.depth, self.blocks, pre_norm=self.pre_norm, **options)

  def example(self, batch: int = 1) -> jax.ShapeDtypeStruct:
    """Shape and type of a batch of inputs, for `jax.eval_shape` of `Encoder.init`."""
    if self.is_text:
      return jax.ShapeDtypeStruct((batch, *self.size), jnp.int32)
    return jax.ShapeDtypeStruct((batch, *self.size, self.channels), jnp.float32)


@flax.struct.dataclass
class Encoded:
  """Output of an encoder for b items of s clips.

  Attributes:
    tokens: [b * s, n, c] input of the heads, the pooled token first, clips not yet averaged: the trunk's output where
      the class token is pooled, its tokens after another pooled one, or for text the pooled token alone.
    trunk: [b * s, n, c] trunk output, all tokens, for the decoder; None for trunks that have no decoder.
    positions: [n, c] the stem's positions, for the decoder; None for none.
    clips: s.
  """

  tokens: Any
  trunk: Any = None
  positions: Any = None
  clips: int = flax.struct.field(pytree_node=False, default=1)


class Encoder(nn.Module):
  """Stem and trunk of a modality under the names `stem`, `trunk`, `norm` (of `out_norm`) and `pool` (`AttentionPool`).

  Attributes:
    spec: the encoder's shape.
    drop_text_mask: text attends to later tokens, as in the release once a text trunk has LoRA (spec section 7); for
      parity only.
    remat, scan: as in `Transformer`.
    dtype: compute type; parameters keep theirs.
  """

  spec: EncoderSpec
  drop_text_mask: bool = False
  remat: bool = False
  scan: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Shaped[Array, "b ..."], train: bool = False) -> Encoded:
    """Encodes a batch shaped as `spec.example(b)`, or with a clip axis after the batch axis, or images for a clip stem.

    Raises:
      ValueError: if the input's shape does not fit the spec.
    """
    spec, clips = self.spec, 1
    if spec.mean_of and x.shape[1:2] != (spec.mean_of,):
      raise ValueError(f"video: shape {x.shape}, allowed [b, {spec.mean_of} frames, height, width, channels]")
    if not (len(spec.patch) == 3 and x.ndim == 4):
      x, clips = fold_clips(x, len(spec.size) + (not spec.is_text))
    x = normalised(spec, x)
    tokens, positions = spec.stem(dtype=self.dtype, name="stem")(x)
    rope = TABLES[spec.rope](spec, x.shape[1:-1]) if spec.rope else None
    mask = (x != spec.pad_id)[:, None, None] if spec.is_text and spec.pad_id >= 0 else None
    causal = spec.is_text and spec.causal and not self.drop_text_mask
    run = spec.trunk(causal=causal, remat=self.remat, scan=self.scan, dtype=self.dtype, name="trunk")
    trunk = run(tokens, mask, rope)
    if spec.out_norm:
      trunk = layer_norm("norm", dtype=self.dtype, eps=spec.eps)(trunk)
    tokens = self._pooled(trunk, x)
    if spec.mean_of:
      tokens = tokens.reshape(-1, spec.mean_of, *tokens.shape[1:])
      rest = tokens[:, :, 1:].reshape(tokens.shape[0], -1, tokens.shape[-1])
      return Encoded(jnp.concatenate([tokens[:, :, :1].mean(axis=1), rest], axis=1))
    return Encoded(tokens, trunk, positions, clips)

  def _pooled(self, trunk: Array, x: Array) -> Array:
    spec = self.spec
    if spec.pool == "class":
      return pool_at_end(trunk, x) if spec.is_text else trunk
    if spec.pool == "end":
      return pool_at_end(trunk, x, spec.end_id)
    if spec.pool in ("last", "first"):
      return trunk[:, -1:] if spec.pool == "last" else trunk[:, :1]
    if spec.pool == "mean":
      pooled = trunk[:, spec.prefix :].mean(axis=1, keepdims=True)
    else:
      form = dataclasses.replace(spec.blocks, heads=spec.pool_heads or spec.heads, mlp=spec.pool_mlp or spec.mlp)
      pooled = AttentionPool(form, self.dtype, name="pool")(trunk)
    return jnp.concatenate([pooled, trunk], axis=1)


def normalised(spec: EncoderSpec, x: Shaped[Array, "b ..."]) -> Shaped[Array, "b ..."]:
  """uint8 pixels by the encoder's mean and deviation, float32; other inputs as they are."""
  if x.dtype != jnp.uint8:
    return x
  return (x.astype(jnp.float32) / 255.0 - jnp.asarray(spec.mean)) / jnp.asarray(spec.std)


def fold_clips(x: Shaped[Array, "b ..."], item_rank: int) -> tuple[Shaped[Array, "n ..."], int]:
  """Folds a clip axis [b, s, ...] into the batch; each clip of a recording is encoded alone.

  Args:
    x: input without (`item_rank` + 1 axes) or with (`item_rank` + 2) a clip axis after the batch axis.
    item_rank: axes of one item, channels included.

  Returns:
    the input with b * s rows, and s (1 where there was no clip axis).

  Raises:
    ValueError: for any other rank.
  """
  if x.ndim == item_rank + 1:
    return x, 1
  if x.ndim != item_rank + 2:
    raise ValueError(f"input: shape {x.shape}, allowed {item_rank + 1} axes, or {item_rank + 2} with clips")
  return x.reshape(-1, *x.shape[2:]), x.shape[1]


def mean_clips(x: Float[Array, "n ..."], clips: int) -> Float[Array, "b ..."]:
  """Mean over the clips that `fold_clips` put into the batch.

  The release takes the mean of normalised features (`norm.unit` first), and of trunk tokens for the decoder.
  """
  return x if clips == 1 else x.reshape(-1, clips, *x.shape[1:]).mean(1)

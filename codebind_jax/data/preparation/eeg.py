"""Recordings of EEG as patches in time."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from codebind_jax.data.reading import name_of
from codebind_jax.data.transforms import eeg as eeg_transforms


def patches(eeg: Float[np.ndarray, "channels samples"], width: int) -> Float[np.ndarray, "n channels"]:
  """Mean over bins of `width` samples; samples left over at the end are dropped.

  >>> patches(np.array([[1.0, 3.0, 5.0, 7.0, 9.0]]), 2)
  array([[2.],
         [6.]])
  """
  channels, samples = eeg.shape
  count = samples // width
  return eeg[:, : count * width].reshape(channels, count, width).mean(axis=2).T


@dataclasses.dataclass(frozen=True)
class Patches:
  """Patches of recordings of one shape.

  Attributes:
    channels, samples: of every recording.
    width: samples a patch.
  """

  channels: int
  samples: int
  width: int

  def __call__(self, value: Any) -> Float32[np.ndarray, "n channels"]:
    """Patches of a path, bytes or array.

    Raises:
      ValueError: as `data.transforms.eeg.read`, or for a recording of another shape.
    """
    eeg = eeg_transforms.read(value)
    if eeg.shape != (self.channels, self.samples):
      turned = "; is the array transposed?" if eeg.shape == (self.samples, self.channels) else ""
      raise ValueError(f"{name_of(value, 'eeg')}: got {eeg.shape[0]} channels of {eeg.shape[1]} samples, allowed: "
                       f"{self.channels} of {self.samples}{turned}")  # fmt: skip
    return patches(eeg, self.width)

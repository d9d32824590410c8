"""Random views of EEG [channels, samples]: shifted, scaled, with noise, without some channels or some of the time."""

import dataclasses

import numpy as np
from jaxtyping import Float

from codebind_jax.data.augment import Checked, image, revision
from codebind_jax.data.transforms.eeg import LARGEST, SMALLEST


@dataclasses.dataclass(frozen=True)
class Series(Checked):
  """A random view of a recording, in its unit and of its shape.

  The kinds of change are those of SeqCLR (Mohsenvand et al. 2020: shift, scale, noise, zero-masking), and channel
  dropout (Saeed et al. 2021); the ranges are ours, narrower, since epochs of a second are far shorter than theirs.

  Attributes:
    shift: largest move in time to either side, as a share of the samples; what it uncovers repeats the first, or the
      last, sample of each channel.
    scale: smallest and largest factor on all values.
    noise: largest deviation of Gaussian noise, as a share of each channel's own deviation; it is drawn from 0 to it.
    drop: probability of each channel to become its mean, as one whose electrode is off; one channel stays always.
    mask: largest share of the samples that become each channel's mean; one stretch, its share drawn from 0 to it.
    revision: of this code; not for setting.
  """

  shift: image.Share = 0.02
  scale: image.Positive = (0.8, 1.25)
  noise: image.Size = 0.1
  drop: image.Share = 0.1
  mask: image.Share = 0.1
  revision: str = revision("series-1")

  def __call__(
    self, value: Float[np.ndarray, "channels samples"], rng: np.random.Generator
  ) -> Float[np.ndarray, "channels samples"]:
    """One random view, of the value's type."""
    channels, samples = value.shape
    reach = int(self.shift * samples)
    seen = moved(value, int(rng.integers(-reach, reach + 1))).astype(np.float64)
    seen *= rng.uniform(*self.scale)
    mean, deviation = seen.mean(axis=1, keepdims=True), seen.std(axis=1, keepdims=True)
    if self.noise:
      seen += rng.standard_normal(seen.shape) * deviation * rng.uniform(0.0, self.noise)
    off = rng.random(channels) < self.drop
    off[rng.integers(channels)] = False
    seen = np.where(off[:, None], mean, seen)
    length = int(rng.uniform(0.0, self.mask) * samples)
    start = int(rng.integers(0, samples - length + 1))
    seen[:, start : start + length] = mean
    # Where the view is read again, larger values are refused, and only smaller ones are taken for volts.
    largest = max(LARGEST, float(np.abs(value).max()))
    seen = np.clip(seen, -largest, largest).astype(value.dtype)
    return value.copy() if 0.0 < np.abs(seen).max() < SMALLEST else seen


def moved(value: np.ndarray, by: int) -> np.ndarray:
  """The samples of each channel moved later by `by`, or earlier; the first or last one is repeated.

  >>> moved(np.array([[1, 2, 3, 4]]), 1)
  array([[1, 1, 2, 3]])
  """
  return np.take(value, np.clip(np.arange(value.shape[1]) - by, 0, value.shape[1] - 1), axis=1)

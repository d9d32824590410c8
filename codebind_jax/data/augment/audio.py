"""Random views of sounds: another window, louder, with noise, of the other sign; and masks of spectrograms."""

import dataclasses
import math
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Float32

from codebind_jax.data.augment import Checked, image, revision, span
from codebind_jax.data.transforms.audio import LOUDEST, RATE
from codebind_jax.schema import above, at_least, at_most


@dataclasses.dataclass(frozen=True)
class Waveform(Checked):
  """A random view of a sound.

  The changes are those of the package audiomentations, by half as much: its gain is 12 dB to either side, its
  signal-to-noise ratio 5 to 40 dB; 10 s is the length of AudioSet's sounds and of CLAP's input.

  Attributes:
    seconds: length of the window, whose position is drawn; a shorter sound is taken whole, and 0 takes any sound whole.
    gain: largest gain to either side, decibels.
    noise: probability that white noise is added.
    snr: smallest and largest ratio of the window's power to the noise's, decibels.
    polarity: probability that the sign changes.
    rate: of arrays, samples a second, which is that of `transforms.audio.read` unless a trunk reads sounds at its own
      (CLAP at 48,000); a sound that has a `rate` tells its own.
    revision: of this code; not for setting.
  """

  seconds: Annotated[float, at_least(0, "the whole sound"), at_most(86_400)] = 10.0
  gain: image.Size = 6.0
  noise: image.Share = 0.5
  snr: Annotated[tuple[float, float], span(-1000, 1000)] = (20.0, 40.0)
  polarity: image.Share = 0.5
  rate: Annotated[int, above(0), at_most(10_000_000)] = RATE
  revision: str = revision("waveform-1")

  def __call__(self, value: Any, rng: np.random.Generator) -> Any:
    """One random view of samples [n] or [n, channels], or of a dataclass that has such `samples`, and a `rate`.

    Samples are an array, or what has slices as one. Full scale is 1; what goes beyond what the transform lets pass (8)
    is cut.
    """
    if dataclasses.is_dataclass(value):
      return dataclasses.replace(value, samples=self._view(value.samples, value.rate, rng))
    return self._view(value, self.rate, rng)

  def _view(
    self, samples: Any, rate: int | float, rng: np.random.Generator
  ) -> Float32[np.ndarray, "m *channels"]:
    length = int(self.seconds * rate) or len(samples)
    start = int(rng.integers(0, max(len(samples) - length, 0) + 1))
    decibels, sign = rng.uniform(-self.gain, self.gain), -1.0 if rng.random() < self.polarity else 1.0
    noisy, ratio = rng.random() < self.noise, rng.uniform(*self.snr)
    seen = samples[start : start + length].astype(np.float32, copy=False)
    if noisy:
      deviation = math.sqrt(np.square(seen).mean(dtype=np.float64)) * 10.0 ** (-ratio / 20.0)
      seen = seen + rng.standard_normal(seen.shape, np.float32) * np.float32(deviation)
    return np.clip(seen * np.float32(sign * 10.0 ** (decibels / 20.0)), -LOUDEST, LOUDEST)


@dataclasses.dataclass(frozen=True)
class Spectrogram(Checked):
  """Masks in time and band (SpecAugment, Park et al. 2019), for inputs whose decoded value is a spectrogram.

  Masked values become the mean of the whole. Paper's LD policy: two masks each, of up to 27 of 80 bands and 100 frames;
  the defaults are one each, of up to a tenth.

  Attributes:
    times: number of masks in time.
    time: largest width of each, as a share of the frames; a width is drawn from 0 to it.
    bands: number of masks of bands.
    band: largest width of each, as a share of the bands.
    revision: of this code; not for setting.
  """

  times: Annotated[int, at_least(0, "none"), at_most(1000)] = 1
  time: image.Share = 0.1
  bands: Annotated[int, at_least(0, "none"), at_most(1000)] = 1
  band: image.Share = 0.1
  revision: str = revision("spectrogram-1")

  def __call__(
    self, value: Float[np.ndarray, "*lead frames bands"], rng: np.random.Generator
  ) -> Float[np.ndarray, "*lead frames bands"]:
    """One random view; leading axes (channels, clips) are masked alike."""
    frames, bands = value.shape[-2:]
    seen, mean = value.copy(), value.mean(dtype=np.float64)
    for start, stop in stretches(self.times, self.time, frames, rng):
      seen[..., start:stop, :] = mean
    for start, stop in stretches(self.bands, self.band, bands, rng):
      seen[..., start:stop] = mean
    return seen


def stretches(count: int, share: float, length: int, rng: np.random.Generator) -> list[tuple[int, int]]:
  """`count` random stretches [start, stop) of `length` places, each of at most a share of them."""
  widths = rng.integers(0, int(share * length) + 1, count)
  starts = [int(rng.integers(0, length - int(width) + 1)) for width in widths]
  return [(start, start + int(width)) for start, width in zip(starts, widths)]

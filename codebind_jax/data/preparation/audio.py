"""Sounds as encoders want them: log-mel spectrograms, whole or in chunks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from codebind_jax.data.preparation import spectrograms
from codebind_jax.data.preparation.long_sounds import LongMono, LongSound, long_sound
from codebind_jax.data.reading import name_of
from codebind_jax.data.transforms import audio as audio_transforms

FRAMES, BANDS = 100, 96  # of a chunk
_HOP = FRAMES // 2
_ABSENT = -1.0  # fills chunks that a sound does not have; no log-mel value is below 0


@dataclasses.dataclass(frozen=True)
class Sound:
  """A sound at its own rate: samples [n, channels] and Hz; those of a very long one are read where they are asked for.
  """

  samples: np.ndarray | LongSound
  rate: int


def sound(value: Any) -> Sound:
  """A sound of a path, bytes, or an array [n] or [n, channels] at 44,100 Hz, neither mixed nor resampled.

  ImageBind and LanguageBind take the first channel: where that is silent, a louder one is moved to its place.

  Raises:
    ValueError: naming the file, as `data.transforms.audio.read` does.
  """
  if isinstance(value, Sound):
    return value
  if (long := long_sound(value)) is not None:
    return Sound(long.first_channel(), long.rate)
  samples, rate = audio_transforms.read_channels(value)
  return Sound(audio_transforms.first_channel(samples, name_of(value, "audio")), rate)


@dataclasses.dataclass(frozen=True)
class Mel:
  """Sound -> CLAP's log-mel spectrogram (transformers' ClapFeatureExtractor with truncation "rand_trunc").

  A longer sound is cut to its middle, where the original takes a random part. A shorter one is repeated as often as it
  fits whole ("repeatpad"), repeated and cut ("repeat"), or not ("pad"); zeros fill the rest.

  Attributes:
    rate: Hz.
    length: samples of an item.
    padding: of a shorter sound.
    window, hop, bands, low, high: as in `spectrograms.decibel_mel`.
  """

  rate: int = 48_000
  length: int = 480_000
  padding: str = "repeatpad"
  window: int = 1024
  hop: int = 480
  bands: int = 64
  low: float = 50.0
  high: float = 14_000.0

  @property
  def shape(self) -> tuple[int, int]:
    """Frames and bands of an item."""
    return self.length // self.hop + 1, self.bands

  def read(self, value: Any) -> Float32[np.ndarray, " n"]:
    """Mono samples at `rate` of a path, bytes or an array at 44,100 Hz, see `data.transforms.audio.mono`.

    Of a sound that is too long to be held, its middle.

    Raises:
      ValueError: as of `data.transforms.audio.read`.
    """
    if (long := long_sound(value, self.rate)) is not None:
      samples = LongMono(long, self.rate)
      start = (len(samples) - self.length) // 2
      return samples[start : start + self.length]
    samples, rate = audio_transforms.read_channels(value)
    name = name_of(value, "audio")
    return audio_transforms.resample(audio_transforms.mono(samples, name, rate), rate, self.rate, name)

  def __call__(self, samples: Float[np.ndarray, " n"]) -> Float32[np.ndarray, "frames bands"]:
    """The spectrogram of samples at `rate`."""
    n = len(samples)
    if n > self.length:
      start = (n - self.length) // 2
      samples = samples[start : start + self.length]
    elif n < self.length:
      times = {"repeatpad": self.length // n, "repeat": self.length // n + 1}.get(self.padding, 1)
      samples = np.tile(samples, times)[: self.length]
      samples = np.pad(samples, (0, self.length - len(samples)))
    return spectrograms.decibel_mel(
      samples, self.rate, window=self.window, hop=self.hop, bands=self.bands, low=self.low, high=self.high)  # fmt: skip


def chunks_of(mel: Float32[np.ndarray, "frames bands"], most: int) -> Float32[np.ndarray, "most 100 bands"]:
  """Chunks of 100 frames, one every 50, evenly thinned to at most `most`; missing ones are filled with -1.

  Args:
    mel: log-mel spectrogram of at least 100 frames; the remainder at the end is dropped, as in the release.
    most: number of chunks returned.
  """
  starts = _starts(len(mel), most)
  out = np.full((most, FRAMES, mel.shape[1]), _ABSENT, np.float32)
  for row, start in zip(out, starts):
    row[:] = mel[start : start + FRAMES]
  return out


def _starts(frames: int, most: int) -> np.ndarray:
  """First frames of the chunks."""
  starts = np.arange(0, frames - FRAMES + 1, _HOP)
  return starts[np.linspace(0, len(starts) - 1, most).round().astype(int)] if len(starts) > most else starts


@dataclasses.dataclass(frozen=True)
class Chunks:
  """Log-mel chunks of a sound, see `chunks_of`; a sound shorter than one chunk is repeated.

  Attributes:
    most: number of chunks.
  """

  most: int

  def read(self, value: Any) -> Any:
    """`data.transforms.audio.read`, but for a sound that is too long to be held: what has its slices."""
    if (long := long_sound(value)) is not None:
      return LongMono(long, audio_transforms.RATE)
    return value if isinstance(value, LongMono) else audio_transforms.read(value)

  def __call__(self, value: Any) -> Float32[np.ndarray, "most 100 96"]:
    """Chunks of a path, bytes or array."""
    value = self.read(value)
    if isinstance(value, LongMono):
      starts = _starts(spectrograms.sfx_frames(value), self.most)
      return np.stack([spectrograms.sfx_part(value, int(start), FRAMES, value.peak) for start in starts])
    samples = spectrograms.loop_to(value, (FRAMES - 1) * 1024)
    if len(samples) > audio_transforms.LONG_SOUND:
      starts = _starts(spectrograms.sfx_frames(samples), self.most)
      return np.stack([spectrograms.sfx_part(samples, int(start), FRAMES) for start in starts])
    return chunks_of(spectrograms.sfx_log_mel(samples), self.most)

"""Log-mel spectrograms of sounds as trunks take them: aiSFX's, CLAP's, Kaldi's and ImageBind's, whole or in parts."""

import functools
import math
from collections.abc import Sized
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from codebind_jax.data.transforms import audio

IMAGEBIND_RATE = 16_000
IMAGEBIND_MEAN, IMAGEBIND_STD = -4.268, 9.138
_TINY = np.finfo(np.float32).eps


def loop_to(samples: Float[np.ndarray, " n"], length: int) -> Float[np.ndarray, " m"]:
  """The samples repeated and cut to `length`; a longer sound is returned whole."""
  if len(samples) >= length:
    return samples
  return np.tile(samples, -(-length // len(samples)))[:length]


def _triangles(frequencies: np.ndarray, bands: int, low: float, high: float, to_mel: Any) -> np.ndarray:
  """Weights [bands, frequencies] of overlapping triangles, straight on the mel axis and equally spaced there."""
  mel = to_mel(frequencies)
  edges = np.linspace(to_mel(np.float64(low)), to_mel(np.float64(high)), bands + 2)
  rise = (mel - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
  fall = (edges[2:, None] - mel) / (edges[2:] - edges[1:-1])[:, None]
  return np.maximum(0.0, np.minimum(rise, fall))


@functools.cache
def _sfx_bank() -> np.ndarray:
  """Weights [96, 1025] that sum to 1 in each band: HTK mel scale, 0 to 22,050 Hz."""
  high = audio.RATE / 2
  weights = _triangles(np.linspace(0, high, 1025), 96, 0.0, high, lambda f: 2595.0 * np.log10(1.0 + f / 700.0))
  return (weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-10)).astype(np.float32)


@functools.cache
def _kaldi_bank(bands: int) -> np.ndarray:
  """Weights [bands, 257]: Kaldi's mel scale, 20 to 8,000 Hz; the bin at 8,000 Hz has weight 0."""
  to_mel = lambda f: 1127.0 * np.log1p(f / 700.0)
  weights = _triangles(np.arange(256) * IMAGEBIND_RATE / 512, bands, 20.0, 8000.0, to_mel)
  return np.pad(weights, ((0, 0), (0, 1))).astype(np.float32)


def _power(frames: np.ndarray, size: int) -> np.ndarray:
  spectrum = np.fft.rfft(frames, size, axis=1)
  return (spectrum.real**2 + spectrum.imag**2).astype(np.float32)


def sfx_log_mel(samples: Float[np.ndarray, " n"]) -> Float32[np.ndarray, "frames 96"]:
  """aiSFX's input (Kim et al., ISMIR 2022): log10(1 + 10^4 mel) of the peak-normalised sound, brought to about 0 to 1.

  Window 2,048 (Hann), hop 1,024, frames centred on multiples of the hop with zeros outside, power spectrum, 96 bands
  whose weights sum to 1; divided by 9.4578, the largest value in the training data of the network.

  Args:
    samples: mono at 44,100 Hz.
  """
  samples = samples / _peak(samples)
  padded = np.pad(samples.astype(np.float32), 1024)
  padded = np.pad(padded, (0, max(0, 2048 - len(padded))))
  frames = np.lib.stride_tricks.sliding_window_view(padded, 2048)[::1024]
  window = (0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(2048) / 2048)).astype(np.float32)
  return np.log10(1.0 + 1e4 * (_power(frames * window, 2048) @ _sfx_bank().T)) / np.float32(9.457798957824707)


def _peak(samples: np.ndarray) -> float:
  return max(float(samples.max()), -float(samples.min()), 1e-9)


def sfx_frames(samples: Sized) -> int:
  """How many frames `sfx_log_mel` gives."""
  return 1 + len(samples) // 1024


def sfx_part(samples: Any, first: int, frames: int, peak: float = 0.0) -> Float32[np.ndarray, "frames 96"]:
  """Some frames of `sfx_log_mel` of a long sound, without the others.

  Args:
    samples: mono at 44,100 Hz, an array or what has slices as one.
    first: number of the first frame.
    frames: how many.
    peak: largest size of a sample, which the sound is divided by; the array's own for 0.
  """
  low, high = first * 1024 - 1024, (first + frames) * 1024
  part = samples[max(low, 0) : high] / (peak or _peak(samples))
  part = np.pad(part.astype(np.float32), (max(-low, 0), max(high - max(low, 0) - len(part), 0)))
  windows = np.lib.stride_tricks.sliding_window_view(part, 2048)[::1024][:frames]
  window = (0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(2048) / 2048)).astype(np.float32)
  return np.log10(1.0 + 1e4 * (_power(windows * window, 2048) @ _sfx_bank().T)) / np.float32(9.457798957824707)


def _slaney_mel(hertz: np.ndarray) -> np.ndarray:
  """Slaney's mel scale: linear up to 1,000 Hz, logarithmic above."""
  return np.where(hertz < 1000.0, 0.015 * hertz, 15.0 + np.log(np.maximum(hertz, 1e-9) / 1000.0) * (27.0 / np.log(6.4)))


@functools.cache
def _slaney_bank(rate: int, window: int, bands: int, low: float, high: float) -> np.ndarray:
  """Weights [window / 2 + 1, bands] of triangles that are straight in hertz and have the same area."""
  mel = np.linspace(*_slaney_mel(np.array([low, high])), bands + 2)
  edges = np.where(mel < 15.0, mel / 0.015, 1000.0 * np.exp((np.log(6.4) / 27.0) * (mel - 15.0)))
  hertz = np.linspace(0, rate // 2, window // 2 + 1)[:, None]
  rise = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
  fall = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
  return np.maximum(0.0, np.minimum(rise, fall)) * (2.0 / (edges[2:] - edges[:-2]))


def decibel_mel(
  samples: Float[np.ndarray, " n"], rate: int = 48_000, *, window: int = 1024, hop: int = 480, bands: int = 64,
  low: float = 50.0, high: float = 14_000.0,
) -> Float32[np.ndarray, "frames bands"]:  # fmt: skip
  """Log-mel spectrogram in decibels, at least -100, on Slaney's mel scale; the defaults are CLAP's.

  Frames are centred on multiples of the hop, the sound is mirrored at its ends.

  Args:
    samples: mono.
    rate: of the samples, Hz.
    window: Hann window, samples.
    hop: step between frames, samples.
    bands: number of mel bands.
    low, high: their range, Hz.
  """
  padded = np.pad(samples.astype(np.float64), window // 2, mode="reflect")
  frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
  hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(window) / window)
  # complex64 is what the original keeps, so that silence has its noise.
  spectrum = np.fft.rfft(frames * hann, axis=1).astype(np.complex64)
  power = np.abs(spectrum).astype(np.float64) ** 2
  mel = np.maximum(power @ _slaney_bank(rate, window, bands, low, high), 1e-10)
  return (10.0 * np.log10(mel)).astype(np.float32)


def kaldi_log_mel(samples: Float[np.ndarray, " n"], bands: int = 128) -> Float32[np.ndarray, "frames bands"]:
  """Kaldi's filter bank as ImageBind calls it: 25 ms every 10 ms, Hann, natural logarithm, no dither.

  Per frame: mean taken off, pre-emphasis 0.97, window, power of a 512-point spectrum. A sound shorter than one frame
  is filled up with zeros, where Kaldi has no frame and the original would hear silence.

  Args:
    samples: mono at 16,000 Hz.
    bands: of the mel scale; ImageBind has 128.
  """
  centred = samples.astype(np.float64) - samples.mean(dtype=np.float64)
  centred = np.pad(centred, (0, max(0, 400 - len(centred))))
  frames = np.lib.stride_tricks.sliding_window_view(centred, 400)[::160]
  frames = frames - frames.mean(axis=1, keepdims=True)
  frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
  window = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(400) / 399)
  return np.log(np.maximum(_power(frames * window, 512) @ _kaldi_bank(bands).T, _TINY))


def _at_imagebind_rate(samples: np.ndarray, rate: int) -> np.ndarray:
  columns = samples.reshape(len(samples), -1).T
  return np.stack([audio.sinc_resample(np.ascontiguousarray(column), rate, IMAGEBIND_RATE) for column in columns])


def imagebind_part(samples: Any, rate: int, start: int, stop: int) -> Float32[np.ndarray, "channels m"]:
  """Some samples of a long sound at 16,000 Hz by `sinc_resample`, without the others.

  Args:
    samples: [n] or [n, channels], an array or what has slices as one.
    rate: of the samples, Hz.
    start, stop: of the result, at 16,000 Hz.
  """
  old, new = (hertz // math.gcd(rate, IMAGEBIND_RATE) for hertz in (rate, IMAGEBIND_RATE))
  # Of whole periods around the part, as the filter reaches beyond it.
  reach = math.ceil(6 * old / (0.99 * min(old, new))) // old + 2
  first, last = max(start // new - reach, 0), stop // new + 1 + reach
  part = _at_imagebind_rate(samples[first * old : last * old], rate)
  return part[:, start - first * new : stop - first * new]


def imagebind_log_mel(
  samples: Any, rate: int = audio.RATE, *, clips: int = 3, seconds: float = 2.0,
  frames: int = 204,
) -> Float32[np.ndarray, "clips 128 frames 1"]:
  """ImageBind's audio input: clips of 2 s, evenly spaced, as spectrograms with mean -4.268 and deviation 9.138 removed.

  Of the first channel. As in the release, a clip's spectrogram is filled with zeros or cut to `frames` before it is
  normalised, a sound shorter than a clip is taken whole, and the mean of all channels is taken off each clip in place,
  so that clips which overlap are shifted again (seen where a clip begins or ends inside another one's frame).

  Args:
    samples: [n] or [n, channels], an array or what has slices as one.
    rate: of the samples, Hz.
    clips: how many, from the beginning to the end of the sound.
    seconds: length of a clip.
    frames: spectrogram frames of a clip.

  Raises:
    ValueError: if there is no clip.
  """
  if clips < 1:
    raise ValueError(f"clips: got {clips}, allowed are 1 and up")
  old, new = (hertz // math.gcd(rate, IMAGEBIND_RATE) for hertz in (rate, IMAGEBIND_RATE))
  length = -(-len(samples) * new // old)
  long = len(samples) > audio.BLOCK
  wave = None if long else _at_imagebind_rate(samples, rate)
  step = max(length / IMAGEBIND_RATE - seconds, 0.0) / max(clips - 1, 1)
  out = np.zeros((clips, frames, 128), np.float32)
  for i, row in enumerate(out):
    start, stop = int(i * step * IMAGEBIND_RATE), min(int((i * step + seconds) * IMAGEBIND_RATE), length)
    clip = imagebind_part(samples, rate, start, stop) if long else wave[:, start:stop]
    clip -= clip.mean()
    mel = kaldi_log_mel(clip[0])[:frames]
    row[: len(mel)] = mel
  return ((out - IMAGEBIND_MEAN) / IMAGEBIND_STD).astype(np.float32).transpose(0, 2, 1)[..., None]

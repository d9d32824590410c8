"""Items as LanguageBind prepares them (arXiv 2310.01852): float values, resized as the original resizes them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from codebind_jax.data.interpolation import antialias_matrix, cubic_matrix, linear_matrix
from codebind_jax.data.preparation import spectrograms
from codebind_jax.data.preparation.audio import Sound, sound
from codebind_jax.data.preparation.pictures import CLIP_MEAN, CLIP_STD, middle
from codebind_jax.data.transforms import audio as audio_transforms
from codebind_jax.data.transforms import depth as depth_transforms
from codebind_jax.data.transforms import image as image_transforms
from codebind_jax.data.transforms import thermal as thermal_transforms
from codebind_jax.data.transforms import video as video_transforms

AUDIO_MEAN, AUDIO_STD = -4.2677393, 4.5689974  # where config.json does not say


def fitted(
  x: np.ndarray, side: int, matrix: Callable[[int, int], np.ndarray], longer: Callable[[int, int, int], int]
) -> np.ndarray:
  """Values [..., h, w, c], the shorter side brought to `side` by the matrix's weights, and the middle square.

  Args:
    x: the values.
    side: of the result.
    matrix: (size, new size) -> weights [new size, size].
    longer: (the longer side, the shorter one, `side`) -> the longer side's new size.
  """
  x = middle(x)
  h, w = x.shape[-3:-1]
  new = tuple(side if n == min(h, w) else longer(n, min(h, w), side) for n in (h, w))
  for axis, n in ((x.ndim - 3, new[0]), (x.ndim - 2, new[1])):
    if x.shape[axis] != n:
      weights = matrix(x.shape[axis], n).astype(np.float32)
      x = np.moveaxis(np.tensordot(weights, x, axes=(1, axis)), 0, axis)
  top, left = (round((n - side) / 2) for n in new)
  return x[..., top : top + side, left : left + side, :]


def normalised(x: np.ndarray) -> Float32[np.ndarray, "*size 3"]:
  """Values in [0, 1] with CLIP's mean and deviation removed."""
  return ((x - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Prepare:
  """An item in LanguageBind's form.

  Attributes:
    modality: of the item.
    size: of the encoder's input, (224, 224), or (bins, frames) of a spectrogram.
    frames: of a video.
    farthest: of depth maps in metres, which becomes 1; 0 for each map's own.
    mean, std: of spectrograms.
    antialias: whether pictures and depth maps that shrink are smoothed: not with torchvision 0.14, which the original
      asks for; with newer ones, yes.
  """

  modality: str
  size: tuple[int, ...]
  frames: int = 1
  farthest: float = 10.0
  mean: float = AUDIO_MEAN
  std: float = AUDIO_STD
  antialias: bool = False

  def read(self, value: Any) -> Any:
    """The decoded value of a path, bytes or array."""
    if self.modality == "image":
      return image_transforms.read(value)
    if self.modality == "video":
      return video_transforms.read_clips(value, 1, math.inf, self.frames)[0]
    if self.modality == "audio":
      return sound(value)
    return depth_transforms.read(value) if self.modality == "depth" else thermal_picture(value)

  def __call__(self, value: Any) -> Float32[np.ndarray, "..."]:
    """The prepared item, of a decoded or of a raw value."""
    value = self.read(value)
    if self.modality == "audio":
      return self._spectrogram(value)
    if self.modality == "video":
      # The original normalises first; both orders give the same.
      longer = lambda long, short, side: math.floor(long / short * side)
      return normalised(fitted(value.astype(np.float32) / 255, self.size[0], linear_matrix, longer))
    matrix = antialias_matrix if self.antialias else cubic_matrix
    if self.modality == "depth":
      depth = np.maximum(value, 0.01)
      depth = np.minimum(depth, self.farthest) / self.farthest if self.farthest else depth / depth.max()
      pixels = np.repeat(depth[..., None], 3, axis=-1).astype(np.float32)
    else:
      pixels = value.astype(np.float32) / 255
    return normalised(fitted(pixels, self.size[0], matrix, lambda long, short, side: int(side * long / short)))

  def _spectrogram(self, value: Sound) -> np.ndarray:
    bins, length = self.size
    rate = spectrograms.IMAGEBIND_RATE
    if len(value.samples) > audio_transforms.BLOCK:
      return self._parts(value)
    wave = audio_transforms.sinc_resample(np.ascontiguousarray(value.samples[:, 0]), value.rate, rate)
    whole = length * rate // 100
    if len(wave) <= whole:
      wave = np.tile(wave, whole // len(wave))
      mel = spectrograms.kaldi_log_mel(np.pad(wave, (0, whole - len(wave))), bins)
      starts = [0, 0, 0]
    else:
      mel = spectrograms.kaldi_log_mel(wave, bins)
      starts = _thirds(len(mel) - length)
    out = np.zeros((3, length, bins), np.float32)
    for part, start in zip(out, starts):
      part[: len(mel) - start] = mel[start : start + length]
    return self._normalised(out)

  def _parts(self, value: Sound) -> np.ndarray:
    """The spectrogram of a long sound, without what lies between its parts."""
    (bins, length), rate = self.size, spectrograms.IMAGEBIND_RATE
    hop, window = rate // 100, rate // 40
    frames = 1 + (-(-len(value.samples) * rate // value.rate) - window) // hop
    out = np.zeros((3, length, bins), np.float32)
    for part, start in zip(out, _thirds(frames - length)):
      stop = min(start + length, frames)
      wave = spectrograms.imagebind_part(value.samples, value.rate, start * hop, (stop - 1) * hop + window)[0]
      part[: stop - start] = spectrograms.kaldi_log_mel(wave, bins)
    return self._normalised(out)

  def _normalised(self, out: np.ndarray) -> np.ndarray:
    return ((out - self.mean) / self.std).astype(np.float32).transpose(2, 1, 0)


def _thirds(last: int) -> list[int]:
  """The begin of each third of the places 0 to `last` where a part can begin."""
  thirds = np.array_split(np.arange(max(last + 1, 1)), 3)
  return [int(third[0]) if len(third) else 0 for third in thirds]


def thermal_picture(value: Any) -> UInt8[np.ndarray, "h w 3"]:
  """A thermal picture of 8 bits as it is, one with temperatures on the scale of `thermal.to_picture`."""
  if isinstance(value, np.ndarray) and value.dtype == np.uint8:
    return image_transforms.read(np.repeat(value[..., None], 3, axis=-1) if value.ndim == 2 else value)
  if isinstance(value, (str, Path, bytes)) and (stored := thermal_transforms.stored(value)) is not None:
    return stored
  return thermal_transforms.to_picture(thermal_transforms.read(value))

"""Items as ImageBind's own code prepares them (arXiv 2305.05665), one input per modality."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from PIL import Image

from codebind_jax.data import numpy_files
from codebind_jax.data.inputs import Input
from codebind_jax.data.preparation import spectrograms
from codebind_jax.data.preparation.audio import sound
from codebind_jax.data.preparation.pictures import CLIP_MEAN, CLIP_STD, Picture, middle, picture_input
from codebind_jax.data.preparation.texts import clip_ids, text_input
from codebind_jax.data.reading import name_of, unmasked
from codebind_jax.data.transforms import audio as audio_transforms
from codebind_jax.data.transforms import depth as depth_transforms
from codebind_jax.data.transforms import thermal as thermal_transforms
from codebind_jax.data.transforms import video as video_transforms

# Depth as in Omnivore (arXiv 2201.08377), whose data ImageBind was trained with: the disparity that a Kinect would see,
# clipped and scaled, and its mean and deviation.
FOCAL_LENGTH, BASELINE = 518.857901, 0.075
_NEAREST, _FARTHEST, _LARGEST_DISPARITY = 0.01, 50.0, 75.0
_DEPTH_MEAN, _DEPTH_STD = 0.0418, 0.0295
_LARGEST_SERIES = 2**28  # values
_CLIPS = {"audio": 3, "video": 5}


def item_input(
  modality: str, size: tuple[int, ...], channels: int = 0, *, clips: int = 0, crops: int = 3,
  focal_length: float = FOCAL_LENGTH, baseline: float = BASELINE,
) -> Input:  # fmt: skip
  """What an encoder wants of an item.

  Args:
    modality: of the item.
    size, channels: of the encoder's input, see `models.encoder.EncoderSpec`.
    clips, crops, focal_length, baseline: as in `trunks.imagebind.make_trunk`.
  """
  side, clips, factor = size[-1], clips or _CLIPS.get(modality, 1), focal_length * baseline
  if modality in ("image", "tactile"):
    return picture_input(Picture((side, side), "shortest", crop="even"))
  if modality == "text":
    return text_input(clip_ids(size[0]))
  if modality == "video":
    shape, key = (clips * crops, *size, 3), video_transforms.REVISION
    prepare = functools.partial(_video, clips=clips, crops=crops, size=side)
    read = functools.partial(video_transforms.read_clips, clips=clips)
  elif modality == "audio":
    shape, key, read = (clips, *size, 1), audio_transforms.REVISION, sound
    prepare = functools.partial(_audio, clips=clips, frames=size[1])
  elif modality == "depth":
    shape, key, read = (side, side, 1), f"{depth_transforms.REVISION} {factor}", depth_transforms.read
    prepare = functools.partial(_depth, side=side, factor=factor)
  elif modality == "thermal":
    shape, key, read = (side, side, 1), thermal_transforms.REVISION, grey
    prepare = functools.partial(_thermal, side=side)
  else:
    shape, key, read = (size[0], channels), "", _stored
    prepare = functools.partial(_series, shape=shape, name=modality)
  dtype = "uint8" if modality == "thermal" else "float32"
  return Input(shape, dtype, prepare, read=read, revision=f"{key} {shape}")


def _audio(value: Any, clips: int, frames: int) -> Float32[np.ndarray, "s 128 n 1"]:
  value = sound(value)
  return spectrograms.imagebind_log_mel(value.samples, value.rate, clips=clips, frames=frames)


def _video(value: Any, clips: int, crops: int, size: int) -> Float32[np.ndarray, "s t h w 3"]:
  frames = middle(video_transforms.read_clips(value, clips))
  scaled = short_side(frames.astype(np.float32) / np.float32(255.0), size)
  scaled = ((scaled - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).astype(np.float32)
  h, w = scaled.shape[-3:-1]
  wanted = range(3) if crops == 3 else (1,)
  out = []
  for clip in scaled:
    for place in wanted:
      top, left = ((0, math.ceil((n - size) / 2), n - size) for n in (h, w))
      top, left = (top[place], left[1]) if h > w else (top[1], left[place])
      out.append(clip[:, top : top + size, left : left + size])
  return np.stack(out)


def short_side(frames: Float32[np.ndarray, "*lead h w c"], size: int) -> Float32[np.ndarray, "*lead i j c"]:
  """Frames whose shorter side is `size`, the longer one rounded down: bilinear, half-pixel centres, no antialias."""
  h, w = frames.shape[-3:-1]
  new = (math.floor(h / w * size), size) if w < h else (size, math.floor(w / h * size))
  rows, columns = (_linear(old, wanted) for old, wanted in zip((h, w), new))
  return np.einsum("ih,...hwc,jw->...ijc", rows, frames, columns, optimize=True).astype(np.float32)


def _linear(size: int, new: int) -> np.ndarray:
  """Weights [new, size] of linear interpolation."""
  at = np.maximum((np.arange(new) + 0.5) * (size / new) - 0.5, 0.0)
  low = np.minimum(at.astype(int), size - 1)
  weights = np.zeros((new, size), np.float32)
  np.add.at(weights, (np.arange(new), low), 1.0 - (at - low))
  np.add.at(weights, (np.arange(new), np.minimum(low + 1, size - 1)), at - low)
  return weights


def _depth(value: Any, side: int, factor: float) -> Float32[np.ndarray, "h w 1"]:
  metres = np.clip(depth_transforms.read(value), _NEAREST, _FARTHEST)
  disparity = np.clip(factor / metres, 0.01, _LARGEST_DISPARITY) / _LARGEST_DISPARITY
  plane = _fitted(disparity.astype(np.float32), side, Image.Resampling.BILINEAR)
  return ((plane - np.float32(_DEPTH_MEAN)) / np.float32(_DEPTH_STD))[..., None]


def grey(value: Any) -> UInt8[np.ndarray, "h w"]:
  """A thermal picture of 8-bit grey as it is, one with temperatures on the scale of `thermal.to_picture`."""
  if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 2 and value.size:
    return value
  if isinstance(value, (str, Path, bytes)) and (stored := thermal_transforms.stored(value)) is not None:
    return thermal_transforms.grey(stored, name_of(value, "thermal"))
  return thermal_transforms.to_picture(thermal_transforms.read(value))[..., 0]


def _thermal(value: Any, side: int) -> UInt8[np.ndarray, "h w 1"]:
  return _fitted(grey(value), side, Image.Resampling.BICUBIC)[..., None]


def _fitted(plane: Shaped[np.ndarray, "h w"], side: int, resample: Image.Resampling) -> Shaped[np.ndarray, "i j"]:
  """One channel, its shorter side resized to `side`, and the middle square cut out."""
  plane = middle(plane[..., None])[..., 0]
  h, w = plane.shape
  new = tuple(side if n == min(h, w) else int(side * n / min(h, w)) for n in (h, w))
  if new != (h, w):
    plane = np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize((new[1], new[0]), resample))
  top, left = (round((n - side) / 2) for n in new)
  return np.ascontiguousarray(plane[top : top + side, left : left + side])


def _stored(value: Any) -> np.ndarray:
  """The array of an .npy file, its bytes, or an array."""
  if not isinstance(value, (str, Path, bytes)):
    return unmasked(value, "series")
  return numpy_files.load_npy(value, name_of(value, "series"))


def _series(value: Any, shape: tuple[int, int], name: str) -> Float32[np.ndarray, "n c"]:
  array = _stored(value)
  if array.shape == shape[::-1] and shape[0] != shape[1]:
    array = array.T
  if array.shape != shape or not np.issubdtype(array.dtype, np.number) or not np.isfinite(array).all():
    raise ValueError(f"{name}: got type {array.dtype} and shape {array.shape}, allowed are finite numbers of shape "
                     f"{shape[::-1]} (channels, samples) or {shape}")  # fmt: skip
  return np.ascontiguousarray(array, np.float32)

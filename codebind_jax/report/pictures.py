"""Pictures of items of every modality, as small RGB arrays for the gallery: what a person tells apart at a glance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from codebind_jax.data.transforms import audio, depth, eeg, image, points, tactile, thermal, video

SIDE = 160  # of drawn pictures; thumbnails are made of them
_LINES = 8  # channels of a recording that are drawn
_WINDOW = 1024  # of a spectrogram


def drawable(modality: str, item: Any) -> bool:
  """Whether an item is one of the modality, and not a vector in its place (synthetic worlds, features)."""
  if modality not in DRAWN or not isinstance(item, np.ndarray):
    return modality in DRAWN
  return item.ndim >= DRAWN[modality].ndim and (modality != "audio" or len(item) >= _WINDOW)


def draw(modality: str, item: Any) -> UInt8[np.ndarray, "h w 3"]:
  """The picture of an item.

  Args:
    modality: a key of `DRAWN`.
    item: as `transforms.<modality>.read` takes it.

  Raises:
    ValueError: if it cannot be read, as `read`.
  """
  return DRAWN[modality].picture(item)


class _Drawing:
  """How a modality is drawn.

  Attributes:
    kind: what the picture is called in its text alternative.
    ndim: dimensions that an array must have at least to be an item.
    picture: item -> [h, w, 3].
  """

  def __init__(self, kind: str, ndim: int, picture: Callable[[Any], np.ndarray]):
    self.kind, self.ndim, self.picture = kind, ndim, picture


def _coloured(values: np.ndarray, name: str) -> UInt8[np.ndarray, "... 3"]:
  """Values from 0 to 1 in a colour map."""
  return (255 * matplotlib.colormaps[name](np.clip(values, 0.0, 1.0))[..., :3] + 0.5).astype(np.uint8)


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
  return (values - low) / max(high - low, 1e-12)


def of_depth(metres: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
  """Near is bright, far is dark, on a scale of the picture's own; no return is grey."""
  there = metres > 0
  if not there.any():
    return np.full((*metres.shape, 3), 128, np.uint8)
  near, far = np.percentile(metres[there], (1, 99))
  picture = _coloured(1.0 - _scaled(metres, near, far), "viridis")
  picture[~there] = 128
  return picture


def of_thermal(celsius: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
  """Warm is bright, cold is dark, on a scale of the picture's own."""
  return _coloured(_scaled(celsius, *np.percentile(celsius, (1, 99))), "inferno")


def of_video(frames: UInt8[np.ndarray, "t h w 3"]) -> UInt8[np.ndarray, "rows columns 3"]:
  """The first and the middle frame, above one another where they are wide, else side by side."""
  if len(frames) == 1:
    return np.asarray(frames[0])
  wide = frames.shape[2] > frames.shape[1]
  return np.concatenate([frames[0], frames[len(frames) // 2]], axis=0 if wide else 1)


def of_points(cloud: Float[np.ndarray, "n c"]) -> UInt8[np.ndarray, "h w 3"]:
  """The cloud seen from before and above, the second axis upward; in its own colours, or near points dark."""
  xyz = np.asarray(cloud[:, :3], np.float64)
  xyz = xyz - (xyz.max(axis=0) + xyz.min(axis=0)) / 2
  turn = np.pi / 6
  across = np.cos(turn) * xyz[:, 0] + np.sin(turn) * xyz[:, 2]
  away = np.sin(turn) * xyz[:, 0] - np.cos(turn) * xyz[:, 2]
  up = xyz[:, 1] + 0.35 * away
  size = max(np.ptp(across), np.ptp(up), 1e-9)
  place = lambda values: ((values - (values.max() + values.min()) / 2) / size * 0.9 + 0.5) * (SIDE - 1)
  columns, rows = place(across).round().astype(int), (SIDE - 1 - place(up)).round().astype(int)
  if cloud.shape[1] == 6:
    colours = (255 * np.clip(cloud[:, 3:], 0, 1) + 0.5).astype(np.uint8)
  else:
    colours = _coloured(0.85 * _scaled(away, away.min(), away.max()), "viridis")
  picture = np.full((SIDE, SIDE, 3), 255, np.uint8)
  order = np.argsort(-away, kind="stable")  # near ones last, above others
  for down in (0, 1):
    for right in (0, 1):
      at = np.clip(rows[order] + down, 0, SIDE - 1), np.clip(columns[order] + right, 0, SIDE - 1)
      picture[at] = colours[order]
  return picture


def of_audio(samples: Float[np.ndarray, "n"]) -> UInt8[np.ndarray, "h w 3"]:
  """The spectrogram, low tones below, loud bright: 60 dB, up to 11 kHz, tones on a logarithmic axis."""
  if len(samples) < _WINDOW:
    samples = np.pad(samples, (0, _WINDOW - len(samples)))
  starts = np.linspace(0, len(samples) - _WINDOW, SIDE).astype(int)
  frames = samples[starts[:, None] + np.arange(_WINDOW)] * np.hanning(_WINDOW)
  power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
  bins = np.geomspace(60.0, 11_025.0, SIDE // 2 + 1) * _WINDOW / audio.RATE
  bands = np.stack([power[:, int(a) : max(int(a) + 1, int(b))].mean(axis=1) for a, b in zip(bins, bins[1:])])
  level = 10.0 * np.log10(np.maximum(bands, 1e-12))
  return _coloured(_scaled(np.repeat(level[::-1], 2, axis=0), level.max() - 60.0, level.max()), "magma")


def of_eeg(microvolts: Float[np.ndarray, "channels samples"]) -> UInt8[np.ndarray, "h w 3"]:
  """Traces of evenly chosen channels below one another, on one scale."""
  chosen = np.unique(np.linspace(0, len(microvolts) - 1, min(_LINES, len(microvolts))).round().astype(int))
  traces = microvolts[chosen] - microvolts[chosen].mean(axis=1, keepdims=True)
  scale = max(float(np.percentile(np.abs(traces), 98)), 1e-9)
  picture = Image.new("RGB", (SIDE, SIDE), "white")
  drawing, step = ImageDraw.Draw(picture), SIDE / len(traces)
  across = np.linspace(0, SIDE - 1, min(2 * SIDE, traces.shape[1]))
  for number, trace in enumerate(traces):
    y = np.interp(across, np.linspace(0, SIDE - 1, len(trace)), trace)
    y = step * (number + 0.5 - 0.45 * np.clip(y / scale, -1, 1))
    drawing.line(list(zip(across.tolist(), y.tolist())), fill=(31, 95, 174), width=1)
  return np.asarray(picture)


DRAWN = {
  "image": _Drawing("picture", 2, image.read),
  "video": _Drawing("two frames of a video", 4, lambda item: of_video(video.read(item))),
  "audio": _Drawing("spectrogram of a sound", 1, lambda item: of_audio(audio.read(item))),
  "depth": _Drawing("depth map, near is bright", 2, lambda item: of_depth(depth.read(item))),
  "thermal": _Drawing("thermal picture, warm is bright", 2, lambda item: of_thermal(thermal.read(item))),
  "tactile": _Drawing("touch picture", 3, tactile.read),
  "points": _Drawing("point cloud", 2, lambda item: of_points(points.read(item))),
  "eeg": _Drawing("EEG traces", 2, lambda item: of_eeg(eeg.read(item))),
}

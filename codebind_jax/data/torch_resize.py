"""Antialiased resize of uint8 pixels as torchvision does it on a CPU, bit for bit, without torch.

Separable, columns first; both passes have weights of 16 bits and give uint8 (PIL's passes keep more bits and round its
weights otherwise, so that about one pixel in a hundred differs by one).
"""

from __future__ import annotations

import functools
import math

import numpy as np
from jaxtyping import UInt8

_BLOCK = 16  # rows made by one product: a few, so that the product's matrix has few zeros
_PRODUCT = 1 << 18  # multiplications of one product; BLAS splits larger ones among threads, which then wait for a core


def _bilinear(x: np.ndarray) -> np.ndarray:
  return np.maximum(1.0 - np.abs(x), 0.0)


def _bicubic(x: np.ndarray) -> np.ndarray:
  x, a = np.abs(x), -0.5
  near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))


FILTERS = {2: (_bilinear, 1.0), 3: (_bicubic, 2.0)}  # PIL's number -> filter and its half width


@functools.lru_cache(maxsize=64)
def _weights(size: int, new_size: int, resample: int) -> tuple[np.ndarray, np.ndarray, int]:
  """First input row of each output row, its integer weights [new_size, taps], and the bits they are shifted by."""
  kernel, half = FILTERS[resample]
  scale = size / new_size
  stretch = max(scale, 1.0)
  support = half * stretch
  centre = scale * (np.arange(new_size) + 0.5)
  start = np.maximum((centre - support + 0.5).astype(np.int64), 0)
  stop = np.minimum((centre + support + 0.5).astype(np.int64), size)
  taps = np.arange(math.ceil(support) * 2 + 1)
  weights = kernel((taps + (start - centre)[:, None] + 0.5) * (1.0 / stretch))
  weights = np.where(taps < (stop - start)[:, None], weights, 0.0)
  total = np.add.accumulate(weights, axis=1)[:, -1:]  # one after the other, as the original adds them
  weights = weights / np.where(total == 0, 1.0, total)
  bits = 0
  while bits < 22 and int(0.5 + weights.max() * (1 << (bits + 1))) < 1 << 15:
    bits += 1
  weights = weights * (1 << bits)
  return start, np.trunc(weights + np.where(weights < 0, -0.5, 0.5)), bits


def _rows(pixels: UInt8[np.ndarray, "n k"], new_size: int, resample: int) -> UInt8[np.ndarray, "m k"]:
  size = pixels.shape[0]
  if size == new_size:
    return pixels
  start, weights, bits = _weights(size, new_size, resample)
  # Either holds every partial sum exactly (float32 those of shrinking by less than about 1.7); integers have no fast
  # matrix product.
  largest = 255 * np.abs(weights).sum(axis=1).max() + (1 << bits)
  kind = np.float32 if largest < 1 << 24 else np.float64
  out = np.empty((new_size, pixels.shape[1]), np.uint8)
  for low in range(0, new_size, _BLOCK):
    rows = np.arange(low, min(low + _BLOCK, new_size))
    first, last = start[low], min(start[rows[-1]] + weights.shape[1], size)
    matrix = np.zeros((len(rows), last - first + weights.shape[1]), kind)
    np.put_along_axis(matrix, (start[rows] - first)[:, None] + np.arange(weights.shape[1]), weights[rows], axis=1)
    matrix = matrix[:, : last - first] / kind(1 << bits)
    step = max(_PRODUCT // matrix.size, 16)
    for at in range(0, pixels.shape[1], step):
      sums = matrix @ pixels[first:last, at : at + step].astype(kind)
      sums += kind(0.5)
      np.clip(np.floor(sums, out=sums), 0, 255, out=sums)
      out[low : low + len(rows), at : at + step] = sums
  return out


def resize(pixels: UInt8[np.ndarray, "h w c"], size: tuple[int, int], resample: int) -> UInt8[np.ndarray, "i j c"]:
  """The resized pixels.

  Args:
    pixels: of one picture.
    size: (height, width) of the result.
    resample: PIL's number of a filter, a key of `FILTERS`.
  """
  (h, w, c), (new_h, new_w) = pixels.shape, size
  if w != new_w:
    columns = _rows(np.ascontiguousarray(pixels.transpose(1, 0, 2)).reshape(w, h * c), new_w, resample)
    pixels = np.ascontiguousarray(columns.reshape(new_w, h, c).transpose(1, 0, 2))
  return _rows(np.ascontiguousarray(pixels).reshape(h, new_w * c), new_h, resample).reshape(new_h, new_w, c)

"""Weights of PyTorch's interpolation along one axis."""

from __future__ import annotations

import numpy as np

_CUBIC = -0.75


def cubic_matrix(size: int, new_size: int, corners: bool = False) -> np.ndarray:
  """Bicubic interpolation weights [new_size, size]: a = -0.75, half-pixel centres, borders repeated, no antialias.

  `jax.image.resize` has a = -0.5 and renormalises at the border; ImageBind's positions need this one.

  Args:
    size, new_size: of one axis.
    corners: the first and last values stay where they are, instead of half-pixel centres (CLAP's spectrograms).
  """
  centre = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
  if corners:
    centre = np.arange(new_size) * ((size - 1) / max(new_size - 1, 1))
  low = np.floor(centre).astype(int)
  weights = np.zeros((new_size, size))
  for tap in range(-1, 3):
    t = np.abs(centre - (low + tap))
    near = ((_CUBIC + 2) * t - (_CUBIC + 3)) * t * t + 1
    far = _CUBIC * (((t - 5) * t + 8) * t - 4)
    np.add.at(weights, (np.arange(new_size), np.clip(low + tap, 0, size - 1)), np.where(t <= 1, near, far))
  return weights


def antialias_matrix(size: int, new_size: int, filter: str = "cubic") -> np.ndarray:
  """Weights [new_size, size] of PyTorch's resize with `antialias`: a coarser grid widens the filter; rows sum to 1.

  Args:
    size, new_size: of one axis.
    filter: "cubic" (a = -0.5) or "linear".
  """
  scale, half = size / new_size, 2 if filter == "cubic" else 1
  stretch = max(scale, 1.0)
  centre = scale * (np.arange(new_size) + 0.5)[:, None]
  low = np.maximum(np.trunc(centre - half * stretch + 0.5), 0)
  high = np.minimum(np.trunc(centre + half * stretch + 0.5), size)
  at = np.arange(size)
  t = np.abs((at - centre + 0.5) / stretch)
  if filter == "cubic":
    near, far = (1.5 * t - 2.5) * t * t + 1, -0.5 * (((t - 5) * t + 8) * t - 4)
    weights = np.where(t < 1, near, np.where(t < 2, far, 0.0))
  else:
    weights = np.maximum(1 - t, 0.0)
  weights = weights * ((at >= low) & (at < high))
  return weights / weights.sum(axis=1, keepdims=True)


def linear_matrix(size: int, new_size: int) -> np.ndarray:
  """Bilinear weights [new_size, size], half-pixel centres, borders repeated, no antialias."""
  at = np.maximum((np.arange(new_size) + 0.5) * (size / new_size) - 0.5, 0.0)
  low = np.minimum(np.floor(at).astype(int), size - 1)
  weights = np.zeros((new_size, size))
  np.add.at(weights, (np.arange(new_size), low), 1 - (at - low))
  np.add.at(weights, (np.arange(new_size), np.minimum(low + 1, size - 1)), at - low)
  return weights

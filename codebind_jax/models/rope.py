"""Rotary positions of an image's patches, by the name that `EncoderSpec.rope` has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from codebind_jax.models.stems import patch_grid
from codebind_jax.models.transformer import Rope

EVA_GRID = (16, 16)  # of EVA02's first training, 224 / 14, on which other grids are laid


def _axial(spec: Any, size: tuple[int, ...], coordinates: Callable[[tuple[int, ...]], list[np.ndarray]],
           theta: float) -> np.ndarray:  # fmt: skip
  """Angles [rows * columns, d / 2] of the patches: those of the row, then those of the column."""
  grid = patch_grid(size, spec.patch, spec.stride or spec.patch)
  bands = spec.width // spec.heads // 4
  frequencies = 1 / np.float32(theta) ** (np.arange(bands, dtype=np.float32) / np.float32(bands))
  at = np.stack(np.meshgrid(*coordinates(grid), indexing="ij"), axis=-1).astype(np.float32)
  return (at[..., None] * frequencies).reshape(-1, 2 * bands)


def _rope(spec: Any, angles: np.ndarray, interleaved: bool) -> Rope:
  angles = np.repeat(angles, 2, axis=-1) if interleaved else np.tile(angles, 2)
  before = ((spec.prefix, 0), (0, 0))
  return Rope(np.pad(np.sin(angles), before), np.pad(np.cos(angles), before, constant_values=1), interleaved)


def eva(spec: Any, size: tuple[int, ...]) -> Rope:
  """EVA02 (arXiv 2303.11331): indices of rows and columns, scaled to `EVA_GRID`; base 10000; neighbouring pairs."""
  scaled = lambda grid: [np.arange(n, dtype=np.float32) / n * whole for n, whole in zip(grid, EVA_GRID)]
  return _rope(spec, _axial(spec, size, scaled, 10000.0), True)


def dinov3(spec: Any, size: tuple[int, ...]) -> Rope:
  """DINOv3 (arXiv 2508.10104): middles of the patches in [-1, 1], times 2 pi; base `spec.rope_theta`; halves."""
  centred = lambda grid: [2 * (np.arange(n, dtype=np.float32) + np.float32(0.5)) / n - 1 for n in grid]
  return _rope(spec, np.float32(2 * np.pi) * _axial(spec, size, centred, spec.rope_theta), False)


def perception(spec: Any, size: tuple[int, ...]) -> Rope:
  """Perception Encoder (arXiv 2504.13181): indices, from 1 on beside a class token; columns first; base 10000."""
  indices = lambda grid: [np.arange(n, dtype=np.float32) + spec.class_token for n in grid]
  rows, columns = np.split(_axial(spec, size, indices, 10000.0), 2, axis=-1)
  return _rope(spec, np.concatenate([columns, rows], axis=-1), True)


# Name -> function (spec, input size without channels) -> Rope over all tokens; those before the patches are not turned.
TABLES: dict[str, Callable[[Any, tuple[int, ...]], Rope]] = {"eva": eva, "dinov3": dinov3, "perception": perception}

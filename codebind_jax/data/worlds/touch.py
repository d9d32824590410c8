"""Simulated pictures of a GelSight-like touch sensor, from photographs of surfaces.

The photograph's brightness stands for height, which is not known: say "simulated touch" wherever a number is shown.
"""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from scipy.ndimage import gaussian_filter

SIZE = 96
_LUMA = np.array([0.299, 0.587, 0.114])
_ANGLES = np.deg2rad([90.0, 210.0, 330.0])  # of the red, green and blue light


def crop(photo: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "n n 3"]:
  """A random square of a third of the photograph (64 to 160 pixels where it has them), mirrored and turned, resized."""
  short = min(photo.shape[:2])
  side = min(short, round(max(64, min(short / 3, 160))))
  top, left = (int(rng.integers(0, length - side + 1)) for length in photo.shape[:2])
  piece = photo[top : top + side, left : left + side]
  piece = np.rot90(piece[:, ::-1] if rng.random() < 0.5 else piece, int(rng.integers(4)))
  return np.asarray(Image.fromarray(np.ascontiguousarray(piece)).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def relief(photo: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w"]:
  """High-pass filtered brightness, scaled to 0 to 1; zero for a picture of one grey."""
  brightness = photo @ _LUMA / 255.0
  rough = brightness - gaussian_filter(brightness, 12)
  reach = np.ptp(rough)
  return (rough - rough.min()) / reach if reach > 1e-6 else np.zeros_like(rough)


def touch(photo: UInt8[np.ndarray, "n n 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "n n 3"]:
  """Picture of a soft dome pressed on the surface, lit by a red, a green and a blue light from three sides."""
  side = np.linspace(-1.0, 1.0, photo.shape[0])
  radius = side[:, None] ** 2 + side[None] ** 2
  pressed = 0.5 * relief(photo) - 0.35 * radius
  pressed -= np.percentile(pressed, 99)
  contact = np.maximum(pressed + 0.5, 0.0)
  skin = np.maximum(gaussian_filter(contact, 1.2), 0.8 * gaussian_filter(contact, 3.0))
  down, across = np.gradient(skin)
  normal = np.stack([-6.0 * across, -6.0 * down, np.ones_like(skin)], axis=-1)
  normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
  lights = np.stack([np.cos(_ANGLES), np.sin(_ANGLES), np.full(3, 0.6)], axis=-1)
  lights /= np.linalg.norm(lights, axis=-1, keepdims=True)
  seen = 0.45 + 0.9 * (normal @ lights.T - lights[:, 2])
  seen = seen * (1.0 - 0.25 * radius)[..., None] + 0.012 * rng.standard_normal(photo.shape)
  return np.round(255.0 * np.clip(seen, 0.0, 1.0)).astype(np.uint8)

"""Simulated long-wave infrared of a rendered object: temperatures by rule, emission, reflection, optics and noise.

Temperatures are rules by the object's class or name (`tables/thermal.json`), not physics: say "simulated" wherever a
figure or a number is shown.
"""

import hashlib
import re
from typing import Any

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float, UInt8

from codebind_jax.data.worlds import names

_SKIN = np.array([205, 155, 125])


def generator(*key: object) -> np.random.Generator:
  """A random generator seeded by a key alone."""
  return np.random.default_rng(int(hashlib.sha256(":".join(map(str, key)).encode()).hexdigest()[:16], 16))


def rule(name: str, cls: str | None) -> dict[str, Any] | None:
  """How warm an object is and where: the first rule that its name matches, else its class's, else None."""
  table = names.table("thermal")
  named = (r for r in table["name_rules"] if re.search(r["regex"], name.lower()))
  return next(named, table["class_rules"].get(cls))


def factor(
  mode: str, height: Float[np.ndarray, "h w"], colour: UInt8[np.ndarray, "h w 3"]
) -> Float[np.ndarray, "h w"] | float:
  """Share of an object's warmth that each pixel has.

  Args:
    mode: "whole", "clothing", "top" or "band".
    height: of the surface seen, 0 at the foot of the object and 1 at its top.
    colour: the colour view.
  """
  if mode == "clothing":
    skin = np.abs(colour.astype(int) - _SKIN).sum(axis=-1) < 130
    return np.where(skin, 1.0, 0.62)
  if mode == "top":
    return 0.15 + 0.85 * np.clip(1.4 * height - 0.3, 0.0, 1.0)
  if mode == "band":
    return 0.35 + 0.65 * np.exp(-(((height - 0.45) / 0.25) ** 2))
  if mode != "whole":
    raise ValueError(f"thermal rule: mode {mode!r}, allowed are whole, clothing, top, band")
  return 1.0


def infrared(
  key: str,
  view: int,
  warm: dict[str, Any] | None,
  seen: Bool[np.ndarray, "h w"],
  height: Float[np.ndarray, "h w"],
  cosine: Float[np.ndarray, "h w"],
  colour: UInt8[np.ndarray, "h w 3"],
) -> Float[np.ndarray, "h w"]:
  """Apparent temperature in degrees C of each pixel.

  Args:
    key: of the object, which decides its temperature and that of the room.
    view: number of the view, which decides the noise.
    warm: the object's rule; None for one at room temperature.
    seen: whether a pixel shows the object.
    height: of the surface seen, 0 at the foot of the object and 1 at its top.
    cosine: between the surface's normal and the line of sight, 0 to 1.
    colour: the colour view.
  """
  table = names.table("thermal")
  once, noise = generator("thermal", key), generator("thermal", key, view)
  room = once.normal(table["ambient"]["mean"], table["ambient"]["sd"])
  surface = room
  if warm is not None:
    surface = room + (once.normal(warm["mean"], warm["sd"]) - room) * factor(warm["mode"], height, colour)
  grazing = table["emissivity"]
  emissivity = grazing["normal"] * np.minimum(cosine / grazing["grazing_cos"], 1.0) ** grazing["power"]
  emitted = emissivity * surface + (1.0 - emissivity) * (room + table["reflected_background"])
  rows, columns = seen.shape
  wall = room + table["wall_gradient"] * (0.5 - np.arange(rows) / (rows - 1))[:, None]
  rough = scipy.ndimage.gaussian_filter(noise.standard_normal(seen.shape), table["wall_noise"]["sigma_px"])
  scene = np.where(seen, emitted, wall + table["wall_noise"]["gain"] * rough)
  scene = scipy.ndimage.gaussian_filter(scene, table["blur_sigma_px"])
  pixels = table["noise_K"] * noise.standard_normal(seen.shape)
  return scene + pixels + table["column_noise_K"] * noise.standard_normal(columns)

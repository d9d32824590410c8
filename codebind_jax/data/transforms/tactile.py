"""Pictures of camera-based touch sensors (GelSight, DIGIT): anything PIL opens, or an array, to RGB."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from codebind_jax.data.reading import name_of
from codebind_jax.data.transforms import image

# Changes whenever the same input would give other values: it is part of the key of cached features.
REVISION = f"tactile-2 {image.REVISION}"


def read(value: Any) -> UInt8[np.ndarray, "h w 3"]:
  """RGB pixels of a path, encoded bytes, PIL image or array; the colours are the sensor's lights, so grey is refused.

  Raises:
    ValueError: naming the file, if it cannot be read, or if it has no colour.
  """
  try:
    pixels = image.read(value)
  except ValueError as error:
    raise ValueError(re.sub(r"^image(?= bytes:|:)", "tactile", str(error))) from error
  if pixels.size > 3 and image.is_grey(pixels):
    name = name_of(value, "tactile") if isinstance(value, (str, Path, bytes)) else "tactile"
    raise ValueError(f"{name}: all pixels are grey; a touch sensor's picture is lit from three sides in three colours")
  return pixels


def check(path: Path) -> None:
  """Raises a ValueError naming the file if it is not an image; its pixels are not decoded."""
  image.check(path)

"""Random views of pictures of camera-based touch sensors: `image.Photo`, which by default keeps sides and colours.

Three lights of different colours shine from three sides, so a colour says how the surface leans: a mirrored picture, or
one with another hue, shows no surface that could be.
"""

import dataclasses
from typing import Annotated

from codebind_jax.data.augment import image, revision
from codebind_jax.schema import within


@dataclasses.dataclass(frozen=True)
class Photo(image.Photo):
  """A random view of a touch sensor's picture; attributes are those of `image.Photo`, without mirror image and hue."""

  flip: image.Share = 0.0
  saturation: image.Size = 0.0
  hue: Annotated[float, within(0, 0.5)] = 0.0
  revision: str = revision("tactile-photo-1")

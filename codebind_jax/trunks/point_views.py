"""Point clouds as depth pictures from several sides, encoded by the image trunk (PointCLIP, Zhang et al. 2022).

A few hundred objects are too few to train an encoder of shapes; a network pretrained on a million pictures replaces it.
No parameters are trained here.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from codebind_jax.data.inputs import Input
from codebind_jax.data.transforms import points as point_transforms
from codebind_jax.models.encoder import Encoded
from codebind_jax.trunks import efficientnet_lite0
from codebind_jax.trunks.base import Trunk, fingerprint
from codebind_jax.trunks.points import histograms, unit_sphere

_REVISION = "point_views-1"
AZIMUTHS = (-60, -35, -10, 20, 45, 160)  # degrees about the y axis, which points up
ELEVATION, DISTANCE, FIELD_OF_VIEW, NEAREST, DEEPEST = 18.0, 2.6, 45.0, 1.6, 2.0  # degrees and unit radii


def depth_picture(
  points: Float[np.ndarray, "p 3"], azimuth: int | float, size: int, radius: int
) -> Float[np.ndarray, "size size"]:
  """A camera's depth picture of a cloud in the unit sphere: 255 near to 1 far, 0 for the background.

  Args:
    points: y up.
    azimuth: of the camera, degrees.
    size: side of the picture in pixels.
    radius: of the disc, in pixels, that each point becomes; nearer ones cover those behind.
  """
  turn, tilt = math.radians(azimuth), math.radians(ELEVATION)
  towards = np.array([math.cos(tilt) * math.sin(turn), math.sin(tilt), math.cos(tilt) * math.cos(turn)])
  right = np.array([math.cos(turn), 0.0, -math.sin(turn)])
  depth = DISTANCE - points @ towards
  reach = depth * math.tan(math.radians(FIELD_OF_VIEW / 2))
  across, down = points @ right / reach, -(points @ np.cross(towards, right)) / reach
  column, row = (np.rint((place + 1) / 2 * size - 0.5).astype(int) for place in (across, down))
  value = np.clip(255.0 - (depth - NEAREST) / DEEPEST * 255.0, 1.0, 255.0)
  side = range(-radius, radius + 1)
  disc = np.array([(i, j) for i in side for j in side if i * i + j * j <= radius * radius + 0.5])
  rows, columns = row[:, None] + disc[:, 0], column[:, None] + disc[:, 1]
  inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
  picture = np.zeros((size, size), np.float32)
  np.maximum.at(picture, (rows[inside], columns[inside]), np.broadcast_to(value[:, None], rows.shape)[inside])
  return picture


class PointViews(nn.Module):
  """Depth pictures, and values to append, in one row an item -> the mean of the pictures' class tokens, and the values.

  Attributes:
    picture: the network of a picture.
    views, size: number of pictures, and their side in pixels.
  """

  picture: efficientnet_lite0.EfficientNetLite0
  views: int
  size: int

  @nn.compact
  def __call__(self, rows: Float[Array, "b c"], train: bool = False) -> Encoded:
    """One token."""
    pixels = self.views * self.size**2
    views = rows[:, :pixels].reshape(-1, self.views, self.size, self.size, 1)
    seen = efficientnet_lite0.one_by_one(self.picture, jnp.repeat(views, 3, axis=-1))
    return Encoded(jnp.concatenate([seen.mean(axis=1), rows[:, pixels:]], axis=1)[:, None])


def make_trunk(
  *,
  weights: str | Path = "",
  azimuths: Sequence[int | float] = AZIMUTHS,
  radius: int = 2,
  size: int = 128,
  levels: Sequence[int] = (5, 6, 7),
  metric: bool = False,
  stages: Sequence[Sequence[int]] = efficientnet_lite0.STAGES,
  head_width: int = efficientnet_lite0.HEAD_WIDTH,
  dont_load: Sequence[str] = (),
) -> Trunk:
  """The trunk of clouds whose upright direction is y: one token, the mean of the views' tokens, then histograms.

  Args:
    weights, size, levels, stages, head_width, dont_load: of the image trunk, see `efficientnet_lite0.make_trunk`.
    azimuths: of the cameras, degrees.
    radius: of a point in the pictures, pixels.
    metric: append the logarithm of the cloud's radius, for clouds whose unit is known (metres).

  Raises:
    ValueError: if an option is out of its range or the checkpoint does not fit.
  """
  azimuths = tuple(float(azimuth) for azimuth in azimuths)
  if not azimuths or radius < 0:
    raise ValueError(f"azimuths {azimuths}, radius {radius}: allowed are one azimuth or more, and radii from 0")
  picture = efficientnet_lite0.make_trunk(
    weights=weights, size=size, grid=0, levels=levels, stages=stages, head_width=head_width, dont_load=dont_load
  )
  def prepare(value: Any) -> np.ndarray:
    cloud, reach = unit_sphere(point_transforms.read(value)[:, :3].astype(np.float64))
    pictures = [depth_picture(cloud, azimuth, size, radius).ravel() for azimuth in azimuths]
    return np.concatenate([*pictures, histograms(cloud), [np.log(reach)] if metric else []]).astype(np.float32)

  revision = f"{_REVISION} {point_transforms.REVISION}"
  length = len(azimuths) * size * size + len(histograms(np.eye(3))) + metric
  options = {key: picture.options[key] for key in ("size", "levels", "stages")}
  options |= {"azimuths": azimuths, "radius": radius, "metric": metric}
  return Trunk(
    name="point_views", modality="points", module=PointViews(picture.module, len(azimuths), size),
    input=Input((length,), "float32", prepare, revision=f"{revision} {azimuths} {size} {radius} {metric}"),
    fingerprint=fingerprint({}, options | {"picture": picture.fingerprint}, revision),
    load=picture.load and (lambda shapes: {"picture": picture.load(shapes["picture"])}), options=options,
    licence=picture.licence,
  )  # fmt: skip

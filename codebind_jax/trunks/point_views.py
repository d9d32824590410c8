"""Point clouds as depth pictures from several sides, encoded by the image trunk (PointCLIP, Zhang et al. 2022).

A few hundred objects are too few to train an encoder of shapes; a network pretrained on a million pictures replaces it.
No parameters are trained here.

Modality: points.
Takes: point clouds whose y axis points up.
Choose it for: clouds of objects, up to some thousands of them; the packaged trunk for points.
"""

from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from codebind_jax.data.inputs import Input
from codebind_jax.data.preparation.points import AZIMUTHS, Views, histograms
from codebind_jax.data.transforms import points as point_transforms
from codebind_jax.models.encoder import Encoded
from codebind_jax.trunks import efficientnet_lite0
from codebind_jax.trunks.base import Trunk, fingerprint
from codebind_jax.trunks.options import Azimuth, Count, Level, Place, Regex, Side

_REVISION = "point_views-1"


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
  weights: Place | Path = "",
  azimuths: Sequence[Azimuth] = AZIMUTHS,
  radius: Count = 2,
  size: Side = 128,
  levels: Sequence[Level] = (5, 6, 7),
  metric: bool = False,
  stages: Sequence[Sequence[Side]] = efficientnet_lite0.STAGES,
  head_width: Side = efficientnet_lite0.HEAD_WIDTH,
  dont_load: Sequence[Regex] = (),
) -> Trunk:
  """The trunk of clouds whose upright direction is y: one token, the mean of the views' tokens, then histograms.

  Args:
    weights, size, levels, stages, head_width, dont_load: of the image trunk, see `efficientnet_lite0.make_trunk`.
    azimuths: directions of the cameras around the upright axis, degrees.
    radius: radius of a point in the pictures, pixels.
    metric: whether to append the logarithm of the cloud's radius, for clouds whose unit is known (metres).

  Raises:
    ValueError: if an option is out of its range or the checkpoint does not fit.
  """
  azimuths = tuple(float(azimuth) for azimuth in azimuths)
  if not azimuths or radius < 0:
    raise ValueError(f"azimuths {azimuths}, radius {radius}: allowed are one azimuth or more, and radii from 0")
  picture = efficientnet_lite0.make_trunk(
    weights=weights, size=size, grid=0, levels=levels, stages=stages, head_width=head_width, dont_load=dont_load
  )
  revision = f"{_REVISION} {point_transforms.REVISION}"
  length = len(azimuths) * size * size + len(histograms(np.eye(3))) + metric
  options = {key: picture.options[key] for key in ("size", "levels", "stages")}
  options |= {"azimuths": azimuths, "radius": radius, "metric": metric}
  return Trunk(
    name="point_views", modality="points", module=PointViews(picture.module, len(azimuths), size),
    input=Input((length,), "float32", Views(azimuths, size, radius, metric),
                revision=f"{revision} {azimuths} {size} {radius} {metric}"),
    fingerprint=fingerprint({}, options | {"picture": picture.fingerprint}, revision),
    load=picture.load and (lambda shapes: {"picture": picture.load(shapes["picture"])}), options=options,
    licence=picture.licence,
  )  # fmt: skip

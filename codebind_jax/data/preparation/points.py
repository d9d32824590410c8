"""Point clouds as encoders want them: groups of neighbours and histograms, depth pictures, or one number of points."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int
from scipy.spatial.distance import pdist

from codebind_jax.data.transforms import points as point_transforms

CELLS, DISTANCES, ROUNDS = 6, 32, (16, 8)
_PAIRED = 512  # points whose distances are counted
AZIMUTHS = (-60, -35, -10, 20, 45, 160)  # degrees about the y axis, which points up
ELEVATION, DISTANCE, FIELD_OF_VIEW, NEAREST, DEEPEST = 18.0, 2.6, 45.0, 1.6, 2.0  # degrees and unit radii
GREY = 0.4  # the colour of points without one


def unit_sphere(points: Float[np.ndarray, "p 3"]) -> tuple[Float[np.ndarray, "p 3"], float]:
  """(the cloud with its box centred at the origin and its farthest point at distance 1, its radius before)."""
  centred = points - (points.max(axis=0) + points.min(axis=0)) / 2
  radius = float(np.linalg.norm(centred, axis=1).max())
  return centred / radius, radius


def farthest_points(points: Float[np.ndarray, "p 3"], count: int) -> Int[np.ndarray, "n"]:
  """Indices by farthest point sampling, from the point that is lowest in x, then y, then z.

  A cloud of fewer points repeats its points in turn.
  """
  chosen = np.empty(count, np.int64)
  chosen[0] = np.lexsort(points.T[::-1])[0]
  nearest = np.full(len(points), np.inf)
  for i in range(1, min(count, len(points))):
    nearest = np.minimum(nearest, ((points - points[chosen[i - 1]]) ** 2).sum(axis=1))
    chosen[i] = np.argmax(nearest)
  return chosen[np.arange(count) % len(points)]


def group_points(
  points: Float[np.ndarray, "p 3"], count: int, neighbours: int
) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n k 3"]]:
  """(centres, relative positions of each centre's nearest points, itself first, divided by their mean distance)."""
  centres = points[farthest_points(points, count)]
  distance = ((centres[:, None] - points[None]) ** 2).sum(axis=-1)
  order = np.argsort(distance, axis=1, kind="stable")[:, np.arange(neighbours) % len(points)]
  relative = points[order] - centres[:, None]
  reach = np.sqrt((relative**2).sum(axis=-1)).mean()
  return centres, relative / max(reach, 1e-9)


def histograms(points: Float[np.ndarray, "p 3"]) -> Float[np.ndarray, "h"]:
  """Shape of a cloud in the unit sphere: square roots of histogram counts, so that no cell outweighs the others.

  The histograms are of distances between points, of cells of a grid, and of rings about the y axis by height, each
  scaled to a mean square of 1; then follow the sides of the box.
  """
  counts = [np.histogram(pdist(points[:_PAIRED]), DISTANCES, (0.0, 2.0))[0]]
  counts.append(np.histogramdd(points, CELLS, ((-1, 1),) * 3)[0].ravel())
  radius = np.hypot(points[:, 0], points[:, 2])
  counts.append(np.histogram2d(points[:, 1], radius, ROUNDS, ((-1, 1), (0, 1)))[0].ravel())
  return np.concatenate([*(np.sqrt(one / max(one.mean(), 1e-9)) for one in counts), np.ptp(points, axis=0)])


@dataclasses.dataclass(frozen=True)
class Groups:
  """A cloud as rows: histograms of the whole, then each group's centre and the relative positions of its points.

  Attributes:
    groups: number of groups.
    neighbours: points a group.
    size: append the logarithm of the cloud's radius to row 0.
  """

  groups: int
  neighbours: int
  size: bool

  @property
  def first_width(self) -> int:
    """Values in row 0."""
    return DISTANCES + CELLS**3 + ROUNDS[0] * ROUNDS[1] + 3 + self.size

  @property
  def width(self) -> int:
    """Of all rows, which are padded with zeros."""
    return max(self.first_width, 3 + 3 * self.neighbours)

  def __call__(self, value: Any) -> Float32[np.ndarray, "rows c"]:
    """Rows of a path, bytes or array."""
    cloud, radius = unit_sphere(point_transforms.read(value)[:, :3].astype(np.float64))
    rows = np.zeros((1 + self.groups, self.width), np.float32)
    rows[0, : self.first_width] = np.concatenate([histograms(cloud), [np.log(radius)] if self.size else []])
    centres, relative = group_points(cloud, self.groups, self.neighbours)
    rows[1:, :3], rows[1:, 3 : 3 + 3 * self.neighbours] = centres, relative.reshape(self.groups, -1)
    return rows


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


@dataclasses.dataclass(frozen=True)
class Views:
  """A cloud as one row: depth pictures from several sides, then histograms.

  Attributes:
    azimuths: of the cameras, degrees.
    size: side of a picture in pixels.
    radius: of a point in the pictures, pixels.
    metric: append the logarithm of the cloud's radius.
  """

  azimuths: tuple[float, ...]
  size: int
  radius: int
  metric: bool

  def __call__(self, value: Any) -> Float32[np.ndarray, " c"]:
    """The row of a path, bytes or array."""
    cloud, reach = unit_sphere(point_transforms.read(value)[:, :3].astype(np.float64))
    pictures = [depth_picture(cloud, azimuth, self.size, self.radius).ravel() for azimuth in self.azimuths]
    return np.concatenate([*pictures, histograms(cloud), [np.log(reach)] if self.metric else []]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Cloud:
  """One cloud in Uni3D's form: its mean in the origin, its farthest point at distance 1; axes are the file's.

  Attributes:
    points: rows of the result. Of a larger cloud as many are drawn, the same ones each time and in their order; a
      smaller one is padded with rows of colour -1.
  """

  points: int

  def __call__(self, cloud: Float32[np.ndarray, "n c"]) -> Float32[np.ndarray, "p 6"]:
    """Coordinates and colours; points without colours are grey."""
    if len(cloud) > self.points:
      cloud = cloud[np.sort(np.random.default_rng(0).choice(len(cloud), self.points, replace=False))]
    xyz = cloud[:, :3] - cloud[:, :3].mean(axis=0)
    xyz = xyz / np.sqrt((xyz**2).sum(axis=1)).max()
    out = np.zeros((self.points, 6), np.float32)
    out[:, 3:] = -1
    out[: len(cloud), :3] = xyz
    out[: len(cloud), 3:] = cloud[:, 3:] if cloud.shape[1] == 6 else GREY
    return out

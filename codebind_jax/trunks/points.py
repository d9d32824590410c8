"""Point clouds as groups of neighbours (Qi et al. 2017; Yu et al. 2022) and histograms, encoded by a small network."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial.distance import pdist

from codebind_jax.data.inputs import Input
from codebind_jax.data.transforms import points as point_transforms
from codebind_jax.models.points import Points
from codebind_jax.trunks.base import Trunk, fingerprint

_REVISION = "points-1"
CELLS, DISTANCES, ROUNDS = 6, 32, (16, 8)
_PAIRED = 512  # points whose distances are counted


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


def groups_input(groups: int, neighbours: int, size: bool) -> Input:
  """Input of `models.points.Points`, [1 + groups, c]: histograms of the whole cloud, then one row a group.

  A group's row is its centre and the relative positions of its points. Rows are padded with zeros. Colours are not
  used.

  Args:
    groups: number of groups.
    neighbours: points a group.
    size: append the logarithm of the cloud's radius to row 0.
  """
  first_width = DISTANCES + CELLS**3 + ROUNDS[0] * ROUNDS[1] + 3 + size  # of row 0
  width = max(first_width, 3 + 3 * neighbours)

  def prepare(value: Any) -> np.ndarray:
    cloud, radius = unit_sphere(point_transforms.read(value)[:, :3].astype(np.float64))
    rows = np.zeros((1 + groups, width), np.float32)
    rows[0, :first_width] = np.concatenate([histograms(cloud), [np.log(radius)] if size else []])
    centres, relative = group_points(cloud, groups, neighbours)
    rows[1:, :3], rows[1:, 3 : 3 + 3 * neighbours] = centres, relative.reshape(groups, -1)
    return rows

  revision = f"{_REVISION} {point_transforms.REVISION} {groups} {neighbours} {size}"
  return Input((1 + groups, width), "float32", prepare, revision=revision)


def make_trunk(
  *, groups: int = 32, neighbours: int = 32, size: bool = False, width: int = 128, depth: int = 2, heads: int = 4,
  dropout: float = 0.0, weights: str | Path = "",
) -> Trunk:  # fmt: skip
  """The trunk of point clouds, trained from scratch: the class token, then one token a group.

  Args:
    groups: number of groups.
    neighbours: points a group.
    size: tell the network the logarithm of the cloud's radius, for clouds whose unit is known (metres).
    width, depth, heads, dropout: see `models.points.Points`.
    weights: unused, as the trunk has no checkpoint; every trunk takes it.

  Raises:
    ValueError: if a number is below 1.
  """
  if groups < 1 or neighbours < 1:
    raise ValueError(f"groups {groups}, neighbours {neighbours}: allowed are 1 and up")
  item = groups_input(groups, neighbours, size)
  options = {
    "groups": groups, "neighbours": neighbours, "size": size, "width": width, "depth": depth, "heads": heads,
    "dropout": dropout,
  }  # fmt: skip
  return Trunk(
    name="points", modality="points", module=Points(width, neighbours, depth, heads, dropout), input=item,
    fingerprint=fingerprint({}, options, f"{_REVISION} {point_transforms.REVISION}"), options=options,
  )  # fmt: skip

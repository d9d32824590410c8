"""Random views of point clouds: turned, larger or smaller, with noise, and with fewer different points."""

import dataclasses
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float32

from codebind_jax.data.augment import Checked, image, revision
from codebind_jax.schema import within

_CUT = 5.0  # noise beyond so many deviations is cut


@dataclasses.dataclass(frozen=True)
class Cloud(Checked):
  """A random view of a cloud [n, 3], or [n, 6] with colours; rows keep their order and their number.

  Turns, scale and jitter are those of PointNet++'s training (Qi et al. 2017): any turn about the up axis, others with a
  deviation of 0.06 rad (here 3.5 degrees), scale 0.8 to 1.25, jitter 0.01 of a cloud in the unit sphere; it drops up to
  0.875 of the points, which is much for the few that a mesh's surface is sampled at here. Turns and scale are about the
  mean of the points.

  Attributes:
    up: axis that points up. Files leave it open; y is that of the trunks `points` and `point_views`.
    turn: largest turn to either side about this axis, degrees.
    tilt: deviation of the turn about each of the other two axes, degrees; three deviations at most.
    scale: smallest and largest factor on the size; (1, 1) where the unit is known and matters.
    jitter: deviation of the noise on each coordinate, as a share of the cloud's radius, which is the distance from its
      mean to its farthest point; five deviations at most.
    drop: largest share of points that are dropped; the share is drawn from 0 to it. A dropped point's row repeats
      another point, with that one's colour.
    revision: of this code; not for setting.
  """

  up: Literal["x", "y", "z"] = "y"
  turn: Annotated[float, within(0, 180)] = 180.0
  tilt: Annotated[float, within(0, 60)] = 3.5
  scale: image.Positive = (0.8, 1.25)
  jitter: Annotated[float, within(0, 1)] = 0.01
  drop: Annotated[float, within(0, 1, below=True)] = 0.2
  revision: str = revision("cloud-1")

  def __call__(self, value: Float32[np.ndarray, "n c"], rng: np.random.Generator) -> Float32[np.ndarray, "n c"]:
    """One random view; colours are those of the points."""
    up = "xyz".index(self.up)
    turns = [(axis, float(np.clip(rng.normal(), -3.0, 3.0)) * self.tilt) for axis in range(3) if axis != up]
    turns.append((up, float(rng.uniform(-self.turn, self.turn))))
    factor = float(rng.uniform(*self.scale))
    xyz = value[:, :3].astype(np.float64)
    mean = xyz.mean(axis=0)
    moved = xyz - mean
    radius = np.sqrt((moved**2).sum(axis=1).max()) * factor
    for axis, degrees in turns:
      moved = moved @ _turning(axis, degrees).T
    moved = moved * factor + mean
    if self.jitter:
      noise = np.clip(rng.standard_normal(moved.shape), -_CUT, _CUT)
      moved += noise * (self.jitter * radius)
    seen = value.copy()
    if self.turn or self.tilt or factor != 1.0 or self.jitter:
      seen[:, :3] = moved
    rows = self._kept(len(value), rng)
    return seen[rows] if np.ptp(seen[rows, :3], axis=0).any() else value.copy()

  def _kept(self, n: int, rng: np.random.Generator) -> np.ndarray:
    """For each row, the row that it shows: its own, or another one that is kept."""
    order = rng.permutation(n)
    count = min(int(rng.uniform(0.0, self.drop) * n), n - 1)
    rows = np.arange(n)
    rows[order[:count]] = rng.choice(order[count:], count)
    return rows


def _turning(axis: int, degrees: float) -> np.ndarray:
  """Matrix of the right-handed turn about axis 0, 1 or 2."""
  angle = np.deg2rad(degrees)
  out = np.eye(3)
  i, j = (axis + 1) % 3, (axis + 2) % 3
  out[i, i] = out[j, j] = np.cos(angle)
  out[j, i], out[i, j] = np.sin(angle), -np.sin(angle)
  return out

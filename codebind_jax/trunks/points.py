"""Point clouds as groups of neighbours (Qi et al. 2017; Yu et al. 2022) and histograms, encoded by a small network.

Modality: points.
Takes: point clouds whose y axis points up.
Choose it for: many clouds: an encoder of shapes is trained from scratch.
"""

from pathlib import Path

from codebind_jax.data.inputs import Input
from codebind_jax.data.preparation.points import Groups
from codebind_jax.data.transforms import points as point_transforms
from codebind_jax.models.points import Points
from codebind_jax.trunks.base import Trunk, fingerprint
from codebind_jax.trunks.options import Count, Dropout, Length, Place, Side

_REVISION = "points-1"


def groups_input(groups: int, neighbours: int, size: bool) -> Input:
  """Input of `models.points.Points`, [1 + groups, c]: histograms of the whole cloud, then one row a group.

  A group's row is its centre and the relative positions of its points. Rows are padded with zeros. Colours are not
  used.

  Args:
    groups: number of groups.
    neighbours: points a group.
    size: append the logarithm of the cloud's radius to row 0.
  """
  revision = f"{_REVISION} {point_transforms.REVISION} {groups} {neighbours} {size}"
  prepare = Groups(groups, neighbours, size)
  return Input((1 + groups, prepare.width), "float32", prepare, revision=revision)


def make_trunk(
  *, groups: Length = 32, neighbours: Length = 32, size: bool = False, width: Side = 128, depth: Count = 2,
  heads: Side = 4, dropout: Dropout = 0.0, weights: Place | Path = "",
) -> Trunk:  # fmt: skip
  """The trunk of point clouds, trained from scratch: the class token, then one token a group.

  Args:
    groups: number of groups.
    neighbours: number of points of a group.
    size: whether the network is told the logarithm of the cloud's radius, for clouds whose unit is known (metres).
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

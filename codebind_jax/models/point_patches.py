"""Encoder of point clouds as patches: sampled centres, their neighbours through a small PointNet, a transformer.

The form of Point-BERT (arXiv 2111.14819) with colours, as Uni3D (arXiv 2310.06773) has it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from codebind_jax.models.encoder import Encoded, fold_clips
from codebind_jax.models.transformer import BlockSpec, Transformer
from codebind_jax.runtime.sharding import keep_rows

CORE = 1e-3  # squared distance from the origin up to which pointnet2_ops chooses no point


@dataclasses.dataclass(frozen=True)
class PointSpec(BlockSpec):
  """Shape of the encoder; the fields of `BlockSpec` describe its blocks.

  Attributes:
    width, depth: of the trunk.
    groups, neighbours: patches of a cloud, and points of a patch.
    hidden: widths of the PointNet's four layers.
  """

  width: int = dataclasses.field(kw_only=True)
  depth: int = dataclasses.field(kw_only=True)
  groups: int = 512
  neighbours: int = 64
  hidden: tuple[int, int, int, int] = (128, 256, 512, 512)

  @property
  def blocks(self) -> BlockSpec:
    """The form of the blocks alone."""
    return BlockSpec(**{field.name: getattr(self, field.name) for field in dataclasses.fields(BlockSpec)})


def farthest_points(points: Float[Array, "b n 3"], real: Bool[Array, "b n"], count: int) -> Int[Array, "b g"]:
  """Indices by farthest point sampling from the first point on, as pointnet2_ops does it.

  A point within sqrt(`CORE`) of the origin is not chosen, nor is one that is not `real`; of equally far ones the first.
  """
  allowed = real & ((points**2).sum(-1) > CORE)

  def step(i: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
    chosen, nearest = state
    last = jnp.take_along_axis(points, chosen[:, i - 1, None, None], axis=1)
    nearest = jnp.minimum(nearest, ((points - last) ** 2).sum(-1))
    return chosen.at[:, i].set(jnp.argmax(jnp.where(allowed, nearest, -1.0), axis=1)), nearest

  start = jnp.zeros((points.shape[0], count), jnp.int32), jnp.full(points.shape[:2], 1e10, points.dtype)
  return jax.lax.fori_loop(1, count, step, start)[0]


def nearest_points(
  points: Float[Array, "b n 3"], real: Bool[Array, "b n"], centres: Float[Array, "b g 3"], count: int
) -> Int[Array, "b g k"]:
  """Indices of each centre's nearest real points, itself among them; the nearest one again where there are too few."""
  points, centres = jax.lax.stop_gradient((points, centres))
  dot = jnp.einsum("bgc,bnc->bgn", centres, points, precision="highest")
  distance = (centres**2).sum(-1)[:, :, None] + (points**2).sum(-1)[:, None] - 2 * dot
  # One row a centre, and the result whole: with more axes, or slices taken of it, XLA sorts whole rows on a CPU.
  rows = jnp.where(real[:, None], -distance, -jnp.inf).reshape(-1, points.shape[1])
  near, index = jax.lax.optimization_barrier(jax.lax.top_k(rows, min(count, points.shape[1])))
  return jnp.where(jnp.isinf(near), index[:, :1], index).reshape(*centres.shape[:2], -1)


class PointStem(nn.Module):
  """Points -> class token and patch tokens, positions added.

  A patch's points, relative to its centre, and their colours pass two layers and a maximum over the patch, twice; the
  batch normalisation after the first layer of each is part of the layer (folded on loading).

  Attributes:
    spec: shape of the encoder.
    dtype: compute type of the layers; distances are float32.
  """

  spec: PointSpec
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Float[Array, "b n 6"]) -> Float[Array, "b t d"]:
    """Coordinates and RGB from 0 to 1; rows with a negative colour are padding, which no patch holds."""
    spec, dense = self.spec, lambda width, name: nn.Dense(width, dtype=self.dtype, name=name)
    points, real = x[..., :3].astype(jnp.float32), x[..., 3] >= 0
    take = lambda values, index: jnp.take_along_axis(
      values, index.reshape(x.shape[0], -1)[..., None], axis=1).reshape(*index.shape, -1)  # fmt: skip
    centres = take(points, farthest_points(points, real, spec.groups))
    index = nearest_points(points, real, centres, spec.neighbours)
    colours = take(x[..., 3:].astype(jnp.float32), index)
    patches = jnp.concatenate([take(points, index) - centres[:, :, None], colours], axis=-1)
    h = dense(spec.hidden[1], "point2")(nn.relu(dense(spec.hidden[0], "point1")(keep_rows(patches))))
    h = jnp.concatenate([jnp.broadcast_to(h.max(axis=2, keepdims=True), h.shape), h], axis=-1)
    h = dense(spec.hidden[3], "patch2")(nn.relu(dense(spec.hidden[2], "patch1")(h))).max(axis=2)
    tokens = dense(spec.width, "project")(h)
    positions = dense(spec.width, "position2")(nn.gelu(dense(128, "position1")(centres), approximate=False))
    first = self.param("cls_token", nn.initializers.zeros, (spec.width,))
    first = first + self.param("cls_position", nn.initializers.normal(1.0), (spec.width,))
    first = jnp.broadcast_to(first.astype(tokens.dtype), (x.shape[0], 1, spec.width))
    return jnp.concatenate([first, tokens + positions], axis=1)


class PointEncoder(nn.Module):
  """Stem and trunk of point clouds, under the names `stem` and `trunk`.

  Attributes:
    spec: the encoder's shape.
    remat, scan: as in `models.transformer.Transformer`.
    dtype: compute type; parameters keep theirs.
  """

  spec: PointSpec
  remat: bool = False
  scan: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Float[Array, "b ..."], train: bool = False) -> Encoded:
    """Encodes clouds [b, n, 6], or with a clip axis after the batch axis.

    Raises:
      ValueError: for another shape.
    """
    x, clips = fold_clips(x, 2)
    if x.shape[-1] != 6:
      raise ValueError(f"points: shape {x.shape}, allowed [b, n, 6], coordinates and colours")
    tokens = PointStem(self.spec, self.dtype, name="stem")(x)
    options = {"remat": self.remat, "scan": self.scan, "dtype": self.dtype}
    trunk = Transformer(self.spec.depth, self.spec.blocks, **options, name="trunk")(tokens)
    return Encoded(trunk, trunk, None, clips)

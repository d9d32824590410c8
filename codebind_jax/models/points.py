"""A network for point clouds: a small PointNet for each group (Qi et al. 2017) and a transformer over the groups."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from codebind_jax.models.encoder import Encoded
from codebind_jax.models.transformer import BlockSpec, Transformer, layer_norm


class Points(nn.Module):
  """Groups of points, as `trunks/points.py` makes them, -> class token and group tokens.

  A group's points pass two layers and a maximum over the group, twice, as in Point-BERT; the position of its centre is
  added. The class token starts as a map of the whole cloud's histograms.

  Attributes:
    width: d, the width of the output tokens.
    neighbours: points of a group, as in the input.
    depth: transformer blocks.
    heads: attention heads; must divide the width.
    dropout: share of the groups that are hidden from a cloud in training, and of histogram values set to zero.
  """

  width: int = 128
  neighbours: int = 32
  depth: int = 2
  heads: int = 4
  dropout: float = 0.0

  @nn.compact
  def __call__(self, tokens: Float[Array, "b n c"], train: bool = False) -> Encoded:
    """Tokens [b, 1 + groups, d]; in training with dropout it needs the random stream "dropout".

    Raises:
      ValueError: if the tokens are too narrow for `neighbours`.
    """
    if tokens.shape[-1] < 3 + 3 * self.neighbours:
      raise ValueError(f"neighbours: {self.neighbours} needs tokens of {3 + 3 * self.neighbours} values or more, got "
                       f"{tokens.shape[-1]}; it must be the input's")
    cloud = nn.Dropout(self.dropout, deterministic=not train)(tokens[:, :1])
    first = nn.Dense(self.width, name="whole")(cloud)
    centres, points = tokens[:, 1:, :3], tokens[:, 1:, 3 : 3 + 3 * self.neighbours]
    x = points.reshape(*points.shape[:2], self.neighbours, 3)
    x = nn.Dense(self.width, name="point2")(nn.gelu(nn.Dense(self.width // 2, name="point1")(x)))
    x = jnp.concatenate([x, jnp.broadcast_to(x.max(axis=2, keepdims=True), x.shape)], axis=-1)
    x = nn.Dense(self.width, name="group2")(nn.gelu(nn.Dense(self.width, name="group1")(x))).max(axis=2)
    x = x + nn.Dense(self.width, name="centre2")(nn.gelu(nn.Dense(self.width, name="centre1")(centres)))
    x = nn.Dropout(self.dropout, broadcast_dims=(2,), deterministic=not train)(x)
    x = jnp.concatenate([first, x], axis=1)
    return Encoded(layer_norm("norm")(Transformer(self.depth, BlockSpec(self.heads), name="blocks")(x)))

"""Trainable modules between a trunk's tokens and the heads, by name.

A body is a flax module with `__call__(tokens [b, n, c], train=False) -> [b, m, d]`, class token first. It is the
encoder of modalities whose trunk only cuts a raw signal into tokens (point groups, EEG patches).
"""

from __future__ import annotations

import importlib

import flax.linen as nn
from jaxtyping import Array, Float

NO_OPTIONS = ("parent", "name")  # attributes of every flax module
BODIES = {
  "encoder": "codebind_jax.models.encoder_body.EncoderBody",
  "mlp": "codebind_jax.models.bodies.Mlp",
  "series": "codebind_jax.models.series.Series",
  "points": "codebind_jax.models.points.Points",
}


def body_class(name: str) -> type[nn.Module]:
  """The class that `config.model.towers.*.body` names; its attributes, without `NO_OPTIONS`, are `body_options`.

  Raises:
    ValueError: for an unknown name.
  """
  if name not in BODIES:
    raise ValueError(f"body: got {name!r}, allowed are {sorted(BODIES)}")
  module, kind = BODIES[name].rsplit(".", 1)
  return getattr(importlib.import_module(module), kind)


class Mlp(nn.Module):
  """Two GELU layers with a residual, token by token.

  Attributes:
    width: width of both layers.
    dropout: dropout rate after each layer.
  """

  width: int = 256
  dropout: float = 0.0

  @nn.compact
  def __call__(self, tokens: Float[Array, "b n c"], train: bool = False) -> Float[Array, "b n d"]:
    """Maps tokens to `width`."""
    drop = nn.Dropout(self.dropout, deterministic=not train)
    x = drop(nn.gelu(nn.Dense(self.width, name="first")(tokens)))
    return x + drop(nn.gelu(nn.Dense(self.width, name="second")(nn.LayerNorm(name="norm")(x))))

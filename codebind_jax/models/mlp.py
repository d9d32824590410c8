"""A small network for vectors, trained from scratch."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from codebind_jax.models.encoder import Encoded


class Mlp(nn.Module):
  """Two GELU layers with a residual, token by token.

  Attributes:
    width: width of both layers.
    dropout: dropout rate after each layer.
  """

  width: int = 256
  dropout: float = 0.0

  @nn.compact
  def __call__(self, tokens: Float[Array, "b n c"], train: bool = False) -> Encoded:
    """Tokens [b, n, width]; in training with dropout it needs the random stream "dropout"."""
    drop = nn.Dropout(self.dropout, deterministic=not train)
    x = drop(nn.gelu(nn.Dense(self.width, name="first")(tokens)))
    return Encoded(x + drop(nn.gelu(nn.Dense(self.width, name="second")(nn.LayerNorm(name="norm")(x)))))

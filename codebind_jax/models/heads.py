"""The map from a trunk's tokens to the shared or specific part of the embedding."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from codebind_jax.models.transformer import TRUNK_EPS

INITS = {
  "orthogonal": nn.initializers.orthogonal(),
  "lecun": nn.initializers.lecun_normal(),
}


class Head(nn.Module):
  """LayerNorm and a linear map on all tokens (spec 1.3); optionally one hidden layer.

  Attributes:
    width: of the output.
    hidden: width of the hidden GELU layer; 0 for none.
    dropout: rate, after LayerNorm and hidden layer.
    start: of the linear map, a key of `INITS`.
    norm, eps: whether there is a LayerNorm, and its epsilon.
    proj: whether there is a linear map; without one `width` is the tokens'.
    bias: whether the linear map has a bias.
  """

  width: int
  hidden: int = 0
  dropout: float = 0.0
  start: str = "orthogonal"
  norm: bool = True
  eps: float = TRUNK_EPS
  proj: bool = True
  bias: bool = False

  @nn.compact
  def __call__(self, tokens: Float[Array, "b n c"], train: bool = False) -> Float[Array, "b n d"]:
    """Maps tokens to `width`; dropout needs an rng named `dropout` when `train`."""
    x = nn.LayerNorm(epsilon=self.eps, name="norm")(tokens) if self.norm else tokens
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    if self.hidden:
      x = nn.gelu(nn.Dense(self.hidden, name="hidden")(x))
      x = nn.Dropout(self.dropout)(x, deterministic=not train)
    if not self.proj:
      return x
    return nn.Dense(self.width, use_bias=self.bias, kernel_init=INITS[self.start], name="proj")(x)

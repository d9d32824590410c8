"""A small network for a series of patches (EEG and the like), class token first."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from codebind_jax.models.encoder import Encoded
from codebind_jax.models.transformer import BlockSpec, Transformer, layer_norm


class Series(nn.Module):
  """Patches in time -> class token and patch tokens.

  With `depth` 0 the class token is a linear map of all patches and the only token, which suits a few hundred training
  recordings. Otherwise patches are embedded, get learned positions and a class token, and pass a small transformer.

  Attributes:
    width: d, the width of the output tokens.
    depth: transformer blocks.
    heads: attention heads; must divide the width.
    dropout: share of patch values set to zero in training.
    mean, deviation: of each patch value [n, c] over training items, by which the patches are standardised first; () for
      patches that are taken as they are.
  """

  width: int = 64
  depth: int = 0
  heads: int = 4
  dropout: float = 0.0
  mean: Sequence[Sequence[float]] = ()
  deviation: Sequence[Sequence[float]] = ()

  @nn.compact
  def __call__(self, tokens: Float[Array, "b n c"], train: bool = False) -> Encoded:
    """Tokens [b, 1, d] (depth 0) or [b, 1 + n, d]; in training with dropout it needs the random stream "dropout"."""
    x = (tokens - jnp.asarray(self.mean)) / jnp.asarray(self.deviation) if self.mean else tokens
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    if not self.depth:
      return Encoded(nn.Dense(self.width, name="flat")(x.reshape(x.shape[0], 1, -1)))
    x = nn.Dense(self.width, name="patch")(x)
    first = self.param("cls_token", nn.initializers.normal(0.02), (self.width,))
    x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, self.width)), x], axis=1)
    x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
    x = Transformer(self.depth, BlockSpec(self.heads), name="blocks")(x)
    return Encoded(layer_norm("norm")(x))

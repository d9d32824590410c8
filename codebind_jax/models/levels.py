"""Parts of DCID and FCID around the quantiser: the decoder of a level, and FCID's coarse level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class TokenDecoder(nn.Module):
  """Reconstructs a token from its code and its specific part: Linear(concat(Linear(code), specific))."""

  width: int
  inner: int

  @nn.compact
  def __call__(
    self, quantized: Float[Array | np.ndarray, "b t d"], specific: Float[Array | np.ndarray, "b t p"]
  ) -> Float[Array, "b t _"]:
    """Tokens of `width`."""
    hidden = nn.Dense(self.inner, name="code")(quantized)
    return nn.Dense(self.width, name="token")(jnp.concatenate([hidden, specific], axis=-1))


class Coarse(NamedTuple):
  """A modality's compressed features u, and the general and specific parts made of them, [b, 1 or t, d] each."""

  compressed: Array
  general: Array
  specific: Array


class CoarseLevel(nn.Module):
  """FCID's coarse level: u = Linear(mean over steps), general c = ReLU(Linear u), specific = ReLU(Linear u).

  Modalities of one group share all three maps (audio and video do, text has its own), as in the released code.

  Attributes:
    groups: modality -> name of its group.
    width: output width of the three maps.
  """

  groups: Mapping[str, str]
  width: int

  @nn.compact
  def __call__(
    self, features: Mapping[str, Float[Array | np.ndarray, "b t _"]], per_step: bool = False
  ) -> dict[str, Coarse]:
    """The coarse level of each modality.

    Args:
      features: fine general features.
      per_step: treat every step as a sequence of one, as the release does in inference.
    """
    maps = {
      group: [nn.Dense(self.width, name=f"{group}_{part}") for part in ("compress", "general", "specific")]
      for group in sorted(set(self.groups.values()))
    }
    out = {}
    for name, x in features.items():
      compress, general, specific = maps[self.groups[name]]
      u = compress(x if per_step else jnp.mean(x, axis=1, keepdims=True))
      out[name] = Coarse(u, nn.relu(general(u)), nn.relu(specific(u)))
    return out

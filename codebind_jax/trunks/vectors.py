"""Arrays of one shape as tokens, without a network, for synthetic data and precomputed features.

Modality: any.
Takes: arrays [tokens, width] of one shape: features that you have computed.
Choose it for: features of an encoder of your own, which stay as they are.
"""

from __future__ import annotations

from pathlib import Path

import flax.linen as nn
from jaxtyping import Array, Float

from codebind_jax.data.inputs import Input
from codebind_jax.data.preparation.vectors import Vectors
from codebind_jax.models.encoder import Encoded
from codebind_jax.trunks.base import Trunk, fingerprint
from codebind_jax.trunks.options import Length, Name, Place, Side


class Prepared(nn.Module):
  """Tokens as they were prepared; no parameters."""

  def __call__(self, tokens: Float[Array, "b n c"], train: bool = False) -> Encoded:
    """The input."""
    return Encoded(tokens)


def vectors_input(tokens: int, width: int, modality: str) -> Input:
  """Input of one shape; an item is [tokens, width], or [width] where `tokens` is 1. `modality` is for messages."""
  return Input((tokens, width), "float32", Vectors(tokens, width, modality), revision="raw-1")


def make_trunk(
  *, width: Side = 64, tokens: Length = 1, modality: Name = "vectors", weights: Place | Path = ""
) -> Trunk:
  """A trunk whose tokens are the input.

  Args:
    width: width C of a vector.
    tokens: number T of vectors an item; an input is [T, C], or [C] where T is 1.
    modality: the tower's modality, for messages.
    weights: unused, as the trunk has none; every trunk takes it.
  """
  options, item = {"width": width, "tokens": tokens}, vectors_input(tokens, width, modality)
  return Trunk(
    name="vectors", modality=modality, module=Prepared(), input=item,
    fingerprint=fingerprint({}, options, item.revision), options=options,
  )  # fmt: skip

"""Vectors through a small network, trained from scratch, for synthetic data and precomputed features.

Modality: any.
Takes: arrays [tokens, inputs] of one shape: features that you have computed, readings of a sensor.
Choose it for: features or readings with enough rows to train a small network; see also `vectors`.
"""

from __future__ import annotations

from pathlib import Path

from codebind_jax.models.mlp import Mlp
from codebind_jax.trunks.base import Trunk, fingerprint
from codebind_jax.trunks.options import Dropout, Length, Name, Place, Side
from codebind_jax.trunks.vectors import vectors_input


def make_trunk(
  *, inputs: Side = 64, tokens: Length = 1, width: Side = 256, dropout: Dropout = 0.0, modality: Name = "vectors",
  weights: Place | Path = "",
) -> Trunk:  # fmt: skip
  """A trunk of two layers, token by token.

  Args:
    inputs: width of an input's vectors.
    tokens: number T of vectors an item; an input is [T, inputs], or [inputs] where T is 1.
    width: width of both layers.
    dropout: share of values set to zero after each layer, while training.
    modality: the tower's modality, for messages.
    weights: unused, as the trunk has no checkpoint; every trunk takes it.
  """
  options = {"inputs": inputs, "tokens": tokens, "width": width, "dropout": dropout}
  item = vectors_input(tokens, inputs, modality)
  return Trunk(
    name="mlp", modality=modality, module=Mlp(width, dropout), input=item,
    fingerprint=fingerprint({}, options, f"mlp-1 {item.revision}"), options=options,
  )  # fmt: skip

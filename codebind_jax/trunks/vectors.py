"""Arrays of one shape as tokens, without a network, for synthetic data and precomputed features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from codebind_jax.trunks.base import Trunk, fingerprint


def make_trunk(*, width: int = 64, tokens: int = 1, modality: str = "vectors", weights: str | Path = "") -> Trunk:
  """A trunk whose tokens are the input.

  Args:
    width: C.
    tokens: T; an input is [T, C], or [C] where T is 1.
    modality: for messages.
    weights: unused, as the trunk has none; every trunk takes it.
  """
  shape = (tokens, width)

  def preprocess(value: Any) -> np.ndarray:
    array = np.asarray(value, np.float32)
    if array.shape != shape and not (tokens == 1 and array.shape == (width,)):
      raise ValueError(f"{modality}: got an array of shape {array.shape}, allowed is {shape}")
    return array.reshape(shape)

  options = {"width": width, "tokens": tokens}
  return Trunk(
    name="vectors", modality=modality, width=width, num_tokens=tokens, params={}, apply=lambda _, x: jnp.asarray(x),
    preprocess=preprocess, fingerprint=fingerprint({}, options, "raw-1"), options=options,
  )  # fmt: skip



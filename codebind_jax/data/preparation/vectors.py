"""Arrays of one shape, without a sensor: synthetic data and precomputed features."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float32

from codebind_jax.data.reading import unmasked


@dataclasses.dataclass(frozen=True)
class Vectors:
  """An array as tokens.

  Attributes:
    tokens, width: of the result; a value may be [width] where `tokens` is 1.
    modality: for messages.
  """

  tokens: int
  width: int
  modality: str

  def __call__(self, value: Any) -> Float32[np.ndarray, "tokens width"]:
    """The tokens of an array.

    Raises:
      ValueError: if it has another shape.
    """
    array, shape = unmasked(value, self.modality).astype(np.float32, copy=False), (self.tokens, self.width)
    if array.shape != shape and not (self.tokens == 1 and array.shape == (self.width,)):
      raise ValueError(f"{self.modality}: got an array of shape {array.shape}, allowed is {shape}")
    return array.reshape(shape)

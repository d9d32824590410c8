"""Text without a checkpoint, for synthetic data: the normalised sum of one fixed random vector a word."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from codebind_jax.data.inputs import Input
from codebind_jax.trunks.base import Trunk, fingerprint
from codebind_jax.trunks.vectors import Prepared


def make_trunk(*, width: int = 64, weights: str | Path = "") -> Trunk:
  """A trunk of one token a text.

  Args:
    width: C.
    weights: unused, as the trunk has none; every trunk takes it.
  """

  def word(text: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(width)

  def prepare(value: Any) -> np.ndarray:
    words = re.findall(r"\w+", str(value).lower())
    if not words:
      raise ValueError(f"text: {value!r} has no word")
    total = sum(word(text) for text in words)
    return (np.sqrt(width) * total / np.linalg.norm(total))[None].astype(np.float32)

  options, item = {"width": width}, Input((1, width), "float32", prepare, revision="words-1")
  return Trunk(
    name="hashed_words", modality="text", module=Prepared(), input=item,
    fingerprint=fingerprint({}, options, item.revision), options=options,
  )  # fmt: skip

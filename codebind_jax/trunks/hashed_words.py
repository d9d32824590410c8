"""Text without a checkpoint, for synthetic data: the normalised sum of one fixed random vector a word.

Modality: text.
Takes: texts, as a bag of words.
Choose it for: tests and synthetic data; it knows no meanings.
"""

from __future__ import annotations

from pathlib import Path

from codebind_jax.data.inputs import Input
from codebind_jax.data.preparation.texts import HashedWords
from codebind_jax.trunks.base import Trunk, fingerprint
from codebind_jax.trunks.options import Place, Side
from codebind_jax.trunks.vectors import Prepared


def make_trunk(*, width: Side = 64, weights: Place | Path = "") -> Trunk:
  """A trunk of one token a text.

  Args:
    width: width of a text's vector.
    weights: unused, as the trunk has none; every trunk takes it.
  """
  options, item = {"width": width}, Input((1, width), "float32", HashedWords(width), revision="words-1")
  return Trunk(
    name="hashed_words", modality="text", module=Prepared(), input=item,
    fingerprint=fingerprint({}, options, item.revision), options=options,
  )  # fmt: skip

"""Texts to padded token ids."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int32

# Changes whenever the same text would give other ids: it is part of the key of cached features.
REVISION = "text-1"


@dataclasses.dataclass(frozen=True)
class Tokenize:
  """One text -> int32 ids of one fixed length, padded with `pad_id`; a longer text is cut and keeps its last id.

  Attributes:
    tokenizer: a `tokenizers.Tokenizer`.
    max_length: ids per text, the special ones included.
    pad_id: the id of padding.
  """

  tokenizer: Any
  max_length: int
  pad_id: int = 0

  def __post_init__(self):
    if self.max_length < 3:
      raise ValueError(f"max_length: got {self.max_length}, at least 3 are needed for one word and its two marks")
    self.tokenizer.no_truncation()
    self.tokenizer.no_padding()

  def __call__(self, text: Any) -> Int32[np.ndarray, "n"]:
    """Ids of one text.

    Raises:
      ValueError: if it is not a string or holds nothing but spaces.
    """
    if not isinstance(text, str) or not text.strip():
      raise ValueError(f"text: got {text!r}, a string that is not empty is needed")
    ids = self.tokenizer.encode(text).ids
    if len(ids) > self.max_length:
      logging.warning("text of %d tokens cut to %d: %.60r...", len(ids), self.max_length, text)
      ids = ids[: self.max_length - 1] + ids[-1:]
    padded = np.full((self.max_length,), self.pad_id, np.int32)
    padded[: len(ids)] = ids
    return padded


def trim_to_bucket(
  items: Sequence[np.ndarray], *, pad_id: int = 0, buckets: Sequence[int] = (8, 16, 32, 64, 128, 256)
) -> Int32[np.ndarray, "b n"]:
  """A batch cut to the smallest bucket that holds its longest text, so that few shapes are ever compiled.

  Args:
    items: id arrays of one length, padding at the end.
    pad_id: the id of padding.
    buckets: allowed lengths, ascending; the items' own length is always allowed.
  """
  batch = np.stack(list(items))
  used = int((batch != pad_id).sum(axis=1).max())
  length = min([bucket for bucket in buckets if bucket >= used] + [batch.shape[1]])
  return np.ascontiguousarray(batch[:, :length])

"""Texts to padded token ids."""

import dataclasses
import functools
import json
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from codebind_jax.data.reading import remark

# Changes whenever the same text would give other ids: it is part of the key of cached features.
REVISION = "text-1"
WORDS = 512  # that a text without a context's length has
_CHARACTERS = 1000  # read for each token that there is room for


def checked(text: Any, length: int, *, blank: bool = False) -> str:
  """The text in Unicode's composed form (NFC), of a very long one the beginning, which is said.

  Args:
    text: a string.
    length: tokens that there is room for; a thousand characters are read for each.
    blank: a text of nothing but spaces is let pass.

  Raises:
    ValueError: if it is not a string, holds nothing but spaces, or has half of a surrogate pair.
  """
  if blank and not isinstance(text, str):
    raise ValueError(f"text: got {type(text).__name__}, a string is needed")
  if not isinstance(text, str) or not (blank or text.strip()):
    raise ValueError(f"text: got {text!r:.80}, a string that is not empty is needed")
  if len(text) > length * _CHARACTERS:
    remark("cut texts", f"text of {len(text):,} characters: its first {length * _CHARACTERS:,} are read: {text:.60}...")
    text = text.lstrip()[: length * _CHARACTERS]
  if text.isascii():
    return text
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f"text: has half of a surrogate pair at character {error.start}, in {text!r:.80}") from error
  return unicodedata.normalize("NFC", text)


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A tokenizer for which names of marks in a text, such as "[PAD]" or "</s>", are text.

  Attributes:
    tokenizer: a `tokenizers.Tokenizer`.
    marks: names of marks in a text are marks all the same, as in CLIP's releases, and it is said.
  """

  tokenizer: Any
  marks: bool = False

  def __post_init__(self):
    self.tokenizer.encode_special_tokens = not self.marks

  def __setstate__(self, state: dict[str, Any]):
    self.__dict__.update(state)
    self.__post_init__()  # pickles of tokenizers do not have it

  @functools.cached_property
  def _marks(self) -> dict[int, str]:
    added = {number: str(token) for number, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
    one = self.tokenizer.encode("a")
    marks = added | {i: t for i, t, mark in zip(one.ids, one.tokens, one.special_tokens_mask) if mark}
    return {number: name for number, name in marks.items() if number != self._unknown}

  @functools.cached_property
  def _unknown(self) -> int | None:
    model = json.loads(self.tokenizer.to_str())["model"]
    token = model.get("unk_token")
    return self.tokenizer.token_to_id(token) if token is not None else model.get("unk_id")

  def __call__(self, text: str, length: int) -> list[int]:
    """Ids of a text with the tokenizer's marks, at most `length`, the last one kept; what is cut is said.

    Args:
      text: as `checked` gives it, and as the tokenizer's model wants it.
      length: ids, the marks included.

    Raises:
      ValueError: if nothing is left of a text that is not blank.
    """
    parts, words = self._parts(text)
    if self.marks and not self._marks.keys().isdisjoint(words):
      remark("marks in texts", f"text with a mark of the tokenizer, which is taken for the mark: {text:.60}")
    elif not self._marks.keys().isdisjoint(words):  # a model that has its marks among its words
      spaced = functools.reduce(lambda t, mark: t.replace(mark, f"{mark[:1]} {mark[1:]}"), self._marks.values(), text)
      parts, words = self._parts(spaced)
      if found := self._marks.keys() & set(words):
        raise ValueError(f"text: becomes the mark {self._marks[found.pop()]!r}, in {text!r:.80}")
    if not words and text.strip():
      raise ValueError(f"text: nothing is left of {text!r:.80} for the tokenizer")
    if words and set(words) == {self._unknown}:
      remark("texts of unknown words", f"text of words that the tokenizer does not know: {text:.60}")
    total = len(words) + sum(parts[0].special_tokens_mask)
    if total <= length:
      return parts[0].ids
    remark("cut texts", f"text of {total} tokens cut to {length}: {text:.60}...")
    return parts[0].ids[: length - 1] + parts[0].ids[-1:] if len(parts) == 1 else parts[0].ids

  def _parts(self, text: str) -> tuple[list[Any], list[int]]:
    """The encoding and what a tokenizer that cuts has left over; and all ids that are no marks."""
    whole = self.tokenizer.encode(text)
    parts = [whole, *whole.overflowing]
    return parts, [i for part in parts for i, mark in zip(part.ids, part.special_tokens_mask) if not mark]


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

  @functools.cached_property
  def _encoder(self) -> Encoder:
    return Encoder(self.tokenizer)

  def __call__(self, text: Any) -> Int32[np.ndarray, "n"]:
    """Ids of one text.

    Raises:
      ValueError: if it is not a string, or nothing is left of it for the tokenizer.
    """
    ids = self._encoder(checked(text, self.max_length), self.max_length)
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

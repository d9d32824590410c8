"""Texts as text encoders want them: ids of a tokenizer, padded to one length, or sums of words' vectors.

CLIP's tokenizer (arXiv 2103.00020) is a lower-cased byte pair encoding of 49,408 ids, for checkpoints without their
own. The merges in `clip_merges.txt.gz` are OpenAI's (MIT, see NOTICE). ImageBind, OpenCLIP and CLIP share them.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import html
import json
import re
import string
from collections.abc import Callable
from importlib import resources
from typing import Any

import ftfy
import numpy as np
import tokenizers
from jaxtyping import Float32, Int32
from tokenizers import models, pre_tokenizers, processors

from codebind_jax.data.inputs import Input
from codebind_jax.data.transforms import text as text_transforms

CONTEXT = 77
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def without_punctuation(text: str) -> str:
  """The text without ASCII punctuation, with single blanks for white space (SigLIP's "canonicalize")."""
  return " ".join(text.translate(_NO_PUNCTUATION).split())


def clean(text: str) -> str:
  """A text as CLIP's tokenizer sees it: mended by ftfy, HTML entities resolved, one space between words, lower case."""
  if not (text.isascii() and text.isprintable() and "&" not in text):  # else there is nothing to mend
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
  text = text.strip()
  return re.sub(r"\s+", " ", text).strip().lower()


# In revisions a function has the name that it had first: other ones would make cached features and saved models anew.
_NAMES = {
  without_punctuation: "codebind_jax.trunks.tokens.without_punctuation",
  clean: "codebind_jax.trunks.clip_tokenizer.clean",
}


@dataclasses.dataclass(frozen=True)
class Ids:
  """One text -> int32 ids of one fixed length.

  Attributes:
    tokenizer: cuts longer texts to `length` ids, special ones included, and keeps the end mark.
    length: ids per text.
    pad_id: the id of padding, after the text.
    lower: texts are lower-cased first.
    clean: what happens to a text before that, such as `clean`; None for nothing.
    left: padding stands before the text.
    marks: as in `data.transforms.text.Encoder`.
  """

  tokenizer: tokenizers.Tokenizer
  length: int
  pad_id: int
  lower: bool = False
  clean: Callable[[str], str] | None = None
  left: bool = False
  marks: bool = False

  def __post_init__(self):
    self.tokenizer.no_padding()
    self.tokenizer.enable_truncation(self.length)

  @functools.cached_property
  def _encoder(self) -> text_transforms.Encoder:
    return text_transforms.Encoder(self.tokenizer, self.marks)

  def __call__(self, text: Any) -> Int32[np.ndarray, " n"]:
    """Ids of one text.

    Raises:
      ValueError: if it is not a string, or nothing is left of it for the tokenizer; a blank text is the empty one.
    """
    whole = text_transforms.checked(text, self.length, blank=True)
    text = self.clean(whole) if self.clean else whole
    if whole.strip() and not text.strip():
      raise ValueError(f"text: nothing is left of {whole!r:.80} after cleaning")
    ids = self._encoder(text.lower() if self.lower else text, self.length)
    out = np.full((self.length,), self.pad_id, np.int32)
    start = self.length - len(ids) if self.left else 0
    out[start : start + len(ids)] = ids
    return out


def text_input(ids: Ids) -> Input:
  """Input of a text encoder; the whole tokenizer is part of its revision."""
  vocabulary = json.dumps(json.loads(ids.tokenizer.to_str()), sort_keys=True)
  flags = f"{ids.lower} {ids.left} {_name(ids.clean)}"
  revision = f"{text_transforms.REVISION} {ids.length} {ids.pad_id} {flags}{vocabulary}"
  return Input((ids.length,), "int32", ids, revision=revision)


def _name(clean: Callable[[str], str] | None) -> str:
  return f"{_NAMES.get(clean) or f'{clean.__module__}.{clean.__qualname__}'} " if clean else ""


def _characters() -> list[str]:
  """A printable character for each byte in the order of the vocabulary: printable Latin-1 first, then the others."""
  printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
  return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def clip_tokenizer(start: str = "<|startoftext|>", end: str = "<|endoftext|>") -> tokenizers.Tokenizer:
  """The tokenizer of texts that `clean` has seen; they begin with `start` (49406) and finish with `end` (49407).

  Args:
    start, end: names of the marks; a text that contains one of them contains the mark (OpenCLIP has other names).
  """
  content = resources.files(__package__).joinpath("clip_merges.txt.gz").read_bytes()
  merges = [tuple(line.split(" ")) for line in gzip.decompress(content).decode().splitlines()]
  characters = _characters()
  words = [*characters, *(c + "</w>" for c in characters), *map("".join, merges), start, end]
  vocabulary = {word: number for number, word in enumerate(words)}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
  tokenizer.add_special_tokens([start, end])
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(tokenizers.Regex(_WORDS), "removed", invert=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ])  # fmt: skip
  marks = [(start, vocabulary[start]), (end, vocabulary[end])]
  tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $0 {end}", special_tokens=marks)
  return tokenizer


def clip_ids(length: int = CONTEXT, start: str = "<|startoftext|>", end: str = "<|endoftext|>") -> Ids:
  """One text -> its ids, padded with 0; a longer text is cut and keeps its end mark."""
  return Ids(clip_tokenizer(start, end), length, pad_id=0, clean=clean, marks=True)


@dataclasses.dataclass(frozen=True)
class HashedWords:
  """The normalised sum of one fixed random vector a word.

  Attributes:
    width: of the vectors; the sum's length is the root of it.
  """

  width: int

  def __call__(self, value: Any) -> Float32[np.ndarray, "1 width"]:
    """The vector of a text.

    Raises:
      ValueError: if it is no string or has no word.
    """
    words = re.findall(r"\w+", text_transforms.checked(value, text_transforms.WORDS).lower())
    if not words:
      raise ValueError(f"text: {value!r:.80} has no word")
    total = sum(self._word(text) for text in words)
    return (np.sqrt(self.width) * total / np.linalg.norm(total))[None].astype(np.float32)

  def _word(self, text: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(self.width)

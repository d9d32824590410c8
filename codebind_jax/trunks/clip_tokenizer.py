"""CLIP's tokenizer (arXiv 2103.00020): lower-cased byte pair encoding of 49,408 ids, for checkpoints without their own.

The merges in `clip_merges.txt.gz` are OpenAI's (MIT, see NOTICE). ImageBind, OpenCLIP and CLIP share them.
"""

from __future__ import annotations

import gzip
import html
import re
from importlib import resources

import ftfy
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from codebind_jax.trunks.tokens import Ids

CONTEXT = 77
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def clean(text: str) -> str:
  """A text as CLIP's tokenizer sees it: mended by ftfy, HTML entities resolved, one space between words, lower case."""
  text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
  return re.sub(r"\s+", " ", text).strip().lower()


def _characters() -> list[str]:
  """A printable character for each byte in the order of the vocabulary: printable Latin-1 first, then the others."""
  printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
  return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def clip_tokenizer(start: str = "<|startoftext|>", end: str = "<|endoftext|>") -> tokenizers.Tokenizer:
  """The tokenizer of texts that `clean` has seen; they begin with `start` (49406) and finish with `end` (49407).

  Args:
    start, end: names of the marks; a text that contains one of them contains the mark (OpenCLIP has other names).
  """
  content = resources.files("codebind_jax.trunks").joinpath("clip_merges.txt.gz").read_bytes()
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
  return Ids(clip_tokenizer(start, end), length, pad_id=0, clean=clean)

"""Texts as published text encoders want them: ids of a `tokenizers.Tokenizer`, padded to one length."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32

from codebind_jax.data.transforms import text as text_transforms
from codebind_jax.trunks.base import Input
from codebind_jax.trunks.checkpoint_files import note


@dataclasses.dataclass(frozen=True)
class Ids:
  """One text -> int32 ids of one fixed length.

  Attributes:
    tokenizer: cuts longer texts to `length` ids, special ones included, and keeps the end mark.
    length: ids per text.
    pad_id: the id of padding, after the text.
    lower: texts are lower-cased first.
  """

  tokenizer: tokenizers.Tokenizer
  length: int
  pad_id: int
  lower: bool = False

  def __post_init__(self):
    self.tokenizer.no_padding()
    self.tokenizer.enable_truncation(self.length)

  def __call__(self, text: Any) -> Int32[np.ndarray, " n"]:
    """Ids of one text.

    Raises:
      ValueError: if it is not a string.
    """
    if not isinstance(text, str):
      raise ValueError(f"text: got {type(text).__name__}, a string is needed")
    out = np.full((self.length,), self.pad_id, np.int32)
    ids = self.tokenizer.encode(text.lower() if self.lower else text).ids
    out[: len(ids)] = ids
    return out


def text_input(ids: Ids) -> Input:
  """Input of a text encoder; the whole tokenizer is part of its revision."""
  vocabulary = json.dumps(json.loads(ids.tokenizer.to_str()), sort_keys=True)
  revision = f"{text_transforms.REVISION} {ids.length} {ids.pad_id} {ids.lower} {vocabulary}"
  return Input((ids.length,), "int32", ids, revision=revision)


def folder_tokenizer(folder: Path) -> tokenizers.Tokenizer:
  """The tokenizer of a folder in Hugging Face layout: `tokenizer.json`, or a slow one's files by transformers.

  Raises:
    ValueError: if there is none, or it is not readable.
  """
  file = folder / "tokenizer.json"
  try:
    if file.is_file():
      note(file)
      return tokenizers.Tokenizer.from_file(str(file))
    if any((folder / name).is_file() for name in ("vocab.json", "spiece.model", "tokenizer.model")):
      from transformers import AutoTokenizer

      tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True).backend_tokenizer
      note(file, tokenizer.to_str().encode())
      return tokenizer
  except Exception as error:
    raise ValueError(f"{folder}: its tokenizer is not readable ({error})") from error
  raise ValueError(f"{folder}: has no tokenizer (tokenizer.json, or vocab.json with merges.txt)")


def folder_json(folder: Path, name: str) -> dict[str, Any]:
  """Content of a JSON file in a folder; {} if there is none.

  Raises:
    ValueError: if it is not a JSON object.
  """
  path = folder / name
  if not path.is_file():
    return {}
  note(path)
  try:
    content = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path}: not JSON ({error})") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path}: an object is needed, got {type(content).__name__}")
  return content

"""Texts as published text encoders want them: ids of a `tokenizers.Tokenizer`, padded to one length."""

from __future__ import annotations

import dataclasses
import json
import string
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32

from codebind_jax.data import sentencepiece
from codebind_jax.data.inputs import Input
from codebind_jax.data.transforms import text as text_transforms

SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.model")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def without_punctuation(text: str) -> str:
  """The text without ASCII punctuation, with single blanks for white space (SigLIP's "canonicalize")."""
  return " ".join(text.translate(_NO_PUNCTUATION).split())


@dataclasses.dataclass(frozen=True)
class Ids:
  """One text -> int32 ids of one fixed length.

  Attributes:
    tokenizer: cuts longer texts to `length` ids, special ones included, and keeps the end mark.
    length: ids per text.
    pad_id: the id of padding, after the text.
    lower: texts are lower-cased first.
    clean: what happens to a text before that, such as `clip_tokenizer.clean`; None for nothing.
    left: padding stands before the text.
  """

  tokenizer: tokenizers.Tokenizer
  length: int
  pad_id: int
  lower: bool = False
  clean: Callable[[str], str] | None = None
  left: bool = False

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
    text = self.clean(text) if self.clean else text
    ids = self.tokenizer.encode(text.lower() if self.lower else text).ids
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
  return f"{clean.__module__}.{clean.__qualname__} " if clean else ""


def has_tokenizer(folder: Path) -> bool:
  """Whether a folder has a file that `folder_tokenizer` reads."""
  return any((folder / name).is_file() for name in ("tokenizer.json", *SENTENCEPIECE, "vocab.json"))


def folder_tokenizer(folder: Path) -> tokenizers.Tokenizer:
  """The tokenizer of a folder in Hugging Face layout: `tokenizer.json`, a SentencePiece model (which adds no marks), or
  CLIP's `vocab.json` with `merges.txt`.

  Raises:
    ValueError: if there is none, or it is not readable.
  """
  file = folder / "tokenizer.json"
  try:
    if file.is_file():
      return tokenizers.Tokenizer.from_file(str(file))
    for name in SENTENCEPIECE:
      if (folder / name).is_file():
        return sentencepiece.read_tokenizer(folder / name)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
      return _byte_pairs(folder)
  except Exception as error:
    raise ValueError(f"{folder}: its tokenizer is not readable ({error})") from error
  files = f"tokenizer.json, {', '.join(SENTENCEPIECE)}, or vocab.json with merges.txt"
  raise ValueError(f"{folder}: has no tokenizer ({files})")


def _byte_pairs(folder: Path) -> tokenizers.Tokenizer:
  """CLIP's tokenizer from its vocabulary and merges, as transformers builds it."""
  vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
  lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
  merges = [tuple(line.split(" ")) for line in lines if line.count(" ") == 1 and not line.startswith("#version")]
  start, end = "<|startoftext|>", "<|endoftext|>"
  if start not in vocabulary or end not in vocabulary:
    raise ValueError(f"vocab.json lacks {start} or {end}: it is not CLIP's; save it as tokenizer.json")
  out = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=end))
  out.add_special_tokens([start, end])
  n, p = tokenizers.normalizers, tokenizers.pre_tokenizers
  out.normalizer = n.Sequence([n.NFC(), n.Replace(tokenizers.Regex(r"\s+"), " "), n.Lowercase()])
  words = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
  split = p.Split(tokenizers.Regex(words), "removed", invert=True)
  out.pre_tokenizer = p.Sequence([split, p.ByteLevel(add_prefix_space=False, use_regex=False)])
  marks = [(start, vocabulary[start]), (end, vocabulary[end])]
  out.post_processor = tokenizers.processors.TemplateProcessing(single=f"{start} $0 {end}", special_tokens=marks)
  return out


def model_type(path: Path) -> str:
  """`model_type` of a folder's `config.json`; "" where there is none, or it is not readable."""
  try:
    kind = folder_json(path, "config.json").get("model_type", "")
  except (ValueError, OSError):
    return ""
  return kind if isinstance(kind, str) else ""


def family_config(weights: str, folder: Path, kinds: Collection[str], family: str) -> dict[str, Any]:
  """Content of the `config.json` of a family's folder.

  Args:
    weights: the user's name of the folder, for errors.
    folder: its path.
    kinds: `model_type`s of the family.
    family: its name, for errors.

  Raises:
    ValueError: if there is no such folder, or it is not one of the family's.
  """
  if not weights or not folder.is_dir():
    raise ValueError(f"weights: {weights!r} is no folder{'' if folder.exists() else ' (no such path)'}")
  config = folder_json(folder, "config.json")
  if config.get("model_type") not in kinds:
    raise ValueError(f"{weights}: not a folder of {family} in Hugging Face layout: its config.json "
                     f"{'has model_type ' + repr(config.get('model_type')) if config else 'is missing'}, "
                     f"allowed are {', '.join(kinds)}")  # fmt: skip
  return config


def processor_config(folder: Path) -> tuple[dict[str, Any], Path]:
  """Content of a folder's image processor, {} if there is none, and its file."""
  whole = folder_json(folder, "processor_config.json").get("image_processor")  # transformers 5 with a processor
  if isinstance(whole, dict) and not (folder / "preprocessor_config.json").is_file():
    return whole, folder / "processor_config.json"
  return folder_json(folder, "preprocessor_config.json"), folder / "preprocessor_config.json"


def folder_json(folder: Path, name: str) -> dict[str, Any]:
  """Content of a JSON file in a folder; {} if there is none.

  Raises:
    ValueError: if it is not a JSON object.
  """
  path = folder / name
  if not path.is_file():
    return {}
  try:
    content = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path}: not JSON ({error})") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path}: an object is needed, got {type(content).__name__}")
  return content

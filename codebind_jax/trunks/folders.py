"""Folders in Hugging Face layout: configuration, tokenizer, image processor."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import tokenizers

from codebind_jax.data import sentencepiece

SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.model")


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
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: not JSON ({error})") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path}: an object is needed, got {type(content).__name__}")
  return content

"""Preprocessed raw inputs as tokens, for towers whose body is the encoder itself (`models/encoder_body.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from codebind_jax.data.transforms import image as image_transforms
from codebind_jax.data.transforms import text as text_transforms
from codebind_jax.models.encoder_body import EncoderBody, split_ids
from codebind_jax.trunks.base import Trunk, fingerprint, stack

_REVISION = "raw-input-1"
# CLIP's statistics of pixels in [0, 1], which ImageBind's image encoder was trained with.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make_trunk(
  *, modality: str = "image", size: tuple[int, ...] = (), tokenizer: str = "", weights: str | Path = ""
) -> Trunk:
  """Raw inputs of a modality in the form `EncoderBody` takes.

  Args:
    modality: "image" or "text".
    size: input size, the same as the body's; () for ImageBind's.
    tokenizer: for text, the path of a `tokenizer.json` whose end token has the highest id (CLIP's), or "letters" for
      tests.
    weights: unused, as the trunk has none; every trunk takes it.

  Raises:
    ValueError: for another modality, or text without a tokenizer.
  """
  body = EncoderBody(modality=modality, size=tuple(size))
  if modality == "image":
    side = body.item_shape()[0]

    def preprocess(value: Any) -> np.ndarray:
      pixels = image_transforms.resize(image_transforms.fit_square(image_transforms.read(value)), side) / 255.0
      return ((pixels - _MEAN) / _STD).astype(np.float32).reshape(side, -1)

    collate, key = stack, image_transforms.REVISION
  elif modality == "text":
    tokenize = text_transforms.Tokenize(_tokenizer(tokenizer), body.item_shape()[0])
    preprocess, key = tokenize, f"{text_transforms.REVISION} {tokenize.tokenizer.to_str()}"
    collate = lambda items: split_ids(stack(items))
  else:
    raise ValueError(f"trunk 'raw_input': modality {modality!r} is not allowed; allowed: image, text")
  tokens, width = body.token_shape()
  options = {"modality": modality, "size": tuple(size), "tokenizer": tokenizer}
  return Trunk(
    name="raw_input", modality=modality, width=width, num_tokens=tokens, params={}, apply=lambda params, batch: batch,
    preprocess=preprocess, fingerprint=fingerprint({}, options, f"{_REVISION} {key}"), collate=collate, options=options,
  )  # fmt: skip


def _tokenizer(path: str) -> Any:
  from tokenizers import Tokenizer

  from codebind_jax.trunks.minilm import letter_tokenizer

  if not path:
    raise ValueError("trunk 'raw_input': text needs options.tokenizer, the path of a tokenizer.json")
  return letter_tokenizer() if path == "letters" else Tokenizer.from_file(path)

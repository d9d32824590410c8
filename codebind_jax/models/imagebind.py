"""ImageBind and CodeBind checkpoints: tower shapes, and state dicts under their official names -> our parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from codebind_jax.models.tower import TowerSpec

_VISION = {"size": (2, 224, 224), "patch": (2, 14, 14), "channels": 3, "stem_norm": False, "pre_norm": True,
           "bias_kv": False}
_SQUARE = {"size": (224, 224), "patch": (16, 16)}

# ImageBind-Huge (arXiv 2305.05665) and the two sensors that CodeBind adds; shared width 1024.
HUGE = {
  "image": TowerSpec(1280, 32, 16, **_VISION),
  "text": TowerSpec(1024, 24, 16, (77,), bias_kv=False, logit_scale=1 / 0.07),
  "audio": TowerSpec(768, 12, 12, (128, 204), (16, 16), (10, 10), logit_scale=20.0),
  "depth": TowerSpec(384, 12, 8, logit_scale=5.0, **_SQUARE),
  "thermal": TowerSpec(768, 12, 12, logit_scale=10.0, **_SQUARE),
  "imu": TowerSpec(512, 6, 8, (2000,), (8,), channels=6, logit_scale=5.0),
  "tactile": TowerSpec(768, 12, 12, channels=3, logit_scale=5.0, **_SQUARE),
  "eeg": TowerSpec(768, 6, 6, (512,), (1,), channels=128, stem_bias=True, logit_scale=5.0),
}

OFFICIAL_NAMES = {"image": "vision"}
"""Our modality -> theirs, where they differ."""

_BLOCK = {"attn/qkv": "attn.in_proj_", "attn/out": "attn.out_proj.", "mlp/fc1": "mlp.fc1.", "mlp/fc2": "mlp.fc2.",
          "norm1": "norm_1.", "norm2": "norm_2."}
_DECODER_BLOCK = {"attn/qkv": "attn.qkv.", "attn/out": "attn.proj.", "mlp/fc1": "mlp.fc1.", "mlp/fc2": "mlp.fc2.",
                  "norm1": "norm1.", "norm2": "norm2."}
_DECODER = {"input_proj": "decoder_input_proj.", "input_norm": "input_proj_norm.", "embed": "decoder_embed.",
            "norm": "norm."}
# Buffers and never-used convolutions (spec section 7) that have no counterpart here.
_NOT_OURS = (r"modality_preprocessors\.text\.mask", r"decoder_heads\.\w+\.(hid_conv|out_conv)\..*")


def official_names(modality: str, path: str) -> tuple[str, ...]:
  """Official state-dict names that parameter `path` of a tower may have, the likeliest first; () if none is known.

  Example: `official_names("image", "trunk/blocks_0/attn/qkv/kernel")` is
  `("modality_trunks.vision.blocks.0.attn.in_proj_weight",)`.
  """
  m = OFFICIAL_NAMES.get(modality, modality)
  module, _, leaf = path.rpartition("/")
  kind = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
  part, _, rest = module.partition("/")
  block = re.fullmatch(r"(?:trunk|decoder)/blocks_(\d+)/(.+)", module)
  if part == "trunk":
    prefix = f"modality_trunks.{m}."
    if rest == "pre_norm":
      return (f"{prefix}pre_transformer_layer.0.{kind}",)
    if block:
      inner = f"attn.{leaf}" if leaf in ("bias_k", "bias_v") else _BLOCK[block[2]] + kind
      return (f"{prefix}blocks.{block[1]}.{inner}",)
  if part == "decoder":
    if block:
      return (f"decoder_trunks.{m}.decoder_blocks.{block[1]}.{_DECODER_BLOCK[block[2]]}{kind}",)
    if rest == "deconv":
      return (f"decoder_heads.{m}.deconv.{kind}",)
    return (f"decoder_trunks.{m}.pos_embed" if leaf == "positions" else f"decoder_trunks.{m}.{_DECODER[rest]}{kind}",)
  if part == "stem":
    prefix = f"modality_preprocessors.{m}."
    if leaf == "positions":
      return (f"{prefix}pos_embedding_helper.pos_embed", f"{prefix}pos_embed")
    stems = [f"{prefix}{kind_of_stem}_stem" for kind_of_stem in ("rgbt", "depth", "imu", "eeg")]
    if rest == "patch":
      return tuple(f"{stem}.proj.{index}{kind}" for stem in stems for index in ("", "1."))
    if rest == "norm":
      return tuple(f"{stem}.norm_layer.{kind}" for stem in stems)
    return (f"{prefix}token_embedding.weight" if rest == "embed" else prefix + leaf,)
  if part in ("shared", "specific"):
    prefix = f"modality_heads{'_mvq' if part == 'specific' else ''}.{m}."
    # Selection and dropout layers shift the linear layer's index.
    indices = ("0", "proj.0") if rest == "norm" else ("1", "2", "3", "proj.1")
    return tuple(f"{prefix}{index}.{kind}" for index in indices)
  return (f"modality_postprocessors.{m}.1.log_logit_scale",) if path == "log_logit_scale" else ()


def _convert(value: np.ndarray, path: str, shape: tuple[int, ...]) -> np.ndarray:
  """PyTorch layout -> ours: linear [out, in] transposed, convolutions channels last, leading ones dropped."""
  if path.endswith("deconv/kernel"):
    # PyTorch's transposed convolution is the gradient of a convolution: its kernel is ours mirrored.
    return np.moveaxis(np.flip(value, range(2, value.ndim)), (0, 1), (-2, -1))
  if path.endswith("patch/kernel"):
    value = value.reshape(value.shape[0], shape[-2], *(shape[:-2] if value.ndim == 2 else value.shape[2:]))
    return np.moveaxis(value, (0, 1), (-1, -2))
  if path.endswith("kernel"):
    return value.T
  return value.reshape([n for i, n in enumerate(value.shape) if n != 1 or i >= value.ndim - len(shape)])


def load(params: Mapping[str, Any], state_dict: Mapping[str, Any], dont_load: Sequence[str] = ()) -> dict[str, Any]:
  """Parameters of towers from an ImageBind or CodeBind state dict (arXiv 2305.05665, 2605.18257).

  Args:
    params: {modality: parameters of a `Tower`, and under `decoder` of a `Decoder`}; any part may be absent.
    state_dict: official names -> arrays.
    dont_load: regexes (full match) of our paths, such as `image/specific/.*`, that keep the value in `params`, or
      of official names, such as `decoder_.*`, that are not wanted.

  Returns:
    a tree like `params` with the loaded values in the types of `params`. Modalities that `params` lacks are left
    out and named in the log.

  Raises:
    ValueError: naming every parameter without a value, every unused name and every shape that differs.
  """
  skip = lambda name: any(re.fullmatch(pattern, name) for pattern in dont_load)
  missing, shapes, used = [], [], set()

  def pick(modality: str, path: str, leaf: Any) -> Any:
    names = [name for name in official_names(modality, path) if name in state_dict]
    used.update(names)
    if skip(f"{modality}/{path}"):
      return leaf
    if not names:
      missing.append(f"{modality}/{path}")
      return leaf
    value = _convert(np.asarray(state_dict[names[0]]), path, leaf.shape)
    if value.shape != leaf.shape:
      shapes.append(f"{modality}/{path} {leaf.shape} <- {names[0]} {value.shape}")
    return value.astype(leaf.dtype)

  def walk(modality: str, tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
      key: walk(modality, sub, f"{prefix}{key}/") if isinstance(sub, Mapping) else pick(modality, prefix + key, sub)
      for key, sub in tree.items()
    }

  loaded = {modality: walk(modality, tree, "") for modality, tree in params.items()}
  ours = {OFFICIAL_NAMES.get(modality, modality) for modality in params}
  foreign = {name for name in state_dict if (parts := name.split("."))[0].startswith(("modality_", "decoder_"))
             and len(parts) > 1 and parts[1] not in ours}
  if foreign:
    logging.info("load: left out modalities %s", sorted({name.split(".")[1] for name in foreign}))
  ignored = lambda name: skip(name) or any(re.fullmatch(pattern, name) for pattern in _NOT_OURS)
  unexpected = sorted(name for name in set(state_dict) - used - foreign if not ignored(name))
  if missing or unexpected or shapes:
    raise ValueError(f"state_dict: missing {missing}; unexpected {unexpected}; wrong shape {shapes}")
  return loaded

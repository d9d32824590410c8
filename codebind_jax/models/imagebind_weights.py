"""ImageBind and CodeBind checkpoints: state dicts under their official names -> parameters of `Encoder` and heads."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

SCALE = "log_logit_scale"

# Modality -> its official name, where they differ.
OFFICIAL_NAMES = {"image": "vision"}

_STEMS = [f"modality_preprocessors.{{m}}.{stem}_stem" for stem in ("rgbt", "depth", "imu", "eeg")]
_BLOCK = "modality_trunks.{m}.blocks.{0}."
_DECODER_BLOCK = "decoder_trunks.{m}.decoder_blocks.{0}."

# (path inside a modality, official names); first match wins. {m} modality, {0} {1} groups, {kind} weight or bias.
# Stems share one class here; selection and dropout layers shift the index of a head's linear layer.
_RULES = (
  (r"trunk/pre_norm/\w+", ["modality_trunks.{m}.pre_transformer_layer.0.{kind}"]),
  (r"trunk/blocks_(\d+)/attn/(bias_[kv])", [_BLOCK + "attn.{1}"]),
  (r"trunk/blocks_(\d+)/attn/qkv/\w+", [_BLOCK + "attn.in_proj_{kind}"]),
  (r"trunk/blocks_(\d+)/attn/out/\w+", [_BLOCK + "attn.out_proj.{kind}"]),
  (r"trunk/blocks_(\d+)/mlp/(fc[12])/\w+", [_BLOCK + "mlp.{1}.{kind}"]),
  (r"trunk/blocks_(\d+)/norm([12])/\w+", [_BLOCK + "norm_{1}.{kind}"]),
  (r"stem/cls_token", ["modality_preprocessors.{m}.cls_token"]),
  (r"stem/positions", [f"modality_preprocessors.{{m}}.{p}pos_embed" for p in ("pos_embedding_helper.", "")]),
  (r"stem/embed/embedding", ["modality_preprocessors.{m}.token_embedding.weight"]),
  (r"stem/patch/\w+", [f"{stem}.proj.{i}{{kind}}" for stem in _STEMS for i in ("", "1.")]),
  (r"stem/norm/\w+", [f"{stem}.norm_layer.{{kind}}" for stem in _STEMS]),
  (r"shared/norm/\w+", [f"modality_heads.{{m}}.{i}.{{kind}}" for i in ("0", "proj.0")]),
  (r"shared/proj/\w+", [f"modality_heads.{{m}}.{i}.{{kind}}" for i in ("1", "2", "3", "proj.1")]),
  (r"specific/norm/\w+", [f"modality_heads_mvq.{{m}}.{i}.{{kind}}" for i in ("0", "proj.0")]),
  (r"specific/proj/\w+", [f"modality_heads_mvq.{{m}}.{i}.{{kind}}" for i in ("1", "2", "3", "proj.1")]),
  (SCALE, ["modality_postprocessors.{m}.1.log_logit_scale"]),
  (r"decoder/positions", ["decoder_trunks.{m}.pos_embed"]),
  (r"decoder/input_proj/\w+", ["decoder_trunks.{m}.decoder_input_proj.{kind}"]),
  (r"decoder/input_norm/\w+", ["decoder_trunks.{m}.input_proj_norm.{kind}"]),
  (r"decoder/embed/\w+", ["decoder_trunks.{m}.decoder_embed.{kind}"]),
  (r"decoder/norm/\w+", ["decoder_trunks.{m}.norm.{kind}"]),
  (r"decoder/blocks_(\d+)/attn/qkv/\w+", [_DECODER_BLOCK + "attn.qkv.{kind}"]),
  (r"decoder/blocks_(\d+)/attn/out/\w+", [_DECODER_BLOCK + "attn.proj.{kind}"]),
  (r"decoder/blocks_(\d+)/mlp/(fc[12])/\w+", [_DECODER_BLOCK + "mlp.{1}.{kind}"]),
  (r"decoder/blocks_(\d+)/norm([12])/\w+", [_DECODER_BLOCK + "norm{1}.{kind}"]),
  (r"decoder/deconv/\w+", ["decoder_heads.{m}.deconv.{kind}"]),
)
# Official names without a counterpart here: buffers and never-used convolutions (spec section 7).
_IGNORED = (r"modality_preprocessors\.text\.mask", r"decoder_heads\.\w+\.(hid_conv|out_conv)\..*")


def official_names(modality: str, path: str) -> list[str]:
  """Official state-dict names that parameter `path` of a modality may have; [] if none is known.

  Example: `official_names("image", "trunk/blocks_0/attn/qkv/kernel")` is
  `["modality_trunks.vision.blocks.0.attn.in_proj_weight"]`.
  """
  leaf = path.rpartition("/")[2]
  kind = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
  for pattern, names in _RULES:
    if match := re.fullmatch(pattern, path):
      return [name.format(*match.groups(), m=OFFICIAL_NAMES.get(modality, modality), kind=kind) for name in names]
  return []


def _convert(value: np.ndarray, path: str, shape: tuple[int, ...]) -> np.ndarray:
  """PyTorch layout -> flax layout: linear [out, in] transposed, convolutions channels last, leading ones dropped."""
  if path.endswith("deconv/kernel"):
    # PyTorch's transposed convolution is the gradient of a convolution: its kernel is flax's mirrored.
    return np.moveaxis(np.flip(value, range(2, value.ndim)), (0, 1), (-2, -1))
  if path.endswith("patch/kernel"):
    if value.ndim == 2 and value.size == math.prod(shape):
      value = value.reshape(-1, shape[-2], *shape[:-2])  # the IMU's linear layer over [channels, samples]
    return np.moveaxis(value, (0, 1), (-1, -2))
  if path.endswith("kernel"):
    return value.T
  return value.reshape([n for i, n in enumerate(value.shape) if n != 1 or i >= value.ndim - len(shape)])


def load(params: Mapping[str, Any], state_dict: Mapping[str, Any], dont_load: Sequence[str] = ()) -> dict[str, Any]:
  """Parameters of modalities from an ImageBind or CodeBind state dict (arXiv 2305.05665, 2605.18257).

  Args:
    params: {modality: {stem, trunk, shared, specific, decoder, log_logit_scale}}; any part may be absent. The scale may
      also stand beside the modality as `<modality>_log_logit_scale`. A scanned trunk's blocks are stacked.
    state_dict: official names -> arrays.
    dont_load: regexes (full match) of paths, such as `image/specific/.*`, that keep the value in `params`, or of
      official names, such as `decoder_.*`, to leave out.

  Returns:
    a tree like `params` with the loaded values in the types of `params`. The log names modalities of the state dict
    that `params` lacks; they are left out.

  Raises:
    ValueError: naming every parameter without a value, every unused name and every shape that differs.
  """
  skip = lambda name: any(re.fullmatch(pattern, name) for pattern in dont_load)
  missing, shapes, used = [], [], set()

  def pick(modality: str, path: str, leaf: Any) -> Any:
    if "/blocks/" in path:  # of a scanned trunk: one array for all blocks
      shape = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
      layers = [leaf[i] if skip(f"{modality}/{path}") else shape for i in range(leaf.shape[0])]
      layers = [pick(modality, path.replace("/blocks/", f"/blocks_{i}/"), layer) for i, layer in enumerate(layers)]
      return leaf if any(layer is shape for layer in layers) else np.stack(layers)
    names = [name for name in official_names(modality, path) if name in state_dict]
    used.update(names)
    if skip(f"{modality}/{path}"):
      return leaf
    if not names and (modality, path) == ("image", SCALE):
      return np.zeros(leaf.shape, leaf.dtype)
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

  loaded = {
    key: walk(key, tree, "") if isinstance(tree, Mapping) else pick(key.removesuffix("_" + SCALE), SCALE, tree)
    for key, tree in params.items()
  }
  known = {OFFICIAL_NAMES.get(key, key) for key in params}
  foreign = {name for name in state_dict if (parts := name.split("."))[0].startswith(("modality_", "decoder_"))
             and len(parts) > 1 and parts[1] not in known}
  if foreign:
    logging.info("load: left out modalities %s", sorted({name.split(".")[1] for name in foreign}))
  ignored = lambda name: skip(name) or any(re.fullmatch(pattern, name) for pattern in _IGNORED)
  unexpected = sorted(name for name in set(state_dict) - used - foreign if not ignored(name))
  if missing or unexpected or shapes:
    raise ValueError(f"state_dict: missing {missing}; unexpected {unexpected}; wrong shape {shapes}")
  return loaded

"""CLIP in Hugging Face layout (arXiv 2103.00020): `config.json`, `model.safetensors`, tokenizer, preprocessor.

Takes: pictures; texts of up to 77 tokens.
Choose it for: the usual base for pictures and texts; permissive weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codebind_jax.data.preparation.pictures import CLIP_MEAN, CLIP_STD, picture_input, processor_picture
from codebind_jax.data.preparation.texts import Ids, text_input
from codebind_jax.models.encoder import Encoder, EncoderSpec
from codebind_jax.models.heads import Head
from codebind_jax.trunks import names
from codebind_jax.trunks.base import PublishedHead, Trunk, fingerprint
from codebind_jax.trunks.checkpoint_files import Weights, folder_weights
from codebind_jax.trunks.folders import (
  family_config,
  folder_json,
  folder_tokenizer,
  has_tokenizer,
  model_type,
  processor_config,
)
from codebind_jax.trunks.options import Dtype, Name, Place

_REVISION = "clip-1"
MODALITIES = ("image", "text")
LICENCE = "MIT (OpenAI's weights)"

_ACT = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_TOWER = {"image": "vision_model", "text": "text_model"}
_KINDS = {"clip": "", "clip_vision_model": "vision_model", "clip_text_model": "text_model"}


def rules_of(tower: str) -> names.Rules:
  """Names of a tower's stem and blocks, for CLIP and its relatives; `tower` is their prefix."""
  layer = f"{tower}.encoder.layers.{{0}}."
  attn = layer + "self_attn."
  return (
    (r"stem/cls_token", f"{tower}.embeddings.class_embedding"),
    (r"stem/patch/\w+", f"{tower}.embeddings.patch_embedding.{{kind}}"),
    (r"stem/positions", f"{tower}.embeddings.position_embedding.weight"),
    (r"stem/embed/embedding", f"{tower}.embeddings.token_embedding.weight"),
    (r"trunk/pre_norm/\w+", f"{tower}.pre_layrnorm.{{kind}}"),
    (r"trunk/blocks_(\d+)/norm([12])/\w+", layer + "layer_norm{1}.{kind}"),
    (r"trunk/blocks_(\d+)/attn/qkv/\w+", f"{attn}q_proj.{{kind}}+{attn}k_proj.{{kind}}+{attn}v_proj.{{kind}}"),
    (r"trunk/blocks_(\d+)/attn/out/\w+", attn + "out_proj.{kind}"),
    (r"trunk/blocks_(\d+)/mlp/(fc[12])/\w+", layer + "mlp.{1}.{kind}"),
  )


HEAD_RULES = {
  "image": ((r"norm/\w+", "vision_model.post_layernorm.{kind}"), (r"proj/kernel", "visual_projection.weight")),
  "text": ((r"norm/\w+", "text_model.final_layer_norm.{kind}"), (r"proj/kernel", "text_projection.weight")),
}
_HEAD = {m: rf"({rules[0][1].removesuffix('.{kind}')}|{rules[1][1].removesuffix('.weight')})\.(weight|bias)"
         for m, rules in HEAD_RULES.items()}  # fmt: skip
_OTHER = r"logit_scale|(vision_model|text_model)\.embeddings\.position_ids"


def recognises(path: Path) -> bool:
  """Whether a path is a checkpoint of this family."""
  return model_type(path) in _KINDS


def modalities(path: Path) -> tuple[str, ...]:
  """Modalities that a folder has: their weights, and for text a tokenizer."""
  return tuple(m for m in names.towers_in(_weights(path), _TOWER) if m != "text" or has_tokenizer(path))


def _weights(path: Path) -> Weights:
  return tower_named(folder_weights(path), _KINDS[model_type(path)])


def tower_named(weights: Weights, tower: str) -> Weights:
  """Names of a checkpoint with one tower alone, with that tower's prefix, which transformers 5 leaves out."""
  if not tower or any(name.startswith(f"{tower}.") for name in weights):
    return weights
  return weights.renamed(lambda name: f"{tower}.{name}")


def activation(name: str, where: str | Path) -> str:
  """Our name of transformers' activation.

  Raises:
    ValueError: naming the file, if it is not known.
  """
  if name not in _ACT:
    raise ValueError(f"{where}: hidden_act {name!r} is not supported; allowed: {', '.join(_ACT)}")
  return _ACT[name]


def spec_of(config: Mapping[str, Any], modality: str, picture: Mapping[str, Any], where: str | Path) -> EncoderSpec:
  """The encoder's shape from a tower's part of `config.json`.

  Args:
    config: `vision_config` or `text_config`; missing keys have transformers' defaults.
    modality: "image" or "text".
    picture: content of `preprocessor_config.json`.
    where: for errors.

  Raises:
    ValueError: for an activation that is not known.
  """
  act = activation(config.get("hidden_act", "quick_gelu"), where)
  text = modality == "text"
  width = config.get("hidden_size", 512 if text else 768)
  common = {
    "width": width, "depth": config.get("num_hidden_layers", 12), "act": act,
    "heads": config.get("num_attention_heads", 8 if text else 12), "eps": config.get("layer_norm_eps", 1e-5),
    "mlp": config.get("intermediate_size", 2048 if text else 3072),
  }  # fmt: skip
  if text:
    end = config.get("eos_token_id", 49407)
    # Old files name 2, though their texts end with the largest id.
    return EncoderSpec(**common, size=(config.get("max_position_embeddings", 77),), pool="end",
                       vocab=config.get("vocab_size", 49408), end_id=-1 if end == 2 else end)  # fmt: skip
  side, patch = config.get("image_size", 224), config.get("patch_size", 32)
  return EncoderSpec(**common, size=(side, side), patch=(patch, patch), channels=config.get("num_channels", 3),
                     stem_norm=False, pre_norm=True, mean=tuple(picture.get("image_mean", CLIP_MEAN)),
                     std=tuple(picture.get("image_std", CLIP_STD)))  # fmt: skip


def make_trunk(
  *, weights: Place = "", modality: Name = "image", dtype: Dtype = "", remat: bool = False, scan: bool = False
) -> Trunk:
  """A tower of a CLIP checkpoint.

  Args:
    weights: folder in Hugging Face layout.
    modality: "image" or "text".
    dtype: compute type, such as "bfloat16"; "" for float32.
    remat, scan: as in `models.transformer.Transformer`.

  Raises:
    ValueError: if the folder is no such checkpoint, or lacks the modality.
  """
  folder = Path(weights).expanduser()
  config = family_config(weights, folder, _KINDS, "CLIP")
  there = _weights(folder)
  found = names.towers_in(there, _TOWER)
  if modality not in found:
    raise ValueError(f"{weights}: has no {modality!r}; it has {', '.join(found) or 'no tower of CLIP'}")
  tower = config.get({"image": "vision_config", "text": "text_config"}[modality], config)
  picture, picture_file = processor_config(folder)
  spec = spec_of(tower, modality, picture, folder / "config.json")
  if modality == "text":
    tokenizer = folder_tokenizer(folder)
    end = tokenizer.token_to_id("<|endoftext|>")
    if end is None or spec.end_id >= 0 and end != spec.end_id:
      raise ValueError(f"{folder}: its tokenizer's end mark <|endoftext|> is {end}, config.json has {spec.end_id}")
    pad = folder_json(folder, "tokenizer_config.json").get("pad_token", "<|endoftext|>")
    pad_id = tokenizer.token_to_id(pad if isinstance(pad, str) else pad["content"])
    item = text_input(Ids(tokenizer, spec.size[0], end if pad_id is None else pad_id))
  else:
    default = {"size": {"shortest_edge": spec.size[0]}, "crop_size": spec.size[0], "do_center_crop": True}
    item = picture_input(processor_picture(default | picture, spec.size, picture_file))
  projected = "visual_projection.weight" if modality == "image" else "text_projection.weight"
  width = there[projected].shape[0] if projected in there else spec.width
  others = "|".join(rf"{_TOWER[m]}\..*" for m in MODALITIES if m != modality)
  foreign = "|".join([others, *(_HEAD[m] for m in MODALITIES if m != modality), _OTHER])
  load = functools.partial(
    names.load, weights=there, rules=rules_of(_TOWER[modality]), ignored=(foreign, _HEAD[modality]))  # fmt: skip
  head = functools.partial(names.load, weights=there.renamed(
    lambda name: name if name.startswith(tuple(rule[1].split(".{kind}")[0] for rule in HEAD_RULES[modality])) else ""
  ), rules=HEAD_RULES[modality])  # fmt: skip
  scale = there["logit_scale"].read().item() if "logit_scale" in there else 0.0
  options = {"weights": weights, "modality": modality, "dtype": dtype, "remat": remat, "scan": scan}
  return Trunk(
    name="clip", modality=modality, module=Encoder(spec, remat=remat, scan=scan, dtype=dtype or None), input=item,
    fingerprint=fingerprint({}, {"weights": there.hash(), "modality": modality, "dtype": dtype},
                            f"{_REVISION} {item.revision}"),
    load=load, options=options, licence=LICENCE,
    head=PublishedHead(Head(width, eps=spec.eps, proj=projected in there), head, math.exp(scale)),
  )  # fmt: skip

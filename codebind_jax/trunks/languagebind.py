"""LanguageBind (arXiv 2310.01852): CLIP towers of images, video, audio, depth and thermal pictures, and their texts.

Folders of LanguageBind/LanguageBind_{Image,Video_FT,Audio_FT,Depth,Thermal}: CLIP's names, temporal attention where
`add_time_attn` is set, LoRA merged or as `lora_A` and `lora_B`. Facts from PKU-YuanGroup/LanguageBind 019ab26.

Not compared with the original, whose packages (peft and torchvision 0.14 among them) were not at hand: the tests
compare with transformers' CLIP and with its layers arranged as the original arranges them. Not verified either: that
config.json names the modality in `model_type` or `architectures`, what `max_depth` is where it is not given (10 is
taken), and which of the published files hold LoRA unmerged. Video is cropped in the middle, where the original crops
and mirrors at random.

Takes: pictures, films, sounds, depth, thermal pictures; texts.
Choose it for: video, and five sensors that share one text space; permissive weights.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from codebind_jax.data.inputs import Input
from codebind_jax.data.preparation.languagebind import AUDIO_MEAN, AUDIO_STD, Prepare
from codebind_jax.data.preparation.pictures import CLIP_MEAN, CLIP_STD
from codebind_jax.data.preparation.texts import Ids, clip_ids, text_input
from codebind_jax.data.transforms import audio as audio_transforms
from codebind_jax.data.transforms import depth as depth_transforms
from codebind_jax.data.transforms import image as image_transforms
from codebind_jax.data.transforms import thermal as thermal_transforms
from codebind_jax.data.transforms import video as video_transforms
from codebind_jax.models.encoder import Encoder, EncoderSpec
from codebind_jax.models.heads import Head
from codebind_jax.trunks import names
from codebind_jax.trunks.base import PublishedHead, Trunk, fingerprint
from codebind_jax.trunks.checkpoint_files import Entry, Weights, folder_weights
from codebind_jax.trunks.clip import activation, rules_of
from codebind_jax.trunks.folders import folder_json, folder_tokenizer
from codebind_jax.trunks.options import Dtype, MaybeName, Place

_REVISION = "languagebind-1"
MODALITIES = ("image", "video", "audio", "depth", "thermal", "text")
LICENCE = "MIT"

_TOWER = re.compile(r"(?i)languagebind_?(image|video|audio|depth|thermal)")


def _tower(path: Path) -> str:
  """Modality of a folder's tower beside the text's; "" where it is none of the family's."""
  try:
    config = folder_json(path, "config.json")
  except (ValueError, OSError):
    return ""
  names_there = [config.get("model_type"), *(config.get("architectures") or [])]
  found = next((match for name in names_there if isinstance(name, str) and (match := _TOWER.match(name))), None)
  return found[1].lower() if found else ""


def recognises(path: Path) -> bool:
  """Whether a path is a checkpoint of this family."""
  return path.is_dir() and bool(_tower(path))


def modalities(path: Path) -> tuple[str, ...]:
  """Modalities that a checkpoint has."""
  return tuple(m for m in (_tower(path), "text") if m)


def merged(weights: Weights, alpha: float) -> Weights:
  """The checkpoint under CLIP's names, with LoRA added to the weights that it changes.

  Args:
    weights: the checkpoint, with or without peft's names.
    alpha: of LoRA; its product is scaled by alpha / rank.

  Raises:
    ValueError: naming a LoRA matrix without its other half or its weight.
  """
  plain = weights.renamed(lambda name: name.replace(".base_model.model.", ".").replace(".base_layer.", "."))
  lora = re.compile(r"(.*)\.lora_([AB])(?:\.default)?\.weight")
  halves = {(match[1], match[2]): entry for name, entry in plain.items() if (match := lora.fullmatch(name))}
  entries = {name: entry for name, entry in plain.items() if not lora.fullmatch(name)}
  for layer in sorted({layer for layer, _ in halves}):
    name = f"{layer}.weight"
    if (layer, "A") not in halves or (layer, "B") not in halves or name not in entries:
      raise ValueError(f"{weights.name}: {layer} needs weight, lora_A and lora_B, and lacks one of them")
    parts = entries[name], halves[layer, "A"], halves[layer, "B"]
    entries[name] = Entry(parts[0].shape, parts[0].dtype, functools.partial(_sum, *parts, alpha))
  return Weights(entries, weights.files)


def _sum(weight: Entry, a: Entry, b: Entry, alpha: float) -> np.ndarray:
  down, up = a.read().astype(np.float32), b.read().astype(np.float32)
  return weight.read().astype(np.float32) + (alpha / down.shape[0]) * (up @ down)


def spec_of(config: Mapping[str, Any], modality: str, where: str | Path) -> EncoderSpec:
  """The encoder's shape from a tower's part of `config.json`.

  Args:
    config: `vision_config` or `text_config`; missing keys have the original's defaults.
    modality: of the tower.
    where: for errors.

  Raises:
    ValueError: for an activation that is not known.
  """
  text = modality == "text"
  common = {
    "width": config.get("hidden_size", 512 if text else 768), "depth": config.get("num_hidden_layers", 12),
    "heads": config.get("num_attention_heads", 8 if text else 12), "eps": config.get("layer_norm_eps", 1e-5),
    "mlp": config.get("intermediate_size", 2048 if text else 3072),
    "act": activation(config.get("hidden_act", "quick_gelu"), where),
  }  # fmt: skip
  if text:
    size = (config.get("max_position_embeddings", 77),)
    return EncoderSpec(**common, size=size, pool="end", vocab=config.get("vocab_size", 49408))
  side, patch = config.get("image_size", 224), config.get("patch_size", 32)
  bins, length = int(config.get("num_mel_bins") or 0), int(config.get("target_length") or 0)
  size = (bins, length) if bins and length else (side, side) if isinstance(side, int) else tuple(side)
  frames = config.get("num_frames", 8 if modality == "video" else 1) if modality == "video" else 1
  return EncoderSpec(
    **common, size=size, patch=(patch, patch), channels=config.get("num_channels", 3), stem_norm=False, pre_norm=True,
    frames=frames if config.get("add_time_attn", False) else 0, mean_of=frames if modality == "video" else 0,
    out_norm=modality == "video", mean=CLIP_MEAN, std=CLIP_STD,
  )  # fmt: skip


def _rules(tower: str) -> names.Rules:
  layer = f"{tower}.encoder.layers.{{0}}."
  time = layer + "temporal_attn."
  return (
    (r"trunk/blocks_(\d+)/time_embedding", layer + "temporal_embedding"),
    (r"trunk/blocks_(\d+)/time_norm/\w+", layer + "temporal_layer_norm1.{kind}"),
    (r"trunk/blocks_(\d+)/time_attn/qkv/\w+", f"{time}q_proj.{{kind}}+{time}k_proj.{{kind}}+{time}v_proj.{{kind}}"),
    (r"trunk/blocks_(\d+)/time_attn/out/\w+", time + "out_proj.{kind}"),
    (r"norm/\w+", f"{tower}.post_layernorm.{{kind}}"),
    *rules_of(tower),
  )


def _item(modality: str, spec: EncoderSpec, config: Mapping[str, Any], folder: Path, antialias: bool) -> Input:
  if modality == "text":
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
      return text_input(clip_ids(spec.size[0]))
    tokenizer = folder_tokenizer(folder)
    end = tokenizer.token_to_id("<|endoftext|>")
    if end is None:
      raise ValueError(f"{folder}: its tokenizer has no end mark <|endoftext|>")
    return text_input(Ids(tokenizer, spec.size[0], end))
  if modality != "audio" and spec.size[0] != spec.size[1]:
    raise ValueError(f"{folder}: pictures of {spec.size} are not supported; allowed: a square")
  prepare = Prepare(
    modality, spec.size, spec.mean_of or 1, float(config.get("max_depth", 10)),
    float(config.get("audio_mean", AUDIO_MEAN)), float(config.get("audio_std", AUDIO_STD)), antialias)  # fmt: skip
  frames = (spec.mean_of,) if spec.mean_of else ()
  revision = " ".join(t.REVISION for t in (image_transforms, video_transforms, audio_transforms, depth_transforms,
                                           thermal_transforms))  # fmt: skip
  return Input((*frames, *spec.size, 3), "float32", prepare, read=prepare.read, revision=f"{revision} {prepare}")


def make_trunk(
  *, weights: Place = "", modality: MaybeName = "", antialias: bool = False, dtype: Dtype = "", remat: bool = False,
  scan: bool = False,
) -> Trunk:  # fmt: skip
  """A tower of a LanguageBind checkpoint.

  Args:
    weights: folder in Hugging Face layout.
    modality: the folder's, or "text"; "" for the folder's.
    antialias: see `Prepare`.
    dtype: compute type, such as "bfloat16"; "" for float32.
    remat, scan: as in `models.transformer.Transformer`.

  Raises:
    ValueError: if the folder is no such checkpoint, or lacks the modality.
  """
  folder = Path(weights).expanduser()
  if not weights or not folder.is_dir():
    raise ValueError(f"weights: {weights!r} is no folder{'' if folder.exists() else ' (no such path)'}")
  config = folder_json(folder, "config.json")
  available = modalities(folder) if _tower(folder) else ()
  if not available:
    kind = config.get("model_type")
    raise ValueError(f"{weights}: not a folder of LanguageBind: config.json has model_type {kind!r}, allowed are "
                     "LanguageBindImage, LanguageBindVideo, LanguageBindAudio, LanguageBindDepth, LanguageBindThermal")
  modality = modality or available[0]
  if modality not in available:
    raise ValueError(f"{weights}: has no {modality!r}; it has {', '.join(available)}")
  text = modality == "text"
  part = config.get("text_config" if text else "vision_config") or {}
  spec = spec_of(part, modality, folder / "config.json")
  there = merged(folder_weights(folder), float((config.get("vision_config") or {}).get("lora_alpha", 16)))
  tower, other, kind = ("text_model", "vision_model", "text") if text else ("vision_model", "text_model", "visual")
  norm, proj = f"{tower}.{'final_layer_norm' if text else 'post_layernorm'}", f"{kind}_projection.weight"
  item = _item(modality, spec, part, folder, antialias)
  head_rules = ((r"norm/\w+", norm + ".{kind}"), (r"proj/kernel", proj))
  ignored = (rf"{other}\..*", r"(text|visual)_projection\.weight", r"logit_scale", r".*\.embeddings\.position_ids",
             rf"{norm}\.(weight|bias)", *(() if spec.frames > 1 else (r".*\.temporal_embedding",)))  # fmt: skip
  in_head = (lambda n: n == proj) if spec.mean_of else (lambda n: n == proj or n.startswith(norm))
  load_head = functools.partial(
    names.load, rules=head_rules, weights=there.renamed(lambda name: name if in_head(name) else ""))
  if proj not in there:
    raise ValueError(f"{there.name}: missing {proj}")
  head = Head(there[proj].shape[0], eps=spec.eps, norm=not spec.mean_of)
  scale = math.exp(float(there["logit_scale"].read().reshape(-1)[0])) if "logit_scale" in there else 1.0
  options = {"weights": weights, "modality": modality, "antialias": antialias, "dtype": dtype, "remat": remat,
             "scan": scan}  # fmt: skip
  return Trunk(
    name="languagebind", modality=modality, module=Encoder(spec, remat=remat, scan=scan, dtype=dtype or None),
    input=item, fingerprint=fingerprint({}, {"weights": there.hash(), "spec": repr(spec), "dtype": dtype},
                                        f"{_REVISION} {item.revision}"),
    load=functools.partial(names.load, weights=there, rules=_rules(tower), ignored=ignored), options=options,
    licence=LICENCE, head=PublishedHead(head, load_head, scale),
  )  # fmt: skip

"""SigLIP and SigLIP2 (arXiv 2303.15343, 2502.14786) in Hugging Face layout, of one image size.

Takes: pictures; texts of up to 64 tokens.
Choose it for: pictures and texts in many languages (SigLIP2, and the i18n models); permissive weights.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from codebind_jax.data import sentencepiece
from codebind_jax.data.inputs import Input
from codebind_jax.data.preparation.pictures import RESAMPLE, picture_input, processor_picture
from codebind_jax.data.preparation.texts import Ids, text_input, without_punctuation
from codebind_jax.models.encoder import Encoder, EncoderSpec
from codebind_jax.models.heads import Head
from codebind_jax.trunks import clip, names
from codebind_jax.trunks.base import PublishedHead, Trunk, fingerprint
from codebind_jax.trunks.checkpoint_files import Entry, Weights, folder_weights, note
from codebind_jax.trunks.folders import (
  SENTENCEPIECE,
  family_config,
  folder_json,
  folder_tokenizer,
  has_tokenizer,
  model_type,
  processor_config,
)
from codebind_jax.trunks.options import Dtype, Name, Place

_REVISION = "siglip-1"
MODALITIES = ("image", "text")
LICENCE = "Apache-2.0 (Google's weights)"
MEAN = STD = (0.5, 0.5, 0.5)

_TOWER = {"image": "vision_model", "text": "text_model"}
_KINDS = {
  "siglip": "", "siglip_vision_model": "vision_model", "siglip_text_model": "text_model",
  "siglip2": "", "siglip2_vision_model": "vision_model", "siglip2_text_model": "text_model",
}  # fmt: skip
_POOL = "vision_model.head."
RULES = {
  "image": (
    *clip.rules_of("vision_model"),
    (r"norm/\w+", "vision_model.post_layernorm.{kind}"),
    (r"pool/probe", _POOL + "probe"),
    (r"pool/q/\w+", _POOL + "attention.q_{kind}"),
    (r"pool/kv/\w+", f"{_POOL}attention.k_{{kind}}+{_POOL}attention.v_{{kind}}"),
    (r"pool/out/\w+", _POOL + "attention.out_proj.{kind}"),
    (r"pool/norm/\w+", _POOL + "layernorm.{kind}"),
    (r"pool/mlp/(fc[12])/\w+", _POOL + "mlp.{0}.{kind}"),
  ),
  "text": clip.rules_of("text_model"),
}
HEAD_RULES = ((r"norm/\w+", "text_model.final_layer_norm.{kind}"), (r"proj/\w+", "text_model.head.{kind}"))
_HEAD = r"text_model\.(final_layer_norm|head)\.(weight|bias)"
_OTHER = r"logit_scale|logit_bias|(vision_model|text_model)\.embeddings\.position_ids"


def recognises(path: Path) -> bool:
  """Whether a path is a checkpoint of this family."""
  return model_type(path) in _KINDS


def modalities(path: Path) -> tuple[str, ...]:
  """Modalities that a folder has: their weights, and for text a tokenizer."""
  return tuple(m for m in names.towers_in(_weights(path), _TOWER) if m != "text" or has_tokenizer(path))


def _weights(path: Path) -> Weights:
  return with_split_projection(clip.tower_named(folder_weights(path), _KINDS[model_type(path)]), ".attention.in_proj_")


def with_split_projection(weights: Weights, name: str) -> Weights:
  """The checkpoint with each joint projection of queries, keys and values, whose name has `name` before weight or bias,
  in three entries: "a.in_proj_weight" becomes "a.q_weight", "a.k_weight", "a.v_weight".
  """
  entries = {}
  for old, entry in weights.items():
    if name not in old:
      entries[old] = entry
      continue
    width = entry.shape[0] // 3
    for i, part in enumerate("qkv"):
      read = lambda e=entry, i=i, n=width: e.read()[i * n : (i + 1) * n]
      entries[old.replace("in_proj", part)] = Entry((width, *entry.shape[1:]), entry.dtype, read)
  return Weights(entries, weights.files)


def spec_of(config: Mapping[str, Any], modality: str, picture: Mapping[str, Any], where: str | Path) -> EncoderSpec:
  """The encoder's shape from a tower's part of `config.json`; see `clip.spec_of`.

  Raises:
    ValueError: for an activation that is not known, pictures of any size (NaFlex), or a tower without a pooling.
  """
  act = clip.activation(config.get("hidden_act", "gelu_pytorch_tanh"), where)
  common = {
    "width": config.get("hidden_size", 768), "depth": config.get("num_hidden_layers", 12), "act": act,
    "heads": config.get("num_attention_heads", 12), "eps": config.get("layer_norm_eps", 1e-6),
    "mlp": config.get("intermediate_size", 3072),
  }  # fmt: skip
  if modality == "text":
    return EncoderSpec(**common, size=(config.get("max_position_embeddings", 64),), pool="last", causal=False,
                       vocab=config.get("vocab_size", 32000))  # fmt: skip
  if not config.get("vision_use_head", True):
    raise ValueError(f"{where}: vision_use_head is false: this tower gives no embedding of a picture")
  side, patch = config.get("image_size", 224), config.get("patch_size", 16)
  return EncoderSpec(**common, size=(side, side), patch=(patch, patch), channels=config.get("num_channels", 3),
                     stem_norm=False, stem_bias=True, class_token=False, out_norm=True, pool="map",
                     mean=tuple(picture.get("image_mean", MEAN)), std=tuple(picture.get("image_std", STD)))  # fmt: skip


def with_end(tokenizer: tokenizers.Tokenizer, end: str) -> tokenizers.Tokenizer:
  """The tokenizer, which now puts its end mark after each text and nothing else."""
  mark = (end, tokenizer.token_to_id(end))
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=f"$A {end}", special_tokens=[mark])
  return tokenizer


def folder_ids(folder: Path, context: int) -> Ids:
  """Preparation of text as the folder's `tokenizer_config.json` says.

  SiglipTokenizer cleans texts in Python code, and SigLIP2 was trained on lower-cased texts, which its official
  `tokenizer.json` does not say.
  """
  settings = folder_json(folder, "tokenizer_config.json")
  kind = str(settings.get("tokenizer_class", "")).removesuffix("Fast")
  model = next((folder / name for name in SENTENCEPIECE if (folder / name).is_file()), None)
  if not kind and model and not (folder / "tokenizer.json").is_file():
    kind = "SiglipTokenizer"
  first, gemma = kind == "SiglipTokenizer", kind in ("GemmaTokenizer", "Siglip2Tokenizer")
  named = lambda token: token if isinstance(token, str) else token["content"]
  end = named(settings.get("eos_token") or ("<eos>" if gemma else "</s>"))
  pad = named(settings.get("pad_token") or (end if first else "<pad>"))
  direct = model is not None and (first or not (folder / "tokenizer.json").is_file())
  if direct:
    note(model)
  tokenizer = sentencepiece.read_tokenizer(model) if direct else folder_tokenizer(folder)
  for name, mark in (("end mark", end), ("padding", pad)):
    if tokenizer.token_to_id(mark) is None:
      raise ValueError(f"{folder}: its tokenizer has no {name} {mark!r}")
  if direct:
    tokenizer = with_end(tokenizer, end)
  if tokenizer.encode("a").ids[-1:] != [tokenizer.token_to_id(end)]:
    raise ValueError(f"{folder}: its tokenizer does not put the end mark {end!r} after a text")
  length = min(context, int(settings.get("model_max_length") or context))
  side = settings.get("padding_side", "left" if kind == "Siglip2Tokenizer" else "right")
  lower = gemma or first and settings.get("do_lower_case", True)
  clean = without_punctuation if first else None
  return Ids(tokenizer, length, tokenizer.token_to_id(pad), lower, clean, left=side == "left")


def make_trunk(
  *, weights: Place = "", modality: Name = "image", dtype: Dtype = "", remat: bool = False, scan: bool = False
) -> Trunk:
  """A tower of a SigLIP checkpoint.

  Args:
    weights, modality, dtype, remat, scan: as in `clip.make_trunk`.

  Raises:
    ValueError: as in `clip.make_trunk`, also for NaFlex checkpoints, which take pictures of any size.
  """
  folder = Path(weights).expanduser()
  config = family_config(weights, folder, _KINDS, "SigLIP")
  tower = config.get({"image": "vision_config", "text": "text_config"}[modality], config) \
    if modality in MODALITIES else {}  # fmt: skip
  if "num_patches" in config.get("vision_config", config):
    raise ValueError(f"{folder / 'config.json'}: SigLIP2 NaFlex (pictures of any size) is not supported")
  there = _weights(folder)
  found = names.towers_in(there, _TOWER)
  if modality not in found:
    raise ValueError(f"{weights}: has no {modality!r}; it has {', '.join(found) or 'no tower of SigLIP'}")
  picture, picture_file = processor_config(folder)
  spec = spec_of(tower, modality, picture, folder / "config.json")
  if modality == "text":
    item = text_input(folder_ids(folder, spec.size[0]))
  else:
    default = {"size": {"height": spec.size[0], "width": spec.size[1]}, "resample": RESAMPLE["bicubic"]}
    item = picture_input(processor_picture(default | picture, spec.size, picture_file))
  options = {"weights": weights, "modality": modality, "dtype": dtype, "remat": remat, "scan": scan}
  foreign = "|".join([_OTHER, *(rf"{_TOWER[m]}\..*" for m in MODALITIES if m != modality)])
  return trunk_of("siglip", spec, there, item, options, f"{_REVISION} {item.revision}", rules=RULES[modality],
                  head="text_model.head.bias", scale="logit_scale", bias="logit_bias", head_rules=HEAD_RULES,
                  ignored=(foreign,), head_names=_HEAD)  # fmt: skip


def trunk_of(
  name: str, spec: EncoderSpec, weights: Weights, item: Input, options: Mapping[str, Any], revision: str, *,
  rules: names.Rules, head_rules: names.Rules, head_names: str, head: str, scale: str, bias: str,
  ignored: Sequence[str], convert: Callable[..., Any] = names.from_torch,
) -> Trunk:  # fmt: skip
  """The trunk of a spec and a checkpoint.

  Args:
    name: of the trunk.
    spec: of its encoder.
    weights: the checkpoint.
    item: its preparation.
    options: of `make_trunk`.
    revision: of names and preparation.
    rules, head_rules: names of the encoder and of the text's head.
    head_names: regex of the names that the text's head has.
    head, scale, bias: names of the head's bias, the logarithm of the logits' scale, and their bias.
    ignored: regexes of names that this tower does not need.
    convert: layout of the checkpoint's arrays, see `names.load`.
  """
  number = lambda key: float(weights[key].read().item()) if key in weights else 0.0
  module, load = Head(spec.width, norm=False, proj=False), None
  if spec.is_text:
    own = weights.renamed(lambda name: name if re.fullmatch(head_names, name) else "")
    module = Head(own[head].shape[0] if head in own else spec.width, eps=spec.eps, bias=True)
    load = functools.partial(names.load, weights=own, rules=head_rules, convert=convert)
  return Trunk(
    name=name, modality=options["modality"], input=item, options=options, licence=LICENCE,
    module=Encoder(spec, remat=options["remat"], scan=options["scan"], dtype=options["dtype"] or None),
    fingerprint=fingerprint({}, {"weights": weights.hash(), "modality": options["modality"], "dtype": options["dtype"]},
                            revision),
    load=functools.partial(names.load, weights=weights, rules=rules, convert=convert, ignored=(*ignored, head_names)),
    head=PublishedHead(module, load, math.exp(number(scale)), number(bias)),
  )  # fmt: skip

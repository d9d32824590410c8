"""OpenCLIP's own layout (github.com/mlfoundations/open_clip): ViT towers and EVA-CLIP's, texts of CLIP's form.

A folder with `open_clip_config.json` and `open_clip_model.safetensors` or `open_clip_pytorch_model.bin`, or one file
of weights with the name of its model config. Facts from open_clip 3.3 and timm 1.0.31.

Takes: pictures; texts of up to 77 tokens.
Choose it for: the widest choice of sizes and training sets; its EVA02-E-14-plus goes with Uni3D.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from codebind_jax.data.inputs import Input
from codebind_jax.data.preparation.pictures import CLIP_MEAN, CLIP_STD, RESAMPLE, Picture, picture_input
from codebind_jax.data.preparation.texts import clip_ids, text_input
from codebind_jax.models.encoder import Encoder, EncoderSpec
from codebind_jax.models.heads import Head
from codebind_jax.trunks import names
from codebind_jax.trunks.base import PublishedHead, Trunk, fingerprint
from codebind_jax.trunks.checkpoint_files import Weights, folder_weights, mentions, open_weights, present
from codebind_jax.trunks.folders import folder_json
from codebind_jax.trunks.options import Act, Dtype, Line, Name, Place

_REVISION = "open_clip-1"
MODALITIES = ("image", "text")
LICENCE = "see the model card: MIT (OpenAI, LAION, DataComp, EVA-CLIP), CC-BY-NC 4.0 (MetaCLIP), Apple's (DFN)"

_CONFIG = "open_clip_config.json"
_MARKS = ("<start_of_text>", "<end_of_text>")
_STEMS = ("open_clip_model", "open_clip_pytorch_model")


def _vit(embed: int, patch: int, width: int, layers: int, head: int, ratio: float, text: tuple[int, int, int],
         size: int = 224) -> dict[str, Any]:  # fmt: skip
  vision = {"image_size": size, "layers": layers, "width": width, "head_width": head, "mlp_ratio": ratio,
            "patch_size": patch}  # fmt: skip
  return {"embed_dim": embed, "vision_cfg": vision, "text_cfg": dict(zip(("width", "heads", "layers"), text))}


def _eva(embed: int, timm: str, text: tuple[int, int, int], size: int = 224) -> dict[str, Any]:
  vision = {"image_size": size, "timm_model_name": timm, "timm_pool": "token", "timm_proj": None}
  return {"embed_dim": embed, "vision_cfg": vision, "text_cfg": dict(zip(("width", "heads", "layers"), text))}


_VITS = {
  "ViT-B-32": _vit(512, 32, 768, 12, 64, 4.0, (512, 8, 12)),
  "ViT-B-32-256": _vit(512, 32, 768, 12, 64, 4.0, (512, 8, 12), 256),
  "ViT-B-16": _vit(512, 16, 768, 12, 64, 4.0, (512, 8, 12)),
  "ViT-L-14": _vit(768, 14, 1024, 24, 64, 4.0, (768, 12, 12)),
  "ViT-L-14-336": _vit(768, 14, 1024, 24, 64, 4.0, (768, 12, 12), 336),
  "ViT-H-14": _vit(1024, 14, 1280, 32, 80, 4.0, (1024, 16, 24)),
  "ViT-H-14-378": _vit(1024, 14, 1280, 32, 80, 4.0, (1024, 16, 24), 378),
  "ViT-g-14": _vit(1024, 14, 1408, 40, 88, 4.3637, (1024, 16, 24)),
  "ViT-bigG-14": _vit(1280, 14, 1664, 48, 104, 4.9231, (1280, 20, 32)),
}
_EVAS = {
  "EVA01-g-14": _eva(1024, "eva_giant_patch14_clip_224", (768, 12, 12)),
  "EVA01-g-14-plus": _eva(1024, "eva_giant_patch14_clip_224", (1024, 16, 24)),
  "EVA02-B-16": _eva(512, "eva02_base_patch16_clip_224", (512, 8, 12)),
  "EVA02-L-14": _eva(768, "eva02_large_patch14_clip_224", (768, 12, 12)),
  "EVA02-L-14-336": _eva(768, "eva02_large_patch14_clip_336", (768, 12, 12), 336),
  "EVA02-E-14": _eva(1024, "eva02_enormous_patch14_clip_224", (1024, 16, 24)),
  "EVA02-E-14-plus": _eva(1024, "eva02_enormous_patch14_clip_224", (1280, 20, 32)),
}
# Name of a model config -> its content, for weights that come without one.
MODELS: dict[str, dict[str, Any]] = {
  **_VITS, **{f"{name}-quickgelu": config | {"quick_gelu": True} for name, config in _VITS.items()}, **_EVAS,
}  # fmt: skip

_EVA02 = {"act": "swiglu", "sub_norm": True, "rope": "eva"}
# timm's name of a tower -> what of `EncoderSpec` it decides.
TIMM: dict[str, dict[str, Any]] = {
  "eva_giant_patch14_clip_224": {"width": 1408, "depth": 40, "heads": 16, "mlp": 6144, "patch": (14, 14)},
  "eva02_base_patch16_clip_224": _EVA02 | {"width": 768, "depth": 12, "heads": 12, "mlp": 2048, "patch": (16, 16)},
  "eva02_large_patch14_clip_224": _EVA02 | {"width": 1024, "depth": 24, "heads": 16, "mlp": 2730, "patch": (14, 14)},
  "eva02_large_patch14_clip_336": _EVA02 | {"width": 1024, "depth": 24, "heads": 16, "mlp": 2730, "patch": (14, 14)},
  "eva02_enormous_patch14_clip_224": {
    "width": 1792, "depth": 64, "heads": 16, "mlp": 15360, "patch": (14, 14), "post_norm": True},
}  # fmt: skip

# Of open_clip's published weights: regex of "model tag" (small letters, _ for - and .), whether the activation is
# QuickGELU, and what differs from the usual preparation. The first that is found holds.
_TAGS: tuple[tuple[str, bool, dict[str, Any]], ...] = (
  (r"vit_l_14 .*laion2b_s32b_b82k", False, {"mean": (0.5,) * 3, "std": (0.5,) * 3}),
  (r"vit_b_32\S* .*laion400m", True, {}),
  (r"dfn5b", True, {"resize_mode": "squash"}),
  (r"dfn2b.*39b", False, {}),
  (r"dfn2b|openai|metaclip_(400m|fullcc|2pt5b)|[blhg]\d\d_(400m|fullcc2_5b)| vit_[bl]_\d\d(_336px)?$", True, {}),
  (r"^eva0|laion2b|laion400m|datacomp|commonpool|merged2b|altogether", False, {}),
)

# What a tower's part of the config may hold beside what is read here: that of training, and defaults.
_TRAINING = ("patch_dropout", "output_tokens", "timm_model_pretrained", "timm_drop", "timm_drop_path", "timm_proj_bias",
             "hf_model_pretrained", "attn_pooler_queries", "attn_pooler_heads")  # fmt: skip
_DEFAULTS = {
  "attentional_pool": False, "block_type": None, "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False,
  "scale_attn_inner": False, "scale_attn": False, "scale_fc": False, "embed_cls": False, "tokenizer_mode": None,
}  # fmt: skip
_READ = {
  "image": ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value", "no_ln_pre",
            "pos_embed_type", "final_ln_after_pool", "pool_type", "act_kwargs", "norm_kwargs", "timm_model_name",
            "timm_pool", "timm_proj"),
  "text": ("context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_kwargs", "width", "heads", "layers",
           "mlp_ratio", "ls_init_value", "pad_id", "eos_id", "no_causal_mask", "final_ln_after_pool", "pool_type",
           "proj_bias", "proj_type", "act_kwargs", "norm_kwargs", "hf_model_name", "hf_proj_type", "hf_pooler_type"),
}  # fmt: skip
_TEXT_POOL = {"argmax": "end", "eos": "end", "last": "last", "first": "first"}


def _config(path: Path) -> dict[str, Any]:
  """Content of a folder's config; {} where there is none that is readable."""
  try:
    config = folder_json(path, _CONFIG)
  except (ValueError, OSError):
    return {}
  config = config.get("model_cfg", config)
  if not isinstance(config, dict) or not isinstance(config.get("vision_cfg"), dict):
    return {}
  return {} if str(config["vision_cfg"].get("timm_model_name")).startswith("vit_pe_core_") else config  # `pe_core`'s


def recognises(path: Path) -> bool:
  """Whether a path is a folder or file of this family; of a file, its names tell."""
  if path.is_dir():
    return bool(_config(path))
  # Perception Encoder's files have the same names, and a pooling of their own.
  return mentions(path, "visual.conv1.weight", "visual.trunk.") and not mentions(path, "visual.attn_pool.probe")


def modalities(path: Path) -> tuple[str, ...]:
  """Modalities that a checkpoint has and this module supports.

  Raises:
    ValueError: if it supports none of them, as the first one is refused.
  """
  config = _config(path)
  if not config:
    there = _weights(path)
    return tuple(m for m in MODALITIES if _has(there, m))
  out, refused = [], None
  for modality in MODALITIES:
    try:
      spec_of(config, modality, path / _CONFIG)
      out.append(modality)
    except ValueError as error:
      refused = refused or error
  if not out:
    raise refused
  return tuple(out)


def _weights(path: Path) -> Weights:
  there = folder_weights(path, _STEMS) if path.is_dir() else open_weights(path)
  if there and all(name.startswith("module.") for name in there):
    there = there.renamed(lambda name: name.removeprefix("module."))
  return there


def _has(weights: Weights, modality: str) -> bool:
  starts = ("visual.",) if modality == "image" else ("text.", "token_embedding.")
  return any(name.startswith(starts) for name in weights)


def _refuse_unknown(cfg: Mapping[str, Any], part: str, modality: str, where: str | Path) -> None:
  for key, value in cfg.items():
    if key in _READ[modality] or key in _TRAINING or key in _DEFAULTS and value == _DEFAULTS[key]:
      continue
    raise ValueError(f"{where}: {part}.{key} = {value!r} is not supported")


def _act(cfg: Mapping[str, Any], quick: bool) -> str:
  if quick:
    return "quick_gelu"
  return "gelu_tanh" if (cfg.get("act_kwargs") or {}).get("approximate") == "tanh" else "gelu"


def spec_of(config: Mapping[str, Any], modality: str, where: str | Path, quick: bool = False,
            picture: Mapping[str, Any] | None = None) -> EncoderSpec:  # fmt: skip
  """The encoder's shape from a model config of OpenCLIP.

  Args:
    config: `embed_dim`, `vision_cfg`, `text_cfg`; missing keys have open_clip's defaults.
    modality: "image" or "text".
    where: for errors.
    quick: whether the activation is QuickGELU.
    picture: `preprocess_cfg`, of which mean and std are read.

  Raises:
    ValueError: for a tower that is not supported, by its name.
  """
  if modality == "text":
    return _text_spec(config.get("text_cfg") or {}, where, quick)
  cfg, picture = config["vision_cfg"], picture or {}
  _refuse_unknown(cfg, "vision_cfg", "image", where)
  side = cfg.get("image_size", 224)
  size = (side, side) if isinstance(side, int) else tuple(side)
  three = lambda value: (float(value),) * 3 if isinstance(value, int | float) else tuple(value)
  common = {"size": size, "channels": 3, "stem_norm": False, "mean": three(picture.get("mean") or CLIP_MEAN),
            "std": three(picture.get("std") or CLIP_STD)}  # fmt: skip
  if timm := cfg.get("timm_model_name"):
    if timm not in TIMM or cfg.get("timm_pool") != "token" or cfg.get("timm_proj", "linear"):
      raise ValueError(f"{where}: the tower {timm!r} of timm is not supported; allowed: {', '.join(TIMM)}, with "
                       "timm_pool 'token' and without timm_proj")  # fmt: skip
    return EncoderSpec(**common, **TIMM[timm], stem_bias=True)
  if not isinstance(cfg.get("layers", 12), int):
    raise ValueError(f"{where}: a ResNet (vision_cfg.layers = {cfg['layers']}) is not supported; allowed: ViT")
  pool, after = cfg.get("pool_type", "tok"), cfg.get("final_ln_after_pool", False)
  if pool != "tok" and not (pool == "avg" and after):
    raise ValueError(f"{where}: vision_cfg.pool_type = {pool!r} with final_ln_after_pool = {after} is not supported; "
                     "allowed: 'tok', or 'avg' with final_ln_after_pool")  # fmt: skip
  width, patch = cfg.get("width", 768), cfg.get("patch_size", 16)
  return EncoderSpec(
    **common, **_block(cfg, width, quick), depth=cfg.get("layers", 12), heads=width // cfg.get("head_width", 64),
    patch=(patch, patch) if isinstance(patch, int) else tuple(patch), pre_norm=not cfg.get("no_ln_pre", False),
    pool="class" if pool == "tok" else "mean",
  )  # fmt: skip


def _block(cfg: Mapping[str, Any], width: int, quick: bool) -> dict[str, Any]:
  return {"width": width, "mlp": int(width * cfg.get("mlp_ratio", 4.0)), "act": _act(cfg, quick),
          "eps": (cfg.get("norm_kwargs") or {}).get("eps", 1e-5),
          "layer_scale": cfg.get("ls_init_value") is not None}  # fmt: skip


def _text_spec(cfg: Mapping[str, Any], where: str | Path, quick: bool) -> EncoderSpec:
  if cfg.get("hf_model_name"):
    raise ValueError(f"{where}: the text tower {cfg['hf_model_name']!r} is not supported; allowed: CLIP's")
  tokenizer = cfg.get("hf_tokenizer_name")
  if tokenizer and not tokenizer.startswith("openai/clip-"):
    raise ValueError(f"{where}: the tokenizer {tokenizer!r} (hf_tokenizer_name) is not supported; allowed: CLIP's")
  if (cfg.get("tokenizer_kwargs") or {}) not in ({}, {"clean": "lower"}):
    raise ValueError(f"{where}: text_cfg.tokenizer_kwargs = {cfg['tokenizer_kwargs']} is not supported")
  _refuse_unknown(cfg, "text_cfg", "text", where)
  pool = cfg.get("pool_type", "argmax")
  if pool not in _TEXT_POOL:
    raise ValueError(f"{where}: text_cfg.pool_type = {pool!r} is not supported; allowed: {', '.join(_TEXT_POOL)}")
  width, vocab = cfg.get("width", 512), cfg.get("vocab_size", 49408)
  if vocab < 49408:
    raise ValueError(f"{where}: text_cfg.vocab_size = {vocab} is not supported; CLIP's tokenizer has 49408 ids")
  return EncoderSpec(
    **_block(cfg, width, quick), depth=cfg.get("layers", 12), heads=cfg.get("heads", 8),
    size=(cfg.get("context_length", 77),), vocab=vocab, pool=_TEXT_POOL[pool],
    end_id=cfg.get("eos_id", 2) if pool == "eos" else -1, causal=not cfg.get("no_causal_mask", False),
  )  # fmt: skip


def _published(model: str, name: str) -> tuple[bool, dict[str, Any]] | None:
  """QuickGELU and preparation of published weights; None where the names do not tell."""
  text = re.sub(r"[-.]", "_", f"{model} {name}".lower())
  for pattern, quick, picture in _TAGS:
    if re.search(pattern, text):
      return quick, picture
  return None


def is_quick(config: Mapping[str, Any], act: str, model: str, name: str, bare: bool, where: str | Path) -> bool:
  """Whether the activation is QuickGELU, x sigmoid(1.702 x), and not GELU; a wrong one costs accuracy silently.

  Args:
    config: the model config; its `quick_gelu` holds if it is there.
    act: "gelu" or "quick_gelu" before everything else; "" to look.
    model: name of the model config, "" for none.
    name: pretrained tag, or name of the file or folder.
    bare: whether the weights came without a config.
    where: for the warning, given where nothing tells.

  Raises:
    ValueError: for another `act`.
  """
  if act not in ("", "gelu", "quick_gelu"):
    raise ValueError(f"act: got {act!r}; allowed: '' (as the checkpoint says), gelu, quick_gelu")
  if act or config.get("quick_gelu") is not None:
    return act == "quick_gelu" if act else bool(config["quick_gelu"])
  known = _published(model, name)
  if "quickgelu" in f"{model} {name}".lower().replace("_", "").replace("-", "") or known and known[0]:
    return True
  if bare and known is None:
    warnings.warn(f"{where}: neither a config nor a name says whether the activation is QuickGELU (OpenAI, MetaCLIP, "
                  "DFN) or GELU (LAION, DataComp): GELU is taken; set act or tag", stacklevel=3)  # fmt: skip
  return False


def _rules(modality: str, weights: Weights, timm: bool) -> tuple[names.Rules, names.Rules]:
  """Rules of the trunk and of the head, in the names the checkpoint has."""
  if modality == "image" and timm:
    layer = "visual.trunk.blocks.{0}."
    a, m = layer + "attn.", layer + "mlp."
    return (
      (r"stem/cls_token", "visual.trunk.cls_token"),
      (r"stem/patch/\w+", "visual.trunk.patch_embed.proj.{kind}"),
      (r"stem/positions", "visual.trunk.pos_embed"),
      (r"trunk/blocks_(\d+)/norm([12])/\w+", layer + "norm{1}.{kind}"),
      (r"trunk/blocks_(\d+)/attn/qkv/kernel", f"{a}q_proj.weight+{a}k_proj.weight+{a}v_proj.weight|{a}qkv.weight"),
      (r"trunk/blocks_(\d+)/attn/qkv/bias", f"{a}q_proj.bias+0+{a}v_proj.bias|{a}q_bias+0+{a}v_bias"),
      (r"trunk/blocks_(\d+)/attn/norm/\w+", a + "norm.{kind}"),
      (r"trunk/blocks_(\d+)/attn/out/\w+", a + "proj.{kind}"),
      (r"trunk/blocks_(\d+)/mlp/fc1/\w+", f"{m}fc1_g.{{kind}}+{m}fc1_x.{{kind}}|{m}fc1.{{kind}}"),
      (r"trunk/blocks_(\d+)/mlp/(norm|fc2)/\w+", m + "{1}.{kind}"),
    ), ((r"norm/\w+", "visual.trunk.norm.{kind}"), (r"proj/\w+", "visual.trunk.head.{kind}"))
  text = "text." if any(name.startswith("text.") for name in weights) else ""
  root, norm, proj = ("visual.", "ln_post", "proj") if modality == "image" else (text, "ln_final", "text_projection")
  layer = root + "transformer.resblocks.{0}."
  return (
    (r"stem/cls_token", root + "class_embedding"),
    (r"stem/patch/kernel", root + "conv1.weight"),
    (r"stem/positions", root + "positional_embedding"),
    (r"stem/embed/embedding", root + "token_embedding.weight"),
    (r"trunk/pre_norm/\w+", root + "ln_pre.{kind}"),
    (r"trunk/blocks_(\d+)/norm([12])/\w+", layer + "ln_{1}.{kind}"),
    (r"trunk/blocks_(\d+)/attn/qkv/\w+", layer + "attn.in_proj_{kind}"),
    (r"trunk/blocks_(\d+)/attn/out/\w+", layer + "attn.out_proj.{kind}"),
    (r"trunk/blocks_(\d+)/scale([12])", layer + "ls_{1}.gamma"),
    (r"trunk/blocks_(\d+)/mlp/fc1/\w+", layer + "mlp.c_fc.{kind}"),
    (r"trunk/blocks_(\d+)/mlp/fc2/\w+", layer + "mlp.c_proj.{kind}"),
  ), ((r"norm/\w+", f"{root}{norm}.{{kind}}"),
      (r"proj/\w+", f"{root}{proj}.{{kind}}" if f"{root}{proj}.weight" in weights else root + proj))  # fmt: skip


# Names that no tower uses: the other tower's, factors of the loss, buffers.
_IMAGE_ONLY = (r"visual\..*",)
_TEXT_ONLY = (r"text\..*", r"token_embedding\.weight", r"positional_embedding", r"transformer\..*", r"ln_final\..*",
              r"text_projection(\..*)?", r"text_decoder\..*")  # fmt: skip
_OTHER = (r"logit_scale", r"logit_bias", r"(text\.)?attn_mask", r"visual\.trunk\.rope\..*", r"input_resolution",
          r"context_length", r"vocab_size")  # fmt: skip


def _head_convert(linear: bool, value: np.ndarray, path: str, shape: tuple[int, ...]) -> np.ndarray:
  # `proj` and `text_projection` are matrices [width, embedding]; only linear layers are transposed.
  return value if path == "proj/kernel" and not linear else names.from_torch(value, path, shape)


def _picture(cfg: Mapping[str, Any], size: tuple[int, ...], where: str | Path) -> Input:
  resize, kind = cfg.get("resize_mode") or "shortest", cfg.get("interpolation") or "bicubic"
  if resize not in ("shortest", "squash", "longest") or kind not in ("bicubic", "bilinear", "random"):
    raise ValueError(f"{where}: preprocess_cfg has resize_mode {resize!r} and interpolation {kind!r}; allowed: "
                     "shortest, squash, longest; bicubic, bilinear")  # fmt: skip
  if resize == "shortest" and size[0] != size[1]:
    raise ValueError(f"{where}: resize_mode 'shortest' to {size} is not supported; allowed: a square")
  resample = RESAMPLE["bilinear" if kind == "bilinear" else "bicubic"]
  return picture_input(Picture(size, resize, 0, resample, crop="even", fill=cfg.get("fill_color", 0)))


@functools.lru_cache(maxsize=4)
def _text(length: int) -> Input:
  return text_input(clip_ids(length, *_MARKS))


def make_trunk(
  *, weights: Place = "", modality: Name = "image", model: Line = "", tag: Line = "", act: Act = "", dtype: Dtype = "",
  remat: bool = False, scan: bool = False,
) -> Trunk:  # fmt: skip
  """A tower of an OpenCLIP checkpoint.

  Args:
    weights: folder with `open_clip_config.json`, or a file of weights.
    modality: "image" or "text".
    model: for a file, the name of its model config, such as "ViT-B-32" or "ViT-L-14-quickgelu" (a key of `MODELS`).
    tag: for a file, open_clip's name of the weights, such as "laion2b_s34b_b79k", which tells activation and
      preparation; "" for the file's own name.
    act: "gelu" or "quick_gelu" instead of the checkpoint's activation.
    dtype: compute type, such as "bfloat16"; "" for float32.
    remat, scan: as in `models.transformer.Transformer`.

  Raises:
    ValueError: if there is no such checkpoint, its tower is not supported, or it lacks the modality.
  """
  path = Path(weights).expanduser()
  if not weights or not (path.exists() or present(path)):
    raise ValueError(f"weights: {weights!r} does not exist")
  bare = not path.is_dir()
  if bare:
    if model not in MODELS:
      raise ValueError(f"model: got {model!r} for {path}, which has no config; allowed: {', '.join(MODELS)}")
    config, where = MODELS[model], path
    published = _published(model, tag or path.stem)
    picture = published[1] if published else {}
  else:
    whole, where = folder_json(path, _CONFIG), path / _CONFIG
    config, picture = whole.get("model_cfg", whole), whole.get("preprocess_cfg", {})
    if "vision_cfg" not in config:
      raise ValueError(f"{path}: not a folder of OpenCLIP ({_CONFIG} with model_cfg)")
  name = tag or (path.stem if bare else "/".join(path.parts[-4:]))
  timm = bool(config["vision_cfg"].get("timm_model_name"))
  quick = is_quick(config, act, model, name, bare and not (timm and modality == "image"), where)
  if modality not in MODALITIES:
    raise ValueError(f"{path}: has no {modality!r}; it has {', '.join(modalities(path))}")
  spec = spec_of(config, modality, where, quick, picture)
  there = _weights(path)
  if not _has(there, modality):
    raise ValueError(f"{there.name}: has no {modality!r}; it has {', '.join(m for m in MODALITIES if _has(there, m))}")
  rules, head_rules = _rules(modality, there, timm)
  linear = timm and modality == "image" or f"{head_rules[1][1].removesuffix('.{kind}')}.weight" in there
  bias = f"{head_rules[1][1].removesuffix('.{kind}')}.bias" in there
  projected = linear or head_rules[1][1] in there
  if modality == "image":
    item = _picture(picture, spec.size, where)
  else:
    item = _text(spec.size[0])
  heads = tuple(rule[1].format(kind="(weight|bias)").replace(".", r"\.") for rule in head_rules)
  ignored = (*(_TEXT_ONLY if modality == "image" else _IMAGE_ONLY), *_OTHER, *heads)
  start = tuple(rule[1].split("{kind}")[0] for rule in head_rules)
  load_head = functools.partial(
    names.load, weights=there.renamed(lambda n: n if n.startswith(start) else ""), rules=head_rules,
    convert=functools.partial(_head_convert, linear))  # fmt: skip
  scale = math.exp(float(there["logit_scale"].read().reshape(-1)[0])) if "logit_scale" in there else 1.0
  act = "quick_gelu" if quick else "gelu"  # as found, since a saved model keeps no names that tell
  options = {"weights": weights, "modality": modality, "model": model, "tag": tag, "act": act, "dtype": dtype,
             "remat": remat, "scan": scan}  # fmt: skip
  width = config["embed_dim"] if projected else spec.width
  return Trunk(
    name="open_clip", modality=modality, module=Encoder(spec, remat=remat, scan=scan, dtype=dtype or None), input=item,
    fingerprint=fingerprint({}, {"weights": there.hash(), "spec": repr(spec), "dtype": dtype},
                            f"{_REVISION} {item.revision}"),
    load=functools.partial(names.load, weights=there, rules=rules, ignored=ignored), options=options, licence=LICENCE,
    head=PublishedHead(Head(width, eps=spec.eps, proj=projected, bias=bias), load_head, scale),
  )  # fmt: skip

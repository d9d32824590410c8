"""Perception Encoder, PE-Core (arXiv 2504.13181): one torch file (facebook/PE-Core-*), or OpenCLIP's layout.

Takes: pictures; texts.
Choose it for: pictures and texts; permissive weights.
"""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import numpy as np

from codebind_jax.data.inputs import Input
from codebind_jax.data.preparation.pictures import RESAMPLE, Picture, picture_input
from codebind_jax.data.preparation.texts import clip_ids, text_input
from codebind_jax.models.encoder import Encoder, EncoderSpec
from codebind_jax.models.heads import Head
from codebind_jax.trunks import names
from codebind_jax.trunks.base import PublishedHead, Trunk, fingerprint
from codebind_jax.trunks.checkpoint_files import (
  ENDINGS,
  Weights,
  folder_weights,
  listed,
  mentions,
  open_weights,
  present,
)
from codebind_jax.trunks.folders import folder_json
from codebind_jax.trunks.options import Dtype, Name, Place
from codebind_jax.trunks.siglip import with_split_projection

_REVISION = "pe_core-1"
MODALITIES = ("image", "text")
LICENCE = "Apache-2.0 (Meta's weights)"
POOL_HEADS = 8

_MEAN = _STD = (0.5, 0.5, 0.5)
_MARKS = ("<start_of_text>", "<end_of_text>")
_MARK = "visual.attn_pool.probe"  # PE-Core alone has it; PE-Lang and PE-Spatial give no embedding
_TIMM = "visual.trunk."
_POOL = "visual.attn_pool."
_HEAD = {"image": r"visual\.(proj|trunk\.head\.(weight|bias))",
         "text": r"(text\.)?(ln_final\.(weight|bias)|text_projection)"}  # fmt: skip
_TEXT = r"(text\.)?(token_embedding\.weight|positional_embedding|transformer\..*)"
_IGNORED = {"image": (_TEXT, _HEAD["text"]), "text": (r"visual\..*",)}
_BUFFERS = r"logit_scale|(text\.)?attn_mask|visual\.trunk\.rope\..*"


def _timm_rules() -> names.Rules:
  """Names of a picture encoder in OpenCLIP's layout, which are timm's."""
  layer, pool = _TIMM + "blocks.{0}.", _TIMM + "attn_pool."
  return (
    (r"stem/cls_token", _TIMM + "cls_token"),
    (r"stem/patch/kernel", _TIMM + "patch_embed.proj.weight"),
    (r"stem/positions", _TIMM + "pos_embed"),
    (r"trunk/pre_norm/\w+", _TIMM + "norm_pre.{kind}"),
    (r"trunk/blocks_(\d+)/(norm[12])/\w+", layer + "{1}.{kind}"),
    (r"trunk/blocks_(\d+)/attn/qkv/\w+", layer + "attn.qkv.{kind}"),
    (r"trunk/blocks_(\d+)/attn/out/\w+", layer + "attn.proj.{kind}"),
    (r"trunk/blocks_(\d+)/mlp/(fc[12])/\w+", layer + "mlp.{1}.{kind}"),
    (r"norm/\w+", _TIMM + "norm.{kind}"),
    (r"pool/probe", pool + "latent"),
    (r"pool/(q|kv|norm)/\w+", pool + "{0}.{kind}"),
    (r"pool/mlp/(fc[12])/\w+", pool + "mlp.{0}.{kind}"),
    (r"pool/out/\w+", pool + "proj.{kind}"),
    (r"proj/\w+", _TIMM + "head.{kind}"),
  )


def _rules(root: str) -> names.Rules:
  """Names of the release under `visual.`, and of texts, in OpenCLIP's layout under `text.`."""
  layer = root + "transformer.resblocks.{0}."
  return (
    (r"stem/cls_token", root + "class_embedding"),
    (r"stem/patch/kernel", root + "conv1.weight"),
    (r"stem/embed/embedding", root + "token_embedding.weight"),
    (r"stem/positions", root + "positional_embedding"),
    (r"trunk/pre_norm/\w+", root + "ln_pre.{kind}"),
    (r"trunk/blocks_(\d+)/norm([12])/\w+", layer + "ln_{1}.{kind}"),
    (r"trunk/blocks_(\d+)/attn/qkv/\w+", layer + "attn.in_proj_{kind}"),
    (r"trunk/blocks_(\d+)/attn/out/\w+", layer + "attn.out_proj.{kind}"),
    (r"trunk/blocks_(\d+)/mlp/fc1/\w+", layer + "mlp.c_fc.{kind}"),
    (r"trunk/blocks_(\d+)/mlp/fc2/\w+", layer + "mlp.c_proj.{kind}"),
    (r"norm/\w+", root + "ln_post.{kind}"),
    (r"pool/probe", _POOL + "probe"),
    (r"pool/q/\w+", _POOL + "attn.q_{kind}"),
    (r"pool/kv/\w+", f"{_POOL}attn.k_{{kind}}+{_POOL}attn.v_{{kind}}"),
    (r"pool/out/\w+", _POOL + "attn.out_proj.{kind}"),
    (r"pool/norm/\w+", _POOL + "layernorm.{kind}"),
    (r"pool/mlp/fc1/\w+", _POOL + "mlp.c_fc.{kind}"),
    (r"pool/mlp/fc2/\w+", _POOL + "mlp.c_proj.{kind}"),
    (r"proj/kernel", "visual.proj"),
  )


def _text_head(root: str) -> names.Rules:
  return ((r"norm/\w+", root + "ln_final.{kind}"), (r"proj/kernel", root + "text_projection"))


def _by_timm(path: Path) -> bool:
  """Whether a folder is PE-Core in OpenCLIP's layout."""
  try:
    config = folder_json(path, "open_clip_config.json") if path.is_dir() else {}
    return str(config["model_cfg"]["vision_cfg"]["timm_model_name"]).startswith("vit_pe_core_")
  except (ValueError, OSError, KeyError, TypeError):
    return False


def _file(path: Path) -> Path | None:
  """The weights of a path; of a folder the one that is named like a model."""
  if path.is_dir():
    return next((f for ending in ENDINGS for f in listed(path) if f.name.startswith("PE-Core-") and f.suffix == ending),
                None)  # fmt: skip
  return path if present(path) and path.suffix in ENDINGS else None


def recognises(path: Path) -> bool:
  """Whether a path is a checkpoint of this family."""
  file = _file(path)
  return _by_timm(path) or file is not None and mentions(file, _MARK)


def modalities(path: Path) -> tuple[str, ...]:
  """Modalities that a checkpoint has."""
  return _modalities(_weights(path))


def _modalities(weights: Weights) -> tuple[str, ...]:
  first = {"image": (_MARK, f"{_TIMM}attn_pool.latent")}
  first["text"] = ("token_embedding.weight", "text.token_embedding.weight")
  return tuple(m for m in MODALITIES if any(name in weights for name in first[m]))


def _weights(path: Path) -> Weights:
  opened = folder_weights(path, ("open_clip_model", "open_clip_pytorch_model")) if _by_timm(path) \
    else open_weights(_file(path))  # fmt: skip
  return opened.renamed(lambda name: name.removeprefix("module."))


def spec_of(weights: Weights, modality: str) -> EncoderSpec:
  """The encoder's shape, from those of its arrays; heads have 64 channels, the largest picture encoder's 96.

  Raises:
    ValueError: naming what the checkpoint lacks.
  """
  timm = modality == "image" and f"{_TIMM}pos_embed" in weights
  root = "visual." if modality == "image" else _text_root(weights)
  layers, pool = (f"{_TIMM}blocks.", f"{_TIMM}attn_pool.") if timm else (f"{root}transformer.resblocks.", _POOL)
  wide = "mlp.fc1.weight" if timm else "mlp.c_fc.weight"
  try:
    places, width = weights[f"{_TIMM}pos_embed" if timm else f"{root}positional_embedding"].shape[-2:]
    common = {
      "width": width, "depth": names.depth_of(weights, rf"^{re.escape(layers)}(\d+)\."), "eps": 1e-5,
      "heads": 16 if width == 1536 else max(width // 64, 1), "mlp": weights[f"{layers}0.{wide}"].shape[0],
    }  # fmt: skip
    if modality == "text":
      return EncoderSpec(**common, size=(places,), vocab=weights[f"{root}token_embedding.weight"].shape[0], pool="end")
    patch = weights[f"{_TIMM}patch_embed.proj.weight" if timm else "visual.conv1.weight"].shape[-1]
    pool_mlp = weights[f"{pool}{wide}"].shape[0]
  except KeyError as error:
    raise ValueError(f"{weights.name}: lacks {error}") from error
  except (ValueError, IndexError) as error:
    raise ValueError(f"{weights.name}: its positions or convolution have another form ({error})") from error
  class_token = "visual.class_embedding" in weights or f"{_TIMM}cls_token" in weights
  grid = math.isqrt(places - class_token)
  if grid**2 != places - class_token:
    raise ValueError(f"{weights.name}: {places} positions are not those of a square")
  return EncoderSpec(
    **common, size=(grid * patch,) * 2, patch=(patch, patch), channels=3, stem_norm=False, class_token=class_token,
    pre_norm=True, rope="perception", out_norm=True, pool="map", pool_heads=POOL_HEADS, pool_mlp=pool_mlp, mean=_MEAN,
    std=_STD,
  )  # fmt: skip


def _text_root(weights: Weights) -> str:
  return "text." if "text.token_embedding.weight" in weights else ""


def _head_value(value: np.ndarray, path: str, shape: tuple[int, ...]) -> np.ndarray:
  return value  # matrices [width, embedding], as flax has them


@functools.lru_cache(maxsize=4)
def _text(length: int) -> Input:
  return text_input(clip_ids(length, *_MARKS))


def make_trunk(
  *, weights: Place = "", modality: Name = "image", dtype: Dtype = "", remat: bool = False, scan: bool = False
) -> Trunk:
  """A tower of a PE-Core checkpoint.

  Args:
    weights: the file, such as `PE-Core-B16-224.pt`, the folder that holds it, or one in OpenCLIP's layout.
    modality: "image" or "text".
    dtype: compute type, such as "bfloat16"; "" for float32.
    remat, scan: as in `models.transformer.Transformer`.

  Raises:
    ValueError: if it is no such checkpoint, or lacks the modality.
  """
  path = Path(weights).expanduser()
  if not weights or not (path.exists() or present(path)):
    raise ValueError(f"weights: {weights!r} does not exist")
  if not _by_timm(path) and _file(path) is None:
    raise ValueError(f"{weights}: not PE-Core: neither a file of weights nor a folder with PE-Core-*.pt")
  whole = _weights(path)
  timm = f"{_TIMM}attn_pool.latent" in whole
  if _MARK not in whole and not timm:
    raise ValueError(f"{whole.name}: not PE-Core: lacks {_MARK} (PE-Lang and PE-Spatial give no embedding)")
  if modality not in _modalities(whole):
    raise ValueError(f"{weights}: has no {modality!r}; it has {', '.join(_modalities(whole))}")
  there, spec = with_split_projection(whole, _POOL + "attn.in_proj_"), spec_of(whole, modality)
  item = _text(spec.size[0]) if spec.is_text else picture_input(
    Picture(spec.size, "squash", resample=RESAMPLE["bilinear"]))  # fmt: skip
  own = there.renamed(lambda name: name if re.fullmatch(_HEAD[modality], name) else "")
  text_root, linear = _text_root(whole), timm and modality == "image"
  rules = (_timm_rules() if timm else _rules("visual.")) if modality == "image" else _rules(text_root)
  head_rules = rules[-1:] if modality == "image" else _text_head(text_root)
  projection = there.get(head_rules[-1][1].format(kind="weight"))
  if projection is None:
    raise ValueError(f"{whole.name}: lacks {head_rules[-1][1].format(kind='weight')}")
  scale = there["logit_scale"].read().item() if "logit_scale" in there else 0.0
  return Trunk(
    name="pe_core", modality=modality, module=Encoder(spec, remat=remat, scan=scan, dtype=dtype or None), input=item,
    fingerprint=fingerprint({}, {"weights": whole.hash(), "modality": modality, "dtype": dtype},
                            f"{_REVISION} {item.revision}"),
    load=functools.partial(names.load, weights=there, rules=rules,
                           ignored=(*_IGNORED[modality], _HEAD[modality], _BUFFERS)),
    options={"weights": weights, "modality": modality, "dtype": dtype, "remat": remat, "scan": scan}, licence=LICENCE,
    head=PublishedHead(
      Head(projection.shape[0 if linear else -1], norm=spec.is_text, eps=spec.eps, bias=f"{_TIMM}head.bias" in own),
      functools.partial(names.load, weights=own, rules=head_rules,
                        convert=names.from_torch if linear else _head_value),
      math.exp(scale),
    ),
  )  # fmt: skip

"""Perception Encoder, PE-Core (arXiv 2504.13181), in its own layout: facebook/PE-Core-*, one torch file."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import numpy as np

from codebind_jax.models.encoder import Encoder, EncoderSpec
from codebind_jax.models.heads import Head
from codebind_jax.trunks import names
from codebind_jax.trunks.base import Input, PublishedHead, Trunk, fingerprint
from codebind_jax.trunks.checkpoint_files import ENDINGS, Weights, open_weights
from codebind_jax.trunks.clip_tokenizer import clip_ids
from codebind_jax.trunks.pictures import RESAMPLE, Picture, picture_input
from codebind_jax.trunks.siglip import with_split_projection
from codebind_jax.trunks.tokens import text_input

_REVISION = "pe_core-1"
MODALITIES = ("image", "text")
LICENCE = "Apache-2.0 (Meta's weights)"
POOL_HEADS = 8

_MEAN = _STD = (0.5, 0.5, 0.5)
_MARKS = ("<start_of_text>", "<end_of_text>")
_MARK = "visual.attn_pool.probe"  # PE-Core alone has it; PE-Lang and PE-Spatial give no embedding
_POOL = "visual.attn_pool."
_HEAD = {"image": r"visual\.proj", "text": r"ln_final\.(weight|bias)|text_projection"}
_TEXT = r"token_embedding\.weight|positional_embedding|transformer\..*"
_IGNORED = {"image": (_TEXT, _HEAD["text"]), "text": (r"visual\..*",)}


def _rules(root: str) -> names.Rules:
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
  )


HEAD_RULES = {
  "image": ((r"proj/kernel", "visual.proj"),),
  "text": ((r"norm/\w+", "ln_final.{kind}"), (r"proj/kernel", "text_projection")),
}


def _file(path: Path) -> Path | None:
  """The weights of a path; of a folder the one that is named like a model."""
  if path.is_dir():
    return next((file for ending in ENDINGS for file in sorted(path.glob(f"PE-Core-*{ending}"))), None)
  return path if path.is_file() and path.suffix in ENDINGS else None


def recognises(path: Path) -> bool:
  """Whether a path is a checkpoint of this family."""
  file = _file(path)
  try:
    return file is not None and file.suffix != ".npz" and _MARK in _weights(file)
  except (ValueError, OSError):
    return False


def modalities(path: Path) -> tuple[str, ...]:
  """Modalities that a checkpoint has."""
  return _modalities(_weights(_file(path)))


def _modalities(weights: Weights) -> tuple[str, ...]:
  first = {"image": _MARK, "text": "token_embedding.weight"}
  return tuple(m for m in MODALITIES if first[m] in weights or first[m].removeprefix("visual.") in weights)


def _weights(file: Path) -> Weights:
  opened = open_weights(file)
  return opened.renamed(lambda name: name.removeprefix("module."))


def spec_of(weights: Weights, modality: str) -> EncoderSpec:
  """The encoder's shape, from those of its arrays; heads have 64 channels, the largest picture encoder's 96.

  Raises:
    ValueError: naming what the checkpoint lacks.
  """
  root = "visual." if modality == "image" else ""
  try:
    places, width = weights[f"{root}positional_embedding"].shape
    common = {
      "width": width, "depth": names.depth_of(weights, rf"^{re.escape(root)}transformer\.resblocks\.(\d+)\."),
      "heads": 16 if width == 1536 else max(width // 64, 1), "eps": 1e-5,
      "mlp": weights[f"{root}transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
    }  # fmt: skip
    if modality == "text":
      return EncoderSpec(**common, size=(places,), vocab=weights["token_embedding.weight"].shape[0], pool="end")
    patch, pool_mlp = weights["visual.conv1.weight"].shape[-1], weights[f"{_POOL}mlp.c_fc.weight"].shape[0]
  except KeyError as error:
    raise ValueError(f"{weights.name}: lacks {error}") from error
  except (ValueError, IndexError) as error:
    raise ValueError(f"{weights.name}: its positions or convolution have another form ({error})") from error
  class_token = "visual.class_embedding" in weights
  grid = math.isqrt(places - class_token)
  if grid**2 != places - class_token:
    raise ValueError(f"{weights.name}: {places} positions are not those of a square")
  return EncoderSpec(
    **common, size=(grid * patch,) * 2, patch=(patch, patch), channels=3, stem_norm=False, class_token=class_token,
    pre_norm=True, rope="perception", out_norm=True, pool="map", pool_heads=POOL_HEADS, pool_mlp=pool_mlp, mean=_MEAN,
    std=_STD,
  )  # fmt: skip


def _head_value(value: np.ndarray, path: str, shape: tuple[int, ...]) -> np.ndarray:
  return value  # matrices [width, embedding], as flax has them


@functools.lru_cache(maxsize=4)
def _text(length: int) -> Input:
  return text_input(clip_ids(length, *_MARKS))


def make_trunk(
  *, weights: str = "", modality: str = "image", dtype: str = "", remat: bool = False, scan: bool = False
) -> Trunk:
  """A tower of a PE-Core checkpoint.

  Args:
    weights: the file, such as `PE-Core-B16-224.pt`, or the folder that holds it.
    modality: "image" or "text".
    dtype: compute type, such as "bfloat16"; "" for float32.
    remat, scan: as in `models.transformer.Transformer`.

  Raises:
    ValueError: if it is no such checkpoint, or lacks the modality.
  """
  path = Path(weights).expanduser()
  if not weights or not path.exists():
    raise ValueError(f"weights: {weights!r} does not exist")
  file = _file(path)
  if file is None:
    raise ValueError(f"{weights}: not PE-Core: neither a file of weights nor a folder with PE-Core-*.pt")
  whole = _weights(file)
  if _MARK not in whole:
    raise ValueError(f"{file}: not PE-Core: lacks {_MARK} (PE-Lang and PE-Spatial give no embedding)")
  if modality not in _modalities(whole):
    raise ValueError(f"{weights}: has no {modality!r}; it has {', '.join(_modalities(whole))}")
  there, spec = with_split_projection(whole, _POOL + "attn.in_proj_"), spec_of(whole, modality)
  item = _text(spec.size[0]) if spec.is_text else picture_input(
    Picture(spec.size, "squash", resample=RESAMPLE["bilinear"]))  # fmt: skip
  own = there.renamed(lambda name: name if re.fullmatch(_HEAD[modality], name) else "")
  projection = there.get(HEAD_RULES[modality][-1][1])
  if projection is None:
    raise ValueError(f"{file}: lacks {HEAD_RULES[modality][-1][1]}")
  scale = there["logit_scale"].read().item() if "logit_scale" in there else 0.0
  return Trunk(
    name="pe_core", modality=modality, module=Encoder(spec, remat=remat, scan=scan, dtype=dtype or None), input=item,
    fingerprint=fingerprint({}, {"weights": whole.hash(), "modality": modality, "dtype": dtype},
                            f"{_REVISION} {item.revision}"),
    load=functools.partial(names.load, weights=there, rules=_rules("visual." if modality == "image" else ""),
                           ignored=(*_IGNORED[modality], _HEAD[modality], "logit_scale")),
    options={"weights": weights, "modality": modality, "dtype": dtype, "remat": remat, "scan": scan}, licence=LICENCE,
    head=PublishedHead(
      Head(projection.shape[-1], norm=spec.is_text, eps=spec.eps),
      functools.partial(names.load, weights=own, rules=HEAD_RULES[modality], convert=_head_value), math.exp(scale),
    ),
  )  # fmt: skip

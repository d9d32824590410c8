"""SigLIP and SigLIP2 as big_vision's `.npz`: flax names, blocks one by one or stacked, with or without `params/`.

Takes: pictures; texts of up to 64 tokens.
Choose it for: SigLIP from Google's own `.npz` files, where you have those.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import tokenizers

from codebind_jax.data import sentencepiece
from codebind_jax.data.preparation.pictures import RESAMPLE, Picture, picture_input
from codebind_jax.data.preparation.texts import Ids, text_input, without_punctuation
from codebind_jax.models.encoder import EncoderSpec
from codebind_jax.trunks import names, siglip
from codebind_jax.trunks.base import Trunk
from codebind_jax.trunks.checkpoint_files import Weights, note, open_weights, present
from codebind_jax.trunks.folders import SENTENCEPIECE, folder_tokenizer, has_tokenizer
from codebind_jax.trunks.options import Dtype, MaybeSide, Name, Place

_REVISION = "big_vision-1"
MODALITIES, LICENCE = siglip.MODALITIES, siglip.LICENCE

_FIRST = {"image": "img/embedding/kernel", "text": "txt/Embed_0/embedding"}
_GEMMA = 256_000  # ids of SigLIP2's vocabulary
_ATTN = "MultiHeadDotProductAttention_0/"


def _rules(root: str, modality: str) -> names.Rules:
  tower = root + {"image": "img/", "text": "txt/"}[modality]
  trunk, pool = tower + {"image": "Transformer/", "text": "Encoder_0/"}[modality], tower + "MAPHead_0/"
  layer = trunk + "encoderblock_{0}/"
  rules = [
    (r"stem/patch/(\w+)", tower + "embedding/{0}"),
    (r"stem/positions", tower + "pos_embedding"),
    (r"stem/embed/embedding", tower + "Embed_0/embedding"),
    (r"norm/(\w+)", trunk + "encoder_norm/{0}"),
    (r"trunk/blocks_(\d+)/attn/qkv/(\w+)", "+".join(f"{layer}{_ATTN}{p}/{{1}}" for p in ("query", "key", "value"))),
    (r"trunk/blocks_(\d+)/attn/out/(\w+)", layer + _ATTN + "out/{1}"),
    (r"pool/probe", pool + "probe"),
    (r"pool/q/(\w+)", pool + _ATTN + "query/{0}"),
    (r"pool/kv/(\w+)", f"{pool}{_ATTN}key/{{0}}+{pool}{_ATTN}value/{{0}}"),
    (r"pool/out/(\w+)", pool + _ATTN + "out/{0}"),
    (r"pool/norm/(\w+)", pool + "LayerNorm_0/{0}"),
    (r"proj/(\w+)", tower + "head/{0}"),
  ]
  for number in (1, 2):
    rules += [
      (rf"trunk/blocks_(\d+)/norm{number}/(\w+)", f"{layer}LayerNorm_{number - 1}/{{1}}"),
      (rf"trunk/blocks_(\d+)/mlp/fc{number}/(\w+)", f"{layer}MlpBlock_0/Dense_{number - 1}/{{1}}"),
      (rf"pool/mlp/fc{number}/(\w+)", f"{pool}MlpBlock_0/Dense_{number - 1}/{{0}}"),
    ]
  return rules


def _root(weights: Weights) -> str | None:
  """What stands before `img/` and `txt/` in the names; None if they are not big_vision's."""
  found = [name.removesuffix(first) for name in weights for first in _FIRST.values() if name.endswith(first)]
  return min(found, key=len, default=None)


def recognises(path: Path) -> bool:
  """Whether a path is a checkpoint of this family."""
  if path.suffix != ".npz" or not path.is_file():
    return False
  try:
    return _root(open_weights(path)) is not None
  except (ValueError, OSError):
    return False


def modalities(path: Path) -> tuple[str, ...]:
  """Modalities that a file has: their weights, and for text a tokenizer beside it."""
  beside = has_tokenizer(path.parent) or any(path.parent.glob("*.model"))
  return tuple(m for m in _modalities(open_weights(path)) if m != "text" or beside)


def _modalities(weights: Weights) -> tuple[str, ...]:
  return tuple(m for m in MODALITIES if f"{_root(weights)}{_FIRST[m]}" in weights)


def _spec(weights: Weights, root: str, modality: str, side: int) -> EncoderSpec:
  tower = root + {"image": "img/", "text": "txt/"}[modality]
  shape = lambda name: weights[tower + name].shape
  try:
    positions = shape("pos_embedding")
    layers = tower + {"image": "Transformer/", "text": "Encoder_0/"}[modality]
    depth = names.depth_of(weights, rf"^{re.escape(layers)}encoderblock_(\d+)/")
    block = f"{layers.removeprefix(tower)}encoderblock_0/"
    common = {"width": positions[-1], "depth": depth, "heads": shape(f"{block}{_ATTN}query/kernel")[-2],
              "mlp": shape(f"{block}MlpBlock_0/Dense_0/kernel")[-1], "act": "gelu_tanh", "eps": 1e-6}  # fmt: skip
    if modality == "text":
      vocab = shape("Embed_0/embedding")[0]
      return EncoderSpec(**common, size=(positions[-2],), pool="last", causal=False, vocab=vocab)
    patch, grid = shape("embedding/kernel")[0], math.isqrt(positions[-2])
  except (KeyError, IndexError) as error:
    raise ValueError(f"{weights.name}: lacks {error}, or it has another form") from error
  if grid**2 != positions[-2] or side and side // patch != grid:
    raise ValueError(f"{weights.name}: {positions[-2]} positions of {patch} x {patch} patches do not fit "
                     f"pictures of {side or 'any'} x {side or 'size'}")  # fmt: skip
  # 27 x 27 patches of 14 pixels are those of 384 pixels too: the file's name says which.
  numbers = [int(n) for n in re.findall(r"\d+", Path(weights.name).name)]
  side = side or next((n for n in numbers if n // patch == grid), grid * patch)
  return EncoderSpec(**common, size=(side, side), patch=(patch, patch), channels=3, stem_norm=False, stem_bias=True,
                     class_token=False, out_norm=True, pool="map", mean=siglip.MEAN, std=siglip.STD)  # fmt: skip


def _ids(file: Path, tokenizer: str, context: int) -> Ids:
  place = Path(tokenizer).expanduser() if tokenizer else file.parent
  folder = place if place.is_dir() else place.parent
  if place.is_dir() and (place / "tokenizer_config.json").is_file():
    return siglip.folder_ids(place, context)
  models = [place] if place.is_file() else [folder / name for name in ("tokenizer.json", *SENTENCEPIECE)]
  models += sorted(folder.glob("*.model")) if place.is_dir() else []
  model = next((path for path in models if path.is_file()), None)
  if model is None:
    raise ValueError(f"{file}: text needs a tokenizer: tokenizer.json or a SentencePiece model in {place}, "
                     "or the option `tokenizer`")  # fmt: skip
  note(model)
  whole = model.suffix == ".json"
  if whole and model.name != "tokenizer.json":
    try:
      made = tokenizers.Tokenizer.from_file(str(model))
    except Exception as error:  # the library raises nothing narrower
      raise ValueError(f"{model}: not a readable tokenizer ({error})") from error
  else:
    made = folder_tokenizer(model.parent) if whole else sentencepiece.read_tokenizer(model)
  gemma = made.token_to_id("<eos>") is not None
  end = "<eos>" if gemma else "</s>"
  pad = "<pad>" if gemma else end
  if made.token_to_id(end) is None or made.token_to_id(pad) is None:
    raise ValueError(f"{model}: has no end mark (<eos> or </s>), or no padding")
  ids = made.encode("a").ids
  if ids[-1:] != [made.token_to_id(end)] or ids[:1] == [made.token_to_id("<bos>")]:
    made = siglip.with_end(made, end)
  clean = None if gemma or whole else without_punctuation
  return Ids(made, context, made.token_to_id(pad), lower=gemma or not whole, clean=clean)


def make_trunk(
  *, weights: Place = "", modality: Name = "image", tokenizer: Place = "", size: MaybeSide = 0, dtype: Dtype = "",
  remat: bool = False, scan: bool = False,
) -> Trunk:  # fmt: skip
  """A tower of a SigLIP checkpoint of big_vision.

  Pictures are prepared as transformers prepares them for the same weights: squashed, by bicubic resize for SigLIP and
  bilinear for SigLIP2. A SentencePiece model gets lower-cased texts, those of SigLIP without punctuation; a
  `tokenizer.json` does what it says, but SigLIP2's texts are lower-cased first.

  Args:
    weights: the `.npz` file.
    modality: "image" or "text".
    tokenizer: file or folder of the text's tokenizer; "" for the folder of `weights`.
    size: side of the pictures in pixels; 0 for the one that the file's name has and its positions fit.
    dtype, remat, scan: as in `clip.make_trunk`.

  Raises:
    ValueError: if the file is no such checkpoint, lacks the modality, or has no tokenizer beside it.
  """
  path = Path(weights).expanduser()
  if not weights or not present(path):
    raise ValueError(f"weights: {weights!r} is no file")
  opened = open_weights(path)
  root = _root(opened)
  if root is None:
    raise ValueError(f"{weights}: not SigLIP of big_vision: has neither {' nor '.join(_FIRST.values())}")
  there = names.stacked_as_layers(opened, r"(encoderblock)/")
  if modality not in _modalities(there):
    raise ValueError(f"{weights}: has no {modality!r}; it has {', '.join(_modalities(there))}")
  spec = _spec(there, root, modality, size)
  if modality == "text":
    item = text_input(_ids(path, tokenizer, spec.size[0]))
  else:
    words = there.get(f"{root}{_FIRST['text']}")
    second = "siglip2" in path.name.lower() or words is not None and words.shape[0] == _GEMMA
    filter_ = RESAMPLE["bilinear" if second else "bicubic"]
    item = picture_input(Picture(spec.size, "squash", resample=filter_, backend="torch"))
  options = {"weights": weights, "modality": modality, "tokenizer": tokenizer, "size": size, "dtype": dtype,
             "remat": remat, "scan": scan}  # fmt: skip
  root_name, other = re.escape(root), "txt" if modality == "image" else "img"
  ignored = (rf"{root_name}({other}/.*|t|b)", *([rf"(?!{root_name}).*"] if root else []))
  rules = _rules(root, modality)
  return siglip.trunk_of(
    "big_vision", spec, there, item, options, f"{_REVISION} {item.revision}", rules=rules, head_rules=rules,
    head=f"{root}txt/head/bias", head_names=rf"{root_name}txt/(head|Encoder_0/encoder_norm)/\w+", ignored=ignored,
    scale=f"{root}t", bias=f"{root}b", convert=names.as_is,
  )  # fmt: skip

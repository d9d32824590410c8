"""DINOv2 (arXiv 2304.07193), with registers (2309.16588), and DINOv3's ViT (2508.10104) in Hugging Face layout.

Names as in the published files and as transformers 5 has them in its modules; facts from transformers 5.24.

Takes: pictures.
Choose it for: pictures where texture and parts count more than words; it has no text side, another tower must bring
  one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codebind_jax.data.inputs import Input, Reading
from codebind_jax.data.preparation.pictures import RESAMPLE, FloatPicture, picture_input, processor_picture
from codebind_jax.data.transforms import image as image_transforms
from codebind_jax.models.encoder import Encoder, EncoderSpec
from codebind_jax.models.heads import Head
from codebind_jax.trunks import names
from codebind_jax.trunks.base import PublishedHead, Trunk, fingerprint
from codebind_jax.trunks.checkpoint_files import Weights, folder_weights
from codebind_jax.trunks.folders import family_config, folder_json, model_type
from codebind_jax.trunks.options import Dtype, Name, Place

_REVISION = "dino-1"
MODALITIES = ("image",)
_KINDS = ("dinov2", "dinov2_with_registers", "dinov3_vit")
_LICENCES = {kind: "Apache-2.0" if kind != "dinov3_vit" else "DINOv3 licence (Meta's own)" for kind in _KINDS}
LICENCE = "Apache-2.0 (DINOv2); DINOv3 licence (DINOv3, Meta's own)"

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
# What the published folders' preprocessor_config.json holds, for folders without one.
_PICTURES = {
  "dinov2": {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
             "resample": RESAMPLE["bicubic"]},
  "dinov3_vit": {"size": {"height": 224, "width": 224}, "resample": RESAMPLE["bilinear"]},
}  # fmt: skip
_ACT = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def recognises(path: Path) -> bool:
  """Whether a path is a checkpoint of this family."""
  return path.is_dir() and model_type(path) in _KINDS


def modalities(path: Path) -> tuple[str, ...]:
  """Modalities that a checkpoint has."""
  return MODALITIES


def _weights(path: Path) -> Weights:
  there = folder_weights(path)
  start = next((f"{kind}." for kind in _KINDS if f"{kind}.embeddings.cls_token" in there), "")
  return there.renamed(lambda name: name.removeprefix(start)) if start else there


def _pair(value: Any) -> tuple[int, int]:
  return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def spec_of(config: Mapping[str, Any], picture: Mapping[str, Any], where: str | Path) -> EncoderSpec:
  """The encoder's shape from `config.json`; missing keys have transformers' defaults.

  Args:
    config: its content.
    picture: content of `preprocessor_config.json`.
    where: for errors.

  Raises:
    ValueError: for what is not supported, by its name.
  """
  kind = config["model_type"]
  v3 = kind == "dinov3_vit"
  width, act = config.get("hidden_size", 384 if v3 else 768), config.get("hidden_act", "gelu")
  gated = config.get("use_gated_mlp" if v3 else "use_swiglu_ffn", False)
  if gated and v3 and act != "silu" or not gated and act not in _ACT:
    allowed = "silu" if gated else ", ".join(_ACT)
    raise ValueError(f"{where}: hidden_act {act!r} is not supported; allowed: {allowed}")
  for key in ("proj_bias", "mlp_bias"):
    if not config.get(key, True):
      raise ValueError(f"{where}: {key} = False is not supported")
  if v3:
    mlp = config.get("intermediate_size", 1536)
    form = {"positions": False, "rope": "dinov3", "rope_theta": float(config.get("rope_theta", 100.0)),
            "registers": config.get("num_register_tokens", 0), "eps": config.get("layer_norm_eps", 1e-5),
            "qkv_bias": any(_biases(config))}  # fmt: skip
  else:
    mlp = int(width * config.get("mlp_ratio", 4))
    mlp = (int(mlp * 2 / 3) + 7) // 8 * 8 if gated else mlp
    with_registers = kind == "dinov2_with_registers"
    form = {"registers": config.get("num_register_tokens", 4) if with_registers else 0,
            "position_filter": "antialias" if with_registers else "cubic",
            "eps": config.get("layer_norm_eps", 1e-6), "qkv_bias": config.get("qkv_bias", True)}  # fmt: skip
  return EncoderSpec(
    width=width, depth=config.get("num_hidden_layers", 12), heads=config.get("num_attention_heads", 6 if v3 else 12),
    mlp=mlp, act="swiglu" if gated else _ACT[act], size=_pair(config.get("image_size", 224)),
    patch=_pair(config.get("patch_size", 16 if v3 else 14)), channels=config.get("num_channels", 3), stem_norm=False,
    stem_bias=True, layer_scale=True, mean=tuple(picture.get("image_mean", _MEAN)),
    std=tuple(picture.get("image_std", _STD)), **form,
  )  # fmt: skip


def _biases(config: Mapping[str, Any]) -> tuple[bool, bool, bool]:
  """Whether DINOv3's queries, keys and values have biases."""
  return config.get("query_bias", True), config.get("key_bias", False), config.get("value_bias", True)


def _rules(config: Mapping[str, Any]) -> names.Rules:
  if config["model_type"] == "dinov3_vit":
    both = lambda template: "|".join(template.replace("@", start) for start in ("layer.{0}.", "model.layer.{0}."))
    bias = "+".join(f"@attention.{n}_proj.bias" if b else "0" for n, b in zip("qkv", _biases(config)))
    return (
      (r"stem/(cls_token)", "embeddings.{0}"),
      (r"stem/registers", "embeddings.register_tokens"),
      (r"stem/patch/\w+", "embeddings.patch_embeddings.{kind}"),
      (r"trunk/blocks_(\d+)/norm([12])/\w+", both("@norm{1}.{kind}")),
      (r"trunk/blocks_(\d+)/attn/qkv/kernel", both("+".join(f"@attention.{n}_proj.weight" for n in "qkv"))),
      (r"trunk/blocks_(\d+)/attn/qkv/bias", both(bias)),
      (r"trunk/blocks_(\d+)/attn/out/\w+", both("@attention.o_proj.{kind}")),
      (r"trunk/blocks_(\d+)/scale([12])", both("@layer_scale{1}.lambda1")),
      (r"trunk/blocks_(\d+)/mlp/fc1/\w+",
       both("@mlp.gate_proj.{kind}+@mlp.up_proj.{kind}" if config.get("use_gated_mlp") else "@mlp.up_proj.{kind}")),
      (r"trunk/blocks_(\d+)/mlp/fc2/\w+", both("@mlp.down_proj.{kind}")),
    )  # fmt: skip
  layer = "encoder.layer.{0}."
  old, new, mlp = layer + "attention.attention.", layer + "attention.", layer + "mlp."
  joined = lambda start, ends: "+".join(f"{start}{end}.{{kind}}" for end in ends)
  return (
    (r"stem/(cls_token)", "embeddings.{0}"),
    (r"stem/registers", "embeddings.register_tokens"),
    (r"stem/patch/\w+", "embeddings.patch_embeddings.projection.{kind}"),
    (r"stem/positions", "embeddings.position_embeddings"),
    (r"trunk/blocks_(\d+)/norm([12])/\w+", layer + "norm{1}.{kind}"),
    (r"trunk/blocks_(\d+)/attn/qkv/\w+",
     f"{joined(old, ('query', 'key', 'value'))}|{joined(new, ('q_proj', 'k_proj', 'v_proj'))}"),
    (r"trunk/blocks_(\d+)/attn/out/\w+", f"{new}output.dense.{{kind}}|{new}o_proj.{{kind}}"),
    (r"trunk/blocks_(\d+)/scale([12])", layer + "layer_scale{1}.lambda1"),
    (r"trunk/blocks_(\d+)/mlp/fc1/\w+",
     f"{mlp}fc1.{{kind}}|{mlp}weights_in.{{kind}}|{joined(mlp, ('gate_proj', 'up_proj'))}"),
    (r"trunk/blocks_(\d+)/mlp/fc2/\w+", f"{mlp}fc2.{{kind}}|{mlp}weights_out.{{kind}}|{mlp}down_proj.{{kind}}"),
  )  # fmt: skip


_HEAD_RULES = {False: ((r"norm/\w+", "layernorm.{kind}"),), True: ((r"norm/\w+", "norm.{kind}"),)}
_IGNORED = (r"embeddings\.mask_token", r"(layernorm|norm)\.(weight|bias)", r"classifier\.(weight|bias)",
            r"rope_embeddings\.inv_freq")  # fmt: skip


def _input(kind: str, picture: Mapping[str, Any], spec: EncoderSpec, where: Path) -> Input:
  processor = picture.get("image_processor_type", "DINOv3" if kind == "dinov3_vit" else "")
  crop = picture.get("do_center_crop", False)
  wanted = picture.get("crop_size" if crop else "size", {})
  size = spec.size
  if isinstance(wanted, int):
    size = _pair(wanted)
  elif "height" in wanted:
    size = (wanted["height"], wanted["width"])
  if not processor.startswith("DINOv3"):
    return picture_input(processor_picture(picture, size, where))
  filters = {RESAMPLE["bilinear"]: "linear", RESAMPLE["bicubic"]: "cubic"}
  resample = picture.get("resample", RESAMPLE["bilinear"])
  if crop or resample not in filters or isinstance(wanted, dict) and "height" not in wanted:
    raise ValueError(f"{where}: do_center_crop {crop}, resample {resample} and size {wanted} are not supported; "
                     "allowed: height and width without a crop, bilinear (2) or bicubic (3)")  # fmt: skip
  prepare = FloatPicture(size, filters[resample], spec.mean, spec.std)
  read = Reading(image_transforms.read, prepare)
  return Input((*size, 3), "float32", read, revision=f"{image_transforms.REVISION} {prepare}")


def make_trunk(
  *, weights: Place = "", modality: Name = "image", dtype: Dtype = "", remat: bool = False, scan: bool = False
) -> Trunk:
  """The image encoder of a DINOv2 or DINOv3 checkpoint; its embedding is the class token after the last LayerNorm.

  Tokens are the class token, registers and patches. A picture has the size of `preprocessor_config.json`; DINOv2's
  positions, of 518 x 518 pixels in the published models, are resized to it.

  Args:
    weights: folder in Hugging Face layout.
    modality: "image".
    dtype: compute type, such as "bfloat16"; "" for float32.
    remat, scan: as in `models.transformer.Transformer`.

  Raises:
    ValueError: if the folder is no such checkpoint, or for another modality.
  """
  folder = Path(weights).expanduser()
  config = family_config(weights, folder, _KINDS, "DINOv2 or DINOv3")
  if modality != "image":
    raise ValueError(f"{weights}: has no {modality!r}; it has image")
  kind, there = config["model_type"], _weights(folder)
  default = _PICTURES[kind.removesuffix("_with_registers")]
  picture = folder_json(folder, "preprocessor_config.json") or default
  spec = spec_of(config, picture, folder / "config.json")
  item = _input(kind, picture, spec, folder / "preprocessor_config.json")
  if item.shape[0] < spec.patch[0] or item.shape[1] < spec.patch[1]:
    raise ValueError(f"{folder}: pictures of {item.shape[:2]} are smaller than a patch of {spec.patch}")
  head_rules = _HEAD_RULES[kind == "dinov3_vit"]
  ignored = _IGNORED if spec.registers else (*_IGNORED, r"embeddings\.register_tokens")
  load = functools.partial(names.load, weights=there, rules=_rules(config), ignored=ignored)
  load_head = functools.partial(names.load, rules=head_rules, weights=there.renamed(
    lambda name: name if re.fullmatch(r"(layernorm|norm)\.(weight|bias)", name) else ""))  # fmt: skip
  options = {"weights": weights, "modality": modality, "dtype": dtype, "remat": remat, "scan": scan}
  return Trunk(
    name="dino", modality=modality, module=Encoder(spec, remat=remat, scan=scan, dtype=dtype or None), input=item,
    fingerprint=fingerprint({}, {"weights": there.hash(), "spec": repr(spec), "dtype": dtype},
                            f"{_REVISION} {item.revision}"),
    load=load, options=options, licence=_LICENCES[kind],
    head=PublishedHead(Head(spec.width, eps=spec.eps, proj=False), load_head),
  )  # fmt: skip

"""ImageBind (arXiv 2305.05665): `imagebind_huge.pth`, or its tensors in a `.safetensors` file.

One file holds the encoders of images (and video), text, audio, depth, thermal pictures and IMU readings; some of them
may be left out. The CodeBind release (arXiv 2605.18257) adds touch and EEG under names of the same form.

Takes: pictures, films, texts, sounds, depth, thermal pictures, IMU readings.
Choose it for: six sensors in one space at once; the base of the publication's configs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

from absl import logging

from codebind_jax.data.preparation.imagebind import BASELINE, FOCAL_LENGTH, item_input
from codebind_jax.data.preparation.pictures import CLIP_MEAN, CLIP_STD
from codebind_jax.models.encoder import Encoder, EncoderSpec
from codebind_jax.models.heads import Head
from codebind_jax.models.imagebind import HUGE
from codebind_jax.trunks import names
from codebind_jax.trunks.base import PublishedHead, Trunk, fingerprint
from codebind_jax.trunks.checkpoint_files import Weights, open_weights, present
from codebind_jax.trunks.options import Camera, Count, Crops, Dtype, MaybeSide, Name, Place

_REVISION = "imagebind-1"
LICENCE = "CC-BY-NC 4.0 (Meta's weights: no commercial use)"
MODALITIES = ("image", "video", "text", "audio", "depth", "thermal", "imu", "tactile", "eeg")
SCALE_LIMIT = 100.0

_ENDINGS = (".pth", ".pt", ".bin", ".safetensors")
_FOLDER_FILES = ("imagebind_huge.pth", "imagebind_huge.safetensors", "model.safetensors", "pytorch_model.bin")


# --- names


def official_name(modality: str) -> str:
  """The release's name of a modality."""
  return "vision" if modality in ("image", "video") else modality


def encoder_rules(modality: str) -> names.Rules:
  """Names of an `Encoder`'s parameters; the kinds of stem differ in theirs."""
  m = official_name(modality)
  pre, block = f"modality_preprocessors.{m}.", f"modality_trunks.{m}.blocks.{{0}}."
  stems = [f"{pre}{kind}_stem" for kind in ("rgbt", "depth", "imu", "eeg")]
  return (
    (r"stem/cls_token", f"{pre}cls_token"),
    (r"stem/positions", f"{pre}pos_embedding_helper.pos_embed|{pre}pos_embed"),
    (r"stem/embed/embedding", f"{pre}token_embedding.weight"),
    (r"stem/patch/\w+", "|".join(f"{stem}.proj.{i}{{kind}}" for stem in stems for i in ("", "1."))),
    (r"stem/norm/\w+", "|".join(f"{stem}.norm_layer.{{kind}}" for stem in stems)),
    (r"trunk/pre_norm/\w+", f"modality_trunks.{m}.pre_transformer_layer.0.{{kind}}"),
    (r"trunk/blocks_(\d+)/attn/(bias_[kv])", block + "attn.{1}"),
    (r"trunk/blocks_(\d+)/attn/qkv/\w+", block + "attn.in_proj_{kind}"),
    (r"trunk/blocks_(\d+)/attn/out/\w+", block + "attn.out_proj.{kind}"),
    (r"trunk/blocks_(\d+)/mlp/(fc[12])/\w+", block + "mlp.{1}.{kind}"),
    (r"trunk/blocks_(\d+)/norm([12])/\w+", block + "norm_{1}.{kind}"),
  )


def head_rules(modality: str, heads: str = "modality_heads") -> names.Rules:
  """Names of a linear `Head`; layers without parameters shift the number of the linear one.

  Args:
    modality: of the head.
    heads: "modality_heads", or "modality_heads_mvq" for CodeBind's specific heads.
  """
  head = f"{heads}.{official_name(modality)}"
  linear = "|".join(f"{head}.{i}.weight" for i in ("1", "2", "3", "proj.1"))
  return ((r"norm/\w+", f"{head}.0.{{kind}}|{head}.proj.0.{{kind}}"), (r"proj/kernel", linear))


def scale_name(modality: str) -> str:
  """Name of the logarithm of the factor on the cosine; images have none."""
  return f"modality_postprocessors.{official_name(modality)}.1.log_logit_scale"


def part_of(weights: Weights, *prefixes: str) -> Weights:
  """The arrays whose names begin with one of the prefixes."""
  return weights.renamed(lambda name: name if name.startswith(prefixes) else "")


def encoder_weights(weights: Weights, modality: str) -> Weights:
  """The arrays of one modality's stem and trunk."""
  m = official_name(modality)
  part = part_of(weights, f"modality_preprocessors.{m}.", f"modality_trunks.{m}.")
  return part.renamed(lambda name: "" if name == "modality_preprocessors.text.mask" else name)


# --- files


def recognises(path: Path) -> bool:
  """Whether a path is a checkpoint of this family: a file, or a folder that holds it."""
  try:
    return bool(modalities(path))
  except (ValueError, OSError):
    return False


def modalities(path: Path) -> tuple[str, ...]:
  """Modalities that a checkpoint has."""
  weights = weights_of(path)
  return tuple(m for m in MODALITIES if f"modality_trunks.{official_name(m)}.blocks.0.norm_1.weight" in weights)


def weights_of(path: str | Path) -> Weights:
  """The arrays of a file, or of the checkpoint in a folder, under the official names.

  Raises:
    ValueError: naming the path, if there is no checkpoint of a known kind.
  """
  path = Path(path).expanduser()
  if path.is_dir():
    files = [path / name for name in _FOLDER_FILES if present(path / name)]
    if not files:
      raise ValueError(f"{path}: holds no ImageBind checkpoint; looked for {', '.join(_FOLDER_FILES)}")
    path = files[0]
  if path.suffix not in _ENDINGS:
    raise ValueError(f"{path}: not an ImageBind checkpoint; its name must end in one of {', '.join(_ENDINGS)}")
  return open_weights(path).renamed(lambda name: name.removeprefix("module."))


# --- encoders


def encoder_spec(weights: Weights, modality: str, heads: int = 0) -> EncoderSpec:
  """The encoder's shape, read from the shapes of its arrays.

  Args:
    weights: the checkpoint.
    modality: of `MODALITIES`; video has the images' encoder.
    heads: attention heads, which no array tells; 0 for ImageBind-Huge's at its width.

  Raises:
    ValueError: if the arrays are not there, or the width is another one and `heads` is not given.
  """
  m = official_name(modality)
  huge = HUGE["image" if m == "vision" else m]
  position = next((name for kind in ("pos_embedding_helper.pos_embed", "pos_embed")
                   if (name := f"modality_preprocessors.{m}.{kind}") in weights), None)  # fmt: skip
  hidden = f"modality_trunks.{m}.blocks.0.mlp.fc1.weight"
  if position is None or hidden not in weights:
    raise ValueError(f"{weights.name}: has no encoder of {modality!r} ({position or 'its positions'}, {hidden})")
  count, width = weights[position].shape[-2:]
  if not heads and width != huge.width:
    raise ValueError(f"{weights.name}: {modality!r} is {width} wide, ImageBind-Huge's {huge.width}; give options.heads")
  changes: dict[str, Any] = {}
  if m in ("vision", "depth", "thermal", "tactile"):
    side = math.isqrt(count - 1)
    if side * side != count - 1:
      raise ValueError(f"{weights.name}: {position} has {count} rows; a class token and a square grid are needed")
    changes["size"] = (*huge.size[:-2], *(side * patch for patch in huge.patch[-2:]))
  elif m == "text":
    changes |= {"size": (count,), "vocab": weights["modality_preprocessors.text.token_embedding.weight"].shape[0]}
  elif m == "imu":
    changes["size"] = ((count - 1) * huge.patch[0],)
  elif m == "eeg":
    *_, channels, patch = weights["modality_preprocessors.eeg.eeg_stem.proj.weight"].shape
    changes |= {"size": ((count - 1) * patch,), "patch": (patch,), "channels": channels}
  depth = names.depth_of(weights, rf"^modality_trunks\.{m}\.blocks\.(\d+)\.")
  return dataclasses.replace(
    normalising(modality), width=width, depth=depth, heads=heads or huge.heads, mlp=weights[hidden].shape[0], **changes
  )


def normalising(modality: str) -> EncoderSpec:
  """ImageBind-Huge's encoder of a modality, with the statistics of its pixels."""
  huge = HUGE["image" if modality == "video" else modality]
  if modality == "tactile":
    return dataclasses.replace(huge, mean=CLIP_MEAN, std=CLIP_STD)
  return dataclasses.replace(huge, mean=(0.0,), std=(1.0,)) if modality == "thermal" else huge


def make_trunk(
  *,
  weights: Place = "",
  modality: Name = "image",
  heads: Count = 0,
  width: MaybeSide = 0,
  depth: Count = 0,
  clips: Count = 0,
  crops: Crops = 3,
  focal_length: Camera = FOCAL_LENGTH,
  baseline: Camera = BASELINE,
  dtype: Dtype = "",
  remat: bool = False,
  scan: bool = False,
) -> Trunk:
  """An encoder of an ImageBind checkpoint, or one of its shape with drawn parameters.

  Args:
    weights: the `.pth` or `.safetensors` file, or a folder that holds it; "" draws the parameters.
    modality: one of the file's, see `modalities`; "vision" is "image".
    heads: attention heads, needed for another width than ImageBind-Huge's.
    width, depth: width and number of blocks of an encoder with drawn parameters; 0 for ImageBind-Huge's. A checkpoint
      has its own.
    clips: number of clips of a sound or video, evenly spaced, 2 s each; 0 for the checkpoint's own 3 and 5.
    crops: number of crops of a video's frames: 3 along the longer side, or 1 in the middle.
    focal_length, baseline: focal length (pixels) and distance of projector and sensor (metres) of the camera that depth
      maps are seen with; the encoder takes disparity. The default is the Kinect of NYU Depth v2.
    dtype: compute type, such as "bfloat16"; "" for float32.
    remat, scan: as in `models.transformer.Transformer`.

  Raises:
    ValueError: naming the file, if it is no such checkpoint or lacks the modality, or an option is out of its range.
  """
  modality = "image" if modality == "vision" else modality
  if not weights:
    return _drawn(modality, {"heads": heads, "width": width, "depth": depth}, clips=clips, crops=crops,
                  focal_length=focal_length, baseline=baseline, dtype=dtype, remat=remat, scan=scan)  # fmt: skip
  if width or depth:
    raise ValueError(f"width {width}, depth {depth}: allowed are 0 with weights, which have their own")
  there, available = weights_of(weights), modalities(Path(weights))
  if modality not in MODALITIES or modality not in available:
    raise ValueError(f"{weights}: has no {modality!r}; it has {', '.join(available) or 'no encoder of ImageBind'}")
  if heads < 0 or clips < 0 or crops not in (1, 3):
    raise ValueError(f"heads {heads}, clips {clips}, crops {crops}: allowed are 0 and up, 0 and up, 1 or 3")
  announce(there.name, LICENCE)
  spec = encoder_spec(there, modality, heads)
  item = item_input(modality, spec.size, spec.channels, clips=clips, crops=crops, focal_length=focal_length,
                    baseline=baseline)  # fmt: skip
  options = {"weights": weights, "modality": modality, "heads": heads, "width": 0, "depth": 0, "clips": clips,
             "crops": crops, "focal_length": focal_length, "baseline": baseline, "dtype": dtype, "remat": remat,
             "scan": scan}  # fmt: skip
  return Trunk(
    name="imagebind", modality=modality, module=Encoder(spec, remat=remat, scan=scan, dtype=dtype or None), input=item,
    fingerprint=fingerprint({}, {"weights": there.hash(), "modality": modality, "heads": spec.heads, "dtype": dtype},
                            f"{_REVISION} {item.revision}"),
    load=functools.partial(names.load, weights=encoder_weights(there, modality), rules=encoder_rules(modality)),
    options=options, licence=LICENCE, head=published_head(there, modality),
  )  # fmt: skip


def _drawn(
  modality: str, sizes: dict[str, int], *, clips: int, crops: int, focal_length: float, baseline: float, dtype: str,
  remat: bool, scan: bool,
) -> Trunk:  # fmt: skip
  if modality not in (*HUGE, "video"):
    raise ValueError(f"modality: got {modality!r}, allowed are {', '.join((*HUGE, 'video'))}")
  spec = dataclasses.replace(normalising(modality), **{key: value for key, value in sizes.items() if value})
  item = item_input(modality, spec.size, spec.channels, clips=clips, crops=crops, focal_length=focal_length,
                    baseline=baseline)  # fmt: skip
  options = {"weights": "", "modality": modality, "clips": clips, "crops": crops, "focal_length": focal_length,
             "baseline": baseline, "dtype": dtype, "remat": remat, "scan": scan} | sizes  # fmt: skip
  return Trunk(
    name="imagebind", modality=modality, module=Encoder(spec, remat=remat, scan=scan, dtype=dtype or None), input=item,
    fingerprint=fingerprint({}, options, f"{_REVISION} {item.revision}"), options=options,
    head=PublishedHead(Head(1024)),
  )  # fmt: skip


def published_head(weights: Weights, modality: str) -> PublishedHead | None:
  """LayerNorm and a linear map without bias, and the factor on the cosine, clipped at 100; None for a file without."""
  part = part_of(weights, f"modality_heads.{official_name(modality)}.")
  widths = [entry.shape[0] for entry in part.values() if len(entry.shape) == 2]
  if not widths:
    return None
  scale, name = 1.0, scale_name(modality)
  if name in weights:
    scale = min(math.exp(weights[name].read().item()), SCALE_LIMIT)
  load = functools.partial(names.load, weights=part, rules=head_rules(modality))
  return PublishedHead(Head(widths[0]), load, scale)


@functools.cache
def announce(name: str, licence: str) -> None:
  """Writes the licence of a file's weights to the log, once."""
  logging.warning("%s: licence of these weights: %s", name, licence)

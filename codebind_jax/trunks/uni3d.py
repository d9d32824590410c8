"""Uni3D's encoder of point clouds (arXiv 2310.06773): coloured points in the space of EVA02-E-14-plus.

`modelzoo/uni3d-{ti,s,b,l,g}/model.pt` of BAAI/Uni3D. Texts and images are those of the OpenCLIP checkpoint
EVA02-E-14-plus (`trunks.open_clip`). Facts from baaivision/Uni3D f027bd1 and timm 1.0.31; the farthest point sampling
is that of pointnet2_ops, not compared with its CUDA kernel.

Takes: point clouds with colours, up to 10,000 points.
Choose it for: objects in 3D, in the space of OpenCLIP's EVA02-E-14-plus.
"""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import numpy as np

from codebind_jax.data.inputs import Input, Reading
from codebind_jax.data.preparation.points import Cloud
from codebind_jax.data.transforms import points as point_transforms
from codebind_jax.models.heads import Head
from codebind_jax.models.point_patches import PointEncoder, PointSpec
from codebind_jax.trunks import names
from codebind_jax.trunks.base import PublishedHead, Trunk, fingerprint
from codebind_jax.trunks.checkpoint_files import Entry, Weights, mentions, open_weights, present
from codebind_jax.trunks.options import Dtype, Length, Name, Place

_REVISION = "uni3d-1"
MODALITIES = ("points",)
LICENCE = "MIT"

POINTS = 10_000  # of a cloud, in training and in the published results
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1408: 16}  # width of the published encoders -> attention heads
_FILES = ("model.safetensors", "model.pt", "pytorch_model.bin")
_MARK = "point_encoder.encoder2trans.weight"
_CONVS = "point_encoder.encoder.{}_conv.{}"


def _file(path: Path) -> Path:
  if not path.is_dir():
    return path
  files = [path / name for name in _FILES]
  return next((file for file in files if mentions(file, _MARK)), next(filter(present, files), files[0]))


def recognises(path: Path) -> bool:
  """Whether a path is a checkpoint of this family: a file, or a folder that holds it."""
  return mentions(_file(path), _MARK)


def modalities(path: Path) -> tuple[str, ...]:
  """Modalities that a checkpoint has."""
  return MODALITIES


def _weights(path: Path) -> Weights:
  there = open_weights(_file(path))
  there = there.renamed(lambda name: name.removeprefix("module."))
  if _MARK not in there:
    raise ValueError(f"{there.name}: not a checkpoint of Uni3D: it has no {_MARK}")
  return there


def folded(weights: Weights) -> Weights:
  """The checkpoint with the PointNet's convolutions as linear layers, its batch normalisations folded into them.

  Raises:
    ValueError: naming what a batch normalisation lacks.
  """
  entries = {name: entry for name, entry in weights.items() if not re.match(_CONVS.format("(first|second)", "1"), name)}
  parts = ("weight", "bias", "running_mean", "running_var")
  lost = [name for stage in ("first", "second") for part in parts
          if (name := f"{_CONVS.format(stage, 1)}.{part}") not in weights]  # fmt: skip
  if lost:
    raise ValueError(f"{weights.name}: missing {lost}")
  for stage in ("first", "second"):
    for number in (0, 3):
      for part in ("weight", "bias"):
        name = f"{_CONVS.format(stage, number)}.{part}"
        if name in weights:
          read = functools.partial(_linear, weights, stage, number, part)
          entries[name] = Entry(weights[name].shape[:2], np.dtype(np.float32), read)
  return Weights(entries, weights.files)


def _linear(weights: Weights, stage: str, number: int, part: str) -> np.ndarray:
  value = weights[f"{_CONVS.format(stage, number)}.{part}"].read().astype(np.float32)
  value = value[..., 0] if value.ndim == 3 else value
  if number:
    return value
  scale, shift, mean, var = (weights[f"{_CONVS.format(stage, 1)}.{name}"].read().astype(np.float32)
                             for name in ("weight", "bias", "running_mean", "running_var"))  # fmt: skip
  factor = scale / np.sqrt(var + np.float32(1e-5))
  return value * factor[:, None] if part == "weight" else (value - mean) * factor + shift


def spec_of(weights: Weights, groups: int = 512, neighbours: int = 64) -> PointSpec:
  """The encoder's shape from the checkpoint's names and shapes.

  Args:
    weights: the checkpoint.
    groups, neighbours: of the patches, which the checkpoint does not hold.

  Raises:
    ValueError: for a width that no published encoder has.
  """
  width = weights["point_encoder.encoder2trans.weight"].shape[0]
  if width not in HEADS:
    allowed = ", ".join(map(str, HEADS))
    raise ValueError(f"{weights.name}: an encoder of width {width} is not supported; allowed: {allowed}")
  mlp = "point_encoder.visual.blocks.0.mlp."
  if f"{mlp}fc1_g.weight" in weights:
    form = {"act": "swiglu", "mlp": weights[f"{mlp}fc1_g.weight"].shape[0], "mlp_norm": f"{mlp}norm.weight" in weights}
  else:
    first, last = (weights[f"{mlp}{name}.weight"].shape if f"{mlp}{name}.weight" in weights else (0, 0)
                   for name in ("fc1", "fc2"))  # fmt: skip
    form = {"mlp": last[1], "act": "swiglu" if first[0] == 2 * last[1] else "gelu"}
  shape = lambda stage, number: weights[f"{_CONVS.format(stage, number)}.weight"].shape[0]
  hidden = tuple(shape(stage, number) for stage in ("first", "second") for number in (0, 3))
  depth = names.depth_of(weights, r"^point_encoder\.visual\.blocks\.(\d+)\.")
  return PointSpec(HEADS[width], width=width, depth=depth, groups=groups, neighbours=neighbours, hidden=hidden, **form)


def _rules() -> names.Rules:
  root, layer = "point_encoder.", "point_encoder.visual.blocks.{0}."
  a, m = layer + "attn.", layer + "mlp."
  return (
    (r"stem/cls_token", root + "cls_token"),
    (r"stem/cls_position", root + "cls_pos"),
    (r"stem/point1/\w+", root + "encoder.first_conv.0.{kind}"),
    (r"stem/point2/\w+", root + "encoder.first_conv.3.{kind}"),
    (r"stem/patch1/\w+", root + "encoder.second_conv.0.{kind}"),
    (r"stem/patch2/\w+", root + "encoder.second_conv.3.{kind}"),
    (r"stem/project/\w+", root + "encoder2trans.{kind}"),
    (r"stem/position1/\w+", root + "pos_embed.0.{kind}"),
    (r"stem/position2/\w+", root + "pos_embed.2.{kind}"),
    (r"trunk/blocks_(\d+)/norm([12])/\w+", layer + "norm{1}.{kind}"),
    (r"trunk/blocks_(\d+)/attn/qkv/kernel", f"{a}qkv.weight|{a}q_proj.weight+{a}k_proj.weight+{a}v_proj.weight"),
    (r"trunk/blocks_(\d+)/attn/qkv/bias", f"{a}q_bias+0+{a}v_bias|{a}q_proj.bias+0+{a}v_proj.bias"),
    (r"trunk/blocks_(\d+)/attn/out/\w+", a + "proj.{kind}"),
    (r"trunk/blocks_(\d+)/mlp/fc1/\w+", f"{m}fc1.{{kind}}|{m}fc1_g.{{kind}}+{m}fc1_x.{{kind}}"),
    (r"trunk/blocks_(\d+)/mlp/(norm|fc2)/\w+", m + "{1}.{kind}"),
  )  # fmt: skip


_HEAD_RULES = (
  (r"norm/\w+", "point_encoder.visual.fc_norm.{kind}|point_encoder.visual.norm.{kind}"),
  (r"proj/\w+", "point_encoder.trans2embed.{kind}"),
)
_HEAD = r"point_encoder\.(visual\.(fc_norm|norm)|trans2embed)\.(weight|bias)"
# The image model that the blocks come from is saved whole.
_IGNORED = (_HEAD, r"logit_scale", r"point_encoder\.visual\.(patch_embed|head|rope)\..*",
            r"point_encoder\.visual\.(cls_token|pos_embed)")  # fmt: skip


def make_trunk(
  *, weights: Place = "", modality: Name = "points", points: Length = POINTS, groups: Length = 512,
  neighbours: Length = 64, dtype: Dtype = "", remat: bool = False, scan: bool = False,
) -> Trunk:  # fmt: skip
  """The point cloud encoder of a Uni3D checkpoint.

  Its memory grows with points x groups: 20 MB a cloud for distances at the published sizes.

  Args:
    weights: file `model.pt`, or a folder with it.
    modality: "points".
    points: number of points of a cloud; larger ones are cut, smaller ones padded, which leaves their embedding as it
      is.
    groups, neighbours: number of groups, and of points in each; 512 and 64 in the published encoders.
    dtype: compute type, such as "bfloat16"; "" for float32.
    remat, scan: as in `models.transformer.Transformer`.

  Raises:
    ValueError: if there is no such checkpoint, for another modality, or numbers below 1.
  """
  path = Path(weights).expanduser()
  if not weights or not (path.exists() or present(path)):
    raise ValueError(f"weights: {weights!r} does not exist")
  if modality not in MODALITIES:
    raise ValueError(f"{weights}: has no {modality!r}; it has points")
  if min(points, groups, neighbours) < 1:
    raise ValueError(f"points {points}, groups {groups}, neighbours {neighbours}: allowed are 1 and up")
  there = _weights(path)
  spec, there = spec_of(there, groups, neighbours), folded(there)
  prepare = Cloud(points)
  item = Input((points, 6), "float32", Reading(point_transforms.read, prepare),
               revision=f"{point_transforms.REVISION} {prepare}")  # fmt: skip
  head = there["point_encoder.trans2embed.weight"].shape[0] if "point_encoder.trans2embed.weight" in there else 0
  load_head = functools.partial(
    names.load, rules=_HEAD_RULES, weights=there.renamed(lambda name: name if re.fullmatch(_HEAD, name) else ""))
  scale = math.exp(float(there["logit_scale"].read().reshape(-1)[0])) if "logit_scale" in there else 1.0
  options = {"weights": weights, "modality": modality, "points": points, "groups": groups, "neighbours": neighbours,
             "dtype": dtype, "remat": remat, "scan": scan}  # fmt: skip
  return Trunk(
    name="uni3d", modality=modality, module=PointEncoder(spec, remat=remat, scan=scan, dtype=dtype or None), input=item,
    fingerprint=fingerprint({}, {"weights": there.hash(), "spec": repr(spec), "dtype": dtype},
                            f"{_REVISION} {item.revision}"),
    load=functools.partial(names.load, weights=there, rules=_rules(), ignored=_IGNORED), options=options,
    licence=LICENCE, head=PublishedHead(Head(head, eps=spec.eps, bias=True), load_head, scale),
  )  # fmt: skip

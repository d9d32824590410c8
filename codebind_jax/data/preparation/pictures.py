"""Pictures as image encoders want them: resized and cropped, uint8 until the device, or normalised float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from PIL import Image

from codebind_jax.data import picture_files, torch_resize
from codebind_jax.data.inputs import Input, Reading
from codebind_jax.data.interpolation import antialias_matrix
from codebind_jax.data.transforms import depth as depth_transforms
from codebind_jax.data.transforms import image as image_transforms
from codebind_jax.data.transforms import tactile as tactile_transforms
from codebind_jax.data.transforms import thermal as thermal_transforms
from codebind_jax.data.transforms import video as video_transforms

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # PIL's numbers
# CLIP's statistics of pixels in [0, 1], which ImageBind's image encoder was trained with.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


_LONGEST = 64  # shorter sides, of what is enlarged whole


def middle(x: Shaped[np.ndarray, "... h w c"]) -> Shaped[np.ndarray, "... i j c"]:
  """The middle of a picture more than 64 times as long as wide, half as long; others as they are.

  For preparations that bring the shorter side to a size and keep a square, so that memory stays bounded.
  """
  for axis, length, short in zip((-3, -2), x.shape[-3:-1], x.shape[-3:-1][::-1]):
    if length > _LONGEST * short:
      kept = _LONGEST // 2 * short
      start = (length - kept) // 2
      x = x[(..., slice(start, length - start), *[slice(None)] * (-1 - axis))]
  return x


@dataclasses.dataclass(frozen=True)
class Picture:
  """Resize and middle crop of RGB pixels.

  Attributes:
    size: (height, width) of the result.
    resize: "shortest": the shorter side becomes `edge`, the longer one is rounded down; "squash": both sides become
      `size`; "longest": the longer side becomes that of `size`, the rest is filled with `fill`; "none".
    edge: of "shortest"; 0 for the shorter side of `size`.
    resample: PIL's number of the filter, antialiased when it shrinks.
    crop: rounding of an odd margin of the middle crop: "down" (transformers) or "even" (torchvision, to the even one);
      what is filled always begins with the smaller part.
    fill: grey value of what the picture does not cover.
    backend: whose resize: "pil", or "torch", torchvision's of uint8 pixels (bilinear and bicubic; others are PIL's).
  """

  size: tuple[int, int]
  resize: Literal["shortest", "squash", "longest", "none"] = "shortest"
  edge: int = 0
  resample: int = RESAMPLE["bicubic"]
  crop: Literal["down", "even"] = "down"
  fill: int = 0
  backend: Literal["pil", "torch"] = "pil"

  def __call__(self, pixels: UInt8[np.ndarray, "h w 3"] | Image.Image) -> UInt8[np.ndarray, "i j 3"]:
    """The prepared pixels, of an array or an RGB picture."""
    h, w = pixels.size[::-1] if isinstance(pixels, Image.Image) else pixels.shape[:2]
    new = (h, w)
    if self.resize == "shortest":
      if max(h, w) > _LONGEST * min(h, w):
        pixels = middle(np.asarray(pixels))
        new = h, w = pixels.shape[:2]
      short, long = min(h, w), max(h, w)
      edge = self.edge or min(self.size)
      new = (edge, int(edge * long / short))
      new = new if h <= w else new[::-1]
    elif self.resize == "squash":
      new = tuple(self.size)
    elif self.resize == "longest":
      ratio = max(h / self.size[0], w / self.size[1])
      new = (max(1, round(h / ratio)), max(1, round(w / ratio)))
    if new != (h, w):
      pixels = self._resized(pixels, new)
    if isinstance(pixels, Image.Image):
      pixels = np.asarray(self._trimmed(pixels))
    return self._cropped(pixels)

  def _resized(self, pixels: np.ndarray | Image.Image, size: tuple[int, int]) -> np.ndarray | Image.Image:
    if self.backend == "torch" and self.resample in torch_resize.FILTERS:
      return torch_resize.resize(np.asarray(pixels), size, self.resample)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))
    return image.resize((size[1], size[0]), Image.Resampling(self.resample))

  def _start(self, have: int, want: int) -> int:
    """First pixel of the middle, of the larger of both lengths."""
    margin = abs(have - want)
    return margin // 2 if self.crop == "down" or have < want else round(margin / 2)

  def _trimmed(self, image: Image.Image) -> Image.Image:
    """The middle, where the picture is larger: before the pixels are copied to an array."""
    sides = [(have, min(have, want)) for have, want in zip(image.size, self.size[::-1])]
    (left, width), (top, height) = [(self._start(have, inside), inside) for have, inside in sides]
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))

  def _cropped(self, pixels: np.ndarray) -> np.ndarray:
    if pixels.shape[:2] == tuple(self.size):
      return np.ascontiguousarray(pixels)
    out = np.full((*self.size, 3), self.fill, np.uint8)
    source, target = [], []
    for have, want in zip(pixels.shape[:2], self.size):
      start = self._start(have, want)
      inside, whole = slice(start, start + min(have, want)), slice(0, min(have, want))
      source.append(inside if have > want else whole)
      target.append(whole if have > want else inside)
    out[tuple(target)] = pixels[tuple(source)]
    return out


def picture_input(picture: Picture) -> Input:
  """Input of an encoder of RGB images."""
  revision = f"{image_transforms.REVISION} {picture}"
  reading = Reading(image_transforms.read, picture, image_transforms.opened)
  return Input((*picture.size, 3), "uint8", reading, revision=revision)


def processor_picture(config: Mapping[str, Any], size: tuple[int, int], where: str | Path) -> Picture:
  """The `Picture` of a Hugging Face `preprocessor_config.json` (an image processor).

  Args:
    config: its content.
    size: (height, width) that the encoder takes, for what the file leaves open.
    where: the file, for errors.

  Raises:
    ValueError: for a kind of resizing that is not known, or a result of another size than the encoder takes.
  """
  sides = lambda value: (value, value) if isinstance(value, int) else (value["height"], value["width"])
  wanted, crop = config.get("size", {}), config.get("crop_size", config.get("size", {}))
  resize, edge = "none", 0
  if config.get("do_resize", True):
    if not isinstance(wanted, int) and "longest_edge" in wanted:
      raise ValueError(f"{where}: size {wanted} is not supported; allowed: shortest_edge, or height and width")
    if isinstance(wanted, int) or "shortest_edge" in wanted:
      resize, edge = "shortest", wanted if isinstance(wanted, int) else wanted["shortest_edge"]
    elif "height" in wanted:
      resize = "squash"
    elif wanted:
      raise ValueError(f"{where}: size {wanted} is not supported; allowed: shortest_edge, or height and width")
    else:
      resize = "squash"
  square = not (isinstance(crop, dict) and "shortest_edge" in crop)
  centred = config.get("do_center_crop", False) and crop and square
  out = sides(crop) if centred else sides(wanted) if resize == "squash" and wanted else size
  if tuple(out) != tuple(size):
    raise ValueError(f"{where}: gives pictures of {tuple(out)}, the encoder takes {tuple(size)}")
  # transformers 5 has torchvision resize.
  return Picture(tuple(size), resize, edge, config.get("resample", RESAMPLE["bicubic"]), backend="torch")


@dataclasses.dataclass(frozen=True)
class FloatPicture:
  """Resize of pixels in [0, 1] without rounding, and normalisation: DINOv3's processor, which rescales first.

  Attributes:
    size: (height, width) of the result; both sides become these.
    filter: "linear" or "cubic", antialiased.
    mean, std: by channel.
  """

  size: tuple[int, int]
  filter: str
  mean: tuple[float, ...]
  std: tuple[float, ...]

  def __call__(self, pixels: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "i j 3"]:
    """The prepared values."""
    x = pixels.astype(np.float32) * np.float32(1 / 255)
    for axis in (1, 0):
      if x.shape[axis] != self.size[axis]:
        matrix = antialias_matrix(x.shape[axis], self.size[axis], self.filter).astype(np.float32)
        x = np.moveaxis(np.tensordot(matrix, x, axes=(1, axis)), 0, axis)
    return ((x - np.float32(self.mean)) / np.float32(self.std)).astype(np.float32)


def _depth(value: Any) -> UInt8[np.ndarray, "h w 3"]:
  return depth_transforms.to_picture(depth_transforms.read(value))


def _thermal(value: Any) -> UInt8[np.ndarray, "h w 3"]:
  return thermal_transforms.to_picture(thermal_transforms.read(value))


# Modality -> (function from raw value to picture, its revision, grey value of the padding).
PICTURES = {
  "image": (image_transforms.read, image_transforms.REVISION, 255),
  "depth": (_depth, depth_transforms.REVISION, 0),
  "thermal": (_thermal, thermal_transforms.REVISION, 0),
  "tactile": (tactile_transforms.read, tactile_transforms.REVISION, 0),
}


@dataclasses.dataclass(frozen=True)
class Square:
  """A picture, or a sensor's array as one, made square.

  Attributes:
    modality: a key of `PICTURES`.
    side: of the result in pixels.
    fit: how it is made square, see `transforms.image.fit_square`.
    crop: cut white margins first.
  """

  modality: str
  side: int
  fit: str = "pad"
  crop: bool = False

  @property
  def revision(self) -> str:
    """Of the modality's pictures."""
    return PICTURES[self.modality][1]

  @property
  def padding(self) -> int:
    """Grey value of what the picture does not cover."""
    return PICTURES[self.modality][2]

  def __call__(self, value: Any) -> UInt8[np.ndarray, "side side 3"]:
    """The prepared pixels of a path, bytes or array."""
    picture = PICTURES[self.modality][0](value)
    if self.crop:
      picture = image_transforms.crop_to_content(picture)
    if self.fit == "pad" and max(picture.shape[:2]) ** 2 > picture_files.PIXELS:  # before it is filled up
      return Picture((self.side, self.side), "longest", fill=self.padding)(picture)
    return image_transforms.resize(image_transforms.fit_square(picture, self.fit, self.padding), self.side)


@dataclasses.dataclass(frozen=True)
class Frames:
  """Evenly spaced frames of a video, each prepared as a picture.

  Attributes:
    count: of the result; a shorter video's frames are repeated.
    prepare: of one frame.
  """

  count: int
  prepare: Callable[[Any], np.ndarray]

  def __call__(self, value: Any) -> UInt8[np.ndarray, "t h w 3"]:
    """The prepared frames of a path, bytes or array."""
    video = video_transforms.read(value)
    chosen = [int((k + 0.5) * len(video) / self.count) for k in range(self.count)]
    return np.stack([self.prepare(video[i]) for i in chosen])

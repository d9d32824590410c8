"""Random views of pictures: photos cropped, mirrored and recoloured, drawings also moved, restyled and laid on colours.

`Photo` is torchvision's RandomResizedCrop, RandomHorizontalFlip and ColorJitter, in this order, as they are for PIL
images. `Drawing` is for drawings on white, which stay what they are in other colours and styles, on other backgrounds.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, UInt8
from PIL import Image, ImageEnhance, ImageFilter

from codebind_jax.data.augment import Checked, revision, span
from codebind_jax.schema import Share, at_least, at_most, within

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_TRIES = 10  # torchvision's, for a crop that fits
Area = Annotated[tuple[float, float], span(0, 1)]
Positive = Annotated[tuple[float, float], span(0, 1000)]
Size = Annotated[float, at_least(0), at_most(1000)]


@dataclasses.dataclass(frozen=True)
class Photo(Checked):
  """A random view of a photo: a part of it, perhaps mirrored, in slightly other colours.

  The defaults crop as CLIP's open training does (open_clip: 0.9 to 1 of the area), and change colours half as far as
  MoCo v2 (Chen et al. 2020). A trunk that resizes the shorter side and cuts out the middle square takes a part of the
  crop alone; set `size` for torchvision's way, which squeezes the whole crop into the square.

  Attributes:
    area: smallest and largest part of the picture's area; (1, 1) takes the whole picture.
    aspect: smallest and largest width / height of the part; logarithms are drawn evenly.
    size: side in pixels of the square that the part is resized to (bilinear); 0 keeps the part's own pixels.
    flip: probability of the mirror image.
    brightness: largest change of the factor on all values, which is drawn from 1 - brightness (at least 0) to
      1 + brightness.
    contrast: likewise, of the factor on the distance from the picture's mean grey.
    saturation: likewise, of the factor on the distance from a pixel's own grey.
    hue: largest turn of the hue to either side, as a share of the whole circle, up to 0.5; takes several times as long
      as all else together, unless it is 0.
    revision: of this code; not for setting.
  """

  area: Area = (0.9, 1.0)
  aspect: Positive = (3 / 4, 4 / 3)
  size: Annotated[int, at_least(0, "the crop's own"), at_most(1 << 14)] = 0
  flip: Share = 0.5
  brightness: Size = 0.2
  contrast: Size = 0.2
  saturation: Size = 0.2
  hue: Annotated[float, within(0, 0.5)] = 0.05
  revision: str = revision("photo-1")

  def __call__(self, value: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "i j 3"]:
    """One random view of RGB pixels."""
    return self.draw(*value.shape[:2], rng).of(value)

  def draw(self, h: int, w: int, rng: np.random.Generator) -> View:
    """The choices of one view of a picture of h x w pixels, to be used for one picture or for all frames of a film."""
    box = crop_box(h, w, self.area, self.aspect, rng)
    flip = bool(rng.random() < self.flip)
    strengths = (self.brightness, self.contrast, self.saturation)
    factors = [float(rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength)) for strength in strengths]
    factors.append(float(rng.uniform(-self.hue, self.hue)))
    order = rng.permutation(len(factors))
    changes = tuple((list(_CHANGES)[i], factors[i]) for i in order if (*strengths, self.hue)[i])
    return View(box, self.size, flip, changes)


@dataclasses.dataclass(frozen=True)
class View:
  """What one view does: its choices are made.

  Attributes:
    box: (top, left, height, width) of the part, pixels.
    size: side of the square that it is resized to; 0 keeps its size.
    flip: whether it is mirrored.
    changes: of colour, in their order: "brightness", "contrast", "saturation" or "hue", and the factor or turn.
  """

  box: tuple[int, int, int, int]
  size: int
  flip: bool
  changes: tuple[tuple[str, float], ...]

  def of(self, pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "i j 3"]:
    """This view of RGB pixels."""
    pixels = cut(pixels, self.box, self.flip)
    picture = Image.fromarray(pixels)
    if self.size:
      picture = picture.resize((self.size, self.size), Image.Resampling.BILINEAR)
    for kind, amount in self.changes:
      picture = _CHANGES[kind](picture, amount)
    return np.asarray(picture)


def crop_box(
  h: int, w: int, area: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
  """(top, left, height, width) of a random part, drawn as torchvision's RandomResizedCrop draws it.

  Where ten draws do not fit into the picture, the part is the largest one in the middle of an allowed shape.

  Args:
    h, w: of the picture, pixels.
    area: smallest and largest share of the picture's area; (1, 1) is the whole picture, whatever its shape.
    aspect: smallest and largest width / height.
    rng: draws.
  """
  if area[0] >= 1.0:
    return 0, 0, h, w
  for _ in range(_TRIES):
    wanted = h * w * rng.uniform(*area)
    ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
    height, width = round(math.sqrt(wanted / ratio)), round(math.sqrt(wanted * ratio))
    if 0 < height <= h and 0 < width <= w:
      return int(rng.integers(0, h - height + 1)), int(rng.integers(0, w - width + 1)), height, width
  ratio = min(max(w / h, aspect[0]), aspect[1])
  height, width = (h, round(h * ratio)) if w / h > ratio else (round(w / ratio), w)
  height, width = max(1, min(height, h)), max(1, min(width, w))
  return (h - height) // 2, (w - width) // 2, height, width


def cut(plane: np.ndarray, box: tuple[int, int, int, int], flip: bool) -> np.ndarray:
  """A part [height, width, ...] of an array [h, w, ...], mirrored where `flip`."""
  top, left, height, width = box
  part = plane[top : top + height, left : left + width]
  return np.ascontiguousarray(part[:, ::-1] if flip else part)


def turn_hue(picture: Image.Image, turn: float) -> Image.Image:
  """The picture with another hue: `turn` is a share of the circle, -0.5 to 0.5; in PIL's HSV of 8 bits."""
  hue, saturation, value = picture.convert("HSV").split()
  turned = hue.point([(i + int(turn * 255)) % 256 for i in range(256)])
  return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


_CHANGES = {
  "brightness": lambda picture, factor: ImageEnhance.Brightness(picture).enhance(factor),
  "contrast": lambda picture, factor: ImageEnhance.Contrast(picture).enhance(factor),
  "saturation": lambda picture, factor: ImageEnhance.Color(picture).enhance(factor),
  "hue": turn_hue,
}


@dataclasses.dataclass(frozen=True)
class Drawing(Checked):
  """How far a random view of an image on white may differ from it.

  Attributes:
    rotate: largest turn to either side, degrees.
    scale: smallest and largest size, as a share of the original.
    shift: largest move, as a share of the side.
    shear: largest shear to either side.
    stretch: largest change of the sides' proportion, as a logarithm.
    flip: probability of the mirror image.
    background: probability that the white around the drawing becomes a colour, a gradient or smooth noise.
    colour: strength in 0 to 1 of the change of hue, saturation, contrast and brightness.
    mono: probability of grey tones, two tones, a silhouette or an outline instead of colours.
    invert: probability that a view of one of these styles is light on dark.
    blur: probability of a slight blur.
    erase: probability that a patch is covered.
    revision: of this code; not for setting.
  """

  rotate: Size = 12.0
  scale: Positive = (0.7, 1.05)
  shift: Size = 0.06
  shear: Size = 0.1
  stretch: Size = 0.1
  flip: Share = 0.5
  background: Share = 0.4
  colour: Share = 0.6
  mono: Share = 0.3
  invert: Share = 0.15
  blur: Share = 0.15
  erase: Share = 0.1
  revision: str = revision("augment-2")

  def __call__(self, value: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """One random view of an image on white, of the same size."""
    styled = rng.random() < self.mono
    image = _restyle(value, rng) if styled else _recolour(value, rng, self.colour)
    image = _move(image, rng, self)
    if styled and rng.random() < self.invert:
      image = 255 - image
    elif rng.random() < self.background:
      image = _fill_background(image, rng)
    if rng.random() < self.blur:
      image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 1.5)))))
    if rng.random() < self.erase:
      image = _erase(image, rng)
    return image


def line_drawing(image: UInt8[np.ndarray, "h w 3"], width: int = 2) -> UInt8[np.ndarray, "h w 3"]:
  """Dark lines on white where colours change: the sum of absolute Sobel responses of the slightly blurred image.

  Args:
    image: RGB pixels.
    width: how far lines are thickened, pixels.
  """
  smooth = scipy.ndimage.gaussian_filter(image.astype(np.float32), (1.0, 1.0, 0.0))
  edges = np.zeros(image.shape[:2], np.float32)
  for along, across in ((0, 1), (1, 0)):
    slope = scipy.ndimage.correlate1d(smooth, [-1.0, 0.0, 1.0], axis=along)
    edges += np.abs(scipy.ndimage.correlate1d(slope, [1.0, 2.0, 1.0], axis=across)).max(axis=-1)
  edges = scipy.ndimage.maximum_filter(edges, width)
  grey = np.round(255.0 - np.clip(6.0 * edges, 0.0, 255.0)).astype(np.uint8)
  return np.repeat(grey[..., None], 3, axis=-1)


def outside(image: UInt8[np.ndarray, "h w 3"], threshold: int = 10) -> Bool[np.ndarray, "h w"]:
  """White regions that touch the border: the background of a drawing, not the white inside it."""
  white = image.min(axis=-1) >= 255 - threshold
  regions, count = scipy.ndimage.label(white)
  if not count:
    return white
  border = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
  touches = np.zeros(count + 1, bool)
  touches[border] = True
  touches[0] = False
  return touches[regions]


def _restyle(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  grey = image @ _LUMA
  style = rng.integers(4)
  if style == 1:
    inside = grey[~outside(image)]
    grey = np.where(grey > (np.median(inside) if inside.size else 128.0), 255.0, 0.0)
  elif style == 2:
    grey = np.where(outside(image), 255.0, 0.0)
  elif style == 3:
    return line_drawing(image, int(rng.integers(1, 4)))
  return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)


def _recolour(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
  """Turns the hue about the grey axis, then changes saturation, contrast and brightness; the background stays."""
  angle = strength * rng.uniform(-np.pi, np.pi) * (rng.random() < 0.5)
  saturation = 1.0 + strength * rng.uniform(-1.0, 0.6)
  contrast, brightness = 1.0 + strength * rng.uniform(-0.4, 0.4), strength * rng.uniform(-40.0, 40.0)
  axis = np.full((3, 3), 1.0 / 3.0)
  cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3.0)
  rotation = np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * axis
  matrix = rotation @ (saturation * np.eye(3) + (1.0 - saturation) * np.outer(np.ones(3), _LUMA))
  pixels = image.astype(np.float32) @ matrix.T.astype(np.float32)
  pixels = (pixels - 128.0) * contrast + 128.0 + brightness
  return np.where(outside(image)[..., None], image, np.clip(pixels, 0, 255).astype(np.uint8))


def _move(image: np.ndarray, rng: np.random.Generator, spec: Drawing) -> np.ndarray:
  h, w, _ = image.shape
  angle = np.deg2rad(rng.uniform(-spec.rotate, spec.rotate))
  scale = rng.uniform(*spec.scale) * np.exp(rng.uniform(-spec.stretch, spec.stretch, 2))
  shear = rng.uniform(-spec.shear, spec.shear)
  mirror = -1.0 if rng.random() < spec.flip else 1.0
  turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
  forward = turn @ np.array([[1.0, shear], [0.0, 1.0]]) @ np.diag([scale[0] * mirror, scale[1]])
  inverse = np.linalg.inv(forward)
  centre = np.array([w, h]) / 2.0
  shift = rng.uniform(-spec.shift, spec.shift, 2) * (w, h)
  offset = centre - inverse @ (centre + shift)
  coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
  white = (255, 255, 255)
  moved = Image.fromarray(image).transform((w, h), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC,
                                           fillcolor=white)  # fmt: skip
  return np.asarray(moved)


def _fill_background(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  h, w, _ = image.shape
  kind = rng.integers(3)
  first, second = rng.uniform(0, 255, (2, 3))
  if kind == 0:
    mix = np.zeros((h, w))
  elif kind == 1:
    direction = rng.uniform(0, 2 * np.pi)
    ramp = np.linspace(-1, 1, w)[None] * np.cos(direction) + np.linspace(-1, 1, h)[:, None] * np.sin(direction)
    mix = (ramp + 1.5) / 3.0
  else:
    coarse = rng.uniform(0, 255, (int(rng.integers(3, 9)),) * 2).astype(np.uint8)
    mix = np.asarray(Image.fromarray(coarse).resize((w, h), Image.Resampling.BICUBIC)) / 255.0
  colours = first + (second - first) * mix[..., None]
  cover = scipy.ndimage.gaussian_filter(outside(image).astype(np.float32), 0.7)[..., None]
  return np.clip(image * (1.0 - cover) + colours * cover, 0, 255).astype(np.uint8)


def _erase(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  h, w, _ = image.shape
  height, width = (int(side * rng.uniform(0.1, 0.35)) for side in (h, w))
  top, left = int(rng.integers(0, h - height + 1)), int(rng.integers(0, w - width + 1))
  image = image.copy()
  image[top : top + height, left : left + width] = rng.integers(0, 256, 3) if rng.random() < 0.5 else 255
  return image

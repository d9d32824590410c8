"""Random views of drawings: other colours, other backgrounds, other styles, slightly moved.

Each view is a function of the image and a numpy generator alone, so cached features of a view can be made again.
"""

import dataclasses

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, UInt8
from PIL import Image, ImageFilter

# Changes whenever the same settings would give other pixels: part of the `repr`, so of the key of cached features.
REVISION = "augment-2"
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclasses.dataclass(frozen=True)
class Augment:
  """How far a random view of an image on white may differ from it; call it with an image and a generator.

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
    revision: of this module's code; not for setting.
  """

  rotate: float = 12.0
  scale: tuple[float, float] = (0.7, 1.05)
  shift: float = 0.06
  shear: float = 0.1
  stretch: float = 0.1
  flip: float = 0.5
  background: float = 0.4
  colour: float = 0.6
  mono: float = 0.3
  invert: float = 0.15
  blur: float = 0.15
  erase: float = 0.1
  revision: str = dataclasses.field(default=REVISION, init=False)

  def __post_init__(self):
    for name in ("flip", "background", "colour", "mono", "invert", "blur", "erase"):
      if not 0.0 <= getattr(self, name) <= 1.0:
        raise ValueError(f"{name}: got {getattr(self, name)}, allowed are 0 to 1")
    if not 0.0 < self.scale[0] <= self.scale[1]:
      raise ValueError(f"scale: got {self.scale}, allowed are 0 < smallest <= largest")

  def __call__(self, image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """One random view, see `augment`."""
    return augment(image, rng, self)


def augment(image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, spec: Augment) -> UInt8[np.ndarray, "h w 3"]:
  """One random view of an image on white, of the same size."""
  styled = rng.random() < spec.mono
  image = _restyle(image, rng) if styled else _recolour(image, rng, spec.colour)
  image = _move(image, rng, spec)
  if styled and rng.random() < spec.invert:
    image = 255 - image
  elif rng.random() < spec.background:
    image = _fill_background(image, rng)
  if rng.random() < spec.blur:
    image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 1.5)))))
  if rng.random() < spec.erase:
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


def _move(image: np.ndarray, rng: np.random.Generator, spec: Augment) -> np.ndarray:
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

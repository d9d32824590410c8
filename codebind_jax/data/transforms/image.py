"""Images: the picture files that people have, or an array, to RGB on white, and to the square that a trunk reads.

Values of files and arrays: 8 bits as they are; 16 bits of grey by their upper 8 (0 to 65535 is black to white), 12-bit
TIFF likewise; floats lie in 0 to 1, which is black to white. Integers of 32 bits, other floats, and 16 bits of which
only the lowest 8 are used have no range that is known, and are refused. The first picture of several is read.

16 bits of which 10, 12 or 14 are used may be a dark picture or a camera's numbers, and 8 bits of 0 and 1 a dark picture
or a mask: they are read as they are, which is said in the log.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms, ImageOps

from codebind_jax.data import picture_files, tiff_files
from codebind_jax.data.reading import file_errors, name_of, remark, unmasked

# Changes whenever the same input would give other pixels: it is part of the key of cached features.
REVISION = "image-3"
FITS = ("pad", "crop", "stretch")
# Grey may have the noise of a JPEG's colour channels: a pixel's largest channel minus its smallest, and the mean of it.
_NOISE, _MEAN_NOISE = 16, 6.0
_BAND = 1 << 22  # pixels that are laid on white at once
_BLOCK = 64  # pixels of a JPEG's block; in fewer there is no such noise
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
_DEEP_PACKING = re.compile(r"[A-Za-z]+;16[BLN]")  # Pillow's names of 16 bits a channel, of which it keeps the upper 8
_BITS = (8, 10, 12, 14)  # that cameras put into 16
_PHOTOMETRIC_TAG, _BITS_TAG = 262, 258  # of TIFF


def _from_array(array: np.ndarray) -> Image.Image:
  if array.ndim == 2:
    array = array[..., None]
  if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
    raise ValueError(f"image: got an array of shape {array.shape}, allowed are [H, W], [H, W, 1], [H, W, 3], [H, W, 4]")
  if np.issubdtype(array.dtype, np.floating):
    array = _scaled(array, "image: a float array")
  elif array.dtype == bool:
    array = array.astype(np.uint8) * 255
  elif array.dtype == np.uint8:
    if array.shape[-1] == 1:
      _say_zeros_and_ones(int(array.max()), "image")
  else:
    raise ValueError(f"image: got an array of type {array.dtype}, allowed are uint8, bool and float in 0 to 1")
  return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else np.ascontiguousarray(array))


def _scaled(array: np.ndarray, name: str) -> np.ndarray:
  """Floats in 0 to 1 as 8 bits."""
  if not (np.isfinite(array).all() and array.min() >= 0.0 and array.max() <= 1.0):
    raise ValueError(f"{name} must be finite and lie in 0 to 1; got {array.min():g} to {array.max():g}")
  return np.round(array * 255.0).astype(np.uint8)


def _on_white(
  picture: Image.Image, name: str = "image", raw: str = "", file: Image.Image | None = None
) -> Image.Image:
  """RGB of a picture of any mode.

  Args:
    picture: loaded.
    name: for errors.
    raw: Pillow's name of how the file packs its values.
    file: what was opened, which has the format and tags that a turned copy has not; None for the picture itself.
  """
  if picture.mode == "RGB" and "transparency" not in picture.info:
    return picture
  if picture.mode in _SIXTEEN or picture.mode == "I":
    return _deep(picture, name, file or picture)
  if picture.mode == "F":
    grey = _scaled(np.asarray(picture), f"{name}: a picture of floats")
    inverted = getattr(file or picture, "tag_v2", {}).get(_PHOTOMETRIC_TAG) == 0
    return Image.fromarray(np.uint8(255) - grey if inverted else grey).convert("RGB")
  if picture.mode == "LAB":
    convert = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    return ImageCms.applyTransform(picture, convert)
  if not picture.has_transparency_data:
    return picture.convert("RGB")
  _transparency_of_eight_bits(picture, raw)
  premultiplied = {"La": "LA", "RGBa": "RGBA"}
  if picture.mode != "RGBA" or "transparency" in picture.info:
    picture = picture.convert(premultiplied.get(picture.mode, "RGBA")).convert("RGBA")
  out = Image.new("RGB", picture.size)
  rows = max(1, _BAND // picture.width)
  for top in range(0, picture.height, rows):
    band = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
    white = Image.new("RGBA", band.size, (255, 255, 255, 255))
    out.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
  return out


def _say_zeros_and_ones(largest: int, name: str) -> None:
  """Says of 8 bits whose largest is 1 that they are read as nearly black."""
  if largest == 1:
    remark("pictures of 0 and 1", f"{name}: its values are 0 and 1 of 255, which is nearly black, and read as such; a "
           "mask is bool, or 0 and 255")  # fmt: skip


def _say_dark(largest: int, name: str) -> None:
  """Says of 16 bits that they are read as dark where all lie in the lower 14."""
  bits = next((bits for bits in _BITS if largest < 2**bits), 16)
  if largest and bits < 16:
    remark("dark pictures of 16 bits", f"{name}: its values of 16 bits reach {largest} of 65535, and would fit {bits} "
           f"bits; it is read as it is, which is dark: values of {bits} bits must be scaled to 16")  # fmt: skip


def _say_of_eight(picture: Image.Image, raw: str, name: str) -> None:
  """What is to be said of a loaded picture's range, where Pillow has made 8 bits of it.

  Args:
    picture: loaded.
    raw: Pillow's name of how the file packs its values.
    name: for the log.
  """
  if picture.mode == "L" and raw == "L":
    _say_zeros_and_ones(int(picture.getextrema()[1]), name)
  elif picture.mode in ("RGB", "RGBA", "LA", "L") and _DEEP_PACKING.fullmatch(raw):
    extrema = picture.getextrema()
    colours = [extrema] if picture.mode == "L" else extrema[: 1 if picture.mode == "LA" else 3]
    _say_dark(256 * max(high for _, high in colours) + 255, name)


def _transparency_of_eight_bits(picture: Image.Image, raw: str) -> None:
  """Brings a PNG's transparent value to the 8 bits that Pillow has made of the pixels, but not of it."""
  value = picture.info.get("transparency")
  factor = {"L;2": 85, "L;4": 17}.get(raw, 1)
  if isinstance(value, int) and factor > 1:
    picture.info["transparency"] = value * factor
  elif isinstance(value, tuple) and "16" in raw:
    picture.info["transparency"] = tuple(v >> 8 for v in value)


def _deep(picture: Image.Image, name: str, file: Image.Image) -> Image.Image:
  """RGB of grey that is deeper than 8 bits."""
  tags = getattr(file, "tag_v2", {})
  values = np.asarray(picture)
  # Of 32 bits, PNG and PPM alone say where white is.
  if picture.mode == "I" and file.format not in ("PNG", "PPM"):
    raise ValueError(f"{name}: its pixels are 32-bit or signed integers, of which the range is not known; got "
                     f"{values.min()} to {values.max()}, allowed are 8 and 16 bits, and floats in 0 to 1")  # fmt: skip
  if says_bits := tags.get(_BITS_TAG) == (12,):
    values = values << 4
  if 0 < values.max() < 256:
    raise ValueError(f"{name}: its pixels are of 16 bits, but lie in {values.min()} to {values.max()}, which would be "
                     "black; allowed are values up to 65535, or 8 bits")  # fmt: skip
  if not says_bits:
    _say_dark(int(values.max()), name)
  grey = np.clip(values >> 8, 0, 255).astype(np.uint8)
  if tags.get(_PHOTOMETRIC_TAG) == 0:  # Pillow turns only 8 bits and fewer, where 0 is white
    grey = np.uint8(255) - grey
  if isinstance(hole := picture.info.get("transparency"), int):
    grey = np.where(values == hole, np.uint8(255), grey)
  return Image.fromarray(grey).convert("RGB")


def opened(value: str | Path | bytes) -> Image.Image:
  """The picture of a path or encoded bytes, of which `read` gives the pixels.

  Raises:
    ValueError: naming the file, if it cannot be read as an image.
  """
  try:
    return _opened(value)
  except ValueError:
    if not tiff_files.takes(value):
      raise
  with file_errors(name_of(value, "image"), "a readable image"):
    array = tiff_files.read(value, picture_files.PIXELS)
    picture = _on_white(_from_array(array))
    return ImageOps.invert(picture) if tiff_files.white_is_zero(value) else picture


def _opened(value: str | Path | bytes) -> Image.Image:
  name = name_of(value, "image")
  with picture_files.opened(value) as picture:
    if (count := len(picture_files.pages(picture))) > 1:
      remark("files of several pictures", f"{name}: the first of its {count} pictures is read")
    raw = picture_files.packing(picture)
    picture.load()
    _say_of_eight(picture, raw, name)
    return _on_white(picture_files.upright(picture, name), name, raw, picture)


def read(value: Any) -> UInt8[np.ndarray, "h w 3"]:
  """RGB pixels of a path, encoded bytes, PIL image or array; transparency is laid on white, the EXIF turn is applied.

  Raises:
    ValueError: naming the file, if it cannot be read as an image, or the array's shape or type if that is not allowed.
  """
  # NumPy's strings and bytes are arrays as well.
  if hasattr(value, "__array__") and not isinstance(value, Image.Image | str | bytes):
    array = unmasked(value, "image")
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[-1] == 3 and 0 not in array.shape:
      return array  # also what was read from a file, of which all is said
    return np.asarray(_on_white(_from_array(array)))
  if isinstance(value, Image.Image):
    with file_errors("image", "a readable image"):
      value.load()
      return np.asarray(_on_white(picture_files.upright(value), file=value))
  if not isinstance(value, (str, Path, bytes)):
    raise ValueError(f"image: got {type(value).__name__}, allowed are a path, bytes, a PIL image or an array")
  return np.asarray(opened(value))


def check(path: Path) -> None:
  """Raises a ValueError naming the file if it is not an image; its pixels are not decoded."""
  try:
    with picture_files.opened(path):
      pass
  except ValueError:
    if not tiff_files.takes(path):
      raise


def is_grey(pixels: UInt8[np.ndarray, "h w 3"]) -> bool:
  """Whether a picture has no colours but the noise that a JPEG's colour channels leave."""
  if (pixels == pixels[..., :1]).all():
    return True
  if pixels.shape[0] * pixels.shape[1] < _BLOCK:
    return False
  spread = pixels.max(axis=-1) - pixels.min(axis=-1)
  return bool(spread.max() <= _NOISE and spread.mean() <= _MEAN_NOISE)


def crop_to_content(
  image: UInt8[np.ndarray, "h w 3"], *, threshold: int = 12, margin: float = 0.04
) -> UInt8[np.ndarray, "i j 3"]:
  """The part that is not white, with a margin; an image that is white throughout is returned as it is.

  Args:
    image: RGB pixels on white.
    threshold: how far below 255 a channel must lie to count as drawn.
    margin: white kept around, as a share of the longer side of the content.
  """
  drawn = image.min(axis=-1) < 255 - threshold
  rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
  if not rows.size:
    return image
  pad = round(margin * max(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1))
  top, bottom = max(rows[0] - pad, 0), rows[-1] + pad + 1
  left, right = max(columns[0] - pad, 0), columns[-1] + pad + 1
  return image[top:bottom, left:right]


def fit_square(
  image: UInt8[np.ndarray, "h w 3"], fit: str = "pad", padding: int = 255
) -> UInt8[np.ndarray, "n m 3"]:
  """A square of the image: "pad" adds grey (255 is white), "crop" cuts the middle, "stretch" leaves it to the resize.

  Raises:
    ValueError: if `fit` is none of these, or a square filled up had more pixels than a picture file may have.
  """
  h, w, _ = image.shape
  if fit not in FITS:
    raise ValueError(f"fit: got {fit!r}, allowed are {', '.join(FITS)}")
  if h == w or fit == "stretch":
    return image
  if fit == "crop":
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    return image[top : top + side, left : left + side]
  side = max(h, w)
  if side**2 > picture_files.PIXELS:
    raise ValueError(f"image: got {w} x {h} pixels, whose square has {side**2:,}; allowed: {picture_files.PIXELS:,}; "
                     "resize it before")  # fmt: skip
  square = np.full((side, side, 3), padding, np.uint8)
  top, left = (side - h) // 2, (side - w) // 2
  square[top : top + h, left : left + w] = image
  return square


def resize(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "n n 3"]:
  """Bicubic resize to size x size, antialiased when it shrinks."""
  if image.shape[:2] == (size, size):
    return image
  return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((size, size), Image.Resampling.BICUBIC))

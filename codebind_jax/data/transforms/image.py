"""Images: anything PIL opens, or an array, to RGB on white, and to the square that a trunk reads."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

# Changes whenever the same input would give other pixels: it is part of the key of cached features.
REVISION = "image-1"
_TURNS = frozenset(("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"))  # keys of `info` that can tell a turn
FITS = ("pad", "crop", "stretch")


def _from_array(array: np.ndarray) -> Image.Image:
  if array.ndim == 2:
    array = array[..., None]
  if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
    raise ValueError(f"image: got an array of shape {array.shape}, allowed are [H, W], [H, W, 1], [H, W, 3], [H, W, 4]")
  if np.issubdtype(array.dtype, np.floating):
    if not (np.isfinite(array).all() and array.min() >= 0.0 and array.max() <= 1.0):
      raise ValueError("image: a float array must be finite and lie in 0 to 1")
    array = np.round(array * 255.0).astype(np.uint8)
  elif array.dtype == bool:
    array = array.astype(np.uint8) * 255
  elif array.dtype != np.uint8:
    raise ValueError(f"image: got an array of type {array.dtype}, allowed are uint8, bool and float in 0 to 1")
  return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else np.ascontiguousarray(array))


def _on_white(picture: Image.Image) -> Image.Image:
  if picture.mode == "RGB" and "transparency" not in picture.info:
    return picture
  if picture.mode in ("I;16", "I;16L", "I;16B", "I"):
    values = np.asarray(picture).astype(np.int64) >> 8
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")
  if not (picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info):
    return picture.convert("RGB")
  picture = picture.convert("RGBA")
  white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
  return Image.alpha_composite(white, picture).convert("RGB")


def _upright(picture: Image.Image) -> Image.Image:
  """With the EXIF turn applied; a JPEG without EXIF or XMP has none, and needs no copy."""
  if picture.format == "JPEG" and not picture.info.keys() & _TURNS:
    return picture
  return ImageOps.exif_transpose(picture)


def opened(value: str | Path | bytes) -> Image.Image:
  """The picture of a path or encoded bytes, of which `read` gives the pixels.

  Raises:
    ValueError: naming the file, if it cannot be read as an image.
  """
  name = "image bytes" if isinstance(value, bytes) else str(value)
  try:
    with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as picture:
      picture.load()
      return _on_white(_upright(picture))
  except FileNotFoundError as error:
    raise ValueError(f"{name}: no such file") from error
  except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(f"{name}: not a readable image ({error})") from error


def read(value: Any) -> UInt8[np.ndarray, "h w 3"]:
  """RGB pixels of a path, encoded bytes, PIL image or array; transparency is laid on white, the EXIF turn is applied.

  Raises:
    ValueError: naming the file, if it cannot be read as an image, or the array's shape or type if that is not allowed.
  """
  if isinstance(value, np.ndarray) or hasattr(value, "__array__") and not isinstance(value, Image.Image):
    array = np.asarray(value)
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[-1] == 3 and 0 not in array.shape:
      return array
    return np.asarray(_on_white(_from_array(array)))
  if isinstance(value, Image.Image):
    return np.asarray(_on_white(ImageOps.exif_transpose(value)))
  if not isinstance(value, (str, Path, bytes)):
    raise ValueError(f"image: got {type(value).__name__}, allowed are a path, bytes, a PIL image or an array")
  return np.asarray(opened(value))


def check(path: Path) -> None:
  """Raises a ValueError naming the file if it is not an image; its pixels are not decoded."""
  try:
    with Image.open(path):
      pass
  except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(f"{path}: not a readable image ({error})") from error


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
    ValueError: if `fit` is none of these.
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
  square = np.full((side, side, 3), padding, np.uint8)
  top, left = (side - h) // 2, (side - w) // 2
  square[top : top + h, left : left + w] = image
  return square


def resize(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "n n 3"]:
  """Bicubic resize to size x size, antialiased when it shrinks."""
  if image.shape[:2] == (size, size):
    return image
  return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((size, size), Image.Resampling.BICUBIC))

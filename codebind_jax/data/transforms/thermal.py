"""Thermal images: 16-bit radiometric PNG or TIFF, float TIFF or .npy in degrees C, 8-bit grey with a known range, or an
array, to degrees C.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image

from codebind_jax.data import numpy_files, picture_files, tiff_files
from codebind_jax.data.reading import file_errors, name_of, remark, unmasked
from codebind_jax.data.transforms import image

# Changes whenever the same input would give other values: it is part of the key of cached features.
REVISION = "thermal-3"
COLDEST, HOTTEST = -90.0, 2000.0
RANGE = (15.0, 45.0)
PIXELS = 2**25  # largest picture that is read
_FULL = 65535  # where 16 bits end
_NUMBERS = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_WHAT = (
  "a readable thermal image; allowed are 16-bit grey PNG or TIFF, 8-bit grey, and float TIFF and .npy in degrees C"
)


def read(
  value: Any, *, scale: float = 0.01, offset: float = -273.15, span: tuple[float, float] = RANGE
) -> Float32[np.ndarray, "h w"]:
  """Degrees C of each pixel; a picture that says how the camera was turned (EXIF) is turned.

  Args:
    value: a path, a file's bytes or an array. Floats (.npy, float TIFF) are degrees C.
    scale: degrees C a step of integers wider than 8 bits: 0.01 is the cameras' usual linear mode, 0.1 their coarse one.
    offset: degrees C at 0 of these integers; the default makes them hundredths of a kelvin.
    span: degrees C at 0 and at 255 of 8-bit grey, which has no temperatures of its own.

  Raises:
    ValueError: naming the file, if it cannot be read, has another shape or false colours, a pixel is masked or not
      finite, or its values cannot be degrees C: floats of which the median is that of a scene in kelvin, or that all
      lie in 0 to 1, as if they had been scaled to it.
  """
  if isinstance(value, (str, Path, bytes)):
    name = name_of(value, "thermal")
    with file_errors(name, _WHAT):
      return _celsius(_decoded(value, name), name, scale, offset, span)
  if isinstance(value, Image.Image):
    with file_errors("thermal", _WHAT):
      return _celsius(_pixels(value, "thermal"), "thermal", scale, offset, span)
  if not hasattr(value, "__array__"):
    raise ValueError(f"thermal: got {type(value).__name__}, allowed are a path, bytes, a PIL image or an array")
  return _celsius(unmasked(value, "thermal"), "thermal", scale, offset, span)


def stored(value: str | Path | bytes) -> UInt8[np.ndarray, "h w 3"] | None:
  """RGB of a picture file of 8 bits as it is, for encoders that take such pictures; None for other files.

  Raises:
    ValueError: naming the file, if it is a damaged picture.
  """
  if not picture_files.is_picture(value):
    return None
  name = name_of(value, "thermal")
  with picture_files.opened(value, "thermal", _WHAT, pixels=PIXELS) as picture:
    if picture.mode not in ("L", "RGB", "P", "1") or "16" in picture_files.packing(picture):
      return None
    picture.load()
    return np.asarray(picture_files.upright(picture, name).convert("RGB"))


def _decoded(value: str | Path | bytes, name: str) -> np.ndarray:
  if picture_files.head_of(value).startswith(numpy_files.MAGIC):
    return numpy_files.read_npy(value, PIXELS)
  if tiff_files.takes(value):
    return tiff_files.read(value, PIXELS)
  with picture_files.opened(value, "thermal", _WHAT, pixels=PIXELS) as picture:
    return _pixels(picture, name)


def _pixels(picture: Image.Image, name: str) -> np.ndarray:
  """The numbers of a picture, with as many bits as it has."""
  packing = picture_files.packing(picture)
  if picture.mode not in _NUMBERS and "16" in packing:
    raise ValueError(f"its pixels are {packing}, of which 8 bits would be left; allowed are 16 bits of grey alone")
  if picture.format == "PPM" and picture.mode in _NUMBERS and not picture_files.unscaled(picture):
    raise ValueError("PFM and PGM whose white is not 65535 do not say their unit: save degrees C as .npy")
  if any(kind == "APP1" and content[:5] == b"FLIR\0" for kind, content in getattr(picture, "applist", ())):
    raise ValueError("a FLIR camera's JPEG, whose picture is scaled to itself: export its radiometric data, such as "
                     "16-bit TIFF or .npy in degrees C")  # fmt: skip
  if (count := len(picture_files.pages(picture))) > 1:
    raise ValueError(f"it holds {count} pictures, allowed is one")
  picture.load()
  picture = picture_files.upright(picture, name)
  if picture.mode in _NUMBERS:
    if "transparency" in picture.info:
      raise ValueError("it has transparent pixels, which say no temperature")
    return np.asarray(picture).astype(np.int64) if picture.mode == "I" else np.asarray(picture)
  if picture.has_transparency_data and picture.convert("RGBA").getchannel("A").getextrema()[0] < 255:
    raise ValueError("it has transparent pixels, which say no temperature")
  return np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))


def grey(pixels: UInt8[np.ndarray, "h w 3"], name: str) -> UInt8[np.ndarray, "h w"]:
  """One channel of RGB that has no colours but a JPEG's noise.

  Raises:
    ValueError: naming it, if it has colours.
  """
  if not image.is_grey(pixels):
    raise ValueError(f"{name}: has false colours, which say no temperature; export grey or radiometric data")
  return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))


def _celsius(array: np.ndarray, name: str, scale: float, offset: float, span: tuple[float, float]) -> np.ndarray:
  if array.ndim == 3 and array.shape[-1] == 3 and array.dtype == np.uint8 and array.size:
    array = grey(array, name)
  elif array.ndim == 3 and array.shape[-1] in (1, 3):
    if (array != array[..., :1]).any():
      raise ValueError(f"{name}: has three channels that differ; one is needed")
    array = array[..., 0]
  numbers = np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)
  if array.ndim != 2 or 0 in array.shape or not numbers:
    raise ValueError(f"{name}: got type {array.dtype} and shape {array.shape}, allowed are numbers [h, w]")
  if array.dtype == np.uint8:
    celsius = span[0] + array / 255.0 * (span[1] - span[0])
  elif np.issubdtype(array.dtype, np.integer):
    celsius = array * scale + offset
  else:
    celsius = array.astype(np.float64)
  if not np.isfinite(celsius).all():
    count = np.count_nonzero(~np.isfinite(celsius))
    raise ValueError(f"{name}: {count} of {celsius.size} values are not finite; every pixel needs a temperature")
  low, high = float(celsius.min()), float(celsius.max())
  floats = np.issubdtype(array.dtype, np.floating)
  if floats and like_shares(celsius):
    raise ValueError(f"{name}: floats of {low:g} to {high:g} look scaled to 0 to 1, which says no temperature; allowed "
                     "are degrees C")  # fmt: skip
  kelvin = floats and like_kelvin(celsius)
  if kelvin or low < COLDEST or high > HOTTEST:
    hint = "these look like kelvin; subtract 273.15." if kelvin else "is the unit right?"
    raise ValueError(f"{name}: {low:g} to {high:g} degrees C: {hint} Allowed are {COLDEST:g} to {HOTTEST:g} degrees C; "
                     f"integers are taken as {scale:g} * value + {offset:g}")
  if (array.dtype.kind, array.itemsize) == ("u", 2) and (full := np.count_nonzero(array == _FULL)):
    remark("saturated thermal images", f"{name}: {full} of {array.size} values are {_FULL}, the largest of 16 bits; "
           f"they are taken as {high:g} degrees C, and may be hotter or no temperature")  # fmt: skip
  return celsius.astype(np.float32)


def like_kelvin(celsius: Float[np.ndarray, "h w"]) -> bool:
  """Whether temperatures look like those of a scene in kelvin, whatever one hot or dead spot says."""
  return bool(200 < float(np.median(celsius)) < 400)


def like_shares(celsius: Float[np.ndarray, "h w"]) -> bool:
  """Whether temperatures look as if they had been scaled to 0 to 1."""
  return bool(0 <= celsius.min() < celsius.max() <= 1)


def to_picture(
  thermal: Float[np.ndarray, "h w"], span: tuple[float, float] = RANGE
) -> UInt8[np.ndarray, "h w 3"]:
  """The picture for an image network: grey, black at the lower end of `span` (degrees C) and white at the upper."""
  share = np.clip((thermal - span[0]) / (span[1] - span[0]), 0.0, 1.0)
  return np.repeat((255.0 * share).astype(np.uint8)[..., None], 3, axis=-1)

"""Thermal images: 16-bit radiometric PNG or TIFF, 8-bit grey with a known range, .npy, or an array, to degrees C."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image, UnidentifiedImageError

# Changes whenever the same input would give other values: it is part of the key of cached features.
REVISION = "thermal-1"
COLDEST, HOTTEST = -90.0, 2000.0
RANGE = (15.0, 45.0)
_DEEP = ("I;16", "I;16L", "I;16B", "I")


def read(
  value: Any, *, scale: float = 0.01, offset: float = -273.15, span: tuple[float, float] = RANGE
) -> Float32[np.ndarray, "h w"]:
  """Degrees C of each pixel.

  Args:
    value: a path, a file's bytes or an array. Floats (.npy) are degrees C.
    scale: degrees C a step of integers wider than 8 bits: 0.01 is the cameras' usual linear mode, 0.1 their coarse one.
    offset: degrees C at 0 of these integers; the default makes them hundredths of a kelvin.
    span: degrees C at 0 and at 255 of 8-bit grey, which has no temperatures of its own.

  Raises:
    ValueError: naming the file, if it cannot be read, has another shape or false colours, or if its values cannot be
      degrees C, as with a wrong unit.
  """
  if isinstance(value, (str, Path, bytes)):
    name = "thermal bytes" if isinstance(value, bytes) else str(value)
    try:
      array = _decoded(value)
    except FileNotFoundError as error:
      raise ValueError(f"{name}: no such file") from error
    except (OSError, EOFError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
      raise ValueError(f"{name}: not a readable thermal image; allowed are 16-bit and 8-bit grey PNG or TIFF, and .npy "
                       f"in degrees C ({error})") from error
  elif hasattr(value, "__array__"):
    name, array = "thermal", np.asarray(value)
  else:
    raise ValueError(f"thermal: got {type(value).__name__}, allowed are a path, bytes or an array")
  return _celsius(array, name, scale, offset, span)


def _decoded(value: str | Path | bytes) -> np.ndarray:
  content = value if isinstance(value, bytes) else Path(value).read_bytes()
  if content[:6] == b"\x93NUMPY":
    return np.load(io.BytesIO(content), allow_pickle=False)
  with Image.open(io.BytesIO(content)) as picture:
    if picture.mode in _DEEP:
      return np.asarray(picture).astype(np.int64)
    return np.asarray(picture if picture.mode in ("L", "RGB", "F") else picture.convert("RGB"))


def _celsius(array: np.ndarray, name: str, scale: float, offset: float, span: tuple[float, float]) -> np.ndarray:
  if array.ndim == 3 and array.shape[-1] in (1, 3):
    if (array != array[..., :1]).any():
      raise ValueError(f"{name}: has false colours, which say no temperature; export grey or radiometric data")
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
    raise ValueError(f"{name}: has values that are not finite")
  low, high = float(celsius.min()), float(celsius.max())
  kelvin = np.issubdtype(array.dtype, np.floating) and low > 200 and high < 400
  if kelvin or low < COLDEST or high > HOTTEST:
    hint = "these look like kelvin; subtract 273.15" if kelvin else "is the unit right?"
    raise ValueError(f"{name}: {low:g} to {high:g} degrees C: {hint} Allowed are {COLDEST:g} to {HOTTEST:g} degrees C; "
                     f"integers are taken as {scale:g} * value + {offset:g}")
  return celsius.astype(np.float32)


def to_picture(
  thermal: Float[np.ndarray, "h w"], span: tuple[float, float] = RANGE
) -> UInt8[np.ndarray, "h w 3"]:
  """The picture for an image network: grey, black at the lower end of `span` (degrees C) and white at the upper."""
  share = np.clip((thermal - span[0]) / (span[1] - span[0]), 0.0, 1.0)
  return np.repeat((255.0 * share).astype(np.uint8)[..., None], 3, axis=-1)

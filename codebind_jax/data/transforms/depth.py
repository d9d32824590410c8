"""Depth maps: 16-bit PNG, integer or float TIFF, .npy, .npz with depth or disparity, or an array, to metres.

Depth cameras write 16-bit integers in millimetres (ROS REP 118), programs write floats in metres; both use 0, floats
also inf or NaN, and 16-bit integers also their largest value, 65535, for "no return".
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image

from codebind_jax.data import numpy_files, picture_files, tiff_files
from codebind_jax.data.reading import file_errors, name_of

# Changes whenever the same input would give other values: it is part of the key of cached features.
REVISION = "depth-3"
FARTHEST = 1000.0
PIXELS = 2**26  # largest map that is read
_BAND = 1 << 22  # values that are brought to metres at once
_KINDS = ("PNG", "TIFF", "PPM", "JPEG", "GIF", "BMP", "WEBP")  # the last four for the message, they hold pictures only
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_WHAT = (
  "a readable depth map; allowed are 16-bit PNG, integer or float TIFF, .npy, and .npz with depth, or with disparity "
  "and scale"
)
_WHOLE = 100.0  # metres beyond which floats that are all whole numbers are taken for millimetres


def read(value: Any) -> Float32[np.ndarray, "h w"]:
  """Metres along the camera's axis; 0 where there was no return.

  Integers are millimetres and floats metres, in files as in arrays. An .npz file holds either `depth` in these units,
  or `disparity` with `scale` (focal length in pixels times baseline in metres), from which depth is scale / disparity.
  Masked values of an array are no return. A picture that says how the camera was turned (EXIF) is turned.

  Raises:
    ValueError: naming the file, if it cannot be read, has another shape or depth of colour, negative values or values
      beyond a kilometre, floats that look like millimetres, or no return at all.
  """
  if isinstance(value, (str, Path, bytes)):
    name = name_of(value, "depth")
    with file_errors(name, _WHAT):
      return _checked(_decoded(value, name), name)
  if isinstance(value, Image.Image):
    with file_errors("depth", _WHAT):
      return _checked(_pixels(value, "depth"), "depth")
  if not hasattr(value, "__array__"):
    raise ValueError(f"depth: got {type(value).__name__}, allowed are a path, bytes, a PIL image or an array")
  array = np.asanyarray(value)
  return _checked(array.filled(0) if isinstance(array, np.ma.MaskedArray) else np.asarray(array), "depth")


def _decoded(value: str | Path | bytes, name: str) -> np.ndarray:
  head = picture_files.head_of(value)
  if head.startswith(numpy_files.MAGIC):
    return numpy_files.read_npy(value, PIXELS)
  if head.startswith(numpy_files.ZIP):
    arrays = numpy_files.read_npz(value, ("depth", "disparity", "scale"), PIXELS)
    if "depth" in arrays and (others := arrays.keys() - {"depth"}):
      raise ValueError(f"holds depth and {' and '.join(sorted(others))}, and does not say how they go together; "
                       "allowed are depth alone (integers are millimetres, floats metres), or disparity and scale")
    if "depth" in arrays:
      return arrays["depth"]
    if missing := {"disparity", "scale"} - set(arrays):
      raise ValueError(f"has no {' and no '.join(sorted(missing))}")
    scale, disparity = arrays["scale"], arrays["disparity"].astype(np.float64, copy=False)
    if scale.size != 1 or not np.isfinite(scale).all() or not scale.item() > 0:
      raise ValueError(f"scale has shape {scale.shape} and values {scale.ravel()[:4]}, allowed is one number above 0")
    returned = np.isfinite(disparity) & (disparity > 0)
    np.divide(float(scale.item()), disparity, out=disparity, where=returned)
    disparity[~returned] = 0.0
    return disparity
  if tiff_files.takes(value):
    return tiff_files.read(value, PIXELS)
  with picture_files.opened(value, "depth", _WHAT, _KINDS, PIXELS) as picture:
    return _pixels(picture, name)


def _pixels(picture: Image.Image, name: str) -> np.ndarray:
  """The numbers of a picture; Pillow's mode I is of 32 bits, whatever the file has."""
  if picture.format == "PPM" and not picture_files.unscaled(picture):
    raise ValueError("PFM and PGM whose white is not 65535 do not say their unit: save metres as .npy")
  if picture.mode not in _DEEP:
    raise ValueError(f"its pixels are {picture.mode}, a picture of depth is no depth: 16-bit integers or floats are "
                     "needed")  # fmt: skip
  if (count := len(picture_files.pages(picture))) > 1:
    raise ValueError(f"it holds {count} pictures, allowed is one")
  picture.load()
  if "transparency" in picture.info:
    raise ValueError("it has transparent pixels, which say no depth")
  array = np.asarray(picture_files.upright(picture, name))
  return array.astype(np.int64) if picture.mode == "I" else array


def _checked(array: np.ndarray, name: str) -> np.ndarray:
  if array.ndim == 3 and array.shape[-1] == 1:
    array = array[..., 0]
  whole = np.issubdtype(array.dtype, np.integer)
  if array.ndim != 2 or 0 in array.shape or not (whole or np.issubdtype(array.dtype, np.floating)):
    raise ValueError(f"{name}: got type {array.dtype} and shape {array.shape}, allowed are integers (millimetres) or "
                     "floats (metres) [h, w]")  # fmt: skip
  if array.dtype in (np.uint8, np.int8):
    raise ValueError(f"{name}: got {array.dtype}, which is a picture of depth; allowed are wider integers "
                     "(millimetres) and floats (metres)")  # fmt: skip
  out, low, high, rounded = np.empty(array.shape, np.float32), np.inf, -np.inf, True
  rows = max(1, _BAND // array.shape[1])
  for top in range(0, len(array), rows):  # so that no second array of all of it is made
    band = array[top : top + rows]
    metres = band * 1e-3 if whole else band.astype(np.float64)
    returned = band != 65535 if (array.dtype.kind, array.itemsize) == ("u", 2) else np.isfinite(metres)
    metres = np.where(returned, metres, 0.0)
    low, high = min(low, float(metres.min())), max(high, float(metres.max()))
    rounded = rounded and bool((metres == np.floor(metres)).all())
    with np.errstate(over="ignore"):  # it is refused below
      out[top : top + rows] = metres
  if low < 0 or high > FARTHEST:
    raise ValueError(f"{name}: values from {low:g} to {high:g} m, allowed are 0 to {FARTHEST:g} m "
                     "(floats are metres, integers millimetres)")
  if not high:
    raise ValueError(f"{name}: no return at all, every value is 0, not finite, or the largest of 16 bits")
  if not whole and high > _WHOLE and rounded:
    raise ValueError(f"{name}: floats that are all whole numbers, up to {high:g}, look like millimetres; "
                     "allowed are floats in metres, and integers in millimetres")  # fmt: skip
  return out


def to_picture(depth: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
  """The picture for an image network: near is bright, no return is black.

  Depth is scaled by the scene's median, which becomes the middle of a rendered object (2.45, the object lying between
  1.6 and 3.6), so that a cup and a wardrobe that fill the frame alike look alike.
  """
  returned = depth > 0
  unit = 2.45 / np.median(depth[returned])
  near = np.clip(255.0 - (depth * unit - 1.6) / 2.0 * 255.0, 1.0, 255.0)
  return np.repeat(np.where(returned, near, 0.0).astype(np.uint8)[..., None], 3, axis=-1)

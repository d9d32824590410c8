"""Depth maps: 16-bit PNG or TIFF, .npy, .npz with depth or disparity, or an array, to metres.

Depth cameras write 16-bit integers in millimetres (ROS REP 118), programs write floats in metres; both use 0, and
floats also inf or NaN, for "no return".
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image, UnidentifiedImageError

# Changes whenever the same input would give other values: it is part of the key of cached features.
REVISION = "depth-1"
FARTHEST = 1000.0
_DEEP = ("I;16", "I;16L", "I;16B", "I")


def read(value: Any) -> Float32[np.ndarray, "h w"]:
  """Metres along the camera's axis; 0 where there was no return.

  Integers are millimetres and floats metres, in files as in arrays. An .npz file holds either `depth` in these units,
  or `disparity` with `scale` (focal length in pixels times baseline in metres), from which depth is scale / disparity.

  Raises:
    ValueError: naming the file, if it cannot be read, has another shape or depth of colour, negative values or values
      beyond a kilometre, or no return at all.
  """
  if isinstance(value, (str, Path, bytes)):
    name = "depth bytes" if isinstance(value, bytes) else str(value)
    try:
      return _checked(_decoded(value), name)
    except FileNotFoundError as error:
      raise ValueError(f"{name}: no such file") from error
    except (OSError, EOFError, SyntaxError, KeyError, UnidentifiedImageError, Image.DecompressionBombError) as error:
      raise ValueError(f"{name}: not a readable depth map; allowed are 16-bit PNG or TIFF, .npy, and .npz with depth, "
                       f"or disparity and scale ({error})") from error
  if not hasattr(value, "__array__"):
    raise ValueError(f"depth: got {type(value).__name__}, allowed are a path, bytes or an array")
  return _checked(np.asarray(value), "depth")


def _decoded(value: str | Path | bytes) -> np.ndarray:
  content = value if isinstance(value, bytes) else Path(value).read_bytes()
  if content[:6] == b"\x93NUMPY":
    return np.load(io.BytesIO(content), allow_pickle=False)
  if content[:2] == b"PK":
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
      if "disparity" not in arrays:
        return arrays["depth"]
      disparity = np.asarray(arrays["disparity"], np.float64)
      returned = np.isfinite(disparity) & (disparity > 0)
      return np.divide(float(arrays["scale"]), disparity, out=np.zeros_like(disparity), where=returned)
  with Image.open(io.BytesIO(content)) as picture:
    if picture.mode not in _DEEP:
      raise OSError(f"its pixels are {picture.mode}, a picture of depth is no depth: 16-bit integers are needed")
    return np.asarray(picture).astype(np.int64)


def _checked(array: np.ndarray, name: str) -> np.ndarray:
  if array.ndim == 3 and array.shape[-1] == 1:
    array = array[..., 0]
  numbers = np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)
  if array.ndim != 2 or 0 in array.shape or not numbers:
    raise ValueError(f"{name}: got type {array.dtype} and shape {array.shape}, allowed are integers (millimetres) or "
                     "floats (metres) [h, w]")
  if array.dtype == np.uint8:
    raise ValueError(f"{name}: got uint8, which is a picture of depth; allowed are wider integers (millimetres) and "
                     "floats (metres)")
  metres = array * 1e-3 if np.issubdtype(array.dtype, np.integer) else array.astype(np.float64)
  metres = np.where(np.isfinite(metres), metres, 0.0)
  if metres.min() < 0 or metres.max() > FARTHEST:
    raise ValueError(f"{name}: values from {metres.min():g} to {metres.max():g} m, allowed are 0 to {FARTHEST:g} m "
                     "(floats are metres, integers millimetres)")
  if not metres.any():
    raise ValueError(f"{name}: no return at all, every value is 0 or not finite")
  return metres.astype(np.float32)


def to_picture(depth: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
  """The picture for an image network: near is bright, no return is black.

  Depth is scaled by the scene's median, which becomes the middle of a rendered object (2.45, the object lying between
  1.6 and 3.6), so that a cup and a wardrobe that fill the frame alike look alike.
  """
  returned = depth > 0
  unit = 2.45 / np.median(depth[returned])
  near = np.clip(255.0 - (depth * unit - 1.6) / 2.0 * 255.0, 1.0, 255.0)
  return np.repeat(np.where(returned, near, 0.0).astype(np.uint8)[..., None], 3, axis=-1)

"""Point clouds: .npy, .ply, .obj, .off, or an array, to coordinates and, where there are any, colours."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

# Changes whenever the same input would give other values: it is part of the key of cached features.
REVISION = "points-1"
SAMPLES = 1024
_KINDS = {b"ply": "ply", b"OFF": "off", b"COFF": "off", b"NOFF": "off"}


def read(value: Any) -> Float32[np.ndarray, "n c"]:
  """Coordinates [n, 3], or [n, 6] with RGB from 0 to 1 after them; unit and origin are the file's.

  The surface of a mesh is sampled at 1,024 points, the same at every call; a file of vertices alone is taken as it is.

  Raises:
    ValueError: naming the file, if it cannot be read, has another shape, values that are not finite or colours out of
      range, or if all points coincide.
  """
  if isinstance(value, (str, Path, bytes)):
    name = "points bytes" if isinstance(value, bytes) else str(value)
    try:
      content = value if isinstance(value, bytes) else Path(value).read_bytes()
      if content[:6] == b"\x93NUMPY":
        return _checked(np.load(io.BytesIO(content), allow_pickle=False), name)
    except FileNotFoundError as error:
      raise ValueError(f"{name}: no such file") from error
    except (OSError, EOFError) as error:
      raise ValueError(f"{name}: cannot be read ({error})") from error
    return _checked(_from_mesh(content, name), name)
  if not hasattr(value, "__array__"):
    raise ValueError(f"points: got {type(value).__name__}, allowed are a path, bytes or an array")
  return _checked(np.asarray(value), "points")


def _from_mesh(content: bytes, name: str) -> np.ndarray:
  import trimesh

  kind = next((kind for head, kind in _KINDS.items() if content.startswith(head)), "obj")
  try:
    shape = trimesh.load(io.BytesIO(content), file_type=kind, process=False)
    shape = shape.to_geometry() if isinstance(shape, trimesh.Scene) else shape
    vertices, faces = np.asarray(shape.vertices), getattr(shape, "faces", ())
    if not len(vertices):
      raise ValueError("no points in it")
    if len(faces):
      return trimesh.sample.sample_surface(shape, SAMPLES, seed=0)[0]
  except Exception as error:  # trimesh raises many kinds for its many formats
    raise ValueError(f"{name}: not a readable cloud or mesh; allowed: .npy, .ply, .obj and .off ({error})") from error
  colours = getattr(shape, "colors", None)
  if colours is not None and len(colours) == len(vertices):
    return np.concatenate([vertices, np.asarray(colours)[:, :3] / 255.0], axis=1)
  return vertices


def _checked(array: np.ndarray, name: str) -> np.ndarray:
  numbers = np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)
  if array.ndim != 2 or array.shape[-1] not in (3, 6) or not len(array) or not numbers:
    raise ValueError(f"{name}: got type {array.dtype} and shape {array.shape}, allowed are numbers [n, 3] or [n, 6]")
  if not np.isfinite(array).all():
    raise ValueError(f"{name}: has values that are not finite")
  if array.shape[-1] == 6 and not (0 <= array[:, 3:].min() and array[:, 3:].max() <= 1):
    raise ValueError(f"{name}: colours from {array[:, 3:].min():g} to {array[:, 3:].max():g}, allowed are 0 to 1")
  if not np.ptp(array[:, :3], axis=0).any():
    raise ValueError(f"{name}: all {len(array)} points are one")
  return array.astype(np.float32)

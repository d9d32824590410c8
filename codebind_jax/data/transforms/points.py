"""Point clouds and meshes: .npy, .ply, .obj, .off, .stl, .glb, .pcd, .xyz, or an array, to coordinates and colours."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from codebind_jax.data import pcd
from codebind_jax.data.numpy_files import load_npy
from codebind_jax.data.reading import file_errors, name_of, remark, unmasked

# Changes whenever the same input would give other values: it is part of the key of cached features.
REVISION = "points-2"
SAMPLES = 1024
FAR = 64.0  # times its size from the origin, float32 has a thousandth of a thousandth of a cloud's size left
SIZES = (1e-12, 1e12)
ALLOWED = ".npy, .ply, .obj, .off, .stl, .glb, .pcd, and tables .xyz, .txt, .csv, .pts, .asc"
_TABLES = (".xyz", ".txt", ".csv", ".pts", ".asc")
_OFF = re.compile(rb"\s*(?:#[^\n]*\n\s*)*(\w*?)off(?=[\s\d#])", re.IGNORECASE)
# Beginnings of formats that are not read -> what they are.
_OTHER = {
  b"PK\x03\x04": "a zip archive (.npz or .3mf); of an .npz save the one array with numpy.save",
  b"LASF": "a LAS or LAZ file; save it as .pcd or .ply, as with PDAL", b"ASTM-E57": "an E57 file; save it as .ply",
  b"ISO-10303": "a STEP file; save it as .stl or .obj", b"Kaydara FBX": "an FBX file; save it as .glb",
  b"BLENDER": "a Blender file; save it as .glb", b"{": "glTF as text, which refers to other "
  "files; save it as .glb", b"<?xml": "XML (.dae or .x3d); save it as .glb",
}  # fmt: skip
_COLOURS = (("red", "green", "blue"), ("diffuse_red", "diffuse_green", "diffuse_blue"), ("r", "g", "b"))


def read(value: Any) -> Float32[np.ndarray, "n c"]:
  """Coordinates [n, 3], or [n, 6] with RGB from 0 to 1 after them; unit and axes are the file's.

  The surface of a mesh is sampled at 1,024 points, the same at every call; a file of vertices alone is taken as it is.
  The origin is the file's, unless the cloud lies more than 64 times its size away, as in map coordinates, of which
  float32 would keep half metres: then it is moved to the middle of the cloud, and it is said.

  Raises:
    ValueError: naming the file, if it cannot be read, has another shape, values that are not finite or colours out of
      range, or if all points coincide.
  """
  name = name_of(value, "points")
  if isinstance(value, (str, Path, bytes)):
    with file_errors(name, f"a readable cloud or mesh; allowed: {ALLOWED}"):
      content = value if isinstance(value, bytes) else Path(value).read_bytes()
      if content[:6] == b"\x93NUMPY":
        return _checked(load_npy(content, name), name)
      return _checked(_from_file(content, name, "" if isinstance(value, bytes) else Path(value).suffix.lower()), name)
  if not hasattr(value, "__array__"):
    raise ValueError(f"points: got {type(value).__name__}, allowed are a path, bytes or an array")
  return _checked(unmasked(value, "points"), "points")


def _from_file(content: bytes, name: str, ending: str) -> np.ndarray:
  content = content.removeprefix(b"\xef\xbb\xbf")
  for beginning, what in _OTHER.items():
    if content.startswith(beginning):
      raise ValueError(what)
  if not content.strip():
    raise ValueError("the file is empty")
  if pcd.is_pcd(content):
    return pcd.read(content, name)
  if content[:4].lower() in (b"ply\n", b"ply\r"):
    return _from_mesh(content, "ply")
  if found := _OFF.match(content):
    variant, content = found[1].upper(), content[found.end() :]
    if variant not in (b"", b"C", b"N", b"CN") or content.lstrip(b" \t")[:6].upper() == b"BINARY":
      raise ValueError(f"an OFF file of the kind {found[0].split()[-1].decode('latin-1')}, or binary; allowed: OFF, "
                       "COFF and NOFF as text")  # fmt: skip
    content = re.sub(rb"#[^\n]*", b"", content)
    _check_lines(content)
    return _from_mesh(b"OFF" + content, "off")
  if content[:4] == b"glTF":
    size = int.from_bytes(content[8:12], "little")
    if size > len(content):
      raise ValueError(f"cut off, its header says {size} bytes and there are {len(content)}")
    return _from_mesh(content, "glb")
  triangles = int.from_bytes(content[80:84], "little")
  if ending == ".stl" or len(content) == 84 + 50 * triangles or re.match(rb"\s*solid\b[^\n]*\n\s*facet\b", content):
    return _from_mesh(content, "stl")
  if pcd.is_table(content) or ending in _TABLES:
    return pcd.read_table(content, name)
  if not re.search(rb"^\s*v\s", content, re.MULTILINE):
    raise ValueError("a kind of file that is not known")
  return _from_mesh(content, "obj")


def _from_mesh(content: bytes, kind: str) -> np.ndarray:
  import trimesh

  shape = trimesh.load(io.BytesIO(content), file_type=kind, process=False)
  raw = shape.metadata.get("_ply_raw", {}).get("vertex") if kind == "ply" else None
  for element, part in (shape.metadata["_ply_raw"] if raw else {}).items():
    there = part.get("data", ())
    there = len(there) if isinstance(there, np.ndarray) or not there else len(next(iter(there.values())))
    if there < part["length"] and element in ("vertex", "face"):
      raise ValueError(f"cut off, its header says {part['length']} of element {element} and there are {there}")
  shape = shape.to_geometry() if isinstance(shape, trimesh.Scene) else shape
  vertices, faces = np.asarray(shape.vertices), getattr(shape, "faces", ())
  if not len(vertices):
    raise ValueError("no points in it")
  if len(faces):
    return np.asarray(trimesh.sample.sample_surface(shape, SAMPLES, seed=0)[0])
  colours = _ply_colours(raw) if raw else getattr(shape, "colors", None)
  if colours is not None and len(colours) == len(vertices):
    return np.concatenate([vertices, colours if raw else np.asarray(colours)[:, :3] / 255.0], axis=1)
  return vertices


def _check_lines(content: bytes) -> None:
  """Refuses an OFF file that has fewer lines than its first one says."""
  lines = [line for line in content.splitlines() if line.strip()]
  vertices, faces = (int(word) for word in (lines[0].split() if lines else (0, 0))[:2])
  if len(lines) < 1 + vertices + faces:
    raise ValueError(f"cut off, it says {vertices} vertices and {faces} faces and has {len(lines) - 1} lines of them")


def _ply_colours(vertex: Any) -> np.ndarray | None:
  """RGB from 0 to 1 of a PLY file's vertices: 1 is the largest value of the type, and of floats 1 or 255."""
  kinds, data = vertex["properties"], vertex["data"]
  found = next((colours for colours in _COLOURS if set(colours) <= set(kinds)), None)
  if found is None:
    return None
  columns = np.stack([np.asarray(data[colour]).reshape(-1) for colour in found], axis=1)
  kind = np.dtype(kinds[found[0]])
  if kind.kind == "f" or kind.itemsize > 2:  # also integers that nobody fills
    return columns / (1.0 if kind.kind == "f" and columns.max() <= 1.0 else 255.0)
  return columns / float(np.iinfo(kind).max)


def _checked(array: np.ndarray, name: str) -> np.ndarray:
  numbers = np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)
  if array.ndim != 2 or array.shape[-1] not in (3, 6) or not len(array) or not numbers:
    raise ValueError(f"{name}: got type {array.dtype} and shape {array.shape}, allowed are numbers [n, 3] or [n, 6]")
  if not np.isfinite(array).all():
    wrong = int((~np.isfinite(array)).any(axis=1).sum())
    raise ValueError(f"{name}: has values that are not finite, in {wrong} of {len(array)} points")
  if array.shape[-1] == 6 and not (0 <= array[:, 3:].min() and array[:, 3:].max() <= 1):
    raise ValueError(f"{name}: colours from {array[:, 3:].min():g} to {array[:, 3:].max():g}, allowed are 0 to 1")
  low, high = array[:, :3].min(axis=0).astype(np.float64), array[:, :3].max(axis=0).astype(np.float64)
  size = float((high - low).max())
  if not size:
    raise ValueError(f"{name}: all {len(array)} points are one")
  if not SIZES[0] <= size <= SIZES[1]:
    raise ValueError(f"{name}: a cloud of size {size:g}; allowed are {SIZES[0]:g} to {SIZES[1]:g}")
  if max(np.abs(low).max(), np.abs(high).max()) <= FAR * size:
    return array.astype(np.float32)
  middle = (low + high) / 2
  step = float(np.spacing(np.abs(middle).max().astype(array.dtype))) if array.dtype.kind == "f" else 0.0
  lost = f"; its numbers are {array.dtype} and have steps of {step:g} there" if step > 1e-4 * size else ""
  remark("far origins", f"{name}: {size:.3g} large and far from its origin, which is moved to the middle, "
         f"({', '.join(f'{axis:.10g}' for axis in middle)}){lost}")  # fmt: skip
  moved = array.astype(np.float64)
  moved[:, :3] -= middle
  return moved.astype(np.float32)

"""Furniture meshes: OBJ files with their materials to triangles in one frame, and the colour of each triangle."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

_GREY = (180, 180, 180)
_TEXTURE = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Mesh:
  """Triangles centred on the middle of their box, whose diagonal is 2; y is up.

  Attributes:
    vertices: coordinates.
    faces: rows of vertices.
    colours: RGB of each face: its texture at the middle of the face, else its material's, else grey.
  """

  vertices: Float[np.ndarray, "v 3"]
  faces: Int[np.ndarray, "f 3"]
  colours: UInt8[np.ndarray, "f 3"]

  @functools.cached_property
  def normals(self) -> Float[np.ndarray, "f 3"]:
    """Unit normals of the faces; zero for a face without area."""
    a, b, c = (self.vertices[self.faces[:, i]] for i in range(3))
    normal = np.cross(b - a, c - a)
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    return np.divide(normal, length, out=np.zeros_like(normal), where=length > 0)

  def sample(self, count: int, seed: int) -> Float[np.ndarray, "p 3"]:
    """Points drawn evenly from the surface."""
    import trimesh

    return np.asarray(trimesh.sample.sample_surface(self._surface, count, seed=seed)[0])

  @functools.cached_property
  def _surface(self):
    import trimesh

    return trimesh.Trimesh(self.vertices, self.faces, process=False)


def read_mesh(path: Path) -> Mesh:
  """Reads an OBJ file with its materials and textures.

  Raises:
    ValueError: if there is no triangle with an extent, or the file cannot be read.
  """
  import trimesh

  try:
    scene = trimesh.load(path, force="scene", process=False)
    parts = [scene.geometry[name] for name in sorted(scene.geometry)]
  except (ValueError, TypeError, KeyError, IndexError, OSError) as error:
    raise ValueError(f"{path}: cannot be read as a mesh ({error})") from error
  parts = [part for part in parts if isinstance(part, trimesh.Trimesh) and len(part.faces)]
  if not parts:
    raise ValueError(f"{path}: no triangles")
  starts = np.cumsum([0, *(len(part.vertices) for part in parts[:-1])])
  vertices = np.concatenate([np.asarray(part.vertices, np.float64) for part in parts])
  faces = np.concatenate([np.asarray(part.faces, np.int64) + start for part, start in zip(parts, starts)])
  used = vertices[faces]
  low, high = used.min(axis=(0, 1)), used.max(axis=(0, 1))
  diagonal = np.linalg.norm(high - low)
  if not (np.isfinite(diagonal) and diagonal > 0):
    raise ValueError(f"{path}: no triangle with an extent")
  colours = np.concatenate([_face_colours(part) for part in parts])
  return Mesh((vertices - (low + high) / 2) * (2 / diagonal), faces, colours)


def _face_colours(part) -> np.ndarray:
  material = getattr(part.visual, "material", None)
  image, uv = getattr(material, "image", None), getattr(part.visual, "uv", None)
  if image is not None and uv is not None and len(uv) == len(part.vertices):
    texture = np.asarray(image.convert("RGB").resize((_TEXTURE, _TEXTURE), Image.Resampling.BICUBIC))
    middle = np.nan_to_num(np.asarray(uv)[part.faces].mean(axis=1)) % 1.0
    column, row = (np.minimum((share * _TEXTURE).astype(int), _TEXTURE - 1) for share in (middle[:, 0], middle[:, 1]))
    return texture[_TEXTURE - 1 - row, column]
  diffuse = getattr(material, "diffuse", None)
  colour = _GREY if diffuse is None else np.asarray(diffuse)[:3]
  return np.tile(np.asarray(colour, np.uint8), (len(part.faces), 1))

"""A z-buffer in numpy: which triangle each pixel of a pinhole camera sees, and how far away it is.

Exact at pixel centres, as one ray per pixel is, and the same on every machine, so that no ray tracer is needed.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

_CELLS = 1 << 20  # candidate pixels in memory at once


@dataclasses.dataclass(frozen=True)
class Camera:
  """A pinhole camera that looks at the origin; y is up.

  Attributes:
    azimuth: degrees about the y axis; 0 looks from +z, 90 from +x.
    elevation: degrees above the ground.
    distance: from the origin, in units of the scene.
    field: whole angle of view, degrees.
    size: side of the picture in pixels.
  """

  azimuth: float
  elevation: float = 18.0
  distance: float = 2.6
  field: float = 45.0
  size: int = 96

  @property
  def axes(self) -> Float[np.ndarray, "3 3"]:
    """Rows: to the right, up and forward."""
    azimuth, elevation = np.deg2rad([self.azimuth, self.elevation])
    across, high = np.cos(elevation), np.sin(elevation)
    forward = -np.array([across * np.sin(azimuth), high, across * np.cos(azimuth)])
    right = np.array([np.cos(azimuth), 0.0, -np.sin(azimuth)])
    return np.stack([right, np.cross(right, forward), forward])

  @property
  def eye(self) -> Float[np.ndarray, "3"]:
    """Position of the camera."""
    return -self.distance * self.axes[2]


def z_buffer(
  vertices: Float[np.ndarray, "v 3"], faces: Int[np.ndarray, "f 3"], camera: Camera
) -> tuple[Float[np.ndarray, "h w"], Int[np.ndarray, "h w"]]:
  """Depth along the camera's axis (infinite where nothing is hit) and the index of the triangle seen (-1 for none).

  Both sides of a triangle are visible; of two at the same depth the lower index wins.

  Args:
    vertices: in units of the scene; all of them in front of the camera.
    faces: triangles as rows of vertices.
    camera: the camera.

  Raises:
    ValueError: if a vertex that a triangle uses is not in front of the camera.
  """
  size = camera.size
  local = (vertices - camera.eye) @ camera.axes.T
  if len(faces) and local[:, 2][faces].min() <= 1e-6:
    raise ValueError("vertices: at least one lies behind the camera; the scene must be in front of it")
  focal = 0.5 * size / np.tan(np.deg2rad(camera.field) / 2)
  inverse = 1.0 / local[:, 2]
  # Pixel coordinates with the centre of the first pixel, top left, at (0, 0).
  column = (0.5 * size - 0.5 + focal * local[:, 0] * inverse)[faces]
  row = (0.5 * size - 0.5 - focal * local[:, 1] * inverse)[faces]
  first = np.ceil(np.maximum(np.stack([row.min(axis=1), column.min(axis=1)]), 0)).astype(np.int64)
  last = np.floor(np.minimum(np.stack([row.max(axis=1), column.max(axis=1)]), size - 1)).astype(np.int64)
  extent = last - first + 1
  area = _edge(column[:, 0], row[:, 0], column[:, 1], row[:, 1], column[:, 2], row[:, 2])
  visible = np.flatnonzero((extent > 0).all(axis=0) & (area != 0))
  depth, seen = np.full(size * size, np.inf), np.full(size * size, -1)
  # Triangles whose boxes have about the same shape are processed together.
  power = np.ceil(np.log2(extent[:, visible])).astype(int)
  for height, width in np.unique(power.T, axis=0):
    alike = visible[(power[0] == height) & (power[1] == width)]
    offsets = np.stack(np.meshgrid(np.arange(2**height), np.arange(2**width), indexing="ij")).reshape(2, -1)
    step = max(1, _CELLS // offsets.shape[1])
    for start in range(0, len(alike), step):
      chosen = alike[start : start + step]
      y, x = (first[:, chosen, None] + offsets[:, None]).astype(np.float64)
      columns, rows = column[chosen].T[:, :, None], row[chosen].T[:, :, None]
      shares = np.stack([
        _edge(x, y, columns[1], rows[1], columns[2], rows[2]),
        _edge(x, y, columns[2], rows[2], columns[0], rows[0]),
        _edge(x, y, columns[0], rows[0], columns[1], rows[1]),
      ]) / area[chosen, None]  # fmt: skip
      inside = (shares >= 0).all(axis=0) & (y < size) & (x < size)
      owner, _ = np.nonzero(inside)
      pixel = (y[inside] * size + x[inside]).astype(np.int64)
      # 1 / depth is linear on the picture.
      distance = 1.0 / np.einsum("cp,pc->p", shares[:, inside], inverse[faces[chosen[owner]]])
      _write(depth, seen, pixel, distance, chosen[owner])
  return depth.reshape(size, size), seen.reshape(size, size)


def _edge(ax: np.ndarray, ay: np.ndarray, bx: np.ndarray, by: np.ndarray, cx: np.ndarray, cy: np.ndarray) -> np.ndarray:
  """Twice the signed area of triangles a b c."""
  return (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)


def _write(depth: np.ndarray, seen: np.ndarray, pixel: np.ndarray, distance: np.ndarray, face: np.ndarray) -> None:
  """Enters candidates into the buffers, in place: the nearest wins, then the lowest index."""
  order = np.lexsort((face, distance, pixel))
  pixel, distance, face = pixel[order], distance[order], face[order]
  best = np.ones(len(pixel), bool)
  best[1:] = pixel[1:] != pixel[:-1]
  pixel, distance, face = pixel[best], distance[best], face[best]
  nearer = (distance < depth[pixel]) | ((distance == depth[pixel]) & (face < seen[pixel]))
  depth[pixel[nearer]], seen[pixel[nearer]] = distance[nearer], face[nearer]

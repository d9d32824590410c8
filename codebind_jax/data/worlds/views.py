"""What the sensors of world Household see of a mesh: colour, depth and simulated infrared of six views, and points."""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from codebind_jax.data.worlds import store
from codebind_jax.data.worlds.infrared import infrared, rule
from codebind_jax.data.worlds.meshes import Mesh, read_mesh
from codebind_jax.data.worlds.raster import Camera, z_buffer

AZIMUTHS = (-60, -35, -10, 20, 45, 160)
SIZE = 96
POINTS = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class View:
  """One picture of a mesh, in units of its frame (the diagonal of its box is 2).

  Attributes:
    depth: along the camera's axis; 0 where there is nothing.
    colour: RGB on white.
    height: of the surface seen, 0 at the foot of the object and 1 at its top; 0 where there is nothing.
    cosine: between the surface's normal and the line of sight, 0 to 1; 1 where there is nothing.
  """

  depth: Float[np.ndarray, "h w"]
  colour: UInt8[np.ndarray, "h w 3"]
  height: Float[np.ndarray, "h w"]
  cosine: Float[np.ndarray, "h w"]


def look(mesh: Mesh, camera: Camera) -> View:
  """Renders one view: flat faces, lit from between the camera and above."""
  depth, face = z_buffer(mesh.vertices, mesh.faces, camera)
  seen = face >= 0
  right, up, forward = camera.axes
  side = (np.arange(camera.size) + 0.5) / camera.size * 2 - 1
  side *= np.tan(np.deg2rad(camera.field) / 2)
  rays = forward + side[None, :, None] * right - side[:, None, None] * up
  where = camera.eye + np.where(seen, depth, 0.0)[..., None] * rays
  normal = np.where(seen[..., None], mesh.normals[face], 0.0)
  light = np.array([0.0, 1.0, 0.0]) - forward
  shade = 0.35 + 0.65 * np.abs(normal @ (light / np.linalg.norm(light)))
  colour = np.where(seen[..., None], mesh.colours[face] * shade[..., None], 255.0)
  cosine = np.abs((normal * rays).sum(axis=-1)) / np.linalg.norm(rays, axis=-1)
  used = mesh.vertices[mesh.faces][..., 1]
  height = (where[..., 1] - used.min()) / max(np.ptp(used), 1e-9)
  return View(
    np.where(seen, depth, 0.0), np.round(np.clip(colour, 0, 255)).astype(np.uint8),
    np.where(seen, np.clip(height, 0.0, 1.0), 0.0), np.where(seen, np.clip(cosine, 0.0, 1.0), 1.0),
  )  # fmt: skip


def sense(path: Path, key: str, name: str, cls: str | None, metres: float) -> list[dict[str, bytes]] | str:
  """All that the sensors give of one object, view by view, as the records' encoded fields.

  Each view has points of its own, sampled evenly from the whole surface.

  Args:
    path: its OBJ file.
    key: of the object.
    name: as catalogued.
    cls: its class, if it has one.
    metres: real length of a unit: half the diagonal of its box.

  Returns:
    A dictionary a view, or why the mesh cannot be used.
  """
  try:
    mesh = read_mesh(path)
  except ValueError as error:
    return str(error)
  warm, views = rule(name, cls), []
  for number, azimuth in enumerate(AZIMUTHS):
    view = look(mesh, Camera(float(azimuth), size=SIZE))
    heat = infrared(key, number, warm, view.depth > 0, view.height, view.cosine, view.colour)
    views.append({
      "image": store.encode_png(view.colour),
      "depth": store.encode((view.depth * metres).astype(np.float16)),
      "thermal": store.encode(heat.astype(np.float16)),
      "points": store.encode((mesh.sample(POINTS, number) * metres).astype(np.float32)),
    })
  return views

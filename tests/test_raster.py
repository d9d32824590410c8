"""The z-buffer against pictures worked out by hand and against a ray tracer of a few lines."""

import numpy as np
import pytest

from codebind_jax.data.worlds.raster import Camera, z_buffer

SQUARE = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], float)
HALVES = np.array([[0, 1, 2], [0, 2, 3]])
LEVEL = Camera(azimuth=0.0, elevation=0.0, distance=2.0, field=90.0, size=4)


def trace(vertices, faces, camera):
  """Moeller and Trumbore's test of every pixel's ray against every triangle."""
  side = ((np.arange(camera.size) + 0.5) / camera.size * 2 - 1) * np.tan(np.deg2rad(camera.field) / 2)
  right, up, forward = camera.axes
  depth, face = np.full((camera.size,) * 2, np.inf), np.full((camera.size,) * 2, -1)
  a, b, c = vertices[faces].transpose(1, 0, 2)
  for i in range(camera.size):
    for j in range(camera.size):
      ray = forward + side[j] * right - side[i] * up
      across = np.cross(ray, c - a)
      scale = 1.0 / ((b - a) * across).sum(axis=1)
      first = scale * ((camera.eye - a) * across).sum(axis=1)
      other = np.cross(camera.eye - a, b - a)
      second = scale * (other @ ray)
      distance = scale * ((c - a) * other).sum(axis=1)
      hit = np.flatnonzero((first >= 0) & (second >= 0) & (first + second <= 1))
      if hit.size:
        face[i, j] = hit[np.argmin(distance[hit])]
        depth[i, j] = distance[face[i, j]]
  return depth, face


def test_square_by_hand():
  # Focal length 2 pixels: the corners lie at 1.5 -+ 2 * 1 / 2, so the middle four pixels are covered.
  depth, face = z_buffer(SQUARE, HALVES, LEVEL)
  inside = np.zeros((4, 4), bool)
  inside[1:3, 1:3] = True
  np.testing.assert_array_equal(face >= 0, inside)
  np.testing.assert_allclose(depth[inside], 2.0)
  assert np.isinf(depth[~inside]).all()
  assert face[1, 1] == 1 and face[2, 2] == 0  # upper left and lower right half; the diagonal goes to the lower index
  assert face[1, 2] == 0 and face[2, 1] == 0


@pytest.mark.parametrize(("azimuth", "elevation", "where"), [
  (0.0, 0.0, (0, 0, 2)), (90.0, 0.0, (2, 0, 0)), (0.0, 90.0, (0, 2, 0))])
def test_camera_stands_where_it_says(azimuth, elevation, where):
  camera = Camera(azimuth, elevation, distance=2.0)
  np.testing.assert_allclose(camera.eye, where, atol=1e-12)
  np.testing.assert_allclose(camera.axes @ camera.axes.T, np.eye(3), atol=1e-12)


def test_up_is_up_and_right_is_right():
  small = 0.6 * SQUARE
  for shift, half in (((0.5, 0, 0), np.s_[:, 2:]), ((0, 0.5, 0), np.s_[:2])):
    seen = z_buffer(small + shift, HALVES, LEVEL)[1] >= 0
    assert seen.any() and seen[half].sum() == seen.sum()


def test_nearest_triangle_wins_then_the_lowest_index():
  near = SQUARE + [0, 0, 0.5]
  vertices, faces = np.concatenate([SQUARE, near, near]), np.concatenate([HALVES, HALVES + 4, HALVES + 8])
  depth, face = z_buffer(vertices, faces, LEVEL)
  assert set(face[face >= 0]) == {2, 3}
  np.testing.assert_allclose(depth[face >= 0], 1.5)


@pytest.mark.parametrize("reach", [0.25, 1.0])  # small triangles and large ones
def test_agrees_with_a_ray_tracer(reach):
  rng = np.random.default_rng(0)
  corners = rng.uniform(-1, 1, (60, 1, 3)) + reach * rng.uniform(-1, 1, (60, 3, 3))
  vertices, faces = corners.reshape(-1, 3), np.arange(180).reshape(-1, 3)
  camera = Camera(azimuth=25.0, distance=4.0, field=40.0, size=20)
  depth, face = z_buffer(vertices, faces, camera)
  traced, owner = trace(vertices, faces, camera)
  np.testing.assert_array_equal(face, owner)
  assert (face >= 0).sum() > 20
  np.testing.assert_allclose(depth, traced, rtol=1e-9)


def test_nothing_to_see():
  depth, face = z_buffer(SQUARE, np.zeros((0, 3), int), LEVEL)
  assert np.isinf(depth).all() and (face == -1).all()
  beside = z_buffer(SQUARE + [50, 0, 0], HALVES, LEVEL)[1]
  assert (beside == -1).all()


def test_behind_the_camera_is_refused():
  with pytest.raises(ValueError, match="behind the camera"):
    z_buffer(SQUARE + [0, 0, 3], HALVES, LEVEL)

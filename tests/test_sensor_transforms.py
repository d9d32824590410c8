"""Depth, thermal, tactile and points: every kind of file to the same array, and refusals of what only looks right."""

import io

import numpy as np
import pytest
from PIL import Image

from codebind_jax.data import transforms
from codebind_jax.data.opening import check_item
from codebind_jax.data.transforms import depth, points, tactile, thermal

METRES = np.array([[0.0, 0.5, 1.25], [2.0, 3.75, 0.0]], np.float32)


def encoded(array, kind="PNG"):
  out = io.BytesIO()
  Image.fromarray(array).save(out, kind)
  return out.getvalue()


def test_all_are_found_by_name():
  assert {"depth", "thermal", "tactile", "points"} <= set(transforms.readable())


def test_depth_of_every_kind_of_file(tmp_path):
  deep = (METRES * 1000).astype(np.uint16)
  (tmp_path / "a.png").write_bytes(encoded(deep))
  (tmp_path / "b.tiff").write_bytes(encoded(deep, "TIFF"))
  np.save(tmp_path / "c.npy", METRES)
  np.save(tmp_path / "d.npy", np.where(METRES > 0, METRES, np.inf))
  np.save(tmp_path / "e.npy", np.where(METRES > 0, METRES, np.nan).astype(np.float64))
  np.savez(tmp_path / "f.npz", depth=deep)
  # Focal length 400 pixels, baseline 0.05 m.
  with np.errstate(divide="ignore"):
    np.savez(tmp_path / "g.npz", disparity=np.where(METRES > 0, 20.0 / METRES, 0.0), scale=20.0)
  for path in sorted(tmp_path.iterdir()):
    check_item("depth", path)
    for value in (path, str(path), path.read_bytes()):
      got = depth.read(value)
      assert got.dtype == np.float32
      np.testing.assert_allclose(got, METRES, rtol=1e-6)
  np.testing.assert_allclose(depth.read(METRES[..., None].astype(np.float16)), METRES, rtol=1e-3)
  np.testing.assert_allclose(depth.read(deep), METRES, rtol=1e-6)


@pytest.mark.parametrize(("value", "says"), [
  (METRES.astype(np.uint8), "uint8, which is a picture of depth"), (METRES * 1000, "values from 0 to 3750 m"),
  (-METRES, "values from -3.75"), (0 * METRES, "no return at all"), (METRES[0], r"shape \(3,\)"),
  (METRES > 0, "type bool"), (b"odd", "depth bytes: not a readable depth map"), (3, "got int")])
def test_depth_refuses(value, says):
  with pytest.raises(ValueError, match=says):
    depth.read(value)


def test_depth_refuses_files_by_name(tmp_path):
  (tmp_path / "a.png").write_bytes(encoded(np.zeros((4, 4), np.uint8)))
  np.savez(tmp_path / "b.npz", other=METRES)
  whys = {"a.png": "a picture of depth is no depth", "b.npz": "needed is depth or disparity", "c.npy": "no such"}
  for name, says in whys.items():
    with pytest.raises(ValueError, match=f"{name}: .*{says}"):
      depth.read(tmp_path / name)


def test_depth_picture_does_not_know_the_scenes_size():
  picture = depth.to_picture(METRES)
  np.testing.assert_array_equal(picture, depth.to_picture(METRES * 7))
  # Median 1.625: 0.5, 1.25, 2.0 and 3.75 m become 0.754, 1.885, 3.015 and 5.654.
  assert picture[..., 0].tolist() == [[0, 255, 218], [74, 1, 0]]
  assert (picture == picture[..., :1]).all()


CELSIUS = np.array([[15.0, 21.25, 36.5], [-10.0, 40.0, 90.0]])


def test_thermal_of_every_kind_of_file(tmp_path):
  raw = np.round((CELSIUS + 273.15) * 100).astype(np.uint16)
  (tmp_path / "a.png").write_bytes(encoded(raw))
  (tmp_path / "b.tiff").write_bytes(encoded(raw, "TIFF"))
  np.save(tmp_path / "c.npy", CELSIUS)
  (tmp_path / "d.tiff").write_bytes(encoded(CELSIUS.astype(np.float32), "TIFF"))
  for path in sorted(tmp_path.iterdir()):
    check_item("thermal", path)
    for value in (path, path.read_bytes()):
      got = thermal.read(value)
      assert got.dtype == np.float32
      np.testing.assert_allclose(got, CELSIUS, atol=1e-4)
  np.testing.assert_allclose(thermal.read(raw), CELSIUS, atol=1e-4)
  coarse = np.round((CELSIUS + 273.15) * 10).astype(np.uint16)
  np.testing.assert_allclose(thermal.read(coarse, scale=0.1), CELSIUS, atol=0.051)


def test_thermal_grey_takes_its_range_from_the_caller():
  grey = np.array([[0, 51, 255]], np.uint8)
  np.testing.assert_allclose(thermal.read(encoded(grey)), [[15, 21, 45]], rtol=1e-6)
  thrice = np.repeat(grey[..., None], 3, axis=-1)
  np.testing.assert_allclose(thermal.read(thrice, span=(-20.0, 80.0)), [[-20, 0, 80]], atol=1e-5)


@pytest.mark.parametrize(("value", "says"), [
  (CELSIUS + 273.15, "look like kelvin"), (CELSIUS * 100, "is the unit right"), (CELSIUS[0], r"shape \(3,\)"),
  (np.array([[np.nan]]), "not finite"), (np.full((2, 2), 300, np.uint16), "-270.15"), (b"odd", "not a readable"),
  (np.arange(12, dtype=np.uint8).reshape(2, 2, 3), "false colours"), (None, "got NoneType")])
def test_thermal_refuses(value, says):
  with pytest.raises(ValueError, match=says):
    thermal.read(value)


def test_thermal_picture():
  picture = thermal.to_picture(np.array([[10.0, 15.0, 30.0, 45.0, 99.0]]))
  assert picture[0, :, 0].tolist() == [0, 0, 127, 255, 255] and picture.shape == (1, 5, 3)
  assert thermal.to_picture(np.array([[50.0]]), (0.0, 100.0))[0, 0].tolist() == [127] * 3


def test_tactile_is_a_colour_picture(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3)).astype(np.uint8)
  path = tmp_path / "touch.png"
  path.write_bytes(encoded(pixels))
  check_item("tactile", path)
  for value in (path, path.read_bytes(), pixels):
    np.testing.assert_array_equal(tactile.read(value), pixels)
  (tmp_path / "grey.png").write_bytes(encoded(pixels[..., 0]))
  with pytest.raises(ValueError, match="grey.png: all pixels are grey"):
    tactile.read(tmp_path / "grey.png")
  with pytest.raises(ValueError, match="tactile: got an array of shape"):
    tactile.read(np.zeros((2, 2, 7), np.uint8))


CORNERS = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], np.float32)
PLY = """ply
format ascii 1.0
element vertex 4
property float x
property float y
property float z
property uchar red
property uchar green
property uchar blue
end_header
""" + "".join(f"{x:g} {y:g} {z:g} 255 0 51\n" for x, y, z in CORNERS)
OFF = "OFF\n4 2 0\n" + "".join(f"{x:g} {y:g} {z:g}\n" for x, y, z in CORNERS) + "3 0 1 2\n3 0 2 3\n"
OBJ = "".join(f"v {x:g} {y:g} {z:g}\n" for x, y, z in CORNERS) + "f 1 2 3\nf 1 3 4\n"


def test_clouds_are_read_as_they_are(tmp_path):
  np.save(tmp_path / "a.npy", CORNERS.astype(np.float64))
  (tmp_path / "b.ply").write_text(PLY)
  for value in (tmp_path / "a.npy", (tmp_path / "a.npy").read_bytes(), CORNERS):
    np.testing.assert_array_equal(points.read(value), CORNERS)
  check_item("points", tmp_path / "b.ply")
  coloured = np.c_[CORNERS, np.tile([1.0, 0.0, 0.2], (4, 1))]
  np.testing.assert_allclose(points.read(tmp_path / "b.ply"), coloured, rtol=1e-6)


@pytest.mark.parametrize(("name", "text"), [("a.off", OFF), ("a.obj", OBJ)])
def test_meshes_are_sampled_evenly(tmp_path, name, text):
  (tmp_path / name).write_text(text)
  got = points.read(tmp_path / name)
  assert got.shape == (1024, 3) and got.dtype == np.float32 and not got[:, 2].any()
  np.testing.assert_allclose(got.mean(axis=0), [0.5, 0.5, 0], atol=0.05)
  assert got.min() >= 0 and got.max() <= 1
  np.testing.assert_array_equal(got, points.read((tmp_path / name).read_bytes()))


@pytest.mark.parametrize(("value", "says"), [
  (CORNERS[:, :2], r"shape \(4, 2\)"), (CORNERS * np.nan, "not finite"), (np.ones((5, 3)), "all 5 points are one"),
  (np.c_[CORNERS, 255 * CORNERS], "colours from 0 to 255"), (CORNERS[:0], r"shape \(0, 3\)"),
  ("none.ply", "no such file"), (b"odd", "not a readable cloud"), ([], "got list")])
def test_points_refuse(value, says):
  with pytest.raises(ValueError, match=says):
    points.read(value)

"""Depth, thermal and tactile files as people have them: units, turns, many bits; what is ambiguous refused by name."""

import io
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from codebind_jax.data.opening import check_item
from codebind_jax.data.preparation import imagebind, languagebind
from codebind_jax.data.transforms import audio, depth, eeg, points, tactile, thermal, video
from tests.picture_fixtures import encoded, grey16, png, tiff, turned

METRES = np.array([[0.0, 0.5, 1.25], [2.0, 3.75, 0.0]])
MILLIMETRES = (METRES * 1000).astype(np.uint16)
CELSIUS = np.array([[15.0, 21.25, 36.5], [-10.0, 40.0, 90.0]])
HUNDREDTHS = np.round((CELSIUS + 273.15) * 100).astype(np.uint16)
GREY = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (16, 1))


def saved(array, **more):
  out = io.BytesIO()
  np.savez(out, **array, **more) if isinstance(array, dict) else np.save(out, array)
  return out.getvalue()


DEPTHS = {
  "float TIFF": tiff(METRES, 32, 3), "float TIFF, big end first": tiff(METRES, 32, 3, order=">"),
  "double TIFF": tiff(METRES, 64, 3), "half TIFF": tiff(METRES, 16, 3),
  "16-bit TIFF": tiff(MILLIMETRES, 16, 1), "16-bit TIFF, big end first": tiff(MILLIMETRES, 16, 1, order=">"),
  "32-bit TIFF": tiff(MILLIMETRES, 32, 1), "signed 16-bit TIFF": tiff(MILLIMETRES, 16, 2),
  "16-bit PNG": grey16(MILLIMETRES), "16-bit PGM": b"P5 3 2 65535\n" + MILLIMETRES.astype(">u2").tobytes(),
  "float .npy": saved(METRES), "float .npy, big end first": saved(METRES.astype(">f8")),
  "by columns": saved(np.asfortranarray(METRES)), ".npz of millimetres": saved({"depth": MILLIMETRES, "other": METRES}),
  "disparity, scale as an array of one": saved(
    {"disparity": np.divide(20.0, METRES, out=0 * METRES, where=METRES > 0), "scale": np.array([20.0])}),
  "the largest of 16 bits": grey16(np.where(MILLIMETRES == 0, 65535, MILLIMETRES)),
  "NaN and infinity": tiff(np.array([[np.nan, 0.5, 1.25], [2.0, 3.75, np.inf]]), 32, 3),
  "a preview first": tiff(MILLIMETRES, 16, 1, pages=2, preview=True),
}  # fmt: skip


@pytest.mark.parametrize("kind", DEPTHS)
def test_depth_in_metres_of_every_kind_of_file(kind):
  got = depth.read(DEPTHS[kind])
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, METRES, rtol=1e-3 if "half" in kind else 1e-6)


def turned_files(values, wide, floats):
  yield turned(Image.fromarray(wide), "PNG"), values
  for order in "<>":
    yield tiff(wide, 16, 1, order=order, turn=6), values
    yield tiff(floats, 32, 3, order=order, turn=6), values
    yield tiff(floats, 64, 3, order=order, turn=6), values


def test_the_camera_turn_of_depth_and_thermal_pictures():
  for content, want in turned_files(np.rot90(METRES, -1), MILLIMETRES, METRES):
    np.testing.assert_allclose(depth.read(content), want, rtol=1e-6)
  for content, want in turned_files(np.rot90(CELSIUS, -1), HUNDREDTHS, CELSIUS):
    np.testing.assert_allclose(thermal.read(content), want, atol=1e-4)
  for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
    got = thermal.read(turned(GREY, kind) if kind != "WEBP" else turned(np.dstack([GREY] * 3), kind))
    assert got.shape == (24, 16) and abs(got[0, 0] - 15.0) < 1 and abs(got[-1, 0] - 15 - 230 / 255 * 30) < 1
    assert imagebind.grey(turned(GREY, "PNG")).shape == (24, 16)
    assert languagebind.thermal_picture(turned(GREY, "PNG")).shape == (24, 16, 3)
  colours = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
  np.testing.assert_array_equal(tactile.read(turned(colours, "PNG")), np.rot90(colours, -1))


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_tiff_of_doubles_is_turned_as_pillow_turns_one_of_floats(turn):
  np.testing.assert_allclose(depth.read(tiff(METRES, 64, 3, turn=turn)), depth.read(tiff(METRES, 32, 3, turn=turn)))


REFUSED = {
  "millimetres as floats": (depth, tiff(MILLIMETRES // 4, 32, 3), "look like millimetres"),
  "PFM": (depth, b"Pf\n3 2\n-1.0\n" + METRES.astype("<f4").tobytes(), "do not say their unit"),
  "PGM of 12 bits": (depth, b"P5 3 2 4095\n" + MILLIMETRES.astype(">u2").tobytes(), "do not say their unit"),
  "pages": (depth, tiff(MILLIMETRES, 16, 1, pages=3), "it holds 3 pictures"),
  "pages of doubles": (depth, tiff(METRES, 64, 3, pages=2), "several pictures"),
  "8-bit": (depth, encoded(GREY, "JPEG"), "its pixels are L, a picture of depth is no depth"),
  "16-bit RGB": (depth, png(2, 1, 16, 2, [bytes(12)]), "its pixels are RGB"),
  "a hole": (depth, grey16(MILLIMETRES, (b"tRNS", struct.pack(">H", 0))), "transparent pixels"),
  "scale of two": (depth, saved({"disparity": METRES, "scale": np.ones(2)}), "scale has shape .2,."),
  "scale of zero": (depth, saved({"disparity": METRES, "scale": 0.0}), "one number above 0"),
  "depth and scale": (depth, saved({"depth": MILLIMETRES, "scale": 0.001}), "holds depth and scale"),
  "depth and disparity": (depth, saved({"depth": METRES, "disparity": METRES, "scale": 1.0}),
                          "holds depth and disparity and scale"),
  "no scale": (depth, saved({"disparity": METRES}), "has no scale"),
  "objects": (depth, saved(np.array([{}], object)), "an array of Python objects"),
  "OpenEXR": (depth, b"v/1\x01" + bytes(60), "it is OpenEXR"),
  "false colours": (thermal, encoded(np.dstack([GREY, GREY[:, ::-1], GREY]), "PNG"), "false colours"),
  "16 bits and alpha": (thermal, png(2, 1, 16, 4, [bytes([110, 0, 255, 255] * 2)]), "of which 8 bits would be left"),
  "16-bit RGB thermal": (thermal, png(2, 1, 16, 2, [bytes([110] * 12)]), "of which 8 bits would be left"),
  "transparent": (thermal, encoded(np.dstack([GREY, GREY]), "PNG"), "transparent pixels"),
  "a hole in 16 bits": (thermal, grey16(HUNDREDTHS, (b"tRNS", struct.pack(">H", 1))), "transparent pixels"),
  "NaN": (thermal, saved(np.where(CELSIUS == 90, np.nan, CELSIUS)), "1 of 6 values are not finite"),
  "kelvin": (thermal, tiff(CELSIUS + 273.15, 32, 3), "look like kelvin"),
  "kelvin with a hot spot": (thermal, saved(np.append(CELSIUS + 273.15, [[900.0] * 3], 0)), "look like kelvin"),
  "kelvin with a dead spot": (thermal, saved(np.append(CELSIUS + 273.15, [[0.0, 290, 290]], 0)), "look like kelvin"),
  "scaled to 0 to 1": (thermal, tiff(GREY / 240, 32, 3), "look scaled to 0 to 1"),
  "thermal pages": (thermal, tiff(HUNDREDTHS, 16, 1, pages=2), "it holds 2 pictures"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_ambiguous_is_refused_by_name(kind, tmp_path):
  module, content, says = REFUSED[kind]
  path = tmp_path / "a file"
  path.write_bytes(content)
  for value, name in ((path, str(path)), (content, f"{module.__name__.rpartition('.')[2]} bytes")):
    with pytest.raises(ValueError, match=says) as caught:
      module.read(value)
    assert str(caught.value).startswith(f"{name}: ")
  with pytest.raises(ValueError, match=says):
    check_item(module.__name__.rpartition(".")[2], path)


def test_a_flir_camera_s_own_jpeg_is_refused_by_thermal():
  content = encoded(GREY, "JPEG")
  marker = b"\xff\xe1" + struct.pack(">H", 2 + 8) + b"FLIR\0\1\0\0"
  with pytest.raises(ValueError, match="a FLIR camera's JPEG"):
    thermal.read(content[:2] + marker + content[2:])


def test_grey_with_the_noise_of_a_jpeg_is_a_temperature():
  rng = np.random.default_rng(0)
  noisy = np.clip(np.dstack([GREY] * 3) + rng.integers(-3, 4, (*GREY.shape, 3)), 0, 255).astype(np.uint8)
  content = encoded(noisy, "JPEG", quality=95, subsampling=0)
  with Image.open(io.BytesIO(content)) as picture:
    assert (np.asarray(picture) != np.asarray(picture)[..., :1]).any()
  np.testing.assert_allclose(thermal.read(content), thermal.read(GREY), atol=1.0)
  assert np.abs(imagebind.grey(content).astype(int) - GREY).max() < 9
  with pytest.raises(ValueError, match="false colours"):
    imagebind.grey(encoded(np.dstack([GREY, GREY[:, ::-1], GREY]), "PNG"))


def header(shape, dtype="<f8"):
  text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
  return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode()


def zipped(name, content, method=zipfile.ZIP_DEFLATED):
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w", method) as archive:
    archive.writestr(name, content)
  return out.getvalue()


@pytest.mark.parametrize("shape", [(2**19, 2**19), (20_000, 20_000), (-1, 5), (2**40, 2**40), (3, 2**62)])
def test_memory_is_not_taken_for_what_a_header_promises(shape):
  for content in (header(shape) + bytes(64), zipped("depth.npy", header(shape) + bytes(64))):
    with pytest.raises(ValueError, match="depth bytes: not a readable depth map"):
      depth.read(content)
  with pytest.raises(ValueError, match="thermal bytes: not a readable thermal image"):
    thermal.read(header(shape) + bytes(64))


def test_a_small_zip_of_much_is_not_unpacked(monkeypatch):
  content = zipped("depth.npy", header((9_000, 9_000)) + bytes(8 * 10**6))
  assert len(content) < 20_000
  monkeypatch.setattr("numpy.frombuffer", None)
  with pytest.raises(ValueError, match="allowed are 67108864 values"):
    depth.read(content)
  with pytest.raises(ValueError, match="but the file has"):
    depth.read(zipped("depth.npy", header((8_000, 8_000)) + bytes(10**6)))


def test_every_error_of_a_damaged_array_names_it(tmp_path):
  rng = np.random.default_rng(0)
  contents = [saved(METRES), saved({"depth": METRES}), zipped("depth.npy", saved(METRES)),
              zipped("depth.npy", saved(METRES), zipfile.ZIP_LZMA), grey16(MILLIMETRES), tiff(METRES, 64, 3),
              tiff(METRES, 32, 3)]  # fmt: skip
  for number, content in enumerate(contents):
    damaged = [content[:cut] for cut in rng.integers(0, len(content), 8)]
    for _ in range(12):
      changed = bytearray(content)
      for at in rng.integers(0, len(content), 3):
        changed[at] = rng.integers(256)
      damaged.append(bytes(changed))
    for module in (depth, thermal):
      for one in damaged:
        path = tmp_path / f"{number}.npz"
        path.write_bytes(one)
        try:
          module.read(path)
        except ValueError as error:
          assert str(error).startswith(f"{path}: ")


def test_pil_images_are_read_as_their_files():
  with Image.open(io.BytesIO(turned(Image.fromarray(MILLIMETRES), "PNG"))) as picture:
    np.testing.assert_allclose(depth.read(picture), np.rot90(METRES, -1), rtol=1e-6)
  np.testing.assert_allclose(thermal.read(Image.fromarray(CELSIUS.astype(np.float32))), CELSIUS, rtol=1e-6)
  with pytest.raises(ValueError, match="depth: not a readable depth map.*its pixels are RGB"):
    depth.read(Image.new("RGB", (4, 4)))


def test_masked_pixels_are_no_return_and_no_temperature():
  hidden = METRES == 3.75
  for values in (METRES, MILLIMETRES):
    np.testing.assert_allclose(depth.read(np.ma.masked_array(values, hidden)), np.where(hidden, 0, METRES))
    np.testing.assert_allclose(depth.read(np.ma.masked_array(values)), METRES)
  with pytest.raises(ValueError, match="^thermal: 1 of 6 values are masked"):
    thermal.read(np.ma.masked_array(CELSIUS, hidden))
  np.testing.assert_allclose(thermal.read(np.ma.masked_array(CELSIUS)), CELSIUS)


@pytest.mark.parametrize(("module", "values"), [
  (audio, np.linspace(-0.5, 0.5, 4000)), (eeg, np.random.default_rng(0).standard_normal((4, 600)) * 20),
  (points, np.random.default_rng(0).standard_normal((50, 3))),
  (tactile, np.arange(48, dtype=np.uint8).reshape(4, 4, 3)),
  (video, np.zeros((3, 8, 8, 3), np.uint8))], ids=lambda x: getattr(x, "__name__", "").rpartition(".")[2])  # fmt: skip
def test_masked_values_are_refused_and_an_empty_mask_is_none(module, values):
  kind = module.__name__.rpartition(".")[2]
  mask = np.arange(values.size).reshape(values.shape) == 5
  with pytest.raises(ValueError, match=f"^{kind}: 1 of {values.size} values are masked"):
    module.read(np.ma.masked_array(values, mask))
  if module is not tactile:
    np.testing.assert_array_equal(module.read(np.ma.masked_array(values)), module.read(values))


def test_hot_spots_and_ice_are_degrees():
  for values in (np.append(CELSIUS, [[300.0, 350, 390]], 0), np.array([[-0.5, 0.5], [0.25, 1.5]])):
    np.testing.assert_allclose(thermal.read(values), values, rtol=1e-6)


def test_saturated_thermal_pixels_are_said(tmp_path, caplog):
  for content in (HUNDREDTHS, np.where(HUNDREDTHS == HUNDREDTHS.max(), 65535, HUNDREDTHS)):
    (tmp_path / "a.png").write_bytes(grey16(content))
    with caplog.at_level("WARNING"):
      got = thermal.read(tmp_path / "a.png")
  assert got.max() == pytest.approx(65535 / 100 - 273.15)
  assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
    f"{tmp_path / 'a.png'}: 1 of 6 values are 65535"]  # fmt: skip

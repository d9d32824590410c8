"""Picture files as people have them: every mode, container and turn to the right pixels; damage refused by name."""

import struct
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms

from codebind_jax.data import reading
from codebind_jax.data.opening import check_item
from codebind_jax.data.preparation import imagebind, languagebind, pictures
from codebind_jax.data.transforms import image, tactile
from tests.picture_fixtures import encoded, grey16, png, tiff, turned, twelve_bits

pytestmark = pytest.mark.usefixtures("quick_compiler")

GREY = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (24, 1))
RGB = np.dstack([GREY, GREY[:, ::-1], np.full_like(GREY, 128)])
THRICE = np.dstack([GREY] * 3)


def on_white(pixels, alpha):
  share = alpha[..., None] / 255
  return pixels * share + 255 * (1 - share)


def palette_with_holes():
  """A PNG with a palette of which the first entry is transparent and the second half so."""
  rows = [bytes([0, 1, 2])]
  return png(3, 1, 8, 3, rows, (b"PLTE", bytes([9, 9, 9, 0, 0, 255, 0, 255, 0])), (b"tRNS", bytes([0, 128])))


WIDE = lambda x: x.astype(np.uint16) * 257
DEEP_RGB = lambda *chunks: png(32, 24, 16, 2, [row.astype(">u2").tobytes() for row in WIDE(RGB)], *chunks)
LAB = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
KINDS = {
  "CMYK JPEG": (lambda: encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95), RGB),
  "CMYK TIFF": (lambda: encoded(Image.fromarray(RGB).convert("CMYK"), "TIFF"), RGB),
  "LAB TIFF": (lambda: encoded(ImageCms.applyTransform(Image.fromarray(RGB), LAB), "TIFF"), RGB),
  "JPEG 2000": (lambda: encoded(RGB, "JPEG2000"), RGB),
  "16-bit RGB": (DEEP_RGB, RGB),
  "16-bit grey": (lambda: grey16(WIDE(GREY)), THRICE),
  "16-bit grey TIFF, big end first": (lambda: tiff(WIDE(GREY), 16, 1, order=">"), THRICE),
  "16-bit grey TIFF, 0 is white": (lambda: tiff(65535 - WIDE(GREY), 16, 1, photometric=0), THRICE),
  "8-bit grey TIFF, 0 is white": (lambda: tiff(255 - GREY, 8, 1, photometric=0), THRICE),
  "12-bit TIFF": (lambda: twelve_bits(GREY.astype(int) * 16 + 8), THRICE),
  "float TIFF": (lambda: tiff(GREY / 255, 32, 3), THRICE),
  "float TIFF, big end first": (lambda: tiff(GREY / 255, 32, 3, order=">"), THRICE),
  "double TIFF": (lambda: tiff(GREY / 255, 64, 3), THRICE),
  "half TIFF": (lambda: tiff(GREY / 255, 16, 3), THRICE),
  "float RGB TIFF": (lambda: tiff(RGB / 255, 32, 3, photometric=2), RGB),
  "16-bit PGM": (lambda: b"P5 32 24 65535\n" + WIDE(GREY).astype(">u2").tobytes(), THRICE),
  "10-bit PGM": (lambda: b"P5 32 24 1023\n" + (GREY * (1023 / 255)).round().astype(">u2").tobytes(), THRICE),
  "bilevel": (lambda: encoded(Image.fromarray(GREY > 127), "PNG"), np.where(THRICE > 127, 255, 0)),
  "grey, 0 transparent": (lambda: encoded(GREY, "PNG", transparency=0), np.where(THRICE == 0, 255, THRICE)),
  "16-bit grey, 0 transparent": (
    lambda: grey16(WIDE(GREY), (b"tRNS", struct.pack(">H", 0))), np.where(THRICE == 0, 255, THRICE)),
  "4-bit grey, 5 transparent": (
    lambda: png(4, 1, 4, 0, [bytes([0x05, 0xAF])], (b"tRNS", struct.pack(">H", 5))), [[[0] * 3, [255] * 3, [170] * 3,
                                                                                       [255] * 3]]),
  "2-bit grey, 1 transparent": (
    lambda: png(4, 1, 2, 0, [bytes([0b00011011])], (b"tRNS", struct.pack(">H", 1))), [[[0] * 3, [255] * 3, [170] * 3,
                                                                                       [255] * 3]]),
  "16-bit RGB, one colour transparent": (
    lambda: png(2, 1, 16, 2, [struct.pack(">6H", 65535, 0, 0, 0, 65535, 0)],
                (b"tRNS", struct.pack(">3H", 65535, 0, 0))),
    [[[255] * 3, [0, 255, 0]]]),
  "palette with holes": (palette_with_holes, [[[255] * 3, [127, 127, 255], [0, 255, 0]]]),
  "RGBA": (lambda: encoded(np.dstack([RGB, GREY]), "PNG"), on_white(RGB, GREY)),
  "16-bit RGBA": (
    lambda: png(32, 24, 16, 6, [row.astype(">u2").tobytes() for row in WIDE(np.dstack([RGB, GREY]))]),
    on_white(RGB, GREY)),
  "grey and alpha": (lambda: encoded(np.dstack([GREY, GREY]), "PNG"), on_white(THRICE, GREY)),
  "GIF with a hole": (lambda: encoded(GREY, "GIF", transparency=0), np.where(THRICE == 0, 255, THRICE)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_its_colours(kind):
  make, want = KINDS[kind]
  got = image.read(make())
  assert got.dtype == np.uint8 and got.shape == np.shape(want)
  assert np.abs(got.astype(float) - np.asarray(want, float)).mean() < 2.5


@pytest.mark.parametrize("mode", ["HSV", "YCbCr", "CMYK", "RGBa", "La", "RGBX", "PA"])
def test_every_mode_of_a_pil_image_is_read(mode):
  through = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode, "RGB")
  grey = mode == "La"
  picture = Image.fromarray(GREY if grey else RGB).convert(through).convert(mode)
  want = np.asarray(Image.fromarray(RGB).convert("P").convert("RGB")) if mode == "PA" else THRICE if grey else RGB
  assert np.abs(image.read(picture).astype(int) - want).mean() < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "MPO"])
@pytest.mark.parametrize("turn", range(2, 9))
def test_the_camera_turn_of_every_container(kind, turn):
  undo = {2: lambda x: x[:, ::-1], 3: lambda x: np.rot90(x, 2), 4: lambda x: x[::-1], 5: lambda x: x.swapaxes(0, 1),
          6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}  # fmt: skip
  smooth = RGB.copy()
  smooth[:12, :8] = 255
  if kind == "MPO":  # a phone's picture with a second one beside it
    exif = Image.Exif()
    exif[0x0112] = turn
    second = Image.new("RGB", (8, 8))
    content = encoded(smooth, "MPO", save_all=True, append_images=[second], exif=exif)
  else:
    content = turned(smooth, kind, turn)
  got, want = image.read(content), undo[turn](smooth)
  assert got.shape == want.shape and np.abs(got.astype(int) - want).mean() < 8


def test_a_turn_that_cannot_be_read_is_said_and_the_picture_taken(caplog):
  broken = turned(RGB, "WEBP")
  at = broken.find(b"Exif\0\0") + 6 if b"Exif\0\0" in broken else broken.find(b"EXIF") + 8
  content = broken[:at] + b"zz" + broken[at + 2 :]
  with caplog.at_level("WARNING"):
    assert image.read(content).shape == (24, 32, 3)
  assert "EXIF" in caplog.text


@pytest.mark.parametrize(("content", "says"), [
  (tiff(GREY.astype(np.int32), 32, 2), "32-bit or signed"), (tiff(GREY, 16, 2), "32-bit or signed"),
  (grey16(GREY[:, :20]), "would be black"), (tiff(GREY * 1.0, 32, 3), "lie in 0 to 1; got 0 to 255"),
  (tiff(GREY * 1.0, 64, 3), "lie in 0 to 1"), (tiff(np.full((2, 2), np.nan), 32, 3), "must be finite"),
  (tiff(GREY, 32, 1), "signed integers|type uint32"), (tiff(GREY / 255, 64, 3)[:400], "cut: "),
  (b"", "image bytes: not a readable image"), (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
  (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"), (b"<svg xmlns='x'/>", "SVG"), (b"%PDF-1.4", "PDF"),
  (b"v/1\x01" + bytes(40), "OpenEXR"), (b"\x00\x00\x01\xb3" + bytes(40), "cannot identify"),
  (encoded(RGB, "PCX"), "allowed are JPEG, PNG"), (encoded(RGB, "TGA"), "allowed are JPEG, PNG")])  # fmt: skip
def test_what_has_no_known_range_or_format_is_refused_by_name(content, says, tmp_path):
  path = tmp_path / "a.png"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=says):
    image.read(content)
  with pytest.raises(ValueError, match=f"^{path}: ") as caught:
    image.read(path)
  assert "not a readable image" in str(caught.value) or "pixels" in str(caught.value) or "floats" in str(caught.value)


def test_an_eps_never_starts_ghostscript(tmp_path, monkeypatch):
  path = tmp_path / "a.png"
  path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
  monkeypatch.setattr("subprocess.Popen", None)
  for look in (image.read, image.check, tactile.read):
    with pytest.raises(ValueError, match="a.png: not a readable image .it is PostScript; allowed are JPEG, PNG"):
      look(path)


def bomb(width, height):
  return png(width, height, 8, 2, [])


@pytest.mark.parametrize("size", [(60_000, 60_000), (13_000, 13_800), (2, 200_000), (2**31 - 1, 2**31 - 1)])
def test_a_header_is_not_believed(size, tmp_path, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as other programs do
  (tmp_path / "bomb.png").write_bytes(bomb(*size))
  with pytest.raises(ValueError, match="bomb.png: not a readable image .*allowed are|bomb.png: not a readable image"):
    image.read(tmp_path / "bomb.png")


def test_a_warning_of_a_bomb_is_no_other_error(tmp_path):
  (tmp_path / "bomb.png").write_bytes(bomb(10_000, 10_000))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    with pytest.raises(ValueError, match="bomb.png: not a readable image .DecompressionBombWarning"):
      image.read(tmp_path / "bomb.png")


def test_every_error_of_a_damaged_file_names_it(tmp_path):
  content = turned(RGB, "AVIF")
  at = content.find(b"mdat") + 4
  (tmp_path / "zeroed.avif").write_bytes(content[:at] + bytes(len(content) - at))
  damaged = [("zeroed.avif", None)]
  rng = np.random.default_rng(0)
  for kind in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "PPM", "JPEG2000"):
    content = encoded(RGB, kind)
    for cut in rng.integers(1, len(content), 6):
      damaged.append((f"{kind}{cut}.png", content[:cut]))
    for _ in range(6):
      changed = bytearray(content)
      for at in rng.integers(0, len(content), 4):
        changed[at] = rng.integers(256)
      damaged.append((f"{kind}-{_}.png", bytes(changed)))
  refused = 0
  for name, content in damaged:
    if content is not None:
      (tmp_path / name).write_bytes(content)
    try:
      image.read(tmp_path / name)
    except ValueError as error:
      refused += str(error).startswith(f"{tmp_path / name}: ")
    else:
      refused += 1  # what is changed may still be a picture
  assert refused == len(damaged)


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a\0b.png", "\udcff.png", ""])
def test_names_that_no_file_can_have(name, tmp_path):
  for look in (image.read, tactile.read):
    with pytest.raises(ValueError, match="no such file|not a readable image"):
      look(f"{tmp_path}/{name}" if name else str(tmp_path))
  if name:
    with pytest.raises(ValueError, match="image: "):
      check_item("image", f"{tmp_path}/{name}")


@pytest.mark.parametrize("error", [
  MemoryError(), RecursionError("deep"), struct.error("short"), RuntimeError("plugin"), IndexError("x")])
def test_whatever_a_plugin_raises_names_the_file(error):
  with pytest.raises(ValueError, match=f"^a.png: not a picture .{type(error).__name__}"):
    with reading.file_errors("a.png", "a picture"):
      raise error


def test_errors_of_the_machine_stay():
  with pytest.raises(OSError, match="No space"), reading.file_errors("a.png", "a picture"):
    raise OSError(28, "No space left")
  with pytest.raises(ImportError), reading.file_errors("a.png", "a picture"):
    raise ImportError("av")


def test_the_first_of_several_pictures_is_read_and_said(tmp_path, caplog):
  pages = tmp_path / "pages.tif"
  pages.write_bytes(tiff(WIDE(GREY), 16, 1, pages=3))
  with caplog.at_level("WARNING"):
    np.testing.assert_array_equal(image.read(pages), THRICE)
    image.read(pages)
  assert caplog.text.count("pages.tif: the first of its 3 pictures is read") == 1


def test_a_preview_before_the_picture_is_not_the_picture():
  np.testing.assert_array_equal(image.read(tiff(WIDE(GREY), 16, 1, pages=2, preview=True)), THRICE)


STRIPS = [(1, 60_000), (60_000, 1)]


@pytest.mark.parametrize("shape", STRIPS)
def test_a_strip_is_not_blown_up(shape):
  """224 times 13 million pixels would be 10 GB; the middle is what a preparation keeps."""
  pixels = np.zeros((*shape, 3), np.uint8)
  pixels.reshape(-1, 3)[:] = np.where(np.arange(60_000) < 30_000, 40, 200)[:, None]
  plane = pixels[..., 0].astype(np.float32)
  side = 32
  prepared = {
    "pil": pictures.Picture((side, side))(pixels), "torch": pictures.Picture((side, side), backend="torch")(pixels),
    "crop": pictures.Square("image", side, "crop")(pixels),
    "plane": imagebind._fitted(plane, side, Image.Resampling.BILINEAR),
    "float": languagebind.fitted(pixels / np.float32(255), side, languagebind.linear_matrix,
                                 lambda long, short, side: long * side // short),
  }  # fmt: skip
  for name, got in prepared.items():
    assert got.shape[:2] == (side, side), name
    values = got * (255 if name == "float" else 1)
    assert 25 <= values.min() <= values.max() <= 215, name  # cubic weights overshoot
  padded = pictures.Square("image", side)(pixels)
  assert padded.shape == (side, side, 3) and (padded[0] == 255).mean() > 0.9


def test_wide_pictures_that_are_not_that_wide_keep_their_bits():
  rng = np.random.default_rng(0)
  x = rng.integers(0, 256, (4, 256, 3)).astype(np.uint8)
  assert pictures.middle(x) is x
  long = np.concatenate([x, x], 1)
  np.testing.assert_array_equal(pictures.middle(long), long[:, 192:320])


def test_grey_may_have_the_noise_of_a_jpeg():
  rng = np.random.default_rng(0)
  noisy = np.clip(THRICE + rng.integers(-3, 4, THRICE.shape), 0, 255).astype(np.uint8)
  content = encoded(noisy, "JPEG", quality=95, subsampling=0)
  pixels = image.read(content)
  assert (pixels != pixels[..., :1]).any() and image.is_grey(pixels)
  with pytest.raises(ValueError, match="all pixels are grey"):
    tactile.read(content)
  assert not image.is_grey(RGB)
  marked = THRICE.copy()
  marked[3, 3] = (255, 0, 0)
  assert not image.is_grey(marked)


DEEP_GREY = lambda high: np.linspace(0, high, 12).astype(np.uint16).reshape(3, 4)
DEEP_COLOURS = lambda high: png(
  4, 3, 16, 2, [np.repeat(row, 3).astype(">u2").tobytes() for row in DEEP_GREY(high)])  # fmt: skip
DEEP_ALPHA = lambda high: png(
  4, 3, 16, 4, [np.stack([row, np.full_like(row, 65535)], 1).astype(">u2").tobytes() for row in DEEP_GREY(high)]
)  # fmt: skip


@pytest.mark.parametrize(("high", "bits"), [(1023, 10), (4095, 12), (16383, 14), (16640, None), (65535, None)])
@pytest.mark.parametrize("make", [lambda high: grey16(DEEP_GREY(high)), lambda high: tiff(DEEP_GREY(high), 16, 1),
                                  DEEP_COLOURS, DEEP_ALPHA], ids=["PNG", "TIFF", "RGB", "alpha"])  # fmt: skip
def test_sixteen_bits_that_a_camera_of_fewer_bits_would_give_are_said(make, high, bits, tmp_path, caplog):
  path = tmp_path / "deep.png"
  path.write_bytes(make(high))
  with caplog.at_level("WARNING"):
    got = image.read(path)
  np.testing.assert_array_equal(got[..., 0], DEEP_GREY(high) >> 8)  # values stay
  said = [record.getMessage() for record in caplog.records]
  assert len(said) == (bits is not None)
  want = f"{path}: its values of 16 bits reach {high} of 65535, and would fit {bits} bits"
  assert not bits or said[0].startswith(want)


def test_pictures_that_say_their_bits_or_are_black_are_not_said_to_be_dark(caplog):
  with caplog.at_level("WARNING"):
    image.read(twelve_bits(GREY.astype(int)))
    image.read(grey16(np.zeros((3, 4))))
    image.read(b"P5 32 24 4095\n" + (GREY.astype(np.uint16) * 16).astype(">u2").tobytes())
  assert not caplog.records


def test_masks_of_0_and_1_are_said(tmp_path, caplog):
  mask = (GREY > 127).astype(np.uint8)
  Image.fromarray(mask).save(tmp_path / "mask.png")
  with caplog.at_level("WARNING"):
    for value in (tmp_path / "mask.png", mask, mask[..., None]):
      assert image.read(value).max() == 1
    image.read(GREY > 127)
    image.read(np.zeros((3, 4), np.uint8))
  assert [record.getMessage().partition(":")[0] for record in caplog.records] == [str(tmp_path / "mask.png"), "image"]
  assert "its values are 0 and 1 of 255" in caplog.text


def test_masked_arrays_are_no_pictures():
  for kind in (RGB, GREY, GREY / 255):
    with pytest.raises(ValueError, match=f"^image: 1 of {kind.size} values are masked"):
      image.read(np.ma.masked_array(kind, np.arange(kind.size).reshape(kind.shape) == 3))
    np.testing.assert_array_equal(image.read(np.ma.masked_array(kind)), image.read(kind))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_floats_of_which_0_is_white_are_turned_as_integers_are(bits):
  want = image.read(tiff(65535 - WIDE(GREY), 16, 1, photometric=0))
  got = image.read(tiff(1 - GREY / 255, bits, 3, photometric=0))
  assert np.abs(got.astype(int) - want).max() <= 1


def test_numpy_strings_are_paths_and_numpy_bytes_are_files(tmp_path):
  Image.fromarray(RGB).save(tmp_path / "a.png")
  for value in (np.str_(tmp_path / "a.png"), np.array([str(tmp_path / "a.png")])[0],
                np.bytes_((tmp_path / "a.png").read_bytes())):  # fmt: skip
    np.testing.assert_array_equal(image.read(value), RGB)

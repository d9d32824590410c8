"""Image and text transforms: values, and clear refusals."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from codebind_jax.data.transforms import image as transforms
from codebind_jax.data.transforms import text as text_transforms
from codebind_jax.trunks import minilm

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (6, 9, 3)).astype(np.uint8)


def png(picture):
  out = io.BytesIO()
  picture.save(out, "PNG")
  return out.getvalue()


def test_every_kind_of_input_gives_the_same_pixels(tmp_path):
  path = tmp_path / "a.png"
  path.write_bytes(png(Image.fromarray(PHOTO)))
  for value in (PHOTO, Image.fromarray(PHOTO), path, str(path), path.read_bytes(), PHOTO / 255.0):
    np.testing.assert_array_equal(transforms.read(value), PHOTO)


def test_transparency_is_laid_on_white():
  alpha = np.array([[0, 255], [128, 255]], np.uint8)
  colour = np.array([[[9, 9, 9], [10, 20, 30]], [[0, 0, 0], [255, 0, 0]]], np.uint8)
  rgba = np.concatenate([colour, alpha[..., None]], axis=-1)
  expected = np.array([[[255, 255, 255], [10, 20, 30]], [[127, 127, 127], [255, 0, 0]]])
  np.testing.assert_allclose(transforms.read(rgba), expected, atol=1)
  np.testing.assert_allclose(transforms.read(png(Image.fromarray(rgba))), expected, atol=1)
  palette = Image.fromarray(colour).convert("P")
  palette.info["transparency"] = palette.getpixel((0, 0))
  assert tuple(transforms.read(palette)[0, 0]) == (255, 255, 255)


def test_grey_and_deep_images_become_rgb():
  grey = np.array([[0, 100], [200, 255]], np.uint8)
  for value in (grey, grey[..., None], Image.fromarray(grey), Image.fromarray(grey.astype(np.uint16) * 257)):
    np.testing.assert_array_equal(transforms.read(value), np.repeat(grey[..., None], 3, axis=-1))
  np.testing.assert_array_equal(transforms.read(grey > 150)[..., 0], [[0, 0], [255, 255]])


def test_the_camera_turn_is_applied():
  exif = Image.Exif()
  exif[0x0112] = 6
  out = io.BytesIO()
  Image.fromarray(PHOTO).save(out, "PNG", exif=exif)
  np.testing.assert_array_equal(transforms.read(out.getvalue()), np.rot90(PHOTO, -1))


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
    (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
    (np.zeros((4, 4, 3), np.int64), "type int64"),
    (np.full((4, 4, 3), 2.0), "lie in 0 to 1"),
    (np.full((4, 4, 3), np.nan), "lie in 0 to 1"),
    (7, "got int"),
    (b"not an image at all", "image bytes: not a readable image"),
    ("/no/such/file.png", "/no/such/file.png: no such file"),
  ],
)
def test_what_is_no_image_is_refused(value, message):
  with pytest.raises(ValueError, match=message):
    transforms.read(value)


def test_a_cut_file_is_refused_by_name(tmp_path):
  whole = png(Image.fromarray(RNG.integers(0, 256, (40, 40, 3)).astype(np.uint8)))
  path = tmp_path / "half.png"
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match="half.png: not a readable image"):
    transforms.read(path)


def test_crop_to_content():
  image = np.full((20, 30, 3), 255, np.uint8)
  image[5:9, 10:20] = 0
  np.testing.assert_array_equal(transforms.crop_to_content(image, margin=0.0), image[5:9, 10:20])
  assert transforms.crop_to_content(image, margin=0.1).shape == (6, 12, 3)
  assert transforms.crop_to_content(image, margin=9.0).shape == image.shape
  white = np.full((5, 6, 3), 250, np.uint8)
  np.testing.assert_array_equal(transforms.crop_to_content(white), white)


def test_fit_square():
  padded = transforms.fit_square(PHOTO, "pad")
  assert padded.shape == (9, 9, 3)
  np.testing.assert_array_equal(padded[1:7], PHOTO)
  assert (padded[[0, 7, 8]] == 255).all()
  np.testing.assert_array_equal(transforms.fit_square(PHOTO, "crop"), PHOTO[:, 1:7])
  np.testing.assert_array_equal(transforms.fit_square(PHOTO, "stretch"), PHOTO)
  with pytest.raises(ValueError, match="fit: got 'zoom', allowed are pad, crop, stretch"):
    transforms.fit_square(PHOTO, "zoom")
  with pytest.raises(ValueError, match="got 20000 x 1 pixels, whose square has 400,000,000; allowed: 89,478,485"):
    transforms.fit_square(np.zeros((1, 20000, 3), np.uint8), "pad")


@settings(max_examples=25, deadline=None)
@given(h=st.integers(1, 40), w=st.integers(1, 40), size=st.integers(1, 40), grey=st.integers(0, 255))
def test_resize_keeps_a_flat_colour(h, w, size, grey):
  out = transforms.resize(np.full((h, w, 3), grey, np.uint8), size)
  assert out.shape == (size, size, 3) and out.dtype == np.uint8
  assert (out == grey).all()


def test_resize_antialiases():
  stripes = np.tile(np.array([0, 255], np.uint8)[:, None, None], (32, 64, 3))
  small = transforms.resize(stripes, 16)
  assert abs(small.astype(float) - 127.5).max() < 20, "single pixels must not survive a fourfold reduction"


# --- text


def test_tokens_are_padded_and_long_texts_cut_with_a_warning(caplog):
  tokenize = text_transforms.Tokenize(minilm.letter_tokenizer(), max_length=8)
  ids = tokenize("ab c")
  assert ids.dtype == np.int32 and ids.tolist()[5:] == [0, 0, 0]
  assert ids[0] == 2 and ids[4] == 3, "[CLS] ... [SEP]"
  np.testing.assert_array_equal(tokenize("AB  C"), ids)
  with caplog.at_level("WARNING"):
    long = tokenize("abcdefghijklm")
  assert "15 tokens cut to 8" in caplog.text
  assert long[-1] == 3 and (long != 0).all()
  np.testing.assert_array_equal(long[:-1], text_transforms.Tokenize(minilm.letter_tokenizer(), 20)("abcdefghijklm")[:7])


@pytest.mark.parametrize("value", ["", "  \n", 3, None, ["a"]])
def test_what_is_no_text_is_refused(value):
  tokenize = text_transforms.Tokenize(minilm.letter_tokenizer(), max_length=8)
  with pytest.raises(ValueError, match="a string that is not empty"):
    tokenize(value)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_buckets_hold_every_token(lengths):
  items = [np.pad(np.arange(1, length + 1), (0, 40 - length)).astype(np.int32) for length in lengths]
  batch = text_transforms.trim_to_bucket(items, buckets=(8, 16))
  assert batch.shape[1] == next(bucket for bucket in (8, 16, 40) if bucket >= max(lengths))
  for row, item in zip(batch, items, strict=True):
    assert row.sum() == item.sum()

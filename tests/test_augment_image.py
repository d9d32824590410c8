"""Random views of pictures and films: crops and colours of photos, drawings, touch, frames that stay together."""

import colorsys
import math

import numpy as np
import pytest
from PIL import Image

from codebind_jax.data import augment
from codebind_jax.data.augment import tactile, video
from codebind_jax.data.augment.image import Drawing, Photo, View, crop_box, line_drawing, outside, turn_hue
from codebind_jax.trunks.line_drawing import line_drawing as device_line_drawing

RNG = np.random.default_rng(0)
WHOLE = {"area": (1.0, 1.0), "flip": 0.0}
PLAIN = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


def seeded(seed):
  return np.random.default_rng(seed)


def numbered(h, w):
  """A picture whose pixels say where they are."""
  rows, columns = np.mgrid[:h, :w].astype(np.uint8)
  return np.stack([rows, columns, np.full_like(rows, 7)], axis=-1)


# --- photos


def test_crops_have_the_shares_and_shapes_that_are_asked_for():
  boxes = [crop_box(300, 400, (0.2, 0.5), (0.5, 2.0), seeded(seed)) for seed in range(400)]
  areas = np.array([h * w for _, _, h, w in boxes]) / (300 * 400)
  ratios = np.array([w / h for _, _, h, w in boxes])
  # A side is rounded by half a pixel of at least 100.
  assert 0.197 < areas.min() < 0.23 and 0.47 < areas.max() < 0.505
  assert 0.495 < ratios.min() < 0.6 and 1.7 < ratios.max() < 2.02
  assert abs(areas.mean() - 0.35) < 0.02, "areas are drawn evenly"
  assert abs(np.log(ratios).mean()) < 0.1, "so are the shapes' logarithms"
  assert all(0 <= top <= 300 - h and 0 <= left <= 400 - w for top, left, h, w in boxes)
  assert min(top for top, *_ in boxes) < 10 and max(top + h for top, _, h, _ in boxes) > 290


def torchvision_box(height, width, scale, ratio, rng):
  """RandomResizedCrop.get_params, written down once more from its documentation, for a numpy generator."""
  for _ in range(10):
    target = height * width * rng.uniform(scale[0], scale[1])
    shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = int(round(math.sqrt(target * shape))), int(round(math.sqrt(target / shape)))
    if 0 < w <= width and 0 < h <= height:
      return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
  if width / height < min(ratio):
    w, h = width, int(round(width / min(ratio)))
  elif width / height > max(ratio):
    w, h = int(round(height * max(ratio))), height
  else:
    w, h = width, height
  return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(60, 80), (9, 200), (200, 9), (64, 64), (1, 1)])
def test_crops_are_torchvisions(size):
  for seed in range(60):
    for area, aspect in (((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (3 / 4, 4 / 3)), ((0.5, 0.5), (1.0, 1.0))):
      assert crop_box(*size, area, aspect, seeded(seed)) == torchvision_box(*size, area, aspect, seeded(seed))


def test_a_picture_that_no_crop_fits_is_cut_in_the_middle():
  assert crop_box(10, 200, (0.9, 1.0), (1.0, 1.0), seeded(0)) == (0, 95, 10, 10)
  assert crop_box(200, 10, (0.9, 1.0), (0.5, 2.0), seeded(0)) == (90, 0, 20, 10)


def test_a_view_is_the_part_mirrored_or_not():
  image, flips = numbered(50, 60), 0
  for seed in range(40):
    one = Photo(area=(0.3, 0.6), **PLAIN)
    top, left, h, w = one.draw(50, 60, seeded(seed)).box
    view, part = one(image, seeded(seed)), image[top : top + h, left : left + w]
    flipped = (view == part[:, ::-1]).all()
    assert flipped or (view == part).all()
    flips += flipped
  assert 8 < flips < 32


def test_a_size_is_the_side_of_the_square():
  image = RNG.integers(0, 256, (50, 60, 3)).astype(np.uint8)
  assert Photo(size=24)(image, seeded(0)).shape == (24, 24, 3)
  whole = Photo(**WHOLE, **PLAIN, size=24)(image, seeded(0))
  np.testing.assert_array_equal(whole, np.asarray(Image.fromarray(image).resize((24, 24), Image.Resampling.BILINEAR)))


def changed(pixels, *changes):
  h, w = pixels.shape[:2]
  return View((0, 0, h, w), 0, False, changes).of(pixels)


def test_colours_change_by_hand():
  halves = np.array([[[50] * 3, [150] * 3]], np.uint8)
  np.testing.assert_array_equal(changed(halves, ("brightness", 1.5))[0, :, 0], [75, 225])
  np.testing.assert_array_equal(changed(halves, ("brightness", 2.0))[0, :, 0], [100, 255])
  np.testing.assert_array_equal(changed(halves, ("contrast", 0.5))[0, :, 0], [75, 125])  # about their mean, 100
  np.testing.assert_array_equal(changed(halves, ("saturation", 1.7)), halves)
  red = np.array([[[255, 0, 0]]], np.uint8)
  grey = 76  # 0.299 * 255
  np.testing.assert_array_equal(changed(red, ("saturation", 0.0))[0, 0], [grey] * 3)
  np.testing.assert_allclose(changed(red, ("saturation", 0.5))[0, 0], [165, 38, 38], atol=1)
  # In their order: doubled and cut first, the halves are 100 and 255 about a mean of 178.
  both = changed(halves, ("brightness", 2.0), ("contrast", 0.5))
  np.testing.assert_allclose(both[0, :, 0], [139, 216], atol=1)
  np.testing.assert_allclose(changed(halves, ("contrast", 0.5), ("brightness", 2.0))[0, :, 0], [150, 250], atol=1)


@pytest.mark.parametrize("turn", [-0.5, -0.31, -0.1, 0.04, 0.25, 0.5])
def test_a_turn_of_hue_is_colorsys(turn):
  pixels = np.array([[[220, 30, 60], [20, 140, 90], [40, 60, 200], [250, 200, 20], [90, 90, 90]]], np.uint8)
  out = np.asarray(turn_hue(Image.fromarray(pixels), turn))
  for got, pixel in zip(out[0], pixels[0] / 255.0):
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    wanted = np.array(colorsys.hsv_to_rgb((hue + turn) % 1.0, saturation, value)) * 255.0
    # PIL's hue has 255 steps, of up to 6 / 255 of the distance between the largest and the smallest value.
    np.testing.assert_allclose(got, wanted, atol=10)
  assert abs(out[0, 4].astype(int) - 90).max() <= 1, "grey has no hue"


def test_changes_are_drawn_within_their_ranges_and_in_every_order():
  one = Photo(brightness=0.4, contrast=0.3, saturation=1.5, hue=0.1)
  views = [one.draw(9, 9, seeded(seed)) for seed in range(300)]
  drawn = {name: np.array([dict(view.changes)[name] for view in views]) for name, _ in views[0].changes}
  ranges = {"brightness": (0.6, 1.4), "contrast": (0.7, 1.3), "saturation": (0.0, 2.5), "hue": (-0.1, 0.1)}
  for name, (low, high) in ranges.items():
    assert low <= drawn[name].min() < low + 0.1 * (high - low) and high - 0.1 * (high - low) < drawn[name].max() <= high
  assert len({tuple(name for name, _ in view.changes) for view in views}) == 24
  assert Photo(contrast=0.2, brightness=0.0, saturation=0.0, hue=0.0).draw(9, 9, seeded(0)).changes[0][0] == "contrast"


def test_small_and_thin_pictures_have_views():
  for shape in ((1, 1, 3), (1, 40, 3), (40, 1, 3), (2, 3, 3)):
    for seed in range(8):
      assert 0 not in Photo(area=(0.08, 1.0))(np.full(shape, 90, np.uint8), seeded(seed)).shape


def test_a_touch_sensors_lights_stay_where_they_are():
  image = numbered(40, 50)
  for seed in range(12):
    view = tactile.Photo(brightness=0.0, contrast=0.0)(image, seeded(seed))
    assert (np.diff(view[0, :, 1].astype(int)) == 1).all(), "never mirrored, no colour changes"


# --- films


def test_all_frames_have_one_crop_one_mirror_image_and_one_change_of_colours():
  frame = RNG.integers(0, 256, (40, 50, 3)).astype(np.uint8)
  one, photo = video.Clip(area=(0.3, 0.8), hue=0.2), Photo(area=(0.3, 0.8), hue=0.2)
  for seed in range(6):
    view = one(np.stack([frame] * 5), seeded(seed))
    np.testing.assert_array_equal(view, np.stack([photo(frame, seeded(seed))] * 5))
    clips = one(np.stack([frame] * 6).reshape(3, 2, 40, 50, 3), seeded(seed))
    np.testing.assert_array_equal(clips, np.broadcast_to(view[0], (3, 2, *view.shape[1:])))


def test_a_clip_begins_anywhere_and_its_frames_follow_each_other():
  film = np.broadcast_to(np.arange(16, dtype=np.uint8)[:, None, None, None], (16, 8, 8, 3))
  starts = set()
  for seed in range(80):
    view = video.Clip(frames=12, **WHOLE, **PLAIN)(film, seeded(seed))[:, 0, 0, 0]
    np.testing.assert_array_equal(np.diff(view.astype(int)), np.ones(11))
    starts.add(int(view[0]))
  assert starts == {0, 1, 2, 3, 4}
  for frames in (0, 16, 20):
    assert len(video.Clip(frames=frames)(film, seeded(0))) == 16
  assert video.Clip(frames=1)(film.reshape(4, 4, 8, 8, 3), seeded(0)).shape[:2] == (4, 4)


# --- drawings


def drawing(size=48):
  """A red ring with a white hole and a blue bar, on white."""
  image = np.full((size, size, 3), 255, np.uint8)
  y, x = np.mgrid[:size, :size] - size / 2 + 0.5
  radius = np.hypot(x, y)
  image[(radius < size * 0.3) & (radius > size * 0.15)] = (220, 30, 30)
  image[size // 2 - 2 : size // 2 + 2, 4:12] = (20, 20, 200)
  return image


def test_a_view_depends_on_the_generator_alone():
  spec, image = Drawing(), drawing()
  before = image.copy()
  views = [spec(image, np.random.default_rng(seed)) for seed in range(8)]
  np.testing.assert_array_equal(image, before)
  for seed, view in enumerate(views):
    assert view.shape == image.shape and view.dtype == np.uint8
    np.testing.assert_array_equal(view, spec(image, np.random.default_rng(seed)))
  assert all((a != b).any() for a, b in zip(views, views[1:]))


STILL = dict(rotate=0.0, scale=(1.0, 1.0), shift=0.0, shear=0.0, stretch=0.0, flip=0.0, background=0.0, colour=0.0,
             mono=0.0, invert=0.0, blur=0.0, erase=0.0)  # fmt: skip


def test_all_strengths_at_zero_change_nothing():
  image = drawing()
  for seed in range(4):
    np.testing.assert_array_equal(Drawing(**STILL)(image, np.random.default_rng(seed)), image)


def test_each_strength_changes_what_it_names():
  image, rng = drawing(), np.random.default_rng
  np.testing.assert_array_equal(Drawing(**STILL | {"flip": 1.0})(image, rng(0)), image[:, ::-1])
  styles = [Drawing(**STILL | {"mono": 1.0})(image, rng(seed)) for seed in range(8)]
  assert all((view[..., 0] == view[..., 1]).all() and (view[..., 1] == view[..., 2]).all() for view in styles)
  assert all(view[0, 0, 0] == 255 for view in styles) and len({view.tobytes() for view in styles}) >= 4
  inverted = Drawing(**STILL | {"mono": 1.0, "invert": 1.0})(image, rng(0))
  np.testing.assert_array_equal(inverted, 255 - styles[0])
  filled = Drawing(**STILL | {"background": 1.0})(image, rng(1))
  assert (filled[0, 0] != 255).any() and abs(filled[15, 15].astype(int) - image[15, 15]).max() <= 2
  recoloured = Drawing(**STILL | {"colour": 1.0})(image, rng(3))
  assert (recoloured[outside(image)] == 255).all() and (recoloured[15, 15] != image[15, 15]).any()
  smaller = Drawing(**STILL | {"scale": (0.5, 0.5)})(image, rng(0))
  ratio = (~outside(smaller)).sum() / (~outside(image)).sum()
  assert 0.15 < ratio < 0.4, "half the side is a quarter of the area"


def test_a_line_drawing_is_dark_where_colours_change_and_only_there():
  image = np.full((20, 24, 3), 200, np.uint8)
  image[:, 12:] = (200, 40, 200)
  lines = line_drawing(image, width=1)
  assert (lines[..., 0] == lines[..., 1]).all() and (lines[..., 0] == lines[..., 2]).all()
  assert (lines[:, 11:13] == 0).all() and (lines[:, :6] == 255).all() and (lines[:, 18:] == 255).all()
  assert (line_drawing(image, width=3) < 255).sum() > (lines < 255).sum()
  assert "augment-" in repr(Drawing()), "cached views follow the code's revision"


def test_line_drawings_of_a_batch_are_those_of_its_images():
  images = np.stack([drawing(48), np.rot90(drawing(48)), np.full((48, 48, 3), 90, np.uint8)])
  lines = np.asarray(device_line_drawing(images))
  # The mirror at the border is taken between the two passes there and before both here, so the border may differ.
  expected = np.stack([line_drawing(image, 2) for image in images])
  np.testing.assert_allclose(lines[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2], atol=0.51)
  assert (lines[2] == 255).all() and (lines[0] < 128).mean() > 0.05


def test_outside_is_the_white_around_and_not_the_white_within():
  image = drawing()
  mask = outside(image)
  assert mask[0, 0] and mask[-1, -1]
  assert not mask[12, 24] and not mask[24, 24], "neither the ring nor its hole"
  assert not outside(np.zeros((4, 4, 3), np.uint8)).any()
  assert outside(np.full((4, 4, 3), 255, np.uint8)).all()


@pytest.mark.parametrize(
  "pixels", [np.full((16, 16, 3), 255), np.zeros((16, 16, 3)), RNG.integers(0, 256, (17, 31, 3))]
)
def test_any_image_can_be_augmented(pixels):
  spec = Drawing(mono=0.5, background=1.0, erase=1.0, blur=1.0, invert=0.5)
  for seed in range(12):
    assert spec(pixels.astype(np.uint8), np.random.default_rng(seed)).shape == pixels.shape


@pytest.mark.parametrize("wrong", [{"flip": 1.5}, {"mono": -0.1}, {"scale": (1.2, 0.8)}, {"scale": (0.0, 1.0)}])
def test_augment_settings_are_checked(wrong):
  with pytest.raises(ValueError, match=next(iter(wrong))):
    Drawing(**wrong)


def test_drawings_can_be_set_by_a_config():
  assert augment.make("image", {"kind": "drawing", "flip": 0.25}) == Drawing(flip=0.25)

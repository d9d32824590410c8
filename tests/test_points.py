"""Point groups by hand and against brute force, the network that learns from them, and pictures of clouds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax.data.preparation import points as preparation
from codebind_jax.models.points import Points
from codebind_jax.trunks import load_trunk

LINE = np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0], [10, 0, 0]], float)


def cloud(seed=0, count=200):
  return np.random.default_rng(seed).normal(size=(count, 3)) * [1.0, 2.0, 0.5]


def test_unit_sphere_by_hand():
  unit, radius = preparation.unit_sphere(LINE + [7, -3, 2])
  assert radius == 5.0
  np.testing.assert_allclose(unit[:, 0], [-1, -0.8, -0.6, -0.4, 1])
  assert not unit[:, 1:].any()


def test_farthest_points_by_hand():
  # From 0 the farthest is 10; then 3 is 3 away from 0 and 7 from 10; then 1 and 2 are 1 away: the lower index wins.
  assert preparation.farthest_points(LINE, 5).tolist() == [0, 4, 3, 1, 2]
  assert preparation.farthest_points(LINE, 7).tolist() == [0, 4, 3, 1, 2, 0, 4]
  assert preparation.farthest_points(LINE[::-1], 2).tolist() == [4, 0]


def test_groups_by_hand():
  centres, relative = preparation.group_points(LINE, 2, 3)
  assert centres[:, 0].tolist() == [0, 10]
  # Neighbours of 0: 0, 1, 2; of 10: 10, 3, 2; their mean distance is (0 + 1 + 2 + 0 + 7 + 8) / 6 = 3.
  np.testing.assert_allclose(relative[..., 0], np.array([[0, 1, 2], [0, -7, -8]]) / 3)
  few, _ = preparation.group_points(LINE[:2], 3, 4)
  assert few.shape == (3, 3)


def test_histograms_have_unit_mean_square():
  unit, _ = preparation.unit_sphere(cloud())
  found = preparation.histograms(unit)
  parts = np.split(found, [32, 32 + 216, 32 + 216 + 128])
  for part in parts[:3]:
    assert (part**2).mean() == pytest.approx(1.0)
  np.testing.assert_allclose(parts[3], np.ptp(unit, axis=0))
  pole = np.stack([np.zeros(9), np.linspace(-1, 1, 9), np.zeros(9)], axis=1)
  rings = preparation.histograms(pole)[248:376].reshape(16, 8)
  assert rings[:, 1:].sum() == 0 and (rings[:, 0] > 0).sum() == 9


def test_groups_forget_place_and_size_but_not_shape():
  trunk = load_trunk("points", groups=8, neighbours=5)
  tokens = trunk.preprocess(cloud())
  assert tokens.shape == trunk.input.shape == (9, 379) and tokens.dtype == trunk.input.dtype
  moved = trunk.preprocess(3.0 * cloud() + [5.0, 0.0, 1.0])
  np.testing.assert_allclose(tokens, moved, atol=1e-4)
  assert np.abs(tokens - trunk.preprocess(cloud() * [1, 1, 4])).max() > 0.1
  colours = np.c_[cloud(), np.full((200, 3), 0.5)]
  np.testing.assert_array_equal(tokens, trunk.preprocess(colours))
  assert not tokens[1:, 18:].any() and trunk.modality == "points"


def test_size_is_kept_where_asked_for():
  sized = load_trunk("points", groups=2, neighbours=2, size=True)
  one, three = (sized.preprocess(scale * cloud())[0, 379] for scale in (1.0, 3.0))
  assert three - one == pytest.approx(np.log(3.0), abs=1e-5)
  assert sized.fingerprint != load_trunk("points", groups=2, neighbours=2).fingerprint
  with pytest.raises(ValueError, match="groups 0"):
    load_trunk("points", groups=0)


@pytest.fixture(scope="module")
def network():
  trunk = load_trunk("points", groups=6, neighbours=5, width=16, depth=1, heads=2, dropout=0.5)
  assert (trunk.num_tokens, trunk.width, trunk.load) == (7, 16, None)
  tokens = jnp.asarray(trunk.collate([trunk.preprocess(cloud(seed)) for seed in (0, 1)]))
  return trunk.module, tokens, trunk.params


def test_network_does_not_care_for_the_order_of_points_and_groups(network):
  made, tokens, params = network
  out = made.apply({"params": params}, tokens).tokens
  assert out.shape == (2, 7, 16)
  points = tokens[:, 1:, 3:18].reshape(2, 6, 5, 3)[:, :, ::-1].reshape(2, 6, 15)
  shuffled = jnp.concatenate([tokens[:, :1], tokens.at[:, 1:, 3:18].set(points)[:, :0:-1]], axis=1)
  again = made.apply({"params": params}, shuffled).tokens
  np.testing.assert_allclose(again[:, 0], out[:, 0], atol=1e-5)
  np.testing.assert_allclose(again[:, :0:-1], out[:, 1:], atol=1e-5)


def test_every_part_of_a_cloud_reaches_the_class_token(network):
  made, tokens, params = network
  slope = jax.grad(lambda t: made.apply({"params": params}, t).tokens[:, 0].sum() ** 2)(tokens)
  for part in (slope[:, :1], slope[:, 1:, :3], slope[:, 1:, 3:18]):
    assert jnp.abs(part).max() > 0
  assert not slope[:, 1:, 18:].any()


def test_network_drops_in_training_alone(network):
  made, tokens, params = network
  run = lambda key, train: made.apply({"params": params}, tokens, train, rngs={"dropout": jax.random.key(key)}).tokens
  assert jnp.abs(run(0, True) - run(1, True)).max() > 0
  np.testing.assert_array_equal(run(0, False), run(1, False))


def test_network_and_input_must_agree():
  tokens = jnp.zeros((1, 3, 20))
  with pytest.raises(ValueError, match="neighbours: 6 needs tokens of 21 values or more, got 20"):
    Points(neighbours=6).init(jax.random.key(0), tokens)


def test_depth_picture_by_hand():
  # From azimuth 0 the camera stands at z > 0, above: a point at the origin is 2.6 away and in the middle.
  picture = preparation.depth_picture(np.zeros((1, 3)), 0.0, 33, 0)
  assert np.argwhere(picture).tolist() == [[16, 16]]
  assert picture[16, 16] == pytest.approx(255 - (2.6 - 1.6) / 2 * 255)
  # One unit towards the camera is a unit nearer; it hides the origin, and a disc of radius 1 is a cross.
  tilt = np.radians(18.0)
  near = np.array([[0.0, np.sin(tilt), np.cos(tilt)], [0, 0, 0]])
  picture = preparation.depth_picture(near, 0.0, 33, 1)
  assert picture[16, 16] == pytest.approx(255.0)
  assert np.argwhere(picture).tolist() == [[15, 16], [16, 15], [16, 16], [16, 17], [17, 16]]
  # To the right of a camera at azimuth 90 (x > 0) lies -z; up is up: 0.5 / (2.6 tan 22.5 degrees) of half the side.
  picture = preparation.depth_picture(np.array([[0.0, 0.0, -0.5]]), 90.0, 101, 0)
  step = 0.5 / (2.6 * np.tan(np.radians(22.5))) / 2 * 101
  assert np.argwhere(picture).tolist() == [[50, round(50 + step)]]
  assert np.argwhere(preparation.depth_picture(np.array([[0.0, 0.3, 0.0]]), 0.0, 101, 0))[0, 0] < 50


def test_views_are_seen_by_the_image_trunk():
  options = {"weights": "random", "size": 32, "levels": (1,), "stages": ((1, 3, 2, 1, 8), (1, 3, 2, 2, 12)),
             "head_width": 16}  # fmt: skip
  trunk = load_trunk("point_views", azimuths=(0, 90), metric=True, **options)
  picture = load_trunk("efficientnet_lite0", grid=0, **options)
  one = cloud()
  unit, radius = preparation.unit_sphere(one)
  views = [np.repeat(preparation.depth_picture(unit, a, 32, 2)[..., None], 3, -1) for a in (0, 90)]
  expected = np.asarray(picture.apply(trunk.params["picture"], np.stack(views)))[:, 0].mean(axis=0)
  tokens = np.asarray(trunk.apply(trunk.params, np.stack([trunk.preprocess(one), trunk.preprocess(2 * one)])))
  assert tokens.shape == (2, 1, trunk.width)
  np.testing.assert_allclose(tokens[0, 0], np.r_[expected, preparation.histograms(unit), np.log(radius)], rtol=2e-4,
                             atol=2e-5)  # fmt: skip
  np.testing.assert_allclose(tokens[1, 0, :-1], tokens[0, 0, :-1], atol=1e-4)  # place and size are forgotten
  assert tokens[1, 0, -1] - tokens[0, 0, -1] == pytest.approx(np.log(2), abs=1e-5)
  with pytest.raises(ValueError, match="one azimuth or more"):
    load_trunk("point_views", azimuths=(), **options)

"""The heads of the towers: their start from training tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax.config import read
from codebind_jax.initialise import copy_heads, whiten_heads
from codebind_jax.models.towers import Head, whitened
from codebind_jax.runtime.sharding import MeshShape, Sharding, make_layout
from configs import common
from tests.source_fixtures import tokens_of


def crowded_tokens(width=12):
  """Tokens with a common part and directions of very different size."""
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(400, width)) * np.geomspace(0.05, 2.0, width) + 3.0, jnp.float32)


@pytest.mark.parametrize("power", [0.0, 0.15, 0.5])
def test_a_whitened_start_turns_the_covariance_to_the_power_one_minus_twice(power):
  head, tokens = Head(12), crowded_tokens()
  params = head.init(jax.random.key(0), tokens[:, None])["params"]
  before = np.asarray(head.apply({"params": params}, tokens[:, None])[:, 0])
  start = whitened(params, tokens, power, shrink=1e-6)
  # LayerNorm takes the tokens' mean over the width away, so one direction of the twelve is empty.
  after = np.asarray(head.apply({"params": start}, tokens[:, None])[:, 0])
  np.testing.assert_allclose(after.mean(0), 0.0, atol=1e-3)
  spread = lambda x: np.linalg.eigvalsh(np.cov(x.T))[1:]
  expected = spread(before) ** (1 - 2 * power)
  np.testing.assert_allclose(spread(after) / spread(after).sum(), expected / expected.sum(), rtol=2e-3)
  size = lambda x: np.square(x - x.mean(0)).mean()
  np.testing.assert_allclose(size(after), size(before), rtol=1e-4)


def test_shrinking_holds_back_directions_that_hardly_occur():
  params = Head(12).init(jax.random.key(0), jnp.zeros((1, 1, 12)))["params"]
  gain = lambda shrink: np.linalg.norm(whitened(params, crowded_tokens(), 0.5, shrink)["proj"]["kernel"], 2)
  assert gain(0.1) < 0.5 * gain(0.001)


def towers_of(**towers):
  config = common.get_config()
  for name, options in towers.items():
    config.model.towers[name] = common.tower("vectors", **options)
  return read(config).model.towers


def test_a_run_whitens_by_the_clean_view_of_the_heads_that_ask_for_it():
  head, tokens = Head(12), crowded_tokens()
  params = {m: {"shared": head.init(jax.random.key(0), tokens[:, None])["params"]} for m in ("image", "text")}
  towers = towers_of(image={"whiten": 0.3, "views": 2, "augment": {"kind": "drawing"}}, text={})
  clean = np.asarray(tokens, np.float16)
  # Two rows show one item, which counts once.
  choices = [(i,) for i in range(len(clean))] + [(3,)]
  feed = tokens_of(np.stack([clean, clean[:, ::-1]], axis=1)[:, :, None], choices)
  layout = make_layout(MeshShape(), Sharding())
  found = whiten_heads(params, towers, {"image": feed, "text": feed}, layout)
  expected = whitened(params["image"]["shared"], clean.astype(np.float32), 0.3)
  jax.tree.map(np.testing.assert_array_equal, found["image"]["shared"], expected)
  assert found["text"] is params["text"]


def test_heads_are_copied_when_a_modality_begins_and_not_again():
  params = {name: {"shared": jnp.full((2, 2), value)} for name, value in (("image", 1.0), ("video", 2.0))}
  towers = towers_of(image={}, video={"starts_from": "image"})
  assert copy_heads(params, towers, {"image", "video"})["video"]["shared"].tolist() == [[1, 1], [1, 1]]
  later = copy_heads(params, towers, ())
  assert later["video"]["shared"].tolist() == [[2, 2], [2, 2]] and later["image"]["shared"].tolist() == [[1, 1], [1, 1]]
  params["video"] = {"shared": jnp.ones((3, 2))}
  with pytest.raises(ValueError, match="towers.video.starts_from: heads of 'image' have shapes"):
    copy_heads(params, towers, {"video"})

"""The training step: mixup."""

import jax
import jax.numpy as jnp
import numpy as np

from codebind_jax.step import mixed

ROWS = slice(0, 6)


def tokens_of(*masks):
  rng = np.random.default_rng(0)
  tokens = {name: jnp.asarray(rng.normal(size=(6, t, 3)), jnp.float16) for name, t in (("image", 2), ("text", 1))}
  return tokens, {name: jnp.asarray(mask, bool) for name, mask in zip(tokens, masks)}


def test_mixup_takes_one_share_for_all_modalities_of_a_row():
  tokens, masks = tokens_of([1] * 6, [1] * 6)
  out = mixed(jax.random.key(0), tokens, masks, {("a", "image"): ROWS, ("a", "text"): ROWS}, 1.0)
  shares = {}
  for name, x in tokens.items():
    own, other = np.asarray(x, np.float64), np.roll(np.asarray(x, np.float64), 1, axis=0)
    share = (np.asarray(out[name]) - other) / (own - other)
    np.testing.assert_allclose(share, share[:, :1, :1] + 0 * share, rtol=1e-3)
    shares[name] = share[:, 0, 0]
  np.testing.assert_allclose(shares["image"], shares["text"], rtol=1e-3)
  assert (shares["text"] >= 0.5).all() and (shares["text"] <= 1.0).all() and np.ptp(shares["text"]) > 0.1


def test_mixup_leaves_rows_whose_neighbour_lacks_a_modality():
  tokens, masks = tokens_of([1, 1, 0, 1, 1, 1], [1] * 6)
  out = mixed(jax.random.key(1), tokens, masks, {("a", "image"): ROWS, ("a", "text"): ROWS}, 1.0)
  for name, x in tokens.items():
    np.testing.assert_array_equal(out[name][3], x[3].astype(jnp.float32), err_msg="its neighbour has no image")
    assert (out[name][4] != x[4]).any()
  assert (out["text"][2] != tokens["text"][2]).any(), "a row without an image mixes its text"


def test_mixup_stays_within_a_source():
  tokens, masks = tokens_of([1] * 6, [1] * 6)
  owners = {("a", "image"): slice(0, 2), ("b", "image"): slice(2, 6)}
  changed = tokens["image"].at[:2].add(5.0)
  first, second = (
    mixed(jax.random.key(0), tokens | {"image": image}, masks, owners, 1.0) for image in (tokens["image"], changed)
  )
  np.testing.assert_array_equal(first["image"][2:], second["image"][2:])
  np.testing.assert_array_equal(first["text"], tokens["text"])

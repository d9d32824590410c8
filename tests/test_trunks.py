"""Trunks found by name; those without a checkpoint."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax import trunks
from codebind_jax.trunks import load_trunk, trunk_maker, trunk_names

pytestmark = pytest.mark.usefixtures("quick_compiler")
SMALL = {
  "mlp": {"inputs": 3, "tokens": 2, "width": 4, "dropout": 0.5, "modality": "sensor"},
  "points": {"groups": 3, "neighbours": 2, "width": 8, "depth": 1, "heads": 2, "dropout": 0.5},
  "eeg": {"width": 8, "depth": 1, "heads": 2, "dropout": 0.5},
}


def test_names_are_those_of_the_modules_that_make_trunks():
  files = pathlib.Path(trunks.__file__).parent.glob("*.py")
  assert trunk_names() == sorted(f.stem for f in files if "\ndef make_trunk(" in f.read_text())
  with pytest.raises(ValueError, match=r"trunk: got 'names', allowed are aisfx, .*vectors"):
    trunk_maker("names")


def test_weights_are_given_by_name_like_the_options():
  assert load_trunk("minilm", weights="random", layers=1, width=8, heads=2).load is None
  with pytest.raises(ValueError, match="'/no/such' does not exist"):
    load_trunk("minilm", weights="/no/such")


@pytest.mark.parametrize("name", SMALL)
def test_a_trunk_without_a_checkpoint_is_drawn_and_drops_in_training_alone(name):
  trunk, again = load_trunk(name, **SMALL[name]), load_trunk(name, **SMALL[name])
  assert trunk.load is None and trunk.head is None and hash(trunk.module) == hash(again.module)
  x = jax.random.normal(jax.random.key(1), (2, *trunk.input.shape), trunk.input.dtype)
  run = jax.jit(
    lambda x, key, train: trunk.module.apply({"params": trunk.params}, x, train, rngs={"dropout": key}).tokens,
    static_argnums=2,
  )
  first, second, clean = (run(x, jax.random.key(key), train) for key, train in ((0, True), (1, True), (0, False)))
  assert clean.shape == (2, trunk.num_tokens, trunk.width) and jnp.abs(first - second).max() > 1e-3
  np.testing.assert_allclose(clean, trunk.compiled(trunk.params, np.asarray(x)), atol=1e-6)
  assert trunk.fingerprint != load_trunk(name, **SMALL[name] | {"width": 2 * SMALL[name]["width"]}).fingerprint


def test_the_mlp_by_hand():
  trunk = load_trunk("mlp", **SMALL["mlp"])
  x = np.array([[[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]]], np.float32)
  np.testing.assert_array_equal(trunk.preprocess(x[0].tolist()), x[0])
  p, gelu = jax.tree.map(np.asarray, trunk.params), lambda x: np.asarray(jax.nn.gelu(x))
  first = gelu(x @ p["first"]["kernel"] + p["first"]["bias"])
  normal = (first - first.mean(-1, keepdims=True)) / np.sqrt(first.var(-1, keepdims=True) + 1e-6)
  second = gelu((normal * p["norm"]["scale"] + p["norm"]["bias"]) @ p["second"]["kernel"] + p["second"]["bias"])
  np.testing.assert_allclose(trunk.compiled(trunk.params, x), first + second, atol=1e-5)
  with pytest.raises(ValueError, match=r"sensor: got an array of shape \(3,\), allowed is \(2, 3\)"):
    trunk.preprocess(x[0, 0])


def test_vectors_and_words_have_no_parameters():
  vectors, words = load_trunk("vectors", width=3), load_trunk("hashed_words", width=8)
  assert vectors.params == words.params == {} and (vectors.num_tokens, vectors.width) == (1, 3)
  np.testing.assert_array_equal(vectors.compiled({}, vectors.collate([vectors.preprocess([1, 2, 3])])), [[[1, 2, 3]]])
  one, other = words.preprocess("two words"), words.preprocess("Words, two!")
  np.testing.assert_allclose(one, other, atol=1e-6)
  assert np.linalg.norm(one) == pytest.approx(np.sqrt(8))
  with pytest.raises(ValueError, match="'...' has no word"):
    words.preprocess("...")

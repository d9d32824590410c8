"""Segments, parts and the call that quantises all modalities."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax import codebook, compositional, losses
from codebind_jax.compositional import CompositionalSpec
from tests.arrays import compiled, normal

SPEC = CompositionalSpec(shared_dim=32, specific_dim=16, num_codes=(12, 6), revive="none")


pytestmark = pytest.mark.usefixtures("quick_compiler")


def features(seed=0):
  return {"text": normal(seed, 6, 32), "image": normal(seed + 1, 6, 3, 48), "depth": normal(seed + 2, 4, 5, 48)}


def quantised(x, states, spec=SPEC, *, rng=None, masks=None, **options):
  """Outputs and codebooks, as one program for each `spec` and options."""
  return compiled(compositional.quantize_modalities, spec=spec, **options)(x, states, rng=rng, masks=masks)


def books(spec=SPEC):
  new = compiled(compositional.new_codebooks, spec=spec, modalities=("text", "image", "depth"))
  states = new(jax.random.key(0))
  return {
    name: s.replace(ema_count=jnp.ones_like(s.ema_count), usage=jnp.ones_like(s.usage) / s.usage.size)
    for name, s in states.items()
  }


def assert_close(a, b):
  chex.assert_trees_all_close(a, b, rtol=1e-7, atol=2e-6)


def test_segments_and_back():
  x = normal(0, 2, 3, 24)
  segments = compositional.split_segments(x, 8)
  assert segments.shape == (2, 3, 3, 8)
  np.testing.assert_array_equal(segments[1, 2, 1], x[1, 2, 8:16])
  np.testing.assert_array_equal(compositional.merge_segments(segments), x)


def test_parts_by_hand():
  x = np.arange(12.0, dtype=np.float32)
  shared, specific = compositional.split_parts(x, 8, 4)
  np.testing.assert_array_equal(shared, x[:8])
  np.testing.assert_array_equal(specific, x[8:])
  shared, specific = compositional.split_parts(x, 8, 4, layout="interleaved", code_dims=(4, 2))
  np.testing.assert_array_equal(shared, [0, 1, 2, 3, 6, 7, 8, 9])
  np.testing.assert_array_equal(specific, [4, 5, 10, 11])


@pytest.mark.parametrize("layout, dims", [("parts", (8, 8)), ("interleaved", (8, 4))])
def test_the_call_is_split_quantise_merge_normalise(layout, dims):
  spec = dataclasses.replace(SPEC, layout=layout, code_dims=dims)
  x, states = features(), books(spec)
  outputs, new = compositional.quantize_modalities(x, states, spec, update="none")
  assert all(new[name] is states[name] for name in states)
  for name, out in outputs.items():
    parts = compositional.split_parts(
      x[name], 32, spec.specific_width(name), layout=layout, code_dims=dims
    )
    rows = []
    for part, dim, book, indices in zip(
      parts, dims, spec.codebook_names(name), (out.indices_shared, out.indices_specific)
    ):
      if part.shape[-1]:
        found = compiled(codebook.quantize)(compositional.split_segments(part, dim), states[book].codes)
        np.testing.assert_array_equal(indices, found.indices)
        rows.append(np.asarray(found.vectors))
    shared = np.asarray(compositional.merge_segments(rows[0]))
    np.testing.assert_allclose(
      out.shared, shared / np.linalg.norm(shared, axis=-1, keepdims=True), atol=1e-6
    )
    np.testing.assert_allclose(np.linalg.norm(out.full, axis=-1), 1.0, atol=1e-5)
    assert out.full.shape == x[name].shape
    first = compositional.split_segments(parts[0], dims[0])
    first = first[:, 0] if first.ndim == 4 else first
    unit = np.asarray(first) / np.linalg.norm(first, axis=-1, keepdims=True)
    want = np.einsum("bsd,kd->bsk", unit, np.asarray(states["shared"].codes))
    np.testing.assert_allclose(out.similarity_shared, want, atol=1e-5)


def test_a_snapshot_is_one_update_with_everything():
  x, states = features(), books()
  outputs, new = quantised(x, states)
  rows, indices = [], []
  for name, out in outputs.items():
    part = compositional.split_segments(x[name][..., :32], 8)
    rows.append(np.asarray(part).reshape(-1, 8))
    indices.append(np.asarray(out.indices_shared).reshape(-1))
  rows = np.concatenate(rows)
  rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
  want = compiled(codebook.update, revive="none")(states["shared"], rows, np.concatenate(indices))
  assert_close(new["shared"], want)
  # The order of the modalities does not matter, and the release's own order would.
  reverse = dict(reversed(x.items()))
  assert_close(jax.jit(lambda states: compositional.quantize_modalities(reverse, states, SPEC)[1])(states), new)
  sequential = quantised(x, states, update="sequential")[1]
  assert np.max(np.abs(sequential["shared"].codes - new["shared"].codes)) > 1e-4


def test_only_what_is_present_is_updated():
  states = books()
  _, new = compositional.quantize_modalities({"image": features()["image"]}, states, SPEC)
  assert new["depth"] is states["depth"]
  assert np.any(new["image"].codes != states["image"].codes)


def test_masked_rows_touch_neither_state_nor_losses():
  x, spec = features(), dataclasses.replace(SPEC, revive="random")
  masks = {"image": np.random.default_rng(0).random((6, 3)) < 0.6, "depth": np.array([1, 0, 1, 1], bool)}
  spoilt = dict(x)
  for name, mask in masks.items():
    spoilt[name] = np.where(mask.reshape(mask.shape + (1,) * (3 - mask.ndim)), x[name], np.float32("nan"))

  @jax.jit
  def run(x, masks):
    def loss(x):
      outputs, new = compositional.quantize_modalities(x, books(), spec, masks=masks)
      return sum(out.commitment for out in outputs.values()), new

    (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(x)
    return (value, gradients), new

  (value, gradients), new = run(x, masks)
  (other, spoilt_gradients), spoilt_new = run(spoilt, masks)
  np.testing.assert_allclose(value, other, rtol=1e-6)
  assert_close(new, spoilt_new)
  for name, mask in masks.items():
    assert np.all(gradients[name][~mask] == 0) and np.any(gradients[name][mask] != 0)
    np.testing.assert_allclose(spoilt_gradients[name][mask], gradients[name][mask], atol=1e-6)
  real = {"depth": x["depth"][masks["depth"]]}
  alone = quantised(real, books())
  with_mask = quantised({"depth": x["depth"]}, books(), masks={"depth": masks["depth"]})
  np.testing.assert_allclose(alone[0]["depth"].commitment, with_mask[0]["depth"].commitment, rtol=1e-6)
  assert_close(alone[1], with_mask[1])


def test_similarities_reach_the_features_unless_detached():
  x = features()["image"]

  def gradient(spec):
    loss = lambda x: jnp.sum(
      compositional.quantize_modalities({"image": x}, books(), spec, update="none")[0]["image"].similarity_shared ** 2
    )
    return jax.jit(jax.grad(loss))(x)

  assert np.any(gradient(SPEC)[:, 0] != 0) and np.all(gradient(SPEC)[:, 1:] == 0)
  assert np.all(gradient(dataclasses.replace(SPEC, detach_similarity=True)) == 0)


def test_contrast_of_all_tokens_is_that_of_the_segments():
  x, states = features(), books()
  got = compiled(compositional.contrast_all_tokens, spec=SPEC)(x, states)
  for name in x:
    want = 0.0
    for part, book in zip(compositional.split_parts(x[name], 32, SPEC.specific_width(name)), SPEC.codebook_names(name)):
      if part.shape[-1]:
        rows = np.asarray(compositional.split_segments(part, 8)).reshape(-1, 8)
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        want += compiled(losses.code_contrast)(rows @ np.asarray(states[book].codes).T)
    np.testing.assert_allclose(got[name], want, rtol=1e-4)
  total = lambda spec: lambda x: sum(compositional.contrast_all_tokens(x, books(), spec).values())
  gradient = lambda spec: np.asarray(jax.jit(jax.grad(total(spec)))(x)["image"])
  assert np.all(np.any(gradient(SPEC) != 0, axis=-1))
  assert np.all(gradient(dataclasses.replace(SPEC, detach_similarity=True)) == 0)


def test_kmeans_start_has_no_transient():
  spec = dataclasses.replace(SPEC, revive="random")
  new = compiled(compositional.new_codebooks, spec=SPEC, modalities=("text", "image", "depth"))
  x, states = features(), new(jax.random.key(0))
  started = compiled(compositional.init_codebooks, spec=spec)(jax.random.key(1), x, states)
  for state in started.values():
    assert bool(state.initialised) and float(state.ema_count.min()) >= 1
    np.testing.assert_allclose(np.linalg.norm(state.codes, axis=1), 1.0, atol=1e-5)
  assert not bool(states["shared"].initialised)
  for step in range(3):
    outputs, started = quantised(x, started, spec, rng=jax.random.key(step))
    assert all(float(out.commitment) < 1.0 for out in outputs.values())
    assert all(float(np.linalg.norm(state.codes, axis=1).max()) < 1.5 for state in started.values())
  # The release's start, from counts of zero, inflates the codes that are not used.
  cold = dataclasses.replace(SPEC, revive_mode="codes_only")
  codes = quantised({"text": x["text"][:1]}, states, cold)[1]["shared"].codes
  assert np.linalg.norm(codes, axis=1).max() > 1e2


def test_kmeans_start_can_sample_and_take_first_tokens_only():
  x, states = features(), books()
  spoilt = {**x, "image": x["image"].copy(), "depth": x["depth"].copy()}
  for name in ("image", "depth"):
    spoilt[name][:, 1:] = np.nan
  start = compiled(compositional.init_codebooks, spec=SPEC, first_token=True)
  started = start(jax.random.key(1), spoilt, states)
  chex.assert_tree_all_finite({name: state.codes for name, state in started.items()})
  sampled = compiled(compositional.init_codebooks, spec=SPEC, max_segments=24)(jax.random.key(1), x, states)
  assert sampled["shared"].ema_count.sum() < 24 + 12


@pytest.mark.parametrize(
  "change, message",
  [
    ({"shared_dim": 30}, "shared_dim.*30"),
    ({"specific_dims": {"image": 12}}, "image.*12"),
    ({"layout": "mixed"}, "layout.*mixed"),
    ({"sharing": "one", "code_dims": (8, 4)}, r"code_dims.*\(8, 4\)"),
    ({"layout": "interleaved"}, "interleaved.*16"),
  ],
)
def test_bad_specs_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SPEC, **change)


@pytest.mark.parametrize(
  "x, options, message",
  [
    ({"image": normal(0, 2, 3, 40)}, {}, "image.*48.*40"),
    ({"audio": normal(0, 2, 3, 48)}, {}, "audio"),
    ({"image": normal(0, 2, 3, 48)}, {"masks": {"image": np.ones(3, bool)}}, r"mask.*image.*\(3,\)"),
    ({"image": normal(0, 2, 3, 48)}, {"update": "never"}, "never"),
  ],
)
def test_bad_input_is_named(x, options, message):
  with pytest.raises(ValueError, match=message):
    compositional.quantize_modalities(x, books(), SPEC, **options)


@pytest.mark.parametrize("name", ["shared", "image"])
def test_a_codebook_of_another_width_is_named(name):
  states, x = books(), {"image": features()["image"]}
  states[name] = codebook.init_codebook(jax.random.key(0), 12, 4)
  message = rf"codebook '{name}' has codes of shape \(12, 4\); segments of width 8 need \[k, 8\]"
  for call in (
    lambda: compositional.quantize_modalities(x, states, SPEC, update="none"),
    lambda: compositional.quantize_modalities(x, states, SPEC),
    lambda: compositional.contrast_all_tokens(x, states, SPEC),
    lambda: compositional.init_codebooks(jax.random.key(1), x, states, SPEC),
  ):
    with pytest.raises(ValueError, match=message):
      call()
  del states[name]
  with pytest.raises(ValueError, match=f"codebooks lack '{name}', which 'image' needs"):
    compositional.contrast_all_tokens(x, states, SPEC)


def test_similarities_of_the_first_rows_alone_change_nothing_else():
  whole, after = quantised(features(), books())
  some, again = quantised(features(), books(), similarity_rows=2)
  for name, out in whole.items():
    part = some[name]
    assert part.similarity_shared.shape[0] == 2
    assert_close(part.similarity_shared, out.similarity_shared[:2])
    if out.similarity_specific.size:
      assert_close(part.similarity_specific, out.similarity_specific[:2])
    assert_close(part.full, out.full)
  assert_close(after, again)


def test_own_codes_have_a_width_for_each_modality():
  spec = dataclasses.replace(SPEC, specific_code_dims={"depth": 4})
  states, x = books(spec), features()
  assert {name: s.codes.shape for name, s in states.items()} == {"shared": (12, 8), "image": (6, 8), "depth": (6, 4)}
  found, _ = quantised(x, states, spec, update="none")
  assert found["image"].indices_specific.shape == (6, 3, 2) and found["depth"].indices_specific.shape == (4, 5, 4)
  # As if each modality were quantised by a quantiser of its width alone.
  for name, width in (("image", 8), ("depth", 4)):
    alone = dataclasses.replace(SPEC, code_dims=(8, width))
    one, _ = quantised({name: x[name]}, {k: states[k] for k in ("shared", name)}, alone, update="none")
    assert_close(one[name], found[name])
  with pytest.raises(ValueError, match="specific_dim of 'depth' must be a multiple of 5, got 16"):
    dataclasses.replace(SPEC, specific_dims={"depth": 16}, specific_code_dims={"depth": 5})
  with pytest.raises(ValueError, match="sharing='one' needs equal code_dims"):
    dataclasses.replace(SPEC, sharing="one", specific_code_dims={"depth": 4})

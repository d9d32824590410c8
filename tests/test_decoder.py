"""Decoder and reconstruction loss against the CodeBind release, and the properties the release lacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax.losses.reconstruction import reconstruction, resize_target
from codebind_jax.models.decoder import Decoder, decoder_for
from codebind_jax.models.imagebind import HUGE
from codebind_jax.trunks import codebind_release, names
from tests.model_fixtures import (
  CLIPS,
  encoded,
  error,
  golden,
  inputs,
  jit,
  official,
  spec,
  state_dict,
  weights,
)

TOLERANCE = 1e-5
D = golden("codebind_model_tiny_decoder")
SMALL = {"width": 16, "depth": 2, "heads": 8}
CASES = [("dec", m) for m in ("image", "audio", "depth", "tactile")] + [("dec2", "audio"), ("decvideo", "video")]
# The same code path as one above with other numbers.
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in (("dec", "thermal"), ("dec2", "depth"))]


def tokens_of(name):
  """The release's decoder input: normalised features of all tokens, averaged over clips; computed in numpy."""
  modality, x = official("image" if name == "video" else name), encoded(name).trunk
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  parts = []
  for head, linear in (("modality_heads", "2"), ("modality_heads_mvq", "1")):
    weight, bias, matrix = (state_dict()[f"{head}.{modality}.{n}"] for n in ("0.weight", "0.bias", f"{linear}.weight"))
    parts.append((x * weight + bias) @ matrix.T)
  x = np.concatenate(parts, -1)
  x = x / np.linalg.norm(x, axis=-1, keepdims=True)
  return x.reshape(-1, CLIPS.get(name, 1), *x.shape[1:]).mean(1)


def decoder_case(group, name):
  """Our decoder with the release's weights, and its arguments."""
  modality, out = "image" if name == "video" else name, encoded(name)
  if group == "dec2":
    decoder = decoder_for(spec(modality), trunk_dim=0, cls_token=False, **SMALL)
    arguments = (tokens_of(name)[:, 1:],)
  else:
    trunk = out.trunk.reshape(-1, CLIPS.get(name, 1), *out.trunk.shape[1:]).mean(1)
    decoder, arguments = decoder_for(spec(modality), **SMALL), (tokens_of(name), trunk, out.positions)
  tree = jax.eval_shape(decoder.init, jax.random.key(0), *map(jnp.asarray, arguments))["params"]
  # The release's unused convolutions have no counterpart here and must not be in the way.
  unused = {f"decoder_heads.{text.split(':')[0]}": np.zeros(1) for text in golden(
    "codebind_model_tiny_weights")[f"{group}/unused_head_params"]}
  assert unused
  part = codebind_release.decoder_weights(weights(state_dict(f"{group}/w/") | unused), modality)
  params = names.load(tree, part, codebind_release.decoder_rules(modality))
  return decoder, params, arguments


@pytest.mark.parametrize(("group", "name"), CASES)
def test_decoder_and_loss_equal_the_release(group, name):
  decoder, params, arguments = decoder_case(group, name)
  x, clips, key = inputs(name), CLIPS.get(name, 1), f"{group}/{official('image' if name == 'video' else name)}"

  @jit
  def run(params, x, *arguments):
    recon = decoder.apply({"params": params}, *arguments)
    return recon, resize_target(x.mean(1) if clips > 1 else x, recon.shape), reconstruction(recon, x, clips=clips)

  recon, target, mse = jax.device_get(run(params, x, *arguments))
  first = lambda a: np.moveaxis(a[:1], -1, 1)[..., ::3, ::3]
  assert error(first(recon), D[f"{key}/recon"]) < TOLERANCE
  if f"{key}/target_frame0" in D:
    assert error(first(target)[:, :, 0], D[f"{key}/target_frame0"]) < TOLERANCE
    np.testing.assert_array_equal(target[:, 0], target[:, 1])
  else:
    assert error(first(target), D[f"{key}/target"]) < 2e-5
  np.testing.assert_allclose(mse, D[f"{key}/mse"], rtol=1e-6)


def test_released_sizes():
  sizes = {}
  for modality in ("image", "audio", "depth", "tactile", "imu", "eeg"):
    decoder = decoder_for(HUGE[modality])
    assert (decoder.width, decoder.depth, decoder.heads) == (512, 8, 8)
    stride = decoder.stride or decoder.patch
    sizes[modality] = tuple((n - 1) * s + p for n, s, p in zip(decoder.grid, stride, decoder.patch))
  assert sizes == {
    "image": (2, 112, 112), "audio": (63, 98), "depth": (112, 112), "tactile": (112, 112), "imu": (1000,), "eeg": (512,)
  }  # fmt: skip
  with pytest.raises(ValueError, match="text has one pooled token"):
    decoder_for(HUGE["text"])


def test_a_series_is_decoded_with_its_positions():
  """The release passes no positions for EEG and has no decoder for it (spec section 7)."""
  decoder, out = decoder_for(spec("eeg"), **SMALL), encoded("eeg")
  rng = np.random.default_rng(0)
  tokens = rng.normal(size=(3, 13, 40)).astype(np.float32)
  tree = jax.eval_shape(decoder.init, jax.random.key(0), tokens, out.trunk, out.positions)["params"]
  params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), tree)
  apply = lambda *arguments: decoder.apply({"params": params}, *arguments)
  run = jit(apply)
  recon = run(tokens, out.trunk, out.positions)
  assert recon.shape == (3, 24, 128)
  assert not np.allclose(recon, run(tokens, out.trunk, np.zeros_like(out.positions)), atol=1e-3)
  loss = lambda x, *arguments: reconstruction(apply(*arguments), x)
  gradients = jit(jax.grad(loss, argnums=(1, 2, 3)))(inputs("eeg"), tokens, out.trunk, out.positions)
  assert all(np.all(np.isfinite(g)) and np.any(g) for g in gradients)


def test_decoder_in_bfloat16_gives_float32():
  decoder = Decoder((3,), 2, (4,), width=8, depth=1, heads=2, dtype=jnp.bfloat16)
  shape = jax.eval_shape(lambda key, x: decoder.init_with_output(key, x)[0], jax.random.key(0), jnp.zeros((1, 4, 6)))
  assert shape.dtype == jnp.float32 and shape.shape == (1, 12, 2)


@pytest.mark.parametrize(
  ("decoder", "arguments", "message"),
  [
    (Decoder((3,), 2, (4,)), (np.zeros((1, 5, 6)),), "tokens: 5, allowed 4"),
    (Decoder((3,), 2, (4,), cls_token=False), (np.zeros((1, 4, 6)),), "tokens: 4, allowed 3"),
    (Decoder((3,), 2, (4,), trunk_dim=8), (np.zeros((1, 4, 6)),), "trunk_dim 8"),
    (Decoder((3,), 2, (4,)), (np.zeros((1, 4, 6)), np.zeros((1, 4, 8)), np.zeros((4, 8))), "trunk_dim 0"),
  ],
)
def test_wrong_decoder_inputs_are_errors(decoder, arguments, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(decoder.init, jax.random.key(0), *map(jnp.asarray, arguments))


def test_resize_target_by_hand():
  series = jnp.arange(8.0).reshape(1, 8, 1)
  # Halving with a triangle filter of twice the width: (1, 3, 3, 1) / 8 inside, renormalised at the border.
  expected = [(3 * 0 + 3 * 1 + 2) / 7, 2.5, 4.5, 7 - 5 / 7]
  np.testing.assert_allclose(resize_target(series, (1, 4, 1))[0, :, 0], expected, rtol=1e-6)
  np.testing.assert_allclose(resize_target(series, (1, 4, 1), antialias=False)[0, :, 0], [0.5, 2.5, 4.5, 6.5])
  clip = jnp.arange(16.0).reshape(1, 1, 2, 8, 1)
  np.testing.assert_allclose(resize_target(clip, (1, 1, 2, 4, 1))[0, 0, 0, :, 0], [0.5, 2.5, 4.5, 6.5])
  image = jnp.arange(4.0).reshape(1, 2, 2, 1)
  np.testing.assert_array_equal(resize_target(image, (1, 3, 2, 2, 1))[0, 2], image[0])
  for shape in ((2, 4, 1), (1, 4, 2), (1, 4, 4, 1)):
    with pytest.raises(ValueError, match="does not fit the input"):
      resize_target(series, shape)


def test_reconstruction_counts_real_rows_only_and_averages_clips():
  rng = np.random.default_rng(0)
  prediction, x = (jnp.asarray(rng.normal(size=(4, 6, 2)), jnp.float32) for _ in range(2))
  expected = np.mean((np.asarray(prediction) - np.asarray(x))[[0, 2]] ** 2)
  mask = jnp.asarray([True, False, True, False])
  np.testing.assert_allclose(reconstruction(prediction, x, mask=mask), expected, rtol=1e-6)
  assert reconstruction(prediction, x, mask=jnp.zeros(4)) == 0
  clips = jnp.stack([x - 1, x + 3], axis=1)
  np.testing.assert_allclose(reconstruction(prediction, clips, clips=2), np.mean((prediction - x - 1) ** 2), rtol=1e-5)


def test_half_precision_is_compared_in_float32():
  prediction = jnp.full((1, 4, 1), 300.0, jnp.float16)
  assert float(reconstruction(prediction, jnp.zeros((1, 4, 1), jnp.float16))) == 90000.0

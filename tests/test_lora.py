"""LoRA against the CodeBind release (its outputs, the true gradients, not its wrong ones), and on any linen module."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from codebind_jax.models.encoder import Encoder
from codebind_jax.models.lora import from_release, lora, merge
from codebind_jax.models.transformer import AttentionPool, BlockSpec, Transformer
from tests.model_fixtures import encoded, encoder_params, error, golden, inputs, jit, spec, state_dict

TOLERANCE = 1e-5
L = golden("codebind_model_tiny_lora")
ALL = "(.*/)?(attn|mlp)/(qkv|out|fc1|fc2)"
CASES = {
  "lora_audio_all": ("audio", "(.*/)?blocks_[12]/(attn|mlp)/(qkv|out|fc1|fc2)"),
  "lora_depth_attn": ("depth", "(.*/)?attn/(qkv|out)"),
  "lora_thermal_attn_out": ("thermal", "(.*/)?blocks_0/attn/out"),
  "lora_text_all": ("text", "(.*/)?blocks_0/(attn|mlp)/(qkv|out|fc1|fc2)"),
}


def over(params, adapters):
  """Parameters with adapters beside their kernels."""
  return unflatten_dict(flatten_dict(params) | flatten_dict(adapters))


def released(group):
  return from_release(state_dict(f"{group}/w/"))


def run(module, params, x, pattern=ALL, rank=4, **options):
  """Tokens with adapters, in one program."""

  @jit
  def call(params, x):
    with nn.intercept_methods(lora(pattern, rank)):
      return module.apply({"params": params}, x, **options)

  return jax.device_get(call(params, x))


def initialised(module, x, pattern=ALL, rank=4):
  with nn.intercept_methods(lora(pattern, rank)):
    return jit(module.init)(jax.random.key(0), x)["params"]


@pytest.mark.parametrize("group", CASES)
def test_an_adapted_encoder_equals_the_release(group):
  modality, pattern = CASES[group]
  params = encoder_params(modality)
  adapted = {**params, "trunk": over(params["trunk"], released(group))}
  make = lambda drop: run(Encoder(spec(modality), drop_text_mask=drop), adapted, inputs(modality), pattern).trunk
  # The release loses the text's mask; with the mask the output must be another.
  if modality == "text":
    assert error(make(True), L[f"{group}/trunk_output"]) < TOLERANCE
    assert error(make(False), L[f"{group}/trunk_output"]) > 0.1
  else:
    assert error(make(False)[:1, ::4], L[f"{group}/trunk_output"]) < TOLERANCE


@pytest.mark.parametrize("group", CASES)
def test_patterns_choose_the_layers_that_the_release_adapts(group):
  modality, pattern = CASES[group]
  s = spec(modality)
  x = jax.ShapeDtypeStruct((1, 3, s.width), jnp.float32)
  with nn.intercept_methods(lora(pattern, 4)):
    shapes = jax.eval_shape(s.trunk().init, jax.random.key(0), x)["params"]
  ours = {path: leaf.shape for path, leaf in flatten_dict(shapes).items() if path[-1].startswith("lora_")}
  assert ours == {path: leaf.shape for path, leaf in flatten_dict(released(group)).items()}
  assert len(ours) == len(L[f"{group}/requires_grad_params"])


@pytest.mark.parametrize("group", ["lora_audio_all", "lora_depth_attn"])
def test_gradients_are_the_true_ones(group):
  modality, pattern = CASES[group]
  params, s = encoder_params(modality), spec(modality)
  x = inputs(modality)
  x = x.reshape(-1, *x.shape[2:]) if modality == "audio" else x
  tokens = jit(s.stem().apply)({"params": params["stem"]}, x)[0]

  @jit
  def gradients(adapters, tokens):
    def forward(adapters, tokens):
      with nn.intercept_methods(lora(pattern, 4)):
        return s.trunk().apply({"params": over(params["trunk"], adapters)}, tokens)

    return jax.vjp(forward, adapters, tokens)[1](jnp.asarray(L[f"{group}/cotangent"]))

  adapters, tokens = jax.device_get(gradients(released(group), tokens))
  assert error(tokens[:, ::8], L[f"{group}/true_grad/trunk_input"]) < TOLERANCE
  for kind, check in (("true_grad", lambda e: e < TOLERANCE), ("ref_grad", lambda e: e > 0.1)):
    prefix = f"{group}/{kind}/"
    theirs = from_release({k.removeprefix(prefix): v for k, v in L.items() if k.startswith(f"{prefix}lora")})
    assert check(max(jax.tree.leaves(jax.tree.map(error, adapters, jax.device_get(theirs)))))


@pytest.mark.parametrize("group", ["lora_audio_all", "lora_thermal_attn_out"])
def test_merging_keeps_the_outputs(group):
  modality, pattern = CASES[group]
  x, params = jnp.asarray(encoded(modality).trunk), over(encoder_params(modality)["trunk"], released(group))
  trunk = spec(modality).trunk()
  merged = merge(params)
  assert not [path for path in flatten_dict(merged) if path[-1].startswith("lora_")]
  assert error(jit(trunk.apply)({"params": merged}, x), run(trunk, params, x, pattern)) < TOLERANCE


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(0, 2**31))
def test_merge_by_hand(rank, seed):
  rng = np.random.default_rng(seed)
  kernel, bias, a, b = (rng.normal(size=s).astype(np.float32) for s in ((5, 3), (3,), (5, rank), (rank, 3)))
  params = {"m": {"q": {"kernel": kernel, "bias": bias, "lora_a": a, "lora_b": b}}, "n": {"bias": bias}}
  merged = merge(params)
  np.testing.assert_allclose(merged["m"]["q"]["kernel"], kernel + a @ b, rtol=1e-5, atol=1e-5)
  assert set(merged["m"]["q"]) == {"kernel", "bias"} and set(params["m"]["q"]) > {"lora_a"}
  np.testing.assert_array_equal(merged["n"]["bias"], bias)


def test_low_precision_kernels_keep_their_type_and_add_in_float32():
  adapters = {"lora_a": jnp.ones((4, 1)), "lora_b": jnp.full((1, 4), 2.0**-6)}
  out = merge({"q": {"kernel": jnp.ones((4, 4), jnp.bfloat16), **adapters}})["q"]["kernel"]
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(out.astype(jnp.float32), 1 + 2.0**-6)


def test_scanned_layers_have_stacked_adapters_that_equal_those_of_single_layers():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 16)), jnp.float32)
  plain, scanned = (Transformer(3, BlockSpec(2), causal=True, scan=scan, remat=scan) for scan in (False, True))
  params = initialised(plain, x)
  params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)
  stacked = {"blocks": jax.tree.map(lambda *layers: jnp.stack(layers), *(params[f"blocks_{i}"] for i in range(3)))}
  assert jax.tree.map(jnp.shape, initialised(scanned, x)) == jax.tree.map(jnp.shape, stacked)
  assert stacked["blocks"]["attn"]["qkv"]["lora_a"].shape == (3, 16, 4)
  wanted = run(plain, params, x)
  np.testing.assert_allclose(run(scanned, stacked, x), wanted, atol=1e-5)
  np.testing.assert_allclose(jit(scanned.apply)({"params": merge(stacked)}, x), wanted, atol=1e-4)


def test_new_adapters_change_nothing_and_learn_b_first():
  params, x = encoder_params("eeg")["trunk"], jnp.asarray(encoded("eeg").trunk)
  trunk, pattern = spec("eeg").trunk(), "(.*/)?attn/out"
  drawn = {path: leaf for path, leaf in flatten_dict(initialised(trunk, x, pattern, 2)).items() if "lora_" in path[-1]}
  params = over(params, unflatten_dict(drawn))
  np.testing.assert_array_equal(run(trunk, params, x, pattern, 2), jit(trunk.apply)({"params": merge(params)}, x))

  def loss(params):
    with nn.intercept_methods(lora(pattern, 2)):
      return jnp.sum(trunk.apply({"params": params}, x) ** 2)

  gradient = jit(jax.grad(loss))(params)
  for name, block in gradient.items():
    assert not np.any(block["attn"]["out"]["lora_a"]) and np.any(block["attn"]["out"]["lora_b"]), name
  bound = np.abs(params["blocks_0"]["attn"]["out"]["lora_a"]).max()
  assert 0.5 * x.shape[-1] ** -0.5 < bound <= x.shape[-1] ** -0.5


def test_rank_0_and_other_layers_have_no_adapters():
  x = jnp.ones((1, 3, 8))
  trunk = Transformer(1, BlockSpec(2))
  plain = jax.tree.map(jnp.shape, jit(trunk.init)(jax.random.key(0), x)["params"])
  assert jax.tree.map(jnp.shape, initialised(trunk, x, rank=0)) == plain
  assert jax.tree.map(jnp.shape, initialised(trunk, x, "attn/qkv")) == plain  # the whole path must match
  params = jit(trunk.init)(jax.random.key(0), x)["params"]
  np.testing.assert_array_equal(run(trunk, params, x, rank=0), jit(trunk.apply)({"params": params}, x))


class Foreign(nn.Module):
  """A model that knows nothing of adapters."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(6, name="first")(x))
    return nn.Conv(4, (3,), name="conv")(x) + nn.Dense(4, use_bias=False, dtype=jnp.bfloat16, name="last")(x)


@pytest.mark.parametrize("make", [Foreign, functools.partial(AttentionPool, BlockSpec(2))], ids=["foreign", "pool"])
def test_any_linen_module_takes_adapters(make):
  module, x = make(), jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
  pattern = ".*(first|last|q|kv|fc1)"
  params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape),
                        initialised(module, x, pattern, 2))  # fmt: skip
  adapted = {path[-2] for path in flatten_dict(params) if path[-1] == "lora_a"}
  assert adapted == ({"first", "last"} if make is Foreign else {"q", "kv", "fc1"})
  out = run(module, params, x, pattern, 2)
  near = jit(module.apply)({"params": merge(params)}, x)
  np.testing.assert_allclose(out, near, atol=0.1 if make is Foreign else 1e-5)
  plain = {path: leaf for path, leaf in flatten_dict(params).items() if "lora_" not in path[-1]}
  assert not np.allclose(out, jit(module.apply)({"params": unflatten_dict(plain)}, x), atol=1e-2)


def test_the_releases_down_and_up_are_transposed():
  down, up = np.ones((2, 5), np.float32), np.full((3, 2), 2.0, np.float32)
  for prefix in ("", "lora_model."):
    names = {f"{prefix}blocks.4.mlp.fc1_lora_{kind}": value for kind, value in (("down", down), ("up", up))}
    adapters = from_release(names)["blocks_4"]["mlp"]["fc1"]
    assert adapters["lora_a"].shape == (5, 2) and adapters["lora_b"].shape == (2, 3)
    merged = merge({"fc1": {"kernel": np.zeros((5, 3), np.float32), **adapters}})["fc1"]["kernel"]
    np.testing.assert_array_equal(merged.T, up @ down)
  with pytest.raises(ValueError, match=r"unexpected \['blocks.0.attn.q_lora_up'\]"):
    from_release({"blocks.0.attn.q_lora_up": np.zeros((2, 2))})

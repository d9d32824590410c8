"""LoRA against the CodeBind release (its outputs, the true gradients, not its wrong ones) and its algebra."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codebind_jax.models.encoder import Encoder
from codebind_jax.models.lora import apply_lora, init_lora, load_lora, lora_pattern, merge, trainable_patterns
from tests.model_fixtures import encoded, encoder_params, error, golden, inputs, jit, spec, state_dict

TOLERANCE = 1e-5
L = golden("codebind_model_tiny_lora")
CASES = {
  "lora_audio_all": ("audio", lora_pattern("audio", layers=(1, 2))),
  "lora_depth_attn": ("depth", lora_pattern("depth", targets="attn")),
  "lora_thermal_attn_out": ("thermal", lora_pattern("thermal", layers=(0,), targets="attn_out")),
  "lora_text_all": ("text", lora_pattern("text", layers=(0,))),
}


def released(group):
  return load_lora(state_dict(f"{group}/w/"))


@pytest.mark.parametrize("group", CASES)
def test_adapted_trunk_equals_the_release(group):
  modality, _ = CASES[group]
  params = encoder_params(modality)
  adapted = {**params, "trunk": apply_lora(params["trunk"], released(group))}
  # The release loses the text's mask; with the mask the output must be another.
  run = lambda drop: jax.device_get(
    jit(Encoder(spec(modality), drop_text_mask=drop).apply)({"params": adapted}, inputs(modality)).trunk
  )
  if modality == "text":
    assert error(run(True), L[f"{group}/trunk_output"]) < TOLERANCE
    assert error(run(False), L[f"{group}/trunk_output"]) > 0.1
  else:
    assert error(run(False)[:1, ::4], L[f"{group}/trunk_output"]) < TOLERANCE


@pytest.mark.parametrize("group", ["lora_audio_all", "lora_depth_attn"])
def test_gradients_are_the_true_ones(group):
  modality, _ = CASES[group]
  params, s = encoder_params(modality), spec(modality)
  x = inputs(modality)
  x = x.reshape(-1, *x.shape[2:]) if modality == "audio" else x
  tokens = jit(s.stem().apply)({"params": params["stem"]}, x)[0]

  @jit
  def gradients(lora, tokens):
    forward = lambda lora, tokens: s.trunk().apply({"params": apply_lora(params["trunk"], lora)}, tokens)
    return jax.vjp(forward, lora, tokens)[1](jnp.asarray(L[f"{group}/cotangent"]))

  lora, tokens = jax.device_get(gradients(released(group), tokens))
  assert error(tokens[:, ::8], L[f"{group}/true_grad/trunk_input"]) < TOLERANCE
  for kind, check in (("true_grad", lambda e: e < TOLERANCE), ("ref_grad", lambda e: e > 0.1)):
    prefix = f"{group}/{kind}/"
    theirs = load_lora({k.removeprefix(prefix): v for k, v in L.items() if k.startswith(f"{prefix}lora")})
    assert check(max(jax.tree.leaves(jax.tree.map(error, lora, jax.device_get(theirs)))))


@pytest.mark.parametrize("group", CASES)
def test_patterns_choose_the_layers_the_release_adapts(group):
  modality, pattern = CASES[group]
  tree = {"towers": {modality: {"trunk": encoder_params(modality)["trunk"]}}}
  ours = jax.eval_shape(lambda key: init_lora(key, tree, [pattern], rank=4), jax.random.key(0))
  theirs = {"towers": {modality: {"trunk": released(group)}}}
  assert jax.tree.map(lambda leaf: leaf.shape, ours) == jax.tree.map(jnp.shape, theirs)
  assert len(jax.tree.leaves(ours)) == len(L[f"{group}/requires_grad_params"])


def test_new_adapters_change_nothing_and_learn_b_first():
  params, x = encoder_params("eeg"), jnp.asarray(encoded("eeg").trunk)
  pattern = lora_pattern("eeg", targets="attn_out")
  lora = init_lora(jax.random.key(1), {"eeg": params}, [pattern], rank=2)["eeg"]["trunk"]
  trunk = spec("eeg").trunk()
  forward = lambda lora: trunk.apply({"params": apply_lora(params["trunk"], lora)}, x)
  jax.tree.map(np.testing.assert_array_equal, apply_lora(params["trunk"], lora), params["trunk"])
  gradient = jit(jax.grad(lambda lora: jnp.sum(forward(lora) ** 2)))(lora)
  for block in gradient.values():
    assert not np.any(block["attn"]["out"]["kernel"]["a"]) and np.any(block["attn"]["out"]["kernel"]["b"])
  bound = np.abs(lora["blocks_0"]["attn"]["out"]["kernel"]["a"]).max()
  assert 0.5 * 24**-0.5 < bound <= 24**-0.5


def test_a_kernel_draws_the_same_whatever_else_is_adapted():
  tree = {"eeg": {"trunk": encoder_params("eeg")["trunk"]}}
  one = init_lora(jax.random.key(1), tree, [lora_pattern("eeg", layers=[1], targets="attn_out")])
  all_of_them = init_lora(jax.random.key(1), tree, [lora_pattern("eeg")])
  same = lambda t: t["eeg"]["trunk"]["blocks_1"]["attn"]["out"]["kernel"]["a"]
  np.testing.assert_array_equal(same(one), same(all_of_them))
  assert not np.array_equal(same(all_of_them), all_of_them["eeg"]["trunk"]["blocks_0"]["attn"]["out"]["kernel"]["a"])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.sampled_from([None, 0.5, 8.0]), st.integers(0, 2**31))
def test_merge_by_hand(rank, alpha, seed):
  rng = np.random.default_rng(seed)
  kernel, bias, a, b = (rng.normal(size=s).astype(np.float32) for s in ((5, 3), (3,), (5, rank), (rank, 3)))
  params = {"m": {"q": {"kernel": kernel, "bias": bias}}, "lora": {"m": {"q": {"kernel": {"a": a, "b": b}}}}}
  merged = merge(params, alpha=alpha)
  scale = 1.0 if alpha is None else alpha / rank
  np.testing.assert_allclose(merged["m"]["q"]["kernel"], kernel + scale * a @ b, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(merged["m"]["q"]["bias"], bias)
  assert set(merged) == {"m"} and params["m"]["q"]["kernel"] is kernel
  applied = apply_lora({"m": params["m"]}, params["lora"], alpha=alpha)
  np.testing.assert_allclose(applied["m"]["q"]["kernel"], merged["m"]["q"]["kernel"], rtol=1e-5)


def test_merged_model_gives_what_the_adapted_one_gives():
  trunk, x, lora = encoder_params("depth")["trunk"], jnp.asarray(encoded("depth").trunk), released("lora_depth_attn")
  run = lambda params: spec("depth").trunk().apply({"params": params}, x)
  adapted = jit(lambda p, lora: run(apply_lora(p, lora)))(trunk, lora)
  assert error(jit(run)(merge({**trunk, "lora": lora})), adapted) < TOLERANCE


def test_low_precision_kernels_keep_their_type_and_add_in_float32():
  kernel = jnp.ones((4, 4), jnp.bfloat16)
  lora = {"kernel": {"a": jnp.ones((4, 1)), "b": jnp.full((1, 4), 2.0**-9)}}
  out = apply_lora({"kernel": kernel}, lora, alpha=8.0)["kernel"]
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(out.astype(jnp.float32), 1 + 2.0**-6)


ALL = {
  "image/stem/cls_token", "image/stem/positions", "image/trunk/blocks_0/attn/qkv/kernel", "image/shared/proj/kernel",
  "image/specific/norm/scale", "image/decoder/embed/kernel", "image/log_logit_scale",
  "lora/image/trunk/blocks_0/attn/qkv/kernel/a", "audio/trunk/blocks_0/attn/qkv/kernel", "audio/shared/proj/kernel",
  "lora/audio/trunk/blocks_0/attn/qkv/kernel/a", "image_log_logit_scale", "audio_log_logit_scale",
}  # fmt: skip
HEADS = {"image/shared/proj/kernel", "image/specific/norm/scale", "image/decoder/embed/kernel"}


def chosen(names, patterns):
  return {name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)}


@pytest.mark.parametrize("prefix", ["", "towers/"])
def test_trainable_patterns(prefix):
  place = lambda name: name.replace("lora/", f"lora/{prefix}") if name.startswith("lora/") else prefix + name
  names = {place(name) for name in ALL}
  expected = {
    "head": HEADS,
    "lora": HEADS | {"image/stem/cls_token", "lora/image/trunk/blocks_0/attn/qkv/kernel/a"},
    "full": {name for name in ALL if "image" in name},
  }
  for tune, wanted in expected.items():
    assert chosen(names, trainable_patterns(tune, "image")) == {place(name) for name in wanted}
  scales = {place("image/log_logit_scale"), place("image_log_logit_scale")}
  assert chosen(names, trainable_patterns("head", "image", logit_scale=True)) == {place(n) for n in HEADS} | scales


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: lora_pattern("audio", targets="mlp"), "targets: 'mlp', allowed"),
    (lambda: lora_pattern("audio", layers=()), "layers: empty"),
    (lambda: trainable_patterns("none", "audio"), "tune: 'none', allowed"),
    (lambda: init_lora(jax.random.key(0), {"a": {"kernel": np.zeros((4, 4))}}, ["b/kernel"]), "'b/kernel' matches no"),
    (lambda: init_lora(jax.random.key(0), {"a": {"kernel": np.zeros((3, 3, 4, 4))}}, ["a/kernel"]), "allowed a matrix"),
    (lambda: init_lora(jax.random.key(0), {"a": {"kernel": np.zeros((4, 2))}}, ["a/kernel"], rank=3), "under rank 3"),
    (lambda: apply_lora({}, {"x": {"kernel": {"a": np.zeros((2, 1))}}}), "x/kernel/a has no kernel"),
    (lambda: merge({"x": {}}), "no 'lora' to merge"),
    (lambda: load_lora({"blocks.0.attn.q_lora_up": np.zeros((2, 2))}), "unexpected .'blocks.0.attn.q_lora_up'"),
  ],
)
def test_errors_name_what_is_wrong(call, message):
  with pytest.raises(ValueError, match=message):
    call()

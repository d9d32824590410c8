"""Methods as recipes: each trains, keeps its state where checkpoints find it, and is chosen by one config key."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from codebind_jax import config as config_lib
from codebind_jax.codebook import unified
from codebind_jax.config import validation
from codebind_jax.methods.base import EXTRA, method_names, unheeded
from codebind_jax.methods.unified import same_steps
from codebind_jax.runtime.optim import make_optimizer
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.step import make_embed_step, make_start_codebooks, make_train_step
from configs import common

pytestmark = pytest.mark.usefixtures("quick_compiler")
ROWS, NAMES = 24, ("audio", "image", "text")
SMALL = {
  "codebind": {}, "fixed_anchor": {"frozen": False}, "centrobind": {"noise": 0.1},
  "codis": {"codes": 12, "queue": 48, "iterations": 10}, "dcid": {"codes": 12, "club_hidden": 8},
  "fcid": {"codes": 12, "club_hidden": 8},
}  # fmt: skip


def small_config(method, steps=4, **options):
  config = common.get_config()
  config.steps, config.batch_size, config.method = steps, ROWS, method
  config.method_options = SMALL[method] | options
  config.data.worlds = ("synthetic-" + "-".join(NAMES),)
  config.data.profile = "tiny"
  config.model.shared_dim, config.codebook.dim, config.codebook.shared_codes = 8, 4, 16
  config.optim.warmup, config.optim.learning_rate = 2, 3e-3
  config.model.towers.text = common.tower("hashed_words", options={"width": 16})
  for name in ("audio", "image"):
    config.model.towers[name] = common.tower(
      "mlp", options={"inputs": 64, "modality": name, "width": 16}, cache=False, specific_dim=4
    )
    config.codebook.codes[name] = 8
  config.stages.only = common.stage(
    config, pairs=(("image", "text"), ("audio", "image")), temperature=0.2,
    losses={"info_nce": 1.0, "commitment": 1.0} if method == "codebind" else {},
  )
  config.stage_order = ("only",)
  return config


def method_of(config):
  return config_lib.method_of(config_lib.read(config))


def batch_of(seed=0, tokens=1):
  """Rows of eight classes, a random linear picture of the class in each modality; the last rows lack the audio."""
  rng = np.random.default_rng(seed)
  shown = np.random.default_rng(99).normal(size=(3, 8, 64))
  label = rng.integers(8, size=ROWS)
  content = {
    name: (shown[i][label][:, None] + 0.3 * rng.normal(size=(ROWS, tokens, 64)))[..., : 16 if name == "text" else 64]
    for i, name in enumerate(NAMES)
  }
  masks = {name: np.ones(ROWS, bool) for name in NAMES}
  masks["audio"][-4:] = False
  content["audio"][-4:] = 0.0
  return {"world": {m: x.astype(np.float32) for m, x in content.items()} | {"_mask": masks, "_group": label}}, label


def started(method, config, batch):
  config = config_lib.read(config)
  stage = config.ordered[0].on({"world": set(NAMES)})
  stage = dataclasses.replace(stage, unique_labels=False)
  tokens = {m: jnp.asarray(batch["world"][m][:1]) for m in NAMES}

  @jax.jit
  def init(rng):
    towers = method.model.init(rng, tokens)["params"]
    features, _ = method.model.apply({"params": towers}, tokens)
    extra, books, aux = method.init(rng, features, tokens, towers)
    return towers | ({EXTRA: extra} if extra else {}), books, aux

  params, books, aux = init(jax.random.key(0))
  tx, _ = make_optimizer(params, stage.train, config.optim, config.steps, frozen=method.frozen_paths(stage))
  state = TrainState(jnp.zeros((), jnp.int32), params, books, tx.init(params), aux, jax.random.key(1))
  state = state.replace(codebooks=jax.jit(make_start_codebooks(method))(state, batch))
  return state, jax.jit(make_train_step(method, stage, tx))


def run(name, steps=30, tokens=1, **options):
  config = small_config(name, steps, **options)
  method, (batch, label) = method_of(config), batch_of(tokens=tokens)
  state, step = started(method, config, batch)
  history = []
  for _ in range(steps):
    before = state
    state, metrics = step(state, batch)
    history.append({key: float(value) for key, value in metrics.items()})
  # Rows of one label are not each other's negatives: told apart by other groups, the last step has another loss.
  apart = {"world": batch["world"] | {"_group": np.arange(ROWS)}}
  assert steps < 2 or float(step(before, apart)[1]["train/total"]) > history[-1]["train/total"]
  return method, state, history, batch, label


@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_method_learns_to_bind(name):
  method, state, history, batch, label = run(name)
  assert all(np.isfinite(list(metrics.values())).all() for metrics in history)
  before, after = history[0]["train/total"], history[-1]["train/total"]
  assert after < before
  assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), (state.params, state.aux)))
  outputs = jax.jit(make_embed_step(method))(state.params, state.codebooks, {m: batch["world"][m] for m in NAMES})
  for name_, out in outputs.items():
    np.testing.assert_allclose(np.linalg.norm(out.shared[:, 0], axis=-1), 1.0, atol=1e-5)
    if "shared" in method.codebook_sizes:
      codes = np.asarray(out.indices_shared)
      assert codes.shape[:2] == (ROWS, 1) and 0 <= codes.min() and codes.max() < method.codebook_sizes["shared"], name_
  # Across modalities, rows of one class are nearer to each other than rows of different ones.
  a, b = (np.asarray(outputs[m].shared)[:20, 0] for m in ("audio", "image"))
  same = label[:20, None] == label[None, :20]
  assert (a @ b.T)[same].mean() > (a @ b.T)[~same].mean() + 0.15


def test_every_module_is_a_method_and_errors_name_what_is_allowed():
  assert method_names() == sorted(SMALL)
  config = small_config("dcid")
  validation.validate(config)
  config.method = "uni"
  with pytest.raises(ValueError, match=r"config.method: got 'uni'; allowed: \['centrobind', 'codebind'"):
    validation.validate(config)
  for name, options, message in (
    ("dcid", {"beeta": 1.0}, "'dcid' has no option 'beeta'; allowed: .*'beta'"), ("dcid", {"form": "both"}, "form"),
    ("codis", {"solver": "lp"}, "allowed: .*'ipot'"), ("codebind", {"codes": 3}, "see config.codebook"),
  ):
    config = small_config(name)
    config.method_options = options
    with pytest.raises(ValueError, match=message):
      validation.validate(config)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_stage_key_that_a_method_does_not_heed_is_an_error(name):
  values = {"losses": {"info_nce": 1.0}, "codes": ("shared",), "code_rows": 4, "matching_temperature": 0.5, "chunk": 2,
            "ring": True, "double_softmax": True, "scale_inside_cosine": True}  # fmt: skip
  assert set(unheeded(name)) == (set() if name == "codebind" else set(values))
  for key, value in values.items():
    config = small_config(name)
    config.stages.only[key] = value
    if name == "codebind":
      validation.validate(config)
      continue
    with pytest.raises(ValueError, match=rf"^config\.stages\.only\.{key}: got .*'{name}' does not heed; allowed: "):
      validation.validate(config)


def test_a_config_read_from_json_gives_the_same_method():
  config = small_config("dcid", order=("image", "audio", "text"))
  again = type(config)(json.loads(json.dumps(config.to_dict())))
  assert method_of(config) == method_of(again) and hash(method_of(config)) == hash(method_of(again))


@pytest.mark.parametrize("name", ["fixed_anchor", "fcid"])
def test_a_source_without_the_modality_all_are_bound_to_is_an_error(name):
  key = {"fixed_anchor": "anchor", "fcid": "hub"}[name]
  with pytest.raises(ValueError, match="'eeg'"):
    run(name, steps=1, **{key: "eeg"})


@pytest.mark.parametrize("name", ["dcid", "fcid"])
def test_modalities_may_differ_in_how_many_tokens_they_have(name):
  method, (batch, _) = method_of(config := small_config(name)), batch_of()
  batch["world"]["audio"] = np.repeat(batch["world"]["audio"], 4, axis=1)  # as groups of points have

  def whole(batch):
    state, step = started(method, config, batch)
    return step(state, batch)[1]

  metrics = jax.eval_shape(whole, batch)
  assert metrics["train/total"].shape == ()


def test_steps_that_are_no_partners_leave_the_first_one():
  ones, many = jnp.ones((2, 1, 3)), jnp.arange(24.0).reshape(2, 4, 3)
  cut = same_steps({"a": ones, "b": many})
  assert cut["a"].shape == cut["b"].shape == (2, 1, 3) and np.array_equal(cut["b"][:, 0], many[:, 0])
  assert same_steps({"b": many})["b"] is many


def test_a_frozen_anchor_stays():
  batch, _ = batch_of()
  config = small_config("fixed_anchor", frozen=True, anchor="image")
  config.optim.weight_decay = 0.1  # which is no gradient, and yet would move it
  method = method_of(config)
  state, step = started(method, config, batch)
  first = jax.device_get(state.params)
  for _ in range(3):
    state, _ = step(state, batch)
  change = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), first, jax.device_get(state.params))
  assert max(jax.tree.leaves(change["image"])) == 0
  assert max(jax.tree.leaves(change["audio"])) > 0


def test_centrobind_of_two_views_differs_and_its_gap_is_watched_only():
  _, _, same, _, _ = run("centrobind", steps=2, noise=0.0)
  _, _, other, _, _ = run("centrobind", steps=2, noise=0.5)
  assert same[0]["train/total"] == same[0]["train/centrobind"] != other[0]["train/centrobind"]
  assert 0 < same[0]["train/alignment_gap"] < 1


def test_teacher_and_queue_live_in_aux():
  method, state, history, batch, _ = run("codis", steps=3, decay=0.5)
  teacher = state.aux["teacher"]
  student = {m: state.params[m] for m in NAMES}
  assert jax.tree.structure(teacher[NAMES[0]]) == jax.tree.structure(student[NAMES[0]])
  # Updated before each step, so one step behind: half way between the students so far, never equal to the last.
  gap = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), {m: teacher[m] for m in NAMES}, student)
  assert max(jax.tree.leaves(gap)) > 0
  queue = state.aux["queue"]
  assert int(queue["image"].pointer) == 3 * ROWS % 48
  assert bool(np.all(queue["image"].valid))
  assert int(np.sum(~np.asarray(queue["audio"].valid))) == 2 * 4
  norms = np.linalg.norm(queue["image"].features, axis=1)
  np.testing.assert_allclose(norms, 1.0, atol=1e-5)
  assert not run("codis", steps=1, queue=0)[1].aux.keys() & {"queue"}


def test_club_s_own_steps_change_its_networks_and_nothing_else():
  config, (batch, _) = small_config("dcid", club=0.0), batch_of()
  method = method_of(config)
  first, step = started(method, config, batch)
  moved, _ = step(first, batch)
  change = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), first.aux["club"], moved.aux["club"])
  assert max(jax.tree.leaves(change["image"]["params"])) > 1e-4
  assert isinstance(moved.aux["club"]["image"]["adam"][0], optax.ScaleByAdamState)
  assert int(moved.aux["club"]["image"]["adam"][0].count) == 5
  still = method_of(small_config("dcid", club=0.0, club_steps=0))
  frozen, step = started(still, config, batch)
  frozen, _ = step(frozen, batch)
  difference = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), moved.params, frozen.params)
  assert max(jax.tree.leaves(difference)) == 0


@pytest.mark.parametrize("name, options", [
  ("dcid", {"cpc_layers": 2, "partner": "attention", "levels": 2, "second_after": 0}),
  pytest.param("fcid", {}, marks=pytest.mark.slow),
])
def test_sequences_are_coded_predictively(name, options):
  method, state, history, batch, _ = run(name, steps=3, tokens=4, **options)
  assert any(key.startswith("predict_") for key in state.params[EXTRA])
  assert history[-1]["train/coding"] > 0 and np.isfinite(history[-1]["train/total"])
  inputs = {m: batch["world"][m] for m in NAMES}
  features = lambda inputs: method.model.apply({"params": state.params}, inputs)[0]
  every = lambda inputs: method.embed(state.params, state.codebooks, features(inputs))
  out, pooled = jax.jit(every)(inputs), jax.jit(make_embed_step(method))(state.params, state.codebooks, inputs)
  assert out["image"].shared.shape == (ROWS, 4, 8)
  np.testing.assert_allclose(pooled["image"].shared, out["image"].shared[:, :1], atol=1e-5)
  if name == "dcid":
    assert set(state.codebooks) == {"shared", "second"} and out["image"].indices_specific.shape == (ROWS, 4, 1)
    # The second level's networks learn once it counts.
    assert "predict2_image" in state.params[EXTRA]


def test_codes_are_asked_of_all_modalities_of_a_source_where_that_is_wanted(monkeypatch):
  asked, reset = [], unified.reset_unified
  monkeypatch.setattr(unified, "reset_unified", lambda *a, **o: asked.append(o) or reset(*a, **o))
  (batch, _), only = batch_of(), {}
  second = {**batch, "sounds": {k: v for k, v in batch["world"].items() if k != "image"}}
  second["sounds"]["_mask"] = {m: v for m, v in batch["world"]["_mask"].items() if m != "image"}
  for by in ("all", "source", "any"):
    config = small_config("dcid", reset_by=by)
    state, step = started(method_of(config), config, batch)
    jax.eval_shape(step, state, second)
    only[by] = {(o["used_by"], o["together"]) for o in asked}
    asked.clear()
  both = (("audio", "text"), ("audio", "image", "text"))  # jit sorts the sources
  assert only == {"all": {("all", ())}, "source": {("all", both)}, "any": {("any", ())}}


@pytest.mark.parametrize("name", ["dcid", pytest.param("fcid", marks=pytest.mark.slow)])
def test_the_release_s_options_are_accepted(name):
  import importlib

  release = importlib.import_module(f"codebind_jax.methods.{name}").RELEASE
  _, state, history, *_ = run(name, steps=2, **release)
  assert np.isfinite(history[-1]["train/total"])
  # Small uniform codes with a count of nothing: what the first batch does not use is thrown far out.
  assert np.abs(state.codebooks["shared"].codes).max() > 10


@pytest.mark.parametrize("name", ["codis", pytest.param("dcid", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_bit_for_bit(name, tmp_path, monkeypatch):
  from codebind_jax import train

  def config():
    config = small_config(name, steps=6, **({"reset_after": 2} if name == "dcid" else {}))
    config.checkpoint_steps, config.log_steps, config.baseline, config.test = 2, 1, False, False
    config.data.root = str(tmp_path / "data")
    return config.lock()

  train.train_and_evaluate(config(), tmp_path / "whole")

  class Stop(Exception):
    pass

  def stop(codebooks, share, step):
    if step == 5:
      raise Stop

  with monkeypatch.context() as patch, pytest.raises(Stop):
    patch.setattr(train, "warn_of_collapse", stop)
    train.train_and_evaluate(config(), tmp_path / "stopped")
  train.train_and_evaluate(config(), tmp_path / "stopped")

  from codebind_jax.runtime.checkpoint import Checkpoints
  from codebind_jax.runtime.optim import param_paths

  found = []
  for folder in ("whole", "stopped"):
    store = Checkpoints(tmp_path / folder)
    try:
      found.append(param_paths(store.read_arrays(("params", "codebooks", "aux"))))
    finally:
      store.close()
  assert found[0].keys() == found[1].keys()
  for path, value in found[0].items():
    assert np.array_equal(value, found[1][path]), path
  assert any(path.startswith("aux/") for path in found[0])

  # The finished run can be loaded, and its codebook's channels chosen.
  from codebind_jax.api import load
  from codebind_jax.compare.channels import Sliced
  from codebind_jax.methods import toc

  model = load(tmp_path / "whole")
  codes = toc.codes_of(model)
  assert codes.shape == (12, 8)
  chosen = toc.choose(codes, 6, (1, 0))
  vectors = [*np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)]
  whole = model.embed({"audio": vectors})["audio"].shared
  sliced = Sliced(model, np.array(chosen["channels"]), 8).embed({"audio": vectors})["audio"].shared
  kept = whole[:, chosen["channels"]]
  np.testing.assert_allclose(sliced, kept / np.linalg.norm(kept, axis=1, keepdims=True), atol=1e-6)

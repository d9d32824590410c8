"""What joins the parts: evaluation reads the right rows, views, templates and statistics; runs say what they train.

The evaluators and losses are right by themselves (test_evaluators.py, test_losses.py). Here they are called by what
calls them in a run, on rows where a wrong argument shows in the numbers. Embeddings are the rows' own vectors.
"""

import collections
import dataclasses
import hashlib
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax.api import Embeddings, Model
from codebind_jax.data.records import Source
from codebind_jax.data.task import EvalSet, Task
from codebind_jax.evaluate import Evaluation
from codebind_jax.methods.base import make_init, make_method
from codebind_jax.runtime.metrics import MetricsWriter, read_metrics
from codebind_jax.runtime.optim import frozen
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.stages import stages_of
from codebind_jax.train import optimizer_of
from codebind_jax.trunks import featurize
from codebind_jax.trunks.base import Trunk
from codebind_jax.trunks.cache import content_hash
from configs import common

EAST, NORTH, WEST, SOUTH = (np.array(direction, np.float16) for direction in ([1, 0], [0, 1], [-1, 0], [0, -1]))


class Rows(Source):
  """Rows with given arrays; None where a row lacks the modality. `closed` rows must not be read."""

  def __init__(self, name, rows, closed=False, **arrays):
    super().__init__(name, [{"id": f"{name} {i}"} | row for i, row in enumerate(rows)])
    self.arrays, self.closed = {m: list(values) for m, values in arrays.items()}, closed

  @property
  def modalities(self):
    return (*self.arrays, *(["text"] if any("text" in row for row in self.rows) else []))

  def has(self, index, modality):
    return super().has(index, modality) or self.arrays.get(modality, {index: None})[index] is not None

  def content_hash(self, index, modality):
    return content_hash(self.read(index, modality))

  def read(self, index, modality):
    assert not self.closed, f"{self.name} was read"
    return np.asarray(self.arrays[modality][index])

  def _choose(self, chosen):
    super()._choose(chosen)
    self.arrays = {m: [values[i] for i in chosen] for m, values in self.arrays.items()}


class Plain(Model):
  """A model whose shared part is the first token as it is; its only code is the number of the largest value."""

  def __init__(self, config, codes=0):
    super().__init__(config, {}, {})
    self.method = types.SimpleNamespace(codebook_sizes={"shared": codes} if codes else {})

  def embed_tokens(self, modality, tokens):
    x = np.asarray(tokens[:, 0], np.float32)
    nothing, none = x[:, :0], np.zeros((len(x), 0), np.int32)
    return Embeddings(x, nothing, nothing, x.argmax(axis=1)[:, None].astype(np.int32), none)


def words_trunk(words):
  """A trunk that knows some texts, and their vectors."""
  digest = hashlib.sha256(repr(sorted((text, list(map(float, v))) for text, v in words.items())).encode()).hexdigest()
  return Trunk(
    "words", "text", len(next(iter(words.values()))), 1, {}, lambda _, x: x,
    lambda text: np.asarray(words[text], np.float32)[None], digest,
  )  # fmt: skip


def evaluation_of(folder, train, evals, words=None, *, views=1, codes=0, **overrides):
  """A model and the evaluation of some sets; `train` is by world."""
  config = common.get_config()
  config.data.root = str(folder)
  sources = [*train.values(), *(test.source for test in evals)]
  widths = {m: len(v) for s in sources for m, values in s.arrays.items() for v in values if v is not None}
  for name, width in widths.items():
    config.model.towers[name] = common.tower("vectors", options={"width": width, "modality": name}, views=views)
  if words:
    config.model.towers.text = common.tower("minilm")
  config.update_from_flattened_dict(overrides)
  task = Task("task", "", train, dict.fromkeys(train, "label"), tuple(evals))
  featurizer = featurize.Featurizer(config, {"text": words_trunk(words)} if words else None)
  return Plain(config, codes), Evaluation(config, task, featurizer)


# Probes.


def tangled(rng, count):
  """Two classes apart in the small difference of two columns that vary together: a strong penalty cannot see it."""
  label = np.arange(count) % 2
  x = rng.normal(size=(count, 4))
  x[:, :2] = 0.3 * x[:, :2] + 3 * rng.normal(size=(count, 1))
  x[:, 0] += 2 * label - 1
  return label, np.tile(x, (1, 100))


def mislabelled(rng, count, wrong):
  """Two classes apart in half of the columns, some rows with the wrong label: a weak penalty learns those too."""
  label = np.arange(count) % 2
  x = rng.normal(size=(count, 12))
  x[:, :6] += 0.5 * (2 * label[:, None] - 1)
  return np.where(wrong & (np.arange(count) % 10 < 2), 1 - label, label), np.tile(x, (1, 100))


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
  """Metrics of probes and class means; every modality has a label of its own."""
  rngs = collections.defaultdict(lambda: np.random.default_rng(7), depth=np.random.default_rng(2))
  sources = {}
  for split, count in (("train", 60), ("test", 40)):
    sign = np.where(np.arange(count) % 2, 1.0, -1.0)[:, None]
    noise = 0.1 * np.random.default_rng(count).normal(size=(count, 3))
    found = {
      "audio": mislabelled(rngs["audio"], count, wrong=split == "train"),
      "depth": tangled(rngs["depth"], count),
      "thermal": (sign[:, 0] > 0, 5 + sign + noise) if split == "train" else (np.ones(count, bool), 6 + noise),
      "tactile": (sign[:, 0] > 0, (sign if split == "train" else -sign) + noise),
    }
    rows = [{f"own_{m}": f"{label[i]}" for m, (label, _) in found.items()} for i in range(count)]
    sources[split] = Rows(split, rows, **{m: x.astype(np.float16) for m, (_, x) in found.items()})
  test = EvalSet("set", "world", "test", sources["test"], (), probes=("own_{modality}",), means=("own_{modality}",))
  model, evaluation = evaluation_of(tmp_path_factory.mktemp("probed"), {"world": sources["train"]}, [test])
  return evaluation.everything(model)


def test_a_probe_s_penalty_is_chosen_on_rows_it_was_not_fitted_on(probed):
  # 77.5 with the weakest penalty, which is best on the fitted rows; 52.5 with the strongest.
  assert probed["eval/set/probe/own_audio/audio/shared"] >= 85
  assert probed["eval/set/probe/own_depth/depth/shared"] >= 90


def test_tested_rows_are_standardised_by_the_training_rows_statistics(probed):
  # All tested rows are of one class: about their own mean half of them would lie on the other's side.
  assert probed["eval/set/probe/own_thermal/thermal/shared"] == 100


def test_probes_and_class_means_learn_from_the_training_rows(probed):
  # The tested rows show the opposite: whatever has learned from them is right.
  assert probed["eval/set/probe/own_tactile/tactile/shared"] == 0
  assert probed["eval/set/ncm/tactile/shared"] == 0


def test_a_probe_is_not_asked_for_values_that_no_training_row_has(tmp_path):
  side = lambda name, *values: Rows(name, [{"label": value} for value in values], image=SIDES[: len(values)])
  test = EvalSet("set", "world", "test", side("test", "e", "n", "e", "x"), (), probes=("label",), means=("label",))
  model, evaluation = evaluation_of(tmp_path, {"world": side("train", *"enen")}, [test])
  found = evaluation.everything(model)
  assert found["eval/set/probe/label/image/shared"] == found["eval/set/ncm/image/shared"] == 100


SIDES = [EAST, NORTH, EAST + NORTH / 4, NORTH + EAST / 4]


# Which sets are read.


def kinds(test_closed=True):
  """Training rows of two worlds, and a validation and a test set of each; the test sets must not be read."""
  rows = [{"label": "east", "text": ["east"]}, {"label": "north", "text": ["north"]}]
  make = lambda name, closed=False: Rows(name, rows, closed, image=[EAST, NORTH])
  evals = [
    EvalSet(f"{world}_{role}", world, role, make(f"{world}_{role}", test_closed and role == "test"), ("east", "north"))
    for world in ("a", "b") for role in ("val", "test")
  ]  # fmt: skip
  return {world: make(f"{world} train") for world in ("a", "b")}, evals, {"east": EAST, "north": NORTH}


def sets_of(found):
  return {name.split("/")[1] for name in found if name.startswith("eval/")}


def test_validation_reads_the_validation_sets_of_the_worlds_trained_on_alone(tmp_path):
  model, evaluation = evaluation_of(tmp_path, *kinds())
  found = evaluation.validate(model, {"a"})
  assert sets_of(found) == {"a_val", "a"}
  assert {name.split("/")[2] for name in found} == {"zeroshot", "retrieval"}
  assert sets_of(evaluation.validate(model, {"a", "b"})) == {"a_val", "a", "b_val", "b"}


def test_a_run_that_may_not_read_the_test_sets_does_not(tmp_path):
  model, evaluation = evaluation_of(tmp_path, *kinds(), test=False)
  with MetricsWriter(tmp_path / "run") as writer:
    evaluation.after_stage(model, 3, "first", writer, {"a"})
    evaluation.finish(model, 5, writer)
  first, last = read_metrics(tmp_path / "run")
  assert sets_of(first) == {"a_val", "a", "stage_done"} and sets_of(last) == {"a_val", "a", "b_val", "b"}
  model, evaluation = evaluation_of(tmp_path, *kinds(), test=True)
  with pytest.raises(AssertionError, match="a_test was read"):
    evaluation.everything(model)
  model, evaluation = evaluation_of(tmp_path, *kinds(test_closed=False), test=True)
  assert sets_of(evaluation.everything(model)) == {"a_val", "a_test", "a", "b_val", "b_test", "b"}


# Templates, views, chance.


def test_classes_are_named_by_the_templates_of_evaluation(tmp_path):
  words = {
    f"{before}{name}": vector
    for before, east, north in (("", NORTH, EAST), ("train ", NORTH, EAST), ("seen ", EAST, NORTH), ("a: ", EAST, EAST))
    for name, vector in (("east", east), ("north", north))
  }
  templates = {"data.templates": ("train {}",), "data.eval_templates": ("seen {}",)}
  train, evals, _ = kinds(test_closed=False)
  model, evaluation = evaluation_of(tmp_path, train, evals, words, **templates)
  evaluation.config.data.templates_of.a = ("a: {}",)
  found = evaluation.everything(model)
  # World a has templates of its own, which name both classes by one vector: a tie, which counts as wrong.
  assert [found[f"eval/{world}_test/zeroshot/image/top1"] for world in "ab"] == [0, 100]


@dataclasses.dataclass(frozen=True)
class Turned:
  """An augmentation that turns a vector around."""

  def __call__(self, x, rng):
    return -x


def test_embeddings_are_of_the_clean_view(tmp_path, monkeypatch):
  monkeypatch.setattr(featurize, "Augment", Turned)
  train, evals, words = kinds(test_closed=False)
  model, evaluation = evaluation_of(tmp_path, train, evals, words, views=3)
  features = evaluation._featurizer.table(train["a"], "image", augmented=True).features
  np.testing.assert_array_equal(features[:, 1:, 0], -np.stack([[EAST, EAST], [NORTH, NORTH]]))
  for table in (evaluation.table(model, evals[0]), evaluation.train_table(model, "a")):
    np.testing.assert_array_equal(table["image"]["shared"], [EAST, NORTH])


def test_emergent_retrieval_joins_the_sets_of_a_role_and_its_chance_is_of_drawing_without_replacement(tmp_path):
  concepts = {"audio": ["cow", "cow", "cow", "dog", "sofa"], "depth": ["dog", "cow", "dog", "cow", "cow", "cow", "owl"]}
  directions = {"cow": EAST, "dog": NORTH, "sofa": WEST, "owl": SOUTH}
  evals = [
    EvalSet(f"{m}_{role}", m, role, Rows(f"{m} {role}", [{"concept": c} for c in own[first:]],
                                         **{m: [directions[c] for c in own[first:]]}), ())
    for m, own in concepts.items() for role, first in (("test", 0), ("val", 2))
  ]  # fmt: skip
  model, evaluation = evaluation_of(tmp_path, {}, evals, emergent=(("audio", "depth"),))
  found = evaluation.everything(model)
  assert {name for name in found if "emergent" in name} == {
    f"eval/{role}/emergent/{pair}/{name}" for role in ("test", "val")
    for pair in ("audio_to_depth", "depth_to_audio") for name in ("r5", "chance5")
  }  # fmt: skip
  # Test: 3 cows and 1 dog among the sounds; 4 cows and 2 dogs among the depth maps, of which five are drawn.
  hit = lambda right, items, k: 100 * (1 - math.comb(items - right, k) / math.comb(items, k))
  assert found["eval/test/emergent/audio_to_depth/chance5"] == pytest.approx((3 * hit(4, 6, 5) + hit(2, 6, 5)) / 4)
  assert found["eval/test/emergent/audio_to_depth/r5"] == 100
  many = [EvalSet("x", "x", "test", Rows("x", [{"concept": f"c{i % 5}"} for i in range(20)], audio=[EAST] * 20), ()),
          EvalSet("y", "y", "test", Rows("y", [{"concept": f"c{i % 10}"} for i in range(20)], depth=[EAST] * 20), ())]
  model, evaluation = evaluation_of(tmp_path, {}, many, emergent=(("audio", "depth"),))
  found = evaluation.everything(model)
  # Only c0 to c4 are on both sides: 4 of the 20 sounds, 2 of the 10 depth maps.
  assert found["eval/test/emergent/depth_to_audio/chance5"] == pytest.approx(hit(4, 20, 5))
  assert found["eval/test/emergent/audio_to_depth/chance5"] == pytest.approx(hit(2, 10, 5))
  assert found["eval/test/emergent/audio_to_depth/r5"] == 0  # all the same: ties count as wrong


def test_code_usage_is_that_of_the_training_rows_of_all_worlds(tmp_path):
  rows = lambda name, world, *values: Rows(name, [{"label": "x"}] * len(values), **{world: list(values)})
  train = {"a": rows("a train", "image", EAST, EAST, EAST), "b": rows("b train", "depth", NORTH, EAST)}
  evals = [EvalSet(f"{w}_val", w, "val", rows(f"{w} val", m, NORTH), ()) for w, m in (("a", "image"), ("b", "depth"))]
  model, evaluation = evaluation_of(tmp_path, train, evals, codes=2)
  found = evaluation.everything(model)
  assert found["eval/train/codebook/shared/max_share"] == 0.8
  assert found["eval/train/codebook/shared/image/max_share"] == 1
  assert found["eval/train/codebook/shared/several_share"] == 0.5
  counts, shared = evaluation.code_counts(model)
  assert counts["shared"].tolist() == [4, 1] and shared["depth"].tolist() == [1, 1]


# The step.

ROWS = 6


def step_of(method, stage, tx, table):
  """The training step as a run makes it."""
  return method.train_step(stage, tx, frozen(table))


def step_config(method="codebind", **overrides):
  """Image and text through linear heads, bound by InfoNCE alone, without codebooks."""
  config = common.get_config()
  config.method, config.batch_size, config.steps = method, ROWS, 10
  config.model.shared_dim, config.model.quantize, config.codebook.dim = 4, False, 4
  for name in ("image", "text"):
    config.model.towers[name] = common.tower("vectors", options={"width": 8, "modality": name})
  config.stages.only = common.stage(config, losses={"info_nce": 1.0}, temperature=0.2)
  config.stage_order = ("only",)
  config.update_from_flattened_dict(overrides)
  return config


def started(config, **scales):
  """A step and its first state, with some modalities' logit scales."""
  method, stage = make_method(config), stages_of(config)[0]
  params, books, aux = make_init(method, {m: (1, 8) for m in config.model.towers})(jax.random.key(0))
  params |= {f"{name}_log_logit_scale": jnp.log(scale) for name, scale in scales.items()}
  tx, table = optimizer_of(config, stage, params)
  state = TrainState(jnp.zeros((), jnp.int32), params, books, tx.init(params), aux, jax.random.key(1))
  return jax.jit(step_of(method, stage, tx, table)), state


def batch_of(config):
  rng = np.random.default_rng(0)
  rows = {name: rng.normal(size=(ROWS, 1, 8)).astype(np.float32) for name in config.model.towers}
  return {"rows": rows | {"_mask": {name: np.ones(ROWS, bool) for name in rows}, "_group": np.arange(ROWS)}}


def info_nce(params, batch, scale):
  """InfoNCE by definition, both directions added, behind heads as they start; `scale` multiplies the cosines."""
  rows = []
  for name in ("image", "text"):
    x = np.asarray(batch["rows"][name][:, 0], np.float64)
    x = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True) @ params[name]["shared"]["proj"]["kernel"]
    rows.append(x / np.linalg.norm(x, axis=1, keepdims=True))
  logits = scale * rows[0] @ rows[1].T
  both = [np.logaddexp.reduce(logits, axis=axis) for axis in (0, 1)]
  return np.mean(both[0] + both[1] - 2 * np.diag(logits))


@pytest.mark.parametrize("temperature", [0.2, 0.5])
def test_info_nce_has_both_logit_scales_up_to_100_and_the_stage_s_temperature(temperature, quick_compiler):
  config = step_config(**{"stages.only.temperature": temperature})
  batch = batch_of(config)
  step, state = started(config)
  for scales, product in (((2, 3), 6), ((0.5, 3), 1.5), ((1000, 3), 300), ((2, 1000), 200)):
    logs = dict(zip(("image_log_logit_scale", "text_log_logit_scale"), np.log(np.float32(scales))))
    found = step(state.replace(params=state.params | logs), batch)[1]["train/info_nce"]
    np.testing.assert_allclose(found, info_nce(state.params, batch, product / temperature), rtol=1e-4)


def test_other_methods_have_the_stage_s_temperature_and_both_scales_too(quick_compiler):
  config = step_config("fixed_anchor", **{"stages.only.temperature": 0.5})
  config.method_options = {"anchor": "image", "frozen": False}
  batch = batch_of(config)
  step, state = started(config, image=2.0, text=3.0)
  found = step(state, batch)[1]["train/total"]
  np.testing.assert_allclose(found, info_nce(state.params, batch, 6 / 0.5), rtol=1e-4)


@pytest.mark.parametrize("method", ["codebind", "fixed_anchor"])
def test_every_step_draws_another_dropout(method, quick_compiler):
  config = step_config(method, **{"model.towers.image.dropout": 0.5})
  batch = batch_of(config)
  step, state = started(config)
  losses = [float(step(state.replace(step=jnp.int32(n)), batch)[1]["train/total"]) for n in (0, 1, 2, 0)]
  assert len(set(losses)) == 3 and losses[3] == losses[0]
  other = state.replace(rng=jax.random.key(2))
  assert float(step(other, batch)[1]["train/total"]) not in losses

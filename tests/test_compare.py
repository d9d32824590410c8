"""Side by side: the evaluator by hand, and the shipped comparisons, shrunk and stopped."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from codebind_jax import schema
from codebind_jax import train as train_lib
from codebind_jax.compare import run as compare_lib
from codebind_jax.compare import runs as runs_lib
from codebind_jax.config import GradedWorld
from codebind_jax.evaluators.crossmodal import code_sharing, error_over_labels, recall_at_one, sharing_sets, transfer
from configs import common
from configs import compare as shipped


def test_transfer_of_a_head_across_modalities():
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(3), 20)
  x = np.eye(4)[labels] + 0.05 * rng.normal(size=(60, 4))
  turned = x @ np.eye(4)[[1, 2, 0, 3]]
  rows, told = {"a": x, "b": turned}, dict.fromkeys("ab", labels)
  found = transfer(rows, rows, told, told)
  assert found["a", "a"] == found["b", "b"] == 100.0
  # The other modality shows every class where this one shows another: a head carries over to nothing.
  assert found["a", "b"] == found["b", "a"] == 0.0


def test_transfer_asks_for_the_labels_that_both_sides_have():
  one_hot, labels = np.eye(4), np.array(["a", "b", "c", "d"])
  rows = {"x": np.repeat(one_hot[:3], 2, 0), "y": one_hot[1:]}
  told = {"x": np.repeat(labels[:3], 2), "y": labels[1:]}
  asked = {"x": one_hot[[0, 1]], "y": one_hot[[1, 2, 3]], "z": one_hot[[3, 3]]}
  answers = {"x": labels[[0, 1]], "y": np.array(["b", "a", "d"]), "z": labels[[3, 3]]}
  found = transfer(rows, asked, told, answers)
  # A head of x has not learned d: of y's rows b is right, the row called a looks like c but c is not asked for.
  assert set(found) == {("x", "x"), ("x", "y"), ("y", "y")} and found["x", "x"] == 100.0
  assert found["y", "y"] == 100.0  # of b and d, all that y has learned of them


def test_error_over_labels_by_hand():
  first = np.array(["a", "a", "b", "b"]), np.array([True, False, True, True])
  second = np.array(["a", "c"]), np.array([True, False])
  # a: mean of 50 and 100; b: 100; c: 0. Deviation of 75, 100, 0 is 52.04; over the root of 3.
  assert error_over_labels([first, second]) == pytest.approx(np.std([75, 100, 0], ddof=1) / 3**0.5)


@pytest.mark.parametrize("tried, beyond", [
  ({1e-3: 1.0, 3e-3: 2.0, 1e-2: 3.0}, 0.033), ({1e-3: 3.0, 3e-3: 2.0}, 0.00033),
  ({1e-3: 1.0, 3e-3: 2.0, 1e-2: 1.5}, None), ({1e-3: 1.0, 3e-3: 2.0, 1e-2: None}, None),
  ({1e-3: None, 3e-3: None}, None),
])  # fmt: skip
def test_the_next_rate_beyond_an_end(tried, beyond):
  assert runs_lib.rate_beyond(tried) == beyond


def test_recall_at_one_by_hand():
  a = np.eye(3)
  b = np.array([[1, 0, 0], [0.8, 0.6, 0], [0, 0, 1.0]])
  # From a all three find their own; of b's rows the second is nearer to a's first.
  assert recall_at_one(a, b) == pytest.approx(100 * (1 + 2 / 3) / 2)


def test_code_sharing_by_hand():
  a, b = np.array([0] * 10 + [1] * 7 + [2] * 3), np.array([3] * 10 + [1] * 7 + [2] * 3)
  # Of codes 0 to 3, two are shared half and half, two are used by one modality alone; 4 is not used.
  assert code_sharing(a, b, 5) == (50.0, 50.0)
  a, b = np.array([0] * 7 + [1]), np.array([0] * 3 + [1] * 5)
  assert code_sharing(a, b, 2) == (50.0, 50.0)
  a, b = np.array([0] * 3), np.array([0])
  assert code_sharing(a, b, 1) == (100.0, 0.0)


def test_sets_of_modalities_that_use_a_code():
  codes = {"a": np.array([0, 0, 1, 1]), "b": np.array([0, 1]), "c": np.array([2, 2, 2, 0, 0, 0])}
  # Of 100 % each: code 0 has 50, 50, 50, code 1 50, 50, 0, code 2 0, 0, 50; one modality of three must make 13.3 %.
  found = sharing_sets(codes, 4)
  assert found == pytest.approx({"a+b+c": 100 / 3, "a+b": 100 / 3, "c": 100 / 3})


@pytest.mark.usefixtures("quick_compiler")
def test_a_rate_that_diverges_is_left_out(tmp_path, monkeypatch):
  config = small(tmp_path, "fixed_anchor_image").unlock()
  tried, real = [], runs_lib.run_stages

  def diverging(run, folder, *rest):
    tried.append(folder.name)
    if run.optim.learning_rate == bad:
      raise FloatingPointError("train/total is not finite in step 1")
    return real(run, folder, *rest)

  monkeypatch.setattr(runs_lib, "run_stages", diverging)
  bad = 1e-2
  for _ in range(2):
    found = compare_lib.compare(config.lock(), tmp_path / "run")["results"]["fixed_anchor_image"]
    assert found["learning_rate"] == 1e-3 and list(found["tuning"]) == ["0.001", "0.01"]
    assert found["tuning"]["0.01"] is None
  assert tried == ["rate0.001", "rate0.01", "seed1"]  # not tried again
  assert "step 1" in (tmp_path / "run/fixed_anchor_image/rate0.01/diverged.txt").read_text()
  (tmp_path / "run/fixed_anchor_image/rate0.001/diverged.txt").touch()
  (tmp_path / "run/fixed_anchor_image/rate0.001/metrics.jsonl").unlink()
  with pytest.raises(FloatingPointError, match="'fixed_anchor_image' diverged with every one of them"):
    compare_lib.compare(config, tmp_path / "run")


def narrowed(config):
  """Leaves two sensors of the graded world, with small towers."""
  for sensor in ("audio", "image"):
    config.model.towers[sensor].options.width = 16
  for sensor in ("depth", "video"):
    del config.model.towers[sensor]
    del config.codebook.codes[sensor]
  config.stages.bind.pairs = (("audio", "image"),)


def small(tmp_path, only=""):
  config = shipped.get_config("runlocal").unlock()
  config.steps, config.batch_size, config.log_steps, config.compare.seeds = 3, 16, 1, 1
  config.compare.learning_rates = (1e-3, 1e-2)
  config.compare.world.rows = 64
  config.data.root = str(tmp_path / "data")
  config.compare.only = only
  narrowed(config)
  for name in list(config.compare.variants):
    if name not in ("fixed_anchor_image", "dcid"):
      del config.compare.variants[name]
  config.compare.variants.dcid.options.update({"codes": 8, "club_hidden": 8})
  return config.lock()


@pytest.mark.usefixtures("quick_compiler")
def test_a_comparison_can_be_divided_stopped_and_continued(tmp_path, monkeypatch, capsys):
  calls, compiled = [], []
  real, compile_step = runs_lib.run_stages, train_lib.compile_step

  def counted(config, folder, *rest):
    calls.append(folder.relative_to(tmp_path).as_posix().removeprefix("run/"))
    if len(calls) == 4:
      raise KeyboardInterrupt
    return real(config, folder, *rest)

  monkeypatch.setattr(runs_lib, "run_stages", counted)
  monkeypatch.setattr(train_lib, "compile_step", lambda *rest: compiled.append(rest) or compile_step(*rest))
  first = compare_lib.compare(small(tmp_path, "dcid"), tmp_path / "run")
  assert calls == ["dcid/rate0.001", "dcid/rate0.01", "dcid/seed1"] and set(first["results"]) == {"dcid"}
  told = capsys.readouterr().out
  assert "| dcid | " in told and "| fixed_anchor_image | " not in told and "without --config.compare.only" in told
  assert not list((tmp_path / "run").glob("comparison.*"))
  # The last run has the step of the run that tuned its rate, and gives what a run with a step of its own does.
  assert len(compiled) == 2
  alone = small(tmp_path, "dcid").unlock()
  alone.compare.learning_rates = (first["results"]["dcid"]["learning_rate"],)
  calls.clear()
  again = compare_lib.compare(alone.lock(), tmp_path / "alone")
  assert len(compiled) == 3 and calls == ["alone/dcid/seed1"]
  assert again["results"]["dcid"]["runs"] == first["results"]["dcid"]["runs"]
  capsys.readouterr()
  calls[:] = ["dcid/rate0.001", "dcid/rate0.01", "dcid/seed1"]
  with pytest.raises(KeyboardInterrupt):
    compare_lib.compare(small(tmp_path, "fixed_anchor_image"), tmp_path / "run")
  before = (tmp_path / "run/dcid/seed1/metrics.jsonl").read_text()
  # Another process trains the anchor's runs; the call without `only` then has nothing left to train, nor to load.
  compare_lib.compare(small(tmp_path, "fixed_anchor_image"), tmp_path / "run")
  for folder in (tmp_path / "run").glob("*/*/checkpoints"):
    shutil.rmtree(folder)
  trained = list(calls)
  compare_lib.compare(small(tmp_path), tmp_path / "run")
  assert calls == trained and trained.count("dcid/seed1") == 1
  assert (tmp_path / "run/dcid/seed1/metrics.jsonl").read_text() == before
  other = small(tmp_path).unlock()
  other.compare.seeds = 2
  with pytest.raises(ValueError, match="compare.seeds: 1 -> 2"):
    compare_lib.compare(other, tmp_path / "run")
  with pytest.raises(ValueError, match="compare.only: 'fcid' is not allowed; allowed: .'dcid', 'fixed_anchor_image'"):
    compare_lib.compare(small(tmp_path, "dcid,fcid"), tmp_path / "run")

  found = json.loads((tmp_path / "run/comparison.json").read_text())
  dcid, anchor = found["results"]["dcid"], found["results"]["fixed_anchor_image"]
  metrics = dcid["runs"][0]
  for kind in ("audio>image", "within", "cross", "all"):
    assert {f"eval/val/label/{kind}", f"eval/test/label/{kind}"} <= set(metrics)
  assert dcid["learning_rate"] == max((0.001, 0.01), key=lambda rate: dcid["tuning"][f"{rate:g}"])
  # Tuning has not read the test set.
  lines = [json.loads(x) for x in (tmp_path / "run/dcid/rate0.01/metrics.jsonl").read_text().splitlines()]
  assert not any(name.startswith("eval/test") for line in lines for name in line)
  assert dcid["cost"]["towers"] == anchor["cost"]["towers"]
  assert anchor["cost"]["aux"] == anchor["cost"]["extra_parameters"] == 0
  assert dcid["cost"]["codebooks"] == 8 * 32 * 2 + 8 + 2 * 8
  text = (tmp_path / "run/comparison.md").read_text()
  assert text in capsys.readouterr().out and "| dcid |" in text and "lowers the mean cosine" in text
  assert all((tmp_path / "run" / name).stat().st_size for name in ("bars.svg", "anchors.svg", "sharing.svg"))
  # A later call times the trained variants' steps in turns; its numbers stand in the table from then on.
  config = small(tmp_path).unlock()
  config.compare.timing = 2
  timed = compare_lib.compare(config.lock(), tmp_path / "run")["speed"]
  assert set(timed["examples_per_second"]) == {"dcid", "fixed_anchor_image"} and timed["steps"] == 2
  assert all(np.isfinite(x) and x > 0 for x in timed["examples_per_second"].values())
  assert calls == trained and "of 2 steps" in (tmp_path / "run/comparison.md").read_text()
  # What TOC's choice of channels does to the codes and to a head carried across.
  probe = json.loads((tmp_path / "run/dcid/seed1/run.json").read_text())["probe"]
  assert probe == dcid["probes"][0] and anchor["probes"] == [{}]
  assert (probe["toc"]["kept"], probe["toc"]["of"]) == (24, 32) and "eval/test/label/cross" in probe["toc"]["metrics"]
  assert sum(probe["sharing"]["sets"].values()) == pytest.approx(100.0)
  assert probe["sharing"]["pairs"]["audio+image"][0] == pytest.approx(metrics["codes/shared"])


def test_items_of_the_graded_world_that_are_few_noisy_or_hidden():
  world = schema.read(GradedWorld, {"rows": 64, "classes": 3, "per_class": 2, "noise": 0.5, "noisy": 1.5,
                                    "hidden": 0.25}, "world")  # fmt: skip
  task = compare_lib.graded_task(world, ("audio", "image"))
  train = task.train["synthetic"]
  every = compare_lib.graded_task(dataclasses.replace(world, per_class=0), ("audio", "image")).train["synthetic"]
  labels = [every.fields(n)["label"] for n in range(len(every))]
  first = sorted(n for label in set(labels) for n in np.flatnonzero(np.array(labels) == label)[:2])
  assert len(train) == 6 and [train.fields(n)["id"] for n in range(6)] == [every.fields(int(n))["id"] for n in first]
  sets = {test.name.removeprefix("synthetic_val"): test.source for test in task.evals if test.role == "val"}
  assert list(sets) == ["", "_noisy", "_hidden"] and len(task.evals) == 6
  of = lambda name: np.stack([sets[name].read(n, "image") for n in range(16)])
  plain, noisy, hidden = of(""), of("_noisy"), of("_hidden")
  # The same items: what noise adds is thrice what it added, so that the difference has a deviation of 1.
  assert np.std(noisy - plain) == pytest.approx(1.0, abs=0.1)
  gone = hidden == 0
  assert np.array_equal(hidden[~gone], plain[~gone]) and 0.15 < gone.mean() < 0.35 and not (plain == 0).any()
  assert [sets["_hidden"].fields(n)["label"] for n in range(16)] == [sets[""].fields(n)["label"] for n in range(16)]


@pytest.mark.usefixtures("quick_compiler")
def test_heads_meet_inputs_seen_less_well(tmp_path):
  """The shipped form `hard`, with few rows of a class."""
  config = shipped.get_config("hard,runlocal").unlock()
  config.steps, config.batch_size, config.log_steps = 3, 10, 1
  config.compare.world.rows, config.compare.world.per_class = 64, 1
  config.data.root = str(tmp_path / "data")
  narrowed(config)
  for name in list(config.compare.variants):
    if name not in ("info_nce", "info_nce_mixup"):
      del config.compare.variants[name]
  found = compare_lib.compare(config.lock(), tmp_path / "run")
  assert "synthetic, graded: 10 training rows" in found["summary"]
  for result in found["results"].values():
    shown = {name: [value for key, value in result["runs"][0].items() if key.startswith(f"eval/test/{name}/label/")]
             for name in ("plain", "noisy", "hidden")}  # fmt: skip
    assert shown["plain"] != shown["noisy"] and shown["plain"] != shown["hidden"] and len(shown["plain"]) == 8
  assert {f"eval/val/{name}/label/cross" for name in shown} <= set(result["runs"][0])
  config.unlock().compare.transfers = {}
  with pytest.raises(ValueError, match="compare.transfers: got none, but compare.world.noisy"):
    compare_lib.compare(config.lock(), tmp_path / "other")
  text = (tmp_path / "run/comparison.md").read_text()
  assert "| plain/label/cross | noisy/label/cross | hidden/label/cross |" in text


@pytest.mark.usefixtures("quick_compiler")
def test_sounds_and_pictures_of_two_worlds_are_compared_by_name(tmp_path):
  """The shipped form `generalise` on drawn worlds: no row has both a sound and a picture."""
  config = shipped.get_config("generalise,runlocal").unlock()
  worlds = ("synthetic-image-text", "synthetic-audio-text")
  config.steps, config.log_steps, config.data.profile, config.data.root = 2, 1, "tiny", str(tmp_path / "data")
  config.data.worlds, config.model.shared_dim = worlds, 16
  config.model.towers.text = common.tower("hashed_words", options={"width": 16})
  for sensor in ("audio", "image"):
    config.model.towers[sensor] = common.tower("vectors", options={"width": 64, "modality": sensor}, specific_dim=4)
  config.stages.bind.sources = dict.fromkeys(worlds, 16)
  sets = {role: tuple(f"{world}_{role}" for world in worlds) for role in ("val", "test")}
  config.compare.transfers = {"concepts": {"worlds": worlds, "fields": ("concept",)} | sets}
  for name in list(config.compare.variants):
    if name != "codis":
      del config.compare.variants[name]
  config.compare.variants.codis.options.update({"codes": 8, "queue": 32, "iterations": 5})
  found = compare_lib.compare(config.lock(), tmp_path / "run")["results"]["codis"]
  metrics, plan = found["runs"][0], found["probes"][0]["plan"]
  pairs = [f"eval/test/concept/{a}>{b}" for a in ("audio", "image", "text") for b in ("audio", "image", "text")]
  assert all(0 <= metrics[name] <= 100 for name in pairs)
  across = [metrics[name] for name in pairs if len(set(name.split("/")[-1].split(">"))) == 2]
  assert metrics["eval/test/concept/cross"] == pytest.approx(np.mean(across))
  assert {"eval/test/zeroshot", "eval/test/retrieval", f"eval/{worlds[0]}_test/zeroshot/image/top1"} <= set(metrics)
  # The plan of rows that have both modalities of the first pair: rows have mass 1, codes share it evenly.
  assert plan["modalities"] == ["image", "text"] and plan["rows"] == sorted(plan["rows"])
  for rows in map(np.array, plan["plans"].values()):
    assert rows.shape == (len(plan["rows"]), 8)
    np.testing.assert_allclose(rows.sum(0), len(rows) / 8, rtol=1e-3)
  config.unlock().compare.transfers.concepts.val = ("icons_val",)
  with pytest.raises(ValueError, match="compare.transfers.concepts.val: the data has none of .'icons_val'"):
    compare_lib.compare(config.lock(), tmp_path / "other")

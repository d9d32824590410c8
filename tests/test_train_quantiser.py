"""A small index as users train it: from a continuous run, by OPQ, with codebooks by position, residuals, a rotation."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

import codebind_jax
from codebind_jax import config as config_lib
from codebind_jax import train as train_lib
from codebind_jax.api import Model
from codebind_jax.train import baseline_of, train_and_evaluate
from tests.processes import assert_close, assert_same_run, finish, start
from tests.train_fixtures import arrays_of, lines_of, tiny_config

FEW = {"steps": 4, "eval_steps": 4, "tasks": ("zeroshot", "retrieval", "codes"), "optim.learning_rate": 1e-3}
SMALL = {
  "codebook.dim": 4, "codebook.shared_codes": 8, "codebook.distance": "l2", "codebook.normalize": False,
  "codebook.unit_parts": True, "codebook.positions": "own", "codebook.stages": 2, "codebook.rotation": "learned",
  "codebook.start": "opq", "codebook.start_rows": 40, "codebook.gradient": "rotation_trick", "queries": "uncoded",
  "stages.bridges.losses": {"info_nce": 1.0, "info_nce_asymmetric": 0.5, "commitment": 1.0},
  "stages.bridges.mixup": 0.0, "model.towers.image.augmented": 0.0, "data.templates": ("{}",), "data.captions": "main",
}  # fmt: skip
TEXTS = ["red", "blue square", "a green thing"]


@pytest.fixture(scope="module")
def continuous(data, tmp_path_factory):
  """A run without codes."""
  folder = tmp_path_factory.mktemp("continuous") / "run"
  losses = {"stages.bridges.losses": {"info_nce": 1.0}}
  train_and_evaluate(tiny_config(*data, **FEW | losses | {"model.quantize": False}), folder)
  return folder


@pytest.fixture(scope="module")
def coded(data, continuous, tmp_path_factory):
  """A run that starts from it."""
  folder = tmp_path_factory.mktemp("coded") / "run"
  config = tiny_config(*data, **FEW | SMALL | {"init_from": str(continuous)})
  return config, folder, train_and_evaluate(config, folder)


def decoded(model, codes, book, rotation, stages, width):
  """Vectors of codes [n, stages * positions], by hand."""
  positions = codes.shape[1] // stages
  tables = np.asarray(book.codes)
  parts = [sum(tables[i, p][codes[:, i * positions + p]] for i in range(stages)) for p in range(positions)]
  vectors = np.concatenate(parts, axis=1) @ np.asarray(rotation)
  assert vectors.shape[1] == width
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_codes_give_the_items_and_queries_are_uncoded(coded, tmp_path):
  config, folder, final = coded
  model = codebind_jax.load(folder)
  out = model.embed({"text": TEXTS})["text"]
  assert out.codes_shared.shape == (3, 2 * 4) and out.codes_shared.max() < 8
  assert model.codebooks["shared"].codes.shape == (2, 4, 8, 4) and model.codebooks["image"].codes.shape[:2] == (2, 4)
  rotation = model.method.rotations(model.params)["shared"]
  assert np.abs(np.asarray(rotation) - np.eye(16)).max() > 0.05
  want = decoded(model, out.codes_shared, model.codebooks["shared"], rotation, 2, 16)
  np.testing.assert_allclose(out.shared, want, atol=1e-5)
  # Queries are what the heads give.
  plain = Model(_plain(config), model.params, {}, model.trunks)
  np.testing.assert_allclose(out.query, plain.embed({"text": TEXTS})["text"].shared, atol=1e-5)
  assert np.abs(out.query - out.shared).max() > 1e-3
  model.save(tmp_path / "saved")
  again = codebind_jax.load(tmp_path / "saved").embed({"text": TEXTS})["text"]
  for name in ("shared", "query", "codes_shared"):
    np.testing.assert_allclose(getattr(again, name), getattr(out, name), atol=1e-6)
  assert 8 < final["eval/train/codebook/shared/perplexity"] <= 2 * 4 * 8  # of the codes of all stages and positions


def _plain(config):
  plain = config.copy_and_resolve_references().unlock()
  plain.model.quantize, plain.codebook.start, plain.codebook.rotation = False, "batch", "none"
  return plain


def test_a_start_by_opq_quantises_well_and_moves_on(coded, continuous):
  config, folder, _ = coded
  lines = [line for line in lines_of(folder) if "train/total" in line]
  assert {"train/info_nce_asymmetric", "codebook/shared/perplexity"} <= lines[0].keys()
  assert lines[0]["train/commitment"] < 0.02, lines[0]
  before, after = arrays_of(continuous), arrays_of(folder)
  assert not np.array_equal(before["params/image/shared/proj/kernel"], after["params/image/shared/proj/kernel"])
  assert bool(after["codebooks/shared/initialised"])


class Started(Exception):
  """Ends a run whose codes have started."""


def test_codes_start_from_items_whatever_views_and_templates_a_batch_draws(
  data, continuous, tmp_path, monkeypatch, caplog
):  # fmt: skip
  caplog.set_level("INFO", "absl")
  found, real = [], train_lib.start_from_rows

  def kept(*of):
    found.append({name: np.asarray(book.codes) for name, book in real(*of).codebooks.items()})
    raise Started

  monkeypatch.setattr(train_lib, "start_from_rows", kept)
  ways = ({}, {"model.towers.image.augmented": 1.0, "data.templates": ("{}", "a {}"), "data.captions": "each"},
          {"codebook.start_rows": 8})  # fmt: skip
  for number, way in enumerate(ways):
    with pytest.raises(Started):
      own = FEW | SMALL | {"init_from": str(continuous)} | way
      train_and_evaluate(tiny_config(*data, **own), tmp_path / f"{number}")
  plain, drawn, few = found
  told = [line for line in caplog.messages if line.startswith("codebooks start from")]
  assert [sorted(re.findall(r"(\d+) of (\w+)", line)) for line in told[:2]] == [[("24", "image"), ("8", "text")]] * 2
  assert plain.keys() == drawn.keys() == {"shared", "image"}
  for name, codes in plain.items():
    np.testing.assert_array_equal(drawn[name], codes)
    assert not np.array_equal(few[name], codes)


def test_equal_items_count_once():
  x = np.array([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [1.0, 5.0], [3.0, 4.0]], np.float32)
  assert train_lib._first_of_equals(x).tolist() == [True, True, False, True, False]


def test_the_baseline_starts_from_the_run_without_codes_or_from_a_coded_run_s_own(coded, continuous):
  config, folder, _ = coded
  start_of = lambda source: baseline_of(dataclasses.replace(config_lib.read(config), init_from=str(source))).init_from
  assert start_of(continuous) == str(continuous) and start_of(folder) == f"{folder}/baseline"


def test_it_resumes_bit_for_bit(coded, tmp_path):
  config, folder, _ = coded
  shutil.copytree(folder, tmp_path / "cut")
  shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
  train_and_evaluate(config, tmp_path / "cut")
  assert_same_run(folder, tmp_path / "cut")


def test_a_stage_that_freezes_codes_freezes_their_rotation(coded, data, tmp_path):
  _, folder, _ = coded
  more = {"init_from": str(folder), "stages.bridges.codes": ("image",), "steps": 2, "optim.warmup": 0}
  train_and_evaluate(tiny_config(*data, **FEW | SMALL | more), tmp_path)
  before, after = arrays_of(folder), arrays_of(tmp_path)
  for path in before:
    if "rotation" in path or path.startswith("codebooks") and path.endswith("codes"):
      assert np.array_equal(before[path], after[path]) == ("shared" in path), path


@pytest.mark.slow  # test_codebook_sharded.py has a step on eight devices without the trainer
def test_four_devices_equal_one(coded, data, continuous, tmp_path):
  _, folder, _ = coded
  overrides = FEW | SMALL | {"init_from": str(continuous)}
  finish(start(data, tmp_path / "four", *(f"{key}={json.dumps(value)}" for key, value in overrides.items()), devices=4))
  assert_close(folder, tmp_path / "four")


def test_codes_as_parameters_of_a_width_of_their_own_train_and_resume(data, tmp_path):
  config = tiny_config(*data, **FEW | {
    "codebook.dim": 4, "codebook.dims": {"image": 2}, "codebook.ema": False, "codebook.first_token": True,
    "codebook.revive": "none", "stages.bridges.losses": {"info_nce": 1.0, "commitment": 1.0, "code_uniform": 0.1},
  })  # fmt: skip
  train_and_evaluate(config, tmp_path / "run")
  model = codebind_jax.load(tmp_path / "run")
  shapes = {name: book.codes.shape for name, book in model.codebooks.items()}
  assert shapes == {"shared": (16, 4), "image": (8, 2)}
  steps = model.params["method"]["codes"]
  assert {name: x.shape for name, x in steps.items()} == shapes and not any(np.any(x) for x in steps.values())
  uniform = [line["train/code_uniform"] for line in lines_of(tmp_path / "run") if "train/code_uniform" in line]
  assert len(uniform) == 4 and len(set(uniform[1:])) == 3  # the codes move, but for the first step, whose rate is 0
  shutil.copytree(tmp_path / "run", tmp_path / "half")
  for path in (tmp_path / "half" / "checkpoints").iterdir():
    if path.name == "4":
      shutil.rmtree(path)
  train_and_evaluate(config, tmp_path / "half")
  assert_same_run(tmp_path / "run", tmp_path / "half")

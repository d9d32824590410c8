"""Runs on items that are read anew at every step: bad records, and the same steps as on cached tokens."""

import numpy as np
import pytest

from codebind_jax.config import validation
from codebind_jax.data.task import open_task
from codebind_jax.runtime.metrics import read_metrics
from codebind_jax.train import run_stages, train_and_evaluate
from codebind_jax.trunks import load_trunk
from codebind_jax.trunks.feeds import Feeder
from configs import finetune
from tests import family_fixtures
from tests.train_fixtures import COLOURS, arrays_of, write_manifest


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  return family_fixtures.unpack("clip_hf", tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture
def squares(tmp_path):
  return write_manifest(tmp_path / "squares", rows_per_label=1)


class Quiet:
  """No evaluation."""

  def __init__(self, task, trunks):
    self.task, self.trunks = task, trunks

  def validate(self, model, worlds):
    return {}

  def after_stage(self, model, step, stage, writer, worlds):
    return None

  def finish(self, model, step, writer):
    return {}


def config_of(clip, squares, **overrides):
  """The shipped fine-tuning config, shrunk: frozen trunks, heads by InfoNCE, and no mixup, which mixes tokens."""
  config = finetune.get_config(str(clip)).unlock()
  config.update_from_flattened_dict({
    "steps": 4, "batch_size": 8, "log_steps": 1, "eval_steps": 100, "checkpoint_steps": 4, "optim.warmup": 0,
    "data.manifest": str(squares), "data.root": str(squares.parent / "data"), "model.quantize": False,
    "codebook.dim": 4, "stages.pairs.losses": {"info_nce": 1.0}, "stages.pairs.mixup": 0.0, "data.captions": "each",
  })  # fmt: skip
  config.stages.pairs.tune = {"image": "frozen", "text": "frozen"}
  config.update_from_flattened_dict(overrides)
  return validation.validate(config.lock())


def run(config, folder):
  """Trains without evaluation."""
  task = open_task(config.data)
  feeder = Feeder(config.data, config.model.towers)
  folder.mkdir(parents=True)
  run_stages(config, folder, feeder.train_feeds(task.drawn, config.data.templates_of), Quiet(task, feeder.trunks))
  return arrays_of(folder)


def cut(picture):
  """Leaves a picture whose head is right, so that it passes the check before a run."""
  picture.write_bytes(picture.read_bytes()[:-30])
  return picture


def lines_with(caplog, text):
  return [record.getMessage() for record in caplog.records if text in record.getMessage()]


def test_a_bad_record_is_named_once_and_left_out(clip, squares, tmp_path, caplog):
  bad, tested = cut(squares.parent / "blue0.png"), cut(squares.parent / "green1.png")
  config = config_of(clip, squares, **{
    "data.max_bad_records": 1, "data.workers": 1, "tasks": ("retrieval",), "test": False,
  })  # fmt: skip
  final = train_and_evaluate(config, tmp_path / "run")
  # Every step has all eight rows: the picture was drawn four times.
  [line] = lines_with(caplog, "masked: ")
  assert f"{squares}:7: " in line and str(bad) in line
  lines = read_metrics(tmp_path / "run")
  assert [line["step"] for line in lines if "train/total" in line] == [1, 2, 3, 4]
  assert all(np.isfinite(line["train/total"]) for line in lines[:4])
  # The first step's reading belongs to the time of compiling, which is not counted.
  for name in ("squares/items_per_second", "squares/bytes_per_second", "image/read_share", "text/read_share"):
    assert all(line[f"data/{name}"] > 0 for line in lines[1:4]), name
  # Of eight validation pictures seven are left, and each is a picture of its own.
  assert any(str(tested) in line for line in lines_with(caplog, "left out: "))
  assert "eval/squares_val/retrieval/image_to_text/r1" in final


@pytest.mark.parametrize("cache", [False, True])
def test_more_bad_records_than_allowed_end_the_run_and_one_is_named(clip, squares, tmp_path, cache, caplog):
  bad = [cut(squares.parent / f"{colour}0.png") for colour in ("blue", "black")]
  towers = {"model.towers.image.cache": cache, "model.towers.text.cache": cache}
  tune = {"stages.pairs.tune": {}} if cache else {}
  config = config_of(clip, squares, **{"data.max_bad_records": 1, **towers, **tune})
  with pytest.raises(ValueError, match=r"squares.jsonl:\d+: .*\(2 bad records, 1 allowed by config.data.max_bad_rec"):
    run(config, tmp_path / "run")
  named = lines_with(caplog, "left out " if cache else "masked: ")
  assert len(named) == 2 and all(any(str(path) in line for line in named) for path in bad)
  steps = read_metrics(tmp_path / "run") if (tmp_path / "run" / "metrics.jsonl").exists() else []
  assert not steps, "the first step that is logged ends it"


def test_a_bad_record_has_no_tokens_and_its_row_is_masked(clip, squares, tmp_path):
  cut(squares.parent / "blue0.png")
  towers = {"model.towers.image.cache": True, "model.towers.text.cache": True, "stages.pairs.tune": {}}
  config = config_of(clip, squares, **{"data.max_bad_records": 1, "data.workers": 1, **towers})
  task, feeder = open_task(config.data), Feeder(config.data, config.model.towers)
  feeds = feeder.train_feeds(task.drawn, {})["squares"]
  there = [feeds["image"].has(row) for row in range(8)]
  assert there == [colour != "blue" for colour in COLOURS] and len(feeder.bad) == 1
  assert all(feeds["text"].has(row) for row in range(8))


def test_frozen_trunks_train_the_same_heads_streamed_and_cached(clip, squares, tmp_path):
  found, losses = {}, {}
  for cache in (True, False):
    towers = {"model.towers.image.cache": cache, "model.towers.text.cache": cache}
    config = config_of(clip, squares, **towers, **{"stages.pairs.tune": {}} if cache else {})
    found[cache] = run(config, tmp_path / str(cache))
    losses[cache] = [line["train/total"] for line in read_metrics(tmp_path / str(cache))]
  start = {m: load_trunk("clip", weights=str(clip), modality=m).head_params for m in ("image", "text")}
  # Cached tokens are rounded to float16, by up to 2^-12 of their value; the rows, captions and order are the same.
  np.testing.assert_allclose(losses[True], losses[False], rtol=2**-10)
  assert len({round(loss, 2) for loss in losses[True]}) > 1
  for m in ("image", "text"):
    path = f"params/{m}/shared/proj/kernel"
    before = np.asarray(start[m]["proj"]["kernel"], np.float64)
    moved, other = found[True][path] - before, found[False][path] - before
    # Adam's first steps have the size of the rate whatever the gradient's, so that entries with hardly any turn around.
    assert np.linalg.norm(other) > 0
    assert np.linalg.norm(moved - other) / np.linalg.norm(other) < 0.1

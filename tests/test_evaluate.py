"""Mode `eval` on a user's manifest, and the bad manifests a user may bring."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from codebind_jax import config as config_lib
from codebind_jax.api import load
from codebind_jax.data.task import EvalSet, open_task
from codebind_jax.evaluate import Evaluation, evaluate, named_pairs
from codebind_jax.runtime.metrics import read_metrics
from codebind_jax.trunks.featurize import Featurizer
from configs import eval as eval_config
from tests.train_fixtures import COLOURS, tiny_config, write_manifest

REPOSITORY = pathlib.Path(__file__).parents[1]


def config_of(trained, **overrides):
  manifest, root, run = trained
  config = eval_config.get_config().unlock()
  config.update_from_flattened_dict({"init_from": str(run), "data.manifest": str(manifest), "data.root": str(root)})
  config.update_from_flattened_dict(overrides)
  return config.lock()


@pytest.mark.parametrize(
  ("task", "metric"),
  [
    ("zeroshot", "eval/squares_test/zeroshot/image/top1"),
    ("retrieval", "eval/squares_test/retrieval/image_to_text/r5"),
    ("probe", "eval/squares_val/probe/label/image/specific"),
  ],
)
def test_each_task_measures_itself_and_nothing_else(trained, tmp_path, task, metric, capsys):
  found = evaluate(config_of(trained, task=task), tmp_path)
  assert metric in found and metric in capsys.readouterr().out
  kinds = {name.split("/")[2] for name in found}
  assert kinds <= ({"zeroshot"} if task == "zeroshot" else {"retrieval"} if task == "retrieval" else {"probe", "ncm"})
  assert read_metrics(tmp_path)[0][metric] == found[metric]


def test_command_line(trained, tmp_path):
  manifest, root, run = trained
  command = [sys.executable, "-m", "codebind_jax.main", "--config=configs/eval.py", f"--workdir={tmp_path}",
             f"--config.init_from={run}", f"--config.data.manifest={manifest}", f"--config.data.root={root}",
             "--config.task=retrieval"]
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=os.environ)
  assert done.returncode == 0, done.stderr
  assert "eval/squares_test/retrieval/text_to_image/r1" in done.stdout


def test_manifest_without_splits_is_all_evaluated(trained, tmp_path):
  folder = tmp_path / "mine"
  folder.mkdir()
  for colour in COLOURS[:3]:
    Image.new("RGB", (20, 20), colour).save(folder / f"{colour}.png")
  path = folder / "mine.jsonl"
  path.write_text("".join(json.dumps({"image": f"{c}.png", "label": c}) + "\n" for c in COLOURS[:3]))
  found = evaluate(config_of(trained, **{"data.manifest": str(path)}), tmp_path / "out")
  assert "eval/mine_test/zeroshot/image/top1" in found


def test_classes_come_from_a_file_where_one_is_given(trained, tmp_path):
  names = tmp_path / "classes.txt"
  names.write_text("\n".join([*COLOURS, "pink", "white"]) + "\n")
  task = open_task(config_lib.read(config_of(trained, **{"data.classes": str(names)})).data)
  assert len(task.evals[0].candidates) == 10
  names.write_text("\n")
  with pytest.raises(ValueError, match="empty class list"):
    open_task(config_lib.read(config_of(trained, **{"data.classes": str(names)})).data)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{not json", ":2: not JSON"),
    ('{"image": "missing.png"}', ":2: image: no such file"),
    ('{"smell": "rose"}', ":2: unknown modality 'smell'; allowed: .'image'"),
    ('{"text": "a", "split": "dev"}', ":2: unknown split 'dev'; allowed"),
  ],
)
def test_bad_manifest_lines_are_named(trained, tmp_path, line, message):
  path = tmp_path / "bad.jsonl"
  path.write_text('{"text": "fine"}\n' + line + "\n")
  with pytest.raises(ValueError, match=message):
    evaluate(config_of(trained, **{"data.manifest": str(path)}), tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_task_without_what_it_needs(trained, tmp_path):
  path = tmp_path / "texts.jsonl"
  path.write_text('{"text": "red"}\n{"text": "blue"}\n')
  with pytest.raises(ValueError, match="task 'zeroshot': texts has nothing to measure; it needs labels"):
    evaluate(config_of(trained, **{"data.manifest": str(path)}), tmp_path / "out")


def test_eval_needs_a_checkpoint_and_a_manifest(trained, tmp_path):
  with pytest.raises(ValueError, match="no supported checkpoint"):
    evaluate(config_of(trained, init_from=str(tmp_path)), tmp_path / "out")


def test_the_command_s_own_settings_decide_and_not_the_run_s(trained, tmp_path, monkeypatch):
  def loaded(path):
    model = load(path)
    data = dataclasses.replace(model.config.data, templates_of={"squares": ("the run's {}",)})
    model.config = dataclasses.replace(model.config, test=False, data=data, emergent=(("image", "text"),))
    return model

  monkeypatch.setattr("codebind_jax.evaluate.load", loaded)
  found = evaluate(config_of(trained, task="retrieval"), tmp_path)
  assert {name.split("/")[1] for name in found} == {"squares_val", "squares_test"}
  asked, texts = [], Featurizer.texts
  monkeypatch.setattr(Featurizer, "texts", lambda self, strings: asked.extend(strings) or texts(self, strings))
  evaluate(config_of(trained, **{"data.eval_templates": ("the command's {}",)}), tmp_path)
  assert {f"the command's {colour}" for colour in COLOURS} <= {*asked}
  assert not any(text.startswith("the run's") for text in asked)
  with pytest.raises(ValueError, match="data.eval_templates.*got 'no place for a name'; allowed: a text with one"):
    evaluate(config_of(trained, **{"data.eval_templates": ("no place for a name",)}), tmp_path)


def test_fields_of_one_pair_of_modalities_have_names_of_their_own():
  pairs = (("tactile", "image", "id"), ("tactile", "image", "texture"), ("image", "text", "label"))
  test = EvalSet("materials_test", "materials", "test", None, (), pairs=pairs)
  assert named_pairs(test, ("image", "tactile", "text")) == [
    ("text", "image", "caption", ""), ("text", "tactile", "caption", ""),
    ("tactile", "image", "id", ""), ("tactile", "image", "texture", "texture"), ("image", "text", "label", "label"),
  ]  # fmt: skip


def test_sets_of_one_split_share_its_features_and_keep_their_rows(trained, tmp_path, monkeypatch):
  manifest, root, run = trained
  model = load(run)
  task = open_task(config_lib.read(config_of(trained)).data)
  whole = task.evals[0].source
  picked = [5, 1, 2]
  part = EvalSet("part", "squares", "val", whole.select(picked), (), whole=whole, picked=picked)
  every = EvalSet("every", "squares", "val", whole, ())
  data = dataclasses.replace(model.config.data, root=str(root))
  evaluation = Evaluation(model.config, task, Featurizer(data, model.config.model.towers, model.trunks))
  read = []
  real = evaluation._featurizer.table
  monkeypatch.setattr(evaluation._featurizer, "table", lambda *a, **k: read.append(a) or real(*a, **k))
  some, found = evaluation.table(model, part)["image"], evaluation.table(model, every)["image"]
  assert len(read) == 1
  np.testing.assert_array_equal(some["id"], found["id"][picked])
  np.testing.assert_allclose(some["shared"], found["shared"][picked], atol=1e-6)


def test_rows_of_one_content_are_seen_once(tmp_path):
  manifest = write_manifest(tmp_path / "squares")
  config = config_lib.read(tiny_config(manifest, tmp_path / "cache"))
  source = open_task(config.data).train["squares"]
  twice = source.select([0, 1, 0, 2, 1])
  twice.rows = [row | {"id": f"{number}"} for number, row in enumerate(twice.rows)]
  featurizer = Featurizer(config.data, config.model.towers)
  once, table = featurizer.table(source.select([0, 1, 2]), "image"), featurizer.table(twice, "image")
  assert [items for items in table.choices] == [(0,), (1,), (0,), (2,), (1,)]
  np.testing.assert_array_equal(table.features, once.features)

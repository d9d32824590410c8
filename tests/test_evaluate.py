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
from codebind_jax.trunks.cache import TokenCache
from codebind_jax.trunks.feeds import Feeder
from configs import eval as eval_config
from tests.model_towers import uncached
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
    ('{"smell": "rose"}', r":2: no modality; at least one of \['image', "),
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
  asked, texts = [], Feeder.texts
  monkeypatch.setattr(Feeder, "texts", lambda self, strings: asked.extend(strings) or texts(self, strings))
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


def evaluation_of(trained, root, model=None, **changes):
  """The evaluation of a trained run's config on its own manifest, with a cache of its own."""
  model = model or load(trained[2])
  data = dataclasses.replace(model.config.data, root=str(root), **changes)
  task = open_task(data, default_split="test")
  settings = dataclasses.replace(model.config, test=True, emergent=(), data=data)
  return Evaluation(settings, task, Feeder(data, settings.model.towers, model.trunks)), model


def test_sets_of_one_split_share_its_tokens_and_keep_their_rows(trained, tmp_path, monkeypatch):
  evaluation, model = evaluation_of(trained, tmp_path)
  whole = evaluation.task.evals[0].source
  picked = [5, 1, 2]
  part = EvalSet("part", "squares", "val", whole.select(picked), ())
  every = EvalSet("every", "squares", "val", whole, ())
  computed, real = [], TokenCache._encode

  def encode(self, entries, writer):
    computed.extend(entries if self._trunk.modality == "image" else ())
    return real(self, entries, writer)

  monkeypatch.setattr(TokenCache, "_encode", encode)
  some = evaluation.table(model, part)["image"]
  assert len(computed) == 3
  found = evaluation.table(model, every)["image"]
  assert len(computed) == len(whole) == 8
  evaluation.table(model, every)
  assert len(computed) == 8
  np.testing.assert_array_equal(some["id"], found["id"][picked])
  np.testing.assert_allclose(some["shared"], found["shared"][picked], atol=1e-6)


def test_rows_of_one_content_are_seen_once(tmp_path):
  manifest = write_manifest(tmp_path / "squares")
  names = [f"{name}.png" for name in ("red0", "red1", "red0", "copy", "red2", "red1")]
  (manifest.parent / "copy.png").write_bytes((manifest.parent / "red0.png").read_bytes())
  lines = [{"id": str(number), "image": name, "text": "red"} for number, name in enumerate(names)]
  manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
  config = config_lib.read(tiny_config(manifest, tmp_path / "cache", **{"data.holdout": 0.0}))
  source = open_task(config.data).train["squares"]
  feeder = Feeder(config.data, config.model.towers)
  feed = feeder.clean(source, "image")
  first = feed.places[:, 0]
  assert [list(first).index(place) for place in first] == [0, 1, 0, 0, 4, 1]
  captions = feeder.train(source, "text").places.reshape(len(names), -1)
  assert len(np.unique(captions)) == captions.shape[1]
  once = feeder.clean(source.select([0, 1, 4]), "image")
  for row, same in enumerate([0, 1, 0, 0, 2, 1]):
    np.testing.assert_array_equal(feed.clean(row), once.clean(same))


def test_a_tower_with_its_trunk_in_the_model_gives_what_cached_tokens_give(trained, tmp_path):
  cached, model = evaluation_of(trained, tmp_path)
  streamed, whole = evaluation_of(trained, tmp_path, uncached(model, "image"))
  test = cached.task.evals[1]
  one, other = cached.table(model, test)["image"], streamed.table(whole, test)["image"]
  np.testing.assert_array_equal(one["id"], other["id"])
  np.testing.assert_allclose(one["full"], other["full"], atol=2e-3)  # cached tokens are float16
  items = [test.source.read(row, "image") for row in range(len(test.source))]
  direct = model.embed({"image": items})["image"]
  np.testing.assert_array_equal(direct.full, other["full"])


def test_tables_hold_embeddings_and_nothing_of_the_inputs(trained, tmp_path):
  cached, model = evaluation_of(trained, tmp_path)
  streamed, whole = evaluation_of(trained, tmp_path, uncached(model, "image"))
  for evaluation, own in ((cached, model), (streamed, whole)):
    for table in (evaluation.train_table(own, "squares"), evaluation.table(own, evaluation.task.evals[0])):
      for modality, columns in table.items():
        rows, widths = len(columns["id"]), own.widths(modality)
        vectors = {name: values for name, values in columns.items() if values.ndim > 1}
        assert {name: values.shape for name, values in vectors.items()} == {n: (rows, w) for n, w in widths.items()}
        assert all(values.flags.owndata or values.base.nbytes == values.nbytes for values in vectors.values())
        assert all(values.dtype.kind in "iUb" for name, values in columns.items() if name not in vectors)
  # Beside the tables no array of the inputs or tokens stays: the feeds hold numbers of places alone.
  for feeder in (cached._feeder, streamed._feeder):
    for _, feed in feeder._made.values():
      arrays = {f.name: getattr(feed, f.name) for f in dataclasses.fields(feed)}
      assert all(v.dtype == np.int64 for v in arrays.values() if isinstance(v, np.ndarray)), arrays


def broken(trained, folder):
  """The squares with one picture of the test split cut in its pixels, and its id."""
  manifest = write_manifest(folder / "squares")
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  path = manifest.parent / "blue4.png"
  Image.fromarray(noise).save(path)
  path.write_bytes(path.read_bytes()[:6000])
  return manifest


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_picture_is_left_out_and_named(trained, tmp_path, streaming, caplog, monkeypatch):
  manifest, model = broken(trained, tmp_path), load(trained[2])
  if streaming:
    model = uncached(model, "image")
  data = {"manifest": str(manifest), "checked": "none"}
  allowed, _ = evaluation_of(trained, tmp_path / "root", model, max_bad_records=1, **data)
  with caplog.at_level("WARNING"):
    found = allowed.everything(model)
  said = [record.getMessage() for record in caplog.records if "blue4.png" in record.getMessage()]
  assert len(said) == 1 and said[0].startswith("left out") and f"{manifest}:15: image: " in said[0]
  test = next(e for e in allowed.task.evals if e.role == "test")
  table = allowed.table(model, test)
  assert [*table["image"]["id"]] == [f"{colour}4" for colour in COLOURS if colour != "blue"]
  assert "blue" in table["text"]["caption"]  # of a record whose picture is bad the text stays
  good = [row for row in range(len(test.source)) if test.source.fields(row)["id"] != "blue4"]
  data = {"manifest": str(trained[0])}
  whole, _ = evaluation_of(trained, tmp_path / "root", model, **data)
  top1 = "eval/squares_test/zeroshot/image/top1"
  rest = dataclasses.replace(test, source=next(e for e in whole.task.evals if e.role == "test").source.select(good))
  monkeypatch.setattr(whole, "_sets", lambda: [rest])
  assert found[top1] == whole.everything(model)[top1]
  strict, _ = evaluation_of(trained, tmp_path / "root", model, manifest=str(manifest), checked="none")
  with pytest.raises(ValueError, match=r"squares.jsonl:15: image: .*blue4.png.*\(1 bad records, 0 allowed by config"):
    strict.everything(model)


def test_the_command_opens_every_picture_first(trained, tmp_path):
  manifest = broken(trained, tmp_path)
  with pytest.raises(ValueError, match="squares.jsonl:15: image: .*blue4.png"):
    evaluate(config_of(trained, **{"data.manifest": str(manifest), "data.root": str(tmp_path)}), tmp_path / "out")
  assert not (tmp_path / "out").exists()
  found = evaluate(
    config_of(trained, **{"data.manifest": str(manifest), "data.root": str(tmp_path), "data.max_bad_records": 1}),
    tmp_path / "out",
  )  # fmt: skip
  assert "eval/squares_test/zeroshot/image/top1" in found

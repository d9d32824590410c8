"""Mode `bind`: what is chosen by the data, what is refused before any work, and whole runs of it."""

import ast
import json
import logging
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import codebind_jax
from codebind_jax import command_line, schema
from codebind_jax.codebook.spec import Codebook
from codebind_jax.command_line import bind
from codebind_jax.config import Config
from codebind_jax.data.task import open_task
from codebind_jax.models.towers import ModelSpec
from codebind_jax.train import train_and_evaluate
from configs import bind as config_file
from tests.family_fixtures import unpack
from tests.processes import REPOSITORY
from tests.source_fixtures import Rows

RANDOM = {
  "image": {"weights": "random", "size": 32, "grid": 0, "stages": ((1, 3, 1, 1, 8), (1, 3, 2, 2, 16)),
            "head_width": 32, "class_names": "", "levels": ()},
  "text": {"weights": "random", "layers": 1, "width": 32, "heads": 4},
}  # fmt: skip
RANDOM["depth"] = RANDOM["thermal"] = RANDOM["tactile"] = RANDOM["image"]
SMALL = {"steps": 4, "model.shared_dim": 16, "codebook.shared_codes": 16, "baseline": False,
         **{f"model.towers.{m}.specific_dim": 8 for m in ("image", "tactile", "thermal")}}  # fmt: skip
WORDS = "cow dog lamp chair table horse apple pear bottle phone".split()


@pytest.fixture
def write(tmp_path, monkeypatch):
  """Writes files of records and their manifest, and gives its path."""
  monkeypatch.setenv("CODEBIND_DATA", str(tmp_path / "cache"))
  return writer(tmp_path)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  """Final metrics and folder of a run that bound pictures to words."""
  folder = tmp_path_factory.mktemp("first")
  words = [{"image": i % 10, "text": f"a {WORDS[i % 10]}"} for i in range(60)]
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("CODEBIND_DATA", str(folder / "cache"))
    return train_and_evaluate(config_of(writer(folder)(words), **SMALL), folder / "run"), folder / "run"


def writer(parent):
  """`write` of a folder."""

  def write(records, name="mine"):
    folder = parent / name
    folder.mkdir()
    for number, record in enumerate(records):
      record.setdefault("id", f"r{number}")
      for modality in set(record) & {"image", "tactile", "depth", "thermal", "eeg"}:
        ending = ".png" if modality in ("image", "tactile") else ".npy"
        kind, record[modality] = record[modality], f"{number}_{modality}{ending}"
        make(folder / record[modality], modality, kind)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)

  return write


def make(path, modality, kind):
  rng = np.random.default_rng(abs(hash((modality, kind))) % 2**32)
  if path.suffix == ".png":
    picture = np.full((32, 32, 3), 255, np.uint8)
    picture[4 + kind : 20 + kind, 4:24] = (25 * kind % 256, 255 - 25 * kind % 256, 40)
    Image.fromarray(picture).save(path)
  elif modality == "eeg":
    np.save(path, (20 * rng.normal(size=(6, 40 + kind))).astype(np.float32))
  else:
    base = 20 if modality == "thermal" else 1
    np.save(path, (base + kind + rng.random((24, 24))).astype(np.float32))


def config_of(files, argument="", **changes):
  """The config of a command, its packaged trunks replaced by tiny random ones."""
  config = config_file.get_config(argument).unlock()
  config.data.files = (files,)
  for name, options in RANDOM.items():
    if name in config.model.towers:
      tower = config.model.towers[name]
      known = {key: value for key, value in options.items() if key in tower.options}
      tower.options = ConfigDict(tower.options.to_dict() | known)
  if "image" in config.model.towers:
    config.model.towers.image.meaning, config.model.towers.image.meaning_dim = "", 0
  config.update_from_flattened_dict(changes)
  return config.lock()


def chosen(files, argument="", **changes):
  config = config_of(files, argument, **changes)
  return bind.resolved(config, open_task(bind.data_of(config)))


def pictures(count, classes=5, **more):
  return [{"image": i % classes, "label": WORDS[i % classes]} | more for i in range(count)]


def test_forty_pictures_of_five_classes(write, caplog):
  """Labels are the captions, and equal labels in a batch are no negatives, so that a batch may be larger than five."""
  caplog.set_level(logging.INFO, "absl")
  config = chosen(write(pictures(40)))
  stage, = config.ordered
  assert config.mode == "train" and set(config.model.towers) == {"image", "text"}
  assert stage.pairs == (("image", "text"),) and not stage.unique_labels and config.batch_size == 32
  assert config.steps == 60 and stage.steps == 60 and config.eval_steps == 30 and config.baseline
  assert stage.tune == {"image": "frozen", "text": "frozen"}
  assert all(tower.cache for tower in config.model.towers.values())
  assert "40 records without text have their label as caption" in caplog.text
  assert "--config.stages.bind.pairs=\"(('image', 'text'),)\"" in caplog.text


def test_the_printed_flags_give_the_same_config(write, caplog, monkeypatch):
  """Also where other data would give another choice: here of ten times as many records."""
  caplog.set_level(logging.INFO, "absl")
  path = write(pictures(40))
  config = chosen(path)
  lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("  --config")]
  argv = [word for line in lines for word in shlex.split(line)]
  file = next(word.removeprefix("--config=") for word in argv if word.startswith("--config=configs/bind.py:"))
  assert file == "configs/bind.py:image,text"
  values = dict(word.removeprefix("--config.").split("=", 1) for word in argv if word.startswith("--config."))
  given = config_of(write(pictures(400), "more"), file.partition(":")[2]).unlock()
  for key, value in values.items():
    section, _, name = key.rpartition(".")
    part = schema.get(given, section) if section else given
    kind = part.get_type(name)
    part[name] = ast.literal_eval(value) if kind in (tuple, bool) else kind(value)  # as the flags' parsers do
  other = bind.resolved(given.lock(), open_task(bind.data_of(given)))
  differing = schema.difference(schema.to_plain(config), schema.to_plain(other))
  assert [line.partition(":")[0] for line in differing] == ["data.files"]


def test_a_hundred_classes_and_a_thousand_rows(write):
  config = chosen(write([{"id": f"r{i}", "text": f"thing {i}", "label": f"kind {i % 100}", "image": i % 9}
                         for i in range(1000)]))  # fmt: skip
  stage, = config.ordered
  assert config.batch_size == 256 and not stage.unique_labels and config.steps == 70  # 20 epochs of about 900 rows
  assert config.model.towers["text"].whiten == 0.25


def test_captions_without_labels_are_their_own_groups(write):
  config = chosen(write([{"text": f"thing {i}", "image": i % 9} for i in range(60)]))
  assert not config.ordered[0].unique_labels and config.batch_size == 32
  assert config.model.towers["text"].whiten == 0  # the covariance of 384 values is not known from 50 texts


def sensors(count, *modalities, **more):
  return [{name: i % 10 for name in modalities} | more for i in range(count)]


def test_sensors_without_pictures_and_texts_are_bound_to_one_another(write):
  config = chosen(write(sensors(30, "depth", "thermal", "eeg")))
  assert set(map(frozenset, config.ordered[0].pairs)) == set(map(frozenset, (
    ("depth", "thermal"), ("depth", "eeg"), ("thermal", "eeg"))))  # fmt: skip
  assert set(config.codebook.codes) == {"depth", "thermal", "eeg"}


def test_a_sensor_is_bound_to_pictures_where_there_is_no_text(write):
  assert chosen(write(sensors(30, "thermal", "image"))).ordered[0].pairs == (("thermal", "image"),)


def test_records_may_have_different_modalities(write):
  """Each is bound to the bridges it shares records with; one that shares none with them, to its best partner."""
  names = ("image", "text"), ("tactile", "image"), ("depth", "tactile")
  value = lambda name, i: f"text {i}" if name == "text" else i % 10
  records = [{name: value(name, i) for name in names[i % 3]} for i in range(90)]
  config = chosen(write(records))
  assert config.ordered[0].pairs == (("image", "text"), ("tactile", "image"), ("depth", "tactile"))


@pytest.mark.parametrize("records, message", [
  ([{"image": i, "text": f"t{i}"} for i in range(2)],
   "2 training records have both image and text, and no two modalities more; at least 8 are needed"),
  ([{"image": i} for i in range(9)], "the modalities image 7, and two are needed .* a text .* a label or another"),
  ([{"text": f"t{i}"} for i in range(9)], "the modalities text 7, and two are needed"),
])  # fmt: skip
def test_too_little_is_said(write, records, message):
  with pytest.raises(ValueError, match=f"config.data.files: .*{message}"):
    chosen(write(records))


@pytest.mark.parametrize("argument, changes, message", [
  ("image,audio", {}, "configs/bind.py:image,audio: no training record has 'audio'; the data has image 8, text 8"),
  ("", {"tune.audio": "lora"}, "config.tune.audio: no training record has 'audio'"),
  ("", {"tune.image": "some"}, "config.tune.image: 'some' is not allowed; allowed: .*'lora'"),
  ("", {"trunks.image": "resnet"}, "config.trunks.image: 'resnet' is not allowed"),
  ("", {"trunks.image": "minilm"}, "config.trunks.image: 'minilm' is a trunk of text"),
  ("", {"weights.image": "/nowhere"}, "config.weights.image: '/nowhere': no such file or folder"),
  ("", {"init_from": "/nowhere"}, "config.init_from: '/nowhere': no such file or folder"),
  ("", {"batch_size": 0}, "config.batch_size: got 0; allowed: any number above 0"),
  ("", {"bind.bridges": ("audio",)}, "config.bind.bridges: 'audio' is not allowed; allowed: some of"),
  ("", {"batch_size": 64}, ""),
])  # fmt: skip
def test_what_does_not_fit_names_the_key(write, argument, changes, message):
  files = write(pictures(10))
  if not message:  # the data's size is checked as the run begins, before encoders are fetched
    with pytest.raises(ValueError, match="config.batch_size: 64 rows of a batch are of 'mine', which has 8"):
      train_and_evaluate(config_of(files, **changes), files + ".run")
    return
  with pytest.raises(ValueError, match=message):
    chosen(files, argument, **changes)


def test_no_data_and_unknown_modalities_are_named():
  with pytest.raises(ValueError, match="config.data.files: must be set"):
    bind.data_of(config_file.get_config())
  with pytest.raises(ValueError, match="configs/bind.py:smell: unknown modality 'smell'; allowed: image, text"):
    config_file.get_config("smell")


def test_eeg_takes_the_shape_that_most_recordings_have(write, caplog):
  caplog.set_level(logging.WARNING, "absl")
  config = chosen(write([{"eeg": 3 if i else 5, "label": WORDS[i % 3]} for i in range(20)]), **{"data.holdout": 0.0})
  options = config.model.towers["eeg"].options
  assert (options["channels"], options["samples"]) == (6, 43)
  with np.load(options["statistics"]) as found:
    assert found["mean"].shape == found["deviation"].shape == (8, 6) and (found["deviation"] > 0).all()
  assert "19 of 20 recordings tried have 6 channels and 43 samples" in caplog.text


def test_a_run_is_made_and_evaluated_and_another_starts_from_it(first, write, tmp_path):
  """The real function of the command: a report without val rows in the file, then one more modality bound to it."""
  metrics, run = first
  assert "eval/mine_val/retrieval/text_to_image/r1" in metrics and (run / "report.html").is_file()
  touch = [{"image": i % 10, "tactile": i % 10, "label": WORDS[i % 10]} for i in range(60)]
  config = config_of(write(touch, "touch"), **SMALL, init_from=str(run))
  second = train_and_evaluate(config, tmp_path / "second")
  assert "eval/touch_val/zeroshot/tactile/top1" in second
  before, after = codebind_jax.load(run), codebind_jax.load(tmp_path / "second")
  assert after.modalities == ("image", "tactile", "text")
  assert set(after.config.stages["bind"].pairs) == {("tactile", "image"), ("tactile", "text")}
  for name in ("image", "text"):  # what the first run has stays as it is
    x = [tmp_path / "touch" / "3_image.png"] if name == "image" else ["a cow"]
    np.testing.assert_array_equal(before.embed({name: x})[name].shared, after.embed({name: x})[name].shared)


def test_what_has_nothing_in_common_with_the_model_it_starts_from_is_refused(first, write):
  _, run = first
  with pytest.raises(ValueError, match=r"config.init_from: .* has image, text, and .* have depth, eeg: nothing ties"):
    chosen(write(sensors(30, "depth", "eeg"), "far"), init_from=str(run))
  near = chosen(write(sensors(30, "thermal", "image"), "near"), **SMALL, init_from=str(run))
  assert near.ordered[0].pairs == (("thermal", "image"),) and near.ordered[0].train == (
    r"thermal(/.*|_log_logit_scale)",)  # fmt: skip


def test_a_tower_that_leans_on_another_brings_it(write, monkeypatch):
  """An image tower that hands its class names to the text head needs the text tower, though the data has no text."""
  start = config_of(write(pictures(20))).copy_and_resolve_references().unlock()
  start.model.towers.image.meaning, start.model.towers.image.meaning_dim = "text", 8
  for name in [name for name in start.model.towers if name not in ("image", "text")]:
    del start.model.towers[name]
  for field in ("bind", "trunks", "weights", "tune"):
    del start[field]
  model = schema.read(ModelSpec, start.model, "model")
  monkeypatch.setattr(bind, "config_of", lambda source: Config(model=model, codebook=schema.read(
    Codebook, {"dim": 2, "codes": {"image": 8}}, "codebook")))  # fmt: skip
  monkeypatch.setattr(bind, "_has_baseline", lambda source: False)
  found = chosen(write(sensors(30, "thermal", "image"), "near"), init_from="somewhere")
  assert set(found.model.towers) == {"image", "text", "thermal"}
  assert found.model.towers["image"].meaning == "text" and found.ordered[0].pairs == (("thermal", "image"),)


def test_two_sources_share_a_batch(write, tmp_path):
  files = {"named_files": {"a": (write(pictures(40), "a"),), "b": (write(pictures(20, classes=3), "b"),)}}
  given = lambda **more: config_of("", **more).unlock()
  config = given()
  config.data.files, config.data.named_files = (), ConfigDict(files["named_files"])
  found = bind.resolved(config.lock(), open_task(bind.data_of(config)))
  assert found.ordered[0].sources == {"a": 16, "b": 16} and found.batch_size == 32
  config = given(batch_size=4096)
  config.data.files, config.data.named_files = (), ConfigDict(files["named_files"])
  with pytest.raises(ValueError, match="config.batch_size: 2048 rows of a batch are of 'a', which has"):
    train_and_evaluate(config.lock(), tmp_path / "run")


def test_published_encoders_by_key(write, tmp_path):
  """Their own heads and width, frozen or adapted as the command says; the new ones start from the packaged trunk."""
  path = write([{"image": i % 10, "text": f"a {WORDS[i % 10]}", "depth": i % 10} for i in range(40)])
  clip_folder = unpack("clip_hf", tmp_path / "clip")
  weights = {"weights.image": str(clip_folder), "weights.text": str(clip_folder)}
  config = chosen(path, **weights, **{"tune.image": "lora"})
  towers = config.model.towers
  assert towers["image"].trunk == towers["text"].trunk == "clip" and towers["depth"].trunk == "efficientnet_lite0"
  assert towers["image"].head == towers["text"].head == "published" and towers["depth"].head == "linear"
  width = codebind_jax.load(clip_folder).config.model.shared_dim
  assert config.model.shared_dim == width and not config.baseline
  assert not towers["image"].cache and towers["text"].cache and config.ordered[0].tune["image"] == "lora"


def test_the_command(write, tmp_path):
  """Given twice, with another harmless key, it finds the run finished."""
  path = write(pictures(24))
  command = [sys.executable, "-m", "codebind_jax.main", "--config=configs/bind.py", f"--config.data.files={path}",
             f"--workdir={tmp_path / 'run'}", "--config.steps=2", "--config.baseline=False",
             "--config.model.shared_dim=16",
             *(f"--config.model.towers.{m}.options.{key}={value}" for m in ("image", "text")
               for key, value in RANDOM[m].items()), "--config.model.towers.image.meaning=",
             "--config.model.towers.image.meaning_dim=0"]  # fmt: skip
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "chosen, as the flags that would give it" in done.stderr and re.search(r"report: .*report\.html", done.stdout)
  again = subprocess.run([*command, "--config.log_steps=1"], cwd=REPOSITORY, capture_output=True, text=True)
  assert again.returncode == 0 and "the final evaluation was done before" in again.stderr, again.stderr


def test_counts_of_pairs():
  """By hand: three records with image and text, two with image and audio, one with all three."""
  names = [("image", "text")] * 3 + [("image", "audio")] * 2 + [("image", "text", "audio")]
  items = {m: [np.zeros(1, np.float32) if m in have else None for have in names] for m in ("image", "audio")}
  counts = bind.Counts([Rows("some", [{"text": ["x"]} if "text" in have else {} for have in names], **items)])
  assert counts.rows == 6 and counts.with_all("image") == 6 and counts.with_all("image", "text") == 4
  assert counts.with_all("text", "audio") == 1 and counts.with_a_pair([("image", "text"), ("text", "audio")]) == 4


def test_flags_of_a_config_file_with_a_space_and_words_that_are_none():
  assert command_line.config_argument(["main", "--config", "a.py:x", "--workdir=w"]) == "a.py:x"
  assert command_line.config_argument(["main", "--config=a.py", "--config.steps=3"]) == "a.py"
  assert command_line.config_argument(["main", "--workdir=w"]) == ""

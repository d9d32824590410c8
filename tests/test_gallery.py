"""Galleries: pictures of every modality, queries of any two modalities of any set, and the strip of a command."""

import dataclasses
import json
import types
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from codebind_jax.api import Model
from codebind_jax.config import read
from codebind_jax.data.task import EvalSet, Task
from codebind_jax.evaluators.base import Captioned
from codebind_jax.report import data, galleries, pictures, summary
from codebind_jax.tools import gallery as tool
from configs import common
from tests.source_fixtures import Rows

RATE = 44_100


def sound(hertz, seconds=0.5):
  return np.sin(2 * np.pi * hertz * np.arange(int(RATE * seconds)) / RATE).astype(np.float32)


# Pictures.


def test_depth_is_bright_where_near_and_grey_where_nothing_came_back():
  metres = np.tile(np.linspace(1.0, 5.0, 20, dtype=np.float32), (10, 1))
  metres[0] = 0
  picture = pictures.draw("depth", metres)
  light = picture[5].astype(int).sum(axis=1)
  assert (np.diff(light) < 0).all() and (picture[0] == 128).all() and picture.dtype == np.uint8


def test_thermal_is_bright_where_warm():
  celsius = np.tile(np.linspace(10.0, 40.0, 20, dtype=np.float32), (10, 1))
  assert (np.diff(pictures.draw("thermal", celsius)[0].astype(int).sum(axis=1)) > 0).all()


def test_a_sound_s_picture_has_low_tones_below():
  brightest = [int(pictures.draw("audio", sound(hertz)).astype(int).sum(axis=(1, 2)).argmax()) for hertz in (200, 5000)]
  assert brightest[0] > brightest[1] + 40
  quiet_then_loud = np.concatenate([0 * sound(500), sound(500)])
  across = pictures.draw("audio", quiet_then_loud).astype(int).sum(axis=(0, 2))
  assert across[:60].max() < across[100:].min()


def test_points_stand_upright_and_keep_their_colours():
  pole = np.zeros((200, 3), np.float32)
  pole[:, 1] = np.linspace(0, 2, 200)
  drawn = (pictures.draw("points", pole) < 250).any(axis=2)
  rows, columns = np.nonzero(drawn)
  assert np.ptp(rows) > 130 and np.ptp(columns) < 5
  red = np.concatenate([pole, np.tile([1.0, 0.0, 0.0], (200, 1))], axis=1).astype(np.float32)
  colours = {tuple(pixel) for pixel in pictures.draw("points", red).reshape(-1, 3).tolist()}
  assert colours == {(255, 255, 255), (255, 0, 0)}


def test_video_shows_its_first_and_its_middle_frame():
  frames = np.zeros((9, 10, 12, 3), np.uint8) + np.arange(9, dtype=np.uint8)[:, None, None, None] * 20
  picture = pictures.draw("video", frames)
  assert picture.shape == (20, 12, 3) and picture[0, 0, 0] == 0 and picture[-1, 0, 0] > 0
  assert pictures.of_video(frames[:, :, :8]).shape == (10, 16, 3)
  assert pictures.of_video(frames[:1]).shape == (10, 12, 3)


def test_eeg_has_a_trace_for_each_channel_up_to_eight():
  flat = np.zeros((3, 100), np.float32)
  flat[1, 50] = 40.0  # one spike, upward
  dark = (pictures.draw("eeg", flat) < 200).any(axis=2)
  assert dark[[26, 80, 133]].mean() > 0.8 or sum(row.mean() > 0.8 for row in dark) == 3
  many = (pictures.of_eeg(np.zeros((40, 50), np.float32)) < 200).any(axis=2)
  assert sum(row.mean() > 0.8 for row in many) == 8


def test_vectors_in_the_place_of_items_are_not_drawn():
  assert all(pictures.drawable(m, "file") for m in pictures.DRAWN) and not pictures.drawable("text", "a dog")
  assert not any(pictures.drawable(m, np.zeros(64, np.float32)) for m in pictures.DRAWN)
  assert pictures.drawable("audio", sound(100)) and pictures.drawable("depth", np.ones((4, 4), np.float32))


# Galleries.


def config_of(*modalities, pairs=()):
  config = common.get_config()
  for name in modalities:
    config.model.towers[name] = common.tower("vectors", options={"width": 4, "modality": name})
  for number, pair in enumerate(pairs):
    config.stages[f"s{number}"] = common.stage(config, pairs=(pair,), losses={"info_nce": 1.0})
  config.stage_order = tuple(config.stages)
  return read(config)


def robot(role="val", title="mine, validation rows held out"):
  """Four rows of sound and depth without text, found by id; the embeddings of the last two are exchanged in depth."""
  rows = [{"id": f"r{i}"} for i in range(4)]
  source = Rows("mine", rows, audio=[sound(200 * (i + 1)) for i in range(4)],
                depth=[np.full((6, 8), i + 1.0, np.float32) for i in range(4)])  # fmt: skip
  x = np.eye(4, dtype=np.float32)
  ids = np.array([row["id"] for row in rows])
  table = {m: {"shared": x[order], "id": ids} for m, order in (("audio", [0, 1, 2, 3]), ("depth", [0, 1, 3, 2]))}
  return EvalSet("mine_val", "mine", role, source, (), title=title), Captioned(table, {})


def test_a_set_without_text_has_galleries_of_the_modalities_that_were_bound():
  test, table = robot()
  config = config_of("audio", "depth", pairs=[("audio", "depth")])
  there, back = galleries.galleries(config, [test], lambda place: table, shown=4)
  assert (there.title, there.on, there.asked, there.found, there.first) == (
    "Audio to depth of one item", "mine, validation rows held out", 4, 4, 2)  # fmt: skip
  assert back.title == "Depth to audio of one item" and back.kind == "pictures"
  answers = {query.asked.text: [(a.text, a.right) for a in query.answers[:1]] for query in there.queries}
  assert answers == {"r0": [("r0", True)], "r1": [("r1", True)], "r2": [("r3", False)], "r3": [("r2", False)]}
  assert there.queries[0].asked.kind == "spectrogram of a sound" and there.queries[0].asked.image.shape[2] == 3
  assert there.queries[0].answers[0].kind == "depth map, near is bright"


def test_a_set_is_embedded_only_where_it_has_a_modality_that_was_not_shown():
  test, table = robot()
  config, asked = config_of("audio", "depth", pairs=[("audio", "depth")]), []
  found = list(galleries.galleries(config, [test, test], lambda place: asked.append(place) or table))
  assert len(found) == 2 and asked == [0]


def test_one_modality_and_vectors_have_no_gallery_and_training_rows_are_called_what_they_are():
  test, table = robot()
  alone = Captioned({"audio": table["audio"]}, {})
  assert list(galleries.galleries(config_of("audio"), [test], lambda place: alone)) == []
  vectors = dataclasses.replace(test, source=Rows("v", [{"id": f"r{i}"} for i in range(4)], audio=list(np.eye(4)),
                                                  depth=list(np.eye(4))))  # fmt: skip
  config = config_of("audio", "depth", pairs=[("audio", "depth")])
  assert list(galleries.galleries(config, [vectors], lambda place: table)) == []
  (shown,) = galleries.shown_sets(Task("mine", "", {"mine": test.source}, ()))
  assert shown.title == "mine, training rows (seen in training)" and shown.source is test.source
  val, other = dataclasses.replace(test, name="v"), dataclasses.replace(test, name="t", role="test")
  assert [s.name for s in galleries.shown_sets(Task("m", "", {}, (other, val)))] == ["v", "t"]


# The whole report of what has little to report.


class Still:
  """An evaluation that has the tables given to it."""

  def __init__(self, config, table):
    self.config, self._table = config, table

  def table(self, model, test):
    return self._table

  def embed_text(self, model, texts):
    raise AssertionError("there is no text")

  def code_counts(self, model):
    return {"shared": np.zeros(4)}, {"audio": np.zeros(4)}


@pytest.mark.parametrize("sets", ["one", "none", "one modality"])
def test_a_report_is_made_without_text_labels_numbers_or_sets(tmp_path, sets):
  test, table = robot()
  config = config_of("audio", "depth", pairs=[("audio", "depth")])
  if sets == "one modality":
    table = Captioned({"audio": table["audio"]}, {})
  task = Task("mine", "", {"mine": test.source}, () if sets == "none" else (test,))
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "s0", "train/total": null}\n')
  model = Model(config, {}, {})
  model.method = types.SimpleNamespace(codebook_sizes={"shared": 4}, numbered=lambda book, x: x)
  models = dict.fromkeys(("before", "after", "baseline"), model)
  final = {"eval/mine_val/zeroshot/audio/top1": float("nan")} if sets == "one" else {}
  found = summary.report_data(config, tmp_path, task, Still(config, table), final, models)
  assert found.code_counts == {} and found.run.records[0]["step"] == 1
  assert found.verdict[-1] == "Codes: no code of codebook shared was used on the training data."
  if sets == "one":
    assert found.verdict[0] == "Zero-shot: the value is not finite on audio (mine, validation rows held out)."
  else:
    assert found.verdict[0].startswith("Nothing was measured")
  assert len(found.galleries) == (0 if sets == "one modality" else 2)
  if sets == "none":
    assert found.galleries[0].on == "mine, training rows (seen in training)"
  first = summary.text_table(found).splitlines()[0]
  assert len(first) > 60 and found.verdict[0].startswith(first)


def test_the_printed_table_has_the_verdict_first_and_only_columns_that_say_something():
  scores = [data.Score("Zero-shot image, top-1", "icons, unseen artists", 24.5, 25.5, 100 / 550, (17.5, 33.4),
                       n=110, ways=550),
            data.Score("Linear probe of family, image, full", "icons, unseen concepts", 99.4, 97.0)]  # fmt: skip
  run = data.Run("CodeBind", [])
  report = data.ReportData("t", run, scores=scores, verdict=["Zero-shot: level."], trained="It learned.")
  lines = summary.text_table(report).splitlines()
  assert lines[:3] == ["Zero-shot: level.", "It learned.", ""]
  assert lines[3].split() == ["set", "rows", "ways", "CodeBind", "95", "%", "baseline", "chance"]
  assert lines[4].split()[-6:] == ["110", "550", "24.5", "17.5-33.4", "25.5", "0.2"]
  assert lines[5].split()[-2:] == ["99.4", "97.0"]
  bare = dataclasses.replace(report, scores=[data.Score("A", "s", 1.0)], verdict=(), trained="")
  lines = summary.text_table(bare).splitlines()
  assert [line.split() for line in lines] == [[], ["set", "CodeBind"], ["A", "s", "1.0"]]


# The strip.


def test_the_strip_is_one_svg_with_marks_captions_and_a_text_alternative():
  red = np.full((20, 20, 3), (200, 0, 0), np.uint8)
  query = data.Query(data.Item("a <red> thing"), [data.Item("red", red, True, 0.9), data.Item("blue", red, False, 0.1)])
  svg = tool.strip(data.Gallery("Text to image", "mine & yours", [query, query], 40, 30, 12), answers=2)
  root = ElementTree.fromstring(svg)
  space = "{http://www.w3.org/2000/svg}"
  marks = [group.get("class") for group in root.iter(f"{space}g")]
  assert marks == ["right", "wrong"] * 2 and len(list(root.iter(f"{space}image"))) == 4
  words = [element.text for element in root.iter(f"{space}text")]
  assert words[:2] == ["Text to image: mine & yours", "12 of 40 queries have a right first answer among 30"]
  assert words[2:7] == ["a <red> thing", "✓", "red", "✗", "blue"]
  assert root.find(f"{space}title").text.startswith(
    "Text to image, mine & yours. a <red> thing: red (right), blue (wrong)"
  )
  assert all(image.get("href").startswith("data:image/") for image in root.iter(f"{space}image"))


def test_drawn_shapes_hold_out_pairs_whose_parts_are_seen(tmp_path):
  lines = [json.loads(line) for line in tool.draw_shapes(tmp_path).read_text().splitlines()]
  texts = {split: {line["text"] for line in lines if line["split"] == split} for split in ("train", "val")}
  assert len(texts["val"]) == 20 and len(texts["train"]) == 60 and not texts["train"] & texts["val"]
  for part in (0, 1):
    assert {text.split()[part] for text in texts["val"]} <= {text.split()[part] for text in texts["train"]}
  green = np.asarray(Image.open(tmp_path / "green-square-1.png"))
  assert green.shape == (96, 96, 3) and green[50, 48].tolist() == [44, 160, 44] and green[2, 2].tolist() == [255] * 3


def test_the_committed_strip_is_small_and_loads_nothing():
  from codebind_jax import files

  text = files.read_text(files.path("docs/gallery.svg"))
  assert len(text) < 60_000 and ElementTree.fromstring(text) is not None
  assert "http" not in text.replace("http://www.w3.org/2000/svg", "")

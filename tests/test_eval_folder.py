"""The command `eval` on data in the forms that people have: rows a caption, odd labels, too little of something."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from codebind_jax.api import load
from codebind_jax.evaluate import evaluate
from codebind_jax.runtime.metrics import MetricsWriter, read_metrics
from configs import eval as eval_config
from tests.model_towers import uncached
from tests.train_fixtures import COLOURS

FORMS = ("{}", "a {} square", "something {}")


def run(trained, folder, records, out, task, **overrides):
  """The metrics of records, which are written beside the pictures that they name."""
  path = folder / "mine.jsonl"
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  config = eval_config.get_config().unlock()
  config.update_from_flattened_dict({
    "init_from": str(trained[2]), "data.manifest": str(path), "data.root": str(trained[1]), "task": task, **overrides
  })
  return evaluate(config.lock(), out)


@pytest.fixture
def pictures(tmp_path):
  """A folder with a picture of each colour, and a copy of the first one under another name."""
  folder = tmp_path / "mine"
  folder.mkdir()
  for number, colour in enumerate(COLOURS):
    image = Image.new("RGB", (32, 32), "white")
    image.paste(Image.new("RGB", (12 + number, 20), colour), (number, number))
    image.save(folder / f"{colour}.png")
  shutil.copy(folder / "red.png", folder / "copy.png")
  return folder


def usual(model, folder, colours, captions):
  """Recall by the usual protocol, from embeddings of each picture and each caption: (text to image, image to text)."""
  x = model.embed({"image": [folder / f"{colour}.png" for colour in colours]})["image"].shared
  y = model.embed({"text": [text for _, text in captions]})["text"].shared
  of = np.array([colours.index(colour) for colour, _ in captions])
  scores = y @ x.T
  own = scores[np.arange(len(of)), of][:, None]
  to_image = 1 + (scores > own + 1e-5).sum(1)
  best = np.array([scores[of == n, n].max() for n in range(len(colours))])
  to_text = 1 + np.array([((scores[:, n] > best[n] + 1e-5) & (of != n)).sum() for n in range(len(colours))])
  return {(way, k): 100 * float((ranks <= k).mean())
          for way, ranks in (("text_to_image", to_image), ("image_to_text", to_text)) for k in (1, 5)}  # fmt: skip


def test_a_record_for_each_caption_gives_what_lists_of_captions_give(trained, pictures, tmp_path, monkeypatch):
  captions = [(colour, form.format(colour)) for colour in COLOURS for form in FORMS]
  expected = usual(load(trained[2]), pictures, list(COLOURS), captions)
  name = lambda n, colour: "copy.png" if (n, colour) == (2, "red") else f"{colour}.png"
  each = [{"id": f"{c}{n}", "image": name(n, c), "text": form.format(c)}
          for c in COLOURS for n, form in enumerate(FORMS)]  # fmt: skip
  lists = [{"id": c, "image": f"{c}.png", "text": [form.format(c) for form in FORMS]} for c in COLOURS]
  found = [run(trained, pictures, records, tmp_path / "out", "retrieval") for records in (each, lists)]
  monkeypatch.setattr("codebind_jax.evaluate.load", lambda source: uncached(load(source), "image"))
  found.append(run(trained, pictures, each, tmp_path / "streamed", "retrieval"))
  for metrics in found:
    for (way, k), value in expected.items():
      metric = f"eval/mine_test/retrieval/{way}/r{k}"
      assert metrics[metric] == pytest.approx(value), metric
      rows, ways = (24, 8) if way == "text_to_image" else (8, 24)
      assert (metrics[f"{metric}/n"], metrics[f"{metric}/ways"]) == (rows, ways)
      assert metrics[f"{metric}/low"] <= value <= metrics[f"{metric}/high"]
  main = run(trained, pictures, lists, tmp_path / "main", "retrieval", **{"data.captions": "main"})
  assert main["eval/mine_test/retrieval/text_to_image/r1/n"] == 8


def test_captions_that_the_model_reads_alike_are_one(trained, pictures, tmp_path):
  texts = {"red": "Something  red", "blue": "blue", "green": "something red"}
  records = [{"id": image, "image": f"{image}.png", "text": text} for image, text in texts.items()]
  found = run(trained, pictures, records, tmp_path / "out", "retrieval")
  assert found["eval/mine_test/retrieval/image_to_text/r1/ways"] == 2


def test_labels_that_differ_in_case_and_blanks_are_one_class(trained, pictures, tmp_path, caplog):
  labels = ["Red ", "RED", "red", "red", "blue", "green"]
  images = ["red", "orange", "purple", "brown", "blue", "green"]
  records = [{"id": image, "image": f"{image}.png", "label": label} for image, label in zip(images, labels)]
  with caplog.at_level("WARNING"):
    found = run(trained, pictures, records, tmp_path / "out", "zeroshot")
  plain = [record | {"label": record["label"].strip().lower()} for record in records]
  assert found == run(trained, pictures, plain, tmp_path / "plain", "zeroshot")
  assert found["eval/mine_test/zeroshot/image/top1/ways"] == 3
  (said,) = [r.getMessage() for r in caplog.records if "are one class" in r.getMessage()]
  assert "'RED' is taken as 'red'" in said and "'Red" in said
  classes = pictures / "classes.txt"
  classes.write_text("Red\nblue\ngreen\n")
  run(trained, pictures, records, tmp_path / "listed", "zeroshot", **{"data.classes": str(classes)})
  lines = [json.loads(line) for line in (tmp_path / "listed/predictions.jsonl").read_text().splitlines()]
  assert {line["truth"] for line in lines} == {"Red", "blue", "green"}
  classes.write_text("red\nblue\nRED\n")
  with pytest.raises(ValueError, match="classes.txt:3: class 'RED' is there twice, first in line 1 as 'red'"):
    run(trained, pictures, records, tmp_path / "listed", "zeroshot", **{"data.classes": str(classes)})


def test_a_picture_under_several_labels_counts_once(trained, pictures, tmp_path):
  records = [{"id": str(n), "image": image, "label": label} for n, (image, label) in enumerate(
    [("red.png", "red"), ("red.png", "warm"), ("copy.png", "red"), ("blue.png", "blue")])]  # fmt: skip
  found = run(trained, pictures, records, tmp_path / "out", "zeroshot")
  assert found["eval/mine_test/zeroshot/image/top1/n"] == 2
  lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
  assert len(lines) == 2 and [line["id"] for line in lines if line["truth"] == "blue"] == ["3"]


def test_the_folder_gets_answers_a_confusion_table_and_a_page_and_keeps_what_it_has(trained, pictures, tmp_path):
  out = tmp_path / "out"
  with MetricsWriter(out, tensorboard=False) as writer:
    writer.write(20, "stage1", {"train/total": 1.0})
  earlier = (out / "metrics.jsonl").read_text()
  (out / "config.json").write_text("{}")
  (out / "report.html").write_text("the run's own page")
  records = [{"id": c, "image": f"{c}.png", "label": c, "text": c} for c in COLOURS]
  found = run(trained, pictures, records, out, "zeroshot")
  assert (out / "metrics.jsonl").read_text().startswith(earlier)
  assert [(line["step"], line["stage"]) for line in read_metrics(out)] == [(20, "stage1"), (20, "eval")]
  assert (out / "report.html").read_text() == "the run's own page"
  page = (out / "report_eval.html").read_text()
  assert "<h1>" in page and "mine" in page

  lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
  assert [line["id"] for line in lines] == list(COLOURS)
  assert lines[0].keys() == {"id", "set", "metric", "modality", "truth", "top5", "right"}
  assert 100 * np.mean([line["right"] for line in lines]) == found["eval/mine_test/zeroshot/image/top1"]
  for line in lines:
    assert line["set"] == "mine_test" and line["truth"] == line["id"] and len(line["top5"]) == 5
    assert [score for _, score in line["top5"]] == sorted((score for _, score in line["top5"]), reverse=True)
    assert line["right"] == (line["top5"][0][0] == line["truth"])
  model = load(trained[2])
  templates = eval_config.get_config().data.eval_templates
  (ranking,) = model.classify([pictures / "red.png"], sorted(COLOURS), templates=templates)
  np.testing.assert_allclose([score for _, score in lines[0]["top5"]], [score for _, score in ranking[:5]], atol=2e-3)
  rows = list(csv.DictReader((out / "confusion.csv").read_text().splitlines()))
  assert sum(int(row["count"]) for row in rows) == 8
  wrong = sum(int(row["count"]) for row in rows if row["truth"] != row["answer"])
  assert wrong == sum(not line["right"] for line in lines)

  # Another task and the same one again: a line more in metrics.jsonl, answers of each task and set once.
  run(trained, pictures, records, out, "retrieval")
  run(trained, pictures, records[:4], out, "zeroshot")
  assert len(read_metrics(out)) == 4
  lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
  kinds = [line["metric"] for line in lines]
  assert kinds.count("zeroshot/image") == 4 and kinds.count("retrieval/text_to_image") == 8
  one = next(line for line in lines if line["metric"] == "retrieval/text_to_image")
  assert one["text"] == one["id"] == "red" and one["truth"] == ["red"]
  assert [len(answer) for answer in one["top5"]] == [3] * 5 and one["right"] == one["top5"][0][2]
  assert sum(int(row["count"]) for row in csv.DictReader((out / "confusion.csv").read_text().splitlines())) == 4
  (out / "predictions.jsonl").write_text("something else\n")
  with pytest.raises(ValueError, match="predictions.jsonl: was not written by an evaluation"):
    run(trained, pictures, records, out, "zeroshot")


def test_a_new_folder_gets_report_html_and_rows_of_training_are_not_scored(trained, pictures, tmp_path, caplog):
  records = [{"id": f"{c}{n}", "image": f"{c}.png", "label": c, "split": "train" if n else "test"}
             for n in range(2) for c in COLOURS[n:4 - n]]  # fmt: skip
  records += [{"id": f"other{c}", "image": f"{c}.png", "label": COLOURS[n % 2], "split": "train"}
              for n, c in enumerate(COLOURS[4:])]  # fmt: skip
  found = run(trained, pictures, records, tmp_path / "out", "probe")
  assert {p.name for p in (tmp_path / "out").iterdir()} >= {"report.html", "predictions.jsonl", "confusion.csv"}
  assert found["eval/mine_test/probe/label/image/shared/n"] == 1  # red alone is known and no picture of training
  with caplog.at_level("WARNING"):
    seen = [record for record in records if record["id"] != "red0"]
    found = run(trained, pictures, seen, tmp_path / "seen", "probe")
  assert found["eval/mine_test/probe/label/image/shared/n"] == 1
  assert "label of image: every item is one of a training row too" in caplog.text


def row(image, label=None, split=None, text=None):
  return {"image": f"{image}.png", "label": label, "split": split, "text": text}


SOME = [row("blue", "a", "train"), row("gray", "b", "train")]


@pytest.mark.parametrize(
  ("task", "records", "message"),
  [
    ("zeroshot", [row("red"), row("blue")], "mine has nothing to measure; it needs labels"),
    ("zeroshot", [row(colour, "red") for colour in COLOURS], "'red' is the only class"),
    ("retrieval", [row("red", text="red")], "nothing to choose among"),
    ("retrieval", [row("red", "red"), row("blue")], "it needs records with a text"),
    ("probe", [row("red", "red")], "it needs labels, on records of split train"),
    ("probe", [row("red", "red", "test"), *SOME], "no value of 'label' is one of the training rows"),
  ],
)
def test_what_cannot_be_measured_is_said(trained, pictures, tmp_path, caplog, task, records, message):
  records = [{"id": str(n), **record} for n, record in enumerate(records)]
  with caplog.at_level("INFO"), pytest.raises(ValueError, match="nothing to measure") as error:
    run(trained, pictures, records, tmp_path / "out", task)
  assert message in caplog.text + str(error.value)


def test_a_probe_without_rows_to_validate_on_is_left_out_and_the_class_means_stay(trained, pictures, tmp_path, caplog):
  records = [{"id": str(n), **one} for n, one in enumerate([row("red", "a", "test"), *SOME])]
  with caplog.at_level("INFO"):
    found = run(trained, pictures, records, tmp_path / "out", "probe")
  assert {name.split("/")[2] for name in found} == {"ncm"} and found["eval/mine_test/ncm/image/full/ways"] == 2
  assert caplog.text.count("probe: validation: each label has one training row alone") == 1


def test_rows_without_a_label_are_left_out_and_counted(trained, pictures, tmp_path, caplog):
  records = [{"id": c, "image": f"{c}.png", "label": c if n % 2 else None} for n, c in enumerate(COLOURS)]
  with caplog.at_level("INFO"):
    found = run(trained, pictures, records, tmp_path / "out", "zeroshot")
  assert found["eval/mine_test/zeroshot/image/top1/n"] == found["eval/mine_test/zeroshot/image/top1/ways"] == 4
  assert "zeroshot/image of 4 of 8 rows is left out: they have no label" in caplog.text

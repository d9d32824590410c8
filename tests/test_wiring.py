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

from codebind_jax.api import Embedded, Embeddings, Model
from codebind_jax.config import method_of, read
from codebind_jax.data.inputs import Input
from codebind_jax.data.joined import joined
from codebind_jax.data.task import Task
from codebind_jax.data.worlds.evalset import EvalSet
from codebind_jax.evaluate import Evaluation
from codebind_jax.methods.base import make_init
from codebind_jax.report import summary
from codebind_jax.runtime.metrics import MetricsWriter, read_metrics
from codebind_jax.runtime.optim import frozen
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.step import make_train_step
from codebind_jax.train import optimizer_of
from codebind_jax.trunks import feeds
from codebind_jax.trunks.base import Trunk
from codebind_jax.trunks.feeds import Feeder
from codebind_jax.trunks.vectors import Prepared
from configs import common
from tests.source_fixtures import Rows

EAST, NORTH, WEST, SOUTH = (np.array(direction, np.float16) for direction in ([1, 0], [0, 1], [-1, 0], [0, -1]))


class Plain(Model):
  """A model whose shared part is the first token as it is; its only code is the number of the largest value."""

  def __init__(self, config, codes=0):
    super().__init__(config, {}, {})
    sizes = {"shared": codes} if codes else {}
    self.method = types.SimpleNamespace(codebook_sizes=sizes, numbered=lambda book, indices: indices)

  def embed_rows(self, modality, feed, rows, *, workers=0, threads=2, batch=0, content=False):
    x = np.stack([np.asarray(feed.clean(int(row))[0], np.float32) for row in rows])
    nothing, none = x[:, :0], np.zeros((len(x), 0), np.int32)
    embeddings = Embeddings(x, nothing, nothing, x.argmax(axis=1)[:, None].astype(np.int32), none, x)
    return Embedded(embeddings, np.ones(len(x), bool), (), np.arange(len(x)) if content else None)


def words_trunk(words):
  """A trunk that knows some texts, and their vectors."""
  digest = hashlib.sha256(repr(sorted((text, list(map(float, v))) for text, v in words.items())).encode()).hexdigest()
  item = Input((1, len(next(iter(words.values())))), "float32", lambda text: np.asarray(words[text], np.float32)[None])
  return Trunk("words", "text", Prepared(), item, digest)


def pictures_trunk():
  """A trunk that sees the mean colour of a picture: red and green."""
  item = Input((1, 2), "float32", lambda x: np.float32(x).mean(axis=(0, 1))[None, :2])
  return Trunk("pictures", "image", Prepared(), item, "pictures")


def evaluation_of(folder, train, evals, words=None, *, views=1, codes=0, **overrides):
  """A model and the evaluation of some sets; `train` is by world."""
  config = common.get_config()
  config.data.root, config.test = str(folder), True
  sources = [*train.values(), *(test.source for test in evals)]
  arrays = [(m, v) for source in sources for m, values in source.items.items() for v in values if v is not None]
  widths, trunks = {m: len(v) for m, v in arrays}, {}
  for name, width in widths.items():
    config.model.towers[name] = common.tower("vectors", options={"width": width, "modality": name}, views=views,
                                              augment={"kind": "any"} if views > 1 else {})  # fmt: skip
  if any(v.ndim == 3 for _, v in arrays):
    trunks["image"] = pictures_trunk()
  if words:
    trunks["text"], config.model.towers.text = words_trunk(words), common.tower("minilm")
  config.update_from_flattened_dict(overrides)
  task = Task("task", "", train, tuple(evals))
  config = read(config)
  feeder = Feeder(config.data, config.model.towers, trunks)
  return Plain(config, codes), Evaluation(config, task, feeder)


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
  """Training rows of two worlds, and a validation and a test set of each, in which pictures show the other label.

  The test sets must not be read if `test_closed`.
  """
  rows = [{"label": name, "style": style, "text": [name]} for style in ("old", "new") for name in ("east", "north")]
  make = lambda name, closed=False, images=(EAST, NORTH): Rows(name, rows, closed, image=2 * images)
  fields = {"probes": ("label",), "means": ("label",), "slices": ("style",)}
  evals = []
  for world in ("a", "b"):
    for role, closed, images in (("val", False, (EAST, NORTH)), ("test", test_closed, (NORTH, EAST))):
      name = f"{world}_{role}"
      evals.append(EvalSet(name, world, role, make(name, closed, images), ("east", "north"), **fields))
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
  kinds_of = lambda found: {name.split("/")[2] for name in found if name.startswith("eval/a_val/")}
  assert kinds_of(first) == {"zeroshot", "retrieval", "ncm"}
  assert kinds_of(last) == {"zeroshot", "retrieval", "ncm", "probe"}
  assert sets_of(first) == {"a_val", "a", "stage_done"} and sets_of(last) == {"a_val", "a", "b_val", "b"}
  model, evaluation = evaluation_of(tmp_path, *kinds(), test=True)
  with pytest.raises(AssertionError, match="a_test was read"):
    evaluation.everything(model)
  model, evaluation = evaluation_of(tmp_path, *kinds(test_closed=False), test=True)
  found = evaluation.everything(model)
  assert sets_of(found) == {"a_val", "a_test", "a", "b_val", "b_test", "b"}
  # What is chosen by is the mean over the validation sets; accuracies of slices are the test sets' alone.
  assert [found[f"eval/{name}/zeroshot/image/top1"] for name in ("a_val", "a_test", "a")] == [100, 0, 100]
  assert {name.split("/")[1] for name in found if "style=" in name} == {"a_test", "b_test"}


def test_the_final_evaluation_is_of_the_last_step_and_done_once(tmp_path):
  model, evaluation = evaluation_of(tmp_path, *kinds(test_closed=False))
  with MetricsWriter(tmp_path / "run") as writer:
    writer.write(4, "final", {"eval/old": 1.0})
    found = evaluation.finish(model, 5, writer)
    evaluation.everything = None  # is not called again
    assert evaluation.finish(model, 5, writer) == found and "eval/old" not in found
  assert [(line["step"], line["stage"]) for line in read_metrics(tmp_path / "run")] == [(4, "final"), (5, "final")]


# Templates, views, chance.


def test_classes_are_named_by_the_templates_of_evaluation(tmp_path):
  words = {
    f"{before}{name}": vector
    for before, east, north in (("", NORTH, EAST), ("train ", NORTH, EAST), ("seen ", EAST, NORTH), ("a: ", EAST, EAST))
    for name, vector in (("east", east), ("north", north))
  }
  templates = {"data.templates": ("train {}",), "data.eval_templates": ("seen {}",)}
  templates["data.templates_of"] = {"a": ("a: {}",)}
  train, evals, _ = kinds(test_closed=False)
  model, evaluation = evaluation_of(tmp_path, train, evals, words, **templates)
  found = evaluation.everything(model)
  # World a has templates of its own, which name both classes by one vector: a tie, which counts as wrong.
  assert [found[f"eval/{world}_val/zeroshot/image/top1"] for world in "ab"] == [0, 100]


@dataclasses.dataclass(frozen=True)
class Turned:
  """An augmentation that turns a vector around."""

  def __call__(self, x, rng):
    return -x


def views_of(feed):
  """[choices, views, tokens, width] of cached tokens."""
  return np.stack([[feed.reader(int(place)) for place in own] for own in feed.places])


def test_embeddings_are_of_the_clean_view(tmp_path, monkeypatch):
  monkeypatch.setattr(feeds.augment, "make", lambda *_: Turned())
  train, evals, words = kinds(test_closed=False)
  model, evaluation = evaluation_of(tmp_path, train, evals, words, views=3)
  features = views_of(evaluation._feeder.train(train["a"], "image"))
  np.testing.assert_array_equal(features[:, 1:, 0], -np.stack([[EAST, EAST], [NORTH, NORTH]] * 2))
  for table in (evaluation.table(model, evals[0]), evaluation.train_table(model, "a")):
    np.testing.assert_array_equal(table["image"]["shared"], [EAST, NORTH] * 2)


def test_texts_are_asked_once_a_caption_and_only_of_rows_that_have_both_sides(tmp_path):
  # Three pictures of an east, one of a north without a name, and a name without a picture.
  rows = [{"text": ["east"]}, {"text": ["east"]}, {"text": ["east"]}, {"id": "nameless"}, {"text": ["north"]}]
  test = EvalSet("set", "world", "test", Rows("set", rows, image=[EAST, EAST, NORTH, NORTH, None]), ())
  model, evaluation = evaluation_of(tmp_path, {}, [test], {"east": EAST, "north": NORTH})
  table = evaluation.table(model, test)
  assert table["text"]["caption"].tolist() == ["east", "north"]
  assert table["image"]["caption"].tolist() == ["east", "east", "east", "nameless"]
  found = evaluation.everything(model)
  assert found["eval/set/retrieval/text_to_image/median_rank"] == 1
  assert found["eval/set/retrieval/image_to_text/r1"] == 100  # only one name is left to find


def test_groups_that_probes_must_not_share_are_the_set_s(tmp_path):
  rows = lambda name, *labels: Rows(
    name, [{"label": label, "family": f"f{i % 2}"} for i, label in enumerate(labels)], image=[EAST, NORTH] * 4
  )
  train = {"world": rows("train", *"aabbccdd")}
  found = {}
  for labels in ("eeffgghh", "aaffgghh"):
    test = EvalSet("set", "world", "test", rows(labels, *labels), (), probes=("family",), probe_group="label")
    model, evaluation = evaluation_of(tmp_path, train, [test])
    found[labels] = lambda run=evaluation.everything, model=model: run(model)
  assert found["eeffgghh"]()["eval/set/probe/family/image/shared"] == 100
  with pytest.raises(ValueError, match="groups: 1 are in training and test, first 'a'"):
    found["aaffgghh"]()


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
    for pair in ("audio_to_depth", "depth_to_audio")
    for name in ("r5", "r5/n", "r5/ways", "r5/low", "r5/high", "chance5")
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
  # The one item of a set has no other to share a code with, and no caption.
  assert not any("/codes/" in name for name in found)
  evals = [EvalSet("c_val", "a", "val", Rows("c val", [{"label": x} for x in "xxy"], image=[EAST, NORTH, EAST]), ())]
  of_two = evaluation_of(tmp_path, train, evals, codes=2)
  found = of_two[1].everything(of_two[0])
  # Items 0 and 2 share a code and have two labels; of three pairs one has one label.
  assert found["eval/c_val/codes/image/same_label"] == 0
  assert found["eval/c_val/codes/image/same_label_chance"] == pytest.approx(100 / 3)
  counts, shared = evaluation.code_counts(model)
  assert counts["shared"].tolist() == [4, 1] and shared["depth"].tolist() == [1, 1]


# What is trained on.


def test_training_feeds_have_views_captions_and_what_tells_rows_apart(tmp_path, monkeypatch):
  monkeypatch.setattr(feeds.augment, "make", lambda *_: Turned())
  rows = [
    {"label": "east", "style": "old", "text": ["east", "dawn"]},
    {"label": "north", "style": "new", "text": ["n"]}, {"label": "north", "style": "old", "text": ["n"]},
  ]  # fmt: skip
  first = Rows("first", rows, image=[EAST, NORTH, NORTH])
  more = Rows("more", [{"label": "", "style": "", "text": ["more"]}], image=[SOUTH])
  names = ["east", "dawn", "n", "a east", "a n", "of east", "of n", "a more", "more", "of more"]
  words = {name: np.array([i, 1], np.float16) for i, name in enumerate(names)}
  templates = {"data.templates": ("a {}",), "data.templates_of": {"second": ("of {}",)}, "data.captions": "each"}
  train = {"first": first, "second": Rows("second", rows, image=[EAST, NORTH, WEST])}
  share = {"model.towers.image.augmented": 0.25}
  _, evaluation = evaluation_of(tmp_path, train, [], words, views=2, **templates, **share)
  feeder = evaluation._feeder
  feeder.texts(["n", "of n"])  # in the cache before the others
  whole = joined([first, more], field="style", unique=False)
  found = feeder.train_feeds({**train, "first": whole}, evaluation.config.data.templates_of)
  assert whole.index.group.tolist() == [0, 1, 0, 2] and train["second"].index.group.tolist() == [0, 1, 1]
  image = found["first"]["image"]
  assert image.augmented == 0.25 and image.shape == (1, 2) and image.starts.tolist() == [0, 1, 2, 3, 4]
  # Rows of one content have a clean view alike, but augmented ones of their own.
  assert len(np.unique(image.places[:, 0])) == 3 and len(np.unique(image.places[:, 1])) == 4
  views = views_of(image)
  np.testing.assert_array_equal(views[:, 0, 0], [EAST, NORTH, NORTH, SOUTH])
  np.testing.assert_array_equal(views[:, 1], -views[:, 0])
  captions = lambda feed: [
    [names[int(feed.reader(int(place))[0, 0])] for place in feed.places[start:stop, 0]]
    for start, stop in zip(feed.starts, feed.starts[1:])
  ]
  assert captions(found["first"]["text"]) == [["a east", "dawn"], ["a n"], ["a n"], ["a more"]]
  assert captions(found["second"]["text"]) == [["of east", "dawn"], ["of n"], ["of n"]]
  assert found["first"]["text"].augmented == 0
  # Evaluation has the main text of each row as it is, and no row that has none.
  clean = feeder.texts(["n", "east", "n"])
  assert [names[int(clean.clean(row)[0, 0])] for row in range(3)] == ["n", "east", "n"]


# What is reported.


def test_the_report_shows_the_validation_set_both_models_and_the_baseline_s_curves(tmp_path):
  picture = lambda red, green: np.full((2, 3, 3), (red, green, 0), np.uint8)
  rows = [{"label": "none"}, {"label": "east", "text": ["east"]}, {"label": "north", "text": ["north"]}]
  images = [None, picture(200, 0), picture(0, 100)]
  labels = [f"label {i}" for i in range(10)]
  make = lambda name, closed=False: Rows(name, rows, closed, image=images)
  evals = [EvalSet("set_test", "set", "test", make("test", closed=True), labels),
           EvalSet("set_val", "set", "val", make("val"), labels)]
  train = {"set": make("train")}
  model, evaluation = evaluation_of(tmp_path, train, evals, {"east": EAST, "north": NORTH})
  before = Plain(evaluation.config)
  swapped = lambda m, rows: np.asarray(rows)[::-1] if m == "text" else rows
  before.embed_rows = lambda m, feed, rows, **more: model.embed_rows(m, feed, swapped(m, rows), **more)
  for folder, loss in ((tmp_path / "run", 2.0), (tmp_path / "run" / "baseline", 3.0)):
    with MetricsWriter(folder) as writer:
      writer.write(1, "only", {"train/total": loss})
  metric = "zeroshot/image/top1"
  final = {f"{start}eval/set_{role}/{name}": value for start, value in (("", 50.0), ("baseline/", 40.0))
           for role in ("test", "val") for name in (metric, "zeroshot/image/top5")}  # fmt: skip
  final |= {f"eval/set_test/zeroshot/image/top{k}/ways": 10.0 for k in (1, 5)}
  models = {"before": before, "after": model}
  found = summary.report_data(evaluation.config, tmp_path / "run", evaluation.task, evaluation, final, models)
  assert [run.records[0]["train/total"] for run in (found.run, found.baseline)] == [2.0, 3.0]
  assert [(s.on, s.value, s.baseline, s.chance) for s in found.scores] == [
    ("set_test", 50.0, 40.0, 10.0), ("set_test", 50.0, 40.0, 50.0)
  ]  # fmt: skip
  assert [(g.title, g.on, g.first, g.asked, g.kind) for g in found.galleries] == [
    ("Text to image", "set_val", 2, 2, "pictures"), ("Image to text", "set_val", 2, 2, "texts")
  ]  # fmt: skip
  by_text, by_image = (gallery.queries for gallery in found.galleries)
  assert [query.asked.text for query in by_text] == ["east", "north"]
  assert [query.answers[0].image.mean(axis=(0, 1)).tolist() for query in by_text] == [[200, 0, 0], [0, 100, 0]]
  assert all(query.answers[0].right and not query.answers[1].right for query in (*by_text, *by_image))
  # Pictures and names are joined by their caption; before training each name lay on the other's place.
  notes = [map_.note.split("joined pairs ")[1].split(",")[0] for map_ in found.maps]
  assert [map_.title for map_ in found.maps] == ["Before training: set_val", "After training: set_val"]
  assert notes == ["0.00", "1.00"]
  shown = summary.headline(dataclasses.replace(evaluation.config, test=False), evaluation.task, final)
  assert {score.on for score in shown} == {"set_test", "set_val"}


# The model.


def test_classify_takes_the_templates_of_evaluation_and_a_bad_item_is_named_by_its_place(tmp_path):
  words = {"the east": NORTH, "the north": EAST, "an east": EAST, "an north": NORTH}
  templates = {"data.templates": ("the {}",), "data.eval_templates": ("an {}",)}
  model, evaluation = evaluation_of(tmp_path, {"set": Rows("set", [{}], image=[EAST])}, [], words, **templates)
  model.trunks = evaluation.trunks
  assert [name for name, _ in model.classify([np.float32([1, 0])], ["east", "north"])[0]] == ["east", "north"]
  assert model.classify([np.float32([1, 0])], ["east", "north"], templates=["the {}"])[0][0][0] == "north"
  items = [np.float32([1, 0])] * 40
  items[-1] = np.zeros(3, np.float32)
  with pytest.raises(ValueError, match=rf"image\[{len(items) - 1}\]"):
    model.embed({"image": items})


# The step.

ROWS = 6


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
  return read(config)


def started(config, **scales):
  """A step and its first state, with some modalities' logit scales."""
  method, [stage] = method_of(config), config.ordered
  items = {m: jax.ShapeDtypeStruct((1, 8), jnp.float32) for m in config.model.towers}
  params, books, aux = make_init(method, items)(jax.random.key(0))
  params |= {f"{name}_log_logit_scale": jnp.log(scale) for name, scale in scales.items()}
  tx, table = optimizer_of(config, method, stage, params)
  state = TrainState(jnp.zeros((), jnp.int32), params, books, tx.init(params), aux, jax.random.key(1))
  return jax.jit(make_train_step(method, stage, tx, frozen=frozen(table))), state


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
  options = {"method_options": {"anchor": "image", "frozen": False}}
  config = step_config("fixed_anchor", **{"stages.only.temperature": 0.5}, **options)
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


def test_a_stage_has_its_own_rate_which_falls_over_its_own_steps():
  config = step_config(**{"stages.only.learning_rate": 0.5, "stages.only.steps": 4, "optim.warmup": 0})
  config = dataclasses.replace(config, steps=10)  # the stage's key refers to the run's, which the override set as well
  params = {"image": {"kernel": jnp.ones(1)}}
  tx, _ = optimizer_of(config, method_of(config), config.ordered[0], params)
  state, rates = tx.init(params), []
  for _ in range(5):
    update, state = tx.update(jax.tree.map(jnp.ones_like, params), state, jax.tree.map(jnp.zeros_like, params))
    rates.append(float(-update["image"]["kernel"][0]))  # Adam divides equal gradients by their size
  np.testing.assert_allclose([rates[0], rates[2], rates[4]], [0.5, 0.5 * 1.02 / 2, 0.5 * 0.02], rtol=1e-4)

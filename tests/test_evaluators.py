"""Metric cores against hand computations, scikit-learn and a second implementation; evaluators against known tables."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, recall_score

from codebind_jax.evaluators import base, class_mean, codes, decomposition, intervals, probe, retrieval, zeroshot


def unit(*degrees):
  """Unit vectors in the plane at these angles."""
  angles = np.deg2rad(np.array(degrees, np.float32))
  return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def clusters(rng, labels, *, width=16, spread=0.3, scale=1.0):
  """Rows around one random centre a label."""
  names, numbers = np.unique(labels, return_inverse=True)
  centres = rng.normal(size=(len(names), width))
  return (scale * (centres[numbers] + spread * rng.normal(size=(len(labels), width)))).astype(np.float32)


# Zero-shot.


def test_class_embeddings_by_hand():
  asked = []

  def embed(texts):
    asked.append(texts)
    degrees = {"a cat": 0, "a dog": 90, "one cat": 60, "one dog": 120}
    return (3.0 if texts[0] == "a cat" else 0.5) * unit(*[degrees[text] for text in texts])

  classes = zeroshot.class_embeddings(embed, ["cat", "dog"], ["a {}", "one {}"])
  np.testing.assert_allclose(classes, unit(30, 105), atol=1e-6)
  assert asked == [["a cat", "a dog"], ["one cat", "one dog"]]


@pytest.mark.parametrize(
  "labels, templates, message",
  [
    ([], ["{}"], "class list is empty"),
    (["cat", " "], ["{}"], "class name is empty"),
    (["cat", "dog", "cat"], ["{}"], "'cat' is named 2 times"),
    (["cat"], [], "templates"),
    (["cat"], ["a picture"], "'a picture' has no {}"),
  ],
)
def test_class_embeddings_reject(labels, templates, message):
  with pytest.raises(ValueError, match=message):
    zeroshot.class_embeddings(lambda texts: unit(*range(len(texts))), labels, templates)


def test_class_embeddings_reject_nan_and_lost_rows():
  with pytest.raises(ValueError, match="template '{}'.*not finite, first row 1"):
    zeroshot.class_embeddings(lambda texts: np.array([[1, 0], [np.nan, 0]], np.float32), ["a", "b"], ["{}"])
  with pytest.raises(ValueError, match="1 rows for 2 texts"):
    zeroshot.class_embeddings(lambda texts: unit(0), ["a", "b"], ["{}"])


def test_topk_accuracy_by_hand():
  classes = unit(0, 90, 180)
  items = unit(10, 80, 100, 170) * np.array([[1], [2], [3], [4]], np.float32)
  # Orders: 0 1 2 | 1 0 2 | 1 2 0 | 2 1 0; right classes have ranks 0, 1, 1, 2.
  found = zeroshot.topk_accuracy(items, classes, np.array([0, 0, 2, 0]), ks=(1, 2, 3))
  assert found == {"top1": 25.0, "top2": 75.0, "top3": 100.0}
  mask = np.array([True, True, False, False])
  assert zeroshot.topk_accuracy(items, classes, np.array([0, 0, 99, 0]), ks=(1,), mask=mask) == {"top1": 50.0}


def test_collapsed_embeddings_get_nothing():
  items, classes = np.ones((20, 8), np.float32), np.ones((10, 8), np.float32)
  found = zeroshot.topk_accuracy(items, classes, np.arange(20) % 10, ks=(1, 5, 10))
  assert found == {"top1": 0.0, "top5": 0.0, "top10": 100.0}
  # Nor does one whose classes differ by rounding alone.
  assert zeroshot.class_ranks(np.array([[0.5, 0.5 - 5e-7, 0.5 - 5e-6]]), np.array([0])).tolist() == [1]


def test_topk_accuracy_rejects():
  items, classes, targets = unit(0, 90), unit(0, 90), np.array([0, 1])
  with pytest.raises(ValueError, match="targets: 2 at row 1 is not one of the 2 classes"):
    zeroshot.topk_accuracy(items, classes, np.array([0, 2]))
  with pytest.raises(ValueError, match="lengths must be equal"):
    zeroshot.topk_accuracy(items, classes, np.array([0]))
  with pytest.raises(ValueError, match="one width"):
    zeroshot.topk_accuracy(np.ones((2, 3), np.float32), classes, targets)
  with pytest.raises(ValueError, match="1 of 2 rows are not finite, first row 0"):
    zeroshot.topk_accuracy(np.array([[np.inf, 0], [0, 1]], np.float32), classes, targets)
  with pytest.raises(ValueError, match="no rows"):
    zeroshot.topk_accuracy(items, classes, targets, mask=np.zeros(2, bool))
  with pytest.raises(ValueError, match="at least 1, got 0"):
    zeroshot.topk_accuracy(items, classes, targets, ks=(0,))


def test_label_indices_name_the_stranger():
  assert zeroshot.label_indices(["b", "a", "b"], ["a", "b"]).tolist() == [1, 0, 1]
  with pytest.raises(ValueError, match=r"label 'bird' \(row 1\) is not among the 2 classes: 'cat', 'dog'"):
    zeroshot.label_indices(np.array(["cat", "bird"]), ["cat", "dog"])
  with pytest.raises(ValueError, match="class list is empty"):
    zeroshot.label_indices(["cat"], [])


def test_average_precision_by_hand():
  scores = np.array([[0.9], [0.8], [0.7], [0.6]], np.float32)
  targets = np.array([[True], [False], [True], [False]])
  # Precision 1/1 at recall 1/2, 2/3 at recall 1: (1 + 2/3) / 2.
  np.testing.assert_allclose(zeroshot.average_precision(scores, targets), [100 * (1 + 2 / 3) / 2])


@hypothesis.given(st.integers(0, 10_000), st.integers(1, 40), st.booleans())
@hypothesis.settings(max_examples=60, deadline=None)
def test_average_precision_equals_scikit_learn(seed, items, ties):
  rng = np.random.default_rng(seed)
  scores = rng.normal(size=(items, 3)).astype(np.float32)
  if ties:
    scores = np.round(scores)
  targets = rng.random((items, 3)) < 0.3
  targets[0] = True
  expected = [100 * average_precision_score(targets[:, k], scores[:, k]) for k in range(3)]
  np.testing.assert_allclose(zeroshot.average_precision(scores, targets), expected, rtol=1e-6)


def test_map_leaves_out_classes_without_positives():
  scores = np.array([[0.9, 0.1], [0.8, 0.3]], np.float32)
  targets = np.array([[False, False], [True, False]])
  assert zeroshot.mean_average_precision(scores, targets) == 50.0
  with pytest.raises(ValueError, match="no class has a positive"):
    zeroshot.mean_average_precision(scores, np.zeros((2, 2), bool))


def test_zeroshot_evaluator():
  texts = {"east": 0, "north": 90, "west": 180}
  table = {
    "image": {
      "shared": unit(5, 95, 100, 0),
      "label": np.array(["east", "north", "west", "nowhere"]),
      "style": np.array(["mono", "mono", "colour", "mono"]),
      "_mask": np.array([True, True, True, False]),
    }
  }
  embed = lambda names: unit(*[texts[name] for name in names])
  evaluator = zeroshot.ZeroShot("image", list(texts), embed, slices=("style",))
  assert dict(base.run_evaluators([evaluator], table, prefix="eval/x")) == {
    "eval/x/zeroshot/image/top1": pytest.approx(200 / 3),
    "eval/x/zeroshot/image/balanced": pytest.approx(200 / 3),
    "eval/x/zeroshot/image/style=colour/top1": 0.0,
    "eval/x/zeroshot/image/style=mono/top1": 100.0,
  }
  stranger = zeroshot.ZeroShot("image", ["east", "north"], embed)
  with pytest.raises(ValueError, match="evaluator 'zeroshot' on 'eval/x': label 'west'"):
    list(base.run_evaluators([stranger], table, prefix="eval/x"))


def test_balanced_zeroshot_counts_every_class_alike_and_intervals_are_yielded_when_asked_for():
  # East: 2 of 3 right, north: 0 of 1, west never occurs. Plain 2/4, balanced (2/3 + 0) / 2.
  table = {"audio": {"shared": unit(0, 10, 95, 5), "label": np.array(["east", "east", "east", "north"])}}
  embed = lambda names: unit(*[{"east": 0, "north": 90, "west": 180}[name] for name in names])
  evaluator = zeroshot.ZeroShot("audio", ["east", "north", "west"], embed, ks=(1,), intervals=True)
  found = dict(evaluator(table))
  assert found["zeroshot/audio/top1"] == 50.0 and found["zeroshot/audio/balanced"] == pytest.approx(100 / 3)
  # Two classes are drawn: twice north has none right, which is further out than Wilson's end for four rows.
  ends = found["zeroshot/audio/top1/low"], found["zeroshot/audio/top1/high"]
  assert ends == pytest.approx((0.0, intervals.wilson_interval(50.0, 4)[1])) and ends[0] < 50 < ends[1]
  assert found["zeroshot/audio/balanced/low"] < 100 / 3 < found["zeroshot/audio/balanced/high"]
  assert found["zeroshot/audio/top1/n"] == 4 and found["zeroshot/audio/top1/ways"] == 3 and len(found) == 10


def test_zeroshot_evaluator_with_several_labels():
  table = {"image": {"shared": unit(0, 45, 90), "label": np.array([[1, 0], [1, 1], [0, 1]], bool)}}
  evaluator = zeroshot.ZeroShot("image", ["east", "north"], lambda names: unit(0, 90))
  assert dict(evaluator(table)) == {"zeroshot/image/map": 100.0}


# Retrieval.


def plain_ranks(query, gallery, relevant):
  """Second implementation: one query at a time, in float64, loops."""
  ranks = []
  for q, right in zip(query.astype(np.float64), relevant):
    cosine = [q @ g / (np.linalg.norm(q) * np.linalg.norm(g)) for g in gallery.astype(np.float64)]
    best = max(cosine[i] for i in right)
    ranks.append(1 + sum(c >= best - 1e-6 for i, c in enumerate(cosine) if i not in right))
  return ranks


def test_recall_by_hand_with_several_captions():
  images, captions = unit(0, 90), unit(30, 70, 50, 80)
  # Captions 0, 1 belong to image 0; 2, 3 to image 1. Order for image 0: 0 2 1 3, for image 1: 3 1 2 0.
  assert retrieval.recall_at_k(images, captions, [{0, 1}, {2, 3}]) == {
    "r1": 100.0, "r5": 100.0, "r10": 100.0, "median_rank": 1.0,
  }  # fmt: skip
  ids = (np.array(["a", "a", "b", "b"]), np.array(["a", "b"]))
  # Caption 1 (70 degrees) lies nearer to image 1; caption 2 (50) nearer to image 1, which is right.
  found = retrieval.recall_at_k(captions, images, ids, ks=(1, 2))
  assert found == {"r1": 75.0, "r2": 100.0, "median_rank": 1.0}


@hypothesis.given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 12), st.integers(1, 13))
@hypothesis.settings(max_examples=60, deadline=None)
def test_ranks_equal_plain_implementation(seed, queries, items, chunk):
  rng = np.random.default_rng(seed)
  query = rng.integers(-1, 2, size=(queries, 3)).astype(np.float32) + 0.25
  gallery = rng.integers(-1, 2, size=(items, 3)).astype(np.float32) + 0.25
  relevant = [set(rng.choice(items, size=rng.integers(1, items + 1), replace=False).tolist()) for _ in query]
  expected = plain_ranks(query, gallery, relevant)
  assert retrieval.first_ranks(query, gallery, relevant, chunk=chunk).tolist() == expected


def test_collapsed_embeddings_get_the_worst_rank():
  x = np.ones((12, 8), np.float32)
  found = retrieval.recall_at_k(x, x, [{i} for i in range(12)])
  assert found == {"r1": 0.0, "r5": 0.0, "r10": 0.0, "median_rank": 12.0}


def test_quantised_duplicates_of_the_right_item_do_not_hurt():
  gallery = unit(0, 0, 90)
  assert retrieval.first_ranks(unit(1), gallery, [{0, 1}]).tolist() == [1]
  assert retrieval.first_ranks(unit(1), gallery, [{0}]).tolist() == [2]


def test_recall_rejects():
  x = unit(0, 90)
  with pytest.raises(ValueError, match="query 1 has no relevant item in the gallery of 2"):
    retrieval.recall_at_k(x, x, [{0}, set()])
  with pytest.raises(ValueError, match="query 0 has no relevant"):
    retrieval.recall_at_k(x, x, (np.array(["p", "q"]), np.array(["q", "r"])))
  with pytest.raises(ValueError, match=r"relevant\[1\] has an index outside the gallery of 2"):
    retrieval.recall_at_k(x, x, [{0}, {2}])
  with pytest.raises(ValueError, match="lengths must be equal"):
    retrieval.recall_at_k(x, x, [{0}])
  with pytest.raises(ValueError, match="gallery: expected a non-empty"):
    retrieval.recall_at_k(x, np.zeros((0, 2), np.float32), [{0}, {0}])
  with pytest.raises(ValueError, match="query: 1 of 2 rows are not finite"):
    retrieval.recall_at_k(np.array([[np.nan, 0], [0, 1]], np.float32), x, [{0}, {1}])


def test_the_query_itself_is_no_answer():
  x, ids = unit(0, 10, 90), np.array(["a", "a", "b"])
  assert retrieval.first_ranks(x[:2], x, (ids[:2], ids), exclude_self=True).tolist() == [1, 1]
  with pytest.raises(ValueError, match="query 2 has no relevant item"):
    retrieval.first_ranks(x, x, (ids, ids), exclude_self=True)
  with pytest.raises(ValueError, match="the 3 queries must be the first rows of the gallery, which has 2"):
    retrieval.first_ranks(x, x[:2], (ids, ids[:2]), exclude_self=True)


def test_retrieval_evaluator_both_ways():
  table = {
    "text": {"shared": unit(0, 90), "label": np.array(["cat", "dog"])},
    "image": {"shared": unit(10, 50, 80), "label": np.array(["cat", "cat", "dog"])},
  }
  found = dict(retrieval.Retrieval(ks=(1,))(table))
  # Image 1 (50 degrees, a cat) lies nearer to "dog".
  assert found == {
    "retrieval/text_to_image/r1": 100.0,
    "retrieval/text_to_image/median_rank": 1.0,
    "retrieval/image_to_text/r1": pytest.approx(200 / 3),
    "retrieval/image_to_text/median_rank": 1.0,
  }
  named = dict(retrieval.Retrieval(ks=(1,), by="label")(table))
  assert named["retrieval/image_to_text/label/r1"] == pytest.approx(200 / 3) and len(named) == 4


def test_within_retrieval_leaves_out_the_query_and_the_lonely():
  table = {"image": {"full": unit(0, 10, 90, 100, 95), "family": np.array(["a", "a", "b", "b", "alone"])}}
  found = dict(retrieval.WithinRetrieval("image", field="family", ks=(1, 2))(table))
  # Rows 2 and 3 have the lonely row between them: rank 2.
  assert found == {"retrieval/image_to_image/family/full/r1": 50.0, "retrieval/image_to_image/family/full/r2": 100.0}
  with pytest.raises(ValueError, match="no two rows share a 'family'"):
    list(retrieval.WithinRetrieval("image", field="family")({"image": {"full": unit(0, 1), "family": np.arange(2)}}))


# Probes.


def test_nearest_class_mean_by_hand():
  train = unit(0, 20, 90) * np.array([[5], [1], [1]], np.float32)
  result = class_mean.nearest_class_mean(train, np.array([7, 7, 8]), unit(12, 48, 56), np.array([7, 7, 8]))
  # The means lie at 10 (not nearer to the long vector) and 90 degrees: the border is at 50.
  assert result.predictions.tolist() == [7, 7, 8] and result.accuracy == 100.0
  result = class_mean.nearest_class_mean(train, np.array([7, 7, 8]), unit(12, 48, 48), np.array([7, 7, 8]))
  assert result.accuracy == pytest.approx(200 / 3) and result.balanced_accuracy == 50.0
  with pytest.raises(ValueError, match="test label '9' is not among the 2 classes"):
    class_mean.nearest_class_mean(train, np.array([7, 7, 8]), unit(12), np.array([9]))


def test_nearest_other_mean_leaves_the_row_out():
  x = unit(0, 10, 80, 90, 45)
  assert class_mean.nearest_other_mean(x, np.array(["a", "a", "b", "b", "c"])).accuracy == 100.0
  # With the row itself in the mean, both of the far-apart class would be right; without it, none is.
  result = class_mean.nearest_other_mean(unit(0, 90, 2, 88), np.array(["a", "a", "b", "b"]))
  assert result.accuracy == 0.0
  with pytest.raises(ValueError, match="alone in its class"):
    class_mean.nearest_other_mean(unit(0, 90), np.array(["a", "b"]))


@hypothesis.given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
@hypothesis.settings(max_examples=50, deadline=None)
def test_balanced_accuracy_equals_scikit_learn(pairs):
  predictions, targets = np.array(pairs).T
  expected = 100 * recall_score(targets, predictions, labels=np.unique(targets), average="macro", zero_division=0)
  assert probe.balanced_accuracy(predictions, targets) == pytest.approx(expected)


def test_linear_probe_finds_a_direction_the_class_means_hide():
  rng = np.random.default_rng(0)
  labels = np.arange(400) % 2
  x = rng.normal(size=(400, 8)).astype(np.float32)
  x[:, 0] *= 100
  x[:, 3] += 3 * (2 * labels - 1)
  result = probe.linear_probe(x[:300], labels[:300], x[300:], labels[300:])
  assert result.accuracy > 97 and result.balanced_accuracy > 97 and result.val_accuracy > 97
  assert class_mean.nearest_class_mean(x[:300], labels[:300], x[300:], labels[300:]).accuracy < 75


def test_linear_probe_is_the_same_when_features_are_scaled_shifted_and_outnumber_examples():
  rng = np.random.default_rng(1)
  labels = np.array(["a", "b", "c"])[np.arange(90) % 3]
  x = clusters(rng, labels, width=200, spread=4.0)
  moved = x * rng.uniform(0.5, 20, 200).astype(np.float32) + rng.normal(size=200).astype(np.float32)
  moved = np.concatenate([moved, np.full((90, 2), 7.0, np.float32)], axis=1)  # Constant columns say nothing.
  plain = probe.linear_probe(x[:60], labels[:60], x[60:], labels[60:], c_grid=(1e-3,))
  other = probe.linear_probe(moved[:60], labels[:60], moved[60:], labels[60:], c_grid=(1e-3,))
  assert (plain.predictions == other.predictions).all() and plain.accuracy > 50
  assert np.isnan(plain.val_accuracy)


def test_probe_chooses_on_validation_only():
  rng = np.random.default_rng(2)
  labels = np.arange(240) % 4
  x = clusters(rng, labels, width=60, spread=3.0)
  first = probe.linear_probe(x[:120], labels[:120], x[120:180], labels[120:180])
  second = probe.linear_probe(x[:120], labels[:120], x[180:], rng.permutation(labels[180:]))
  assert first.c == second.c and first.val_accuracy == second.val_accuracy
  given = probe.linear_probe(x[:120], labels[:120], x[120:], labels[120:], val=(x[:120], labels[:120]))
  assert given.val_accuracy > first.val_accuracy  # Scored on what it was fitted on, as asked.


def test_groups_stay_together_in_the_validation_split():
  rng = np.random.default_rng(3)
  concepts, families = np.repeat(np.arange(60), 4), np.tile(np.arange(4), 60)
  concept_part, family_part = clusters(rng, concepts, width=40, scale=2.0), clusters(rng, families, width=4)
  x = np.concatenate([concept_part, family_part], axis=1)
  held = probe.grouped_split(concepts, 0.25)
  assert len(np.unique(concepts[held])) == 15 and not np.intersect1d(concepts[held], concepts[~held]).size
  result = probe.linear_probe(
    x[~held], families[~held], x[held], families[held], groups=concepts[~held], test_groups=concepts[held]
  )
  assert result.accuracy > 95
  with pytest.raises(ValueError, match="groups: 60 are in training and test, first '0'"):
    probe.linear_probe(x, families, x, families, groups=concepts, test_groups=concepts)
  # A label that is its group's name cannot be told from other groups.
  with pytest.raises(ValueError, match="each label lies in one group"):
    probe.linear_probe(x, concepts, x, concepts, groups=concepts)


def test_grouped_split_moves_no_other_group():
  names = [f"concept-{i}" for i in range(40)]
  one = set(np.array(names)[probe.grouped_split(np.array(names), 0.5)])
  two = set(np.array(names[::-1] * 3)[probe.grouped_split(np.array(names[::-1] * 3), 0.5)])
  assert one == two and len(one) == 20
  assert one != set(np.array(names)[probe.grouped_split(np.array(names), 0.5, salt="other")])
  with pytest.raises(ValueError, match="at least two"):
    probe.grouped_split(np.array(["a", "a"]), 0.5)
  with pytest.raises(ValueError, match="fraction"):
    probe.grouped_split(np.array(names), 1.0)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(train_y=np.array([0, 1])), "lengths must be equal"),
    (dict(test_x=np.ones((4, 3), np.float32)), "one width"),
    (dict(test_y=np.array([0, 1, 2, 0])), "test label '2' is not among the 2 classes"),
    (dict(train_y=np.zeros(4, int), test_y=np.zeros(4, int)), "at least two classes"),
    (dict(train_x=np.full((4, 2), np.nan, np.float32)), "train embeddings: 4 of 4 rows are not finite"),
    (dict(c_grid=()), "c_grid"),
    (dict(c_grid=(0.0, 1.0)), "c_grid"),
    (dict(test_groups=np.arange(4)), "test_groups needs groups"),
    (dict(groups=np.arange(3)), "lengths must be equal"),
  ],
)
def test_linear_probe_rejects(change, message):
  good = dict(
    train_x=unit(0, 1, 90, 91), train_y=np.array([0, 0, 1, 1]), test_x=unit(0, 1, 90, 91), test_y=np.array([0, 0, 1, 1])
  )
  with pytest.raises(ValueError, match=message):
    probe.linear_probe(**(good | change))


def test_probe_evaluators_show_what_is_in_the_specific_part():
  rng = np.random.default_rng(4)
  concepts = np.array([f"concept {i}" for i in np.repeat(np.arange(50), 3)])
  families = np.array(["ink", "oil", "clay"])[np.tile(np.arange(3), 50)]
  shared, specific = clusters(rng, concepts, spread=0.4), clusters(rng, families)
  image = {"shared": shared, "specific": specific, "full": np.concatenate([shared, specific], axis=1)}
  table = {
    "image": image | {"label": concepts, "family": families},
    "text": {"shared": shared, "specific": shared[:, :0]},
  }
  found = dict(base.run_evaluators([class_mean.NearestClassMean("image"), probe.LinearProbe("image")], table))
  assert found["ncm/image/shared"] > 90 > 20 > found["ncm/image/specific"]
  assert found["probe/family/image/specific"] > 95 and found["probe/family/image/full"] > 95
  assert found["probe/family/image/shared"] < 60
  assert found["probe/family/image/full/balanced"] > 95
  assert base.parts_of(table, "text") == ("shared",)
  train = {"image": {name: column[:90] for name, column in table["image"].items()}}
  test = {"image": {name: column[90:] for name, column in table["image"].items()}}
  found = dict(probe.LinearProbe("image", train)(test))
  assert found["probe/family/image/specific"] > 95 and found["probe/family/image/shared"] < 60
  with pytest.raises(ValueError, match="groups: 30 are in training and test"):
    list(probe.LinearProbe("image", table)(train))
  assert dict(class_mean.NearestClassMean("image", table)(train))["ncm/image/shared"] > 90


def test_linear_probe_is_fitted_once_for_all_sets(monkeypatch):
  rng = np.random.default_rng(3)
  labels = np.repeat(np.arange(3), 20)
  table = lambda: {"image": {"shared": clusters(rng, labels, spread=2.0), "label": labels}}
  train, sets, fits = table(), [table(), table()], []
  fit = probe.fit_probe
  monkeypatch.setattr(probe, "fit_probe", lambda *args, **options: fits.append(1) or fit(*args, **options))
  kept = probe.LinearProbe("image", train, field="label", group=None)
  together = [dict(kept(one)) for one in sets]
  assert len(fits) == 1 and together[0] != together[1]
  assert together == [dict(probe.LinearProbe("image", train, field="label", group=None)(one)) for one in sets]


# Codes.


def test_usage_by_hand():
  assert codes.usage(np.array([2, 2, 0, 0])) == {
    "active_share": 0.5, "perplexity": pytest.approx(2.0), "dead": 2.0, "max_share": 0.5,
  }  # fmt: skip
  assert codes.usage(np.ones(8))["perplexity"] == pytest.approx(8.0)
  assert codes.usage(np.array([0, 9]))["perplexity"] == 1.0


def test_count_codes():
  indices = np.array([[0, 1], [1, 3], [2, 2]])
  assert codes.count_codes(indices, 5).tolist() == [1, 2, 2, 1, 0]
  assert codes.count_codes(indices, 5, np.array([True, True, False])).tolist() == [1, 2, 0, 1, 0]
  with pytest.raises(ValueError, match="index 3 is outside the codebook of 3"):
    codes.count_codes(indices, 3)
  with pytest.raises(ValueError, match="index -1 is outside"):
    codes.count_codes(np.array([-1]), 3)
  for bad, message in [
    ([0, 0], "all zero"),
    ([1, -1], "not negative"),
    ([np.nan, 1], "finite"),
    ([[1, 2]], "one number"),
  ]:
    with pytest.raises(ValueError, match=message):
      codes.usage(np.array(bad))


def test_codebook_evaluator_counts_the_shared_book_over_modalities():
  table = {
    "image": {"codes_shared": np.array([[0, 1]]), "codes_specific": np.array([[0, 0]])},
    "text": {"codes_shared": np.array([[2, 3], [0, 0]]), "_mask": np.array([True, False])},
  }
  found = dict(codes.CodebookUsage({"shared": 4, "image": 2})(table))
  assert found["codebook/shared/perplexity"] == pytest.approx(4.0) and found["codebook/shared/dead"] == 0
  assert found["codebook/image/active_share"] == 0.5 and found["codebook/image/max_share"] == 1.0
  assert found["codebook/shared/image/active_share"] == 0.5 and found["codebook/shared/text/perplexity"] == 2.0
  assert found["codebook/shared/several_share"] == 0.0 and found["codebook/shared/modalities_per_code"] == 1.0
  with pytest.raises(ValueError, match="text: no column 'codes_specific'"):
    list(codes.CodebookUsage({"text": 4})(table))


def test_labels_and_captions_that_share_codes_by_hand():
  # Position 0: items 0, 1, 2 share a code (three pairs, one of one label), position 1: items 0 and 3 (of one label).
  book, labels = np.array([[5, 1], [5, 2], [5, 3], [6, 1]]), np.array(["a", "b", "b", "a"])
  assert codes.label_pairs(book, np.array([0, 1, 1, 0])) == (2 / 4, 2 / 6)
  one_each = codes.label_pairs(np.arange(3)[:, None], np.zeros(3, int))
  assert np.isnan(one_each[0]) and one_each[1] == 1.0
  # Captions 0, 0, 1, 1: the same code at position 0 thrice, at position 1 once. By chance: code 5 is 3 in 4 items and
  # 2 in 4 captions, code 6 the rest; at position 1 code 1 is 2 in 4 and 2 in 4, code 9 never an item's.
  texts, paired = np.array([[5, 1], [6, 9]]), (np.arange(4), np.array([0, 0, 1, 1]))
  by_chance = (3 / 4 * 2 / 4 + 1 / 4 * 2 / 4 + 2 / 4 * 2 / 4) / 2
  assert codes.agreement(book, texts[paired[1]]) == ((3 + 1) / 8, by_chance)
  table = base.Captioned({
    "image": {"codes_shared": book, "label": labels}, "text": {"codes_shared": texts},
    "eeg": {"shared": np.ones((4, 2))},
  }, {"image": paired})  # fmt: skip
  assert dict(codes.CodeReading()(table)) == {
    "codes/image/same_label": 50.0, "codes/image/same_label_chance": pytest.approx(100 / 3),
    "codes/image/text/same": 50.0, "codes/image/text/same_chance": pytest.approx(37.5),
  }  # fmt: skip
  table["image"]["label"] = np.array(["a", "", "", "a"])  # rows without a label tell nothing of labels
  assert dict(codes.CodeReading()(table))["codes/image/same_label"] == 100.0
  # A copy counts once: of items 0, 1 and 3 two pairs share a code, none of one label; of all three pairs one has one.
  table["image"] |= {"label": np.array(["a", "b", "b", "b"]), "_content": np.array([0, 1, 1, 2])}
  found = dict(codes.CodeReading()(table))
  assert found["codes/image/same_label"] == 0
  assert found["codes/image/same_label_chance"] == pytest.approx(100 / 3)


def test_shared_codes_of_several_modalities_by_hand():
  counts = {"image": np.array([6, 2, 0, 0, 0]), "text": np.array([3, 0, 1, 0, 0]), "eeg": np.array([1, 0, 1, 0, 2])}
  found = codes.overlap(counts)
  # Used at all: codes 0, 1, 2, 4; by at least two: 0 (all three) and 2 (text and EEG).
  assert found["several_share"] == 0.5
  # Shares of code 0: 0.75, 0.75, 0.25, so 3/7, 3/7, 1/7; code 2: 0.25 and 0.25; codes 1 and 4 have one user each.
  of_zero = np.exp(-2 * 3 / 7 * np.log(3 / 7) - np.log(1 / 7) / 7)
  assert found["modalities_per_code"] == pytest.approx((of_zero + 1 + 2 + 1) / 4)
  assert codes.overlap({"image": np.array([1, 2])}) == {"several_share": 0.0, "modalities_per_code": 1.0}
  with pytest.raises(ValueError, match="eeg: no code"):
    codes.overlap(counts | {"eeg": np.zeros(5)})


# Tables.


def test_columns_reject():
  table = {
    "image": {"shared": unit(0, 1), "label": np.array(["a"]), "_mask": np.array([1, 0])},
    "text": {"shared": unit(0)},
  }
  with pytest.raises(ValueError, match=r"modality 'audio' is not in the table; it has \['image', 'text'\]"):
    base.columns(table, "audio", ["shared"])
  with pytest.raises(ValueError, match="image: no column 'full'"):
    base.columns(table, "image", ["full"])
  with pytest.raises(ValueError, match="equally many rows"):
    base.columns(table, "image", ["shared", "label"])
  with pytest.raises(ValueError, match="_mask must be boolean"):
    base.columns(table, "image", ["shared"])
  with pytest.raises(ValueError, match="all are masked"):
    base.columns({"a": {"shared": unit(0), "_mask": np.array([False])}}, "a", ["shared"])


def test_unique_rows_keep_the_first_of_each():
  rows = {"label": np.array(["b", "a", "b", "c"]), "n": np.arange(4), "_mask": np.array([True, True, True, False])}
  kept = base.unique_rows(rows, "label")
  assert kept["label"].tolist() == ["b", "a"] and kept["n"].tolist() == [0, 1]


def test_two_evaluators_cannot_share_a_name():
  table = {"image": {"codes_shared": np.array([[0, 1]])}}
  twice = [codes.CodebookUsage({"shared": 4}), codes.CodebookUsage({"shared": 4})]
  with pytest.raises(ValueError, match="'codebook/shared/active_share' was already yielded by evaluator 'codebook'"):
    list(base.run_evaluators(twice, table))


# Decomposition.


def test_decomposition_by_hand():
  columns = {"label": np.array(["a", "a", "b", "c"]), "private_depth": np.array(["x", "x", "x", "y"])}
  table = {"depth": columns, "audio": {"label": np.array(["a", "b"]), "private_audio": np.array(["x", "y"])},
           "text": {"label": np.array(["a", "b", "c"])}}
  accuracy = lambda field, modality, *parts: {
    f"probe/{field}/{modality}/{part}": value for part, value in zip(base.PARTS, parts)
  }
  found = {
    **accuracy("label", "depth", 90.0, 60.0, 100.0), **accuracy("private_depth", "depth", 80.0, 45.0, 90.0),
    **accuracy("label", "audio", 50.0, 50.0, 50.5),
  }
  got = dict(decomposition.decomposition(found, table, ("label", "private_{modality}")))
  # Chance: depth's label a is 2 of 4, its private x 3 of 4; audio's label 1 of 2, of which `full` tells half a point.
  # Text and audio's own were not probed.
  assert got == {
    "decomposition/depth/label/kept": 80.0, "decomposition/depth/label/leaked": 10.0,
    "decomposition/depth/private/kept": -200.0, "decomposition/depth/private/leaked": 5.0,
    "decomposition/audio/label/kept": 0.0, "decomposition/audio/label/leaked": 0.0,
    "decomposition/label/kept": 40.0, "decomposition/label/kept_least": 0.0,
    "decomposition/label/leaked": 5.0, "decomposition/label/leaked_most": 10.0,
    "decomposition/private/kept": -200.0, "decomposition/private/kept_least": -200.0,
    "decomposition/private/leaked": 5.0, "decomposition/private/leaked_most": 5.0,
  }  # fmt: skip

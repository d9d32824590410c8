"""One content in several rows counts once: by hand, against loops, and in sets of which one holds the other."""

import doctest

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from codebind_jax.evaluators import answers, base, class_mean, contents, pairs, probe, retrieval, zeroshot


def unit(*degrees):
  angles = np.deg2rad(np.array(degrees, np.float32))
  return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


@pytest.mark.parametrize("module", [contents, base])
def test_docstring_examples(module):
  found = doctest.testmod(module)
  assert found.attempted and not found.failed


def rows_per_caption():
  """Two pictures of two captions each as four records, in the form of COCO."""
  image = {"shared": unit(0, 0, 90, 90), "_content": np.array([7, 7, 9, 9]), "id": np.array(["a", "b", "c", "d"])}
  text = {"shared": unit(10, 60, 80, 100), "caption": np.array(["one", "uno", "two", "due"])}
  text["id"] = image["id"]
  captions = {"text": (np.arange(4), np.arange(4)), "image": (np.arange(4), np.arange(4))}
  return base.Captioned({"image": image, "text": text}, captions)


def test_a_picture_in_several_records_is_one_item_with_all_of_its_captions():
  table, kept = rows_per_caption(), []
  keys = pairs.keys_of(table, "text", "image", "caption")
  found = dict(retrieval.Retrieval("text", "image", keys=keys, ks=(1,), intervals=True, keep=kept.append)(table))
  # Text "uno" at 60 degrees lies nearer to the picture at 90; each picture finds one of its captions first.
  assert found["retrieval/text_to_image/r1"] == 75.0 and found["retrieval/image_to_text/r1"] == 100.0
  assert [found[f"retrieval/text_to_image/r1/{end}"] for end in ("n", "ways")] == [4, 2]
  assert [found[f"retrieval/image_to_text/r1/{end}"] for end in ("n", "ways")] == [2, 4]
  by_text, by_image = kept
  assert by_text.texts == ["one", "uno", "two", "due"] and by_image.texts == ()
  assert [by_text.names[n] for n in by_text.found[:, 0]] == ["a", "c", "c", "c"] and by_text.truth[1] == ["a"]
  assert by_image.truth == [["one", "uno"], ["two", "due"]]
  assert by_image.right.tolist() == [[True, True, False, False], [True, True, False, False]]
  # As one row a record, every text has a wrong picture as near as its own.
  for columns in table.values():
    columns.pop("_content", None)
  plain = dict(retrieval.Retrieval("text", "image", keys=keys, ks=(1,))(table))
  assert plain["retrieval/text_to_image/r1"] == 0.0


def test_intervals_of_retrieval_draw_the_captions_of_a_picture_together():
  content = (np.array([5, 6, 7, 7]), np.arange(5))
  # Rows 0 and 1 share caption 0; rows 2 and 3 are one picture of captions 2, 3 and 4; caption 1 is row 1's second.
  keys = (np.array([0, 1, 1, 2, 3, 3]), np.array([0, 0, 1, 2, 3, 4])), (np.arange(5), np.arange(5))
  image, text = contents.sides(content, keys)
  assert image.rows.tolist() == [0, 1, 2] and contents.right_answers(image, text).tolist() == [1, 2, 3]
  assert contents.right_answers(text, image).tolist() == [2, 1, 1, 1, 1]
  assert contents.groups_of(image, text).tolist() == [0, 0, 2]
  assert contents.groups_of(text, image).tolist() == [0, 0, 2, 2, 2]


def plain_ranks(x, y, content_x, content_y, pairs_x, pairs_y):
  """Second implementation of ranks of contents: sets and loops."""
  own = lambda content, pairs: {c: {v for row, v in pairs if content[row] == c} for c in content}
  of_x, of_y = own(content_x, pairs_x), own(content_y, pairs_y)
  row = lambda content, c: int(np.flatnonzero(content == c)[0])
  ranks = {}
  for c, values in of_x.items():
    if not values:
      continue
    score = {d: float(x[row(content_x, c)] @ y[row(content_y, d)]) for d, others in of_y.items() if others}
    right = {d for d in score if of_y[d] & values}
    best = max(score[d] for d in right)
    ranks[c] = 1 + sum(score[d] >= best - 1e-6 for d in score if d not in right)
  return [ranks[c] for c in sorted(ranks, key=lambda c: min(row for row, _ in pairs_x if content_x[row] == c))]


@hypothesis.given(st.integers(0, 10_000))
@hypothesis.settings(max_examples=60, deadline=None)
def test_ranks_of_contents_equal_a_plain_implementation(seed):
  rng = np.random.default_rng(seed)
  sizes = rng.integers(1, 9, 2)
  content = [rng.integers(0, 5, n) + 10 for n in sizes]
  vectors = [rng.normal(size=(16, 4)).astype(np.float32) for _ in sizes]
  x, y = (v[c] / np.linalg.norm(v[c], axis=1, keepdims=True) for v, c in zip(vectors, content))
  several = [rng.integers(0, 6, (int(n), 2)) for n in sizes]
  keys = [(np.repeat(np.arange(len(s)), 2), s.reshape(-1)) for s in several]
  both = np.intersect1d(keys[0][1], keys[1][1])
  hypothesis.assume(len(both))
  keys = tuple((rows[np.isin(v, both)], v[np.isin(v, both)]) for rows, v in keys)
  one, other = contents.sides(tuple(content), keys)
  found = retrieval.first_ranks(x[one.rows], y[other.rows], (one, other))
  assert found.tolist() == plain_ranks(x, y, *content, *(list(zip(*map(np.ndarray.tolist, k))) for k in keys))


def test_emergent_retrieval_over_sets_of_which_one_holds_the_other():
  rng = np.random.default_rng(0)
  concepts = np.array([f"c{n}" for n in np.repeat(np.arange(20), 2)])
  centres = np.repeat(rng.normal(size=(20, 8)), 2, axis=0)
  side = lambda: {"shared": (centres + 1.2 * rng.normal(size=centres.shape)).astype(np.float32), "concept": concepts,
                  "_content": np.arange(40)}  # fmt: skip
  whole = {"touch": side(), "audio": side()}
  twice = {m: {f: np.concatenate([c[f], c[f][:30]]) for f in c} for m, c in whole.items()}
  found, stacked = (dict(retrieval.Emergent("touch", "audio", intervals=True)(table)) for table in (whole, twice))
  assert found == stacked and found["emergent/touch_to_audio/r5/n"] == found["emergent/touch_to_audio/r5/ways"] == 40
  for columns in twice.values():
    columns.pop("_content")
  wrong = dict(retrieval.Emergent("touch", "audio")(twice))
  assert wrong["emergent/touch_to_audio/r5"] < found["emergent/touch_to_audio/r5"] - 5


def test_within_retrieval_does_not_find_a_copy_of_the_query():
  labels = np.array(["a", "a", "a", "b", "b"])
  image = {"full": unit(0, 0, 80, 60, 100), "label": labels, "_content": np.array([1, 1, 2, 3, 4])}
  found = dict(retrieval.WithinRetrieval("image", ks=(1,), intervals=True)({"image": image}))
  # Of the four contents at 0, 80, 60 and 100 degrees none is nearest to its partner: 80 lies between the others' two.
  name = "retrieval/image_to_image/label/full/r1"
  assert found[name] == 0.0 and found[f"{name}/n"] == 4 and found[f"{name}/ways"] == 3


def test_zero_shot_counts_a_picture_once_and_takes_any_of_its_labels():
  # Content 1 is twice an east; content 2 is an east and a north, and lies north; content 3 is a west that lies north.
  table = {"image": {"shared": unit(5, 5, 88, 88, 92), "_content": np.array([1, 1, 2, 2, 3]), "id": np.arange(5),
                     "label": np.array(["east", "east", "east", "north", "west"])}}  # fmt: skip
  kept = []
  embed = lambda names: unit(*[{"east": 0, "north": 90, "west": 180}[name] for name in names])
  found = dict(zeroshot.ZeroShot("image", ["east", "north", "west"], embed, intervals=True, keep=kept.append)(table))
  assert found["zeroshot/image/top1"] == pytest.approx(200 / 3) and found["zeroshot/image/top1/n"] == 3
  (one,) = kept
  assert one.ids == ["0", "3", "4"] and one.truth == ["east", "north", "west"]
  assert one.right[:, 0].tolist() == [True, True, False] and one.names[one.found[2, 0]] == "north"
  np.testing.assert_allclose(one.scores[0], np.cos(np.deg2rad([5, 85, 175])), atol=1e-6)


def test_probes_count_a_picture_once_and_keep_its_copies_together():
  rng = np.random.default_rng(1)
  labels = np.array(["a", "b"])[np.arange(40) % 2]
  x = (np.where(labels == "a", 1.0, -1.0)[:, None] + 0.8 * rng.normal(size=(40, 3))).astype(np.float32)
  columns = {"shared": x, "label": labels, "_content": np.arange(40), "id": np.arange(40)}
  some = lambda rows: {"image": {name: values[rows] for name, values in columns.items()}}
  train, test, kept = some(np.arange(24)), some(np.arange(24, 40)), []
  copies = some(np.repeat(np.arange(24), np.arange(24) % 5 + 1)), some(np.repeat(np.arange(24, 40), 3))
  for make in (
    lambda train: probe.LinearProbe("image", train, field="label", group=None, intervals=True, keep=kept.append),
    lambda train: class_mean.NearestClassMean("image", train, intervals=True),
  ):
    assert dict(make(train)(test)) == dict(make(copies[0])(copies[1]))
  assert kept[0].ids == kept[1].ids and len(kept[0].ids) == 16
  np.testing.assert_allclose(kept[0].scores.sum(1), 1.0, atol=1e-5)  # probabilities of two classes
  alone = class_mean.NearestClassMean("image", None)
  assert dict(alone(test)) == dict(alone(copies[1]))
  # A picture of two labels is held out with both of its rows.
  seen = []
  double = {name: np.concatenate([values, values[:6]]) for name, values in columns.items()}
  double["label"][40:] = np.where(double["label"][40:] == "a", "b", "a")
  real = probe._fitted
  try:
    probe._fitted = lambda x, y, grid, steps: seen.append(x) or real(x, y, grid, steps)
    probe.LinearProbe("image", {"image": double}, field="label", group=None)._on_training_rows("shared", [])
  finally:
    probe._fitted = real
  chosen, whole = seen
  out = {tuple(row) for row in whole} - {tuple(row) for row in chosen}
  assert len(whole) == 46 and len(chosen) < 46 and not out & {tuple(row) for row in chosen}


def test_the_numbers_of_a_probe_are_those_of_the_scored_rows():
  rng = np.random.default_rng(2)
  labels = np.array([f"c{n % 6}" for n in range(60)])
  table = {"image": {"shared": rng.normal(size=(60, 4)).astype(np.float32), "label": labels, "_content": np.arange(60)}}
  test = {"image": dict(table["image"]) | {"_mask": np.arange(60) < 17, "_content": np.arange(60) + 60}}
  found = dict(probe.LinearProbe("image", table, field="label", group=None, intervals=True)(test))
  assert found["probe/label/image/shared/n"] == 17 and found["probe/label/image/shared/ways"] == 6
  assert found["probe/label/image/shared/balanced/n"] == 17


def test_best_answers_equal_a_sort():
  rng = np.random.default_rng(3)
  rows, others = rng.normal(size=(7, 3)).astype(np.float32), rng.normal(size=(9, 3)).astype(np.float32)
  found, scores = answers.best(rows, others)
  expected = np.argsort(-(rows @ others.T), axis=1, kind="stable")[:, :5]
  np.testing.assert_array_equal(found, expected)
  np.testing.assert_allclose(scores, np.take_along_axis(rows @ others.T, expected, 1))
  assert answers.best(rows, others[:2])[0].shape == (7, 2)


def test_labels_that_differ_in_case_and_blanks_are_refused_as_candidates():
  with pytest.raises(ValueError, match="labels: 'cow' and 'Cow ' are one class but for case and blanks"):
    zeroshot.class_embeddings(lambda texts: unit(*range(len(texts))), ["cow", "Cow "], ["{}"])

"""What a config's data is: files of one's own, several sources beside worlds, validation rows that are held out."""

import json
import logging
import pickle

import numpy as np
import pytest

from codebind_jax import schema
from codebind_jax.data.task import Data, open_task


@pytest.fixture
def write(tmp_path, monkeypatch):
  """Writes a file of records and gives its path."""
  monkeypatch.setenv("CODEBIND_DATA", str(tmp_path / "cache"))

  def write(name, rows):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)

  return write


def data(**keys):
  return schema.read(Data, keys, "data")


def rows(count, start=0, **more):
  return [{"id": f"r{i}", "text": f"thing {i}", "label": f"kind {i % 5}"} | more for i in range(start, start + count)]


def test_files_take_the_place_of_worlds_and_named_ones_stand_beside_them(write):
  mine, web = write("mine.jsonl", rows(20)), write("web.jsonl", rows(30, 100))
  alone = open_task(data(files=mine, worlds=("synthetic-image-text",), profile="tiny", holdout=0.0))
  assert list(alone.train) == ["mine"] and len(alone.train["mine"]) == 20
  assert {k: len(v) for k, v in open_task(data(manifest=mine, holdout=0.0)).train.items()} == {"mine": 20}
  named = {"named_files": {"web": (web,)}, "worlds": ("synthetic-image-text",), "profile": "tiny"}
  both = open_task(data(**named, holdout=0.0))
  assert {name: len(source) for name, source in both.train.items()} == {"web": 30, "synthetic-image-text": 512}
  three = open_task(data(files=mine, named_files={"web": (web,)}, worlds=("synthetic-image-text",)))
  assert set(three.train) == {"mine", "web"}


def test_several_files_are_one_source_and_an_id_in_two_of_them_is_named(write):
  write("p-00.jsonl", rows(4)), write("p-01.jsonl", rows(4, 10))
  pattern = write("p-02.jsonl", rows(4, 20)).replace("p-02", "p-{00..02}")
  assert len(next(iter(open_task(data(files=pattern, holdout=0.0)).train.values()))) == 12
  write("p-01.jsonl", rows(4, 2))
  with pytest.raises(ValueError, match=r"'r2' is there twice: .*p-00.jsonl:3 and .*p-01.jsonl:1"):
    open_task(data(files=pattern))


def test_groups_are_labels_and_rows_without_one_stand_alone(write):
  plain = [{"id": f"n{i}", "text": "x"} for i in range(3)]
  source = open_task(data(files=write("mine.jsonl", [*rows(6), *plain]), holdout=0.0)).train["mine"]
  assert source.index.group.tolist() == [0, 1, 2, 3, 4, 0, 5, 6, 7]


def test_held_out_rows_are_a_share_chosen_by_id_alone(write, caplog):
  caplog.set_level(logging.INFO, "absl")
  small = open_task(data(files=write("mine.jsonl", rows(400)), holdout=0.25))
  assert "of 400 are held out as val, by hash of the id (config.data.holdout=0.25; 0 for none)" in caplog.text
  test, = small.evals
  assert test.role == "val" and len(test.source) + len(small.train["mine"]) == 400
  assert 70 <= len(test.source) <= 130  # 100 expected, deviation 9
  assert not set(test.source.column("id")) & set(small.train["mine"].column("id"))
  large = open_task(data(files=write("more.jsonl", rows(800)), holdout=0.25))
  early = {name for name in large.evals[0].source.column("id") if int(name[1:]) < 400}
  assert early == set(test.source.column("id"))


def test_splits_of_records_are_kept(write):
  records = [*rows(5, split="train"), *rows(3, 10, split="validation"), *rows(2, 20, split="test")]
  task = open_task(data(files=write("mine.jsonl", records)))
  assert len(task.train["mine"]) == 5 and {e.role: len(e.source) for e in task.evals} == {"val": 3, "test": 2}
  assert task.evals[0].candidates == [f"kind {n}" for n in range(5)] and task.evals[0].name == "mine_val"


def test_a_tenth_is_held_out_where_no_record_is_of_val_or_test(write):
  """Two and more of four and more, so that there is something to compare."""
  whole = open_task(data(files=write("mine.jsonl", rows(500))))
  assert 30 <= len(whole.evals[0].source) <= 70  # 50 expected, deviation 7
  few = open_task(data(files=write("few.jsonl", rows(4))))
  assert len(few.evals[0].source) == 2 and len(few.train["few"]) == 2
  two = open_task(data(files=write("two.jsonl", rows(2))))
  assert len(two.train["two"]) == 2 and two.evals == ()
  tested = open_task(data(files=write("tested.jsonl", [*rows(50), *rows(5, 100, split="test")])))
  assert len(tested.train["tested"]) == 50 and [e.role for e in tested.evals] == ["test"]


def test_candidates_of_unseen_labels_alone_are_these(write):
  """A set that shares a label with training is chosen among all labels; one of unseen labels among its own."""
  new = [{"id": f"n{i}", "text": "x", "label": f"new {i}", "split": "test"} for i in range(3)]
  unseen = open_task(data(files=write("unseen.jsonl", [*rows(10, split="train"), *new])))
  assert unseen.evals[0].candidates == ["new 0", "new 1", "new 2"]
  seen = open_task(data(files=write("seen.jsonl", [*rows(10, split="train"), *rows(1, 20, split="val")])))
  assert seen.evals[0].candidates == [f"kind {n}" for n in range(5)]


def test_labels_are_captions_of_records_without_text_if_asked_for(write):
  vector = lambda i: {"image": f"{i}.png"}
  records = [{"id": "a", "label": "cow"} | vector(0), {"id": "b", "label": "dog", "text": "a dog runs"} | vector(1),
             {"id": "c"} | vector(2), {"id": "d", "label": "cow", "text": "moo"} | vector(3)]  # fmt: skip
  path = write("mine.jsonl", records)
  plain = open_task(data(files=path, holdout=0.0, checked="none")).train["mine"]
  found = open_task(data(files=path, holdout=0.0, checked="none", label_captions=True)).train["mine"]
  assert plain.rows_with("text").tolist() == [1, 3] and found.rows_with("text").tolist() == [0, 1, 3]
  assert [found.fields(i).get("text") for i in range(4)] == [["cow"], ["a dog runs"], None, ["moo"]]
  assert found.fingerprint() != plain.fingerprint() and found.content_hash(1, "text") == plain.content_hash(1, "text")
  part = pickle.loads(pickle.dumps(found.select([3, 0])))
  assert part.fields(1)["text"] == ["cow"] and part.has(1, "text") and part.where(0) == plain.where(3)
  assert str(part.read(1, "image")) == str(plain.read(0, "image"))


def test_modalities_of_the_same_records_are_retrieved_by_one_another(write):
  """In sets of files; of pairs that two records have, text aside, which is matched by caption."""
  some = lambda i, *names: {"id": f"r{i}", "text": "x", "split": "val"} | {name: f"{i}.{name}" for name in names}
  records = [some(0, "audio", "depth"), some(1, "audio", "depth", "points"), some(2, "points", "audio"),
             some(3, "points", "depth", "image"), some(4, "image")]  # fmt: skip
  test, = open_task(data(files=write("mine.jsonl", records), checked="none")).evals
  assert set(test.pairs) == {("audio", "depth", "id"), ("audio", "points", "id"), ("depth", "points", "id")}


@pytest.mark.parametrize("keys, message", [
  ({"files": (3,)}, "config.data.files: got 3; allowed: a text"), ({"holdout": 1.0}, "config.data.holdout: got 1.0"),
  ({"checked": "most"}, "config.data.checked: 'most' is not allowed"),
])  # fmt: skip
def test_bad_keys_are_named(keys, message):
  with pytest.raises(ValueError, match=message):
    data(**keys)


def test_the_index_of_a_large_split_is_shared_by_a_file(write, monkeypatch):
  monkeypatch.setattr("codebind_jax.data.task.SHARED", 50)
  path = write("mine.jsonl", rows(400))
  source = open_task(data(files=path, holdout=0.25)).train["mine"]
  small = open_task(data(files=path, holdout=0.95)).train["mine"]
  assert len(pickle.dumps(source)) < len(pickle.dumps(small)) + 4 * len(source)  # but for the numbers in the file
  again = pickle.loads(pickle.dumps(source))
  for name in ("has", "label", "group", "ids"):
    np.testing.assert_array_equal(getattr(again.index, name), getattr(source.index, name))
  assert again.fields(7) == source.fields(7)

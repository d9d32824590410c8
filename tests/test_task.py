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
  alone = open_task(data(files=mine, worlds=("synthetic-image-text",), profile="tiny"))
  assert list(alone.train) == ["mine"] and len(alone.train["mine"]) == 20
  assert {k: len(v) for k, v in open_task(data(manifest=mine)).train.items()} == {"mine": 20}
  both = open_task(data(named_files={"web": (web,)}, worlds=("synthetic-image-text",), profile="tiny"))
  assert {name: len(source) for name, source in both.train.items()} == {"web": 30, "synthetic-image-text": 512}
  three = open_task(data(files=mine, named_files={"web": (web,)}, worlds=("synthetic-image-text",)))
  assert set(three.train) == {"mine", "web"}


def test_several_files_are_one_source_and_an_id_in_two_of_them_is_named(write):
  write("p-00.jsonl", rows(4)), write("p-01.jsonl", rows(4, 10))
  pattern = write("p-02.jsonl", rows(4, 20)).replace("p-02", "p-{00..02}")
  assert len(next(iter(open_task(data(files=pattern)).train.values()))) == 12
  write("p-01.jsonl", rows(4, 2))
  with pytest.raises(ValueError, match=r"'r2' is there twice: .*p-00.jsonl:3 and .*p-01.jsonl:1"):
    open_task(data(files=pattern))


def test_groups_are_labels_and_rows_without_one_stand_alone(write):
  plain = [{"id": f"n{i}", "text": "x"} for i in range(3)]
  source = open_task(data(files=write("mine.jsonl", [*rows(6), *plain]))).train["mine"]
  assert source.index.group.tolist() == [0, 1, 2, 3, 4, 0, 5, 6, 7]


def test_held_out_rows_are_a_share_chosen_by_id_alone(write, caplog):
  caplog.set_level(logging.INFO, "absl")
  small = open_task(data(files=write("mine.jsonl", rows(400)), holdout=0.25))
  assert "of 400 training rows are held out as val" in caplog.text
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
  assert task.evals[0].candidates == ["kind 0", "kind 1", "kind 2"] and task.evals[0].name == "mine_val"


@pytest.mark.parametrize("keys, message", [
  ({"files": (3,)}, r"config.data.files: got \(3,\)"), ({"holdout": 1.0}, "config.data.holdout: got 1.0"),
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

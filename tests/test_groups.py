"""Records that are no negatives of one another: of one label, or of one picture in several records."""

import doctest
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from codebind_jax import config as config_lib
from codebind_jax.data import index
from codebind_jax.data.batches import SourceBatches
from codebind_jax.data.opening import open_source
from codebind_jax.data.task import open_task
from codebind_jax.trunks.feeds import Feeder
from tests.train_fixtures import tiny_config


def test_docstring_examples():
  found = doctest.testmod(index)
  assert found.attempted >= 5 and not found.failed


def coco_form(folder, captions=5, pictures=6, copy=False):
  """A manifest of a record a caption, whose last picture is copied under another name."""
  folder.mkdir()
  for n in range(pictures):
    Image.new("RGB", (16, 16), (40 * n, 20, 90)).save(folder / f"{n}.png")
  lines = [{"id": f"{n}-{k}", "image": f"{n}.png", "text": f"caption {k} of {n}"}
           for n in range(pictures) for k in range(captions)]  # fmt: skip
  if copy:
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    lines.append({"id": "copy", "image": "copy.png", "text": "a copy of 0"})
  path = folder / "coco.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def test_captions_of_one_picture_are_one_group_in_every_text_format(tmp_path):
  path = coco_form(tmp_path / "coco")
  expected = np.repeat(np.arange(6), 5).tolist()
  source = open_source(path)
  assert source.index.group.tolist() == expected
  table = path.with_suffix(".csv")
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  table.write_text("id,image,text\n" + "".join(f"{r['id']},{r['image']},{r['text']}\n" for r in rows))
  assert open_source(table).index.group.tolist() == expected
  assert source.select(np.arange(29, 12, -4)).index.group.tolist() == [0, 0, 1, 2, 3]  # rows 29, 25, 21, 17, 13
  both = path.with_name("more.jsonl")
  records = [{"image": "9.png", "text": "a"}, {"image": "9.png", "audio": "s"}, {"audio": "s", "label": None},
             {"label": "cow", "image": "8.png"}, {"image": "8.png"}, {"label": "calf", "image": "8.png"}]  # fmt: skip
  both.write_text("".join(json.dumps(record) + "\n" for record in records))
  assert open_source([both, path], check="none").index.group.tolist() == [0, 0, 0, 1, 1, 2, *(3 + n for n in expected)]


def test_copies_of_a_picture_whose_tokens_are_cached_are_one_group(tmp_path):
  path = coco_form(tmp_path / "coco", copy=True)
  config = config_lib.read(tiny_config(path, tmp_path / "cache"))
  source = open_task(config.data).train["coco"]
  feeder = Feeder(config.data, config.model.towers)
  feeds = {m: feeder.train(source, m) for m in ("image", "text")}
  assert source.index.group.tolist() == [*np.repeat(np.arange(6), 5).tolist(), 6]
  batches = SourceBatches(source, feeds, rows=6, seed=0)
  for step in range(8):
    batch = batches[step]
    assert sorted(batch["_group"].tolist()) == list(range(6))  # every picture once, and 0 with its copy
    assert all(source.index.group[row] % 6 == group for row, group in zip(batch["_row"], batch["_group"]))
  with pytest.raises(ValueError, match="7 is larger than its 6"):
    SourceBatches(source, feeds, rows=7, seed=0)
  plain = SourceBatches(source, feeds, rows=31, seed=0, unique_labels=False)[0]
  assert len(np.unique(plain["_group"])) == 6


@hypothesis.given(st.integers(0, 10_000))
@hypothesis.settings(max_examples=60, deadline=None)
def test_groups_of_contents_equal_a_plain_implementation(seed):
  rng = np.random.default_rng(seed)
  count = int(rng.integers(1, 14))
  label = rng.integers(-1, 2, count)
  group = index.groups_of(label)
  contents = [rng.integers(-1, 8, count) for _ in range(int(rng.integers(0, 3)))]
  found = index.of_contents(group, label, contents)
  near = lambda a, b: any(c[a] == c[b] >= 0 for c in contents)
  parts = [{n} for n in range(count) if label[n] < 0]
  close = lambda p, q: p is not q and any(near(a, b) for a in p for b in q)
  while pair := next(((p, q) for p in parts for q in parts if close(p, q)), None):
    parts = [p for p in parts if p not in pair] + [pair[0] | pair[1]]
  name = {n: f"label {label[n]}" for n in range(count) if label[n] >= 0}
  for part in parts:
    touched = [n for n in range(count) if label[n] >= 0 and any(near(n, m) for m in part)]
    own = f"label {label[min(touched, key=lambda n: group[n])]}" if touched else f"part {min(part)}"
    name |= dict.fromkeys(part, own)
  numbers = {}
  assert found.tolist() == [numbers.setdefault(name[n], len(numbers)) for n in range(count)]

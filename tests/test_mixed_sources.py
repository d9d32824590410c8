"""A tar, a Parquet file and JSON lines in one batch: the same bits for any process, worker, kill and start."""

import json
import re
import signal
import sys

import numpy as np
import pytest

from codebind_jax.data import augment
from codebind_jax.data.batches import Batches, SourceBatches
from codebind_jax.data.examples import Items, Texts
from codebind_jax.data.opening import open_source
from codebind_jax.data.transforms import image
from codebind_jax.trunks import load_trunk
from tests.batches_fixtures import digest
from tests.mixed_sources import write_mixed
from tests.processes import started
from tests.train_fixtures import arrays_of, lines_of, write_manifest

STREAMED = {
  "model.towers.image.cache": False, "model.towers.image.views": 1, "data.manifest": "", "data.workers": 2,
  "stages.bridges.tune": {"image": "frozen"}, "stages.bridges.mixup": 0.0,
}  # fmt: skip
POINTS = 6


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
  return write_mixed(tmp_path_factory.mktemp("mixed"))


def batches_of(files, process=0, processes=1):
  source = open_source(files, split="train")
  trunk = {
    "image": load_trunk("efficientnet_lite0", weights="random", size=32, grid=2, head_width=32,
                        stages=((1, 3, 1, 1, 8), (1, 3, 2, 2, 16))),
    "text": load_trunk("hashed_words", width=8),
  }  # fmt: skip
  feeds = {
    "image": Items(source, "image", trunk["image"].input, augment.make("image", {"kind": "photo"})),
    "text": Texts(source, trunk["text"].input),
  }
  return Batches({"mixed": SourceBatches(source, feeds, rows=8, seed=1, process=process, processes=processes)})


def test_formats_give_the_same_records(mixed, tmp_path):
  alike = open_source(write_manifest(tmp_path))
  number = {name: row for row, name in enumerate(alike.column("id"))}
  source = open_source(mixed)
  assert len(source) == len(alike) == 40 and source.modalities == ("image", "text")
  for row in range(len(source)):
    there, fields = number[source.fields(row)["id"]], source.fields(row)
    assert fields == alike.fields(there)
    np.testing.assert_array_equal(image.read(source.read(row, "image")), image.read(alike.read(there, "image")))


def test_batches_are_the_same_bits_for_any_workers_processes_and_start(mixed):
  whole = batches_of(mixed)
  expected = [whole[step] for step in range(5)]
  assert all(len(set(batch["mixed"]["_group"])) == 8 for batch in expected)
  for workers, start in ((0, 0), (2, 0), (2, 3)):
    ahead = whole.start(start, workers=workers)
    assert digest(next(ahead).batch for _ in range(5 - start)) == digest(expected[start:]), (workers, start)
    ahead.close()
  for processes in (2, 4):
    parts = [batches_of(mixed, process, processes)[3]["mixed"] for process in range(processes)]
    joined = np.concatenate([part["image"] for part in parts])
    np.testing.assert_array_equal(joined, expected[3]["mixed"]["image"])
  assert not np.array_equal(expected[0]["mixed"]["image"], expected[1]["mixed"]["image"])


def start(mixed, root, workdir, **values):
  overrides = [f"{key}={json.dumps(value)}" for key, value in (STREAMED | {"data.files": mixed} | values).items()]
  return started([sys.executable, "-m", "tests.run_tiny", "unused", str(root), str(workdir), *overrides])


@pytest.fixture(scope="module")
def uninterrupted(mixed, tmp_path_factory):
  """(folder of caches, workdir of a run that was not stopped, number of points at which it could be killed)."""
  root, workdir = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("whole")
  process = start(mixed, root, workdir, kill_at=-1)
  out, err = process.communicate(timeout=1200)
  assert process.returncode == 0, err[-4000:]
  return root, workdir, int(re.search(r"^(\d+) events$", out, re.MULTILINE)[1])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(POINTS))
def test_killed_anywhere_a_streamed_run_goes_on_bit_for_bit(mixed, uninterrupted, tmp_path, request, number):
  root, whole, events = uninterrupted
  rng = np.random.default_rng((request.config.getoption("--kill-seed"), number))
  process = start(mixed, root, tmp_path, kill_at=int(rng.integers(0, int(0.9 * events))))
  _, err = process.communicate(timeout=1200)
  assert process.returncode == -signal.SIGKILL, err[-4000:]
  process = start(mixed, root, tmp_path, **{"data.workers": number % 3})
  _, err = process.communicate(timeout=1200)
  assert process.returncode == 0, err[-4000:]
  assert lines_of(tmp_path) == lines_of(whole)
  here, there = arrays_of(tmp_path), arrays_of(whole)
  assert here.keys() == there.keys()
  for path, array in here.items():
    np.testing.assert_array_equal(array, there[path], err_msg=path)

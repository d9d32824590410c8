"""Writers on a disk that is full: one line that names what could not be written, and the old content stays."""

import contextlib
import os
import subprocess

import jax
import numpy as np
import pytest

import codebind_jax
from codebind_jax.compare.table import write_comparison
from codebind_jax.data import opening, shards
from codebind_jax.report import answers as answers_lib
from codebind_jax.runtime import metrics
from codebind_jax.runtime.checkpoint import Checkpoints, Position
from codebind_jax.trunks.cache import TokenCache
from tests import test_faults_files
from tests.test_compare_claims import WORLD, result
from tests.test_features import Images, mean_trunk
from tests.train_fixtures import write_manifest
from tests.world_fixtures import small_world


@contextlib.contextmanager
def nearly_full(folder, left=4_000):
  """A small disk of its own, mounted on a folder, with little room left."""
  mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
  if mounted.returncode:
    pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
  try:
    yield lambda: (folder / "ballast").write_bytes(b"\0" * max(0, free(folder) - left - left % 4096))
  finally:
    subprocess.run(["umount", "-l", folder], check=True)


def free(folder):
  disk = os.statvfs(folder)
  return disk.f_bavail * disk.f_frsize


def comparison(folder, content):
  settings = {"world": WORLD, "learning_rates": [1e-3], "seeds": 3}
  config = {"compare": settings, "steps": 7, "batch_size": 9, "stages": {"bind": {"sources": {"w": 4}}}}
  results = {"fixed_anchor_audio": result(40), "fixed_anchor_image": result(60)}
  write_comparison(folder, {"summary": content * 9_000, "config": config, "results": results})


def world(folder, content):
  small_world(folder / content)


def answers(folder, content):
  folder.mkdir(exist_ok=True)
  answers_lib.files.write_whole(folder / answers_lib.PREDICTIONS, content * 20_000)


def checkpoint(folder, content):
  with contextlib.closing(Checkpoints(folder)) as store:
    state = {"params": {"a": jax.random.normal(jax.random.key(ord(content)), (100, 100))}, "codebooks": {}}
    store.save(Position(ord(content), "s", False), state, {}, {})
    store.wait()


def lines(folder, content):
  with metrics.MetricsWriter(folder) as writer:
    for step in range(300):
      writer.write(step, content, {"train/loss": step / 7})


def records(folder, content):
  source = opening.open_source(write_manifest(folder.parent.parent / f"squares {content}", 3))
  shards.write_all(shards.Job.of(source, shards.make_plan(source, 1 << 20, check="none"), folder / content))


def tokens(folder, content):
  images = Images(ord(content) + 300)
  TokenCache(folder, mean_trunk()).fill(images.keys, images)


WRITERS = [comparison, world, answers, checkpoint, lines, records, tokens]


def one_line(error, folder):
  """Asserts that an error is one line that names something below a folder, and that the disk is full."""
  said = str(error)
  assert "\n" not in said and str(folder) in said, said
  assert any(words in said for words in ("No space left on device", "no space", "File too large", "are free")), said


@pytest.mark.parametrize("write", [comparison, world], ids=lambda f: f.__name__)
def test_files_that_do_not_fit_are_named(tmp_path, write):
  with test_faults_files.room(2_000), pytest.raises(OSError) as caught:
    write(tmp_path, "a")
  one_line(caught.value, tmp_path)
  left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
  assert not left and not list(tmp_path.rglob(".building-*"))


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
def test_a_full_disk_is_named_by_each_writer(tmp_path, write):
  disk = tmp_path / "disk"
  disk.mkdir()
  with nearly_full(disk) as fill:
    folder = disk / "kept"
    folder.mkdir()
    write(folder, "a")
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    fill()
    with pytest.raises(OSError) as caught:
      write(folder, "b")
    one_line(caught.value, folder)
    there = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    if write is lines:  # grows by whole lines
      assert [line["stage"] for line in metrics.read_metrics(folder)][:300] == ["a"] * 300
    else:
      assert {path: there.get(path) for path in kept} == kept
    (disk / "ballast").unlink()
    write(folder, "b")  # there is room again


@pytest.mark.slow
def test_a_model_that_does_not_fit_leaves_the_old_one(trained, tmp_path):
  model, disk = codebind_jax.load(trained[2]), tmp_path / "disk"
  disk.mkdir()
  with nearly_full(disk) as fill:
    model.save(disk / "model")
    kept = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    fill()
    with pytest.raises(OSError) as caught:
      model.save(disk / "model")
    one_line(caught.value, disk)
    assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file() and path.name != "ballast"} == kept
    assert np.isfinite(codebind_jax.load(disk / "model").params["image"]["shared"]["proj"]["kernel"]).all()

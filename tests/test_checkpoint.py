"""Checkpoints: flips are noticed, readers change nothing, only damage is set aside, odd folder names."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax import config as config_lib
from codebind_jax import files
from codebind_jax.runtime import checkpoint_files
from codebind_jax.runtime.checkpoint import Checkpoints, Position, SavedRun
from codebind_jax.runtime.near_checkpoint import NearCheckpoints
from codebind_jax.train import open_run
from tests.train_fixtures import tiny_config


def state_of(value):
  params = {"a": jnp.full((64, 5), value), "none": {}}
  return {"params": params, "codebooks": {"n": jnp.int32(3)}, "rng": jax.random.key(7)}


PLACED = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def target(_):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=PLACED), state_of(0.0))


def write(folder, *steps, keep=9):
  store = Checkpoints(folder, keep=keep)
  for step in steps:
    store.save(Position(step, "s", False, ("a",)), state_of(step / 3), {"x": step}, {"key": 1})
  store.close()


def restored(folder):
  store = Checkpoints(folder)
  try:
    return store.restore(target)
  finally:
    store.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """A run with checkpoints 1 and 2, to be read only."""
  folder = tmp_path_factory.mktemp("two")
  write(folder, 1, 2)
  return folder


def listing(folder):
  everything = [folder, *folder.rglob("*")]
  return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in everything}


def test_every_flip_in_a_checkpoint_is_noticed_or_changes_no_value(two, tmp_path, caplog):
  folder = shutil.copytree(two, tmp_path / "run")
  want = SavedRun(folder).read()
  files = [path for path in (folder / "checkpoints" / "2").rglob("*") if path.is_file()]
  rng, silent, noticed = np.random.default_rng(0), set(), 0
  for path in files:
    whole = path.read_bytes()
    for at in rng.integers(0, len(whole), 4):
      flipped = bytearray(whole)
      flipped[at] ^= 1 << rng.integers(8)
      path.write_bytes(flipped)
      meta, arrays = SavedRun(folder).read()
      if meta["position"]["step"] == 1:
        noticed += 1
        continue
      silent.add(path.name)
      assert meta == want[0]
      jax.tree.map(np.testing.assert_array_equal, arrays, want[1])
    path.write_bytes(whole)
  assert silent <= {"_CHECKPOINT_METADATA", "commit_success.txt", "checksums.json"}, "what gives no value"
  assert noticed > 2 * len(files) / 3
  there = folder / "checkpoints"
  assert f"checkpoint {there / '2'} cannot be read, taking the one before it, {there / '1'}" in caplog.text


@pytest.mark.parametrize("name", ["checksums.json", "meta/metadata", "state/_METADATA", "state/manifest.ocdbt"])
def test_a_missing_file_is_damage(two, tmp_path, name):
  folder = shutil.copytree(two, tmp_path / "run")
  (folder / "checkpoints" / "2" / name).unlink()
  assert SavedRun(folder).read_meta()["position"]["step"] == 1
  assert restored(folder)[0].step == 1
  assert (folder / "checkpoints" / "2.damaged").is_dir()


def test_large_files_have_several_checksums_and_all_are_verified(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint_files, "_BLOCK", 1000)
  monkeypatch.setattr(checkpoint_files, "_PIECE", 300)
  monkeypatch.setattr(checkpoint_files, "_SMALL", 2000)
  (tmp_path / "state").mkdir()
  data = np.random.default_rng(0).bytes(4567)
  (tmp_path / "state" / "big").write_bytes(data)
  (tmp_path / "state" / "empty").write_bytes(b"")
  checkpoint_files.write_checksums(tmp_path, ("state",))
  checkpoint_files.verify_checksums(tmp_path)
  (tmp_path / "state" / "big").write_bytes(data[:4566] + bytes([data[4566] ^ 1]))
  checkpoint_files.verify_checksums(tmp_path, large=False)
  for large in (None, True):
    with pytest.raises(checkpoint_files.Damaged, match=r"state/big is not what was written: .* \(bytes 4000 and on\)"):
      checkpoint_files.verify_checksums(tmp_path, large=large)
  found = 0
  for process in range(3):  # who share the work
    try:
      checkpoint_files.verify_checksums(tmp_path, process, 3)
    except checkpoint_files.Damaged:
      found += 1
  assert found == 1
  (tmp_path / "state" / "big").write_bytes(data[:4000])
  with pytest.raises(checkpoint_files.Damaged, match="state/big has 4000 of 4567 bytes"):
    checkpoint_files.verify_checksums(tmp_path, large=False) or checkpoint_files.verify_checksums(tmp_path)


def test_readers_change_nothing_also_while_a_checkpoint_is_written(two, tmp_path):
  folder = shutil.copytree(two, tmp_path / "run")
  (folder / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()  # as one that is being written
  damaged = folder / "checkpoints" / "2" / "meta" / "metadata"
  damaged.write_text("{}")
  before = listing(folder)
  run = SavedRun(folder)
  assert run.fingerprint() == {"x": 1} and run.read_meta()["config"] == {"key": 1}
  assert float(run.read_arrays()["params"]["a"][0, 0]) == np.float32(1 / 3)
  run.close()
  assert listing(folder) == before
  none = tmp_path / "none"
  with pytest.raises(FileNotFoundError, match="no checkpoint in"):
    SavedRun(none).read()
  assert not none.exists()


def test_a_reader_takes_the_newest_again_when_the_run_deletes_what_it_reads(two, tmp_path, monkeypatch):
  folder = shutil.copytree(two, tmp_path / "run")
  meta = NearCheckpoints.meta

  def deleted_meanwhile(self, step):
    if step == 2:
      (folder / "checkpoints" / "2").rename(folder / "checkpoints" / "3")
    return meta(self, step)

  monkeypatch.setattr(NearCheckpoints, "meta", deleted_meanwhile)
  assert SavedRun(folder).read()[0]["position"]["step"] == 2  # what is in 3


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), OSError(24, "Too many open files"), MemoryError(),
                                   PermissionError(13, "no"), KeyError("bug"), KeyboardInterrupt(),
                                   jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")])  # fmt: skip
@pytest.mark.parametrize("where", ["meta", "kinds", "restore"])
def test_what_is_not_damaged_stays(two, monkeypatch, error, where):
  before = listing(two)

  def fails(*_):
    raise error

  monkeypatch.setattr(NearCheckpoints, where, fails)
  with pytest.raises(type(error)):
    restored(two)
  assert listing(two) == before


def test_another_structure_says_which_version_wrote_it(two, monkeypatch):
  before, other = listing(two), {"version": "9.9", "source": "abc"}
  monkeypatch.setattr("codebind_jax.runtime.checkpoint.this_version", lambda: other)
  store = Checkpoints(two)
  message = r"checkpoints/2 holds other arrays .* \(written by version 0.*, this is version 9.9 \(source abc\)\)"
  with pytest.raises(ValueError, match=message):
    store.restore(lambda at: {"step": jax.ShapeDtypeStruct((), jnp.int32)})
  store.close()
  assert listing(two) == before


def test_nothing_begins_again_where_there_was_a_checkpoint(two, tmp_path):
  folder = shutil.copytree(two, tmp_path / "run")
  for step in ("1", "2"):
    (folder / "checkpoints" / step / "meta" / "metadata").write_text("{}")
  with pytest.raises(ValueError, match="checkpoints/2 cannot be read, it is damaged: .*; nor can .*checkpoints/1: "):
    SavedRun(folder).read()
  with pytest.raises(RuntimeError, match=r"none of the checkpoints \[2, 1\] in .* kept as \*.damaged; put back a copy"):
    restored(folder)
  for _ in range(2):
    with pytest.raises(RuntimeError, match="has no checkpoint but 1.damaged, 2.damaged, which was set aside; put back"):
      restored(folder)
  with pytest.raises(FileNotFoundError, match="no checkpoint in .*, only 1.damaged, 2.damaged"):
    SavedRun(folder).read()
  shutil.rmtree(folder / "checkpoints")
  with pytest.raises(RuntimeError, match="of a run that had one at step 1; put back a copy of one, or use"):
    restored(folder)
  (folder / "versions.json").unlink()
  assert restored(folder) is None


def test_old_ones_are_deleted_and_what_a_kill_has_left_too(tmp_path):
  (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
  (tmp_path / "checkpoints" / ".1.01234567.old").mkdir()
  (tmp_path / "checkpoints" / "0.damaged").mkdir()
  write(tmp_path, 1, 2, 3, keep=2)
  assert sorted(os.listdir(tmp_path / "checkpoints")) == ["0.damaged", "2", "3"]
  versions = files.read_sealed(tmp_path / "versions.json")
  assert versions["versions"] == [dict(checkpoint_files.this_version()) | {"step": 1}]
  position, state = restored(tmp_path)
  assert position == Position(3, "s", False, ["a"]) and float(state["params"]["a"][0, 0]) == 1.0


def test_a_failed_save_is_said_and_leaves_the_one_before(tmp_path, monkeypatch):
  write(tmp_path, 1)

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("codebind_jax.runtime.near_checkpoint.write_checksums", full)
  with pytest.raises(OSError, match="No space left"):
    write(tmp_path, 2)
  assert restored(tmp_path)[0].step == 1
  assert os.listdir(tmp_path / "checkpoints") == ["1"]


@pytest.mark.parametrize("name", ["a[v2]", "a]", "[!a]", "a*", "a?", "a\\b", " a ", "a b", "ä", "{a}", "a$b", "~a",
                                  "a%20", "'a\"", "#a", "a:b", "a&b;c"])  # fmt: skip
def test_runs_in_folders_of_any_name(data, tmp_path, name):
  folder = open_run(config_lib.read(tiny_config(*data)), tmp_path / name)
  write(folder, 1, 2)
  position, state = restored(folder)
  assert position.step == 2 and float(state["params"]["a"][0, 0]) == np.float32(2 / 3)
  assert SavedRun(folder).read()[0]["fingerprint"] == {"x": 2}
  assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\x7f", os.fsdecode(b"a\xff")])
def test_names_that_logs_and_reports_cannot_hold_are_refused(data, tmp_path, name):
  with pytest.raises(ValueError, match="workdir .* in its name; allowed: UTF-8 without control characters"):
    open_run(config_lib.read(tiny_config(*data)), tmp_path / name)
  assert list(tmp_path.iterdir()) == []

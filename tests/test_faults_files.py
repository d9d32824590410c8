"""Files of a run: closed with the stage that opened them, and named when a disk is full or cannot be written."""

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from codebind_jax import files, train
from codebind_jax.data import index_cache, opening, ranges, shards
from codebind_jax.data.blocks import Block
from codebind_jax.data.joined import Joined, joined
from codebind_jax.embedding import shards as embedded
from codebind_jax.files import temporary
from codebind_jax.runtime import metrics
from codebind_jax.search import Index
from codebind_jax.trunks import cache
from codebind_jax.trunks.cache import TokenCache
from tests.test_features import Images, files_of, mean_trunk, tokens_at
from tests.train_fixtures import tiny_config, write_manifest


def open_below(folder):
  """Files below a folder that this process has open."""
  links = []
  for number in os.listdir("/proc/self/fd"):
    with contextlib.suppress(FileNotFoundError):  # that of the listing itself
      links.append(os.readlink(f"/proc/self/fd/{number}"))
  return sorted(link for link in links if link.startswith(f"{folder}/"))


# What reading opens.


def test_files_of_sources_and_tokens_are_closed_and_open_again(tmp_path):
  manifest = write_manifest(tmp_path / "squares")
  lines = opening.open_source(manifest)
  shards.write_all(shards.Job.of(lines, shards.make_plan(lines, 1 << 20, check="none"), tmp_path / "shards"))
  records = opening.open_source(f"{tmp_path}/shards/*.array_record")
  whole = joined([lines.select(range(3)), records.select(range(3, 6))])
  assert isinstance(whole, Joined)
  first = [(whole.fields(row), whole.content_hash(row, "image")) for row in range(6)]
  ranges.File(manifest, ranges.stamp(manifest)).read(0, 10)
  assert {os.path.splitext(name)[1] for name in open_below(tmp_path)} == {".jsonl", ".array_record"}
  whole.close()
  assert open_below(tmp_path) == []
  assert [(whole.fields(row), whole.content_hash(row, "image")) for row in range(6)] == first
  whole.close()
  images, store = Images(3), TokenCache(tmp_path / "tokens", mean_trunk())
  places, _ = store.fill(images.keys, images)
  read = tokens_at(store, places)
  assert open_below(tmp_path)
  store.reader.close()
  assert open_below(tmp_path) == []
  np.testing.assert_array_equal(tokens_at(store, places), read)
  store.reader.close()


@pytest.mark.slow
def test_five_stages_leave_no_more_files_open_than_one(data, tmp_path, monkeypatch, quick_compiler):
  config = tiny_config(*data).unlock()
  names = tuple(f"s{number}" for number in range(5))
  for name in names:
    config.stages[name] = config.stages.bridges.copy_and_resolve_references().unlock()
    config.stages[name].steps = 1
  del config.stages.bridges
  config.stage_order, config.tasks, config.test = names, ("retrieval",), False
  real, during, after = train.close_files, [], []

  def closed(task, feeds):
    during.append(len(open_below(data[1])))
    real(task, feeds)
    after.append((open_below(data[1]), open_below(data[0].parent), len(os.listdir("/proc/self/fd"))))

  monkeypatch.setattr(train, "close_files", closed)
  train.train_and_evaluate(config.lock(), tmp_path / "run")
  assert len(after) == 5 and all(during), "cached tokens are read in each stage"
  assert all(tokens == sources == [] for tokens, sources, _ in after)
  assert max(count for *_, count in after[1:]) <= after[0][-1] + 1  # the first has checkpoints and metrics open


# Full disks.


@contextlib.contextmanager
def room(size):
  """No file may grow beyond a size: every write, of any library, then fails as on a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def text(path, content):
  files.write_whole(path, content * 100_000)



def index(path, content):
  made = Index("numpy")
  made.add([f"{content}{n}" for n in range(300)], np.random.default_rng(ord(content)).normal(size=(300, 64)))
  made.save(path)


def shard(path, content):
  vectors = np.random.default_rng(ord(content)).normal(size=(300, 64))
  schema = embedded.make_schema(["image_shared"], "float32")
  columns = [pa.array([f"{content}{n}" for n in range(300)]), *[pa.array([None] * 300, pa.string())] * 2]
  columns.append(embedded.with_nulls(vectors, range(300), 300, np.float32))
  batch = pa.RecordBatch.from_arrays(columns, schema=schema)
  embedded.write_shard(path, schema, [batch], embedded.ShardReport(content, 1, 300))


@pytest.mark.parametrize("write", [text, index, shard], ids=lambda f: f.__name__)
def test_a_full_disk_leaves_the_old_file_and_is_one_line(tmp_path, write):
  path = tmp_path / "kept.parquet"
  with room(10_000), pytest.raises(OSError) as caught:
    write(path, "a")
  assert not list(tmp_path.iterdir())
  write(path, "a")
  old = path.read_bytes()
  assert len(old) > 20_000
  with room(10_000), pytest.raises(OSError) as caught:
    write(path, "b")
  assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
  assert (caught.value.errno in (errno.EFBIG, errno.ENOSPC)) and caught.value.filename == str(path)
  said = caught.value.strerror
  assert "cannot be written (File too large; more than " in said and "are free" in said and "\n" not in said


def test_metrics_on_a_full_disk_end_with_a_whole_line(tmp_path):
  with metrics.MetricsWriter(tmp_path) as writer:
    with pytest.raises(OSError, match="cannot be written .File too large.*metrics.jsonl"), room(3_000):
      for step in range(1_000):
        writer.write(step, "s", {"train/loss": step / 7})
    assert len(metrics.read_metrics(tmp_path)) == step  # all before the one that failed
    content = (tmp_path / "metrics.jsonl").read_bytes()
    assert content.endswith(b"\n") and len(content) <= 3_000
    writer.write(step, "s", {"train/loss": step / 7})  # there is room again
  assert [line["step"] for line in metrics.read_metrics(tmp_path)] == list(range(step + 1))


def test_events_on_a_full_disk_are_an_error_and_no_wait_without_end(tmp_path):
  with metrics.MetricsWriter(tmp_path) as writer:
    with pytest.raises(OSError, match="cannot be written .File too large.*tensorboard/events"), room(4_000):
      for step in range(1_000):
        writer.image(step, "map", np.full((9, 9, 3), step % 256, np.uint8))


def test_no_room_in_shared_memory_is_an_error_where_a_write_would_end_the_process():
  block = Block()
  try:
    with room(100_000), pytest.raises(OSError, match="no room for an item of 1,000,000 bytes .*config.data.workers"):
      block.empty((1_000_000,), np.uint8)
  finally:
    block.close()


def test_an_index_that_finds_no_room_is_used_and_not_kept(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(index_cache, "SMALLEST", 0)
  manifest = write_manifest(tmp_path / "squares", 30)
  with room(2_000):
    found = opening.open_source(manifest, data_dir=tmp_path / "root")
  assert len(found) == 8 * 32 and "the index is not kept" in caplog.text
  assert [path for path in (tmp_path / "root").rglob("*") if path.is_file()] == []


def test_a_temporary_folder_that_is_not_there_is_named(tmp_path):
  code = "from codebind_jax import files\ntry: files.make_scratch()\nexcept OSError as error: print(error)"
  environment = os.environ | {"TMPDIR": str(tmp_path / "gone"), "PATH": ""}
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
  assert done.returncode == 0, done.stderr  # another folder takes its place, as Python chooses


# What killed writers leave.


KILLED = """
import os, signal, sys, pathlib
from codebind_jax import files
folder = pathlib.Path(sys.argv[1])
with files.replacing(folder / "a.json") as part:
  part.write_text("half")
  (folder / files.temporary_name(".model")).mkdir()
  (folder / files.temporary_name(".moved", "old")).mkdir()
  os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_writer(folder):
  subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False)


def test_what_killed_writers_left_does_not_pile_up(tmp_path):
  for _ in range(2):
    killed_writer(tmp_path)
    assert len([p for p in tmp_path.iterdir() if p.suffix == ".part"]) == 2
    (tmp_path / "moved").rmdir() if (tmp_path / "moved").exists() else None
    temporary._looked.discard(str(tmp_path))  # as a new process
    with files.replacing(tmp_path / "b.json") as own:
      own.write_text("whole")
      files.remove_left(tmp_path)
      assert own.exists(), "this process still writes it"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.json", "moved"]  # what was to be replaced is put back


def test_what_others_write_is_left_alone(tmp_path, monkeypatch):
  name = temporary.temporary_name("a.json")
  machine, rest = name.removeprefix("a.json.").split("-", 1)
  other = tmp_path / f"a.json.{'0' * 8}-{rest}"  # of another machine, whose processes cannot be seen
  stale = tmp_path / f"b.json.{'0' * 8}-{rest}"
  alive = tmp_path / f"c.json.{machine}-{os.getppid()}-abcdef-0.part"
  own = tmp_path / "mine.part"
  for path in (other, stale, alive, own):
    path.write_text("x")
  os.utime(stale, (0, 0))
  files.remove_left(tmp_path)
  assert sorted(tmp_path.iterdir()) == sorted([other, alive, own])


def test_a_folder_is_exchanged_at_once_or_put_back(tmp_path, monkeypatch):
  old, new = tmp_path / "model", tmp_path / ".new"
  for exchanged in (True, False):
    for folder, content in ((old, "old"), (new, "new")):
      folder.mkdir(exist_ok=True)
      (folder / "a").write_text(content)
    if not exchanged:
      from codebind_jax.files import places

      monkeypatch.setattr(places, "exchange", lambda *_: False)
    files.replace_folder(new, old)
    assert (old / "a").read_text() == "new" and list(tmp_path.iterdir()) == [old]


# Bad items late in a long list.


def test_tokens_that_are_computed_stay_whatever_comes_after(tmp_path):
  for error in (OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()):
    images, folder = Images(60, failing={57: error}), tmp_path / type(error).__name__
    with pytest.raises(type(error)):
      TokenCache(folder, mean_trunk()).fill(images.keys, images)
    images.failing.clear()
    images.reads.clear()
    TokenCache(folder, mean_trunk()).fill(images.keys, images)
    assert sorted(images.reads) == list(range(48, 60))


def test_one_bad_picture_costs_that_picture(tmp_path):
  bad = ValueError("picture 57: cut short")
  images, store = Images(60, failing={57: bad}), TokenCache(tmp_path, mean_trunk())
  places, messages = store.fill(images.keys, images)
  assert np.flatnonzero(places < 0).tolist() == [57] and messages == [str(bad)]
  images.failing.clear()
  images.reads.clear()
  places, messages = TokenCache(tmp_path, mean_trunk()).fill(images.keys, images)
  assert images.reads == [57] and (places >= 0).all() and not messages
  assert not files_of(tmp_path)[2]


def test_a_shard_that_could_not_be_written_is_not_kept_by_the_error_after(tmp_path, monkeypatch):
  images = Images(40)
  with room(4_000), pytest.raises(OSError, match="tokens cannot be written"):
    TokenCache(tmp_path, mean_trunk()).fill(images.keys, images)
  assert files_of(tmp_path) == ([], [], [])


# Folders that can be read alone.


@pytest.fixture
def read_only(monkeypatch):
  """Makes a folder one in which Python can neither make, change nor remove anything, also for root."""
  barred = []

  def hook(event, args):
    if not barred or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"):
      return
    writes = event != "open" or args[2] is not None and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    paths = [os.fspath(arg) for arg in args[:2] if isinstance(arg, str | os.PathLike)]
    if writes and any(str(path).startswith(f"{barred[0]}") for path in paths):
      raise OSError(errno.EROFS, os.strerror(errno.EROFS), paths[0])

  sys.addaudithook(hook)
  yield barred.append
  barred.clear()


def test_a_read_only_token_cache_that_has_everything_is_used(tmp_path, read_only):
  images = Images(30)
  wanted, _ = TokenCache(tmp_path, mean_trunk()).fill(images.keys, images)
  images.reads.clear()
  read_only(tmp_path)
  store = TokenCache(tmp_path, mean_trunk())
  places, _ = store.fill(images.keys, images)
  assert not images.reads and len(tokens_at(store, places)) == len(wanted)
  more = Images(31)
  with pytest.raises(OSError, match=f"Read-only file system.*{tmp_path.name}"):
    store.fill(more.keys, more)


def test_remembered_hashes_and_kept_indices_are_read_where_nothing_can_be_written(tmp_path, read_only, monkeypatch):
  memory = cache.Contents(tmp_path / "root" / "contents.sqlite")
  assert memory.hashes(["a", "b"], str) == ["0", "1"]
  monkeypatch.setattr(index_cache, "SMALLEST", 0)
  manifest = write_manifest(tmp_path / "squares", 3)
  before = opening.open_source(manifest, data_dir=tmp_path / "root")
  read_only(tmp_path / "root")
  assert memory.hashes(["a", "b"], lambda number: pytest.fail("read anew")) == ["0", "1"]
  after = opening.open_source(manifest, data_dir=tmp_path / "root")
  assert after.fingerprint() == before.fingerprint() and json.dumps(after.fields(3)) == json.dumps(before.fields(3))
  other = write_manifest(tmp_path / "others", 4)
  assert len(opening.open_source(other, data_dir=tmp_path / "root")) == 48  # made, and not kept

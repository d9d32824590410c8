"""Folders at gs:// and s3://, against servers on the loopback device: what is there is whole, what fails says what."""

import itertools
import json
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax import config as config_lib
from codebind_jax import files
from codebind_jax.api import load
from codebind_jax.data.worlds import fetch
from codebind_jax.embedding import job, shards
from codebind_jax.runtime.checkpoint import Checkpoints, Position
from codebind_jax.runtime.metrics import MetricsWriter, read_metrics
from codebind_jax.search import Index
from codebind_jax.train import open_run, train_and_evaluate
from codebind_jax.trunks import load_trunk
from codebind_jax.trunks.cache import TokenCache
from tests.far_servers import KEYS, SETTINGS, VARIABLES, Server, Way
from tests.processes import assert_close, assert_same_run, finish, launch, start, wait_for
from tests.train_fixtures import tiny_config

for package in ("moto", "s3fs", "gcsfs", "gcp_storage_emulator"):
  pytest.importorskip(package)

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def servers():
  """Scheme -> server."""
  both = {scheme: Server(scheme) for scheme in ("s3", "gs")}
  yield both
  for server in both.values():
    server.close()


@pytest.fixture
def environment(monkeypatch, tmp_path):
  """Sets variables for clients, forgets others, and closes connections at the end."""

  def use(values):
    files.close()
    for name in VARIABLES:
      monkeypatch.delenv(name, raising=False)
    for name, value in (SETTINGS | values).items():
      monkeypatch.setenv(name, value)

  monkeypatch.setenv("CODEBIND_CACHE", str(tmp_path / "cache"))
  use({})
  yield use
  files.close()


@pytest.fixture(params=["s3", "gs"])
def root(request, servers, environment):
  """A far folder of its own."""
  environment(servers[request.param].environment())
  return files.path(f"{request.param}://bucket/{next(NUMBERS)}")


@pytest.fixture
def amazon(servers, environment):
  environment(servers["s3"].environment())
  return files.path(f"s3://bucket/{next(NUMBERS)}")


@pytest.fixture(params=["s3", "gs"])
def way(request, servers, environment):
  """(a way to the server that may fail, a far folder over it)."""
  server = servers[request.param]
  way = Way(server.port)
  environment(server.environment(way.port))
  yield way, files.path(f"{request.param}://bucket/{next(NUMBERS)}")
  files.close()
  way.close()


@pytest.fixture
def waits(monkeypatch):
  """Seconds that were to be waited; nothing waits."""
  waited = []
  monkeypatch.setattr(files.far, "patience", files.Patience(attempts=3, quiet=5.0, sleep=waited.append))
  return waited


# Paths.


def test_paths_are_local_or_of_a_known_scheme(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  assert files.path("a/b") == tmp_path / "a" / "b" and files.path("~/a") == tmp_path / "home" / "a"
  assert isinstance(files.path("a"), pathlib.Path) and not files.is_far(files.path("a"))
  assert str(files.path("gs://bucket/a/") / "b") == "gs://bucket/a/b" and files.is_far("s3://bucket")
  for text, reason in {
    "http://host/a": "'http://host/a': unknown scheme 'http://'; allowed: a local path, gs://BUCKET/NAME or s3://",
    "gs:/bucket/a": "'gs:/bucket/a': has no bucket after gs://", "s3://": "'s3://': has no bucket after s3://",
    "s3:///a": "has no bucket",
  }.items():  # fmt: skip
    with pytest.raises(ValueError, match=reason):
      files.path(text)
  with pytest.raises(ValueError, match="has no bucket after gs://"):
    files.path(pathlib.Path("gs://bucket/a"))  # pathlib has made one slash of two


def test_a_package_that_is_not_installed_is_named(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"gcsfs is not installed: pip install codebind_jax\[gcs\]"):
    files.path("gs://bucket/a")
  with pytest.raises(ValueError, match=r"s3fs is not installed: pip install codebind_jax\[s3\]"):
    files.path("s3://bucket/a")


# Files and folders.


def test_files_near_and_far_are_alike(root, tmp_path):
  for folder in (root, tmp_path / "near"):
    assert not files.exists(folder) and files.children(folder) == [] and files.contents(folder) == {}
    files.make_folder(folder)
    for name in ("ä b.txt", "b.txt"):
      files.write_whole(folder / name, f"text of {name}\n")
    files.make_folder(folder / "inner")
    files.write_whole(folder / "inner" / "c.bin", "0123456789")
    assert [path.name for path in files.children(folder)] == ["b.txt", "inner", "ä b.txt"]
    assert files.children(folder, "*.txt") == [folder / "b.txt", folder / "ä b.txt"]
    sizes = {name: found.size for name, found in files.contents(folder).items()}
    assert sizes == {"b.txt": 14, "inner/c.bin": 10, "ä b.txt": 17}
    assert files.is_folder(folder / "inner") and not files.is_file(folder / "inner")
    assert files.is_file(folder / "b.txt") and not files.is_folder(folder / "b.txt") and files.exists(folder / "b.txt")
    assert not files.exists(folder / "b") and not files.exists(folder / "inn")
    assert files.read_bytes(folder / "inner" / "c.bin", 3, 7) == b"3456"
    assert files.read_bytes(folder / "inner" / "c.bin", 7) == b"789"
    with pytest.raises(FileNotFoundError, match="none.txt"):
      files.read_text(folder / "none.txt")
    files.remove(folder / "b.txt")
    files.remove(folder / "b.txt")
    files.remove_folder(folder / "inner")
    assert files.children(folder) == [folder / "ä b.txt"]
  with files.lock(root / ".lock", "works"):
    assert [path.name for path in files.children(root)] == ["ä b.txt"]


def test_a_far_object_is_read_by_ranges(root):
  data = np.random.default_rng(0).integers(0, 256, 3 << 20, dtype=np.uint8).tobytes()
  with files.replacing(root / "a.bin") as temporary:
    temporary.write_bytes(data)
  with files.open_far(root / "a.bin") as file:
    file.seek(-5, 2)
    assert file.read() == data[-5:] and file.read() == b""
    file.seek(1_000_000)
    assert file.read(2_000_000) == data[1_000_000:3_000_000] and file.tell() == 3_000_000
  with pytest.raises(FileNotFoundError):
    files.open_far(root / "b.bin")


def folder_of(place, **texts):
  place.mkdir(parents=True)
  for name, text in texts.items():
    (place / name).write_text(text)
  return place


def test_a_folder_takes_the_place_of_another(root, tmp_path):
  for number, texts in enumerate([{"a": "1", "mark": "old"}, {"b": "2", "mark": "new"}]):
    files.replace_folder(folder_of(tmp_path / str(number), **texts), root / "model", last="mark")
    assert {name: files.read_text(root / "model" / name) for name in files.contents(root / "model")} == texts
  assert files.children(root) == [root / "model"]


def test_a_copy_is_made_once_and_anew_when_the_far_folder_changes(root, tmp_path):
  files.replace_folder(folder_of(tmp_path / "1", a="1", mark="x"), root / "model", last="mark")
  first = files.fetched(root / "model")
  assert (first / "a").read_text() == "1" and first.name == "model"
  (first / "a").write_text("kept")
  assert files.fetched(root / "model") == first and (first / "a").read_text() == "kept"
  files.write_whole(root / "model" / "a", "2")
  assert (files.fetched(root / "model") / "a").read_text() == "2"
  assert files.fetched(root / "model" / "a").read_text() == "2"
  with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
    files.fetched(root / "none")


# Failures.


def test_an_upload_that_breaks_leaves_the_old_object(way, waits, tmp_path):
  way, root = way
  # Google refuses half a body, its emulator keeps it as a whole one: there the half does not reach the server.
  fault = ("cut" if str(root).startswith("s3") else "lost", 100_000)
  files.write_whole(root / "a.txt", "old")
  files.replace_folder(folder_of(tmp_path / "old", a="old", mark="old"), root / "model", last="mark")
  files.close()
  many = [fault] * (50 if fault[0] == "cut" else 3)
  way.faults += many
  with pytest.raises(OSError, match=r"a\.txt: cannot be written: .* \(3 attempts\); set "):
    files.write_whole(root / "a.txt", "new" * 100_000)
  way.faults.clear()
  assert len(waits) == 2 and waits[1] > waits[0]
  assert files.read_text(root / "a.txt") == "old"
  new = folder_of(tmp_path / "new", a="new" * 100_000, mark="new")
  files.close()
  way.faults += [None, *many]  # the old folder is listed first
  with pytest.raises(OSError, match=r"\.part/a: cannot be written"):
    files.replace_folder(new, root / "model", last="mark")
  way.faults.clear()
  files.close()
  assert files.read_text(root / "model" / "a") == "old" and files.read_text(root / "model" / "mark") == "old"


def test_what_may_pass_is_tried_again_and_what_may_not_is_not(way, waits):
  way, root = way
  way.faults += [503, 503]
  files.write_whole(root / "a.txt", "text")
  assert len(waits) == 2 and files.read_text(root / "a.txt") == "text"
  for status, kind in ((403, PermissionError), (404, FileNotFoundError)):
    files.close()
    way.faults += [status]
    with pytest.raises(kind, match=r"a\.txt: cannot be written: "):
      files.write_whole(root / "a.txt", "other")
  assert len(waits) == 2
  files.close()
  way.faults += [503] * 3
  with pytest.raises(OSError, match=r"\(3 attempts\)"):
    files.read_text(root / "a.txt")
  assert len(waits) == 4


def test_a_server_that_never_answers_is_named_and_nothing_hangs(way, monkeypatch):
  way, root = way
  patience = files.Patience(attempts=2, quiet=0.3, limit=0.6, sleep=lambda seconds: None)
  monkeypatch.setattr(files.far, "patience", patience)
  way.faults += ["silent"] * 50
  with pytest.raises(ValueError, match=rf"^{root}: no answer in 0.2 s; set .*(AWS_ENDPOINT_URL|STORAGE_EMULATOR_HOST)"):
    files.probe(root, seconds=0.2)
  with pytest.raises(TimeoutError, match=r"cannot be read: no answer.*\(2 attempts\)"):
    files.read_text(root / "a.txt")
  with pytest.raises(TimeoutError, match=r"cannot be written: no answer.*\(2 attempts\)"):
    files.write_whole(root / "a.txt", "x" * 300_000)
  way.faults.clear()


def test_a_missing_bucket_is_one_line_before_any_work(root, data):
  nowhere = f"{str(root)[:2]}://nobodys-bucket/run"
  with pytest.raises(ValueError) as raised:
    open_run(config_lib.read(tiny_config(*data)), nowhere)
  text = str(raised.value)
  assert "\n" not in text and text.startswith(f"{nowhere}: cannot be listed: there is no such bucket")
  assert ("AWS_ENDPOINT_URL" if nowhere.startswith("s3") else "STORAGE_EMULATOR_HOST") in text
  with pytest.raises(ValueError, match="there is no such bucket"):
    load(nowhere)
  with pytest.raises(ValueError, match="no such file or folder"):
    load(str(root / "nothing"))


def test_wrong_keys_and_none_are_named(environment):
  server = Server("s3", strict=True)
  try:
    environment(server.environment())
    with pytest.raises(ValueError, match=r"^s3://bucket/a: cannot be listed: not allowed .*; set AWS_ACCESS_KEY_ID"):
      files.probe(files.path("s3://bucket/a"), write=True)
    environment({name: value for name, value in server.environment().items() if name not in KEYS})
    with pytest.raises(ValueError, match=r"^s3://bucket/a: cannot be listed: not allowed .*; set AWS_ACCESS_KEY_ID"):
      files.probe(files.path("s3://bucket/a"), write=True)
  finally:
    files.close()
    server.close()


def test_google_s_credentials_are_named(way):
  way, root = way
  way.faults += [401]
  with pytest.raises(ValueError, match="not allowed .*; set (GOOGLE_APPLICATION_CREDENTIALS|AWS_ACCESS_KEY_ID)"):
    files.probe(root, write=True)


# What a run writes.


def test_metrics_are_uploaded_whole_and_go_on(root, tmp_path):
  for folder in (root, tmp_path):
    with MetricsWriter(folder) as writer:
      for step in (1, 2, 3):
        writer.write(step, "s", {"train/loss": 1 / step})
      writer.flush()
      writer.write(4, "s", {"train/loss": 0.0})
      if folder is root:
        assert [line["step"] for line in read_metrics(root)] == [1, 2, 3]
    with MetricsWriter(folder) as writer:
      writer.truncate(2)
      assert [line["step"] for line in read_metrics(folder)] == [1, 2]
      writer.write(3, "s", {"train/loss": 7.0})
  assert read_metrics(root / "metrics.jsonl") == read_metrics(tmp_path)
  assert len(files.children(root / "tensorboard")) == len(files.children(tmp_path / "tensorboard")) == 2


def state_of(value):
  return {
    "params": {"a": {"w": jnp.full((3, 4), value), "none": {}}, "half": jnp.asarray([value], jnp.bfloat16)},
    "codebooks": {"flag": jnp.asarray(True)}, "rng": jax.random.key(7),
    "opt": (jnp.int32(3), ()),
  }  # fmt: skip


def test_a_checkpoint_far_is_what_it_is_near(root, tmp_path):
  placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), state_of(0.0))
  found = []
  for folder in (root, tmp_path):
    store = Checkpoints(folder, keep=2)
    assert store.restore(lambda at: target) is None and store.fingerprint() is None
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
      store.read_meta()
    for step in (1, 2, 3):
      store.save(Position(step, "s", False, ("a",)), state_of(step / 3), {"x": step}, {"key": [1, None]})
    store.close()
    store = Checkpoints(folder, keep=2)
    position, state = store.restore(lambda at: target)
    assert position.step == 3 and store.fingerprint() == {"x": 3} and store.read_meta()["config"] == {"key": [1, None]}
    found.append((state, store.read_arrays()))
    other = target | {"opt": (jax.ShapeDtypeStruct((2,), jnp.int32, sharding=placed), ())}
    with pytest.raises(ValueError, match=r"holds other arrays than this run has \(1 differ\): opt/0: 'int32\[\]' -> "):
      store.restore(lambda at, other=other: other)
    store.close()
  (far, far_arrays), (near, near_arrays) = found
  assert jax.tree.structure(far) == jax.tree.structure(near)
  assert jax.tree.structure(far_arrays) == jax.tree.structure(near_arrays)
  plain = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  for a, b in zip(jax.tree.leaves((far, far_arrays)), jax.tree.leaves((near, near_arrays)), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(plain(a), plain(b))
  assert [path.name for path in files.children(root / "checkpoints")] == ["2", "3"]


def test_a_damaged_or_half_written_checkpoint_far_is_passed_over(root, caplog):
  placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), state_of(0.0))
  store = Checkpoints(root, keep=3)
  for step in (1, 2, 3):
    store.save(Position(step, "s", False), state_of(float(step)), {}, {})
  store.wait()
  files.remove(root / "checkpoints" / "3" / "commit.json")  # as a kill before the last upload leaves it
  part = next(path for path in files.children(root / "checkpoints" / "2") if path.name.endswith(".bin"))
  data = bytearray(files.read_bytes(part))
  data[5] ^= 1
  with files.replacing(part) as temporary:
    temporary.write_bytes(data)
  position, state = store.restore(lambda at: target)
  assert position.step == 1 and float(state["params"]["a"]["w"][0, 0]) == 1.0
  assert "checkpoints/2 cannot be read, trying the one before it: params/a/w: damaged in part-" in caplog.text
  assert files.is_file(root / "checkpoints" / "2" / "damaged.json")
  store.save(Position(2, "s", False), state_of(2.5), {}, {})
  store.close()
  store = Checkpoints(root)
  position, state = store.restore(lambda at: target)
  assert position.step == 2 and float(state["params"]["a"]["w"][0, 0]) == 2.5
  files.write_whole(root / "checkpoints" / "1" / "commit.json", "{}")
  files.write_whole(root / "checkpoints" / "2" / "commit.json", "{}")
  with pytest.raises(RuntimeError, match=r"none of the checkpoints \[2, 1\]"):
    store.restore(lambda at: target)
  store.close()


def test_a_far_disk_that_fails_is_no_damage(way, waits):
  way, root = way
  placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), state_of(0.0))
  store = Checkpoints(root)
  store.save(Position(1, "s", False), state_of(1.0), {}, {})
  store.wait()
  files.close()
  way.faults += [503] * 3
  with pytest.raises(OSError, match=r"\(3 attempts\)"):
    store.restore(lambda at: target)
  assert store.restore(lambda at: target)[0].step == 1
  files.close()
  way.faults += [("cut", 1)] * 50
  store.save(Position(2, "s", False), state_of(2.0), {}, {})
  with pytest.raises(OSError, match="cannot be written"):
    store.wait()
  way.faults.clear()
  assert store.restore(lambda at: target)[0].step == 1
  store.close()


def test_an_index_and_embeddings_are_written_and_read_far(root, trained, tmp_path):
  index = Index(backend="numpy")
  index.add(["a", "b"], np.array([[1.0, 0.0], [0.0, 2.0]]))
  index.save(str(root / "a.index"))
  again = Index.load(str(root / "a.index"), backend="numpy")
  assert again.search(np.array([[0.1, 1.0]]), k=1)[0].tolist() == [["b"]]
  with pytest.raises(ValueError, match="there is no such file"):
    Index.load(str(root / "none.index"))
  from tests.test_embed import config_of

  found = {}
  for folder in (root / "embedded", tmp_path / "embedded"):
    summary = job.embed(config_of(trained), str(folder))
    assert summary == json.loads(files.read_text(folder / "summary.json"))
    assert len(shards.shard_files(folder)) == 3
    found[folder] = list(shards.read_column(folder, "image_shared"))
    assert len(Index.from_parquet(str(folder), "image")) == 40
    assert job.embed(config_of(trained), str(folder)) == summary
  for (ids, values), (others, expected) in zip(*found.values(), strict=True):
    assert ids == others
    np.testing.assert_array_equal(values, expected)


def test_a_model_is_saved_and_loaded_far(root, trained):
  model = load(trained[2])
  assert str(model.save(str(root / "model"))) == str(root / "model")
  model.save(root / "model")  # in the place of the first
  again = load(str(root / "model"))
  for name in model.modalities:
    items = ["red", "blue square"] if name == "text" else sorted(trained[0].parent.glob("*.png"))[:2]
    np.testing.assert_array_equal(again.embed({name: items})[name].full, model.embed({name: items})[name].full)
  files.write_whole(root / "other" / "notes.txt", "mine")
  with pytest.raises(ValueError, match="other: holds notes.txt; allowed: a new or empty folder, or a saved model"):
    model.save(root / "other")
  with pytest.raises(ValueError, match=f"^{root}/other: no supported checkpoint"):
    load(str(root / "other"))


def test_a_far_run_goes_on_and_equals_a_local_one(amazon, data, whole_run):
  root = amazon
  train_and_evaluate(tiny_config(*data), str(root / "run"))
  files.remove_folder(root / "run" / "checkpoints" / "6", first="commit.json")
  final = train_and_evaluate(tiny_config(*data), str(root / "run"))
  assert final == whole_run[1]
  assert_same_run(whole_run[0], root / "run")
  assert files.read_text(root / "run" / "report.html").startswith("<!doctype html>")
  with pytest.raises(ValueError, match=f"workdir '{root}/run' holds a run of another config: .*seed"):
    train_and_evaluate(tiny_config(*data, seed=5), str(root / "run"))
  near, far = load(whole_run[0]), load(str(root / "run"))
  np.testing.assert_array_equal(far.embed({"text": ["red"]})["text"].full, near.embed({"text": ["red"]})["text"].full)


def test_tokens_far_are_computed_once(root, tmp_path, monkeypatch):
  trunk, strings = load_trunk("hashed_words"), ["red", "green ball"]
  tokens = lambda cache: [cache.reader(int(place)) for place in cache.strings(strings)]
  expected = tokens(TokenCache(tmp_path / "near", trunk))
  np.testing.assert_array_equal(tokens(TokenCache(root, trunk)), expected)
  [shard, keys] = files.contents(files.children(root)[0])
  assert shard.endswith(".array_record") and keys == f"{shard}.keys.npy"
  monkeypatch.setattr(TokenCache, "_compute", lambda *_: pytest.fail("computed again"))
  for cache in ("cache", "another"):  # the copy here, and that of another machine
    monkeypatch.setenv("CODEBIND_CACHE", str(tmp_path / cache))
    np.testing.assert_array_equal(tokens(TokenCache(root, trunk)), expected)
  monkeypatch.setenv("CODEBIND_DATA", str(root))
  assert fetch.data_dir() == tmp_path / "another" and fetch.features_dir() == root / "features"


@pytest.mark.slow
def test_a_far_run_that_is_killed_goes_on_bit_for_bit(root, data, whole_run):
  process = start(data, root / "run")
  wait_for(process, lambda: files.is_file(root / "run" / "checkpoints" / "2" / "commit.json"))
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  finish(start(data, root / "run"))
  assert_same_run(whole_run[0], root / "run")


@pytest.mark.slow
def test_two_processes_write_one_far_run_and_one_goes_on(root, data, whole_run):
  finish(*launch(data, root / "run"))
  assert_close(whole_run[0], root / "run")
  names = [path.name for path in files.children(root / "run" / "checkpoints" / "6", "part-*.json")]
  assert [name[:19] for name in names] == ["part-00000-of-00002", "part-00001-of-00002"]
  files.remove_folder(root / "run" / "checkpoints" / "6", first="commit.json")
  train_and_evaluate(tiny_config(*data), str(root / "run"))
  assert_close(whole_run[0], root / "run")

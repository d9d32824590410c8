"""The cache of tokens: one more item costs one item, right values, kept after a kill, damage found, no half shard."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax.data import token_reader
from codebind_jax.data.inputs import Input
from codebind_jax.data.units import Strings
from codebind_jax.models.encoder import Encoded
from codebind_jax.trunks import cache
from codebind_jax.trunks.base import Trunk
from codebind_jax.trunks.cache import Contents, TokenCache, content_hash, key_of, string_keys
from tests.pretrained_fixtures import tiny_text_trunk
from tests.processes import REPOSITORY


class Mean(nn.Module):
  """Images -> the mean colour and its double, times `scale`."""

  @nn.compact
  def __call__(self, images, train=False):
    mean = jnp.mean(images.astype(jnp.float32), axis=(1, 2)) * self.param("scale", nn.initializers.ones, ())
    return Encoded(jnp.stack([mean, 2 * mean], axis=1))


def mean_trunk(fingerprint="weights 1", scale=1.0):
  """A trunk whose two tokens are the mean colour and its double; `batches` are those it was given."""
  load = lambda shapes: {"scale": jnp.full(shapes["scale"].shape, scale)}
  trunk = Trunk("mean", "image", Mean(), Input((4, 4, 3), "uint8", np.asarray), fingerprint, load)
  trunk.__dict__["batches"], compiled = [], trunk.compiled
  trunk.__dict__["compiled"] = lambda params, batch: (trunk.batches.append(np.array(batch)), compiled(params, batch))[1]
  return trunk


class Images:
  """Images, each with `views` ones that are brighter, which count how often they are read."""

  def __init__(self, count, views=1, failing=None):
    rng = np.random.default_rng(count)
    self.images = rng.integers(0, 100, (count, 4, 4, 3)).astype(np.uint8)
    self.views, self.failing, self.reads = views, failing or {}, []

  def __len__(self):
    return len(self.images)

  def __getitem__(self, number):
    if number in self.failing:
      raise self.failing[number]
    self.reads.append(number)
    return [self.images[number] + np.uint8(view) for view in range(self.views)]

  @property
  def keys(self):
    named = lambda image, view: key_of(content_hash(image), *([str(view)] if view else []))
    return np.array([named(image, view) for image in self.images for view in range(self.views)], np.uint64)


def expected(images):
  mean = images.astype(np.float32).mean(axis=(-3, -2))
  return np.stack([mean, 2 * mean], axis=-2)


def tokens_at(store, places):
  return np.stack([store.reader(int(place)) for place in places])


def files_of(folder):
  """(shards, keys, others) below a folder, by name."""
  names = sorted(path.name for path in folder.rglob("*") if path.is_file())
  shards = [name for name in names if name.endswith(".array_record")]
  keys = [name for name in names if name.endswith(".keys.npy")]
  return shards, keys, sorted({*names} - {*shards, *keys})


@pytest.fixture
def small_shards(monkeypatch):
  monkeypatch.setattr(cache, "SHARD_ITEMS", 6)


def test_values_shape_and_type(tmp_path, small_shards):
  images, store = Images(20), TokenCache(tmp_path, mean_trunk())
  places, bad = store.fill(images.keys, images)
  found = tokens_at(store, places)
  assert found.shape == (20, 2, 3) and found.dtype == np.float16 and not bad
  np.testing.assert_allclose(found, expected(images.images), rtol=1e-3)
  for place, tokens in zip(places, found):
    np.testing.assert_array_equal(store.reader(int(place), pooled=True), tokens[:1])
  shards, keys, others = files_of(tmp_path)
  assert len(shards) == 4 and keys == [f"{name}.keys.npy" for name in shards] and not others


def test_shards_that_are_open_at_once_are_bounded(tmp_path, small_shards, monkeypatch):
  images, store = Images(20), TokenCache(tmp_path, mean_trunk())
  places, _ = store.fill(images.keys, images)
  whole = tokens_at(store, places)
  monkeypatch.setattr(token_reader, "OPEN", 2)
  again = TokenCache(tmp_path, mean_trunk())
  for _ in range(2):
    np.testing.assert_array_equal(tokens_at(again, again.places(images.keys)), whole)
    assert len(again.reader._open) == 2 and len(again.reader.shards) == 4


def test_one_more_item_computes_one_item(tmp_path):
  images, trunk = Images(20), mean_trunk()
  fewer = Images(20)
  fewer.images = fewer.images[:19]
  TokenCache(tmp_path, trunk).fill(fewer.keys, fewer)
  assert sorted(fewer.reads) == list(range(19)) and len(trunk.batches) == 2
  trunk.batches.clear()
  store = TokenCache(tmp_path, trunk)  # as another run
  places, _ = store.fill(images.keys, images)
  assert images.reads == [19] and len(trunk.batches) == 1
  np.testing.assert_array_equal(trunk.batches[0], np.broadcast_to(images.images[19], trunk.batches[0].shape))
  np.testing.assert_allclose(tokens_at(store, places), expected(images.images), rtol=1e-3)
  images.reads.clear()
  assert store.fill(images.keys, images)[0].tolist() == places.tolist() and not images.reads
  assert len(files_of(tmp_path)[0]) == 2


def test_equal_contents_share_an_item_and_views_are_their_own(tmp_path):
  images, trunk = Images(4, views=3), mean_trunk()
  images.images[2] = images.images[0]
  keys = images.keys
  keys[7:9] += np.uint64(1)  # the augmented views of the third image are of its own name
  store = TokenCache(tmp_path, trunk)
  places = store.fill(keys, images)[0].reshape(4, 3)
  assert places[2, 0] == places[0, 0] and len(np.unique(places)) == 11
  views = tokens_at(store, places.reshape(-1)).reshape(4, 3, 2, 3).astype(np.float32)
  np.testing.assert_allclose(views[:, 0], expected(images.images), rtol=1e-3)
  for view in (1, 2):
    np.testing.assert_allclose(views[:, view, 0] - views[:, 0, 0], np.full((4, 3), view), atol=0.1)
  assert sum(np.load(path).shape[0] for path in tmp_path.rglob("*.keys.npy")) == 11
  images.reads.clear()
  images.images[3] += 50
  again = images.keys
  again[7:9] += np.uint64(1)
  places = store.fill(again, images)[0].reshape(4, 3)
  assert images.reads == [3] and (places >= 0).all()


def test_trunks_of_other_weights_have_folders_of_their_own(tmp_path):
  images = Images(3)
  for trunk, scale in ((mean_trunk(), 1), (mean_trunk("weights 2", 2.0), 2)):
    store = TokenCache(tmp_path, trunk)
    places, _ = store.fill(images.keys, images)
    np.testing.assert_allclose(tokens_at(store, places), scale * expected(images.images), rtol=1e-3)
  assert len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_read_has_no_place_and_is_tried_again(tmp_path):
  images = Images(5, failing={3: ValueError("item 3 is no picture")})
  store = TokenCache(tmp_path, mean_trunk())
  places, bad = store.fill(images.keys, images)
  assert bad == ["item 3 is no picture"] and (places < 0).tolist() == [False, False, False, True, False]
  np.testing.assert_allclose(tokens_at(store, places[[0, 4]]), expected(images.images)[[0, 4]], rtol=1e-3)
  images.failing.clear()
  images.reads.clear()
  assert (store.fill(images.keys, images)[0] >= 0).all() and images.reads == [3]


@pytest.mark.parametrize("workers", [0, 2])
def test_texts_have_the_same_bits_whatever_else_is_computed(tmp_path, workers):
  trunk = tiny_text_trunk()
  texts = ["owl", "a cat", "an icon of a very long dog in the rain", *(f"{n} birds on a wire" for n in range(30))]
  whole, alone, other = (TokenCache(tmp_path / name, trunk) for name in ("whole", "alone", "other"))
  places, _ = whole.fill(string_keys(texts), Strings(texts, trunk.input.prepare), workers=workers)
  tokens = tokens_at(whole, places)
  assert len(np.unique(tokens, axis=0)) == len(texts)
  for text in (texts[0], texts[2]):
    np.testing.assert_array_equal(tokens_at(alone, alone.strings([text])), tokens[[texts.index(text)]])
  np.testing.assert_array_equal(tokens_at(other, other.strings(texts[::-1]))[::-1], tokens)
  raw = trunk.compiled(trunk.params, trunk.collate([trunk.preprocess("owl")]))
  np.testing.assert_allclose(tokens[0], raw[0], atol=1e-3)


class Width(nn.Module):
  """Ids -> their padded length."""

  def __call__(self, ids, train=False):
    return Encoded(jnp.full((ids.shape[0], 1, 1), ids.shape[1], jnp.float32))


def test_items_of_one_padded_length_are_computed_together(tmp_path):
  ids = lambda text: np.array([ord(letter) for letter in text.ljust(12, "\0")], np.int32)
  cut = lambda items: np.stack(items)[:, : max(int(np.count_nonzero(item)) for item in items)]
  trunk = Trunk("width", "text", Width(), Input((12,), "int32", ids, cut), "width")
  texts = ["x" * (1 + n % 5) + "abcdefg"[: n % 7] for n in range(40)]
  store = TokenCache(tmp_path, trunk)
  assert tokens_at(store, store.strings(texts)).ravel().tolist() == [len(text) for text in texts]


def test_content_hash_tells_values_types_and_shapes_apart(tmp_path):
  path = tmp_path / "a"
  path.write_bytes(b"abc")
  image = np.arange(6, dtype=np.uint8)
  values = [image, image.reshape(2, 3), image.reshape(3, 2), image.astype(np.int8), image + 1, "abc", b"abc", "abd"]
  assert len({content_hash(value) for value in values}) == len(values)
  assert content_hash(path) == content_hash(b"abc") and content_hash(image[::-1][::-1]) == content_hash(image)
  with pytest.raises(ValueError, match="content_hash: got object"):
    content_hash(object())
  assert key_of("a", "bc") != key_of("ab", "c")


# What ends in the middle.


def test_an_interrupted_fill_keeps_its_finished_shards_and_leaves_no_half_one(tmp_path, small_shards):
  images = Images(60, failing={40: RuntimeError("the disk is on fire")})
  with pytest.raises(RuntimeError, match="on fire"):
    TokenCache(tmp_path, mean_trunk()).fill(images.keys, images)
  shards, keys, others = files_of(tmp_path)
  assert len(shards) == len(keys) == 6 and not others, "of 40 items two batches of 16 were computed"
  images.failing.clear()
  images.reads.clear()
  store = TokenCache(tmp_path, mean_trunk())
  places, _ = store.fill(images.keys, images)
  assert sorted(images.reads) == list(range(32, 60))
  np.testing.assert_allclose(tokens_at(store, places), expected(images.images), rtol=1e-3)


KILLED = textwrap.dedent("""
  import os, pathlib, signal, sys
  from codebind_jax.trunks import cache
  from tests.test_features import Images, mean_trunk
  class Deadly(Images):
    def __getitem__(self, number):
      if number == 40:
        os.kill(os.getpid(), signal.SIGKILL)
      return super().__getitem__(number)
  cache.SHARD_ITEMS = 6
  images = Deadly(60)
  cache.TokenCache(pathlib.Path(sys.argv[1]), mean_trunk()).fill(images.keys, images)
""")


def test_a_killed_process_leaves_nothing_half_written(tmp_path):
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
  done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, capture_output=True, text=True)
  assert done.returncode == -signal.SIGKILL, done.stderr
  shards, keys, others = files_of(tmp_path)
  assert len(shards) == len(keys) == 5 and all(name.endswith(".part") for name in others)
  images, store = Images(60), TokenCache(tmp_path, mean_trunk())
  places, _ = store.fill(images.keys, images)
  assert sorted(images.reads) == list(range(30, 60))
  np.testing.assert_allclose(tokens_at(store, places), expected(images.images), rtol=1e-3)


def test_two_processes_of_one_fill_give_the_tokens_of_one(tmp_path, small_shards):
  alone, whole = TokenCache(tmp_path / "alone", mean_trunk()), Images(41)
  whole.images[7] = whole.images[2]
  wanted = tokens_at(alone, alone.fill(whole.keys, whole)[0])
  barrier, found = threading.Barrier(2, timeout=60), {}

  def one(process):
    images = Images(41)
    images.images[7] = images.images[2]
    store = TokenCache(tmp_path / "two", mean_trunk())
    places, _ = store.fill(images.keys, images, process=process, processes=2, wait=lambda name: barrier.wait())
    found[process] = sorted(images.reads), tokens_at(store, places)

  threads = [threading.Thread(target=one, args=(process,)) for process in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  (first, a), (second, b) = found[0], found[1]
  assert sorted(first + second) == [n for n in range(41) if n != 7] and len(first) == len(second) == 20
  np.testing.assert_array_equal(a, wanted)
  np.testing.assert_array_equal(b, wanted)


# Damage.


def filled(folder, count=10):
  images, store = Images(count), TokenCache(folder, mean_trunk())
  return images, store.fill(images.keys, images)[0], next(folder.rglob("*.array_record"))


@pytest.mark.parametrize("damage", ["a byte", "cut to a block", "cut short", "empty", "gone while it is used", "other"])
def test_a_damaged_shard_is_named_when_it_is_read(tmp_path, damage):
  images, places, shard = filled(tmp_path)
  store, content = TokenCache(tmp_path, mean_trunk()), shard.read_bytes()
  if damage == "a byte":
    tokens = store.reader(int(places[4]))[1:].tobytes()
    store = TokenCache(tmp_path, mean_trunk())
    at = content.index(tokens)
    shard.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
  elif damage == "gone while it is used":
    shard.unlink()
  elif damage == "other":  # of fewer items, as no writer leaves it
    *_, small = filled(tmp_path / "small", 2)
    shard.write_bytes(small.read_bytes())
  else:
    shard.write_bytes(content[: {"cut to a block": 65536, "cut short": 1000, "empty": 0}[damage]])
  with pytest.raises(OSError, match=rf"{shard}: cached tokens are damaged .*; remove this file and its .keys.npy"):
    store.reader(int(places[4]))
  if damage == "a byte":  # the others are whole
    np.testing.assert_allclose(store.reader(int(places[5])), expected(images.images)[5], rtol=1e-3)
    np.testing.assert_allclose(store.reader(int(places[4]), pooled=True), expected(images.images)[4, :1], rtol=1e-3)


@pytest.mark.parametrize("damage", ["cut short", "header", "empty", "other numbers", "shard gone"])
def test_damaged_keys_are_left_out_and_their_items_computed_again(tmp_path, damage, caplog):
  images, _, shard = filled(tmp_path)
  path = shard.with_name(f"{shard.name}.keys.npy")
  content = path.read_bytes()
  if damage == "other numbers":
    np.save(path, np.zeros((10, 3), np.uint64))
  elif damage == "shard gone":
    shard.unlink()
  else:
    path.write_bytes({"cut short": content[:-40], "header": b"\0" + content[1:], "empty": b""}[damage])
  store = TokenCache(tmp_path, mean_trunk())
  assert f"{path} is left out: " in caplog.text
  assert (store.places(images.keys) < 0).all()
  images.reads.clear()
  places, _ = store.fill(images.keys, images)
  assert sorted(images.reads) == list(range(10))
  np.testing.assert_allclose(tokens_at(store, places), expected(images.images), rtol=1e-3)


@pytest.mark.parametrize("word", [0, 8])
def test_a_changed_key_is_found_and_all_are_computed_again(tmp_path, word):
  images, _, shard = filled(tmp_path)
  path = shard.with_name(f"{shard.name}.keys.npy")
  content = bytearray(path.read_bytes())
  content[word - 8 - 16 * 7] ^= 1  # of the fourth item
  path.write_bytes(content)
  store = TokenCache(tmp_path, mean_trunk())
  assert (store.places(images.keys) < 0).all()
  images.reads.clear()
  places, _ = store.fill(images.keys, images)
  assert sorted(images.reads) == list(range(10))
  np.testing.assert_allclose(tokens_at(store, places), expected(images.images), rtol=1e-3)


@pytest.mark.parametrize("scale", [np.nan, 1e6])
def test_values_that_are_not_finite_are_refused(tmp_path, scale):
  images = Images(8)
  with pytest.raises(ValueError, match="trunk 'mean' gave a value that is not finite in float16"):
    TokenCache(tmp_path, mean_trunk(scale=scale)).fill(images.keys, images)
  assert files_of(tmp_path) == ([], [], [])


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  images = Images(3)
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(OSError, match="file"):
    TokenCache(tmp_path / "file", mean_trunk()).fill(images.keys, images)
  store = TokenCache(tmp_path, mean_trunk())
  with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match=rf"{tmp_path}/mean-.*: tokens cannot be"):
    patch.setattr(cache.Path, "mkdir", lambda *_, **__: None)  # as a folder that another process has removed
    store.fill(images.keys, images)


FULL = textwrap.dedent("""
  import pathlib, resource, signal, sys
  from codebind_jax.trunks import cache
  from tests.test_features import Images, mean_trunk
  folder, room = pathlib.Path(sys.argv[1]), int(sys.argv[2])
  images = Images(600)
  store, trunk = cache.TokenCache(folder, mean_trunk()), mean_trunk()
  trunk.compiled(trunk.params, images.images[:16])  # compiled programs are kept on the disk too
  cache.SHARD_ITEMS = 500
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
  try:
    store.fill(images.keys, images)
  except OSError as error:
    print(error)
""")


@pytest.mark.parametrize("room", [50_000, 4_000])
def test_a_full_disk_is_an_error_and_leaves_no_shard(tmp_path, room):
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
  command = [sys.executable, "-B", "-c", FULL, str(tmp_path), str(room)]  # or it leaves half a .pyc
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert f"{tmp_path}/mean-" in done.stdout and "tokens cannot be written" in done.stdout, done.stdout + done.stderr
  assert "File too large" in done.stdout
  assert files_of(tmp_path) == ([], [], [])
  images, store = Images(600), TokenCache(tmp_path, mean_trunk())
  places, _ = store.fill(images.keys, images)
  np.testing.assert_allclose(tokens_at(store, places), expected(images.images), rtol=1e-3)


def test_no_room_for_the_keys_leaves_no_shard(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  images = Images(4)
  with monkeypatch.context() as patch, pytest.raises(OSError, match="tokens cannot be written .*No space left"):
    patch.setattr(cache.np, "save", full)
    TokenCache(tmp_path, mean_trunk()).fill(images.keys, images)
  assert files_of(tmp_path) == ([], [], [])


# What is remembered of files.


class Hashes:
  """The hashes of some files, counted."""

  def __init__(self, folder):
    self.paths, self.reads = [folder / f"{n}.bin" for n in range(4)], []
    for n, path in enumerate(self.paths):
      path.write_bytes(bytes([n] * 10))

  def __call__(self, number):
    self.reads.append(number)
    return content_hash(self.paths[number])

  @property
  def identities(self):
    stats = [path.stat() for path in self.paths]
    return [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in zip(self.paths, stats)]


def test_a_file_s_hash_is_remembered_until_it_changes(tmp_path):
  files, memory = Hashes(tmp_path), tmp_path / "below" / "contents.sqlite"
  first = Contents(memory).hashes(files.identities, files)
  assert first == [content_hash(path) for path in files.paths] and files.reads == [0, 1, 2, 3]
  files.reads.clear()
  assert Contents(memory).hashes(files.identities, files) == first and files.reads == []
  files.paths[2].write_bytes(b"other byte")  # ten bytes too
  stat = files.paths[2].stat()
  os.utime(files.paths[2], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
  again = Contents(memory).hashes(files.identities, files)
  assert files.reads == [2] and again == [*first[:2], content_hash(b"other byte"), first[3]]
  files.reads.clear()
  unknown = [*files.identities[:3], ""]  # one that has no place of its own
  assert Contents(memory).hashes(unknown, files) == again == Contents(memory).hashes(unknown, files)
  assert files.reads == [3, 3]


def test_an_item_that_cannot_be_read_is_not_remembered(tmp_path):
  memory, answers = Contents(tmp_path / "contents.sqlite"), iter(["", "hash"])
  assert memory.hashes(["place"], lambda number: next(answers)) == [""]
  assert memory.hashes(["place"], lambda number: next(answers)) == ["hash"] == memory.hashes(["place"], str)


@pytest.mark.parametrize("damage", ["no base", "in the way", "a folder"])
def test_a_memory_that_cannot_be_used_is_only_lost(tmp_path, damage, caplog):
  files, memory = Hashes(tmp_path), tmp_path / "below" / "contents.sqlite"
  if damage == "in the way":
    memory.parent.write_text("a file")
  elif damage == "a folder":
    memory.mkdir(parents=True)
  else:
    memory.parent.mkdir()
    memory.write_text("this is no data base, " * 100)
  hashes = [content_hash(path) for path in files.paths]
  assert Contents(memory).hashes(files.identities, files) == hashes and files.reads == [0, 1, 2, 3]
  assert "content hashes are not remembered" in caplog.text

"""The cache of features: right values, resumed after a kill, never stale, damage found and mended."""

import dataclasses
import json
import signal
import subprocess
import sys
import textwrap
import time

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax.data.inputs import Input
from codebind_jax.models.encoder import Encoded
from codebind_jax.trunks import cache as features
from codebind_jax.trunks.base import Trunk
from codebind_jax.trunks.cache import cached_features, content_hash
from tests.pretrained_fixtures import tiny_text_trunk


class Mean(nn.Module):
  """Images -> the mean colour and its double, times `scale`; times `bright` as well where the batch is not black."""

  bright: float = 1.0

  @nn.compact
  def __call__(self, images, train=False):
    mean = jnp.mean(images.astype(jnp.float32), axis=(1, 2)) * self.param("scale", nn.initializers.ones, ())
    mean = mean * jnp.where(images.max() > 0, self.bright, 1)
    return Encoded(jnp.stack([mean, 2 * mean], axis=1))


def mean_trunk(fingerprint="weights 1", scale=1.0, bright=1.0):
  """A trunk whose two tokens are the mean colour and its double."""
  load = lambda shapes: {"scale": jnp.full(shapes["scale"].shape, scale)}
  return Trunk("mean", "image", Mean(bright), Input((4, 4, 3), "uint8", np.asarray), fingerprint, load)


@dataclasses.dataclass(frozen=True)
class Brighter:
  amount: float = 1.0

  def __call__(self, image, rng):
    return image + np.uint8(self.amount * rng.integers(1, 20))


class Items:
  """Images that count how often they are read."""

  def __init__(self, count):
    rng = np.random.default_rng(count)
    self.images = rng.integers(0, 100, (count, 4, 4, 3)).astype(np.uint8)
    self.keys = [f"item {index}" for index in range(count)]
    self.reads = []

  def __call__(self, index):
    self.reads.append(index)
    return self.images[index]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(features, "_ITEMS_PER_CHUNK", 6)


def expected(images):
  mean = images.astype(np.float32).mean(axis=(-3, -2))
  return np.stack([mean, 2 * mean], axis=-2)


def folder(path):
  (found,) = [entry for entry in path.iterdir() if entry.is_dir()]
  return found


def test_values_shape_and_type(tmp_path):
  items = Items(20)
  out = cached_features(mean_trunk(), items.keys, items, cache_dir=tmp_path, batch=4)
  assert out.shape == (20, 1, 2, 3) and out.dtype == np.float16 and isinstance(out, np.memmap)
  np.testing.assert_allclose(out[:, 0], expected(items.images), rtol=1e-3)
  with pytest.raises(ValueError, match="read-only"):
    out[0] = 0


def test_a_hit_reads_no_item_when_hashes_are_given(tmp_path):
  items = Items(9)
  hashes = [content_hash(image) for image in items.images]
  first = cached_features(mean_trunk(), items.keys, items, cache_dir=tmp_path, hashes=hashes)
  items.reads.clear()
  second = cached_features(mean_trunk(), items.keys, items, cache_dir=tmp_path, hashes=hashes)
  assert items.reads == []
  np.testing.assert_array_equal(first, second)
  cached_features(mean_trunk(), items.keys, items, cache_dir=tmp_path)
  assert sorted(items.reads) == list(range(9)), "without hashes each item is read once, to be hashed"


def test_views_are_augmented_by_key_and_seed_alone(tmp_path):
  items, augment = Items(7), Brighter()
  out = cached_features(mean_trunk(), items.keys, items, cache_dir=tmp_path, views=3, augment=augment, seed=5)
  assert out.shape == (7, 3, 2, 3)
  np.testing.assert_allclose(out[:, 0], expected(items.images), rtol=1e-3)
  added = (out[:, 1:, 0] - out[:, :1, 0]).astype(np.float32)
  np.testing.assert_allclose(added, np.round(added.mean(-1, keepdims=True)).repeat(3, -1), atol=0.2)
  assert added.min() > 0.8 and len(np.unique(np.round(added))) > 3
  part = cached_features(mean_trunk(), items.keys[4:], lambda i: items.images[4 + i], cache_dir=tmp_path, views=3,
                         augment=augment, seed=5, batch=5)  # fmt: skip
  np.testing.assert_array_equal(part, out[4:])
  other = cached_features(mean_trunk(), items.keys, items, cache_dir=tmp_path, views=3, augment=augment, seed=6)
  np.testing.assert_array_equal(other[:, 0], out[:, 0])
  assert (other[:, 1:] != out[:, 1:]).any()


def test_the_key_follows_everything_that_decides_the_values(tmp_path):
  items = Items(4)
  changed = items.images.copy()
  changed[2, 0, 0, 0] += 1
  calls = [
    dict(),
    dict(trunk=mean_trunk("weights 2", 2.0)),
    dict(read=lambda index: changed[index]),
    dict(keys=[f"other {key}" for key in items.keys]),
    dict(views=2, augment=Brighter(1.0)),
    dict(views=2, augment=Brighter(2.0)),
    dict(views=3, augment=Brighter(1.0)),
    dict(views=2, augment=Brighter(1.0), seed=1),
  ]
  for count, call in enumerate(calls, 1):
    arguments = dict(trunk=mean_trunk(), keys=items.keys, read=items) | call
    out = cached_features(**arguments, cache_dir=tmp_path)
    assert len([entry for entry in tmp_path.iterdir() if entry.is_dir()]) == count, call
  np.testing.assert_allclose(cached_features(mean_trunk("weights 2"), items.keys, items, cache_dir=tmp_path)[:, 0],
                             2 * expected(items.images), rtol=1e-3)  # fmt: skip
  again = cached_features(mean_trunk(), items.keys, items, cache_dir=tmp_path, seed=9, batch=3)
  assert len([entry for entry in tmp_path.iterdir() if entry.is_dir()]) == len(calls), (
    "batch and an unused seed do not count"
  )
  assert out.shape[1] == 2 and again.shape[1] == 1


def test_texts(tmp_path):
  trunk, texts = tiny_text_trunk(), ["a cat", "an icon of a very long dog", "owl"]
  out = cached_features(trunk, texts, texts.__getitem__, cache_dir=tmp_path, batch=2)
  assert out.shape == (3, 1, 1, 16)
  alone = trunk.compiled(trunk.params, trunk.collate([trunk.preprocess("owl")]))
  np.testing.assert_allclose(out[2, 0], alone[0], atol=1e-3)


def test_content_hash_tells_values_types_and_shapes_apart(tmp_path):
  path = tmp_path / "a"
  path.write_bytes(b"abc")
  image = np.arange(6, dtype=np.uint8)
  values = [image, image.reshape(2, 3), image.reshape(3, 2), image.astype(np.int8), image + 1, "abc", b"abc", "abd"]
  assert len({content_hash(value) for value in values}) == len(values)
  assert content_hash(path) == content_hash(b"abc") and content_hash(image[::-1][::-1]) == content_hash(image)
  with pytest.raises(ValueError, match="content_hash: got object"):
    content_hash(object())


def test_an_interrupted_build_goes_on_from_its_finished_chunks(tmp_path):
  items = Items(20)
  hashes = [content_hash(image) for image in items.images]

  def failing(index):
    if index == 15:
      raise RuntimeError("the disk is on fire")
    return items(index)

  with pytest.raises(RuntimeError, match="on fire"):
    cached_features(mean_trunk(), items.keys, failing, cache_dir=tmp_path, hashes=hashes)
  assert folder(tmp_path).name.endswith(".part"), "an unfinished set is never under its final name"
  items.reads.clear()
  out = cached_features(mean_trunk(), items.keys, items, cache_dir=tmp_path, hashes=hashes)
  assert sorted(items.reads) == list(range(12, 20)), "two chunks of six were there"
  np.testing.assert_allclose(out[:, 0], expected(items.images), rtol=1e-3)
  assert not folder(tmp_path).name.endswith(".part")


def test_a_killed_process_leaves_nothing_half_written(tmp_path):
  script = textwrap.dedent(f"""
    import sys, time
    import numpy as np
    from codebind_jax.trunks import cache as features
    from tests.test_features import Items, content_hash, mean_trunk
    features._ITEMS_PER_CHUNK = 6
    items = Items(40)
    def slow(index):
      time.sleep(0.02 if index < 18 else 600)
      return items(index)
    hashes = [content_hash(image) for image in items.images]
    features.cached_features(mean_trunk(), items.keys, slow, cache_dir={str(tmp_path)!r}, hashes=hashes)
  """)
  process = subprocess.Popen([sys.executable, "-c", script])
  chunks = lambda: [path for path in tmp_path.glob("*.part/chunks.jsonl") if path.read_text().count("crc32") >= 3]
  for _ in range(3000):
    if chunks() or process.poll() is not None:
      break
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert chunks(), "the process was killed while it worked"
  with open(folder(tmp_path) / "chunks.jsonl", "a") as log:
    log.write('{"start": 18, "sto')
  items = Items(40)
  hashes = [content_hash(image) for image in items.images]
  out = cached_features(mean_trunk(), items.keys, items, cache_dir=tmp_path, hashes=hashes)
  assert sorted(items.reads) == list(range(18, 40))
  np.testing.assert_allclose(out[:, 0], expected(items.images), rtol=1e-3)


@pytest.mark.parametrize("damage", ["a byte", "cut short", "no array", "no list", "a wrong header"])
def test_a_damaged_set_is_found_and_mended(tmp_path, damage, caplog):
  items = Items(20)
  hashes = [content_hash(image) for image in items.images]
  build = lambda: cached_features(mean_trunk(), items.keys, items, cache_dir=tmp_path, hashes=hashes)
  good = np.array(build())
  path, items.reads[:] = folder(tmp_path) / "features.npy", []
  data = bytearray(path.read_bytes())
  if damage == "a byte":
    data[-13 * 12 - 1] ^= 1
    path.write_bytes(data)
  elif damage == "cut short":
    path.write_bytes(data[:-40])
  elif damage == "no array":
    path.unlink()
  elif damage == "no list":
    (path.parent / "chunks.jsonl").unlink()
  else:
    np.save(path, np.zeros((20, 1, 2, 4), np.float16))
  with caplog.at_level("WARNING"):
    out = build()
  np.testing.assert_array_equal(out, good)
  assert "is damaged, computing" in caplog.text
  bad = {"a byte": range(6, 12), "cut short": range(12, 20)}.get(damage, range(20))
  assert sorted(items.reads) == list(bad), "chunks that are whole are kept"
  assert not list(tmp_path.glob("*.part"))


def test_chunks_are_recorded_with_checksums(tmp_path):
  items = Items(8)
  cached_features(mean_trunk(), items.keys, items, cache_dir=tmp_path)
  lines = [json.loads(line) for line in (folder(tmp_path) / "chunks.jsonl").read_text().split("\n") if line]
  assert [(line["start"], line["stop"]) for line in lines] == [(0, 6), (6, 8)]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(keys=[]), "keys: got none"),
    (dict(keys=["a", "b", "a"]), "'a' appears more than once"),
    (dict(hashes=["x"]), "hashes: got 1 for 3 keys"),
    (dict(views=0), "views: got 0"),
    (dict(views=2), "more need `augment`"),
    (dict(views=2, augment=lambda image, rng: image), "does not say what it does"),
  ],
)
def test_bad_arguments_are_named(tmp_path, change, message):
  items = Items(3)
  with pytest.raises(ValueError, match=message):
    cached_features(**(dict(trunk=mean_trunk(), keys=items.keys, read=items, cache_dir=tmp_path) | change))


@pytest.mark.parametrize("scale", [np.nan, 1e6])
def test_values_that_are_not_finite_are_named(tmp_path, scale):
  items = Items(8)
  items.images[:] = 0
  items.images[5] = 9
  trunk = mean_trunk(bright=scale)
  with pytest.raises(ValueError, match="not finite in float16 for 'item 5'"):
    cached_features(trunk, items.keys, items, cache_dir=tmp_path, batch=1)
  assert all(entry.name.endswith(".part") for entry in tmp_path.iterdir() if entry.is_dir())

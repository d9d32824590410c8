"""Preparation of items in worker processes, which have neither JAX nor Flax: pickled, and equal bit for bit."""

import errno
import io
import pickle
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codebind_jax.data.inputs import Input
from codebind_jax.data.preparation.texts import Ids, text_input, without_punctuation
from codebind_jax.data.ranges import ChangedError
from codebind_jax.trunks import codebind_release, imagebind, load_trunk, minilm, trunk_names, uni3d
from codebind_jax.trunks.families import families
from tests import family_fixtures, processes
from tests.test_imagebind import heads
from tests.test_languagebind import CASES as LANGUAGEBIND
from tests.test_languagebind import folder_of as languagebind_folder
from tests.test_saving_families import CASES

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (4, 40, 50, 3), np.uint8)
# Runs without JAX and Flax: reads pickles of (modality, Input, item), writes batches, and modules that no worker needs.
WORKER = """
import pickle, sys
out, sys.stdout = sys.stdout.buffer, sys.stderr
for name in ("jax", "flax", "torch", "tensorflow"):
  sys.modules[name] = None
made = []
for modality, input, value in map(pickle.loads, pickle.load(sys.stdin.buffer)):
  made.append(input.collate([input.prepare(input.opened(modality, value))]))
loaded = [name for name in sys.modules if name.startswith(("codebind_jax.trunks", "codebind_jax.models"))]
pickle.dump((made, loaded), out)
"""


def npy(array):
  with io.BytesIO() as out:
    np.save(out, array)
    return out.getvalue()


def picture(**options):
  with io.BytesIO() as out:
    first, *rest = map(Image.fromarray, FRAMES)
    first.save(out, options.pop("format", "PNG"), append_images=rest, **options)
    return out.getvalue()


def sound():
  with io.BytesIO() as out:
    with wave.open(out, "wb") as file:
      file.setparams((1, 2, 16_000, 0, "NONE", ""))
      file.writeframes((8000 * np.sin(np.arange(24_000) / 9)).astype(np.int16).tobytes())
    return out.getvalue()


ITEMS = {
  "image": picture(), "tactile": picture(), "text": "A photo of two dogs, & a caf\u00e9.", "audio": sound(),
  "video": picture(format="WEBP", save_all=True, duration=500, lossless=True),
  "depth": npy(RNG.uniform(0.5, 4, (30, 40)).astype(np.float32)),
  "thermal": npy(RNG.uniform(20, 40, (30, 40)).astype(np.float32)),
  "points": npy(RNG.normal(size=(80, 3)).astype(np.float32)),
  "imu": RNG.normal(size=(6, 2000)).astype(np.float32), "vectors": RNG.normal(size=64).astype(np.float32),
}  # fmt: skip


def item_of(modality, shape):
  """An item, raw; recordings of EEG have the shape that the patches or series are made of."""
  if modality != "eeg":
    return ITEMS[modality]
  return npy(np.random.default_rng(1).normal(0, 20, shape if shape[1] == 128 else (10, 91)).astype(np.float32))


def built(folder):
  """"<trunk> <modality>" -> trunk, for all that can be built without a published checkpoint."""
  paths = {name: str(CASES[name](folder / name)) for name in CASES if name not in ("imagebind", "languagebind")}
  sensors = ("image", "depth", "thermal", "tactile")
  options = [
    *((name, {}) for name in ("hashed_words", "vectors", "mlp", "points", "eeg", "eeg_patches")),
    *((name, {"weights": "random"}) for name in ("minilm", "aisfx")),
    ("video_mean", {"weights": "random", "frames": 2}), ("point_views", {"weights": "random", "size": 32}),
    *(("efficientnet_lite0", {"weights": "random", "modality": m, "crop": m == "image"}) for m in sensors),
    *(("imagebind", {"modality": m, "width": 12, "depth": 1, "heads": 2}) for m in (*imagebind.HUGE, "video")),
    ("dino", {"weights": str(family_fixtures.unpack("dino_v2", folder / "dino_v2"))}),
  ]  # fmt: skip
  for name in sorted((families().keys() & paths.keys()) - {"codebind_release"}):
    options += [(name, {"weights": paths[name], "modality": m}) for m in families()[name].modalities(Path(paths[name]))]
  release = paths["codebind_release"]
  options += [("codebind_release", {"weights": release, "modality": m, "heads": heads(m)})
              for m in codebind_release.modalities(Path(release))]  # fmt: skip
  arrays = family_fixtures.arrays("languagebind")
  bound = {m: languagebind_folder(arrays, folder / f"languagebind_{m}", m) for m in LANGUAGEBIND}
  options += [("languagebind", {"weights": path, "modality": m}) for m, path in bound.items()]
  options.append(("languagebind", {"weights": bound["image"], "modality": "text"}))
  made = [(load_trunk(name, **own), "2" if "dino_v2" in str(own) else "") for name, own in options]
  return {f"{trunk.name}{suffix} {trunk.modality}": trunk for trunk, suffix in made}


@pytest.fixture(scope="module")
def trunks(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(uni3d.HEADS, 24, 2)
    return built(tmp_path_factory.mktemp("inputs"))


def test_every_trunk_is_among_them(trunks):
  assert {name.split()[0] for name in trunks} - {"dino2"} == set(trunk_names())
  assert {trunk.modality for trunk in trunks.values()} >= {"image", "text", "audio", "video", "depth", "points", "eeg"}


def test_items_are_prepared_without_jax_as_they_are_with_it(trunks):
  """Each input is pickled by itself, as a worker gets it; classes of the tests, JAX or Flax would be missed there."""
  jobs = [(trunk.modality, trunk.input, item_of(trunk.modality, trunk.input.shape)) for trunk in trunks.values()]
  pickled = pickle.dumps([pickle.dumps(job) for job in jobs])
  done = subprocess.run([sys.executable, "-W", "error", "-c", WORKER], input=pickled, capture_output=True,
                        cwd=processes.REPOSITORY, env=processes.environment(1))  # fmt: skip
  assert done.returncode == 0, done.stderr.decode()
  made, loaded = pickle.loads(done.stdout)
  assert len(made) == len(jobs) and loaded == []
  for name, (modality, found, value), there in zip(trunks, jobs, made):
    prepared = found.prepare(found.opened(modality, value))
    assert prepared.shape == found.shape and prepared.dtype == found.dtype, name
    here = found.collate([prepared])
    assert here.dtype == there.dtype, name
    np.testing.assert_array_equal(here, there, err_msg=name)
    assert np.ptp(here) > 0, name


def test_a_revision_names_what_cleans_texts_as_before_it_moved(trunks):
  """The keys of features in users' caches hold it, and the fingerprints in saved models."""
  for name, cleaned in (("clip", ""), ("imagebind", "codebind_jax.trunks.clip_tokenizer.clean ")):
    ids = trunks[f"{name} text"].input.prepare
    start = f"text-1 {ids.length} {ids.pad_id} {ids.lower} {ids.left} {cleaned}{{"
    assert trunks[f"{name} text"].input.revision.startswith(start)
  ids = Ids(minilm.letter_tokenizer(), 8, 0, clean=without_punctuation)
  assert text_input(ids).revision.startswith('text-1 8 0 False False codebind_jax.trunks.tokens.without_punctuation {"')


def test_paths_and_bytes_are_opened_and_nothing_else(tmp_path):
  plain = Input((2,), "float32", np.asarray)
  own = Input((2,), "float32", np.asarray, read=lambda value: [type(value).__name__])
  path = tmp_path / "depth.npy"
  path.write_bytes(ITEMS["depth"])
  for value in (path, str(path), ITEMS["depth"]):
    np.testing.assert_array_equal(plain.opened("depth", value), np.load(path))
    assert own.opened("depth", value) == [type(value).__name__]
  array = np.zeros(2)
  assert plain.opened("depth", array) is array and own.opened("depth", array) is array
  assert plain.opened("text", str(path)) == own.opened("text", str(path)) == str(path)


def test_what_cannot_be_opened_is_a_value_error():
  def read(value):
    raise PermissionError(13, "Permission denied", value)

  with pytest.raises(ValueError, match=r"Permission denied: 'a.npy'"):
    Input((2,), "float32", np.asarray, read=read).opened("depth", "a.npy")
  with pytest.raises(ValueError, match=r"'smell' is not read from files; allowed: \['audio', 'depth'"):
    Input((2,), "float32", np.asarray).opened("smell", b"")


class Struct(Exception):
  """What a package raises for a damaged file."""


@pytest.mark.parametrize("raised, kept", [
  (Struct("bad magic"), False), (OSError("truncated"), False), (RecursionError("deep"), False),
  (OSError(errno.EIO, "disk"), True), (MemoryError(), True), (ImportError("av"), True), (ChangedError("a.tar"), True),
])  # fmt: skip
def test_what_a_reader_raises_is_a_bad_item_unless_it_is_the_machines(tmp_path, raised, kept):
  def fail(value):
    raise raised

  item = Input((1,), "float32", fail, read=fail)
  for work in (lambda: item.opened("image", tmp_path), lambda: item.prepared("image", np.zeros(3))):
    with pytest.raises(type(raised) if kept else ValueError) as caught:
      work()
    assert kept or str(raised.args[0]) in str(caught.value)

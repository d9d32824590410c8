"""tfds:NAME: sets prepared as ArrayRecord read back; nothing is downloaded."""

import io
import pathlib
import pickle
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from codebind_jax.data import opening
from codebind_jax.data.formats import tfds as format_tfds
from codebind_jax.data.index import id_hash
from tests.world_fixtures import png

tfds = pytest.importorskip("tensorflow_datasets")


class Tiny(tfds.core.GeneratorBasedBuilder):
  """Five and two records, without what needs TensorFlow to be written."""

  url_infos = {}  # finding those of a set that is no module of tfds needs a package more
  pkg_dir_path = pathlib.Path(__file__).parent
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict({
      "image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(names=["cat", "dog"]),
      "caption": tfds.features.Text(), "depth": tfds.features.Tensor(shape=(2, 2), dtype=np.float32),
      "words": tfds.features.Text()})  # fmt: skip
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {"train": self._records(5), "validation": self._records(2), "odd": self._records(1)}

  def _records(self, count):
    for i in range(count):
      depth = np.full((2, 2), i + 1, np.float32)
      yield i, {"image": io.BytesIO(png((i, 0, 0))), "label": i % 2, "caption": f"c{i}", "depth": depth, "words": "ü"}

  def _generate_examples(self):
    pass


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  root = tmp_path_factory.mktemp("tfds")
  Tiny(data_dir=root, file_format="array_record").download_and_prepare()
  return root


def open_source(name, root, **options):
  return opening.open_source(name, root=str(root), check="all", **options)


def test_records_read_back(prepared, caplog):
  caplog.set_level("INFO", "absl")
  source = pickle.loads(pickle.dumps(open_source("tfds:tiny", prepared)))
  assert len(source) == 7 and source.modalities == ("image", "text", "depth")
  assert np.bincount(source.index.split + 1).tolist() == [0, 5, 2] and source.index.labels == ("cat", "dog")
  assert "tfds:tiny: splits that are not used, kept aside: odd" in caplog.text
  with ThreadPoolExecutor(8) as pool:
    rows = list(pool.map(source.__getitem__, list(range(7)) * 5))
  for row in rows:
    i = int(row["text"][0][1:])
    assert row["image"][0, 0].tolist() == [i, 0, 0] and row["depth"][0, 0] == i + 1
    assert row["label"] == ("cat", "dog")[i % 2] and row["words"] == "ü"
  assert sorted(row["text"][0] for row in rows[:5]) == [f"c{i}" for i in range(5)]
  assert isinstance(source.read(0, "image"), bytes) and source.where(0) == "tfds:tiny/train: record 0"
  assert source.index.ids.tolist() == [id_hash(name) for name in source.column("id")]
  assert source.content_hash(0, "image") != source.content_hash(1, "image")
  assert source.content_hash(0, "depth") != source.content_hash(0, "text") != source.content_hash(1, "text")


def test_features_that_are_called_otherwise(prepared):
  source = open_source("tfds:tiny", prepared, columns={"text": "words"})
  assert source.fields(0)["text"] == ["ü"]
  with pytest.raises(ValueError, match="tfds:tiny: no column 'smell' for 'image'; it has"):
    open_source("tfds:tiny", prepared, columns={"image": "smell"})
  assert len(opening.open_source(f"tfds:{prepared}/tiny/1.0.0", split="val")) == 2


def test_sets_that_are_not_there(prepared, tmp_path):
  with pytest.raises(ValueError, match="tfds:nowhere: Dataset nowhere not found"):
    open_source("tfds:nowhere", prepared)
  with pytest.raises(ValueError, match="tfds:mnist: is not prepared in .*array_record"):
    open_source("tfds:mnist", tmp_path)


def test_sounds_are_brought_to_their_rate(monkeypatch):
  """What TensorFlow would read: int64 samples at the feature's rate."""
  source = object.__new__(format_tfds.TfdsSource)
  samples = (8000 * np.sin(np.arange(22_050) * 2 * np.pi * 441 / 22_050)).astype(np.int64)
  feature = types.SimpleNamespace(sample_rate=22_050)
  source.name, source._places = "x", np.zeros((1, 2), np.int64)
  monkeypatch.setattr(source, "_example", lambda number: ({"audio": samples}, {"audio": feature}), raising=False)
  sound = source._read(0, "audio")
  assert len(sound) == 44_100 and sound.dtype == np.float32
  assert np.abs(sound[1000:-1000:2] - samples[500:-500] / 32768).max() < 1e-3

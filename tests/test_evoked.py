"""World "Evoked": its split, a toy recording built whole, and the real one (slow)."""

import collections
import json

import numpy as np
import pytest

from codebind_jax.data.opening import open_source
from codebind_jax.data.worlds import evoked, fetch, names, registry
from codebind_jax.trunks import eeg_patches
from tests.world_fixtures import recording


def test_rule_6_the_split_is_chronological():
  epochs = names.table("eeg")["epochs"]
  assert collections.Counter(e["split"] for e in epochs) == {"train": 173, "val": 29, "test": 86}
  assert [e["label"] for e in epochs] == list(range(288))
  last = {split: max(e["label"] for e in epochs if e["split"] == split) for split in ("train", "val")}
  first = {split: min(e["label"] for e in epochs if e["split"] == split) for split in ("val", "test")}
  assert last["train"] < first["val"] and last["val"] < first["test"]


def test_rule_7_standardisation_knows_training_epochs_alone():
  rng = np.random.default_rng(0)
  train = rng.normal(3.0, 2.0, (9, 2, 10))
  found = eeg_patches.statistics(train, 5)
  cut = train.reshape(9, 2, 2, 5).mean(axis=3).transpose(0, 2, 1)
  np.testing.assert_allclose(found["mean"], cut.mean(axis=0))
  np.testing.assert_allclose(found["deviation"], cut.std(axis=0))


def test_eval_sets_ask_for_the_stimulus_and_for_the_sense():
  sets = evoked.eval_sets("tiny")
  assert len(sets["test_condition"].candidates) == 4 and sets["val_condition"].role == "val"
  assert sets["test_sense"].candidates == ("a tone", "a checkerboard") and sets["test_sense"].split == "test_sense"
  with pytest.raises(ValueError, match="unknown profile 'big' of world 'evoked'"):
    evoked.eval_sets("big")


def test_stimuli_fill_their_half():
  left, right = (evoked.checkerboard(side, 96) for side in ("left", "right"))
  assert set(np.unique(left[:, :48])) == {0, 255} and (left[:, 48:] == 128).all()
  assert set(np.unique(right[:, 48:])) == {0, 255} and (right[:, :48] == 128).all()
  assert left[0, 0, 0] != left[0, 8, 0] and left[0, 0, 0] != left[8, 0, 0]
  tone = evoked.tone("right")
  assert not tone[:, 0].any() and tone[:, 1].max() > 0.45


@pytest.fixture
def toy(tmp_path, monkeypatch):
  table, one = recording(tmp_path)
  monkeypatch.setattr(names, "table", lambda name: table)
  monkeypatch.setattr(fetch, "packages", lambda: {"neurokit2": one})
  return tmp_path, table


def test_toy_world_is_built_whole(toy):
  root, _ = toy
  folder = registry.ensure("evoked", "small", root)
  assert json.loads((folder / "manifest.json").read_text())["splits"] == {
    "train": 2, "val": 2, "test": 2, "val_sense": 2, "test_sense": 2
  }
  read = lambda split: open_source("world:evoked", profile="small", split=split, data_dir=str(root))
  rows = {row["id"]: row for row in read("train")}
  first, second = rows["evoked:000"], rows["evoked:001"]
  np.testing.assert_allclose(second["eeg"], [[1, 2, 3, 4], [0, -1, -2, -3]], rtol=1e-6)  # microvolts
  assert first["text"] == ["a tone in the left ear", "a tone"] and first["label"] == "a tone in the left ear"
  assert first["has"] == ["eeg", "audio"] and second["has"] == ["eeg", "image"]
  assert first["audio"].shape == (22050,) and second["image"].shape == (192, 192, 3)
  assert (first["condition"], first["sense"], first["side"]) == ("audio/left", "audio", "left")
  sense = {row["id"]: row for row in read("test_sense")}
  assert sense["evoked:004"]["label"] == "a tone" and sense["evoked:004"]["text"][0] == "a tone"
  np.testing.assert_array_equal(sense["evoked:005"]["eeg"], {r["id"]: r["eeg"] for r in read("test")}["evoked:005"])


def test_another_recording_is_an_error(toy):
  root, table = toy
  table["sha1"] = "0" * 40
  with pytest.raises(ValueError, match="data.csv: expected SHA-1 0000"):
    registry.ensure("evoked", "small", root)
  table["inner"] = "other.csv"
  with pytest.raises(ValueError, match=r"other\.csv is not in it"):
    registry.ensure("evoked", "small", root)


@pytest.mark.slow
def test_real_world_and_the_shipped_statistics():
  source = open_source("world:evoked", profile="tiny", split="train")
  epochs = np.stack([source.read(i, "eeg") for i in range(len(source))])
  assert epochs.shape == (173, 10, 91) and 140 < np.abs(epochs).max() < 148
  mean, deviation = eeg_patches._read_statistics("evoked")
  found = eeg_patches.statistics(epochs, 5)
  np.testing.assert_allclose(found["mean"], mean, atol=1e-3)
  np.testing.assert_allclose(found["deviation"], deviation, atol=1e-3)

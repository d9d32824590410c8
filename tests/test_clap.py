"""CLAP in Hugging Face layout: against transformers, on tiny weights; names and shapes of the official models."""

import json

import numpy as np
import pytest
import soundfile
import tokenizers
from safetensors.numpy import save_file

from codebind_jax.data.preparation import spectrograms
from codebind_jax.data.preparation.audio import Mel
from codebind_jax.models import swin
from codebind_jax.trunks import clap
from tests import family_fixtures

WANT = family_fixtures.arrays("clap_hf")
SOUNDS = [WANT[f"sound{i}"].astype(np.float32) / 32768 for i in range(3)]
TEXTS = [str(text) for text in WANT["texts"]]
OFFICIAL = family_fixtures.official("clap")


@pytest.fixture
def folder(tmp_path):
  return family_fixtures.unpack("clap_hf", tmp_path / "clap")


def trunk_of(folder, modality, **options):
  return clap.make_trunk(weights=str(folder), modality=modality, **options)


def error(path, modality="audio"):
  with pytest.raises(ValueError) as caught:
    trunk = trunk_of(path, modality)
    assert trunk.params and trunk.head_params
  return str(caught.value)


def test_audio_is_that_of_transformers(folder):
  trunk = trunk_of(folder, "audio")
  mel = trunk.collate([trunk.preprocess(samples) for samples in SOUNDS])
  np.testing.assert_allclose(mel, WANT["mel"], atol=1e-4)
  np.testing.assert_allclose(trunk.embed(WANT["mel"]), WANT["audio_embeds"], atol=2e-6)
  np.testing.assert_allclose(trunk.embed(mel), WANT["audio_embeds"], atol=2e-6)
  assert trunk.head.logit_scale == pytest.approx(WANT["scales"][0]) and trunk.input.shape == (201, 16)
  clips = np.asarray(trunk.embed(WANT["mel"][None]))  # three clips of one item
  mean = WANT["audio_embeds"].mean(axis=0)
  np.testing.assert_allclose(clips[0], mean, atol=2e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_text_is_that_of_transformers(folder, scan):
  trunk = trunk_of(folder, "text", scan=scan)
  ids = [trunk.preprocess(text) for text in TEXTS]
  np.testing.assert_array_equal(np.stack(ids), WANT["ids"])
  np.testing.assert_allclose(trunk.embed(trunk.collate(ids)), WANT["text_embeds"], atol=2e-6)
  # Padding is masked and has no positions: a shorter batch gives the same.
  assert trunk.collate(ids[2:3]).shape == (1, 8)
  np.testing.assert_allclose(trunk.embed(trunk.collate(ids[2:3])), WANT["text_embeds"][2:3], atol=2e-6)
  assert trunk.head.logit_scale == pytest.approx(WANT["scales"][1])


def test_remat_changes_nothing_and_bfloat16_little(folder):
  trunk = trunk_of(folder, "audio", remat=True)
  np.testing.assert_allclose(trunk.embed(WANT["mel"]), WANT["audio_embeds"], atol=2e-6)
  low = trunk_of(folder, "audio", dtype="bfloat16").embed(WANT["mel"])
  assert np.sum(np.asarray(low) * WANT["audio_embeds"], axis=1).min() > 0.999


def test_official_settings_of_the_spectrogram():
  mel = Mel()(WANT["long"].astype(np.float32) / 32768)
  assert mel.shape == Mel().shape == (1001, 64)
  np.testing.assert_allclose(mel[::7], WANT["long_mel"], atol=1e-4)


@pytest.mark.parametrize("padding, times", [("repeatpad", 4), ("repeat", 4.35), ("pad", 1)])
def test_short_sounds_are_repeated_as_the_folder_says(folder, padding, times):
  family_fixtures.change_json(folder / "preprocessor_config.json", padding=padding)
  mel = trunk_of(folder, "audio").preprocess(SOUNDS[0])
  assert (mel[: int(200 * min(times * 0.23, 1)) - 30].max(axis=1) > -60).any()
  whole = np.zeros(8000, np.float32)
  n = min(int(times * 1840 + 0.5), 8000)
  whole[:n] = np.tile(SOUNDS[0], 5)[:n]
  want = spectrograms.decibel_mel(whole, 8000, window=256, hop=40, bands=16, low=50.0, high=3500.0)
  np.testing.assert_array_equal(mel, want)


def test_files_are_read_at_the_checkpoints_own_rate(folder, tmp_path):
  trunk = trunk_of(folder, "audio")
  soundfile.write(tmp_path / "a.wav", np.stack([SOUNDS[1], SOUNDS[1]], axis=1), 8000, subtype="PCM_16")
  read = trunk.read(tmp_path / "a.wav")
  np.testing.assert_allclose(read, SOUNDS[1], atol=1e-4)
  assert trunk.read(np.zeros(44_100, np.float32)).shape == (8000,)


def test_windows():
  index = swin.relative_index(2)
  assert index.tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
  mask = swin.shifted_mask(4, 4, 2, 1)
  assert mask.shape == (4, 4, 4) and mask[0].all() and mask[3].sum() == 4  # the last window has four corners


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_array_of_the_official_models_is_accounted_for(tmp_path, monkeypatch, name):
  model = OFFICIAL[name]
  for file, content in model["files"].items():
    (tmp_path / file).write_text(json.dumps(content))
  marks = {"<s>": 0, "<pad>": 1, "</s>": 2, "a": 4}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(marks, "<pad>"))
  made.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
  made.save(str(tmp_path / "tokenizer.json"))
  weights = family_fixtures.zeros(model["shapes"], tmp_path / "config.json")
  monkeypatch.setattr(clap, "folder_weights", lambda path: weights)
  for modality, shape in (("audio", (1001, 64)), ("text", (512,))):
    trunk = trunk_of(tmp_path, modality, scan=True)
    family_fixtures.load_all(trunk)
    assert trunk.input.shape == shape and trunk.head.module.width == 512


def test_bad_folders_are_refused_by_name(folder, tmp_path):
  assert "no such path" in error(tmp_path / "nowhere")
  assert "no 'image'; it has audio, text" in error(folder, "image")
  kept = family_fixtures.weights_of(folder)
  save_file({n: x for n, x in kept.items() if not n.startswith("audio")}, folder / "model.safetensors")
  assert "no 'audio'; it has text" in error(folder)
  (folder / "model.safetensors").unlink()
  assert "no weights" in error(folder)
  family_fixtures.change_json(folder / "config.json", audio_config={"enable_fusion": True})
  assert "config.json: CLAP with feature fusion" in error(folder)
  family_fixtures.change_json(folder / "config.json", model_type="clip")
  assert "'clip'" in error(folder) and not clap.recognises(folder)


def test_settings_that_do_not_fit(folder):
  family_fixtures.change_json(folder / "preprocessor_config.json", feature_size=32)
  assert "preprocessor_config.json: gives spectrograms of (201, 32)" in error(folder)
  family_fixtures.change_json(folder / "preprocessor_config.json", truncation="fusion")
  assert "truncation 'fusion'" in error(folder)
  family_fixtures.change_json(folder / "config.json", audio_config={"hidden_act": "mish"})
  assert "hidden_act 'mish'" in error(folder)


def test_missing_superfluous_and_misshapen_arrays_are_one_error(folder):
  weights = family_fixtures.weights_of(folder)
  del weights["audio_model.audio_encoder.batch_norm.running_var"]
  weights["audio_model.extra"] = np.zeros(3, np.float32)
  weights["audio_model.audio_encoder.norm.bias"] = np.zeros(31, np.float32)
  save_file(weights, folder / "model.safetensors")
  text = error(folder)
  assert all(part in text for part in (
    "model.safetensors", "missing", "batch_norm", "audio_model.extra", "norm.bias (31,)"))  # fmt: skip


def test_a_tokenizer_that_does_not_fit(folder):
  family_fixtures.change_json(folder / "tokenizer_config.json", eos_token="<stop>")
  assert "end mark '<stop>'" in error(folder, "text")
  family_fixtures.change_json(folder / "tokenizer_config.json", pad_token="<s>")
  assert "padding '<s>' is 0, config.json has 1" in error(folder, "text")
  for name in ("tokenizer.json", "vocab.json", "merges.txt"):
    (folder / name).unlink(missing_ok=True)
  assert "has no tokenizer" in error(folder, "text") and clap.modalities(folder) == ("audio",)

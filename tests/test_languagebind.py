"""LanguageBind's towers against transformers' CLIP with temporal attention and LoRA, its preparation, its names."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from codebind_jax.data.preparation.audio import Sound
from codebind_jax.data.preparation.languagebind import Prepare
from codebind_jax.trunks import languagebind
from tests import family_fixtures
from tests.checkpoint_fixtures import check_names, prefixed, write

LIMIT = 2e-5
CASES = ("image", "depth", "audio", "video")


@pytest.fixture(scope="module")
def made():
  return family_fixtures.arrays("languagebind")


def folder_of(made, path, case, arrays=None, **vision):
  config = json.loads(str(made[f"{case}/config"]))
  config["vision_config"] |= vision
  return str(write(path, prefixed(made, f"{case}/weights/") if arrays is None else arrays, config=config))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_embeddings_equal_the_reference(made, tmp_path, case, scan):
  folder = folder_of(made, tmp_path, case)
  assert languagebind.recognises(tmp_path) and languagebind.modalities(tmp_path) == (case, "text")
  trunk = languagebind.make_trunk(weights=folder, scan=scan)
  assert trunk.modality == case
  assert np.abs(trunk.embed(made[f"{case}/pixels"]) - made[f"{case}/made"]).max() < LIMIT
  if case == "video":
    assert trunk.num_tokens == 1 + 3 * 4 and trunk.input.shape == (3, 16, 16, 3)


def test_texts_equal_transformers(made, tmp_path):
  trunk = languagebind.make_trunk(weights=folder_of(made, tmp_path, "image"), modality="text")
  assert np.abs(trunk.embed(made["ids"].astype(np.int32)) - made["text"]).max() < LIMIT
  assert trunk.preprocess("A dog").tolist() == [49406, 320, 1929, 49407] + [0] * 8  # padding is never attended to


def test_lora_that_is_merged_or_under_newer_names_is_the_same(made, tmp_path):
  arrays = prefixed(made, "depth/weights/")
  rename = lambda n: n.replace("_proj.weight", "_proj.base_layer.weight") if "base_model" in n else n
  newer = {rename(name): value for name, value in arrays.items()}
  there = languagebind.merged(family_weights(arrays, tmp_path / "lora"), 16.0)
  plain = {name: entry.read() for name, entry in there.items()}
  assert not any("lora" in name or "base" in name for name in plain)
  for name, changed in (("newer", newer), ("plain", plain)):
    trunk = languagebind.make_trunk(weights=folder_of(made, tmp_path / name, "depth", changed))
    assert np.abs(trunk.embed(made["depth/pixels"]) - made["depth/made"]).max() < LIMIT
  lost = {n: v for n, v in arrays.items() if not n.endswith("layers.1.self_attn.q_proj.lora_B.default.weight")}
  with pytest.raises(ValueError, match="model.safetensors: .*1.self_attn.q_proj needs weight, lora_A and lora_B"):
    languagebind.make_trunk(weights=folder_of(made, tmp_path / "lost", "depth", lost))


def family_weights(arrays, folder):
  return languagebind.folder_weights(write(folder, arrays))


def test_the_scale_of_lora_and_the_mean_over_frames_are_seen(made, tmp_path):
  trunk = languagebind.make_trunk(weights=folder_of(made, tmp_path / "lora", "depth", lora_alpha=8))
  assert np.abs(trunk.embed(made["depth/pixels"]) - made["depth/made"]).max() > 50 * LIMIT
  trunk = languagebind.make_trunk(weights=folder_of(made, tmp_path / "video", "video"))
  turned = trunk.embed(made["video/pixels"][:, ::-1])  # frames have embeddings: their order matters
  assert np.abs(turned - made["video/made"]).max() > 50 * LIMIT
  with pytest.raises(ValueError, match=r"video: shape \(2, 2, 16, 16, 3\), allowed \[b, 3 frames"):
    trunk.embed(made["video/pixels"][:, :2])


def test_bfloat16_is_close(made, tmp_path):
  trunk = languagebind.make_trunk(weights=folder_of(made, tmp_path, "video"), dtype="bfloat16", remat=True, scan=True)
  assert (trunk.embed(made["video/pixels"]) * made["video/made"]).sum(-1).min() > 0.99


@pytest.mark.parametrize("smooth", [False, True])
def test_pictures_and_depth_are_prepared_as_with_torchvision(made, smooth):
  for i in range(3):
    prepare = Prepare("image", (16, 16), antialias=smooth)
    np.testing.assert_allclose(prepare(made[f"picture{i}"]), made[f"picture_made{i}/{smooth}"], atol=1e-5)
    thermal = Prepare("thermal", (16, 16), antialias=smooth)
    np.testing.assert_array_equal(thermal(made[f"picture{i}"]), prepare(made[f"picture{i}"]))
    np.testing.assert_array_equal(thermal(made[f"picture{i}"][..., 0])[..., 0], prepare(made[f"picture{i}"])[..., 0])
    for farthest in (10.0, 0.0):
      prepare = Prepare("depth", (16, 16), farthest=farthest, antialias=smooth)
      wanted = made[f"depth_made{i}/{smooth}/{farthest:g}"]
      np.testing.assert_allclose(prepare(made[f"depth{i}"]), wanted, atol=2e-5)


def test_videos_are_prepared_as_with_torch(made):
  prepare = Prepare("video", (16, 16), frames=3)
  np.testing.assert_allclose(prepare(made["video"]), made["video_made"], atol=1e-5)
  frames = [Image.fromarray(np.full((20, 24, 3), 40 * i, np.uint8)) for i in range(5)]
  with io.BytesIO() as film:  # with a rate: frames of the whole film, whatever its length
    frames[0].save(film, "WEBP", save_all=True, append_images=frames[1:], duration=500, lossless=True)
    assert prepare.read(film.getvalue())[:, 0, 0, 0].tolist() == [0, 80, 160]


@pytest.mark.parametrize("name", ["short", "long", "exact"])
def test_sounds_are_prepared_as_with_kaldis_filter_bank(made, name):
  prepare = Prepare("audio", (16, 40), mean=-4.5, std=4.5)
  sound = Sound((made[f"sound_{name}"][:, None] / 32768).astype(np.float32), 16_000)
  np.testing.assert_allclose(prepare(sound), made[f"sound_made_{name}"], atol=1e-4)
  slightly = Sound(np.concatenate([sound.samples[:6400], sound.samples[:1]]), 16_000)  # too long for one, not for two
  assert name == "short" or np.isfinite(prepare(slightly)).all()


def test_names_and_shapes_of_every_official_tower(tmp_path, monkeypatch):
  for name, model in family_fixtures.official("languagebind").items():
    shapes = model["shapes"]
    folder = write(tmp_path / name, {}, config=model["files"]["config.json"])
    zeros = family_fixtures.zeros(shapes, folder / "model.safetensors")
    monkeypatch.setattr(languagebind, "folder_weights", lambda path, zeros=zeros: zeros)
    for modality in languagebind.modalities(folder):
      trunk = languagebind.make_trunk(weights=str(folder), modality=modality, scan=True)
      check_names(trunk)
      wanted = {"audio": (112, 1036, 3), "video": (8, 224, 224, 3), "text": (77,)}.get(modality, (224, 224, 3))
      assert trunk.input.shape == wanted


def test_bad_folders_are_refused(made, tmp_path):
  with pytest.raises(ValueError, match="no such path"):
    languagebind.make_trunk(weights=str(tmp_path / "nowhere"))
  write(tmp_path / "other", {"a": np.zeros(2)}, config={"model_type": "clip"})
  assert not languagebind.recognises(tmp_path / "other")
  with pytest.raises(ValueError, match="not a folder of LanguageBind: config.json has model_type 'clip'"):
    languagebind.make_trunk(weights=str(tmp_path / "other"))
  folder = folder_of(made, tmp_path / "video", "video")
  with pytest.raises(ValueError, match="has no 'depth'; it has video, text"):
    languagebind.make_trunk(weights=folder, modality="depth")
  arrays = prefixed(made, "video/weights/")
  start = "vision_model.encoder.base_model.model.layers.0."
  arrays[f"{start}strange"] = arrays.pop(f"{start}temporal_embedding")
  with pytest.raises(ValueError, match=r"missing.*layers.0.temporal_embedding.*superfluous.*layers.0.strange"):
    languagebind.make_trunk(weights=folder_of(made, tmp_path / "strange", "video", arrays)).params
  with pytest.raises(ValueError, match="config.json: hidden_act 'relu'"):
    languagebind.make_trunk(weights=folder_of(made, tmp_path / "relu", "image", hidden_act="relu"))
  with pytest.raises(ValueError, match=r"pictures of \(16, 24\) are not supported"):
    languagebind.make_trunk(weights=folder_of(made, tmp_path / "size", "image", image_size=[16, 24]))

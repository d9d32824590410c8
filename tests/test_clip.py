"""CLIP in Hugging Face layout: against transformers, on tiny weights; names and shapes of the official models."""

import json
import pickle
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from codebind_jax import codebook
from codebind_jax.data import torch_resize
from codebind_jax.data.preparation.pictures import processor_picture
from codebind_jax.trunks import clip
from codebind_jax.trunks.checkpoint_files import open_weights
from tests import family_fixtures

WANT = family_fixtures.arrays("clip_hf")
RAW = {"image": [WANT[f"raw{i}"] for i in range(4)], "text": [str(text) for text in WANT["texts"]]}
IN = {"image": WANT["pixels"], "text": WANT["ids"]}
OFFICIAL = family_fixtures.official("clip")
BOTH = pytest.mark.parametrize("modality", clip.MODALITIES)


@pytest.fixture
def folder(tmp_path):
  return family_fixtures.unpack("clip_hf", tmp_path / "clip")


def prepared(trunk):
  return trunk.collate([trunk.preprocess(trunk.read(item)) for item in RAW[trunk.modality]])


def embedding(folder, modality, **options):
  return np.asarray(clip.make_trunk(weights=str(folder), modality=modality, **options).embed(IN[modality]))


def error(folder, modality="image", **options):
  """Parameters are read where this is called, as a model's are when it is loaded."""
  with pytest.raises(ValueError) as caught:
    trunk = clip.make_trunk(weights=str(folder), modality=modality, **options)
    assert trunk.params and trunk.head_params
  return str(caught.value)


@pytest.mark.parametrize("scan", [False, True])
@BOTH
def test_embeddings_are_those_of_transformers(folder, modality, scan):
  trunk = clip.make_trunk(weights=str(folder), modality=modality, scan=scan)
  np.testing.assert_allclose(trunk.embed(IN[modality]), WANT[f"{modality}_quick_gelu"], atol=2e-6)
  assert trunk.head.logit_scale == pytest.approx(WANT["logit_scale"], rel=1e-6)
  if modality == "image":
    np.testing.assert_allclose(trunk.compiled(trunk.params, IN["image"])[:2], WANT["tokens_quick_gelu"], atol=2e-5)


@BOTH
def test_preparation_of_raw_items_is_that_of_transformers(folder, modality):
  np.testing.assert_array_equal(prepared(clip.make_trunk(weights=str(folder), modality=modality)), IN[modality])


def test_preparation_in_a_processor_config_is_read(folder):
  file = folder / "preprocessor_config.json"
  (folder / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(file.read_text())}))
  file.unlink()
  np.testing.assert_array_equal(prepared(clip.make_trunk(weights=str(folder))), IN["image"])
  (folder / "processor_config.json").unlink()
  assert clip.make_trunk(weights=str(folder)).preprocess(RAW["image"][0]).shape == (32, 32, 3)  # CLIP's usual one


@BOTH
def test_bfloat16_stays_close(folder, modality):
  cosine = np.sum(np.asarray(embedding(folder, modality, dtype="bfloat16")) * WANT[f"{modality}_quick_gelu"], axis=1)
  assert cosine.min() > 0.999


def test_float_pixels_are_taken_as_normalised(folder):
  trunk = clip.make_trunk(weights=str(folder))
  np.testing.assert_allclose(trunk.embed(WANT["normalised"]), WANT["image_quick_gelu"][:1], atol=2e-6)


@BOTH
def test_the_activation_is_the_one_of_config_json(folder, modality):
  family_fixtures.change_json(folder / "config.json", **{
    part: {"hidden_act": "gelu"} for part in ("vision_config", "text_config")})  # fmt: skip
  got = embedding(folder, modality)
  np.testing.assert_allclose(got, WANT[f"{modality}_gelu"], atol=2e-6)
  assert np.abs(got - WANT[f"{modality}_quick_gelu"]).max() > 1e-3


def test_an_activation_that_is_not_known_is_refused(folder):
  family_fixtures.change_json(folder / "config.json", vision_config={"hidden_act": "mish"})
  assert "hidden_act 'mish'" in error(folder)


def test_without_an_activation_it_is_quick_gelu(folder):
  config = json.loads((folder / "config.json").read_text())
  del config["vision_config"]["hidden_act"]
  (folder / "config.json").write_text(json.dumps(config))
  np.testing.assert_allclose(embedding(folder, "image"), WANT["image_quick_gelu"], atol=2e-6)


def test_epsilon_is_the_one_of_config_json(folder):
  assert clip.make_trunk(weights=str(folder)).module.spec.eps == 1e-5
  family_fixtures.change_json(folder / "config.json", vision_config={"layer_norm_eps": 1e-6})
  assert clip.make_trunk(weights=str(folder)).module.spec.eps == 1e-6


def test_end_id_2_of_old_files_means_the_largest_id(folder):
  family_fixtures.change_json(folder / "config.json", text_config={"eos_token_id": 2})
  np.testing.assert_allclose(embedding(folder, "text"), WANT["text_quick_gelu"], atol=2e-6)


def test_padding_with_zero_does_not_move_the_end_mark(folder):
  family_fixtures.change_json(folder / "tokenizer_config.json", pad_token="!")
  ids = prepared(clip.make_trunk(weights=str(folder), modality="text"))
  pad = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("!")
  assert ids[2, -1] == pad != WANT["ids"][2, -1]
  trunk = clip.make_trunk(weights=str(folder), modality="text")
  np.testing.assert_allclose(trunk.embed(ids), WANT["text_quick_gelu"], atol=2e-6)


def test_a_long_text_keeps_its_end_mark(folder):
  ids = prepared(clip.make_trunk(weights=str(folder), modality="text"))
  assert ids.shape == (4, 12) and ids[3, -1] == ids.max() and ids[3, -2] != ids.max()


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("modality, kind", [("image", "clip_vision_model"), ("text", "clip_text_model")])
def test_a_tower_alone(folder, modality, kind, bare):
  tower, part = clip._TOWER[modality], {"image": "vision_config", "text": "text_config"}[modality]
  config = json.loads((folder / "config.json").read_text())[part] | {"model_type": kind}
  (folder / "config.json").write_text(json.dumps(config))
  head = {"image": "visual_projection.weight", "text": "text_projection.weight"}[modality]
  kept = {n: x for n, x in family_fixtures.weights_of(folder).items() if n.startswith(tower) or n == head and not bare}
  save_file({n.removeprefix(f"{tower}." if bare else ""): x for n, x in kept.items()}, folder / "model.safetensors")
  trunk = clip.make_trunk(weights=str(folder), modality=modality)
  assert clip.modalities(folder) == (modality,)
  if bare:  # the embedding is the class token after the last LayerNorm
    assert trunk.embed(IN[modality]).shape == (4, trunk.width) and not trunk.head.module.proj
  else:
    np.testing.assert_allclose(trunk.embed(IN[modality]), WANT[f"{modality}_quick_gelu"], atol=2e-6)


def test_shards_and_bf16(folder):
  weights = family_fixtures.weights_of(folder)
  (folder / "model.safetensors").unlink()
  names = sorted(weights)
  shards = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
  for shard, inside in shards.items():
    save_file({n: weights[n] for n in inside}, folder / shard)
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {n: shard for shard, inside in shards.items() for n in inside}}))
  np.testing.assert_allclose(embedding(folder, "image"), WANT["image_quick_gelu"], atol=2e-6)
  (folder / "b.safetensors").unlink()
  assert "index.json: shards are missing: b.safetensors" in error(folder)
  index.unlink()
  rounded = {n: x.astype(ml_dtypes.bfloat16) if x.dtype == np.float32 else x for n, x in weights.items()}
  save_file(rounded, folder / "model.safetensors")
  assert open_weights(folder / "model.safetensors")["visual_projection.weight"].dtype == ml_dtypes.bfloat16
  low = embedding(folder, "image")
  save_file({n: x.astype(np.float32) if x.dtype.itemsize == 2 else x for n, x in rounded.items()},
            folder / "model.safetensors")  # fmt: skip
  np.testing.assert_array_equal(embedding(folder, "image"), low)
  assert 1e-5 < np.abs(low - WANT["image_quick_gelu"]).max() < 0.05


def test_a_vocabulary_with_merges_gives_the_ids_of_the_tokenizer(folder):
  whole = clip.make_trunk(weights=str(folder), modality="text")
  tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
  (folder / "tokenizer.json").unlink()
  (folder / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
  merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["merges"]]
  (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
  own = clip.make_trunk(weights=str(folder), modality="text")
  for text in [*RAW["text"], "don't  STOP\tnow 12", "caf\u0065\u0301!", "<|endoftext|> inside"]:
    np.testing.assert_array_equal(own.preprocess(text), whole.preprocess(text))
  vocabulary = {word: number for word, number in tokenizer["vocab"].items() if word != "<|endoftext|>"}
  (folder / "vocab.json").write_text(json.dumps(vocabulary))
  assert "vocab.json lacks" in error(folder, "text")


def test_a_torch_file_that_calls_functions_is_refused(folder):
  (folder / "model.safetensors").unlink()
  (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(), protocol=2))
  assert "pytorch_model.bin" in (text := error(folder)) and "print" in text


class Malicious:
  """Unpickles by calling a foreign function."""

  def __reduce__(self):
    return print, ("called",)


def test_a_torch_file_in_half_precision_is_read(folder):
  torch_file = family_fixtures.FOLDER / "clip_hf_vision.bin"
  (folder / "model.safetensors").unlink()
  shutil.copy(torch_file, folder / "pytorch_model.bin")
  assert clip.modalities(folder) == ("image",)
  np.testing.assert_allclose(embedding(folder, "image"), WANT["image_quick_gelu"], atol=1e-3)


@pytest.mark.parametrize("name", OFFICIAL)
@BOTH
def test_every_array_of_the_official_models_is_accounted_for(tmp_path, monkeypatch, name, modality):
  model = OFFICIAL[name]
  for file, content in model["files"].items():
    (tmp_path / file).write_text(json.dumps(content))
  marks = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
  tokenizers.Tokenizer(tokenizers.models.WordLevel(marks)).save(str(tmp_path / "tokenizer.json"))
  weights = family_fixtures.zeros(model["shapes"], tmp_path / "config.json")
  monkeypatch.setattr(clip, "_weights", lambda path: weights)
  trunk = clip.make_trunk(weights=str(tmp_path), modality=modality, scan=True)
  family_fixtures.load_all(trunk)
  assert trunk.head.module.width == model["files"]["config.json"]["projection_dim"]


def test_bad_folders_are_refused_by_name(folder, tmp_path):
  assert "no such path" in error(tmp_path / "nowhere") and "''" in error("")
  assert "no folder" in error(folder / "config.json")
  (tmp_path / "empty").mkdir()
  assert "config.json is missing" in error(tmp_path / "empty")
  assert not clip.recognises(tmp_path / "empty") and not clip.recognises(folder / "config.json")
  family_fixtures.change_json(folder / "config.json", model_type="bert")
  assert "'bert'" in error(folder) and not clip.recognises(folder)
  (folder / "config.json").write_text("{")
  assert "config.json: not JSON" in error(folder) and not clip.recognises(folder)


def test_config_without_weights(folder):
  (folder / "model.safetensors").unlink()
  assert f"{folder}: no weights" in error(folder)


def test_a_modality_that_is_not_there(folder):
  assert "no 'audio'; it has image, text" in error(folder, "audio")
  kept = {n: x for n, x in family_fixtures.weights_of(folder).items() if not n.startswith("vision")}
  save_file(kept, folder / "model.safetensors")
  assert "no 'image'; it has text" in error(folder)


def test_missing_superfluous_and_misshapen_arrays_are_one_error(folder):
  weights = family_fixtures.weights_of(folder)
  del weights["vision_model.pre_layrnorm.weight"]
  weights["vision_model.extra"] = np.zeros(3, np.float32)
  weights["vision_model.embeddings.class_embedding"] = np.zeros(31, np.float32)
  save_file(weights, folder / "model.safetensors")
  text = error(folder)
  assert all(part in text for part in (
    "model.safetensors", "pre_layrnorm.weight", "vision_model.extra", "class_embedding (31,)"))  # fmt: skip


def test_weights_of_another_size(folder):
  family_fixtures.change_json(folder / "config.json", vision_config={"patch_size": 16})
  assert "patch_embedding" in (text := error(folder)) and "position_embedding" in text


def test_cut_short(folder):
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])
  assert "model.safetensors: cut short" in error(folder)
  file.write_bytes(file.read_bytes()[:50])
  assert "model.safetensors" in error(folder)


def test_a_tokenizer_that_lacks_the_end_mark(folder):
  file = folder / "tokenizer.json"
  file.write_text(file.read_text().replace("<|endoftext|>", "<|other|>"))
  assert "<|endoftext|>" in (text := error(folder, "text")) and str(folder) in text
  for name in ("tokenizer.json", "vocab.json", "merges.txt"):
    (folder / name).unlink()
  assert "has no tokenizer" in error(folder, "text")


def test_a_processor_of_another_size(folder):
  family_fixtures.change_json(folder / "preprocessor_config.json", crop_size={"height": 30, "width": 32})
  assert "preprocessor_config.json: gives pictures of (30, 32)" in error(folder)


@pytest.mark.parametrize("resample", [2, 3])
def test_resize_is_torchvisions_bit_for_bit(resample):
  stored = family_fixtures.arrays("torch_resize")
  for i in range(5):
    want = stored[f"resized{i}_{resample}"]
    np.testing.assert_array_equal(torch_resize.resize(stored[f"pixels{i}"], want.shape[:2], resample), want)


def test_the_old_form_of_a_processor():
  old = {"size": 36, "crop_size": 32, "do_center_crop": True, "resample": 3, "do_resize": True}
  new = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
  assert processor_picture(old, (32, 32), "old") == processor_picture(new, (32, 32), "new")


@pytest.mark.parametrize(("width", "codes"), [(5, 16), (5, 64), (10, 64), (20, 256)])
def test_bfloat16_picks_the_codes_that_float32_picks(folder, width, codes):
  rng = np.random.default_rng(0)
  pictures = np.kron(rng.integers(0, 256, (256, 4, 4, 3), dtype=np.uint8), np.ones((1, 8, 8, 1), np.uint8))
  found = []
  for dtype in ("", "bfloat16"):
    segments = np.asarray(clip.make_trunk(weights=str(folder), dtype=dtype).embed(pictures)).reshape(-1, width)
    found.append(segments / np.linalg.norm(segments, axis=-1, keepdims=True))
  means, _ = codebook.kmeans(jax.random.key(0), jnp.asarray(found[0]), codes)
  whole, half = (np.asarray(codebook.nearest_code(jnp.asarray(segments), means)) for segments in found)
  assert np.mean(whole == half) >= 0.99

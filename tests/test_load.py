"""What `codebind_jax.load` refuses, with the file and what is wrong; `embed` and `combine` of what it gives."""

import io
import json
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

import codebind_jax
from codebind_jax.runtime.checkpoint import Checkpoints, Position
from codebind_jax.trunks.families import families
from tests import family_fixtures

WANT = family_fixtures.arrays("clip_hf")
RAW = {"image": [WANT[f"raw{i}"] for i in range(4)], "text": [str(text) for text in WANT["texts"]]}


@pytest.fixture
def clip(tmp_path):
  return family_fixtures.unpack("clip_hf", tmp_path / "clip")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return codebind_jax.load(family_fixtures.unpack("clip_hf", tmp_path_factory.mktemp("load") / "clip"))


def refusal(source, **options):
  with pytest.raises(ValueError) as caught:
    codebind_jax.load(source, **options)
  return str(caught.value)


# What is no model.


def test_a_path_that_is_not_there(tmp_path):
  assert "nothing': no such file or folder" in refusal(tmp_path / "nothing")


def test_a_folder_or_file_that_is_no_model_names_what_is_supported(tmp_path):
  (tmp_path / "notes.txt").write_text("hello")
  for path in (tmp_path, tmp_path / "notes.txt"):
    text = refusal(path)
    assert str(path) in text and "no supported checkpoint (it is none of their files)" in text
    assert all(name in text for name in families()) and "a run's folder, a saved model" in text


def test_a_family_that_is_not_supported_is_named(clip):
  family_fixtures.change_json(clip / "config.json", model_type="blip")
  text = refusal(clip)
  assert "its config.json has model_type 'blip'" in text and "supported: " in text and "open_clip" in text


def test_a_file_of_foreign_arrays_shows_some_of_their_names(tmp_path):
  safetensors.numpy.save_file({"gpt.wte": np.zeros(3, np.float32)}, tmp_path / "gpt.safetensors")
  assert "it has 1 arrays, such as gpt.wte" in refusal(tmp_path / "gpt.safetensors")


# Checkpoints that are damaged.


def test_a_config_without_weights(clip):
  (clip / "model.safetensors").unlink()
  text = refusal(clip)
  assert f"{clip}: no weights; looked for model.safetensors" in text and "found config.json" in text


def test_weights_of_another_size(clip):
  family_fixtures.change_json(clip / "config.json", vision_config={"hidden_size": 96, "num_attention_heads": 4})
  text = refusal(clip)
  assert "model.safetensors: missing []; superfluous []; wrong shape [" in text
  assert "class_embedding (32,) for stem/cls_token" in text


def test_all_arrays_that_do_not_fit_are_in_one_error(clip):
  weights = family_fixtures.weights_of(clip)
  del weights["vision_model.pre_layrnorm.bias"], weights["vision_model.encoder.layers.0.mlp.fc1.weight"]
  weights["vision_model.more"] = np.zeros(2, np.float32)
  weights["vision_model.embeddings.class_embedding"] = np.zeros(3, np.float32)
  safetensors.numpy.save_file(weights, clip / "model.safetensors")
  text = refusal(clip, modalities=["image"])
  missing, others = text.split("superfluous")
  assert "pre_layrnorm.bias" in missing and "layers.0.mlp.fc1.weight" in missing
  assert "vision_model.more" in others and "class_embedding (3,) for stem/cls_token" in others


@pytest.mark.parametrize("keep", [4, 30, -10])
def test_a_safetensors_file_that_is_cut_short(clip, keep):
  content = (clip / "model.safetensors").read_bytes()
  (clip / "model.safetensors").write_bytes(content[:keep])
  text = refusal(clip)
  assert str(clip / "model.safetensors") in text and ("cut short" in text or "damaged" in text)


def test_other_files_that_are_cut_short(tmp_path):
  np.savez(tmp_path / "x.npz", a=np.arange(1000.0))
  (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:500])
  assert "x.npz: not a readable npz file" in refusal(tmp_path / "x.npz")
  (tmp_path / "y.npz").write_bytes(b"no zip")
  assert "y.npz: not a readable npz file" in refusal(tmp_path / "y.npz")
  with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
    archive.writestr("x/data.pkl", pickle.dumps({"a": 1}))
  (tmp_path / "x.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:-30])
  assert "x.pth: not a readable torch checkpoint" in refusal(tmp_path / "x.pth")


@pytest.mark.parametrize("file", ["meta/metadata", "state/_METADATA"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b"[" * 100_000])
def test_a_run_whose_checkpoint_is_damaged(tmp_path, file, content):
  store = Checkpoints(tmp_path)
  store.save(Position(3, "s", True, ("image",)), {"params": {"a": jnp.ones(3)}, "codebooks": {}}, {}, {})
  store.close()
  path = tmp_path / "checkpoints" / "3" / file
  path.write_bytes(path.read_bytes()[:-9] if content is None else content)
  assert f"checkpoint {tmp_path / 'checkpoints' / '3'} cannot be read, it is damaged: " in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_json_beside_the_weights_that_is_nested_deeply(clip, name):
  (clip / "model.safetensors").unlink()
  (clip / name).write_text("[" * 100_000 + "]" * 100_000)
  assert str(clip) in refusal(clip)


def test_a_shard_that_is_missing(clip):
  weights = family_fixtures.weights_of(clip)
  names = sorted(weights)
  shard_of = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
  for shard in set(shard_of.values()):
    part = {name: weights[name] for name in names if shard_of[name] == shard}
    safetensors.numpy.save_file(part, clip / shard)
  (clip / "model.safetensors").unlink()
  (clip / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
  assert codebind_jax.load(clip, modalities=["text"]).modalities == ("text",)
  (clip / "model-00002-of-00002.safetensors").unlink()
  assert "index.json: shards are missing: model-00002-of-00002.safetensors" in refusal(clip)


def test_a_tokenizer_without_the_end_mark(clip):
  content = json.loads((clip / "tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>"))
  (clip / "tokenizer.json").write_text(json.dumps(content))
  assert "its tokenizer's end mark <|endoftext|> is None" in refusal(clip)


def test_a_malicious_pickle_runs_nothing(tmp_path, clip):
  class Evil:
    def __reduce__(self):
      return (open, (str(tmp_path / "written"), "w"))

  with zipfile.ZipFile(tmp_path / "evil.pth", "w") as archive:
    archive.writestr("evil/data.pkl", pickle.dumps({"x": Evil()}, protocol=2))
  text = refusal(tmp_path / "evil.pth")
  assert "evil.pth" in text and "refused to unpickle" in text and "open" in text
  (clip / "model.safetensors").unlink()
  (tmp_path / "evil.pth").rename(clip / "pytorch_model.bin")
  assert "refused to unpickle" in refusal(clip)
  assert not (tmp_path / "written").exists()


def test_a_modality_that_the_checkpoint_lacks(clip):
  assert f"{clip}: has no modality 'audio'; it has image, text" in refusal(clip, modalities=["image", "audio"])
  assert "modalities: got 'image'; a list of names is needed" in refusal(clip, modalities="image")
  saved = codebind_jax.load(clip).save(clip.parent / "saved")
  assert f"{saved}: has no modality 'audio'; it has image, text" in refusal(saved, modalities=["audio"])


# What to embed.


def test_pictures_come_as_paths_bytes_pil_images_and_arrays(model, tmp_path):
  picture = PIL.Image.fromarray(RAW["image"][0])
  picture.save(tmp_path / "a.png")
  encoded = io.BytesIO()
  picture.save(encoded, "PNG")
  items = [tmp_path / "a.png", str(tmp_path / "a.png"), encoded.getvalue(), picture, RAW["image"][0]]
  shared = model.embed({"image": items})["image"].shared
  np.testing.assert_allclose(shared, np.repeat(shared[:1], len(items), axis=0), atol=1e-6)
  batch = np.stack([RAW["image"][0]] * 2)
  np.testing.assert_allclose(model.embed({"image": batch})["image"].shared, shared[:2], atol=1e-6)
  np.testing.assert_array_equal(model.embed({"text": ("a dog",)})["text"].shared,
                                model.embed({"text": np.array(["a dog"])})["text"].shared)  # fmt: skip


@pytest.mark.parametrize(("modality", "item", "got"), [
  ("text", "a dog", "'a dog'"), ("image", "dog.png", "'dog.png'"), ("image", b"PNG", "one bytes"),
  ("image", np.zeros((8, 8, 3), np.uint8), r"an array of shape \(8, 8, 3\)"), ("image", {"a": 1}, "one dict"),
  ("image", PIL.Image.new("RGB", (8, 8)), "one Image"), ("text", np.array("a dog"), r"an array of shape \(\)"),
  ("image", jax.numpy.zeros((8, 8)), r"an array of shape \(8, 8\)"), ("text", iter(["a"]), "one list_iterator"),
])  # fmt: skip
def test_one_item_where_a_list_is_needed_is_refused(model, modality, item, got):
  with pytest.raises(ValueError, match=f"{modality}: got {got}; a list of items is needed"):
    model.embed({modality: item})
  with pytest.raises(ValueError, match="a list of items is needed"):
    model.combine({modality: item})


def test_empty_lists_and_labels_that_are_one_text_are_refused(model):
  for nothing in ([], (), np.zeros((0, 8, 8, 3), np.uint8)):
    with pytest.raises(ValueError, match="image: nothing to embed, got 0 items"):
      model.embed({"image": nothing})
  with pytest.raises(ValueError, match="labels: got 'dog'; a list of items is needed"):
    model.classify(RAW["image"], "dog")
  with pytest.raises(ValueError, match=r"text\[1\]: text: got int, a string is needed"):
    model.embed({"text": ["a", 3]})


def test_two_labels_with_one_embedding_are_refused_with_both_names(model):
  for labels, pair in ((["a dog", "a cat", "A  Dog "], "'a dog' and 'A  Dog '"),
                       (["x", "caf\u00e9", "cafe\u0301"], "'caf")):
    with pytest.raises(ValueError, match=f"labels: .*{pair}.* (have one embedding|are one class)"):
      model.classify(RAW["image"], labels)
  assert len(model.classify(RAW["image"], ["a dog", "a cat"])[0]) == 2


def test_one_template_and_one_item_to_classify_are_refused(model):
  with pytest.raises(ValueError, match="templates: got 'a {}'; a list of templates is needed".replace("{", r"\{")):
    model.classify(RAW["image"], ["a dog", "a cat"], templates="a {}")
  for item in ("dog.png", RAW["image"][0], b"PNG"):
    with pytest.raises(ValueError, match="image: got .*; a list of items is needed"):
      model.classify(item, ["a dog", "a cat"])


def test_an_array_of_paths_is_a_list(model, tmp_path):
  PIL.Image.fromarray(RAW["image"][0]).save(tmp_path / "a.png")
  paths = [str(tmp_path / "a.png")] * 2
  want = model.embed({"image": paths})["image"].shared
  np.testing.assert_array_equal(model.embed({"image": np.array(paths)})["image"].shared, want)
  np.testing.assert_array_equal(model.embed({"image": np.array(paths, object)})["image"].shared, want)
  with pytest.raises(ValueError, match="a list of items is needed"):
    model.embed({"image": np.array(paths[0])})


def test_combined_items_are_the_weighted_sum_at_unit_length(model):
  seen = model.embed(RAW)
  image, text = seen["image"].shared, seen["text"].shared
  for weights, want in ((None, image + text), ({"text": 0.25}, image + 0.25 * text), ({"image": -1}, text - image)):
    want = want / np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(model.combine(RAW, weights), want, atol=1e-6)
    np.testing.assert_allclose(model.combine({"image": seen["image"], "text": RAW["text"]}, weights), want, atol=1e-6)
  assert model.combine(RAW).dtype == np.float32 and model.combine({"text": RAW["text"]}).shape == text.shape


def test_an_empty_source_is_not_the_current_folder():
  with pytest.raises(ValueError, match="source: got ''; needed: a path, or hf:org/name"):
    codebind_jax.load("")


def test_what_cannot_be_combined_is_refused(model):
  for inputs, weights, match in (
    ({"image": RAW["image"][:2], "text": ["a"]}, None, "lists of different lengths, {'image': 2, 'text': 1}"),
    ({"audio": ["a.wav"]}, None, "'audio' is not in this model"),
    ({"text": ["a"]}, {"image": 1.0}, "weights: got 1.0 for 'image'; allowed: a number for text"),
    ({"text": ["a"]}, {"text": float("nan")}, "weights: got nan for 'text'"),
    ({"text": ["a"]}, {"text": 0.0}, "item 0 add up to zero"),
    ({"text": ["a"]}, {"text": 1e39}, r"weights: got 1e+39 for 'text'"),
    ({"text": ["a"]}, {"text": 10**400}, "weights: got 1000"), ({"text": ["a"]}, {"text": "1"}, "weights: got '1' for"),
    ({"text": ["a"]}, {"text": 1j}, "weights: got 1j for"),
    ({}, None, "needed: modality -> a list of items"),
    ({"text": []}, None, "nothing to embed, got 0 items"),
  ):
    with pytest.raises(ValueError, match=match.replace("{", r"\{").replace("+", r"\+")):
      model.combine(inputs, weights)

"""SigLIP and SigLIP2, in Hugging Face layout and as big_vision's npz: against transformers, on tiny weights."""

import json

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from codebind_jax.data import sentencepiece
from codebind_jax.data.preparation.texts import Ids
from codebind_jax.trunks import big_vision, clip, siglip
from tests import family_fixtures

WANT = family_fixtures.arrays("siglip_hf")
WORDS = family_fixtures.arrays("sentencepiece")
RAW = {"image": [WANT[f"raw{i}"] for i in range(4)], "text": [str(text) for text in WANT["texts"]]}
IN = {"image": WANT["pixels"], "text": WANT["ids"].astype(np.int32)}
OFFICIAL = family_fixtures.official("siglip")
FOLDERS = [name for name in OFFICIAL if not name.endswith(".npz")]
NPZ = family_fixtures.FOLDER / "siglip_big_vision.npz"
BOTH = pytest.mark.parametrize("modality", siglip.MODALITIES)
TEXTS = [str(text) for text in WORDS["texts"]]


@pytest.fixture
def folder(tmp_path):
  return family_fixtures.unpack("siglip_hf", tmp_path / "siglip")


def prepared(trunk):
  return trunk.collate([trunk.preprocess(trunk.read(item)) for item in RAW[trunk.modality]])


def error(path, modality="image", family=siglip, **options):
  with pytest.raises(ValueError) as caught:
    trunk = family.make_trunk(weights=str(path), modality=modality, **options)
    assert trunk.params and trunk.head_params
  return str(caught.value)


def model_file(path, kind):
  path.write_bytes(WORDS[kind].tobytes())
  return path


@pytest.mark.parametrize("scan", [False, True])
@BOTH
def test_embeddings_are_those_of_transformers(folder, modality, scan):
  trunk = siglip.make_trunk(weights=str(folder), modality=modality, scan=scan)
  np.testing.assert_allclose(trunk.embed(IN[modality]), WANT[f"{modality}_embeds"], atol=2e-6)
  assert trunk.head.logit_scale == pytest.approx(np.exp(2.5), rel=1e-6) and trunk.head.logit_bias == -7.0
  if modality == "image":
    np.testing.assert_allclose(trunk.compiled(trunk.params, IN["image"])[:2, 1:], WANT["tokens"], atol=2e-5)


@BOTH
def test_bfloat16_stays_close(folder, modality):
  trunk = siglip.make_trunk(weights=str(folder), modality=modality, dtype="bfloat16")
  assert np.sum(np.asarray(trunk.embed(IN[modality])) * WANT[f"{modality}_embeds"], axis=1).min() > 0.999


@BOTH
def test_preparation_of_raw_items_is_that_of_transformers(folder, modality):
  np.testing.assert_array_equal(prepared(siglip.make_trunk(weights=str(folder), modality=modality)), IN[modality])


def test_bilinear_of_siglip2(folder):
  family_fixtures.change_json(folder / "preprocessor_config.json", resample=2)
  np.testing.assert_array_equal(prepared(siglip.make_trunk(weights=str(folder))), WANT["bilinear"])


def test_text_is_not_causal_and_the_last_token_is_pooled_after_padding(folder):
  trunk = siglip.make_trunk(weights=str(folder), modality="text")
  spec = trunk.module.spec
  assert (spec.causal, spec.pool, spec.pad_id, spec.eps, spec.act) == (False, "last", -1, 1e-6, "gelu_tanh")
  ids = trunk.preprocess("violin")
  assert ids.shape == (16,) and list(ids[-2:]) == [1, 1]
  changed = ids.copy()
  changed[0] = 20  # an earlier token sees later ones, and the last one, padding, is read out
  changed_end = ids.copy()
  changed_end[-1] = 20
  a, b, c = np.asarray(trunk.embed(np.stack([ids, changed, changed_end])))
  assert np.abs(a - b).max() > 1e-3 and np.abs(a - c).max() > 1e-3


def test_the_activation_is_the_one_of_config_json(folder):
  family_fixtures.change_json(folder / "config.json", vision_config={"hidden_act": "gelu"})
  got = np.asarray(siglip.make_trunk(weights=str(folder)).embed(IN["image"]))
  assert np.abs(got - WANT["image_embeds"]).max() > 5e-5
  family_fixtures.change_json(folder / "config.json", vision_config={"hidden_act": "relu"})
  assert "hidden_act 'relu'" in error(folder)


# Texts and tokenizers


def test_siglip_texts_are_cleaned_as_its_tokenizer_does(folder):
  trunk = siglip.make_trunk(weights=str(folder), modality="text")
  # A blank before the text becomes a token in transformers alone, and stands in no text of its training.
  for text, ids in zip(TEXTS, WORDS["siglip_ids"]):
    if not text.startswith(" "):
      np.testing.assert_array_equal(trunk.preprocess(text), ids, err_msg=text)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_models_give_the_ids_of_sentencepiece(tmp_path, kind):
  tokenizer = sentencepiece.read_tokenizer(model_file(tmp_path / "a.model", kind))
  for i, text in enumerate(TEXTS):
    assert tokenizer.encode(text).ids == list(WORDS[f"{kind}_ids{i}"]), text


def test_a_damaged_sentencepiece_model_is_named(tmp_path):
  for content in (b"", b"no model at all", WORDS["bpe"].tobytes()[:-500]):
    (tmp_path / "a.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.model: not a SentencePiece model"):
      sentencepiece.read_tokenizer(tmp_path / "a.model")


def test_tokenizer_json_is_taken_as_it_is(folder):
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "Two": 3, "dogs,": 4}, "<pad>"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  siglip.with_end(made, "</s>").save(str(folder / "tokenizer.json"))
  family_fixtures.change_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast",
                              pad_token={"content": "<pad>"})  # fmt: skip
  trunk = siglip.make_trunk(weights=str(folder), modality="text")
  assert list(trunk.preprocess("Two dogs,")[:5]) == [3, 4, 1, 0, 0]
  made.post_processor = tokenizers.processors.TemplateProcessing(single="$A", special_tokens=[])
  made.save(str(folder / "tokenizer.json"))
  assert "does not put the end mark '</s>'" in error(folder, "text")


def test_siglip2_texts_are_lower_cased(folder):
  model_file(folder / "tokenizer.model", "bpe")
  (folder / "spiece.model").unlink()
  (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer", "padding_side": "right"}')
  trunk = siglip.make_trunk(weights=str(folder), modality="text")
  ids = list(trunk.preprocess("A Photo, of a Cow"))
  plain = sentencepiece.read_tokenizer(folder / "tokenizer.model").encode("a photo, of a cow").ids
  assert ids == [*plain, 1, *[0] * (16 - len(plain) - 1)]
  family_fixtures.change_json(folder / "tokenizer_config.json", padding_side="left")
  assert list(siglip.make_trunk(weights=str(folder), modality="text").preprocess("a")[-2:]) == [
    *sentencepiece.read_tokenizer(folder / "tokenizer.model").encode("a").ids, 1]  # fmt: skip


def test_a_tokenizer_that_lacks_the_end_mark(folder):
  family_fixtures.change_json(folder / "tokenizer_config.json", eos_token="<stop>")
  assert "no end mark '<stop>'" in error(folder, "text")
  (folder / "spiece.model").unlink()
  assert "has no tokenizer" in error(folder, "text")


# Names


@pytest.mark.parametrize("name", FOLDERS)
def test_every_array_of_the_official_models_is_accounted_for(tmp_path, monkeypatch, name):
  model = OFFICIAL[name]
  for file, content in model["files"].items():
    (tmp_path / file).write_text(json.dumps(content))
  weights = siglip.with_split_projection(family_fixtures.zeros(model["shapes"], tmp_path / "config.json"), ".in_proj_")
  monkeypatch.setattr(siglip, "_weights", lambda path: weights)
  word = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 1}))
  monkeypatch.setattr(siglip, "folder_ids", lambda folder, context: Ids(word, context, 1))
  for modality in siglip.MODALITIES:
    family_fixtures.load_all(siglip.make_trunk(weights=str(tmp_path), modality=modality, scan=True))


@pytest.mark.parametrize("name", [name for name in OFFICIAL if name.endswith(".npz")])
def test_every_array_of_the_official_npz_files_is_accounted_for(tmp_path, monkeypatch, name):
  (tmp_path / name).touch()
  weights = family_fixtures.zeros(OFFICIAL[name]["shapes"], tmp_path / name)
  monkeypatch.setattr(big_vision, "open_weights", lambda path: weights)
  word = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 1}))
  monkeypatch.setattr(big_vision, "_ids", lambda file, tokenizer, context: Ids(word, context, 1))
  for modality in siglip.MODALITIES:
    trunk = big_vision.make_trunk(weights=str(tmp_path / name), modality=modality, scan=True)
    family_fixtures.load_all(trunk)
    if modality == "image":
      side = next(int(part) for part in name.removesuffix(".npz").split("_") if part in ("224", "256", "384"))
      assert trunk.input.shape == (side, side, 3)


@pytest.mark.parametrize("modality, kind", [("image", "siglip_vision_model"), ("text", "siglip_text_model")])
def test_a_tower_alone(folder, modality, kind):
  tower, part = clip._TOWER[modality], {"image": "vision_config", "text": "text_config"}[modality]
  config = json.loads((folder / "config.json").read_text())[part] | {"model_type": kind}
  (folder / "config.json").write_text(json.dumps(config))
  kept = {n: x for n, x in family_fixtures.weights_of(folder).items() if n.startswith(tower)}
  for prefix in (f"{tower}.", ""):  # transformers 4, and 5
    save_file({prefix + n.removeprefix(f"{tower}."): x for n, x in kept.items()}, folder / "model.safetensors")
    assert siglip.modalities(folder) == (modality,)
    trunk = siglip.make_trunk(weights=str(folder), modality=modality)
    np.testing.assert_allclose(trunk.embed(IN[modality]), WANT[f"{modality}_embeds"], atol=2e-6)


# Bad input


def test_bad_folders_are_refused_by_name(folder, tmp_path):
  assert "no such path" in error(tmp_path / "nowhere")
  assert "no 'audio'; it has image, text" in error(folder, "audio")
  family_fixtures.change_json(folder / "config.json", vision_config={"num_patches": 256}, model_type="siglip2")
  assert "config.json: SigLIP2 NaFlex" in error(folder)
  family_fixtures.change_json(folder / "config.json", model_type="clip")
  assert "'clip'" in error(folder) and not siglip.recognises(folder)


def test_a_tower_without_pooling(folder):
  family_fixtures.change_json(folder / "config.json", vision_config={"vision_use_head": False})
  assert "vision_use_head" in error(folder)


def test_missing_superfluous_and_misshapen_arrays_are_one_error(folder):
  weights = family_fixtures.weights_of(folder)
  del weights["vision_model.head.probe"]
  weights["vision_model.extra"] = np.zeros(3, np.float32)
  weights["vision_model.head.attention.in_proj_bias"] = np.zeros(93, np.float32)
  save_file(weights, folder / "model.safetensors")
  text = error(folder)
  assert all(part in text for part in (
    "model.safetensors", "head.probe", "vision_model.extra", "attention.q_bias (31,)"))  # fmt: skip
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])
  assert "cut short" in error(folder)


# big_vision


@pytest.fixture
def npz(tmp_path):
  """Writes the weights as users have them: with `params/` or without, one by one or stacked, compressed or not."""

  def write(root="", stacked=False, save=np.savez, name="siglip_tiny.npz", change=lambda arrays: arrays):
    with np.load(NPZ) as stored:
      arrays = change({key: stored[key] for key in stored.files})
    if stacked:
      layers = sorted(key for key in arrays if "encoderblock_0" in key)
      for key in layers:
        both = [arrays.pop(key.replace("encoderblock_0", f"encoderblock_{i}")) for i in range(2)]
        arrays[key.replace("encoderblock_0", "encoderblock")] = np.stack(both)
    save(tmp_path / name, **{root + key: value for key, value in arrays.items()})
    model_file(tmp_path / "sentencepiece.model", "unigram")
    return tmp_path / name

  return write


FORMS = (
  {}, {"root": "params/"}, {"root": "params/", "stacked": True}, {"stacked": True, "save": np.savez_compressed},
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@BOTH
def test_npz_gives_the_embeddings_of_transformers(npz, modality, form):
  path = npz(**form)
  assert big_vision.recognises(path) and big_vision.modalities(path) == ("image", "text")
  trunk = big_vision.make_trunk(weights=str(path), modality=modality, scan="stacked" in form)
  np.testing.assert_allclose(trunk.embed(IN[modality]), WANT[f"{modality}_embeds"], atol=2e-6)
  assert trunk.head.logit_scale == pytest.approx(np.exp(2.5), rel=1e-6) and trunk.head.logit_bias == -7.0
  np.testing.assert_array_equal(prepared(trunk), IN[modality])


def test_npz_of_siglip2_resizes_bilinearly_and_lower_cases(npz, tmp_path):
  path = npz(name="siglip2_tiny.npz")
  np.testing.assert_array_equal(prepared(big_vision.make_trunk(weights=str(path))), WANT["bilinear"])
  model = model_file(tmp_path / "gemma.model", "bpe")
  trunk = big_vision.make_trunk(weights=str(path), modality="text", tokenizer=str(model))
  plain = sentencepiece.read_tokenizer(model).encode("two dogs, running!").ids[:15]
  assert list(trunk.preprocess("Two dogs, running!")[: len(plain) + 1]) == [*plain, 1]


def test_npz_takes_a_tokenizer_json_or_a_folder(npz, folder, tmp_path):
  path = npz()
  (tmp_path / "sentencepiece.model").unlink()
  text = error(path, "text", big_vision)
  assert big_vision.modalities(path) == ("image",)
  assert "tokenizer.json or a SentencePiece model" in text and str(path) in text
  trunk = big_vision.make_trunk(weights=str(path), modality="text", tokenizer=str(folder))
  np.testing.assert_array_equal(prepared(trunk), IN["text"])
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "cow": 5}, "<pad>"))
  made.save(str(tmp_path / "words.json"))
  for place in (tmp_path / "words.json", tmp_path / "tokenizer.json"):
    made.save(str(place))
    option = str(place) if place.name == "words.json" else ""
    trunk = big_vision.make_trunk(weights=str(path), modality="text", tokenizer=option)
    assert list(trunk.preprocess("cow")[:3]) == [5, 1, 1]
  tokenizers.Tokenizer(tokenizers.models.WordLevel({"cow": 5})).save(str(tmp_path / "tokenizer.json"))
  assert "no end mark" in error(path, "text", big_vision)


def test_bad_npz_files_are_refused_by_name(npz, tmp_path):
  assert "is no file" in error(tmp_path / "nowhere.npz", family=big_vision)
  path = npz()
  assert "do not fit pictures of 48 x 48" in error(path, family=big_vision, size=48)
  assert "no 'audio'" in error(path, "audio", big_vision)
  path.write_bytes(path.read_bytes()[:-300])
  assert "siglip_tiny.npz: not a readable npz" in error(path, family=big_vision) and not big_vision.recognises(path)
  np.savez(path, a=np.zeros(3))
  assert "not SigLIP of big_vision" in error(path, family=big_vision) and not big_vision.recognises(path)

  def spoil(arrays):
    del arrays["img/MAPHead_0/probe"]
    return arrays | {"img/extra": np.zeros(3), "img/embedding/bias": np.zeros(5)}

  text = error(npz(change=spoil), family=big_vision)
  assert all(part in text for part in ("siglip_tiny.npz", "MAPHead_0/probe", "img/extra", "img/embedding/bias (5,)"))
  only = lambda arrays: {name: value for name, value in arrays.items() if not name.startswith("txt")}
  assert "has no 'text'; it has image" in error(npz(change=only), "text", big_vision)

"""Saved models: written whole, read elsewhere with equal bits, with trunks or references to them; the model card."""

import contextlib
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from codebind_jax import api
from codebind_jax import config as config_lib
from codebind_jax.data.worlds import fetch
from codebind_jax.methods.base import make_init
from codebind_jax.saving import folder as saved_folder
from codebind_jax.saving.card import licence_id
from codebind_jax.trunks import checkpoint_files, input_shapes, load_trunk, minilm
from codebind_jax.trunks.class_names import names_trunk
from tests import family_fixtures
from tests.damage import equal, flipped, share_noticed
from tests.test_pretrained import random_bert_state

WANT = family_fixtures.arrays("clip_hf")
RAW = {"image": [WANT[f"raw{i}"] for i in range(4)], "text": [str(text) for text in WANT["texts"]]}


def same(a, b):
  assert set(a) == set(b)
  for m in a:
    for name, value in a[m].asdict().items():
      np.testing.assert_array_equal(value, b[m].asdict()[name], err_msg=f"{m} {name}")


@pytest.fixture
def clip(tmp_path):
  """A folder of CLIP."""
  return family_fixtures.unpack("clip_hf", tmp_path / "there" / "clip")


@pytest.fixture
def model(clip):
  return api.load(clip)


def trained(clip, tune="frozen", half=()):
  """A model with codebooks over CLIP's towers, as after training: heads are drawn, adapters have values."""
  own = {m: {"trunk": "clip", "options": {"weights": str(clip), "modality": m}, "cache": False} for m in RAW}
  own["image"]["specific_dim"] = 8
  config = config_lib.read({
    "model": {"shared_dim": 16, "towers": own, "half": half},
    "stages": {"bind": {"tune": dict.fromkeys(RAW, tune), "steps": 1, "batch_size": 4}},
    "codebook": {"dim": 8, "shared_codes": 16, "codes": {"image": 8}}, "stage_order": ("bind",),
    "data": {"manifest": "/somewhere/private.jsonl", "eval_templates": ("a photo of {}",)},
  })  # fmt: skip
  trunks = {m: load_trunk(tower.trunk, **tower.options) for m, tower in config.model.towers.items()}
  init = make_init(config_lib.method_of(config), input_shapes(config.model, trunks), half)
  params, codebooks, _ = jax.jit(init)(jax.random.key(3))
  for m, tower in config.model.towers.items():
    if not tower.cache:
      flat = flatten_dict(params[m]["trunk"])
      shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in flat.items() if "lora" not in path[-1]}
      flat |= flatten_dict(trunks[m].load(unflatten_dict(shapes)))
      flat |= {p: 0.05 + x for p, x in flat.items() if p[-1] == "lora_b" or tune == "full"}
      params[m] = params[m] | {"trunk": unflatten_dict(flat)}
  return api.Model(config, params, codebooks, trunks)


def test_a_published_model_loads_elsewhere_with_equal_bits(model, clip, tmp_path):
  want = model.embed(RAW)
  model.save(tmp_path / "saved")
  shutil.rmtree(clip)
  shutil.move(tmp_path / "saved", tmp_path / "elsewhere")
  again = api.load(tmp_path / "elsewhere")
  same(again.embed(RAW), want)
  assert again.modalities == model.modalities and again.fingerprint(["image"]) == model.fingerprint(["image"])
  # A saved model is saved like any other, and one of its modalities loads without the other's arrays.
  api.load(tmp_path / "elsewhere", modalities=["text"]).save(tmp_path / "text")
  assert api.load(tmp_path / "text").modalities == ("text",)
  same(api.load(tmp_path / "text").embed({"text": RAW["text"]}), {"text": want["text"]})
  assert not [name for name in safetensors.numpy.load_file(tmp_path / "text" / "model.safetensors") if "image" in name]


def test_a_saved_folder_has_what_the_docs_say_and_no_pickle(model, tmp_path):
  folder = model.save(tmp_path / "saved")
  files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
  assert {"config.json", "model.safetensors", "README.md", "trunks/text/tokenizer.json"} <= files
  assert {path.rsplit(".", 1)[-1] for path in files} <= {"json", "safetensors", "md", "txt"}
  assert "trunks/image/model.safetensors.shapes.json" in files and "trunks/image/tokenizer.json" not in files
  config = json.loads((folder / "config.json").read_text())
  towers = config["config"]["model"]["towers"]
  assert config["model_type"] == "codebind_jax" and towers["image"]["options"]["weights"] == "trunks/image"
  assert str(tmp_path) not in (folder / "config.json").read_text() + (folder / "README.md").read_text()
  assert not [path for path in folder.parent.iterdir() if "part" in path.name or "old" in path.name]


@pytest.mark.parametrize("tune", ["frozen", "lora", "full"])
def test_trained_trunks_are_saved_as_they_are_and_adapters_merged(clip, tmp_path, tune):
  model = trained(clip, tune)
  want = model.embed(RAW)
  frozen = np.asarray(model.trunk("image").params["trunk"]["blocks_0"]["attn"]["qkv"]["kernel"])
  folder = model.save(tmp_path / "saved")
  shutil.rmtree(clip.parent)
  again = api.load(folder)
  got = again.embed(RAW)
  if tune == "lora":
    names = checkpoint_files.open_weights(folder / "model.safetensors")
    assert "lora_a" in str(list(flatten_dict(model.params["image"]))) and not [n for n in names if "lora" in n]
    for m in RAW:
      np.testing.assert_allclose(got[m].full, want[m].full, atol=1e-5)
  else:
    same(got, want)
  moved = np.asarray(again.params["image"]["trunk"]["trunk"]["blocks_0"]["attn"]["qkv"]["kernel"])
  assert np.array_equal(moved, frozen) == (tune == "frozen")
  text = (folder / "config.json").read_text()
  assert "private.jsonl" not in text and again.config.data.eval_templates == ("a photo of {}",)
  card = (folder / "README.md").read_text()
  assert "| shared | 16 | 8 |" in card and "| image | 8 | 8 |" in card and "license: mit" in card


def test_a_run_is_saved_without_its_data_under_the_names_of_its_arrays(trained, tmp_path):
  manifest, _, workdir = trained
  model = api.load(workdir)
  raw = {"image": [manifest.parent / "red0.png"], "text": ["red", "a cow"]}
  want = model.embed(raw)
  folder = model.save(tmp_path / "saved", trunks="reference")  # drawn trunks have no checkpoint to refer to
  again = api.load(folder)
  same(again.embed(raw), want)
  assert again.fingerprint(["image", "text"]) == model.fingerprint(["image", "text"])
  assert str(manifest) not in (folder / "config.json").read_text()
  a, b = (saved_folder.flat({"params": x.params, "codebooks": x.codebooks}) for x in (model, again))
  assert set(b) <= set(a) and "codebooks/shared/codes" in b  # so that a run can start from it


def test_half_precision_is_kept(clip, tmp_path):
  model = trained(clip, half=(r"image/trunk/.*",))
  folder = model.save(tmp_path / "saved")
  kernel = api.load(folder).params["image"]["trunk"]["stem"]["patch"]["kernel"]
  assert kernel.dtype == jnp.bfloat16
  np.testing.assert_array_equal(kernel, model.params["image"]["trunk"]["stem"]["patch"]["kernel"])
  referring = model.save(tmp_path / "referring", trunks="reference")
  assert api.load(referring).params["image"]["trunk"]["stem"]["patch"]["kernel"].dtype == jnp.bfloat16
  same(api.load(referring).embed(RAW), api.load(folder).embed(RAW))


def test_trunks_outside_the_model_are_included_without_fetching(tmp_path, monkeypatch):
  """Trunks with cached tokens; the packaged checkpoint of class names' text space lies beside the image trunk's."""
  monkeypatch.setattr(fetch, "fetch", functools.partial(packaged, tmp_path))
  small = {"size": 32, "stages": ((1, 3, 1, 1, 8), (1, 3, 2, 2, 16)), "head_width": 32, "grid": 0, "weights": "random"}
  towers = {
    "image": {"trunk": "efficientnet_lite0", "options": small, "specific_dim": 8},
    "text": {"trunk": "minilm", "options": {"layers": 1, "width": 32, "heads": 4}},
    "eeg": {"trunk": "eeg_patches", "options": {"statistics": str(statistics(tmp_path / "eeg.npz"))}},
    "vectors": {"trunk": "vectors", "options": {"width": 4}},
  }
  config = config_lib.read({"model": {"shared_dim": 16, "towers": towers},
                            "codebook": {"dim": 8, "shared_codes": 16, "codes": {"image": 8}}})  # fmt: skip
  trunks = {m: load_trunk(tower.trunk, **tower.options) for m, tower in config.model.towers.items()}
  init = make_init(config_lib.method_of(config), input_shapes(config.model, trunks))
  params, codebooks, _ = jax.jit(init)(jax.random.key(0))
  model = api.Model(config, params, codebooks, trunks)
  rng = np.random.default_rng(0)
  raw = {"image": [rng.integers(0, 255, (40, 30, 3), np.uint8)], "text": ["a dog", "red"],
         "eeg": [rng.normal(size=(10, 91)).astype(np.float32)], "vectors": [np.ones(4, np.float32)]}  # fmt: skip
  want = model.embed(raw)
  folder = model.save(tmp_path / "saved")
  monkeypatch.setattr(fetch, "fetch", lambda name: pytest.fail(f"fetches {name}"))
  (tmp_path / "eeg.npz").unlink()
  again = api.load(folder)
  same(again.embed(raw), want)
  assert again.fingerprint(["text", "image"]) == model.fingerprint(["text", "image"])
  again.save(tmp_path / "again")
  same(api.load(tmp_path / "again").embed(raw), want)
  assert names_trunk("minilm", tmp_path / "again" / "trunks" / "text").width == 384  # makes it of what is there


def packaged(folder, name):
  """A tiny MiniLM in place of the packaged one."""
  folder = folder / name
  if not folder.exists():
    folder.mkdir()
    state = random_bert_state(minilm.BertConfig(layers=1, width=32, heads=4, mlp_width=128), np.random.default_rng(0))
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    minilm.letter_tokenizer().save(str(folder / "tokenizer.json"))
  return folder


def statistics(path):
  np.savez(path, mean=np.full((18, 10), 0.5, np.float32), deviation=np.full((18, 10), 2.0, np.float32))
  return path


def test_a_reference_names_the_checkpoint_and_its_hash(model, clip, tmp_path):
  want = model.embed(RAW)
  folder = model.save(tmp_path / "saved", trunks="reference")
  arrays = safetensors.numpy.load_file(folder / "model.safetensors")
  assert not [name for name in arrays if "/trunk/" in name] and not (folder / "trunks").exists()
  assert checkpoint_files.file_hash(clip / "model.safetensors") in (folder / "README.md").read_text()
  same(api.load(folder).embed(RAW), want)
  # Beside the saved folder, where its own path is no more.
  shutil.move(clip, tmp_path / "clip")
  same(api.load(folder).embed(RAW), want)
  api.load(folder, modalities=["text"]).save(tmp_path / "included")
  with pytest.raises(ValueError, match="came from a saved model that includes it"):
    api.load(tmp_path / "included").save(tmp_path / "new", trunks="reference")
  old = checkpoint_files.file_hash(tmp_path / "clip" / "model.safetensors")
  changed = family_fixtures.weights_of(tmp_path / "clip")
  changed["logit_scale"] = np.asarray(changed["logit_scale"] + 1)
  safetensors.numpy.save_file(changed, tmp_path / "clip" / "model.safetensors")
  new = checkpoint_files.file_hash(tmp_path / "clip" / "model.safetensors")
  with pytest.raises(ValueError, match=f"SHA-256 {old}.*has SHA-256 {new}"):
    api.load(folder)
  shutil.rmtree(tmp_path / "clip")
  with pytest.raises(ValueError, match=f"refers to model.safetensors with SHA-256 {old}; looked for .*clip.*include"):
    api.load(folder)


def test_a_tuned_trunk_is_included_where_others_are_referred_to(clip, tmp_path):
  model = trained(clip, "full")
  text = load_trunk("clip", weights=str(clip), modality="text")
  model.params["text"]["trunk"] = text.params
  folder = model.save(tmp_path / "saved", trunks="reference")
  trunks = json.loads((folder / "config.json").read_text())["trunks"]
  assert {m: trunk["values"] for m, trunk in trunks.items()} == {"image": "included", "text": "reference"}
  same(api.load(folder).embed(RAW), model.embed(RAW))


def test_a_folder_that_holds_something_else_is_refused(model, tmp_path):
  folder = model.save(tmp_path / "saved")
  before = (folder / "model.safetensors").stat().st_ino
  model.save(folder)  # a saved model is replaced
  assert (folder / "model.safetensors").stat().st_ino != before
  (folder / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match="holds README.md, config.json, model.safetensors, notes.txt"):
    model.save(folder)
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "config.json").write_text('{"model_type": "clip"}')
  with pytest.raises(ValueError, match="holds config.json; allowed: a new or empty folder"):
    model.save(tmp_path / "other")
  with pytest.raises(ValueError, match="is a file"):
    model.save(folder / "notes.txt")
  with pytest.raises(ValueError, match="trunks: got 'all'; allowed: include, reference"):
    model.save(tmp_path / "new", trunks="all")
  (tmp_path / "empty").mkdir()
  assert api.load(model.save(tmp_path / "empty")).modalities == ("image", "text")


def test_an_error_leaves_what_was_there(model, tmp_path, monkeypatch):
  folder = model.save(tmp_path / "saved")
  content = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
  monkeypatch.setattr(saved_folder, "card", lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    model.save(folder)
  with pytest.raises(ZeroDivisionError):
    model.save(tmp_path / "new")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "there"]
  assert content == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_arrays_of_all_types_are_written_as_safetensors_reads_them(tmp_path):
  arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": jnp.ones((3,), jnp.bfloat16), "c": np.bool_(True),
            "d": np.zeros((0, 4), np.int32), "e": np.float16([1.5]), "f": np.arange(3, dtype=np.uint8)}  # fmt: skip
  checkpoint_files.write_safetensors(tmp_path / "x.safetensors", arrays, {"format": "pt"})
  theirs = safetensors.numpy.load_file(tmp_path / "x.safetensors")
  ours = checkpoint_files.open_weights(tmp_path / "x.safetensors")
  for name, value in arrays.items():
    for got in (theirs[name], ours[name].read()):
      assert got.shape == np.shape(value) and got.dtype == np.asarray(value).dtype
      np.testing.assert_array_equal(got, np.asarray(value))
  with pytest.raises(ValueError, match="'z' has the type complex64"):
    checkpoint_files.write_safetensors(tmp_path / "y.safetensors", {"z": np.zeros(1, np.complex64)}, {})


def test_a_damaged_saved_model_is_named_with_what_is_wrong(model, tmp_path):
  folder = model.save(tmp_path / "saved")
  arrays = safetensors.numpy.load_file(folder / "model.safetensors")
  name = "params/image/shared/proj/kernel"
  changed = {key: value for key, value in arrays.items() if key != name} | {"more": np.zeros(3, np.float32)}
  changed["params/text/shared/proj/kernel"] = np.zeros((2, 2), np.float32)
  safetensors.numpy.save_file(changed, folder / "model.safetensors")
  with pytest.raises(ValueError) as caught:
    api.load(folder)
  wrong = "wrong shape ['params/text/shared/proj/kernel (2, 2) for "
  assert f"missing ['{name}']; superfluous ['more']; {wrong}" in str(caught.value)
  safetensors.numpy.save_file(arrays, folder / "model.safetensors")
  content = (folder / "model.safetensors").read_bytes()
  (folder / "model.safetensors").write_bytes(content[:-100])
  with pytest.raises(ValueError, match="model.safetensors: cut short"):
    api.load(folder)
  (folder / "model.safetensors").unlink()
  with pytest.raises(ValueError, match="no weights; looked for model.safetensors"):
    api.load(folder)
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | {"format": 99, "version": "9.0"}))
  with pytest.raises(ValueError, match=r"has format 99 \(codebind_jax 9.0\)"):
    api.load(folder)
  (folder / "config.json").write_text(json.dumps({"model_type": "codebind_jax"}))
  with pytest.raises(ValueError, match="not the config of a saved model"):
    api.load(folder)


@pytest.mark.parametrize("count", [4, pytest.param(250, marks=pytest.mark.slow)])
def test_flipped_bits_of_a_saved_model_are_noticed(model, tmp_path, count):
  folder = model.save(tmp_path / "saved")
  parts = ["text/tokenizer.json", "image/preprocessor_config.json", "image/model.safetensors.shapes.json"]

  def read():
    saved = saved_folder.read(folder)
    trunks = {m: trunk.fingerprint for m, trunk in saved.trunks.items()}
    return {"arrays": saved_folder.flat((saved.params, saved.codebooks)), "config": str(saved.config), "trunks": trunks}

  whole = read()
  assert share_noticed(folder / "model.safetensors", read, count, whole) > 0.7
  for name in parts:
    assert share_noticed(folder / "trunks" / name, read, count // 4, whole) == 1
  assert share_noticed(folder / "config.json", read, count, whole) > 0.2  # white space of its text may become another
  assert share_noticed(folder / "README.md", read, 1, whole) == 0
  content = (folder / "model.safetensors").read_bytes()
  length = int.from_bytes(content[:8], "little")
  for damaged in flipped(content[: 8 + length], count, seed=1):  # the header: names, types, shapes, places
    (folder / "model.safetensors").write_bytes(damaged + content[8 + length :])
    with contextlib.suppress(ValueError):
      assert equal(read(), whole)


def test_of_a_saved_model_what_is_read_is_verified_and_no_more(model, tmp_path):
  folder = model.save(tmp_path / "saved")
  path, name = folder / "model.safetensors", "params/image/shared/proj/kernel"
  arrays = safetensors.numpy.load_file(path)
  changed = arrays | {name: np.nextafter(arrays[name], np.float32(9))}
  safetensors.numpy.save_file(changed, path)
  with pytest.raises(ValueError, match=f"{path}: array '{name}': damaged, or changed since it was written"):
    api.load(folder)
  same(api.load(folder, modalities=["text"]).embed({"text": RAW["text"]}), model.embed({"text": RAW["text"]}))
  safetensors.numpy.save_file(arrays, path)  # laid out by another program
  (folder / "README.md").write_text("mine")
  same(api.load(folder).embed(RAW), model.embed(RAW))
  tokenizer = folder / "trunks" / "text" / "tokenizer.json"
  content = tokenizer.read_bytes()
  tokenizer.write_bytes(content.replace(b"0", b"1", 1))
  with pytest.raises(ValueError, match=f"^{tokenizer}: damaged"):
    api.load(folder)
  tokenizer.write_bytes(content)
  (folder / "trunks" / "image" / "preprocessor_config.json").unlink()
  with pytest.raises(ValueError, match=r"preprocessor_config\.json: is missing"):
    api.load(folder)
  assert api.load(folder, modalities=["text"]).modalities == ("text",)
  config = json.loads((folder / "config.json").read_text())
  config["config"]["model"]["shared_dim"] *= 2
  (folder / "config.json").write_text(json.dumps(config))
  for load in (api.load, api.config_of):
    with pytest.raises(ValueError, match=r"config\.json: damaged, or changed"):
      load(folder)


def nested(depth=100_000):
  return "[" * depth + "]" * depth


DAMAGES = {
  "modalities as a text": lambda x: x | {"modalities": "image"},
  "modalities as a number": lambda x: x | {"modalities": 5},
  "modalities of lists": lambda x: x | {"modalities": [["image"], "text"]},
  "modalities without a trunk": lambda x: x | {"modalities": ["image", "audio"]},
  "config as a list": lambda x: x | {"config": [1]},
  "config without towers": lambda x: x | {"config": {"model": {}}},
  "towers as a list": lambda x: x | {"config": x["config"] | {"model": {"towers": [1]}}},
  "a tower as a number": lambda x: x | {"config": x["config"] | {"model": {"towers": {"image": 1, "text": 2}}}},
  "an unknown key": lambda x: x | {"config": x["config"] | {"model": x["config"]["model"] | {"more": 1}}},
  "trunks as null": lambda x: x | {"trunks": None},
  "a trunk as a list": lambda x: x | {"trunks": x["trunks"] | {"image": []}},
  "paths as numbers": lambda x: x | {"trunks": x["trunks"] | {"image": x["trunks"]["image"] | {"paths": {"a": 1}}}},
  "format as a text": lambda x: x | {"format": "one"},
}


@pytest.mark.parametrize("load", [api.load, api.config_of])
def test_a_config_of_other_types_is_named(model, tmp_path, load):
  path = model.save(tmp_path / "saved") / "config.json"
  content = json.loads(path.read_text())
  texts = {name: json.dumps(change(content)) for name, change in DAMAGES.items()}
  head = json.dumps({"model_type": "codebind_jax", "format": 1})[:-1]
  texts |= {"nested": f'{head}, "config": {nested()}}}', "cut": path.read_text()[:500]}
  texts["nested modalities"] = json.dumps(content | {"modalities": 0}).replace('"modalities": 0',
                                                                               f'"modalities": {nested()}')  # fmt: skip
  for name, text in texts.items():
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
      load(path.parent)
    assert str(caught.value).startswith(str(path)), name


def test_the_licence_of_a_card_is_that_of_all_trunks():
  assert licence_id(["MIT (OpenAI's weights)", "MIT"]) == "mit"
  assert licence_id(["CC-BY-NC 4.0"]) == licence_id(["CC BY-NC 4.0 (Meta)"]) == "cc-by-nc-4.0"
  assert licence_id(["MIT", "Apache-2.0"]) == licence_id([""]) == "other"

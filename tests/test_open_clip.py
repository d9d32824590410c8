"""OpenCLIP's layout: tiny random models made by open_clip and timm, names of the official ones, what is refused."""

import json
import warnings

import numpy as np
import pytest
from safetensors.numpy import save_file

from codebind_jax.models.rope import TABLES
from codebind_jax.trunks import open_clip
from tests import family_fixtures
from tests.checkpoint_fixtures import check_names, prefixed, write
from tests.torch_files import torch_zip

LIMIT = 2e-5
TINY = {"width": 24, "depth": 2, "heads": 2, "patch": (8, 8)}
TOWERS = {
  "eva01": TINY | {"mlp": 60},
  "eva02": TINY | {"mlp": 64, "act": "swiglu", "sub_norm": True, "rope": "eva"},
  "eva02_post": TINY | {"mlp": 72, "post_norm": True},
}


@pytest.fixture(scope="module")
def made():
  return family_fixtures.arrays("open_clip")


def weights_of(made, case):
  return prefixed(made, f"{case}/weights/")


def folder_of(made, path, case="plain", config=None, arrays=None, **model):
  config = {"model_cfg": json.loads(str(made[f"{case}/config"])) | model} if config is None else config
  return write(path, arrays or weights_of(made, case), "open_clip_model.safetensors", open_clip_config=config)


def batch_of(made, modality):
  return made["pixels"].transpose(0, 2, 3, 1) if modality == "image" else made["ids"]


def error(made, folder, wanted, modality="image", **options):
  trunk = open_clip.make_trunk(weights=str(folder), modality=modality, **options)
  return np.abs(trunk.embed(batch_of(made, modality)) - made[wanted]).max()


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_embeddings_equal_open_clip(made, tmp_path, modality, scan):
  for case in ("plain", "variant"):
    folder = folder_of(made, tmp_path / case, case)
    assert error(made, folder, f"{case}/{modality}", modality, scan=scan) < LIMIT, case
  assert open_clip.recognises(folder) and open_clip.modalities(folder) == ("image", "text")


@pytest.mark.parametrize("modality", ["image", "text"])
def test_the_activation_is_the_configs_and_the_other_one_is_seen(made, tmp_path, modality):
  folder = folder_of(made, tmp_path, quick_gelu=True)
  assert error(made, folder, f"quick/{modality}", modality) < LIMIT
  assert error(made, folder, f"plain/{modality}", modality) > 50 * LIMIT
  assert error(made, folder, f"plain/{modality}", modality, act="gelu") < LIMIT


def test_names_with_the_prefix_text_and_of_parallel_training_are_the_same_model(made, tmp_path):
  arrays = weights_of(made, "plain")
  custom = {n if n.startswith(("visual.", "logit")) else f"text.{n}": v for n, v in arrays.items()}
  assert sorted(custom) == list(made["custom_names"])
  for name, renamed in (("custom", custom), ("parallel", {f"module.{n}": v for n, v in arrays.items()})):
    folder = folder_of(made, tmp_path / name, arrays=renamed)
    for modality in ("image", "text"):
      assert error(made, folder, f"plain/{modality}", modality) < LIMIT


@pytest.mark.parametrize("case", TOWERS)
@pytest.mark.parametrize("scan", [False, True])
def test_eva_towers_equal_timm(made, tmp_path, monkeypatch, case, scan):
  monkeypatch.setitem(open_clip.TIMM, case, TOWERS[case])
  vision = {"image_size": 32, "timm_model_name": case, "timm_pool": "token", "timm_proj": None}
  config = {"embed_dim": 20, "vision_cfg": vision, "text_cfg": {}, "quick_gelu": True}  # timm's towers do not heed it
  folder = folder_of(made, tmp_path, config={"model_cfg": config}, arrays=weights_of(made, case))
  assert error(made, folder, f"{case}/image", scan=scan) < LIMIT


def test_bfloat16_is_close(made, tmp_path):
  for modality in ("image", "text"):
    folder = str(folder_of(made, tmp_path))
    trunk = open_clip.make_trunk(weights=folder, modality=modality, dtype="bfloat16", remat=True)
    assert (trunk.embed(batch_of(made, modality)) * made[f"plain/{modality}"]).sum(-1).min() > 0.99


def test_rotary_positions_leave_the_class_token_and_follow_the_grid():
  spec = open_clip.spec_of(open_clip.MODELS["EVA02-L-14-336"], "image", "here")
  rope = TABLES[spec.rope](spec, spec.size)
  assert rope.sin.shape == (1 + 24 * 24, 64) and not rope.sin[0].any() and rope.cos[0].all()
  np.testing.assert_allclose(rope.sin[2, 32], np.sin(16 / 24), rtol=1e-6)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("kind", ["bicubic", "bilinear"])
def test_pixels_equal_open_clips(made, mode, kind):
  item = open_clip._picture({"resize_mode": mode, "interpolation": kind, "fill_color": 7}, (19, 19), "here")
  for i, wanted in enumerate(made[f"made/{mode}/{kind}"]):
    np.testing.assert_array_equal(item.prepare(made[f"picture{i}"]), wanted, err_msg=str(i))


def test_mean_and_std_are_the_configs(made, tmp_path):
  config = {"model_cfg": json.loads(str(made["plain/config"])), "preprocess_cfg": {"mean": 0.5, "std": [0.1, 0.2, 0.3]}}
  spec = open_clip.make_trunk(weights=str(folder_of(made, tmp_path, config=config))).module.spec
  assert (spec.mean, spec.std) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))


def test_pixels_as_bytes_are_normalised_in_the_module(made, tmp_path):
  trunk = open_clip.make_trunk(weights=str(folder_of(made, tmp_path)))
  pixels = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(1, 32, 32, 3)
  floats = (pixels / 255.0 - np.array(open_clip.CLIP_MEAN)) / np.array(open_clip.CLIP_STD)
  np.testing.assert_allclose(trunk.embed(pixels), trunk.embed(floats.astype(np.float32)), atol=1e-6)


def test_ids_equal_open_clips(made, tmp_path):
  trunk = open_clip.make_trunk(weights=str(folder_of(made, tmp_path)), modality="text")
  ids = trunk.collate([trunk.preprocess(str(text)) for text in made["texts"]])
  np.testing.assert_array_equal(ids, made["ids"])


def test_shapes_and_names_of_every_official_model(tmp_path, monkeypatch):
  file = tmp_path / "weights.safetensors"
  file.write_bytes(b"")
  models = family_fixtures.official("open_clip")
  assert {name.removesuffix("-quickgelu") for name in open_clip.MODELS} == set(models)
  for model, shapes in models.items():
    monkeypatch.setattr(open_clip, "_weights", lambda path, shapes=shapes: family_fixtures.zeros(shapes, path))
    for modality in open_clip.MODALITIES:
      trunk = open_clip.make_trunk(weights=str(file), modality=modality, model=model, tag="laion2b", scan=True)
      check_names(trunk)


@pytest.mark.parametrize(
  "model,name,quick,differs",
  [
    ("ViT-B-32", "vit_b_32-quickgelu-laion400m_e32-46683a32", True, ()),
    ("ViT-B-32", "laion400m_e31", True, ()),
    ("ViT-B-16", "laion400m_e31", False, ()),
    ("ViT-B-32-quickgelu", "mine", True, ()),
    ("ViT-B-32", "openai", True, ()),
    ("ViT-B-32", "ViT-B-32", True, ()),
    ("ViT-L-14", "laion2b_s32b_b82k", False, ("mean", "std")),
    ("ViT-L-14", "dfn2b", True, ()),
    ("ViT-L-14", "dfn2b_s39b", False, ()),
    ("ViT-H-14-378", "dfn5b", True, ("resize_mode",)),
    ("ViT-H-14-quickgelu", "dfn5b", True, ("resize_mode",)),
    ("ViT-H-14", "metaclip_altogether", False, ()),
    ("ViT-L-14", "l14_fullcc2.5b", True, ()),
    ("ViT-B-16", "datacomp_xl_s13b_b90k", False, ()),
    ("ViT-g-14", "laion2b_s34b_b88k", False, ()),
    ("EVA02-L-14", "mine", False, ()),
  ],
)
def test_activation_and_preparation_of_published_weights(model, name, quick, differs):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert open_clip.is_quick(open_clip.MODELS[model], "", model, name, True, "here") == quick
  assert tuple((open_clip._published(model, name) or (0, {}))[1]) == differs


def test_a_bare_file_needs_the_models_name_and_warns_of_an_activation_that_nothing_tells(made, tmp_path, monkeypatch):
  monkeypatch.setitem(open_clip.MODELS, "tiny", json.loads(str(made["plain/config"])))
  file = tmp_path / "mine.safetensors"
  save_file(weights_of(made, "plain"), file)
  assert open_clip.recognises(file) and open_clip.modalities(file) == ("image", "text")
  with pytest.raises(ValueError, match=r"model: got '' for .*mine.safetensors.*ViT-B-32, "):
    open_clip.make_trunk(weights=str(file))
  with pytest.warns(UserWarning, match="mine.safetensors.*QuickGELU"):
    open_clip.make_trunk(weights=str(file), model="tiny")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert error(made, file, "plain/image", model="tiny", tag="datacomp_xl_s13b_b90k") < LIMIT
    assert error(made, file, "quick/text", "text", model="tiny", tag="openai") < LIMIT
    assert error(made, file, "quick/image", model="tiny", act="quick_gelu") < LIMIT


@pytest.mark.parametrize("wrapper", ["", "state_dict"])
def test_torch_files_load_and_are_recognised_by_their_names(made, tmp_path, monkeypatch, wrapper):
  content = torch_zip(weights_of(made, "plain"), wrapper)
  folder = folder_of(made, tmp_path / "folder")
  (tmp_path / "folder" / "open_clip_model.safetensors").unlink()
  (tmp_path / "folder" / "open_clip_pytorch_model.bin").write_bytes(content)
  assert error(made, folder, "plain/image") < LIMIT
  monkeypatch.setitem(open_clip.MODELS, "tiny", json.loads(str(made["plain/config"])))
  file = tmp_path / "epoch_3.pt"
  file.write_bytes(content)
  assert open_clip.recognises(file) and not open_clip.recognises(tmp_path / "nothing.pt")
  assert error(made, file, "plain/text", "text", model="tiny", act="gelu") < LIMIT
  file.write_bytes(content[:1000])
  assert not open_clip.recognises(file)
  with pytest.raises(ValueError, match="epoch_3.pt"):
    open_clip.make_trunk(weights=str(file), model="tiny", act="gelu")


@pytest.mark.parametrize(
  "change,said",
  [
    ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, "a ResNet"),
    ({"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_224"}}, "vit_base_patch16_siglip_224"),
    ({"vision_cfg": {"attentional_pool": True}}, "vision_cfg.attentional_pool = True"),
    ({"vision_cfg": {"pool_type": "avg"}}, "vision_cfg.pool_type"),
    ({"vision_cfg": {"patch_normaliser": 1}}, "vision_cfg.patch_normaliser = 1"),
    ({"text_cfg": {"hf_model_name": "roberta-base"}}, "roberta-base"),
    ({"text_cfg": {"hf_tokenizer_name": "bert-base-uncased"}}, "bert-base-uncased"),
    ({"text_cfg": {"embed_cls": True}}, "text_cfg.embed_cls"),
    ({"text_cfg": {"vocab_size": 100}}, "49408 ids"),
    ({"text_cfg": {"tokenizer_kwargs": {"clean": "canonicalize"}}}, "canonicalize"),
  ],
)
def test_a_tower_that_is_not_supported_is_refused_by_its_name(made, tmp_path, change, said):
  config = json.loads(str(made["plain/config"]))
  part = next(iter(change))
  config[part] = config[part] | change[part]
  folder = folder_of(made, tmp_path, config={"model_cfg": config})
  modality = "image" if part == "vision_cfg" else "text"
  other = "text" if modality == "image" else "image"
  assert open_clip.modalities(folder) == (other,)
  with pytest.raises(ValueError, match=f"(?s)open_clip_config.json: .*{said}"):
    open_clip.make_trunk(weights=str(folder), modality=modality)
  assert open_clip.make_trunk(weights=str(folder), modality=other).modality == other


def test_a_folder_without_a_supported_tower_is_refused_by_the_first_one(made, tmp_path):
  vision = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"}
  config = {"embed_dim": 768, "vision_cfg": vision, "text_cfg": {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}}
  folder = folder_of(made, tmp_path, config={"model_cfg": config})
  assert open_clip.recognises(folder)
  with pytest.raises(ValueError, match="open_clip_config.json: the tower 'vit_base_patch16_siglip_224' of timm"):
    open_clip.modalities(folder)


def test_arrays_that_do_not_fit_are_named_all_at_once(made, tmp_path):
  arrays = weights_of(made, "plain")
  arrays["visual.strange"] = arrays.pop("visual.ln_pre.bias")
  arrays["visual.conv1.weight"] = arrays["visual.conv1.weight"][:8]
  arrays["visual.proj"] = arrays["visual.proj"][:, :8]
  trunk = open_clip.make_trunk(weights=str(folder_of(made, tmp_path, arrays=arrays)))
  with pytest.raises(ValueError, match=r"(?s)open_clip_model.*visual.ln_pre.bias.*visual.strange.*visual.conv1.weight"):
    trunk.params
  with pytest.raises(ValueError, match="visual.proj"):
    trunk.head_params


def test_what_is_no_checkpoint_is_refused(made, tmp_path):
  with pytest.raises(ValueError, match="does not exist"):
    open_clip.make_trunk(weights=str(tmp_path / "nowhere"))
  with pytest.raises(ValueError, match="not a folder of OpenCLIP"):
    open_clip.make_trunk(weights=str(tmp_path))
  folder = folder_of(made, tmp_path / "model")
  with pytest.raises(ValueError, match="has no 'audio'; it has image, text"):
    open_clip.make_trunk(weights=str(folder), modality="audio")
  with pytest.raises(ValueError, match="act: got 'relu'"):
    open_clip.make_trunk(weights=str(folder), act="relu")
  (folder / "open_clip_model.safetensors").unlink()
  with pytest.raises(ValueError, match="no weights; looked for open_clip_model.safetensors"):
    open_clip.make_trunk(weights=str(folder))
  (folder / "open_clip_config.json").write_text("[")
  assert not open_clip.recognises(folder) and not open_clip.recognises(folder / "open_clip_config.json")
  with pytest.raises(ValueError, match="not JSON"):
    open_clip.make_trunk(weights=str(folder))

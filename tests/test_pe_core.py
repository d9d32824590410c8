"""PE-Core in its own layout: against timm's and open_clip's copies, on tiny weights; the official names and shapes."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import codebind_jax
from codebind_jax.trunks import open_clip, pe_core
from tests import family_fixtures

WANT = family_fixtures.arrays("pe_core")
RAW = {"image": [WANT[f"raw{i}"] for i in range(4)], "text": [str(text) for text in WANT["texts"]]}
IN = {"image": WANT["pixels"], "text": WANT["ids"].astype(np.int32)}
OFFICIAL = family_fixtures.official("pe_core")


def state(kind="class"):
  """The weights by name; of the vocabulary only the rows that the texts use were kept."""
  weights = {name.removeprefix(f"{kind}:"): value for name, value in WANT.items() if name.startswith(f"{kind}:")}
  if "token_embedding.weight" in weights:
    rows = weights["token_embedding.weight"]
    weights["token_embedding.weight"] = np.zeros((49408, rows.shape[1]), np.float32)
    weights["token_embedding.weight"][WANT["used"]] = rows
  return weights | {"logit_scale": np.float32(np.log(50.0))}


SWAPS = (
  ("visual.proj", "visual.trunk.head.weight"), ("visual.conv1", "visual.trunk.patch_embed.proj"),
  ("visual.positional_embedding", "visual.trunk.pos_embed"), ("visual.class_embedding", "visual.trunk.cls_token"),
  ("visual.ln_pre", "visual.trunk.norm_pre"), ("visual.ln_post", "visual.trunk.norm"),
  ("visual.transformer.resblocks", "visual.trunk.blocks"), (".ln_1", ".norm1"), (".ln_2", ".norm2"),
  (".attn.in_proj_", ".attn.qkv."), (".attn.out_proj", ".attn.proj"), ("mlp.c_fc", "mlp.fc1"),
  ("mlp.c_proj", "mlp.fc2"),
)  # fmt: skip


def timm_state():
  """The weights in OpenCLIP's layout."""
  out = {"logit_scale": state()["logit_scale"], "visual.trunk.head.bias": np.zeros(24, np.float32)}
  for name, value in state().items():
    if name.startswith("visual.attn_pool"):
      name = name.replace("visual.attn_pool", "visual.trunk.attn_pool")
      for old, new in (("probe", "latent"), (".layernorm.", ".norm."), (".attn.out_proj.", ".proj."), *SWAPS[-2:]):
        name = name.replace(old, new)
      if "in_proj" in name:
        kind, width = name.rsplit("_", 1)[1], len(value) // 3
        out[f"visual.trunk.attn_pool.q.{kind}"], out[f"visual.trunk.attn_pool.kv.{kind}"] = value[:width], value[width:]
        continue
    elif name.startswith("visual."):
      for old, new in SWAPS:
        name = name.replace(old, new)
      value = value.T if name.endswith("head.weight") else value
      value = value[None] if name.endswith("pos_embed") else value[None, None] if name.endswith("cls_token") else value
    elif name != "logit_scale":
      name = f"text.{name}"
    out[name] = value
  return out


def write(path, weights):
  save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, path)
  return path


def error(path, modality="image"):
  with pytest.raises(ValueError) as caught:
    trunk = pe_core.make_trunk(weights=str(path), modality=modality)
    assert trunk.params and trunk.head_params
  return str(caught.value)


FORMS = (("image", "class", False), ("image", "class", True), ("image", "plain", False), ("text", "class", False))


@pytest.mark.parametrize("modality, kind, scan", FORMS)
def test_embeddings_and_preparation_are_those_of_timm_and_open_clip(tmp_path, modality, kind, scan):
  path = write(tmp_path / "PE-Core-tiny.safetensors", state(kind))
  assert pe_core.recognises(path) and pe_core.recognises(tmp_path) and not open_clip.recognises(path)
  trunk = pe_core.make_trunk(weights=str(tmp_path), modality=modality, scan=scan)
  np.testing.assert_allclose(trunk.embed(IN[modality]), WANT[f"{kind}_{modality}"], atol=2e-6)
  got = trunk.collate([trunk.preprocess(trunk.read(item)) for item in RAW[modality]])
  np.testing.assert_array_equal(got, IN[modality])
  assert trunk.head.logit_scale == pytest.approx(50.0)


@pytest.mark.parametrize("modality", pe_core.MODALITIES)
def test_the_layout_of_openclip(tmp_path, modality):
  config = {"model_cfg": {"vision_cfg": {"timm_model_name": "vit_pe_core_tiny_patch16_384"}, "text_cfg": {}}}
  (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
  write(tmp_path / "open_clip_model.safetensors", timm_state())
  assert pe_core.recognises(tmp_path) and not open_clip.recognises(tmp_path)
  assert pe_core.modalities(tmp_path) == ("image", "text")
  trunk = pe_core.make_trunk(weights=str(tmp_path), modality=modality)
  np.testing.assert_allclose(trunk.embed(IN[modality]), WANT[f"class_{modality}"], atol=2e-6)


@pytest.mark.parametrize("timm", [False, True])
def test_a_model_is_saved_and_loads_again(tmp_path, timm):
  path = write(tmp_path / "PE-Core-tiny.safetensors", state())
  if timm:
    path = tmp_path / "timm"
    path.mkdir()
    config = {"model_cfg": {"vision_cfg": {"timm_model_name": "vit_pe_core_tiny_patch16_384"}}}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    write(path / "open_clip_model.safetensors", timm_state())
  codebind_jax.load(str(path)).save(tmp_path / "saved")
  got = codebind_jax.load(str(tmp_path / "saved")).embed(RAW)
  for modality in pe_core.MODALITIES:
    np.testing.assert_allclose(got[modality].shared, WANT[f"class_{modality}"], atol=2e-6)


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_array_of_the_official_models_is_accounted_for(tmp_path, monkeypatch, name):
  file = tmp_path / ("open_clip_config.json" if "timm" in name else f"{name}.pt")
  file.write_text(json.dumps(OFFICIAL[name].get("config")))
  weights = family_fixtures.zeros(OFFICIAL[name]["shapes"], file)
  monkeypatch.setattr(pe_core, "open_weights", lambda path: weights)
  monkeypatch.setattr(pe_core, "folder_weights", lambda path, stems: weights)
  for modality in pe_core.MODALITIES:
    trunk = pe_core.make_trunk(weights=str(tmp_path), modality=modality, scan=True)
    family_fixtures.load_all(trunk)
    side = 224 if "B16" in name or "B-16" in name else int(name[-3:])
    context = 72 if "G14" in name or "bigG" in name else 32
    assert trunk.input.shape == ((side, side, 3) if modality == "image" else (context,))
    heads = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 20, 1536: 16}
    assert trunk.module.spec.heads == heads[trunk.module.spec.width]


def test_bad_files_are_refused_by_name(tmp_path):
  assert "does not exist" in error(tmp_path / "nowhere.pt")
  assert "neither a file of weights nor a folder" in error(tmp_path)
  path, good = tmp_path / "PE-Core-tiny.safetensors", state()
  write(path, good)
  assert "no 'audio'; it has image, text" in error(path, "audio")
  write(path, {name: value for name, value in good.items() if "attn_pool" not in name})
  assert "PE-Lang and PE-Spatial" in error(path) and not pe_core.recognises(path)
  write(path, {name: value for name, value in good.items() if name.startswith("visual.")})
  assert "no 'text'; it has image" in error(path, "text")
  bad = {name: value for name, value in good.items() if name != "visual.ln_pre.bias"}
  write(path, bad | {"visual.extra": np.zeros(3, np.float32), "visual.ln_post.bias": np.zeros(5, np.float32)})
  text = error(path)
  assert all(part in text for part in (str(path), "visual.ln_pre.bias", "visual.extra", "visual.ln_post.bias (5,)"))
  path.write_bytes(path.read_bytes()[:-100])
  assert "cut short" in error(path) and not pe_core.recognises(path)

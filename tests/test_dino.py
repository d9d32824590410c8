"""DINOv2 and DINOv3 in Hugging Face layout: tiny random models by transformers, names of the official ones."""

import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax.models.rope import TABLES
from codebind_jax.models.stems import resize_positions
from codebind_jax.trunks import dino
from tests import family_fixtures
from tests.checkpoint_fixtures import check_names, write

LIMIT = 2e-5
CASES = ("v2", "v2_registers", "v2_giant", "v3", "v3_gated")


def case_of(name, path, **changes):
  return str(family_fixtures.unpack(f"dino_{name}", path, **changes)), family_fixtures.arrays(f"dino_{name}")


def tokens_of(trunk, pixels):
  return trunk.head.module.apply({"params": trunk.head_params}, trunk.compiled(trunk.params, pixels))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_embeddings_and_tokens_equal_transformers(tmp_path, name, scan):
  folder, made = case_of(name, tmp_path)
  assert dino.recognises(tmp_path) and dino.modalities(tmp_path) == ("image",)
  trunk, pixels = dino.make_trunk(weights=folder, scan=scan), made["pixels"].transpose(0, 2, 3, 1)
  assert np.abs(trunk.embed(pixels) - made["image_embeds"]).max() < LIMIT
  if not scan:
    tokens = tokens_of(trunk, pixels)
    assert tokens.shape == made["tokens"].shape and np.abs(tokens - made["tokens"]).max() < 5 * LIMIT


@pytest.mark.parametrize("name", CASES)
def test_pictures_are_prepared_as_by_the_processor(tmp_path, name):
  folder, made = case_of(name, tmp_path)
  trunk = dino.make_trunk(weights=folder)
  batch = trunk.collate([trunk.preprocess(made[f"image{i}"]) for i in range(4)])
  wanted, spec = made["pixels"].transpose(0, 2, 3, 1), trunk.module.spec
  if batch.dtype == np.uint8:
    np.testing.assert_array_equal(batch, np.rint((wanted * spec.std + spec.mean) * 255).astype(np.uint8))
    assert np.abs(trunk.embed(batch) - made["image_embeds"]).max() < LIMIT
  else:
    assert name.startswith("v3") and batch.dtype == np.float32
    np.testing.assert_allclose(batch, wanted, atol=1e-5)  # 1e-5 of a standard deviation: float32 sums in another order


@pytest.mark.parametrize("name", CASES)
def test_names_of_transformers_modules_load_as_well(tmp_path, name):
  folder, made = case_of(name, tmp_path)
  arrays = family_fixtures.weights_of(tmp_path)
  renames = (("attention.attention.query", "attention.q_proj"), ("attention.attention.key", "attention.k_proj"),
             ("attention.attention.value", "attention.v_proj"), ("attention.output.dense", "attention.o_proj"),
             ("mlp.weights_out", "mlp.down_proj"))  # fmt: skip
  new = {}
  for key, value in arrays.items():
    key = "model." + key if key.startswith("layer.") else key
    for old, other in renames:
      key = key.replace(old, other)
    if "weights_in" in key:
      gate, up = np.split(value, 2)
      new |= {key.replace("weights_in", "gate_proj"): gate, key.replace("weights_in", "up_proj"): up}
    else:
      new[key] = value
  assert sorted(new) == list(made["new_names"])
  start = "dinov2." if name == "v2" else ""  # as in a classifier's file
  write(tmp_path, {start + key: value for key, value in new.items()})
  trunk = dino.make_trunk(weights=folder)
  assert np.abs(trunk.embed(made["pixels"].transpose(0, 2, 3, 1)) - made["image_embeds"]).max() < LIMIT


def test_names_and_shapes_of_every_official_model(tmp_path, monkeypatch):
  for name, model in family_fixtures.official("dino").items():
    shapes = model["shapes"]
    folder = tmp_path / name
    write(folder, {}, config=model["files"]["config.json"])
    file = folder / "model.safetensors"
    monkeypatch.setattr(dino, "folder_weights", lambda path, shapes=shapes, f=file: family_fixtures.zeros(shapes, f))
    trunk = dino.make_trunk(weights=str(folder), scan=True)
    check_names(trunk)
    assert trunk.input.shape == (224, 224, 3)
    assert trunk.num_tokens == 1 + trunk.module.spec.registers + (224 // trunk.module.spec.patch[0]) ** 2


def test_registers_models_resize_positions_with_antialiasing_and_the_others_without(tmp_path):
  for name, other in (("v2", "antialias"), ("v2_registers", "cubic")):
    folder, made = case_of(name, tmp_path / name)
    trunk = dino.make_trunk(weights=folder)
    positions, spec = trunk.params["stem"]["positions"], trunk.module.spec
    right, wrong = (resize_positions(positions, (9, 9), (4, 5), filter=f) for f in (spec.position_filter, other))
    assert np.abs(right - wrong).max() > 0.01
    at = np.concatenate([[0], np.arange(1 + spec.registers, 21 + spec.registers)])
    np.testing.assert_array_equal(right[0], positions[0])
    assert len(at) == len(right) and made["tokens"].shape[1] == 21 + spec.registers


def test_dinov3_turns_patches_alone_by_their_middles():
  spec = dino.spec_of({"model_type": "dinov3_vit", "num_register_tokens": 4}, {}, "here")
  rope = TABLES["dinov3"](spec, (224, 224))
  assert rope.sin.shape == (1 + 4 + 14 * 14, 64) and not rope.sin[:5].any() and (rope.cos[:5] == 1).all()
  np.testing.assert_allclose(rope.sin[5, 0], np.sin(2 * np.pi * (1 / 14 - 1)), atol=1e-6)
  np.testing.assert_allclose(rope.sin[6, 16], np.sin(2 * np.pi * (3 / 14 - 1)), atol=1e-6)
  np.testing.assert_array_equal(rope.sin[:, :32], rope.sin[:, 32:])


def test_a_picture_of_another_size_is_encoded(tmp_path):
  for name in ("v2_registers", "v3"):
    folder, _ = case_of(name, tmp_path / name)
    trunk = dino.make_trunk(weights=folder)
    tokens = trunk.apply(trunk.params, jnp.zeros((1, 24, 32, 3)))
    assert tokens.shape[1] == trunk.module.spec.prefix + 6 * 8 and jnp.isfinite(tokens).all()


@pytest.mark.parametrize("name", ["v2_giant", "v3_gated"])
def test_bfloat16_is_close(tmp_path, name):
  folder, made = case_of(name, tmp_path)
  trunk = dino.make_trunk(weights=folder, dtype="bfloat16")
  assert (trunk.embed(made["pixels"].transpose(0, 2, 3, 1)) * made["image_embeds"]).sum(-1).min() > 0.99


@pytest.mark.parametrize(
  "name,changes,said",
  [
    ("v2", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
    ("v3", {"mlp_bias": False}, "mlp_bias = False is not supported"),
    ("v3_gated", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; allowed: silu"),
    ("v2", {"model_type": "vit"}, "model_type 'vit'"),
  ],
)
def test_what_is_not_supported_is_refused_by_its_name(tmp_path, name, changes, said):
  folder, _ = case_of(name, tmp_path, **changes)
  with pytest.raises(ValueError, match=said):
    dino.make_trunk(weights=folder)


def test_bad_folders_are_refused(tmp_path):
  with pytest.raises(ValueError, match="no such path"):
    dino.make_trunk(weights=str(tmp_path / "nowhere"))
  folder, _ = case_of("v3", tmp_path / "v3")
  with pytest.raises(ValueError, match="has no 'text'; it has image"):
    dino.make_trunk(weights=folder, modality="text")
  arrays = family_fixtures.weights_of(tmp_path / "v3")
  arrays["layer.0.strange"] = arrays.pop("layer.1.mlp.up_proj.bias")
  arrays["embeddings.cls_token"] = arrays["embeddings.cls_token"][..., :5]
  write(tmp_path / "v3", arrays)
  with pytest.raises(ValueError, match=r"(?s)model.safe.*: missing.*1.mlp.up_proj.bias.*0.strange.*cls_token"):
    dino.make_trunk(weights=folder).params
  (tmp_path / "v3" / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 20}}')
  with pytest.raises(ValueError, match="preprocessor_config.json: .*shortest_edge"):
    dino.make_trunk(weights=folder)
  (tmp_path / "v3" / "model.safetensors").unlink()
  with pytest.raises(ValueError, match="no weights; looked for"):
    dino.make_trunk(weights=folder)
  (tmp_path / "v3" / "config.json").write_text("{")
  assert not dino.recognises(tmp_path / "v3")

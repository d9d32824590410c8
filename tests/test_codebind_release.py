"""The CodeBind release's folder: towers, codebooks and sizes from its files, against what the release computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml
from absl import logging
from flax.traverse_util import flatten_dict

import codebind_jax
from codebind_jax.codebook import CodebookState
from codebind_jax.compositional import CompositionalSpec, quantize_modalities
from codebind_jax.models import towers
from codebind_jax.models.encoder import Encoder, mean_clips
from codebind_jax.norm import unit
from codebind_jax.trunks import codebind_release, imagebind
from codebind_jax.trunks.checkpoint_files import Weights, noted, write_shapes
from tests.model_fixtures import CLIPS, SHARED, SPECIFIC, error, golden, inputs, jit, official, spec, state_dict
from tests.torch_files import torch_zip

A, LORA, STEP = (golden(f"codebind_model_tiny_{name}") for name in ("encoder", "lora", "step"))
MODALITIES = ("image", "text", "audio", "depth", "tactile", "eeg")
BOOKS = {"shared": "common", "image": "vision", "audio": "audio"}
MODULES = {"modality_preprocessors": "preprocessors", "modality_heads": "heads", "modality_heads_mvq": "heads_mvq",
           "modality_postprocessors": "postprocessors", "decoder_trunks": "decoder_trunk",
           "decoder_heads": "decoder_head"}  # fmt: skip
SETTINGS = {"expname": "x", "encoder": {"use_both_head": True, "add_new_output_head": True},
            "vector_quantise": {"distance": "cos", "norm_code": True, "seg_type": 1}}  # fmt: skip


def codebook_arrays():
  arrays = {}
  for name in BOOKS.values():
    codes = STEP[f"step/vq_init/{name}/weight"]
    arrays |= {f"mvq_dict.{name}.embedding.weight": codes, f"mvq_dict.{name}.initted": np.ones(1, np.float32),
               f"mvq_dict.{name}.embedding.embed_avg": STEP[f"step/vq_init/{name}/embed_avg"],
               f"mvq_dict.{name}.embedding.cluster_size": STEP[f"step/vq_init/{name}/cluster_size"],
               f"mvq_dict.{name}.embed_prob": np.linspace(0, 1, len(codes), dtype=np.float32)}  # fmt: skip
  return arrays


def write(folder, *, lora=(), postfix="_best", lora_postfix="_best", changes=None, base=True, settings=SETTINGS,
          whole=()):  # fmt: skip
  """A folder in the release's layout from the fixture's arrays.

  Args:
    folder: to be written.
    lora: groups of the fixture's adapters.
    postfix, lora_postfix: of the files.
    changes: official names -> arrays, instead of the fixture's.
    base: whether the base checkpoint lies beside it; it holds the encoders, with other heads.
    settings: content of cfg_all_train.yaml.
    whole: modules that are one file for all modalities.
  """
  folder.mkdir(parents=True, exist_ok=True)
  state = state_dict() | state_dict("dec/w/") | (changes or {})
  files = {}
  for name, value in state.items():
    module, modality, rest = name.split(".", 2)
    ours = codebind_release.ours(modality)
    if module in MODULES and ours in MODALITIES and value is not None:
      key = (MODULES[module], "" if MODULES[module] in whole else f"-{modality}")
      files.setdefault(key, {})[f"{modality}.{rest}" if not key[1] else rest] = value
  files.setdefault(("postprocessors", "-vision"), {})  # the image has no factor: its file holds no tensor
  for (module, modality), arrays in files.items():
    (folder / f"imagebind-{module}{modality}{postfix}.pth").write_bytes(torch_zip(arrays))
  (folder / f"imagebind-vector_quantise-{postfix}.pth").write_bytes(torch_zip(codebook_arrays()))
  for group in lora:
    modality = group.split("_")[1]
    arrays = {k.removeprefix("lora_model."): np.asarray(v, order="C") for k, v in state_dict(f"{group}/w/").items()}
    safetensors.numpy.save_file(arrays, folder / f"imagebind-lora-{modality}{lora_postfix}.safetensors")
  if settings is not None:
    (folder / "cfg_all_train.yaml").write_text(yaml.safe_dump(settings))
  if base:
    heads = {n: np.full_like(v, 7) if n.startswith("modality_heads.") else v for n, v in state_dict().items()
             if n.startswith(("modality_trunks.", "modality_preprocessors.", "modality_heads."))}  # fmt: skip
    (folder / "imagebind_huge.pth").write_bytes(torch_zip(heads))
  return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write(tmp_path_factory.mktemp("release") / "asa", lora=("lora_audio_all",))


@pytest.fixture(scope="module")
def release(folder):
  return codebind_release.open_release(folder)


@functools.cache
def encode(modality, drop_text_mask=False):
  return jit(Encoder(spec(modality), drop_text_mask=drop_text_mask).apply)


def features(tower, modality, drop_text_mask=False):
  """Trunk output of a tower's parameters, and the features of its heads, clips averaged after normalising."""
  out = encode(modality, drop_text_mask)({"params": tower["trunk"]}, inputs(modality))
  heads = {part: tower[part] for part in ("shared", "specific") if part in tower}
  widths = [heads[part]["proj"]["kernel"].shape[1] if part in heads else 0 for part in ("shared", "specific")]
  model = towers.Tower(towers.TowerSpec(*widths))
  full = unit(jit(model.apply)({"params": heads}, out.tokens))
  return jax.device_get(out.trunk), jax.device_get(mean_clips(full, CLIPS.get(modality, 1)))


def test_what_a_release_has(release, folder):
  assert codebind_release.recognises(folder) and not imagebind.recognises(folder / "imagebind-heads-audio_best.pth")
  assert set(codebind_release.modalities(folder)) == set(release.modalities) == set(MODALITIES)
  assert release.adapted == ("audio",)
  sizes = release.sizes()
  assert sizes.shared_dim == SHARED
  assert dict(sizes.specific_dims) == {m: SPECIFIC[m] for m in MODALITIES}
  assert dict(sizes.code_dims) == {"shared": 8, "image": 8, "audio": 8}
  assert dict(sizes.codes) == {"shared": 40, "image": 20, "audio": 20}
  assert (sizes.distance, sizes.normalize, sizes.layout) == ("cosine", True, "parts")
  assert list(release.towers()["text"]) == ["trunk", "shared"]


@pytest.mark.parametrize("modality", ["image", "text", "depth", "eeg"])
def test_towers_equal_the_release(modality, release):
  _, out = features(release.tower(modality), modality)
  name = official(modality)
  assert error(out[:, 0], A[f"A/{name}"]) < 1e-5
  if modality != "text":
    assert error(out[:1, ::4], A[f"A/{name}_all_tokens"]) < 1e-5


@pytest.mark.parametrize("group", ["lora_audio_all", "lora_depth_attn", "lora_text_all"])
def test_adapters_are_merged(group, tmp_path):
  modality = group.split("_")[1]
  opened = codebind_release.open_release(write(tmp_path, lora=(group,)))
  tower = opened.tower(modality)
  assert not [path for path in flatten_dict(tower) if path[-1].startswith("lora_")]
  trunk, _ = features(tower, modality, drop_text_mask=modality == "text")
  want = LORA[f"{group}/trunk_output"]
  assert error(trunk if modality == "text" else trunk[:1, ::4], want) < 1e-5
  found = codebind_release.make_trunk(weights=str(tmp_path), modality=modality, heads=spec(modality).heads, scan=True)
  assert found.module.drop_text_mask == (modality == "text")  # the release's adapted text looks ahead
  tokens = found.compiled(found.params, inputs(modality))
  if modality == "text":
    assert error(tokens[:, 0], trunk[np.arange(len(trunk)), inputs(modality).argmax(1)]) < 1e-5
  else:
    assert error(tokens[:1, ::4], want) < 1e-5


def test_codebooks_are_the_release_s(release):
  books = release.codebooks()
  assert set(books) == set(BOOKS)
  for ours, theirs in BOOKS.items():
    state = books[ours]
    assert isinstance(state, CodebookState) and bool(state.initialised)
    for field, name in (("codes", "weight"), ("ema_count", "cluster_size"), ("ema_sum", "embed_avg")):
      np.testing.assert_array_equal(getattr(state, field), STEP[f"step/vq_init/{theirs}/{name}"])
    np.testing.assert_allclose(state.usage, np.linspace(0, 1, len(state.codes)), rtol=1e-6)


def test_quantised_tokens_and_later_codebooks_equal_the_release(release):
  sizes, books = release.sizes(), release.codebooks()
  chosen = CompositionalSpec(sizes.shared_dim, 0, tuple(sizes.specific_dims.items()), distance=sizes.distance,
                             normalize=sizes.normalize, layout=sizes.layout, revive="none")  # fmt: skip
  for m in ("text", "image", "audio"):
    tokens = {m: jnp.asarray(STEP[f"step/in/{official(m)}"])}
    out, books = quantize_modalities(tokens, books, chosen, update="sequential")
    assert error(out[m].full, STEP[f"step/{official(m)}_vq"]) < 1e-5
  for ours, theirs in BOOKS.items():
    assert error(books[ours].codes, STEP[f"step/vq_after/{theirs}/weight"]) < 1e-5


def test_codes_of_an_optimizer_have_counts_of_one(tmp_path):
  write(tmp_path, base=False)
  codes = {n: v for n, v in codebook_arrays().items() if n.endswith("embedding.weight") or n.endswith("initted")}
  codes["mvq_dict.audio.initted"] = np.zeros(1, np.float32)
  (tmp_path / "imagebind-vector_quantise-_best.pth").write_bytes(torch_zip(codes))
  books = codebind_release.open_release(tmp_path, needs_base=False).codebooks()
  np.testing.assert_array_equal(books["shared"].ema_count, np.ones(40))
  np.testing.assert_array_equal(books["shared"].ema_sum, books["shared"].codes)
  assert bool(books["image"].initialised) and not bool(books["audio"].initialised)


def test_one_head_for_both_parts_is_cut_in_two(tmp_path):
  settings = {**SETTINGS, "encoder": {"use_both_head": False}}
  opened = codebind_release.open_release(write(tmp_path, changes=state_dict("wB/"), settings=settings))
  assert dict(opened.sizes().specific_dims) == {m: SPECIFIC[m] for m in MODALITIES}
  for modality in ("depth", "text"):
    _, out = features(opened.tower(modality), modality)
    assert error(out[:, 0] * opened.logit_scale(modality), A[f"B/{modality}"]) < 1e-5


def test_decoders(release):
  for modality, count in {"image": 257, "audio": 229, "depth": 197, "tactile": 197}.items():
    decoder, params = release.decoder(modality)
    assert (decoder.width, decoder.depth, decoder.trunk_dim) == (16, 2, spec(modality).width)
    tokens, trunk = jnp.zeros((1, count, SHARED + SPECIFIC[modality])), jnp.zeros((1, count, spec(modality).width))
    out = jax.eval_shape(decoder.apply, {"params": params}, tokens, trunk, trunk[0])
    assert out.shape[-1] == spec(modality).channels
    theirs = state_dict("dec/w/")[f"decoder_trunks.{official(modality)}.decoder_embed.weight"]
    np.testing.assert_array_equal(params["embed"]["kernel"], theirs.T)
  assert release.decoder("text") is None and release.decoder("eeg") is None


# --- the trunk


def test_the_trunk_s_embedding_is_the_shared_part_before_quantisation(folder, release):
  found = codebind_release.make_trunk(weights=str(folder), modality="depth", heads=spec("depth").heads)
  _, full = features(release.tower("depth"), "depth")
  np.testing.assert_allclose(found.embed(inputs("depth")), unit(jnp.asarray(full[:, 0, :SHARED])), atol=1e-5)
  assert found.licence.startswith("CC-BY-NC 4.0")
  np.testing.assert_allclose(found.head.logit_scale, np.exp(state_dict()[imagebind.scale_name("depth")]), rtol=1e-6)
  assert found.fingerprint != imagebind.make_trunk(
    weights=str(folder / "imagebind_huge.pth"), modality="depth", heads=spec("depth").heads).fingerprint
  film = codebind_release.make_trunk(weights=str(folder), modality="video", heads=4)
  assert film.module.spec == dataclasses.replace(spec("image"), mlp=4 * spec("image").width)
  assert film.head.logit_scale == 1.0


def test_the_same_trunk_is_made_of_the_files_shapes(folder, tmp_path):
  """A saved model keeps no values of its trunks' checkpoints."""
  for modality in ("audio", "text"):
    options = {"modality": modality, "heads": spec(modality).heads}
    with noted() as notes:
      found = codebind_release.make_trunk(weights=str(folder), **options)
    kept = tmp_path / modality
    kept.mkdir()
    for path, content in notes.items():
      if isinstance(content, Weights):
        write_shapes(kept / path.name, content)
      else:
        (kept / path.name).write_bytes(content)
    again = codebind_release.make_trunk(weights=str(kept), **options)
    assert again.fingerprint == found.fingerprint and again.head.logit_scale == pytest.approx(found.head.logit_scale)
    assert jax.tree.map(jnp.shape, again.shapes) == jax.tree.map(jnp.shape, found.params)
    with pytest.raises(ValueError, match="shapes alone"):
      again.params


# --- files


def test_the_best_state_is_chosen_and_any_can_be_named(tmp_path, caplog):
  logging.get_absl_logger().propagate = True
  write(tmp_path, lora=("lora_audio_all",), lora_postfix="_last")
  (tmp_path / "imagebind-heads-depth_last.pth").write_bytes(torch_zip({"2.weight": np.zeros((3, 3), np.float32)}))
  with caplog.at_level("WARNING", logger="absl"):
    opened = codebind_release.open_release(tmp_path)
  assert "imagebind-lora-audio_last.safetensors: taken" in caplog.text
  assert opened.sizes().shared_dim == SHARED and opened.adapted == ("audio",)
  with pytest.raises(ValueError, match="holds no codebooks"):
    codebind_release.open_release(tmp_path, postfix="_last")
  with pytest.raises(ValueError, match="postfix '_first': give one of those that are there: _best, _last"):
    codebind_release.open_release(tmp_path, postfix="_first")


def test_checkpoints_below_and_settings_above_and_files_of_all_modalities(tmp_path, folder):
  whole = ("heads", "postprocessors")
  write(tmp_path / "exp" / "checkpoints", base=False, settings=None, postfix="_dreambooth_last", whole=whole)
  (tmp_path / "exp" / "cfg_all_train.yaml").write_text(yaml.safe_dump({"vector_quantise": {"distance": "l2"}}))
  base = str(folder / "imagebind_huge.pth")
  opened = codebind_release.open_release(tmp_path / "exp", base)
  assert opened.sizes().distance == "l2" and set(opened.modalities) == set(MODALITIES)
  _, out = features(opened.tower("depth"), "depth")
  assert error(out[:, 0], A["A/depth"]) < 1e-5


def test_new_postprocessors_and_tuned_trunks_replace_the_old_ones(tmp_path):
  write(tmp_path)
  scale = {"log_logit_scale": np.asarray(1.5, np.float32)}
  (tmp_path / "imagebind-postprocessors_new-depth_best.pth").write_bytes(torch_zip(scale))
  trunk = {n.removeprefix("modality_trunks.depth."): v + 1 for n, v in state_dict().items()
           if n.startswith("modality_trunks.depth.")}
  (tmp_path / "imagebind-trunks-depth_best.pth").write_bytes(torch_zip(trunk))
  opened = codebind_release.open_release(tmp_path)
  np.testing.assert_allclose(opened.logit_scale("depth"), np.exp(1.5), rtol=1e-6)
  found = opened.tower("depth")["trunk"]["trunk"]["blocks_0"]["norm1"]["bias"]
  np.testing.assert_array_equal(found, trunk["blocks.0.norm_1.bias"])


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("imagebind_huge.pth", None, "needs the ImageBind checkpoint it was trained from"),
    ("imagebind-vector_quantise-_best.pth", None, "holds no codebooks"),
    ("imagebind-vector_quantise-_best.pth", torch_zip({"embedding.weight": np.ones(2)}), "no codebooks of the kind"),
    ("imagebind-mvq_adapter-text_best.pth", torch_zip({"a": np.ones(2)}), "mvq_adapter is not supported"),
    ("imagebind-heads-depth_best.pth", b"PK\x03\x04", "heads-depth_best.pth: not a readable torch checkpoint"),
    ("cfg_all_train.yaml", b"a: [", "cfg_all_train.yaml: not readable YAML"),
    ("cfg_all_train.yaml", b"- a", "a mapping is needed, got list"),
    ("cfg_all_train.yaml", b"share_codebook: true", "share_codebook is not supported"),
    ("cfg_all_train.yaml", b"seg_type: 3", "seg_type 3; allowed"),
    ("imagebind-lora-depth_best.safetensors", safetensors.numpy.save({"blocks.0.attn.q_lora_up": np.ones((2, 2))}),
     r"lora-depth_best.safetensors: lora state_dict: unexpected"),
    ("imagebind-lora-depth_best.safetensors",
     safetensors.numpy.save({"blocks.0.attn.out_proj_lora_up": np.ones((2, 2))}),
     r"do not fit modality_trunks.depth.blocks.0.attn.out_proj.weight \(16, 16\)"),
  ],
)  # fmt: skip
def test_what_is_refused(name, content, message, folder, tmp_path):
  for path in folder.iterdir():
    if path.name != name:
      (tmp_path / path.name).symlink_to(path)
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    codebind_release.open_release(tmp_path).sizes()


def test_foreign_folders_are_not_recognised(tmp_path):
  assert not codebind_release.recognises(tmp_path) and not codebind_release.recognises(tmp_path / "missing")
  (tmp_path / "imagebind_huge.pth").write_bytes(b"x")
  assert not codebind_release.recognises(tmp_path)
  with pytest.raises(ValueError, match="holds no file of the CodeBind release"):
    codebind_release.open_release(tmp_path)
  with pytest.raises(ValueError, match="weights: got ''"):
    codebind_release.make_trunk()


def test_a_modality_that_is_not_there(folder):
  with pytest.raises(ValueError, match="has no 'thermal'; it has image, text, audio, depth, tactile, eeg"):
    codebind_release.make_trunk(weights=str(folder), modality="thermal")


def test_load_gives_the_whole_model(folder):
  model = codebind_jax.load(folder, modalities=["image", "text"], heads=spec("image").heads)
  pictures = np.random.default_rng(0).integers(0, 256, (2, 240, 250, 3), dtype=np.uint8)
  found = model.embed({"image": list(pictures)})["image"]
  release = codebind_release.open_release(folder)
  tower, trunk = release.tower("image"), model.trunk("image")
  tokens = Encoder(spec("image")).apply({"params": tower["trunk"]}, jnp.stack([trunk.preprocess(p) for p in pictures]))
  whole = towers.Tower(towers.TowerSpec(SHARED, SPECIFIC["image"]))
  features = whole.apply({"params": {part: tower[part] for part in ("shared", "specific")}}, tokens.tokens)
  books = {name: release.codebooks()[name] for name in ("shared", "image")}
  quantiser = CompositionalSpec(
    SHARED, 0, {"image": SPECIFIC["image"], "text": 0}, code_dims=(8, 8), num_codes=(40, 0),
    num_specific_codes={"image": 20},
  )  # fmt: skip
  wanted = quantize_modalities({"image": features}, books, quantiser, update="none", rng=None)[0]["image"]
  np.testing.assert_array_equal(found.codes_shared, wanted.indices_shared[:, 0])
  np.testing.assert_array_equal(found.codes_specific, wanted.indices_specific[:, 0])
  np.testing.assert_allclose(found.shared, wanted.shared[:, 0], atol=1e-5)
  assert found.codes.shape == (2, SHARED // 8 + SPECIFIC["image"] // 8)

"""PE-Core in its own layout: against timm's and open_clip's copies, on tiny weights; the official names and shapes."""

import numpy as np
import pytest
from safetensors.numpy import save_file

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


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_array_of_the_official_models_is_accounted_for(tmp_path, monkeypatch, name):
  (tmp_path / f"{name}.pt").touch()
  weights = family_fixtures.zeros(OFFICIAL[name]["shapes"], tmp_path / f"{name}.pt")
  monkeypatch.setattr(pe_core, "open_weights", lambda path: weights)
  for modality in pe_core.MODALITIES:
    trunk = pe_core.make_trunk(weights=str(tmp_path), modality=modality, scan=True)
    family_fixtures.load_all(trunk)
    side = int(name[-3:])
    assert trunk.input.shape == ((side, side, 3) if modality == "image" else (72 if "G14" in name else 32,))
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

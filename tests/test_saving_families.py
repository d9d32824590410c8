"""Saved models of every published family: the same trunks, made of shapes and small files, with equal values."""

import shutil
import warnings

import numpy as np
import pytest
import safetensors.numpy

from codebind_jax import api
from codebind_jax.saving import folder as saved_folder
from codebind_jax.trunks import uni3d
from codebind_jax.trunks.families import families
from tests import family_fixtures
from tests.checkpoint_fixtures import prefixed
from tests.checkpoint_fixtures import write as write_folder
from tests.test_codebind_release import write as write_release
from tests.test_imagebind import contiguous, heads, published
from tests.test_languagebind import folder_of as languagebind_folder
from tests.test_open_clip import folder_of as open_clip_folder
from tests.test_pe_core import state as pe_core_state
from tests.test_pe_core import write as write_pe_core
from tests.test_siglip import NPZ, model_file


def big_vision(path):
  path.mkdir()
  shutil.copy(NPZ, path / "siglip2_tiny.npz")
  model_file(path / "sentencepiece.model", "unigram")
  return path / "siglip2_tiny.npz"


def pe_core(path):
  path.mkdir()
  return write_pe_core(path / "PE-Core-tiny.safetensors", pe_core_state())


def imagebind(path):
  path.mkdir()
  safetensors.numpy.save_file(contiguous(published()), path / "imagebind_huge.safetensors")
  return path / "imagebind_huge.safetensors"


def release(path):
  """With its base beside it, and adapters of the sounds' encoder."""
  write_release(path / "asa", lora=("lora_audio_all",))
  (path / "asa" / "imagebind_huge.pth").rename(path / "imagebind_huge.pth")
  return path / "asa"


CASES = {
  "clip": lambda path: family_fixtures.unpack("clip_hf", path),
  "siglip": lambda path: family_fixtures.unpack("siglip_hf", path),
  "big_vision": big_vision,
  "open_clip": lambda path: open_clip_folder(family_fixtures.arrays("open_clip"), path / "vit-quickgelu"),
  "dino": lambda path: family_fixtures.unpack("dino_v3", path),
  "uni3d": lambda path: write_folder(path, prefixed(family_fixtures.arrays("uni3d"), "giant/weights/")),
  "languagebind": lambda path: languagebind_folder(family_fixtures.arrays("languagebind"), path, "image"),
  "pe_core": pe_core,
  "clap": lambda path: family_fixtures.unpack("clap_hf", path),
  "imagebind": imagebind,
  "codebind_release": release,
}
OPTIONS = {
  "uni3d": {"points": 100, "groups": 12, "neighbours": 7},
  "imagebind": {"modalities": ["audio"], "heads": heads("audio")},
  "codebind_release": {"modalities": ["audio"], "heads": heads("audio")},
}


def test_every_family_has_a_case():
  assert set(families()) <= set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_saved_model_has_the_same_trunks_and_values(name, tmp_path, monkeypatch):
  monkeypatch.setitem(uni3d.HEADS, 24, 2)
  source = CASES[name](tmp_path / "there")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = api.load(source, **OPTIONS.get(name, {}))
    model.save(tmp_path / "saved")
  shutil.rmtree(tmp_path / "there")
  again = api.load(tmp_path / "saved")
  assert again.modalities == model.modalities
  for m in model.modalities:
    assert again.trunk(m).module == model.trunk(m).module and again.trunk(m).fingerprint == model.trunk(m).fingerprint
  want, got = (saved_folder.flat({"p": x.params, "c": x.codebooks}) for x in (model, again))
  used = {path for path in want if path.startswith(("c/", *(f"p/{m}" for m in model.modalities)))}
  assert set(got) <= used and not [path for path in used - set(got) if "decoder" not in path]
  for path, value in got.items():
    assert value.dtype == np.asarray(want[path]).dtype
    np.testing.assert_array_equal(value, want[path], err_msg=path)
  assert again.fingerprint(again.modalities) == api.load(again.save(tmp_path / "again")).fingerprint(again.modalities)
  assert not [file for file in (tmp_path / "saved").rglob("*") if file.suffix in (".pth", ".bin", ".npz", ".pt")]

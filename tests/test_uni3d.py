"""Uni3D's point encoder against a plain torch one on timm's blocks, and the names of the official checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax.data.preparation.points import GREY, Cloud
from codebind_jax.models.point_patches import farthest_points, nearest_points
from codebind_jax.trunks import uni3d
from tests import family_fixtures
from tests.checkpoint_fixtures import check_names, prefixed, write
from tests.torch_files import torch_zip

LIMIT = 2e-5
CASES = ("giant", "base", "tiny")
SIZES = {"points": 100, "groups": 12, "neighbours": 7}


@pytest.fixture(scope="module")
def made():
  return family_fixtures.arrays("uni3d")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  monkeypatch.setitem(uni3d.HEADS, 24, 2)


def folder_of(made, path, case="giant", arrays=None):
  return str(write(path, prefixed(made, f"{case}/weights/") if arrays is None else arrays))


def batch_of(made, trunk):
  return trunk.collate([trunk.preprocess(made[f"cloud{i}"]) for i in range(2)])


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_embeddings_equal_the_reference(made, tmp_path, case, scan):
  folder = folder_of(made, tmp_path, case)
  assert uni3d.recognises(tmp_path) and uni3d.modalities(tmp_path) == ("points",)
  trunk = uni3d.make_trunk(weights=folder, scan=scan, **SIZES)
  assert np.abs(trunk.embed(batch_of(made, trunk)) - made[f"{case}/points"]).max() < LIMIT
  assert trunk.num_tokens == 13 and trunk.head.logit_scale == pytest.approx(np.exp(2.0))


def test_clouds_are_centred_and_scaled_and_padding_is_not_seen(made, tmp_path):
  trunk = uni3d.make_trunk(weights=folder_of(made, tmp_path), **SIZES)
  for i, size in enumerate((90, 40)):
    cloud = trunk.preprocess(made[f"cloud{i}"])
    np.testing.assert_allclose(cloud[:size], made[f"prepared{i}"], atol=1e-6)
    assert (cloud[size:, 3:] == -1).all()
  assert (trunk.preprocess(made["cloud1"][:, :3])[:40, 3:] == np.float32(GREY)).all()
  cut = Cloud(30)(made["cloud0"])
  assert cut.shape == (30, 6) and len(np.unique(cut[:, 3])) == 30


def test_the_names_of_parallel_training_are_the_same_model(made, tmp_path):
  arrays = {f"module.{name}": value for name, value in prefixed(made, "base/weights/").items()}
  trunk = uni3d.make_trunk(weights=folder_of(made, tmp_path, arrays=arrays), **SIZES)
  assert np.abs(trunk.embed(batch_of(made, trunk)) - made["base/points"]).max() < LIMIT


def test_bfloat16_is_close_and_gradients_are_finite(made, tmp_path):
  trunk = uni3d.make_trunk(weights=folder_of(made, tmp_path, "base"), dtype="bfloat16", remat=True, **SIZES)
  batch = batch_of(made, trunk)
  assert (trunk.embed(batch) * made["base/points"]).sum(-1).min() > 0.99
  slopes = jax.jit(jax.grad(lambda p: trunk.apply(p, jnp.asarray(batch)).astype(jnp.float32).std()))(trunk.params)
  assert all(jnp.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(slopes))


def test_torch_files_load(made, tmp_path):
  (tmp_path / "model.pt").write_bytes(torch_zip(prefixed(made, "giant/weights/"), "module"))
  assert uni3d.recognises(tmp_path) and uni3d.recognises(tmp_path / "model.pt")
  trunk = uni3d.make_trunk(weights=str(tmp_path), **SIZES)
  assert np.abs(trunk.embed(batch_of(made, trunk)) - made["giant/points"]).max() < LIMIT


def test_centres_begin_with_the_first_point_and_avoid_the_origin():
  points = jnp.array([[[0.0, 0, 0], [1, 0, 0], [0.01, 0, 0], [-1, 0, 0], [0.5, 0, 0], [9, 0, 0]]])
  real = jnp.array([[True] * 5 + [False]])
  assert farthest_points(points, real, 4).tolist() == [[0, 1, 3, 4]]
  assert sorted(nearest_points(points, real, points[:, 1:2], 2)[0, 0].tolist()) == [1, 4]
  assert nearest_points(points, real, points[:, :1], 6)[0, 0].tolist()[-1] == 0  # too few: the nearest one again


def test_names_and_shapes_of_every_official_model(tmp_path, monkeypatch):
  file = tmp_path / "model.pt"
  file.write_bytes(b"")
  for name, shapes in family_fixtures.official("uni3d").items():
    monkeypatch.setattr(uni3d, "open_weights", lambda path, shapes=shapes: family_fixtures.zeros(shapes, path))
    trunk = uni3d.make_trunk(weights=str(file), scan=True)
    assert trunk.input.shape == (10_000, 6) and trunk.module.spec.hidden == (128, 256, 512, 512), name
    check_names(trunk)


def test_bad_checkpoints_are_refused(made, tmp_path):
  with pytest.raises(ValueError, match="does not exist"):
    uni3d.make_trunk(weights=str(tmp_path / "nowhere"))
  arrays = prefixed(made, "giant/weights/")
  with pytest.raises(ValueError, match="not a checkpoint of Uni3D"):
    uni3d.make_trunk(weights=str(tmp_path / "other" / "model.safetensors")
                     if write(tmp_path / "other", {"a": np.zeros(2)}) else "")  # fmt: skip
  folder = folder_of(made, tmp_path / "whole")
  with pytest.raises(ValueError, match="has no 'image'; it has points"):
    uni3d.make_trunk(weights=folder, modality="image")
  with pytest.raises(ValueError, match="groups 0"):
    uni3d.make_trunk(weights=folder, groups=0)
  lost = {n: v for n, v in arrays.items() if "running_var" not in n}
  with pytest.raises(ValueError, match=r"model.safetensors: missing .*first_conv.1.running_var.*second_conv"):
    uni3d.make_trunk(weights=folder_of(made, tmp_path / "lost", arrays=lost))
  arrays["point_encoder.strange"] = arrays.pop("point_encoder.cls_pos")
  with pytest.raises(ValueError, match=r"missing.*cls_pos.*strange"):
    uni3d.make_trunk(weights=folder_of(made, tmp_path / "strange", arrays=arrays), **SIZES).params
  with pytest.raises(ValueError, match="width 24 is not supported; allowed: 192"):
    uni3d.HEADS.pop(24)
    uni3d.make_trunk(weights=folder)

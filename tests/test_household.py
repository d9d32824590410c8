"""World "Household": its tables' splits, the simulated infrared, and a build from packages made here."""

import collections
import hashlib
import json

import numpy as np
import pytest

from codebind_jax.data.opening import open_source
from codebind_jax.data.worlds import fetch, furniture, household, icons, infrared, names, registry, views
from codebind_jax.data.worlds.meshes import Mesh, read_mesh
from codebind_jax.data.worlds.raster import Camera
from tests.world_fixtures import deb, package, png, put, tgz, wheel

MODELS = furniture._MODELS


def test_counts_are_those_of_the_tables_description():
  objects = household.plan("small")
  labelled = [o for o in objects if household.label(o)]
  assert (len(objects), len(labelled), len(household.plan("tiny"))) == (905, 615, 89)
  assert collections.Counter(o["split"] for o in labelled) == {"train": 372, "val": 90, "test": 153}
  assert len({household.label(o) for o in labelled}) == 32
  assert household.plan("full") == objects
  assert household.package_ids("tiny") == ["sh3d-pip"]
  assert household.package_ids("small") == ["sh3d-furniture", "sh3d-pip"]


def test_a_shape_is_in_one_split():
  splits = collections.defaultdict(set)
  for entry in household.plan("small"):
    splits[entry["group"]].add(entry["split"])
  assert max(map(len, splits.values())) == 1
  assert sum(1 for c in collections.Counter(o["group"] for o in household.plan("small")).values() if c > 1) == 8


def test_every_class_that_is_asked_for_was_trained_on():
  split = lambda wanted: {household.label(o) for o in household.plan("small") if o["split"] == wanted} - {""}
  assert split("train") == set(household.eval_sets("small")["test"].candidates) >= split("val") | split("test")


def test_no_object_is_called_by_an_unseen_concept():
  for entry in household.plan("small"):
    called = {household._concepts()[entry["key"]], *map(names.to_concept, household.texts(entry))}
    assert not called & icons.unseen(), entry["key"]


def test_captions_are_distinct_whatever_their_case():
  entry = next(o for o in household.plan("small") if o["name"] == "Small upper cabinet")
  assert household.texts(entry) == ["Small upper cabinet", "cabinet or wardrobe"]


def test_eval_sets():
  small, tiny = household.eval_sets("small"), household.eval_sets("tiny")
  assert len(small["test"].candidates) == 32 and len(tiny["test"].candidates) == 20
  assert {name: (s.split, s.role) for name, s in small.items()} == {
    "val": ("val", "val"), "val_objects": ("val", "val"), "test": ("test", "test"), "test_objects": ("test", "test")}
  assert small["test"].keep({"label": "chair"}) and not small["test"].keep({"label": ""})
  assert small["test_objects"].keep({"label": ""})
  with pytest.raises(ValueError, match="unknown profile 'huge' of world 'household'"):
    household.eval_sets("huge")


def test_thermal_rules_by_name_before_class():
  assert infrared.rule("Candle holder", "lamp")["mode"] == "top" and infrared.rule("Candle holder", "lamp")["sd"] == 15
  assert infrared.rule("Old man", "person")["mean"] == 33
  assert infrared.rule("Shelf", None) is None


@pytest.mark.parametrize(("mode", "height", "share"), [
  ("whole", 0.3, 1.0), ("top", 0.0, 0.15), ("top", 1.0, 1.0), ("band", 0.45, 1.0),
  ("band", 0.95, 0.35 + 0.65 * np.e**-4)])
def test_where_an_object_is_warm(mode, height, share):
  at = np.full((1, 1), height)
  np.testing.assert_allclose(np.broadcast_to(infrared.factor(mode, at, np.zeros((1, 1, 3), np.uint8)), (1, 1)), share)


def test_clothing_hides_warmth():
  colour = np.array([[[205, 155, 125], [20, 30, 200]]], np.uint8)
  assert infrared.factor("clothing", np.zeros((1, 2)), colour).tolist() == [[1.0, 0.62]]
  with pytest.raises(ValueError, match="mode 'hot'"):
    infrared.factor("hot", np.zeros((1, 2)), colour)


def heat(warm, cosine=1.0, key="a", view=0):
  shape = (48, 48)
  seen = np.zeros(shape, bool)
  seen[12:36, 12:36] = True
  black = np.zeros((*shape, 3), np.uint8)
  return infrared.infrared(key, view, warm, seen, np.zeros(shape), np.full(shape, cosine), black)


def test_infrared_follows_its_equation():
  # Emissivity 0.95, room 21 (sd 0.3), reflected 4 K below the room: 0.95 * 50 + 0.05 * 17 = 48.35.
  warm = {"mean": 50.0, "sd": 0.0, "mode": "whole"}
  assert heat(warm)[20:28, 20:28].mean() == pytest.approx(48.35, abs=0.1)
  # cos 0.35 / 2: emissivity 0.95 / 2**0.3
  e = 0.95 * 0.5**0.3
  assert heat(warm, 0.175)[20:28, 20:28].mean() == pytest.approx(e * 50 + (1 - e) * 17, abs=0.3)
  walls = np.mean([heat(warm, view=view)[:, :4] for view in range(60)], axis=0)
  assert 20 < walls.mean() < 22 and walls[:8].mean() - walls[-8:].mean() == pytest.approx(1.5 * 40 / 47, abs=0.2)


def test_temperature_is_the_objects_and_noise_the_views():
  warm = {"mean": 40.0, "sd": 8.0, "mode": "whole"}
  middle = lambda *key: heat(warm, 1.0, *key)[20:28, 20:28]
  np.testing.assert_array_equal(middle("a", 0), middle("a", 0))
  assert abs(middle("a", 0).mean() - middle("a", 1).mean()) < 0.2
  assert not np.array_equal(middle("a", 0), middle("a", 1))
  assert abs(middle("a", 0).mean() - middle("b", 0).mean()) > 0.5


CUBE = """mtllib cube.mtl
v 0 0 0
v 2 0 0
v 2 1 0
v 0 1 0
v 0 0 1
v 2 0 1
v 2 1 1
v 0 1 1
vt 0.1 0.1
usemtl sides
f 5/1 6/1 7/1 8/1
f 1/1 4/1 3/1 2/1
f 2/1 3/1 7/1 6/1
f 1/1 5/1 8/1 4/1
usemtl ends
f 4/1 8/1 7/1 3/1
f 1/1 2/1 6/1 5/1
"""
MTL = "newmtl sides\nKd 1 0 0\nnewmtl ends\nKd 1 1 1\nmap_Kd ends.png\n"


def cube(folder):
  put_all = {"cube.obj": CUBE.encode(), "cube.mtl": MTL.encode(), "ends.png": png((0, 255, 0))}
  return {f"{folder}{name}": data for name, data in put_all.items()}


@pytest.fixture
def model(tmp_path):
  for name, data in cube("").items():
    (tmp_path / name).write_bytes(data)
  return read_mesh(tmp_path / "cube.obj")


def test_mesh_is_centred_scaled_and_coloured(model):
  low, high = model.vertices.min(axis=0), model.vertices.max(axis=0)
  np.testing.assert_allclose(low, -high, atol=1e-12)
  np.testing.assert_allclose(high - low, np.array([2, 1, 1]) * 2 / np.sqrt(6))
  colours = collections.Counter(map(tuple, model.colours.tolist()))
  assert colours == {(255, 0, 0): 8, (0, 255, 0): 4}
  np.testing.assert_allclose(np.linalg.norm(model.normals, axis=1), 1.0)


def test_view_shows_red_side_under_green_top(model):
  view = views.look(model, Camera(0.0, size=48))
  seen = view.depth > 0
  assert (view.colour[~seen] == 255).all() and view.depth[~seen].max() == 0
  top, side = (view.colour[..., channel] > 60 for channel in (1, 0))
  rows = np.arange(48)[:, None] * np.ones((1, 48))
  assert rows[seen & top & ~side].mean() < rows[seen & side & ~top].mean()
  assert view.height[seen & top & ~side].min() > 0.99 and view.height[seen].min() < 0.1
  middle = view.depth[24, 24]
  assert 2.6 - 1 < middle < 2.6 and 0 < view.cosine[seen].min() <= 1


def test_points_lie_on_the_surface(model):
  points = model.sample(200, 0)
  half = np.array([2, 1, 1]) / np.sqrt(6)
  assert points.shape == (200, 3)
  np.testing.assert_allclose(np.abs(points / half).max(axis=1), 1.0, atol=1e-6)
  np.testing.assert_array_equal(points, model.sample(200, 0))
  assert not np.array_equal(points, model.sample(200, 1))


def test_mesh_without_triangles_is_refused(tmp_path):
  (tmp_path / "none.obj").write_text("v 0 0 0\n")
  with pytest.raises(ValueError, match="none.obj"):
    read_mesh(tmp_path / "none.obj")
  flat = Mesh(np.zeros((3, 3)), np.array([[0, 1, 2]]), np.zeros((1, 3), np.uint8))
  assert flat.normals.tolist() == [[0, 0, 0]]


@pytest.fixture
def toy(tmp_path, monkeypatch):
  sha1 = hashlib.sha1(CUBE.encode()).hexdigest()
  common = {"cls": "chair", "cm": ["200", "100", "100"], "creator": "Ann", "licence": "CC", "sha1": sha1}
  objects = [
    common | {"key": f"default#{i}", "lib": "default", "name": f"Chair {i}", "model": "seat/cube.obj", "split": split,
              "group": f"g{i}"} for i, split in enumerate(("train", "val", "test"))]
  objects += [
    common | {"key": "Scopia#1", "lib": "Scopia", "name": "Radiator", "cls": "gone", "model": "s/c/cube.obj",
              "split": "train", "group": "s1"},
    common | {"key": "Scopia#2", "lib": "Scopia", "name": "Other", "model": "s/d/cube.obj", "split": "train",
              "group": "s2", "sha1": "0" * 40}]
  tables = {
    "meshes": {"objects": objects}, "mesh_rules": {"classes": [{"cls": "chair"}]}, "thermal": names.table("thermal"),
    "concepts": {"concepts": {"seat": {"label": "seat", "meshes": ["default#0"], "split": "train"}}}}
  archive = {
    "sh3d-pip": tgz({f"{MODELS}seat.zip": wheel(cube(""))}),
    "sh3d-furniture": deb({furniture._DEBIAN.format("Scopia"): wheel(cube("s/c/") | cube("s/d/"))})}
  packages = {
    "sh3d-pip": package("sh3d-pip", "pip-sdist", "s.tar.gz", archive["sh3d-pip"]),
    "sh3d-furniture": package("sh3d-furniture", "apt", "s.deb", archive["sh3d-furniture"])}
  monkeypatch.setattr(names, "table", lambda name: tables[name])
  monkeypatch.setattr(fetch, "packages", lambda: packages)
  for name, one in packages.items():
    put(tmp_path, one, archive[name])
  for cache in (household.plan, household._concepts):
    cache.cache_clear()
  yield tmp_path
  for cache in (household.plan, household._concepts):
    cache.cache_clear()


def test_toy_world_is_built_whole(toy):
  folder = registry.ensure("household", "small", toy)
  manifest = json.loads((folder / "manifest.json").read_text())
  assert manifest["splits"] == {"train": 12, "val": 6, "test": 6}
  assert list(manifest["dropped"]) == ["Scopia#2"] and "expected SHA-1 000" in manifest["dropped"]["Scopia#2"]
  source = open_source("world:household", profile="small", split="train", data_dir=str(toy))
  row = next(r for r in source if r["id"] == "default#0:-60")
  arrays = {name: row.pop(name) for name in household.ARRAYS}
  assert row == {
    "id": "default#0:-60", "label": "chair", "text": ["Chair 0", "chair", "seat"], "name": "Chair 0", "group": "g0",
    "concept": "seat", "object": "default#0", "library": "default", "view": "-60", "source": "sh3d-pip",
    "has": list(household.ARRAYS)}
  assert arrays["image"].shape == (96, 96, 3) and arrays["image"].dtype == np.uint8
  assert arrays["depth"].shape == arrays["thermal"].shape == (96, 96) and arrays["points"].shape == (1024, 3)
  # The box is 2 x 1 x 1 m, so half its diagonal is 1.22 m: the eye is 2.6 of these away.
  seen = arrays["depth"] > 0
  assert 1.6 * 1.22 < arrays["depth"][seen].min() < 2.6 * 1.22 and (arrays["image"][~seen] == 255).all()
  np.testing.assert_allclose(np.abs(arrays["points"]).max(axis=0), [1, 0.5, 0.5], rtol=1e-2)
  assert {r["label"] for r in source if r["library"] == "Scopia"} == {""}
  assert "default: 3 models by Ann (CC)" in (folder / "ATTRIBUTION.md").read_text()
  assert not list(folder.parent.glob(".unpacked-*"))


def test_rule_4_all_views_of_an_object_are_in_its_split(toy):
  registry.ensure("household", "small", toy)
  views, groups = collections.defaultdict(list), collections.defaultdict(set)
  for split in ("train", "val", "test"):
    source = open_source("world:household", profile="small", split=split, data_dir=str(toy))
    for row in map(source.fields, range(len(source))):
      views[row["object"], split].append(row["view"])
      groups[row["group"]].add(split)
  assert all(len(set(found)) == len(found) == 6 for found in views.values())
  assert len({name for name, _ in views}) == len(views) and max(map(len, groups.values())) == 1


def test_views_of_an_object_have_points_of_their_own(toy):
  registry.ensure("household", "small", toy)
  source = open_source("world:household", profile="small", split="val", data_dir=str(toy))
  clouds = [row["points"].tobytes() for row in source]
  assert len(clouds) == 6 == len(set(clouds))


def test_default_library_must_be_as_recorded(toy):
  names.table("meshes")["objects"][0]["sha1"] = "1" * 40
  with pytest.raises(ValueError, match="default#0: cube.obj: expected SHA-1 111"):
    registry.ensure("household", "small", toy)


def test_another_release_without_any_known_object_is_refused(toy):
  names.table("meshes")["objects"][3]["sha1"] = "1" * 40
  with pytest.raises(ValueError, match="none of its 2 objects is as recorded"):
    registry.ensure("household", "small", toy)


@pytest.mark.slow
def test_real_world_of_the_default_library():
  source = open_source("world:household", profile="tiny", split="train")
  assert len(source) == 288 and set(source.column("library")) == {"default"}
  row = source[0]
  assert row["depth"].max() > 0 and np.isfinite(row["thermal"]).all()

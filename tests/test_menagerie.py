"""World "Menagerie": splits and leakage rules on the tables, a toy world built whole, notes; the real data (slow)."""

import collections
import hashlib
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from codebind_jax.data.opening import open_source
from codebind_jax.data.transforms import audio
from codebind_jax.data.worlds import fetch, icons, menagerie, names, notes, registry
from tests.world_fixtures import deb, package, put, rcc, tgz, unseen_names, wheel

PROFILES = menagerie.PROFILES


@pytest.fixture(autouse=True)
def with_notes(monkeypatch):
  """The plan is the same wherever tests run: as if tinysoundfont were installed."""
  monkeypatch.setattr(notes, "available", lambda: True)
  menagerie.plan.cache_clear()
  yield
  menagerie.plan.cache_clear()


def counts(profile):
  return collections.Counter((item.form, item.split) for item in menagerie.plan(profile))


def kept(profile, name):
  test = menagerie.eval_sets(profile)[name]
  rows = [menagerie._row(item, b"", 0.0) for item in menagerie.plan(profile) if item.split == test.split]
  return [row for row in rows if test.keep(row)]


# The tables: counts of the sources' documentation, and what must never happen.


def test_counts_of_the_full_profile():
  found = counts("full")
  assert [found["recording", split] for split in ("train", "val", "test")] == [298, 59, 110]
  assert [found["clip", split] for split in ("train", "val", "test")] == [105, 21, 45]
  # 8 plain notes of 29 instruments, one key of four held out; 32 more for training; the other font is the test.
  assert [found["note", split] for split in ("train", "val", "test")] == [29 * (6 + 32), 29 * 2, 29 * 8]
  assert len({i.concept for i in menagerie.plan("full") if i.form == "recording"}) == 334


def test_counts_of_the_smaller_profiles():
  small, tiny = counts("small"), counts("tiny")
  assert [small["recording", split] for split in ("train", "val", "test")] == [235, 27, 37]
  assert small["note", "train"] == 29 * 38 and small["note", "val"] == 58 and not small["note", "test"]
  assert tiny == {("recording", "train"): 10, ("note", "train"): 29 * 38, ("note", "val"): 29, ("note", "test"): 29}
  assert menagerie.package_ids("tiny") == ["pretty-midi", "sound-like"]


@pytest.mark.parametrize(
  ("profile", "name", "rows", "ways"),
  [
    ("full", "val_sounds", 54, 43), ("full", "test_sounds", 52, 27), ("full", "test_sounds_all", 52, 283),
    ("full", "test_recordings", 110, 0), ("full", "test_notes", 232, 29), ("full", "test_video", 45, 120),
    ("full", "val_video", 21, 60), ("full", "test_instruments", 21, 29),
    ("small", "val_sounds", 22, 18), ("small", "test_sounds", 21, 14), ("small", "test_sounds_all", 21, 233),
    ("tiny", "val_notes", 29, 29), ("tiny", "test_notes", 29, 29),
  ],
)  # fmt: skip
def test_eval_sets(profile, name, rows, ways):
  test, found = menagerie.eval_sets(profile)[name], kept(profile, name)
  assert len(found) == rows and len(test.candidates) == len(set(test.candidates)) == ways
  assert test.role == name.split("_")[0] and test.split in (test.role, f"{test.role}_emergent")
  if ways:
    assert {row["label"] for row in found} <= set(test.candidates)


@pytest.mark.parametrize("profile", PROFILES)
def test_rule_2_no_unseen_concept_in_training(profile):
  train = [item for item in menagerie.plan(profile) if item.split == "train"]
  assert not {item.concept for item in train} & icons.unseen()
  words = {names.slug(text) for item in train for text in menagerie.texts(item.concept)}
  assert not words & unseen_names()
  for item in menagerie.plan(profile):
    if item.form == "clip" and not item.split.endswith("_emergent"):
      assert names.concepts()[item.concept]["split"] == item.split


@pytest.mark.parametrize("profile", PROFILES)
def test_rule_3_no_group_in_two_splits_and_test_sources_not_in_training(profile):
  splits = collections.defaultdict(set)
  for item in menagerie.plan(profile):
    if not item.split.endswith("_emergent"):
      splits[item.form, item.group].add(item.split)
  assert all(len(found) == 1 for found in splits.values())
  sources = {(i.package, i.split) for i in menagerie.plan(profile) if i.form == "recording"}
  assert not {("scratch", "train"), ("gcompris", "train"), ("scratch", "val")} & sources


@pytest.mark.parametrize("profile", ["small", "full"])
def test_sounds_are_asked_for_by_concepts_that_were_heard_in_training(profile):
  trained = {i.concept for i in menagerie.plan(profile) if i.form == "recording" and i.split == "train"}
  for role in ("val", "test"):
    assert {row["concept"] for row in kept(profile, f"{role}_sounds")} <= trained
    own = {item.id for item in menagerie.plan(profile) if item.split == role}
    rows = [row for name in ("sounds", "recordings", "instruments") for row in kept(profile, f"{role}_{name}")]
    assert rows and {row["id"] for row in rows} <= own


def test_a_clip_that_was_trained_on_is_in_no_set_but_that_of_emergent_pairs():
  # Its frames are the drawings of the training icons: accuracy on them says nothing.
  trained = {item.id for item in menagerie.plan("full") if item.form == "clip" and item.split == "train"}
  sets = [name for name in menagerie.eval_sets("full") if not name.endswith("audio_video")]
  shown = {row["id"] for name in sets for row in kept("full", name) if row["form"] == "clip"}
  assert trained and shown and not trained & shown
  assert not menagerie.eval_sets("full")["test_audio_video"].candidates


def test_held_out_notes_share_font_and_key_with_no_training_note():
  by_concept = collections.defaultdict(lambda: {True: set(), False: set()})
  for note in notes.plain() + notes.extra():
    by_concept[note.concept][note.held_out] |= {key for _, key, _, _ in note.events}
  assert len(by_concept) == 29
  for found in by_concept.values():
    assert len(found[True]) == 2 and not found[True] & found[False]
  fonts = {(i.package, i.split) for i in menagerie.plan("full") if i.form == "note"}
  assert fonts == {("fluid", "train"), ("fluid", "val"), ("pretty-midi", "test")}


def test_notes_stay_in_range_and_are_always_the_same():
  table = {one["concept"]: one for one in names.table("instruments")["instruments"]}
  everything = notes.plain() + notes.extra()
  for note in everything:
    one = table[note.concept]
    assert note.program in one["programs"] and note.events
    assert all(one["low"] <= key <= one["high"] and 0 <= start < 2 for start, key, _, _ in note.events)
  assert len({note.name for note in everything}) == len(everything) == 29 * 40
  assert notes.plain_keys(40, 47) == [40, 41, 42, 43, 44, 45, 46, 47]
  digest = hashlib.sha256(repr(everything).encode()).hexdigest()
  assert digest[:16] == "f4392a3155d9020d"


def test_emergent_pairs_join_held_out_sounds_and_clips_that_no_row_joins():
  for role in ("val", "test"):
    rows = kept("full", f"{role}_audio_video")
    heard, seen = ({row["concept"] for row in rows if row["form"] == form} for form in ("recording", "clip"))
    assert heard == seen and len(heard) == {"val": 23, "test": 13}[role]
    own = {item.id for item in menagerie.plan("full") if item.split == role}
    assert all(row["id"] in own for row in rows if row["form"] == "recording")
  assert menagerie.eval_sets("full")["test_audio_video"].pairs == (("audio", "video", "concept"),)


def test_only_recordings_have_a_category_to_be_probed():
  rows = kept("full", "test_recordings") + kept("full", "test_notes") + kept("full", "test_video")
  found = collections.Counter(row["category"] for row in rows)
  assert found == {"instrument": 43, "object": 26, "animal": 24, "human": 17, "": 232 + 45}


def test_unknown_profile_is_named():
  for call in (menagerie.plan, menagerie.package_ids, lambda profile: menagerie.build(profile, Path())):
    with pytest.raises(ValueError, match="unknown profile 'big' of world 'menagerie'; allowed"):
      call("big")


# A toy world.


def sound(hertz, kind="WAV", level=0.5, rate=8000):
  out = io.BytesIO()
  wave = level * np.sin(2 * np.pi * hertz * np.arange(rate // 4) / rate)
  soundfile.write(out, wave.astype(np.float32), rate, format=kind)
  return out.getvalue()


def clip():
  out = io.BytesIO()
  first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
  first.save(out, "webp", save_all=True, append_images=[second], lossless=True)
  return out.getvalue()


@pytest.fixture
def toy(tmp_path, monkeypatch):
  files = {"cow.wav": sound(200), "owl.wav": sound(400), "mute.wav": sound(1, level=0.0), "cow.ogg": sound(210, "OGG")}
  archives = {
      "qabcs": deb({f"usr/{name}": files[name] for name in ("cow.wav", "owl.wav", "mute.wav")}),
      "gcompris": deb({"usr/x.rcc": rcc({"cow.ogg": (files["cow.ogg"], "zlib")})}),
      "tuxpaint": deb({"usr/t.wav": sound(300)}), "scratch": deb({"usr/s.wav": sound(310)}),
      "pretty-midi": wheel({menagerie.FONTS["pretty-midi"]: b"font one"}),
      "fluid": deb({menagerie.FONTS["fluid"]: b"font two"}),
      "anim-1": tgz({"package/assets/1.webp": clip()}), "anim-3": tgz({"package/assets/2.webp": clip()})}
  endings = {"npm": "tgz", "apt": "deb", "pip": "whl"}
  kinds = {i: "npm" if i[:4] == "anim" else "pip" if i == "pretty-midi" else "apt" for i in archives}
  packages = {i: package(i, kinds[i], f"{i}.{endings[kinds[i]]}", data) for i, data in archives.items()}

  def recording(source, inner, split, data, file="deb"):
    return {"source": source, "file": file, "inner": inner, "concept": inner.split("/")[-1][:3], "kind": "animal",
            "group": f"{source}:{inner}", "split": split, "eval": True, "eval_small": True,
            "sha1": hashlib.sha1(data).hexdigest()}

  tables = {
      "concepts": {"concepts": {c: {"label": c, "texts": [f"{c} sound"], "group": "animals", "split": s, "emoji": [c]}
                                for c, s in (("cow", "train"), ("owl", "train"), ("sun", "test"))}},
      "aliases": {"alias": {}, "drop_emoji": []},
      "audio": {"clips": [
          recording("qabcs", "usr/cow.wav", "train", files["cow.wav"]),
          recording("qabcs", "usr/owl.wav", "val", files["owl.wav"]),
          recording("qabcs", "usr/mute.wav", "train", files["mute.wav"]),
          recording("gcompris", "top/cow.ogg", "test", files["cow.ogg"], "usr/x.rcc"),
          recording("tuxpaint", "usr/t.wav", "val", sound(300)),
          recording("scratch", "usr/s.wav", "test", sound(310))]},
      "video": {"clips": [
          {"package": "anim-1", "inner": "package/assets/1.webp", "code": "1", "concept": "cow", "split": "train"},
          {"package": "anim-3", "inner": "package/assets/2.webp", "code": "2", "concept": "sun", "split": "test"}]},
      "instruments": {"instruments": [{"concept": "steel-drum", "programs": [3], "low": 40, "high": 60}]}}

  def render(font, played):
    for note in played:
      yield note, (np.zeros(100, np.float32) if note.name.endswith("-0") else 0.1 * np.ones(100, np.float32))

  monkeypatch.setattr(names, "table", lambda name: tables[name])
  monkeypatch.setattr(fetch, "packages", lambda: packages)
  monkeypatch.setattr(notes, "render", render)
  caches = (menagerie.plan, notes.plain, notes.extra, icons.texts, icons.unseen)
  for cache in caches:
    cache.cache_clear()
  for i, one in packages.items():
    put(tmp_path, one, archives[i])
  yield tmp_path
  for cache in caches:
    cache.cache_clear()


def rows(root, split, profile="full"):
  return open_source("world:menagerie", profile=profile, split=split, data_dir=str(root))


def test_toy_world_is_built_whole(toy, caplog):
  folder = registry.ensure("menagerie", "full", toy)
  manifest = json.loads((folder / "manifest.json").read_text())
  assert manifest["dropped"] == {"qabcs:usr/mute.wav": "silent", "fluid:steel-drum-0": "silent",
                                 "pretty-midi:steel-drum-0": "silent"}
  assert "left out qabcs:usr/mute.wav: silent" in caplog.text
  assert manifest["splits"] == {"train": 1 + 37 + 1, "val": 2 + 2, "test": 2 + 7 + 1, "test_emergent": 2}
  train = {name: i for i, name in enumerate(rows(toy, "train").column("id"))}
  cow = rows(toy, "train")[train["qabcs:usr/cow.wav"]]
  samples = cow.pop("audio")
  assert cow == {"id": "qabcs:usr/cow.wav", "concept": "cow", "label": "cow", "text": ["cow", "cow sound"],
                 "form": "recording", "kind": "animal", "category": "animal", "source": "qabcs",
                 "group": "qabcs:usr/cow.wav", "heard": True, "seconds": 0.25, "has": ["audio"]}
  assert samples.shape == (audio.RATE // 4,) and np.abs(samples).max() > 0.45
  film = rows(toy, "train")[train["anim-1:1"]]
  assert film["video"].shape == (2, 8, 8, 3) and film["video"][1, 0, 0].tolist() == [0, 0, 255]
  note = rows(toy, "train")[train["fluid:steel-drum-1"]]
  assert note["label"] == "steel drum" and note["text"] == ["steel drum"] and note["kind"] == "note"
  np.testing.assert_allclose(note["audio"], 0.1, atol=1e-4)
  assert set(rows(toy, "test_emergent").column("id")) == {"gcompris:top/cow.ogg", "anim-1:1"}
  credits = (folder / "ATTRIBUTION.md").read_text()
  assert all(f"maker of {i}" in credits for i in ("qabcs", "fluid", "anim-3"))


def test_two_builds_give_the_same_contents(toy):
  first = registry.ensure("menagerie", "full", toy)
  held = (first / "manifest.json").read_text()
  (first / "manifest.json").unlink()
  assert (registry.ensure("menagerie", "full", toy) / "manifest.json").read_text() == held


def test_without_tinysoundfont_there_are_no_notes_until_it_is_there(toy, monkeypatch, caplog):
  monkeypatch.setattr(notes, "available", lambda: False)
  menagerie.plan.cache_clear()
  folder = registry.ensure("menagerie", "full", toy)
  assert "no instrument notes, as tinysoundfont is not installed: pip install" in caplog.text
  assert set(rows(toy, "train").column("form")) == {"recording", "clip"}
  assert "fluid" not in json.loads((folder / "manifest.json").read_text())["packages"]
  assert "test_notes" not in menagerie.eval_sets("full")
  with pytest.raises(ValueError, match="profile 'tiny' needs tinysoundfont: pip install --no-deps"):
    registry.ensure("menagerie", "tiny", toy)
  monkeypatch.setattr(notes, "available", lambda: True)
  menagerie.plan.cache_clear()
  registry.ensure("menagerie", "full", toy)
  assert "note" in rows(toy, "train").column("form")


def test_a_changed_recording_of_debian_is_dropped_and_a_lost_clip_is_an_error(toy):
  menagerie.names.table("audio")["clips"][0]["sha1"] = "0" * 40
  menagerie.plan.cache_clear()
  folder = registry.ensure("menagerie", "small", toy)
  assert "expected SHA-1 0000" in json.loads((folder / "manifest.json").read_text())["dropped"]["qabcs:usr/cow.wav"]
  menagerie.names.table("video")["clips"][1]["inner"] = "package/assets/9.webp"
  menagerie.plan.cache_clear()
  with pytest.raises(ValueError, match=r"anim-3\.tgz: package/assets/9\.webp is not in it"):
    registry.ensure("menagerie", "full", toy)


# The real thing.


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tinysoundfont") is None, reason="tinysoundfont is not installed")
@pytest.mark.parametrize("profile", ["tiny", "small"])
def test_real_world(profile):
  """Builds, or opens, the real data: counts, and every sound can be read."""
  folder = registry.ensure("menagerie", profile)
  manifest = json.loads((folder / "manifest.json").read_text())
  assert all(reason == "silent" and item.startswith("pretty-midi:") for item, reason in manifest["dropped"].items())
  planned = collections.Counter(item.split for item in menagerie.plan(profile))
  assert sum(planned.values()) - sum(manifest["splits"].values()) == len(manifest["dropped"]) <= 8
  for split in manifest["splits"]:
    for row in open_source("world:menagerie", profile=profile, split=split):
      assert row["audio"].dtype == np.float32 and np.abs(row["audio"]).max() > 1e-4, row["id"]
      assert row["form"] != "note" or len(row["audio"]) == 2 * audio.RATE

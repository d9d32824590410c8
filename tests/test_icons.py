"""World "Icons": names, splits and leakage rules, on the tables."""

import collections
import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codebind_jax.data.worlds import icons, names
from tests.world_fixtures import unseen_names

BRIDGE = [c for c, v in names.concepts().items() if v["split"]]
SEEN = {c for c in BRIDGE if names.concepts()[c]["split"] == "train"}


@pytest.mark.parametrize("name, want", [
    ("CarPassing", "car-passing"), ("Piñata & Co's", "pinata-cos"), ("  a__b--c ", "a-b-c"), ("ABC", "abc")])
def test_slug_after_camel_case(name, want):
  assert names.slug(re.sub(r"([a-z])([A-Z][a-z])", r"\1-\2", name)) == want


@pytest.mark.parametrize("name, want", [
    ("cow face", "cow"), ("calf", "cow"), ("apples", "apple"), ("apples2", "apple"), ("cow3-x", "cow"),
    ("cow12", "cow"), ("AlarmClock", "clock"), ("747", "airplane"), ("12", "12"), ("no such thing", "no-such-thing")])
def test_name_to_concept(name, want):
  assert names.to_concept(name) == want


@given(st.text(max_size=30))
def test_slug_is_ascii_and_idempotent(name):
  slug = names.slug(name)
  assert re.fullmatch(r"([a-z0-9]+(-[a-z0-9]+)*)?", slug) and names.slug(slug) == slug


def test_emoji_labels_lead_to_their_concepts():
  table = names.table("emoji")["emoji"]
  assert all(names.to_concept(e["label"]) == e["concept"] for e in table)
  assert not {e["slug"] for e in table} & set(names.table("aliases")["drop_emoji"])


def test_unit_hash_by_hand():
  # sha256("s:k") begins with these 12 hex digits; 16**12 = 2**48.
  digits = hashlib.sha256(b"s:k").hexdigest()[:12]
  assert names.unit_hash("s", "k") == sum(int(d, 16) / 16 ** (i + 1) for i, d in enumerate(digits))
  assert names.unit_hash("", "") == 0xe7ac0786668e / 2**48  # sha256 of ":"


@pytest.mark.parametrize("profile, want", [
    ("tiny", [847, 48, 110, 92, 188, 1285]), ("tiny-plus", [1471, 48, 110, 157, 320, 1285]),
    ("small", [3587, 398, 1400, 557, 1126, 3024, 151, 121]),
    ("full", [4199, 398, 1400, 622, 1258, 3024, 151, 121, 99, 298])])
def test_split_counts(profile, want):
  counts = collections.Counter(item.split for item in icons.plan(profile))
  assert dict(counts) == dict(zip(icons.split_names(profile), want))
  ids = [item.id for item in icons.plan(profile)]
  assert len(set(ids)) == len(ids)


def test_unknown_profile_is_named():
  with pytest.raises(ValueError, match="unknown profile 'big' of world 'icons'; allowed: .'tiny'"):
    icons.plan("big")


# Leakage rules, in the order and numbering of the data card.


@pytest.mark.parametrize("profile", icons.PROFILES)
def test_rule_1_artist_families_do_not_cross_splits(profile):
  by_role = collections.defaultdict(set)
  for item in icons.plan(profile):
    if item.split in ("train", "val_artist", "test_artist"):
      by_role[item.split].add(item.family)
  assert not by_role["train"] & (by_role["val_artist"] | by_role["test_artist"])
  if not profile.startswith("tiny"):  # Font Awesome, the one held-out artist of tiny, is halved by hash
    assert not by_role["val_artist"] & by_role["test_artist"]
  pictures = {item.family for item in icons.plan(profile) if item.kind != "icon"}
  assert not by_role["train"] & pictures


def test_rule_1_finishes_of_one_drawing_are_one_family():
  sets = names.table("emoji")["sets"]
  assert {sets[s]["family"] for s in sets if s.startswith("fluent")} == {"fluent"}
  assert sets["emojione"]["family"] == sets["emojione-monotone"]["family"] == "emojione"
  families = names.table("emoji")["families"]
  assert sorted(f for group in families.values() for f in group) == sorted({s["family"] for s in sets.values()})


@pytest.mark.parametrize("profile", icons.PROFILES)
def test_rule_2_no_unseen_concept_in_training(profile):
  for item in icons.plan(profile):
    if item.split == "extra":  # most of its names are of no concept at all; see test_extra.py
      assert item.concept not in icons.unseen(), item
      continue
    split = names.concepts()[item.concept]["split"]
    if item.split in ("train", "val_artist", "test_artist"):
      assert split == "train", item
    if item.split.endswith("_concept"):
      assert item.split == f"{split}_concept", item


def test_rule_2_unseen_concepts_have_no_sound_and_no_mesh():
  for concept in icons.unseen():
    entry = names.concepts()[concept]
    assert not entry["sounds"] and not entry["meshes"], concept


@pytest.mark.parametrize("profile", icons.PROFILES)
def test_rule_3_no_file_in_two_splits(profile):
  places = collections.defaultdict(set)
  for item in icons.plan(profile):
    places[item.package, item.container, item.inner].add(item.split)
  assert all(len(splits) == 1 for splits in places.values())


def test_rule_3_test_sources_are_not_used_in_training():
  assert {i.split for i in icons.plan("full") if i.kind != "icon"} == {"gcompris", "qabcs", "scratch", "tuxpaint"}
  assert {i.kind for i in icons.plan("full") if i.split == "train"} == {"icon"}


def test_rule_7_sets_to_choose_by_are_not_test_sets():
  roles = {name: test.role for name, test in icons.eval_sets("full").items()}
  assert {n for n, role in roles.items() if role == "val"} == {"val_artist", "val_concept", "gcompris"}
  splits = collections.defaultdict(set)
  for test in icons.eval_sets("full").values():
    splits[test.role].add(test.split)
  assert not splits["val"] & splits["test"] and "train" not in splits["val"] | splits["test"]
  for row in names.table("pictures")["pictures"]:
    if row["in_bridge"]:
      assert row["split"] == roles.get(row["source"], "test")


def test_rule_8_captions_of_seen_concepts_name_no_unseen_one():
  forbidden = unseen_names()
  for concept in SEEN:
    assert not {names.slug(t) for t in icons.texts(concept)} & forbidden, concept
  kept = icons.texts("sunflower")
  assert kept[0] == "sunflower" and "sun" in names.concepts()["sunflower"]["texts"] and "sun" not in kept
  for profile in icons.PROFILES:
    assert not {names.slug(i.name) for i in icons.plan(profile) if i.split == "train"} & forbidden


def test_rule_8_drops_nothing_else():
  forbidden = unseen_names()
  for concept in BRIDGE:
    entry = names.concepts()[concept]
    dropped = set(entry["texts"]) - set(icons.texts(concept))
    assert all(names.to_concept(t) in forbidden for t in dropped), concept
    assert icons.texts(concept)[0] == entry["label"]


def test_what_is_trained_on_holds_no_unseen_concept_s_whole_name():
  spelled = lambda text: f" {' '.join(re.findall('[a-z0-9]+', text.lower()))} "
  hidden = {spelled(names.concepts()[c]["label"]) for c in icons.unseen()}
  before, after = set(), set()
  for concept in SEEN:
    row = {"concept": concept, "texts": list(icons.texts(concept))}
    kept = icons.annotate(row, "train")["texts"]
    assert kept and icons.annotate(row, "val_artist")["texts"] == row["texts"]
    before |= set(row["texts"]) - set(kept)
    after |= {text for text in kept if any(name in spelled(text) for name in hidden)}
  assert after == set() and before == {
    "satellite antenna", "snow-capped mountain", "circus tent", "mahjong red dragon", "mirror ball", "pick-up",
    "hair pick", "hammer and pick",
  }
  assert icons.trained_texts(["satellite antenna", "antenna", "dish"]) == ["antenna", "dish"]


def test_words_of_unseen_concepts_that_captions_hold():
  words = lambda concept: icons.annotate({"concept": concept, "texts": []}, "test_concept")["words"]
  found = collections.Counter((names.concepts()[c]["split"], words(c)) for c in icons.unseen())
  assert found == {("val", "seen"): 27, ("val", "unseen"): 33, ("test", "seen"): 50, ("test", "unseen"): 70}
  assert words("satellite") == "unseen" and words(min(SEEN)) == ""
  assert {name for name, test in icons.eval_sets("full").items() if "words" in test.slices} == {
    "val_concept", "test_concept"
  }


@pytest.mark.parametrize("name, ways", [
    ("val_artist", 550), ("val_concept", 60), ("gcompris", 730), ("test_artist", 550), ("test_concept", 120),
    ("qabcs", 730), ("scratch", 730), ("tuxpaint_photo", 730), ("tuxpaint_drawing", 730)])
def test_candidates_of_eval_sets(name, ways):
  candidates = icons.eval_sets("full")[name].candidates
  assert len(candidates) == len(set(candidates)) == ways
  concept_of = {v["label"]: c for c, v in names.concepts().items()}
  order = [concept_of[label] for label in candidates]
  assert order == sorted(order)


def test_eval_sets_sizes_and_candidates_hold_every_label():
  want = {"val_artist": 398, "val_concept": 622, "gcompris": 142, "test_artist": 1400, "test_concept": 1258,
          "qabcs": 113, "scratch": 84, "tuxpaint_photo": 156, "tuxpaint_drawing": 97}
  for name, test in icons.eval_sets("full").items():
    rows = [{"seen": i.concept in SEEN, "kind": i.kind, "style": i.style, "label": names.concepts()[i.concept]["label"]}
            for i in icons.plan("full") if i.split == test.split]
    kept = [row for row in rows if test.keep(row)]
    assert len(kept) == want.pop(name)
    assert {row["label"] for row in kept} <= set(test.candidates)
  assert not want
  assert set(icons.eval_sets("tiny")) == {"val_artist", "val_concept", "test_artist", "test_concept"}


def test_iconify_svg_follows_aliases_and_boxes():
  pack = {"width": 16, "height": 16, "icons": {"a": {"body": "<p fill='currentColor'/>", "left": 2, "width": 20}},
          "aliases": {"b": {"parent": "a"}}}
  want = (b'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
          b'viewBox="2 0 20 16" width="20" height="16"><p fill=\'#000\'/></svg>')
  assert icons.iconify_svg(pack, "a") == icons.iconify_svg(pack, "b") == want
  assert icons.iconify_svg(pack, "c") is None

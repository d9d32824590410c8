"""Further named pictures: which names may be trained on, the table, the tool's parts, and how batches draw them."""

import numpy as np
import pytest

from codebind_jax.data.batches import SourceBatches
from codebind_jax.data.joined import joined
from codebind_jax.data.worlds import extra, icons, names
from codebind_jax.tools.list_extra import WordNet
from tests.source_fixtures import Rows, tokens_of
from tests.world_fixtures import unseen_names

PROFILES = ("tiny", "small")
UNSEEN = {c: v for c, v in names.concepts().items() if v["split"] in ("val", "test")}


def rows(profile):
  return [item for item in icons.plan(profile) if item.split == "extra"]


@pytest.mark.parametrize("one, other", [("axes", "axe"), ("boxes", "box"), ("cherries", "cherry"), ("knives", "knife"),
                                        ("buses", "bus"), ("glasses", "glass"), ("leaves", "leaf"), ("ants", "ant")])
def test_plural_and_singular_have_one_stem(one, other):
  assert extra.stem(one) == extra.stem(other)


@pytest.mark.parametrize("name, why", [
    ("unicorn", "unicorn"), ("donut", "doughnut"), ("eagle-emblem", "eagle"), ("crossed-anchors", "anchor"),
    ("mountaintop", "mountain"), ("ufo", "flying-saucer"), ("plug", "electric-plug"), ("ButterflyKnife", "butterfly"),
    ("f1-car", "racing-car"), ("two-coins", "coin"), ("full-moon-face", "full-moon")])
def test_names_of_unseen_concepts_are_refused(name, why):
  assert extra.unseen_concept(name) == why


@pytest.mark.parametrize("name", ["cow", "crossed-swords", "lighthouse", "anvil", "grinning-face", "animal", "tree"])
def test_other_names_are_taken(name):
  assert not extra.unseen_concept(name)


@pytest.mark.parametrize("concept", sorted(UNSEEN))
def test_every_unseen_concept_is_refused_alone_and_in_a_longer_name(concept):
  own = [concept, UNSEEN[concept]["label"], *(a for a, c in names.table("aliases")["alias"].items() if c == concept)]
  for name in own:
    assert extra.unseen_concept(name), name
    assert extra.unseen_concept(f"old {name} emblem"), name


@pytest.mark.parametrize("profile", PROFILES)
def test_no_extra_picture_names_an_unseen_concept(profile):
  forbidden = {tuple(name.split("-")) for name in unseen_names()}
  for item in rows(profile):
    assert not extra.unseen_concept(item.name), item
    own = names.slug(item.name).split("-")
    spans = {tuple(own[a:b]) for a in range(len(own)) for b in range(a + 1, len(own) + 1)}
    assert not spans & forbidden, item
    assert names.concepts().get(item.concept, {}).get("split") not in ("val", "test")


@pytest.mark.parametrize("profile", PROFILES)
def test_extra_pictures_are_by_training_artists_and_nobody_elses(profile):
  held_out = {item.family for item in icons.plan(profile) if item.split in ("val_artist", "test_artist")}
  pictures = {item.family for item in icons.plan(profile) if item.kind != "icon"}
  assert rows(profile) and not {item.family for item in rows(profile)} & (held_out | pictures)
  others = {(item.package, item.inner) for item in icons.plan(profile) if item.split != "extra"}
  assert not {(item.package, item.inner) for item in rows(profile)} & others
  assert len({item.name for item in rows(profile)}) == len(rows(profile)), "one picture a name"


def test_extra_row_has_its_name_as_its_only_text():
  item = rows("small")[0]
  row = icons._row(item, b"")
  assert row["texts"] == [item.name] == [row["name"]] and not row["seen"]
  seen = next(item for item in rows("tiny") if names.concepts().get(item.concept, {}).get("split") == "train")
  assert icons._row(seen, b"")["label"] == names.concepts()[seen.concept]["label"]


def test_wordnet_finds_kinds(tmp_path):
  entry = "{} 05 n 01 {} 0 {:03d} {} | gloss @ 00000009 n 0000\n"
  (tmp_path / "data.noun").write_text("  1 licence\n" + entry.format("00000001", "bird", 0, "") + entry.format(
      "00000002", "parrot", 2, "@ 00000001 n 0000 ~ 00000003 n 0000") + entry.format(
          "00000003", "macaw", 1, "@ 00000002 n 0000"))
  (tmp_path / "index.noun").write_text("  1 licence\nbird n 1 0 1 0 00000001\nparrot n 1 2 @ ~ 1 0 00000002\n"
                                       "macaw n 1 1 @ 1 0 00000003\nbarn_owl n 1 0 1 0 00000001\n")
  wordnet = WordNet(tmp_path)
  assert wordnet.above("00000003") == {"00000001", "00000002", "00000003"}
  parrot = wordnet.senses("parrot")
  assert wordnet.kinds_of("two-macaws", parrot) and wordnet.kinds_of("parrots", parrot)
  assert not wordnet.kinds_of("bird", parrot) and wordnet.kinds_of("old-barn-owl", wordnet.senses("bird"))


def test_further_rows_are_read_where_they_are_and_share_groups_by_name():
  main = Rows("main", [{"name": name, "text": [name]} for name in "aab"], image=[b"0", None, b"2"])
  further = Rows("further", [{"name": "b"}, {"name": "c", "text": ["sea"]}], depth=[b"3", b"4"])
  both = joined([main, further], field="name", unique=False)
  assert [both.has(i, "image") for i in range(5)] == [True, False, True, False, False]
  assert [both.has(i, "depth") for i in range(5)] == [False, False, False, True, True]
  assert [both.has(i, "text") for i in range(5)] == [True, True, True, False, True]
  assert (both.read(2, "image"), both.read(3, "depth"), both.fields(4)["text"]) == (b"2", b"3", ["sea"])
  assert both.index.group.tolist() == [0, 0, 1, 1, 2] and both.where(4) == "further: record 1"
  part = both.select([4, 0])
  assert part.read(0, "depth") == b"4" and part.read(1, "image") == b"0" and part.column("name") == ["c", "a"]


def test_batches_hold_the_share_of_further_rows():
  labels = [f"main{i // 2}" for i in range(20)] + ["main0"] + [f"further{i}" for i in range(9)]
  values = np.arange(30, dtype=np.float16)[:, None, None, None]
  source = Rows("rows", [{"label": label} for label in labels])
  make = lambda share, rows=8: SourceBatches(
    source, {"a": tokens_of(values)}, rows=rows, seed=0, extra=10, extra_share=share
  )
  batches, seen = make(0.25), []
  for step in range(4):
    batch = batches[step]
    own = [labels[row] for row in batch["_row"]]
    assert sum(label.startswith("further") for label in own) == 2 and len(set(own)) == 8
    np.testing.assert_array_equal(batch["a"].ravel(), batch["_row"])
    seen += [label for label in own if label.startswith("further")]
  assert len(set(seen)) == 8, "an epoch of the further rows has no repeats"
  assert not any(labels[row].startswith("further") for row in make(0.0)[0]["_row"])
  with pytest.raises(ValueError, match="12 rows of a batch are of 'source', which has 9 distinct labels"):
    make(0.75, rows=16)

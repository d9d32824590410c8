"""Batches of items that are read, augmented and prepared anew: the same bits everywhere, and bad ones masked."""

import contextlib
import dataclasses
import itertools
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from codebind_jax.data import augment
from codebind_jax.data.batches import Batches, Once, SourceBatches
from codebind_jax.data.examples import Items, Texts, Values
from codebind_jax.data.inputs import Input
from codebind_jax.data.opening import open_source
from codebind_jax.data.preparation.pictures import Picture
from tests.batches_fixtures import digest, leaves
from tests.source_fixtures import Letters, Rows, tokens_of

# Row 4 has no picture, row 6 no text; rows 2 and 9 have one label.
COUNT, SIZE = 13, 8
LABELS = [f"label {2 if row == 9 else row}" for row in range(COUNT)]


@pytest.fixture
def manifest(tmp_path):
  """Noise pictures of one colour each, with two captions of five letters."""
  rng, lines = np.random.default_rng(0), []
  for row in range(COUNT):
    pixels = np.clip(rng.integers(0, 40, (20, 24, 3)) + 15 * row, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"{row}.png")
    line = {"id": f"row{row}", "label": LABELS[row]}
    line |= {"image": f"{row}.png"} if row != 4 else {}
    line |= {"text": [f"m{row:04}", f"f{row:04}"]} if row != 6 else {}
    lines.append(json.dumps(line) + "\n")
  (tmp_path / "noise.jsonl").write_text("".join(lines))
  return tmp_path / "noise.jsonl"


IMAGE = Input((SIZE, SIZE, 3), "uint8", Picture((SIZE, SIZE), resize="squash"), revision="squash")
TEXT = Input((8,), "int32", Letters())


def feeds_of(source, **changes):
  photo = augment.make("image", {"kind": "photo", **changes})
  return {"image": Items(source, "image", IMAGE, photo), "text": Texts(source, TEXT, ("{}", "a {}"))}


def batches_of(manifest, rows=4, unique=True, **options):
  source = open_source(str(manifest), check="none")
  return SourceBatches(source, feeds_of(source), rows=rows, seed=3, unique_labels=unique, **options)


def test_batches_are_the_same_bits_for_any_workers_threads_and_start(manifest):
  batches = Batches({"noise": batches_of(manifest), "again": batches_of(manifest, 6, unique=False)})
  expected = [digest([batches[step]]) for step in range(12)]
  assert len(set(expected)) == 12
  for first, options in [(0, {}), (2, {"threads": 1}), (5, {"threads": 4}), (3, {"workers": 2})]:
    with contextlib.closing(batches.start(first, **options)) as following:
      assert [digest([one.batch]) for one in itertools.islice(following, 7)] == expected[first : first + 7]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_their_rows_of_the_same_batch(manifest, processes):
  whole = batches_of(manifest, 12)
  parts = [batches_of(manifest, 12, process=p, processes=processes) for p in range(processes)]
  for step in (0, 1, 5):
    for found in zip(leaves(whole[step]), *(leaves(part[step]) for part in parts), strict=True):
      (path, wanted), *own = found
      np.testing.assert_array_equal(wanted, np.concatenate([x for _, x in own]), err_msg=path)
  assert whole.fingerprint == parts[1].fingerprint


def test_every_epoch_draws_another_view_and_another_caption(manifest):
  batches, views, texts = batches_of(manifest, COUNT, unique=False), {}, {}
  for epoch in range(8):
    batch = batches[epoch]
    assert sorted(batch["_row"]) == list(range(COUNT))
    for place, row in enumerate(batch["_row"].tolist()):
      views.setdefault(row, set()).add(batch["image"][place].tobytes())
      texts.setdefault(row, set()).add("".join(map(chr, batch["text"][place])).strip())
  assert all(len(own) == 8 for row, own in views.items() if row != 4) and views[4] == {bytes(SIZE * SIZE * 3)}
  # The templates go round the main text, and the further one is a caption of its own.
  assert all(own <= {f"m{row:04}", f"a m{row:04}", f"f{row:04}"} for row, own in texts.items() if row != 6)
  assert sum(len(own) for own in texts.values()) > 2.5 * COUNT
  plain = Items(open_source(str(manifest), check="none"), "image", IMAGE)
  for row in (0, 5):  # without an augmentation, and for evaluation, an item is as it is
    pixels = np.asarray(Image.open(manifest.parent / f"{row}.png"))
    np.testing.assert_array_equal(plain.clean(row), IMAGE.prepare(pixels))
    np.testing.assert_array_equal(plain.draw(row, np.random.default_rng(0))[0], IMAGE.prepare(pixels))


def damage_cut(path):
  path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage, message", [(damage_cut, "image: "), (lambda path: path.unlink(), "No such file")])
def test_a_bad_item_is_masked_and_named_and_no_other_row_changes(manifest, damage, message, workers):
  before = Batches({"noise": batches_of(manifest, 6, unique=False)})
  expected = [before.examples(step) for step in range(4)]
  damage(manifest.parent / "9.png")
  batches = Batches({"noise": batches_of(manifest, 6, unique=False)})
  with contextlib.closing(batches.start(workers=workers)) as following:
    found = list(itertools.islice(following, 4))
  masked = 0
  for old, new in zip(expected, found):
    a, b = old.batch["noise"], new.batch["noise"]
    np.testing.assert_array_equal(a["_row"], b["_row"])
    np.testing.assert_array_equal(a["_group"], b["_group"])
    here = a["_row"] == 9
    np.testing.assert_array_equal(b["_mask"]["image"], a["_mask"]["image"] & ~here)
    np.testing.assert_array_equal(b["_mask"]["text"], a["_mask"]["text"])
    for name in ("image", "text"):
      np.testing.assert_array_equal(a[name][~here], b[name][~here])
    assert not b["image"][here].any() and a["image"][here].all(axis=(1, 2, 3)).all()
    assert b["text"][here].any() == here.any()
    assert not old.bad and len(new.bad) == here.sum()
    for one in new.bad:
      assert (one.source, one.row, one.modality) == ("noise", 9, "image")
      assert f"{manifest}:10: " in one.message and f"{manifest.parent / '9.png'}" in one.message
      assert message in one.message
    masked += int(here.sum())
  assert masked >= 1


def test_what_is_read_is_counted(manifest):
  examples = Batches({"a": batches_of(manifest, 6), "b": batches_of(manifest, 4, unique=False)}).examples(2)
  sizes = {row: (manifest.parent / f"{row}.png").stat().st_size for row in range(COUNT)}
  for name, batch in examples.batch.items():
    pictures = sum(sizes[row] for row in batch["_row"].tolist() if row != 4)
    letters = sum(len("".join(map(chr, ids)).strip()) for ids in batch["text"] if ids.any())
    assert examples.read[name] == pictures + letters
  assert set(examples.seconds) == {"image", "text"} and examples.seconds["image"] > examples.seconds["text"] > 0


def test_the_fingerprint_follows_preparation_augmentation_and_captions(manifest):
  source = open_source(str(manifest), check="none")
  own = feeds_of(source)
  assert own["image"].fingerprint == feeds_of(source)["image"].fingerprint == pickle.loads(
    pickle.dumps(own["image"])).fingerprint  # fmt: skip
  others = [feeds_of(source, flip=0.0)["image"], Items(source, "image", IMAGE),
            Items(source, "image", Input(IMAGE.shape, "uint8", IMAGE.prepare, revision="other"))]  # fmt: skip
  assert len({own["image"].fingerprint, *(other.fingerprint for other in others)}) == 4
  texts = [own["text"], Texts(source, TEXT), Texts(source, TEXT, mode="main"), Texts(source, TEXT, mode="joined")]
  assert len({text.fingerprint for text in texts}) == 4


def test_items_of_bytes_and_arrays_and_what_reading_them_raises(manifest):
  content = (manifest.parent / "3.png").read_bytes()
  pixels = np.asarray(Image.open(manifest.parent / "3.png"))
  source = Rows("rows", [{}] * 4, image=[content, pixels, None, OSError("the disk does not answer")])
  feed, rng = Items(source, "image", IMAGE), np.random.default_rng(0)
  (one, size), (other, of_array) = feed.draw(0, rng), feed.draw(1, rng)
  np.testing.assert_array_equal(one, other)
  assert (size, of_array) == (len(content), pixels.nbytes)
  assert [feed.has(row) for row in range(4)] == [True, True, False, True]
  with pytest.raises(ValueError, match="the disk does not answer"):
    feed.clean(3)
  examples = Batches({"rows": SourceBatches(source, {"image": feed}, rows=4, seed=0)}).examples(0)
  assert [bad.message for bad in examples.bad] == ["rows: record 3: image: the disk does not answer"]
  assert examples.batch["rows"]["_mask"]["image"].sum() == 2 and examples.bad[0].source == "rows"


def test_values_are_named_by_their_number(manifest):
  feed = Values([manifest.parent / "0.png", manifest], "image", IMAGE)
  assert feed.clean(0).shape == IMAGE.shape
  with pytest.raises(ValueError, match=r"image\[1\]: .*noise.jsonl"):
    feed.clean(1)
  # A text is never a path.
  text = Values([str(manifest.parent / "0.png")], "text", TEXT)
  np.testing.assert_array_equal(text.clean(0), Letters()(str(manifest.parent / "0.png")))


@pytest.mark.parametrize("processes", [1, 2])
def test_each_row_once_in_order_with_padding_and_gaps(manifest, processes):
  (manifest.parent / "7.png").unlink()
  source = open_source(str(manifest), check="none")
  feed, numbers = Items(source, "image", IMAGE), np.array([8, 3, 4, 7, 0])
  whole = Once(feed, numbers, 4)
  parts = [Once(feed, numbers, 4, p, processes) for p in range(processes)]
  assert len(whole) == 2
  good = [(True, True, False, False), (True, False, False, False)]
  for k in range(2):
    items = np.concatenate([part[k].items for part in parts])
    np.testing.assert_array_equal(items, whole[k].items)
    assert tuple(np.concatenate([part[k].good for part in parts])) == good[k]
    assert items[~np.array(good[k])].sum() == 0
    bad = [item for part in parts for item in part[k].bad]
    assert [row for row, _ in bad] == ([7] if k == 0 else []) and all("7.png" in message for _, message in bad)
  np.testing.assert_array_equal(whole[1].items[0], feed.clean(0))


def test_a_row_whose_view_or_caption_is_not_cached_has_no_item():
  values = np.arange(8, dtype=np.float16).reshape(4, 2, 1, 1)
  feed = tokens_of(values, [(0,), (1,), (2, 3), ()], 0.5)
  places = feed.places.copy()
  assert [feed.has(row) for row in range(4)] == [True, True, True, False]
  places[1, 1] = places[3, 0] = -1  # an augmented view of row 1, and the second caption of row 2
  part = dataclasses.replace(feed, places=places)
  assert [part.has(row) for row in range(4)] == [True, False, False, False]

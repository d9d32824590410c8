"""Manifests: every kind of bad input names file and line; good input reads back as written."""

import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from codebind_jax.data.batches import SourceBatches
from codebind_jax.data.examples import Items, Texts, Values
from codebind_jax.data.formats.record import add_rows, parse
from codebind_jax.data.index import IndexBuilder, groups_of, id_hash
from codebind_jax.data.inputs import Input, Reading
from codebind_jax.data.opening import class_names, open_source
from codebind_jax.data.transforms import image as image_transform
from tests.world_fixtures import png


@pytest.fixture
def write(tmp_path):
  """Writes a manifest of the given lines (objects or raw text) beside a few images."""
  for name, colour in (("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255))):
    (tmp_path / f"{name}.png").write_bytes(png(colour))
  (tmp_path / "clip.wav").write_bytes(b"RIFF")

  def write(*lines, name="data.jsonl"):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (tmp_path / name).write_text(text + "\n", encoding="utf-8")
    return tmp_path / name

  return write


def test_rows_read_back(write):
  path = write(
      {"id": "a", "image": "red.png", "text": "a red thing", "label": "red", "split": "train"}, "",
      {"image": "green.png", "split": "test"},
      {"id": "c", "text": ["vert", "grün"], "label": "green", "split": "test"})
  source = open_source(str(path))
  assert source.column("id") == ["a", "data.jsonl:3", "c"] and len(source) == 3
  assert source.modalities == ("image", "text")
  first, second, third = source
  assert first["image"].shape == (8, 8, 3) and first["image"][0, 0].tolist() == [255, 0, 0]
  assert first["text"] == ["a red thing"] and first["label"] == "red"
  assert "text" not in second and second["label"] is None and source.where(1) == f"{path}:3"
  assert third["text"] == ["vert", "grün"] and "image" not in third
  assert [source.has(i, "image") for i in range(3)] == [True, True, False]
  assert [source.has(i, "text") for i in range(3)] == [True, False, True]
  with pytest.raises(IndexError):
    source[3]
  assert source[-1]["id"] == "c"


def test_records_taken_together_are_indexed_as_one_by_one():
  """`add_rows`, which takes columns at once, against `parse` of each row."""
  rng = np.random.default_rng(0)
  values = {
    "id": ["a", 3, None, " ", True, 1.5], "label": ["x", "y", 7, None, ""],
    "split": ["train", "validation", "dev", None],
    "image": ["a.png", b"x", {"bytes": b"x", "path": None}, {"bytes": None, "path": None}, "", None, 3],
    "text": ["t", ["t", "u"], [], [""], "", None, 5],
    "caption": ["c", None], "depth": ["d", None],
    "url": ["u", None, {}],
  }  # fmt: skip
  rows = []
  for number in range(4000):
    keys = rng.permutation(list(values))[: rng.integers(1, 5)]
    good = number % 2  # half of them of the first, good kinds
    rows.append({key: values[key][rng.integers(0, 2 if good else len(values[key]))] for key in keys})
  fast, slow, bad = IndexBuilder(), IndexBuilder(), {}
  where = np.stack([np.arange(len(rows)), np.arange(len(rows)) ** 2], 1)
  for at, row in enumerate(rows):
    try:
      record = parse(row, f"f:{at}")
      fields = record.fields
      slow.add(fields["id"], record.modalities, fields["label"], fields.get("split"), tuple(where[at].tolist()))
    except ValueError as error:
      bad[at] = str(error)
  unfit, _ = add_rows(fast, rows, lambda at: f"f:{at}", where)
  got, want = fast.build(), slow.build()
  assert unfit == bad and 500 < len(bad) < 3000 and got.labels == want.labels
  for name in ("label", "split", "where", "ids", "group"):
    assert (getattr(got, name) == getattr(want, name)).all(), name
  for modality in want.modalities:
    assert ((got.has & got.bit(modality) > 0) == (want.has & want.bit(modality) > 0)).all()
  assert (want.group == groups_of(want.label)).all()


def test_lines_of_all_kinds(write, tmp_path):
  path = tmp_path / "data.jsonl"
  long = b'{"text": "' + b"c" * 200_000 + b'"}'
  path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n  {"text": "b"}  \n\n\t\n' + long + b'\n{"text": "d"}')
  source = open_source(path)
  assert [text[0][:1] for text in source.column("text")] == ["a", "b", "c", "d"]
  assert [source.where(row)[-2:] for row in range(4)] == [":1", ":2", ":5", ":6"]
  for line in (b'{"text": "a"} {"text": "b"}', b'{"text": "a"},', b'"text"', b'{"text": "a"', b"[" * 100_000):
    path.write_bytes(b'{"text": "x"}\n' + line + b"\n")
    with pytest.raises(ValueError, match="data.jsonl:2: "):
      open_source(path)


def test_split_is_chosen(write):
  path = write(*({"id": str(i), "text": "x", "split": s} for i, s in enumerate(["train", "test", "train", "val"])))
  assert open_source(path, split="train").column("id") == ["0", "2"]
  assert open_source(str(path), split="val").column("id") == ["3"]
  assert open_source(path, split="").column("id") == ["0", "1", "2", "3"]


def test_manifest_without_splits_is_used_whole_and_says_so(write, caplog):
  path = write({"id": "a", "text": "x"}, {"id": "b", "text": "y"})
  assert open_source(path, split="test").column("id") == ["a", "b"]
  assert "no record has a split; all 2 are used as 'test'" in caplog.text


def test_split_that_is_nowhere_or_not_everywhere(write):
  path = write({"text": "x", "split": "train"}, {"text": "y", "split": "train"})
  with pytest.raises(ValueError, match=r"data: no record of split 'val'; it has \['train'\]"):
    open_source(path, split="val")
  path = write({"text": "x", "split": "train"}, {"text": "y"})
  with pytest.raises(ValueError, match="data.jsonl:2: no split, though other records have one"):
    open_source(path, split="train")
  with pytest.raises(ValueError, match="unknown split 'dev' for .*data.jsonl; allowed: .'train', 'val', 'test'"):
    open_source(path, split="dev")


BAD = {
    "not json": ('{"id": "b", ', "not JSON"),
    "not an object": ("[1, 2]", "an object is needed, got list"),
    "missing file": ({"image": "gone.png"}, "image: no such file: .*gone.png"),
    "a folder": ({"image": "."}, "image: .*not a readable image"),
    "no modality that is known": ({"smell": "red.png"}, "no modality; at least one of .'image', 'text', 'audio'"),
    "two texts": ({"text": "x", "caption": "y"}, "text and caption are both there"),
    "nothing but nulls": ({"image": None, "text": None}, "no modality"),
    "a number as path": ({"image": 3}, "image: a string that is not empty is needed, got 3"),
    "true as label": ({"text": "x", "label": True}, "label: a text or a whole number is needed, got True"),
    "a fraction as id": ({"text": "x", "id": 1.5}, "id: a text or a whole number is needed, got 1.5"),
    "unknown split": ({"text": "x", "split": "dev"}, "unknown split 'dev'; allowed: .'train', 'val', 'test'"),
    "not an image": ({"image": "clip.wav"}, "image: .*clip.wav: not a readable image"),
    "empty text": ({"text": " "}, "text: a string that is not empty is needed, got ' '"),
    "empty texts": ({"text": []}, "text: an empty list"),
    "text of another type": ({"text": 3}, "text: a string that is not empty is needed, got 3"),
    "empty label": ({"text": "x", "label": ""}, "label: a string that is not empty is needed"),
    "no modality": ({"id": "z", "label": "x"}, "no modality; at least one of"),
    "a key twice": ('{"text": "x", "image": "red.png", "image": "blue.png"}', "key 'image' is there twice"),
    "a key twice inside": ('{"text": "x", "more": {"a": 1, "a": 2}}', "key 'a' is there twice"),
    "a key twice, blanks": ('{"text" : "x", "id" : "1", "text" : "y"}', "key 'text' is there twice"),
    "half a surrogate pair": ('{"image": "\\ud800.png"}', r"image: no such file: .*\\ud800.png"),
    "half a pair in a text": ('{"text": ["x", "a \\udc00"]}', "text: got 'a .*udc00', which has half of a"),
    "half a pair in an id": ('{"text": "x", "id": "\\udc00"}', "id: got '.*udc00', which has half of a surrogate pair"),
    "half a pair in a label": ('{"text": "x", "label": "\\ud800"}', "label: got '.*ud800', which has half of a"),
    "id twice": ({"id": "a", "text": "x"}, "id 'a' is there twice, first in line 1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_record_names_file_and_line(write, kind):
  line, message = BAD[kind]
  path = write({"id": "a", "image": "red.png"}, {"id": "c", "image": "blue.png"}, line)
  with pytest.raises(ValueError, match=f"data.jsonl:3: .*{message}"):
    open_source(path)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("wrap", [lambda x: [x, x], lambda x: x])
def test_json_that_is_not_one_object_a_line_says_so(tmp_path, indent, wrap):
  text = json.dumps(wrap({"text": "x", "id": "1"}), indent=indent)
  (tmp_path / "a.jsonl").write_text(text + "\n")
  if text.startswith("{") and indent is None:
    assert len(open_source(tmp_path / "a.jsonl")) == 1
    return
  with pytest.raises(ValueError, match="a.jsonl:1: .*; one object a line is needed, not one array") as caught:
    open_source(tmp_path / "a.jsonl")
  str(caught.value).encode()


def test_a_path_of_half_a_surrogate_pair_can_be_printed(write):
  with pytest.raises(ValueError, match="no such file") as caught:
    open_source(write('{"image": "\\ud800.png"}'))
  str(caught.value).encode()


def test_keys_in_texts_are_no_repetition(write):
  lines = ['{"text": "a \\"text\\": b", "more": {"text": 1, "x": {"text": 2}}, "id": "1"}', '{"text" : "x"}']
  assert open_source(write(*lines)).column("text") == [['a "text": b'], ["x"]]


def test_remarks_on_bytes_name_their_records(tmp_path, caplog):
  mask = io.BytesIO()
  Image.fromarray(np.eye(8, dtype=np.uint8)).save(mask, "PNG")
  path = tmp_path / "a.parquet"
  pq.write_table(pa.table({"image": [mask.getvalue()] * 2}), path)
  prepared = Input((8, 8, 3), "uint8", Reading(image_transform.read, lambda x: x))
  with caplog.at_level("WARNING"):
    source = open_source(path, check="none")
    for _ in range(2):
      for row in range(2):
        Items(source, "image", prepared).clean(row)
    Values([mask.getvalue()], "image", prepared).clean(0)
  said = [message for record in caplog.records if "values are 0 and 1" in (message := record.getMessage())]
  names = [message.partition(": image bytes: ")[0] for message in said]
  assert names == [f"{path}: row 0", f"{path}: row 1", "image[0]"]


def test_text_that_is_not_utf_8(write):
  path = write({"id": "a", "text": "x"})
  path.write_bytes(path.read_bytes() + b'{"text": "\xff"}\n')
  with pytest.raises(ValueError, match="data.jsonl:2: not JSON"):
    open_source(path)


def test_bad_records_up_to_the_limit_are_named_and_counted(write, caplog):
  path = write({"id": "a", "image": "red.png"}, "{", {"label": "x"}, {"id": "d", "text": "x"})
  assert open_source(path, max_bad_records=2).column("id") == ["a", "d"]
  assert "left out" in caplog.text and "data.jsonl:2: not JSON" in caplog.text and "data.jsonl:3: no mod" in caplog.text
  with pytest.raises(ValueError, match=r"data.jsonl:2: not JSON .* \(2 bad records, 1 allowed\)"):
    open_source(path, max_bad_records=1)


def test_the_limit_is_of_all_files_together(write, tmp_path):
  write("{", {"text": "x"}, name="a.jsonl")
  write({"text": "y"}, "[", name="b.jsonl")
  assert len(open_source(tmp_path / "*.jsonl", max_bad_records=2)) == 2
  with pytest.raises(ValueError, match="a.jsonl:1: not JSON"):
    open_source(tmp_path / "*.jsonl", max_bad_records=1)


def test_records_without_id_are_named_by_file_and_line(write, tmp_path):
  for name in ("a/b", "a/c"):
    (tmp_path / name).mkdir(parents=True)
    write({"text": "x"}, "", {"text": "y"}, name=f"{name}/data.jsonl")
  source = open_source([tmp_path / "a/b/data.jsonl", tmp_path / "a/c/data.jsonl"])
  assert source.column("id") == ["b/data.jsonl:1", "b/data.jsonl:3", "c/data.jsonl:1", "c/data.jsonl:3"]
  assert source.index.ids.tolist() == [id_hash(name) for name in source.column("id")]


def test_files_that_are_bad_stay_where_they_are(write, caplog):
  path = write({"id": "a", "image": "red.png"}, {"id": "b", "image": "gone.png"}, {"id": "c", "text": "x"})
  assert open_source(path, max_bad_records=1).column("id") == ["a", "b", "c"]
  assert "will be left out: " in caplog.text and "gone.png" in caplog.text


def test_image_cut_short_is_found_when_read(write, tmp_path):
  rng = np.random.default_rng(0)
  Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
  (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
  source = open_source(write({"id": "a", "image": "red.png"}, {"id": "b", "image": "cut.png"}))
  with pytest.raises(ValueError, match="cut.png: not a readable image"):
    source[1]


def test_values_that_are_taken(write, caplog):
  caplog.set_level("INFO", "absl")
  path = write({"id": 7, "caption": "x", "label": 3, "split": "validation", "audio": None, "url": "u", "width": [1]},
               {"id": "b", "text": "y", "label": "3", "split": "test"})  # fmt: skip
  source = open_source(path)
  assert source.fields(0) == {"id": "7", "label": "3", "text": ["x"], "split": "val", "url": "u", "width": [1]}
  assert source.index.group.tolist() == [0, 0] and source.modalities == ("text",)
  assert "kept aside: url, width" in caplog.text and open_source(path, split="val").column("id") == ["7"]


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_empty_manifest(write, text):
  path = write("x")
  path.write_text(text)
  with pytest.raises(ValueError, match="data.jsonl: no records"):
    open_source(path)


def test_manifest_that_is_not_there(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
    open_source(tmp_path / "no.jsonl")


def test_sound_that_is_none_or_not_there_is_named_with_its_line(write):
  with pytest.raises(ValueError, match="data.jsonl:1: audio: .*clip.wav: not a readable sound"):
    open_source(write({"id": "a", "image": "red.png", "audio": "clip.wav"}))
  with pytest.raises(ValueError, match="data.jsonl:1: audio: no such file"):
    open_source(write({"audio": "gone.wav"}))


def test_unknown_key_and_missing_key_of_a_source(write):
  with pytest.raises(ValueError, match="world:icons: got folder 'x'; allowed for a world: no options"):
    open_source("world:icons", split="train", folder="x")
  path = write({"id": "a", "text": "x"})
  with pytest.raises(ValueError, match="data.jsonl: got profile 'tiny'; allowed for files: 'auto'"):
    open_source(path, profile="tiny")
  with pytest.raises(ValueError, match="data.jsonl: got separator ';'; allowed for files of this kind: columns"):
    open_source(path, separator=";")
  with pytest.raises(ValueError, match="world:icons: got max_bad_records 1; allowed for a world: 0"):
    open_source("world:icons", split="train", max_bad_records=1)
  with pytest.raises(ValueError, match="world:icons: needs a split, such as 'train'"):
    open_source("world:icons")


def test_select_pickle_and_threads(write):
  colours = ["red", "green", "blue"] * 5
  path = write(*({"id": str(i), "image": f"{c}.png", "text": c} for i, c in enumerate(colours)))
  source = open_source(path)
  part = source.select(np.array([4, 2, 3]))
  assert part.column("id") == ["4", "2", "3"] and len(source) == 15
  assert [row["text"][0] for row in part] == ["green", "blue", "red"]
  assert [row["image"][0, 0].argmax() for row in part] == [1, 2, 0]
  with pytest.raises(IndexError):
    source.select([15])
  again = pickle.loads(pickle.dumps(part))
  assert again.column("id") == part.column("id") and (again[0]["image"] == part[0]["image"]).all()
  with ThreadPoolExecutor(4) as pool:
    rows = list(pool.map(source.__getitem__, range(15)))
  assert [row["text"][0] for row in rows] == colours


def test_source_feeds_grain(write):
  path = write(*({"id": str(i), "text": str(i)} for i in range(6)))
  rows = grain.MapDataset.source(open_source(path)).shuffle(seed=1)
  assert sorted(row["id"] for row in rows) == [str(i) for i in range(6)]


def test_content_hash_follows_content(write, tmp_path):
  path = write({"id": "a", "image": "red.png", "text": "x"}, {"id": "b", "image": "red.png", "text": "y"})
  source = open_source(path)
  assert source.content_hash(0, "image") == source.content_hash(1, "image")
  assert source.content_hash(0, "text") != source.content_hash(1, "text")
  (tmp_path / "film").mkdir()
  (tmp_path / "film" / "0.png").write_bytes(png((1, 2, 3)))
  film = open_source(write({"video": "film"}, name="film.jsonl"))
  hashed = film.content_hash(0, "video")
  (tmp_path / "film" / "1.png").write_bytes(png((1, 2, 3)))
  assert film.content_hash(0, "video") != hashed
  before = source.content_hash(0, "image")
  (tmp_path / "red.png").write_bytes(png((1, 2, 3)))
  assert source.content_hash(0, "image") != before


def test_class_names(write, tmp_path):
  source = open_source(write(*({"text": "x", "label": label} for label in ["dog", "cat", "dog"])))
  assert class_names(source) == ("cat", "dog")
  classes = tmp_path / "classes.txt"
  classes.write_text("dog\n\nowl\ncat\n")
  assert class_names(source, classes) == ("dog", "owl", "cat")
  classes.write_text("dog\nowl\n")
  with pytest.raises(ValueError, match="label 'cat' of data is not among its 2 classes"):
    class_names(source, classes)
  classes.write_text("dog\ncat\ndog\n")
  with pytest.raises(ValueError, match="classes.txt:3: class 'dog' is there twice, first in line 1"):
    class_names(source, classes)
  classes.write_text(" \n")
  with pytest.raises(ValueError, match="classes.txt: empty class list"):
    class_names(source, classes)
  with pytest.raises(ValueError, match="empty class list: no row of data has a label"):
    class_names(open_source(write({"text": "x"})))


@pytest.mark.parametrize("mode, value, want", [
    ("RGBA", (10, 20, 30, 0), (255, 255, 255)), ("RGBA", (10, 20, 30, 255), (10, 20, 30)), ("LA", (9, 0), (255,) * 3),
    ("L", 7, (7, 7, 7)), ("1", 1, (255, 255, 255)), ("I;16", 0x8123, (0x81,) * 3), ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ("P", 0, (0, 0, 0))])
def test_image_modes_become_rgb_on_white(tmp_path, mode, value, want):
  path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
  Image.new(mode, (3, 2), value).save(path)
  image = image_transform.read(path)
  assert image.shape == (2, 3, 3) and image.dtype == np.uint8 and image[0, 0].tolist() == list(want)


def test_image_is_turned_upright(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # shown a quarter turn clockwise
  pixels = np.zeros((16, 32, 3), np.uint8)
  pixels[:, :16] = 255
  Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
  image = image_transform.read(tmp_path / "a.jpg")
  assert image.shape == (32, 16, 3) and image[2, 8].min() > 200 and image[-3, 8].max() < 50


def test_large_image_is_an_error_and_not_a_warning(tmp_path, monkeypatch):
  (tmp_path / "a.png").write_bytes(png((1, 2, 3), (64, 64)))
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
  with pytest.raises(ValueError, match="a.png: .*decompression bomb"):
    image_transform.read(tmp_path / "a.png")


def test_groups_of_selected_records_are_numbered_anew(tmp_path):
  path = tmp_path / "x.jsonl"
  labels = ["a", "b", None, "c", "b", "c", None, "b"]
  path.write_text("".join(json.dumps({"text": str(n), "label": label}) + "\n" for n, label in enumerate(labels)))
  source = open_source(path)
  assert source.index.group.tolist() == [0, 1, 2, 3, 1, 3, 4, 1]
  part = source.select([5, 7, 6, 3, 4])
  assert part.index.group.tolist() == [0, 1, 2, 0, 1] and [part.fields(n)["text"] for n in (0, 4)] == [["5"], ["4"]]
  assert part.select(np.array([4, 2])).index.group.tolist() == [0, 1] and part.select([4]).fields(0)["text"] == ["4"]
  assert source.select(range(8)).index.group.tolist() == source.index.group.tolist()
  feed = Texts(part, Input((1,), "int32", lambda text: np.array([int(text)], np.int32)))
  rows = SourceBatches(part, {"text": feed}, rows=3, seed=0)[0]
  assert sorted(rows["_group"].tolist()) == [0, 1, 2]

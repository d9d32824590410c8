"""Folders: class folders, Hugging Face dataset folders; and what `data.files` may name."""

import contextlib
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from codebind_jax.data import index_cache, opening, paged, ranges, records
from codebind_jax.data.formats import hugging_face
from tests.world_fixtures import png

RED, BLUE = png((255, 0, 0)), png((0, 0, 255))
CLASSES = {b"huggingface": json.dumps({"info": {"features": {
  "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}, "image": {"_type": "Image"}}}}).encode()}  # fmt: skip


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
  monkeypatch.setenv("CODEBIND_DATA", str(tmp_path / "root"))
  return tmp_path / "root"


def open_source(path, **options):
  return opening.open_source(path, **({"check": "none"} | options))


@pytest.fixture
def put(tmp_path):
  def put(*names, content=RED):
    for name in names:
      path = tmp_path / "set" / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content)
    return tmp_path / "set"

  return put


def arrow_table(labels, first=0):
  images = [{"bytes": RED if label else BLUE, "path": None} for label in labels]
  images = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
  ids = [f"n{first + at}" for at in range(len(labels))]
  return pa.table({"image": images, "label": labels, "id": ids}).replace_schema_metadata(CLASSES)


def test_names_that_are_no_utf_8_are_written_out_in_ids_and_labels(put):
  source = open_source(put(os.fsdecode(b"d\xff/a\xfe.png"), "d/b.png"))
  assert source.column("id") == ["d/b.png", r"d\xff/a\xfe.png"] and source.column("label") == ["d", r"d\xff"]
  assert os.fsencode(source.read(1, "image")).endswith(b"/set/d\xff/a\xfe.png")


def test_class_folders(put, caplog):
  caplog.set_level("INFO", "absl")
  folder = put("dog/b.jpg", "dog/x/a.PNG", "cat/ä.wav", "cat/c.mp4", "dog/notes.txt", ".git/x.jpg", "cat/.hidden.jpg",
               "README.md")  # fmt: skip
  (folder / "owl").mkdir()
  source = pickle.loads(pickle.dumps(open_source(folder)))
  assert source.column("id") == ["cat/c.mp4", "cat/ä.wav", "dog/b.jpg", "dog/x/a.PNG"]
  assert source.column("label") == ["cat", "cat", "dog", "dog"] and source.index.group.tolist() == [0, 0, 1, 1]
  assert source.modalities == ("image", "audio", "video") and source.has(1, "audio")
  assert source.read(3, "image") == folder / "dog/x/a.PNG" and source.where(2) == str(folder / "dog/b.jpg")
  assert "kept aside: .md, .txt" in caplog.text and "class owl has no file" in caplog.text
  assert open_source(f"{folder}/").column("id") == source.column("id")


def test_split_folders(put):
  folder = put("train/dog/a.png", "train/cat/a.png", "validation/dog/a.png", "test/cat/b.png")
  source = open_source(folder, split="val")
  assert source.fields(0) == {"id": "validation/dog/a.png", "label": "dog", "split": "val"} and len(source) == 1
  assert open_source(folder, split="train").column("label") == ["cat", "dog"]


def test_a_class_may_be_called_train(put):
  source = open_source(put("train/a.png", "bus/a.png"))
  assert source.column("label") == ["bus", "train"] and (source.index.split == -1).all()


@pytest.mark.parametrize("names, message", [
  (["a.png", "b.png"], "set: no class folders; CLASS/FILE or train/CLASS/FILE is expected.*found 2 files, such as a"),
  (["train/a.png", "test/dog/a.png"], "set/train: no class folders; .*found 1 files, such as a.png"),
  (["dog/a.txt", "cat/b.xyz"], "set: no file in its class folders ends in one of jpg, jpeg"),
])  # fmt: skip
def test_folders_without_classes_or_files(put, names, message):
  folder = put(*names)
  with pytest.raises(ValueError, match=message):
    open_source(folder)


def test_an_empty_folder(tmp_path):
  with pytest.raises(ValueError, match="no class folders; .* found nothing"):
    open_source(tmp_path)


def test_parquet_named_by_split(put, tmp_path, caplog):
  caplog.set_level("INFO", "absl")
  put("README.md")
  (tmp_path / "set/data").mkdir()
  for name, labels, first in (("train-00000-of-00002", [0, 1], 0), ("train-00001-of-00002", [1], 2),
                              ("validation-00000-of-00001-0123abc", [0], 3), ("test-00000-of-00001", [-1], 4),
                              ("extra-00000-of-00001", [1], 5)):
    pq.write_table(arrow_table(labels, first), tmp_path / f"set/data/{name}.parquet")
  folder = tmp_path / "set"
  assert open_source(folder, split="train").column("label") == ["cat", "dog", "dog"]
  assert open_source(folder, split="val").column("id") == ["n3"]
  assert open_source(folder, split="test").column("label") == [None]
  assert open_source(folder, split="train").read(1, "image") == RED
  assert len(open_source(folder)) == 5 and "splits that are not used, kept aside: extra" in caplog.text


def test_parquet_of_several_configurations(tmp_path):
  for name in ("en", "de"):
    (tmp_path / "set" / name).mkdir(parents=True)
    pq.write_table(arrow_table([0]), tmp_path / f"set/{name}/train-00000-of-00001.parquet")
  with pytest.raises(ValueError, match="set: Parquet files of several configurations: de, en; name the folder of one"):
    open_source(tmp_path / "set")
  assert len(open_source(tmp_path / "set/de", split="train")) == 1


def save_to_disk(folder, split, *shards):
  """As datasets.Dataset.save_to_disk: Arrow's stream format, and two files that describe it."""
  folder.mkdir(parents=True)
  names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
  for name, table in zip(names, shards):
    with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
      writer.write_table(table, max_chunksize=2)
  state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": split}
  (folder / "state.json").write_text(json.dumps(state))
  (folder / "dataset_info.json").write_text("{}")


def test_saved_to_disk(tmp_path):
  folder = tmp_path / "set"
  save_to_disk(folder / "train", "train", arrow_table([0, 1, 1]), arrow_table([1, 0], 3))
  save_to_disk(folder / "test", "test", arrow_table([1], 5))
  (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
  source = pickle.loads(pickle.dumps(open_source(folder, split="train")))
  with ThreadPoolExecutor(8) as pool:
    rows = list(pool.map(lambda row: (source.fields(row % 5), source.read(row % 5, "image")), range(80)))
  labels = ["cat", "dog", "dog", "dog", "cat"]
  assert source.index.ids.tolist() == [opening.id_hash(f"n{i}") for i in range(5)]
  assert rows == [({"id": f"n{i}", "label": labels[i]}, RED if labels[i] == "dog" else BLUE) for i in range(5)] * 16
  assert open_source(folder, split="test").column("id") == ["n5"]
  alone = open_source(folder / "test")
  assert alone.index.split.tolist() == [2] and alone.where(0) == f"{folder / 'test'}: row 0"
  assert source.content_hash(0, "image") == source.content_hash(4, "image") != source.content_hash(1, "image")
  os.utime(folder / "train/data-00001-of-00002.arrow", ns=(1, 1))
  with pytest.raises(ranges.ChangedError, match="data-00001-of-00002.arrow: has changed"):
    pickle.loads(pickle.dumps(source)).fields(0)
  (folder / "test/data-00000-of-00001.arrow").write_bytes(b"no arrow")
  with pytest.raises(ValueError, match="data-00000-of-00001.arrow: not a readable Arrow file"):
    open_source(folder / "test")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_media_beside_metadata(put, tmp_path, ending):
  put("train/a.png", "train/b.png", "test/a.png")
  rows = [{"file_name": "a.png", "text": "an a", "label": "x"}, {"file_name": "b.png", "text": "a b", "label": "y"}]
  for name, own in (("train", rows), ("test", rows[:1])):
    lines = [",".join(own[0]), *(",".join(row.values()) for row in own)] if ending == "csv" else map(json.dumps, own)
    text = "\n".join(lines).replace("an a", f"an a of {name}") + "\n"
    (tmp_path / f"set/{name}/metadata.{ending}").write_text(text)
  source = open_source(tmp_path / "set", split="train")
  assert source.read(1, "image") == tmp_path / "set/train/b.png"
  first = 1 if ending == "jsonl" else 2
  assert source.column("id") == [f"train/metadata.{ending}:{first}", f"train/metadata.{ending}:{first + 1}"]
  assert opening.id_hash(source.fields(0)["id"]) == source.index.ids[0]
  test = open_source(tmp_path / "set/test")
  assert test.column("text") == [["an a of test"]] and test.modalities == ("image", "text")


def test_metadata_that_names_no_file(put, tmp_path):
  put("a.png")
  (tmp_path / "set/metadata.csv").write_text("name,text\na.png,x\n")
  with pytest.raises(ValueError, match="metadata.csv: no column 'file_name'; it has name, text"):
    open_source(tmp_path / "set")
  (tmp_path / "set/metadata.csv").write_text("file_name,text\na.xyz,x\n")
  with pytest.raises(ValueError, match="file_name 'a.xyz': unknown ending; allowed: jpg"):
    open_source(tmp_path / "set")
  source = open_source(tmp_path / "set", columns={"depth": "file_name"})
  assert source.modalities == ("text", "depth") and source.where(0).endswith("metadata.csv:2")


@pytest.mark.parametrize("name, want", [
  ("a", ["a"]), ("a{b,c}d", ["abd", "acd"]), ("{000..003}", ["000", "001", "002", "003"]),
  ("{8..10}", ["8", "9", "10"]), ("{08..10}", ["08", "09", "10"]), ("{3..1}", ["3", "2", "1"]),
  ("{0..6..3}", ["0", "3", "6"]), ("{a,b{1..2}}", ["a", "b1", "b2"]), ("{a}", ["{a}"]), ("{a", ["{a"]),
  ("{,x}", ["", "x"]),
  ("{a}{1..2}", ["{a}1", "{a}2"]), ("{1..2}{x,y}", ["1x", "1y", "2x", "2y"]), ("{-1..1}", ["-1", "0", "1"]),
])  # fmt: skip
def test_braces_are_as_in_bash(name, want):
  assert opening.braces(name) == want


def test_files_that_are_named(tmp_path, monkeypatch):
  for n in range(12):
    (tmp_path / f"s{n:02d}.jsonl").write_text(f'{{"id": "{n}", "text": "x"}}\n')
  (tmp_path / "t.csv").write_text("id,text\nt,x\n")
  (tmp_path / "odd[1].jsonl").write_text('{"id": "odd", "text": "x"}\n')
  ids = lambda *names: open_source([str(tmp_path / name) for name in names]).column("id")
  assert ids("s0*.jsonl") == [str(n) for n in range(10)]
  assert ids("s{11..09}.jsonl") == ["11", "10", "9"]
  assert ids("s1?.jsonl", "t.csv", "s10.jsonl", "s{00,01}.jsonl") == ["10", "11", "0", "1", "t"]
  assert ids("odd[1].jsonl") == ["odd"]
  monkeypatch.setenv("HOME", str(tmp_path))
  assert open_source("~/t.csv").column("id") == ["t"]
  for name, message in (("u*.jsonl", r"u\*.jsonl"), ("s{11..12}.jsonl", r"\(of .*s{11..12}.jsonl\).*s12.jsonl")):
    with pytest.raises(FileNotFoundError, match=f"no such file or folder.*{message}"):
      ids("t.csv", name)
  (tmp_path / "a.xyz").touch()
  with pytest.raises(ValueError, match=r"a.xyz: unknown ending; allowed: .*\.jsonl.*\.parquet.*\.csv.*\.tar.*tfds:"):
    ids("a.xyz")
  with pytest.raises(ValueError, match="files: got an empty list"):
    open_source([])
  with pytest.raises(ValueError, match="'ftp://x/a.jsonl': unknown scheme 'ftp://'; allowed: a local path, gs://BUCKET"):
    open_source("ftp://x/a.jsonl")
  (tmp_path / "u.csv").write_text("id,text\n3,x\n")
  with pytest.raises(ValueError, match="id '3' is there twice: .*s03.jsonl:1 and .*u.csv:2"):
    ids("s*.jsonl", "u.csv")


def test_held_out_records_stay_so(tmp_path):
  path = tmp_path / "a.jsonl"
  lines = [f'{{"id": "{n}", "text": "x"}}\n' for n in range(3000)]
  path.write_text("".join(lines[1000:]))
  first = dict(zip(range(1000, 3000), opening.held_out(open_source(path), 0.1).tolist()))
  path.write_text("".join(lines[::-1]))
  source = open_source(path)
  held = opening.held_out(source, 0.1)
  assert all(first[n] == held[2999 - n] for n in range(1000, 3000))
  assert 240 < held.sum() < 360 and not (held & ~opening.held_out(source, 0.2)).any()
  assert (opening.held_out(source, 0.1, "other") & held).sum() < 80
  assert not opening.held_out(source, 0.0).any() and opening.held_out(source, 1.0).all()
  with pytest.raises(ValueError, match="share: got 1.5, allowed: 0 to 1"):
    opening.held_out(source, 1.5)


def test_the_kept_index(tmp_path, root, caplog, monkeypatch):
  path = tmp_path / "a.jsonl"
  lines = [json.dumps({"id": str(n), "text": "x" * 1000, "label": str(n % 7)}) + "\n" for n in range(1100)]
  path.write_text("".join(lines) + "{\n")
  first = open_source(path, max_bad_records=1)
  folder, ids = next((root / "index").iterdir()), first.index.ids.copy()
  again = open_source(path, max_bad_records=1)
  assert isinstance(again.index.has, paged.Pages) and caplog.text.count("left out") == 2
  assert (again.index.ids == ids).all() and again.index.label_of(9) == "2"
  assert len(pickle.dumps(again)) < 3000
  with pytest.raises(ValueError, match="a.jsonl:1101: not JSON"):
    open_source(path)
  for name, content in (("columns", None), ("meta.json", b"{"), ("columns", b"x"), ("columns", b"")):
    damaged = bytearray((folder / name).read_bytes())
    damaged[-1] ^= 1
    (folder / name).write_bytes(damaged if content is None else content)
    caplog.clear()
    assert (open_source(path, max_bad_records=1).index.ids == ids).all()
    assert "is damaged and is made again" in caplog.text
  caplog.clear()
  path.write_text("".join(lines[1:]))
  assert len(open_source(path)) == 1099 and len(list((root / "index").iterdir())) == 1 and "damaged" not in caplog.text
  (tmp_path / "file").touch()
  path.write_text("".join(lines))
  assert len(open_source(path, data_dir=tmp_path / "file")) == 1100 and "the index is not kept: " in caplog.text


def test_indices_on_disk_are_shared_by_processes(tmp_path, caplog):
  for name in ("a", "b"):
    rows = (json.dumps({"id": f"{name}{n}", "text": "x" * 900, "label": str(n % 7)}) for n in range(1200))
    (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
  source = open_source(str(tmp_path / "{a,b}.jsonl"))
  assert (source.index.where == 0).all() and source.select([3, 1203]).column("id") == ["a3", "b3"]
  rows = np.arange(2399, -1, -2)
  part = source.select(rows)
  part.index = index_cache.on_disk(part.index, tmp_path / "kept")
  again = pickle.loads(pickle.dumps(part.index))
  assert len(pickle.dumps(part.index)) < 2000 < len(pickle.dumps(source.select(rows).index))
  for name in ("has", "label", "split", "where", "ids"):
    assert (getattr(again, name) == getattr(source.index, name)[rows]).all()
  assert (again.group == records.groups_of(source.index.group[rows])).all()
  assert index_cache.on_disk(part.index, tmp_path / "kept").labels == part.index.labels
  assert len(list((tmp_path / "kept").iterdir())) == 1
  (tmp_path / "file").touch()
  assert index_cache.on_disk(part.index, tmp_path / "file") is part.index and "the index is not kept" in caplog.text
  empty = source.select([]).index
  assert len(pickle.loads(pickle.dumps(index_cache.on_disk(empty, tmp_path / "kept")))) == 0


def test_a_file_that_changes_while_it_is_indexed(tmp_path, monkeypatch):
  path = tmp_path / "a.jsonl"
  path.write_text('{"text": "x"}\n')
  build = opening.formats.jsonl.IndexBuilder.build

  def changing(builder):
    path.write_text('{"text": "longer"}\n')
    return build(builder)

  monkeypatch.setattr(opening.formats.jsonl.IndexBuilder, "build", changing)
  with pytest.raises(ranges.ChangedError, match="a.jsonl: has changed while it was indexed"):
    open_source(path)


def test_files_read_at_once_are_closed_beyond_the_limit_when_they_are_read(tmp_path):
  handles = ranges.Handles(3)
  paths = [str(tmp_path / f"{n}.jsonl") for n in range(5)]
  for path in paths:
    Path(path).write_text(path)
  with contextlib.ExitStack() as reading:
    held = [reading.enter_context(handles.of(path, ranges.stamp(Path(path)))) for path in paths]
    assert len(handles) == 5 and [os.pread(handle, 999, 0).decode() for handle in held] == paths
  assert len(handles) == 3


def test_more_files_than_can_be_open(tmp_path, monkeypatch):
  handles = ranges.Handles(3)
  monkeypatch.setattr(ranges, "_handles", handles)
  for n in range(12):
    (tmp_path / f"{n:02d}.jsonl").write_text("".join(f'{{"id": "{n}-{i}", "text": "{n} {i}"}}\n' for i in range(9)))
  source = open_source(tmp_path / "*.jsonl")
  with ThreadPoolExecutor(8) as pool:
    got = list(pool.map(lambda row: source.fields(row)["text"][0], np.random.default_rng(0).permutation(108).tolist()))
  assert sorted(got) == sorted(f"{n} {i}" for n in range(12) for i in range(9))
  source.fields(0)
  assert len(handles) == 3
  before = set(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
  kept = [paged.map_file(str(tmp_path / f"{n:02d}.jsonl")) for n in range(12)]
  assert bytes(kept[3]) == (tmp_path / "03.jsonl").read_bytes() and not kept[3].flags.writeable
  assert before is None or set(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_replaced_and_opened_again(tmp_path, monkeypatch):
  path = tmp_path / "a.jsonl"
  path.write_text('{"text": "old"}\n')
  old = open_source(path)
  assert old.fields(0)["text"] == ["old"]
  (tmp_path / "b").write_text('{"text": "new one"}\n')
  os.replace(tmp_path / "b", path)
  assert open_source(path).fields(0)["text"] == ["new one"]
  assert old.fields(0)["text"] == ["old"]  # the file that is open is still the old one
  monkeypatch.setattr(ranges, "_handles", ranges.Handles(3))
  with pytest.raises(ranges.ChangedError, match="a.jsonl: has changed since it was indexed"):
    old.fields(0)
  assert not len(ranges._handles)


def test_takes():
  assert not hugging_face.takes(ranges.as_path("/nowhere"))

"""Shards of raw media: what is read back, restarts, damage, and the ArrayRecord format itself."""

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys

import msgpack
import numpy as np
import pytest
import soundfile
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from codebind_jax.data import shards
from codebind_jax.data.formats import array_record
from codebind_jax.data.index import id_hash, index_of
from codebind_jax.data.opening import open_source
from codebind_jax.data.records import Source

REPOSITORY = pathlib.Path(__file__).parents[1]
ROWS = 12
SIZE = 2500


def write_input(folder):
  """A manifest beside pictures and sounds; a row of three has a sound, one has no picture, labels and splits differ."""
  folder.mkdir()
  rng, lines = np.random.default_rng(0), []
  for i in range(ROWS):
    line = {
      "id": f"r{i}",
      "caption": [f"thing {i}", "väl ☂"],
      "split": "val" if i % 4 == 3 else "train",
      "n": {"a": [i]},
    }
    if i != 5:
      line |= {"image": f"{i}.png", "label": f"class {i % 3}"}
      Image.fromarray(rng.integers(0, 255, (10 + i, 12, 3), np.uint8)).save(folder / f"{i}.png")
    if i % 3 == 0:
      line["audio"] = f"{i}.wav"
      soundfile.write(folder / f"{i}.wav", rng.normal(size=200) * 0.1, 44100)
    lines.append(line)
  write_lines(folder, lines)
  return folder / "set.jsonl"


def write_lines(folder, lines):
  (folder / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def lines_of(manifest):
  return [json.loads(line) for line in manifest.read_text().splitlines()]


@pytest.fixture
def manifest(tmp_path):
  return write_input(tmp_path / "in")


def job_of(manifest, folder, size=SIZE, **options):
  source = open_source(manifest, check="none")
  return shards.Job.of(source, shards.make_plan(source, size, **options), folder)


def files_of(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def shards_of(folder):
  return sorted(folder.glob("*.array_record"))


def bytes_of(item):
  return item if isinstance(item, bytes) else item.read_bytes()


def same_records(a, b):
  assert len(a) == len(b) and a.modalities == b.modalities
  np.testing.assert_array_equal(a.index.ids, b.index.ids)
  np.testing.assert_array_equal(a.index.split, b.index.split)
  np.testing.assert_array_equal(a.index.group, b.index.group)
  for row in range(len(a)):
    assert a.fields(row) == b.fields(row)
    assert a.index.label_of(row) == b.index.label_of(row)
    for m in a.modalities:
      assert a.has(row, m) == b.has(row, m)
      if a.has(row, m):
        assert a.content_hash(row, m) == b.content_hash(row, m)
        assert m == "text" or bytes_of(a.read(row, m)) == bytes_of(b.read(row, m))


def test_records_are_read_back_as_they_went_in_also_from_shards_of_shards(manifest, tmp_path):
  summary, kept = shards.write_all(job_of(manifest, tmp_path / "out"))
  files = shards_of(tmp_path / "out")
  assert kept == 0 and len(files) > 2 and summary["records"] == ROWS == sum(s["records"] for s in summary["shards"])
  assert [p.name for p in files] == [f"set-{n:05d}-of-{len(files):05d}.array_record" for n in range(len(files))]
  assert [s["sha256"] for s in summary["shards"]] == [hashlib.sha256(p.read_bytes()).hexdigest() for p in files]
  there = open_source(manifest)
  same_records(there, open_source(files))
  assert open_source(files)[0]["image"].shape == (10, 12, 3) and open_source(files)[0]["audio"].shape == (200,)
  again = open_source(files)
  plan = shards.make_plan(again, 2 * SIZE)
  shards.write_all(shards.Job.of(again, plan, tmp_path / "again"))
  assert 1 < len(shards_of(tmp_path / "again")) < len(files)
  same_records(there, open_source(shards_of(tmp_path / "again")))


def test_a_split_alone_and_one_that_only_its_opening_names(manifest, tmp_path):
  source = open_source(manifest, split="val", check="none")
  shards.write_all(shards.Job.of(source, shards.make_plan(source, SIZE, split="val"), tmp_path / "out"))
  found = open_source(shards_of(tmp_path / "out"), split="val")
  assert [found.fields(row)["id"] for row in range(len(found))] == ["r3", "r7", "r11"]
  assert shards_of(tmp_path / "out")[0].name.startswith("set-val-00000-of-")
  plain = Made([{"id": "a", "text": ["one"]}], [("text",)])
  shards.write_all(shards.Job.of(plain, shards.make_plan(plain, SIZE, split="test"), tmp_path / "plain"))
  found = open_source(shards_of(tmp_path / "plain"), split="test")
  assert found.fields(0) == {"id": "a", "label": None, "text": ["one"], "split": "test"}


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_write_what_one_does(manifest, tmp_path, workers):
  job = job_of(manifest, tmp_path / "out", workers=workers)
  for number in reversed(range(len(job.plan.parts))):
    job.begin() if not job.folder.exists() else None
    job.write(number)
  _, kept = shards.write_all(job, workers)
  assert kept == len(job.plan.parts)
  shards.write_all(job_of(manifest, tmp_path / "two"), 2)
  assert files_of(tmp_path / "out") == files_of(tmp_path / "two")


_KILLED = """
import os, pathlib, signal, sys
from codebind_jax.data import shards
from codebind_jax.data.opening import open_source
manifest, folder, row = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
source = open_source(manifest, check="none")
job = shards.Job.of(source, shards.make_plan(source, int(sys.argv[4])), folder)
record = shards._record
def hook(source, split, media, at):
  if at == row:
    os.kill(os.getpid(), signal.SIGKILL)
  return record(source, split, media, at)
shards._record = hook
shards.write_all(job)
"""


def test_a_killed_run_goes_on_to_the_same_bytes(manifest, tmp_path):
  whole = job_of(manifest, tmp_path / "whole")
  shards.write_all(whole)
  part = whole.plan.parts[2]
  middle = part.first + part.records - 1
  command = [sys.executable, "-c", _KILLED, str(manifest), str(tmp_path / "out"), str(middle), str(SIZE)]
  assert subprocess.run(command, cwd=REPOSITORY).returncode == -signal.SIGKILL
  done = shards_of(tmp_path / "out")
  assert len(done) == 2 and not (tmp_path / "out" / "shards.json").exists()
  assert len(list((tmp_path / "out").glob("*.part"))) == 1
  before = [path.stat().st_ino for path in done]
  _, kept = shards.write_all(job_of(manifest, tmp_path / "out"))
  assert kept == 2 and [path.stat().st_ino for path in done] == before
  assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def flip(path, at):
  content = bytearray(path.read_bytes())
  content[at] ^= 1
  path.write_bytes(content)


def test_damage_is_named_when_read_and_mended_by_the_next_run(manifest, tmp_path):
  shards.write_all(job_of(manifest, tmp_path / "out"))
  before, path = files_of(tmp_path / "out"), shards_of(tmp_path / "out")[0]
  source = open_source(path, check="none")
  media = bytes_of(source.read(1, "image"))
  flip(path, before[path.name].index(media) + 40)
  source = open_source(path, check="none")  # its index is whole
  assert bytes_of(source.read(0, "image")) and bytes_of(source.read(2, "image"))
  with pytest.raises(ValueError, match=rf"{path}: record 1: damaged .*hash mismatch"):
    source.read(1, "image")
  cut = shards_of(tmp_path / "out")[2]
  cut.write_bytes(before[cut.name][:-100])
  with pytest.raises(ValueError, match=rf"{cut}: not an ArrayRecord file, or its end is missing"):
    open_source(cut)
  _, kept = shards.write_all(job_of(manifest, tmp_path / "out"))
  assert kept == len(shards_of(tmp_path / "out")) - 2 and files_of(tmp_path / "out") == before


def test_what_a_shard_holds_is_compared_with_the_input_before_it_gets_its_name(manifest, tmp_path, monkeypatch):
  right = array_record.encode
  wrong = lambda fields, items: right(fields, items | {m: b"!" + items[m][1:] for m in items if m == "image"})
  monkeypatch.setattr(shards, "encode", wrong)
  with pytest.raises(ValueError, match=r"set.jsonl:1 \(id 'r0'\): its image was not written as it is"):
    shards.write_all(job_of(manifest, tmp_path / "out"))
  assert list(files_of(tmp_path / "out")) == ["plan.json"]


@pytest.mark.parametrize("change, said", [
  ("content", r"set.jsonl:2 \(id 'r1'\): its image is not what was written of it: the input has changed since"),
  ("file", r"the input had [\d,]+ bytes of fields and media, has "),
  ("label", r"fields or sizes of records 0 to \d \(shard 0\) have changed"),
  ("record", r"the input had 12 records, has 11"),
  ("size", r"size was 2500, is 5000"),
  ("other", r"is none of the shards of this plan"),
  ("plan", r"belongs to another plan"),
])  # fmt: skip
def test_a_changed_input_or_setting_is_named(manifest, tmp_path, change, said):
  shards.write_all(job_of(manifest, tmp_path / "out"))
  before, lines = files_of(tmp_path / "out"), lines_of(manifest)
  if change == "content":
    flip(manifest.parent / "1.png", -20)
  elif change == "file":
    (manifest.parent / "1.png").write_bytes((manifest.parent / "1.png").read_bytes() + b"0")
  elif change == "label":
    write_lines(manifest.parent, [lines[0] | {"label": "class 2"}, *lines[1:]])
  elif change == "record":
    write_lines(manifest.parent, lines[:-1])
  elif change == "other":
    (tmp_path / "out" / "plan.json").unlink()
  elif change == "plan":
    writer = ArrayRecordWriter(str(shards_of(tmp_path / "out")[0]), "group_size:1,uncompressed")
    writer.write(array_record.encode({"id": "x"}, {"image": b"1"}))
    writer.close()
  with pytest.raises(ValueError, match=said):
    shards.write_all(job_of(manifest, tmp_path / "out", 2 * SIZE if change == "size" else SIZE))
  if change not in ("other", "plan"):
    assert files_of(tmp_path / "out") == before


def test_a_file_that_changes_after_the_plan_is_noticed(manifest, tmp_path):
  job = job_of(manifest, tmp_path / "out")
  (manifest.parent / "11.png").write_bytes(b"another picture")
  with pytest.raises(ValueError, match="set.jsonl:12: fields or sizes of records have changed since the plan was made"):
    shards.write_all(job)
  assert len(shards_of(tmp_path / "out")) == len(job.plan.parts) - 1 and not list((tmp_path / "out").glob("*.part"))


_FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv[:2] = ["shards"]
import runpy
runpy.run_module("codebind_jax.tools.shards", run_name="__main__")
"""


def test_a_full_disk_leaves_no_half_a_shard_and_the_next_run_goes_on(manifest, tmp_path):
  command = [str(manifest), str(tmp_path / "out"), "--size=1GB", "--workers=1"]
  limited = [sys.executable, "-B", "-c", _FULL, "4000", *command]  # or it leaves half a .pyc
  found = subprocess.run(limited, cwd=REPOSITORY, capture_output=True, text=True)
  assert found.returncode == 1 and "error: " in found.stderr and "File too large" in found.stderr
  assert "Traceback" not in found.stderr and list(files_of(tmp_path / "out")) == ["plan.json"]
  command = [sys.executable, "-m", "codebind_jax.tools.shards", *command]
  found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
  assert found.returncode == 0, found.stderr
  assert "1 shards of 12 records" in found.stdout and "1 written, 0 kept" in found.stdout
  same_records(open_source(manifest), open_source(shards_of(tmp_path / "out")))


def test_room_on_the_disk_is_looked_at_before(manifest, tmp_path, monkeypatch):
  monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
  with pytest.raises(OSError, match=r"out: .* are needed, 1.0 kB are free"):
    shards.write_all(job_of(manifest, tmp_path / "out"))
  assert not files_of(tmp_path / "out")


def test_bad_records_are_an_error_or_left_out_by_name(manifest, tmp_path, caplog):
  (manifest.parent / "2.png").unlink()
  (manifest.parent / "4.png").write_bytes(b"")
  (manifest.parent / "6.png").write_bytes(b"no picture")
  with pytest.raises(ValueError, match="set.jsonl:3: image: no such file"):
    job_of(manifest, tmp_path / "out")
  with pytest.raises(ValueError, match=r"set.jsonl:3: .* \(3 bad records, 2 allowed\)"):
    job_of(manifest, tmp_path / "out", max_bad_records=2)
  with caplog.at_level("WARNING", "absl"):
    job = job_of(manifest, tmp_path / "out", max_bad_records=3)
  assert [f"set.jsonl:{line}: image:" in caplog.text for line in (3, 5, 7)] == [True] * 3
  assert job.plan.left_out == (2, 4, 6) and job_of(
    manifest, tmp_path, check="none", max_bad_records=2
  ).plan.left_out == (2, 4)
  summary, _ = shards.write_all(job, 2)
  assert summary["records"] == 9 and summary["left_out"] == 3
  found = open_source(shards_of(tmp_path / "out"))
  assert found.column("id") == [f"r{i}" for i in range(ROWS) if i not in (2, 4, 6)]


def test_two_records_of_one_id_are_refused(manifest, tmp_path):
  shutil.copytree(manifest.parent, tmp_path / "copy")
  with pytest.raises(ValueError, match="id 'r0' is there twice: .*in/set.jsonl:1 and .*copy/set.jsonl:1"):
    open_source([manifest, tmp_path / "copy/set.jsonl"], check="none")
  source = Made([{"id": "a", "text": ["x"]}, {"id": "b", "text": ["x"]}, {"id": "a", "text": ["y"]}], [("text",)] * 3)
  with pytest.raises(ValueError, match="id 'a' is there twice: made: record 0 and made: record 2"):
    shards.make_plan(source, SIZE)


class Made(Source):
  """Records in memory."""

  def __init__(self, rows, has, items=()):
    super().__init__("made", index_of(rows, has))
    self.rows, self.items = rows, items

  def _fields(self, number):
    return self.rows[number]

  def _read(self, number, modality):
    return self.items[number][modality]

  def _hash(self, number, modality):
    return ""


class Deadly(Made):
  """Its last record ends the worker process that reads it."""

  def _read(self, number, modality):
    if number == len(self.rows) - 1 and multiprocessing.parent_process():
      os.kill(os.getpid(), signal.SIGKILL)
    return super()._read(number, modality)


def test_a_worker_process_that_ends_is_told_and_its_shard_is_written_by_the_next_run(tmp_path):
  source = Deadly([{"id": str(i)} for i in range(4)], [("image",)] * 4, [{"image": b"1" * 100}] * 4)
  job = shards.Job.of(source, shards.make_plan(source, 200, check="none"), tmp_path / "out")
  with pytest.raises(RuntimeError, match="worker processes was killed by SIGKILL.*run the same command again"):
    shards.write_all(job, 2)
  assert not (tmp_path / "out/shards.json").exists() and len(job.plan.parts) == 3
  shards.write_all(job)
  assert len(shards_of(tmp_path / "out")) == 3 and not list((tmp_path / "out").glob("*.part"))


def test_arrays_become_npy_files_and_bytes_stay(tmp_path):
  picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
  cloud = np.arange(12, dtype=np.float32).reshape(4, 3)
  content = shards.content_of(cloud)
  rows = [{"id": "a", "label": None, "size": np.float32(0.5)}, {"id": "b", "label": "x"}]
  source = Made(rows, [("image",), ("points",)], [{"image": picture}, {"points": content}])
  shards.write_all(shards.Job.of(source, shards.make_plan(source, 10**6), tmp_path / "out"))
  found = open_source(shards_of(tmp_path / "out"))
  np.testing.assert_array_equal(found[0]["image"], picture)
  np.testing.assert_array_equal(found[1]["points"], cloud)
  assert found.fields(0) == {"id": "a", "label": None, "size": 0.5} and content in files_of(tmp_path / "out")[
    "made-00000-of-00001.array_record"]  # fmt: skip


def test_a_kind_of_file_that_is_read_by_its_path_alone_is_refused(tmp_path, monkeypatch):
  from codebind_jax.data.transforms import points

  path = tmp_path / "a.xyz"
  path.write_text("".join(f"{n} {n * n % 7} {n % 3}\n" for n in range(9)))
  read = points.read

  def by_path(value):
    if isinstance(value, bytes):
      raise ValueError("points bytes: a kind of file that is not known")
    return read(value)

  monkeypatch.setattr(points, "read", by_path)
  source = Made([{"id": "a"}], [("points",)], [{"points": path}])
  with pytest.raises(ValueError, match="record 0: points: .*a.xyz: .xyz files are read from their path, not"):
    shards.make_plan(source, SIZE)


def test_shards_are_balanced():
  assert shards.balanced(np.array([5, 5, 5, 5]), 10).tolist() == [0, 2, 4]
  assert shards.balanced(np.array([5, 5, 5, 5]), 20).tolist() == [0, 4]
  assert shards.balanced(np.array([100, 1, 1, 1]), 10).tolist() == [0, 1, 4]
  assert shards.balanced(np.array([7]), 2).tolist() == [0, 1]
  sizes = np.random.default_rng(0).integers(1, 1000, 5000)
  bounds = shards.balanced(sizes, 100_000)
  sums = np.add.reduceat(sizes, bounds[:-1])
  assert len(sums) == -(-sizes.sum() // 100_000) and np.ptp(sums) < 2000 and bounds[-1] == 5000


@pytest.mark.parametrize(
  "text, size", [("1GB", 10**9), ("64MiB", 2**26), ("500 kb", 500_000), ("12", 12), ("0.5kB", 500)]
)
def test_sizes(text, size):
  assert shards.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1MB", "1XB", "1 GB 2"])
def test_no_sizes(text):
  with pytest.raises(ValueError, match="size: got .*allowed: a number above 0"):
    shards.parse_size(text)


def test_the_command_has_one_line_of_error(manifest, tmp_path):
  command = [sys.executable, "-m", "codebind_jax.tools.shards", str(manifest), str(tmp_path / "out")]
  for more, said in ((["--size=much"], "error: size: got 'much'"), (["--split=none"], "error: unknown split 'none'")):
    found = subprocess.run([*command, *more], cwd=REPOSITORY, capture_output=True, text=True)
    assert found.returncode == 1 and said in found.stderr and "Traceback" not in found.stderr
  assert not (tmp_path / "out").exists()


# The format.


def write_records(path, contents, options="group_size:1,uncompressed"):
  writer = ArrayRecordWriter(str(path), options)
  for content in contents:
    writer.write(content)
  writer.close()
  return path


def test_a_file_without_an_index_gives_the_same_one(manifest, tmp_path):
  shards.write_all(job_of(manifest, tmp_path / "out", 10**9))
  path = shards_of(tmp_path / "out")[0]
  contents = [content for _, content in array_record.Shard(path)]
  assert len(contents) == ROWS + 1 and list(msgpack.unpackb(contents[-1])) == ["__index__"]
  plain = open_source(write_records(tmp_path / "plain.arrayrecord", contents[:-1]))
  same_records(open_source(path), plain)
  same_records(open_source(manifest), plain)
  with pytest.raises(ValueError, match="its index is of 12 records, and 11 are before it"):
    open_source(write_records(tmp_path / "less.array_record", contents[1:]))


def test_a_record_is_a_plain_map():
  content = array_record.encode({"label": "x", "z": 1, "id": "a", "text": ["b"], "split": None}, {"image": b"\x89PNG"})
  assert msgpack.unpackb(content) == {"id": "a", "label": "x", "text": ["b"], "z": 1, "image": b"\x89PNG"}
  assert list(msgpack.unpackb(content)) == ["id", "label", "text", "z", "image"]
  with pytest.raises(ValueError, match="image: is both a field and a modality of record 'a'"):
    array_record.encode({"id": "a", "image": "x"}, {"image": b"1"})
  with pytest.raises(ValueError, match="record 'a': cannot be written .type set."):
    array_record.encode({"id": "a", "odd": {1}}, {})


def test_records_of_others(tmp_path):
  path = write_records(tmp_path / "others.array_record", [
    msgpack.packb({"__key__": "k0", "jpg": b"J", "txt": b" a dog\n", "cls": b"3", "json": b'{"width": 7, "id": "x"}'}),
    msgpack.packb({"__key__": "k1", "depth.png": b"D", "wav": b"W", "__url__": "u"}),
    msgpack.packb({"image": b"I", "caption": "a cat", "split": "validation"}),
  ])  # fmt: skip
  source = open_source(path, check="none")
  assert source.column("id") == ["k0", "k1", "others.array_record:2"]
  assert source.fields(0) == {"id": "k0", "label": "3", "text": ["a dog"], "width": 7}
  assert source.read(0, "image") == b"J" and source.read(1, "depth") == b"D" and source.read(1, "audio") == b"W"
  assert source.fields(2)["split"] == "val" and source.index.split.tolist() == [-1, -1, 1]
  assert source.index.ids[1] == id_hash("k1")


@pytest.mark.parametrize("content, said", [
  (b"", "not msgpack"), (b"\xc1", "not msgpack"), (msgpack.packb({"id": "a"}), "no modality"),
  (msgpack.packb([1]), "a msgpack map with string keys is needed, got list"),
  (msgpack.packb({"id": "a", "split": "dev", "image": b"1"}), "unknown split"),
])  # fmt: skip
def test_what_is_no_record_is_named_or_left_out(tmp_path, caplog, content, said):
  good = [array_record.encode({"id": name}, {"image": b"1"}) for name in "ab"]
  path = write_records(tmp_path / "some.array_record", [good[0], content, good[1]])
  with pytest.raises(ValueError, match=rf"{path}: record 1: .*{said}"):
    open_source(path, check="none")
  with caplog.at_level("WARNING", "absl"):
    source = open_source(path, check="none", max_bad_records=1)
  assert f"left out {path}: record 1" in caplog.text
  assert source.column("id") == ["a", "b"] and source.where(1) == f"{path}: record 2"


def test_a_damaged_record_of_others_is_a_bad_record(tmp_path):
  good = [array_record.encode({"id": name}, {"image": name.encode() * 99}) for name in "abc"]
  path = write_records(tmp_path / "some.array_record", good)
  flip(path, path.read_bytes().index(b"b" * 99))
  with pytest.raises(ValueError, match=rf"{path}: record 1: damaged"):
    open_source(path, check="none")
  assert open_source(path, check="none", max_bad_records=1).column("id") == ["a", "c"]


def test_ids_twice_and_files_that_are_none(tmp_path):
  same = array_record.encode({"id": "a"}, {"image": b"1"})
  with pytest.raises(ValueError, match=r"two.array_record: record 1: id 'a' is there twice, first in record 0"):
    open_source(write_records(tmp_path / "two.array_record", [same, same]), check="none")
  with pytest.raises(ValueError, match="none.array_record: no records"):
    open_source(write_records(tmp_path / "none.array_record", []))
  (tmp_path / "text.array_record").write_text("text")
  with pytest.raises(ValueError, match="text.array_record: not an ArrayRecord file"):
    open_source(tmp_path / "text.array_record")
  with pytest.raises(FileNotFoundError):
    open_source(tmp_path / "missing.array_record")


def test_many_threads_and_another_copy_read_the_same(tmp_path):
  rng = np.random.default_rng(0)
  media = [rng.bytes(int(rng.integers(1, 5000))) for _ in range(300)]
  path = write_records(
    tmp_path / "many.array_record", [array_record.encode({"id": str(i)}, {"image": m}) for i, m in enumerate(media)]
  )
  source = pickle.loads(pickle.dumps(open_source(path, check="none")))
  order = rng.integers(0, 300, 4000).tolist()
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda row: (source.fields(row)["id"], source.read(row, "image")), order))
  assert found == [(str(row), media[row]) for row in order]
  part = source.select([7, 3])
  assert part.read(1, "image") == media[3] and part.where(0) == f"{path}: record 7"


def test_records_that_are_stored_together_are_a_block(tmp_path):
  contents = [array_record.encode({"id": str(i)}, {"image": b"1"}) for i in range(9)]
  source = open_source(write_records(tmp_path / "four.array_record", contents, "group_size:4"), check="none")
  assert source.block == 4 and source.column("id") == [str(i) for i in range(9)]
  assert open_source(write_records(tmp_path / "one.array_record", contents), check="none").block == 1


def test_files_that_were_not_used_for_long_are_closed(tmp_path):
  paths = [write_records(tmp_path / f"{i}.array_record", [array_record.encode({"id": str(i)}, {"image": b"1"})])
           for i in range(3)]  # fmt: skip
  source = open_source(paths, check="none")
  count = lambda: sum(
    os.path.realpath(f"/proc/self/fd/{fd}").startswith(str(tmp_path)) for fd in os.listdir("/proc/self/fd")
  )
  assert source.column("id") == ["0", "1", "2"] and count() == 3
  array_record.close()
  assert count() == 0 and array_record._reader.cache_info().maxsize == 256
  assert source.read(0, "image") == b"1" and count() == 1


def test_a_file_in_the_place_of_another_is_read_anew(tmp_path):
  for name in ("a", "bb"):
    (tmp_path / "one.array_record").unlink(missing_ok=True)
    write_records(tmp_path / "one.array_record", [array_record.encode({"id": name}, {"image": name.encode() * 70000})])
    assert open_source(tmp_path / "one.array_record", check="none").read(0, "image") == name.encode() * 70000


@pytest.mark.slow
def test_beam_s_local_runner_writes_the_same_shards(manifest, tmp_path):
  pytest.importorskip("apache_beam")
  from codebind_jax.tools.shards_beam import write_with_beam

  shards.write_all(job_of(manifest, tmp_path / "here"))
  job = job_of(manifest, tmp_path / "there")
  job.begin()
  job.write(1)
  inode = job.plan.path(job.folder, 1).stat().st_ino
  write_with_beam(open_source(manifest), job.plan, job.folder, [str(manifest)], options=["--runner=DirectRunner"])
  assert job.plan.path(job.folder, 1).stat().st_ino == inode
  assert files_of(tmp_path / "there") == files_of(tmp_path / "here")

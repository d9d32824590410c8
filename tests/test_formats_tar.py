"""Tars: records read in place as tarfile reads them; everything that is wrong names tar and member."""

import gzip
import io
import itertools
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from codebind_jax.data import opening, ranges
from codebind_jax.data.formats import tar
from codebind_jax.data.index import id_hash
from tests.world_fixtures import png


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
  monkeypatch.setenv("CODEBIND_DATA", str(tmp_path / "root"))
  return tmp_path / "root"


def pack(path, *members, format=tarfile.GNU_FORMAT):
  """A tar of (name, content) in order."""
  with tarfile.open(path, "w", format=format) as archive:
    for name, content in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  return path


def npy(array):
  out = io.BytesIO()
  np.save(out, array)
  return out.getvalue()


def open_source(path, **options):
  return opening.open_source(path, **({"check": "none"} | options))


RED, BLUE = png((255, 0, 0)), png((0, 0, 255))


def test_records_read_back(tmp_path, caplog):
  caplog.set_level("INFO", "absl")
  depth, points = np.full((2, 2), 1.5, np.float32), np.eye(3, dtype=np.float32)
  path = pack(
    tmp_path / "a.tar",
    ("./x/000.jpg", RED), ("./x/000.txt", b"a red thing\n"),
    ("./x/000.json", b'{"width": 8, "label": 3, "image": "u"}'),
    ("./x/000.cls", b"red"), ("./x/000.xyz", b"?"),
    ("x/001.DEPTH.npy", npy(depth)), ("x/001.points.npy", npy(points)), ("x/001.tactile.png", BLUE),
    ("._002.png", b"mac"), ("002.png", BLUE), ("._002.json", b"mac"),
    ("002.json", b'{"caption": ["blue", "bleu"], "id": 17, "split": "validation"}'))  # fmt: skip
  source = open_source(path)
  assert source.column("id") == ["x/000", "x/001", "17"]
  assert source.fields(0) == {
    "id": "x/000", "label": "red", "text": ["a red thing"], "width": 8, "json label": 3, "json image": "u"}  # fmt: skip
  assert source.fields(2)["text"] == ["blue", "bleu"] and source.fields(2)["split"] == "val"
  assert source.index.label_of(0) == "red" and source.index.split.tolist() == [-1, -1, 1]
  assert source.modalities == ("image", "text", "depth", "points", "tactile")
  assert source.read(0, "image") == RED and source.read(1, "tactile") == BLUE
  assert (source[1]["depth"] == depth).all() and (source[1]["points"] == points).all()
  assert [source.has(row, "text") for row in range(3)] == [True, False, True]
  assert source.where(1) == f"{path}: x/001"
  assert "kept aside: .xyz, " in caplog.text and "hidden files" in caplog.text
  assert source.content_hash(0, "text") != source.content_hash(2, "text")
  assert source.content_hash(1, "tactile") != source.content_hash(1, "points")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_where_tarfile_finds_them(tmp_path, form):
  rng = np.random.default_rng(0)
  names = [f"{i:03d}.jpg" for i in range(20)] + [f"{'d' * 90}/{'e' * 40}/{i}.wav" for i in range(3)]
  if form != tarfile.USTAR_FORMAT:
    names += [f"{'f' * 180}/{i}.wav" for i in range(3)] + [f"größe/ß{i}.png" for i in range(3)]
  path = pack(tmp_path / "a.tar", *((n, rng.bytes(int(rng.integers(1, 3000)))) for n in names), format=form)
  with tarfile.open(path) as archive:
    theirs = [(member.name, member.offset_data, member.size) for member in archive]
  with open(path, "rb") as file:
    ours = [(member.name, member.offset, member.size) for member in tar.members(file, path.stat().st_size, "a")]
  assert ours == theirs and len(ours) == len(names)
  assert open_source(path).column("id") == [tar.split_name(name)[0] for name in names]


def test_folders_comments_and_joined_tars(tmp_path):
  with tarfile.open(tmp_path / "a.tar", "w") as archive:
    folder = tarfile.TarInfo("x")
    folder.type = tarfile.DIRTYPE
    archive.addfile(folder)
  first = (tmp_path / "a.tar").read_bytes() + pack(tmp_path / "b.tar", ("x/0.png", RED)).read_bytes()
  (tmp_path / "c.tar").write_bytes(first + pack(tmp_path / "b.tar", ("x/1.png", BLUE)).read_bytes())
  source = open_source(tmp_path / "c.tar")
  assert source.column("id") == ["x/0", "x/1"] and source.read(1, "image") == BLUE


def test_offsets_beyond_four_gigabytes(tmp_path):
  """A member of 5 GB that is a hole, then a record behind it."""
  path, size = tmp_path / "a.tar", 5 * 2**30 + 7
  big, last = tarfile.TarInfo("a.bin"), tarfile.TarInfo("b.png")
  big.size, last.size = size, len(RED)
  with open(path, "wb") as file:
    file.write(big.tobuf(tarfile.GNU_FORMAT))
    file.seek(512 + -(-size // 512) * 512)
    file.write(last.tobuf(tarfile.GNU_FORMAT) + RED)
    file.truncate(-(-file.tell() // 512) * 512 + 1024)
  source = open_source(path, max_bad_records=1)
  assert source.index.where.tolist() == [[1, 1]] and source.read(0, "image") == RED and source.column("id") == ["b"]
  huge = tarfile.TarInfo("a.bin")
  huge.size = 9 * 2**30  # beyond eleven octal digits: base 256 in GNU's format, a pax header in the other
  for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
    head = huge.tobuf(form)
    with open(path, "wb") as file:
      file.write(head)
      file.seek(len(head) + huge.size)
      file.write(last.tobuf(form) + RED)
      file.truncate(-(-file.tell() // 512) * 512 + 1024)
    assert open_source(path, max_bad_records=1).read(0, "image") == RED


def test_bad_records_are_bounded(tmp_path, caplog):
  path = pack(tmp_path / "a.tar", ("a.png", RED), ("b.json", b"{"), ("README", b"x"), ("c.xyz", b"x"), ("d.png", b""),
              ("e.png", RED), ("e.jpg", RED), ("f.txt", b"\xff"), ("g.txt", b"ok"))  # fmt: skip
  source = open_source(path, max_bad_records=6)
  assert source.column("id") == ["a", "g"]
  for message in ("a.tar: b: json: not JSON", "member README: no ending, so no key", "a.tar: c: no modality",
                  "image: member d.png is empty", "image: two members, e.jpg is the second", "text: not UTF-8"):
    assert message in caplog.text
  with pytest.raises(ValueError, match=r"\(6 bad records, 5 allowed\)"):
    open_source(path, max_bad_records=5)
  with pytest.raises(ValueError, match="a.tar: member README: no ending, so no key"):
    open_source(pack(tmp_path / "b.tar", ("README", b"x"), ("a.png", RED)).rename(tmp_path / "a.tar"))


def test_members_of_one_key_apart(tmp_path):
  path = pack(tmp_path / "a.tar", ("x/a.png", RED), ("x/b.png", RED), ("x/a.txt", b"red"))
  with pytest.raises(ValueError, match="a.tar: members of key 'x/a' are apart"):
    open_source(path)
  path = pack(tmp_path / "a.tar", ("a.json", b'{"id": "q", "text": "x"}'), ("b.json", b'{"id": "q", "text": "y"}'))
  with pytest.raises(ValueError, match="a.tar: id 'q' is there twice: a and b"):
    open_source(path)


@pytest.mark.parametrize("cut", [100, 512, 700, 1024, 1024 + 300, 2048, 4096])
def test_cut_short(tmp_path, cut):
  content = pack(tmp_path / "a.tar", *((f"{i}.png", bytes([i]) * 500) for i in range(4))).read_bytes()
  (tmp_path / "a.tar").write_bytes(content[:cut])
  after = {100: "after its beginning", 512: "in member 0.png", 700: "in member 0.png", 1324: "after member 0.png"}
  after = after.get(cut, f"after member {cut // 1024 - 1}.png")
  with pytest.raises(ValueError, match=f"a.tar: is cut short {after}"):
    open_source(tmp_path / "a.tar")


def test_damage_and_no_tar(tmp_path):
  content = bytearray(pack(tmp_path / "a.tar", ("a.png", RED), ("b.png", RED)).read_bytes())
  content[1024 + 20] ^= 1
  (tmp_path / "a.tar").write_bytes(content)
  with pytest.raises(ValueError, match="a.tar: no tar header at byte 1024, after member a.png"):
    open_source(tmp_path / "a.tar")
  (tmp_path / "a.tar").write_bytes(b"hello " * 1000)
  with pytest.raises(ValueError, match="a.tar: no tar header at byte 0"):
    open_source(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "a.tar", "a.TAR.GZ"])
def test_compressed(tmp_path, name):
  content = pack(tmp_path / "b.tar", ("a.png", RED)).read_bytes()
  (tmp_path / name).write_bytes(gzip.compress(content))
  with pytest.raises(ValueError, match=f"{name}: a compressed tar, .* unpack it to .tar"):
    open_source(tmp_path / name)


@pytest.mark.parametrize("kind, what", [
  (tarfile.LNKTYPE, "a hard link"), (tarfile.SYMTYPE, "a symbolic link"), (tarfile.FIFOTYPE, "a pipe"),
  (tarfile.CHRTYPE, "a device"), (tarfile.GNUTYPE_SPARSE, "a sparse file")])  # fmt: skip
def test_no_plain_file(tmp_path, kind, what):
  with tarfile.open(tmp_path / "a.tar", "w") as archive:
    info = tarfile.TarInfo("x/a.png")
    info.type, info.linkname = kind, "b.png"
    archive.addfile(info)
  with pytest.raises(ValueError, match=f"a.tar: member x/a.png is {what}; plain files are needed"):
    open_source(tmp_path / "a.tar")


def test_sparse_file_in_pax_headers(tmp_path):
  with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
    info = tarfile.TarInfo("GNUSparseFile.0/a.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "x/a.png"}
    archive.addfile(info)
  with pytest.raises(ValueError, match="a.tar: member x/a.png is a sparse file"):
    open_source(tmp_path / "a.tar")


def test_many_tars_one_id_and_none(tmp_path):
  for shard in range(3):
    pack(tmp_path / f"s-{shard:03d}.tar", *((f"{shard}-{i}.png", RED) for i in range(4)))
  source = open_source(str(tmp_path / "s-{000..002}.tar"))
  assert len(source) == 12 and source.column("id")[4:6] == ["1-0", "1-1"]
  pack(tmp_path / "s-003.tar", ("1-2.txt", b"x"))
  with pytest.raises(ValueError, match="id '1-2' is there twice: .*s-001.tar: 1-2 and .*s-003.tar: 1-2; shard_ids"):
    open_source(tmp_path / "s-*.tar")
  again = open_source(tmp_path / "s-*.tar", shard_ids=True)
  assert again.column("id")[4:6] == ["s-001/1-0", "s-001/1-1"]
  assert again.index.ids.tolist() == [id_hash(name) for name in again.column("id")]
  with pytest.raises(ValueError, match="e.tar: no records"):
    open_source(pack(tmp_path / "e.tar"))


def test_pickle_threads_and_selection(tmp_path):
  contents = [np.random.default_rng(i).bytes(700 + 13 * i) for i in range(64)]
  path = pack(tmp_path / "a.tar", *((f"{i}.{e}", c) for i, b in enumerate(contents)
                                    for e, c in (("jpg", b), ("txt", b"%d" % i))))  # fmt: skip
  source = pickle.loads(pickle.dumps(open_source(path).select(range(63, -1, -1))))
  rows = list(range(64)) * 8
  with ThreadPoolExecutor(8) as pool:
    got = list(pool.map(lambda row: (source.read(row, "image"), source.fields(row)["text"]), rows))
  assert got == [(contents[63 - row], [str(63 - row)]) for row in rows]


def test_a_tar_that_changes(tmp_path):
  path = pack(tmp_path / "a.tar", ("a.png", RED), ("b.png", BLUE))
  source = open_source(path)
  fresh, kept = pickle.loads(pickle.dumps(source)), source
  assert kept.read(1, "image") == BLUE
  content = path.read_bytes()
  with open(path, "r+b") as file:
    file.write(content[:-512])
    file.truncate()
  for one in (kept, fresh):
    with pytest.raises(ranges.ChangedError, match="a.tar: has changed since .* .10240 bytes then, 9728 now"):
      one.read(0, "image")
  path.write_bytes(content)
  os.utime(path, ns=(1, 1))
  with pytest.raises(ranges.ChangedError, match="a.tar: has changed since it was indexed .written anew"):
    fresh.fields(0)


def test_the_index_is_kept(tmp_path, root, monkeypatch):
  pairs = (((f"{i}.wav", b"\1" * 30_000), (f"{i}.json", json.dumps({"label": i % 3}).encode())) for i in range(40))
  members = itertools.chain.from_iterable(pairs)
  path = pack(tmp_path / "a.tar", *members)
  first = open_source(path)
  monkeypatch.setattr(tar, "_scan", None)
  again = open_source(path)
  assert len(list((root / "index").iterdir())) == 1
  assert [again.fields(i) for i in range(40)] == [first.fields(i) for i in range(40)]
  assert again.read(39, "audio") == b"\1" * 30_000 and again.index.group.tolist() == [i % 3 for i in range(40)]
  pickled = pickle.dumps(again)
  assert len(pickled) < 3000 and pickle.loads(pickled).fields(7) == first.fields(7)

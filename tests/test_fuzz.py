"""Readers of foreign files read thousands of damaged ones: a ValueError that names the file, or values.

CI reads 2,000 mutants of each reader, `-m slow` 50,000 (FUZZ=N chooses another number); `tests.fuzz` makes them.
"""

import io
import os
import pathlib
import struct
import zipfile

import numpy as np
import pytest

from codebind_jax.data import numpy_files, reading, transforms
from codebind_jax.files import zips
from codebind_jax.trunks.checkpoint_files import open_weights
from codebind_jax.trunks.torch_pickle import load_torch_pickle
from tests import fuzz, fuzz_readers
from tests.test_pretrained_pickle import new_zip, object_pickle, old_stream

QUICK, NIGHTLY = 2000, 50_000


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
  return fuzz.run(fuzz_readers.READERS, QUICK, tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", list(fuzz_readers.READERS))
def test_damaged_files_are_named_or_read(name, quick):
  assert quick[name]["failures"] == []
  assert quick[name]["accepted"] + quick[name]["refused"] == QUICK


@pytest.mark.slow
@pytest.mark.parametrize("name", list(fuzz_readers.READERS))
def test_many_damaged_files_are_named_or_read(name, tmp_path):
  found = fuzz.run([name], int(os.environ.get("FUZZ", NIGHTLY)), tmp_path)
  assert found[name]["failures"] == []


def test_the_fuzzer_sees_errors_memory_and_crashes(tmp_path):
  """Of a reader that raises what it should not, on one mutant each."""
  faults = [KeyError("x"), MemoryError(), ValueError("no name"), ValueError("it: bad")]
  reader = fuzz.Reader(lambda content: raised(faults.pop(0)) if content != b"seed" else None, lambda: [b"seed"],
                       called="it")  # fmt: skip
  with open(tmp_path / "state", "w+b") as state:
    wanted = [n for n in range(20) if fuzz.mutant([b"seed"], fuzz.number_of("x", n)) != b"seed"][:4]
    found = [fuzz.fuzz("x", reader, n, 1, tmp_path, state.fileno()) for n in wanted]
  assert [len(one["failures"]) for one in found] == [1, 1, 1, 0]


def raised(error):
  raise error


TENSOR = [("w", "0", "FloatStorage", 4, 0, (4,), (1,))]
VALUES = {"0": np.array([1.0, 2.0, 3.0, -4.0], "f4")}
SHARED = b"}q\0" + b"".join(b"}(U\1ah%cU\1bh%cuq%c" % (i, i, i + 1) for i in range(27))
EVIL = {
  "BUILD on a type": b"ctorch\nFloatStorage\n}X\5\0\0\0dtypeK\1sb0}",
  "BUILD on a function": b"ctorch._utils\n_rebuild_parameter\nN}X\x0c\0\0\0__defaults__K\1\x85s\x86b",
  "a type as a value": b"ctorch\nFloatStorage\n", "SETITEM on a type": b"ctorch\nFloatStorage\nK\1K\2s",
  "a list in itself": b"]q\0h\0a", "deep lists": b"]" * 100_000 + b"a" * 99_999, "an empty stack": b"0",
  "shared 2^27 times": SHARED, "an unhashable key": b"}]K\1s", "a deep key": b"}" + b")" + b"\x85" * 50_000 + b"K\1s",
  "long bytes": b"\x8e" + struct.pack("<Q", 1 << 40) + b"x", "an absent memo": b"h\x07",
  "objects": b"cos\nsystem\n)\x81",
}  # fmt: skip


@pytest.mark.parametrize("container", [old_stream, new_zip])
@pytest.mark.parametrize("name", EVIL)
def test_pickles_that_reach_further_are_refused_and_change_nothing(name, container, tmp_path):
  path = tmp_path / "evil.pth"
  path.write_bytes(container(b"\x80\2" + EVIL[name] + b".", {}))
  with pytest.raises(ValueError, match=r"^\S+evil\.pth: "):
    load_torch_pickle(path)
  got = load_torch_pickle(container(object_pickle(TENSOR), VALUES))["w"]
  assert got.dtype == np.float32 and got.tolist() == [1, 2, 3, -4]


@pytest.mark.parametrize("container", [old_stream, new_zip])
def test_memo_indices_take_no_memory_and_strides_repeat_a_little(container):
  body = b"\x80\2}r" + struct.pack("<I", 0x7FFFFFFF) + b"."
  assert load_torch_pickle(container(body, {})) == {}
  one = [("a", "0", "FloatStorage", 1, 0, (3, 1000), (0, 0))]
  assert (load_torch_pickle(container(object_pickle(one), {"0": np.ones(1, "f4")}))["a"] == 1).all()
  huge = [("a", "0", "FloatStorage", 1, 0, (400, 1000, 1000), (0, 0, 0))]
  with pytest.raises(ValueError, match="repeats 1 values to 1600000000 bytes"):
    load_torch_pickle(container(object_pickle(huge), {"0": np.ones(1, "f4")}))
  many = [(f"t{i}", "0", "FloatStorage", 1, 0, (1000, 1000), (0, 0)) for i in range(40)]
  with pytest.raises(ValueError, match="its tensors repeat 4 bytes"):
    load_torch_pickle(container(object_pickle(many), {"0": np.ones(1, "f4")}))


def test_zips_with_two_members_of_a_name_or_packed_tensors_are_refused(tmp_path):
  whole = new_zip(object_pickle(TENSOR), VALUES)
  path = tmp_path / "net.pth"
  packed = io.BytesIO()
  with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
    for name in old.namelist():
      new.writestr(name, old.read(name))
  path.write_bytes(packed.getvalue())
  with pytest.raises(ValueError, match=r"net\.pth: member .* is compressed"):
    open_weights(path)
  with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
    for _ in range(2):
      archive.writestr("net/data.pkl", object_pickle([]))
  with pytest.raises(ValueError, match=r"net\.pth: .*two members of the name 'net/data.pkl'"):
    load_torch_pickle(path)


def test_a_zip_directory_is_bounded_before_it_is_read(monkeypatch):
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w") as archive:
    for i in range(50):
      archive.writestr(f"{i}", b"")
  monkeypatch.setattr(zips, "_DIRECTORY", 1000)
  with pytest.raises(ValueError, match="directory beyond 1000"), zips.open_zip(out.getvalue()):
    pass


def test_tensors_of_a_safetensors_file_lie_beside_each_other(tmp_path):
  path = tmp_path / "m.safetensors"
  for table, message in (
    (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
     "lie in one another"),
    (b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}', "does not fit"),
    (b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}', "shape"), (b'{"a":1,"a":2}', "twice"),
  ):  # fmt: skip
    path.write_bytes(struct.pack("<Q", len(table)) + table + bytes(8))
    with pytest.raises(ValueError, match=rf"m\.safetensors: .*{message}"):
      open_weights(path)


@pytest.mark.parametrize("shard", ["m.safetensors.index.json", "/etc/passwd", "../m.safetensors", "a\\u0000"])
def test_shards_lie_beside_their_index(shard, tmp_path):
  path = tmp_path / "m.safetensors.index.json"
  path.write_text(f'{{"weight_map": {{"w": "{shard}"}}}}')
  with pytest.raises(ValueError, match="no name of a shard beside the index"):
    open_weights(path)


@pytest.mark.parametrize("modality", ["image", "audio", "video", "depth", "thermal", "points", "eeg", "tactile"])
def test_a_pipe_or_device_is_refused_by_name(modality, tmp_path):
  os.mkfifo(tmp_path / "pipe.wav")
  for path in (tmp_path / "pipe.wav", pathlib.Path("/dev/zero")):
    with pytest.raises(ValueError, match=rf"{path}: .*(is a pipe|is a device|no such file)"):
      transforms.of(modality).read(path)


def test_headers_of_arrays_are_bounded(tmp_path):
  for header in (b"\x93NUMPY\2\0\xf0\xff\xff\xff{}", b"\x93NUMPY\1\0\xff\x1f" + b"(" * 8191):
    with pytest.raises(ValueError, match="x: not a readable .npy file"):
      numpy_files.load_npy(header, "x")
  (tmp_path / "eight").write_bytes(b"12345678")
  with pytest.raises(ValueError, match="a file of 8 bytes; allowed are 4"):
    reading.whole_file(tmp_path / "eight", 4)

"""Files that torch 2.14 wrote: read as they were saved, one tensor at a time; foreign and damaged ones are refused."""

import os
import pathlib
import pickle
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from codebind_jax.trunks import torch_pickle
from codebind_jax.trunks.checkpoint_files import open_weights
from tests.torch_files import torch_zip

with np.load(pathlib.Path(__file__).parent / "fixtures" / "torch_files.npz") as stored:
  FIXTURE = dict(stored)


def written(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(FIXTURE[f"file:{name}"].tobytes())
  return path


def expected(group):
  return {key.removeprefix(f"{group}/"): value for key, value in FIXTURE.items() if key.startswith(f"{group}/")}


@pytest.mark.parametrize("name", ["state_dict.pth", "old.pth", "lightning.ckpt", "wrapped_twice.pt"])
def test_a_state_dict_is_found_however_it_is_wrapped(name, tmp_path):
  weights = open_weights(written(tmp_path, name))
  want = expected("state")
  assert set(weights) == set(want) and len(want) == 8
  for key, value in want.items():
    assert weights[key].shape == value.shape and weights[key].dtype == value.dtype
    np.testing.assert_array_equal(weights[key].read(), value)
  assert weights.name == str(tmp_path / name)


def test_bfloat16_keeps_its_type(tmp_path):
  weights = open_weights(written(tmp_path, "bfloat16.bin"))
  for name, entry in weights.items():
    assert entry.dtype == entry.read().dtype == np.dtype(ml_dtypes.bfloat16)
    np.testing.assert_allclose(entry.read().astype(np.float32), expected("state")[name], rtol=2**-8)


def test_views_scalars_and_every_type(tmp_path):
  weights = open_weights(written(tmp_path, "views.pth"))
  assert set(weights) == set(expected("views"))
  for name, want in expected("views").items():
    got = weights[name].read()
    assert got.shape == want.shape and (name == "bfloat16" or got.dtype == want.dtype)
    np.testing.assert_array_equal(got.astype(want.dtype), want, err_msg=name)
  weights["whole"].read()[:] = -1  # a copy, though others share its storage
  np.testing.assert_array_equal(weights["part"].read(), expected("views")["part"])


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("namespace.pth", r"namespace\.pth: refused to unpickle argparse\.Namespace"),
    ("module.pth", r"module\.pth: refused to unpickle torch\.nn\.modules\.container\.Sequential"),
    ("opaque.pth", r"opaque\.pth: refused to unpickle __main__\.Opaque"),
    ("no_tensors.pth", r"no_tensors\.pth: holds no tensors \(names: \['epoch'\]\)"),
    ("list.pth", r"list\.pth: holds no state dict, but a list"),
  ],
)
def test_what_is_no_state_dict_is_refused_by_name(name, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    open_weights(written(tmp_path, name))


def test_a_malicious_file_is_refused_and_not_run(tmp_path):
  class Evil:
    def __reduce__(self):
      return os.system, (f"touch {tmp_path / 'ran'}",)

  source, evil = written(tmp_path, "state_dict.pth"), tmp_path / "evil.pth"
  with zipfile.ZipFile(source) as archive, zipfile.ZipFile(evil, "w") as target:
    for member in archive.namelist():
      body = pickle.dumps({"weight": Evil()}, 2) if member.endswith("data.pkl") else archive.read(member)
      target.writestr(member, body)
  with pytest.raises(ValueError, match=r"evil\.pth: refused to unpickle \w+\.system"):
    open_weights(evil)
  assert not (tmp_path / "ran").exists()


def test_truncated_and_damaged_files_are_refused_by_name(tmp_path):
  content = FIXTURE["file:state_dict.pth"].tobytes()
  path = tmp_path / "cut.pth"
  for length in (3, 100, len(content) // 2, len(content) - 1):
    path.write_bytes(content[:length])
    with pytest.raises(ValueError, match=r"cut\.pth: "):
      open_weights(path)
  old = FIXTURE["file:old.pth"].tobytes()
  path.write_bytes(old[:-4])
  with pytest.raises(ValueError, match=r"cut\.pth: cut short inside storage"):
    open_weights(path)
  path.write_bytes(b"<html>not found</html>")
  with pytest.raises(ValueError, match=r"cut\.pth: not a readable torch checkpoint"):
    open_weights(path)


def test_a_file_that_is_cut_after_it_was_opened_names_itself(tmp_path):
  path = written(tmp_path, "state_dict.pth")
  weights = open_weights(path)
  path.write_bytes(path.read_bytes()[:200])
  with pytest.raises(ValueError, match=r"state_dict\.pth: storage '\d' is not readable"):
    weights["0.weight"].read()


def test_flipped_bits_of_a_tensor_are_noticed(tmp_path):
  path = tmp_path / "flipped.pth"
  value = np.arange(1000, dtype=np.float32)
  content = torch_zip({"w": value}).replace(value.tobytes(), (value + 1).tobytes())
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r"flipped\.pth: storage '0' is not readable \(Bad CRC"):
    open_weights(path)["w"].read()


def test_opening_reads_no_tensor_and_reading_only_one(tmp_path, monkeypatch):
  path = written(tmp_path, "state_dict.pth")
  read = []
  original = zipfile.ZipFile.open
  spied = lambda self, name, *rest, **more: read.append(str(name)) or original(self, name, *rest, **more)
  monkeypatch.setattr(torch_pickle.zipfile.ZipFile, "open", spied)
  weights = open_weights(path)
  assert {name.rsplit("/", 1)[-1] for name in read} == {"data.pkl", "byteorder"}
  read.clear()
  weights["0.bias"].read()
  assert len(read) == 1 and "/data/" in read[0]


def test_a_tensor_is_held_once(tmp_path):
  path, value = tmp_path / "large.pth", np.ones((4096, 4096), np.float32)
  path.write_bytes(torch_zip({"w": value}))
  entry = open_weights(path)["w"]
  tracemalloc.start()
  got = entry.read()
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 1.3 * value.nbytes and got.flags.writeable
  np.testing.assert_array_equal(got[::512], value[::512])


def test_tests_files_are_like_torch_s(tmp_path):
  """`tests.torch_files.torch_zip` writes what torch reads: the same tensors as torch's own file."""
  state = expected("state")
  (tmp_path / "ours.pth").write_bytes(torch_zip(state, wrapper="state_dict"))
  ours, theirs = open_weights(tmp_path / "ours.pth"), open_weights(written(tmp_path, "lightning.ckpt"))
  assert set(ours) == set(theirs)
  for name in ours:
    np.testing.assert_array_equal(ours[name].read(), theirs[name].read())

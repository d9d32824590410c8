"""Checksums of kept files, and what flipped bits of each kind of file do."""

import json
import pathlib
import zlib

import numpy as np
import pytest

from codebind_jax import files


def test_checksum_of_bytes_is_the_crc_of_them_joined():
  assert files.checksum(b"123456789") == "cbf43926"  # the check value of CRC-32
  assert files.checksum(b"1234", b"56789") == "cbf43926"
  assert files.checksum() == "00000000"


def test_checksum_of_an_array_knows_type_and_shape():
  values = np.arange(6, dtype=np.float32)
  same = [values, values.copy(), np.arange(0, 6, 0.5, np.float32)[::2]]
  assert len({files.array_checksum(x) for x in same}) == 1
  others = [values.reshape(2, 3), values.reshape(3, 2), values.view(np.int32), values.astype(np.float64), values[:0]]
  assert len({files.array_checksum(x) for x in [values, *others]}) == 6
  assert files.array_checksum(np.ones((), np.float32)) != files.array_checksum(np.ones(1, np.float32))


def test_checksum_of_a_file(tmp_path):
  data = np.random.default_rng(0).bytes((1 << 20) + 17)
  (tmp_path / "a").write_bytes(data)
  assert files.file_checksum(tmp_path / "a") == f"{zlib.crc32(data):08x}"


def test_a_sealed_object_is_read_back_in_any_layout(tmp_path):
  content = {"b": [1, 2.5, None, "ä"], "a": {"10": 1, "9": float("inf")}}
  files.write_sealed(tmp_path / "a.json", content)
  assert files.read_sealed(tmp_path / "a.json") == content
  read = json.loads((tmp_path / "a.json").read_text())
  (tmp_path / "b.json").write_text(json.dumps(read, sort_keys=True, ensure_ascii=False))
  assert files.read_sealed(tmp_path / "b.json") == content
  assert files.unsealed(files.sealed({"a": (1, 2), 3: 4}), "it") == {"a": [1, 2], "3": 4}
  assert files.sealed(files.sealed(content)) == files.sealed(content)


def test_every_flipped_bit_of_a_sealed_object_is_noticed_or_changes_nothing(tmp_path):
  content, path = {"ids": ["a", "b"], "scale": 0.125, "count": 12, "none": None}, tmp_path / "a.json"
  files.write_sealed(path, content)
  data, noticed = path.read_bytes(), 0
  for place in range(8 * len(data)):
    damaged = bytearray(data)
    damaged[place // 8] ^= 1 << place % 8
    path.write_bytes(damaged)
    try:
      assert files.read_sealed(path) == content
    except ValueError as error:
      assert str(path) in str(error)
      noticed += 1
  assert noticed > 0.85 * 8 * len(data)  # white space may become other white space
  for length in range(len(data) - 1):
    path.write_bytes(data[:length])
    with pytest.raises(ValueError, match="a.json"):
      files.read_sealed(path)


@pytest.mark.parametrize("text", ["[]", "{}", "null", "1", "", "[" * 100_000, '{"checksum": 5}', "\x00"])
def test_what_is_not_sealed_is_refused_by_name(tmp_path: pathlib.Path, text):
  (tmp_path / "a.json").write_text(text)
  with pytest.raises(ValueError, match="a.json: damaged"):
    files.read_sealed(tmp_path / "a.json")

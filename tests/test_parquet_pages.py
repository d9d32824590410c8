"""Headers of Parquet pages against pyarrow's own account of files, and damage that would take memory."""

import io

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from codebind_jax.data.parquet_pages import check_pages

NAMES = ("number", "word", "list", "packed", "flag", "nothing")


def written(rows=5000, **options):
  rng = np.random.default_rng(0)
  columns = {
    "number": rng.integers(0, 1 << 40, rows), "word": [f"word {n % 70}" if n % 9 else None for n in range(rows)],
    "list": rng.normal(size=(rows, 4)).astype(np.float32).tolist(), "flag": rng.integers(0, 2, rows).astype(bool),
    "packed": pa.array([bytes(rng.integers(0, 256, 6, np.uint8)) for _ in range(rows)], pa.binary(6)),
    "nothing": pa.nulls(rows),
  }  # fmt: skip
  schema = pa.schema([("list", pa.list_(pa.float32()))])
  columns["list"] = pa.array(columns["list"], schema.field("list").type)
  out = io.BytesIO()
  pq.write_table(pa.table(columns), out, row_group_size=2000, data_page_size=3000, **options)
  return out.getvalue()


@pytest.mark.parametrize("options", [
  {}, {"compression": "zstd"}, {"compression": "none", "use_dictionary": False}, {"data_page_version": "2.0"},
  {"write_statistics": False, "write_page_index": True}, {"write_page_checksum": True}, {"rows": 0}, {"rows": 1},
], ids=str)  # fmt: skip
def test_whole_files_pass(options):
  check_pages(io.BytesIO(written(**options)), NAMES)


@pytest.mark.parametrize("name", NAMES[:4])
def test_a_page_that_says_another_size_is_refused(name):
  content = written(compression="zstd")
  about = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(1)
  leaf = next(about.column(n) for n in range(about.num_columns) if about.column(n).path_in_schema.startswith(name))
  at = leaf.dictionary_page_offset if leaf.has_dictionary_page else leaf.data_page_offset
  # A page begins with its kind, a byte and a number, and the size unpacked: 0x15 and a number of seven bits a byte.
  assert content[at : at + 3 : 2] == b"\x15\x15" and content[at + 3] & 128
  bad = bytearray(content)
  bad[at + 4] ^= 1
  check_pages(io.BytesIO(bad), [other for other in NAMES if other != name])
  with pytest.raises(ValueError, match=rf"pages of column '{name}.*unpacked; its footer says"):
    check_pages(io.BytesIO(bad), [name])


@pytest.mark.parametrize("seed", range(400))
def test_damage_is_a_value_error_or_nothing(seed):
  rng, content = np.random.default_rng(seed), bytearray(written(60))
  tail = int.from_bytes(content[-8:-4], "little") + 8
  for at in rng.integers(len(content) - tail if seed % 2 else 0, len(content), 3):
    content[at] = rng.integers(256)
  try:
    check_pages(io.BytesIO(content[: len(content) - seed % 3]), NAMES)
  except ValueError:
    pass

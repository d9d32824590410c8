"""Embed shards and indices as kept files: what is damaged, missing, changed or foreign is refused by name."""

import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from codebind_jax import files
from codebind_jax.embedding import shards, tables
from codebind_jax.search import Index
from tests.damage import cuts, share_noticed

ROWS, WIDTH = 60, 8
COLUMNS = ("image_shared", "image_codes_shared")
SIZES = (3, 3)


def write_job(folder, count=1, digest="d", first=0, vectors=None, **changes):
  """Shards as mode `embed` writes them; every seventh row lacks the image."""
  rng = np.random.default_rng(first)
  sizes = changes.get("sizes", SIZES)  # other ones of as many bits write codes that are not there
  schema = shards.make_schema(COLUMNS, "float16", captions=True, codes={"image_codes_shared": sizes})
  for number in range(count):
    ids = [f"k{first + number * ROWS + n}" for n in range(ROWS)]
    at = [n for n in range(ROWS) if n % 7]
    values = rng.standard_normal((ROWS, WIDTH)).astype(np.float32) if vectors is None else vectors
    texts = [["a", "b ä"] if n % 3 else None for n in range(ROWS)]
    columns = [
      pa.array(changes.get("ids", ids)), pa.array([None, "x"] * (ROWS // 2), pa.string()),
      pa.array([None] * ROWS, pa.string()), shards.with_nulls(values[at], at, ROWS, np.float16),
      shards.packed(changes.get("codes", rng.integers(0, 3, (ROWS, 2)))[at], at, ROWS, sizes),
      *shards.nested(texts, {"a": values[1], "b ä": values[2]}, np.float16),
    ]  # fmt: skip
    batch = pa.RecordBatch.from_arrays(columns, names=schema.names)
    report = shards.ShardReport(digest, count, changes.get("rows", ROWS), codes={"image_codes_shared": SIZES})
    shards.write_shard(shards.shard_path(folder, number, count), batch.schema, [batch], report)


def read_job(folder, columns=COLUMNS):
  """All that is read of a job."""
  return {column: list(shards.read_column(folder, column)) for column in columns}


def summarise(folder, count):
  """`summary.json` as mode `embed` writes it."""
  paths = [shards.shard_path(folder, number, count) for number in range(count)]
  rows = [{"file": p.name, "rows": (r := shards.read_report(p)).rows, "checksum": r.checksum} for p in paths]
  files.write_sealed(folder / shards.SUMMARY, {"digest": "d", "shards": rows})


def test_checksums_are_of_values_however_they_lie():
  column = pa.array([["ab", None], None, [], ["c"]])
  cut = pa.chunked_array([column.slice(0, 1), column.slice(1)])
  assert tables.column_checksum(column) == tables.column_checksum(cut)
  assert tables.column_checksum(column.slice(1, 2)) == tables.column_checksum(pa.array([None, []], column.type))
  different = [
    column, pa.array([["ab", None], [], None, ["c"]]), pa.array([["a", None], None, [], ["bc"]]),
    pa.array([["ab", ""], None, [], ["c"]]), pa.array([["ab"], [None], [], ["c"]]), pa.array(["ab", None, "c"]),
    pa.array([1, 2]), pa.array([1, 2], pa.int32()), pa.array([[1], [2]]), pa.array([[1, 2]]),
    pa.array([[1, 2]], pa.list_(pa.int64(), 2)), pa.array([[1.0, 2.0]], pa.list_(pa.float16(), 2)),
    pa.array([], pa.int64()), pa.array([None], pa.int64()), pa.array([b"ab", None], pa.binary(2)),
    pa.array([b"ab", b"cd"], pa.binary(2)), pa.array([b"abcd"], pa.binary(4)), pa.array(["ab", None]),
  ]  # fmt: skip
  assert len({tables.column_checksum(x) for x in different}) == len(different)


def test_tables_are_read_in_the_groups_that_were_written(tmp_path):
  path, rng = tmp_path / "a.parquet", np.random.default_rng(0)
  table = pa.table({"a": rng.integers(0, 9, 25), "b": [f"{n}" for n in range(25)]})
  tables.write_table(table, path, {"more": [1]}, row_group=10)
  with tables.open_table(path, "a table") as opened:
    groups = list(opened.groups(["b"]))
    assert [(group.first, len(group.columns["b"])) for group in groups] == [(0, 10), (10, 10), (20, 5)]
    assert opened.about["more"] == [1]
    assert opened.verify() is None and [g.verify() for g in groups] == [None] * 3
  assert pq.read_table(path).to_pydict() == table.to_pydict()  # by any other program
  tables.write_table(table.slice(0, 0), path, {})
  with tables.open_table(path, "a table") as opened:
    opened.verify()
    assert opened.rows == 0 and list(opened.groups(["a"])) == []


@pytest.mark.parametrize("count", [60, pytest.param(None, marks=pytest.mark.slow)])
def test_flipped_bits_of_a_shard_are_noticed(count, tmp_path):
  write_job(tmp_path)
  path = shards.shard_path(tmp_path, 0, 1)

  def read():
    shards.verify_shard(path)
    return read_job(tmp_path)

  assert share_noticed(path, read, count) > 0.6
  content = path.read_bytes()
  for cut in cuts(content):
    path.write_bytes(cut)
    with pytest.raises(ValueError, match=path.name):
      read()


@pytest.mark.parametrize("count", [60, pytest.param(None, marks=pytest.mark.slow)])
def test_flipped_bits_of_an_index_are_noticed(count, tmp_path):
  index, path = Index("numpy"), tmp_path / "index.parquet"
  index.add([f"k{n}" for n in range(40)], np.random.default_rng(0).standard_normal((40, WIDTH)))
  index.save(path)

  def read():
    there = Index.load(path, "numpy")
    return {"ids": there._ids.array(0, len(there)).to_pylist(), "vectors": list(there._store.blocks())}

  assert share_noticed(path, read, count) > 0.6
  for cut in cuts(path.read_bytes()):
    path.write_bytes(cut)
    with pytest.raises(ValueError, match=r"index\.parquet"):
      read()


def test_of_a_shard_only_what_is_read_is_verified(tmp_path):
  write_job(tmp_path)
  path = shards.shard_path(tmp_path, 0, 1)
  about = pq.ParquetFile(path).metadata.row_group(0)
  where = {about.column(n).path_in_schema.split(".")[0]: about.column(n) for n in range(about.num_columns)}
  content = bytearray(path.read_bytes())
  damaged = where["image_shared"]
  content[(damaged.dictionary_page_offset or damaged.data_page_offset) + damaged.total_compressed_size // 2] ^= 1
  path.write_bytes(content)
  assert len(read_job(tmp_path, ["image_codes_shared"])["image_codes_shared"][0][0]) == 51
  with pytest.raises(ValueError, match=rf"{path}: .*"):
    read_job(tmp_path, ["image_shared"])
  with pytest.raises(ValueError, match=path.name):
    shards.verify_shard(path)


def test_values_that_another_program_changed_are_refused(tmp_path):
  """Parquet's pages are whole then, and the metadata go along."""
  write_job(tmp_path)
  path = shards.shard_path(tmp_path, 0, 1)
  table = pq.read_table(path)
  at = table.schema.get_field_index("image_codes_shared")
  other = [None if row is None else bytes([row[0] ^ 1 if row[0] % 4 < 2 else row[0]]) for row in table[at].to_pylist()]
  other = pa.array(other, table[at].type)
  pq.write_table(table.set_column(at, "image_codes_shared", other), path)
  read_job(tmp_path, ["image_shared"])
  with pytest.raises(ValueError, match=rf"^{path}: rows 0 to 59 of column 'image_codes_shared': damaged, or changed"):
    read_job(tmp_path, ["image_codes_shared"])
  pq.write_table(table.slice(0, 50), path)
  with pytest.raises(ValueError, match="rows 60, it has 50"):
    read_job(tmp_path)
  pq.write_table(table.drop_columns(["label"]), path)
  with pytest.raises(ValueError, match="its metadata say columns"):
    read_job(tmp_path)
  pq.write_table(table.replace_schema_metadata(), path)
  with pytest.raises(ValueError, match="is not a shard written by mode 'embed'.*no report"):
    read_job(tmp_path)


def test_a_report_of_other_rows_is_not_written(tmp_path):
  with pytest.raises(ValueError, match="the report says 61 rows, there are 60"):
    write_job(tmp_path, rows=ROWS + 1)


def with_value(row, value):
  """Vectors with one value that cannot be."""
  vectors = np.ones((ROWS, WIDTH), np.float32)
  vectors[row, 3] = value
  return vectors


@pytest.mark.parametrize(("changes", "column", "message"), [
  ({"vectors": with_value(12, np.nan)}, "image_shared", "row 12: column 'image_shared': that of 'k12' is not finite"),
  ({"vectors": with_value(13, -np.inf)}, "image_shared", "row 13: column 'image_shared': that of 'k13' is not finite"),
  ({"ids": [*range(ROWS)]}, "image_shared", "column 'id' is of type int64; allowed: string"),
  ({"ids": [*map(str, range(20)), None, *map(str, range(21, ROWS))]}, "image_shared", "row 20: column 'id' has 1 null"),
  ({"codes": np.where(np.arange(2 * ROWS).reshape(ROWS, 2) == 31, 3, 0), "sizes": (4, 4)}, "image_codes_shared",
   "row 15: column 'image_codes_shared': position 1 has the code 3; allowed: 0 to 2"),
  ({"codes": np.where(np.arange(2 * ROWS).reshape(ROWS, 2) == 32, 16, 0), "sizes": (32, 4)}, "image_codes_shared",
   "row 16: column 'image_codes_shared': of the last 4 bits, which are of no code, some are set"),
  ({"sizes": (512, 4)}, "image_codes_shared", r"is of type fixed_size_binary\[2\]; allowed: fixed_size_binary\[1\]"),
  ({}, "text_captions", r"column 'text_captions' is of type list<.*string>; allowed: lists of numbers"),
  ({}, "label", "column 'label' is of type string; allowed: lists of numbers"),
  ({}, "image_full", "no column 'image_full'; allowed"),
])  # fmt: skip
def test_rows_that_cannot_be_are_named(changes, column, message, tmp_path):
  write_job(tmp_path, **changes)
  with pytest.raises(ValueError, match=rf"{shards.shard_path(tmp_path, 0, 1)}.*{message}"):
    read_job(tmp_path, [column])


def test_widths_of_two_shards_and_ids_of_two_shards_are_compared(tmp_path):
  write_job(tmp_path, 2)
  last = shards.shard_path(tmp_path, 1, 2)
  report = shards.read_report(last)
  table = pq.read_table(last)
  at = table.schema.get_field_index("image_shared")
  narrow = pa.array([row and row[:5] for row in table[at].to_pylist()], table[at].type)
  shards.write_shard(last, table.schema, table.set_column(at, "image_shared", narrow).to_batches(), report)
  with pytest.raises(ValueError, match=rf"^{last}: row 1: column 'image_shared' has vectors of widths \[5, 8\]"):
    read_job(tmp_path)
  write_job(tmp_path, 2, ids=[f"k{n}" for n in range(ROWS)])
  with pytest.raises(ValueError, match=f"^{last}: ids: 'k1' is there twice"):
    Index.from_parquet(tmp_path, "image", backend="numpy")
  inner = pa.array([None if n == 3 else [1.0, None if n == 5 else 2.0] for n in range(ROWS)], pa.list_(pa.float16()))
  shards.write_shard(last, table.schema, table.set_column(at, "image_shared", inner).to_batches(), report)
  shutil.copy(last, shards.shard_path(tmp_path, 0, 2))
  with pytest.raises(ValueError, match="was written as 'shard-000001-of-000002.parquet'"):
    read_job(tmp_path)
  shards.write_shard(shards.shard_path(tmp_path, 0, 2), table.schema, table.to_batches(), report)
  with pytest.raises(ValueError, match="widths"):
    read_job(tmp_path)
  for number in range(2):
    batches = table.set_column(at, "image_shared", inner).to_batches()
    shards.write_shard(shards.shard_path(tmp_path, number, 2), table.schema, batches, report)
  with pytest.raises(ValueError, match=r"000000-of-000002.*: row 5: column 'image_shared' has vectors with nulls"):
    read_job(tmp_path)


def test_a_set_that_is_not_whole_is_refused(tmp_path):
  write_job(tmp_path, 3)
  summarise(tmp_path, 3)
  whole = read_job(tmp_path)
  first, middle = (shards.shard_path(tmp_path, number, 3) for number in (0, 1))
  content = middle.read_bytes()
  middle.unlink()
  with pytest.raises(ValueError, match="2 of 3 shards are finished, shard-000001-of-000003.parquet"):
    read_job(tmp_path)
  middle.write_bytes(first.read_bytes())
  with pytest.raises(ValueError, match=f"{middle}.*written as '{first.name}'"):
    read_job(tmp_path)
  (tmp_path / "other").mkdir()
  write_job(tmp_path / "other", 3, digest="e")
  shutil.copy(tmp_path / "other" / middle.name, middle)
  with pytest.raises(ValueError, match=f"{middle} belongs to another job"):
    read_job(tmp_path)
  middle.write_bytes(content)
  assert read_job(tmp_path).keys() == whole.keys()
  for path in shards.shard_files(tmp_path):
    path.unlink()
  with pytest.raises(ValueError, match=r"no shards .*summary.json says that there were some"):
    read_job(tmp_path)


def test_shards_that_are_written_after_the_summary_are_refused(tmp_path):
  write_job(tmp_path, 2)
  summarise(tmp_path, 2)
  read_job(tmp_path)
  write_job(tmp_path, 2, vectors=np.ones((ROWS, WIDTH), np.float32))  # of one digest, and with other values
  with pytest.raises(ValueError, match=f"{shards.shard_path(tmp_path, 0, 2)}: is not the file of which .*summary.json"):
    read_job(tmp_path)
  summarise(tmp_path, 2)
  read_job(tmp_path)
  summary = json.loads((tmp_path / shards.SUMMARY).read_text())
  for changed in ("{", "[]", json.dumps(summary | {"shards": summary["shards"][:1]}),
                  json.dumps(files.sealed({"digest": "d", "shards": [{}]}))):  # fmt: skip
    (tmp_path / shards.SUMMARY).write_text(changed)
    with pytest.raises(ValueError, match=r"summary\.json: "):
      read_job(tmp_path)


@pytest.mark.parametrize(("change", "message"), [
  (lambda t: t.set_column(0, "id", pa.array([*"abcd", *"abcd"])), "row 4: ids: 'a' is there twice"),
  (lambda t: t.set_column(0, "id", pa.array([*range(8)])), "column 'id': damaged, or changed since it was written"),
  (lambda t: t.set_column(0, "id", pa.array([True, False] * 4)), "row 0: ids: got True; allowed"),
  (lambda t: t.set_column(0, "id", pa.array([*"abcdefg", None])), "row 7: column 'id' has 1 nulls"),
  (lambda t: t.take([1, 0, *range(2, 8)]), "rows 0 to 7 of column 'id': damaged, or changed"),
  (lambda t: t.slice(0, 7), "its metadata say rows 8, it has 7"),
  (lambda t: t.set_column(1, "vector", pa.array([[3.0, 4.0]] + [[1.0, 0.0]] * 7)), "row 0: .*not of unit length"),
  (lambda t: t.set_column(1, "vector", pa.array([[1.0, 0.0]] * 7 + [[0.0, 0.0]])), "row 7: .*zero or not finite"),
  (lambda t: t.set_column(1, "vector", pa.array([[1.0, 0.0]] * 6 + [None] * 2)), "row 6: column 'vector' has 2 nulls"),
  (lambda t: t.set_column(1, "vector", pa.array([[1.0, 0.0]] * 5 + [[1.0]] * 3)), r"row 5: .*widths \[1, 2\]"),
  (lambda t: t.set_column(1, "vector", pa.array([[1.0, 0.0]] * 8)), "column 'vector': damaged, or changed"),
  (lambda t: t.set_column(1, "vector", pa.array([[[1.0, 0.0]]] * 8)), "column 'vector' is of type list<"),
  (lambda t: t.rename_columns(["id", "vectors"]), "columns"),
])  # fmt: skip
def test_an_index_that_another_program_changed_is_refused_by_row(change, message, tmp_path):
  index, path = Index("numpy"), tmp_path / "index.parquet"
  index.add([*"abcdefgh"], np.random.default_rng(0).standard_normal((8, 2)))
  index.save(path)
  pq.write_table(change(pq.read_table(path)), path)
  with pytest.raises(ValueError, match=rf"^{re.escape(repr(str(path)))}.*{message}"):
    Index.load(path, "numpy")


def test_an_index_of_another_program_loads_and_the_log_says_that_it_is_not_verified(tmp_path, caplog):
  pq.write_table(pa.table({"id": ["a", "b"], "vector": [[1.0, 0.0], [0.0, 1.0]]}), tmp_path / "a.parquet")
  assert Index.load(tmp_path / "a.parquet", "numpy").search([[1.0, 0.1]], 1)[0].tolist() == [["a"]]
  assert "without checksums" in caplog.text


def test_a_shard_is_no_index(tmp_path):
  write_job(tmp_path)
  with pytest.raises(ValueError, match="is not an index that was saved"):
    Index.load(shards.shard_path(tmp_path, 0, 1), "numpy")

"""Parquet: rows read back as pyarrow reads them; what is wrong names file and column or row."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from codebind_jax.data import opening, ranges
from codebind_jax.data.formats import parquet
from tests.source_fixtures import damaged_parquet, footer_of
from tests.world_fixtures import png

RED, BLUE = png((255, 0, 0)), png((0, 0, 255))


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
  monkeypatch.setenv("CODEBIND_DATA", str(tmp_path / "root"))
  return tmp_path / "root"


def open_source(path, **options):
  return opening.open_source(path, **({"check": "none"} | options))


@pytest.fixture
def write(tmp_path):
  (tmp_path / "red.png").write_bytes(RED)

  def write(columns, name="a.parquet", metadata=None, rows=2, **options):
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata or {}), tmp_path / name, row_group_size=rows, **options)
    return tmp_path / name

  return write


def struct(*rows):
  return pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def test_bytes_paths_and_structs(write, tmp_path, caplog):
  caplog.set_level("INFO", "absl")
  path = write({
    "image": struct({"bytes": RED, "path": "gone.png"}, {"bytes": None, "path": "red.png"}, None),
    "thermal": pa.array([BLUE, None, BLUE]), "depth": ["red.png", None, ""][:2] + [None],
    "text": pa.array([["a", "b"], None, ["c"]]), "label": [3, None, 3], "split": ["train", "validation", "test"],
    "width": [1, 2, None], "boxes": pa.array([[[1.0]], None, []])})  # fmt: skip
  source = open_source(path, check="none")
  assert source.block == 2 and source.modalities == ("image", "text", "depth", "thermal")
  assert source.fields(0) == {"id": "a.parquet:0", "label": "3", "text": ["a", "b"], "split": "train", "width": 1}
  assert source.fields(1) == {"id": "a.parquet:1", "label": None, "split": "val", "width": 2}
  assert source.read(0, "image") == RED and source.read(1, "image") == tmp_path / "red.png"
  assert source.read(2, "thermal") == BLUE and source.read(0, "depth") == tmp_path / "red.png"
  assert [source.has(row, "image") for row in range(3)] == [True, True, False]
  assert source.index.group.tolist() == [0, 1, 0] and source.where(2) == f"{path}: row 2"
  assert source.content_hash(0, "thermal") == source.content_hash(2, "thermal") != source.content_hash(0, "image")
  assert source.content_hash(1, "image") and "kept aside: width, boxes" in caplog.text


def test_class_names_of_hugging_face(write):
  names = {"_type": "ClassLabel", "names": ["cat", "dog"]}
  about = {"huggingface": json.dumps({"info": {"features": {"label": names, "text": {"_type": "Value"}}}})}
  source = open_source(write({"text": ["x", "y", "z"], "label": [1, -1, 0]}, metadata=about))
  assert source.column("label") == ["dog", None, "cat"] and source.index.labels == ("dog", "cat")
  with pytest.raises(ValueError, match=r"a.parquet: row 1: label: .* got \(2,\)"):
    open_source(write({"text": ["x", "y"], "label": [1, 2]}, metadata=about))


def test_types_that_are_taken(write):
  path = write({"image": pa.array([RED], pa.large_binary()), "caption": pa.array(["x"]).dictionary_encode(),
                "label": pa.array(["y"], pa.large_string()), "id": pa.array([2**40])})  # fmt: skip
  assert open_source(path).fields(0) == {"id": str(2**40), "label": "y", "text": ["x"]}


@pytest.mark.parametrize("columns, message", [
  ({"image": pa.array([[RED]])}, "column 'image' is of type list<.*; allowed: strings .paths., binary"),
  ({"image": pa.array([{"bytes": RED, "width": 3}])}, "column 'image' is of type struct<"),
  ({"image": [3]}, "column 'image' is of type int64"),
  ({"text": [3]}, "column 'text' is of type int64; allowed: strings or lists of strings"),
  ({"text": pa.array([[["x"]]])}, "column 'text' is of type list<.*list<"),
  ({"text": ["x"], "label": [0.5]}, "column 'label' is of type double; allowed: strings or integers"),
  ({"text": ["x"], "label": pa.array([["y"]])}, "column 'label' is of type list<"),
  ({"picture": [RED], "label": [1]}, "no column of a modality; it has picture, label; one of .*image.* columns="),
  ({"image": struct({"bytes": RED}, {"bytes": None, "path": None})}, "row 1: image: column 'image' has neither"),
  ({"image": pa.array([RED, b"", None]), "id": list("abc")}, "row 1: image: column 'image' has neither bytes nor path"),
  ({"image": pa.array([RED, None]), "text": [None, None]}, "row 1: no modality"),
  ({"text": ["x", " "]}, "row 1: text: a string that is not empty"),
  ({"text": ["x", "y", "z"], "id": ["a", "b", "a"]}, "id 'a' is there twice: row 0 and row 2"),
  ({"text": ["x"], "split": ["dev"]}, "row 0: unknown split 'dev'"),
])  # fmt: skip
def test_bad_columns_and_rows(write, columns, message):
  with pytest.raises(ValueError, match=f"a.parquet: {message}"):
    open_source(write(columns))


def test_bad_rows_are_bounded(write, caplog):
  path = write({"image": struct({"bytes": RED}, {"bytes": None}, None, {"bytes": BLUE}), "id": list("abcd")})
  source = open_source(path, max_bad_records=2)
  assert source.column("id") == ["a", "d"] and source.read(1, "image") == BLUE and source.where(1) == f"{path}: row 3"
  assert "row 1: image: column" in caplog.text and "row 2: no modality" in caplog.text
  with pytest.raises(ValueError, match=r"\(2 bad records, 1 allowed\)"):
    open_source(path, max_bad_records=1)


def test_columns_that_are_called_otherwise_or_missing(write, tmp_path):
  path = write({"img": [RED, BLUE], "text": ["a", "b"], "caption_en": ["c", "d"]})
  source = open_source(path, columns={"image": "img", "text": "caption_en"})
  assert source.read(1, "image") == BLUE and source.fields(1)["text"] == ["d"]
  with pytest.raises(ValueError, match="a.parquet: no column 'pic' for 'image'; it has img, text, caption_en"):
    open_source(path, columns={"image": "pic"})
  write({"text": ["x"], "image": [RED]}, "b.parquet")
  write({"text": ["x"]}, "c.parquet")
  with pytest.raises(ValueError, match="c.parquet: no column 'image', which .*b.parquet has"):
    open_source(str(tmp_path / "{c,b}.parquet"))


def test_no_parquet(tmp_path, write):
  (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
  with pytest.raises(ValueError, match="a.parquet: not a readable Parquet file"):
    open_source(tmp_path / "a.parquet")
  path = write({"text": ["hello " * 50] * 20}, compression="none", use_dictionary=False)
  content = path.read_bytes()
  path.write_bytes(content[:-100])
  with pytest.raises(ValueError, match="a.parquet: not a readable Parquet file"):
    open_source(path)
  with pytest.raises(ValueError, match="e.parquet: no records"):
    open_source(write({"text": pa.array([], pa.string())}, "e.parquet"))


def test_every_error_of_a_damaged_file_names_it(write, tmp_path):
  path = write({"text": [f"hello {number}" for number in range(20)], "label": ["a"] * 20})
  content, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
  footer = footer_of(content)
  for changed in damaged_parquet(content, rng):
    path.write_bytes(changed)
    try:
      open_source(path, data_dir=tmp_path / "data")
    except ValueError as error:
      refused += 1
      assert str(path) in str(error)
  assert refused > 20
  path.write_bytes(content[:footer] + bytes(20) + content[footer + 20 :])
  with pytest.raises(ValueError, match=f"^{path}: not a readable Parquet file"):
    open_source(path)


def test_files_rows_in_random_order_pickle_and_threads(write, tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  contents = [rng.bytes(1000) for _ in range(60)]
  for shard in range(3):
    rows = range(20 * shard, 20 * shard + 20)
    write({"image": [contents[i] for i in rows], "text": [str(i) for i in rows], "id": list(rows)}, f"s{shard}.parquet",
          rows=7)  # fmt: skip
  monkeypatch.setattr(parquet, "_groups", parquet.Kept(20_000))
  order = rng.permutation(60)
  source = pickle.loads(pickle.dumps(open_source(tmp_path / "s*.parquet").select(order)))
  assert source.block == 7
  with ThreadPoolExecutor(8) as pool:
    got = list(pool.map(lambda row: (source.read(row, "image"), source.fields(row)["text"][0]), list(range(60)) * 3))
  assert got == [(contents[i], str(i)) for i in order] * 3
  assert 0 < parquet._groups.total <= 20_000


def test_what_is_kept_is_bounded_and_made_once():
  kept, made = parquet.Kept(100), []
  make = lambda n: lambda: made.append(n) or np.zeros(n, np.uint8)
  for n in (40, 50, 40, 60, 40, 50, 500, 500, 10):
    kept.get(n, make(n))
  assert made == [40, 50, 60, 50, 500, 10] and kept.total == 10


def test_indexing_reads_no_items_where_statistics_say_they_are_there(write, monkeypatch):
  path = write({"image": struct(*({"bytes": RED} for _ in range(5))), "id": list("abcde")})
  monkeypatch.setattr(parquet.arrow, "filled", None)
  assert open_source(path).column("id") == list("abcde")


def test_a_file_that_changes(write):
  path = write({"text": ["x", "y", "z"]})
  source = open_source(path)
  write({"text": ["x", "y", "longer"]})
  with pytest.raises(ranges.ChangedError, match="a.parquet: has changed since it was indexed"):
    source.fields(2)


def test_the_index_is_kept(write, monkeypatch):
  rng = np.random.default_rng(0)
  path = write({"image": [rng.bytes(20_000) for _ in range(60)], "label": [i % 3 for i in range(60)]})
  first = open_source(path)
  monkeypatch.setattr(parquet, "_scan", None)
  again = open_source(path)
  assert again.fields(59) == first.fields(59) and again.read(59, "image") == first.read(59, "image")
  assert again.block == 2 and again.index.group.tolist() == [i % 3 for i in range(60)]

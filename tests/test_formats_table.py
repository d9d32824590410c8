"""CSV and TSV: records read back by offset as the csv module reads them; what is wrong names file and line."""

import csv
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from codebind_jax.data import opening
from codebind_jax.data.formats import table
from tests.world_fixtures import png


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
  monkeypatch.setenv("CODEBIND_DATA", str(tmp_path / "root"))
  return tmp_path / "root"


def open_source(path, **options):
  return opening.open_source(path, **({"check": "none"} | options))


@pytest.fixture
def write(tmp_path):
  (tmp_path / "red.png").write_bytes(png((255, 0, 0)))

  def write(text, name="a.csv", encoding="utf-8"):
    (tmp_path / name).write_bytes(text.encode(encoding))
    return tmp_path / name

  return write


def test_records_read_back(write, tmp_path, caplog):
  caplog.set_level("INFO", "absl")
  path = write('\ufeff,id,image,text,label,split,url\r\n0,a,red.png,"a ""red"", big\nthing",red,train,u\r\n\r\n'
               "1,b,,ü,3,validation,\r\n2,,red.png,,,test,v")  # fmt: skip
  source = open_source(path, check="all")
  assert source.fields(0) == {
    "id": "a", "label": "red", "text": ['a "red", big\nthing'], "split": "train", "url": "u"}  # fmt: skip
  assert source.fields(1) == {"id": "b", "label": "3", "text": ["ü"], "split": "val"}
  assert source.fields(2)["id"] == "a.csv:6" and source.where(2) == f"{path}:6"
  assert source.read(0, "image") == tmp_path / "red.png" and source[2]["image"][0, 0].tolist() == [255, 0, 0]
  assert source.modalities == ("image", "text") and not source.has(1, "image") and not source.has(2, "text")
  assert "kept aside: url" in caplog.text and open_source(path, split="val").column("id") == ["b"]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separators_are_found(write, separator):
  path = write(separator.join(["id", "text", "label"]) + "\n" + separator.join(["1", '"x,;|\ty"', "z"]) + "\n")
  assert open_source(path).fields(0) == {"id": "1", "text": ["x,;|\ty"], "label": "z"}


def test_separators_that_are_said(write):
  path = write("text;a,text,label,b\nx;1,y,z,2\n")
  assert open_source(path).fields(0)["text"] == ["y"]
  assert open_source(path, separator=";").fields(0)["text"] == ["x"]
  path = write("text\tlabel,other\nx\ty,z\n", "a.tsv")
  assert open_source(path).fields(0) == {"id": "a.tsv:2", "text": ["x"], "label": None, "label,other": "y,z"}
  assert open_source(write("text\nx\ny\n")).column("text") == [["x"], ["y"]]
  with pytest.raises(ValueError, match="separator: got ';;', allowed: one letter"):
    open_source(path, separator=";;")


def test_columns_that_are_called_otherwise(write):
  path = write("img,text,caption_en,caption\nred.png,a,b,c\n")
  source = open_source(path, columns={"image": "img", "text": "caption_en"})
  assert source.fields(0)["text"] == ["b"] and source.read(0, "image").name == "red.png"
  with pytest.raises(ValueError, match="a.csv: no column 'pic' for 'image'; it has img, text, caption_en, caption"):
    open_source(path, columns={"image": "pic"})
  with pytest.raises(ValueError, match="columns: unknown key 'picture'; allowed: image, text, audio"):
    open_source(path, columns={"picture": "img"})


@pytest.mark.parametrize("text, message", [
  ("red.png,a red thing\nred.png,b\n", "a.csv:1: the first line must name the columns, one of .* got 'red.png, a"),
  ("id,label\n1,2\n", "a.csv:1: the first line must name the columns"),
  ("text,text\n1,2\n", "a.csv:1: column 'text' is there twice"),
  ("", "a.csv: empty; the first line must name the columns"),
  ("\n\n", "a.csv: empty"),
  ("text,label\n", "a.csv: no records"),
  ("id,text\n1,x\n2\n", "a.csv:3: 1 cells, where the first line names 2 columns"),
  ('id,text\n1,x\n2,"y\n3,z\n', "a.csv:3: unexpected end of data; is a quote left open.*quote=''"),
  ('id,text\n1,"x" y\n', "a.csv:2: ',' expected after"),
  ("id,text\n1,x\n2,\n", "a.csv:3: no modality"),
  ("id,text\n1,x\n2, \n", "a.csv:3: text: a string that is not empty"),
  ("id,text\n1,x\n2,y\n1,z\n", "a.csv:4: id '1' is there twice, first in line 2"),
  ("text,split\nx,dev\n", "a.csv:2: unknown split 'dev'"),
  ("text\nx\0y\n\0", "a.csv:2: |a.csv:3: "),
])  # fmt: skip
def test_bad_files(write, text, message):
  with pytest.raises(ValueError, match=message):
    source = open_source(write(text))
    assert source.fields(0)["text"] == ["x\0y"]  # Pythons from 3.11 on read a zero byte as a letter
    raise ValueError("a.csv:2: ")


def test_quotes_that_are_letters(write):
  path = write('id\ttext\n1\t"5 inch" nails\n2\tso "quoted"\n', "a.tsv")
  with pytest.raises(ValueError, match="a.tsv:2: "):
    open_source(path)
  assert open_source(path, quote="").column("text") == [['"5 inch" nails'], ['so "quoted"']]


def test_bad_records_are_bounded(write, caplog):
  path = write('id,text\n1\n2,x\n3,"y" z\n4,w\n5,\n6,v\n')
  assert open_source(path, max_bad_records=3).column("id") == ["2", "4", "6"]
  assert "left out" in caplog.text and "a.csv:4: " in caplog.text
  with pytest.raises(ValueError, match=r"a.csv:2: 1 cells.*\(3 bad records, 2 allowed\)"):
    open_source(path, max_bad_records=2)


def test_encodings(write):
  path = write("id,text\n1,x\n2,grün\n", encoding="latin-1")
  with pytest.raises(ValueError, match="a.csv:3: not utf-8 .*byte 0xfc.*; name the file's encoding.*'latin-1'"):
    open_source(path, max_bad_records=5)
  assert open_source(path, encoding="latin-1").column("text") == [["x"], ["grün"]]
  with pytest.raises(ValueError, match="a.csv:1: not utf-8"):
    open_source(write("id,text,grün\n1,x,y\n", encoding="latin-1"))
  for encoding in ("utf-16", "klingon"):
    with pytest.raises(ValueError, match=f"encoding: got '{encoding}' .*; allowed: utf-8, latin-1"):
      open_source(path, encoding=encoding)


def test_many_records_as_csv_reads_them(write, monkeypatch):
  monkeypatch.setattr(table, "_CHUNK", 7)
  cells = [[str(i), "x" + ',"\n\r\n é\u2028\x0b'[i % 10 :] * (i % 7) + "y", f"class {i % 3}"] for i in range(100)]
  path = write("", "b.csv")
  with open(path, "w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows([["id", "text", "label"], *cells])
  source = pickle.loads(pickle.dumps(open_source([path, write("id,text\nn,o\n")]).select(range(100))))
  with ThreadPoolExecutor(8) as pool:
    got = list(pool.map(lambda row: source.fields(row % 100), range(800)))
  assert [[row["id"], row["text"][0], row["label"]] for row in got] == cells * 8
  assert source.index.group.tolist() == [i % 3 for i in range(100)]


def test_the_index_is_kept(write, root, monkeypatch):
  path = write("id,text\n" + "".join(f"{i},{'x' * 1000}{i}\n" for i in range(1100)))
  first = open_source(path)
  monkeypatch.setattr(table, "_scan", None)
  assert open_source(path).fields(1099) == first.fields(1099) == {
    "id": "1099", "label": None, "text": ["x" * 1000 + "1099"]}  # fmt: skip
  with pytest.raises(TypeError):
    open_source(path, encoding="latin-1")


def test_what_pandas_writes_for_absent_and_whole_numbers(write):
  """A column of integers of which some are absent is written as floats."""
  text = "id,text,label,image\n1.0,a cow,7.0,\n2.0,nan,7,x.png\nthird,NaN cows,<NA>,None\n4,2.0,None,NaN\n"
  source = open_source(write(text), check="none")
  assert source.column("id") == ["1", "2", "third", "4"] and source.column("label") == ["7", "7", None, None]
  assert source.column("text") == [["a cow"], None, ["NaN cows"], ["2.0"]]
  assert source.rows_with("image").tolist() == [1]

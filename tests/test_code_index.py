"""Packed codes against arithmetic by hand, their index against decoded vectors, its file, and what it refuses."""

import dataclasses
import json
import pathlib
import re
import types

import numpy as np
import pyarrow.parquet as pq
import pytest

from codebind_jax.embedding import packing, tables
from codebind_jax.search import Codec, CodeIndex, Index, byte_table
from codebind_jax.search import codes as of_codes
from codebind_jax.search import ids as of_ids
from codebind_jax.search.norm_codes import NormCodes
from tests.source_fixtures import damaged_parquet

BACKENDS = ("numpy", "faiss")


def there(backend):
  if backend == "faiss":
    pytest.importorskip("faiss")
  return backend


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def turned(rng, width):
  return np.linalg.qr(rng.normal(size=(width, width)))[0].astype(np.float32)


def codec_of(kind, rng):
  """Every form that the quantiser has."""
  table = lambda k, w: rng.normal(size=(k, w)).astype(np.float32)
  if kind == "one codebook":
    return Codec((table(200, 3),) * 5)
  if kind == "4 bits":
    return Codec(tuple(table(k, 2) for k in (16, 13, 16, 9, 16)), rotation=turned(rng, 10))
  if kind == "10 bits":
    return Codec(tuple(table(1000, 2) for _ in range(4)), score="dot")
  if kind == "residual":
    return Codec(tuple(table(256, 4) / (1 + n // 3) for n in range(6)), (0, 4, 8) * 2, turned(rng, 12))
  if kind == "residual of 10 bits":
    return Codec(tuple(table(1000, 12) / (1 + n) for n in range(5)), (0,) * 5)
  assert kind == "mixed"  # widths and bits differ; one position has no choice
  return Codec((table(1000, 2), table(1, 3), table(30, 1), table(2, 4), table(70000, 2)))


KINDS = ("one codebook", "4 bits", "10 bits", "residual", "residual of 10 bits", "mixed")
WITH_FAISS = KINDS[:5]
NORM_BYTES = {"residual": 8, "residual of 10 bits": 8}  # of an item with its norm's digits: two of 8 bits, one of 10


def codes_of(codec, rng, n):
  return np.stack([rng.integers(0, size, n) for size in codec.sizes], axis=1)


def decoded(codec, codes):
  """The sum of an item's rows, turned back: one item and one position at a time, in float64."""
  out = np.zeros((len(codes), codec.width))
  for row, item in enumerate(codes):
    for start, table, code in zip(codec.starts, codec.tables, item):
      out[row, start : start + table.shape[1]] += table[code]
  return out if codec.rotation is None else out @ codec.rotation.astype(np.float64)


def expected(codec, codes, queries, k):
  vectors = decoded(codec, codes)
  scores = unit(queries) @ (unit(vectors) if codec.score == "cosine" else vectors).T
  order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  return order, np.take_along_axis(scores, order, 1)


def test_bits_by_hand():
  # 5 = 101, 1 = 1, 9 = 1001 in 3, 1 and 4 bits, the first lowest; then 3 in 10 bits over two bytes.
  packed = packing.pack(np.array([[5, 1, 9, 3]]), (8, 2, 16, 1000))
  assert packed.tolist() == [[0b1001_1_101, 3, 0]]
  assert packing.bits_of((8, 2, 16, 1000, 1)) == (3, 1, 4, 10, 0)
  assert packing.bytes_of((1024,) * 192) == 240 and packing.bytes_of((256,) * 48) == 48 and packing.bytes_of((5,)) == 1
  assert packing.unpack(packed, (8, 2, 16, 1000)).tolist() == [[5, 1, 9, 3]]


@pytest.mark.parametrize("sizes", [(2,) * 9, (1000,) * 7, (1, 5, 70000, 2, 1 << 31, 16), (256,) * 3, (4096,) * 5])
def test_packed_codes_are_read_back(sizes):
  codes = np.random.default_rng(0).integers(0, sizes, (50, len(sizes)))
  packed = packing.pack(codes, sizes)
  assert packed.shape == (50, -(-sum(int(np.ceil(np.log2(size))) for size in sizes) // 8))
  np.testing.assert_array_equal(packing.unpack(packed, sizes), codes)


@pytest.mark.parametrize(("bits", "positions"), [(4, 6), (8, 3), (10, 5), (12, 3)])
def test_bits_lie_as_faiss_lays_them(bits, positions):
  faiss = pytest.importorskip("faiss")
  codes = np.random.default_rng(0).integers(0, 1 << bits, (20, positions))
  with_faiss = faiss.ProductQuantizer(positions, positions, bits)
  faiss.copy_array_to_vector(np.tile(np.arange(1 << bits, dtype=np.float32), positions), with_faiss.centroids)
  packed = packing.pack(codes, (1 << bits,) * positions)
  np.testing.assert_array_equal(with_faiss.decode(packed), codes)


def test_codes_that_are_not_there_are_refused():
  for codes, message in [([[0, 4]], "row 0: position 1 has the code 4; allowed: 0 to 3"), ([[-1, 0]], "the code -1"),
                         ([[0]], r"got shape \(1, 1\); allowed: 2 codes")]:  # fmt: skip
    with pytest.raises(ValueError, match=message):
      packing.pack(np.array(codes), (4, 4))
  with pytest.raises(ValueError, match="row 1: position 0 has the code 3; allowed: 0 to 2"):
    packing.unpack(np.array([[0], [3]], np.uint8), (3,))
  with pytest.raises(ValueError, match="row 1: of the last 6 bits, which are of no code, some are set"):
    packing.unpack(np.array([[1], [4]], np.uint8), (3,))


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_sums_of_rows(kind):
  rng = np.random.default_rng(0)
  codec = codec_of(kind, rng)
  codes = codes_of(codec, rng, 30)
  plain = decoded(codec, codes)
  np.testing.assert_allclose(codec.decode(codes), unit(plain) if codec.score == "cosine" else plain, atol=1e-5)
  np.testing.assert_allclose(codec.norms(codes), np.linalg.norm(plain, axis=1), rtol=1e-5)
  query = unit(rng.normal(size=codec.width))
  table = codec.look_up_table(query)
  looked = [sum(table[offset + code] for offset, code in zip(codec.offsets, item)) for item in codes]
  np.testing.assert_allclose(looked, plain @ query, atol=1e-5)
  again = Codec.of_plain(json.loads(json.dumps(codec.plain())))
  np.testing.assert_array_equal(again.decode(codes), codec.decode(codes))
  assert again.sizes == codec.sizes and len({id(table) for table in again.tables}) == len(set(map(id, codec.tables)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 9, 700])
def test_finds_what_decoded_vectors_find(backend, kind, k, monkeypatch):
  if backend == "faiss" and kind not in WITH_FAISS:
    pytest.skip("refused, see below")
  monkeypatch.setattr(of_codes, "_BLOCK", 128)  # several parts, and some left over
  rng = np.random.default_rng(1)
  codec = codec_of(kind, rng)
  codes, queries = codes_of(codec, rng, 500), rng.normal(size=(6, codec.width))
  index = CodeIndex(codec, there(backend))
  for part in np.array_split(np.arange(500), 7):
    index.add(part + 1000, codes[part])
  assert index.backend == backend and len(index) == 500 and index.width == codec.width
  ids, scores = index.search(queries, k)
  order, cosines = expected(codec, codes, queries, k)
  np.testing.assert_array_equal(ids, order + 1000)
  np.testing.assert_allclose(scores, cosines, atol=2e-6)
  # Norms differ, so the inner product alone orders otherwise.
  assert scores.dtype == np.float32 and np.ptp(codec.norms(codes)) > 0.5
  assert index.nbytes == 500 * NORM_BYTES.get(kind, codec.item_bytes)


@pytest.mark.parametrize("kind", WITH_FAISS)
def test_backends_agree_to_the_bit(kind):
  pytest.importorskip("faiss")
  rng = np.random.default_rng(2)
  codec = codec_of(kind, rng)
  codes = codes_of(codec, rng, 300)[rng.integers(0, 40, 300)]  # most of them several times
  queries, found = np.concatenate([codec.decode(codes[:3]), rng.normal(size=(3, codec.width))]), []
  for backend in BACKENDS:
    index = CodeIndex(codec, backend)
    index.add([f"{i}" for i in range(300)], codes)
    found.append(index.search(queries, 20))
  np.testing.assert_array_equal(found[0][0], found[1][0])
  np.testing.assert_array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_items_are_found_by_position(backend, monkeypatch):
  monkeypatch.setattr(of_codes, "_BLOCK", 64)
  rng = np.random.default_rng(3)
  codec = codec_of("one codebook", rng)
  kinds = codes_of(codec, rng, 5)
  places = rng.integers(0, 5, 400)
  index = CodeIndex(codec, there(backend))
  index.add(range(400), kinds[places])
  queries = rng.normal(size=(4, codec.width))
  for k in (1, 3, 90, 399):
    order, _ = expected(codec, kinds, queries, 5)
    for query, ids in enumerate(index.search(queries, k)[0]):
      assert ids.tolist() == [n for kind in order[query] for n in np.flatnonzero(places == kind)][:k]


def test_faiss_refuses_bits_that_it_cannot_look_up():
  codec = codec_of("mixed", np.random.default_rng(0))
  assert CodeIndex(codec).backend == "numpy"
  pytest.importorskip("faiss")
  with pytest.raises(ValueError, match=r"'faiss' cannot look up codes of \[0, 1, 5, 10, 17\] bits"):
    CodeIndex(codec, "faiss")


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_items_that_fit_are_found(backend, monkeypatch):
  monkeypatch.setattr(of_codes, "_BLOCK", 100)
  rng = np.random.default_rng(4)
  codec = codec_of("4 bits", rng)
  codes, queries = codes_of(codec, rng, 450), rng.normal(size=(5, codec.width))
  modality = np.repeat(["image", "text", "image"], 150)  # a part of 100 is of one, or of both
  label = np.array([None, *"abcdefghij"], object)[rng.integers(0, 11, 450)]
  index = CodeIndex(codec, there(backend))
  for part in np.array_split(np.arange(450), 9):
    index.add(part, codes[part], {"modality": modality[part].tolist(), "label": label[part].tolist()})
  for where, mask in [
    ({"modality": "text"}, modality == "text"), ({"label": ["a", "c"]}, np.isin(label.astype(str), ["a", "c"])),
    ({"modality": "image", "label": "b"}, (modality == "image") & (label == "b")),
    ({"label": None}, label == None), ({"modality": ["text", "image"]}, np.ones(450, bool)),  # noqa: E711
  ]:  # fmt: skip
    rows = np.flatnonzero(mask)
    ids, scores = index.search(queries, 60, where=where)
    order, cosines = expected(codec, codes[rows], queries, 60)
    np.testing.assert_array_equal(ids, rows[order])
    np.testing.assert_allclose(scores, cosines, atol=2e-6)
  assert index.search(queries, 3, where={"modality": "smell"})[0].shape == (5, 0)
  with pytest.raises(ValueError, match=r"where: got 'colour'; this index has the fields \['label', 'modality'\]"):
    index.search(queries, 3, where={"colour": "red"})


@pytest.mark.parametrize("backend", BACKENDS)
def test_candidates_are_ordered_by_the_vectors_given(backend, tmp_path):
  rng = np.random.default_rng(5)
  codec = codec_of("one codebook", rng)
  codes = codes_of(codec, rng, 200)
  vectors = (codec.decode(codes) + 0.05 * rng.normal(size=(200, codec.width))).astype(np.float16)
  np.save(tmp_path / "vectors.npy", vectors)
  index, exact = CodeIndex(codec, there(backend)), Index("numpy")
  index.add(range(200), codes, {"label": ["even", "odd"] * 100})
  exact.add(range(200), vectors)
  queries = rng.normal(size=(8, codec.width))
  for rerank in (vectors, str(tmp_path / "vectors.npy"), tmp_path / "vectors.npy"):
    ids, scores = index.search(queries, 10, rerank=rerank, candidates=200)
    np.testing.assert_array_equal(ids, exact.search(queries, 10)[0])
    np.testing.assert_allclose(scores, exact.search(queries, 10)[1], atol=1e-6)
  few = index.search(queries, 10, rerank=vectors, candidates=10)[0]
  by_codes = index.search(queries, 10)[0]
  assert (np.sort(few) == np.sort(by_codes)).all() and (few != by_codes).any()
  assert (index.search(queries, 5, rerank=vectors, where={"label": "odd"})[0] % 2 == 1).all()
  (tmp_path / "text.npy").write_text("no vectors")
  for rerank, options, message in [
    (vectors[:-1], {}, r"rerank: got float16 of shape \(199, 15\); this index has 200 items of width 15"),
    (codes, {}, "rerank: got int64"), (str(tmp_path / "none.npy"), {}, r"none.npy': not a .npy file"),
    (tmp_path / "text.npy", {}, r"text.npy': not a .npy file"), (vectors, {"candidates": 3}, "got 3 for 10 neighbours"),
    (None, {"candidates": 3}, "got 3 without rerank"),
  ]:  # fmt: skip
    with pytest.raises(ValueError, match=message):
      index.search(queries, 10, rerank=rerank, **options)


def test_digits_of_norms_by_hand():
  codec = Codec((np.array([[3.0], [4.0]]), np.array([[0.5], [-1.0]])), (0, 0))  # a bit each, so ten digits
  norms = NormCodes(codec)
  assert norms.sizes == (2,) * 10 and norms.step == pytest.approx(5 / 1024)
  digits = norms.codes(np.array([4.5, 2.0]))  # 921.6 and 409.6 steps
  assert ["".join(map(str, row)) for row in digits] == [f"{921:010b}", f"{409:010b}"]
  table = norms.table(-2.0).reshape(10, 2)
  np.testing.assert_allclose(table[np.arange(10), digits].sum(axis=1), -2 * norms.step * np.array([921, 409]))
  assert NormCodes(Codec((np.eye(2),) * 2)).sizes == () and not len(NormCodes(Codec((np.eye(2),) * 2)).table(1.0))
  assert NormCodes(dataclasses.replace(codec, score="dot")).sizes == ()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["residual", "residual of 10 bits"])
def test_norms_of_residual_codes_do_not_widen_a_search(kind, backend, monkeypatch):
  rng = np.random.default_rng(7)
  codec, asked = codec_of(kind, rng), []
  codes, queries = codes_of(codec, rng, 30_000), rng.normal(size=(5, codec.width))
  assert np.ptp(codec.norms(codes)) > 1
  monkeypatch.setattr(of_codes, "_BLOCK", 1 << 13)
  index = CodeIndex(codec, there(backend))
  index.add(range(30_000), codes)
  largest = type(index._scan(index._look)).largest
  monkeypatch.setattr(index._scan, "largest", lambda self, packed, k: asked.append(k) or largest(self, packed, k))
  ids, scores = index.search(queries, 10)
  order, cosines = expected(codec, codes, queries, 10)
  np.testing.assert_array_equal(ids, order)
  np.testing.assert_allclose(scores, cosines, atol=2e-6)
  assert set(asked) == {10 + of_codes._MORE}  # never more than the first look


@pytest.mark.parametrize("ids", ["strings", "range", "integers"])
def test_save_and_load(ids, tmp_path, monkeypatch):
  monkeypatch.setattr(of_codes, "_BLOCK", 64)
  monkeypatch.setattr(tables, "ROW_GROUP", 70)
  rng = np.random.default_rng(6)
  codec = codec_of("residual", rng)
  codes, queries = codes_of(codec, rng, 200), rng.normal(size=(4, codec.width))
  kinds = {"strings": [f"item {n}" for n in range(200)], "range": range(5, 205), "integers": list(range(400, 0, -2))}
  names = kinds[ids]
  label = [None if n % 3 else f"{n % 7}" for n in range(200)]
  index = CodeIndex(codec, "numpy")
  index.add(names, codes, {"label": label, "modality": "image"})
  index.save(tmp_path / "index.parquet")
  file = pq.ParquetFile(tmp_path / "index.parquet")
  assert [str(kind) for kind in file.schema_arrow.types] == [
    "string" if ids == "strings" else "int64", "fixed_size_binary[6]", "string", "string"]
  assert file.read()["codes"].to_pylist() == [row.tobytes() for row in packing.pack(codes, codec.sizes)]
  file.close()
  for backend in BACKENDS:
    again = CodeIndex.load(tmp_path / "index.parquet", there(backend))
    for own in ({}, {"where": {"label": "3"}}):
      for mine, other in zip(index.search(queries, 7, **own), again.search(queries, 7, **own)):
        np.testing.assert_array_equal(mine, other)
    with pytest.raises(ValueError, match="is there twice"):
      again.add([names[0]], codes[:1], {"label": "3", "modality": "text"})
    again.add(["new"] if ids == "strings" else [-1], codes[:1], {"label": "3", "modality": "text"})
    assert len(again) == 201 and again.search(queries, 9, where={"modality": "text"})[0].shape == (4, 1)


def test_what_is_refused_adds_nothing():
  table = np.array([[0.0, 0.0], [1.0, 0.0]], np.float32)
  index = CodeIndex(Codec((table, table)), "numpy")
  with pytest.raises(ValueError, match="the index is empty"):
    index.search(np.ones((1, 4)))
  with pytest.raises(ValueError, match="the index is empty"):
    index.save("nowhere.parquet")
  index.add(["a"], [[0, 1]], {"label": "x"})
  for ids, codes, fields, message in [
    ("b", [[0, 1]], {"label": "x"}, "ids: got 'b'; a list of ids is needed"),
    (["b", "c"], [[0, 1]], {"label": "x"}, "got 2 for 1 items"),
    (["b", "a"], [[0, 1], [1, 1]], {"label": "x"}, "'a' is there twice"),
    (["b"], [[0, 2]], {"label": "x"}, "row 0: position 1 has the code 2; allowed: 0 to 1"),
    (["b"], [[0.0, 1.0]], {"label": "x"}, "codes: got values of type float64"),
    (["b"], [[0, 1, 1]], {"label": "x"}, r"got shape \(1, 3\); allowed: 2 codes"),
    (["b", "c"], [[0, 1], [0, 0]], {"label": "x"}, "the vector of 'c' is zero"),
    ([3], [[0, 1]], {"label": "x"}, "got 3 in an index of str"),
    (["b"], [[0, 1]], None, r"fields: got \[\] in an index with \['label'\]"),
    (["b"], [[0, 1]], {"label": ["x", "y"]}, "fields: 'label' has 2 values for 1 items"),
    (["b"], [[0, 1]], {"label": [3]}, "'label' has the value 3; allowed: strings, or None"),
  ]:
    with pytest.raises(ValueError, match=message):
      index.add(ids, codes, fields)
    assert len(index) == 1
  index.add([], np.zeros((0, 2), int), {"label": []})
  for queries, k, message in [(np.ones((1, 3)), 1, "width 3"), (np.ones((1, 4)), 0, "k: got 0"),
                              (np.zeros((1, 4)), 1, "query 0")]:  # fmt: skip
    with pytest.raises(ValueError, match=message):
      index.search(queries, k)
  index.add(["b"], [[1, 0]], {"label": "y"})
  assert index.search(np.array([[1.0, 0, 0.1, 0]]), 2)[0].tolist() == [["b", "a"]]
  with pytest.raises(ValueError, match="'id'; allowed: other names"):
    CodeIndex(Codec((table, table)), "numpy").add(["b"], [[1, 0]], {"id": "x"})


def test_tables_that_do_not_fit_are_refused():
  two = np.eye(2, dtype=np.float32)
  for options, message in [
    ({"tables": ()}, "tables: got none"), ({"tables": (two[0],)}, r"position 0 has shape \(2,\)"),
    ({"tables": (two, two * np.nan)}, "position 1 has shape .* or is not finite"),
    ({"tables": (two, two), "starts": (0, 1)}, "beside one another"), ({"tables": (two,), "starts": (1,)}, "from 0 on"),
    ({"tables": (two, two), "starts": (0, 3)}, "beside one another"), ({"tables": (two[:1],)}, "one code at every"),
    ({"tables": (two,), "rotation": 2 * two}, "an orthogonal matrix of 2 rows"),
    ({"tables": (two,), "rotation": np.eye(3)}, r"got shape \(3, 3\)"), ({"tables": (two,), "score": "l2"}, "got 'l2'"),
  ]:  # fmt: skip
    with pytest.raises(ValueError, match=message):
      Codec(**options)


def test_every_error_of_a_damaged_file_names_it(tmp_path):
  path, rng, refused = tmp_path / "index.parquet", np.random.default_rng(0), 0
  codec = codec_of("4 bits", rng)
  index = CodeIndex(codec, "numpy")
  index.add([f"{number}" for number in range(50)], codes_of(codec, rng, 50), {"label": "x"})
  index.save(path)
  for changed in damaged_parquet(path.read_bytes(), rng):
    path.write_bytes(changed)
    try:
      CodeIndex.load(path, "numpy")
    except ValueError as error:
      refused += 1
      assert str(error).startswith(repr(str(path)))
  assert refused > 20


def test_foreign_files_and_codes_that_are_not_there_are_refused(tmp_path):
  rng, path = np.random.default_rng(0), tmp_path / "index.parquet"
  codec = codec_of("4 bits", rng)  # of 13 codes at position 1
  index = CodeIndex(codec, "numpy")
  index.add(["a", "b"], codes_of(codec, rng, 2))
  index.save(path)
  table = pq.read_table(path)
  with tables.open_table(path, "a file") as file:
    about = {key: file.about[key] for key in ("kind", "sizes", "codec")}
  packed = tables.fixed_bytes(table["codes"].chunk(0)).copy()
  packed[1, 0] |= 0xF0
  changed = table.set_column(1, "codes", tables.as_fixed_bytes(packed))
  for content, meta, message in [
    (changed, about, "row 1: column 'codes': position 1 has the code 15; allowed: 0 to 12"),
    (table, about | {"kind": "index"}, "of kind 'index'"), (table, about | {"codec": {}}, "no tables of codes"),
    (table, about | {"sizes": [16] * 5}, "its tables are of"), (table.select(["codes"]), about, r"columns \['codes'\]"),
    (table.set_column(0, "id", [["a", "a"]]), about, "row 1: ids: 'a' is there twice"),
    (table.set_column(0, "id", [["a", None]]), about, "row 1: column 'id' has 1 nulls"),
    (table.set_column(1, "codes", [[1, 2]]), about, "column 'codes' is of type int64"),
  ]:  # fmt: skip
    tables.write_table(content, path, meta)
    with pytest.raises(ValueError, match=rf"index\.parquet' is not an index of codes.*{message}"):
      CodeIndex.load(path)
  pq.write_table(table.replace_schema_metadata({}), path)
  with pytest.raises(ValueError, match=r"index\.parquet' is not an index of codes"):
    CodeIndex.load(path)
  with pytest.raises(ValueError, match=r"index\.parquet' is not an index that was saved.*columns \['id', 'codes'\]"):
    Index.load(path)
  with pytest.raises(ValueError, match="there is no such file"):
    CodeIndex.load(tmp_path / "nothing.parquet")


def test_ids_take_few_bytes_and_each_is_there_once(monkeypatch):
  monkeypatch.setattr(of_ids, "_PART", 100)
  ids = of_ids.Ids()
  for first in range(0, 1000, 40):
    ids.add(ids.checked(np.arange(first, first + 40)))
  assert len(ids) == 1000 and ids.nbytes == 0 and ids[999] == 999
  for again in (range(990, 1010), [5], [999], np.arange(100, 103)):
    with pytest.raises(ValueError, match="is there twice"):
      ids.checked(again)
  assert ids.checked([1000, 7000]) == [1000, 7000]
  words = of_ids.Ids()
  for first in range(0, 950, 50):
    words.add(words.checked([f"w{n:05d}" for n in range(first, first + 50)]))
  assert len(words) == 950 and words.nbytes < 900 * (6 + 8) + 9 * 64
  assert words.array(95, 103).to_pylist() == [f"w{n:05d}" for n in range(95, 103)]
  assert words.take(np.array([[0, 949]])).tolist() == [["w00000", "w00949"]]
  for again in (["w00000"], ["w00949"], ["new", "new"]):
    with pytest.raises(ValueError, match="is there twice"):
      words.checked(again)
  # Hashes may be equal where ids are not.
  monkeypatch.setattr(of_ids, "_hashes", lambda names: np.zeros(len(names), np.uint32))
  words = of_ids.Ids()
  for first in range(0, 300, 100):
    words.add(words.checked([f"{n}" for n in range(first, first + 100)]))
  assert len(words) == 300
  with pytest.raises(ValueError, match="'250' is there twice"):
    words.checked(["300", "250"])
  scattered = of_ids.Ids()
  scattered.add(scattered.checked(list(range(0, 900, 3))))
  assert scattered.nbytes == 300 * 12 and scattered.array(0, 300).to_pylist() == list(range(0, 900, 3))
  with pytest.raises(ValueError, match="299|297"):
    scattered.checked([299, 297])


def test_a_model_without_codes_for_positions_is_refused():
  model = types.SimpleNamespace(method=types.SimpleNamespace(spec=None), modalities=("image",))
  with pytest.raises(ValueError, match="the model has no compositional codes"):
    Codec.of_model(model)


def test_a_database_finds_the_same_with_the_page_s_query(tmp_path, monkeypatch):
  duckdb = pytest.importorskip("duckdb")
  page = (pathlib.Path(__file__).parents[1] / "docs/index.md").read_text(encoding="utf-8")
  (statement,) = re.findall(r"```sql\n(.*?)```", page, re.DOTALL)
  rng = np.random.default_rng(8)
  codec = codec_of("4 bits", rng)
  index = CodeIndex(codec, "numpy")
  index.add([f"{n:03d}" for n in range(300)], codes_of(codec, rng, 300), {"modality": ["image", "text"] * 150})
  monkeypatch.chdir(tmp_path)
  index.save("codes.parquet")
  for query in rng.normal(size=(3, codec.width)):
    pq.write_table(byte_table(codec, query), "query.parquet")
    with duckdb.connect() as engine:
      rows = engine.execute(statement).fetchall()
    ids, scores = index.search(query[None], 5, where={"modality": "image"})
    assert [name for name, _ in rows] == ids[0].tolist()
    np.testing.assert_allclose([score for _, score in rows], scores[0], atol=1e-5)


def test_the_table_for_an_engine_by_hand():
  codec = Codec((np.array([[1.0], [2.0]]), np.array([[3.0], [-4.0]])))  # a bit each
  table = byte_table(codec, np.array([3.0, 4.0])).to_pylist()  # the unit query is 0.6, 0.8
  assert len(table) == 256 and table[0b10] == {"position": 1, "byte": "02", "product": pytest.approx(0.6 - 3.2),
                                               "square": 1 + 16}  # fmt: skip
  rng = np.random.default_rng(0)
  for kind in ("10 bits", "residual"):
    with pytest.raises(ValueError, match="allowed: one stage of codes within one byte each"):
      byte_table(codec_of(kind, rng), np.ones(codec_of(kind, rng).width))

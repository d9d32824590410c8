"""The index against brute force, its file, and what it refuses."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import codebind_jax
from codebind_jax.embedding import shards
from codebind_jax.search import Index, checks
from codebind_jax.search import vectors as of_vectors
from tests.source_fixtures import damaged_parquet

BACKENDS = ("numpy", "faiss")


def backend_there(backend):
  if backend == "faiss":
    pytest.importorskip("faiss")
  return backend


def brute_force(vectors, queries, k):
  """One dot product at a time, in float64."""
  unit = lambda x: x / np.sqrt((x.astype(np.float64) ** 2).sum(-1, keepdims=True))
  found = []
  for query in unit(queries):
    scores = [(float(np.dot(query, vector)), row) for row, vector in enumerate(unit(vectors))]
    found.append(sorted(scores, reverse=True)[:k])
  return [[row for _, row in own] for own in found], [[score for score, _ in own] for own in found]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 7, 300])
def test_finds_what_brute_force_finds(backend, k, monkeypatch):
  monkeypatch.setattr(of_vectors, "_BLOCK", 1000)  # several blocks of queries
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(300, 12)) * rng.uniform(0.1, 10.0, size=(300, 1))
  queries = rng.normal(size=(9, 12)).astype(np.float32)
  index = Index(backend=backend_there(backend))
  index.add(list(range(100, 250)), vectors[:150])
  index.add(np.arange(250, 400), vectors[150:].astype(np.float64))
  assert index.backend == backend and len(index) == 300 and index.width == 12
  ids, scores = index.search(queries, k)
  rows, expected = brute_force(vectors, queries, k)
  np.testing.assert_array_equal(ids, np.array(rows) + 100)
  np.testing.assert_allclose(scores, expected, atol=1e-6)
  assert scores.dtype == np.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ids", [["a", "b", "cc"], [7, 5, 3]], ids=["strings", "integers"])
def test_save_and_load(backend, ids, tmp_path):
  index = Index(backend=backend_there(backend))
  vectors = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
  index.add(ids[:2], vectors[:2])
  index.add(ids[2:], vectors[2:])
  index.save(tmp_path / "index.parquet")
  before = index.search(vectors, 3)
  assert before[0][:, 0].tolist() == ids
  for other in BACKENDS:
    again = Index.load(tmp_path / "index.parquet", backend=backend_there(other))
    found = again.search(vectors, 3)
    assert again.backend == other and found[0].tolist() == before[0].tolist()
    np.testing.assert_allclose(found[1], before[1], atol=1e-6)
    with pytest.raises(ValueError, match="is there twice"):
      again.add(ids[:1], vectors[:1])
  again.save(tmp_path / "second.parquet")
  same = [Index.load(tmp_path / f"{name}.parquet", "numpy")._store.blocks() for name in ("index", "second")]
  np.testing.assert_array_equal(*(np.concatenate(list(blocks)) for blocks in same))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_vectors_are_found_by_position(backend, monkeypatch):
  """Also where k cuts through a tie, for any k, however many are equal, and added in any number of parts."""
  monkeypatch.setattr(of_vectors, "_BLOCK", 4000)
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(7, 33)).astype(np.float32)
  places = rng.integers(0, 7, 400)
  tied = vectors[places] * np.float32(2.0) ** rng.integers(-3, 4, (400, 1)).astype(np.float32)  # one direction each
  index = Index(backend=backend_there(backend))
  for part in np.array_split(np.arange(400), 3):
    index.add(part, tied[part])
  exact = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
  for k in (1, 2, 17, 90, 399, 400, 500):
    ids, scores = index.search(vectors, k)
    for query in range(7):
      order = sorted(range(400), key=lambda row: (-float(exact[query] @ exact[places[row]]), row))
      assert ids[query].tolist() == order[:k], (backend, k, query)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_backends_agree_on_everything():
  pytest.importorskip("faiss")
  rng = np.random.default_rng(1)
  vectors = np.concatenate([rng.integers(-1, 2, (300, 6)) * 1.0 + 0.01, rng.normal(size=(100, 6))])
  found = []
  for backend in BACKENDS:
    index = Index(backend=backend)
    index.add([f"{i}" for i in range(400)], vectors)
    found.append(index.search(vectors[::7], 25))
  np.testing.assert_array_equal(found[0][0], found[1][0])
  np.testing.assert_array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_item_where_a_list_is_needed_is_refused(backend):
  index = Index(backend=backend_there(backend))
  one = np.array([1.0, 0.0, 0.0])
  for ids, vectors, message in [
    ("cow", np.eye(3), "ids: got 'cow'; a list of ids is needed"), (b"cow", np.eye(3), "a list of ids is needed"),
    ({"a": 1}, np.eye(3)[:1], "a list of ids is needed"), ({"a"}, np.eye(3)[:1], "a list of ids is needed"),
    (np.array("a"), np.eye(3)[:1], "a list of ids is needed"), (7, np.eye(3)[:1], "a list of ids is needed"),
    (["a"], one, r"vectors: got shape \(3,\)"), (["a", "b", "c"], one, r"vectors: got shape \(3,\)"),
    (["a"], 1.0, r"vectors: got shape \(\)"), (["a", "b"], [[1.0], [1.0, 2.0]], "rows of different lengths"),
    (["a"], [["x", "y"]], "type <U1; allowed: numbers"), (["a"], np.eye(3)[:1] * 1j, "type complex128"),
    (["a"], np.zeros((1, 0)), r"got shape \(1, 0\)"), (["a"], np.full((1, 3), np.inf), "zero or not finite"),
  ]:  # fmt: skip
    with pytest.raises(ValueError, match=message):
      index.add(ids, vectors)
  assert len(index) == 0
  index.add(["a", "b", "c"], np.eye(3))
  for queries, k, message in [(one, 1, r"queries: got shape \(3,\)"), (np.eye(3), 1.5, "k: got 1.5"),
                              (np.eye(3), True, "k: got True"), (np.full((1, 3), np.nan), 1, "query 0"),
                              ([[1.0, 0.0, 0.0], [1.0]], 1, "rows of different lengths")]:  # fmt: skip
    with pytest.raises(ValueError, match=message):
      index.search(queries, k)
  ids, scores = index.search(np.zeros((0, 3)), 2)
  assert ids.shape == scores.shape == (0, 2)
  assert index.search(np.array([[0, 2, 1]]), 2)[0].tolist() == [["b", "c"]]


@pytest.mark.parametrize(("ids", "vectors", "message"), [
  (["a", None], [[1.0, 0.0], [0.0, 1.0]], "column 'id' has 1 nulls"),
  (["a", "b"], [[1.0, 0.0], None], "column 'vector' has 1 nulls"),
  (["a", "b"], [[1.0, 0.0], [None, 1.0]], "vectors with nulls"),
  (["a", "b"], [[1.0, 0.0], [np.nan, 1.0]], "that of 'b' is zero or not finite"),
  (["a", "b"], [[1.0, 0.0], [0.0, 0.0]], "that of 'b' is zero or not finite"),
  (["a", "b"], [[1.0, 0.0], [3.0, 4.0]], "not of unit length"),
  (["a", "b"], [[1.0, 0.0], [1.0]], r"widths \[1, 2\]"), (["a", "a"], [[1.0, 0.0], [0.0, 1.0]], "'a' is there twice"),
  ([1.5, 2.5], [[1.0, 0.0], [0.0, 1.0]], "got 1.5; allowed: strings or integers"),
  (["a", "b"], ["x", "y"], "column 'vector' is of type string"),
])  # fmt: skip
def test_a_file_that_another_program_wrote_is_checked(ids, vectors, message, tmp_path):
  pq.write_table(pa.table({"id": ids, "vector": vectors}), tmp_path / "index.parquet")
  with pytest.raises(ValueError, match=rf"index\.parquet.*{message}"):
    Index.load(tmp_path / "index.parquet")


def test_fewer_than_k_gives_all():
  index = Index()
  index.add(["a", "b"], np.eye(2))
  ids, scores = index.search(np.array([[1.0, 0.5]]), 10)
  assert ids.tolist() == [["a", "b"]] and scores.shape == (1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_refused_adds_nothing(backend):
  index = Index(backend=backend_there(backend))
  with pytest.raises(ValueError, match="the index is empty"):
    index.search(np.eye(2), 1)
  index.add(["a"], np.eye(2)[:1])
  for ids, vectors, message in [
    (["b"], np.ones((1, 3)), "got width 3; this index has width 2"),
    (["b", "a"], np.eye(2), "'a' is there twice"),
    (["b", "b"], np.eye(2), "'b' is there twice"),
    (["b"], np.eye(2), "got 1 for 2 vectors"),
    (["b", 3], np.eye(2), "got 3 in an index of str"),
    ([2.5], np.eye(2)[:1], "got 2.5; allowed: strings or integers"),
    (["\ud800"], np.eye(2)[:1], r"got '\\ud800', which has half a surrogate pair"),
    ([2**70], np.eye(2)[:1], "got 1180591620717411303424; allowed: integers of 64 bits"),
    ([-(2**63) - 1], np.eye(2)[:1], "allowed: integers of 64 bits"),
    (["b", "c"], np.array([[1.0, 0.0], [0.0, 0.0]]), "that of 'c' is zero or not finite"),
    (["b", "c"], np.array([[np.nan, 0.0], [0.0, 1.0]]), "that of 'b' is zero or not finite"),
  ]:
    with pytest.raises(ValueError, match=message):
      index.add(ids, vectors)
    assert len(index) == 1
  for queries, k, message in [(np.ones((1, 3)), 1, "got width 3"), (np.eye(2), 0, "k: got 0"),
                              (np.zeros((1, 2)), 1, "query 0")]:  # fmt: skip
    with pytest.raises(ValueError, match=message):
      index.search(queries, k)
  index.add(["b", "c"], np.eye(2))
  assert index.search(np.array([[0.0, 1.0]]), 1)[0].tolist() == [["c"]]


def test_files_and_backends_that_are_not_there(tmp_path):
  with pytest.raises(ValueError, match="there is no such file"):
    Index.load(tmp_path / "nothing.parquet")
  (tmp_path / "text.parquet").write_text("not an index")
  with pytest.raises(ValueError, match="is not an index that was saved"):
    Index.load(tmp_path / "text.parquet")
  with pytest.raises(ValueError, match="the index is empty"):
    Index().save(tmp_path / "empty.parquet")
  with pytest.raises(ValueError, match="backend: got 'annoy'; allowed"):
    Index(backend="annoy")


def test_integers_of_64_bits_and_letters_beyond_16_bits_are_saved(tmp_path):
  for ids in ([-(2**63), 2**63 - 1], ["\U0001f404", "\u00e9"]):
    index = Index("numpy")
    index.add(ids, np.eye(2))
    index.save(tmp_path / "index.parquet")
    assert Index.load(tmp_path / "index.parquet").search(np.eye(2), 1)[0][:, 0].tolist() == ids


def test_every_error_of_a_damaged_file_names_it(tmp_path):
  path, rng, index, refused = tmp_path / "index.parquet", np.random.default_rng(0), Index("numpy"), 0
  index.add([f"{number}" for number in range(50)], rng.standard_normal((50, 4)))
  index.save(path)
  content = path.read_bytes()
  for changed in damaged_parquet(content, rng):
    path.write_bytes(changed)
    try:
      Index.load(path, "numpy")
    except ValueError as error:
      refused += 1
      assert str(error).startswith(repr(str(path)))
  assert refused > 20


def test_a_damaged_shard_is_named(tmp_path):
  schema = shards.make_schema(["image_shared"], "float32")
  vectors = np.random.default_rng(0).standard_normal((40, 8))
  columns = [[f"{number}" for number in range(40)], [None] * 40, [None] * 40]
  columns = [*map(pa.array, columns), shards.with_nulls(vectors, range(40), 40, np.float32)]
  batch = pa.record_batch(columns, schema=schema)
  path = shards.shard_path(tmp_path, 0, 1)
  shards.write_shard(path, schema, [batch], shards.ShardReport("x", 1, 40))
  assert len(Index.from_parquet(tmp_path, "image", backend="numpy")) == 40
  content = path.read_bytes()
  path.write_bytes(content[:4] + bytes(100) + content[104:])  # its first pages, not its footer
  with pytest.raises(ValueError, match=f"^{path}: not a readable shard"):
    Index.from_parquet(tmp_path, "image")


def test_without_faiss_numpy_searches(monkeypatch):
  monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
  assert Index().backend == "numpy"
  with pytest.raises(ValueError, match="'faiss' is not installed"):
    Index(backend="faiss")


def test_the_package_gives_the_index_without_loading_faiss():
  assert codebind_jax.search.Index is Index
  code = "import sys, codebind_jax as c; a = 'pyarrow' in sys.modules; c.search.Index; print(a, 'faiss' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
  assert done.stdout.split() == ["False", "False"]

"""The index against brute force, its file, and what it refuses."""

import subprocess
import sys

import numpy as np
import pytest

import codebind_jax
from codebind_jax import search
from codebind_jax.search import Index

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
  monkeypatch.setattr(search, "_BLOCK", 1000)  # several blocks of queries
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


def test_without_faiss_numpy_searches(monkeypatch):
  monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)
  assert Index().backend == "numpy"
  with pytest.raises(ValueError, match="'faiss' is not installed"):
    Index(backend="faiss")


def test_the_package_gives_the_index_without_loading_faiss():
  assert codebind_jax.search.Index is Index
  code = "import sys, codebind_jax as c; a = 'pyarrow' in sys.modules; c.search.Index; print(a, 'faiss' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
  assert done.stdout.split() == ["False", "False"]

"""Flipped bits in every file of what a run reads and writes: each is refused by name, or changes nothing that is read.

The slow form prints how many were refused of each kind of folder, which SECURITY.md quotes.
"""

import contextlib
import shutil
import sys

import numpy as np
import pytest

import codebind_jax
from codebind_jax import files
from codebind_jax.compare import cost
from codebind_jax.compare import runs as runs_lib
from codebind_jax.compare.table import write_comparison
from codebind_jax.data import index_cache, opening, shards
from codebind_jax.data.task import EvalSet
from codebind_jax.embedding import shards as embedded
from codebind_jax.evaluators.answers import Answers
from codebind_jax.report import answers as answers_lib
from codebind_jax.runtime.checkpoint import SavedRun
from codebind_jax.runtime.checkpoint_files import versions_of
from codebind_jax.runtime.metrics import read_metrics
from codebind_jax.saving import folder as saved_folder
from codebind_jax.search import Index
from codebind_jax.train import read_config
from codebind_jax.trunks.cache import Contents, TokenCache
from tests.damage import survey
from tests.test_compare_claims import WORLD, result
from tests.test_features import Images, mean_trunk, tokens_at
from tests.test_tables import read_job, summarise, write_job
from tests.train_fixtures import write_manifest
from tests.world_fixtures import read_world, small_world

# What people look at; checkpoints have Orbax's marks beside their checksums, which give no value.
PRODUCTS = (".html", ".md", ".svg", ".csv", ".lock", "commit_success.txt", "_CHECKPOINT_METADATA", ".vm.0000")
FEW, MANY = 3, 200
COUNTS = [FEW, pytest.param(MANY, marks=pytest.mark.slow)]


@pytest.fixture
def told(capsys):
  """Prints what a survey has found, of the slow form."""

  def tell(kind, found, count):
    noticed, unchanged = (sum(pair[n] for pair in found.values()) for n in range(2))
    if count > FEW:
      with capsys.disabled():
        sys.stdout.write(f"\n{kind}: {len(found)} files, {noticed + unchanged} bits flipped, {noticed} refused by "
                         f"name, {unchanged} changed no value, 0 changed one in silence\n")  # fmt: skip
    return noticed, unchanged

  return tell


def read_run(folder):
  """All that is read of a run."""
  with contextlib.closing(SavedRun(folder)) as run:
    meta, arrays = run.read(("params", "codebooks"))
  versions = versions_of(folder)
  if versions[0]["version"] == "unknown":
    raise ValueError("versions.json")
  return {"meta": meta, "arrays": arrays, "config": read_config(folder), "metrics": read_metrics(folder),
          "versions": versions, "answers": answers_lib.read_predictions(folder / "predictions.jsonl")}  # fmt: skip


def write_answers(folder):
  """Answers of an evaluation, beside a run."""
  found = np.array([[0, 1], [1, 0]])
  one = Answers("zeroshot/image", "image", ["a", "b"], [], ["red", "blue"], found, ["red", "blue"],
                np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([[True, False], [True, False]]))  # fmt: skip
  test = EvalSet("mine", "mine", "test", write_source(folder.parent), ())
  answers_lib.write_answers(folder, "zeroshot", [test], [(test, one)])


def write_source(folder):
  return opening.open_source(write_manifest(folder / "squares", 1))


@pytest.mark.parametrize("count", [1, pytest.param(MANY // 4, marks=pytest.mark.slow)])
def test_a_finished_run(whole_run, tmp_path, told, count):
  folder = shutil.copytree(whole_run[0], tmp_path / "run")
  write_answers(folder)
  shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # TensorBoard's own checksums
  steps = sorted((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
  for older in steps[:-1]:  # readers would take these, and say so
    shutil.rmtree(older)
  named = lambda path: path.name if steps[-1] not in path.parents else f"checkpoint {steps[-1]} cannot be read"
  found = survey(folder, lambda: read_run(folder), count, products=PRODUCTS, named=named)
  assert {"config.json", "metrics.jsonl", "predictions.jsonl", "versions.json"} <= found.keys()
  noticed, unchanged = told("a run", found, count)
  assert noticed > unchanged


@pytest.mark.parametrize("count", [2, pytest.param(MANY // 4, marks=pytest.mark.slow)])
def test_a_saved_model(whole_run, tmp_path, told, count):
  folder = codebind_jax.load(whole_run[0]).save(tmp_path / "model")

  def read():
    saved = saved_folder.read(folder)
    trunks = {modality: trunk.fingerprint for modality, trunk in saved.trunks.items()}
    return {"arrays": saved_folder.flat((saved.params, saved.codebooks)), "config": saved.config, "trunks": trunks}

  noticed, unchanged = told("a saved model", survey(folder, read, count, products=PRODUCTS), count)
  assert noticed > unchanged


@pytest.mark.parametrize("count", COUNTS)
def test_shards_of_embeddings_and_an_index(tmp_path, told, count):
  folder = tmp_path / "job"
  folder.mkdir()
  write_job(folder, 2)
  summarise(folder, 2)
  (tmp_path / "index").mkdir()
  index = Index("numpy")
  index.add([f"k{n}" for n in range(40)], np.random.default_rng(0).standard_normal((40, 8)))
  index.save(tmp_path / "index" / "index.parquet")

  def read():
    for number in range(2):
      embedded.verify_shard(embedded.shard_path(folder, number, 2))
    return read_job(folder)

  def read_index():
    there = Index.load(tmp_path / "index" / "index.parquet", "numpy")
    return {"ids": there._ids, "vectors": list(there._store.blocks())}

  for kind, where, reader in (("embeddings", folder, read), ("an index", tmp_path / "index", read_index)):
    noticed, _ = told(kind, survey(where, reader, count), count)
    assert noticed


@pytest.mark.parametrize("count", COUNTS)
def test_a_built_world(tmp_path, told, count):
  folder = small_world(tmp_path)
  named = lambda path: path.name if path.suffix == ".json" else str(folder)
  found = survey(folder, lambda: read_world(folder), count, products=PRODUCTS, named=named)
  assert {"manifest.json", "index.json", "dataset_info.json", "features.json"} <= found.keys() and len(found) == 6
  noticed, _ = told("a world", found, count)
  assert noticed


@pytest.mark.parametrize("count", COUNTS)
def test_shards_of_records(tmp_path, told, count):
  source, folder = write_source(tmp_path), tmp_path / "shards"
  shards.write_all(shards.Job.of(source, shards.make_plan(source, 4_000, check="none"), folder))

  def read():
    with contextlib.closing(opening.open_source(f"{folder}/*.array_record")) as there:
      rows = [(there.fields(n), there.content_hash(n, "image")) for n in range(len(there))]
    return {"rows": rows, "plan": shards.read_plan(folder), "about": files.read_sealed(folder / shards.SUMMARY)}

  noticed, _ = told("shards of records", survey(folder, read, count), count)
  assert noticed


@pytest.mark.parametrize("count", COUNTS)
def test_caches_of_tokens_of_hashes_and_of_indices(tmp_path, told, monkeypatch, count):
  """Damaged keys, hashes and indices are made anew; damaged tokens are refused by name."""
  images, folder = Images(10), tmp_path / "features"
  TokenCache(folder, mean_trunk()).fill(images.keys, images)
  kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
  remembered, identities = tmp_path / "hashes", [f"file {n}" for n in range(50)]
  hashes = lambda: Contents(remembered / "contents.sqlite").hashes(identities, lambda n: f"{n:064x}")
  hashes()
  monkeypatch.setattr(index_cache, "SMALLEST", 0)
  manifest, root = write_manifest(tmp_path / "squares", 1), tmp_path / "root"
  trunk = mean_trunk()

  def tokens():
    for path in [path for path in folder.rglob("*") if path.is_file() and path not in kept]:
      path.unlink()  # what the reading before has computed again
    cache = TokenCache(folder, trunk)
    try:
      return tokens_at(cache, cache.fill(images.keys, images)[0])
    finally:
      cache.reader.close()

  def index():
    source = opening.open_source(manifest, data_dir=root)
    return source.fingerprint(), [source.fields(n) for n in range(len(source))]

  index()
  for kind, where, read in (("tokens", folder, tokens), ("hashes", remembered, hashes), ("indices", root, index)):
    told(kind, survey(where, read, count), count)


@pytest.mark.parametrize("count", COUNTS)
def test_a_comparison(tmp_path, told, count):
  settings = {"world": WORLD, "learning_rates": [1e-3], "seeds": 3}
  config = {"compare": settings, "steps": 7, "batch_size": 9, "stages": {"bind": {"sources": {"w": 4}}}}
  results = {"fixed_anchor_audio": result(40), "fixed_anchor_image": result(60)}
  write_comparison(tmp_path, {"summary": "a world", "config": config, "results": results})
  files.write_sealed(tmp_path / cost.FILE, {"examples_per_second": {"a": 77.4}, "load": 0.5})
  files.write_sealed(tmp_path / runs_lib.RESULT, {"metrics": {"eval/test/label/all": 40.5}, "probe": {}})
  read = lambda: {path.name: files.read_sealed(path) for path in tmp_path.glob("*.json")}
  noticed, unchanged = told("a comparison", survey(tmp_path, read, count, products=PRODUCTS), count)
  assert noticed > unchanged

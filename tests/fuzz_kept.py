"""Readers of what this package writes (runs, models, checkpoints, shards, indices, worlds), for `tests.fuzz`.

Most of these files carry checksums, which refuse whatever an accident changes. Whoever means to deceive writes
checksums of his own: the readers whose name ends in "sealed" get mutants with right ones.
"""

import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import shutil
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from codebind_jax import api, files, search, train
from codebind_jax import config as config_lib
from codebind_jax.data import shards as data_shards
from codebind_jax.data.formats import tfds as format_tfds
from codebind_jax.data.worlds import store
from codebind_jax.data.worlds.source import WorldSource
from codebind_jax.embedding import shards
from codebind_jax.runtime import checkpoint, checkpoint_files
from codebind_jax.runtime.far_checkpoint import FarCheckpoints
from codebind_jax.runtime.metrics import read_metrics
from tests.fuzz import Reader, json_mutant

VECTORS = np.array([[1, 0, 0], [0, 1, 0], [0, 0.6, 0.8], [-1, 0, 0]], np.float32)


def written(write, name):
  """The bytes of a file that a function writes."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / name
    write(path)
    return path.read_bytes()


@functools.cache
def _template(make):
  """A folder that a function fills, once a process; its owner removes it."""
  folder = tempfile.TemporaryDirectory()
  make(pathlib.Path(folder.name))
  return folder


def beside(path, make, name):
  """Puts a good folder's files around a file, once, and the file where it belongs in it; gives the folder."""
  folder = path.parent / "whole"
  if not folder.exists():
    shutil.copytree(_template(make).name, folder)
  (folder / name).write_bytes(path.read_bytes())
  return folder


def member(make, name):
  """A seed: a file of a good folder."""
  return lambda: [(pathlib.Path(_template(make).name) / name).read_bytes()]


def sealed(read):
  """A reader of JSON objects whose checksum is right."""

  def resealed(path):
    with contextlib.suppress(ValueError, RecursionError):
      content = json.loads(path.read_bytes())
      if isinstance(content, dict):
        path.write_text(json.dumps(files.sealed(content)))
    return read(path)

  return resealed


# --- runs and models


def small_config():
  tower = {"trunk": "vectors", "options": {"width": 6}, "cache": False}
  return config_lib.read({
    "model": {"shared_dim": 8, "towers": {"image": tower | {"specific_dim": 4}, "text": tower}},
    "stages": {"bind": {"steps": 1, "batch_size": 4}}, "stage_order": ("bind",),
    "codebook": {"dim": 4, "shared_codes": 8, "codes": {"image": 8}}, "data": {"manifest": "/nowhere.jsonl"},
  })  # fmt: skip


def metrics():
  rows = [{"step": i, "stage": "s", "train/loss": 1 / i, "val/bad": None, "warning": "w\u00e9"} for i in range(1, 5)]
  return ["".join(json.dumps(row) + "\n" for row in rows).encode(), json.dumps(rows[0]).encode()]


def read_line(path):
  """A whole line."""
  path.write_bytes(path.read_bytes() + b"\n")
  return read_metrics(path)


def read_run(path):
  """Opens a run's folder in which steps were made."""
  path.with_name("metrics.jsonl").write_text('{"step": 1, "stage": "s"}\n')
  train.open_run(small_config(), path.parent)


def run_config():
  from codebind_jax import schema

  return json.dumps(schema.to_plain(small_config()), indent=1).encode()


def saved_model(folder):
  import jax

  from codebind_jax.methods.base import make_init
  from codebind_jax.trunks import input_shapes, load_trunk

  config = small_config()
  trunks = {m: load_trunk(tower.trunk, **tower.options) for m, tower in config.model.towers.items()}
  init = make_init(config_lib.method_of(config), input_shapes(config.model, trunks), ())
  params, codebooks, _ = jax.jit(init)(jax.random.key(3))
  api.Model(config, params, codebooks, trunks).save(folder / "model")


def read_model(path):
  return api.load(beside(path, saved_model, f"model/{path.name}") / "model")


# --- checkpoints


def checkpoints(folder):
  import jax
  import jax.numpy as jnp

  state = {"params": {"a": jnp.ones((6, 5)), "none": {}}, "codebooks": {"n": jnp.int32(3)}, "rng": jax.random.key(7)}
  saver = checkpoint.Checkpoints(folder)
  saver.save(checkpoint.Position(2, "s", False, ("a",)), state, {"x": 1}, {"key": 1})
  saver.close()


def read_meta(name, seal):
  """A run with one checkpoint, a file of which is damaged; the checksums are right where `seal`."""

  def read(path):
    folder = beside(path, checkpoints, name)
    at = folder / "checkpoints" / "2"
    if seal:
      checkpoint_files.write_checksums(at, ("state", "meta"))
    saved = checkpoint.SavedRun(folder)
    try:
      return saved.read_meta()
    finally:
      saved.close()

  return read


def read_checksums(path):
  return read_meta("checkpoints/2/checksums.json", False)(path)


def read_versions(path):
  return checkpoint_files.versions_of(path.parent)


def versions():
  return json.dumps([{"version": "0.1.0", "source": "abc", "step": 3}, {"version": "0.1.1", "step": 9}]).encode()


def far_checkpoint(folder):
  """What a far disk would hold."""
  import jax.numpy as jnp

  saver = FarCheckpoints(folder / "checkpoints", keep=2)
  saver._mark = "00000000"
  (folder / "checkpoints" / "2").mkdir(parents=True)
  meta = {"position": {"step": 2, "stage": "s", "done": False, "trained": ["a"]}, "config": {}, "fingerprint": {}}
  upload, files.upload = files.upload, shutil.copy
  try:
    saver.save(2, {"params": {"a": jnp.ones((6, 5)), "b": {}}, "codebooks": {"n": jnp.int32(3)}}, meta, lambda: None)
    saver.close()
  finally:
    files.upload = upload


def read_far(path):
  """The meta and all arrays of a far checkpoint whose files lie here."""
  folder = beside(path, far_checkpoint, f"checkpoints/2/{path.name}")
  saved = checkpoint.SavedRun(folder)
  saved._store = FarCheckpoints(folder / "checkpoints", keep=2)
  try:
    return saved.read(), saved._store.kinds(2)
  finally:
    saved.close()


# --- embeddings and indices


def index_file():
  index = search.Index("numpy")
  index.add(["a", "b", "\u00e7", "d"], VECTORS)
  return written(index.save, "i.parquet")


def other_index():
  """By another program."""
  ids, vectors = pa.array([3, 1, 2, 0]), pa.array(VECTORS.tolist(), pa.list_(pa.float32()))
  out = io.BytesIO()
  pq.write_table(pa.table([ids, vectors], ["id", "vector"]), out)
  return out.getvalue()


SHARD = "shard-000000-of-000001.parquet"


def shard():
  schema = shards.make_schema(["image_shared", "image_codes_shared"], "float32", captions=True)
  texts, vectors = shards.nested([["x"], None, [], ["x", "y"]], {"x": VECTORS[0], "y": VECTORS[1]}, np.float32)
  columns = [
    pa.array(["a", "b", "c", "d"]), pa.array(["l", None, "l", "m"]), pa.array(["train"] * 4),
    shards.with_nulls(VECTORS[:3], [0, 1, 3], 4, np.float32),
    shards.with_nulls(np.arange(6).reshape(3, 2), [0, 1, 3], 4, np.int32), texts, vectors]  # fmt: skip
  report = shards.ShardReport("digest", 1, 4, ["bad"], {"audio": 1}, {"image_codes_shared": 8})
  batches = [pa.RecordBatch.from_arrays(columns, schema=schema)]
  return written(lambda path: shards.write_shard(path, schema, batches, report), SHARD)


def read_shard(path):
  shards.read_report(path)
  for column in ("image_shared", "image_codes_shared"):
    list(shards.read_column(path.parent, column))


def read_summary(path):
  path.with_name(SHARD).write_bytes(shard())
  list(shards.read_column(path.parent, "image_shared"))


def plan():
  part = data_shards.Part(*range(1, 1 + len(dataclasses.fields(data_shards.Part))))
  return data_shards.Plan("data", "", 1000, (3,), (part, part)).text().encode()


def read_plan(path):
  data_shards.read_plan(path.parent)


def summary():
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / SHARD
    path.write_bytes(shard())
    rows = [{"file": SHARD, "rows": 4, "checksum": shards.read_report(path).checksum}]
  return json.dumps(files.sealed({"shards": rows})).encode()


# --- worlds and sets of TensorFlow Datasets


def world(folder):
  rows = [{"id": f"r{i}", "texts": ["a dog"], "label": "dog", "has": ["image"], "part": 1.5} for i in range(3)]
  content = json.dumps({"train": rows, "test": rows[:1]}).encode()
  (folder / "index.json").write_bytes(content)
  manifest = {"tables": {}, "modalities": ["image"], "index": files.checksum(content), "counts": {"train": 3}}
  (folder / "manifest.json").write_text(json.dumps(files.sealed(manifest)))


def open_world(folder):
  if store.read_manifest(folder) is not None:
    for split in ("train", "test"):
      source = WorldSource(folder, split)
      for row in range(len(source)):
        source.fields(row)


def read_world(path):
  open_world(beside(path, world, path.name))


def read_world_index(path):
  """An index whose manifest knows of it."""
  folder = beside(path, world, path.name)
  manifest = {"tables": {}, "modalities": ["image"], "index": files.file_checksum(folder / "index.json")}
  files.write_sealed(folder / "manifest.json", manifest)
  open_world(folder)


def tfds_set(folder):
  import tensorflow_datasets as tfds

  from tests.test_formats_tfds import Tiny

  with store._quiet(tfds.core.utils.tqdm_utils):
    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()


TFDS = "tiny/1.0.0"


def read_tfds(path):
  folder = beside(path, tfds_set, f"{TFDS}/{path.name}") / TFDS
  try:
    sources = format_tfds.open_files([pathlib.PurePath(f"tfds:{folder}")])
  except ImportError as error:  # of TensorFlow, which some features need
    raise ValueError(str(error)) from error
  for source in sources:
    try:
      for row in range(len(source)):
        source.fields(row)
        for modality in ("image", "depth"):
          if modality in source.modalities and source.has(row, modality):
            source.read(row, modality)
    finally:
      source.close()


def _json(read, seeds, name, called=""):
  return Reader(read, seeds, name, called, json_mutant)


_OF_MODEL = member(saved_model, "model/config.json")
_OF_SUMS, _OF_META = (member(checkpoints, f"checkpoints/2/{name}") for name in ("checksums.json", "meta/metadata"))
_PART = "part-00000-of-00001-00000000.json"
_OF_COMMIT, _OF_PART = (member(far_checkpoint, f"checkpoints/2/{name}") for name in ("commit.json", _PART))
_META = "checkpoints/2/meta/metadata"
_RECORDS = "tiny-train.array_record-00000-of-00001"

READERS = {
  "run config": _json(read_run, lambda: [run_config()], "config.json", "run config"),
  "metrics": Reader(read_metrics, metrics, "metrics.jsonl"),
  "metrics line": _json(read_line, lambda: metrics()[1:], "metrics.jsonl"),
  "model config": _json(read_model, _OF_MODEL, "config.json", "model config"),
  "model config sealed": _json(sealed(read_model), _OF_MODEL, "config.json", "model config"),
  "checkpoint sums": _json(read_checksums, _OF_SUMS, "checksums.json", "checkpoint sums"),
  "checkpoint sums sealed": _json(sealed(read_checksums), _OF_SUMS, "checksums.json", "checkpoint sums"),
  "checkpoint meta": _json(read_meta(_META, False), _OF_META, "metadata", "checkpoint meta"),
  "checkpoint meta sealed": _json(read_meta(_META, True), _OF_META, "metadata", "checkpoint meta"),
  "versions": _json(read_versions, lambda: [versions()], "versions.json"),
  "far commit": _json(read_far, _OF_COMMIT, "commit.json", "far commit"),
  "far commit sealed": _json(sealed(read_far), _OF_COMMIT, "commit.json", "far commit"),
  "far part": _json(read_far, _OF_PART, _PART, "far part"),
  "far part sealed": _json(sealed(read_far), _OF_PART, _PART, "far part"),
  "index": Reader(search.Index.load, lambda: [index_file(), other_index()], "i.parquet"),
  "shard": Reader(read_shard, lambda: [shard()], SHARD),
  "summary": _json(read_summary, lambda: [summary()], "summary.json"),
  "summary sealed": _json(sealed(read_summary), lambda: [summary()], "summary.json", "summary sealed"),
  "plan of shards": _json(read_plan, lambda: [plan()], data_shards.PLAN),
  "world manifest": _json(read_world, member(world, "manifest.json"), "manifest.json", "world manifest"),
  "world manifest sealed": _json(sealed(read_world), member(world, "manifest.json"), "manifest.json", "world manifest"),
  "world index": _json(read_world, member(world, "index.json"), "index.json", "world index"),
  "world index sealed": _json(read_world_index, member(world, "index.json"), "index.json", "world index"),
  "tfds info": _json(read_tfds, member(tfds_set, f"{TFDS}/dataset_info.json"), "dataset_info.json", "tfds"),
  "tfds features": _json(read_tfds, member(tfds_set, f"{TFDS}/features.json"), "features.json", "tfds"),
  "tfds records": Reader(read_tfds, member(tfds_set, f"{TFDS}/{_RECORDS}"), _RECORDS, "tfds"),
}  # fmt: skip

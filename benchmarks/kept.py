"""What checksums cost a save and a load of what is kept: a model's arrays, shards of embeddings, an index.

Run: python -m benchmarks.kept [--megabytes=256] [--repeats=7] [--folder=DIR]
With and without checksums in turn: without, the CRC is a constant, so that the same code runs and computes none.
Seconds are medians; the share is that of checksums in the time with them, a median of pairs.
"""

import contextlib
import pathlib
import shutil
import statistics
import tempfile
import time
import types

import jax
import numpy as np
import pyarrow as pa
from absl import app, flags, logging

from benchmarks.machine import describe
from codebind_jax.embedding import shards
from codebind_jax.files import checksums
from codebind_jax.saving import folder as saved
from codebind_jax.search import Index
from codebind_jax.trunks.checkpoint_files import open_weights, write_safetensors

_MEGABYTES = flags.DEFINE_integer("megabytes", 256, "Size of each.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Saves and loads each way.")
_FOLDER = flags.DEFINE_string("folder", None, "On the disk to measure; a temporary one unless given.")
_WIDTH, _ROWS = 512, 16_384


@contextlib.contextmanager
def without_checksums():
  """The same code, whose CRC takes no time."""
  kept, checksums.zlib = checksums.zlib, types.SimpleNamespace(crc32=lambda *_: 0)
  try:
    yield
  finally:
    checksums.zlib = kept


def model(megabytes):
  """(save, load) of arrays of 16 MiB."""
  rng = np.random.default_rng(0)
  arrays = {f"a{n}": rng.standard_normal((1024, 4096), np.float32) for n in range(max(1, megabytes // 16))}
  shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
  sums = {}

  def save(path):
    sums.update(write_safetensors(path, arrays, {}))

  def load(path):
    jax.block_until_ready(saved._arrays(open_weights(path), shapes, sums, True))

  return save, load


def embeddings(megabytes):
  """(save, load) of one shard of unit vectors in float16."""
  batches, schema = [], shards.make_schema(["image_shared"], "float16")
  for number in range(max(1, megabytes * 1_000_000 // (2 * _WIDTH * _ROWS))):
    vectors = _vectors(number)
    columns = [pa.array([f"{number}-{n}" for n in range(_ROWS)]), *[pa.array([None] * _ROWS, pa.string())] * 2]
    columns.append(shards.with_nulls(vectors, range(_ROWS), _ROWS, np.float16))
    batches.append(pa.RecordBatch.from_arrays(columns, schema=schema))
  report = shards.ShardReport("digest", 1, _ROWS * len(batches))
  save = lambda path: shards.write_shard(path, schema, batches, report)
  return save, lambda path: shards.verify_shard(path)


def index(megabytes):
  """(save, load) of an index."""
  made = Index("numpy")
  for number in range(max(1, megabytes * 1_000_000 // (4 * _WIDTH * _ROWS))):
    made.add([f"{number}-{n}" for n in range(_ROWS)], _vectors(number))
  return made.save, lambda path: Index.load(path, "numpy")


def _vectors(seed):
  vectors = np.random.default_rng(seed).standard_normal((_ROWS, _WIDTH), np.float32)
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def timed(act, *rest):
  begun = time.perf_counter(), time.process_time()
  act(*rest)
  return time.perf_counter() - begun[0], time.process_time() - begun[1]


def main(_):
  logging.set_verbosity(logging.ERROR)
  describe()
  scratch = pathlib.Path(tempfile.mkdtemp(dir=_FOLDER.value))
  for make in (model, embeddings, index):
    save, load = make(_MEGABYTES.value)
    found = {True: [], False: []}
    for _ in range(_REPEATS.value + 1):
      for with_them, context in ((True, contextlib.nullcontext), (False, without_checksums)):
        path = scratch / (f"{make.__name__}.safetensors" if make is model else f"{make.__name__}.parquet")
        with context():
          found[with_them].append((timed(save, path), timed(load, path)))
        path.unlink()
    for number, what in enumerate(("save", "load")):
      for way, clock in enumerate(("wall", "processor")):
        ours, bare = ([one[number][way] for one in found[kind][1:]] for kind in (True, False))
        share = statistics.median(1 - b / a for a, b in zip(ours, bare))
        print(f"{what} of {_MEGABYTES.value} MB, {make.__name__}: {statistics.median(ours):.3f} s {clock} with, "
              f"{statistics.median(bare):.3f} s without checksums: {100 * share:.1f} %")  # fmt: skip
  shutil.rmtree(scratch)


if __name__ == "__main__":
  app.run(main)

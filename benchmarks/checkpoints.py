"""What checksums cost a save and a load of a checkpoint, and what either took compressed, as Orbax does by default.

Run: python -m benchmarks.checkpoints [--megabytes=512] [--repeats=7]
All ways run in turn; seconds are medians. A save is timed until it is on disk, of which a run waits for the copy alone.
"""

import contextlib
import pathlib
import shutil
import statistics
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags, logging

from codebind_jax.runtime import near_checkpoint
from codebind_jax.runtime.checkpoint import Checkpoints, Position

_MEGABYTES = flags.DEFINE_integer("megabytes", 512, "Size of the state.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Saves and loads each way.")
_FOLDER = flags.DEFINE_string("folder", None, "On the disk to measure; a temporary one unless given.")
WAYS = ("as it is", "without checksums", "compressed, without checksums")


@contextlib.contextmanager
def without_checksums():
  """The same code with nothing to write and to compare."""
  kept = near_checkpoint.write_checksums, near_checkpoint.verify_checksums
  near_checkpoint.write_checksums = near_checkpoint.verify_checksums = lambda *_, **__: None
  try:
    yield
  finally:
    near_checkpoint.write_checksums, near_checkpoint.verify_checksums = kept


@contextlib.contextmanager
def compressed():
  made = ocp.PyTreeCheckpointHandler
  ocp.PyTreeCheckpointHandler = lambda **options: made(**options | {"use_compression": True})
  try:
    with without_checksums():
      yield
  finally:
    ocp.PyTreeCheckpointHandler = made


def seconds(folder, state, target):
  """Of a save and of a load."""
  store = Checkpoints(folder)
  store.save(Position(1, "s", False), {"x": state["a0"]}, {}, {})  # threads and folders are there
  store.wait()
  begun = time.perf_counter()
  store.save(Position(2, "s", False), state, {}, {})
  store.wait()
  saved = time.perf_counter() - begun
  begun = time.perf_counter()
  jax.block_until_ready(store.restore(lambda at: target))
  loaded = time.perf_counter() - begun
  store.close()
  return saved, loaded


def main(_):
  logging.set_verbosity(logging.ERROR)
  count = max(1, _MEGABYTES.value >> 4)
  state = {f"a{i}": jax.random.normal(jax.random.key(i), (1024, 4096)) for i in range(count)}
  placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), state)
  found = {way: [] for way in WAYS}
  for _ in range(_REPEATS.value + 1):
    for way, context in zip(WAYS, (contextlib.nullcontext, without_checksums, compressed)):
      scratch = pathlib.Path(tempfile.mkdtemp(dir=_FOLDER.value))
      with context():
        found[way].append(seconds(scratch, state, target))
      shutil.rmtree(scratch)
  for number, what in enumerate(("save", "load")):
    base = np.array([one[number] for one in found[WAYS[0]][1:]])
    for way in WAYS:
      own = np.array([one[number] for one in found[way][1:]])
      print(f"{what} of {16 * count} MiB, {way}: {statistics.median(own):.3f} s, "
            f"{statistics.median(base / own):.3f} is what ours takes of it")  # fmt: skip


if __name__ == "__main__":
  app.run(main)

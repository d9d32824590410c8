"""Seconds and memory until the first batch of a large JSONL, and reads in flight where each one waits for a far disk.

Run: python -m benchmarks.records [--records=10000,1000000,10000000] [--wait=0.05]
Memory is that of a process beyond the same process with a file of one record: what is its own, without the pages of
the kept index that the system can drop and that workers share. Every case is a new process.
"""

import contextlib
import hashlib
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from benchmarks import machine

_RECORDS = flags.DEFINE_list("records", ["10000", "1000000"], "Records of the files.")
_WAIT = flags.DEFINE_float("wait", 0.05, "Seconds that a read of the far disk takes.")
_IDS = 16


def hashed(text):
  """Ids of a text without a tokenizer."""
  return np.frombuffer(hashlib.shake_128(text.encode()).digest(4 * _IDS), np.int32)


def memory(pid="self"):
  """Megabytes of a process that no file holds."""
  with open(f"/proc/{pid}/status") as file:
    found = dict(line.split(":", 1) for line in file)
  return (int(found["RssAnon"].split()[0]) + int(found["RssShmem"].split()[0])) / 1e3


def peak():
  """Megabytes of this process at most, pages of files included."""
  with open("/proc/self/status") as file:
    return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1e3


def batches_of(path, rows=256):
  """Batches of the texts of a file."""
  from codebind_jax.data.batches import Batches, SourceBatches
  from codebind_jax.data.examples import Texts
  from codebind_jax.data.inputs import Input
  from codebind_jax.data.opening import open_source

  source = open_source(path, data_dir=pathlib.Path(path).parent)
  feeds = {"text": Texts(source, Input((_IDS,), "int32", hashed))}
  return Batches({"lines": SourceBatches(source, feeds, rows=min(rows, len(source)), seed=0, name="lines")})


def first_batch(path, workers):
  """A process that opens a file and reads the first batch: prints seconds and megabytes."""
  import multiprocessing

  from codebind_jax.data import opening

  opening.format_of(path)  # imports all formats before the clock starts
  start = time.perf_counter()
  batches = batches_of(path)
  opened = time.perf_counter() - start
  with contextlib.closing(batches.start(workers=workers)) as following:
    next(following)
    seconds = time.perf_counter() - start
    of_workers = [memory(child.pid) for child in multiprocessing.active_children()]
    print(json.dumps([opened, seconds, memory(), peak(), max(of_workers, default=0)]))


def case(path, workers):
  """What `first_batch` finds in a new process."""
  line = [sys.executable, "-m", "benchmarks.records", str(path), str(workers)]
  return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


class Far:
  """A feed each of whose reads waits, as one of a bucket does."""

  shape, dtype, fingerprint = (16,), "int32", ""

  def __init__(self, wait):
    self.wait = wait

  def has(self, row):
    return True

  def draw(self, row, rng):
    time.sleep(self.wait)
    return np.full(self.shape, row, np.int32), 64


def far(source, threads, workers, rows=256, timed=8):
  """Reads a second with so many threads and workers."""
  from codebind_jax.data.batches import Batches, SourceBatches

  batches = Batches({"far": SourceBatches(source, {"item": Far(_WAIT.value)}, rows=rows, seed=0, name="far")})
  with contextlib.closing(batches.start(threads=threads, workers=workers)) as following:
    for _ in itertools.islice(following, 2 * max(workers, 2) + 1):
      pass  # what was read while the first batch was waited for
    start = time.perf_counter()
    for _ in itertools.islice(following, timed):
      pass
    return rows * timed / (time.perf_counter() - start)


def main(argv):
  if len(argv) > 1:
    first_batch(pathlib.Path(argv[1]), int(argv[2]))
    return
  machine.describe()
  with tempfile.TemporaryDirectory() as name:
    folder, found = pathlib.Path(name), {}
    for count in (1, *map(int, _RECORDS.value)):
      path = folder / f"{count}.jsonl"
      with open(path, "w") as file:
        for n in range(count):
          file.write(f'{{"id": "r{n:08d}", "text": "a photo of thing {n % 977} and {n}"}}\n')
      for again in ("", ", again"):
        for workers in (0, 2):
          if count > 1 or not again:
            found[count, again, workers] = case(path, workers)
      for (n, again, workers), (opened, seconds, own, most, of_worker) in found.items():
        if n == count and count > 1:
          base = found[1, "", workers]
          print(f"{n:>11,} records{again}, {workers} workers: open {opened:.2f} s, first batch {seconds:.2f} s (of one "
                f"record {base[1]:.2f} s), own memory {own - base[2]:+,.0f} MB, peak with files' pages "
                f"{most - base[3]:+,.0f} MB, a worker {of_worker - base[4]:+,.0f} MB", flush=True)  # fmt: skip
      path.unlink() if count > 1 else None
    sizes = sorted({n for n, *_ in found})[-2:]
    own = [found[size, ", again", 0][2] for size in sizes]
    per = (own[1] - own[0]) / (sizes[1] - sizes[0])
    print(f"own memory a record {1e6 * per:.1f} bytes; at 1e8 records {1e8 * per / 1e3:.1f} GB, at 1e9 "
          f"{1e9 * per / 1e3:.1f} GB, beside 37 bytes a record of memory-mapped index")  # fmt: skip
    from codebind_jax.data.opening import open_source

    path = folder / "far.jsonl"
    path.write_text("".join(f'{{"id": "{n}", "text": "t"}}\n' for n in range(8192)))
    source = open_source(path, data_dir=folder)
    print(f"a read waits {_WAIT.value} s, batches of 256:")
    for threads, workers in ((4, 0), (16, 0), (64, 0), (64, 2)):
      rate = far(source, threads, workers)
      print(f"  threads {threads}, workers {workers}: {rate:6.0f} reads/s, {rate * _WAIT.value:5.1f} in flight")


if __name__ == "__main__":
  app.run(main)

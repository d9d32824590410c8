"""Readers of foreign files under damage: files that are flipped, cut, repeated, swapped, and whose numbers are others.

`python -m tests.fuzz [--count=N] [--start=N] [READER ...]` reads mutants of every reader's seeds in one process with a
gigabyte more than it had, and writes a line of JSON for each reader. A mutant is made of its reader's name and number
alone, so `--start=N --count=1 READER` makes one again. Whatever a reader raises but a ValueError that names the file is
a failure, as are memory that runs out or grows by a gigabyte, a crash, and a mutant that takes 20 s of the processor.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings

ROOM = 1 << 30  # bytes
SECONDS = 20
_NUMBERS = (0, 1, 2, 3, 7, 8, 16, 127, 128, 255, 256, 1000, 4096, 0x7FFF, 0x8000, 0xFFFF, 1 << 20, 1 << 24, 10**9,
            0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)  # fmt: skip
_WORDS = (b"0", b"1", b"-1", b"9" * 12, b"1e309", b"nan", b"{", b"}", b"[" * 30, b'"', b"\n", b"\0", b",", b"null",
          b"\\u0000", b"\\ud800", b"\xff\xfe", b"../", b"http://127.0.0.1:9/", b"/dev/zero")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reader:
  """A reader under test.

  Attributes:
    read: takes a file's path, or its bytes where `name` is "".
    seeds: makes whole files.
    name: of the file; "" where bytes are read.
    called: what errors call the bytes; of a file its path, unless given.
    mutate: makes a mutant of seeds and random numbers; `mutant` unless given.
  """

  read: object
  seeds: object
  name: str = ""
  called: str = ""
  mutate: object = None


def mutant(seeds, rng):
  """Bytes of one of the seeds after one to four changes."""
  content = bytearray(rng.choice(seeds))
  for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
    size = len(content)
    if not size:
      break
    # Headers are where numbers stand: half of the changes are within the first part of the file, or its last.
    zone = rng.random()
    at = rng.randrange(min(size, 128)) if zone < 0.4 else rng.randrange(size)
    at = max(0, size - 1 - at) if zone > 0.9 else at
    kind = rng.randrange(9)
    if kind == 0:
      content[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
      content[at] = rng.randrange(256)
    elif kind == 2:
      del content[at:]
    elif kind == 3:
      del content[at : at + rng.choice((1, 2, 4, 16, 100))]
    elif kind == 4:
      content[at:at] = bytes([rng.randrange(256)]) * rng.choice((1, 2, 4, 16, 1000))
    elif kind == 5:
      length = rng.choice((1, 4, 16, 64))
      other = rng.randrange(size)
      content[at : at + length], content[other : other + length] = (
        content[other : other + length], content[at : at + length])  # fmt: skip
    elif kind == 6:
      width = rng.choice((1, 2, 4, 4, 8))
      number = rng.choice(_NUMBERS) & ((1 << 8 * width) - 1)
      content[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
    elif kind == 7:
      content[at : at + rng.choice((0, 1, 2, 5))] = rng.choice(_WORDS)
    else:
      length = rng.choice((1, 8, 64, 512))
      content[at:at] = content[at : at + length] * rng.choice((1, 2, 20))
  return bytes(content)


_VALUES = (None, True, 0, 1, -1, 1.5, 1e308, float("nan"), 10**6, 10**12, 1 << 63, 10**30, "", "x", "../x", "/dev/zero",
           "\ud800", "\0", "1" * 300, "random", [], [1], [[]], ["x"], {}, {"a": 1}, {"": {}})  # fmt: skip


def json_mutant(seeds, rng):
  """A JSON text with one to three other values, fewer keys or more; or one of `mutant`."""
  if rng.random() < 0.3:
    return mutant(seeds, rng)
  try:
    return _changed(json.loads(rng.choice(seeds)), rng)
  except RecursionError:
    return b"[" * 5000


def _changed(content, rng):
  tree = [content]
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    places = list(_places(tree))
    holder, key = rng.choice(places)
    kind = rng.randrange(10)
    if kind == 0 and holder is not tree:
      del holder[key]
    elif kind == 1:
      other, name = rng.choice(places)
      holder[key] = copy.deepcopy(other[name])
    elif kind == 2:
      holder[key] = functools.reduce(lambda inner, _: [inner], range(rng.choice((1, 3, 500))), holder[key])
    elif kind == 3 and isinstance(holder, dict):
      holder[rng.choice(("", "x", "\ud800", "../x", "0", "__class__", "1" * 300))] = holder.pop(key)
    elif kind == 4 and isinstance(holder, list) and holder is not tree:
      holder += [copy.deepcopy(holder[key])] * rng.choice((1, 2, 1000))
    elif kind == 5 and isinstance(holder[key], int | float):
      number = holder[key]
      holder[key] = rng.choice((number * 10**6, -number, number + 1, float(number), str(number)))
    else:
      holder[key] = copy.deepcopy(rng.choice(_VALUES))
  return json.dumps(tree[0]).encode()


def _places(tree):
  """(holder, key) of every value in a tree but itself."""
  for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
    yield tree, key
    if isinstance(value, dict | list):
      yield from _places(value)


def number_of(name, number):
  """The random numbers of a mutant."""
  return random.Random(f"{name} {number}")


def _memory():
  with open("/proc/self/statm") as file:
    size, resident = map(int, file.read().split()[:2])
  return size * resource.getpagesize(), resident * resource.getpagesize()


def _cause(error):
  """What on the way to an error is none of the file's: that memory ran out, or a mistake of the program; "" if none."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    ours = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1:]
    ours = bool(ours) and "codebind_jax" in ours[0].f_code.co_filename
    # FFmpeg's error of this kind is one of sizes that it refuses; libraries may have mistakes of their own.
    ran_out = isinstance(error, MemoryError) and not type(error).__module__.startswith("av")
    if ran_out or isinstance(error, NameError) and ours:
      return f"{type(error).__name__}: {error}"
    error = error.__cause__ or error.__context__
  return ""


def fuzz(name, reader, start, count, folder, state):
  """Results of some mutants of one reader.

  Args:
    name: of the reader.
    reader: it.
    start, count: numbers of the mutants.
    folder: for files.
    state: open file that says what is being read.
  """
  seeds = reader.seeds()
  path = folder / reader.name if reader.name else None
  found = {"reader": name, "accepted": 0, "refused": 0, "failures": []}

  def read(content):
    if path is None:
      return reader.read(content)
    path.write_bytes(content)
    return reader.read(path)

  called = reader.called or str(path)
  for content in seeds:
    read(content)  # a seed is a good file
  begun = time.process_time()
  for number in range(start, start + count):
    content = (reader.mutate or mutant)(seeds, number_of(name, number))
    os.pwrite(state, f"{name} {number}".ljust(80).encode(), 0)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fault = ""
    try:
      read(content)
      found["accepted"] += 1
    except ValueError as error:
      found["refused"] += 1
      if cause := _cause(error):
        fault = f"{cause}; {error}"
      elif called not in str(error):
        fault = f"does not name the file: {type(error).__name__}: {error}"
    except ImportError:
      raise
    except BaseException as error:
      fault = f"{type(error).__name__}: {error}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    if grown >= ROOM:
      fault = f"took {grown >> 20} MB"
    if fault:
      found["failures"].append(f"{number}: {fault[:300]}")
  signal.setitimer(signal.ITIMER_PROF, 0)
  found["seconds"] = round(time.process_time() - begun, 2)
  return found


def main(arguments):
  """Fuzzes the readers named, each from `--start` on, `--count` mutants."""
  from absl import logging

  from tests import fuzz_readers

  logging.set_verbosity(logging.FATAL)
  warnings.simplefilter("ignore")
  options = dict(one.removeprefix("--").split("=") for one in arguments if one.startswith("--"))
  names = [one for one in arguments if not one.startswith("--")] or list(fuzz_readers.READERS)
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  with tempfile.TemporaryDirectory(dir=options.get("folder")) as folder:
    state = os.open(options["state"], os.O_RDWR | os.O_CREAT) if "state" in options else os.memfd_create("state")
    for name in names:
      reader = fuzz_readers.READERS[name]
      seeds = reader.seeds()
      place = pathlib.Path(folder) / "first"
      place.mkdir()
      if reader.name:
        (place / reader.name).write_bytes(seeds[0])
      reader.read(place / reader.name if reader.name else seeds[0])  # what is imported is no growth
      shutil.rmtree(place)
      signal.signal(signal.SIGPROF, signal.SIG_DFL)
      resource.setrlimit(resource.RLIMIT_AS, (_memory()[0] + ROOM, resource.RLIM_INFINITY))
      place = pathlib.Path(folder) / name
      place.mkdir()
      found = fuzz(name, reader, int(options.get("start", 0)), int(options.get("count", 2000)), place, state)
      resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
      sys.stdout.write(json.dumps(found) + "\n")
      sys.stdout.flush()
      shutil.rmtree(place, ignore_errors=True)


def run(names, count, folder):
  """Reader -> its results, of `main` in a process that is started again behind a mutant that ends it."""
  results, waiting, start = {}, list(names), 0
  partial = {}
  while waiting:
    state = folder / "state"
    state.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.fuzz", f"--count={count - start}", f"--start={start}", f"--state={state}"]
    command += waiting[:1] if start else waiting
    done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent.parent,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    for line in done.stdout.splitlines():
      with contextlib.suppress(ValueError):
        found = json.loads(line)
        earlier = partial.pop(found["reader"], [])
        results[found["reader"]] = found | {"failures": earlier + found["failures"]}
        waiting.remove(found["reader"])
        start = 0
    if done.returncode:
      if not state.exists():
        raise RuntimeError(done.stderr[-2000:])
      name, number = state.read_text().rsplit(None, 1)
      if done.returncode > 0:
        raise RuntimeError(f"{name} {number}: {done.stderr[-2000:]}")
      partial.setdefault(name, []).append(f"{number}: the process ends by {signal.Signals(-done.returncode).name}")
      waiting.remove(name)
      waiting.insert(0, name)
      start = int(number) + 1
      if start >= count or len(partial[name]) > 5:
        results[name] = {"reader": name, "failures": partial.pop(name)}
        waiting.remove(name)
        start = 0
  return results


if __name__ == "__main__":
  main(sys.argv[1:])

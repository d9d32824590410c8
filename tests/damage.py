"""Files with flipped bits, and whether what reads them notices."""

import pathlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np


def flipped(content: bytes, count: int | None, seed: int = 0) -> Iterator[bytes]:
  """The content with one bit flipped: at `count` places that are spread evenly, or of every byte one.

  Every second of a sample is in the last eighth, where footers are.
  """
  rng = np.random.default_rng(seed)
  places = range(len(content))
  if count is not None and count < len(content):
    spread, end = np.linspace(0, len(content) - 1, count - count // 2), 7 * len(content) // 8
    places = sorted({*spread.astype(int).tolist(), *rng.integers(end, len(content), count // 2).tolist()})
  for place in places:
    damaged = bytearray(content)
    damaged[place] ^= 1 << int(rng.integers(8))
    yield bytes(damaged)


def cuts(content: bytes, count: int = 8) -> Iterator[bytes]:
  """The content cut short."""
  for length in np.linspace(0, len(content) - 1, count).astype(int):
    yield content[:length]


def equal(a: Any, b: Any) -> bool:
  """Whether two trees of dicts, lists, arrays and plain values are the same, types of arrays included."""
  if isinstance(a, dict):
    return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
  if isinstance(a, list | tuple):
    return isinstance(b, list | tuple) and len(a) == len(b) and all(map(equal, a, b))
  if hasattr(a, "dtype"):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
  return bool(a == b)


def share_noticed(path: pathlib.Path, read: Callable[[], Any], count: int | None, whole: Any = None) -> float:
  """Damages a file, reads it each time, and puts it back.

  What is read is what it was before, or refused by a ValueError that names the file.

  Args:
    path: of the file.
    read: gives what it holds.
    count: flipped bits; None for one in every byte.
    whole: what it gives of the whole file; read first unless given.

  Returns:
    Share of the flipped bits that were refused; the others changed nothing.
  """
  content, noticed, total = path.read_bytes(), 0, 0
  whole = read() if whole is None else whole
  try:
    for damaged in flipped(content, count):
      path.write_bytes(damaged)
      total += 1
      try:
        found = read()
      except ValueError as error:
        assert path.name in str(error), f"{error} does not name {path.name}"
        noticed += 1
      else:
        place = next(n for n, (a, b) in enumerate(zip(content, damaged)) if a != b)
        assert equal(found, whole), f"a bit of byte {place} of {len(content)} of {path.name} changes what is read"
  finally:
    path.write_bytes(content)
  return noticed / total


def survey(
  folder: pathlib.Path, read: Callable[[], Any], count: int, seed: int = 0, products: Collection[str] = (),
  named: Callable[[pathlib.Path], str] = lambda path: path.name,
) -> dict[str, tuple[int, int]]:
  """Flips bits at seeded places of each file of a folder, one at a time, and reads the folder each time.

  What is read is what it was before, or refused by an error that names the file: nothing is changed in silence.

  Args:
    folder: whose files are put back.
    read: gives all that it holds.
    count: flipped bits a file.
    seed: of the places.
    products: names, or ends of them, of files that people look at and nothing here reads.
    named: what the error must have in it.

  Returns:
    Path in the folder -> (flips that were refused, flips that changed nothing).
  """
  whole, found = read(), {}
  for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
    if path.name.endswith(tuple(products)) or not path.stat().st_size:
      continue
    content, noticed = path.read_bytes(), 0
    rng = np.random.default_rng((seed, number))
    for place in rng.integers(0, len(content), count).tolist():
      damaged = bytearray(content)
      damaged[place] ^= 1 << int(rng.integers(8))
      path.write_bytes(damaged)
      try:
        there = read()
      except (ValueError, OSError) as error:
        assert named(path) in str(error), f"{error!r} does not name {path}"
        noticed += 1
      else:
        assert equal(there, whole), f"a bit of byte {place} of {len(content)} of {path} changes what is read"
      finally:
        path.write_bytes(content)
    found[path.relative_to(folder).as_posix()] = (noticed, count - noticed)
  return found

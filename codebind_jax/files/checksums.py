"""Checksums of what is kept, so that what is read is what was written.

CRC-32, as PNG, zip and Parquet have it: zlib takes some GB a second. Any flipped bit and any damage within four bytes
is noticed, of cuts and other damage all but one in 4e9. It is against accidents of disks and copies, not against people
who mean to deceive: they would write a checksum of their own.
"""

from __future__ import annotations

import collections
import concurrent.futures
import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from codebind_jax.files.far import Path, is_far, open_far
from codebind_jax.files.jsons import read_json
from codebind_jax.files.places import write_whole

SEAL = "checksum"  # of a sealed JSON object
_BITS = 32  # of a CRC
_BLOCK = 1 << 20
_WAITING = 4  # arrays


def checksum(*parts: Any) -> str:
  """CRC-32 of bytes that follow one another, 8 hex digits.

  Args:
    *parts: bytes, or anything contiguous that has them.
  """
  value = 0
  for part in parts:
    value = zlib.crc32(part, value)
  return f"{value:08x}"


def array_checksum(array: np.ndarray) -> str:
  """That of an array: of its type, shape and values."""
  flat = np.ascontiguousarray(array).reshape(-1)
  return checksum(f"{array.dtype.name}{list(array.shape)}".encode(), flat.view(np.uint8))


def file_checksum(path: Path) -> str:
  """That of a file's bytes.

  Raises:
    OSError: if it cannot be read.
  """
  value = 0
  with open_far(path) if is_far(path) else open(path, "rb") as file:
    while block := file.read(_BLOCK):
      value = zlib.crc32(block, value)
  return f"{value:08x}"


class Checksums:
  """Computes checksums of arrays in a thread of its own, beside what reads or writes the next ones.

  At most a few arrays wait, so that memory holds no more of them.

  Args:
    done: called with the name and the checksum of each array, in order, by the thread that adds them.

  Example:
    >>> found = {}
    >>> with Checksums(found.__setitem__) as checksums:
    ...   checksums.add("a", np.zeros(3, np.float32))
    >>> found == {"a": array_checksum(np.zeros(3, np.float32))}
    True
  """

  def __init__(self, done: Callable[[str, str], Any]):
    self._done, self._waiting = done, collections.deque()
    self._thread: concurrent.futures.ThreadPoolExecutor | None = None

  def add(self, name: str, array: np.ndarray) -> None:
    """Takes an array, which must stay as it is until it is done."""
    if array.nbytes < _BLOCK and not self._waiting:
      self._done(name, array_checksum(array))
      return
    self._thread = self._thread or concurrent.futures.ThreadPoolExecutor(1, "checksums")
    self._waiting.append((name, self._thread.submit(array_checksum, array)))
    if len(self._waiting) > _WAITING:
      self._next()

  def _next(self) -> None:
    name, found = self._waiting.popleft()
    self._done(name, found.result())

  def __enter__(self) -> Checksums:
    return self

  def __exit__(self, kind: Any, *_: Any) -> None:
    try:
      while self._waiting and kind is None:
        self._next()
    finally:
      if self._thread:
        self._thread.shutdown()


def verify(found: str, expected: Any, what: Any) -> None:
  """Compares two checksums.

  Raises:
    ValueError: naming what is damaged, if they differ.
  """
  if found != expected:
    raise ValueError(f"{what}: damaged, or changed since it was written (checksum {found}, {expected} is expected)")


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
  """What JSON gives back of an object, with a checksum of its values; another layout of the text does not change it."""
  plain = json.loads(json.dumps({key: value for key, value in content.items() if key != SEAL}))
  return plain | {SEAL: _of_json(plain)}


def unsealed(content: Any, what: Any) -> dict[str, Any]:
  """The content of a sealed object.

  Args:
    content: as it was read.
    what: it is read from, for the error.

  Raises:
    ValueError: if it is no object, has no checksum, or another one than its values.
  """
  if not isinstance(content, dict) or not isinstance(content.get(SEAL), str):
    raise ValueError(f"{what}: damaged, or not written by this version: it has no {SEAL!r}")
  plain = {key: value for key, value in content.items() if key != SEAL}
  try:
    found = _of_json(plain)
  except RecursionError as error:
    raise ValueError(f"{what}: damaged, nested too deeply") from error
  verify(found, content[SEAL], what)
  return plain


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
  """Writes a sealed JSON object whole, see `files.replacing`."""
  write_whole(path, json.dumps(sealed(content), indent=1) + "\n")


def read_sealed(path: Path, need: bool = True) -> dict[str, Any]:
  """The content of a file of `write_sealed`.

  Args:
    path: of the file.
    need: False takes an object without a checksum as it is: one that people write, whose reader refuses unknown keys,
      such as the checksum's after a flip of its name.

  Raises:
    ValueError: naming the file, if it is no JSON, or damaged.
    FileNotFoundError: if there is none.
    OSError: if it cannot be read.
  """
  content = read_json(path)
  return content if not need and isinstance(content, dict) and SEAL not in content else unsealed(content, path)


def sealed_line(text: str) -> str:
  """A line of a text file, with a checksum that is not seen: a blank a bit at its end, space for 0 and tab for 1.

  So a line of JSON is the same object as before for whatever reads it, and a file of lines can grow by lines.

  Args:
    text: without line break, not ending in a blank.
  """
  value = zlib.crc32(text.encode())
  return text + "".join("\t" if value >> bit & 1 else " " for bit in range(_BITS))


def unsealed_line(line: bytes, what: Any) -> bytes:
  """The text of a line of `sealed_line`; one without any blank at its end, as others write it, is taken as it is.

  Args:
    line: without its line break.
    what: file and number, for the error.

  Raises:
    ValueError: if the checksum is another one, or not whole.
  """
  text = line.rstrip(b" \t")
  if text != line and sealed_line(text.decode(errors="replace")).encode() != line:
    raise ValueError(f"{what}: damaged, or changed since it was written: the checksum in the blanks at its end differs")
  return text


def _of_json(content: Mapping[str, Any]) -> str:
  """The checksum of an object's values, whatever the order of its keys."""
  return checksum(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())

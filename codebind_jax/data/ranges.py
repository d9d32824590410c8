"""Ranges of bytes of a file, near or far, read from any number of threads."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from codebind_jax import files
from codebind_jax.data.reading import refuse_special

LONGEST = 1 << 24  # bytes of a line
_HELD = 1 << 26  # bytes of lines that are parsed together


def groups_of_lines(file: BinaryIO, name: str, most: int) -> Iterator[list[bytes]]:
  """`lines` in lists of up to `most`, or fewer where they are long."""
  group: list[bytes] = []
  held = 0
  for line in lines(file, name):
    group.append(line)
    held += len(line)
    if len(group) == most or held > _HELD:
      yield group
      group, held = [], 0
  if group:
    yield group


class ChangedError(RuntimeError):
  """A file is not the one that was indexed: another size or time. No bad record: all of it may be wrong."""


def as_path(name: str | PurePath) -> PurePath:
  """A path from its name: `epath.Path` in a bucket, else a `Path` with the user's home put in.

  Raises:
    ValueError: for another scheme, or a package that is not installed.
  """
  return files.path(name) if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(name)) else Path(name).expanduser()


def stamp(path: PurePath) -> tuple[int, int]:
  """Size of a file, and what changes with its content: its time (ns), or a hash of the bucket's tag.

  Raises:
    OSError: if there is none.
  """
  if not files.is_far(path):
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
  found = files.found(path)
  if found is None:
    raise FileNotFoundError(f"{path}: there is no such object")
  return found.size, int.from_bytes(hashlib.sha256(found.tag.encode()).digest()[:6], "little")


def identity(path: PurePath) -> str:
  """Path, size and time of a file, or of those of a folder, which change with its content; "" where there is none."""
  try:
    if not files.is_far(path) and os.path.isdir(path):  # of a film in frames, whose own time tells of new files alone
      own = repr(sorted((part.name, *stamp(Path(part))) for part in os.scandir(path)))
      return f"{os.path.abspath(path)} {hashlib.sha256(own.encode()).hexdigest()[:16]}"
    return f"{path if files.is_far(path) else os.path.abspath(path)} {stamp(path)}"
  except (OSError, ValueError):  # a name with a null byte is none that a file can have
    return ""


def mark(path: PurePath) -> str:
  """A hash of a file's content that is the same for a copy of it elsewhere, 16 hex digits; "" for a folder.

  Of a file beyond 64 MB it is one of its size and 64 blocks of 64 KB, spread evenly; in a bucket, of its tag.
  """
  if files.is_far(path):
    return hashlib.sha256(str(stamp(path)).encode()).hexdigest()[:16]
  if not os.path.isfile(path):
    return ""
  size, block = os.stat(path).st_size, 1 << 16
  digest = hashlib.sha256(str(size).encode())
  with open(path, "rb", 0) as file:
    if size <= 1024 * block:
      while content := file.read(16 * block):
        digest.update(content)
    else:
      for number in range(64):
        file.seek(number * (size - block) // 63)
        digest.update(file.read(block))
  return digest.hexdigest()[:16]


def open_binary(path: PurePath, buffering: int = 1 << 17) -> BinaryIO:
  """A file to be read from its beginning on, by one thread."""
  if files.is_far(path):
    return files.open_far(path)
  refuse_special(str(path))
  return open(path, "rb", buffering)


def lines(file: BinaryIO, name: str) -> Iterator[bytes]:
  """The lines of a file, of which none may be longer than 16 MB.

  Args:
    file: at its beginning.
    name: of the file, for errors.

  Raises:
    ValueError: naming file and line, for a longer one.
  """
  number = 0
  while line := file.readline(LONGEST + 1):
    number += 1
    if len(line) > LONGEST:
      raise ValueError(f"{name}:{number}: a line of more than {LONGEST} bytes")
    yield line


class Handles:
  """Open files of a process, the latest `limit` of them: there may be more shards than files can be open."""

  def __init__(self, limit: int):
    self.limit = limit
    self._open: collections.OrderedDict[Any, list[int]] = collections.OrderedDict()  # file -> handle, readers
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._open)

  @contextlib.contextmanager
  def of(self, path: str, stamp: tuple[int, int] | None) -> Iterator[int]:
    """The handle of a file as it was at `stamp`; it stays open while it is used, and after an error no longer."""
    key = (path, stamp)
    with self._lock:
      entry = self._open.get(key)
      if entry is None:
        entry = self._open[key] = [os.open(path, os.O_RDONLY | os.O_CLOEXEC), 0]
      self._open.move_to_end(key)
      entry[1] += 1
      self._close_oldest()
    kept = False
    try:
      yield entry[0]
      kept = stamp is not None  # without one, another file of this name would not be noticed
    finally:
      with self._lock:
        entry[1] -= 1
        if not kept and not entry[1] and self._open.get(key) is entry:
          os.close(self._open.pop(key)[0])
        self._close_oldest()

  def _close_oldest(self) -> None:
    """Closes files beyond the limit that no thread is reading, the longest unused first; under the lock."""
    beyond = len(self._open) - self.limit
    if beyond > 0:
      for key in [key for key, (_, readers) in self._open.items() if not readers][:beyond]:
        os.close(self._open.pop(key)[0])

  def close(self) -> None:
    """Closes the files that no thread is reading."""
    with self._lock:
      for key in [key for key, (_, readers) in self._open.items() if not readers]:
        os.close(self._open.pop(key)[0])


_handles = Handles(256)


def close() -> None:
  """Closes the files that this process keeps open, but those that a thread is reading; a later read opens them anew."""
  _handles.close()


class File:
  """A file whose ranges are read by pread, so that threads do not move one another's place; picklable.

  It is opened at a read, and closed when others have been read since. In a bucket each range is a request.
  """

  def __init__(self, path: PurePath, stamp: tuple[int, int] | None = None):
    """Ranges of a file.

    Args:
      path: near or far.
      stamp: what `stamp` said when the file was indexed; a file that has changed since is an error.
    """
    self.path, self._stamp = path, stamp
    self._far, self._seen = files.is_far(path), False

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_seen": False}

  def read(self, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`; fewer at the end of the file.

    Raises:
      ChangedError: if the file is not the one that was indexed.
      OSError: if the file cannot be read.
    """
    if self._far:
      if self._stamp and not self._seen:  # once: each look is a request
        self._compare(stamp(self.path))
        self._seen = True
      return files.read_bytes(self.path, offset, offset + length)
    with _handles.of(str(self.path), self._stamp) as handle:
      if self._stamp:
        status = os.fstat(handle)
        self._compare((status.st_size, status.st_mtime_ns))
      parts = []
      while length > 0 and (part := os.pread(handle, length, offset)):  # Linux reads 2 GB at most at once
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)

  def _compare(self, now: tuple[int, int]) -> None:
    if now != self._stamp:
      was = self._stamp
      what = f"{was[0]} bytes then, {now[0]} now" if was[0] != now[0] else "written anew, of the same size"
      raise ChangedError(f"{self.path}: has changed since it was indexed ({what}); start again")

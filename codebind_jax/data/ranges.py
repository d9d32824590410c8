"""Ranges of bytes of a file, near or far, read from any number of threads."""

from __future__ import annotations

import os
import re
import threading
import time
import weakref
from pathlib import Path, PurePath
from typing import Any, BinaryIO

FAR = ("gs://", "s3://")
_ATTEMPTS = 4
_opening = threading.Lock()


class ChangedError(RuntimeError):
  """A file is not the one that was indexed: another size or time. No bad record: all of it may be wrong."""


def is_far(path: str | PurePath) -> bool:
  """Whether a path is in a bucket."""
  return str(path).startswith(FAR)


def as_path(name: str | PurePath) -> PurePath:
  """A path from its name: `epath.Path` in a bucket, else a `Path` with the user's home put in.

  Raises:
    ValueError: for another scheme.
  """
  if is_far(name):
    from etils import epath

    return epath.Path(str(name))
  if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(name)):
    raise ValueError(f"{name}: unknown scheme {scheme[0]!r}; allowed: a local path, {', '.join(FAR)}")
  return Path(name).expanduser()


def stamp(path: PurePath) -> tuple[int, int]:
  """Size and time of change (ns; 0 in a bucket that tells none) of a file.

  Raises:
    OSError: if there is none.
  """
  if not is_far(path):
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
  _far(path).invalidate_cache(str(path.parent))  # it would tell what an earlier listing said
  about = _far(path).info(_key(path))
  changed = about.get("LastModified") or about.get("mtime") or about.get("updated") or 0
  changed = changed.timestamp() if hasattr(changed, "timestamp") else changed
  return int(about["size"]), int(changed * 1e9) if isinstance(changed, int | float) else 0


def identity(path: PurePath) -> str:
  """Path, size and time of a file, which change with its content; "" where there is none."""
  try:
    return f"{path if is_far(path) else os.path.abspath(path)} {stamp(path)}"
  except OSError:
    return ""


def open_binary(path: PurePath, buffering: int = 1 << 17) -> BinaryIO:
  """A file to be read from its beginning on, by one thread."""
  return _far(path).open(_key(path), "rb") if is_far(path) else open(path, "rb", buffering)


def read_whole(path: PurePath) -> bytes:
  """All bytes of a file.

  Raises:
    OSError: if it cannot be read.
  """
  return _fetched(path, None, None) if is_far(path) else Path(path).read_bytes()


class File:
  """A file whose ranges are read by pread, so that threads do not move one another's place; picklable.

  It is opened at the first read, and closed when the object goes. In a bucket each range is a request.
  """

  def __init__(self, path: PurePath, stamp: tuple[int, int] | None = None):
    """Ranges of a file.

    Args:
      path: near or far.
      stamp: what `stamp` said when the file was indexed; a file that has changed since is an error.
    """
    self.path, self._stamp = path, stamp
    self._handle: int | None = None

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_handle": None}

  def read(self, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`; fewer at the end of the file.

    Raises:
      ChangedError: if the file is not the one that was indexed.
      OSError: if the file cannot be read.
    """
    if self._handle is None:
      self._open()
    if is_far(self.path):
      return _fetched(self.path, offset, offset + length)
    if self._stamp:
      status = os.fstat(self._handle)
      self._compare((status.st_size, status.st_mtime_ns))
    parts = []
    while length > 0 and (part := os.pread(self._handle, length, offset)):  # Linux reads 2 GB at most at once
      parts.append(part)
      offset, length = offset + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)

  def _open(self) -> None:
    with _opening:
      if self._handle is not None:
        return
      if is_far(self.path):
        if self._stamp:
          self._compare(stamp(self.path))
        self._handle = -1
      else:
        self._handle = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)

  def _compare(self, now: tuple[int, int]) -> None:
    if now != self._stamp:
      was = self._stamp
      what = f"{was[0]} bytes then, {now[0]} now" if was[0] != now[0] else "written anew, of the same size"
      raise ChangedError(f"{self.path}: has changed since it was indexed ({what}); start again")


def _far(path: PurePath) -> Any:
  import fsspec

  return fsspec.filesystem(str(path).partition("://")[0])


def _key(path: PurePath) -> str:
  return str(path).partition("://")[2]


def _fetched(path: PurePath, start: int | None, end: int | None) -> bytes:
  """A range of a far file; tried again after what may pass."""
  for attempt in range(_ATTEMPTS):
    try:
      return _far(path).cat_file(_key(path), start=start, end=end)
    except (FileNotFoundError, PermissionError):
      raise
    except OSError:
      if attempt == _ATTEMPTS - 1:
        raise
      time.sleep(0.2 * 4**attempt)
  raise AssertionError

"""Files that are replaced whole, and locks between processes; on the lowest floor, since the data rooms lock too."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from absl import logging

try:
  import fcntl
except ImportError:  # not a POSIX system: nothing is locked
  fcntl = None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """Yields the path of a temporary file beside `path` that takes its place at the end, or is removed after an error.

  A reader, or a kill at any time, sees the old file or the new one. Several processes may write one path at once.
  """
  temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
  try:
    yield temporary
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)
  finally:
    temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
  """Writes a UTF-8 text file as `replacing` does."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def replace_folder(new: Path, folder: Path) -> None:
  """Puts a folder in the place of another one, or of none; a kill between leaves the old one as `.NAME.HEX.old`."""
  old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
  if folder.exists():
    os.replace(folder, old)
  os.replace(new, folder)
  _flush(folder.parent)
  shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


@contextlib.contextmanager
def lock(path: Path, work: str) -> Iterator[None]:
  """Holds a lock file that only one process has at a time; the system frees that of a process that was killed.

  Args:
    path: the lock file, made where it is not there.
    work: what another process may be doing, for the line in the log before a wait: "fetches into DIR".
  """
  with open(path, "w") as handle:
    if fcntl:
      try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError:
        logging.info("waiting for another process that %s", work)
        fcntl.flock(handle, fcntl.LOCK_EX)
    yield

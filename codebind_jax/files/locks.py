"""Locks between processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from absl import logging

from codebind_jax.files import far
from codebind_jax.files.far import Path

try:
  import fcntl
except ImportError:  # not a POSIX system: nothing is locked
  fcntl = None



@contextlib.contextmanager
def lock(path: Path, work: str) -> Iterator[None]:
  """Holds a lock file that only one process has at a time; the system frees that of a process that was killed.

  Far disks have no locks, and nothing is held there: of a run, process 0 alone replaces shared objects, and what others
  write (their shards, their parts of a checkpoint) has names of its own.

  Args:
    path: the lock file, made where it is not there.
    work: what another process may be doing, for the line in the log before a wait: "fetches into DIR".
  """
  if far.is_far(path):
    yield
    return
  with open(path, "w") as handle:
    if fcntl:
      try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError:
        logging.info("waiting for another process that %s", work)
        fcntl.flock(handle, fcntl.LOCK_EX)
    yield

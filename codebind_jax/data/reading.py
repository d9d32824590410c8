"""Errors of one file, and what is said of it: whatever a library raises becomes a ValueError with the file's name."""

from __future__ import annotations

import contextlib
import errno
import functools
from collections.abc import Iterator
from pathlib import Path

from absl import logging

# Errors of the machine, which no other file would escape.
MACHINE = frozenset((errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT))


def name_of(value: str | Path | bytes, kind: str) -> str:
  """What errors call a path, or a file's bytes."""
  return f"{kind} bytes" if isinstance(value, bytes) else str(value).encode("utf-8", "backslashreplace").decode()


@contextlib.contextmanager
def file_errors(name: str, what: str) -> Iterator[None]:
  """Makes whatever is raised while a file is read a ValueError that begins with its name.

  Args:
    name: of the file; a ValueError that begins with it stays as it is.
    what: what it should be, such as "a readable image".

  Raises:
    ValueError: for everything but errors of the machine (a full disk) and of the installation (a missing package).
  """
  try:
    yield
  except (ImportError, TimeoutError, ConnectionError):
    raise
  except FileNotFoundError as error:
    raise ValueError(f"{name}: no such file") from error
  except Exception as error:
    if isinstance(error, OSError) and error.errno in MACHINE:
      raise
    if type(error) is ValueError and str(error).startswith(name):
      raise
    usual = isinstance(error, (OSError, ValueError, SyntaxError)) and str(error)
    raise ValueError(f"{name}: not {what} ({error if usual else f'{type(error).__name__}: {error}'})") from error


@functools.lru_cache(maxsize=4096)
def say(message: str) -> None:
  """Logs what was judged of a file, once for each message, a thousand in all."""
  logging.log_first_n(logging.WARNING, "%s", 1000, message)

"""What readers of files share: errors that name the file, and remarks that are made once."""

from __future__ import annotations

import contextlib
import contextvars
import errno
import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

# Errors of the machine, which no other file would escape.
MACHINE = frozenset((errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT))
_REMARKS = 100  # of one kind
_made: dict[str, set[str]] = {}
_NAMELESS = re.compile(r"\w+( bytes)?: ")  # how remarks on bytes and arrays begin, see `name_of`
_record: contextvars.ContextVar[Callable[[], str] | None] = contextvars.ContextVar("record", default=None)


def name_of(value: Any, kind: str) -> str:
  """What errors call a path, a file's bytes, or an array of this kind."""
  if isinstance(value, str | Path):
    return str(value).encode("utf-8", "backslashreplace").decode()
  return f"{kind} bytes" if isinstance(value, bytes) else kind


def refuse_special(path: str | Path) -> None:
  """Raises a ValueError for a device, a pipe or a socket, which may have no end, or nothing to read for ever.

  Files, folders and what is not there are let pass.
  """
  try:
    mode = os.stat(path).st_mode
  except (OSError, ValueError):
    return
  if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
    kind = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}.get(stat.S_IFMT(mode), "a device")
    raise ValueError(f"{name_of(path, '')}: is {kind}; a file is needed")


def opened_file(value: str | Path | bytes) -> io.BufferedReader | io.BytesIO:
  """A file, or its bytes, open for reading.

  Raises:
    ValueError: if it is no file but a device, a pipe or a socket.
    OSError: if it cannot be read.
  """
  if isinstance(value, bytes):
    return io.BytesIO(value)
  refuse_special(value)
  return open(value, "rb")


def whole_file(value: str | Path | bytes, largest: int = 1 << 29) -> bytes:
  """The bytes of a file, or those given.

  Raises:
    ValueError: if it is larger than `largest` bytes, or no file.
    OSError: if it cannot be read.
  """
  if isinstance(value, bytes):
    return value
  with opened_file(value) as file:
    if (size := os.fstat(file.fileno()).st_size) > largest:
      raise ValueError(f"{name_of(value, '')}: a file of {size} bytes; allowed are {largest}")
    return file.read()


def unmasked(value: Any, kind: str) -> np.ndarray:
  """The array of a value.

  Args:
    value: an array of any library.
    kind: for errors.

  Raises:
    ValueError: if values are masked: what lies below a NumPy mask is no content.
  """
  array = np.asanyarray(value)
  if np.ma.is_masked(array):
    raise ValueError(f"{kind}: {np.ma.count_masked(array)} of {array.size} values are masked; allowed are arrays of "
                     "which nothing is masked: fill them, or leave the item out")  # fmt: skip
  return np.asarray(array)


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


@contextlib.contextmanager
def arrow_errors(message: str) -> Iterator[None]:
  """Makes what pyarrow raises for a damaged file a ValueError with its name: errors of its own, and an OSError that has
  no number; those of the machine have one.

  Args:
    message: naming the file, such as "a.parquet: not a readable Parquet file"; what pyarrow says follows it.

  Raises:
    ValueError: for these errors.
  """
  import pyarrow as pa

  try:
    yield
  except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
      raise
    raise ValueError(f"{message} ({error})") from error


@contextlib.contextmanager
def in_record(where: Callable[[], str]) -> Iterator[None]:
  """Remarks on bytes and arrays that are read meanwhile begin with where they are.

  Args:
    where: gives the record's place, such as "a.parquet: row 3"; called where there is a remark.
  """
  token = _record.set(where)
  try:
    yield
  finally:
    _record.reset(token)


def remark(kind: str, message: str) -> None:
  """Warns of what was judged of an item or done to it, once in a process; of one kind no more than a hundred.

  Args:
    kind: of what was done, in the plural.
    message: naming the item; one without a name of its own gets its record's, see `in_record`.
  """
  if (where := _record.get()) and _NAMELESS.match(message):
    message = f"{where()}: {message}"
  made = _made.setdefault(kind, set())
  if message in made or len(made) >= _REMARKS:
    return
  made.add(message)
  logging.warning("%s%s", message, "" if len(made) < _REMARKS else f" (further remarks on {kind} are left out)")

"""What readers of files share: errors that name the file, arrays of .npy files, and remarks that are made once."""

from __future__ import annotations

import contextlib
import errno
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

# Errors of the machine, which no other item would escape.
MACHINE = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT}
_NPY, _ZIP = b"\x93NUMPY", b"PK\x03\x04"
_REMARKS = 100  # of one kind
_made: dict[str, set[str]] = {}


def shown(value: Any, kind: str) -> str:
  """What a path, or a file's bytes, or an array of this kind is called in an error."""
  return f"{kind} bytes" if isinstance(value, bytes) else str(value) if isinstance(value, str | Path) else kind


@contextlib.contextmanager
def named(name: str, what: str) -> Iterator[None]:
  """Makes whatever a library raises for a damaged file a ValueError that names it.

  Errors of the machine and of the installation stay as they are.

  Args:
    name: of the file.
    what: is wrong with it, such as "not a readable sound".
  """
  try:
    yield
  except (MemoryError, ImportError):
    raise
  except FileNotFoundError as error:
    raise ValueError(f"{name}: {what} (no such file)") from error
  except OSError as error:
    if error.errno in MACHINE:
      raise
    raise ValueError(f"{name}: {what} ({error})") from error
  except ValueError as error:
    if str(error).startswith(f"{name}: "):
      raise
    raise ValueError(f"{name}: {what} ({error})") from error
  except Exception as error:
    raise ValueError(f"{name}: {what} ({type(error).__name__}: {error})") from error


def load_npy(value: str | Path | bytes, name: str, allowed: str = ".npy") -> np.ndarray:
  """The array of an .npy file; pickles are never loaded, and a header is not believed beyond the file's size.

  Args:
    value: path, or the file's bytes.
    name: for errors.
    allowed: formats that the caller reads, for errors.

  Raises:
    ValueError: naming the file, if it is none, is damaged or cut off, or holds Python objects.
  """
  with named(name, f"not a readable .npy file; allowed: {allowed}"):
    with io.BytesIO(value) if isinstance(value, bytes) else open(value, "rb") as file:
      if file.read(len(_ZIP)) == _ZIP:
        raise ValueError("an .npz archive; save its one array with numpy.save")
      file.seek(0)
      version = np.lib.format.read_magic(file)
      reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
      shape, _, dtype = reader(file)
      if dtype.hasobject:
        raise ValueError("an array of Python objects, which is a pickle; allowed are numbers")
      start = file.tell()
      needed, there = math.prod(shape) * dtype.itemsize, file.seek(0, io.SEEK_END) - start
      if needed > there:
        raise ValueError(f"cut off: shape {shape} of {dtype} needs {needed} bytes, there are {there}")
      file.seek(0)
      return np.load(file, allow_pickle=False)


def remark(kind: str, message: str) -> None:
  """Warns of what was done to an item, once in a process; of one kind no more than a hundred.

  Args:
    kind: of what was done.
    message: naming the item.
  """
  made = _made.setdefault(kind, set())
  if message in made or len(made) >= _REMARKS:
    return
  made.add(message)
  logging.warning("%s%s", message, "" if len(made) < _REMARKS else f" (further remarks on {kind} are left out)")

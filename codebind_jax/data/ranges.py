"""Ranges of bytes of a file, read from any number of threads."""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path
from typing import Any

_opening = threading.Lock()


class File:
  """A file whose ranges are read by pread, so that threads do not move one another's place; picklable.

  It is opened at the first read, and closed when the object goes.
  """

  def __init__(self, path: Path):
    self.path = path
    self._handle: int | None = None

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_handle": None}

  def read(self, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`; fewer at the end of the file.

    Raises:
      OSError: if the file cannot be read.
    """
    with _opening:
      if self._handle is None:
        self._handle = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)
    return os.pread(self._handle, length, offset)

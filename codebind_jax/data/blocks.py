"""Memory that a process shares with its workers, so that batches need not go through a pipe.

A block has no name: nothing is left of it when the last process that has it ends, however it ends.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import tempfile
from multiprocessing import reduction
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8

_ALIGNED = 64  # bytes; JAX on a CPU takes aligned arrays without a copy


class Block:
  """Shared memory that grows. It can be pickled only for a process that is being started."""

  def __init__(self):
    if hasattr(os, "memfd_create"):
      self._handle = os.memfd_create("codebind_jax")
    else:
      with tempfile.TemporaryFile() as file:
        self._handle = os.dup(file.fileno())
    self._begin()

  def _begin(self) -> None:
    self._map: mmap.mmap | None = None
    self.clear()

  def __getstate__(self) -> Any:
    return reduction.DupFd(self._handle)

  def __setstate__(self, handle: Any) -> None:
    self._handle = handle.detach()
    self._begin()

  def close(self) -> None:
    """Gives up the handle; arrays in the block stay valid."""
    os.close(self._handle)

  def _bytes(self, size: int) -> UInt8[np.ndarray, "n"]:
    if self._map is None or len(self._map) < size:
      if os.fstat(self._handle).st_size < size:
        self._grow(size)
      self._map = mmap.mmap(self._handle, os.fstat(self._handle).st_size)
    return np.frombuffer(self._map, np.uint8)

  def _grow(self, size: int) -> None:
    """Makes the file larger.

    Raises:
      OSError: if there is no room for it, which a write to the map would tell by ending the process.
    """
    try:
      os.ftruncate(self._handle, size)
      if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(self._handle, 0, size)
    except OSError as error:
      raise OSError(
        error.errno, f"no room for an item of {size:,} bytes that worker processes share ({error.strerror}); make "
        "room, or use fewer workers (config.data.workers)", "memory",
      ) from error  # fmt: skip

  def clear(self) -> None:
    """Makes room: what was written is written over."""
    self._used, self._arrays = 0, {}  # address -> (offset, array); the array keeps the address its own

  def empty(self, shape: tuple[int, ...], dtype: Any) -> Shaped[np.ndarray, "..."]:
    """An array in the block, of any content."""
    size, offset = math.prod(shape) * np.dtype(dtype).itemsize, self._used
    self._used = offset + -(-size // _ALIGNED) * _ALIGNED
    array = self._bytes(self._used)[offset : offset + size].view(dtype).reshape(shape)
    self._arrays[array.ctypes.data] = offset, array
    return array

  def dumps(self, value: Any) -> tuple[bytes, list[tuple[int, int]]]:
    """The pickle of a value, and (offset, bytes) of its arrays, written to the block unless they are there."""
    spans = []

    def span(buffer: pickle.PickleBuffer) -> None:
      content = np.frombuffer(buffer.raw(), np.uint8)
      offset, _ = self._arrays.get(content.ctypes.data, (self._used, None))
      if offset == self._used:
        self.empty((len(content),), np.uint8)[:] = content
      spans.append((offset, len(content)))

    return pickle.dumps(value, protocol=5, buffer_callback=span), spans

  def loads(self, content: bytes, spans: list[tuple[int, int]]) -> tuple[Any, UInt8[np.ndarray, "n"]]:
    """The value, whose arrays lie in the block, and what lives as long as any of them."""
    whole = self._bytes(max((offset + size for offset, size in spans), default=1))
    return pickle.loads(content, buffers=[whole[offset : offset + size] for offset, size in spans]), whole

"""Arrays that lie in memory-mapped files, which worker processes share instead of getting copies."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Reference:
  """A memory-mapped array in a pickle: worker processes share the file's pages, and hold no copies."""

  path: str
  size: int
  offset: int
  shape: tuple[int, ...]
  type: str

  def array(self) -> np.ndarray:
    """The array of the file as this process maps it.

    Raises:
      ValueError: if the file is another one by now.
    """
    length = int(np.prod(self.shape)) * np.dtype(self.type).itemsize
    whole = map_file(self.path)
    if len(whole) != self.size:
      raise ValueError(f"{self.path}: was replaced while the run started; start again")
    return whole[self.offset : self.offset + length].view(self.type).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Zeros:
  """An array of nothing but zeros in a pickle."""

  shape: tuple[int, ...]
  type: str

  def array(self) -> np.ndarray:
    """The zeros, which take no memory."""
    return np.broadcast_to(np.zeros((), self.type), self.shape)


class Pages(np.ndarray):
  """The bytes of a file by memory map. Views of it can be pickled by reference."""

  path = ""


_maps: weakref.WeakValueDictionary[str, Pages] = weakref.WeakValueDictionary()


def map_file(path: str) -> Pages:
  """The bytes of a file, mapped once in a process; one that is replaced goes on as it was.

  Unlike `mmap` and `np.memmap` it holds no open file, of which a system allows a process a thousand.

  Raises:
    OSError: if it cannot be mapped.
  """
  there = _maps.get(path)
  if there is None:
    with open(path, "rb") as file:
      size = os.fstat(file.fileno()).st_size
      libc = ctypes.CDLL(None, use_errno=True)
      libc.mmap.restype, libc.munmap.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t)
      libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
      address = libc.mmap(None, max(size, 1), mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
      raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    memory = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(memory, libc.munmap, address, max(size, 1)).atexit = False
    there = np.frombuffer(memory, np.uint8).view(Pages)
    there.flags.writeable = False
    there.path = path
    _maps[path] = there
  return there


def unmap(path: str) -> None:
  """Lets the next `map_file` map a file anew."""
  _maps.pop(path, None)


def referred(state: Mapping[str, Any]) -> dict[str, Any]:
  """A state to be pickled, with references to arrays that are in a file, and without zeros."""
  return {name: _in_short(value) if isinstance(value, np.ndarray) else value for name, value in state.items()}


def _in_short(array: np.ndarray) -> Any:
  if array.size and not any(array.strides):
    return Zeros(array.shape, array.dtype.str) if not array.flat[0] else array
  root = array
  while isinstance(root.base, Pages):
    root = root.base
  if not isinstance(root, Pages) or not root.path or not array.flags.c_contiguous:
    return array
  at = [one.__array_interface__["data"][0] for one in (root, array)]
  return Reference(root.path, root.size, at[1] - at[0], array.shape, array.dtype.str)


def mapped(state: Mapping[str, Any]) -> dict[str, Any]:
  """The state whose arrays `referred` has replaced."""
  return {name: value.array() if isinstance(value, Reference | Zeros) else value for name, value in state.items()}

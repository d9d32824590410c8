"""Arrays of .npy and .npz files, of which no header is believed: memory is taken for what is there, up to a limit."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codebind_jax.data.reading import file_errors, opened_file
from codebind_jax.files.zips import open_zip

MAGIC = np.lib.format.MAGIC_PREFIX
ZIP = b"PK"
LARGEST = 1 << 28  # values
_LARGEST_BYTES = 1 << 29
_HEADER = 10_000  # characters, as numpy allows
_PIECE = 1 << 24


def read_npy(value: str | Path | bytes, largest: int) -> np.ndarray:
  """The array of an .npy file or its bytes; pickles are never loaded.

  Args:
    value: the file.
    largest: allowed number of values.

  Raises:
    ValueError: if it is damaged, cut, or larger.
    OSError: if it cannot be read.
  """
  with opened_file(value) as file:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return _array(file, size, largest)


def load_npy(value: str | Path | bytes, name: str, allowed: str = ".npy") -> np.ndarray:
  """`read_npy` of up to 2^28 values, with errors that name the file.

  Args:
    value: the file.
    name: for errors.
    allowed: formats that the caller reads, for errors.

  Raises:
    ValueError: naming the file, if it is none, is damaged or cut, holds Python objects, or is larger.
  """
  with file_errors(name, f"a readable .npy file; allowed: {allowed}"):
    with opened_file(value) as file:
      if file.read(len(ZIP)) == ZIP:
        raise ValueError("an .npz archive; save its one array with numpy.save")
    return read_npy(value, LARGEST)


def read_npz(value: str | Path | bytes, names: Sequence[str], largest: int) -> dict[str, np.ndarray]:
  """Those of some arrays that an .npz file or its bytes hold; others are not unpacked.

  Args:
    value: the file.
    names: of the arrays.
    largest: allowed number of values of one array.

  Raises:
    ValueError, zipfile.BadZipFile, zlib.error: if it is damaged, or an array is larger.
    OSError: if it cannot be read.
  """
  with open_zip(value) as archive:
    there = set(archive.namelist())
    out = {}
    for name in names:
      if f"{name}.npy" in there:
        with archive.open(f"{name}.npy") as member:
          out[name] = _array(member, archive.getinfo(f"{name}.npy").file_size, largest)
    if not out:
      raise ValueError(f"holds {sorted(there)[:8]}, needed is {' or '.join(names)}")
    return out


def read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
  """Shape, whether columns are stored one after the other, and type, of the .npy file that begins here.

  Raises:
    ValueError: if it is none, is damaged, or its header is longer than numpy reads.
  """
  head = file.read(12)
  version, width = head[6:8], 2 if head[6:7] == b"\x01" else 4
  if not head.startswith(MAGIC) or version not in (b"\x01\0", b"\x02\0"):
    raise ValueError(f"an array of plain numbers is needed, this begins as {head!r}")
  length = int.from_bytes(head[8 : 8 + width], "little")
  if length > _HEADER:
    raise ValueError(f"its header says that it has {length} bytes; allowed are {_HEADER}")
  rest = head[8 + width :]
  text = io.BytesIO(head[8 : 8 + width] + rest + file.read(length - len(rest)))
  read = np.lib.format.read_array_header_1_0 if width == 2 else np.lib.format.read_array_header_2_0
  try:
    shape, by_columns, dtype = read(text)
  except (MemoryError, RecursionError) as error:  # Python's parser, of brackets in one another
    raise ValueError(f"a damaged header ({type(error).__name__})") from error
  if min(shape, default=1) < 0 or max(shape, default=0) >= 1 << 48 or any(type(n) is not int for n in shape):
    raise ValueError(f"its header says shape {shape}")
  return tuple(shape), by_columns, dtype


def _array(file: Any, size: int, largest: int) -> np.ndarray:
  """The array that begins here.

  Args:
    file: open for bytes, of which nothing is read yet.
    size: bytes that the file says to have.
    largest: allowed number of values.
  """
  shape, fortran, dtype = read_header(file)
  if dtype.hasobject:
    raise ValueError("an array of Python objects, which is a pickle; allowed are numbers")
  if dtype.kind not in "biufc":
    raise ValueError(f"an array of plain numbers is needed, this has type {dtype} and shape {shape}")
  count = math.prod(shape)
  if count > largest or count * dtype.itemsize > _LARGEST_BYTES:
    allowed = min(largest, _LARGEST_BYTES // dtype.itemsize)
    raise ValueError(f"its header says shape {shape} of {dtype}, allowed are {allowed} values")
  if count * dtype.itemsize > size:
    raise ValueError(f"its header says shape {shape} of {dtype}, but the file has {size} bytes")
  array = np.empty(count, dtype)
  view, done = memoryview(array.view(np.uint8)), 0
  while done < len(view) and (got := file.readinto(view[done : done + _PIECE])):
    done += got
  if done < len(view):
    raise ValueError(f"cut: {done} of {len(view)} bytes are there")
  array = array.reshape(shape, order="F" if fortran else "C")
  return array if dtype.isnative else array.astype(dtype.newbyteorder("="))

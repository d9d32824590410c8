"""Arrays of .npy and .npz files, of which no header is believed: memory is taken for what is there, up to a limit."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codebind_jax.data.reading import file_errors

MAGIC = np.lib.format.MAGIC_PREFIX
ZIP = b"PK"
LARGEST = 1 << 29  # values


def read_npy(value: str | Path | bytes, largest: int) -> np.ndarray:
  """The array of an .npy file or its bytes; pickles are never loaded.

  Args:
    value: the file.
    largest: allowed number of values.

  Raises:
    ValueError: if it is damaged, cut, or larger.
    OSError: if it cannot be read.
  """
  size = len(value) if isinstance(value, bytes) else os.stat(value).st_size
  with io.BytesIO(value) if isinstance(value, bytes) else open(value, "rb") as file:
    return _array(file, size, largest)


def load_npy(value: str | Path | bytes, name: str, allowed: str = ".npy") -> np.ndarray:
  """`read_npy` of up to 2^29 values, with errors that name the file.

  Args:
    value: the file.
    name: for errors.
    allowed: formats that the caller reads, for errors.

  Raises:
    ValueError: naming the file, if it is none, is damaged or cut, holds Python objects, or is larger.
  """
  with file_errors(name, f"a readable .npy file; allowed: {allowed}"):
    with io.BytesIO(value) if isinstance(value, bytes) else open(value, "rb") as file:
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
  with zipfile.ZipFile(io.BytesIO(value) if isinstance(value, bytes) else value) as archive:
    there = set(archive.namelist())
    out = {}
    for name in names:
      if f"{name}.npy" in there:
        with archive.open(f"{name}.npy") as member:
          out[name] = _array(member, archive.getinfo(f"{name}.npy").file_size, largest)
    if not out:
      raise ValueError(f"holds {sorted(there)[:8]}, needed is {' or '.join(names)}")
    return out


def _array(file: Any, size: int, largest: int) -> np.ndarray:
  """The array that begins here.

  Args:
    file: open for bytes, of which nothing is read yet.
    size: bytes that the file says to have.
    largest: allowed number of values.
  """
  version = np.lib.format.read_magic(file)
  if version not in ((1, 0), (2, 0)):
    raise ValueError(f"an array of plain numbers is needed, this is .npy of version {version}")
  shape, fortran, dtype = (
    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
  )(file)
  if dtype.hasobject:
    raise ValueError("an array of Python objects, which is a pickle; allowed are numbers")
  if dtype.kind not in "biufc" or min(shape, default=1) < 0:
    raise ValueError(f"an array of plain numbers is needed, this has type {dtype} and shape {shape}")
  count = math.prod(shape)
  if count > largest:
    raise ValueError(f"its header says shape {shape}, allowed are {largest} values")
  if count * dtype.itemsize > size:
    raise ValueError(f"its header says shape {shape} of {dtype}, but the file has {size} bytes")
  content = file.read(count * dtype.itemsize)
  if len(content) < count * dtype.itemsize:
    raise ValueError(f"cut: {len(content)} of {count * dtype.itemsize} bytes are there")
  array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
  return array.astype(dtype.newbyteorder("="), copy=False)

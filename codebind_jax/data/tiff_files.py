"""TIFF files of numbers that Pillow does not read: floats of 16 and 64 bits, several channels of floats, wide integers.

Only what programs write unless they are told otherwise: one picture, in strips, not compressed.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import TiffImagePlugin

from codebind_jax.data import picture_files
from codebind_jax.data.reading import opened_file

_MAGIC = (b"II*\0", b"MM\0*")
_KINDS = {1: "u", 2: "i", 3: "f"}  # SampleFormat -> NumPy's kind
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _STARTS, _CHANNELS, _COUNTS, _PLANAR = 256, 257, 258, 259, 273, 277, 279, 284
_TURN, _FORMAT, _PHOTOMETRIC = 274, 339, 262
# Orientation -> (rows and columns change places, rows are mirrored, columns are mirrored), in this order.
_TURNS = {
  1: (0, 0, 0), 2: (0, 0, 1), 3: (0, 1, 1), 4: (0, 1, 0), 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1), 8: (1, 1, 0)
}  # fmt: skip


def takes(value: str | Path | bytes) -> bool:
  """Whether a file is a TIFF that Pillow does not know."""
  try:
    return picture_files.head_of(value)[:4] in _MAGIC and not picture_files.is_picture(value)
  except (OSError, ValueError):
    return False


def white_is_zero(value: str | Path | bytes) -> bool:
  """Whether a TIFF file says that its grey is white at 0."""
  with opened_file(value) as file:
    tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
    file.seek(tags.next)
    tags.load(file)
  return tags.get(_PHOTOMETRIC) == 0


def read(value: str | Path | bytes, largest: int) -> np.ndarray:
  """The numbers [h, w] or [h, w, c] of a TIFF file, turned as it says.

  Args:
    value: a path or the file's bytes.
    largest: allowed number of values.

  Raises:
    ValueError: if it is compressed, of another layout, cut, or larger.
    OSError: if it cannot be read.
  """
  with opened_file(value) as file:
    tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
    file.seek(tags.next)
    tags.load(file)
    bits, formats = tags.get(_BITS, (1,)), tags.get(_FORMAT, (1,))
    channels = int(tags.get(_CHANNELS, 1))
    kind = _KINDS.get(formats[0], "?")
    what = f"{channels} x {bits[0]}-bit {dict(u='unsigned', i='signed', f='float').get(kind, 'unknown')} values"
    if tags.get(_COMPRESSION, 1) != 1 or tags.get(_PLANAR, 1) != 1 and channels > 1 or _STARTS not in tags:
      raise ValueError(f"TIFF of {what} is read without compression, in strips, and channels beside each other alone")
    if len(set(bits)) > 1 or len(set(formats)) > 1 or kind == "?" or bits[0] not in (8, 16, 32, 64):
      raise ValueError(f"TIFF of {what} is not read")
    if tags.next:
      raise ValueError(f"TIFF of {what}: it holds several pictures, allowed is one")
    shape = (int(tags[_HEIGHT]), int(tags[_WIDTH])) + ((channels,) if channels > 1 else ())
    count = math.prod(shape)
    if not 0 < count <= largest:
      raise ValueError(f"its header says shape {shape}, allowed are {largest} values")
    dtype = np.dtype(f"{tags.prefix == b'MM' and '>' or '<'}{kind}{bits[0] // 8}")
    content = bytearray()
    for start, length in zip(tags[_STARTS], tags[_COUNTS]):
      file.seek(start)
      content += file.read(min(length, count * dtype.itemsize - len(content)))
    if len(content) < count * dtype.itemsize:
      raise ValueError(f"cut: {len(content)} of {count * dtype.itemsize} bytes are there")
  array = np.frombuffer(bytes(content), dtype).reshape(shape).astype(dtype.newbyteorder("="))
  across, rows, columns = _TURNS.get(int(tags.get(_TURN, 1)), (0, 0, 0))
  array = array.swapaxes(0, 1) if across else array
  return np.ascontiguousarray(array[:: -1 if rows else 1, :: -1 if columns else 1])

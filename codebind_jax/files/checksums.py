"""Checksums of what is kept, so that what is read is what was written.

CRC-32, as PNG, zip and Parquet have it: zlib takes some GB a second. Any flipped bit and any damage within four bytes
is noticed, of cuts and other damage all but one in 4e9. It is against accidents of disks and copies, not against people
who mean to deceive: they would write a checksum of their own.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from codebind_jax.files.far import Path, is_far, open_far
from codebind_jax.files.places import read_bytes, write_whole

KEY = "checksum"  # of a sealed JSON object
_BLOCK = 1 << 20


def checksum(*parts: Any) -> str:
  """CRC-32 of bytes that follow one another, 8 hex digits.

  Args:
    *parts: bytes, or anything contiguous that has them.
  """
  value = 0
  for part in parts:
    value = zlib.crc32(part, value)
  return f"{value:08x}"


def array_checksum(array: np.ndarray) -> str:
  """That of an array: of its type, shape and values."""
  flat = np.ascontiguousarray(array).reshape(-1)
  return checksum(f"{array.dtype.name}{list(array.shape)}".encode(), flat.view(np.uint8))


def file_checksum(path: Path) -> str:
  """That of a file's bytes.

  Raises:
    OSError: if it cannot be read.
  """
  value = 0
  with open_far(path) if is_far(path) else open(path, "rb") as file:
    while block := file.read(_BLOCK):
      value = zlib.crc32(block, value)
  return f"{value:08x}"


def verify(found: str, expected: Any, what: Any) -> None:
  """Compares two checksums.

  Raises:
    ValueError: naming what is damaged, if they differ.
  """
  if found != expected:
    raise ValueError(f"{what}: damaged, or changed since it was written (checksum {found}, {expected} is expected)")


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
  """What JSON gives back of an object, with a checksum of its values; another layout of the text does not change it."""
  plain = json.loads(json.dumps({key: value for key, value in content.items() if key != KEY}))
  return plain | {KEY: _of_json(plain)}


def unsealed(content: Any, what: Any) -> dict[str, Any]:
  """The content of a sealed object.

  Args:
    content: as it was read.
    what: it is read from, for the error.

  Raises:
    ValueError: if it is no object, has no checksum, or another one than its values.
  """
  if not isinstance(content, dict) or not isinstance(content.get(KEY), str):
    raise ValueError(f"{what}: damaged, or not written by this version: it has no {KEY!r}")
  plain = {key: value for key, value in content.items() if key != KEY}
  verify(_of_json(plain), content[KEY], what)
  return plain


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
  """Writes a sealed JSON object whole, see `files.replacing`."""
  write_whole(path, json.dumps(sealed(content), indent=1) + "\n")


def read_sealed(path: Path) -> dict[str, Any]:
  """The content of a file of `write_sealed`.

  Raises:
    ValueError: naming the file, if it is no JSON, or damaged.
    FileNotFoundError: if there is none.
    OSError: if it cannot be read.
  """
  try:
    content = json.loads(read_bytes(path).decode())
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: damaged, no readable JSON ({error})") from error
  return unsealed(content, path)


def _of_json(content: Mapping[str, Any]) -> str:
  """The checksum of an object's values, whatever the order of its keys."""
  return checksum(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())

"""Sizes of a Parquet file's pages, which are compared before one is unpacked: a damaged header takes what it says.

The footer and the headers of pages are structs of Thrift's compact protocol (parquet-format, `FileMetaData` and
`PageHeader`). They are read here, since what pyarrow is asked of a column of a damaged footer may end the process.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

_END = b"PAR1"
_HEADER = 1 << 12  # bytes of a page's header that are read at once
_LONGEST = 1 << 24  # bytes of a page's header
_DEEPEST = 16
# Fields: of the file, of a row group, of a column in it, of what is said of that column, and of a page's header.
_GROUPS, _COLUMNS, _SAID = 4, 1, 3
_PATH, _UNPACKED, _PACKED, _DATA, _DICTIONARY = 3, 6, 7, 9, 11
_PAGE_UNPACKED, _PAGE_PACKED = 2, 3


def check_pages(file: Any, names: Collection[str]) -> None:
  """Compares the headers of the pages of columns with the sizes that the footer says.

  Args:
    file: a whole Parquet file, open for reading.
    names: of the columns; of nested ones, the outermost.

  Raises:
    ValueError: if footer or headers are damaged, or the sizes are others.
  """
  length = file.seek(0, os.SEEK_END)
  file.seek(max(0, length - 8))
  size = int.from_bytes((last := file.read(8))[:4], "little")
  if last[4:] != _END or size + 12 > length:
    raise ValueError("its end is that of no Parquet file")
  file.seek(length - 8 - size)
  try:
    footer, _ = _struct(file.read(size), 0, 0)
    for group in _list(footer, _GROUPS):
      for column in _list(group, _COLUMNS):
        said = column[_SAID]
        if said[_PATH][0].decode(errors="replace") in names:
          _check(file, said, length - 8 - size)
  except (IndexError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"its footer is damaged ({type(error).__name__}: {error})") from error


def _check(file: Any, said: Mapping[int, Any], stop: int) -> None:
  """Compares the pages of a column of a row group with what is said of it; `stop` is where the footer begins."""
  start = min(offset for offset in (said[_DATA], said.get(_DICTIONARY)) if offset) if said[_PACKED] else 0
  at, end, unpacked = start, start + said[_PACKED], 0
  what = f"column {b'.'.join(said[_PATH]).decode(errors='replace')!r}"
  if not 0 <= start <= end <= stop:
    raise ValueError(f"{what} lies from byte {start} to {end}, the footer begins at {stop}")
  while at < end:
    length, page_unpacked, page_packed = _header(file, at, end)
    at, unpacked = at + length + page_packed, unpacked + length + page_unpacked
  if at != end or unpacked != said[_UNPACKED]:
    raise ValueError(f"pages of {what} have {at - start} bytes, {unpacked} unpacked; its footer says {end - start} and "
                     f"{said[_UNPACKED]}")  # fmt: skip


def _header(file: Any, at: int, end: int) -> tuple[int, int, int]:
  """(Its length, the page's size when it is unpacked, and in the file) of the page that begins at a byte."""
  size = _HEADER
  while True:
    file.seek(at)
    content = file.read(min(size, end - at))
    try:
      found, length = _struct(content, 0, 0)
      break
    except IndexError:
      if size >= _LONGEST or len(content) < size:
        raise ValueError(f"the header of the page at byte {at} does not end") from None
      size *= 16
  unpacked, packed = found.get(_PAGE_UNPACKED, -1), found.get(_PAGE_PACKED, -1)
  if type(unpacked) is not int or type(packed) is not int or min(unpacked, packed) < 0:
    raise ValueError(f"the header of the page at byte {at} gives the sizes {unpacked!r:.40} and {packed!r:.40}")
  return length, unpacked, packed


def _list(found: Mapping[int, Any], field: int) -> list[Any]:
  value = found.get(field, [])
  if not isinstance(value, list):
    raise TypeError(f"field {field} is no list")
  return value


def _struct(content: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
  """(Values by field, where it ends) of a struct: whole numbers, bytes, lists and structs; of others None."""
  if depth > _DEEPEST:
    raise ValueError("its structs are nested too deeply")
  found: dict[int, Any] = {}
  field = 0
  while True:
    head, at = content[at], at + 1
    if head == 0:
      return found, at
    if head >> 4:
      field += head >> 4
    else:
      value, at = _varint(content, at)
      field = _signed(value)
    kind = head & 15
    found[field], at = (None, at) if kind in (1, 2) else _value(content, at, kind, depth)  # true and false are kinds


def _value(content: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
  """(A value, where it ends)."""
  if kind in (4, 5, 6):
    value, at = _varint(content, at)
    return _signed(value), at
  if kind in (3, 7):
    return None, at + (1 if kind == 3 else 8)
  if kind == 8:
    size, at = _varint(content, at)
    if at + size > len(content):
      raise IndexError("a text beyond the end")
    return content[at : at + size], at + size
  if kind == 12:
    return _struct(content, at, depth + 1)
  if kind not in (9, 10):
    raise ValueError(f"a value of kind {kind}")
  head, at = content[at], at + 1
  count, kind, values = head >> 4, head & 15, []
  if count == 15:
    count, at = _varint(content, at)
  if count > len(content) - at:
    raise IndexError("a list beyond the end")
  for _ in range(count):
    value, at = _value(content, at, 3 if kind in (1, 2) else kind, depth + 1)
    values.append(value)
  return values, at


def _varint(content: bytes, at: int) -> tuple[int, int]:
  """(A number of seven bits a byte, where it ends)."""
  value = 0
  for shift in range(0, 70, 7):
    byte, at = content[at], at + 1
    value |= (byte & 127) << shift
    if not byte & 128:
      return value, at
  raise ValueError("a number of more than 64 bits")


def _signed(value: int) -> int:
  return (value >> 1) ^ -(value & 1)

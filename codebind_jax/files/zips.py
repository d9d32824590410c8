"""Zip archives that may come from anywhere: of a directory of bounded size, with plain members under one name each."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

_DIRECTORY = 1 << 24  # bytes; Python's objects of its entries are some ten times as large
_KINDS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others take memory as their data say


class _Reader(io.BufferedReader):
  """A file that gives no more at once than a directory may have, while `bounded`: `zipfile` reads that at once."""

  bounded = True

  def read(self, size: int | None = -1, /) -> bytes:
    """As a file does, or ValueError."""
    if not self.bounded:
      return super().read(size)
    whole = size is None or size < 0
    content = super().read(_DIRECTORY + 1 if whole else min(size, _DIRECTORY + 1))
    if len(content) > _DIRECTORY:
      raise ValueError(f"a zip archive with a directory beyond {_DIRECTORY} bytes")
    return content


@contextlib.contextmanager
def open_zip(source: str | Path | bytes) -> Iterator[zipfile.ZipFile]:
  """An archive whose directory has been checked; a member gives no more bytes than its `file_size`.

  Args:
    source: a path or the archive's bytes.

  Raises:
    ValueError: for a directory beyond 16 MB, two members of one name, one that is encrypted or compressed otherwise
      than by deflate, or one that ends behind the file.
    zipfile.BadZipFile, NotImplementedError, OSError, struct.error, ...: as `zipfile` does for what is damaged.
  """
  with contextlib.ExitStack() as stack:
    raw = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb", buffering=0)
    file = stack.enter_context(_Reader(raw))
    size = file.seek(0, os.SEEK_END)
    archive = stack.enter_context(zipfile.ZipFile(file))
    file.bounded = False
    names = set()
    for member in archive.infolist():
      if member.filename in names:
        raise ValueError(f"a zip archive with two members of the name {member.filename!r:.80}")
      names.add(member.filename)
      if member.flag_bits & 1 or member.compress_type not in _KINDS:
        what = "encrypted" if member.flag_bits & 1 else f"compressed by method {member.compress_type}"
        raise ValueError(f"member {member.filename!r:.80} is {what}; allowed are stored and deflated ones")
      if not 0 <= member.header_offset <= member.header_offset + member.compress_size <= size:
        raise ValueError(f"member {member.filename!r:.80} ends behind the archive; it is cut or damaged")
    yield archive


def start_of(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
  """Where a member's content begins in the file.

  Raises:
    ValueError: if it is not stored as it is, or no member begins where the directory says.
  """
  if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
    raise ValueError(f"member {member.filename!r:.80} is compressed; it must be stored as it is")
  file = archive.fp
  file.seek(member.header_offset)
  header = file.read(30)
  if len(header) < 30 or header[:4] != b"PK\x03\x04":
    raise ValueError(f"no member {member.filename!r:.80} begins at byte {member.header_offset}")
  return member.header_offset + 30 + sum(struct.unpack("<2H", header[26:]))

"""Readers of the archives that packages come in: npm tarballs, wheels, Debian packages and Qt resource files."""

import contextlib
import io
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from codebind_jax.data.reading import MACHINE
from codebind_jax.files.zips import open_zip

_LARGEST = 1 << 29  # bytes of a file in an archive


def read_members(path: Path, names: Iterable[str]) -> dict[str, bytes]:
  """Contents of the named files of an archive; a name that the archive lacks is absent from the result.

  Args:
    path: a .tgz, .tar.gz, .whl, .zip or .deb file.
    names: inner paths, without a leading "./".

  Raises:
    ValueError: if the archive is damaged, or of another kind.
  """
  wanted = set(names)
  with _errors(path):
    if path.suffix in (".whl", ".zip"):
      with open_zip(path) as archive:
        for member in archive.infolist():
          if member.filename in wanted:
            _check_size(member.filename, member.file_size)
        return {name: archive.read(name) for name in archive.namelist() if name in wanted}
    if path.suffix == ".deb":
      with deb_tar(path.read_bytes()) as archive:
        return _tar_members(archive, wanted)
    if path.name.endswith((".tgz", ".tar.gz")):
      with tarfile.open(path) as archive:
        return _tar_members(archive, wanted)
  raise ValueError(f"{path}: unknown kind of archive; allowed: .tgz .tar.gz .whl .zip .deb")


def member_names(path: Path) -> list[str]:
  """Names of the files of a wheel or zip archive.

  Raises:
    ValueError: if the archive is damaged.
  """
  with _errors(path), open_zip(path) as archive:
    return archive.namelist()


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
  """Makes whatever a damaged archive raises a ValueError with its name, but errors of the machine."""
  try:
    yield
  except (ImportError, FileNotFoundError, PermissionError):
    raise
  except Exception as error:
    if isinstance(error, OSError) and error.errno in MACHINE:
      raise
    raise ValueError(f"{path}: damaged archive ({error}); remove it and run again to fetch it anew") from error


def _check_size(name: str, size: int) -> None:
  if size > _LARGEST:
    raise ValueError(f"member {name!r:.80} has {size} bytes; allowed are {_LARGEST}")


def _tar_members(archive: tarfile.TarFile, wanted: set[str]) -> dict[str, bytes]:
  contents = {}
  for member in archive:
    name = member.name.removeprefix("./")
    if name in wanted and member.isfile():
      _check_size(name, member.size)
      contents[name] = archive.extractfile(member).read()
      if len(contents) == len(wanted):
        break
  return contents


def deb_tar(data: bytes) -> tarfile.TarFile:
  """Opens the files of a Debian package, the `data.tar.*` member of an `ar` archive.

  Raises:
    ValueError: if `data` is no Debian package.
  """
  if data[:8] != b"!<arch>\n":
    raise ValueError("not an ar archive")
  offset = 8
  while offset + 60 <= len(data):
    header = data[offset : offset + 60]
    name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
    if name.startswith("data.tar"):
      body = data[offset + 60 : offset + 60 + size]
      if len(body) < size:
        raise ValueError(f"member {name} is cut short: {len(body)} of {size} bytes")
      return tarfile.open(fileobj=io.BytesIO(body))
    offset += 60 + size + (size & 1)
  raise ValueError("no data.tar member")


def read_rcc(data: bytes) -> dict[str, bytes]:
  """All files of a Qt resource file: inner path -> content.

  The header is "qres" and four big-endian u32: version, offsets of tree, data and names. A tree entry is 22 bytes from
  version 2 on, else 14: u32 name offset, u16 flags, then for a folder (flag 2) u32 count and u32 first child, for a
  file 4 skipped bytes and u32 data offset. Flag 1 marks zlib behind a 4-byte length, flag 4 zstandard.

  Raises:
    ValueError: if `data` is no Qt resource file or is damaged.
  """
  if data[:4] != b"qres":
    raise ValueError("not a Qt resource file: it does not begin with 'qres'")
  try:
    version, tree, payload, names = struct.unpack_from(">4I", data, 4)
    width = 22 if version >= 2 else 14
    files = {}
    todo = [(0, "")]
    seen = set()
    while todo:
      index, parent = todo.pop()
      if index in seen:
        raise ValueError("its tree has a cycle")
      seen.add(index)
      offset = tree + index * width
      name_offset, flags = struct.unpack_from(">IH", data, offset)
      path = parent
      if index:
        length = struct.unpack_from(">H", data, names + name_offset)[0]
        start = names + name_offset + 6
        path = f"{parent}/{data[start : start + 2 * length].decode('utf-16-be')}".lstrip("/")
      if flags & 2:
        count, first = struct.unpack_from(">2I", data, offset + 6)
        if count > len(data) // width:
          raise ValueError(f"a folder of {count} files in {len(data)} bytes")
        todo.extend((first + i, path) for i in range(count))
      else:
        files[path] = _rcc_file(data, payload + struct.unpack_from(">I", data, offset + 10)[0], flags)
    return files
  except (struct.error, zlib.error, UnicodeDecodeError, OverflowError) as error:
    raise ValueError(f"damaged Qt resource file ({error})") from error


def _rcc_file(data: bytes, offset: int, flags: int) -> bytes:
  size = struct.unpack_from(">I", data, offset)[0]
  body = data[offset + 4 : offset + 4 + size]
  if len(body) < size:
    raise ValueError(f"a file is cut short: {len(body)} of {size} bytes")
  if flags & 1:
    unpacking = zlib.decompressobj()
    content = unpacking.decompress(body[4:], _LARGEST)
    if not unpacking.eof:
      raise ValueError(f"a file is cut short, or has more than {_LARGEST} bytes")
    return content
  if flags & 4:
    import zstandard

    try:
      with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(body) as stream:
        content = stream.read(_LARGEST + 1)
    except zstandard.ZstdError as error:
      raise ValueError(f"damaged zstandard data ({error})") from error
    _check_size("", len(content))
    return content
  return body

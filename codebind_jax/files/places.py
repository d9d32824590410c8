"""Files and folders, near and far alike: paths, reading, and files and folders that are replaced whole."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Iterator

from etils import epath

from codebind_jax.files import far
from codebind_jax.files.far import Found, Path
from codebind_jax.files.temporary import exchange, look_once, scratch, temporary_name, writing


def path(text: str | os.PathLike) -> Path:
  """The path that a user's text means: near ones expanded (`~`) and absolute, far ones as they are.

  Raises:
    ValueError: for another scheme, an address without a bucket, or a package that is not installed.
  """
  name = os.fspath(text)
  scheme, _, rest = name.partition(":/")
  if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+", scheme) or not rest and not name.endswith(":/"):
    return pathlib.Path(name).expanduser().absolute()
  if scheme not in far.SCHEMES:
    raise ValueError(f"{name!r}: unknown scheme {scheme + '://'!r}; allowed: {far.ALLOWED}")
  if not re.match(r"/[^/]", rest):
    raise ValueError(f"{name!r}: has no bucket after {scheme}://; allowed: {far.ALLOWED}")
  module, extra = far.SCHEMES[scheme][:2]
  if importlib.util.find_spec(module) is None:
    raise ValueError(f"{name!r}: {module} is not installed: pip install codebind_jax[{extra}]")
  return epath.Path(name)


def exists(place: Path) -> bool:
  """Whether there is a file or a folder; a far folder is there as long as there is an object in it."""
  return is_file(place) or is_folder(place)


def is_file(place: Path) -> bool:
  """Whether there is a file."""
  return far.found(place) is not None if far.is_far(place) else place.is_file()


def is_folder(place: Path) -> bool:
  """Whether there is a folder; a far one is there as long as there is an object in it."""
  return any(any(page) for page in far.pages(place, whole=True, limit=1)) if far.is_far(place) else place.is_dir()


def children(folder: Path, pattern: str = "*") -> list[Path]:
  """Files and folders in a folder, by name; none where there is no folder."""
  if not far.is_far(folder):
    there = os.listdir(folder) if folder.is_dir() else []
  else:
    full = [name for objects, folders in far.pages(folder, whole=False) for name in (*objects, *folders)]
    there = {name.rstrip("/").rpartition("/")[2] for name in full}
  return [folder / name for name in sorted(there) if fnmatch.fnmatchcase(name, pattern)]


def contents(folder: Path) -> dict[str, Found]:
  """All files below a folder, by their path in it."""
  if far.is_far(folder):
    cut = len(far.split(folder)[2]) + 1 if far.split(folder)[2] else 0
    below = {name[cut:]: item for objects, _ in far.pages(folder, whole=True) for name, item in objects.items()}
    return {name: item for name, item in sorted(below.items()) if name and not name.endswith("/")}
  near = sorted(one for one in folder.rglob("*") if one.is_file())
  stats = {one.relative_to(folder).as_posix(): one.stat() for one in near}
  return {name: Found(stat.st_size, str(stat.st_mtime_ns)) for name, stat in stats.items()}


def read_bytes(place: Path, start: int | None = None, stop: int | None = None) -> bytes:
  """A file's bytes from `start` up to `stop`, all of them unless given.

  Raises:
    FileNotFoundError: if there is none.
    OSError: if it cannot be read.
  """
  if far.is_far(place):
    return far.read(place, start, stop)
  with open(place, "rb") as file:
    file.seek(start or 0)
    return file.read() if stop is None else file.read(stop - (start or 0))


def read_text(place: Path) -> str:
  """A file's text, UTF-8."""
  return read_bytes(place).decode()


def make_folder(folder: Path) -> None:
  """Makes a folder and those above it; a far one is there once an object is."""
  if not far.is_far(folder):
    folder.mkdir(parents=True, exist_ok=True)


def upload(file: pathlib.Path, place: Path) -> None:
  """Puts a local file at a far place, whole or not at all: after an error what was there before is there still."""
  do = lambda system: system._put_file(os.fspath(file), os.fspath(place))
  far.ask(place, "written", do, file.stat().st_size)


def download(place: Path, file: pathlib.Path) -> None:
  """Puts a far object at a local path, whole or not at all."""
  about = far.found(place)
  with replacing(file) as part:
    do = lambda system, part=part: system._get_file(os.fspath(place), os.fspath(part))
    far.ask(place, "read", do, about.size if about else 0)
    if about and part.stat().st_size != about.size:
      raise OSError(f"{place}: got {part.stat().st_size} of {about.size} bytes")


def remove(place: Path) -> None:
  """Removes a file that is or is not there."""
  if not far.is_far(place):
    place.unlink(missing_ok=True)
    return
  with contextlib.suppress(FileNotFoundError):
    far.ask(place, "removed", lambda system: system._rm_file(os.fspath(place)))


def remove_folder(folder: Path, first: str = "") -> None:
  """Removes a folder that is or is not there; far, the object `first`, whose lack says so, before the others."""
  if not far.is_far(folder):
    shutil.rmtree(folder, ignore_errors=True)
    return
  for name in sorted(contents(folder), key=lambda name: (name != first, name)):
    remove(folder / name)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[pathlib.Path]:
  """Yields the path of a temporary file that takes the place of `path` at the end, or is removed after an error.

  The temporary file is local, beside a local path. A reader, or a kill at any time, sees the old file or the new one.
  Several processes may write one path at once. What killed writers left in the folder is removed.

  Raises:
    OSError: naming the path, if the disk is full or cannot be written.
  """
  if far.is_far(path):
    with scratch() as folder:
      with writing(folder):
        yield folder / path.name
      upload(folder / path.name, path)
    return
  look_once(path.parent)
  temporary = path.with_name(temporary_name(path.name))
  try:
    with writing(path, temporary):
      yield temporary
      _flush(temporary)
      os.replace(temporary, path)
      _flush(path.parent)
  finally:
    with contextlib.suppress(OSError):  # of a folder that is gone
      temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
  """Writes a UTF-8 text file as `replacing` does."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def replace_folder(new: pathlib.Path, folder: Path, last: str = "") -> None:
  """Puts a local folder in the place of another one, or of none.

  Near, both are exchanged at once; on a disk that cannot, a kill between leaves the old one as `.NAME.MARK.old`, which
  the next writer in the folder above puts back. Far, all is uploaded beside the old folder first, so that an error
  leaves that as it was; then copied there by the far disk itself. A kill in that moment leaves a folder without `last`,
  so that it is not taken for whole.

  Args:
    new: moved near, removed by the caller far.
    folder: where it goes.
    last: far, the file in it whose lack says that a folder is not whole: removed first, copied last.
  """
  if far.is_far(folder):
    _replace_far(new, folder, last)
    return
  look_once(folder.parent)
  old = folder.with_name(temporary_name(f".{folder.name}", "old"))
  if folder.exists():
    if exchange(new, folder):
      old = new
    else:
      os.replace(folder, old)
      os.replace(new, folder)
  else:
    os.replace(new, folder)
  _flush(folder.parent)
  shutil.rmtree(old, ignore_errors=True)


def _replace_far(new: pathlib.Path, folder: Path, last: str) -> None:
  part, old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.part"), contents(folder)
  names = sorted(contents(new), key=lambda name: (name == last, name))
  try:
    for name in names:
      upload(new / name, part / name)
    if last in old:
      remove(folder / last)
    for name in names:
      far.copy(part / name, folder / name, (new / name).stat().st_size)
    for name in set(old) - set(names):
      remove(folder / name)
  finally:
    for name in names:
      with contextlib.suppress(OSError):  # what failed is named; these remain under a name of their own
        remove(part / name)


def _flush(path: pathlib.Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)

"""Files and folders that are being written: their names, what killed writers leave, and disks that are full."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import itertools
import os
import pathlib
import platform
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator

from codebind_jax.files import far
from codebind_jax.files.far import Path

_STALE = 86_400  # seconds after which what another machine writes, and has not changed since, counts as left behind
_MARKED = re.compile(r"\.([0-9a-f]{8})-(\d+)-([0-9a-f]{6})-\d+\.(part|old)$")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_SAID = re.compile("|".join(re.escape(os.strerror(number)) for number in sorted(_FULL)))
_EXCHANGE, _HERE = 2, -100  # of Linux's renameat2: RENAME_EXCHANGE, AT_FDCWD
_numbers = itertools.count()
_looked: set[str] = set()


@functools.cache
def _machine() -> str:
  """This boot of this machine, and the processes that this one sees: where a process number means one process."""
  parts = [platform.node()]
  with contextlib.suppress(OSError):
    parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text())
    parts.append(os.readlink("/proc/self/ns/pid"))
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


@functools.cache
def _process(pid: int) -> str:
  """Tells a process from an earlier one of its number."""
  return uuid.uuid4().hex[:6]


def temporary_name(name: str, kind: str = "part") -> str:
  """A name, that no other call gives, of a file or folder that takes the place of one called `name`.

  It says which process writes: once that is gone, `remove_left` removes what it has left.
  """
  pid = os.getpid()
  return f"{name}.{_machine()}-{pid}-{_process(pid)}-{next(_numbers)}.{kind}"


def remove_left(folder: pathlib.Path) -> None:
  """Removes from a folder what writers have left there that were killed; what cannot be removed stays.

  An old folder that was to be replaced is put back where it is missing.
  """
  with contextlib.suppress(OSError):
    for entry in list(os.scandir(folder)):
      if not (found := _MARKED.search(entry.name)) or not _is_left(entry, *found.groups()[:3]):
        continue
      replaced = folder / entry.name[1 : found.start()]
      if found[4] == "old" and not replaced.exists():
        os.rename(entry.path, replaced)
      elif entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path, ignore_errors=True)
      else:
        os.unlink(entry.path)


def _is_left(entry: os.DirEntry, machine: str, pid: str, process: str) -> bool:
  """Whether who writes it is gone."""
  if machine != _machine():
    return time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE
  if int(pid) == os.getpid():
    return process != _process(os.getpid())
  try:
    os.kill(int(pid), 0)
  except ProcessLookupError:
    return True
  except PermissionError:
    return False
  return False


def look_once(folder: pathlib.Path) -> None:
  """`remove_left`, the first time that this process writes to a folder."""
  if str(folder) not in _looked:
    _looked.add(str(folder))
    remove_left(folder)


def make_scratch() -> pathlib.Path:
  """A new folder of the system's folder for temporary files, which the caller removes.

  Raises:
    OSError: naming the folder, if there is none or it is full.
  """
  base = pathlib.Path(tempfile.gettempdir())
  look_once(base)
  scratch = base / temporary_name("codebind_jax")
  with writing(base):
    scratch.mkdir(mode=0o700)
  return scratch


@contextlib.contextmanager
def scratch() -> Iterator[pathlib.Path]:
  """A new folder of the system's folder for temporary files, for the block."""
  folder = make_scratch()
  try:
    yield folder
  finally:
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path, temporary: pathlib.Path | None = None) -> Iterator[None]:
  """Makes errors of a disk, while a file or folder is written, ones that name it.

  Args:
    path: what is written.
    temporary: what is written in its place at first.

  Raises:
    OSError: for any exception that says that a disk is full: naming the path, how much was written and how much is
      free; and for an OSError that names nothing or what is temporary.
  """
  there = temporary or path
  try:
    yield
  except Exception as error:
    full = getattr(error, "errno", None) in _FULL or _FULL_SAID.search(str(error))
    own = isinstance(error, OSError) and error.errno and error.filename in (None, os.fspath(there))
    if far.is_far(there) or isinstance(error, OSError) and error.filename and not own or not (full or own):
      raise
    number = error.errno if own else errno.ENOSPC
    reason = os.strerror(number) if own else _FULL_SAID.search(str(error))[0]
    if full:
      reason += f"; more than {_size(there):,} bytes are needed, {_free(there):,} are free"
    raise OSError(number, f"cannot be written ({reason})", os.fspath(path)) from error


def _size(there: pathlib.Path) -> int:
  """Bytes of a file, or of all in a folder that is temporary."""
  with contextlib.suppress(OSError):
    if not there.is_dir():
      return there.stat().st_size
    return sum(one.stat().st_size for one in there.rglob("*") if one.is_file()) if "." in there.name else 0
  return 0


def _free(there: pathlib.Path) -> int:
  while not there.exists() and there != there.parent:
    there = there.parent
  return shutil.disk_usage(there).free


def exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
  """Exchanges two folders of one disk at once; False where the system or the disk cannot."""
  rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
  return bool(rename) and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), ctypes.c_uint(_EXCHANGE)) == 0

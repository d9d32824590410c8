"""Locks between processes: a file that waits for its turn, a folder that has one writer."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import logging

from codebind_jax.files import far
from codebind_jax.files.far import Path
from codebind_jax.files.jsons import from_json
from codebind_jax.files.places import read_bytes, remove

try:
  import fcntl
except ImportError:  # not a POSIX system: nothing is locked
  fcntl = None

WRITER = ".writer.lock"  # in a folder while a process writes to it


@dataclasses.dataclass(frozen=True)
class Beat:
  """How the writer of a folder shows other hosts that it lives.

  Attributes:
    every: seconds between its signs of life.
    limit: seconds without one after which it counts as dead.
    sleep: waits that many seconds.
  """

  every: float = 10.0
  limit: float = 60.0
  sleep: Callable[[float], Any] = time.sleep
beat = Beat()


@contextlib.contextmanager
def lock(path: Path, work: str) -> Iterator[None]:
  """Holds a lock file that only one process has at a time; the system frees that of a process that was killed.

  Far disks have no locks, and nothing is held there: of a run, process 0 alone replaces shared objects, and what others
  write (their shards, their parts of a checkpoint) has names of its own.

  Args:
    path: the lock file, made where it is not there.
    work: what another process may be doing, for the line in the log before a wait: "fetches into DIR".
  """
  if far.is_far(path):
    yield
    return
  with open(path, "w") as handle:
    if fcntl:
      try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError:
        logging.info("waiting for another process that %s", work)
        fcntl.flock(handle, fcntl.LOCK_EX)
    yield


@contextlib.contextmanager
def held(folder: Path, work: str) -> Iterator[None]:
  """Makes this process the one that writes to a folder, until the end of the block.

  The folder has `WRITER` meanwhile: which process on which host, since when. That of a process of this host that was
  killed is taken over at once; that of another host, which cannot be looked at, once it has shown no sign of life for
  `beat.limit` seconds. No locks of the system are needed, which disks shared by hosts may lack or keep to one host.

  Args:
    folder: that is there, if it is near.
    work: what is done with it, for the errors of others: "trains".

  Raises:
    ValueError: naming the process that has it.
    OSError: if it cannot be written to.
  """
  lock = _Writer(folder, work)
  lock.take()
  try:
    yield
  finally:
    lock.release()


def check_held(place: Path) -> None:
  """Checks that no other process has taken over a folder that this one holds, or one above it.

  Raises:
    RuntimeError: naming the process that has it, if one has.
  """
  for folder in (place, *place.parents):
    lost = _mine[os.fspath(folder)].lost if os.fspath(folder) in _mine else ""
    if lost:
      raise RuntimeError(f"{folder}: this process showed no sign of life, and another one has taken over: {lost}; this "
                         "one writes nothing more")  # fmt: skip


_mine: dict[str, _Writer] = {}  # folder -> its writer, of this process


class _Writer:
  """A folder's writer: this process, between `take` and `release`."""

  def __init__(self, folder: Path, work: str):
    self._slot = (_FarSlot if far.is_far(folder) else _NearSlot)(folder / WRITER)
    self._folder, self._work, self.lost = folder, work, ""
    now = datetime.datetime.now(datetime.UTC)
    self._record = {"work": work, "host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(),
                    "started": _started(os.getpid()), "since": f"{now:%Y-%m-%d %H:%M:%S} UTC",
                    "mark": uuid.uuid4().hex, "beat": 0}  # fmt: skip
    self._end = threading.Event()
    self._thread = threading.Thread(target=self._show_life, daemon=True, name="writer")

  def take(self) -> None:
    """Takes the folder, or raises a ValueError that names who has it."""
    silent, seen = 0.0, None
    while True:
      there = self._slot.read()
      if there is None:
        if self._slot.create(self._record):
          break
        continue
      holder, tag = there
      lives = _lives(holder)
      if lives or (lives is None and seen not in (None, tag)):
        raise ValueError(self._refusal(holder))
      if lives is None and silent < beat.limit:
        if seen is None:
          logging.warning("%s: %s; it is taken over if it shows no sign of life for %g s, and at once if %s is removed",
                          self._folder, _said(holder), beat.limit, self._slot.path)  # fmt: skip
        seen = tag
        beat.sleep(min(1.0, beat.limit))
        silent += 1.0
        continue
      if not self._slot.replace(self._record, tag):
        continue
      logging.warning("%s: taken over from a process that ended without saying so: %s", self._folder, _said(holder))
      if lives is None:  # where hosts do not see each other's locks, two may have done so
        beat.sleep(1.0)
        now = self._slot.read()
        if now is None or now[0].get("mark") != self._record["mark"]:
          raise ValueError(self._refusal(now[0] if now else {}))
      break
    _mine[os.fspath(self._folder)] = self
    _marks.add(self._record["mark"])
    self._thread.start()

  def _refusal(self, holder: Mapping[str, Any]) -> str:
    gone = "" if holder.get("machine") == _machine() else f"; if that process is gone, remove {self._slot.path}"
    return f"{self._folder}: {_said(holder)}; allowed: one at a time, so wait for its end, or use another folder{gone}"

  def _show_life(self) -> None:
    while not self._end.wait(beat.every):
      try:
        there = self._slot.read()
        if there is None or there[0].get("mark") != self._record["mark"]:
          self.lost = _said(there[0]) if there else f"{self._slot.path} was removed"
          logging.error("%s: this process is no longer its writer: %s", self._folder, self.lost)
          return
        self._record["beat"] += 1
        self._slot.touch(self._record, there[1])
      except OSError as error:
        logging.debug("%s: %s", self._slot.path, error)

  def release(self) -> None:
    """Gives the folder back."""
    self._end.set()
    self._thread.join()
    _mine.pop(os.fspath(self._folder), None)
    _marks.discard(self._record["mark"])
    with contextlib.suppress(OSError):  # a disk that fails; the process ends, which others see
      there = self._slot.read()
      if there is not None and there[0].get("mark") == self._record["mark"]:
        remove(self._slot.path)


_marks: set[str] = set()  # of the locks that this process holds


class _NearSlot:
  """A lock file on a disk."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def read(self) -> tuple[dict[str, Any], str] | None:
    """(who has it, what changes with each sign of life), or None."""
    try:
      with open(self.path, "rb") as file:
        return _parsed(file.read()), _tag(os.fstat(file.fileno()))
    except FileNotFoundError:
      return None

  def create(self, record: Mapping[str, Any]) -> bool:
    """Whether there was none, and now is this one."""
    with self._part(record) as part:
      try:
        os.link(part, self.path)  # is there with its content, or not at all, also where several hosts try
        return True
      except FileExistsError:
        return False
      except OSError:  # a disk without links
        try:
          with open(self.path, "xb") as file:
            file.write(json.dumps(record).encode())
          return True
        except FileExistsError:
          return False

  def replace(self, record: Mapping[str, Any], tag: str) -> bool:
    """Whether the one of that tag was still there, and now is this one."""
    try:
      with open(self.path, "rb") as file, self._part(record) as part:
        if fcntl:
          with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if _tag(os.stat(self.path)) != tag:
          return False
        os.replace(part, self.path)
        return True
    except FileNotFoundError:
      return False

  @contextlib.contextmanager
  def _part(self, record: Mapping[str, Any]) -> Iterator[pathlib.Path]:
    part = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
      part.write_text(json.dumps(record) + "\n")
      yield part
    finally:
      part.unlink(missing_ok=True)

  def touch(self, record: Mapping[str, Any], tag: str) -> None:
    """A sign of life."""
    os.utime(self.path)


class _FarSlot:
  """A lock object at a far disk, which creates and replaces it on condition, if it knows how."""

  def __init__(self, path: Path):
    self.path = path

  def read(self) -> tuple[dict[str, Any], str] | None:
    """(who has it, what changes with each sign of life), or None."""
    try:
      about = far.found(self.path)
      return None if about is None else (_parsed(read_bytes(self.path)), about.tag)
    except FileNotFoundError:
      return None

  def create(self, record: Mapping[str, Any]) -> bool:
    """Whether there was none, and now is this one."""
    return far.put_if(self.path, json.dumps(record).encode(), None)

  def replace(self, record: Mapping[str, Any], tag: str) -> bool:
    """Whether the one of that tag was still there, and now is this one."""
    return far.put_if(self.path, json.dumps(record).encode(), tag)

  touch = replace


def _tag(stat: os.stat_result) -> str:
  return f"{stat.st_ino}/{stat.st_mtime_ns}"


def _parsed(content: bytes) -> dict[str, Any]:
  """Who has it; {} where that cannot be read."""
  try:
    record = from_json(content, "lock")
  except ValueError:
    return {}
  return record if isinstance(record, dict) else {}


def _said(holder: Mapping[str, Any]) -> str:
  """Who has it, in words."""
  if not holder:
    return "an unknown process has it"
  return (f"process {holder.get('pid')} on {holder.get('host')} {holder.get('work')} here since {holder.get('since')}")


def _lives(holder: Mapping[str, Any]) -> bool | None:
  """Whether a process of this machine lives; None of another machine, or where that cannot be known."""
  if not holder or holder.get("machine") != _machine():
    return None
  if holder.get("pid") == os.getpid():
    return holder.get("mark") in _marks
  started = _started(holder.get("pid"))
  if started == "unknown":
    return None
  return bool(started) and started == holder.get("started")


def _started(pid: Any) -> str:
  """When a process of this machine began, by its clock; empty if there is none, "unknown" if nothing says so."""
  try:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
  except (FileNotFoundError, ProcessLookupError):
    if pathlib.Path("/proc/self/stat").exists():
      return ""
  except (OSError, IndexError):
    return "unknown"
  try:
    os.kill(int(pid), 0)
  except ProcessLookupError:
    return ""
  except (OSError, TypeError, ValueError):
    pass
  return "unknown"


@functools.cache
def _machine() -> str:
  """What tells apart machines, their restarts, and containers with process numbers of their own."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return f"{socket.gethostname()}/{uuid.getnode():x}"

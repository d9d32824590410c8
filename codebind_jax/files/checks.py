"""What a run asks of its disks before it begins: access to far ones, room on near ones."""

from __future__ import annotations

import importlib
import pathlib
import shutil
import threading
import uuid

from codebind_jax.files import far
from codebind_jax.files.far import Path
from codebind_jax.files.places import read_text, remove, write_whole


def check_space(folder: Path, need: int, what: str) -> None:
  """Checks that a near disk has room for what will be written; nobody says it of far ones.

  Args:
    folder: on the disk, or a folder that is made there later.
    need: bytes.
    what: will be written, and which key chooses where, for the error.

  Raises:
    OSError: naming the folder, the bytes needed and those free.
  """
  if far.is_far(folder):
    return
  there = pathlib.Path(folder)
  while not there.exists() and there != there.parent:
    there = there.parent
  free = shutil.disk_usage(there).free
  if need > free:
    raise OSError(28, f"no space: {what} need {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free", str(folder))


def probe(place: Path, seconds: float = 10.0, write: bool = False) -> None:
  """Asks a far disk whether a run can use it, before anything is built; near paths are not asked.

  Args:
    place: folder or file of the run.
    seconds: after which a server counts as one that does not answer.
    write: also writes an object `.probe-HEX` in this folder, reads it and removes it.

  Raises:
    ValueError: in one line: the address, what failed (no such bucket, no credentials or wrong ones, no answer) and
      what to set.
  """
  if not far.is_far(place):
    return
  importlib.import_module(far.SCHEMES[far.split(place)[0]][0])  # seconds on a busy machine, which are not the server's
  failure: list[Exception] = []

  def look() -> None:
    far.here.attempts = 2  # so that the reason is there in time
    try:
      next(far.pages(place, whole=True, limit=1))
      if write:
        mark, text = place / f".probe-{uuid.uuid4().hex[:8]}", uuid.uuid4().hex
        write_whole(mark, text)
        read = read_text(mark)
        remove(mark)
        if read != text:
          raise OSError(f"{place}: what was written is not what is read")
    except Exception as error:
      failure.append(error)

  thread = threading.Thread(target=look, daemon=True, name="probe")  # left behind where nothing answers
  thread.start()
  thread.join(seconds)
  advice = far.advice(far.split(place)[0], TimeoutError)
  if thread.is_alive():
    raise ValueError(f"{place}: no answer in {seconds:g} s; {advice}")
  if isinstance(failure[0] if failure else None, OSError):
    raise ValueError(str(failure[0])) from failure[0]
  if failure:
    raise ValueError(f"{place}: cannot be used: {far.judged(failure[0])[1]}; {advice}") from failure[0]

"""Checkpoints in a local folder: arrays by Orbax, which all processes write at once, and checksums of all files.

`STEP/state` has the arrays, `STEP/meta` what is saved with them, `STEP/checksums.json` a CRC-32 of each 64 MiB of each
file of both. Orbax writes into a folder of another name; the checksums are written there too, before it gets its own:
a kill at any time leaves a checkpoint with its checksums, or none. Arrays are not compressed: weights lose 7 % of their
size, which takes longer than all else of a save; see benchmarks/checkpoints.py.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pathlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from codebind_jax import files
from codebind_jax.runtime import distributed
from codebind_jax.runtime.checkpoint_files import kinds_of, newest_first, same_on_all, verify_checksums, write_checksums

_STATE, _META = "state", "meta"
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax writes into
# Orbax looks for files by patterns with the whole path in them, and Tensorstore wants UTF-8.
_PLAIN = re.compile(r"[\w/.,:+=@%~# -]*", re.ASCII)


class NearCheckpoints:
  """The checkpoints in a local folder; what `checkpoint.Checkpoints` does with them, but for choosing one."""

  def __init__(self, path: pathlib.Path, *, keep: int):
    self.path, self._keep = path, keep
    self._stack = contextlib.ExitStack()
    self._writer: ocp.AsyncCheckpointer | None = None
    self._pool: concurrent.futures.ThreadPoolExecutor | None = None
    self._running: concurrent.futures.Future | None = None
    self._plain, self._saving = path, 0

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, newest first."""
    return newest_first(self._names())

  def _names(self) -> list[str]:
    try:
      return os.listdir(self.path)
    except FileNotFoundError:
      return []

  def damaged(self) -> list[str]:
    """Names of what was set aside."""
    return sorted(name for name in self._names() if ".damaged" in name)

  def agreed_steps(self) -> list[int]:
    """Those that process 0 sees."""
    self.wait()
    return same_on_all(self.steps())

  def clean(self) -> None:
    """Makes the folder, and removes what a killed run has left: half a checkpoint, or one that was being deleted.

    No save is on its way.
    """
    files.make_folder(self.path)
    if jax.process_index() == 0:
      for name in self._names():
        if _UNFINISHED in name or re.fullmatch(r"\.\d+\.[0-9a-f]{8}\.old", name):
          shutil.rmtree(self.path / name, ignore_errors=True)

  def save(self, step: int, state: Any, meta: Mapping[str, Any], done: Any) -> None:
    """Copies the arrays to the host's memory and starts to write them; `done` is called once all is on disk."""
    self.wait()
    self.clean()
    if self._writer is None:
      self._plain = self._stack.enter_context(_plain(self.path))
      handlers = {_STATE: ocp.PyTreeCheckpointHandler(use_compression=False), _META: ocp.JsonCheckpointHandler()}
      options = ocp.options.AsyncOptions(post_finalization_callback=self._add_checksums)
      self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers), async_options=options)
      self._stack.callback(self._writer.close)
      self._pool = self._stack.enter_context(concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint"))
    self._saving = step
    items: dict[str, Any] = {_STATE: ocp.args.PyTreeSave(state), _META: ocp.args.JsonSave(dict(meta))}
    with files.writing(self.path / str(step)):
      self._writer.save(self._plain / str(step), args=ocp.args.Composite(**items), force=True)
    self._running = self._pool.submit(self._finish, step, done)

  def _add_checksums(self) -> None:
    """Called on process 0 when all processes have written, before the folder gets its name."""
    names = [name for name in self._names() if name.startswith(f"{self._saving}.") and _UNFINISHED in name]
    if len(names) != 1:
      raise RuntimeError(f"{self.path}: {names} for step {self._saving}; another process changes this folder")
    write_checksums(self.path / names[0], (_STATE, _META))

  def _finish(self, step: int, done: Any) -> None:
    with files.writing(self.path / str(step)):
      self._writer.wait_until_finished()
    if jax.process_index() > 0:
      return
    done()
    for step in self.steps()[self._keep :]:
      old = self.path / f".{step}.{uuid.uuid4().hex[:8]}.old"  # so that none is half there for a reader
      os.replace(self.path / str(step), old)
      shutil.rmtree(old, ignore_errors=True)

  def verify(self, step: int) -> None:
    """Raises `Damaged` unless all files are as they were written."""
    verify_checksums(self.path / str(step))

  def verify_part(self, step: int) -> None:
    """Of one process, the files that are opened first; of several, this one's share of all."""
    if jax.process_count() == 1:
      verify_checksums(self.path / str(step), large=False)
    else:
      verify_checksums(self.path / str(step), jax.process_index(), jax.process_count())

  def meta(self, step: int) -> Any:
    """What was saved with the arrays; verified before."""
    return files.read_json(self.path / str(step) / _META / "metadata")

  def kinds(self, step: int) -> dict[str, str]:
    """Path -> type and shape of the saved arrays."""
    return kinds_of(self._tree(step))

  def _tree(self, step: int) -> Any:
    """The saved state, whose leaves have shape and type."""
    with _plain(self.path) as path, contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
      return reader.metadata(path / str(step) / _STATE).tree

  def restore(self, step: int, target: Any) -> Any:
    """The saved arrays in the shardings of the target; one process verifies large files meanwhile."""

    def read() -> Any:
      with _plain(self.path) as path, ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        return jax.block_until_ready(reader.restore(path / str(step) / _STATE, args=ocp.args.StandardRestore(target)))

    return read() if jax.process_count() > 1 else self._verified(step, read)

  def arrays(self, step: int, keys: Sequence[str]) -> dict[str, Any]:
    """Parts of the state as nested dicts of numpy arrays; large files are verified meanwhile."""

    def read() -> Any:
      tree = self._tree(step)
      restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
      with _plain(self.path) as path, contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(path / str(step) / _STATE, args=ocp.args.PyTreeRestore(restore_args=restore))

    state = self._verified(step, read)
    return {key: state[key] for key in keys}

  def _verified(self, step: int, read: Any) -> Any:
    """What `read` gives, once the large files that it reads are verified."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      verification = pool.submit(verify_checksums, self.path / str(step), large=True)
      result = read()
      verification.result()
    return result

  def agreed(self, bad: bool) -> bool:
    """Whether any process found the checkpoint bad: each verifies a share of it."""
    return bool(np.any(multihost_utils.process_allgather(np.array(bad)))) if jax.process_count() > 1 else bad

  def set_aside(self, step: int) -> None:
    """Renames a damaged checkpoint to `<step>.damaged`."""
    if jax.process_index() == 0:
      names = [f"{step}.damaged{number or ''}" for number in range(len(self._names()) + 1)]
      (self.path / str(step)).rename(next(self.path / name for name in names if not (self.path / name).exists()))
    distributed.wait_for_all(f"damaged checkpoint {step}")

  def wait(self) -> None:
    """Blocks until the last save is on disk."""
    running, self._running = self._running, None
    if running is not None:
      running.result()

  def close(self) -> None:
    """Waits for the last save and frees the threads."""
    try:
      self.wait()
    finally:
      self._stack.close()
      self._writer = None


@contextlib.contextmanager
def _plain(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """The folder under a path without characters that Orbax misreads: its own, or that of a link to it."""
  if _PLAIN.fullmatch(str(path)):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix="codebind_jax-") as scratch:
    link = pathlib.Path(scratch) / "checkpoints"
    link.symlink_to(path)
    yield link

"""Checkpoints: train state, config, stage and the data's fingerprint; a damaged one is skipped for the one before."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from codebind_jax import files, schema
from codebind_jax.runtime.far_checkpoint import FarCheckpoints

FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Position:
  """Where a run stands.

  Attributes:
    step: global, over all stages.
    stage: the current stage.
    done: whether that stage is finished.
    trained: modalities trained so far, by this run and those it started from.
  """

  step: int
  stage: str
  done: bool
  trained: Sequence[str] = ()


class Checkpoints:
  """Writes `workdir/checkpoints/<step>` asynchronously, keeps the newest `keep` of them, and reads them.

  Near by orbax, whose folders the processes share; at gs:// and s3:// by `FarCheckpoints`.
  """

  def __init__(self, workdir: str | files.Path, *, keep: int = 2):
    self.path = files.path(workdir) / FOLDER
    self._store = (FarCheckpoints if files.is_far(self.path) else _Near)(self.path, keep=keep)

  def save(self, position: Position, state: Any, fingerprint: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Starts to write a checkpoint; `fingerprint` is the data's, the position says which batch of it comes next."""
    meta = {"position": dataclasses.asdict(position), "config": dict(config), "fingerprint": dict(fingerprint)}
    self._store.save(position.step, state, meta)

  def restore(self, target: Callable[[Position], Any]) -> tuple[Position, Any] | None:
    """Restores the newest readable checkpoint.

    Args:
      target: position -> abstract state; called per checkpoint tried.

    Returns:
      (position, state) or None where there is no checkpoint. A checkpoint that cannot be read is set aside (near as
      `<step>.damaged`, far its `commit.json` as `damaged.json`), named in the log, and the one before it is tried.

    Raises:
      RuntimeError: if there are checkpoints but none can be read.
      ValueError: if a checkpoint's arrays differ from the target's in path, shape or type.
    """
    steps = self._store.steps()
    for step in steps:
      found = self._readable(step, lambda step=step: (self._meta(step), self._store.kinds(step)))
      if found is None:
        continue
      meta, saved = found
      position = Position(**meta["position"])
      state = target(position)
      if differing := schema.difference(saved, _arrays(state)):
        raise ValueError(f"checkpoint {self.path / str(step)} holds other arrays than this run has "
                         f"({len(differing)} differ): {'; '.join(differing[:5])}")  # fmt: skip
      restored = self._readable(step, lambda step=step, state=state: self._store.restore(step, state))
      if restored is not None:
        return position, restored
    if steps:
      raise RuntimeError(f"none of the checkpoints {steps} in {self.path} can be read; they are kept as *.damaged")
    return None

  def _readable(self, step: int, read: Callable[[], Any]) -> Any:
    """What `read` gives; None where it fails because of the checkpoint's content, which is then set aside."""
    result, reason = None, ""
    try:
      result = read()
    except (MemoryError, PermissionError, TimeoutError, jax.errors.JaxRuntimeError):  # the machine's fault
      raise
    except Exception as error:  # orbax reports a truncated array as a bare Exception
      if files.is_far(self.path) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        raise  # the far disk's
      reason = _first_line(error)
    if not self._store.agreed(bool(reason)):
      return result
    logging.error("checkpoint %s cannot be read, trying the one before it: %s", self.path / str(step),
                  reason or "another process cannot")  # fmt: skip
    self._store.set_aside(step)
    return None

  def fingerprint(self) -> dict[str, Any] | None:
    """The data's fingerprint in the newest readable checkpoint; None where there is none."""
    for step in self._store.steps():
      try:
        return self.read_meta(step).get("fingerprint")
      except Exception as error:  # a damaged checkpoint, which `restore` names and sets aside
        logging.debug("checkpoint %d: %s", step, error)
    return None

  def read_meta(self, step: int | None = None) -> dict[str, Any]:
    """Position, config and fingerprint stored with a checkpoint (the newest by default).

    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError: naming the checkpoint, if it is damaged.
    """
    step = self._newest() if step is None else step
    with self._damage_named(step):
      return self._meta(step)

  def _meta(self, step: int) -> dict[str, Any]:
    """What was saved with a checkpoint's arrays.

    Raises:
      ValueError, TypeError: if it is not what `save` wrote.
    """
    meta = self._store.meta(step)
    wrong = [key for key in ("position", "config", "fingerprint")
             if not isinstance(meta, dict) or not isinstance(meta.get(key), dict)]  # fmt: skip
    if wrong:
      raise ValueError(f"what is saved with its arrays has no section {wrong[0]!r}")
    Position(**meta["position"])
    return meta

  @contextlib.contextmanager
  def _damage_named(self, step: int) -> Iterator[None]:
    """Makes what reading a damaged checkpoint raises a ValueError with its name."""
    try:
      yield
    except (MemoryError, ImportError, PermissionError, TimeoutError, ConnectionError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:
      if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and files.is_far(self.path):
        raise
      raise ValueError(f"checkpoint {self.path / str(step)} cannot be read, it is damaged: {_first_line(error)}"
                       ) from error  # fmt: skip

  def read_arrays(self, keys: tuple[str, ...] = ("params", "codebooks")) -> dict[str, Any]:
    """Parts of the newest state as nested dicts of numpy arrays, for evaluation and embedding.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError: naming the checkpoint, if it is damaged.
    """
    step = self._newest()
    with self._damage_named(step):
      return self._store.arrays(step, keys)

  def _newest(self) -> int:
    steps = self._store.steps()
    if not steps:
      raise FileNotFoundError(f"no checkpoint in {self.path}")
    return steps[0]

  def wait(self) -> None:
    """Blocks until the last save is on disk."""
    self._store.wait()

  def close(self) -> None:
    """Waits for the last save and frees the threads."""
    self._store.close()


class _Near:
  """Checkpoints in a local folder, by orbax."""

  def __init__(self, path: pathlib.Path, *, keep: int):
    self.path, self._keep = path, keep
    self._open()

  def _open(self) -> None:
    options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(self.path, options=options)

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, newest first."""
    self._manager.wait_until_finished()
    return sorted(self._manager.all_steps(), reverse=True)

  def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
    items: dict[str, Any] = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(dict(meta))}
    self._manager.save(step, args=ocp.args.Composite(**items), force=True)

  def meta(self, step: int) -> dict[str, Any]:
    return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

  def kinds(self, step: int) -> dict[str, str]:
    """Path -> type and shape of the saved arrays."""
    return _arrays(self._metadata(step))

  def _metadata(self, step: int) -> Any:
    """The tree of a checkpoint's state, whose leaves are shapes and types."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
      return reader.metadata(self.path / str(step) / "state").tree

  def restore(self, step: int, target: Any) -> Any:
    restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))
    return restored["state"]

  def arrays(self, step: int, keys: Sequence[str]) -> dict[str, Any]:
    restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), self._metadata(step))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      args = ocp.args.PyTreeRestore(restore_args=restore)
      state = reader.restore(self.path / str(step) / "state", args=args)
    return {key: state[key] for key in keys}

  def agreed(self, bad: bool) -> bool:
    """Whether this checkpoint is bad; all processes read the same files."""
    return bad

  def set_aside(self, step: int) -> None:
    """Renames a damaged checkpoint to `<step>.damaged`."""
    self._manager.close()
    if jax.process_index() == 0:
      aside = next(p for n in itertools.count() if not (p := self.path / f"{step}.damaged{n or ''}").exists())
      (self.path / str(step)).rename(aside)
    multihost_utils.sync_global_devices(f"damaged checkpoint {step}")
    self._open()

  def wait(self) -> None:
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.wait_until_finished()
    self._manager.close()


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _arrays(tree: Any) -> dict[str, str]:
  """Path -> type and shape of a tree's arrays."""
  kinds = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    if hasattr(leaf, "shape"):
      if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # saved as the key's integers
        leaf = jax.eval_shape(jax.random.key_data, leaf)
      kinds[jax.tree_util.keystr(path, simple=True, separator="/")] = f"{leaf.dtype}{list(leaf.shape)}"
  return kinds

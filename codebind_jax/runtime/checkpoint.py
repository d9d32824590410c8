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

from codebind_jax import schema

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
  """Writes `workdir/checkpoints/<step>` asynchronously, keeps the newest `keep` of them, and reads them."""

  def __init__(self, workdir: str | pathlib.Path, *, keep: int = 2):
    self.path = pathlib.Path(workdir).absolute() / FOLDER
    self._keep = keep
    self._open()

  def _open(self) -> None:
    options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(self.path, options=options)

  def save(self, position: Position, state: Any, fingerprint: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Starts to write a checkpoint; `fingerprint` is the data's, the position says which batch of it comes next."""
    meta = {"position": dataclasses.asdict(position), "config": dict(config), "fingerprint": dict(fingerprint)}
    items: dict[str, Any] = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(meta)}
    self._manager.save(position.step, args=ocp.args.Composite(**items), force=True)

  def restore(self, target: Callable[[Position], Any]) -> tuple[Position, Any] | None:
    """Restores the newest readable checkpoint.

    Args:
      target: position -> abstract state; called per checkpoint tried.

    Returns:
      (position, state) or None where there is no checkpoint. A checkpoint that cannot be read is renamed to
      `<step>.damaged`, named in the log, and the one before it is tried.

    Raises:
      RuntimeError: if there are checkpoints but none can be read.
      ValueError: if a checkpoint's arrays differ from the target's in path, shape or type.
    """
    steps = self._steps()
    for step in steps:
      saved = None
      with self._set_aside_if_damaged(step):
        meta, saved = self.read_meta(step), _arrays(self._metadata(step))
      if saved is None:
        continue
      position = Position(**meta["position"])
      state = target(position)
      if differing := schema.difference(saved, _arrays(state)):
        raise ValueError(f"checkpoint {self.path / str(step)} holds other arrays than this run has "
                         f"({len(differing)} differ): {'; '.join(differing[:5])}")  # fmt: skip
      with self._set_aside_if_damaged(step):
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(state)))
        return position, restored["state"]
    if steps:
      raise RuntimeError(f"none of the checkpoints {steps} in {self.path} can be read; they are kept as *.damaged")
    return None

  def _steps(self) -> list[int]:
    """Steps that have a checkpoint, newest first."""
    self._manager.wait_until_finished()
    return sorted(self._manager.all_steps(), reverse=True)

  @contextlib.contextmanager
  def _set_aside_if_damaged(self, step: int) -> Iterator[None]:
    """Renames the checkpoint to `<step>.damaged` if reading it in the body fails because of its content."""
    try:
      yield
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):  # the machine's fault
      raise
    except Exception as error:  # orbax reports a truncated array as a bare Exception
      reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
      logging.error("checkpoint %s cannot be read, trying the one before it: %s", self.path / str(step), reason)
      self._manager.close()
      if jax.process_index() == 0:
        aside = next(p for n in itertools.count() if not (p := self.path / f"{step}.damaged{n or ''}").exists())
        (self.path / str(step)).rename(aside)
      multihost_utils.sync_global_devices(f"damaged checkpoint {step}")
      self._open()

  def _metadata(self, step: int) -> Any:
    """The tree of a checkpoint's state, whose leaves are shapes and types."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
      return reader.metadata(self.path / str(step) / "state").tree

  def fingerprint(self) -> dict[str, Any] | None:
    """The data's fingerprint in the newest readable checkpoint; None where there is none."""
    for step in self._steps():
      try:
        return self.read_meta(step).get("fingerprint")
      except Exception as error:  # a damaged checkpoint, which `restore` names and sets aside
        logging.debug("checkpoint %d: %s", step, error)
    return None

  def read_meta(self, step: int | None = None) -> dict[str, Any]:
    """Position, config and fingerprint stored with a checkpoint (the newest by default).

    Raises:
      FileNotFoundError: if there is no checkpoint.
    """
    step = self._manager.latest_step() if step is None else step
    if step is None:
      raise FileNotFoundError(f"no checkpoint in {self.path}")
    return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

  def read_arrays(self, keys: tuple[str, ...] = ("params", "codebooks")) -> dict[str, Any]:
    """Parts of the newest state as nested dicts of numpy arrays, for evaluation and embedding."""
    steps = self._steps()
    if not steps:
      raise FileNotFoundError(f"no checkpoint in {self.path}")
    restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), self._metadata(steps[0]))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      args = ocp.args.PyTreeRestore(restore_args=restore)
      state = reader.restore(self.path / str(steps[0]) / "state", args=args)
    return {key: state[key] for key in keys}

  def wait(self) -> None:
    """Blocks until the last save is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save and frees the threads."""
    self._manager.wait_until_finished()
    self._manager.close()


def _arrays(tree: Any) -> dict[str, str]:
  """Path -> type and shape of a tree's arrays."""
  kinds = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    if hasattr(leaf, "shape"):
      if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # saved as the key's integers
        leaf = jax.eval_shape(jax.random.key_data, leaf)
      kinds[jax.tree_util.keystr(path, simple=True, separator="/")] = f"{leaf.dtype}{list(leaf.shape)}"
  return kinds

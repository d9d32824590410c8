"""Checkpoints: TrainState, data iterators, config and stage; restored exactly, past a newest one that is damaged."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from codebind_jax.runtime import distributed

FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Position:
  """Where a run stands.

  Attributes:
    step: global, over all stages.
    stage: the one it is in.
    done: whether that stage is finished.
    held: modalities that have been trained, by this run and those it started from.
  """

  step: int
  stage: str
  done: bool
  held: Sequence[str] = ()


class Checkpoints:
  """Writes and reads `workdir/checkpoints/<step>`; saves asynchronously, keeps the newest `keep`."""

  def __init__(self, workdir: str | pathlib.Path, *, keep: int = 2):
    self.path = pathlib.Path(workdir).absolute() / FOLDER
    self._keep = keep
    self._open()

  def _open(self) -> None:
    options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(self.path, options=options)

  def save(self, position: Position, state: Any, iterators: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Starts writing a checkpoint; `iterators` are Grain iterators by source name.

    Their states count global batches and are the same on every process, so that any number of processes can go on.
    """
    data = {name: it.get_state() for name, it in iterators.items()}
    meta = {"position": dataclasses.asdict(position), "config": dict(config), "data": data}
    items: dict[str, Any] = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(meta)}
    self._manager.save(position.step, args=ocp.args.Composite(**items), force=True)

  def restore(
    self, target: Callable[[Position], tuple[Any, Mapping[str, Any]]]
  ) -> tuple[Position, Any, Mapping[str, Any]] | None:
    """Restores the newest readable checkpoint.

    Args:
      target: position -> (abstract state, fresh iterators by source name); called per checkpoint tried.

    Returns:
      (position, state, iterators) or None where there is no checkpoint. A checkpoint that cannot be read is
      renamed to `<step>.damaged`, named in the log, and the one before it is tried.

    Raises:
      RuntimeError: if there are checkpoints but none can be read.
    """
    self._manager.wait_until_finished()
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        meta = self.read_meta(step)
        position = Position(**meta["position"])
        state, iterators = target(position)
        found = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(state)))
        for name, it in iterators.items():
          it.set_state(meta["data"][name])
        return position, found["state"], iterators
      except Exception as error:  # orbax reports a truncated array as a bare Exception
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        logging.error("checkpoint %s cannot be read, trying the one before it: %s", self.path / str(step), reason)
        self._manager.close()
        if jax.process_index() == 0:
          aside = next(p for n in itertools.count() if not (p := self.path / f"{step}.damaged{n or ''}").exists())
          (self.path / str(step)).rename(aside)
        distributed.wait_for_all(f"damaged checkpoint {step}")
        self._open()
    if steps:
      raise RuntimeError(f"none of the checkpoints {steps} in {self.path} can be read; they are kept as *.damaged")
    return None

  def read_meta(self, step: int | None = None) -> dict[str, Any]:
    """The position and config stored with a checkpoint (the newest by default).

    Raises:
      FileNotFoundError: if there is no checkpoint.
    """
    step = self._manager.latest_step() if step is None else step
    if step is None:
      raise FileNotFoundError(f"no checkpoint in {self.path}")
    return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

  def read_arrays(self, keys: tuple[str, ...] = ("params", "codebooks")) -> dict[str, Any]:
    """Parts of the newest state as nested dicts of numpy arrays, for evaluation and embedding."""
    self._manager.wait_until_finished()
    step = self._manager.latest_step()
    if step is None:
      raise FileNotFoundError(f"no checkpoint in {self.path}")
    folder = self.path / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      tree = reader.metadata(folder).item_metadata.tree
      restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
      whole = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=restore))
    return {key: whole[key] for key in keys}

  def wait(self) -> None:
    """Blocks until the last save is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save and frees the threads."""
    self._manager.wait_until_finished()
    self._manager.close()

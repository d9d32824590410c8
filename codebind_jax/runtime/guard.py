"""What stops a run in order: a step that is not finite, or the machine being taken away."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from codebind_jax.runtime.checkpoint import Checkpoints

DUMP = "nonfinite"


class Preempted(Exception):
  """The run was told to end (SIGTERM) and has saved its state; the same command goes on."""


class Preemption:
  """Notices SIGTERM; as a context manager it puts the earlier handler back.

  With several processes, JAX passes the notice on and names a step that all of them reach.
  """

  def __init__(self):
    self._told = False
    self._before: Any = None
    self._own = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

  def __enter__(self) -> Preemption:
    if self._own:
      self._before = signal.signal(signal.SIGTERM, self._tell)
    return self

  def __exit__(self, *_: Any) -> None:
    if self._own:
      signal.signal(signal.SIGTERM, self._before)

  def _tell(self, *_: Any) -> None:
    self._told = True

  def reached(self, step: int) -> bool:
    """Whether the run should save and end after `step`; every process must ask after every step."""
    return self._told if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)


class Watch:
  """Looks for a step that was not finite, and keeps the state before it and its batch."""

  def __init__(self, folder: pathlib.Path, stage: str, step: int):
    self._folder, self._stage, self._good = folder, stage, step

  def check(
    self, state: Any, step: int, run: Callable[[Any, Any], Any], read: Callable[[int], Any],
    save: Callable[[Checkpoints, int, Any], None],
  ) -> None:  # fmt: skip
    """Looks at the state after `step`.

    Args:
      state: after `step`.
      step: as the host counts.
      run: the compiled step, to name what was not finite.
      read: the batch of the step after the one it is given.
      save: writes a state at a step into a store.

    Raises:
      FloatingPointError: naming the step, the steps in question, the terms and the dump.
    """
    reached = int(state.step)
    if reached >= 0:
      self._good = step
      return
    bad = ~reached
    state = state.replace(step=jax.device_put(np.int32(bad), state.step.sharding))
    dump = self._folder / DUMP
    with contextlib.closing(Checkpoints(dump, keep=1)) as store:
      save(store, bad, state)
    batch = read(bad)
    _, metrics = run(state, batch)
    terms = [name for name, value in jax.device_get(metrics).items() if not np.isfinite(value)]
    if jax.process_count() == 1:
      flat = jax.tree_util.tree_flatten_with_path(batch)[0]
      np.savez(dump / "batch.npz", **{jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in flat})
    logging.error("the state before step %d and its batch are in %s", bad + 1, dump)
    raise FloatingPointError(
      f"stage {self._stage!r}, step {bad + 1} (found in steps {self._good + 1} to {step}): not finite: "
      f"{', '.join(terms)}; {dump} holds the state before it: --workdir={dump} does the step again"
    )

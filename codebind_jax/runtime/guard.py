"""Two reasons to stop a run: a step that is not finite, and more bad records than allowed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from codebind_jax import files
from codebind_jax.runtime.checkpoint import Checkpoints

DUMP = "nonfinite"


class BadRecords:
  """Counts items that cannot be read, names each once in the log, and ends a run that has too many.

  Args:
    allowed: `config.data.max_bad_records`.
    fate: what becomes of such an item, for the log.
  """

  def __init__(self, allowed: int, fate: str = "masked"):
    self._allowed, self._fate, self._known = allowed, fate, {}

  def add(self, source: str, row: int, modality: str, message: str) -> None:
    """Counts an item, unless it is known."""
    if (source, row, modality) not in self._known:
      self._known[source, row, modality] = message
      logging.warning("%s: %s", self._fate, message)

  def check(self, alike: bool = False) -> None:
    """Compares the count of all processes with the number allowed; every process must call it at the same point.

    Args:
      alike: all processes have added the same items, so that none is asked.

    Raises:
      ValueError: if there are more.
    """
    count = len(self._known)
    if jax.process_count() > 1 and not alike:
      # An item that two processes have met, in two epochs, counts twice.
      count = int(np.sum(multihost_utils.process_allgather(np.int32(count))))
    if count > self._allowed:
      first = next(iter(self._known.values()), "items that other processes could not read")
      raise ValueError(f"{first} ({count} bad records, {self._allowed} allowed by config.data.max_bad_records)")


class Watch:
  """Finds a step that was not finite, and saves the state before it and its batch."""

  def __init__(self, folder: files.Path, stage: str, step: int):
    self._folder, self._stage, self._good = folder, stage, step

  def check(
    self, state: Any, step: int, run: Callable[[Any, Any], Any], read: Callable[[int], Any],
    save: Callable[[Checkpoints, int, Any], None],
  ) -> None:  # fmt: skip
    """Checks the state after `step`.

    Args:
      state: after `step`; see `train_state.advance`.
      step: number of steps by the host's count.
      run: the compiled step, run once more to name the metrics that are not finite.
      read: number of steps done -> the batch of the next one.
      save: writes a state at a step into a store.

    Raises:
      FloatingPointError: naming the step, the range of steps checked, the metrics and the dump.
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
      with files.replacing(dump / "batch.npz") as path, open(path, "wb") as file:
        np.savez(file, **{jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in flat})
    logging.error("the state before step %d and its batch are in %s", bad + 1, dump)
    raise FloatingPointError(
      f"stage {self._stage!r}, step {bad + 1} (found in steps {self._good + 1} to {step}): not finite: "
      f"{', '.join(terms)}; {dump} holds the state before it: --workdir={dump} does the step again"
    )

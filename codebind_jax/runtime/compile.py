"""Compiling a step for a layout, once, and what the compiler says it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from codebind_jax.runtime.sharding import Layout


def lower_step(step: Any, state: Any, batch: Any, layout: Layout) -> Any:
  """The step lowered for these shapes: the state is donated and stays where the layout has it.

  Args:
    step: (state, batch) -> (state, metrics).
    state: arrays or shapes with shardings.
    batch: likewise.
    layout: mesh and rules.
  """
  with jax.set_mesh(layout.mesh):
    return jax.jit(step, donate_argnums=0, out_shardings=(layout.of(state), layout.replicated)).lower(state, batch)


def compile_step(step: Any, state: Any, batch: Any, layout: Layout) -> Any:
  """Compiles the step for these shapes once and for all (a later shape is an error, not a recompilation)."""
  started = time.time()
  # XLA keeps to 256 bits on CPU unless told otherwise; the code search is twice as fast with the whole register.
  options = {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else None
  compiled = lower_step(step, state, batch, layout).compile(compiler_options=options)
  memory = compiled.memory_analysis()
  logging.info(
    "compiled the step in %.1f s: %.0f MB of arguments, %.0f MB of temporaries a device", time.time() - started,
    memory.argument_size_in_bytes / 2**20, memory.temp_size_in_bytes / 2**20,
  )
  return compiled


class Programs:
  """Compiled functions of runs, kept for those after them whose configs make the same function."""

  def __init__(self) -> None:
    self._made: dict[tuple[str, str], Any] = {}

  def get(self, name: str, key: str, make: Callable[[], Any]) -> Any:
    """The function of that name for a key, made now or for an earlier run.

    Args:
      name: of the function.
      key: whatever the function depends on beside its name, as text; see `schema.key`.
      make: compiles it.
    """
    if (name, key) not in self._made:
      self._made[name, key] = make()
    return self._made[name, key]

"""Compilation of a step for a layout, and compiled functions shared by runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from codebind_jax.runtime.sharding import Layout


def lower_step(step: Any, state: Any, batch: Any, layout: Layout) -> Any:
  """The step lowered for these shapes; the state is donated and keeps the layout's shardings.

  Args:
    step: (state, batch) -> (state, metrics).
    state: arrays or shapes with shardings.
    batch: likewise.
    layout: mesh and rules.
  """
  with jax.set_mesh(layout.mesh):
    return jax.jit(step, donate_argnums=0, out_shardings=(layout.of(state), layout.replicated)).lower(state, batch)


def compile_step(step: Any, state: Any, batch: Any, layout: Layout) -> Any:
  """The step compiled for these shapes; a call with other shapes is an error, not a recompilation."""
  started = time.time()
  # XLA uses 256-bit vectors on CPU by default; the code search is twice as fast with 512.
  options = {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else None
  compiled = lower_step(step, state, batch, layout).compile(compiler_options=options)
  memory = compiled.memory_analysis()
  logging.info(
    "compiled the step in %.1f s: %.0f MB of arguments, %.0f MB of temporaries a device", time.time() - started,
    memory.argument_size_in_bytes / 2**20, memory.temp_size_in_bytes / 2**20,
  )
  return compiled


class Programs:
  """Cache of compiled functions, shared by runs whose configs give the same function."""

  def __init__(self) -> None:
    self._compiled: dict[tuple[str, str], Any] = {}

  def get(self, name: str, key: str, make: Callable[[], Any]) -> Any:
    """The function of a name and a key, compiled at its first use.

    Args:
      name: of the function.
      key: all that the function depends on beside its name, as text; see `schema.key`.
      make: compiles it.
    """
    if (name, key) not in self._compiled:
      self._compiled[name, key] = make()
    return self._compiled[name, key]

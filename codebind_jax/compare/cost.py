"""The cost of a method: speed, memory of the compiled step, and sizes of its state beside the towers."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from codebind_jax import files
from codebind_jax.api import Model
from codebind_jax.config import Config, method_of
from codebind_jax.data.examples import Feed
from codebind_jax.data.task import Task
from codebind_jax.methods.base import EXTRA, make_init
from codebind_jax.runtime import optim
from codebind_jax.runtime import train_state as state_lib
from codebind_jax.runtime.checkpoint import SavedRun
from codebind_jax.runtime.compile import compile_step
from codebind_jax.runtime.metrics import read_metrics
from codebind_jax.runtime.sharding import make_layout
from codebind_jax.step import make_start_codebooks, make_train_step
from codebind_jax.train import batches_of, optimizer_of
from codebind_jax.trunks import input_shapes

FILE = "speed.json"
ROUNDS = 5


def cost(workdir: files.Path, model: Model) -> dict[str, float]:
  """The cost of a finished run.

  Returns:
    `examples_per_second`: rows of all sources a second, with waiting for data, without compilation and checkpoints;
    median over the run's log. `compiled_megabytes`: temporaries of the compiled step, as XLA counts them. Sizes in
    numbers: `towers`, `extra_parameters` (the method's own, trained), `codebooks` (codes and their statistics), `aux`
    (teacher, queue, CLUB's networks).
  """
  lines = read_metrics(workdir / "metrics.jsonl")
  speeds = [line["examples_per_second"] for line in lines if "examples_per_second" in line]
  memory = [line["compiled_megabytes"] for line in lines if "compiled_megabytes" in line]
  size = lambda tree: int(sum(np.size(x) for x in jax.tree.leaves(tree)))
  with contextlib.closing(SavedRun(workdir)) as run:
    aux = run.read_arrays(("aux",))["aux"]
  return {
    "examples_per_second": float(np.median(speeds)) if speeds else float("nan"),
    "compiled_megabytes": memory[-1] if memory else float("nan"),
    "towers": size({name: value for name, value in model.params.items() if name != EXTRA}),
    "extra_parameters": size(model.params.get(EXTRA, {})), "codebooks": size(model.codebooks), "aux": size(aux),
  }  # fmt: skip


def speeds(
  configs: Mapping[str, Config], feeds: Mapping[str, Mapping[str, Feed]], task: Task, trunks: Mapping[str, Any],
  steps: int,
) -> dict[str, Any]:
  """Times the variants' compiled steps in turns, so that other load on the machine affects all of them.

  Args:
    configs: variant -> config of a run with one stage.
    feeds: source -> modality -> what the training items are read from.
    task: the data.
    trunks: modality -> Trunk.
    steps: of every variant a turn.

  Returns:
    `examples_per_second`: variant -> rows of all sources a second, of the fastest of `rounds` turns of `steps` steps on
    one batch, reading it left out; the `load` average of the machine before, its `cores`, and the `device`.
  """
  load, ready = os.getloadavg()[0], {name: _ready(config, feeds, task, trunks) for name, config in configs.items()}
  seconds: dict[str, list[float]] = {name: [] for name in ready}
  for number in range(ROUNDS + 1):
    for name, (step, state, batch, rows) in ready.items():
      started = time.perf_counter()
      for _ in range(steps):
        state, _ = step(state, batch)
      jax.block_until_ready(state.params)
      ready[name] = step, state, batch, rows
      if number:  # the first turn warms up
        seconds[name].append(time.perf_counter() - started)
  found = {name: ready[name][3] * steps / min(taken) for name, taken in seconds.items()}
  return {"examples_per_second": found, "rounds": ROUNDS, "steps": steps, "load": load, "cores": os.cpu_count(),
          "device": jax.devices()[0].device_kind}  # fmt: skip


def _ready(config: Config, feeds: Any, task: Task, trunks: Any) -> tuple[Any, Any, Any, int]:
  """(compiled step, state, batch, its rows) at the start of the config's only stage."""
  layout, method = make_layout(config.mesh, config.sharding), method_of(config)
  stage = config.ordered[0].on({name: set(found) for name, found in feeds.items()})
  shapes = input_shapes(config.model, trunks)
  state = state_lib.create(layout, jax.random.key(config.seed), make_init(method, shapes, config.model.half, [stage]))
  tx, table = optimizer_of(config, method, stage, state.params)
  state = state_lib.with_optimizer(state, tx, layout)
  batch = layout.put_batch(batches_of(config, stage, feeds, task)[0])
  if state.codebooks:
    start = jax.jit(make_start_codebooks(method), out_shardings=layout.of(state.codebooks, "codebooks"))
    state = state.replace(codebooks=start(state, batch))
  step = state_lib.guarded(make_train_step(method, stage, tx, frozen=optim.frozen(table)))
  return compile_step(step, state, batch, layout), state, batch, sum(stage.sources.values())

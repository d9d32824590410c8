"""Mode `compile`: memory and time of a config's train step on a TPU slice, by compilation without a TPU.

Needs libtpu of jax's version (`pip install -e '.[tpu]'`). Nothing is executed, so that only memory and the program are
exact; times are estimates from the compiler's cycles, at the clock for which a large bfloat16 matrix product runs at
the published peak.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.core import FrozenDict

from codebind_jax.compile_ahead import flops, hlo
from codebind_jax.methods.base import Method, make_init
from codebind_jax.models.towers import CodeBind, ModelSpec, TowerSpec
from codebind_jax.runtime import optim
from codebind_jax.runtime import train_state as state_lib
from codebind_jax.runtime.compile import lower_step
from codebind_jax.runtime.sharding import Layout, MeshShape, Sharding, make_layout
from codebind_jax.stages import Stage
from codebind_jax.step import make_train_step
from codebind_jax.trunks import frozen_by, input_shapes, load_trunk
from codebind_jax.trunks.base import Trunk


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of a chip, and the clock at which the compiler's cycles give its peak.

  Attributes:
    memory: bytes of HBM.
    peak: bfloat16 operations a second.
    clock: Hz.
    links: bytes a second over all its links to other chips.
    sides: largest sides of a slice.
  """

  memory: int
  peak: float
  clock: float
  links: float
  sides: tuple[int, ...]


CHIPS = {
  "v5e": Chip(16 * 2**30, 197e12, 1.71e9, 200e9, (16, 16)),
  "v5p": Chip(95 * 2**30, 459e12, 1.94e9, 600e9, (16, 16, 24)),
  "v6e": Chip(32 * 2**30, 918e12, 2.49e9, 448e9, (16, 16)),
}


@dataclasses.dataclass(frozen=True)
class Report:
  """Memory, work and estimated time of one step of a stage on one chip.

  Attributes:
    stage, chips: name of the stage, and number of chips of the slice.
    compile_seconds: on this machine.
    arguments, outputs, temporaries, code: bytes; `outputs` without donated ones.
    memory: bytes of the chip's HBM.
    model_flops: operations of towers and heads, forward and backward, without recomputation, a chip's share.
    all_flops: of the whole step (quantiser, losses, recomputation), likewise.
    bytes: moved to and from memory, as XLA counts them: bodies of loops once, so this is a lower bound.
    program: traffic and cycles.
    chip: published figures.
    peak: largest number of bytes in use at once by the compiler's count, less than it reserves; 0 if it gives none.
  """

  stage: str
  chips: int
  compile_seconds: float
  arguments: int
  outputs: int
  temporaries: int
  code: int
  memory: int
  model_flops: float
  all_flops: float
  bytes: float
  program: hlo.Program
  chip: Chip
  peak: int = 0

  @property
  def needed(self) -> int:
    """Bytes of HBM."""
    return self.arguments + self.outputs + self.temporaries + self.code

  @property
  def fits(self) -> bool:
    """Whether the step fits into a chip's memory."""
    return self.needed <= self.memory

  @property
  def compute_seconds(self) -> float:
    """Estimated time without collectives."""
    return self.program.cycles / self.chip.clock

  @property
  def link_seconds(self) -> float:
    """Lower bound of the collectives' time: their results at the links' full rate."""
    return sum(traffic.bytes for traffic in self.program.traffic.values()) / self.chip.links

  @property
  def model_share(self) -> tuple[float, float]:
    """Model flops as a share of the chip's peak: (if computing hides the collectives, if it does not)."""
    ideal = self.model_flops / self.chip.peak
    return tuple(ideal / max(t, 1e-12) for t in (self.compute_seconds, self.compute_seconds + self.link_seconds))

  def lines(self) -> list[str]:
    """The report as text."""
    mb = lambda number: f"{number / 2**20:,.0f} MB"
    hidden, shown = self.model_share
    lines = [
      f"stage {self.stage} on {self.chips} chips, compiled in {self.compile_seconds:.0f} s; all figures a chip",
      f"  HBM         {mb(self.needed)} of {mb(self.memory)} ({100 * self.needed / self.memory:.1f} %): "
      f"{mb(self.arguments)} state and batch, {mb(self.temporaries)} temporaries, {mb(self.outputs)} further outputs, "
      f"{mb(self.code)} code" + (f"; {mb(self.peak)} in use at the peak" if self.peak else ""),
      f"  flops       {self.model_flops / 1e12:.2f} T of the model (towers and heads, nothing recomputed); "
      f"{self.all_flops / 1e12:.2f} T of the whole step",
      f"  bytes       {self.bytes / 2**30:.2f} GB to and from memory (loop bodies counted once: a lower bound)",
    ]
    for kind, traffic in self.program.traffic.items():
      times = f"{traffic.runs} a step ({traffic.static} in the program)"
      lines.append(f"  collective  {kind}: {times}, {mb(traffic.bytes)}")
    if not self.program.traffic:
      lines.append("  collective  none")
    if self.program.uncounted:
      lines.append(f"  warning     loops of unknown length count once: {', '.join(self.program.uncounted)}")
    lines += [
      f"  step time   {1e3 * self.compute_seconds:.0f} ms of computing (the compiler's cycles; an estimate), "
      f"at least {1e3 * self.link_seconds:.0f} ms of links",
      f"  model share {100 * hidden:.1f} % of peak if the links' time is hidden, {100 * shown:.1f} % if none is",
      f"  {'fits' if self.fits else 'DOES NOT FIT'}",
    ]
    return lines


def slice_devices(topology: str) -> tuple[list[Any], Chip]:
  """The devices of a slice such as `v5e:16x16`, and their kind of chip.

  Raises:
    ValueError: for an unknown slice, or without libtpu.
  """
  match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
  chip = CHIPS.get(match[1]) if match else None
  sides = tuple(int(n) for n in match[2].split("x")) if match else ()
  if chip is None or len(sides) != len(chip.sides) or any(n > top for n, top in zip(sides, chip.sides)):
    allowed = ", ".join(f"{name}:{'x'.join('AB' if len(c.sides) == 2 else 'ABC')}" for name, c in CHIPS.items())
    raise ValueError(f"config.topology: got {topology!r}; allowed: {allowed}, such as v5e:16x16 (sides of at most 16)")
  # Without these libtpu asks for the metadata of a TPU machine, and a second process that loads it aborts.
  for name, value in {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                      "TPU_ACCELERATOR_TYPE": "v5litepod-16", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
    os.environ.setdefault(name, value)
  from jax.experimental import topologies

  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices), chip
  except Exception as error:  # jax and libtpu report a missing library, a wrong version and a wrong slice alike
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(f"config.topology: {topology!r} cannot be had ({reason}); libtpu of jax {jax.__version__}'s "
                     "version is needed: pip install -e '.[tpu]'") from error


def trunks_of(towers: Mapping[str, TowerSpec]) -> dict[str, Trunk]:
  """Modality -> its trunk."""
  return {name: load_trunk(tower.trunk, **tower.options) for name, tower in towers.items()}


def batch_shapes(inputs: Mapping[str, jax.ShapeDtypeStruct], stage: Stage, layout: Layout) -> dict[str, Any]:
  """Shapes of a global batch of a stage: every source with every modality of the stage.

  Args:
    inputs: modality -> shape and type of one item, the tower's input.
    stage: whose batch.
    layout: mesh and rules.

  Raises:
    ValueError: if the rows do not divide over the devices.
  """
  batch = {}
  for source, rows in (getattr(stage, "sources", None) or {"all": stage.batch_size}).items():
    if rows % layout.row_devices:
      raise ValueError(f"config.stages.{stage.name}: {rows} rows of {source!r} do not divide over the "
                       f"{layout.row_devices} devices of mesh axes data and fsdp")
    shape = lambda inner, dtype, rows=rows: jax.ShapeDtypeStruct((rows, *inner), dtype, sharding=layout.rows)
    batch[source] = {name: shape(inputs[name].shape, inputs[name].dtype) for name in stage.modalities}
    batch[source] |= {"_mask": {name: shape((), bool) for name in stage.modalities}}
    batch[source] |= {"_row": shape((), np.int32), "_group": shape((), np.int32)}
  return batch


def compile_stage(
  method: Method, model: ModelSpec, settings: optim.Optim, stage: Stage, layout: Layout, chip: Chip
) -> Report:
  """Compiles the train step of a stage for a slice.

  Args:
    method: of the run.
    model: its towers.
    settings: of the optimizer.
    stage: whose step.
    layout: mesh and rules.
    chip: the slice is made of.
  """
  inputs = input_shapes(model, trunks_of(model.towers))
  shapes = state_lib.shapes(make_init(method, inputs, model.half, [stage]))
  frozen_paths = (*method.frozen_paths(stage), *frozen_by(model, stage))
  trained = (*stage.train, *method.trained_paths(stage))
  tx, table = optim.make_optimizer(shapes.params, trained, settings, stage.steps, frozen=frozen_paths)
  state, batch = state_lib.abstract(shapes, tx, layout), batch_shapes(inputs, stage, layout)
  for line in layout.table(state):
    logging.info("  %s", line)
  frozen = optim.frozen(table)
  step = state_lib.guarded(make_train_step(method, stage, tx, frozen=frozen))
  started = time.time()
  with jax.set_mesh(layout.mesh):
    model_work, all_work = model_flops(method.model, state.params, batch, frozen), flops.count(step, state, batch)
  compiled = lower_step(step, state, batch, layout).compile()
  seconds = time.time() - started
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  chips = layout.mesh.size
  return Report(
    stage=stage.name, chips=chips, compile_seconds=seconds, arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes, temporaries=memory.temp_size_in_bytes,
    code=memory.generated_code_size_in_bytes, memory=chip.memory,
    model_flops=model_work / chips, all_flops=all_work / chips,
    bytes=float(cost.get("bytes accessed", 0.0)),
    program=hlo.read(compiled.as_text()), chip=chip, peak=getattr(memory, "peak_memory_in_bytes", 0),
  )  # fmt: skip


def model_flops(model: CodeBind, params: Any, batch: Mapping[str, Any], frozen: frozenset[str]) -> int:
  """Operations of the towers for one global batch, forward and backward to trained parameters, nothing recomputed."""
  trunks = {}
  for name, trunk in model.trunks.items():
    module = trunk.module.clone(remat=False) if getattr(trunk.module, "remat", False) else trunk.module
    trunks[name] = dataclasses.replace(trunk, module=module)
  model = CodeBind(model.towers, FrozenDict(trunks))

  def outputs(params: Any, tokens: Any) -> Any:
    features, scales = model.apply({"params": optim.stop_frozen(params, frozen)}, tokens)
    return sum(jnp.sum(x) for x in jax.tree.leaves((features, scales)))

  total = 0
  for content in batch.values():
    tokens = {name: x for name, x in content.items() if not name.startswith("_")}
    total += flops.count(jax.value_and_grad(outputs), params, tokens)
  return total


def compile_mode(
  topology: str, mesh: MeshShape, sharding: Sharding, method: Method, model: ModelSpec, settings: optim.Optim,
  stages: Sequence[Stage],
) -> bool:
  """Compiles the train step of every stage for a slice and writes the reports to standard output.

  Args:
    topology: the slice, such as v5e:16x16.
    mesh, sharding: how its chips share the state and the batch.
    method: of the run.
    model: its towers.
    settings: of the optimizer.
    stages: of the run.

  Returns:
    Whether every stage fits.

  Raises:
    ValueError: for an unknown topology, a mesh or batch that does not fit it, or without libtpu.
  """
  devices, chip = slice_devices(topology)
  layout = make_layout(mesh, sharding, devices)
  sys.stdout.write(f"{topology}: {dict(layout.mesh.shape)}, jax {jax.__version__}\n")
  fits = True
  for stage in stages:
    report = compile_stage(method, model, settings, stage, layout, chip)
    sys.stdout.write("\n".join(report.lines()) + "\n")
    sys.stdout.flush()
    fits &= report.fits
  return fits

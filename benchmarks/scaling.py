"""How the train step of stage 1 grows: bytes and memory with devices, time with the batch, input with threads.

Command: python -m benchmarks.scaling --what=memory   # compiled for 1 to 64 devices that need not exist, not run
         python -m benchmarks.scaling --what=time     # step time against the batch, one device
         python -m benchmarks.scaling --what=input    # rows a second against reading threads; how long a loop waits
Tokens are drawn at random in the shapes of `configs/stage1.py`, so that neither data nor weights are needed.
"""

import dataclasses
import statistics
import time

import jax
import numpy as np
from absl import app, flags

from benchmarks.machine import describe, in_turn
from codebind_jax import config as config_lib
from codebind_jax.compile_ahead import report as aot
from codebind_jax.config import validation
from codebind_jax.data import open_source
from codebind_jax.data.batches import Batches, SourceBatches
from codebind_jax.data.examples import Tokens
from codebind_jax.data.token_reader import TokenReader
from codebind_jax.methods.base import make_init
from codebind_jax.runtime import optim
from codebind_jax.runtime import train_state as state_lib
from codebind_jax.runtime.compile import compile_step
from codebind_jax.runtime.metrics import Throughput
from codebind_jax.runtime.sharding import make_layout
from codebind_jax.step import make_start_codebooks, make_train_step
from codebind_jax.trunks import input_shapes
from configs import stage1

_WHAT = flags.DEFINE_enum("what", "memory", ("memory", "time", "input"), "What to measure.")
_QUANTIZE = flags.DEFINE_bool("quantize", True, "False: the baseline's step, plain InfoNCE, which compiles quickly.")
_DEVICES = flags.DEFINE_list("devices", ["1", "2", "4", "8", "16", "32", "64"], "Counts of devices, for memory.")

WIDTHS = {"image": 4192, "text": 384}  # of the trunks' tokens, one an item
FORMS = {"plain": {}, "tiles": {"chunk": 512}}  # of InfoNCE
ROWS_A_DEVICE, ROWS = 256, 4096
BATCHES = (64, 128, 256, 512, 1024)


def config_of(rows):
  """Stage 1 (or its baseline) on tokens of its shapes that need no trunk."""
  config = stage1.get_config().unlock()
  config.batch_size = rows
  if not _QUANTIZE.value:
    config.model.quantize = False
    config.stages.bridges.losses = {"info_nce": 1.0}
  for name, width in WIDTHS.items():
    config.model.towers[name].trunk = "vectors"
    config.model.towers[name].options = {"width": width, "modality": name}
  return validation.validate(config)


def memory():
  """A table for each way to grow the batch, of steps compiled for growing numbers of devices."""
  counts = [int(count) for count in _DEVICES.value]
  jax.config.update("jax_num_cpu_devices", max(counts))
  jax.config.update("jax_disable_most_optimizations", True)  # of machine code alone, which nothing runs
  for title, rows_of in ((f"{ROWS_A_DEVICE} rows a device", lambda n: ROWS_A_DEVICE * n),
                         (f"{ROWS:,} rows in all", lambda n: ROWS)):  # fmt: skip
    print(f"\n{title}; MB a device\n")
    print("| devices | InfoNCE | state and batch | temporaries | all-gather | all-reduce | permute | other |")
    print("|---|---|---|---|---|---|---|---|")
    for devices in counts:
      config = config_of(rows_of(devices))
      for form, options in FORMS.items():
        stage = dataclasses.replace(config.ordered[0], **options)
        layout = make_layout(config.mesh, config.sharding, jax.devices()[:devices])
        method = config_lib.method_of(config)
        report = aot.compile_stage(method, config.model, config.optim, stage, layout, aot.CHIPS["v5e"])
        moved = {kind: traffic.bytes for kind, traffic in report.program.traffic.items()}
        named = [moved.pop(kind, 0) for kind in ("all-gather", "all-reduce", "collective-permute")]
        numbers = [report.arguments, report.temporaries, *named, sum(moved.values())]
        print(f"| {devices} | {form} | " + " | ".join(f"{n / 2**20:,.1f}" for n in numbers) + " |", flush=True)


def ready(rows):
  """The compiled step of a batch on one device, a state and the layout."""
  config = config_of(rows)
  layout = make_layout(config.mesh, config.sharding, jax.devices()[:1])
  stage, method = config.ordered[0], config_lib.method_of(config)
  init = make_init(method, input_shapes(config.model, aot.trunks_of(config.model.towers)))
  state = state_lib.create(layout, jax.random.key(0), init)
  tx, table = optim.make_optimizer(state.params, stage.train, config.optim, stage.steps)
  state = state_lib.with_optimizer(state, tx, layout)
  first = layout.put_batch(next(iterator(rows)))
  state = state.replace(codebooks=jax.jit(make_start_codebooks(method))(state, first))
  step = state_lib.guarded(make_train_step(method, stage, tx, frozen=optim.frozen(table)))
  return compile_step(step, state, first, layout), state, layout


class InMemory(TokenReader):
  """Random tokens, one an item, of which the place is the number."""

  def __init__(self, items, width):
    super().__init__((), 1, width)
    self.values = np.random.default_rng(0).normal(size=(items, 1, width)).astype(np.float16)

  def __call__(self, place, pooled=False):
    return self.values[place]


def iterator(rows, threads=2):
  """Endless batches of the trainer's input over random tokens: 4,096 items in two views, a caption each."""
  source = open_source("world:synthetic-image-text", profile="small", split="train").grouped("id")
  count, views = len(source), {"image": 2, "text": 1}
  feeds = {
    name: Tokens(InMemory(count * views[name], width), np.arange(count + 1),
                 np.arange(count * views[name]).reshape(count, -1), augmented=0.5)
    for name, width in WIDTHS.items()
  }  # fmt: skip
  batches = Batches({"toy": SourceBatches(source, feeds, rows=rows, seed=0)}).start(threads=threads)
  return (examples.batch for examples in batches)


def step_time():
  """Median step time of every batch, in turn, as ratios to the smallest batch."""
  contenders = {}
  for rows in BATCHES:
    compiled, state, layout = ready(rows)
    holder, batch = [state], layout.put_batch(next(iterator(rows)))

    def run(compiled=compiled, holder=holder, batch=batch):
      holder[0], metrics = compiled(holder[0], batch)
      jax.block_until_ready(metrics)

    contenders[rows] = run
  taken = {rows: wall for rows, (wall, _) in in_turn(contenders, 9).items()}
  least = min(BATCHES)
  print("| rows | step, / that of the smallest batch | a row |\n|---|---|---|")
  for rows, wall in taken.items():
    ratio = wall / taken[least]
    print(f"| {rows:,} | {ratio:.2f} | {ratio * least / rows:.2f} |")


def input_rate(rows=256, batches=20, repeats=3):
  """Rows a second of the iterator alone, and the share of the time that a training loop waits for it."""
  compiled, state, layout = ready(rows)
  alone, shares = {}, {}
  for threads in (1, 2, 4):
    rates, waits = [], []
    for _ in range(repeats):
      batches_of = iterator(rows, threads)
      next(batches_of)
      start = time.perf_counter()
      for _ in range(batches):
        next(batches_of)
      rates.append(batches * rows / (time.perf_counter() - start))
      clock = Throughput()
      for _ in range(batches):
        with clock.waiting(state.step):
          batch = layout.put_batch(next(batches_of))
        state, _ = compiled(state, batch)
        clock.add(rows)
      jax.block_until_ready(state.step)
      waits.append(clock.report()["data_wait_share"])
    alone[threads], shares[threads] = statistics.median(rates), statistics.median(waits)
  print("| threads | rows a second, / one | time a loop waits |\n|---|---|---|")
  for threads, rate in alone.items():
    print(f"| {threads} | {rate / alone[1]:.2f} | {100 * shares[threads]:.1f} % |")


def main(_):
  describe()
  {"memory": memory, "time": step_time, "input": input_rate}[_WHAT.value]()


if __name__ == "__main__":
  app.run(main)

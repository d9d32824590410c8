"""The train step of configs/imagebind_huge.py on one accelerator: time, memory and share of the peak FLOP/s.

Run: python -m benchmarks.huge_step --rows=64,256 [--peak=989]   (weights and rows are random; steps are really run)
"""

import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from codebind_jax import config as config_lib
from codebind_jax.compile_ahead import flops
from codebind_jax.compile_ahead import report as aot
from codebind_jax.config import validation
from codebind_jax.methods.base import make_init
from codebind_jax.models import transformer
from codebind_jax.runtime import optim
from codebind_jax.runtime import train_state as state_lib
from codebind_jax.runtime.compile import compile_step
from codebind_jax.runtime.sharding import make_layout
from codebind_jax.step import make_start_codebooks, make_train_step
from codebind_jax.trunks import frozen_by, input_shapes
from configs import imagebind_huge

_ROWS = flags.DEFINE_list("rows", ["64", "256"], "Batches to time.")
_PEAK = flags.DEFINE_float("peak", 989.0, "bfloat16 TFLOP/s of the device (an H100's 989 without sparsity).")
_STEPS = flags.DEFINE_integer("steps", 8, "Timed steps, after two that are not.")
_DEPTH = flags.DEFINE_integer("depth", 0, "Depth of every tower instead of the config's, for a trial on a CPU.")
_FUSED = flags.DEFINE_bool("fused", True, "Attention by cuDNN's fused kernel; False for XLA's form.")
_PROFILE = flags.DEFINE_string("profile", "", "Folder for a profile of one more step.")


def config_of(rows):
  """The shipped config for one device and fewer rows."""
  config = imagebind_huge.get_config().unlock()
  config.data.worlds = ("synthetic",)  # a config has data; the rows are drawn below
  config.batch_size, config.mesh.data, config.mesh.fsdp = rows, -1, 1
  if _DEPTH.value:
    for name in config.model.towers:
      config.model.towers[name].options.depth = _DEPTH.value
  return validation.validate(config)


def filled(shapes):
  """A batch of random numbers: every row has all modalities and is a group of its own."""

  def leaf(path, shape):
    if shape.dtype == bool:
      return jnp.ones(shape.shape, bool)
    if shape.dtype == jnp.int32:  # group numbers, and ids whose largest, the end mark, is the last
      return jnp.broadcast_to(jnp.arange(shape.shape[-1], dtype=jnp.int32), shape.shape)
    if shape.dtype == jnp.uint8:
      return jax.random.randint(jax.random.key(1), shape.shape, 0, 256, jnp.int32).astype(jnp.uint8)
    return jax.random.normal(jax.random.key(len(jax.tree_util.keystr(path))), shape.shape, shape.dtype)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def measure(rows):
  """Times one batch size and prints its line of the table."""
  config = config_of(rows)
  layout = make_layout(config.mesh, config.sharding, jax.devices()[:1])
  stage, method = config.ordered[0], config_lib.method_of(config)
  inputs = input_shapes(config.model, aot.trunks_of(config.model.towers))
  init = make_init(method, inputs, config.model.half, [stage])
  state = state_lib.create(layout, jax.random.key(0), init)
  frozen_trunks = frozen_by(config.model, stage)
  tx, table = optim.make_optimizer(state.params, stage.train, config.optim, stage.steps, frozen=frozen_trunks)
  state = state_lib.with_optimizer(state, tx, layout)
  batch = jax.device_put(filled(aot.batch_shapes(inputs, stage, layout)), layout.rows)
  frozen = optim.frozen(table)
  state = state.replace(codebooks=jax.jit(make_start_codebooks(method))(state, batch))
  step = state_lib.guarded(make_train_step(method, stage, tx, frozen=frozen))
  with jax.set_mesh(layout.mesh):
    model, everything = aot.model_flops(method.model, state.params, batch, frozen), flops.count(step, state, batch)
  started = time.perf_counter()
  compiled = compile_step(step, state, batch, layout)
  compile_seconds, taken = time.perf_counter() - started, []
  memory = compiled.memory_analysis()
  for _ in range(_STEPS.value + 2):
    started = time.perf_counter()
    state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))
    taken.append(time.perf_counter() - started)
  seconds = statistics.median(taken[2:])
  if _PROFILE.value:
    with jax.profiler.trace(_PROFILE.value):
      jax.block_until_ready(compiled(state, batch))
  print(f"| {rows} | {1e3 * seconds:.0f} | {rows / seconds:.0f} | {model / 1e12:.2f} | {everything / 1e12:.2f} "
        f"| {100 * model / seconds / 1e12 / _PEAK.value:.1f} % | {memory.temp_size_in_bytes / 2**20:,.0f} "
        f"| {compile_seconds:.0f} |", flush=True)


def main(_):
  if not _FUSED.value:
    transformer._has_cudnn = lambda: False
  print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
  print("| rows | ms | rows a second | model TFLOP | of the whole step | model share of peak | temporaries, MB "
        "| compiled in, s |\n|---|---|---|---|---|---|---|---|")
  for rows in _ROWS.value:
    measure(int(rows))


if __name__ == "__main__":
  app.run(main)

"""Counting operations and reading compiled programs, by hand; compiling for a TPU slice that is not there."""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from codebind_jax import config as config_lib
from codebind_jax.compile_ahead import flops, hlo
from codebind_jax.compile_ahead import report as aot
from codebind_jax.trunks import input_shapes, load_trunk
from configs import imagebind_huge

REPOSITORY = pathlib.Path(__file__).parents[1]


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize(
  ("function", "shapes", "wanted"),
  [
    (lambda x, w: x @ w, (shape(8, 16), shape(16, 32)), 2 * 8 * 16 * 32),
    # tanh needs the product; its gradient one more, with respect to w alone.
    (jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w))), (shape(16, 32), shape(8, 16)), 2 * 2 * 8 * 16 * 32),
    (lambda x, w: jax.lax.scan(lambda c, _: (jax.jit(jnp.dot)(c, w), None), x, length=5)[0],
     (shape(8, 16), shape(16, 16)), 5 * 2 * 8 * 16 * 16),
    (lambda x, k: jax.lax.conv_general_dilated(x, k, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")),
     (shape(2, 8, 8, 3), shape(2, 2, 3, 5)), 2 * (2 * 4 * 4 * 5) * (2 * 2 * 3)),
    (lambda x, w: (x @ w, w)[1], (shape(8, 16), shape(16, 32)), 0),
    # The dearest branch of a conditional.
    (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x), (shape(8, 8), shape(8, 8)), 4 * 8**3),
  ],
)  # fmt: skip
def test_operations_are_counted(function, shapes, wanted):
  assert flops.count(function, *shapes) == wanted


PROGRAM = """HloModule jit_step, is_scheduled=true

%condition.1 (param: (s32[], f32[8,128])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3)
  %param = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%param), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %bound), direction=LT
}

%condition.2 (param.1: (s32[], s32[])) -> pred[] {
  %param.1 = (s32[], s32[]) parameter(0)
  %a = s32[] get-tuple-element(%param.1), index=0
  %b = s32[] get-tuple-element(%param.1), index=1
  ROOT %less.1 = pred[] compare(%a, %b), direction=LT
}

%inner (param.2: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %param.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%param.2), index=1
  %start = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) collective-permute-start(%x)
  %done = f32[8,128]{1,0:T(8,128)} collective-permute-done(%start)
  %fused = f32[8,128]{1,0} fusion(%done), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"100"}
  ROOT %out = (s32[], f32[8,128]) tuple(%x, %fused)
}

%outer (param.3: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %param.3 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  ROOT %loop = (s32[], f32[8,128]) while(%param.3), condition=%condition.1, body=%inner
}

ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %gather = (bf16[16,128]{1,0}, f32[2]{0}) all-gather(%p, %p), dimensions={0}
  %twice = (s32[], f32[8,128]) while(%p), condition=%condition.1, body=%outer
  %unknown = (s32[], s32[]) while(%p), condition=%condition.2, body=%inner
  ROOT %sum = f32[8,128]{1,0} add(%p, %p), backend_config={"estimated_cycles":"7"}
}
"""


def test_a_program_is_read_with_its_loops():
  program = hlo.read(PROGRAM)
  assert program.traffic["collective-permute"] == hlo.Traffic(static=2, runs=9 + 1, bytes=10 * 8 * 128 * 4)
  assert program.traffic["all-gather"] == hlo.Traffic(static=1, runs=1, bytes=16 * 128 * 2 + 2 * 4)
  assert program.cycles == 10 * 100 + 7
  assert program.uncounted == ("unknown",)


def test_loops_of_a_real_program_are_counted():
  def loop(x):
    return jax.lax.fori_loop(0, 5, lambda _, c: jax.lax.fori_loop(0, 3, lambda _, d: jnp.sin(d) @ d, c), x)

  text = jax.jit(loop).lower(shape(64, 64)).compile().as_text()
  every, entry = hlo.computations(text)
  assert entry in every
  known = [int(n) for n in re.findall(r'known_trip_count":\{"n":"(\d+)"', text)]
  conditions = re.findall(r" while\(.*condition=%([\w.\-]+)", text)
  assert sorted(known) == sorted(hlo.trips(every[name], every) for name in conditions) == [3, 5]


@pytest.mark.parametrize("topology", ["", "v5e", "v5e:32x32", "v5p:4x4", "v4:2x2x1", "h100:8"])
def test_slices_there_are_none_of_are_named(topology):
  with pytest.raises(ValueError, match=f"config.topology: got {topology!r}; allowed: v5e:AxB, v5p:AxBxC"):
    aot.slice_devices(topology)


def report(**changes):
  values = {"stage": "s", "chips": 4, "compile_seconds": 1.0, "arguments": 2**30, "outputs": 0, "temporaries": 2**30,
            "code": 0, "memory": 16 * 2**30, "model_flops": 1.97e12, "all_flops": 3e12, "bytes": 2.0**30,
            "program": hlo.Program({"all-gather": hlo.Traffic(1, 2, 10**9)}, 34_200_000, ()),
            "chip": aot.CHIPS["v5e"]}  # fmt: skip
  return aot.Report(**(values | changes))


def test_the_estimate_by_hand():
  """34.2 M cycles at 1.71 GHz are 20 ms; 1.97 T at 197 T/s are 10 ms; 1 GB over 200 GB/s is 5 ms."""
  found = report()
  assert found.compute_seconds == pytest.approx(0.02) and found.link_seconds == pytest.approx(0.005)
  assert found.model_share == (pytest.approx(0.5), pytest.approx(0.4))
  assert found.fits and "fits" in found.lines()[-1]
  large = report(temporaries=16 * 2**30)
  assert not large.fits and "DOES NOT FIT" in large.lines()[-1]


def test_the_shipped_config_has_the_sizes_of_the_publication():
  towers = config_lib.read(imagebind_huge.get_config()).model.towers
  trunks = {name: load_trunk(tower.trunk, **tower.options) for name, tower in towers.items()}
  assert {name: (trunk.module.spec.depth, trunk.module.spec.width) for name, trunk in trunks.items()} == {
    "image": (32, 1280), "text": (24, 1024), "audio": (12, 768)
  }
  items = input_shapes(config_lib.read(imagebind_huge.get_config()).model, trunks)
  assert {name: (item.shape, str(item.dtype)) for name, item in items.items()} == {
    "image": ((224, 224, 3), "uint8"), "text": ((77,), "int32"), "audio": ((1, 128, 204, 1), "float32")
  }


SMALL = [f"--config.model.towers.{m}.options.{key}={value}" for m in ("image", "text", "audio")
         for key, value in {"width": 64, "depth": 2, "heads": 4}.items()]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("more", "status"), [((), 0), (("--config.model.shared_dim=524288",), 1)])
def test_a_small_model_is_compiled_for_a_slice(more, status):
  pytest.importorskip("libtpu")
  command = [sys.executable, "-m", "codebind_jax.main", "--config=configs/imagebind_huge.py", "--config.mode=compile",
             "--config.topology=v5e:2x2", "--config.mesh.fsdp=2", "--config.batch_size=64", *SMALL, *more]
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
  assert done.returncode == status, done.stderr[-3000:]
  for part in ("HBM  ", "flops  ", "collective  all-gather", "step time", "model share"):
    assert part in done.stdout
  assert ("DOES NOT FIT" in done.stdout) == bool(status)

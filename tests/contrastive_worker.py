"""InfoNCE over a ring of eight devices: values, gradients and compiled memory; see test_contrastive_sharded.py."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from codebind_jax.losses import info_nce

AXES = ("data", "fsdp")
ROWS, WIDTH = 80, 16  # ten rows a device: chunks of 4 overlap
CHUNKS = (0, 4, 10, 64)


def rows(seed):
  """Embeddings of both sides the rows that count, and groups."""
  rng = np.random.default_rng(seed)
  a, b = rng.normal(size=(2, ROWS, WIDTH)).astype(np.float32)
  mask = rng.random(ROWS) < 0.8
  a[~mask] = np.nan
  return a, 0.5 * a + b, mask, rng.integers(0, 20, ROWS).astype(np.int32)


def loss_and_gradients(chunk, axes):
  """Jitted (a, b, scale, mask, groups) -> (loss, gradients of a, b and scale)."""

  def loss(a, b, scale, mask, groups):
    return info_nce(a, b, temperature=0.1, logit_scale_a=scale, mask=mask, chunk=chunk, axes=axes, groups=groups)

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def temporaries(mesh, chunk, axes, size=(32_768, 1024)):
  """Bytes of temporaries a device of value and gradients of a batch of `size`."""
  split = NamedSharding(mesh, P(AXES))
  x = jax.ShapeDtypeStruct(size, jnp.float32, sharding=split)
  loss = lambda a, b: info_nce(a, b, temperature=0.07, chunk=chunk, axes=axes)
  step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=(NamedSharding(mesh, P()), (split, split)))
  compiled = step.lower(x, x).compile()
  return compiled.memory_analysis().temp_size_in_bytes, "all-gather" in compiled.as_text()


def main(folder):
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
  # A program with a ring that XLA's CPU client reads back from the cache waits for itself (jax 0.10.2).
  jax.config.update("jax_enable_compilation_cache", False)
  mesh = jax.make_mesh((4, 2), AXES, axis_types=(AxisType.Auto,) * 2)
  jax.set_mesh(mesh)
  place = lambda x: jax.device_put(x, NamedSharding(mesh, P(AXES)))
  a, b, mask, groups = map(place, rows(0))
  for chunk in CHUNKS:
    for name, given in (("alone", None), ("grouped", groups)):
      value, grads = loss_and_gradients(chunk, AXES)(a, b, 1.5, mask, given)
      np.savez(folder / f"{chunk}.{name}.npz", value, *grads)
  found = {"plain": temporaries(mesh, 0, ()), "ring": temporaries(mesh, 512, AXES)}
  (folder / "memory.json").write_text(json.dumps(found))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))

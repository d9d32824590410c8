"""Processor time of InfoNCE and its gradient, chunked against plain, on one device; temporaries of both.

Command: python -m benchmarks.contrastive [--rows=4096] [--width=1024] [--repeats=7]
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import describe, in_turn
from codebind_jax.losses import info_nce


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--rows", type=int, default=4096)
  parser.add_argument("--width", type=int, default=1024)
  parser.add_argument("--repeats", type=int, default=7)
  options = parser.parse_args()
  describe()
  rng = np.random.default_rng(0)
  a, b = (jnp.asarray(rng.normal(size=(options.rows, options.width)), jnp.float32) for _ in range(2))

  contenders, memory = {}, {}
  for chunk in (0, 256, 512, 1024, 2048):
    if chunk < options.rows:
      loss = lambda a, b, chunk=chunk: info_nce(a, b, temperature=0.07, chunk=chunk)
      compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(a, b).compile()
      name = f"chunk {chunk}" if chunk else "plain"
      contenders[name] = lambda compiled=compiled: jax.block_until_ready(compiled(a, b))
      memory[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
  seconds = {name: processor for name, (_, processor) in in_turn(contenders, options.repeats).items()}
  print(f"{options.rows} x {options.width}, value and gradient, time of all threads")
  for name, taken in seconds.items():
    print(f"  {name:12s} {1e3 * taken:8.1f} ms  {taken / seconds['plain']:5.2f} x plain  {memory[name]:8.1f} MB")


if __name__ == "__main__":
  main()

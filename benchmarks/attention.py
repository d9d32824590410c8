"""Attention at the towers' shapes on a GPU: cuDNN's fused kernel, which `transformer.attend` takes, against XLA's form.

Run: python -m benchmarks.attention   (times are medians of 5 groups of calls, without compiling; rows are random)
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks.machine import milliseconds
from codebind_jax.models import transformer

SHAPES = {  # batch, queries, keys, heads, width of a head, causal
  "image, ViT-H/14": (256, 257, 257, 16, 80, False),
  "audio of ImageBind, with its own key": (256, 229, 230, 12, 64, False),
  "text, causal": (256, 77, 77, 16, 64, True),
  "image, ViT-L/14 at 336": (64, 577, 577, 16, 64, False),
}


def form(fused, causal):
  """Compiled attention and its gradient, and the size of its temporaries in MB."""

  def run(q, k, v, g):
    out, back = jax.vjp(lambda q, k, v: transformer.attend(q, k, v, causal=causal), q, k, v)
    return out, *back(g)

  def compiled(*args):
    asked, transformer._has_cudnn = transformer._has_cudnn, lambda: fused
    try:
      made = jax.jit(run).lower(*args).compile()
    finally:
      transformer._has_cudnn = asked
    return made, made.memory_analysis().temp_size_in_bytes / 2**20

  return compiled


def error(found, wanted):
  """Largest difference of two arrays, as a share of the largest value of the second."""
  found, wanted = (x.astype(jnp.float32) for x in (found, wanted))
  return float(jnp.max(jnp.abs(found - wanted)) / jnp.max(jnp.abs(wanted)))


def main():
  print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; attention and its gradient, bfloat16")
  print("| | cuDNN ms | XLA ms | ratio | temporaries, MB | XLA's | error of cuDNN | of XLA |\n|" + "---|" * 8)
  for name, (b, n, m, h, d, causal) in SHAPES.items():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(b, n, h, d), (b, m, h, d), (b, m, h, d), (b, n, h, d)]
    exact = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes)]
    few = [x[:4].astype(jnp.float32) for x in exact]
    with jax.default_matmul_precision("highest"):
      wanted = form(False, causal)(*few)[0](*few)  # float32
    row, errors = [], []
    for fused in (True, False):
      run, memory = form(fused, causal)(*exact)
      found = run(*exact)
      errors.append(max(error(f[:4], w) for f, w in zip(found, wanted)))
      row.append((milliseconds(functools.partial(run, *exact), jax.block_until_ready, calls=10), memory))
    (ours, memory), (theirs, more) = row
    print(f"| {name} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} | {memory:,.0f} | {more:,.0f} "
          f"| {errors[0]:.4f} | {errors[1]:.4f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
  main()

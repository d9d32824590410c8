"""The search, the sums and one training call on a GPU, against torch and XLA's own forms.

Run: python -m benchmarks.gpu   (needs torch with CUDA; times are medians of 5 groups of calls, without compiling)
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import quantise
from benchmarks.machine import milliseconds
from codebind_jax.codebook import segments
from codebind_jax.codebook.nearest import nearest_code, nearest_segments

SHAPES = {"narrow": (328_960, 1024, 8), "narrow, 1M": (1_048_576, 1024, 8), "wide": (65_536, 8192, 256)}
EXACT = jax.lax.Precision.HIGHEST
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait_for_torch(_):
  """Waits until the device has done all that torch has queued."""
  if DEVICE == "cuda":
    torch.cuda.synchronize()


def search(name):
  """Nearest code of n unit vectors among k."""
  n, k, d = SHAPES[name]
  rng = np.random.default_rng(0)
  z, codes = rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(k, d)).astype(np.float32)
  z /= np.linalg.norm(z, axis=1, keepdims=True)
  codes /= np.linalg.norm(codes, axis=1, keepdims=True)
  on_jax = jax.device_put(z), jax.device_put(codes)
  on_torch = torch.from_numpy(z).to(DEVICE), torch.from_numpy(codes).to(DEVICE)
  rows = 65_536 if d <= 32 else 8192
  whole = jax.jit(lambda z, c: jnp.argmax(jnp.dot(z, c.T, precision=EXACT), axis=1))
  product = jax.jit(lambda z, c: jnp.dot(z, c.T, precision=EXACT))
  runs = {
    "codebind_jax": lambda: nearest_code(*on_jax),
    "XLA, argmax of the whole matrix": lambda: whole(*on_jax),
    "(XLA, matrix product alone)": lambda: product(*on_jax),
    "torch, by blocks": lambda: torch.cat([(part @ on_torch[1].T).argmax(1) for part in on_torch[0].split(rows)]),
  }
  reference = np.argmax(z[:4096].astype(np.float64) @ codes.T.astype(np.float64), axis=1)
  print(f"search, {name}: N={n} K={k} D={d}")
  for contender, run in runs.items():
    indices = run()
    if "alone" not in contender:
      indices = np.asarray(indices.cpu() if isinstance(indices, torch.Tensor) else indices)
      assert np.sum(indices[:4096] != reference) <= 4, contender
    wait = wait_for_torch if contender.startswith("torch") else jax.block_until_ready
    took = milliseconds(run, wait)
    print(f"  {contender:34s} {took:8.3f} ms {2e-9 * n * k * d / took:7.2f} TFLOP/s")
  memory = jax.jit(nearest_code).lower(*on_jax).compile().memory_analysis()
  print(f"  temporaries of ours: {memory.temp_size_in_bytes / 1e6:.0f} MB")


def sums(name):
  """Counts and sums of the segments of each code."""
  n, k, d = SHAPES[name]
  vectors = jax.random.normal(jax.random.key(0), (1, d + 1, n))
  indices = nearest_segments(vectors[:, :d], vectors[0, :d, :k].T)
  print(f"sums of {n} segments by code, and if all chose one code")
  forms = {"integers (ours)": segments._integer_sums, "scatter of floats, not reproducible": segments._scatter_sums,
           "products with one-hot blocks": segments._one_hot_sums}
  for form, function in forms.items():
    run = jax.jit(lambda v, i, function=function: function(v, i, k))
    even, single = (
      milliseconds(lambda run=run, chosen=chosen: run(vectors, chosen), jax.block_until_ready)
      for chosen in (indices, jnp.zeros_like(indices))
    )
    print(f"  {form:38s} {even:8.3f} ms {single:8.3f} ms")


def call(case):
  """One training call at the release's shapes, as in `quantise.py`."""
  step, arguments = quantise.call_of_ours(case)
  ours = milliseconds(lambda: step(*arguments), jax.block_until_ready, calls=5)
  peer = quantise.with_torch("plain" if case == "plain" else "contrast", DEVICE)
  theirs = milliseconds(peer, wait_for_torch, calls=2)
  peak = torch.cuda.max_memory_allocated() / 1e6 if DEVICE == "cuda" else float("nan")
  memory = step.memory_analysis().temp_size_in_bytes / 1e6
  print(f"call, {case}: codebind_jax {ours:.2f} ms, {memory:.0f} MB of temporaries; "
        f"torch {theirs:.2f} ms, {peak:.0f} MB at its peak; {theirs / ours:.1f} times")


def main():
  print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, torch {torch.__version__}")
  for name in SHAPES:
    search(name)
    if name.startswith("narrow"):
      sums(name)
  for case in ("plain", "contrast", "contrast+gradient"):
    call(case)


if __name__ == "__main__":
  main()

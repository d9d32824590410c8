"""The nearest-code search against faiss, torch, numpy and jax's own matrix product.

Run: python -m benchmarks.nearest [--shape=narrow|wide] [--repeats=5]   (needs torch, faiss-cpu and threadpoolctl)
"""

import argparse

import faiss
import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import machine
from codebind_jax.codebook import nearest_code
from codebind_jax.codebook.nearest import _compiled_search

SHAPES = {"narrow": (328_960, 1024, 8), "wide": (65_536, 8192, 256)}


def contenders(z, codes, narrow):
  """{name: function that returns indices}; codes and vectors are unit vectors, so all searches agree."""
  d = z.shape[1]
  on_jax = jax.device_put(z), jax.device_put(codes)
  on_torch = torch.from_numpy(z), torch.from_numpy(codes)
  flat_l2, flat_ip = faiss.IndexFlatL2(d), faiss.IndexFlatIP(d)
  flat_l2.add(codes)
  flat_ip.add(codes)
  block = 1024 if narrow else 2048
  product = jax.jit(lambda z, c: jax.lax.dot_general(z, c, (((1,), (1,)), ((), ()))))

  def numpy_chunks():
    return np.concatenate([np.argmax(z[i : i + block] @ codes.T, axis=1) for i in range(0, len(z), block)])

  def torch_chunks():
    a, b = on_torch
    return torch.cat([(a[i : i + block] @ b.T).argmax(1) for i in range(0, len(a), block)])

  searches = {
    "codebind_jax cosine": lambda: np.asarray(nearest_code(*on_jax)),
    "codebind_jax l2": lambda: np.asarray(nearest_code(*on_jax, distance="l2")),
    "faiss flat L2": lambda: flat_l2.search(z, 1)[1][:, 0],
    "faiss flat IP": lambda: flat_ip.search(z, 1)[1][:, 0],
    "numpy chunked": numpy_chunks,
    "torch chunked": torch_chunks,
  }
  if narrow:
    searches["torch whole matrix"] = lambda: (on_torch[0] @ on_torch[1].T).argmax(1)
  else:
    searches["(jax matrix product alone)"] = lambda: product(*on_jax).block_until_ready()
  return searches


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--shape", choices=sorted(SHAPES), default="narrow")
  parser.add_argument("--repeats", type=int, default=5)
  options = parser.parse_args()
  n, k, d = SHAPES[options.shape]
  rng = np.random.default_rng(0)
  z, codes = rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(k, d)).astype(np.float32)
  z /= np.linalg.norm(z, axis=1, keepdims=True)
  codes /= np.linalg.norm(codes, axis=1, keepdims=True)
  machine.describe()
  runs = contenders(z, codes, options.shape == "narrow")
  reference = np.argmax(z[:4096].astype(np.float64) @ codes.T.astype(np.float64), axis=1)
  for name, run in runs.items():
    if "alone" not in name:
      print(f"{name}: {np.sum(np.asarray(run())[:4096] != reference)} of 4096 differ from float64")
  times = machine.in_turn(runs, options.repeats)
  ours = times["codebind_jax cosine"]
  print(f"N={n} K={k} D={d}, median of {options.repeats}")
  for name, (seconds, processor) in sorted(times.items(), key=lambda item: item[1]):
    rate = 2e-9 * n * k * d / seconds
    print(f"{name:28s} {1e3 * seconds:9.1f} ms {rate:7.1f} GFLOP/s   time / ours {seconds / ours[0]:6.2f}   "
          f"processor {1e3 * processor:9.1f} ms, / ours {processor / ours[1]:6.2f}")
  shapes = jax.ShapeDtypeStruct(z.shape, jnp.float32), jax.ShapeDtypeStruct(codes.shape, jnp.float32)
  memory = _compiled_search("cpu").lower(*shapes, "cosine", 0).compile().memory_analysis()
  print(f"our temporaries: {memory.temp_size_in_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
  main()

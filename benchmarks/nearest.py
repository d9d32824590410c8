"""The nearest-code search against faiss, torch, numpy and jax's own matrix product.

Run: python -m benchmarks.nearest [--shape=narrow|wide|positions] [--repeats=5]   (needs torch, faiss-cpu and
threadpoolctl). `positions` is the search with a codebook for each position, against faiss's product quantiser.
"""

import argparse

import faiss
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from codebind_jax.codebook import nearest_code
from codebind_jax.codebook.nearest import _compiled_search, nearest_segments

SHAPES = {"narrow": (328_960, 1024, 8), "wide": (65_536, 8192, 256)}
# (items, positions, codes of each, width): 48, 12, 8 and 18 bytes an item.
BY_POSITION = ((16_384, 48, 256, 8), (16_384, 12, 256, 32), (8192, 8, 256, 48), (4096, 12, 4096, 32))


def contenders(z, codes, narrow):
  """{name: function that returns indices}; codes and vectors are unit vectors, so all searches agree."""
  import torch

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


def by_position(items, positions, k, d, repeats):
  """Times of the search in each position's own codebook, in one codebook of that size, and of faiss's encoder."""
  rng = np.random.default_rng(0)
  z = rng.normal(size=(items, positions * d)).astype(np.float32)
  codes = rng.normal(size=(positions, k, d)).astype(np.float32)
  quantiser = faiss.ProductQuantizer(positions * d, positions, int(np.log2(k)))
  faiss.copy_array_to_vector(codes.reshape(-1), quantiser.centroids)
  lanes = jnp.asarray(np.ascontiguousarray(z.reshape(items, positions, d).transpose(1, 2, 0)))
  own, one = jnp.asarray(codes), jnp.asarray(codes[0])
  options = {"xla_cpu_prefer_vector_width": 512}
  search = jax.jit(lambda z, codes: nearest_segments(z, codes, distance="l2"), compiler_options=options)
  runs = {
    "a codebook for each position": lambda: search(lanes, own).block_until_ready(),
    "one codebook": lambda: search(lanes, one).block_until_ready(),
    "faiss ProductQuantizer": lambda: quantiser.compute_codes(z),
  }
  if k == 256:
    different = np.mean(quantiser.compute_codes(z) != np.asarray(search(lanes, own)).T)
    print(f"{different:.1e} of the codes differ from faiss")
  print(f"N={items} positions={positions} K={k} D={d}, median of {repeats}")
  for name, (seconds, processor) in machine.in_turn(runs, repeats).items():
    print(f"{name:30s} {1e3 * seconds:9.1f} ms   processor {1e3 * processor:9.1f} ms")


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--shape", choices=sorted((*SHAPES, "positions")), default="narrow")
  parser.add_argument("--repeats", type=int, default=5)
  options = parser.parse_args()
  if options.shape == "positions":
    machine.describe()
    for shape in BY_POSITION:
      by_position(*shape, options.repeats)
    return
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

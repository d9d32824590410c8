"""Packed codes against flat float32 search of the same items: time of a query, memory, recall.

Run: python -m benchmarks.index [--items=1000000] [--bits=8] [--bytes=48] [--repeats=5]
(needs faiss-cpu and threadpoolctl)

Items are clustered unit vectors, coded with tables that faiss's k-means finds for each position; queries are items with
noise. The flat index holds the vectors that were coded.
"""

import argparse
import ctypes
import gc
import os

import faiss
import numpy as np

from benchmarks import machine
from codebind_jax.search import Codec, CodeIndex

BLOCK = 1 << 16
SINGLE = 16  # queries, one after the other or at once


def resident():
  """Bytes of this process in memory."""
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)  # what is free, but kept for the next allocation, is not counted
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def unit(x):
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def make(items, width, rng):
  """(vectors of items, queries near some of them, which ones)."""
  centres = unit(rng.standard_normal((2000, width), np.float32))
  vectors = np.empty((items, width), np.float32)
  for first in range(0, items, BLOCK):
    some = rng.integers(0, len(centres), min(BLOCK, items - first))
    noise = rng.standard_normal((len(some), width), np.float32)
    vectors[first : first + len(some)] = unit(centres[some] + 0.6 * unit(noise))
  rows = rng.integers(0, items, 200)
  return vectors, unit(vectors[rows] + 0.3 * unit(rng.standard_normal((200, width), np.float32)))


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--items", type=int, default=1_000_000)
  parser.add_argument("--width", type=int, default=384)
  parser.add_argument("--bytes", type=int, default=48)
  parser.add_argument("--bits", type=int, default=8)
  parser.add_argument("--repeats", type=int, default=5)
  options = parser.parse_args()
  machine.describe()
  vectors, queries = make(options.items, options.width, np.random.default_rng(0))
  positions = options.bytes * 8 // options.bits
  with_faiss = faiss.ProductQuantizer(options.width, positions, options.bits)
  with_faiss.train(vectors[:20000])
  tables = faiss.vector_to_array(with_faiss.centroids).reshape(positions, -1, options.width // positions)
  codec = Codec(tuple(tables))
  indexes, memory = {}, {}
  with_faiss.compute_codes(vectors[:BLOCK])  # starts faiss's threads
  for backend in ("faiss", "numpy"):
    before, index = resident(), CodeIndex(codec, backend)
    for first in range(0, options.items, BLOCK):
      some = vectors[first : first + BLOCK]
      packed = with_faiss.compute_codes(some)
      codes = faiss.unpack_bitstrings(packed, positions, options.bits)
      index.add(range(first, first + len(some)), codes, {"modality": "image"})
      del packed, codes
    index.search(queries[:1], 10)
    memory[backend], indexes[backend] = resident() - before, index
  flat = faiss.IndexFlatIP(options.width)
  flat.add(vectors)
  low, high = indexes["faiss"]._norms
  some = queries[:SINGLE]
  single = lambda search: lambda: [search(query[None]) for query in some]
  times = machine.in_turn({
    "codes, faiss": single(lambda q: indexes["faiss"].search(q, 10)),
    "codes, numpy": single(lambda q: indexes["numpy"].search(q, 10)),
    "flat float32, faiss": single(lambda q: flat.search(q, 10)),
    "flat float32, numpy": single(lambda q: np.argpartition(-(vectors @ q[0]), 10)),
    "codes, faiss, at once": lambda: indexes["faiss"].search(some, 10),
    "flat float32, faiss, at once": lambda: flat.search(some, 10),
  }, options.repeats)  # fmt: skip
  print(f"{options.items} items of {options.width}: {positions} codes of {options.bits} bits, {codec.item_bytes} "
        f"bytes, norms {low:.3f} to {high:.3f}; a query, median of {options.repeats} times {SINGLE}")  # fmt: skip
  for name, (seconds, processor) in times.items():
    base = times["codes, faiss, at once" if "at once" in name else "codes, faiss"]
    print(f"{name:30s} {1e3 * seconds / SINGLE:8.1f} ms, / ours {seconds / base[0]:5.1f}   processor "
          f"{1e3 * processor / SINGLE:8.1f} ms, / ours {processor / base[1]:5.1f}")  # fmt: skip
  for backend, index in indexes.items():
    print(f"{backend}: {index.nbytes / 1e6:.1f} MB of items, {memory[backend] / 1e6:.1f} MB resident; "
          f"flat {vectors.nbytes / 1e6:.0f} MB")  # fmt: skip
  exact = flat.search(queries, 10)[1]
  found, other = (indexes[backend].search(queries, 10)[0] for backend in ("faiss", "numpy"))
  again = indexes["faiss"].search(queries, 10, rerank=vectors, candidates=100)[0]
  recall = lambda ids: np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids.tolist(), exact.tolist())])
  best = lambda ids: np.mean(ids[:, 0] == exact[:, 0])
  print(f"of the exact 10 found: {recall(found):.3f}, after re-ranking 100: {recall(again):.3f}; the exact first: "
        f"{best(found):.3f}, {best(again):.3f}; both backends the same: {np.array_equal(found, other)}")  # fmt: skip


if __name__ == "__main__":
  main()

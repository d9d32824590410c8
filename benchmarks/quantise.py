"""One training call of the quantiser on text, image and depth: forward, losses, update and gradients.

The shapes are the release's (batch 10; image 257 and depth 197 tokens of 2,048; text 1,024). The contender is the
obvious torch translation of the same mathematics: a similarity matrix, argmax, one-hot sums, a sort for the contrast.
As in the release the contrast gives no gradient, unless the case says so.

Run: python -m benchmarks.quantise [--repeats=3] [--cases=plain,contrast]   (needs torch and threadpoolctl)
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

SHAPES = {"text": (10, 1024), "image": (10, 257, 2048), "depth": (10, 197, 2048)}
SHARED, CODES, WIDTH = 1024, {"shared": 1024, "image": 256, "depth": 256}, 8


def data():
  rng = np.random.default_rng(0)
  features = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
  codes = {name: rng.normal(size=(k, WIDTH)).astype(np.float32) for name, k in CODES.items()}
  return features, {name: c / np.linalg.norm(c, axis=1, keepdims=True) for name, c in codes.items()}


def call_of_ours(case, **compiler_options):
  """One call of this package, compiled, and its arguments."""
  import jax
  import jax.numpy as jnp

  from codebind_jax import compositional, losses

  features, codes = data()
  spec = compositional.CompositionalSpec(detach_similarity=case != "contrast+gradient")
  states = compositional.new_codebooks(jax.random.key(0), spec, SHAPES)
  states = {
    name: s.replace(codes=jnp.asarray(codes[name]), ema_sum=jnp.asarray(codes[name]), ema_count=jnp.ones(CODES[name]))
    for name, s in states.items()
  }

  def loss(features, states):
    outputs, new = compositional.quantize_modalities(features, states, spec, rng=jax.random.key(1))
    total = sum(jnp.sum(out.full**3) + 10 * out.commitment for out in outputs.values())
    if case != "plain":
      total += 0.01 * sum(compositional.contrast_all_tokens(features, states, spec, double_softmax=True).values())
      total += 0.01 * sum(losses.code_uniform(state.codes) for state in states.values())
    return total, new

  features = jax.device_put(features)
  step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(features, states)
  return step.compile(compiler_options), (features, states)


def with_jax(case):
  """A function that runs one call of this package."""
  import jax

  step, arguments = call_of_ours(case, xla_cpu_prefer_vector_width=512)
  return lambda: float(jax.block_until_ready(step(*arguments))[0][0])


def with_torch(case, device="cpu"):
  """A function that runs one call of the torch translation."""
  import torch
  import torch.nn.functional as F

  features, codes = data()
  features = {name: torch.from_numpy(x).to(device).requires_grad_() for name, x in features.items()}
  books = {}
  for name, c in codes.items():
    c = torch.from_numpy(c).to(device)
    ones = torch.ones(len(c), device=device)
    books[name] = {"codes": c, "count": ones, "sum": c.clone(), "usage": 0 * ones}

  def quantise(z, book):
    k = len(book["codes"])
    z = F.normalize(z.reshape(-1, WIDTH), dim=1)
    similarity = z.detach() @ F.normalize(book["codes"], dim=1).T
    indices = similarity.argmax(1)
    q = book["codes"][indices]
    commitment = 0.25 * ((q - z) ** 2).mean()
    one_hot = F.one_hot(indices, k).float()
    extra = 0.0
    if case != "plain":
      rows = similarity.sort(dim=1).values
      logits = torch.cat([rows[:, -(k // 10) :].mean(1, keepdim=True), rows[:, : k // 2]], dim=1)
      extra = F.cross_entropy(logits.softmax(1), torch.zeros(len(rows), dtype=torch.long, device=device))
    return z + (q - z).detach(), commitment, extra, (one_hot.sum(0), one_hot.T @ z.detach(), z.detach())

  def update(book, parts):
    n, s = sum(p[0] for p in parts), sum(p[1] for p in parts)
    z, k = torch.cat([p[2] for p in parts]), len(book["codes"])
    count, total = 0.99 * book["count"] + 0.01 * n, 0.99 * book["sum"] + 0.01 * s
    smoothed = (count + 1e-5) / (count.sum() + k * 1e-5) * count.sum()
    usage = 0.99 * book["usage"] + 0.01 * n / n.sum()
    rate = torch.exp(-usage * k * 10 / 0.01 - 1e-3)[:, None]
    anchors = z[torch.randint(len(z), (k,), device=device)]
    new = total / smoothed[:, None] * (1 - rate) + anchors * rate
    return {"codes": new, "count": count, "sum": total, "usage": usage}

  def step():
    total, parts = 0.0, {}
    for name, x in features.items():
      x.grad = None
      shared, commitment, extra, used = quantise(x[..., :SHARED], books["shared"])
      parts.setdefault("shared", []).append(used)
      outputs = [shared.reshape(*x.shape[:-1], SHARED)]
      total = total + 10 * commitment + 0.01 * extra
      if x.shape[-1] > SHARED:
        specific, commitment, extra, used = quantise(x[..., SHARED:], books[name])
        parts.setdefault(name, []).append(used)
        outputs.append(specific.reshape(*x.shape[:-1], -1))
        total = total + 10 * commitment + 0.01 * extra
      total = total + (F.normalize(torch.cat(outputs, -1), dim=-1) ** 3).sum()
    if case != "plain":
      for book in books.values():
        total = total + 0.01 * torch.pdist(F.normalize(book["codes"], dim=1)).pow(2).neg().exp().mean().log()
    total.backward()
    for name, used in parts.items():
      update(books[name], used)
    return float(total.detach())

  return step


def measure(contender, case, calls):
  """Prints a JSON line: wall and processor seconds of each call after a first, and the peak memory they added."""
  run = {"jax": with_jax, "torch": with_torch}[contender](case)
  base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  value, seconds, processor = run(), [], []
  for _ in range(calls):
    start, start_processor = time.perf_counter(), time.process_time()
    run()
    seconds.append(time.perf_counter() - start)
    processor.append(time.process_time() - start_processor)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  memory = {"base_mb": base / 1024, "peak_mb": peak / 1024}
  print(json.dumps({"seconds": seconds, "processor": processor, "value": value} | memory))


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--cases", default="plain,contrast")
  parser.add_argument("--measure", nargs=3)
  options = parser.parse_args()
  if options.measure:
    measure(options.measure[0], options.measure[1], int(options.measure[2]))
    return
  from benchmarks import machine

  machine.describe()
  for case in options.cases.split(","):
    measured = {"jax": [], "torch": []}
    for _ in range(options.repeats):
      for contender in measured:
        command = [sys.executable, "-m", "benchmarks.quantise", "--measure", contender, case, "1"]
        text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        measured[contender].append(json.loads(text.splitlines()[-1]))
    median = {
      (name, key): statistics.median(s for r in runs for s in r[key])
      for name, runs in measured.items()
      for key in ("seconds", "processor")
    }
    for name, runs in measured.items():
      print(f"{case:18s} {name:6s} {median[name, 'seconds']:8.3f} s (processor {median[name, 'processor']:.3f} s)   "
            f"peak {runs[0]['peak_mb']:7.0f} MB (base {runs[0]['base_mb']:.0f})   value {runs[0]['value']:.4f}")
    ratio = {key: median["torch", key] / median["jax", key] for key in ("seconds", "processor")}
    print(f"{case:18s} torch / jax: time {ratio['seconds']:.1f}, processor time {ratio['processor']:.1f}, "
          f"peak memory {measured['torch'][0]['peak_mb'] / measured['jax'][0]['peak_mb']:.1f}")


if __name__ == "__main__":
  main()

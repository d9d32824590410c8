"""One quantised step over all devices there are, alone or as one of several processes; see test_codebook_sharded.py."""

import functools
import json
import re
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from codebind_jax import compositional, losses
from codebind_jax.codebook import segments
from codebind_jax.codebook.nearest_triton import nearest_by_triton

B, T = 32, 8
SPECS = {
  "random": compositional.CompositionalSpec(shared_dim=64, specific_dim=32, num_codes=(48, 24)),
  "closest": compositional.CompositionalSpec(shared_dim=64, specific_dim=32, num_codes=(48, 24), revive="closest"),
  "wide": compositional.CompositionalSpec(shared_dim=128, specific_dim=64, code_dims=(64, 64), num_codes=(8, 5)),
  "own": compositional.CompositionalSpec(
    shared_dim=64, specific_dim=32, num_codes=(12, 6), positions="own", stages=2, distance="l2", normalize=False,
    unit_parts=True, gradient="rotation_trick",
  ),
  "beam": compositional.CompositionalSpec(
    shared_dim=64, specific_dim=32, code_dims=(32, 16), num_codes=(12, 6), stages=3, beam=4, distance="l2",
    normalize=False, unit_parts=True,
  ),
  "own_wide": compositional.CompositionalSpec(
    shared_dim=128, specific_dim=64, code_dims=(64, 64), num_codes=(6, 5), positions="own", revive="closest"
  ),
}  # fmt: skip
# Losses gather class tokens, as they must; the other cases show that quantising does not.
CASES = [("random", True), ("random", False), ("closest", False), ("wide", False), ("own", False),
         ("beam", False), ("own_wide", False)]  # fmt: skip


def batch(spec):
  """Features and masks of two modalities as numpy."""
  rng = np.random.default_rng(0)
  width = spec.shared_dim + spec.specific_dim
  features = {"text": rng.normal(size=(B, spec.shared_dim)), "image": rng.normal(size=(B, T, width))}
  masks = {"image": rng.random((B, T)) < 0.8, "text": rng.random(B) < 0.9}
  return {name: x.astype(np.float32) for name, x in features.items()}, masks


def step(spec, with_losses, features, masks, codebooks):
  """Loss, its gradients, outputs and codebooks of one step."""

  def loss(features):
    outputs, new = compositional.quantize_modalities(features, codebooks, spec, rng=jax.random.key(1), masks=masks)
    total = sum(out.commitment for out in outputs.values())
    if with_losses:
      image, text, mask = outputs["image"], outputs["text"], masks["text"]
      total += losses.info_nce(image.shared[:, 0], text.shared, temperature=0.07, mask=mask)
      total += losses.info_nce(image.shared[:, 0], text.shared, temperature=0.07, chunk=16)
      total += losses.code_matching(image.similarity_shared, text.similarity_shared, mask=mask)
      total += losses.code_contrast(image.similarity_shared.reshape(-1, codebooks["shared"].codes.shape[0]))
      total += losses.decomposition(image.specific, image.shared[..., :32], mask=masks["image"])
      total += losses.specific_uniform(image.specific[:, 0], mask=mask)
    return total, (outputs, new)

  (value, (outputs, new)), gradients = jax.value_and_grad(loss, has_aux=True)(features)
  return {"loss": value, "gradients": gradients, "outputs": outputs, "codebooks": new}


def start(spec):
  """Codebooks with some codes that nothing uses."""
  books = compositional.new_codebooks(jax.random.key(0), spec, ["text", "image"])
  return {
    name: s.replace(ema_count=s.ema_count.at[..., 1:].set(3.0), ema_sum=3.0 * s.codes) for name, s in books.items()
  }


def collectives(text):
  """(operation, elements of its largest output) of every collective in compiled HLO."""
  found = []
  for line in text.splitlines():
    match = re.search(r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\(", line)
    if match:
      shapes = re.findall(r"\w+\[([\d,]*)\]", match.group(1))
      found.append((match.group(2), max(int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes)))
  return found


def run(case, with_losses):
  """Runs a case on a mesh of all devices; returns results as numpy by path, and the collectives."""
  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
  spec = SPECS[case]
  split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
  place = lambda x, sharding: jax.make_array_from_callback(np.shape(x), sharding, lambda i: np.asarray(x)[i])
  features, masks = jax.tree.map(lambda x: place(x, split), batch(spec))
  codebooks = jax.tree.map(lambda x: place(x, whole), start(spec))
  compiled = jax.jit(lambda *args: step(spec, with_losses, *args)).lower(features, masks, codebooks).compile()
  results = jax.jit(lambda x: x, out_shardings=whole)(compiled(features, masks, codebooks))
  leaves = jax.tree_util.tree_flatten_with_path(results)[0]
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, collectives(compiled.as_text())


def search_by_triton():
  """The search of NVIDIA's GPUs, interpreted, for segments that are split over the devices."""
  rng = np.random.default_rng(0)
  z, codes, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 8, 1200), (24, 8), (24,)))
  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
  where = [NamedSharding(mesh, axes) for axes in (P(None, None, "data"), P(), P())]
  placed = [jax.device_put(x, sharding) for x, sharding in zip((z, codes, bias), where)]
  compiled = jax.jit(functools.partial(nearest_by_triton, interpret=True)).lower(*placed).compile()
  found = compiled(*placed)
  assert found.sharding.spec == P(None, "data"), found.sharding
  best = np.argmax(np.einsum("kd,sdn->skn", codes, z) - bias[:, None], axis=1)
  return {"found": np.asarray(found), "best": best}, collectives(compiled.as_text())


def main(devices, processes, process, port, output):
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", int(devices))
  jax.config.update("jax_disable_most_optimizations", True)
  segments._CACHED = 0  # as with features that fill no cache
  if int(processes) > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process), initialization_timeout=60)
  talk = {}
  for case, with_losses in CASES if int(processes) == 1 else CASES[:1]:
    results, talk[f"{case}.{with_losses}"] = run(case, with_losses)
    np.savez(f"{output}.{case}.{with_losses}.{process}.npz", **results)
  if int(processes) == 1:
    results, talk["triton"] = search_by_triton()
    np.savez(f"{output}.triton.npz", **results)
  with open(f"{output}.json", "w") as file:
    json.dump(talk, file)


if __name__ == "__main__":
  main(*sys.argv[1:])

"""Loads the checkpoint of test_memory.py in a process of its own, and prints its peak of memory, in bytes, as JSON.

Arguments: its folder; that of a small one, loaded first, so that code and programs are not counted; and how: "load" by
codebind_jax.load, "fsdp" or "fsdp scan" into a sharding over all devices.
"""

import gc
import json
import resource
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from codebind_jax import api
from codebind_jax.trunks import clip


def resident():
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * resource.getpagesize()


def peak():
  """Largest resident size since `forget`."""
  with open("/proc/self/status") as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def forget():
  """Starts the measurement of the peak anew, so that what compiling took before is not counted."""
  with open("/proc/self/clear_refs", "w") as file:
    file.write("5")


def sharded(folder, scan):
  """The image trunk's parameters, every large one split over all devices along its last axis."""
  trunk = clip.make_trunk(weights=folder, modality="image", scan=scan)
  mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
  split = lambda x: PartitionSpec(*[None] * (x.ndim - 1), "fsdp") if x.size > 1e5 else PartitionSpec()
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, split(x)))
  shapes = jax.tree.map(place, trunk.shapes)
  return lambda: trunk.load(shapes)


def main(folder, small, how):
  api.load(small, modalities=["image"])
  if how.startswith("fsdp"):
    read = sharded(folder, "scan" in how)
  else:
    read = lambda: api.load(folder, modalities=["image"]).params
    read()  # what tracing and compiling take is not counted; large arrays go back to the system as they are freed
    gc.collect()
  forget()
  before = resident()
  params = jax.block_until_ready(read())
  kernels = [x for x in jax.tree.leaves(params) if x.size > 1e5]
  blocks = (params if how.startswith("fsdp") else params["image"]["trunk"])["trunk"]
  kernel = blocks["blocks" if "scan" in how else "blocks_1"]["mlp"]["fc1"]["kernel"]
  high = peak()  # before values are looked at
  arrays = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
  stays = sum(shard.data.nbytes for x in arrays for shard in x.addressable_shards)
  sample = np.asarray(kernel)[..., :3, :4].reshape(-1, 3, 4)[-1].tolist()
  found = {"above": high - before - stays, "stays": stays, "devices": len(kernels[0].sharding.device_set)}
  sys.stdout.write(json.dumps(found | {"sample": sample}) + "\n")


if __name__ == "__main__":
  main(*sys.argv[1:])

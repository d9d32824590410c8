"""The device mesh and where arrays live on it: batches split over `data`, state replicated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")


def make_mesh(shape: Mapping[str, int]) -> Mesh:
  """Mesh over all devices with axes `data`, `fsdp`, `tensor`; one entry may be -1 and is filled.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
  """
  sizes = [int(shape[axis]) for axis in AXES]
  count = jax.device_count()
  known = math.prod(size for size in sizes if size != -1)
  if sizes.count(-1) > 1 or known < 1 or count % known or (-1 not in sizes and known != count):
    raise ValueError(f"mesh: {dict(zip(AXES, sizes))} does not fit {count} devices (one axis may be -1)")
  sizes = [count // known if size == -1 else size for size in sizes]
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same value on every device."""
  return NamedSharding(mesh, P())


def over_data(mesh: Mesh) -> NamedSharding:
  """Leading axis split over `data`."""
  return NamedSharding(mesh, P("data"))


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Moves a host batch to the mesh; every process passes its own rows of the global batch."""
  sharding = over_data(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)

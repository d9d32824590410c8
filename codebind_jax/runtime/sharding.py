"""The device mesh, and how arrays are split over it: one table of path regexes for everything in the train state.

A rule gives the axes of a path's array logical names (`embed`, `mlp`, `codes`); a second table maps a logical axis to
mesh axes. Model code uses neither. An axis that does not divide is not split, and the logged table shows it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from absl import logging
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from codebind_jax.schema import Regex, Rule

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # mesh axes that split the rows; under fsdp a device gathers its weights layer by layer

# Logical axis -> mesh axes.
LOGICAL = {"embed": ("fsdp",), "mlp": ("tensor",), "vocab": ("tensor",), "codes": (), "": ()}

# (path regex, logical names of the last axes); the first match wins. The path of an optimizer state or a moving average
# ends with its parameter's path, so that one table serves all.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
  (r"codebooks/.*/(codes|ema_sum)", ("codes", "")),
  (r"codebooks/.*/(ema_count|usage)", ("codes",)),
  (r".*lora_[ab]", ()),
  (r".*(attn/out|mlp/fc2|second)/kernel", ("mlp", "embed")),
  (r".*patch/kernel", ("embed",)),
  (r".*/kernel", ("embed", "mlp")),
  (r".*/embedding", ("vocab", "embed")),
  (r".*", ()),  # vectors, positions, counters: small, so replicated
)

_MOST = 1 << 20
_FITS = Rule(lambda n: n == -1 or 1 <= n <= _MOST, f"-1 (all that remain), or 1 to {_MOST:,}", -1, _MOST)
Devices = Annotated[int, _FITS]
Axis = Annotated[str, Rule(lambda name: name in (*LOGICAL, *AXES), f"an axis, one of {sorted((*LOGICAL, *AXES))}")]
Split = Annotated[str, Rule(lambda name: name in ("", *AXES), f"'' (whole) or {list(AXES)}")]


@dataclasses.dataclass(frozen=True)
class MeshShape:
  """Section `mesh`: devices along each axis of the mesh; one number may be -1, for all remaining devices.

  Attributes:
    data: number of devices that share out the rows of a batch.
    fsdp: number of devices that share out rows and weights.
    tensor: number of devices that share out the wide axes of weights.
  """

  data: Devices = -1
  fsdp: Devices = 1
  tensor: Devices = 1

  def check(self, path: str) -> None:
    """Refuses two axes that both take the remaining devices."""
    if [self.data, self.fsdp, self.tensor].count(-1) > 1:
      sizes = {axis: getattr(self, axis) for axis in AXES}
      raise ValueError(f"config.{path}: got {sizes}; allowed: -1 for one axis")


@dataclasses.dataclass(frozen=True)
class Sharding:
  """Section `sharding`: how arrays are split over the mesh, beside `RULES`.

  Attributes:
    rules: (regular expression of an array's path, logical names or mesh axes of its last axes), tried before `RULES`.
    codes: the axis of the mesh that splits codebooks; "" for a whole copy on every device.
  """

  rules: tuple[tuple[Regex, tuple[Axis, ...]], ...] = ()
  codes: Split = ""


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
  """Mesh with axes `data`, `fsdp`, `tensor`.

  Args:
    shape: devices along each axis.
    devices: devices to use; all by default.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
  """
  sizes = [getattr(shape, axis) for axis in AXES]
  count = jax.device_count() if devices is None else len(devices)
  known = math.prod(size for size in sizes if size != -1)
  if sizes.count(-1) > 1 or known < 1 or count % known or (-1 not in sizes and known != count):
    raise ValueError(f"mesh: {dict(zip(AXES, sizes))} does not fit {count} devices (one axis may be -1)")
  sizes = [count // known if size == -1 else size for size in sizes]
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _splits(axes: tuple[str, ...], length: int) -> int:
  """Number of devices over which axes of the current mesh (`jax.set_mesh`) split `length`; 1 if it does not divide."""
  mesh = jax.sharding.get_abstract_mesh()
  devices = 1 if mesh.empty or not set(axes) <= set(mesh.axis_names) else math.prod(mesh.shape[a] for a in axes)
  return 1 if length % devices else devices


def row_axes(rows: int) -> tuple[str, ...]:
  """Axes of the current mesh that split `rows` over several devices; () if none do."""
  return BATCH if _splits(BATCH, rows) > 1 else ()


def keep_rows(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
  """Keeps activations split by rows, so that XLA gathers weights split over `fsdp` instead of summing activations.

  Returns x unchanged without a mesh, or if the rows do not divide over its devices.
  """
  axes = row_axes(len(x))
  return jax.lax.with_sharding_constraint(x, P(axes)) if axes else x


def split_over_devices(x: Float[Array, "s ..."]) -> Float[Array, "s ..."]:
  """Splits the first axis over as many devices as it divides over; returns x unchanged where it divides over none.

  Use it for work on a few rows of a batch, which would otherwise run on the few devices that hold them, or be repeated
  on every device. The rows are first replicated, so that the batch stays split in the backward pass too.
  """
  axes = max((BATCH, *((axis,) for axis in BATCH)), key=lambda axes: _splits(axes, len(x)))
  if _splits(axes, len(x)) == 1:
    return x
  return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, P()), P(axes))


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh and the rules that place arrays on it.

  Attributes:
    mesh: the devices and their axes.
    rules: (path regex, logical names of the last axes), the first match wins.
    logical: logical axis -> mesh axes.
  """

  mesh: Mesh | AbstractMesh
  rules: tuple[tuple[str, tuple[str, ...]], ...] = RULES
  logical: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: dict(LOGICAL))

  @property
  def replicated(self) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(self.mesh, P())

  @property
  def rows(self) -> NamedSharding:
    """Leading axis split over the batch's mesh axes."""
    return NamedSharding(self.mesh, P(BATCH))

  @property
  def row_devices(self) -> int:
    """Number of devices that the rows of a batch are split over."""
    return math.prod(self.mesh.shape[axis] for axis in BATCH)

  @property
  def process(self) -> tuple[int, int]:
    """(number of this process, number of processes) among those that have devices of the mesh."""
    there = sorted({device.process_index for device in self.mesh.devices.flat})
    return there.index(jax.process_index()), len(there)

  def spec(self, path: str, shape: tuple[int, ...]) -> P:
    """The partition of an array at `path`.

    Raises:
      ValueError: if no rule matches.
    """
    names = next((names for pattern, names in self.rules if re.fullmatch(pattern, path)), None)
    if names is None:
      raise ValueError(f"sharding.rules: {path!r} matches none of {[pattern for pattern, _ in self.rules]}")
    names = names[len(names) - min(len(names), len(shape)) :]
    parts: list[Any] = [None] * (len(shape) - len(names))
    used: set[str] = set()
    for size, name in zip(shape[len(parts) :], names, strict=True):
      axes = tuple(a for a in self.logical[name] if self.mesh.shape[a] > 1 and a not in used)
      fits = axes and size % math.prod(self.mesh.shape[a] for a in axes) == 0
      used.update(axes if fits else ())
      parts.append((axes if len(axes) > 1 else axes[0]) if fits else None)
    while parts and parts[-1] is None:
      parts.pop()
    return P(*parts)

  def of(self, tree: Any, prefix: str = "") -> Any:
    """Shardings of a state, or of its part at `prefix`, as a tree."""
    place = lambda path, x: NamedSharding(self.mesh, self.spec(_name(prefix, path), np.shape(x)))
    return jax.tree_util.tree_map_with_path(place, tree)

  def log(self, tree: Any, prefix: str = "") -> None:
    """Logs `table` if there are several devices."""
    if self.mesh.size > 1:
      for line in self.table(tree, prefix):
        logging.info("  %s", line)

  def table(self, tree: Any, prefix: str = "") -> list[str]:
    """Lines of text: part of the state, its split, number of arrays, size in all and on a device, an example path."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
      name = _name(prefix, path)
      spec = self.spec(name, np.shape(leaf))
      split = math.prod(self.mesh.shape[a] for part in spec for a in ((part,) if isinstance(part, str) else part or ()))
      entry = groups.setdefault((name.split("/")[0], str(tuple(spec)) if len(spec) else "whole"), [0, 0, 0, name])
      size = leaf.size * leaf.dtype.itemsize
      entry[:3] = entry[0] + 1, entry[1] + size, entry[2] + size // split
    lines = [f"{'part':<10} {'split':<22} {'arrays':>6} {'MB':>10} {'MB/device':>10}  such as"]
    for (part, split), (count, size, local, example) in groups.items():
      lines.append(f"{part:<10} {split:<22} {count:6d} {size / 2**20:10.2f} {local / 2**20:10.2f}  {example}")
    total, local = (sum(entry[i] for entry in groups.values()) for i in (1, 2))
    count = sum(entry[0] for entry in groups.values())
    return [*lines, f"{'all':<10} {'':<22} {count:6d} {total / 2**20:10.2f} {local / 2**20:10.2f}"]

  def put_batch(self, batch: Any) -> Any:
    """Places a host batch on the mesh, split by rows; every process passes its own rows of the global batch."""
    if self.process[1] == 1:
      return jax.device_put(batch, self.rows)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self.rows, np.asarray(x)), batch)

  def gathered(self, tree: Any) -> Any:
    """The tree with every array whole on this process: unchanged if it already is, else gathered into numpy arrays."""
    if self.process[1] == 1 and all(x.sharding.is_fully_replicated for x in jax.tree.leaves(tree)):
      return tree
    replicated = _identity(self.replicated)(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), replicated)


@functools.lru_cache(maxsize=8)
def _identity(sharding: NamedSharding) -> Any:
  """The compiled function that gives a tree as it is, placed otherwise."""
  return jax.jit(lambda tree: tree, out_shardings=sharding)


def make_layout(mesh: MeshShape, sharding: Sharding, devices: Sequence[Any] | None = None) -> Layout:
  """The layout of the sections `mesh` and `sharding`.

  Raises:
    ValueError: for a mesh that does not fit the devices.
  """
  logical = LOGICAL | {axis: (axis,) for axis in AXES}  # a rule of the user's may name mesh axes
  if sharding.codes:
    logical["codes"] = (sharding.codes,)
  return Layout(make_mesh(mesh, devices), sharding.rules + RULES, logical)


def _name(prefix: str, path: Any) -> str:
  name = jax.tree_util.keystr(path, simple=True, separator="/")
  return f"{prefix}/{name}" if prefix and name else prefix or name

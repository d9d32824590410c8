"""Random views of training items, one module per modality; drawn anew whenever an item is read.

A module's augmentations are its public frozen dataclasses that can be called with `(value, rng)`: a decoded value (what
`data.transforms.MODALITY.read`, or a trunk's own `Input.read`, gives) and a numpy generator; the view has the same kind
and the same unit, so that whatever takes the item takes the view. A view is a function of the value, the fields and the
generator's state alone, and the value is never written to. Fields are config keys: `Annotated` rules say what is
allowed. Each has a `revision`, which is part of its `repr`, so of the key of features that are kept of a view. A new
modality, or a new kind, needs no registry. Modules import no JAX: views are made in worker processes.
"""

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from codebind_jax.schema import DERIVED, Rule, arguments, check_keys, keys_of, read


def make(modality: str, settings: Mapping[str, Any]) -> Callable[[Any, np.random.Generator], Any]:
  """The augmentation that the section `model.towers.MODALITY.augment` describes.

  >>> make("image", {"kind": "photo", "flip": 0.0}).flip
  0.0

  Args:
    modality: name of a module of this package.
    settings: `kind`, the name of one of its classes in lower case, and fields of that class.

  Raises:
    ValueError: naming the key, the value got and what is allowed.
  """
  path = f"model.towers.{modality}.augment"
  if modality not in augmented():
    raise ValueError(
      f"config.{path}: got {dict(settings)!r}; allowed: none, {modality!r} is not among the modalities that have "
      f"augmentations: {list(augmented())}"
    )
  known = kinds(importlib.import_module(f"{__name__}.{modality}"))
  if "kind" not in settings:
    raise ValueError(f"config.{path}.kind: must be set, got {dict(settings)!r}; allowed: {sorted(known)}")
  check_keys([settings["kind"]], sorted(known), f"{path}.kind")
  kind = known[settings["kind"]]
  return kind(**arguments(kind, {key: value for key, value in settings.items() if key != "kind"}, path))


def augmented() -> tuple[str, ...]:
  """Modalities that have augmentations."""
  return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def kinds(module: ModuleType) -> dict[str, type]:
  """Name for `kind` -> class, of a module's augmentations."""
  named = {name: one for name, one in vars(module).items() if dataclasses.is_dataclass(one) and name[0] != "_"}
  return {name.lower(): one for name, one in named.items() if any("__call__" in vars(base) for base in one.__mro__)}


def revision(name: str) -> Any:
  """The field `revision` of an augmentation: changes whenever the same fields would give other values."""
  return dataclasses.field(default=name, init=False, metadata=DERIVED)


def span(low: int | float = -math.inf, high: int | float = math.inf) -> Rule:
  """Pairs (smallest, largest) of finite numbers above `low` and up to `high`."""
  bounds = [f"above {low:g}"] * (low > -math.inf) + [f"up to {high:g}"] * (high < math.inf)
  holds = lambda pair: low < pair[0] <= pair[1] <= high and pair[1] < math.inf
  return Rule(holds, f"smallest <= largest{''.join(f', {bound}' for bound in bounds)}", low, high)


class Checked:
  """A dataclass whose fields are checked by their annotations, also where it is made without a config."""

  def __post_init__(self):
    for name, (hint, _) in keys_of(type(self)).items():
      try:
        read(hint, getattr(self, name), name)
      except ValueError as error:
        raise ValueError(str(error).removeprefix("config.")) from None

"""Published checkpoints by their files: which family a path belongs to.

A family is a module of this package with `recognises(path) -> bool`, `modalities(path) -> tuple` and `make_trunk`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from codebind_jax.trunks import trunk_names
from codebind_jax.trunks.checkpoint_files import ENDINGS, open_weights
from codebind_jax.trunks.tokens import folder_json


def families() -> dict[str, ModuleType]:
  """Name of a family -> its module."""
  modules = {name: importlib.import_module(f"codebind_jax.trunks.{name}") for name in trunk_names()}
  return {name: module for name, module in modules.items() if hasattr(module, "recognises")}


def family_of(path: Path) -> str:
  """Name of the family that a file or folder belongs to.

  Raises:
    ValueError: naming the families that are supported, and what the path seems to be; for a damaged file of weights,
      or one that names foreign code, what is wrong with it.
  """
  found = families()
  for name, module in found.items():
    if module.recognises(path):
      return name
  kind = folder_json(path, "config.json").get("model_type") if path.is_dir() else None
  seems = f"its config.json has model_type {kind!r}" if kind else "it is none of their files"
  if path.is_file() and path.suffix in ENDINGS:
    some = sorted(open_weights(path))
    seems = f"it has {len(some)} arrays, such as {', '.join(some[:3])}"
  raise ValueError(f"{path}: no supported checkpoint ({seems}); supported: a run's folder, a saved model, "
                   f"{', '.join(found)}")  # fmt: skip

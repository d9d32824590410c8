"""Published checkpoints by their files: which family a path belongs to.

A family is a module of this package with `recognises(path) -> bool`, `modalities(path) -> tuple` and `make_trunk`.
"""

from __future__ import annotations

import importlib
import importlib.resources
import json
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from codebind_jax.trunks import trunk_names
from codebind_jax.trunks.checkpoint_files import ENDINGS, open_weights
from codebind_jax.trunks.folders import folder_json


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


class Pretrained(NamedTuple):
  """An official checkpoint that `load` takes.

  Attributes:
    name: for `load`, where it begins with "hf:"; else the file's or folder's name as its authors publish it.
    family: module of `trunks`.
    modalities: that it embeds.
    width: of its shared embedding.
    licence: of its weights.
  """

  name: str
  family: str
  modalities: tuple[str, ...]
  width: int
  licence: str


def list_pretrained() -> list[Pretrained]:
  """The official checkpoints of all supported families, as `trunks/pretrained.json` has them."""
  rows = json.loads((importlib.resources.files("codebind_jax.trunks") / "pretrained.json").read_text(encoding="utf-8"))
  supported = families()
  return [Pretrained(**row | {"modalities": tuple(row["modalities"])}) for row in rows if row["family"] in supported]

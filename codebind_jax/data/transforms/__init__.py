"""Per-modality transforms from users' files to arrays.

A modality is a module of this package with `read(value) -> array` (a path, the file's bytes, or an array that is
checked and passed on) and, where a look at the file's head is cheaper, `check(path)`; both raise a ValueError that
names the file. A new modality needs no registry. Text has no module: its values are strings.
"""

import functools
import importlib
import pkgutil
from types import ModuleType


def readable() -> tuple[str, ...]:
  """Modalities that can be read from files, text included."""
  return _readable(tuple(__path__))


@functools.cache
def _readable(folders: tuple[str, ...]) -> tuple[str, ...]:
  modules = [module.name for module in pkgutil.iter_modules(folders)]
  return tuple(sorted([*modules, "text"]))


def of(modality: str) -> ModuleType:
  """The transform module of a modality.

  Raises:
    ValueError: if there is none.
  """
  if modality == "text" or modality not in readable():
    known = [name for name in readable() if name != "text"]
    raise ValueError(f"modality: {modality!r} is not read from files; allowed: {known}")
  return importlib.import_module(f"{__name__}.{modality}")

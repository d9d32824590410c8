"""codebind_jax: bind any number of modalities into one space and keep what is unique to each."""

import importlib
from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "list_pretrained", "load", "search"]


def __getattr__(name: str) -> Any:
  """Loads the public names on first use, so that importing the package stays light."""
  if name == "load":
    from codebind_jax.api import load

    return load
  if name == "list_pretrained":
    from codebind_jax.trunks.families import list_pretrained

    return list_pretrained
  if name == "search":
    return importlib.import_module("codebind_jax.search")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

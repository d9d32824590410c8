"""The names of ImageNet's classes."""

from __future__ import annotations

import importlib.resources
import json


def imagenet_names() -> list[str]:
  """Names of the 1,000 ILSVRC-2012 classes, synonyms joined by commas, in the order of the classifier's outputs."""
  file = importlib.resources.files("codebind_jax.data.worlds") / "tables" / "imagenet_classes.json"
  return json.loads(file.read_text(encoding="utf-8"))["names"]

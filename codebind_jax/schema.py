"""How a config is read: dotted paths, plain values, differences."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections


def get(config: Any, path: str) -> Any:
  """The value at a dotted path.

  Raises:
    ValueError: naming the first missing key and the keys there are.
  """
  value = config
  done: list[str] = []
  for part in path.split("."):
    if not isinstance(value, (Mapping, ml_collections.ConfigDict)):
      raise ValueError(f"config.{path}: {'.'.join(done)!r} is a value, it has no key {part!r}")
    if part not in value:
      prefix = "".join(f"{key}." for key in done)
      raise ValueError(f"config.{path}: unknown key {part!r}; allowed: {sorted(prefix + key for key in value)}")
    value = value[part]
    done.append(part)
  return value


def has(config: Any, path: str) -> bool:
  """Whether the dotted path exists."""
  try:
    get(config, path)
  except ValueError:
    return False
  return True


def check_keys(given: Iterable[str], allowed: Iterable[str], what: str) -> None:
  """Raises a ValueError naming the first of `given` that is not among `allowed`."""
  allowed = list(allowed)
  for name in given:
    if name not in allowed:
      raise ValueError(f"config.{what}: {name!r} is not allowed; allowed: {allowed}")


def to_plain(config: Any) -> Any:
  """The config as JSON-ready dicts, lists and numbers, for checkpoints and comparisons."""
  return json.loads(json.dumps(config.to_dict() if hasattr(config, "to_dict") else config))


def difference(a: Any, b: Any, prefix: str = "") -> list[str]:
  """Dotted paths at which two plain configs differ, with both values."""
  if isinstance(a, dict) and isinstance(b, dict):
    keys = sorted(set(a) | set(b))
    return [line for key in keys for line in difference(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)]
  return [] if a == b else [f"{prefix}: {a!r} -> {b!r}"]


def key(config: Any, *free: str) -> str:
  """A config as text, without the keys at the dotted paths of `free`: equal for runs that differ in those alone."""
  plain = to_plain(config)
  for path in free:
    *parents, last = path.split(".")
    part = plain
    for parent in parents:
      part = part[parent]
    part.pop(last, None)
  return json.dumps(plain, sort_keys=True)

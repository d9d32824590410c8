"""Reading of configs: a section is a frozen dataclass, which declares keys, types, defaults and ranges once.

A field is a key. Its type is a scalar, a `Literal` of choices, a tuple, a `Mapping`, another section, `X | None`, or
`Any`; `Annotated[type, rule]` adds a condition on the value. The section's method `check(path)` checks keys against one
another. Every error is a ValueError that names the key, the value got and what is allowed.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import itertools
import json
import math
import numbers
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Annotated, Any, Literal, Union

import ml_collections

DERIVED = {"key": False}  # metadata of a dataclass field that is no config key: the program sets it
_SCALARS = {
  bool: (bool, "True or False"), int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a number"),
  str: (str, "a text"),
}  # fmt: skip


class Frozen(dict):
  """A dict that must not be changed, so that it can be hashed and be a default."""

  def __hash__(self) -> int:
    return hash(frozenset(self.items()))


@dataclasses.dataclass(frozen=True)
class Rule:
  """What a value must satisfy beside its type, and how an error says it."""

  holds: Callable[[Any], bool]
  said: str


def above(low: int | float) -> Rule:
  """Finite numbers larger than `low`."""
  return Rule(lambda value: low < value < math.inf, f"any number above {low:g}")


def at_least(low: int | float, means: str = "") -> Rule:
  """Finite numbers from `low` on; `means` says what `low` itself stands for."""
  return Rule(lambda value: low <= value < math.inf, f"{low:g}{f' ({means})' if means else ''} and up")


def within(low: int | float, high: int | float, means: str = "", below: bool = False) -> Rule:
  """Numbers from `low` to `high`, which is left out where `below`; `means` says what `low` itself stands for."""
  to = "up to, not including," if below else "to"
  holds = lambda value: low <= value <= high and not (below and value == high)
  return Rule(holds, f"{low:g}{f' ({means})' if means else ''} {to} {high:g}")


def _compiles(value: str) -> bool:
  try:
    re.compile(value)
  except re.error:
    return False
  return True


Regex = Annotated[str, Rule(_compiles, "a regular expression")]


def read(kind: Any, value: Any, path: str = "") -> Any:
  """A value converted to the type of its key.

  Args:
    kind: the type, such as a section's class.
    value: a ConfigDict, dict, list, number, ...; an object of the section's class is returned unchanged.
    path: of the key, dotted; "" for the whole config.

  Raises:
    ValueError: naming the key, the value got and what is allowed.
  """
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin is Annotated:
    typed = read(args[0], value, path)
    for rule in args[1:]:
      if not rule.holds(typed):
        raise ValueError(f"config.{path}: got {typed!r}; allowed: {rule.said}")
    return typed
  if origin is Literal:
    check_keys([value], args, path)
    return value
  if origin in (Union, types.UnionType):
    others = [one for one in args if one is not types.NoneType]
    return None if value is None else read(others[0], value, path) if len(others) == 1 else fixed(value)
  if dataclasses.is_dataclass(kind):
    if isinstance(value, kind):
      return value
    section = kind(**arguments(kind, value, path))
    if hasattr(section, "check"):
      section.check(path)
    return section
  if origin in (dict, collections.abc.Mapping):
    return Frozen({key: read(args[1], item, f"{path}.{key}") for key, item in _items(value, path)})
  if origin is tuple:
    if not isinstance(value, list | tuple):
      raise ValueError(f"config.{path}: got {value!r}; allowed: a tuple")
    if args[-1] is not Ellipsis and len(args) != len(value):
      raise ValueError(f"config.{path}: got {value!r}; allowed: a tuple of {len(args)}")
    kinds = itertools.repeat(args[0]) if args[-1] is Ellipsis else args
    return tuple(read(one, item, path) for one, item in zip(kinds, value))
  if kind in _SCALARS:
    accepted, name = _SCALARS[kind]
    if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
      raise ValueError(f"config.{path}: got {value!r}; allowed: {name}")
    return kind(value)
  return fixed(value)


def arguments(target: Callable[..., Any], value: Any, path: str, leave: Collection[str] = ()) -> dict[str, Any]:
  """Arguments for `target`: the values of a mapping, read by its annotations, and its defaults for all other keys.

  Args:
    target: a dataclass or a function with keywords, whose names are the keys.
    value: mapping of key -> value.
    path: of the mapping, dotted.
    leave: names that are no keys.

  Raises:
    ValueError: for an unknown key, naming the known ones, a missing key, or a bad value.
  """
  keys, values = keys_of(target, leave), dict(_items(value, path))
  at = f"{path}." if path else ""
  for key in values:
    if key not in keys:
      raise ValueError(f"config.{at}{key}: unknown key {key!r}; allowed: {sorted(at + name for name in keys)}")
  for key, (_, default) in keys.items():
    if key not in values and default is dataclasses.MISSING:
      raise ValueError(f"config.{at}{key}: must be set")
  return {key: read(hint, values[key], at + key) if key in values else default for key, (hint, default) in keys.items()}


def keys_of(target: Callable[..., Any], leave: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
  """Key -> (type, default or `dataclasses.MISSING`) of a dataclass or a function with keywords."""
  hints = typing.get_type_hints(target, include_extras=True)
  if dataclasses.is_dataclass(target):
    keys = {f.name: f.default for f in dataclasses.fields(target) if f.metadata.get("key", True)}
  else:
    missing = lambda default: dataclasses.MISSING if default is inspect.Parameter.empty else default
    keys = {name: missing(p.default) for name, p in inspect.signature(target).parameters.items()}
  return {name: (hints.get(name, Any), default) for name, default in keys.items() if name not in leave}


def defaults(target: Callable[..., Any], leave: Collection[str] = ()) -> dict[str, Any]:
  """Key -> default as a plain dict for a ConfigDict; keys without a default, or whose default is None, are left out."""
  return {name: _plain(default, tuple) for name, (_, default) in keys_of(target, leave).items()
          if default is not dataclasses.MISSING and default is not None}  # fmt: skip


def fixed(value: Any) -> Any:
  """The value made hashable: lists become tuples, dicts become `Frozen`, at all depths."""
  if isinstance(value, Mapping | ml_collections.ConfigDict):
    return Frozen({key: fixed(item) for key, item in value.items()})
  return tuple(map(fixed, value)) if isinstance(value, list | tuple) else value


def get(config: Any, path: str) -> Any:
  """The value of a ConfigDict at a dotted path.

  Raises:
    ValueError: naming the first missing key and the keys that exist.
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


def check_keys(values: Iterable[Any], allowed: Iterable[Any], path: str) -> None:
  """Raises a ValueError naming the first of `values` that is not among `allowed`."""
  allowed = list(allowed)
  for value in values:
    if value not in allowed:
      raise ValueError(f"config.{path}: {value!r} is not allowed; allowed: {allowed}")


def to_plain(config: Any) -> Any:
  """A section or ConfigDict as JSON-ready dicts, lists and scalars, for checkpoints and comparisons."""
  return _plain(config, list)


def difference(a: Any, b: Any, prefix: str = "") -> list[str]:
  """Lines "path: a's value -> b's value" for all dotted paths at which two plain configs differ."""
  if isinstance(a, dict) and isinstance(b, dict):
    keys = sorted(set(a) | set(b))
    return [line for key in keys for line in difference(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)]
  return [] if a == b else [f"{prefix}: {a!r} -> {b!r}"]


def key(config: Any, *free: str) -> str:
  """The config as text without the keys at the dotted paths `free`, equal for configs that differ in those alone."""
  plain = to_plain(config)
  for path in free:
    *parents, last = path.split(".")
    part = plain
    for parent in parents:
      part = part[parent]
    part.pop(last, None)
  return json.dumps(plain, sort_keys=True)


def _plain(value: Any, sequence: type) -> Any:
  if dataclasses.is_dataclass(value):
    value = {name: item for name in keys_of(type(value)) if (item := getattr(value, name)) is not None}
  if isinstance(value, Mapping | ml_collections.ConfigDict):
    return {key: _plain(item, sequence) for key, item in value.items()}
  return sequence(_plain(item, sequence) for item in value) if isinstance(value, list | tuple) else value


def _items(value: Any, path: str) -> Iterable[tuple[str, Any]]:
  if not isinstance(value, Mapping | ml_collections.ConfigDict):
    raise ValueError(f"config.{path}: got {value!r}; allowed: a section with keys")
  return value.items()


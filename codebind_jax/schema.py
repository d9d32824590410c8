"""How a config is read: a section is a frozen dataclass, which says keys, types, defaults and ranges once.

A field is a key. Its type is a scalar, a `Literal` of choices, a tuple, a `Mapping`, another section, `X | None`, or
`Any`; `Annotated[type, rule]` adds what the value must satisfy. What two keys of a section say of one another is
checked by the section's method `check(path)`. Every error is a ValueError that names the key, the value got and what
is allowed.
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

DERIVED = {"key": False}  # metadata of a dataclass field that is no key of a config: the program fills it in
_SCALARS = {
  bool: (bool, "True or False"), int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a number"),
  str: (str, "a text"),
}  # fmt: skip


class Frozen(dict):
  """A dict that nobody changes, so that it has a hash and can be a default."""

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
  """A value as the type of its key.

  Args:
    kind: the type; a section's class gives the section.
    value: a ConfigDict, dict, list, number, ...; an object of the section's class is taken as it is.
    path: dotted, of the key; "" for the whole config.

  Raises:
    ValueError: naming the key, the value got and what is allowed.
  """
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin is Annotated:
    found = read(args[0], value, path)
    for rule in args[1:]:
      if not rule.holds(found):
        raise ValueError(f"config.{path}: got {found!r}; allowed: {rule.said}")
    return found
  if origin is Literal:
    check_keys([value], args, path)
    return value
  if origin in (Union, types.UnionType):
    others = [one for one in args if one is not types.NoneType]
    return None if value is None else read(others[0], value, path) if len(others) == 1 else fixed(value)
  if dataclasses.is_dataclass(kind):
    if isinstance(value, kind):
      return value
    made = kind(**arguments(kind, value, path))
    if hasattr(made, "check"):
      made.check(path)
    return made
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


def arguments(made: Callable[..., Any], value: Any, path: str, leave: Collection[str] = ()) -> dict[str, Any]:
  """What to call `made` with: the values given, read by its annotations, and its defaults for all other keys.

  Args:
    made: a dataclass or a function with keywords, whose names are the keys.
    value: mapping of the values given.
    path: dotted, of the mapping.
    leave: names that are no keys.

  Raises:
    ValueError: for an unknown key, naming those there are, a missing one, or a bad value.
  """
  keys, given = keys_of(made, leave), dict(_items(value, path))
  at = f"{path}." if path else ""
  for key in given:
    if key not in keys:
      raise ValueError(f"config.{at}{key}: unknown key {key!r}; allowed: {sorted(at + name for name in keys)}")
  for key, (_, default) in keys.items():
    if key not in given and default is dataclasses.MISSING:
      raise ValueError(f"config.{at}{key}: must be set")
  return {key: read(hint, given[key], at + key) if key in given else default for key, (hint, default) in keys.items()}


def keys_of(made: Callable[..., Any], leave: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
  """Key -> (type, default) of a dataclass or a function with keywords; `dataclasses.MISSING` where there is none."""
  hints = typing.get_type_hints(made, include_extras=True)
  if dataclasses.is_dataclass(made):
    found = {f.name: f.default for f in dataclasses.fields(made) if f.metadata.get("key", True)}
  else:
    missing = lambda default: dataclasses.MISSING if default is inspect.Parameter.empty else default
    found = {name: missing(p.default) for name, p in inspect.signature(made).parameters.items()}
  return {name: (hints.get(name, Any), default) for name, default in found.items() if name not in leave}


def defaults(made: Callable[..., Any], leave: Collection[str] = ()) -> dict[str, Any]:
  """The keys that have a default, as a plain dict for a ConfigDict; sections that are None are left out."""
  kept = {name: default for name, (_, default) in keys_of(made, leave).items()}
  return {name: _plain(default, tuple) for name, default in kept.items()
          if default is not dataclasses.MISSING and default is not None}  # fmt: skip


def fixed(value: Any) -> Any:
  """A value that can be hashed: lists as tuples, dicts as `Frozen`, also within."""
  if isinstance(value, Mapping | ml_collections.ConfigDict):
    return Frozen({key: fixed(item) for key, item in value.items()})
  return tuple(map(fixed, value)) if isinstance(value, list | tuple) else value


def get(config: Any, path: str) -> Any:
  """The value of a ConfigDict at a dotted path.

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


def check_keys(given: Iterable[Any], allowed: Iterable[Any], what: str) -> None:
  """Raises a ValueError naming the first of `given` that is not among `allowed`."""
  allowed = list(allowed)
  for name in given:
    if name not in allowed:
      raise ValueError(f"config.{what}: {name!r} is not allowed; allowed: {allowed}")


def to_plain(config: Any) -> Any:
  """A section or ConfigDict as JSON-ready dicts, lists and numbers, for checkpoints and comparisons."""
  return _plain(config, list)


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


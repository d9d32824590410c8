"""Reading of configs: a section is a frozen dataclass, which declares keys, types, defaults and ranges once.

A field is a key. Its type is a scalar, a `Literal` of choices, a tuple, a `Mapping`, a section, a union, or `Any`;
`Annotated[type, rule, ...]` adds conditions on the value. A whole number is one of 32 bits unless a rule names a larger
end, any other number one that float32 can tell from 0 and from infinity. The section's method `check(path)` checks keys
against one another. Every error is a ValueError that names the key, the value got and what is allowed.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import itertools
import json
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union

import ml_collections
import numpy as np

INT32 = 2**31 - 1  # the largest of the whole numbers that arrays and steps are counted in
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
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
  """What a value must satisfy beside its type, and how an error says it.

  Attributes:
    holds: whether a value of the type satisfies it.
    said: what is allowed, in words.
    low, high: the ends of a range of numbers; None where it has none on that side.
  """

  holds: Callable[[Any], bool]
  said: str
  low: int | float | None = None
  high: int | float | None = None


def above(low: int | float) -> Rule:
  """Finite numbers larger than `low`."""
  return Rule(lambda value: low < value < math.inf, f"any number above {low:g}", low)


def at_least(low: int | float, means: str = "") -> Rule:
  """Finite numbers from `low` on; `means` says what `low` itself stands for."""
  return Rule(lambda value: low <= value < math.inf, f"{low:g}{f' ({means})' if means else ''} and up", low)


def at_most(high: int | float) -> Rule:
  """Numbers up to `high`; the other end is another rule's."""
  return Rule(lambda value: value <= high, f"up to {high:,}", high=high)


def below(high: int | float) -> Rule:
  """Numbers that are smaller than `high` in float32 too; the other end is another rule's."""
  return Rule(lambda value: np.float32(value) < high, f"any number below {high:g}", high=high)


def within(low: int | float, high: int | float, means: str = "", below: bool = False) -> Rule:
  """Numbers from `low` to `high`, which is left out where `below`; `means` says what `low` itself stands for."""
  to = "up to, not including," if below else "to"
  holds = lambda value: low <= value <= high and not (below and np.float32(value) >= high)
  whole = lambda number: f"{number:g}" if abs(number) < 10**5 else f"{number:,}"
  return Rule(holds, f"{low:g}{f' ({means})' if means else ''} {to} {whole(high)}", low, high)


def shaped(pattern: str, said: str) -> Rule:
  """Texts that a regular expression matches as a whole."""
  return Rule(lambda value: re.fullmatch(pattern, value) is not None, said)


def one_of(*values: Any) -> Rule:
  """These values alone."""
  ordered = [value for value in values if isinstance(value, int | float)]
  ends = (min(ordered), max(ordered)) if ordered else (None, None)
  return Rule(lambda value: value in values, f"one of {list(values)}", *ends)


def _compiles(value: str) -> bool:
  try:
    re.compile(value)
  except (re.error, OverflowError, RecursionError):
    return False
  return True


def _distinct(values: Collection[Any]) -> bool:
  values = list(values)
  return all(value not in values[:at] for at, value in enumerate(values))


_LINE = r"[^\0\r\n]"
Regex = Annotated[str, Rule(_compiles, "a regular expression")]
Name = Annotated[str, shaped(r"[^\W_][\w-]*", "a name of letters, digits, _ and -, which begins with neither _ nor -")]
MaybeName = Annotated[str, shaped(r"([^\W_][\w-]*)?", "'' or a name of letters, digits, _ and -")]
Place = Annotated[str, shaped(rf"{_LINE}*", "a path, in one line")]
NonemptyPlace = Annotated[str, shaped(rf"{_LINE}*[^\0\r\n\s]{_LINE}*", "a path, in one line and not empty")]
Line = Annotated[str, shaped(rf"{_LINE}*", "a text of one line")]
NonemptyLine = Annotated[str, shaped(rf"{_LINE}*[^\0\r\n\s]{_LINE}*", "a text of one line, not empty")]
Seed = Annotated[int, at_least(0), at_most(2**32 - 1)]
Side = Annotated[int, above(0), at_most(1 << 16)]  # a width
Share = Annotated[float, within(0, 1)]
Decay = Annotated[float, within(0, 1), below(1)]  # of a moving average, which never moves at 1
Rate = Annotated[float, above(0)]  # too large a one ends the run, which says so
Temperature = Annotated[float, above(0), within(1e-4, 1e4)]
Weight = Annotated[float, at_least(0, "off"), at_most(1e6)]
Threads = Annotated[int, above(0), at_most(1024)]
NONEMPTY = Rule(lambda value: len(value) > 0, "one and more")
DISTINCT = Rule(_distinct, "each one once")


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
    rules = args[1:]
    typed = _scalar(args[0], value, path) if args[0] in _SCALARS else read(args[0], value, path)
    for rule in rules:
      if not rule.holds(typed):
        raise ValueError(f"config.{path}: got {_shown(typed)}; allowed: {rule.said}")
    return _limited(typed, path, max((rule.high for rule in rules if rule.high is not None), default=INT32))
  if origin is Literal:
    if not any(value == one and type(value) is type(one) for one in args):  # True is no 1
      raise ValueError(f"config.{path}: {_shown(value)} is not allowed; allowed: {list(args)}")
    return value
  if origin in (Union, types.UnionType):
    return read_any(args, value, path)
  if dataclasses.is_dataclass(kind):
    if isinstance(value, kind):
      return value
    section = kind(**arguments(kind, value, path))
    if hasattr(section, "check"):
      section.check(path)
    return section
  if origin in (dict, collections.abc.Mapping):
    named = lambda key: read(args[0], key, f"{path}.{key}") if isinstance(key, str) else read(str, key, path)
    return Frozen({named(key): read(args[1], item, f"{path}.{key}") for key, item in _items(value, path)})
  if origin in (tuple, collections.abc.Sequence):
    if not isinstance(value, list | tuple):
      raise ValueError(f"config.{path}: got {_shown(value)}; allowed: a tuple")
    several = origin is not tuple or args[-1] is Ellipsis
    if not several and len(args) != len(value):
      raise ValueError(f"config.{path}: got {_shown(value)}; allowed: a tuple of {len(args)}")
    kinds = itertools.repeat(args[0]) if several else args
    return tuple(read(one, item, path) for one, item in zip(kinds, value))
  if kind in _SCALARS:
    return _limited(_scalar(kind, value, path), path)
  if inspect.isclass(kind) and issubclass(kind, os.PathLike) and not isinstance(value, kind):
    raise ValueError(f"config.{path}: got {_shown(value)}; allowed: a path")
  return fixed(value)


def _scalar(kind: type, value: Any, path: str) -> Any:
  accepted, name = _SCALARS[kind]
  if not isinstance(value, accepted) or isinstance(value, bool | np.bool_) != (kind is bool):
    raise ValueError(f"config.{path}: got {_shown(value)}; allowed: {name}")
  try:
    return kind(value)
  except OverflowError:
    raise ValueError(f"config.{path}: got {_shown(value)}; allowed: {name} of at most {LARGEST:.2g}") from None


def _limited(value: Any, path: str, high: int | float = INT32) -> Any:
  """The value, unless it is a number that the arrays' types cannot hold."""
  if type(value) is int and not -INT32 <= value <= max(high, INT32):
    raise ValueError(f"config.{path}: got {_shown(value)}; allowed: a whole number of 32 bits, up to {INT32:,}")
  if type(value) is float and not (value == 0 or SMALLEST <= abs(value) <= LARGEST):
    raise ValueError(f"config.{path}: got {value!r}; allowed: a finite number of float32, 0 or of {SMALLEST:.2g} to "
                     f"{LARGEST:.2g} in size")  # fmt: skip
  return value


def read_any(kinds: Sequence[Any], value: Any, path: str) -> Any:
  """The value as the first of several types that takes it.

  Args:
    kinds: the types.
    value, path: as of `read`.

  Raises:
    ValueError: of the type whose form the value has, else of all.
  """
  if types.NoneType in kinds and value is None:
    return None
  errors: dict[str, None] = {}
  for kind in (kind for kind in kinds if kind is not types.NoneType):
    try:
      return read(kind, value, path)
    except ValueError as error:
      errors[str(error)] = None
  head = f"config.{path}: got {_shown(value)}; allowed: "
  if all(error.startswith(head) for error in errors):
    raise ValueError(head + " or ".join(error.removeprefix(head) for error in errors))
  raise ValueError(next(error for error in errors if not error.startswith(head)))


def _shown(value: Any) -> str:
  """A value as an error shows it: whole, or its first letters."""
  try:
    text = repr(value)
  except ValueError:  # a number of too many digits
    return f"a number of {value.bit_length()} bits"
  return text if len(text) <= 200 else f"{text[:200]}..."


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
  errors, found = [], {}
  for key in values:
    if key not in keys:
      errors.append(f"config.{at}{key}: unknown key {key!r}; allowed: {sorted(at + name for name in keys)}")
  for key, (hint, default) in keys.items():
    if key not in values and default is dataclasses.MISSING:
      errors.append(f"config.{at}{key}: must be set")
    try:
      found[key] = read(hint, values[key], at + key) if key in values else default
    except ValueError as error:
      errors.append(str(error))
  if errors:
    raise ValueError("\n".join(errors))
  return found


def keys_of(target: Callable[..., Any], leave: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
  """Key -> (type, default or `dataclasses.MISSING`) of a dataclass or a function with keywords."""
  return {name: key for name, key in _all_keys(target) if name not in leave}


@functools.cache  # every section of every config asks, and annotations are evaluated anew
def _all_keys(target: Callable[..., Any]) -> tuple[tuple[str, tuple[Any, Any]], ...]:
  hints = typing.get_type_hints(target, include_extras=True)
  if dataclasses.is_dataclass(target):
    keys = {f.name: f.default for f in dataclasses.fields(target) if f.metadata.get("key", True)}
  else:
    missing = lambda default: dataclasses.MISSING if default is inspect.Parameter.empty else default
    keys = {name: missing(p.default) for name, p in inspect.signature(target).parameters.items()}
  return tuple((name, (hints.get(name, Any), default)) for name, default in keys.items())


def entry_type(target: type, path: Iterable[str]) -> type | None:
  """Type of the values of the mapping at a path of keys of a section: bool, int, float, str or tuple; else None."""
  hint: Any = target
  for part in path:
    if dataclasses.is_dataclass(hint):
      hint = _bare(keys_of(hint).get(part, (None, None))[0])
    else:
      hint = _bare(typing.get_args(hint)[1]) if typing.get_origin(hint) is collections.abc.Mapping else None
  if typing.get_origin(hint) is not collections.abc.Mapping:
    return None
  entry = _bare(typing.get_args(hint)[1])
  if typing.get_origin(entry) is Literal:
    entry = type(typing.get_args(entry)[0])
  return tuple if typing.get_origin(entry) is tuple else entry if entry in _SCALARS else None


def _bare(hint: Any) -> Any:
  """A type without the rules on its values, and without None beside it."""
  if typing.get_origin(hint) is Annotated:
    return _bare(typing.get_args(hint)[0])
  if typing.get_origin(hint) in (Union, types.UnionType):
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    return _bare(kinds[0]) if len(kinds) == 1 else hint
  return hint


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


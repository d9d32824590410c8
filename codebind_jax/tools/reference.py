"""Tables of options out of the code: names, types and defaults from signatures, meanings from docstrings."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union

import codebind_jax
from codebind_jax import schema
from codebind_jax.schema import Frozen

_ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)")
_ELSEWHERE = re.compile(r"(?:as in|see) `([\w.]+)`")
_SCALARS = {bool: "True or False", int: "whole number", float: "number", str: "text", type(None): "None"}
_ROOTS = ("codebind_jax", "codebind_jax.trunks", "codebind_jax.data.augment")


def meanings(target: Any) -> dict[str, str]:
  """Name -> its text in the sections `Attributes` and `Args` of the docstrings of a class and its bases, or a function.

  A text with "as in `module.name`" or "see `module.name`" is the text there, if that one has the name.
  """
  found: dict[str, str] = {}
  for one in reversed(target.__mro__ if inspect.isclass(target) else [target]):
    if one is not object:
      found |= _entries(inspect.cleandoc(vars(one).get("__doc__") or "" if inspect.isclass(one) else one.__doc__ or ""))
  for name, text in found.items():
    elsewhere = _ELSEWHERE.search(text)
    other = _named(elsewhere[1], inspect.getmodule(target)) if elsewhere else None
    if other is not None and other is not target and name in (there := meanings(other)):
      found[name] = there[name]
  return found


def _entries(doc: str) -> dict[str, str]:
  found: dict[str, str] = {}
  for part in re.findall(r"^(?:Attributes|Args):\n((?:(?:  .*)?\n?)*)", doc, re.MULTILINE):
    names: list[str] = []
    for line in part.rstrip().splitlines():
      entry = _ENTRY.match(line[2:])
      if entry:
        names = entry[1].split(", ")
        found |= dict.fromkeys(names, entry[2].strip())
      else:
        found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
  return found


def _named(path: str, here: types.ModuleType | None) -> Any:
  """The object of a name of a module, or of a dotted path below the package; None if there is none."""
  module, _, name = path.rpartition(".")
  if not module:
    return getattr(here, name, None)
  for root in _ROOTS:
    try:
      return getattr(importlib.import_module(f"{root}.{module}"), name)
    except (ImportError, AttributeError):
      pass
  return None


def said(kind: Any) -> str:
  """A type as words: "whole number, above 0", "`a` or `b`", "tuple of text", "mapping of name -> number"."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin is Annotated:
    rules = ", ".join(rule.said.removeprefix("any number ") for rule in args[1:])
    return rules if args[0] is str and rules.startswith("a ") else f"{said(args[0])}, {rules}"
  if origin is Literal:
    return " or ".join(f"`{value}`" for value in args)
  if origin in (Union, types.UnionType):
    words = " or ".join(said(one) for one in args if one is not types.NoneType)
    return f"{words}, or None" if types.NoneType in args else words
  if inspect.isclass(kind) and issubclass(kind, Mapping) or origin is not None and issubclass(origin, Mapping):
    return f"mapping of name -> {said(args[1])}" if args else "mapping"
  if origin is tuple or origin is not None and issubclass(origin, Collection):
    if args[-1] is Ellipsis or origin is not tuple:
      return f"tuple of {_several(args[0])}"
    return f"tuple ({', '.join(said(one) for one in args)})"
  if dataclasses.is_dataclass(kind):
    return "section"
  return _SCALARS.get(kind) or ("any" if kind is Any else getattr(kind, "__name__", str(kind)).lower())


def _several(kind: Any) -> str:
  words = said(kind)
  return f"({words})" if "," in words and not words.startswith("tuple") else words


def default_said(default: Any) -> str:
  """A default as it is written in a config."""
  if default is dataclasses.MISSING:
    return "must be set"
  if dataclasses.is_dataclass(default):
    return "see there"
  return f"`{schema.to_plain(default) if isinstance(default, Mapping) else default!r}`"


def table(
  target: Callable[..., Any], leave: Collection[str] = (), *, kinds: Mapping[str, str] = Frozen(),
  defaults: Mapping[str, str] = Frozen(), links: Mapping[str, str] = Frozen(),
) -> str:  # fmt: skip
  """Markdown table of the keys of a section's class or of a function with keywords.

  Args:
    target: what `schema.keys_of` takes.
    leave: names left out.
    kinds: key -> words in place of its type.
    defaults: key -> words in place of its default.
    links: key -> what is said after its meaning.

  Raises:
    ValueError: naming the key that has no meaning in the docstring.
  """
  rows, texts = [], meanings(target)
  for name, (kind, default) in schema.keys_of(target, leave).items():
    if not texts.get(name):
      raise ValueError(f"{target.__module__}.{target.__qualname__}: its docstring does not say what {name!r} means")
    meaning = texts[name].rstrip(".") + (f"; see {links[name]}" if name in links else "")
    rows.append((f"`{name}`", kinds.get(name) or said(kind), defaults.get(name) or default_said(default), meaning))
  return rows_table(("key", "type", "default", "meaning"), rows)


def rows_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Markdown table with these titles and cells."""
  line = lambda cells: "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"
  return line(titles) + "|---" * len(titles) + "|\n" + "".join(map(line, rows))


def put(text: str, page: str, write: bool) -> None:
  """Prints a page, or writes it into the checkout."""
  if write:
    (pathlib.Path(codebind_jax.__file__).parents[1] / page).write_text(text, encoding="utf-8")
  sys.stdout.write(f"{page} written\n" if write else text)

"""How sections of a config are read: values, types, ranges and messages, and every field of every section."""

import collections.abc
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest
from ml_collections import ConfigDict

from codebind_jax import schema
from codebind_jax.config import Config
from codebind_jax.methods.base import method_class, method_names
from codebind_jax.schema import Frozen, Regex, above, at_least, read, within
from codebind_jax.trunks import trunk_maker, trunk_names


@dataclasses.dataclass(frozen=True)
class Inner:
  count: Annotated[int, at_least(1)] = 2
  words: tuple[str, ...] = ("a",)


@dataclasses.dataclass(frozen=True)
class Section:
  rate: Annotated[float, above(0)]
  kind: Literal["one", "two"] = "one"
  share: Annotated[float, within(0, 1, "off", below=True)] = 0.0
  pairs: tuple[tuple[str, int], ...] = ()
  sizes: Mapping[str, Annotated[int, above(0)]] = Frozen()
  options: Mapping[str, Any] = Frozen()
  inner: Inner = Inner()
  maybe: Inner | None = None
  free: int | tuple[int, ...] = 3
  on: bool = False
  made: str = dataclasses.field(default="", metadata=schema.DERIVED)

  def check(self, path):
    if self.on and not self.sizes:
      raise ValueError(f"config.{path}.on: got True without sizes")


def test_values_of_a_config_dict_come_out_in_the_types_of_the_fields():
  given = ConfigDict({"rate": 1, "pairs": [["a", 2]], "sizes": {"x": 4}, "options": {"deep": {"list": [1, [2]]}},
                      "inner": {"words": ["b", "c"]}, "maybe": {}, "free": [1, 2]})  # fmt: skip
  found = read(Section, given, "s")
  assert found == Section(1.0, pairs=(("a", 2),), sizes={"x": 4}, options={"deep": {"list": (1, (2,))}},
                          inner=Inner(words=("b", "c")), maybe=Inner(), free=(1, 2))  # fmt: skip
  assert type(found.rate) is float and hash(found) == hash(read(Section, given, "s"))
  assert read(Section, found, "s") is found


def test_a_section_as_a_plain_dict_gives_the_same_section():
  found = read(Section, {"rate": 0.5, "sizes": {"x": 4}, "pairs": (("a", 2),)}, "s")
  plain = schema.to_plain(found)
  assert plain == {"rate": 0.5, "kind": "one", "share": 0.0, "pairs": [["a", 2]], "sizes": {"x": 4}, "options": {},
                   "inner": {"count": 2, "words": ["a"]}, "free": 3, "on": False}  # fmt: skip
  assert read(Section, plain, "s") == found
  defaults = schema.defaults(Section)
  assert "rate" not in defaults and "maybe" not in defaults and "made" not in defaults
  assert defaults["inner"] == {"count": 2, "words": ("a",)}
  assert read(Section, ConfigDict(defaults | {"rate": 1.0}), "s") == Section(1.0)


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("rate", 0, "config.s.rate: got 0.0; allowed: any number above 0"),
    ("rate", math.nan, "config.s.rate: got nan; allowed: any number above 0"),
    ("rate", math.inf, "config.s.rate: got inf; allowed: any number above 0"),
    ("rate", "fast", "config.s.rate: got 'fast'; allowed: a number"),
    ("rate", True, "config.s.rate: got True; allowed: a number"),
    ("share", 1.0, "config.s.share: got 1.0; allowed: 0 (off) up to, not including, 1"),
    ("kind", "three", "config.s.kind: 'three' is not allowed; allowed: ['one', 'two']"),
    ("pairs", "ab", "config.s.pairs: got 'ab'; allowed: a tuple"),
    ("pairs", (("a",),), "config.s.pairs: got ('a',); allowed: a tuple of 2"),
    ("pairs", (("a", 1.5),), "config.s.pairs: got 1.5; allowed: a whole number"),
    ("sizes", {"x": 0}, "config.s.sizes.x: got 0; allowed: any number above 0"),
    ("sizes", 3, "config.s.sizes: got 3; allowed: a section with keys"),
    ("inner", {"count": 0}, "config.s.inner.count: got 0; allowed: 1 and up"),
    ("inner", {"no": 3}, "config.s.inner.no: unknown key 'no'; allowed: ['s.inner.count', 's.inner.words']"),
    ("maybe", {"words": (1,)}, "config.s.maybe.words: got 1; allowed: a text"),
    ("on", 1, "config.s.on: got 1; allowed: True or False"),
    ("on", True, "config.s.on: got True without sizes"),
    ("made", "x", "config.s.made: unknown key 'made'; allowed: ['s.free', 's.inner', 's.kind', 's.maybe', 's.on', "
                  "'s.options', 's.pairs', 's.rate', 's.share', 's.sizes']"),
  ],
)  # fmt: skip
def test_errors_name_key_value_and_what_is_allowed(key, value, message):
  with pytest.raises(ValueError) as error:
    read(Section, {"rate": 1.0} | {key: value}, "s")
  assert str(error.value) == message


def test_a_missing_key_is_named():
  with pytest.raises(ValueError, match="config.s.rate: must be set"):
    read(Section, {}, "s")


def test_regular_expressions_must_compile():
  assert read(Regex, "a|b", "r") == "a|b"
  with pytest.raises(ValueError, match=r"config.r: got '\('; allowed: a regular expression"):
    read(Regex, "(", "r")


def test_a_function_s_keywords_are_keys():
  def make(*, width: int = 3, names: tuple[str, ...] = (), more=None):
    return width

  assert schema.arguments(make, {"names": ["a"]}, "f") == {"width": 3, "names": ("a",), "more": None}
  assert schema.defaults(make) == {"width": 3, "names": ()}
  with pytest.raises(ValueError, match=r"config.f.size: unknown key 'size'; allowed: \['f.more', 'f.names', 'f.width'"):
    schema.arguments(make, {"size": 1}, "f")


@pytest.mark.parametrize("name", trunk_names())
def test_all_options_of_trunks_have_defaults(name):
  keys = schema.keys_of(trunk_maker(name))
  assert all(default is not dataclasses.MISSING for _, default in keys.values())
  assert set(schema.defaults(trunk_maker(name))) == set(keys)  # None could not be set on the command line


# Every field of every section. What follows finds them by the fields' types, so that a new field is tested as well.


def sections_of(kind, path=""):
  """(path, class) of a section and those within it."""
  yield path, kind
  for name, (hint, _) in schema.keys_of(kind).items():
    for inner in (hint, *typing.get_args(hint)):
      if isinstance(inner, type) and dataclasses.is_dataclass(inner):
        named = f"{name}.it" if typing.get_origin(hint) is collections.abc.Mapping else name
        yield from sections_of(inner, f"{path}.{named}".removeprefix("."))


def good(hint):
  """A value that a type allows."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    return next(v for v in (good(args[0]), 1, 0.5, ".*", "{}") if all(rule.holds(v) for rule in args[1:]))
  if origin is Literal:
    return args[0]
  if origin is tuple:
    return () if args[-1] is Ellipsis else tuple(map(good, args))
  return {str: "x", int: 1, float: 0.5, bool: True}.get(hint, {})


def bad(hint):
  """Values that a type does not allow, in the form of the type."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    candidates = ["({"] if args[0] is str else [-1, 0, 1.5, math.nan, math.inf]
    refused = [value for value in candidates if not all(rule.holds(value) for rule in args[1:])]
    assert refused and (args[0] is str or {-1, 0} & set(refused))
    yield from refused
    yield from (value for value in bad(args[0]) if not isinstance(value, int | float) or isinstance(value, bool))
  elif origin is Literal:
    yield "nonsense"
  elif origin is tuple:
    yield "text"
    for number, inner in enumerate(args if args[-1] is not Ellipsis else args[:1]):
      others = [good(one) for one in args] if args[-1] is not Ellipsis else [None]
      for value in bad(inner):
        yield tuple([*others[:number], value, *others[number + 1 :]])
  elif origin is types.UnionType or hint is Any:
    return
  elif origin is not None:  # a mapping
    yield 3
    yield from ({"it": value} for value in bad(args[1]))
  elif dataclasses.is_dataclass(hint):
    yield 3
    yield {"no_such_key": 1}
  else:
    yield {str: 3, int: "many", float: "many", bool: "yes"}[hint]


SECTIONS = list(dict.fromkeys(sections_of(Config)))
METHODS = [(f"method_options({name})", method_class(name)) for name in method_names()]
FIELDS = [(path, kind, name) for path, kind in [*SECTIONS, *METHODS] for name in schema.keys_of(kind)]


def test_the_sections_are_found():
  assert {"", "data", "model", "model.decoder", "codebook", "optim", "mesh", "sharding", "embed", "compare"} <= {
    path for path, _ in SECTIONS
  }
  assert any("stages" in path for path, _ in SECTIONS) and any("towers" in path for path, _ in SECTIONS)
  assert len(FIELDS) > 100


@pytest.mark.parametrize(("path", "kind", "name"), FIELDS, ids=[f"{path}.{name}" for path, _, name in FIELDS])
def test_a_bad_value_of_a_key_is_named(path, kind, name):
  keys = schema.keys_of(kind)
  needed = {key: good(hint) for key, (hint, default) in keys.items() if default is dataclasses.MISSING}
  hint, default = keys[name]
  given = {} if default is dataclasses.MISSING else {name: schema.to_plain(default)}
  schema.arguments(kind, needed | given, path)
  where = f"config.{path}.{name}".replace("..", ".")
  for value in bad(hint):
    with pytest.raises(ValueError, match="allowed: .") as error:
      schema.arguments(kind, needed | {name: value}, path)
    assert str(error.value).startswith(where), (value, str(error.value))


@pytest.mark.parametrize(("path", "kind"), [*SECTIONS, *METHODS], ids=[p or "config" for p, _ in [*SECTIONS, *METHODS]])
def test_every_key_is_explained(path, kind):
  told = "".join((base.__doc__ or "").partition("Attributes:")[2] for base in kind.__mro__)
  explained = {name for line in told.splitlines() if line.startswith("    ") and line[4:5].strip() and ":" in line
               for name in line.partition(":")[0].replace(" ", "").split(",")}  # fmt: skip
  assert set(schema.keys_of(kind)) <= explained


@pytest.mark.parametrize(("path", "kind"), SECTIONS, ids=[path or "config" for path, _ in SECTIONS])
def test_the_defaults_of_a_section_make_it(path, kind):
  needed = {key: good(hint) for key, (hint, default) in schema.keys_of(kind).items()
            if default is dataclasses.MISSING}  # fmt: skip
  made = read(kind, ConfigDict(schema.defaults(kind) | needed), path)
  assert made == read(kind, schema.to_plain(made), path) == kind(**needed)

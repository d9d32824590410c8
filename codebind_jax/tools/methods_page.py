"""Enters a finished comparison's tables into a page of documentation, between the two marks that bear its name.

Command: python -m codebind_jax.tools.methods_page --comparison=runs/compare/comparison.json --name=graded
         [--page=docs/methods.md]
"""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from codebind_jax import files
from codebind_jax.compare import sizes_table, table

_COMPARISON = flags.DEFINE_string("comparison", None, "comparison.json of a finished comparison.")
_NAME = flags.DEFINE_string("name", None, "Name in the page's marks.")
_PAGE = flags.DEFINE_string("page", "docs/methods.md", "The page.")
_BEGIN, _END = "<!-- results {} -->", "<!-- end {} -->"


def entered(page: str, name: str, lines: Sequence[str]) -> str:
  """The page with the lines in place of the text between the marks of that name.

  Raises:
    ValueError: if the page has no such marks.
  """
  begin, end = _BEGIN.format(name), _END.format(name)
  if begin not in page or end not in page:
    allowed = re.findall(_BEGIN.format("(.*?)"), page)
    raise ValueError(f"--name: the page has no marks {begin!r} and {end!r}; allowed: {allowed}")
  before, rest = page.split(begin, 1)
  return f"{before}{begin}\n" + "\n".join(lines).strip() + f"\n{end}{rest.split(end, 1)[1]}"


def lines_of(whole: Mapping[str, Any]) -> list[str]:
  """Lines of the tables of comparison.json, of methods or of sizes."""
  return (sizes_table if whole["config"]["compare"].get("bytes") else table).sections(whole, "####")


def main(_: Sequence[str]) -> None:
  """Enters the tables and writes the page."""
  if not (_COMPARISON.value and _NAME.value):
    sys.exit("error: --comparison=comparison.json and --name=NAME are both needed")
  path = pathlib.Path(_PAGE.value)
  try:
    whole = files.read_sealed(pathlib.Path(_COMPARISON.value))
    page = entered(path.read_text(encoding="utf-8"), _NAME.value, lines_of(whole))
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  path.write_text(page, encoding="utf-8")
  sys.stdout.write(f"{path}: {_NAME.value} entered\n")


if __name__ == "__main__":
  app.run(main)

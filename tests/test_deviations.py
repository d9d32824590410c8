"""The table of deviations in docs/methods.md: its keys exist, and take the values that it names."""

import ast
import pathlib
import re

import pytest

from codebind_jax import command_line, schema
from codebind_jax import config as config_lib
from codebind_jax.config import validation
from codebind_jax.methods.base import method_names, method_options
from configs import stage1

PAGE = (pathlib.Path(__file__).parents[1] / "docs/methods.md").read_text(encoding="utf-8")
TABLE = PAGE.split("## Deviations from papers and releases\n")[1].split("\n## ")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in TABLE.splitlines() if line.startswith("| ")]
KEYS = [(row[0], *span.split("=", 1)) for row in ROWS[1:] for span in re.findall(r"`([^`]*=[^`]*)`", row[-1])]


def test_each_row_names_a_method_and_what_it_would_take():
  assert ROWS[0] == ["method", "paper or release", "here", "keys of the paper's or release's form"] and len(ROWS) > 50
  for row in ROWS[1:]:
    assert len(row) == 4 and row[0] in (*method_names(), "toc"), row
    assert row[3] == "-" or re.fullmatch(r"(`[\w.]+=[^`]+`(, )?)+", row[3]), row
  assert {row[0] for row in ROWS[1:]} == {*method_names(), "toc"}


@pytest.mark.parametrize("method, key, value", KEYS, ids=lambda x: x)
def test_a_key_of_the_table_can_be_set(method, key, value):
  value = ast.literal_eval(value)
  if key.startswith("method_options."):
    option = key.removeprefix("method_options.")
    assert method_options(method, {option: value})[option] == value
    return
  tower = "text" if key.endswith(("whiten", "trunk")) else "image"
  key = key.replace("towers.NAME", f"towers.{tower}").replace("stages.NAME", "stages.bridges")
  config = command_line.read_file(stage1.__file__, [f"--config.{key}=0"]).unlock()  # with what the command line can set
  config.model.shared_dim, config.model.towers.image.specific_dim = 1024, 1024  # which width 8 divides
  *section, last = key.split(".")
  holder = schema.get(config, ".".join(section))
  assert last in holder
  holder[last] = value
  if last == "code_uniform":
    config.codebook.ema = False
  if last == "head":
    holder.meaning = ""
  if last == "trunk":
    holder.options = {"modality": "text"}
  read = config_lib.read(config.lock())
  for name in section:
    read = read[name] if isinstance(read, dict) else getattr(read, name)
  found = read[last] if isinstance(read, dict) else getattr(read, last)
  assert (dict(found) if isinstance(value, dict) else found) == value
  if last not in ("trunk", "head", "meaning"):
    validation.validate(config)


@pytest.mark.parametrize("path", [
  "codebook.ema", "codebook.first_token", "stages.bridges.scale_inside_cosine", "stages.bridges.double_softmax",
])  # fmt: skip
def test_the_release_s_forms_are_keys_of_every_config(path):
  config = stage1.get_config()
  changed = config.copy_and_resolve_references().unlock()
  changed.update_from_flattened_dict({path: not schema.get(config, path)})
  assert validation.validate(changed.lock()) != validation.validate(config)

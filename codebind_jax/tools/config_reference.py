"""Writes docs/config.md: every key of a config, and the options of methods, trunks, augmentations and formats.

Command: python -m codebind_jax.tools.config_reference --write   (without --write the page is printed)
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pathlib
import pkgutil
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from absl import app, flags

import codebind_jax
from codebind_jax import schema
from codebind_jax.command_line.bind import Choice, Keys
from codebind_jax.config import Config
from codebind_jax.data import augment, formats
from codebind_jax.methods.base import method_class, method_names
from codebind_jax.methods.codebind_terms import TERMS
from codebind_jax.models.towers import ModelSpec
from codebind_jax.stages import Stage
from codebind_jax.tools import reference
from codebind_jax.trunks import trunk_maker, trunk_names

PAGE = "docs/config.md"
HEAD = """# Config keys

<!-- Written by `python -m codebind_jax.tools.config_reference --write`; change the docstrings, not this page. -->

A config is a Python file with a function `get_config()`; `configs/` holds the shipped ones. Any key can be changed on
the command line of `codebind_jax.main`, and in a config file of your own:

    python -m codebind_jax.main --config=configs/stage1.py --workdir=runs/one --config.optim.learning_rate=3e-3
    python -m codebind_jax.main --config=configs/stage1.py --workdir=runs/more \\
        --config.stages.bridges.losses.reconstruction=1.0
    python -m codebind_jax.main --config=mine.py --workdir=runs/two '--config.data.worlds=("icons", "household")'

```python
# mine.py, in any folder
from configs import stage1


def get_config():
  config = stage1.get_config().unlock()
  config.steps = 100
  config.data.worlds = ("icons",)
  config.stages.bridges.losses = {"info_nce": 1.0}
  return config.lock()
```

A *tower* is what a modality goes through: its *trunk* (a frozen or trained encoder, items -> tokens), then a *shared
head*, whose output compares across modalities, and perhaps a *specific head* for what is the modality's own.
*Codebooks* quantise both. A *stage* trains some towers on some *sources* of data (packaged *worlds*, or files of your
own) and binds pairs of modalities; a run is one or several stages.

Names in capitals (`stages.NAME`, `model.towers.MODALITY`) stand for names of your config. A value of the wrong type or
range, and a key that does not exist, end the command before any work, with a line that says what is allowed. `''` is
the empty text, `()` the empty tuple, `{}` the empty mapping. A mapping of names to numbers, words or tuples (`losses`,
`codebook.dims`) takes names on the command line that the file does not have. In the paths of parameters and codebooks a
regular expression must match the whole path, such as `image/shared/proj/kernel`; the log shows the paths at the start
of a run.
"""
SHIPPED = """## Shipped configs

The first lines of each file say more: arguments after a colon, time, what comes out.
"""
BIND = """## Keys of configs/bind.py

Beside those of a run, of which steps, batch and others are chosen by the data unless they are set:
[docs/data.md](data.md).
"""
METHODS = """## Options of the methods

`config.method_options`, with `config.method` set; [docs/methods.md](methods.md) explains the methods.
"""
TRUNKS = """## Options of the trunks

`config.model.towers.MODALITY.options`, with `trunk` set; [docs/trunks.md](trunks.md) says which trunk takes what.
"""
AUGMENTATIONS = """## Augmentations

`config.model.towers.MODALITY.augment`: the `kind`, and keys of its own.
"""
FORMATS = """## Options of the formats

`config.data.options`, for files of that format; [docs/streaming.md](streaming.md) has the formats.
"""
# Where the values of a key are listed.
LISTED = {
  "method": "[methods](methods.md)", "method_options": "[options of the methods](#options-of-the-methods)",
  "trunk": "[trunks](trunks.md)", "augment": "[augmentations](#augmentations)", "losses": "[losses](#losses)",
}  # fmt: skip
OPTIONS = {
  "model.towers.MODALITY": "[options of the trunks](#options-of-the-trunks)",
  "data": "[options of the formats](#options-of-the-formats)",
  "compare.variants.NAME": "[options of the methods](#options-of-the-methods)",
}
# What `configs.common.stage` sets.
STAGE_DEFAULTS = {"steps": "`config.steps`", "batch_size": "`config.batch_size`"}
FORMAT_ARGUMENTS = ("paths", "cache", "max_bad_records")  # of every format, which are no options


def shipped() -> dict[str, str]:
  """File -> the first sentence of its docstring, of every config that says how it is run."""
  root = pathlib.Path(codebind_jax.__file__).parents[1]
  texts = {path: path.read_text(encoding="utf-8") for path in sorted((root / "configs").rglob("*.py"))}
  docs = {path: ast.get_docstring(ast.parse(text)) or "" for path, text in texts.items() if "def get_config(" in text}
  run = {path: doc for path, doc in docs.items() if "python -m" in doc}
  return {path.relative_to(root).as_posix(): _first(doc).rstrip(".") for path, doc in run.items()}


def sections(kind: type = Config, path: str = "") -> Iterator[tuple[str, type]]:
  """(dotted path, class) of a section and all sections in it; a name of the user's is in capitals."""
  yield path, kind
  for _, inner, key in _inner(kind, path):
    yield from sections(inner, key)


def _inner(kind: type, path: str) -> Iterator[tuple[str, type, str]]:
  """(key, class, dotted path) of the sections that a section holds."""
  for name, (hint, _) in schema.keys_of(kind).items():
    inner, many = _section_of(hint)
    if inner:
      key = ".".join(part for part in (path, name) if part)
      capital = "MODALITY" if (kind, name) == (ModelSpec, "towers") else "NAME"
      yield name, inner, f"{key}.{capital}" if many else key


def _section_of(hint: Any) -> tuple[type | None, bool]:
  """(the section's class that a type holds, whether it is a mapping of such); (None, False) for a value."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    return _section_of(args[0])
  if inspect.isclass(origin) and issubclass(origin, Mapping):
    return (args[1], True) if dataclasses.is_dataclass(args[1]) else (None, False)
  if dataclasses.is_dataclass(hint):
    return hint, False
  return next((found for one in args if (found := _section_of(one))[0] and origin is not tuple), (None, False))


def _inner_words(path: str) -> str:
  return "sections by name" if path.rpartition(".")[2].isupper() else "section"


def _anchor(heading: str) -> str:
  """The address of a heading in its page."""
  return "".join(letter for letter in heading.lower().replace(" ", "-") if letter.isalnum() or letter in "-_")


def _first(text: str | None) -> str:
  """The first paragraph of a docstring, on one line; of a section's, what is said after its path."""
  line = " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())
  said = line.partition("`: ")[2] if line.startswith("Section `") else line
  return said[:1].upper() + said[1:]


def page() -> str:
  """The whole page.

  Raises:
    ValueError: naming a key whose class does not say what it means.
  """
  rows = [(f"`{name}`", line) for name, line in shipped().items()]
  parts = [HEAD, SHIPPED, reference.rows_table(("file", "what it does"), rows)]
  for path, kind in sections():
    parts += [f"## config.{path}\n" if path else "## config\n", _first(kind.__doc__) + "\n"]
    links = {**LISTED, "options": OPTIONS[path]} if path in OPTIONS else LISTED
    kinds = {name: f"[{_inner_words(key)}](#{_anchor(f'config.{key}')})" for name, _, key in _inner(kind, path)}
    defaults = STAGE_DEFAULTS if kind is Stage else {}
    parts.append(reference.table(kind, kinds=kinds, defaults=defaults, links=links))
    if kind is Stage:
      rows = [(f"`{name}`", _first(term.__doc__).rstrip(".")) for name, term in TERMS.items()]
      parts += ["### Losses\n", "Of the method `codebind`; other methods have weights among their options.\n",
                reference.rows_table(("loss", "meaning"), rows)]  # fmt: skip
  parts += [BIND, reference.table(Keys, kinds={"bind": "[section](#configbind)"})]
  parts += ["### config.bind\n", _first(Choice.__doc__) + "\n", reference.table(Choice)]
  module = lambda package, name: importlib.import_module(f"{package.__name__}.{name}")
  of_format = {m.name: module(formats, m.name) for m in pkgutil.iter_modules(formats.__path__)}
  parts += [METHODS, *_tables({name: method_class(name) for name in method_names()})]
  parts += [TRUNKS, *_tables({name: trunk_maker(name) for name in trunk_names()})]
  parts += [AUGMENTATIONS, *_tables({
    f"{modality}: {name}": kind
    for modality in augment.augmented() for name, kind in augment.kinds(module(augment, modality)).items()
  })]  # fmt: skip
  parts += [FORMATS, *_tables(
    {name: one.open_files for name, one in of_format.items() if hasattr(one, "open_files")}, FORMAT_ARGUMENTS
  )]  # fmt: skip
  return "\n".join(parts).rstrip() + "\n"


def _tables(targets: Mapping[str, Callable[..., Any]], leave: Sequence[str] = ()) -> Iterator[str]:
  """A heading and a table of each; those that have no options are named at the end."""
  without = [name for name, target in targets.items() if not schema.keys_of(target, leave)]
  for name, target in targets.items():
    if name not in without:
      yield f"### {name}\n"
      yield _first(target.__doc__) + "\n"
      yield reference.table(target, leave)
  if without:
    yield f"Without options: {', '.join(f'`{name}`' for name in without)}.\n"


def main(_: Sequence[str]) -> None:
  """Prints or writes the page."""
  reference.put(page(), PAGE, flags.FLAGS.write)


if __name__ == "__main__":  # flags of its own: importing it defines none
  flags.DEFINE_bool("write", False, f"Write {PAGE} instead of printing it.")
  app.run(main)

"""One config over a grid of values: what each gives on the validation sets, and which is best.

Command: python -m codebind_jax.tools.sweep --config=configs/stage1.py --workdir=DIR \
             --config.optim.learning_rate=1e-3,3e-3 --config.codebook.dim=2,4 [--config.KEY=VALUE ...] [--parallel=N]
Commas between values; a value that has commas of its own stands in brackets or quotes:
--config.data.worlds='("icons",),("icons","household")', --config.data.classes='"a,b.txt",c.txt'. A key with one value
is the same in all runs. Test sets are never read. Runs go to folders of DIR that bear their values, such as
learning_rate=1e-3,dim=2; finished ones are not run again, killed ones continue, and values may be added to the grid
later. Hosts that share DIR take different runs if each is given the command. The table is printed and written to
DIR/sweep.md, with all metrics in DIR/sweep.json. --metric chooses other validation metrics, by patterns such as
'eval/*/retrieval/text_to_image/r5,eval/*/retrieval/image_to_text/r5', whose mean is then the score.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from codebind_jax import command_line, files, schema
from codebind_jax.runtime import signals
from codebind_jax.tools import runs
from codebind_jax.tools.reference import rows_table

# What is scored: the first of these that a run has. Each world's mean over its validation sets; the sets themselves.
METRICS = ("eval/*/zeroshot/*/top1", "eval/*/retrieval/*/r5", "eval/*/probe/*/shared")
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_SHOWN = 8  # metrics that have columns of their own


def split(text: str) -> list[str]:
  """The values of a comma-separated text; commas in quotes and brackets separate nothing, and whole quotes are removed.

  >>> split('("a","b"),("c",)')
  ['("a","b")', '("c",)']

  Raises:
    ValueError: if a bracket or quote is not closed, or a value is empty.
  """
  parts, part, open_ = [], "", []
  for letter in text:
    if open_ and letter == open_[-1]:
      open_.pop()
    elif not open_ and letter == ",":
      parts.append(part)
      part = ""
      continue
    elif (not open_ or open_[-1] not in "'\"") and letter in "([{'\"":
      open_.append(_CLOSING.get(letter, letter))
    part += letter
  if open_:
    raise ValueError(f"got {text!r}, in which {open_[-1]} is missing")
  whole = [re.sub(r"""^(["'])((?:(?!\1).)*)\1$""", r"\2", part.strip()) for part in [*parts, part]]
  if len(whole) > 1 and "" in [part.strip() for part in [*parts, part]]:
    raise ValueError(f"got {text!r}, in which a value is empty; allowed: '' for an empty text")
  return whole


@dataclasses.dataclass(frozen=True)
class Grid:
  """The runs of a sweep.

  Attributes:
    file: of the config, with its argument.
    fixed: key -> value of all runs.
    swept: key -> values.
  """

  file: str
  fixed: Mapping[str, str]
  swept: Mapping[str, Sequence[str]]

  @property
  def points(self) -> dict[str, dict[str, str]]:
    """Name of a run's folder -> swept key -> value, the last key changing fastest."""
    short = [key.rpartition(".")[2] for key in self.swept]
    called = {key: name if short.count(name) == 1 else key for key, name in zip(self.swept, short)}
    points = {}
    for values in itertools.product(*self.swept.values()):
      point = dict(zip(self.swept, values))
      points[_folder(",".join(f"{called[key]}={value}" for key, value in point.items()))] = point
    return points


def _folder(name: str) -> str:
  """A name as that of a folder: other letters become "-"; a hash tells apart what is then alike, or too long."""
  plain = re.sub(r"[^\w.,=+-]+", "-", name.replace('"', "").replace("'", ""))
  tag = hashlib.sha256(name.encode()).hexdigest()[:6]
  return plain if plain == name and len(name) <= 100 else f"{plain[:90]}-{tag}"


def grid_of(argv: Sequence[str]) -> Grid:
  """The grid of the arguments `--config=FILE` and `--config.KEY=VALUE,VALUE`; others are refused.

  Raises:
    ValueError: naming the argument.
  """
  file, values = "", {}
  for argument in argv:
    name, is_set, value = argument.removeprefix("-").removeprefix("-").partition("=")
    if not is_set or name.split(".")[0] != "config":
      raise ValueError(f"{argument}: is not allowed; allowed: --config=FILE.py and --config.KEY=VALUE,VALUE")
    key = name.partition(".")[2]
    if not key:
      file = value
      continue
    try:
      values[key] = split(value)
    except ValueError as error:
      raise ValueError(f"--config.{key}: {error}") from error
    for one in values[key]:
      if values[key].count(one) > 1:
        raise ValueError(f"--config.{key}: {one!r} is there twice")
  if not file:
    raise ValueError("--config=FILE.py and --workdir=DIR are both needed")
  swept = {key: tuple(of) for key, of in values.items() if len(of) > 1}
  if "test" in values:
    raise ValueError("--config.test: is not allowed; a sweep reads no test sets")
  if not swept:
    raise ValueError("no key has several values; allowed: --config.KEY=VALUE,VALUE")
  return Grid(file, {key: of[0] for key, of in values.items() if len(of) == 1} | {"test": "False"}, swept)


class _File(flags.ArgumentParser):
  """Parser of a config file, for one command."""

  def __init__(self, argv: Sequence[str]):
    self._argv = argv

  def parse(self, argument: str) -> ConfigDict:
    """The config with the options of the modules that the command names."""
    return command_line.read_file(argument, self._argv)


def config_of(file: str, changes: Mapping[str, str]) -> ConfigDict:
  """The config that `main` makes of a file and `--config.KEY=VALUE`.

  Raises:
    ValueError: for a missing file, an unknown key or a value of the wrong type, in one line.
  """
  argv = ["sweep", f"--config={file}", *(f"--config.{key}={value}" for key, value in changes.items())]
  found = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "", flag_values=found, sys_argv=argv)
  found["config"].parser = _File(argv)
  try:
    found(argv)
  except (AttributeError, KeyError) as error:
    config = command_line.read_file(file, argv)
    for key in changes:
      schema.get(config, key)
    raise ValueError(f"--config={file}: {error}") from error
  except flags.Error as error:
    raise ValueError(str(error)) from error
  return found["config"].value


def scored(metrics: Mapping[str, float], patterns: Sequence[str] = ()) -> dict[str, float]:
  """The validation metrics whose mean is a run's score.

  Args:
    metrics: of a finished run that has read no test set.
    patterns: of their names; else the first of `METRICS` that the run has. Of zero-shot accuracies a world's mean over
      its sets is taken where it is there.

  Raises:
    ValueError: naming the patterns, if none matches.
  """
  for asked in [tuple(patterns)] if patterns else [(one,) for one in METRICS]:
    found = {name: value for name, value in metrics.items() if any(fnmatch.fnmatch(name, one) for one in asked)}
    found = {name: value for name, value in found.items() if "=" not in name and not name.startswith("eval/train/")}
    if found and not patterns:
      sets = {name.split("/")[1] for name in found}
      of_worlds = {name for name in sets if any(other.startswith(f"{name}_") for other in sets)}
      found = {name: value for name, value in found.items() if name.split("/")[1] in of_worlds} or found
    if found:
      return found
  names = sorted(name for name in metrics if name.startswith("eval/"))
  raise ValueError(f"none of {list(patterns) or list(METRICS)} was measured on validation sets; there are {names[:20]}")


def summary(grid: Grid, done: Mapping[str, Mapping[str, float]], patterns: Sequence[str] = ()) -> dict[str, Any]:
  """The content of sweep.json: every run's values, score and metrics, the best run, and keys that ended at an edge.

  Args:
    grid: of the sweep.
    done: name -> metrics of the finished runs; {} for one that diverged.
    patterns: as `scored` takes them.
  """
  rows = []
  for name, point in grid.points.items():
    metrics = done.get(name)
    parts = scored(metrics, patterns) if metrics else {}
    of_baseline = [metrics[runs.BASELINE + part] for part in parts if runs.BASELINE + part in metrics]
    rows.append({
      "run": name, "values": point, "state": "finished" if metrics else "left" if metrics is None else "diverged",
      "score": float(np.mean(list(parts.values()))) if parts else None, "parts": parts,
      "baseline": float(np.mean(of_baseline)) if of_baseline else None, "metrics": dict(metrics or {}),
    })  # fmt: skip
  whole = [row for row in rows if row["score"] is not None]
  best = max(whole, key=lambda row: row["score"], default=None)
  level = [row["run"] for row in whole if best and row["score"] == best["score"]]
  chosen = best["values"] if len(level) == 1 else {}
  edges = {key: value for key, value in chosen.items() if key != "seed" and _at_edge(value, grid.swept[key])}
  return {"config": grid.file, "fixed": dict(grid.fixed), "swept": {key: list(of) for key, of in grid.swept.items()},
          "best": best and best["run"], "level": level, "edges": edges, "runs": rows}  # fmt: skip


def _at_edge(value: str, values: Sequence[str]) -> bool:
  """Whether a value is the smallest or largest of several numbers."""
  try:
    numbers = [float(one) for one in values]
  except ValueError:
    return False
  return float(value) in (min(numbers), max(numbers))


def text_of(found: Mapping[str, Any]) -> str:
  """The content of sweep.md: the table, the best run, and what the grid leaves open."""
  keys, rows = list(found["swept"]), found["runs"]
  parts = list(dict.fromkeys(part for row in rows for part in row["parts"]))
  shown = parts if 1 < len(parts) <= _SHOWN else []
  number = lambda value: "" if value is None else f"{value:.2f}"
  baseline = any(row["baseline"] is not None for row in rows)
  lines = []
  for row in rows:
    score = number(row["score"]) if row["state"] == "finished" else row["state"]
    lines.append([*(row["values"][key] for key in keys), f"**{score}**" if row["run"] == found["best"] else score,
                  *([number(row["baseline"])] if baseline else []),
                  *(number(row["parts"].get(part)) for part in shown)])  # fmt: skip
  said = [f"Mean of {', '.join(f'`{part}`' for part in parts)} on the validation sets; test sets were not read.\n"]
  if found["best"]:
    said.append(f"Best: `{found['best']}`.\n")
  if len(found["level"]) > 1:
    said.append(f"{len(found['level'])} runs are level at the best score; the first of them is marked.\n")
  for key, value in found["edges"].items():
    said.append(f"The best `{key}`, {value}, is at the edge of the values tried: try values beyond it.\n")
  left = [row["run"] for row in rows if row["state"] == "left"]
  if left:
    said.append(f"Not finished, or in other processes' hands: {', '.join(left)}.\n")
  titles = [*(f"`{key}`" for key in keys), "score", *(["baseline"] if baseline else []), *shown]
  return rows_table(titles, lines) + "\n" + "".join(said)


def main(argv: Sequence[str]) -> None:
  """Runs the grid and writes the table."""
  folder, patterns = files.path(flags.FLAGS.workdir or "."), [one for one in flags.FLAGS.metric.split(",") if one]
  try:
    grid = grid_of(argv[1:])
    if not flags.FLAGS.workdir:
      raise ValueError("--config=FILE.py and --workdir=DIR are both needed")
    configs = {name: config_of(grid.file, {**grid.fixed, **point}) for name, point in grid.points.items()}
    valid = runs.checked(configs, folder)
    done = runs.train_all(valid, folder, flags.FLAGS.parallel)
    found = summary(grid, done, patterns)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  text = text_of(found)
  files.write_whole(folder / "sweep.json", json.dumps(found, indent=1) + "\n")
  files.write_whole(folder / "sweep.md", text)
  sys.stdout.write(text)


def own_flags(argv: Sequence[str], own: flags.FlagValues = flags.FLAGS) -> list[str]:
  """absl's parsing of this command's own flags; `--config...` is left for `grid_of`."""
  joined = list(argv)
  for at in range(len(joined) - 2, 0, -1):  # --config FILE
    if re.fullmatch(r"--?config(\.[\w.]+)?", joined[at]):
      joined[at : at + 2] = [f"{joined[at]}={joined[at + 1]}"]
  is_config = lambda argument: re.match(r"--?config[.=]", argument)
  try:
    rest = own([argument for argument in joined if not is_config(argument)])
  except flags.Error as error:
    sys.exit(f"error: {error}")
  return [*rest, *filter(is_config, joined)]


if __name__ == "__main__":  # flags of its own: importing it defines none
  runs.define_flags()
  flags.DEFINE_string("metric", "", "Comma-separated patterns of the validation metrics whose mean is the score.")
  logging.set_verbosity(logging.WARNING)
  signals.command(app.run, main, flags_parser=own_flags)

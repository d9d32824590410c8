"""Opens a source: files of any format of `data.formats`, or a split of a packaged world."""

from __future__ import annotations

import glob
import importlib
import inspect
import os
import pkgutil
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

import numpy as np
import tqdm
from absl import logging
from jaxtyping import Bool

from codebind_jax import files
from codebind_jax.data import formats, ranges, transforms
from codebind_jax.data.index import SPLITS, id_hash
from codebind_jax.data.joined import joined
from codebind_jax.data.reading import in_record, name_of
from codebind_jax.data.records import Source
from codebind_jax.data.worlds import fetch, registry
from codebind_jax.data.worlds.source import WorldSource
from codebind_jax.evaluators.base import plain_text

CHECKED = 10_000  # records up to which all files are opened before any work
SOME = 1_000  # records whose files are opened where there are more


def open_source(
  files: str | PurePath | Sequence[str | PurePath],
  *,
  split: str = "",
  profile: str = "auto",
  data_dir: str | Path | None = None,
  max_bad_records: int = 0,
  check: str = "auto",
  **options: Any,
) -> Source:
  """Opens files of records, or a split of a packaged world.

  Args:
    files: a path, or several, with globs and braces (`data/{000..127}.tar`); a folder; `tfds:NAME`; or `world:NAME` for
      a packaged world, which is built if it is not there.
    split: train, val or test; "" takes all records of files.
    profile: of a world; files have none.
    data_dir: where worlds and indices are, see `fetch.data_dir` for the default.
    max_bad_records: bad records of files before it is an error; a world has none.
    check: opens the files that records name: "all", "some" (1,000 records, spread evenly) or "none"; "auto" is all of
      up to 10,000 records, and some of more.
    **options: of the format.

  Raises:
    ValueError: for an unknown world, profile or split, a world without `split`, an argument that a source of this kind
      has not, or bad records.
    FileNotFoundError: if there is no such file.
  """
  kind, _, world = str(files).partition(":") if isinstance(files, str) else ("", "", "")
  if kind == "world":
    if max_bad_records:
      raise ValueError(f"{files}: got max_bad_records {max_bad_records!r}; allowed for a world: 0, it has none")
    if options:
      name, value = next(iter(options.items()))
      raise ValueError(f"{files}: got {name} {value!r}; allowed for a world: no options")
    if not split:
      raise ValueError(f"{files}: needs a split, such as 'train'")
    module = registry.world_module(world)
    if hasattr(module, "open_split"):
      return module.open_split(registry.resolve(world, profile), split)
    return WorldSource(registry.ensure(world, profile, data_dir), split, getattr(module, "annotate", None))
  if profile != "auto":
    raise ValueError(f"{files}: got profile {profile!r}; allowed for files: 'auto', only worlds have profiles")
  if split and split not in SPLITS:
    raise ValueError(f"unknown split {split!r} for {files}; allowed: {list(SPLITS)}, or '' for all")
  names = [files] if isinstance(files, str | PurePath) else list(files)
  by_format: dict[ModuleType, list[PurePath]] = {}
  for path in found(names):
    by_format.setdefault(format_of(path), []).append(path)
  cache = fetch.data_dir(data_dir) / "index"
  parts: list[Source] = []
  for module, own in by_format.items():
    refuse_unknown(module, own[0], options)
    parts += module.open_files(own, cache=cache, max_bad_records=max_bad_records, **options)
  if not any(map(len, parts)):
    raise ValueError(f"{', '.join(map(str, names))}: no records")
  for part in parts:
    if not len(part):
      logging.warning("%s: no records", part.name)
  source = joined([part for part in parts if len(part)])
  check_items(source, check, max_bad_records)
  return of_split(source, split)


def found(names: Sequence[str | PurePath]) -> list[PurePath]:
  """The files and folders of names, in the order given: with braces as in bash, and globs, sorted by name.

  Raises:
    ValueError: if there are no names, or a scheme is unknown; for a bucket that is not there, refuses, or does not
      answer.
    FileNotFoundError: naming a path or pattern that nothing fits.
  """
  if not names:
    raise ValueError("files: got an empty list; allowed: a path, a pattern, or several")
  paths: dict[str, PurePath] = {}
  probed: set[str] = set()
  for name in names:
    for one in braces(str(name)):
      if one.startswith("tfds:"):
        fitting = [PurePath(one)]
      else:
        path = ranges.as_path(one)
        if files.is_far(path) and (bucket := str(path).split("/")[2]) not in probed:
          files.probe(path)
          probed.add(bucket)
        there = files.exists(path)
        fitting = [path] if there or not _GLOB.search(one) else _globbed(path)
        if not there and fitting == [path] or not fitting:
          of = "" if one == str(name) else f" (of {name})"
          raise FileNotFoundError(2, f"no such file or folder{of}", one)
      paths |= {str(path): path for path in fitting}
  return list(paths.values())


_GLOB = re.compile(r"[*?\[]")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")


def _globbed(path: PurePath) -> list[PurePath]:
  if not files.is_far(path):
    return [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
  *parents, last = str(path).split("/")
  first = next((n for n, part in enumerate(parents) if _GLOB.search(part)), len(parents))
  if first == len(parents):  # the usual one: files of one folder
    return files.children(files.path("/".join(parents)), last)
  folder, pattern = files.path("/".join(parents[:first])), "/".join([*parents[first:], last])
  fits = _translated(pattern)
  return [folder / name for name in files.contents(folder) if fits.fullmatch(name)]


def _translated(pattern: str) -> re.Pattern:
  """The expression of a pattern whose `*` and `?` stay in a folder, and `**/` is any number of folders."""
  parts = (re.escape(part).replace(r"\*", "[^/]*").replace(r"\?", "[^/]") for part in pattern.split("**/"))
  return re.compile("(?:.*/)?".join(parts))


def braces(name: str) -> list[str]:
  """The names that bash makes of one with `{a,b}` and `{000..127}`, also nested.

  >>> braces("x-{08..10}.{tar,csv}")
  ['x-08.tar', 'x-08.csv', 'x-09.tar', 'x-09.csv', 'x-10.tar', 'x-10.csv']
  """
  for start in (at for at, letter in enumerate(name) if letter == "{"):
    depth, commas = 0, [start]
    for at in range(start, len(name)):
      depth += {"{": 1, "}": -1}.get(name[at], 0)
      if name[at] == "," and depth == 1:
        commas.append(at)
      if depth == 0:
        inner = name[start + 1 : at]
        if len(commas) > 1:
          parts = [name[a + 1 : b] for a, b in zip(commas, [*commas[1:], at])]
        elif numbers := _RANGE.fullmatch(inner):
          parts = _counted(*numbers.groups())
        else:
          break
        rest = braces(name[at + 1 :])
        return [name[:start] + one + tail for part in parts for one in braces(part) for tail in rest]
  return [name]


def _counted(first: str, last: str, step: str | None) -> list[str]:
  """`{first..last..step}`: as wide as the wider end where one of them begins with a zero."""
  a, b, by = int(first), int(last), abs(int(step or 1)) or 1
  padded = any(len(end.lstrip("-")) > 1 and end.lstrip("-").startswith("0") for end in (first, last))
  width = max(len(first), len(last)) if padded else 0
  return [f"{n:0{width}d}" for n in (range(a, b + 1, by) if a <= b else range(a, b - 1, -by))]


def format_of(path: PurePath) -> ModuleType:
  """The module of `data.formats` that reads a path: by its ending, or what is in the folder.

  Raises:
    ValueError: for an unknown ending.
  """
  modules = [importlib.import_module(f"{formats.__name__}.{m.name}") for m in pkgutil.iter_modules(formats.__path__)]
  known: list[str] = []
  for module in modules:
    endings = getattr(module, "ENDINGS", ())
    if endings and path.name.lower().endswith(endings):
      return module
    known.extend(endings)
  for module in modules:
    if hasattr(module, "takes") and module.takes(path):
      return module
  others = "a folder of class folders, a Hugging Face dataset folder, tfds:NAME, world:NAME"
  if path.name.lower().endswith(".json"):
    others += "; a .json file is converted to one object a line (.jsonl) first"
  raise ValueError(f"{path}: unknown ending; allowed: {', '.join(known)}; or {others}")


def refuse_unknown(module: ModuleType, path: PurePath, options: Mapping[str, Any]) -> None:
  """Raises a ValueError for an option that a format has not."""
  allowed = [name for name in inspect.signature(module.open_files).parameters
             if name not in ("paths", "cache", "max_bad_records")]  # fmt: skip
  for name, value in options.items():
    if name not in allowed:
      raise ValueError(f"{path}: got {name} {value!r}; allowed for files of this kind: {', '.join(allowed) or 'none'}")


def held_out(source: Source, share: float, salt: str = "holdout") -> Bool[np.ndarray, "n"]:
  """Which records are held out: by a hash of the id, so that more records change nothing of those before.

  Records without a label that have one content (captions of one picture, as far as the index knows) go together. Where
  the share is above 0 and there are four records or more, at least two are held out.

  Args:
    source: the records.
    share: of them, about, from 0 to 1.
    salt: another one gives another choice.

  Raises:
    ValueError: for a share out of range.
  """
  if not 0 <= share <= 1:
    raise ValueError(f"share: got {share!r}, allowed: 0 to 1")
  mixed = source.index.ids ^ np.uint64(id_hash(salt))
  for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):  # splitmix64's last steps
    mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
  mixed >>= np.uint64(11)
  alone = source.index.label < 0  # its group is its content: captions of one picture go together, as the first of them
  if alone.any():
    _, first, group = np.unique(source.index.group, return_index=True, return_inverse=True)
    mixed = np.where(alone, mixed[first[group]], mixed)
  out = mixed < np.uint64(round(share * 2**53))
  if share and len(mixed) >= 4 and out.sum() < 2:
    out |= mixed <= np.unique(mixed)[: 2][-1]
  return out


def of_split(source: Source, split: str) -> Source:
  """The records of a split; all of them where none names one, which is logged.

  Raises:
    ValueError: if only some records name a split, or none has this one.
  """
  if not split:
    return source
  there = source.index.split
  if (there < 0).all():
    logging.warning("%s: no record has a split; all %d are used as %r", source.name, len(source), split)
    return source
  if (there < 0).any():
    first = int(np.argmax(there < 0))
    raise ValueError(f"{source.where(first)}: no split, though other records have one; allowed: {list(SPLITS)}")
  chosen = np.flatnonzero(there == SPLITS.index(split))
  if not len(chosen):
    have = sorted({SPLITS[number] for number in np.unique(there)})
    raise ValueError(f"{source.name}: no record of split {split!r}; it has {have}")
  return source.select(chosen)


def check_items(source: Source, check: str, max_bad_records: int) -> None:
  """Opens what records name: the head of each file, or all of it where a modality has no cheaper check.

  Bad records stay where they are, so that the order of rows does not change; they are masked when they are read.

  Args:
    source: the records.
    check: as of `open_source`.
    max_bad_records: number of bad records, each named in the log, before it is an error.

  Raises:
    ValueError: naming the first bad record if there are more.
  """
  if check == "auto":
    check = "all" if len(source) <= CHECKED else "some"
  rows = {"all": range(len(source)), "some": np.linspace(0, len(source) - 1, SOME).astype(int), "none": ()}[check]
  bad = []
  for row in tqdm.tqdm(rows, desc=f"checking {source.name}", unit="record", disable=None):
    for modality in source.modalities:
      if modality != "text" and source.has(int(row), modality):
        try:
          with in_record(lambda row=int(row): source.where(row)):
            check_item(modality, source.read(int(row), modality))
        except ValueError as error:
          bad.append(f"{source.where(int(row))}: {error}")
          break
    if len(bad) > max_bad_records:
      more = f" ({len(bad)} bad records, {max_bad_records} allowed)" if max_bad_records else ""
      raise ValueError(bad[0] + more)
  for message in bad:
    logging.warning("will be left out: %s", message)


def check_item(modality: str, item: str | bytes | Path | np.ndarray) -> None:
  """Checks the head of an item's file.

  Raises:
    ValueError: naming modality and file, if it cannot be read.
  """
  module = transforms.of(modality)
  if isinstance(item, str | Path) and not os.path.exists(item):  # a name that is too long is no file either
    raise ValueError(f"{modality}: no such file: {name_of(item, modality)}")
  try:
    (module.check if isinstance(item, str | Path) and hasattr(module, "check") else module.read)(item)
  except ValueError as error:
    raise ValueError(f"{modality}: {error}") from error


def class_names(source: Source, path: Path | None = None) -> tuple[str, ...]:
  """Candidate labels: the lines of a text file, or the labels that occur in the source, sorted.

  Raises:
    ValueError: if there are none, or a line occurs twice, or a label of the source is not among them.
  """
  present = np.unique(source.index.label)
  labels = sorted(source.index.labels[number] for number in present if number >= 0)
  if path is None:
    if not labels:
      raise ValueError(f"empty class list: no row of {source.name} has a label")
    return tuple(labels)
  classes = class_lines(path)
  known = {plain_text(name) for name in classes}
  unknown = [label for label in labels if plain_text(label) not in known]
  if unknown:
    raise ValueError(f"{path}: label {unknown[0]!r} of {source.name} is not among its {len(classes)} classes")
  return classes


def class_lines(path: Path) -> tuple[str, ...]:
  """The classes of a text file, one a line.

  Raises:
    ValueError: if there are none, or a class is there twice, also where case or blanks differ.
  """
  try:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
  except (OSError, UnicodeError) as error:
    raise ValueError(f"config.data.classes: {path}: cannot be read as a text ({error})") from error
  classes = [line for line in lines if line]
  if not classes:
    raise ValueError(f"{path}: empty class list; one class a line is needed")
  first: dict[str, int] = {}
  for number, line in enumerate(lines, 1):
    if line and (earlier := first.setdefault(plain_text(line), number)) != number:
      as_what = "" if lines[earlier - 1] == line else f" as {lines[earlier - 1]!r}"
      raise ValueError(f"{path}:{number}: class {line!r} is there twice, first in line {earlier}{as_what}")
  return tuple(classes)

"""Opens a source: files of any format of `data.formats`, or a split of a packaged world."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tqdm
from absl import logging

from codebind_jax.data import formats, transforms
from codebind_jax.data.records import SPLITS, Source, joined
from codebind_jax.data.worlds import registry
from codebind_jax.data.worlds.source import WorldSource

CHECKED = 10_000  # records up to which all files are opened before any work
SOME = 1_000  # records whose files are opened where there are more


def open_source(
  files: str | Path | Sequence[str | Path],
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
    files: a path, or several; or `world:NAME` for a packaged world, which is built if it is not there.
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
    if not split:
      raise ValueError(f"{files}: needs a split, such as 'train'")
    module = registry.world_module(world)
    if hasattr(module, "open_split"):
      return module.open_split(registry.resolve(world, profile), split)
    return WorldSource(registry.ensure(world, profile, data_dir), split)
  if profile != "auto":
    raise ValueError(f"{files}: got profile {profile!r}; allowed for files: 'auto', only worlds have profiles")
  if split and split not in SPLITS:
    raise ValueError(f"unknown split {split!r} for {files}; allowed: {list(SPLITS)}, or '' for all")
  names = [files] if isinstance(files, str | Path) else list(files)
  paths = [Path(name) for name in names]
  by_format: dict[ModuleType, list[Path]] = {}
  for path in paths:
    by_format.setdefault(format_of(path), []).append(path)
  parts = [
    source for module, own in by_format.items()
    for source in module.open_files(own, max_bad_records=max_bad_records, **options)
  ]  # fmt: skip
  source = joined([part for part in parts if len(part)] or parts)
  if not len(source):
    raise ValueError(f"{', '.join(map(str, names))}: no records")
  check_items(source, check, max_bad_records)
  return of_split(source, split)


def format_of(path: Path) -> ModuleType:
  """The module of `data.formats` that reads a path, by its ending.

  Raises:
    ValueError: for an unknown ending.
  """
  known = []
  for info in pkgutil.iter_modules(formats.__path__):
    module = importlib.import_module(f"{formats.__name__}.{info.name}")
    endings = getattr(module, "ENDINGS", ())
    if str(path).endswith(endings) and endings:
      return module
    known.extend(endings)
  raise ValueError(f"{path}: unknown ending; allowed: {', '.join(known)}")


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
  if isinstance(item, str | Path) and not Path(item).exists():
    raise ValueError(f"{modality}: no such file: {item}")
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
  lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
  classes = [line for line in lines if line]
  if not classes:
    raise ValueError(f"{path}: empty class list; one class a line is needed")
  first: dict[str, int] = {}
  for number, line in enumerate(lines, 1):
    if line and first.setdefault(line, number) != number:
      raise ValueError(f"{path}:{number}: class {line!r} is there twice, first in line {first[line]}")
  unknown = [label for label in labels if label not in first]
  if unknown:
    raise ValueError(f"{path}: label {unknown[0]!r} of {source.name} is not among its {len(classes)} classes")
  return tuple(classes)

"""A folder of class folders: `[train/]CLASS/.../FILE`; the class is the label, a file is a record."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from absl import logging

from codebind_jax import files
from codebind_jax.data import ranges
from codebind_jax.data.formats import hugging_face
from codebind_jax.data.formats.jsonl import item
from codebind_jax.data.formats.record import BY_ENDING, FILE_SPLITS
from codebind_jax.data.index import SPLITS, IndexBuilder
from codebind_jax.data.index_cache import Scan
from codebind_jax.data.records import Source


class FolderSource(Source):
  """Records that are files of a folder; memory holds their names as one string."""

  def __init__(self, path: PurePath, scan: Scan):
    super().__init__(path.name, scan.index, scan.mark)
    self.left_out = scan.bad
    self._path, self._names, self._places = path, scan.columns["names"], scan.index.where
    self._label, self._split, self._labels = scan.index.label, scan.index.split, scan.index.labels

  def _name(self, number: int) -> str:
    begin, end = map(int, self._places[number])
    return os.fsdecode(self._names[begin:end].tobytes())

  def _fields(self, number: int) -> dict[str, Any]:
    split = int(self._split[number])
    fields = {"id": _shown(self._name(number)), "label": self._labels[self._label[number]]}
    return fields | ({"split": SPLITS[split]} if split >= 0 else {})

  def _read(self, number: int, modality: str) -> Path | bytes:
    return item(self._path / "-", self._name(number))

  def _identity(self, number: int, modality: str) -> str:
    return f"{modality} {ranges.identity(self._path / self._name(number))}"

  def _where(self, number: int) -> str:
    return str(self._path / self._name(number))


def _shown(name: str) -> str:
  r"""A file's name as an id or a label; bytes that are no UTF-8 are written out, as \xff."""
  return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")


def takes(path: PurePath) -> bool:
  """Whether a path is a folder that no other format knows."""
  return not str(path).startswith("tfds:") and path.is_dir() and not hugging_face.takes(path)


def open_files(paths: Sequence[PurePath], *, cache: Path | None = None, max_bad_records: int = 0) -> list[Source]:
  """The files of each folder, by name; a file's ending says its modality, others are kept aside.

  Args:
    paths: folders of class folders, or of `train`, `val` (or `validation`) and `test`, each with class folders.
    cache: not used: a listing is as fast as what would be kept.
    max_bad_records: not used: what is in a file is seen when it is read.

  Raises:
    ValueError: for a folder without class folders, or without a file that could be read.
  """
  return [FolderSource(path, _scan(path)) for path in paths]


def _scan(path: PurePath) -> Scan:
  tops, loose = _entries(path)
  splits: list[tuple[str | None, str]] = [(None, "")]
  if tops and all(top in FILE_SPLITS for top in tops):
    splits = [(FILE_SPLITS[top], top) for top in tops]
  builder, names, length, aside = IndexBuilder(), [], 0, {}
  for split, top in splits:
    base = path / top if top else path
    classes, loose = (tops, loose) if split is None else _entries(base)
    if not classes:
      found = f"{len(loose)} files, such as {loose[0]}" if loose else "nothing"
      raise ValueError(f"{base}: no class folders; CLASS/FILE or train/CLASS/FILE is expected, or a file's name that "
                       f"says what is there (.jsonl, .csv), or a metadata.csv; found {found}")  # fmt: skip
    aside |= dict.fromkeys(f".{name.rpartition('.')[2]}" if "." in name else name for name in loose)
    for label in classes:
      before = len(builder)
      for name in _files(base / label):
        modality = BY_ENDING.get(name.rpartition(".")[2].lower())
        if modality is None:
          aside[f".{name.rpartition('.')[2]}" if "." in name else name.rpartition("/")[2]] = None
          continue
        whole = "/".join([*([top] if top else []), label, name])
        encoded = os.fsencode(whole)
        builder.add(_shown(whole), [modality], _shown(label), split, (length, length + len(encoded)))
        names.append(encoded)
        length += len(encoded)
      if len(builder) == before:
        logging.warning("%s: class %s has no file that can be read", base, label)
  if not len(builder):
    endings = ", ".join(BY_ENDING)
    raise ValueError(f"{path}: no file in its class folders ends in one of {endings}")
  if aside:
    logging.info("%s: not used, kept aside: %s", path, ", ".join(list(aside)[:20]))
  return Scan(builder.build(), columns={"names": np.frombuffer(b"".join(names), np.uint8)})


def _entries(path: PurePath) -> tuple[list[str], list[str]]:
  """Names of the folders and of the files in a folder, sorted; hidden ones are left out."""
  folders, others = [], []
  for entry in path.iterdir() if files.is_far(path) else os.scandir(path):
    if not entry.name.startswith("."):
      (folders if entry.is_dir() else others).append(entry.name)
  return sorted(folders), sorted(others)


def _files(path: PurePath) -> list[str]:
  """Names of all files below a folder, relative to it, sorted folder by folder."""
  folders, found = _entries(path)
  return found + [f"{folder}/{name}" for folder in folders for name in _files(path / folder)]

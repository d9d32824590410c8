"""One split of a packaged world as a source."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from codebind_jax.data.index import index_of
from codebind_jax.data.records import Source
from codebind_jax.data.worlds import store

Annotate = Callable[[dict[str, Any], str], dict[str, Any]]


class WorldSource(Source):
  """One split of a packaged world, read from its array_record files."""

  def __init__(self, folder: Path, split: str, annotate: Annotate | None = None):
    found = store.read_index(folder)
    if split not in found:
      raise ValueError(f"unknown split {split!r} of {folder}; allowed: {list(found)}")
    read = [annotate(row, split) for row in found[split]] if annotate else found[split]
    self._rows = rows = [{("text" if k == "texts" else k): v for k, v in row.items()} for row in read]
    self._folder, self._split = folder, split
    self._fingerprint, self._arrays = store.fingerprint(folder), store.array_modalities(folder)
    has = ([*(["text"] if row.get("text") else []), *row.get("has", self._arrays)] for row in rows)
    super().__init__("/".join([*folder.parts[-3:-1], split]), index_of(rows, has), self._fingerprint)
    self._reader, self._lock = None, threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_reader": None, "_lock": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._lock = threading.Lock()

  def close(self) -> None:
    """See `Source.close`."""
    with self._lock:
      self._reader = None

  def _fields(self, number: int) -> dict[str, Any]:
    return self._rows[number]

  def _hash(self, number: int, modality: str) -> str:
    """From the world's manifest (package and table hashes, builder version) and the row's id: nothing is decoded."""
    return hashlib.sha256(f"{self._fingerprint}:{modality}:{self._rows[number]['id']}".encode()).hexdigest()

  def _item_content(self, number: int, modality: str, item: bytes | np.ndarray) -> str:
    """Each record is a content of its own."""
    return self._hash(number, modality)

  def _read(self, number: int, modality: str) -> bytes | np.ndarray:
    with self._lock:
      if self._reader is None:
        self._reader = store.open_records(self._folder, self._split, self._arrays)
      reader = self._reader
    try:
      record = reader[number]
    except (RuntimeError, IndexError, ValueError) as error:  # array_record's are RuntimeErrors
      raise ValueError(f"{self._folder}: record {number} of split {self._split!r} is damaged ({error}); remove the "
                       "folder and run prepare again") from error  # fmt: skip
    if record["id"].decode() != self._rows[number]["id"]:
      raise ValueError(f"{self._folder}: record {number} of split {self._split!r} is {record['id']!r}, its index says "
                       f"{self._rows[number]['id']!r}; remove the folder and run prepare again")  # fmt: skip
    return store.item(record[modality])

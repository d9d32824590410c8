"""One split of a packaged world as a source."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np

from codebind_jax.data.records import Source
from codebind_jax.data.worlds import store


class WorldSource(Source):
  """One split of a packaged world, read from its array_record files."""

  def __init__(self, folder: Path, split: str):
    index = store.read_index(folder)
    if split not in index:
      raise ValueError(f"unknown split {split!r} of {folder}; allowed: {list(index)}")
    rows = [{("text" if k == "texts" else k): v for k, v in row.items()} for row in index[split]]
    super().__init__("/".join([*folder.parts[-3:-1], split]), rows)
    self._folder, self._split = folder, split
    self._records = np.arange(len(rows))
    manifest = (folder / "manifest.json").read_bytes()
    self._fingerprint = hashlib.sha256(manifest).hexdigest()
    self._arrays = tuple(json.loads(manifest).get("modalities", ("image",)))
    self._reader, self._lock = None, threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_reader": None, "_lock": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._lock = threading.Lock()

  @property
  def modalities(self) -> tuple[str, ...]:
    """Modalities of the world."""
    return (*self._arrays, "text")

  def has(self, index: int, modality: str) -> bool:
    """Whether the row's record holds the modality, by the world's index."""
    row = self.rows[index]
    return bool(row.get("text")) if modality == "text" else modality in row.get("has", self._arrays)

  def content_hash(self, index: int, modality: str) -> str:
    """From the world's manifest (package and table hashes, builder version) and the row's id: nothing is decoded."""
    return hashlib.sha256(f"{self._fingerprint}:{modality}:{self.rows[index]['id']}".encode()).hexdigest()

  def _choose(self, chosen: list[int]) -> None:
    super()._choose(chosen)
    self._records = self._records[chosen]

  def read(self, index: int, modality: str) -> np.ndarray:
    """The row's array, decoded from its record."""
    with self._lock:
      if self._reader is None:
        self._reader = store.open_records(self._folder, self._split, self._arrays)
    record = self._reader[int(self._records[index])]
    if record["id"].decode() != self.rows[index]["id"]:
      raise ValueError(f"{self._folder}: record {self._records[index]} of split {self._split!r} is {record['id']!r}, "
                       f"its index says {self.rows[index]['id']!r}; remove the folder and run prepare again")
    return store.decode(modality, record[modality])

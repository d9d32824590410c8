"""Counts of what a world's build keeps and drops, for its manifest and ATTRIBUTION.md."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from codebind_jax.data.worlds import attribution, fetch, names, store


@dataclasses.dataclass
class Tally:
  """Counts of one build.

  Attributes:
    world, profile, version: of the build.
    paths: package id -> archive it is built from.
    tables: names of the tables it reads; the world is built anew when one changes.
    kept: split -> rows.
    dropped: id of a row that was left out -> the reason.
    digest: over the content of all rows, in order.
  """

  world: str
  profile: str
  version: str
  paths: Mapping[str, Path]
  tables: Sequence[str]
  kept: dict[str, int] = dataclasses.field(default_factory=dict)
  dropped: dict[str, str] = dataclasses.field(default_factory=dict)
  digest: Any = dataclasses.field(default_factory=hashlib.sha256)

  def keep(self, split: str, *content: bytes) -> None:
    """Counts a row of a split and adds its content to the digest."""
    self.kept[split] = self.kept.get(split, 0) + 1
    for part in content:
      self.digest.update(hashlib.sha256(part).digest())

  def check(self, split: str, what: str) -> None:
    """Raises a ValueError with the first reason if a split has no row."""
    if not self.kept.get(split):
      reason = next(iter(self.dropped.values()), "the tables list none")
      raise ValueError(f"world {self.world!r}, profile {self.profile!r}: no {what} of split {split!r} can be made; "
                       f"first: {reason}")

  def finish(self, works: Iterable[str] = (), **more: Any) -> tuple[dict[str, Any], str]:
    """Logs what was dropped; returns the manifest, with the fields of `more`, and the text of ATTRIBUTION.md."""
    for key, reason in self.dropped.items():
      logging.warning("%s: left out %s: %s", self.world, key, reason)
    used = {i: fetch.packages()[i] for i in self.paths}
    manifest = {
      "world": self.world, "profile": self.profile, "version": self.version, "splits": self.kept,
      "dropped": self.dropped, "contents_sha256": self.digest.hexdigest(),
      "packages": {i: {"name": p.name, "version": p.version, "sha256": fetch.sha256_file(self.paths[i])}
                   for i, p in used.items()},
      "tables": {name: names.table_hash(name) for name in self.tables},
    } | more  # fmt: skip
    return manifest, attribution.text(self.world.capitalize(), used.values(), list(works))


def features(arrays: Sequence[str], words: Sequence[str], **others: Any) -> dict[str, Any]:
  """The tfds features of a row: `store.blob` for arrays, a list of texts, a text for each of `words`, and `others`."""
  import tensorflow_datasets as tfds

  return {
    **{name: store.blob() for name in arrays}, "texts": tfds.features.Sequence(tfds.features.Text()),
    **{word: tfds.features.Text() for word in words}, **others,
  }  # fmt: skip

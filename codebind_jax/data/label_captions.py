"""Labels as captions: a source whose records without text have their label as the only caption."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from codebind_jax.data.records import Source


class LabelCaptions(Source):
  """The records of a source; one with a label and without a text has the label as its text."""

  def __init__(self, source: Source):
    index = source.index
    names = index.modalities if "text" in index.modalities else (*index.modalities, "text")
    bit = np.uint32(1 << names.index("text"))
    has = np.where(index.label >= 0, index.has | bit, index.has)
    super().__init__(source.name, dataclasses.replace(index, modalities=names, has=has), "label captions")
    self._source, self.left_out, self.block = source, source.left_out, source.block

  def fingerprint(self) -> dict[str, str]:
    """Of the source, and of the choice of records."""
    own = {f"{name} with labels": digest for name, digest in super().fingerprint().items()}
    return self._source.fingerprint() | own

  def _fields(self, number: int) -> dict[str, Any]:
    fields = self._source.fields(number)
    return fields if fields.get("text") or not fields.get("label") else fields | {"text": [fields["label"]]}

  def _read(self, number: int, modality: str) -> str | bytes | Path | np.ndarray:
    return self._source.read(number, modality)

  def _hash(self, number: int, modality: str) -> str:
    return super()._hash(number, modality) if modality == "text" else self._source.content_hash(number, modality)

  def _identity(self, number: int, modality: str) -> str:
    return "" if modality == "text" else self._source.identity(number, modality)

  def _where(self, number: int) -> str:
    return self._source.where(number)

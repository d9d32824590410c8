"""Several sources as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from codebind_jax.data.index import Index, twice, unified
from codebind_jax.data.paged import Zeros
from codebind_jax.data.records import Source


class Joined(Source):
  """The records of several sources, one after the other.

  Groups are those of the parts; parts that lie in one vocabulary of labels share groups, see `joined`.
  """

  def __init__(self, name: str, index: Index, parts: Sequence[Source]):
    super().__init__(name, index)
    self._parts = tuple(parts)
    self.left_out = tuple(message for part in parts for message in part.left_out)
    self._starts = np.cumsum([0, *map(len, parts)])
    self.block = max(part.block for part in parts)

  def fingerprint(self) -> dict[str, str]:
    """Of every part, and of the choice of records."""
    parts = {key: value for part in self._parts for key, value in part.fingerprint().items()}
    return parts if self._numbers is None else parts | super().fingerprint()

  def close(self) -> None:
    """See `Source.close`."""
    for part in self._parts:
      part.close()

  def _part(self, number: int) -> tuple[Source, int]:
    part = int(np.searchsorted(self._starts, number, "right")) - 1
    return self._parts[part], number - int(self._starts[part])

  def _fields(self, number: int) -> dict[str, Any]:
    part, row = self._part(number)
    return part.fields(row)

  def _read(self, number: int, modality: str) -> str | bytes | Path | np.ndarray:
    part, row = self._part(number)
    return part.read(row, modality)

  def _hash(self, number: int, modality: str) -> str:
    part, row = self._part(number)
    return part.content_hash(row, modality)

  def _item_content(self, number: int, modality: str, item: str | bytes | Path | np.ndarray) -> str:
    part, row = self._part(number)
    return part.content_of_item(row, modality, item)

  def _identity(self, number: int, modality: str) -> str:
    part, row = self._part(number)
    return part.identity(row, modality)

  def _where(self, number: int) -> str:
    part, row = self._part(number)
    return part.where(row)


def joined(parts: Sequence[Source], *, name: str = "", field: str = "label", unique: bool = True) -> Source:
  """Several sources as one; records of equal label are one group, also across the parts.

  Args:
    parts: one and more.
    name: of the whole; the first part's unless given.
    field: whose values make the groups; "label" is known without parsing records.
    unique: refuses an id that two records have.

  Raises:
    ValueError: naming both records of one id.
  """
  if len(parts) == 1:
    return parts[0]
  modalities = tuple(dict.fromkeys(m for part in parts for m in part.index.modalities))
  labels = tuple(dict.fromkeys(label for part in parts for label in part.index.labels))
  number = {label: n for n, label in enumerate(labels)}
  columns: dict[str, list[np.ndarray]] = {"has": [], "label": []}
  for part in parts:
    bits = np.zeros(len(part), np.uint32)
    for bit, modality in enumerate(part.index.modalities):
      bits |= ((part.index.has >> np.uint32(bit)) & np.uint32(1)) << np.uint32(modalities.index(modality))
    columns["has"].append(bits)
    known = np.array([*(number[label] for label in part.index.labels), -1], np.int32)
    columns["label"].append(known[part.index.label])
  for column in ("split", "ids"):
    columns[column] = [getattr(part.index, column) for part in parts]
  whole = {column: np.concatenate(values) for column, values in columns.items()}
  whole["where"] = Zeros((len(whole["ids"]), 2), "<i8").array()
  starts = np.cumsum([0, *(int(part.index.group.max(initial=-1)) + 1 for part in parts)])
  groups = np.concatenate([part.index.group + start for part, start in zip(parts, starts)])
  index = Index(modalities, labels=labels, group=unified(groups, whole["label"]), **whole)
  source = Joined(name or parts[0].name, index, parts)
  if unique and (pair := twice(index)):
    a, b = pair
    raise ValueError(f"id {source.fields(a)['id']!r} is there twice: {source.where(a)} and {source.where(b)}")
  return source if field == "label" else source.grouped(field)

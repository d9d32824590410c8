"""The interface of a source of rows.

A source is a picklable random-access sequence of rows `{"id": str, "label": str | None, <modality>: value, ...}`. An
image is uint8 [h, w, 3] RGB with transparency on white, another sensor's array what its transform's `read` gives; a
text is the list of captions the row may use, the main one first. A modality that a row lacks is an absent key.
"""

import abc
import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from codebind_jax.data import transforms

MODALITIES = ("image", "text", "audio", "video", "depth", "points", "thermal", "tactile", "eeg")
SPLITS = ("train", "val", "test")


def known_modalities() -> tuple[str, ...]:
  """`MODALITIES` and all others that have a module in `data.transforms`."""
  return (*MODALITIES, *(m for m in transforms.readable() if m not in MODALITIES))


class Source(abc.ABC):
  """Rows of one split. `rows[i]` is row i without its arrays, so that rows can be chosen without decoding."""

  def __init__(self, name: str, rows: Sequence[dict[str, Any]]):
    self.name = name
    self.rows = list(rows)

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    index = range(len(self))[index]
    arrays = [m for m in self.modalities if m != "text" and self.has(index, m)]
    return self.rows[index] | {modality: self.read(index, modality) for modality in arrays}

  @property
  def keys(self) -> list[str]:
    """Unique id of each row."""
    return [row["id"] for row in self.rows]

  @property
  @abc.abstractmethod
  def modalities(self) -> tuple[str, ...]:
    """Modalities that at least one row has."""

  def has(self, index: int, modality: str) -> bool:
    """Whether a row has a modality, without decoding it."""
    return modality in self.rows[index]

  @abc.abstractmethod
  def content_hash(self, index: int, modality: str) -> str:
    """Hex SHA-256 that changes when a row's content of a modality changes."""

  @abc.abstractmethod
  def read(self, index: int, modality: str) -> np.ndarray:
    """A row's array of one modality (not text), decoded."""

  def select(self, indices: Iterable[int] | Int[np.ndarray, "n"]) -> "Source":
    """The rows at `indices`, in that order, as a source of its own.

    Raises:
      IndexError: if an index is out of range.
    """
    chosen = [range(len(self))[int(i)] for i in indices]
    part = copy.copy(self)
    part._choose(chosen)
    return part

  def _choose(self, chosen: list[int]) -> None:
    self.rows = [self.rows[i] for i in chosen]

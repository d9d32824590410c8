"""What is prepared for the cache of tokens, in worker processes without JAX: texts, and views of pictures."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from codebind_jax.data.examples import Items
from codebind_jax.data.records import Source


@runtime_checkable
class Units(Protocol):
  """Number of a unit -> its prepared items: views of one picture, or one text; or a ValueError."""

  def __len__(self) -> int: ...

  def __getitem__(self, number: int) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Strings:
  """Number -> the prepared text, as a list of one view.

  Attributes:
    strings: the texts.
    prepare: text -> ids.
  """

  strings: Sequence[str]
  prepare: Callable[[Any], np.ndarray]

  def __len__(self) -> int:
    return len(self.strings)

  def __getitem__(self, number: int) -> list[np.ndarray]:
    return [self.prepare(self.strings[number])]


@dataclasses.dataclass(frozen=True)
class Views:
  """Row -> its prepared views: the clean one, and augmented ones whose draws depend on the row's id alone."""

  source: Source
  rows: Int[np.ndarray, "n"]
  feed: Items
  views: int
  augment: Callable[[Any, np.random.Generator], Any] | None

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, number: int) -> list[np.ndarray]:
    row = int(self.rows[number])
    try:
      value = self.feed.decoded(row)[0]
      out = [self.feed.input.prepare(value)]
      for view in range(1, self.views):
        seed = hashlib.sha256(f"0:{view}:{self.source.fields(row)['id']}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(seed[:16], "little"))
        out.append(self.feed.input.prepare(self.augment(value, rng)))
      return out
    except ValueError as error:
      where = self.source.where(row)
      message = str(error) if where in str(error) else f"{where}: {self.feed.modality}: {error}"
      raise ValueError(message) from error


class Chosen:
  """Some units of prepared items; what cannot be read is given as the error."""

  def __init__(self, prepared: Units, own: np.ndarray):
    self._prepared, self._own = prepared, own

  def __getitem__(self, number: int) -> Any:
    try:
      return self._prepared[int(self._own[number])]
    except ValueError as error:
      return error

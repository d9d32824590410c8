"""A record's item of one modality as its tower takes it: read, augmented and prepared, or its cached tokens.

A feed is made for the rows of a source. It is picklable and needs no JAX, so that worker processes can use it. What
cannot be read is a ValueError, which `batches` turns into a masked row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32, Int64, Shaped

from codebind_jax.data.ahead import empty
from codebind_jax.data.inputs import Input, item_errors
from codebind_jax.data.reading import in_record
from codebind_jax.data.records import Source
from codebind_jax.data.token_reader import TokenReader


@runtime_checkable
class Feed(Protocol):
  """Items of one modality of a source's rows.

  Attributes:
    shape: of an item as the tower takes it.
    dtype: likewise.
    fingerprint: of all that decides the items but for the source's content.
  """

  shape: tuple[int, ...]
  dtype: str
  fingerprint: str

  def has(self, row: int) -> bool:
    """Whether the row has an item."""

  def draw(self, row: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """An item for training, and the bytes that were read; the draws depend on `rng` alone.

    Raises:
      ValueError: if it cannot be read.
    """

  def clean(self, row: int) -> np.ndarray:
    """The item as it is, for evaluation.

    Raises:
      ValueError: if it cannot be read.
    """


def captions(texts: Sequence[str], templates: Sequence[str], mode: str = "each") -> list[str]:
  """Training captions of a row without repeats: every template with the main text, and further texts by `mode`.

  Args:
    texts: of one row, the main text first.
    templates: strings with one `{}` each.
    mode: "main" omits the further texts, "each" makes every one a caption, "joined" adds one caption that lists all
      texts (a further text alone, such as "animal", may fit many other rows).

  >>> captions(["cow", "calf", "ox"], ["{}", "an icon of a {}"])
  ['cow', 'an icon of a cow', 'calf', 'ox']
  >>> captions(["cow", "calf", "ox"], ["{}", "an icon of a {}"], "joined")
  ['cow', 'an icon of a cow', 'cow, calf, ox']
  """
  main = [template.format(texts[0]) for template in templates]
  rest = {"main": [], "each": texts[1:], "joined": [", ".join(texts)]}[mode]
  return list(dict.fromkeys([*main, *rest]))


class Prepared:
  """What feeds of prepared items have in common: shape and type are those that their `input` says."""

  input: Input

  @property
  def shape(self) -> tuple[int, ...]:
    """Of a prepared item."""
    return self.input.shape

  @property
  def dtype(self) -> str:
    """Of a prepared item."""
    return self.input.dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Items(Prepared):
  """Items that are read, augmented and prepared anew each time.

  Attributes:
    source: the rows.
    modality: not text.
    input: what the trunk wants.
    augment: (decoded value, generator) -> another view; None for none.
  """

  source: Source
  modality: str
  input: Input
  augment: Callable[[Any, np.random.Generator], Any] | None = None

  @property
  def fingerprint(self) -> str:
    """Of the preparation and the augmentation."""
    return digest(f"{self.input} {self.augment!r}")

  def has(self, row: int) -> bool:
    """Whether the record has the modality."""
    return self.source.has(row, self.modality)

  def _named(self, row: int) -> contextlib.AbstractContextManager[None]:
    """Remarks on the row's item name its record."""
    return in_record(lambda: self.source.where(row))

  def raw(self, row: int) -> tuple[str | bytes | Path | np.ndarray, int]:
    """The item as the source has it, and the bytes that are read of it."""
    with item_errors():
      raw = self.source.read(row, self.modality)
      size = len(raw) if isinstance(raw, bytes) else os.stat(raw).st_size if isinstance(raw, str | Path) else raw.nbytes
      return raw, size

  def decoded(self, row: int) -> tuple[Any, int]:
    """The decoded value, and the bytes that were read."""
    raw, size = self.raw(row)
    with self._named(row):
      return self.input.opened(self.modality, raw), size

  def draw(self, row: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Augmented and prepared."""
    if self.augment is None:
      raw, size = self.raw(row)
      with self._named(row):
        return self.input.prepared(self.modality, raw), size
    value, size = self.decoded(row)
    with item_errors():
      return self.input.prepare(self.augment(value, rng)), size

  def clean(self, row: int) -> np.ndarray:
    """Prepared as it is."""
    raw = self.raw(row)[0]
    with self._named(row):
      return self.input.prepared(self.modality, raw)

  def clean_and_content(self, row: int) -> tuple[np.ndarray, int]:
    """The item prepared as it is, and a hash of its content, of what was read anyway: equal for equal bytes."""
    raw = self.raw(row)[0]
    with self._named(row):
      prepared = self.input.prepared(self.modality, raw)
    with item_errors():
      return prepared, number_of(self.source.content_of_item(row, self.modality, raw))


@dataclasses.dataclass(frozen=True, eq=False)
class Texts(Prepared):
  """Ids of a row's captions, one drawn each time.

  Attributes:
    source: the rows.
    input: what the trunk wants.
    templates: of captions.
    mode: use of further texts, see `captions`.
  """

  source: Source
  input: Input
  templates: tuple[str, ...] = ("{}",)
  mode: str = "each"

  @property
  def fingerprint(self) -> str:
    """Of the preparation and the captions."""
    return digest(f"{self.input} {self.templates} {self.mode}")

  def has(self, row: int) -> bool:
    """Whether the record has a text."""
    return self.source.has(row, "text")

  def draw(self, row: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """One of the row's captions."""
    own = captions(self.source.fields(row)["text"], self.templates, self.mode)
    text = own[rng.integers(len(own))]
    return self.input.prepare(text), len(text.encode())

  def clean(self, row: int) -> np.ndarray:
    """The main text."""
    return self.input.prepare(self.source.fields(row)["text"][0])


@dataclasses.dataclass(frozen=True, eq=False)
class Values(Prepared):
  """Given values of one modality, prepared; row i is value i.

  Attributes:
    values: decoded or not: paths, bytes, arrays, or texts.
    modality: theirs.
    input: what the trunk wants.
  """

  values: Sequence[Any]
  modality: str
  input: Input

  @property
  def fingerprint(self) -> str:
    """Of the preparation."""
    return digest(f"{self.input}")

  def has(self, row: int) -> bool:
    """Always."""
    return True

  def draw(self, row: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """The value as it is."""
    return self.clean(row), 0

  def clean(self, row: int) -> np.ndarray:
    """The value, opened and prepared; an error names its number."""
    try:
      with in_record(lambda: f"{self.modality}[{row}]"):
        return self.input.prepared(self.modality, self.values[row])
    except ValueError as error:
      raise ValueError(f"{self.modality}[{row}]: {error}") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
  """Cached tokens: of a row's choices (captions; one for an image) and their views, the clean one first.

  Attributes:
    reader: of the cache.
    starts: row -> its first choice; [rows + 1].
    places: choice and view -> place in the cache; -1 where the item could not be read.
    augmented: probability of drawing one of the augmented views.
    made_from: hash of the keys of all items.
    pooled: gives the pooled token alone.
  """

  reader: TokenReader
  starts: Int32[np.ndarray, "r"] | Int64[np.ndarray, "r"]
  places: Int64[np.ndarray, "n v"]
  augmented: float = 0.0
  made_from: str = ""
  pooled: bool = False
  dtype: str = "float16"

  @property
  def shape(self) -> tuple[int, ...]:
    """Of an item's tokens."""
    return (1 if self.pooled else self.reader.tokens, self.reader.width)

  @property
  def fingerprint(self) -> str:
    """Of the items' keys and the share of augmented views."""
    return digest(f"{self.made_from} {self.augmented}")

  def has(self, row: int) -> bool:
    """Whether the row has an item, and all of its choices and views could be read."""
    first, stop = self.starts[row], self.starts[row + 1]
    return bool(stop > first and (self.places[first:stop] >= 0).all())

  def draw(self, row: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """A choice and a view."""
    first, stop, views = int(self.starts[row]), int(self.starts[row + 1]), self.places.shape[1]
    view = 1 + rng.integers(views - 1) if views > 1 and rng.random() < self.augmented else 0
    tokens = self.reader(int(self.places[first + rng.integers(stop - first), view]), self.pooled)
    return tokens, tokens.nbytes

  def places_of(self, rows: Int[np.ndarray, "n"] | range) -> Int64[np.ndarray, "n"]:
    """Place of the clean view of each row's first choice, which rows of one content share; -1 where there is none."""
    rows = np.asarray(rows)
    first = self.starts[rows]
    there = first < self.starts[rows + 1]
    return np.where(there, self.places[np.minimum(first, len(self.places) - 1), 0], -1)

  def clean(self, row: int) -> np.ndarray:
    """The clean view of the first choice."""
    return self.reader(int(self.places[self.starts[row], 0]), self.pooled)


def stacked(items: Sequence[Shaped[np.ndarray, "..."] | None], feed: Feed) -> Shaped[np.ndarray, "b ..."]:
  """One batch of items, zeros where one is missing."""
  out = empty((len(items), *feed.shape), feed.dtype)
  for place, item in enumerate(items):
    out[place] = 0 if item is None else item
  return out


def number_of(content: str) -> int:
  """A number of 62 bits that stands for a content."""
  return int.from_bytes(hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:8], "little") >> 2


def digest(value: str | bytes | np.ndarray) -> str:
  """First 16 hex digits of the SHA-256 of a string, bytes or an array's bytes."""
  content = value.encode() if isinstance(value, str) else np.ascontiguousarray(value).data if isinstance(
    value, np.ndarray) else value  # fmt: skip
  return hashlib.sha256(content).hexdigest()[:16]

"""A source and cached tokens whose values are given arrays. Worker processes import this: it imports no JAX."""

import hashlib
from pathlib import Path

import numpy as np

from codebind_jax.data.examples import Tokens
from codebind_jax.data.index import index_of
from codebind_jax.data.records import Source
from codebind_jax.data.token_reader import TokenReader


class Rows(Source):
  """Rows with given items: arrays, bytes or paths; None where a row lacks the modality. `closed` rows must not be read.

  An item that is an exception is raised when it is read.
  """

  def __init__(self, name, rows, closed=False, **items):
    fields = [{"id": f"{name} {i}"} | row for i, row in enumerate(rows)]
    texts = lambda row: ["text"] if row.get("text") else []
    has = [[m for m, own in items.items() if own[i] is not None] + texts(row) for i, row in enumerate(fields)]
    super().__init__(name, index_of(fields, has))
    self.rows, self.items, self.closed = fields, {m: list(own) for m, own in items.items()}, closed

  def _fields(self, number):
    return self.rows[number]

  def _read(self, number, modality):
    assert not self.closed, f"{self.name} was read"
    item = self.items[modality][number]
    if isinstance(item, Exception):
      raise item
    return item if isinstance(item, bytes | Path) else np.asarray(item)

  def _hash(self, number, modality):
    item = self._read(number, modality)
    if isinstance(item, np.ndarray):
      return hashlib.sha256(f"{item.dtype} {item.shape}".encode() + item.tobytes()).hexdigest()
    return hashlib.sha256(item if isinstance(item, bytes) else item.read_bytes()).hexdigest()


class Arrays(TokenReader):
  """Tokens in memory; the place of an item is its number."""

  def __init__(self, values):
    super().__init__((), *values.shape[1:])
    self.values = values

  def __call__(self, place, pooled=False):
    return self.values[place, :1] if pooled else self.values[place]


def tokens_of(values, choices=None, augmented=0.0, made_from=""):
  """Tokens [items, views, tokens, width] of rows that draw from these items; of one each unless `choices` says so."""
  count, views, *shape = values.shape
  choices = [(i,) for i in range(count)] if choices is None else choices
  starts = np.cumsum([0, *map(len, choices)])
  items = np.array([i for own in choices for i in own], np.int64)
  places = items[:, None] * views + np.arange(views)
  made_from = made_from or hashlib.sha256(values.tobytes() + repr(choices).encode()).hexdigest()[:16]
  return Tokens(Arrays(values.reshape(-1, *shape)), starts, places, augmented, made_from)


class Letters:
  """Text -> the numbers of its first letters."""

  def __call__(self, text):
    return np.array([ord(letter) for letter in text[:8].ljust(8)], np.int32)


def footer_of(content):
  """Where the footer of a Parquet file's bytes begins."""
  return len(content) - 8 - int.from_bytes(content[-8:-4], "little")


def damaged_parquet(content, rng, count=60):
  """The bytes of a Parquet file with two of them changed, anywhere and in its footer by turns."""
  for number in range(count):
    changed = bytearray(content)
    for at in rng.integers(footer_of(content) if number % 2 else 4, len(content) - 8, 2):
      changed[at] = rng.integers(256)
    yield bytes(changed)

"""Which rows of two modalities of an evaluation set answer each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from codebind_jax.evaluators import base, contents


@runtime_checkable
class Evaluation(Protocol):
  """What makes the tables of a task's sets, see `codebind_jax.evaluate.Evaluation`.

  Attributes:
    config: of the run.
  """

  config: Any

  def table(self, model: Any, test: Any) -> base.Captioned:
    """Embeddings of one set."""

  def embed_text(self, model: Any, texts: Any) -> np.ndarray:
    """`shared` embeddings of strings."""

  def code_counts(self, model: Any) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    """Use counts of each code over all training rows: (by codebook, of the shared codebook by modality)."""


def named_pairs(test: Any, modalities: Iterable[str]) -> list[tuple[str, str, str, str]]:
  """(modality, modality, field, name) of retrieval: every modality with text by caption, then the set's own pairs.

  The name is empty for the first field by which two modalities are matched, and the field for further ones (touch to
  the photograph of the same crop, and to one of the same texture).
  """
  first: dict[frozenset[str], str] = {}
  by_text = [("text", name, "caption") for name in modalities if name != "text"]
  return [
    (a, b, field, "" if first.setdefault(frozenset((a, b)), field) == field else field)
    for a, b, field in [*by_text, *test.pairs]
  ]


def keys_of(table: base.Captioned, a: str, b: str, field: str) -> dict[str, contents.Keys]:
  """Modality -> its rows and their values of `field` ("caption": all captions of a row) that both modalities have.

  Empty if no value is in both.
  """
  if a not in table or b not in table:
    return {}
  keys = {}
  for m in (a, b):
    if field == "caption":
      keys[m] = table.captions.get(m, (np.zeros(0, np.int64), np.zeros(0, np.int64)))
    else:
      values = table[m][field]
      rows = np.flatnonzero(values != "") if values.dtype.kind in "US" else np.arange(len(values))
      keys[m] = rows, values[rows]
  both = np.intersect1d(keys[a][1], keys[b][1])
  keys = {m: tuple(column[np.isin(values, both)] for column in (rows, values)) for m, (rows, values) in keys.items()}
  return keys if len(both) else {}


def paired(table: base.Table, a: str, b: str, field: str) -> base.Table | None:
  """Two modalities with a `_mask` of the rows to show together: each content once, and values of `field` in both.

  Of several captions a row has its main one here; `keys_of` has all. None if no value is in both.
  """
  if a not in table or b not in table:
    return None
  once = {m: np.isin(np.arange(len(table[m][field])), contents.once(contents.contents_of(table, m))) for m in (a, b)}
  both = np.intersect1d(*(table[m][field][once[m]] for m in (a, b)))
  both = both[both != ""] if both.dtype.kind in "US" else both
  masked = {m: dict(table[m]) | {"_mask": once[m] & np.isin(table[m][field], both)} for m in (a, b)}
  return masked if len(both) else None

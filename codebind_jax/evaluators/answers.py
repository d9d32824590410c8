"""What a model answered, row by row, beside the numbers that it makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from codebind_jax.evaluators import base

TOP = 5
_BLOCK = 1 << 22  # scores held at once


@dataclasses.dataclass(frozen=True)
class Answers:
  """The best answers to N rows, k of them each, best first.

  Attributes:
    name: of the metrics that they make, such as `zeroshot/image`.
    modality: of the rows.
    ids: [N].
    texts: [N] of queries that are texts; else empty.
    truth: right answer of each row, a label; for retrieval the right items, at most `TOP`.
    found: [N, k] numbers of answers in `names`.
    names: all possible answers: labels, ids of items, or texts.
    scores: [N, k]: cosines, or probabilities of a probe.
    right: [N, k], which of them are right.
  """

  name: str
  modality: str
  ids: Sequence[str]
  texts: Sequence[str]
  truth: Sequence[str | Sequence[str]]
  found: Int[np.ndarray, "n k"]
  names: Sequence[str]
  scores: Float[np.ndarray, "n k"]
  right: Bool[np.ndarray, "n k"]

  @property
  def to_items(self) -> bool:
    """Whether the answers are items and not classes."""
    return self.name.startswith("retrieval/")


Keep = Callable[[Answers], None]


def ids_of(table: base.Table, modality: str, rows: Int[np.ndarray, "n"]) -> list[str]:
  """Ids of rows of a table without padding; their numbers where it has none."""
  if "id" not in table[modality]:
    return [str(row) for row in rows]
  (ids,) = base.columns(table, modality, ["id"])
  return [str(name) for name in ids[rows]]


def best(
  rows: Float[np.ndarray, "n d"], others: Float[np.ndarray, "m d"], k: int = TOP
) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
  """The k others of the largest product with each row, best first, and the products; all of them if there are fewer."""
  parts = [top(scores, k) for scores in _blocks(rows, others)]
  return np.concatenate([found for found, _ in parts]), np.concatenate([scores for _, scores in parts])


def top(scores: Float[np.ndarray, "n m"], k: int = TOP) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
  """The k columns of the highest score of each row, best first (ties by number), and their scores."""
  k = min(k, scores.shape[1])
  some = np.sort(np.argpartition(-scores, k - 1, axis=1)[:, :k], axis=1)
  own = np.take_along_axis(scores, some, axis=1)
  order = np.argsort(-own, axis=1, kind="stable")
  return np.take_along_axis(some, order, axis=1), np.take_along_axis(own, order, axis=1)


def _blocks(rows: np.ndarray, others: np.ndarray) -> Iterator[np.ndarray]:
  step = max(1, _BLOCK // len(others))
  for start in range(0, len(rows), step):
    yield rows[start : start + step] @ others.T

"""A test of a packaged world: which of its rows, what for, and what is asked of them."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class EvalSet:
  """Rows of a split and what is asked of them.

  Attributes:
    split: split of the world.
    role: "val" to choose by, "test" to read once per reported model.
    candidates: labels to choose among in zero-shot classification; () where nothing is to be named.
    labelled: whether rows without a label are left out.
    where: (field, values): only rows are kept whose field has one of the values.
    probes: fields that a linear probe tells, learned on the training rows.
    means: fields told by the nearest class mean of the training rows.
    pairs: (modality, modality, field): retrieval beyond that with texts; rows of equal field answer each other.
  """

  split: str
  role: str
  candidates: tuple[str, ...] = ()
  labelled: bool = False
  where: tuple[tuple[str, tuple[Any, ...]], ...] = ()
  probes: tuple[str, ...] = ()
  means: tuple[str, ...] = ()
  pairs: tuple[tuple[str, str, str], ...] = ()

  def keep(self, row: dict[str, Any]) -> bool:
    """Whether a row of the split belongs to the test."""
    return bool(row["label"] or not self.labelled) and all(row[field] in values for field, values in self.where)

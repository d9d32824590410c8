"""A set to evaluate on: which rows of a split, and what is asked of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class EvalSet:
  """A set to evaluate on. A world leaves out `name`, `world` and `source`: `open_task` adds them.

  Attributes:
    name: metrics are called `eval/<name>/...`.
    world: the source whose training rows belong to it.
    role: "val" to choose by, "test" to read once per reported model.
    source: its rows.
    candidates: labels to choose among in zero-shot classification; empty where rows have no labels.
    probes: fields that a linear probe predicts, fitted on the training rows and tested here.
    means: fields predicted by the nearest class mean of the training rows.
    pairs: (modality, modality, field): retrieval beyond that with texts; rows of equal field answer each other.
    slices: fields whose values get an accuracy of their own.
    probe_group: field whose values the training and the test rows of a probe must not share; None where any may.
    split: split of the world.
    title: how reports name the set, "icons, unseen artists"; a world leaves out its own name, `open_task` adds it.
    labelled: whether rows without a label are left out.
    where: (field, values): only rows are kept whose field has one of the values.
    texts: which of a row's texts are its captions: all, or the main one alone (others are tags).
    spellings: label of rows -> the candidate that it is, where it is written otherwise (in case or blanks).
  """

  name: str = ""
  world: str = ""
  role: str = "val"
  source: Any = None
  candidates: Sequence[str] = ()
  probes: tuple[str, ...] = ()
  means: tuple[str, ...] = ()
  pairs: tuple[tuple[str, str, str], ...] = ()
  slices: tuple[str, ...] = ()
  probe_group: str | None = None
  split: str = ""
  title: str = ""
  labelled: bool = False
  where: tuple[tuple[str, tuple[Any, ...]], ...] = ()
  texts: Literal["all", "main"] = "main"
  spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def keep(self, row: dict[str, Any]) -> bool:
    """Whether a row of the split belongs to the set."""
    return bool(not self.labelled or row["label"]) and all(row[field] in values for field, values in self.where)

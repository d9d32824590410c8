"""Stages as data: what a stage binds, on what, training what, with which losses, for how long."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of progressive alignment (spec section 4).

  Attributes:
    name: of the stage; metrics carry it.
    pairs: active pairs (modality, bridge) that InfoNCE and code matching bind.
    train: regexes of the parameter paths that train; everything else is frozen.
    losses: term name -> weight.
    steps: optimizer steps.
    batch_size: rows of the global batch.
    temperature: of InfoNCE (tau).
    matching_temperature: of the softmax over codes in code matching.
    code_rows: rows of a batch that code contrast and code matching look at; 0 for all. Their cost grows with rows times
      segments times codes (matching: with the square of the rows), and is most of a step's if all rows take part.
    mixup: rows are mixed with their neighbours in the batch, all modalities by the same share, drawn from Beta(mixup,
      mixup) (Zhang et al., 2018, arXiv 1710.09412); 0 for none.
    balance: the loss balancer (`losses/balance.py`) sets the weights of the terms; `losses` then only says which take
      part.
    first_step: global step at which the stage begins.
  """

  name: str
  pairs: tuple[tuple[str, str], ...]
  train: tuple[str, ...]
  losses: dict[str, float]
  steps: int
  batch_size: int
  temperature: float
  matching_temperature: float
  code_rows: int
  mixup: float
  balance: bool
  first_step: int

  @property
  def last_step(self) -> int:
    """Global step at which the stage is done."""
    return self.first_step + self.steps

  @property
  def modalities(self) -> tuple[str, ...]:
    """Modalities that take part, in order of first appearance."""
    return tuple(dict.fromkeys(m for pair in self.pairs for m in pair))


def stages_of(config: Any) -> list[Stage]:
  """The stages of a config in order, with their global steps."""
  stages, step = [], 0
  for name in config.stage_order:
    entry = config.stages[name]
    stages.append(
      Stage(
        name=name,
        pairs=tuple(tuple(pair) for pair in entry.pairs),
        train=tuple(entry.train),
        losses={term: float(weight) for term, weight in entry.losses.items()},
        steps=int(entry.steps),
        batch_size=int(entry.batch_size),
        temperature=float(entry.temperature),
        matching_temperature=float(entry.matching_temperature),
        code_rows=int(entry.code_rows),
        mixup=float(entry.mixup),
        balance=bool(entry.balance),
        first_step=step,
      )
    )
    step = stages[-1].last_step
  return stages

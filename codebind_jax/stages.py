"""Stages as data: what a stage binds, on what, training what, with which losses, for how long."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of progressive alignment (spec section 4).

  Attributes:
    name: of the stage; metrics carry it.
    pairs: active pairs (modality, bridge) that InfoNCE and code matching bind.
    sources: source name -> rows of it in a global batch; empty until `on` fills it in.
    weights: source name -> weight of its losses; 1 where not named.
    unique_labels: at most one row of a label in a batch; else rows of equal labels do not count as each other's
      negatives where one side of the pair is text.
    train: regexes of the parameter paths that train; everything else is frozen.
    codes: regexes of the codebooks that learn (`shared`, a modality), the others stay as they are.
    losses: term name -> weight.
    steps: optimizer steps.
    batch_size: rows of the global batch where there is one source.
    learning_rate: of this stage; 0 for that of `config.optim`.
    temperature: of InfoNCE (tau).
    matching_temperature: of the softmax over codes in code matching.
    code_rows: rows of a batch that code contrast and code matching look at; 0 for all. Their cost grows with rows times
      segments times codes (matching: with the square of the rows), and is most of a step's if all rows take part.
    chunk: rows and columns of the InfoNCE logits held at once; 0 for the whole matrix. Where several devices share the
      rows, these pass from device to device, so that none holds the whole batch.
    ring: they do so with `chunk` 0 as well, the rows of a device at once.
    parts: the towers see the batch in so many parts, one after the other; losses and codebooks see it whole.
    mixup: rows are mixed with their neighbours in the batch, all modalities by the same share, drawn from Beta(mixup,
      mixup) (Zhang et al., 2018, arXiv 1710.09412); 0 for none.
    balance: the loss balancer (`losses/balance.py`) sets the weights of the terms; `losses` then only says which take
      part.
    first_step: global step at which the stage begins.
  """

  name: str
  pairs: tuple[tuple[str, str], ...]
  steps: int
  batch_size: int
  sources: Mapping[str, int] = dataclasses.field(default_factory=dict)
  weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
  unique_labels: bool = True
  learning_rate: float = 0.0
  train: tuple[str, ...] = (".*",)
  codes: tuple[str, ...] = (".*",)
  losses: Mapping[str, float] = dataclasses.field(default_factory=dict)
  temperature: float = 0.07
  matching_temperature: float = 1.0
  code_rows: int = 0
  mixup: float = 0.0
  chunk: int = 0
  ring: bool = False
  parts: int = 1
  balance: bool = False
  first_step: int = 0

  @property
  def last_step(self) -> int:
    """Global step at which the stage is done."""
    return self.first_step + self.steps

  @property
  def modalities(self) -> tuple[str, ...]:
    """Modalities that take part, in order of first appearance."""
    return tuple(dict.fromkeys(m for pair in self.pairs for m in pair))

  def on(self, held: Mapping[str, Collection[str]]) -> Stage:
    """The stage with its sources settled.

    Args:
      held: source name -> modalities it has.

    Raises:
      ValueError: if a source is unknown, several could be meant, or no source has both sides of a pair.
    """
    if not self.sources and len(held) > 1:
      raise ValueError(f"config.stages.{self.name}.sources: must say which of {sorted(held)} and how many rows of each")
    sources = self.sources or dict.fromkeys(held, self.batch_size)
    for name in [*sources, *self.weights]:
      if name not in held:
        raise ValueError(f"config.stages.{self.name}.sources: {name!r} is not allowed; allowed: {sorted(held)}")
    for a, b in self.pairs:
      if not any(a in held[name] and b in held[name] for name in sources):
        raise ValueError(f"config.stages.{self.name}.pairs: none of {sorted(sources)} has both {a!r} and {b!r}")
    return dataclasses.replace(self, sources=sources)


# Key of a stage -> its default, for the keys that have one.
DEFAULTS = {
  field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
  for field in dataclasses.fields(Stage)
  if not field.default is field.default_factory is dataclasses.MISSING
}  # fmt: skip


def stages_of(config: Any) -> list[Stage]:
  """The stages of a config in order, with their global steps."""
  stages, step = [], 0
  for name in config.stage_order:
    entry = config.stages[name]
    stages.append(
      Stage(
        name=name,
        pairs=tuple(tuple(pair) for pair in entry.pairs),
        sources={source: int(rows) for source, rows in entry.sources.items()},
        weights={source: float(weight) for source, weight in entry.weights.items()},
        unique_labels=bool(entry.unique_labels),
        learning_rate=float(entry.learning_rate),
        train=tuple(entry.train),
        codes=tuple(entry.get("codes", (".*",))),  # runs of before this key load as well
        losses={term: float(weight) for term, weight in entry.losses.items()},
        steps=int(entry.steps),
        batch_size=int(entry.batch_size),
        temperature=float(entry.temperature),
        matching_temperature=float(entry.matching_temperature),
        code_rows=int(entry.code_rows),
        mixup=float(entry.mixup),
        chunk=int(entry.chunk),
        ring=bool(entry.ring),
        parts=int(entry.parts),
        balance=bool(entry.balance),
        first_step=step,
      )
    )
    step = stages[-1].last_step
  return stages

"""Stages as data: what a stage binds, on what, training what, with which losses, for how long."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated

from codebind_jax.schema import DERIVED, Frozen, Regex, above, at_least, keys_of


@dataclasses.dataclass(frozen=True)
class Stage:
  """Section `stages.NAME`: one stage of progressive alignment (spec section 4).

  Attributes:
    pairs: active pairs (modality, bridge) that InfoNCE and code matching bind.
    losses: term name -> weight.
    sources: source name -> rows of it in a global batch; empty for the only source, with `batch_size` rows.
    weights: source name -> weight of its losses; 1 where not named.
    unique_labels: at most one row of a label in a batch; else rows of equal labels do not count as each other's
      negatives where one side of the pair is text.
    steps: optimizer steps; those of the run unless set.
    batch_size: rows of the global batch where there is one source; that of the run unless set.
    learning_rate: of this stage; 0 for that of `config.optim`.
    train: regexes of the parameter paths that train; everything else is frozen.
    codes: regexes of the codebooks that learn (`shared`, and each modality's own under its name); the others stay as
      they are.
    temperature: of InfoNCE (tau).
    matching_temperature: of the softmax over codes in code matching.
    code_rows: rows of a batch that code contrast and code matching look at; 0 for all. Their cost grows with rows times
      segments times codes (matching: with the square of the rows), and is most of a step's if all rows take part.
    chunk: rows and columns of the InfoNCE logits held at once; 0 for the whole matrix. Where several devices share the
      rows, these pass from device to device, so that none holds the whole batch.
    ring: they do so with `chunk` 0 as well, the rows of a device at once.
    parts: the towers see the batch in so many parts, one after the other, for batches larger than memory; losses and
      codebooks see it whole.
    mixup: rows are mixed with their neighbours in the batch, all modalities by the same share, drawn from Beta(mixup,
      mixup) (Zhang et al., 2018, arXiv 1710.09412); 0 for none.
    balance: the loss balancer (`losses/balance.py`) sets the weights of the terms; `losses` then only says which take
      part.
    name: of the stage; metrics carry it. `stages_of` fills it in.
    first_step: global step at which the stage begins, likewise.
  """

  pairs: tuple[tuple[str, str], ...] = (("image", "text"),)
  losses: Mapping[str, Annotated[float, at_least(0, "off")]] = Frozen()
  sources: Mapping[str, Annotated[int, above(0)]] = Frozen()
  weights: Mapping[str, Annotated[float, above(0)]] = Frozen()
  unique_labels: bool = True
  steps: Annotated[int, above(0)] = dataclasses.field(kw_only=True)
  batch_size: Annotated[int, above(0)] = dataclasses.field(kw_only=True)
  learning_rate: Annotated[float, at_least(0, "config.optim's")] = 0.0
  train: tuple[Regex, ...] = (".*",)
  codes: tuple[Regex, ...] = (".*",)
  temperature: Annotated[float, above(0)] = 0.07
  matching_temperature: Annotated[float, above(0)] = 1.0
  code_rows: Annotated[int, at_least(0, "all")] = 0
  chunk: Annotated[int, at_least(0, "the whole matrix")] = 0
  ring: bool = False
  parts: Annotated[int, at_least(1)] = 1
  mixup: Annotated[float, at_least(0, "off")] = 0.0
  balance: bool = False
  name: str = dataclasses.field(default="", metadata=DERIVED)
  first_step: int = dataclasses.field(default=0, metadata=DERIVED)

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
    sources = self.sources or Frozen(dict.fromkeys(held, self.batch_size))
    for name in [*sources, *self.weights]:
      if name not in held:
        raise ValueError(f"config.stages.{self.name}.sources: {name!r} is not allowed; allowed: {sorted(held)}")
    for a, b in self.pairs:
      if not any(a in held[name] and b in held[name] for name in sources):
        raise ValueError(f"config.stages.{self.name}.pairs: none of {sorted(sources)} has both {a!r} and {b!r}")
    return dataclasses.replace(self, sources=sources)


# Key of a stage -> its default, for the keys that have one.
DEFAULTS = {key: default for key, (_, default) in keys_of(Stage).items() if default is not dataclasses.MISSING}


def stages_of(stages: Mapping[str, Stage], order: Sequence[str]) -> list[Stage]:
  """The stages of a config (`config.stages`, `config.stage_order`) in order, with their names and global steps."""
  found: list[Stage] = []
  for name in order:
    first = found[-1].last_step if found else 0
    found.append(dataclasses.replace(stages[name], name=name, first_step=first))
  return found

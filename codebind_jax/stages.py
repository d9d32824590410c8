"""Stages: the pairs of modalities that a stage binds, its data, trained parameters, losses and length."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Literal

from codebind_jax.schema import (
  DERIVED,
  DISTINCT,
  NONEMPTY,
  Frozen,
  Name,
  Regex,
  Rule,
  Temperature,
  Weight,
  above,
  at_least,
  at_most,
  keys_of,
)  # fmt: skip

Pair = Annotated[tuple[Name, Name], Rule(lambda pair: pair[0] != pair[1], "two different modalities")]
Mixup = Annotated[float, at_least(0, "off"), at_most(1000)]


@dataclasses.dataclass(frozen=True)
class Stage:
  """Section `stages.NAME`: one stage of progressive alignment, which binds new modalities to bridges.

  Attributes:
    pairs: pairs (modality, bridge) that InfoNCE and code matching bind.
    losses: name of a loss -> its weight.
    sources: source (a world, a name of `data.named_files`, or that of the files) -> its rows of a batch; empty for the
      only source, with `batch_size` rows.
    weights: source name -> weight of its losses; 1 where not named.
    unique_labels: at most one row of a label in a batch; if False, rows of equal labels are no negatives of each other
      where one side of the pair is text.
    steps: number of optimizer steps; the run's unless set.
    batch_size: rows of a batch, over all devices, if there is one source; the run's unless set.
    learning_rate: learning rate of this stage; 0 for that of `config.optim`.
    train: regular expressions of the paths of the parameters that train; everything else is frozen.
    tune: modality -> how its trunk trains, where it runs in the model: `frozen`, `lora` (adapters and the class token)
      or `full`. Those not named are frozen if they have a checkpoint, else they train in full.
    codes: regular expressions of the updated codebooks (`shared`, and each modality's own under its name); the others
      are frozen.
    temperature: temperature of InfoNCE (tau); the smaller, the more the hardest negatives count.
    matching_temperature: temperature of the softmax over codes in code matching.
    scale_inside_cosine: whether InfoNCE takes the cosine after the modalities' logit scales, as the release does, which
      cancels them, so that they have no effect and do not train.
    double_softmax: whether code contrast takes the softmax of the similarities twice (the release).
    code_rows: rows of a batch for code contrast and code matching; 0 for all. Their cost grows with rows times segments
      times codes (matching: with the square of the rows), and dominates the step if all rows take part.
    chunk: rows and columns of the InfoNCE logits in memory at once; 0 for the whole matrix. If several devices share
      the rows, tiles of rows pass from device to device, so that none holds the whole batch.
    ring: whether rows also pass from device to device with `chunk` 0, a device's rows at once.
    parts: number of micro-batches in which the towers run, for batches larger than memory; losses and codebooks take
      the whole batch.
    mixup: every row is mixed with its neighbour in the batch, in all modalities by one share drawn from Beta(mixup,
      mixup) (Zhang et al., 2018, arXiv 1710.09412); 0 for none.
    balance: whether the loss balancer (`losses/balance.py`) sets the weights of those losses whose weight is not 0.
    name: of the stage, in the metrics; set by `stages_of`.
    first_step: global step at which the stage begins; set by `stages_of`.
  """

  pairs: Annotated[tuple[Pair, ...], NONEMPTY, DISTINCT] = (("image", "text"),)
  losses: Mapping[Name, Weight] = Frozen()
  sources: Mapping[Name, Annotated[int, above(0)]] = Frozen()
  weights: Mapping[Name, Annotated[float, above(0), at_most(1e6)]] = Frozen()
  unique_labels: bool = True
  steps: Annotated[int, above(0)] = dataclasses.field(kw_only=True)
  batch_size: Annotated[int, above(0)] = dataclasses.field(kw_only=True)
  learning_rate: Annotated[float, at_least(0, "config.optim's")] = 0.0
  train: Annotated[tuple[Regex, ...], NONEMPTY] = (".*",)
  tune: Mapping[Name, Literal["frozen", "lora", "full"]] = Frozen()
  codes: tuple[Regex, ...] = (".*",)
  temperature: Temperature = 0.07
  matching_temperature: Temperature = 1.0
  scale_inside_cosine: bool = False
  double_softmax: bool = False
  code_rows: Annotated[int, at_least(0, "all")] = 0
  chunk: Annotated[int, at_least(0, "the whole matrix")] = 0
  ring: bool = False
  parts: Annotated[int, at_least(1), at_most(1 << 16)] = 1
  mixup: Mixup = 0.0
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

  def on(self, data: Mapping[str, Collection[str]]) -> Stage:
    """The stage with `sources` filled in for this data.

    Args:
      data: source name -> its modalities.

    Raises:
      ValueError: if a source is unknown, several are possible, or no source has both modalities of a pair.
    """
    if not self.sources and len(data) > 1:
      raise ValueError(f"config.stages.{self.name}.sources: must say which of {sorted(data)} and how many rows of each")
    sources = self.sources or Frozen(dict.fromkeys(data, self.batch_size))
    for name in [*sources, *self.weights]:
      if name not in data:
        raise ValueError(f"config.stages.{self.name}.sources: {name!r} is not allowed; allowed: {sorted(data)}")
    for a, b in self.pairs:
      if not any(a in data[name] and b in data[name] for name in sources):
        raise ValueError(f"config.stages.{self.name}.pairs: none of {sorted(sources)} has both {a!r} and {b!r}")
    return dataclasses.replace(self, sources=sources)


# Stage key -> its default, for those that have one.
DEFAULTS = {key: default for key, (_, default) in keys_of(Stage).items() if default is not dataclasses.MISSING}


def stages_of(stages: Mapping[str, Stage], order: Sequence[str]) -> list[Stage]:
  """The stages of a config (`config.stages`, `config.stage_order`) in order, with their names and global steps."""
  ordered: list[Stage] = []
  for name in order:
    first_step = ordered[-1].last_step if ordered else 0
    ordered.append(dataclasses.replace(stages[name], name=name, first_step=first_step))
  return ordered

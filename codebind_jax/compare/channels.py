"""A trained model with only some channels of its codes (TOC), and its metrics before and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from codebind_jax.api import Embedded, Model
from codebind_jax.data.task import open_task
from codebind_jax.evaluate import Evaluation
from codebind_jax.methods.toc import keep_channels
from codebind_jax.trunks.feeds import Feeder


class Sliced(Model):
  """A trained model whose `shared` and `query` embeddings have only the chosen channels of every segment."""

  def __init__(self, model: Model, channels: Int[np.ndarray, "q"], width: int):
    super().__init__(model.config, model.params, model.codebooks, model.trunks, model.batch, model.modalities)
    self._channels, self._width = channels, width

  def embed_rows(self, *args: Any, **options: Any) -> Embedded:
    """As `Model`, sliced."""
    full = super().embed_rows(*args, **options)
    kept = {name: keep_channels(getattr(full.embeddings, name), self._channels, self._width)
            for name in ("shared", "query")}  # fmt: skip
    return dataclasses.replace(full, embeddings=dataclasses.replace(full.embeddings, **kept))


def evaluate(model: Model, channels: Sequence[int], width: int) -> dict[str, tuple[float, float]]:
  """Metric -> (before, after) on the validation sets of the model's own data."""
  config = dataclasses.replace(model.config, test=False)
  evaluation = Evaluation(config, open_task(config.data), Feeder(config.data, config.model.towers, model.trunks))
  model.trunks = evaluation.trunks
  before = evaluation.everything(model)
  after = evaluation.everything(Sliced(model, np.asarray(channels), width))
  return {name: (value, after[name]) for name, value in before.items() if name in after and "/train/" not in name}

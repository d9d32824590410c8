"""From a config to the objects it names: the model and the quantiser's spec."""

from __future__ import annotations

from typing import Any

from flax.core import FrozenDict

from codebind_jax.compositional import CompositionalSpec
from codebind_jax.models.codebind import CodeBind, TowerSpec


def make_model(config: Any) -> CodeBind:
  """The towers of `config.model`."""
  towers = {
    name: TowerSpec(
      shared_dim=config.model.shared_dim,
      specific_dim=tower.specific_dim,
      hidden=tower.hidden,
      dropout=tower.dropout,
      init=tower.init,
      logit_scale=tower.logit_scale,
      meaning=tower.meaning,
      meaning_dim=tower.meaning_dim,
      body=tower.body,
      body_options=FrozenDict(tower.body_options.to_dict()),
    )
    for name, tower in config.model.towers.items()
  }
  return CodeBind(FrozenDict(towers))  # hashable, so that compiled steps can be shared


def make_spec(config: Any) -> CompositionalSpec | None:
  """The quantiser of `config.codebook`; None where `config.model.quantize` is off (the baseline)."""
  if not config.model.quantize:
    return None
  book = config.codebook
  return CompositionalSpec(
    shared_dim=config.model.shared_dim,
    specific_dims={name: tower.specific_dim for name, tower in config.model.towers.items()},
    code_dims=(book.dim, book.dim),
    num_codes=(book.shared_codes, 0),
    num_specific_codes=book.codes.to_dict(),
    layout=book.layout,
    distance=book.distance,
    normalize=book.normalize,
    decay=book.decay,
    revive=book.revive,
    revive_mode=book.revive_mode,
    detach_similarity=book.detach_similarity,
  )

"""Models whose towers are other than those of their run."""

import dataclasses

from codebind_jax import schema
from codebind_jax.api import Model


def uncached(model, modality):
  """The same model, whose trunk of a modality runs in it."""
  method, params = model._with_trunk(modality)
  towers = dict(model.config.model.towers)
  towers[modality] = dataclasses.replace(towers[modality], cache=False)
  spec = dataclasses.replace(model.config.model, towers=schema.Frozen(towers))
  return Model(dataclasses.replace(model.config, model=spec), params, model.codebooks, model.trunks)

"""The common base of all configs. Each key can be set on the command line: --config.KEY=VALUE.

The keys, their defaults and what they mean: `codebind_jax.config.Config` and the sections it names.
"""

from ml_collections import ConfigDict

from codebind_jax import schema
from codebind_jax.config import Config
from codebind_jax.models.towers import TowerSpec
from codebind_jax.stages import Stage
from codebind_jax.trunks import trunk_maker


def tower(trunk, *, options=(), **overrides):
  """One modality (`TowerSpec`): its trunk with all its options, and its heads."""
  config = ConfigDict(schema.defaults(TowerSpec))
  config.trunk = trunk
  config.options = ConfigDict(schema.defaults(trunk_maker(trunk)) | dict(options))
  config.update(overrides)
  return config


def stage(config, **overrides):
  """One stage (`Stage`); steps and batch size follow the top-level ones unless set."""
  entry = ConfigDict(schema.defaults(Stage))
  for key in ("steps", "batch_size"):  # a value given here must not reach the top-level key through its reference
    if key not in overrides:
      entry[key] = config.get_ref(key)
  entry.update(overrides)
  return entry


def get_config():
  """The default config, without towers and stages."""
  return ConfigDict(schema.defaults(Config))

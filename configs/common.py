"""The common base of all configs. Each key can be set on the command line: --config.KEY=VALUE.

The keys, their defaults and what they mean: `codebind_jax.config.Config` and the sections it names.
"""

from ml_collections import ConfigDict

from codebind_jax import schema
from codebind_jax.codebook.spec import stages_within
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


# A run that only starts its codebooks from another run's parameters: it has one step at least, at hardly any rate.
START = {"steps": 1, "learning_rate": 1e-7}
INDEX_BITS = 10  # of a code of `small_index`


def small_index(width, size, bits=INDEX_BITS):
  """Section `codebook` of an index of few bytes: residual codes, each the nearest (docs/codes.md compares).

  They start from the items of the training rows. The specific part, which a search does not need, has few codes.

  Args:
    width: of the shared part.
    size: bytes an item, at most.
    bits: of a code.
  """
  parts, stages = stages_within(width, size, bits)
  return {
    "dim": width // parts, "shared_codes": 1 << bits, "stages": stages, "positions": "own",
    "distance": "l2", "normalize": False, "unit_parts": True, "start": "kmeans", "revive": "none",
    "codes": {"image": 16},
  }  # fmt: skip

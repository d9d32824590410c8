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
  """One stage (`Stage`); steps and batch size follow the top-level ones unless set, here or on the command line."""
  entry = ConfigDict(schema.defaults(Stage))
  entry.update({key: config.get_oneway_ref(key) for key in ("steps", "batch_size")} | overrides)
  return entry


def get_config():
  """The default config, without towers and stages."""
  return ConfigDict(schema.defaults(Config))


def words_of(arg):
  """The words after a config's colon, with commas between them."""
  return [word for word in arg.split(",") if word]


def words_and_size(arg):
  """(the words after a config's colon that are no number; bytes an item of the small index that they ask for, or 0).

  Raises:
    ValueError: if there are several numbers.
  """
  words = words_of(arg)
  sizes = [word for word in words if word.isdecimal() and int(word)]
  if len(sizes) > 1:
    raise ValueError(f"config argument {arg!r}: got {len(sizes)} numbers of bytes an item; allowed: one")
  return [word for word in words if word not in sizes], int(sizes[0]) if sizes else 0


# A run that only starts its codebooks from another run's parameters: it has one step at least, at hardly any rate.
START = {"steps": 1, "learning_rate": 1e-7}
INDEX_BITS = 10  # of a code of `small_index`
# Trained as a search uses them: queries uncoded, items coded; the codes learn by what their items are found with.
SEARCHED = {"info_nce_asymmetric": 1.0, "commitment": 1.0}


def own_widths(model, width):
  """Section `codebook.dims` for codes of a width: of specific parts that are no multiple of it, their own."""
  return {m: t.specific_dim for m, t in model.towers.items() if t.specific_dim % width}


def small_index(model, size, bits=INDEX_BITS):
  """Section `codebook` of an index of few bytes: residual codes, each the nearest (docs/codes.md compares).

  They start from the items of the training rows. Specific parts, which a search does not need, have few codes.

  Args:
    model: section `model`, with its towers.
    size: bytes an item, at most.
    bits: of a code.
  """
  parts, stages = stages_within(model.shared_dim, size, bits)
  width = model.shared_dim // parts
  return {
    "dim": width, "dims": own_widths(model, width), "shared_codes": 1 << bits, "stages": stages, "positions": "own",
    "distance": "l2", "normalize": False, "unit_parts": True, "start": "kmeans", "revive": "none",
    "codes": {m: 16 for m, t in model.towers.items() if t.specific_dim},
  }  # fmt: skip


def start_small_index(config, size, start):
  """Makes of a config with one stage that of an index of few bytes an item.

  Its heads are not trained, so that it needs a run to start from; `start` is the folder unless `config.init_from` says
  another.
  """
  config.init_from = start
  config.codebook.update(small_index(config.model, size))
  config.steps, config.optim.learning_rate = START["steps"], START["learning_rate"]
  config.queries, config.baseline = "uncoded", False
  (stage,) = config.stage_order
  config.stages[stage].mixup, config.stages[stage].losses = 0.0, ConfigDict(SEARCHED)

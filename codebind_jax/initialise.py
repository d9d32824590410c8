"""Initial parameters of a run: of published checkpoints, whitened heads, copied heads, or those of another run.

Order: random, the trunks' checkpoints and published heads, `whiten`, `config.init_from`, the run's own checkpoint;
`starts_from` as a modality's stage begins.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from codebind_jax.api import config_of, load
from codebind_jax.config import Config
from codebind_jax.data.examples import Feed
from codebind_jax.models.towers import ModelSpec, TowerSpec, whitened
from codebind_jax.runtime import optim
from codebind_jax.runtime.sharding import Layout
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.trunks.base import Trunk
from codebind_jax.trunks.feeds import whitening_tokens


def load_published(params: Any, model: ModelSpec, trunks: Mapping[str, Trunk]) -> Any:
  """The parameters with the checkpoints' values of trunks that run in the model, and of published heads.

  Each array is read into the sharding and type of the one it replaces, which is freed before. Adapters keep their
  start.

  Args:
    params: of all towers.
    model: section.
    trunks: modality -> Trunk.

  Raises:
    ValueError: as the trunks' `load`.
  """
  params = dict(params)
  for name, tower in model.towers.items():
    trunk = trunks[name]
    parts = ["trunk"] * bool(not tower.cache and trunk.load) + ["head"] * (tower.head == "published")
    logging.info("%s: %s", name, f"{' and '.join(parts)} from the checkpoint" if parts else "random heads")
    if not tower.cache and trunk.load:
      params[name] = params[name] | {"trunk": _loaded(params[name]["trunk"], trunk.load)}
    if tower.head == "published" and trunk.head.load:
      params[name] = params[name] | {"shared": _loaded(params[name]["shared"], trunk.head.load)}
  return params


def _loaded(tree: Any, load: Callable[[Any], Any]) -> Any:
  """The tree with loaded values; adapters stay."""
  flat = flatten_dict(tree)
  own = {path: x for path, x in flat.items() if path[-1] not in ("lora_a", "lora_b")}
  shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for path, x in own.items()}
  for x in own.values():
    x.delete()
  return unflatten_dict(flat | flatten_dict(load(unflatten_dict(shapes))))


def whiten_heads(params: Any, towers: Mapping[str, TowerSpec], feeds: Mapping[str, Feed], layout: Layout) -> Any:
  """The parameters, with a whitening of the training tokens folded into shared heads where a tower sets `whiten`.

  Args:
    params: random parameters of the towers.
    towers: by modality.
    feeds: modality -> training items.
    layout: mesh and rules.
  """
  params = dict(params)
  for name, tower in towers.items():
    if tower.whiten and name in feeds:
      tokens = whitening_tokens(feeds[name])
      head = whitened(layout.gathered(params[name]["shared"]), tokens, tower.whiten)
      placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), head, params[name]["shared"])
      params[name] = dict(params[name]) | {"shared": placed}
  return params


def copy_heads(params: Any, towers: Mapping[str, TowerSpec], new: Collection[str]) -> Any:
  """The parameters, with the heads of the `new` modalities copied from those that their `starts_from` names.

  Raises:
    ValueError: if the two modalities' heads differ in shape.
  """
  params = dict(params)
  for name in sorted(new):
    source = towers[name].starts_from
    if source:
      shapes = [jax.tree.map(lambda x: x.shape, params[m]) for m in (name, source)]
      if shapes[0] != shapes[1]:
        raise ValueError(f"config.model.towers.{name}.starts_from: heads of {source!r} have shapes {shapes[1]}, "
                         f"those of {name!r} {shapes[0]}")
      params[name] = jax.tree.map(jnp.copy, params[source])
  return params


def check_start(config: Config) -> None:
  """Checks `config.init_from` before any work: that it can be loaded, and that common towers are alike.

  Raises:
    ValueError: naming the key that differs, or what is wrong with the path.
  """
  try:
    there = config_of(config.init_from)
  except ValueError as error:
    raise ValueError(f"config.init_from: {error}") from error
  common = [m for m in config.model.towers if m in there.model.towers]
  pairs = [("model.shared_dim", config.model, there.model, "shared_dim")] if common else []
  for name in common:
    for key in ("specific_dim", "hidden", "trunk"):
      pairs.append((f"model.towers.{name}.{key}", config.model.towers[name], there.model.towers[name], key))
  for path, ours, theirs, key in pairs:
    if getattr(ours, key) != getattr(theirs, key):
      raise ValueError(f"config.{path}: got {getattr(ours, key)!r}, but config.init_from {config.init_from!r} has "
                       f"{getattr(theirs, key)!r}; allowed: the same")  # fmt: skip


def start_from(state: TrainState, workdir: str) -> tuple[TrainState, tuple[str, ...]]:
  """(the state with the parameters and codebooks of another run, where it has them; that run's modalities).

  Raises:
    ValueError: if the folder holds no run, or one of its arrays has another shape than in the state.
  """
  model = load(workdir)
  here = optim.param_paths({"params": state.params, "codebooks": state.codebooks})
  saved = optim.param_paths({"params": model.params, "codebooks": model.codebooks})
  for path, value in saved.items():
    if path in here and here[path].shape != np.shape(value):
      raise ValueError(f"config.init_from: {workdir!r} has {path} of shape {np.shape(value)}, here {here[path].shape}")
  logging.info("starting from %s: %s; new: %s", workdir, ", ".join(model.modalities),
               ", ".join(sorted({path.split("/")[1] for path in set(here) - set(saved)})) or "nothing")
  pick = lambda prefix, tree: jax.tree_util.tree_map_with_path(
    lambda path, x: jax.device_put(saved.get(prefix + jax.tree_util.keystr(path, simple=True, separator="/"), x),
                                   x.sharding), tree,
  )  # fmt: skip
  state = state.replace(params=pick("params/", state.params), codebooks=pick("codebooks/", state.codebooks))
  return state, model.modalities

"""Initial parameters of a run: whitened heads, heads copied from another modality, or those of another run.

Order: random heads, `whiten`, `config.init_from`, the run's own checkpoint; `starts_from` as a modality's stage begins.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from codebind_jax.api import load
from codebind_jax.models.towers import TowerSpec, whitened
from codebind_jax.runtime import optim
from codebind_jax.runtime.sharding import Layout
from codebind_jax.runtime.train_state import TrainState


def whiten_heads(params: Any, towers: Mapping[str, TowerSpec], tables: Mapping[str, Any], layout: Layout) -> Any:
  """The parameters, with a whitening of the training tokens folded into shared heads where a tower sets `whiten`.

  Args:
    params: random parameters of the towers.
    towers: by modality.
    tables: modality -> FeatureTable of training rows.
    layout: mesh and rules.
  """
  params = dict(params)
  for name, tower in towers.items():
    if tower.whiten and name in tables:
      tokens = np.asarray(tables[name].features[:, 0, 0], np.float32)
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

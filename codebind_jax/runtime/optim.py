"""Optimizer: AdamW under one regex table that says, per parameter path, what trains and how."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from absl import logging

FROZEN = "frozen"


def param_paths(params: Any) -> dict[str, Any]:
  """Flat view of a parameter tree: `towers/image/shared/proj/kernel` -> leaf."""
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def match_rules(params: Any, rules: Sequence[tuple[str, Any]], *, what: str = "optim.rules") -> Any:
  """Tree of the value of the first rule whose regex matches the whole parameter path.

  Args:
    params: parameter tree (arrays or shapes).
    rules: (regex, value) pairs; the first match wins.
    what: name of the table, for the error.

  Raises:
    ValueError: if a parameter matches no rule.
  """
  def find(path: Any, _: Any) -> Any:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for pattern, value in rules:
      if re.fullmatch(pattern, name):
        return value
    raise ValueError(f"{what}: parameter {name!r} matches none of {[pattern for pattern, _ in rules]}")

  return jax.tree_util.tree_map_with_path(find, params)


def make_schedule(learning_rate: float, steps: int, warmup: int, final_ratio: float) -> optax.Schedule:
  """Linear warm-up, then cosine to `learning_rate * final_ratio` (release: 1/50)."""
  warmup = min(warmup, max(steps - 1, 0))
  return optax.warmup_cosine_decay_schedule(
    0.0 if warmup else learning_rate, learning_rate, warmup, max(steps, warmup + 1), learning_rate * final_ratio
  )


def make_optimizer(
  params: Any, trainable: Sequence[str], config: Mapping[str, Any], steps: int, *, frozen: Sequence[str] = ()
):
  """AdamW with clipping, frozen where no `trainable` pattern matches, tuned by `config.rules`.

  Args:
    params: parameter tree (arrays or shapes).
    trainable: regexes of the paths a stage trains; everything else is frozen.
    config: `learning_rate, warmup, final_ratio, b1, b2, weight_decay, clip_norm` and `rules`, a tuple of
      (regex, learning-rate multiplier, weight-decay multiplier).
    steps: optimizer steps of the stage.
    frozen: regexes of paths that do not train even if `trainable` names them.

  Returns:
    (optax transformation, table): `table` maps each path to "frozen" or to its learning rate and weight decay.

  Raises:
    ValueError: if a parameter matches no rule or nothing is trainable.
  """
  rules = [(pattern, (float(lr), float(decay))) for pattern, lr, decay in config["rules"]]
  settings = match_rules(params, rules)
  is_pair = lambda x: isinstance(x, tuple)

  def label(path: Any, setting: tuple[float, float]) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    matches = lambda patterns: any(re.fullmatch(pattern, name) for pattern in patterns)
    active = matches(trainable) and not matches(frozen) and setting[0] > 0
    return f"lr*{setting[0]:g} wd*{setting[1]:g}" if active else FROZEN

  labels = jax.tree_util.tree_map_with_path(label, settings, is_leaf=is_pair)
  kinds = sorted(set(jax.tree.leaves(labels)))
  if kinds == [FROZEN]:
    raise ValueError(f"stage.train: no parameter matches any of {list(trainable)}; paths: {list(param_paths(params))}")

  transforms: dict[str, optax.GradientTransformation] = {}
  for kind in kinds:
    if kind == FROZEN:
      transforms[kind] = optax.set_to_zero()
      continue
    lr, decay = (float(part.split("*")[1]) for part in kind.split())
    schedule = make_schedule(config["learning_rate"] * lr, steps, config["warmup"], config["final_ratio"])
    transforms[kind] = optax.adamw(
      schedule, b1=config["b1"], b2=config["b2"], weight_decay=config["weight_decay"] * decay
    )
  # Frozen gradients are zeroed before the norm is taken, so that only what trains is clipped.
  freeze = optax.masked(optax.set_to_zero(), jax.tree.map(lambda kind: kind == FROZEN, labels))
  tx = optax.chain(
    freeze, optax.clip_by_global_norm(config["clip_norm"]), optax.multi_transform(transforms, labels)
  )
  return tx, param_paths(labels)


def frozen(table: Mapping[str, str]) -> frozenset[str]:
  """Paths that do not train, from `make_optimizer`'s table."""
  return frozenset(path for path, kind in table.items() if kind == FROZEN)


def stop_frozen(params: Any, paths: frozenset[str]) -> Any:
  """The parameters, with no gradient through those at `paths`: none is computed, and none counts in a norm."""

  def stop(path: Any, x: Any) -> Any:
    return jax.lax.stop_gradient(x) if jax.tree_util.keystr(path, simple=True, separator="/") in paths else x

  return jax.tree_util.tree_map_with_path(stop, params) if paths else params


def log_table(params: Any, table: Mapping[str, str]) -> None:
  """Logs the resolved table: path, shape, what happens to it."""
  shapes = {path: tuple(leaf.shape) for path, leaf in param_paths(params).items()}
  width = max(len(path) for path in table)
  for path, kind in table.items():
    logging.info("  %-*s %-16s %s", width, path, shapes[path], kind)

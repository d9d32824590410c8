"""The optimizer: AdamW, with learning rate and weight decay of every parameter by one table of path regexes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import optax
from absl import logging

from codebind_jax.schema import Decay, Rate, Regex, Rule, above, at_least, at_most

FROZEN = "frozen"
_ALONE = Rule(
  lambda value: value == 1,
  "1. Gradients summed over small batches are not those of a large one here: a row would see the negatives of its "
  "small batch alone, and the codebooks would move in between. For a batch larger than memory set stages.*.parts, "
  "which gives exactly the large batch's step", 1, 1,
)  # fmt: skip
Factor = Annotated[float, at_least(0, "frozen"), at_most(1e6)]
WeightDecay = Annotated[float, at_least(0), at_most(1000)]


@dataclasses.dataclass(frozen=True)
class Optim:
  """Section `optim`: AdamW, its learning rate schedule, and the rules of single parameters.

  Attributes:
    learning_rate: peak of the schedule, after the warm-up.
    warmup: steps in which the rate grows linearly from 0, at the start of each stage.
    final_ratio: final learning rate of the cosine, as a share of the peak (release: 1/50).
    b1: decay of Adam's moving average of the gradients.
    b2: decay of Adam's moving average of their squares.
    weight_decay: decoupled weight decay, multiplied by the learning rate and by the rules.
    clip_norm: largest global norm of the gradients.
    accumulate: batches a step; only 1 is allowed, `stages.NAME.parts` is for batches larger than memory.
    rules: (regular expression of a parameter's path, multiplier of the learning rate, multiplier of the weight decay);
      the first match wins.
  """

  learning_rate: Rate = 1e-3
  warmup: Annotated[int, at_least(0)] = 50
  final_ratio: Annotated[float, at_least(0), at_most(1)] = 0.02
  b1: Decay = 0.9
  b2: Decay = 0.95
  weight_decay: WeightDecay = 1e-4
  clip_norm: Annotated[float, above(0)] = 1.0
  accumulate: Annotated[int, _ALONE] = 1
  rules: tuple[tuple[Regex, Factor, Annotated[float, at_least(0), at_most(1e6)]], ...] = (
    (r".*_log_logit_scale", 1.0, 0.0), (r".*(bias|scale)", 1.0, 0.0), (r".*kernel", 1.0, 1.0),
    (r"method/codes", 1.0, 0.0), (r"method/(codes|rotation)/.*", 1.0, 0.0), (r".*/decoder/positions", 1.0, 0.0),
    (r".*/trunk/.*", 1.0, 0.0),  # adapters, class tokens, positions, embeddings
  )  # fmt: skip


def param_paths(params: Any) -> dict[str, Any]:
  """Path -> leaf of a parameter tree, such as `image/shared/proj/kernel`."""
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def match_rules(params: Any, rules: Sequence[tuple[str, Any]], *, what: str = "optim.rules") -> Any:
  """For each parameter the value of the first rule whose regex matches its whole path, as a tree.

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
  params: Any, trainable: Sequence[str], settings: Optim, steps: int, *, frozen: Sequence[str] = ()
):
  """AdamW with clipping for the `trainable` parameters, with the multipliers of `settings.rules`; others are frozen.

  Args:
    params: parameter tree (arrays or shapes).
    trainable: regexes of the paths that a stage trains.
    settings: of the optimizer.
    steps: optimizer steps of the stage.
    frozen: regexes of paths that do not train even if `trainable` names them.

  Returns:
    (optax transformation, table): `table` maps each path to "frozen" or its multipliers, such as "lr*1 wd*0".

  Raises:
    ValueError: if a parameter matches no rule or nothing is trainable.
  """
  multipliers = match_rules(params, [(pattern, (rate, decay)) for pattern, rate, decay in settings.rules])
  is_pair = lambda x: isinstance(x, tuple)

  def label(path: Any, multiplier: tuple[float, float]) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    matches = lambda patterns: any(re.fullmatch(pattern, name) for pattern in patterns)
    active = matches(trainable) and not matches(frozen) and multiplier[0] > 0
    return f"lr*{multiplier[0]:g} wd*{multiplier[1]:g}" if active else FROZEN

  labels = jax.tree_util.tree_map_with_path(label, multipliers, is_leaf=is_pair)
  kinds = sorted(set(jax.tree.leaves(labels)))
  if kinds == [FROZEN]:
    raise ValueError(f"stage.train: no parameter matches any of {list(trainable)}; paths: {list(param_paths(params))}")

  transforms: dict[str, optax.GradientTransformation] = {}
  for kind in kinds:
    if kind == FROZEN:
      transforms[kind] = optax.set_to_zero()
      continue
    lr, decay = (float(part.split("*")[1]) for part in kind.split())
    schedule = make_schedule(settings.learning_rate * lr, steps, settings.warmup, settings.final_ratio)
    transforms[kind] = optax.adamw(
      schedule, b1=settings.b1, b2=settings.b2, weight_decay=settings.weight_decay * decay
    )
  # Frozen gradients are zeroed before the norm is taken, so that only what trains is clipped.
  freeze = optax.masked(optax.set_to_zero(), jax.tree.map(lambda kind: kind == FROZEN, labels))
  tx = optax.chain(
    freeze, optax.clip_by_global_norm(settings.clip_norm), optax.multi_transform(transforms, labels)
  )
  return tx, param_paths(labels)


def frozen(table: Mapping[str, str]) -> frozenset[str]:
  """Paths of the frozen parameters in `make_optimizer`'s table."""
  return frozenset(path for path, kind in table.items() if kind == FROZEN)


def stop_frozen(params: Any, paths: frozenset[str]) -> Any:
  """The parameters, those at `paths` behind a stop-gradient: their gradients are not computed and add to no norm."""

  def stop(path: Any, x: Any) -> Any:
    return jax.lax.stop_gradient(x) if jax.tree_util.keystr(path, simple=True, separator="/") in paths else x

  return jax.tree_util.tree_map_with_path(stop, params) if paths else params


def log_table(params: Any, table: Mapping[str, str]) -> None:
  """Logs path, shape and entry of the parameters that train by `make_optimizer`'s table, and how many others there are.

  Layers of a stack, whose paths differ in numbers alone, share a line, in which `*` stands for the numbers.
  """
  shapes = {path: tuple(leaf.shape) for path, leaf in param_paths(params).items()}
  lines: dict[tuple[str, tuple[int, ...], str], int] = {}
  still: dict[str, int] = {}
  for path, kind in table.items():
    if kind == FROZEN:
      tower = path.partition("/")[0]
      still[tower] = still.get(tower, 0) + 1
    else:
      line = re.sub(r"(?<=[_/])\d+(?=/|$)", "*", path), shapes[path], kind
      lines[line] = lines.get(line, 0) + 1
  width = max(len(path) for path, _, _ in lines)
  for (path, shape, kind), count in lines.items():
    logging.info("  %-*s %-16s %s%s", width, path, shape, kind, f" ({count} of them)" if count > 1 else "")
  if still:
    named = ", ".join(f"{tower} ({count})" if count > 1 else tower for tower, count in still.items())
    logging.info("  frozen: %s", named)

"""The loss balancer: weights that hold every term at a set fraction of the base term's magnitude, as a state update."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

# Magnitude of a term relative to the base, by name. Terms that are neither here nor fixed need an entry of their own.
FACTORS = {
  "commitment": 0.01,
  "code_matching": 0.1,
  "code_contrast": 0.1,
  "code_uniform": 0.1,
  "decomposition": 0.1,
  "specific_uniform": 1.0,
  "info_nce_plain": 1.0,  # this and the next two are not the release's
  "info_nce_asymmetric": 1.0,
  "decorrelation": 0.1,
}


@struct.dataclass
class BalanceState:
  """Magnitudes and weights of the terms. A pytree of scalars; the settings are static.

  Attributes:
    magnitude: by term, its moving average (of the absolute value; of the value for the base), 0 before it is first
      seen.
    weight: by term, its factor in the total.
    count: updates so far.
    since: updates since the weights were last set.
    interval: updates between two settings of the weights.
  """

  magnitude: Any
  weight: Any
  count: Any
  since: Any
  interval: Any
  base: str = struct.field(pytree_node=False)
  factors: tuple[tuple[str, float], ...] = struct.field(pytree_node=False)
  limits: tuple[tuple[str, float], ...] = struct.field(pytree_node=False)
  momentum: float = struct.field(pytree_node=False)
  intervals: tuple[int, int] = struct.field(pytree_node=False)
  max_steps: int = struct.field(pytree_node=False)


def balance_init(
  names: Sequence[str],
  *,
  base: str = "info_nce",
  fixed: Sequence[str] = ("info_nce", "reconstruction"),
  factors: Mapping[str, float] | None = None,
  limits: Mapping[str, float] | None = None,
  momentum: float = 0.9,
  min_interval: int = 10,
  max_interval: int = 100,
  max_steps: int = 40000,
) -> BalanceState:
  """A balancer that has seen nothing; all weights are 1.

  Args:
    names: terms of the total loss.
    base: the term whose magnitude the others follow.
    fixed: terms whose weight stays 1.
    factors: target magnitude by term, relative to the base; added to `FACTORS`.
    limits: largest weight by term; 1e4 unless given, so that a term that starts at 0 does not blow up.
    momentum: of the moving averages.
    min_interval: updates between two settings of the weights, at the start.
    max_interval: the same after `max_steps` updates, reached along a quarter of a sine.
    max_steps: see `max_interval`.

  Raises:
    ValueError: if a term is neither fixed nor has a factor, or `base` is not among `names`.
  """
  factors = {**FACTORS, **(factors or {})}
  unknown = [name for name in names if name not in factors and name not in fixed]
  if unknown or base not in names:
    raise ValueError(f"names need a factor or a fixed weight and must hold the base {base!r}; got {unknown or names}")
  return BalanceState(
    magnitude={name: jnp.zeros((), jnp.float32) for name in names},
    weight={name: jnp.ones((), jnp.float32) for name in names},
    count=jnp.zeros((), jnp.int32),
    since=jnp.zeros((), jnp.int32),
    interval=jnp.asarray(min_interval, jnp.int32),
    base=base,
    factors=tuple(sorted((name, float(factors[name])) for name in names if name not in fixed)),
    limits=tuple(sorted({**dict.fromkeys(names, 1e4), **(limits or {})}.items())),
    momentum=momentum,
    intervals=(min_interval, max_interval),
    max_steps=max_steps,
  )


def balance_update(state: BalanceState, raw_losses: Mapping[str, float | Array]) -> BalanceState:
  """Follows the terms' magnitudes and, at each interval's end, sets weight = base magnitude * factor / own magnitude.

  The total of a step is `sum(new.weight[name] * raw)`. Terms that are missing keep what they have; a term seen for
  the first time gets its weight at once. No gradient passes. Evaluation does not call it and uses
  `state.weight` as it is.

  Args:
    state: the balancer.
    raw_losses: unweighted terms of this step.

  Raises:
    ValueError: for a term that is not among the `names` of `balance_init`.
  """
  unknown = sorted(set(raw_losses) - set(state.weight))
  if unknown:
    raise ValueError(f"the balancer knows {sorted(state.weight)}, got {unknown}")
  raw = {name: jax.lax.stop_gradient(jnp.asarray(value, jnp.float32)) for name, value in raw_losses.items()}
  due = state.since + 1 >= state.interval
  magnitude, weight = dict(state.magnitude), dict(state.weight)
  unseen = {}
  for name, value in raw.items():
    unseen[name] = magnitude[name] == 0
    value = jnp.where(unseen[name] | (name != state.base), jnp.abs(value), value)
    average = state.momentum * magnitude[name] + (1 - state.momentum) * value
    magnitude[name] = jnp.where(unseen[name], value, jnp.where(due, average, magnitude[name]))
  limits = dict(state.limits)
  for name, factor in state.factors:
    if name in raw:
      new = jnp.minimum(magnitude[state.base] * factor / (magnitude[name] + 1e-8), limits[name])
      weight[name] = jnp.where(due | unseen[name], new, weight[name])
  low, high = state.intervals
  progress = jnp.minimum(1.0, state.count / state.max_steps)
  interval = (low + (high - low) * jnp.sin(0.5 * jnp.pi * progress)).astype(jnp.int32)
  first = state.count == 0
  return state.replace(
    magnitude=magnitude,
    weight=weight,
    count=state.count + 1,
    since=jnp.where(due | first, 0, state.since + 1),
    interval=jnp.where(due & ~first, interval, state.interval),
  )

"""TrainState, everything that a training step changes: its creation, its shapes, and steps that are not finite."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from codebind_jax.runtime.sharding import Layout


@flax.struct.dataclass
class TrainState:
  """All that a step reads and writes; a checkpoint holds all of it.

  Attributes:
    step: int32 [], optimizer steps done, over all stages.
    params: parameters of towers, heads and logit scales.
    codebooks: name -> CodebookState; outside `params`, so that no optimizer, decay or LoRA pattern reaches them.
    opt_state: optax state of the current stage.
    aux: loss balancer, momentum teacher, queue; empty where not used.
    rng: typed PRNG key; a step folds its number into it.
  """

  step: Any
  params: Any
  codebooks: Any
  opt_state: Any
  aux: Any
  rng: Any


Init = Callable[[Any], tuple[Any, Any, Any]]


def _initial(init: Init, rng: Any) -> TrainState:
  params, codebooks, aux = init(jax.random.fold_in(rng, 0))
  step = jnp.zeros((), jnp.int32)
  return TrainState(step, params, codebooks, (), aux, jax.random.fold_in(rng, 1))


def shapes(init: Init) -> TrainState:
  """Shapes and types of the initial state."""
  return jax.eval_shape(functools.partial(_initial, init), jax.random.key(0))


def creator(layout: Layout, init: Init) -> Callable[[Any], TrainState]:
  """Typed PRNG key -> the initial state, created in its shardings: no device ever holds it all.

  Args:
    layout: mesh and rules.
    init: key -> (params, codebooks, aux); pure and jittable.

  Returns:
    A jitted function; its state is at step 0 and has no optimizer state (see `with_optimizer`).
  """
  make = jax.jit(lambda data, impl: _initial(init, jax.random.wrap_key_data(data, impl=impl)),
                 static_argnums=1, out_shardings=layout.of(shapes(init)))  # fmt: skip
  # As numpy, which jit takes as replicated over all processes; a key on one device is not.
  return lambda rng: make(np.asarray(jax.random.key_data(rng)), str(jax.random.key_impl(rng)))


def create(layout: Layout, rng: Any, init: Init) -> TrainState:
  """The initial state for one key, see `creator`."""
  return creator(layout, init)(rng)


def optimizer_init(params: Any, tx: optax.GradientTransformation, layout: Layout) -> Callable[[Any], Any]:
  """Parameters -> a new optimizer state of `tx`, placed on the mesh; jitted for these parameters' shapes."""
  return jax.jit(tx.init, out_shardings=layout.of(jax.eval_shape(tx.init, params), "opt_state"))


def with_optimizer(state: TrainState, tx: optax.GradientTransformation, layout: Layout) -> TrainState:
  """The state with a new optimizer state of `tx`, as at the start of a stage."""
  return state.replace(opt_state=optimizer_init(state.params, tx, layout)(state.params))


def abstract(state: TrainState, tx: optax.GradientTransformation, layout: Layout) -> TrainState:
  """Shapes, types and shardings of `state` (arrays or shapes) with `tx`: the target of a checkpoint's restoration."""
  state = jax.eval_shape(lambda s: s.replace(opt_state=tx.init(s.params)), state)
  place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(place, state, layout.of(state))


def advance(state: TrainState, new: TrainState, finite: Any) -> TrainState:
  """The new state if the step was finite; else the old one with its step number inverted, which stops all later steps.

  So the device keeps the state before the bad step until the host checks, and no step waits for the host.

  Args:
    state: before the step.
    new: after it.
    finite: bool [].
  """
  alive = state.step >= 0
  stopped = state.replace(step=jnp.where(alive, ~state.step, state.step))
  keys = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  choose = lambda a, b: a if keys(a) else jnp.where(alive & finite, a, b)
  return jax.tree.map(choose, new, stopped)


def guarded(step: Callable[..., Any]) -> Callable[..., Any]:
  """The training step with `advance`: a metric that is not finite keeps the old state and stops later steps."""

  def run(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
    new, metrics = step(state, batch)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(value)) for value in metrics.values()]))
    return advance(state, new, finite), metrics

  return run

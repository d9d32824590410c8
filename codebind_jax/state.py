"""TrainState: everything that changes while training, and how it is first made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import optax
from jax.sharding import Mesh

from codebind_jax.sharding import replicated


@flax.struct.dataclass
class TrainState:
  """All that a step reads and writes; a checkpoint holds it whole.

  Attributes:
    step: int32 [], optimizer steps done, over all stages.
    params: parameters of towers, heads and logit scales.
    codebooks: name -> CodebookState; outside `params`, so no optimizer, decay or LoRA pattern reaches them.
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


def create(mesh: Mesh, rng: Any, init: Callable[[Any], tuple[Any, Any, Any]]) -> TrainState:
  """Makes the first state already placed on the mesh; nothing is materialised on one device.

  Args:
    mesh: device mesh.
    rng: typed PRNG key.
    init: key -> (params, codebooks, aux); pure and jittable.

  Returns:
    A state at step 0 without optimizer state (see `with_optimizer`).
  """

  def build(key: Any) -> TrainState:
    params, codebooks, aux = init(jax.random.fold_in(key, 0))
    step = jax.numpy.zeros((), jax.numpy.int32)
    return TrainState(step, params, codebooks, (), aux, jax.random.fold_in(key, 1))

  return jax.jit(build, out_shardings=replicated(mesh))(rng)


def with_optimizer(state: TrainState, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """The state with a fresh optimizer state of `tx`, as at the start of a stage."""
  return state.replace(opt_state=jax.jit(tx.init, out_shardings=replicated(mesh))(state.params))


def abstract(state: TrainState, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Shapes, types and shardings of `state` under `tx`: the target a checkpoint is restored into."""
  shapes = jax.eval_shape(lambda s: s.replace(opt_state=tx.init(s.params)), state)
  sharding = replicated(mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)

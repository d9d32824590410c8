"""Optimal transport between two discrete distributions: the proximal point method (IPOT) and Sinkhorn's.

Both work on logarithms, so that a large cost or a marginal of 0 neither overflows nor divides by zero, and are
differentiable, though the losses treat a plan as a constant.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from codebind_jax.norm import wide

_Marginal = Float[Array | np.ndarray, "_"]


@functools.partial(jax.jit, static_argnames=("beta", "outer", "inner"))
def ipot(
  cost: Float[Array | np.ndarray, "n m"],
  a: _Marginal | None = None,
  b: _Marginal | None = None,
  *,
  beta: float = 0.5,
  outer: int = 50,
  inner: int = 1,
) -> Float[Array, "n m"]:
  """Plan of the inexact proximal point method (Xie et al., arXiv 1802.04307, algorithm 1).

  T = 1; repeat `outer` times: Q = exp(-cost / beta) * T, then `inner` times delta = a / (Q sigma), sigma = b /
  (Q^T delta), and T = diag(delta) Q diag(sigma). It tends to the plan of the transport problem *without*
  regularisation; with the inner loop converged, t outer steps are Sinkhorn's plan of `reg = beta / t`. Column
  marginals are exact after every step, row marginals in the limit.

  Args:
    cost: cost of moving row i's mass to column j, finite.
    a: mass of the rows; None for 1/n each. A row of mass 0 takes no part.
    b: mass of the columns; None for 1/m each.
    beta: size of a proximal step, in units of the cost.
    outer: proximal steps.
    inner: scalings of rows and columns in each.

  Raises:
    ValueError: for marginals of the wrong length, or numbers that are not positive.
  """
  cost, log_a, log_b = _prepare(cost, a, b, "beta", beta, min(outer, inner))

  def step(_, carry):
    plan, _, log_sigma = carry
    kernel = plan - cost / beta

    def scale(_, scalings):
      log_delta = _divide(log_a, kernel + scalings[1][None], axis=1)
      return log_delta, _divide(log_b, kernel + log_delta[:, None], axis=0)

    log_delta, log_sigma = jax.lax.fori_loop(0, inner, scale, (log_a, log_sigma))
    return log_delta[:, None] + kernel + log_sigma[None], log_delta, log_sigma

  start = (jnp.zeros_like(cost), log_a, jnp.full_like(log_b, -jnp.log(cost.shape[1])))
  return jnp.exp(jax.lax.fori_loop(0, outer, step, start)[0])


@functools.partial(jax.jit, static_argnames=("reg", "iterations"))
def sinkhorn(
  cost: Float[Array | np.ndarray, "n m"],
  a: _Marginal | None = None,
  b: _Marginal | None = None,
  *,
  reg: float,
  iterations: int,
) -> Float[Array, "n m"]:
  """Plan of entropy-regularised transport (Cuturi, 2013): columns and then rows are scaled, `iterations` times.

  Args:
    cost: as for `ipot`.
    a: mass of the rows; None for 1/n each. Row marginals are exact.
    b: mass of the columns; None for 1/m each.
    reg: weight of the entropy, in units of the cost.
    iterations: scalings.

  Raises:
    ValueError: as `ipot`.
  """
  cost, log_a, log_b = _prepare(cost, a, b, "reg", reg, iterations)
  kernel = -cost / reg

  def scale(_, scalings):
    log_v = _divide(log_b, kernel + scalings[0][:, None], axis=0)
    return _divide(log_a, kernel + log_v[None], axis=1), log_v

  start = (jnp.full_like(log_a, -jnp.log(cost.shape[0])), log_b)
  log_u, log_v = jax.lax.fori_loop(0, iterations, scale, start)
  return jnp.exp(log_u[:, None] + kernel + log_v[None])


def _prepare(cost, a, b, name, step, count):
  """Checked cost, and the logarithms of both marginals."""
  cost = wide(cost)
  if not step > 0 or count < 1:
    raise ValueError(f"{name} and the numbers of iterations must be positive, got {step} and {count}")
  logs = []
  for side, mass, size in (("a", a, cost.shape[0]), ("b", b, cost.shape[1])):
    mass = jnp.full(size, 1.0 / size, cost.dtype) if mass is None else jnp.asarray(mass, cost.dtype)
    if mass.shape != (size,):
      raise ValueError(f"marginal {side} must have length {size} for a cost of shape {cost.shape}, got {mass.shape}")
    logs.append(jnp.log(mass))
  return cost, *logs


def _divide(log_mass, log_terms, axis):
  """log(mass / sum of terms); the quotient is 0 where the mass or the sum is."""
  empty = jnp.isneginf(log_mass)
  total = jax.nn.logsumexp(jnp.where(jnp.expand_dims(empty, axis), 0.0, log_terms), axis=axis)
  return jnp.where(empty | jnp.isneginf(total), -jnp.inf, log_mass - total)

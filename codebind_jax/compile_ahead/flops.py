"""Floating-point operations of matrix products and convolutions in a traced function, loops counted by their length."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def count(function: Callable[..., Any], *args: Any) -> int:
  """Operations of `function(*args)` (arrays or shapes), two for a multiply-add; unused results do not count.

  A conditional counts as its most expensive branch, a `while` without a known length as one trip.
  """
  closed = jax.make_jaxpr(function)(*args)
  jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
  return _of(jaxpr)


def _of(jaxpr: Any) -> int:
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    elif name == "conv_general_dilated":
      kernel, dims = equation.invars[1].aval.shape, params["dimension_numbers"]
      inner = math.prod(kernel) // kernel[dims.rhs_spec[0]]
      total += 2 * math.prod(equation.outvars[0].aval.shape) * inner
    elif name == "scan":
      total += params["length"] * _of(params["jaxpr"].jaxpr)
    elif name == "cond":
      total += max(_of(branch.jaxpr) for branch in params["branches"])
    else:
      total += sum(_of(inner) for inner in _inner(params))
  return total


def _inner(params: dict[str, Any]) -> list[Any]:
  """The jaxprs that an operation calls."""
  jaxprs = []
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        jaxprs.append(item.jaxpr)
      elif isinstance(item, core.Jaxpr):
        jaxprs.append(item)
  return jaxprs

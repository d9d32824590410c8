"""L2 normalisation with a finite gradient everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Vectors whose largest entry is below this count as zero, as in the eps of torch's `normalize`.
_ZERO = 1e-12


def wide(x: Float[Array | np.ndarray, "..."]) -> Float[Array, "..."]:
  """x in float32, or in float64 if it is float64 and `jax.enable_x64` is on."""
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def unit(x: Float[Array | np.ndarray, "..."], axis: int = -1) -> Float[Array, "..."]:
  """L2-normalises along one axis, in float32 (or float64, as `wide`).

  A zero vector stays zero and gets a zero gradient; huge vectors do not overflow, because each is first divided by its
  largest entry (a constant for the gradient, because the result does not depend on it).

  Args:
    x: vectors of any float type.
    axis: the axis that holds the components of a vector.

  Returns:
    vectors of norm one, or zero.
  """
  x = wide(x)
  if x.shape[axis] == 0:
    return x
  largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
  zero = largest < _ZERO
  x = jnp.where(zero, 0.0, x / jnp.where(zero, 1.0, largest))
  square = jnp.sum(x * x, axis=axis, keepdims=True)
  return x / jnp.sqrt(jnp.where(zero, 1.0, square))

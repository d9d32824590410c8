"""Which rows of a batch count, and which of them are each other's negatives."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

MASKED_LOGIT = -1e30  # of a pair that does not count; finite, so that a row without any pair has a finite gradient


def distinct(groups: Int[Array | np.ndarray, "b"]) -> Bool[Array, "b b"]:
  """Whether row j counts in the softmax of row i: rows of other groups are negatives, row i itself is the positive."""
  groups = jnp.asarray(groups)
  return (groups[:, None] != groups) | jnp.eye(groups.shape[0], dtype=bool)


def masked_mean(terms: Float[Array, "b"], mask: Bool[Array | np.ndarray, "b"] | None) -> Float[Array, ""]:
  """Mean of the terms where `mask` is True, 0 if it is nowhere; of all terms for None."""
  if mask is None:
    return jnp.mean(terms)
  mask = jnp.asarray(mask, jnp.bool_)
  return jnp.sum(jnp.where(mask, terms, 0.0)) / jnp.maximum(jnp.sum(mask), 1)

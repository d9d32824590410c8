"""Small networks that only a loss needs: the Gaussian of CLUB and the predictor of CPC."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class ConditionalGaussian(nn.Module):
  """q(y|x) of CLUB: mean and log-variance by two networks of three hidden layers each, as the release of DCID has them.

  The log-variance ends in a tanh, so it stays between -1 and 1.
  """

  width: int
  hidden: int = 128

  @nn.compact
  def __call__(
    self, x: Float[Array | np.ndarray, "*lead c"]
  ) -> tuple[Float[Array, "*lead d"], Float[Array, "*lead d"]]:
    """(mean, log-variance) of y, of `width` each."""

    def network(name):
      h = x
      for i in range(3):
        h = nn.relu(nn.Dense(self.hidden, name=f"{name}{i}")(h))
      return nn.Dense(self.width, name=f"{name}3")(h)

    return network("mean"), jnp.tanh(network("logvar"))


class FuturePredictor(nn.Module):
  """The context c_t of a sequence up to each step, by LSTMs, and a linear prediction of each of the next steps.

  The paper (DCID) has one LSTM layer, its release two.
  """

  width: int
  steps: int = 1
  layers: int = 1

  @nn.compact
  def __call__(self, x: Float[Array | np.ndarray, "b t c"]) -> Float[Array, "b t k d"]:
    """Predictions, from every step t, of the steps t + 1, t + 2, ..."""
    for i in range(self.layers):
      cell = nn.OptimizedLSTMCell(self.width, param_dtype=jnp.promote_types(x.dtype, jnp.float32))
      x = nn.RNN(cell, name=f"lstm{i}")(x)
    return jnp.stack([nn.Dense(self.width, name=f"predict{k}")(x) for k in range(self.steps)], axis=2)

"""Networks that serve a loss alone: the Gaussian of CLUB, with its own training, and the predictor of CPC."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from codebind_jax.losses.mutual_information import club_likelihood


class ConditionalGaussian(nn.Module):
  """q(y|x) of CLUB: mean and log-variance by two networks of three hidden layers each, as in the release of DCID.

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


def club_start(net: ConditionalGaussian, rng: Any, x: Float[Array, "*lead c"]) -> dict[str, Any]:
  """Parameters of the network and its Adam state, to be kept in `TrainState.aux`."""
  params = net.init(rng, x)["params"]
  return {"params": params, "adam": optax.adam(0.0).init(params)}


def club_fit(
  net: ConditionalGaussian, state: dict[str, Any], x: Float[Array, "*lead c"], y: Float[Array, "*lead d"], *,
  steps: int = 5, learning_rate: float = 1e-3, mask: Bool[Array, "b"] | None = None,
) -> dict[str, Any]:
  """Inner steps of a batch: Adam on the likelihood of y given x; no gradient reaches x, y or the main loss."""
  x, y, state = jax.lax.stop_gradient((x, y, state))
  tx = optax.adam(learning_rate)

  def step(_: Any, state: dict[str, Any]) -> dict[str, Any]:
    loss = lambda p: -club_likelihood(*net.apply({"params": p}, x), y, mask=mask)
    updates, adam = tx.update(jax.grad(loss)(state["params"]), state["adam"])
    return {"params": optax.apply_updates(state["params"], updates), "adam": adam}

  return jax.lax.stop_gradient(jax.lax.fori_loop(0, steps, step, state))


class FuturePredictor(nn.Module):
  """LSTMs give the context c_t of a sequence up to each step, linear layers predict each of the next steps from it.

  The paper (DCID) has one LSTM layer, its release two.

  Attributes:
    width: of the predicted vectors.
    steps: number of steps predicted.
    layers: number of LSTM layers.
    context: width of c_t; 0 for that of the predicted vectors.
  """

  width: int
  steps: int = 1
  layers: int = 1
  context: int = 0

  @nn.compact
  def __call__(self, x: Float[Array | np.ndarray, "b t c"]) -> Float[Array, "b t k d"]:
    """Predictions, from every step t, of the steps t + 1, t + 2, ..."""
    for i in range(self.layers):
      cell = nn.OptimizedLSTMCell(self.context or self.width, param_dtype=jnp.promote_types(x.dtype, jnp.float32))
      x = nn.RNN(cell, name=f"lstm{i}")(x)
    return jnp.stack([nn.Dense(self.width, name=f"predict{k}")(x) for k in range(self.steps)], axis=2)

"""A batch in parts trains like the batch in one, in the memory of a part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax.runtime.gradient_cache import in_parts
from tests import layout_worker


@pytest.mark.usefixtures("quick_compiler")
def test_steps_in_parts_equal_steps_of_the_whole_batch_codebooks_included():
  states = {}
  for parts in (1, 4):
    config = layout_worker.config_of("1x1x1", **{"stages.bridges.parts": parts})
    states[parts] = layout_worker.whole(*layout_worker.train(config, jax.devices()[:1])[:2])
  assert any(path.startswith("codebooks/image") for path in states[1])
  for path, value in states[1].items():
    np.testing.assert_allclose(states[4][path], value, atol=1e-5, rtol=0, err_msg=path)


def test_activations_of_one_part_are_held_at_once():
  def apply(params, tokens, rng):
    x = tokens["x"]
    for _ in range(6):
      x = jnp.tanh(x @ params)
    return {"x": x}, {"x": jnp.float32(1.0)}

  def loss(params, x, parts):
    features, _ = in_parts(apply, params, {"x": x}, jax.random.key(0), parts)
    return jnp.sum(jax.nn.logsumexp(features["x"][:, 0] @ features["x"][:, 0].T, axis=1))

  def gradient(parts):
    shapes = jax.ShapeDtypeStruct((32, 32), jnp.float32), jax.ShapeDtypeStruct((512, 16, 32), jnp.float32)
    return jax.jit(jax.grad(loss), static_argnums=2).lower(*shapes, parts).compile()

  whole, parts = (gradient(n).memory_analysis().temp_size_in_bytes for n in (1, 16))
  assert parts < whole / 2
  rng = np.random.default_rng(0)
  arrays = rng.normal(size=(32, 32)).astype(np.float32) / 6, rng.normal(size=(512, 16, 32)).astype(np.float32)
  np.testing.assert_allclose(gradient(16)(*arrays), gradient(1)(*arrays), rtol=2e-4, atol=2e-4)


def test_rows_that_do_not_divide_are_named():
  with pytest.raises(ValueError, match=r"stages.\*.parts: 6 rows of 'x' do not divide into 4 parts"):
    in_parts(lambda *_: None, None, {"x": jnp.zeros((6, 1, 1))}, jax.random.key(0), 4)

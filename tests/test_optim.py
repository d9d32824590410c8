"""The one table of path patterns, the schedule and the mesh, against hand computations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from codebind_jax.runtime import optim, sharding

SETTINGS = optim.Optim(
  learning_rate=0.1, warmup=0, final_ratio=0.02, b1=0.9, b2=0.95, weight_decay=0.5, clip_norm=1e9,
  rules=((r".*bias", 1.0, 0.0), (r"a/.*", 0.5, 1.0), (r".*", 1.0, 1.0)),
)  # fmt: skip
PARAMS = {"a": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "b": {"kernel": jnp.ones(2)}}


def test_first_match_decides_and_frozen_stays():
  tx, table = optim.make_optimizer(PARAMS, (r"a/.*",), SETTINGS, steps=10)
  assert table == {"a/bias": "lr*1 wd*0", "a/kernel": "lr*0.5 wd*1", "b/kernel": "frozen"}
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
  # Adam's first step is the sign of the gradient; decay adds 0.5 * parameter before the learning rate.
  np.testing.assert_allclose(updates["a"]["bias"], -0.1, rtol=1e-5)
  np.testing.assert_allclose(updates["a"]["kernel"], -0.05 * 1.5, rtol=1e-5)
  np.testing.assert_array_equal(updates["b"]["kernel"], 0.0)


def test_frozen_gradients_do_not_count_in_the_clipping():
  tx, _ = optim.make_optimizer(PARAMS, (r"a/bias",), dataclasses.replace(SETTINGS, clip_norm=1.0), steps=10)
  big = {"a": {"kernel": jnp.full(2, 1e6), "bias": jnp.full(2, 0.1)}, "b": {"kernel": jnp.full(2, 1e6)}}
  _, state = tx.update(big, tx.init(PARAMS), PARAMS)
  moments = [s for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, optax.ScaleByAdamState))
             if isinstance(s, optax.ScaleByAdamState)]
  np.testing.assert_allclose(moments[0].mu["a"]["bias"], 0.01, rtol=1e-5)


def test_unmatched_parameter_and_empty_stage_are_errors():
  with pytest.raises(ValueError, match=r"parameter 'b/kernel' matches none of \['a/.*'\]"):
    optim.match_rules(PARAMS, [("a/.*", 1)])
  with pytest.raises(ValueError, match=r"parameter 'a/bias' matches none of \['a'"):  # a pattern is of the whole path
    optim.match_rules(PARAMS, [("a", 1), ("b/.*", 1)])
  for pattern in ("c/.*", "a"):
    with pytest.raises(ValueError, match="no parameter matches any of"):
      optim.make_optimizer(PARAMS, (pattern,), SETTINGS, steps=10)


def test_two_steps_are_those_of_adam_by_hand():
  tx, _ = optim.make_optimizer(PARAMS, (r"a/bias",), SETTINGS, steps=10)
  state, gradients = tx.init(PARAMS), (1.0, -3.0)
  for gradient in gradients:
    updates, state = tx.update(optax.tree.full_like(PARAMS, gradient), state, PARAMS)
  mean = (0.9 * 0.1 * gradients[0] + 0.1 * gradients[1]) / (1 - 0.9**2)
  square = (0.95 * 0.05 * gradients[0] ** 2 + 0.05 * gradients[1] ** 2) / (1 - 0.95**2)
  rate = optim.make_schedule(0.1, steps=10, warmup=0, final_ratio=0.02)(1)
  np.testing.assert_allclose(updates["a"]["bias"], -rate * mean / np.sqrt(square), rtol=1e-4)


def test_schedule_warms_up_and_ends_at_the_ratio():
  schedule = optim.make_schedule(0.5, steps=100, warmup=10, final_ratio=0.02)
  np.testing.assert_allclose([schedule(0), schedule(5), schedule(10), schedule(100)], [0.0, 0.25, 0.5, 0.01], atol=1e-6)


def test_mesh_fills_and_refuses():
  assert dict(sharding.make_mesh(sharding.MeshShape()).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
  with pytest.raises(ValueError, match=r"mesh: .* does not fit 1 devices"):
    sharding.make_mesh(sharding.MeshShape(data=3))


def test_the_log_names_what_trains_and_counts_what_does_not(caplog):
  params = {"image": {"block_0": np.zeros(3), "block_1": np.zeros(3), "head": np.zeros((2, 3))}, "text": np.zeros(4),
            "audio": {"a": np.zeros(1), "b": np.zeros(1)}}  # fmt: skip
  table = {"image/block_0": "lr*1 wd*1", "image/block_1": "lr*1 wd*1", "image/head": "lr*0.1 wd*0", "text": "frozen",
           "audio/a": "frozen", "audio/b": "frozen"}  # fmt: skip
  with caplog.at_level("INFO"):
    optim.log_table(params, table)
  assert [record.getMessage().split() for record in caplog.records] == [
    ["image/block_*", "(3,)", "lr*1", "wd*1", "(2", "of", "them)"], ["image/head", "(2,", "3)", "lr*0.1", "wd*0"],
    ["frozen:", "text,", "audio", "(2)"],
  ]  # fmt: skip

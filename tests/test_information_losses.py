"""CLUB and CPC: recorded numbers of the release, closed forms, and invariants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from codebind_jax.losses import club_estimate, club_likelihood, cpc, cross_cpc
from codebind_jax.models.critics import ConditionalGaussian, FuturePredictor, club_fit
from tests.golden_fixtures import close, gaussian, load, predictor


@pytest.fixture(autouse=True, scope="module")
def double():
  jax.config.update("jax_disable_most_optimizations", True)
  with jax.enable_x64(True):
    yield
  jax.config.update("jax_disable_most_optimizations", False)


CLUB, CPC = load("cmg_club"), load("cmg_cpc")
NET = ConditionalGaussian(12, 10)


@pytest.mark.parametrize("case, options", [("seq", {}), ("flat", {"release_axis": True})])
def test_recorded_club(case, options):
  params, x, y = {"params": gaussian(CLUB, "w")}, CLUB[f"{case}/x"], CLUB[f"{case}/y"]
  mu, logvar = jax.jit(NET.apply)(params, x)
  close(mu, CLUB[f"{case}/mu"], 1e-9)
  close(logvar, CLUB[f"{case}/logvar"], 1e-9)
  estimate = lambda x, y: club_estimate(*NET.apply(params, x), y, CLUB["perm"], **options)
  likelihood = lambda x, y: club_likelihood(*NET.apply(params, x), y)
  for name, loss in (("mi_est", estimate), ("loglikeli", likelihood)):
    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, y)
    close(value, CLUB[f"{case}/{name}"], 1e-9)
    close(grads[0], CLUB[f"{case}/grad_{name}/x"], 1e-9)
    close(grads[1], CLUB[f"{case}/grad_{name}/y"], 1e-9)
  assert club_estimate(mu, logvar, y, np.arange(7), **options) == 0


def test_recorded_inner_steps_of_club():
  params, x, y = gaussian(CLUB, "w"), CLUB["seq/x"], CLUB["seq/y"]
  tx = optax.adam(float(CLUB["learn/lr"]))
  state = tx.init(params)

  @jax.jit
  def step(params, state):
    loss = lambda p: -club_likelihood(*NET.apply({"params": p}, x), y)
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state)
    return optax.apply_updates(params, updates), state, value

  for want in CLUB["learn/loss"]:
    params, state, value = step(params, state)
    close(value, want, 1e-9)
  estimate = club_estimate(*NET.apply({"params": params}, x), y, CLUB["perm"])
  close(estimate, CLUB["learn/mi_est_after"], 1e-8)


@pytest.mark.parametrize("rho, club, information", [(0.3, 0.0989, 0.0472), (0.6, 0.5625, 0.2231), (0.0, 0.0, 0.0)])
def test_club_of_gaussians_is_an_upper_bound(rho, club, information):
  rng = np.random.default_rng(0)
  x, noise = rng.normal(size=(2, 400_000, 1))
  y = rho * x + np.sqrt(1 - rho**2) * noise
  logvar = np.full_like(x, np.log(1 - rho**2))
  got = float(club_estimate(rho * x, logvar, y, rng.permutation(len(x))))
  assert got == pytest.approx(club, abs=0.01)
  assert got >= information - 0.005
  assert float(club_estimate(rho * x[:500], logvar[:500], y[:500], None)) == pytest.approx(club, abs=0.12)


def test_club_forms():
  rng = np.random.default_rng(1)
  mu, logvar, y = rng.normal(size=(3, 6, 1, 4))
  order = rng.permutation(6)
  flat = club_estimate(mu[:, 0], logvar[:, 0], y[:, 0], order)
  assert club_estimate(mu, logvar, y, order) == pytest.approx(float(flat))
  assert club_estimate(mu, logvar, y, order, per_step=True) == pytest.approx(float(flat))
  like = lambda i, j: -0.5 * np.sum((mu[i] - y[j]) ** 2 / np.exp(logvar[i]))
  pairs = np.array([[like(i, j) for j in range(6)] for i in range(6)])
  every = club_estimate(mu, logvar, y, None)
  assert every == pytest.approx(np.mean(np.diagonal(pairs)) - pairs.mean())
  rows = np.array([1, 1, 0, 1, 1, 0], bool)
  pairs = pairs[rows][:, rows]
  got = club_estimate(mu, logvar, np.where(rows[:, None, None], y, 1e3), None, mask=rows)
  assert got == pytest.approx(np.mean(np.diagonal(pairs)) - pairs.mean())
  mu, logvar, y = rng.normal(size=(3, 6, 5, 4))
  steps = -0.5 * np.sum(((mu - y) ** 2 - (mu - y[order]) ** 2) / np.exp(logvar), -1).mean()
  assert club_estimate(mu, logvar, y, order, per_step=True) == pytest.approx(steps)
  assert club_likelihood(mu, logvar, y, mask=np.arange(6) < 4) == pytest.approx(
    float(club_likelihood(mu[:4], logvar[:4], y[:4]))
  )
  with pytest.raises(ValueError, match="release_axis"):
    club_estimate(mu, logvar, y, order, release_axis=True)


@functools.cache
def contexts(k, names):
  prefix = "av" if len(names) == 2 else "avt"
  net = FuturePredictor(12, k, 2)
  apply = jax.jit(net.apply)
  return {
    m: functools.partial(apply, {"params": predictor(CPC, f"k{k}/{prefix}/w", m, steps=k)}) for m in names
  }


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("names", [("audio", "video"), ("audio", "video", "text")])
def test_recorded_cpc(k, names):
  features = {m: CPC[f"k{k}/z/{m}"] for m in names}
  nets = contexts(k, names)

  @jax.jit
  def loss(f, t):
    return cross_cpc({m: nets[m](x) for m, x in f.items()}, f, t, self_weight=0.1, over="predictions")

  grad = jax.jit(jax.grad(loss))
  for t in CPC[f"k{k}/start_values"]:
    prefix = f"k{k}/t{t}/" + ("av" if len(names) == 2 else "avt")
    close(loss(features, int(t)), CPC[f"{prefix}/nce"], 1e-9)
    grads = grad(features, int(t))
    for m in names:
      close(grads[m], CPC[f"{prefix}/grad_z/{m}"], 1e-8)


def test_cpc_is_causal_and_does_not_mind_the_order_of_the_batch():
  names = ("audio", "video")
  features = {m: CPC[f"k1/z/{m}"] for m in names}
  nets = contexts(1, names)
  loss = jax.jit(lambda f: cross_cpc({m: nets[m](x) for m, x in f.items()}, f, 2, self_weight=0.1))
  value = float(loss(features))
  later = {m: np.where(np.arange(7)[:, None] > 3, 100.0, x) for m, x in features.items()}
  assert float(loss(later)) == pytest.approx(value, abs=1e-12)
  target = {m: np.where(np.arange(7)[:, None] == 3, 2 * x, x) for m, x in features.items()}
  assert abs(float(loss(target)) - value) > 1e-3
  assert float(loss({m: x[::-1] for m, x in features.items()})) == pytest.approx(value, abs=1e-12)


def test_cpc_of_unrelated_features_is_log_b_and_the_axes_differ():
  rng = np.random.default_rng(0)
  p, f = 0.1 * rng.normal(size=(2, 64, 2, 4))
  assert float(cpc(p, f)) == pytest.approx(np.log(64), abs=0.01)
  p, f = rng.normal(size=(2, 8, 1, 4))
  assert abs(float(cpc(p, f)) - float(cpc(p, f, over="predictions"))) > 1e-3
  assert float(cpc(f, f)) == pytest.approx(float(cpc(f, f, over="predictions")))
  scores = p[:, 0] @ f[:, 0].T
  want = np.mean(np.log(np.exp(scores).sum(1)) - np.diagonal(scores))
  assert float(cpc(p, f)) == pytest.approx(want)
  rows = np.arange(8) < 5
  assert float(cpc(p, f, mask=rows)) == pytest.approx(float(cpc(p[:5], f[:5])))
  # Two rows of one group are not compared: with them alone in a batch nothing is left to tell apart.
  assert float(cpc(p[:2], f[:2], groups=np.zeros(2, int))) == pytest.approx(0.0, abs=1e-6)
  assert float(cpc(p[:2], f[:2], groups=np.arange(2))) == pytest.approx(float(cpc(p[:2], f[:2])))
  with pytest.raises(ValueError, match="'futures'"):
    cpc(p, f, over="time")


def test_neither_step_reaches_the_other_s_parameters():
  x, y = CLUB["seq/x"], CLUB["seq/y"]
  params = gaussian(CLUB, "w")
  main = jax.grad(lambda x: club_estimate(*NET.apply({"params": params}, x), y, CLUB["perm"]))(x)
  start = {"params": params, "adam": optax.adam(1e-3).init(params)}
  assert np.any(main)
  only = lambda x, y: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(club_fit(NET, start, x, y)["params"]))
  assert not any(np.any(g) for g in jax.grad(only, (0, 1))(x, y))
  assert jnp.max(jnp.abs(NET.apply({"params": params}, x)[1])) <= 1

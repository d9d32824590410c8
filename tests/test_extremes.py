"""k-means and InfoNCE at their extremes: fewer rows than codes, equal rows, zeros, far origins, any temperature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from codebind_jax import codebook
from codebind_jax.losses import contrastive

RNG = np.random.default_rng(0)
Z = RNG.normal(size=(10, 4)).astype(np.float32)
A, B = RNG.normal(size=(2, 16, 8))
KEY = jax.random.key(0)


def test_kmeans_of_fewer_rows_than_codes_has_every_row_for_a_code():
  means, counts = codebook.kmeans(KEY, Z, 32, distance="l2")
  assert np.isfinite(means).all() and float(np.sum(counts)) == len(Z)
  assert ((Z[:, None] - np.asarray(means)[None]) ** 2).sum(-1).min(axis=1).max() < 1e-9


@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("rows", [np.ones((50, 4)), np.zeros((50, 4)), Z[:1], np.full((50, 4), 1e-30), 1e15 * Z])
def test_kmeans_of_rows_that_are_one_zero_tiny_or_huge_counts_all_of_them(rows, distance):
  rows = np.asarray(rows, np.float32)
  means, counts = codebook.kmeans(KEY, rows, 8, distance=distance)
  assert np.isfinite(means).all() and float(np.sum(counts)) == len(rows)


@pytest.mark.parametrize("origin", [0.0, 1000.0, -1e4, 1e5])
def test_kmeans_finds_two_clusters_wherever_they_lie(origin):
  far = np.concatenate([Z[:5] * 0.01 + origin, Z[5:] * 0.01 + origin + 1]).astype(np.float32)
  assert sorted(np.asarray(codebook.kmeans(KEY, far, 2, distance="l2")[1]).tolist()) == [5, 5]


def test_kmeans_from_the_same_start_is_as_good_as_scikit_learn():
  cluster = pytest.importorskip("sklearn.cluster")
  centres = RNG.normal(size=(6, 4)) * 10
  rows = (centres[RNG.integers(0, 6, 600)] + RNG.normal(size=(600, 4))).astype(np.float32)
  start = (centres + RNG.normal(size=(6, 4))).astype(np.float32)
  for origin in (0, 500):
    means, _ = codebook.kmeans(KEY, rows + origin, 6, distance="l2", iterations=50, init=start + origin)
    theirs = cluster.KMeans(6, n_init=1, init=start).fit(rows)
    np.testing.assert_allclose(means, theirs.cluster_centers_ + origin, atol=2e-3)


def test_updates_with_equal_rows_stay_finite():
  state, x = codebook.init_codebook(KEY, 8, 4), jnp.full((64, 4), 0.5)

  @jax.jit
  def step(state, key):
    return codebook.update(state, x, codebook.quantize(x, state.codes).indices, rng=key)

  for i in range(200):
    state = step(state, jax.random.fold_in(KEY, i))
  assert all(np.isfinite(np.asarray(part)).all() for part in (state.codes, state.ema_count, state.ema_sum, state.usage))


def by_definition(a, b, temperature):
  """Both directions of the cross entropy, in float64."""
  a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300) for x in (a, b))
  s = a @ b.T / temperature
  return float((logsumexp(s, axis=1) + logsumexp(s, axis=0) - 2 * np.diag(s)).mean())


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize(("a", "b", "temperature"), [
  (A, B, 0.07), (A, B, 1e-3), (A, B, 1e-6), (A, B, 1e3), (np.ones((16, 8)), np.ones((16, 8)), 0.07),
  (A * (np.arange(16) != 3)[:, None], B, 0.07), (A[:1], B[:1], 0.07), (A * 1e30, B * 1e30, 0.07)])  # fmt: skip
def test_info_nce_is_its_definition_and_has_finite_gradients(a, b, temperature, chunk):
  loss = lambda a, b, t: contrastive.info_nce(a, b, temperature=t, chunk=chunk)
  a, b = np.float32(a), np.float32(b)
  value, slopes = jax.value_and_grad(loss, argnums=(0, 1, 2))(a, b, jnp.float32(temperature))
  want = by_definition(a.astype(np.float64), b.astype(np.float64), temperature)
  assert float(value) == pytest.approx(want, rel=1e-5, abs=1e-5)
  assert all(np.isfinite(slope).all() for slope in slopes)

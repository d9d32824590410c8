"""Properties of the codebook core."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from codebind_jax import codebook
from codebind_jax.codebook.revival import draw_candidates
from codebind_jax.codebook.segments import Segments
from codebind_jax.norm import unit
from tests.arrays import compiled, normal

# Shapes come from short lists, because every new one is compiled.
hypothesis.settings.register_profile("few", max_examples=12, deadline=None, derandomize=True, database=None)
few = hypothesis.settings.get_profile("few")
seeds = st.integers(0, 2**31 - 1)
sizes = st.sampled_from([(40, 5, 3), (40, 33, 8), (30, 12, 40)])
distances = st.sampled_from(["cosine", "l2"])


pytestmark = pytest.mark.usefixtures("quick_compiler")


def units(seed, *shape):
  x = normal(seed, *shape)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def warm_state(seed, k, d):
  """A state as after some training, most codes in use and the last quarter dead."""
  rng = np.random.default_rng(seed)
  count = rng.uniform(0.5, 3, k).astype(np.float32)
  usage = count / count.sum()
  usage[-(k // 4) :] = 0
  codes = units(seed + 1, k, d)
  return codebook.CodebookState(
    jnp.asarray(codes), jnp.asarray(count), jnp.asarray(codes * count[:, None]), jnp.asarray(usage), jnp.ones((), bool)
  )


def by_definition(z, codes, distance):
  z, codes = z.astype(np.float64), codes.astype(np.float64)
  if distance == "cosine":
    return np.argmax(z @ (codes / np.linalg.norm(codes, axis=1, keepdims=True)).T, axis=1)
  return np.argmin(((z[:, None] - codes[None]) ** 2).sum(-1), axis=1)


@few
@hypothesis.given(seeds, sizes, distances, st.sampled_from([0, 7, 64]))
def test_nearest_code_is_the_definition(seed, size, distance, block):
  n, k, d = size
  z, codes = normal(seed, n, d), normal(seed + 1, k, d)
  found = compiled(codebook.nearest_code, distance=distance, block=block)(z, codes)
  np.testing.assert_array_equal(found, by_definition(z, codes, distance))
  assert found.dtype == jnp.int32


@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("block", [0, 16])
def test_lowest_index_wins_ties_and_nan_gives_zero(width, distance, block):
  codes = np.tile(units(0, 7, width), (5, 1))
  z = np.concatenate([units(1, 20, width), np.full((3, width), np.nan, np.float32)])
  z[20, 1:] = 1.0
  found = np.asarray(codebook.nearest_code(z, codes, distance=distance, block=block))
  np.testing.assert_array_equal(found[:20], by_definition(z[:20], codes[:7], distance))
  np.testing.assert_array_equal(found[20:], 0)


@pytest.mark.parametrize("k", [1, 31, 32, 33, 70])
def test_any_number_of_codes(k):
  z, codes = normal(0, 50, 8), normal(1, k, 8)
  np.testing.assert_array_equal(codebook.nearest_code(z, codes), by_definition(z, codes, "cosine"))


def test_bfloat16_is_compared_in_float32():
  codes = np.array([[1.0, 1.0], [1.0, 1.001]], np.float32)
  z = jnp.asarray([[1.0, 1.0]], jnp.bfloat16)
  assert codebook.nearest_code(z, codes, distance="l2")[0] == 0
  assert codebook.quantize(z, codes).vectors.dtype == jnp.float32


@few
@hypothesis.given(seeds, sizes, distances)
def test_permuting_codes_permutes_indices_and_nothing_else(seed, size, distance):
  n, k, d = size
  z, codes = normal(seed, n, d), normal(seed + 1, k, d)
  order = np.random.default_rng(seed).permutation(k)
  quantize = compiled(codebook.quantize, distance=distance)
  plain, permuted = quantize(z, codes), quantize(z, codes[order])
  np.testing.assert_array_equal(order[permuted.indices], plain.indices)
  np.testing.assert_array_equal(permuted.vectors, plain.vectors)


def test_permuting_codes_permutes_the_state():
  z, state, order = units(0, 60, 8), warm_state(1, 12, 8), np.random.default_rng(2).permutation(12)
  permuted = state.replace(**{
    name: getattr(state, name)[order] for name in ("codes", "ema_count", "ema_sum", "usage")
  })
  step = jax.jit(lambda s: codebook.update(s, z, codebook.nearest_code(z, s.codes), revive="closest"))
  a, b = step(state), step(permuted)
  for name in ("codes", "ema_count", "ema_sum", "usage"):
    np.testing.assert_allclose(getattr(a, name)[order], getattr(b, name), atol=1e-6)


@few
@hypothesis.given(seeds, st.sampled_from(["none", "closest"]))
def test_permuting_the_batch_changes_no_state(seed, revive):
  z, state = units(seed, 50, 8), warm_state(seed + 1, 12, 8)
  order = np.random.default_rng(seed).permutation(50)
  update = functools.partial(compiled(codebook.update, revive=revive), state)
  a = update(z, codebook.nearest_code(z, state.codes))
  b = update(z[order], codebook.nearest_code(z[order], state.codes))
  chex.assert_trees_all_close(a, b, rtol=1e-7, atol=2e-6)


@few
@hypothesis.given(seeds, st.sampled_from(["none", "random", "closest", "disturbance"]))
def test_masked_rows_have_no_effect(seed, revive):
  z, state, key = units(seed, 50, 8), warm_state(seed + 1, 12, 8), jax.random.key(seed)
  mask = np.random.default_rng(seed).permutation(50) < 30  # always as many: one program for the rows kept
  rubbish = np.where(mask[:, None], z, np.where(np.random.default_rng(seed).random((50, 8)) < 0.5, np.nan, 1e30))
  indices = codebook.nearest_code(z, state.codes)
  update = functools.partial(compiled(codebook.update, revive=revive), state, rng=key)
  a = update(z, indices, weights=mask)
  b = update(rubbish.astype(np.float32), np.where(mask, indices, 3), weights=mask)
  chex.assert_trees_all_equal(a, b)
  kept = update(z[mask], indices[mask], weights=np.ones(mask.sum(), np.float32))
  chex.assert_trees_all_close(a, kept, rtol=1e-7, atol=2e-6)


def test_a_batch_of_padding_leaves_the_state_alone():
  z, state = units(0, 20, 8), warm_state(1, 12, 8)
  new = codebook.update(state, z, np.zeros(20, np.int32), weights=np.zeros(20, bool))
  chex.assert_trees_all_equal(new, state)


@few
@hypothesis.given(seeds, st.sampled_from(["none", "random", "closest"]))
def test_weights_equal_repeated_rows(seed, revive):
  z, state, key = units(seed, 30, 8), warm_state(seed + 1, 12, 8), jax.random.key(seed)
  weights = np.random.default_rng(seed).integers(0, 4, 30)
  weights[0] += 60 - weights.sum()
  hypothesis.assume(weights[0] >= 0)
  indices = codebook.nearest_code(z, state.codes)
  update = compiled(codebook.update, revive=revive)
  a = update(state, z, indices, rng=key, weights=weights)
  b = update(state, np.repeat(z, weights, 0), np.repeat(indices, weights), rng=key)
  chex.assert_trees_all_close(a, b, rtol=1e-7, atol=3e-6)


@few
@hypothesis.given(seeds, st.sampled_from(["none", "random", "closest", "probrandom", "disturbance"]), st.booleans())
def test_counts_conserve_mass(seed, revive, cold):
  z = units(seed, 50, 8)
  state = codebook.init_codebook(jax.random.key(seed), 12, 8) if cold else warm_state(seed, 12, 8)
  update = compiled(codebook.update, revive=revive)
  new = update(state, z, codebook.nearest_code(z, state.codes), rng=jax.random.key(seed))
  np.testing.assert_allclose(new.ema_count.sum(), 0.99 * state.ema_count.sum() + 0.01 * 50, rtol=1e-5)
  chex.assert_tree_all_finite(new)
  assert np.all(np.asarray(new.ema_count) >= 0)


def test_update_is_the_formula():
  z, state = units(0, 40, 4), warm_state(1, 6, 4)
  indices = np.asarray(codebook.nearest_code(z, state.codes))
  n = np.bincount(indices, minlength=6)
  s = np.stack([z[indices == k].sum(0) for k in range(6)])
  count = 0.9 * np.asarray(state.ema_count) + 0.1 * n
  total = 0.9 * np.asarray(state.ema_sum) + 0.1 * s
  smoothed = (count + 1e-3) / (count.sum() + 6e-3) * count.sum()
  new = codebook.update(state, z, indices, decay=0.9, eps=1e-3, revive="none")
  np.testing.assert_allclose(new.ema_count, count, rtol=1e-5)
  np.testing.assert_allclose(new.ema_sum, total, atol=1e-5)
  np.testing.assert_allclose(new.codes, total / smoothed[:, None], atol=1e-5)
  np.testing.assert_allclose(new.usage, 0.9 * np.asarray(state.usage) + 0.1 * n / 40, atol=1e-6)
  assert bool(new.initialised)


def quantized(z, codes, normalize):
  return codebook.quantize(z, codes, normalize=normalize).vectors


def plain(z, codes, normalize):
  return unit(z) if normalize else z


@functools.partial(jax.jit, static_argnums=(0, 1))
def pulled_back(function, normalize, z, codes, cotangent):
  """Value, and the gradient of z."""
  value, pullback = jax.vjp(lambda z: function(z, codes, normalize), z)
  return value, pullback(cotangent)[0]


@jax.jit
def slope_of_codes(codes, z, cotangent):
  return jax.grad(lambda c: jnp.sum(quantized(z, c, True) * cotangent))(codes)


@few
@hypothesis.given(seeds, st.booleans())
def test_straight_through_is_the_identity(seed, normalize):
  z, codes, cotangent = normal(seed, 4, 5, 8), normal(seed + 1, 12, 8), normal(seed + 2, 4, 5, 8)
  value, slope = pulled_back(quantized, normalize, z, codes, cotangent)
  np.testing.assert_allclose(slope, pulled_back(plain, normalize, z, codes, cotangent)[1], atol=1e-6)
  found = compiled(codebook.quantize, normalize=normalize)(z, codes)
  np.testing.assert_array_equal(value, codes[found.indices])
  np.testing.assert_array_equal(slope_of_codes(codes, z, cotangent), 0)


@pytest.mark.parametrize("revive", ["random", "closest", "probrandom", "disturbance"])
def test_a_revived_code_is_still_there_after_the_next_update(revive):
  z, state = units(0, 200, 8), warm_state(1, 12, 8)
  dead = slice(-3, None)
  # Dead codes point away from all that the batch holds.
  z = z * np.sign(z[:, :1])
  state = state.replace(codes=state.codes.at[dead].set(-jnp.eye(8)[0]))
  first = codebook.update(
    state, z, codebook.nearest_code(z, state.codes), revive=revive, rng=jax.random.key(2)
  )
  moved = np.linalg.norm(first.codes[dead] - state.codes[dead], axis=1)
  assert np.all(moved > 0.5)
  # The next batch does not use them.
  indices = np.full(200, 0)
  second = codebook.update(first, z, indices, revive=revive, rng=jax.random.key(3))
  np.testing.assert_allclose(second.codes[dead], first.codes[dead], atol=1e-3)
  release = functools.partial(codebook.update, z=z, indices=indices, revive_mode="codes_only", rng=jax.random.key(4))
  lost = release(release(state, revive=revive), revive="none")
  assert np.all(np.linalg.norm(lost.codes[dead] - release(state, revive=revive).codes[dead], axis=1) > 0.5)


def test_candidates_are_segments_of_the_batch():
  z, state = units(0, 50, 8), warm_state(1, 12, 8)
  indices = codebook.nearest_code(z, state.codes)
  lanes = Segments(jnp.asarray(z).T[None], indices[None])
  nearest = z[np.argmax(z @ np.asarray(state.codes).T, axis=0)]
  draw = lambda revive, seed=0: np.asarray(draw_candidates(revive, jax.random.key(seed), [lanes], state.codes))
  np.testing.assert_allclose(draw("closest"), nearest, atol=1e-6)
  for revive in ("random", "probrandom"):
    rows = draw(revive)
    assert np.max(np.min(np.linalg.norm(rows[:, None] - z[None], axis=-1), axis=1)) < 1e-6
    assert np.any(rows != draw(revive, 1))
  np.testing.assert_allclose(np.linalg.norm(draw("disturbance"), axis=1), 1.0, atol=1e-5)
  assert len(np.unique(draw("random"), axis=0)) == 12
  assert draw_candidates("none", None, [lanes], state.codes) is None


def test_probrandom_follows_the_softmax_of_the_similarity():
  z = np.concatenate([np.eye(4, dtype=np.float32)[:2], -np.eye(4, dtype=np.float32)[:1]])
  codes = jnp.tile(jnp.eye(4)[:1], (3000, 1))
  part = Segments(jnp.asarray(z).T[None], jnp.zeros((1, 3), jnp.int32))
  rows = np.asarray(draw_candidates("probrandom", jax.random.key(0), [part], codes))
  share = [np.mean(np.all(rows == row, axis=1)) for row in z]
  odds = np.exp([1.0, 0.0, -1.0])
  np.testing.assert_allclose(share, odds / odds.sum(), atol=0.04)


@few
@hypothesis.given(seeds, distances)
def test_kmeans_finds_distinct_points(seed, distance):
  points = units(seed, 10, 6) * (1.0 if distance == "cosine" else 3.0)
  rows = np.repeat(points, np.random.default_rng(seed).multinomial(20, np.ones(10) / 10) + 1, axis=0)
  means, counts = codebook.kmeans(jax.random.key(seed), rows, 10, distance=distance)
  distance_to = np.linalg.norm(np.asarray(means)[:, None] - points[None], axis=-1)
  np.testing.assert_allclose(distance_to.min(axis=0), 0.0, atol=1e-5)
  assert counts.sum() == 30


@few
@hypothesis.given(seeds, distances)
def test_kmeans_of_as_many_points_as_codes_is_the_points(seed, distance):
  points = units(seed, 12, 6)
  means, counts = codebook.kmeans(jax.random.key(seed), points, 12, distance=distance)
  order = np.argmin(np.linalg.norm(np.asarray(means)[:, None] - points[None], axis=-1), axis=1)
  np.testing.assert_array_equal(np.sort(order), np.arange(12))
  np.testing.assert_allclose(means, points[order], atol=1e-6)
  np.testing.assert_array_equal(counts, 1)


def test_kmeans_takes_weights_as_repeats_and_ignores_padding():
  z, weights = normal(0, 30, 6), np.random.default_rng(1).integers(0, 3, 30)
  z[weights == 0] = 1e9
  init = normal(2, 4, 6)
  means, counts = codebook.kmeans(jax.random.key(0), z, 4, distance="l2", init=init, weights=weights.astype(np.float32))
  want, want_counts = codebook.kmeans(jax.random.key(0), np.repeat(z, weights, 0), 4, distance="l2", init=init)
  np.testing.assert_allclose(means, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(counts, want_counts)
  drawn, _ = codebook.kmeans(jax.random.key(0), z, 4, distance="l2", weights=weights.astype(np.float32))
  assert np.all(np.abs(drawn) < 100)


def test_usage_stats_by_hand():
  stats = codebook.usage_stats(np.array([2, 2, 0, 4]))
  assert {k: float(v) for k, v in stats.items()} == pytest.approx(
    {"active_share": 0.75, "perplexity": 2**1.5, "dead": 1, "max_share": 0.5}
  )
  empty = codebook.usage_stats(np.zeros(4, int))
  assert {k: float(v) for k, v in empty.items()} == {"active_share": 0, "perplexity": 0, "dead": 4, "max_share": 0}


def test_alarm_fires_below_the_share():
  counts = np.array([5.0, 5.0, 0, 0, 0, 0, 0, 0, 0, 0])
  assert bool(codebook.collapsed(counts, 0.25)) and not bool(codebook.collapsed(counts, 0.15))
  assert not bool(codebook.collapsed(np.ones(10)))


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: codebook.nearest_code(normal(0, 3, 4), normal(0, 3, 5)), r"one width.*\(3, 4\).*\(3, 5\)"),
    (lambda: codebook.nearest_code(normal(0, 3, 4), normal(0, 0, 4)), "empty"),
    (lambda: codebook.quantize(normal(0, 3, 4), normal(0, 3, 5)), "one width"),
    (lambda: codebook.init_codebook(jax.random.key(0), 0, 8), "num_codes.*0"),
    (lambda: codebook.kmeans(jax.random.key(0), normal(0, 3, 4), 2, init=normal(0, 3, 4)), r"init.*\(2, 4\)"),
    (lambda: codebook.collapsed(np.ones(3), 2.0), "share.*2"),
    (lambda: codebook.nearest_code(normal(0, 3, 4), normal(0, 3, 4), distance="l3"), "cosine.*l2.*l3"),
    (
      lambda: codebook.update(warm_state(0, 12, 8), normal(0, 5, 8), np.zeros(5, int), revive="often"),
      "random, closest, probrandom, disturbance or none.*often",
    ),
    (
      lambda: codebook.update(warm_state(0, 12, 8), normal(0, 5, 8), np.zeros(5, int), decay=1.0),
      "decay.*1.0",
    ),
    (
      lambda: codebook.update(warm_state(0, 12, 8), normal(0, 5, 7), np.zeros(5, int)),
      r"the codebook has codes of shape \(12, 8\); segments of width 7 need \[k, 7\]",
    ),
    (
      lambda: codebook.update(
        warm_state(0, 12, 8).replace(ema_sum=jnp.zeros((12, 4))), normal(0, 5, 8), np.zeros(5, int)
      ),
      r"codes of shape \(12, 8\), but ema_sum of shape \(12, 4\)",
    ),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def batches(key, step, shift):
  """Segments around forty directions of one half of space, and after `shift` steps of the other half."""
  centres = jax.random.normal(jax.random.key(5), (2, 40, 8)).at[:, :, 0].set(jnp.array([[3.0], [-3.0]]))
  pick, noise = jax.random.split(key)
  centre = centres[jnp.where(step < shift, 0, 1), jax.random.randint(pick, (1024,), 0, 40)]
  return unit(centre + 0.3 * jax.random.normal(noise, centre.shape))


def share_in_use(stream, steps, state, window=10, **options):
  """Share of the codes used within the last steps, after each step, with the default settings."""

  def step(carry, t):
    state, last = carry
    key = jax.random.fold_in(jax.random.key(7), t)
    z = stream(key, t)
    indices = codebook.nearest_code(z, state.codes)
    state = codebook.update(state, z, indices, rng=key, **options)
    last = last.at[indices].set(t)
    return (state, last), (jnp.mean(t - last < window), codebook.collapsed(state.usage, 0.3))

  start = (state, jnp.full(state.codes.shape[0], -window))
  return [np.asarray(x) for x in jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(steps))[1])()]


def started(z, k=128):
  means, counts = codebook.kmeans(jax.random.key(0), z, k)
  counts = jnp.maximum(counts, 1.0)
  return codebook.CodebookState(means, counts, means * counts[:, None], counts / counts.sum(), jnp.ones((), bool))


def test_codes_come_back_after_the_distribution_shifts():
  state = started(batches(jax.random.key(1), 0, 1))
  share, _ = share_in_use(lambda key, t: batches(key, t, 100), 400, state)
  assert share[99] > 0.95 and share[112] < 0.5
  assert np.all(share[-20:] >= 0.95)
  release, _ = share_in_use(lambda key, t: batches(key, t, 100), 400, state, revive_mode="codes_only")
  assert release[-1] < 0.5


def test_codes_come_back_after_a_degenerate_start():
  state = started(jnp.ones((1024, 8)) / np.sqrt(8.0))
  stream = lambda key, t: jnp.where(t < 20, jnp.ones((1024, 8)) / np.sqrt(8.0), batches(key, t, 10**6))
  share, alarm = share_in_use(stream, 320, state)
  assert share[19] < 0.05 and np.all(share[-20:] >= 0.95)
  assert alarm[0] and not alarm[-1]

"""Losses: definitions in numpy, gradients at the edges, compute types and memory."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from codebind_jax import losses
from codebind_jax.codebook.segments import similarity
from codebind_jax.losses.code_contrast import extreme_bounds, selected
from tests.arrays import compiled, normal

hypothesis.settings.register_profile("few", max_examples=12, deadline=None, derandomize=True, database=None)
few = hypothesis.settings.get_profile("few")
seeds = st.integers(0, 2**31 - 1)


pytestmark = pytest.mark.usefixtures("quick_compiler")


def log_softmax(x, axis):
  x = x.astype(np.float64)
  x = x - x.max(axis=axis, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))


def info_nce_by_definition(a, b, temperature):
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  logits = unit(a) @ unit(b).T / temperature
  return -np.mean(np.diag(log_softmax(logits, 1)) + np.diag(log_softmax(logits, 0)))


def code_contrast_by_definition(x, top=None):
  """By sorting each row."""
  k = x.shape[1]
  rows = np.sort(x.astype(np.float64), axis=1)
  above = max(1, k // 10)
  logits = np.concatenate([rows[:, -above:].mean(axis=1, keepdims=True), rows[:, : k // 2]], axis=1)
  return -np.mean(log_softmax(logits, 1)[:, 0])


@few
@hypothesis.given(seeds, st.sampled_from([(6, 0), (24, 5), (24, 64), (17, 4)]))
def test_info_nce_is_the_definition_in_chunks_too(seed, size):
  rows, chunk = size
  a, b = normal(seed, rows, 8), normal(seed + 1, rows, 8)
  got = compiled(losses.info_nce, temperature=0.1, chunk=chunk)(a, b)
  np.testing.assert_allclose(got, info_nce_by_definition(a, b, 0.1), rtol=2e-5)


@pytest.mark.parametrize("rows, chunk", [(24, 1), (24, 7), (64, 16), (17, 3), (96, 33)])
def test_chunked_info_nce_has_the_same_value_and_gradients(rows, chunk):
  a, b, mask = normal(0, rows, 8), normal(1, rows, 8), np.random.default_rng(2).random(rows) < 0.7
  a[~mask] = np.nan

  def loss(a, b, temperature, scale, chunk):
    scales = {"logit_scale_a": scale, "logit_scale_b": 2.0}
    return losses.info_nce(a, b, temperature=temperature, mask=mask, chunk=chunk, **scales)

  take = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), static_argnums=4)
  value, grads = take(a, b, 0.3, 1.5, chunk)
  chex.assert_trees_all_close((value, grads), take(a, b, 0.3, 1.5, 0), rtol=1e-4, atol=2e-6)
  np.testing.assert_allclose(value, compiled(losses.info_nce, temperature=0.1)(a[mask], b[mask]), rtol=1e-5)
  assert np.all(grads[0][~mask] == 0) and np.all(grads[1][~mask] == 0)


def test_chunks_make_memory_linear():
  def bytes_needed(rows, chunk):
    loss = lambda a, b: losses.info_nce(a, b, temperature=0.1, chunk=chunk)
    shape = jax.ShapeDtypeStruct((rows, 16), jnp.float32)
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(shape, shape).compile().memory_analysis().temp_size_in_bytes

  full, small, large = bytes_needed(2048, 0), bytes_needed(2048, 128), bytes_needed(4096, 128)
  assert full > 2048 * 2048 * 4
  assert small < full / 4 and large < 2.5 * small


@few
@hypothesis.given(seeds, st.sampled_from([4, 9, 10, 37, 256]), st.sampled_from([1.0, 1e-3, 1e4]))
def test_code_contrast_is_the_definition_by_sorting(seed, k, scale):
  x = normal(seed, 12, k) * np.float32(scale)
  found = compiled(losses.code_contrast)(x)
  np.testing.assert_allclose(found, code_contrast_by_definition(x), rtol=2e-5, atol=1e-6)


def test_code_contrast_with_ties_and_without_a_sort():
  x = np.round(normal(0, 50, 60) * 2) / 2
  np.testing.assert_allclose(compiled(losses.code_contrast)(x), code_contrast_by_definition(x), rtol=1e-5)
  constant = np.full((3, 60), 0.25, np.float32)
  np.testing.assert_allclose(compiled(losses.code_contrast)(constant), np.log(31), rtol=1e-5)
  for double in (False, True):
    loss = functools.partial(losses.code_contrast, double_softmax=double)
    text = jax.jit(jax.grad(loss)).lower(x).as_text()
    assert "sort" not in text and "top_k" not in text


@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("double", [False, True])
def test_contrast_of_all_segments_in_blocks(distance, double):
  z, codes, weights = normal(0, 3, 8, 22), normal(1, 40, 8), jnp.asarray(np.arange(22) % 3 > 0, jnp.float32)

  def blocks(z, codes):
    return losses.code_contrast_segments(z, codes, distance=distance, double_softmax=double, weights=weights, block=18)

  def whole(z, codes):
    x = jnp.moveaxis(similarity(z, codes, distance=distance), 1, 2).reshape(-1, 40)
    return losses.code_contrast(x, double_softmax=double, mask=jnp.tile(weights > 0, 3))

  a, b = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(z, codes) for f in (blocks, whole))
  chex.assert_trees_all_close(a, b, rtol=2e-4, atol=2e-6)
  assert np.all(a[1][0][:, :, np.asarray(weights) == 0] == 0)


BOUNDS = jax.jit(extreme_bounds, static_argnums=(1, 2))


def check_bounds(x, above, below):
  top, low = BOUNDS(jnp.asarray(x), above, below)
  for rows, bound, count in ((x, top, above), (-x, low, below)):
    weights, rows = np.asarray(compiled(selected)(rows, bound), np.float64), rows.astype(np.float64)
    np.testing.assert_allclose(weights.sum(axis=1), count, rtol=1e-5)
    np.testing.assert_allclose((weights * rows).sum(axis=1), np.sort(rows, axis=1)[:, -count:].sum(axis=1), atol=1e-4)


@few
@hypothesis.given(seeds, st.integers(1, 30), st.integers(1, 30))
def test_bounds_select(seed, above, below):
  check_bounds(np.round(normal(seed, 8, 30), 1), above, below)


@pytest.mark.parametrize(("k", "above", "below"), [(2**15 - 1, 20_000, 30_000), (2**16 + 30, 5, 50_000)])
def test_bounds_where_two_counts_just_fit_into_one_number_and_where_they_do_not(k, above, below):
  check_bounds(np.round(normal(0, 2, k), 1), above, below)


def test_code_matching_by_definition():
  a, b = normal(0, 5, 3, 7), normal(1, 5, 3, 7)
  p, q = np.exp(log_softmax(a, 2)), np.exp(log_softmax(b, 2))
  score = np.einsum("isk,jsk->sij", p, np.log(q + 1e-10)) + np.einsum("isk,jsk->sij", np.log(p + 1e-10), q)
  want = -np.mean(np.diagonal(log_softmax(score, 2), axis1=1, axis2=2))
  matching, warm = compiled(losses.code_matching), compiled(losses.code_matching, temperature=4.0)
  np.testing.assert_allclose(matching(a, b), want, rtol=1e-5)
  np.testing.assert_allclose(matching(a / 4, b / 4), warm(a, b), rtol=1e-5)


def test_uniformity_by_definition():
  codes = normal(0, 9, 4)
  unit = codes / np.linalg.norm(codes, axis=1, keepdims=True)
  pairs = [np.exp(-np.sum((unit[i] - unit[j]) ** 2)) for i in range(9) for j in range(i)]
  np.testing.assert_allclose(compiled(losses.code_uniform)(codes), np.log(np.mean(pairs)), rtol=1e-5)
  np.testing.assert_allclose(compiled(losses.specific_uniform)(unit), np.log(np.mean(pairs)), rtol=1e-5)
  assert compiled(losses.specific_uniform)(unit[:1]) == 0


def test_commitment_and_decomposition_by_hand():
  z, q = jnp.ones((2, 3)), jnp.full((2, 3), 3.0)
  assert losses.commitment(z, q) == 1.0
  assert losses.commitment(z, q, beta=1.0) == 4.0
  assert jnp.all(jax.grad(losses.commitment, argnums=1)(z, q) == 0)
  shared = np.zeros((2, 2, 3), np.float32)
  specific = np.zeros((2, 2, 3), np.float32)
  shared[0, 0, 0] = shared[0, 1, 0] = specific[0, 0, 0] = 2.0
  specific[1, :, 1] = 1.0
  np.testing.assert_allclose(compiled(losses.decomposition)(shared, specific), np.sqrt(16 + 16) / 2, rtol=1e-6)


def test_decomposition_of_parts_of_different_widths_compares_segments():
  shared, specific = normal(0, 3, 2, 8), normal(1, 3, 2, 4)
  total = 0.0
  for a, b in zip(shared, specific):
    cosines = [[p @ q / np.linalg.norm(p) / np.linalg.norm(q) for p in t.reshape(4, 2) for q in u.reshape(2, 2)]
               for t in a for u in b]
    total += np.sqrt(np.square(cosines).mean(1).sum()) / 3
  np.testing.assert_allclose(compiled(losses.decomposition, segment=2)(shared, specific), total, rtol=1e-5)
  one = specific / np.linalg.norm(specific, axis=2, keepdims=True)
  two = shared[..., :4] / np.linalg.norm(shared[..., :4], axis=2, keepdims=True)
  of_segments, whole = compiled(losses.decomposition, segment=4), compiled(losses.decomposition)
  np.testing.assert_allclose(of_segments(one, two), whole(one, two), rtol=1e-5)


masked = {
  "info_nce": lambda x, y, m: losses.info_nce(x[:, 0], y[:, 0], temperature=0.2, mask=m),
  "code_contrast": lambda x, y, m: losses.code_contrast(x[:, 0], mask=m),
  "code_matching": lambda x, y, m: losses.code_matching(x, y, mask=m),
  "decomposition": lambda x, y, m: losses.decomposition(x, y, mask=m),
  "specific_uniform": lambda x, y, m: losses.specific_uniform(x[:, 0], mask=m),
}


@pytest.mark.parametrize("name", sorted(masked))
def test_masked_rows_have_no_effect(name):
  x, y = normal(0, 8, 3, 12), normal(1, 8, 3, 12)
  mask = np.array([1, 1, 0, 1, 0, 1, 1, 0], bool)
  loss = jax.jit(jax.value_and_grad(masked[name], argnums=(0, 1)))
  value, grads = loss(x, y, mask)
  np.testing.assert_allclose(value, compiled(masked[name])(x[mask], y[mask], None), rtol=1e-5)
  other, other_grads = loss(np.where(mask[:, None, None], x, 1e3), np.where(mask[:, None, None], y, -1e3), mask)
  np.testing.assert_allclose(value, other, rtol=1e-6)
  for gradient, again in zip(grads, other_grads):
    np.testing.assert_array_equal(gradient[~mask], 0)
    np.testing.assert_allclose(gradient, again, atol=1e-6)
  nothing, none_grads = loss(x, y, np.zeros(8, bool))
  assert nothing == 0 and all(np.all(g == 0) for g in none_grads)


# Every loss of features [b, 4, 12], as training would call it.
of_features = {
  **{name: (lambda x, y, f=f: f(x, y, None)) for name, f in masked.items()},
  "info_nce_chunked": lambda x, y: losses.info_nce(x[:, 0], y[:, 0], temperature=0.07, chunk=2),
  "code_contrast_double": lambda x, y: losses.code_contrast(x[:, 0], double_softmax=True),
  "code_matching_release": lambda x, y: losses.code_matching(x, y, release_axis=True),
  "code_uniform": lambda x, y: losses.code_uniform(x[:, 0]),
  "commitment": lambda x, y: losses.commitment(x, y),
}
edges = {
  "coincide": np.tile(normal(3, 1, 1, 12), (6, 4, 1)),
  "zero": np.zeros((6, 4, 12), np.float32),
  "huge": normal(4, 6, 4, 12) * 1e12,
  "tiny": normal(4, 6, 4, 12) * 1e-18,
}


@functools.cache
def with_gradients(name):
  """Jitted (x, y) -> (loss, gradients of x and y)."""
  return jax.jit(jax.value_and_grad(of_features[name], argnums=(0, 1)))


@pytest.mark.parametrize("edge", sorted(edges))
@pytest.mark.parametrize("name", sorted(of_features))
def test_values_and_gradients_are_finite_at_the_edges(name, edge):
  x = jnp.asarray(edges[edge])
  for y in (x, jnp.asarray(normal(5, 6, 4, 12))):
    chex.assert_tree_all_finite(with_gradients(name)(x, y))


@pytest.mark.parametrize("name", sorted(of_features))
def test_bfloat16_features_are_computed_in_float32(name):
  x, y = (jnp.asarray(normal(seed, 6, 4, 12), jnp.bfloat16) for seed in (0, 1))
  value, grads = with_gradients(name)(x, y)
  assert value.dtype == jnp.float32 and grads[0].dtype == jnp.bfloat16
  np.testing.assert_array_equal(value, with_gradients(name)(x.astype(jnp.float32), y.astype(jnp.float32))[0])


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: losses.info_nce(normal(0, 3, 4), normal(0, 2, 4), temperature=1.0), r"\(3, 4\).*\(2, 4\)"),
    (lambda: losses.info_nce(normal(0, 3, 4), normal(0, 3, 4), temperature=1.0, chunk=-1), "-1"),
    (lambda: losses.code_matching(normal(0, 3, 2, 4), normal(0, 3, 2, 5)), "one shape"),
    (lambda: losses.decomposition(normal(0, 3, 2, 4), normal(0, 3, 2, 5)), r"\(3, 2, 4\).*\(3, 2, 5\)"),
    (lambda: losses.decomposition(normal(0, 3, 2, 4), normal(0, 3, 2, 6), segment=4), "4 and 6 must be multiples"),
    (lambda: losses.balance_init(["info_nce", "mystery"]), "mystery"),
    (lambda: losses.balance_init(["commitment"]), "info_nce"),
    (lambda: losses.balance_update(losses.balance_init(["info_nce"]), {"mystery": 1.0}), "mystery"),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_balancer_gives_a_late_term_its_weight_at_once_and_bounds_it():
  state = losses.balance_init(["info_nce", "commitment", "decomposition"])
  update = jax.jit(losses.balance_update)
  state = update(state, {"info_nce": 2.0, "commitment": 0.0})
  assert state.weight["commitment"] == 1e4 and state.weight["decomposition"] == 1.0
  state = update(state, {"info_nce": 5.0, "decomposition": -0.5})
  np.testing.assert_allclose(state.weight["decomposition"], 0.1 * 2.0 / 0.5, rtol=1e-5)
  structure = jax.tree.structure(state)
  assert jax.tree.structure(update(state, {"info_nce": jnp.ones(())})) == structure


def test_balancer_weights_carry_no_gradient():
  state = losses.balance_init(["info_nce", "decomposition"])
  weigh = lambda x: losses.balance_update(state, {"info_nce": x, "decomposition": 2 * x}).weight["decomposition"]
  assert jax.jit(jax.grad(weigh))(1.5) == 0


def test_decorrelation_is_the_mean_square_of_the_correlations_by_hand():
  rng = np.random.default_rng(0)
  shared, specific = rng.normal(size=(40, 3)), rng.normal(size=(40, 5))
  specific[:, 0] = 7 * shared[:, 1] - 2  # scale and shift do not matter
  mask = np.arange(40) < 30
  decorrelation = compiled(losses.decorrelation)
  found = decorrelation(shared.astype(np.float32), specific.astype(np.float32), mask=mask)
  both = np.corrcoef(np.concatenate([shared, specific], axis=1)[:30].T)[:3, 3:]
  assert abs(both[1, 0]) > 0.999
  np.testing.assert_allclose(found, (both**2).sum() / np.sqrt(15), rtol=1e-4)
  shared[~mask], specific[~mask] = np.nan, 1e30
  np.testing.assert_allclose(decorrelation(shared.astype(np.float32), specific, mask=mask), found, rtol=1e-5)
  value, slope = jax.jit(jax.value_and_grad(losses.decorrelation))(np.ones((30, 3), "f"), specific[:30].astype("f"))
  assert value == 0 and np.isfinite(slope).all()
  assert decorrelation(np.ones((4, 2), "f"), np.ones((4, 2), "f"), mask=np.zeros(4, bool)) == 0

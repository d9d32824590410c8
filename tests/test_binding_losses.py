"""Fixed-anchor and centroid binding: recorded numbers, and the bounds that the objective must satisfy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from codebind_jax.losses import centroid_info_nce, directed_info_nce, fixed_anchor_info_nce
from codebind_jax.losses.centroid import centroid
from tests.arrays import compiled
from tests.golden_fixtures import close, load

DATA = load("centrobind")
NAMES = ("m0", "m1", "m2", "m3")


@pytest.fixture(autouse=True, scope="module")
def double():
  jax.config.update("jax_disable_most_optimizations", True)
  with jax.enable_x64(True):
    yield
  jax.config.update("jax_disable_most_optimizations", False)


def unit(x):
  norm = np.linalg.norm if isinstance(x, np.ndarray) else jnp.linalg.norm
  return x / norm(x, axis=-1, keepdims=True)


def named(x):
  return {f"m{i}": rows for i, rows in enumerate(x)}


VARIANTS = {
  "centrobind": {},
  "centrobind_stopgrad": {"stop_anchor": True},
  "centrobind_normalised": {"normalize_anchor": True},
  "centrobind_weighted": {"weights": dict(zip(NAMES, DATA["weights"]))},
  "centrobind_missing": {"mask": {name: np.full(10, here) for name, here in zip(NAMES, DATA["present"])}},
  "centrobind_same_view": {},
}


TAUS = sorted({key.split("/")[0] for key in DATA if key.startswith("tau")})


@pytest.mark.parametrize("prefix", TAUS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_centroid_values_and_gradients(prefix, variant):
  def loss(feat, anchor):
    anchor = feat if variant.endswith("same_view") else anchor
    return centroid_info_nce(named(unit(anchor)), named(unit(feat)), temperature=float(prefix[3:]), **VARIANTS[variant])

  value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(DATA["feat_raw"], DATA["anchor_raw"])
  close(value, DATA[f"{prefix}/{variant}/loss"], 1e-10)
  close(grads[0], DATA[f"{prefix}/{variant}/grad_feat_raw"], 1e-10)
  close(grads[1], DATA[f"{prefix}/{variant}/grad_anchor_raw"], 1e-10)


@pytest.mark.parametrize("anchor", range(4))
@pytest.mark.parametrize("stop", [True, False])
def test_fixed_anchor_values_and_gradients(anchor, stop):
  kind = "frozen" if stop else "trainable"

  def loss(feat, anchors):
    return fixed_anchor_info_nce(
      named(unit(anchors)), named(unit(feat)), temperature=0.07, anchor=NAMES[anchor], stop_anchor=stop
    )

  value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(DATA["feat_raw"], DATA["anchor_raw"])
  prefix = f"tau0.07/fabind_anchor{anchor}_{kind}"
  close(value, DATA[f"{prefix}/loss"], 1e-10)
  for got, want in zip(grads, (DATA[f"{prefix}/grad_feat_raw"], DATA[f"{prefix}/grad_anchor_raw"])):
    close(got, want, 1e-10)
  if stop:
    assert not np.any(grads[1])


def test_the_centroid_and_its_alignment_gap_are_recorded():
  anchors = named(unit(DATA["anchor_raw"]))
  got = compiled(centroid)(anchors)
  close(got, DATA["tau0.07/centroid"], 1e-12)
  gap = np.mean([np.sum((x - got) ** 2, -1) for x in anchors.values()], axis=0)
  close(1 - jnp.sum(got**2, -1), gap, 1e-12)
  close(gap.mean(), DATA["tau0.07/alignment_gap"], 1e-10)


def random_case(seed, m, b, d=6):
  rng = np.random.default_rng(seed)
  return (named(unit(rng.normal(size=(m, b, d)))) for _ in range(2))


CASES = {
  "seed": st.integers(0, 2**31), "m": st.integers(1, 6), "b": st.sampled_from([2, 7, 20]),
  "tau": st.floats(0.05, 10.0),
}


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_bounds_of_the_centroid(seed, m, b, tau):
  """(i) The loss is at most the mean of the pairwise ones, (iii) at least their sum at tau M, less a constant."""
  anchors, features = random_case(seed, m, b)
  anchor, v = compiled(centroid)(anchors), features["m0"]
  value = directed_info_nce(anchor, v, temperature=tau)
  upper = sum(directed_info_nce(f, v, temperature=tau) for f in anchors.values()) / m
  other = sum(directed_info_nce(v, f, temperature=tau) for f in anchors.values()) / m
  wide_tau = sum(directed_info_nce(f, v, temperature=tau * m) for f in anchors.values())
  assert value <= upper + 1e-12
  assert directed_info_nce(v, anchor, temperature=tau) <= other + 1e-12
  assert value >= wide_tau - (m - 1) * (math.log(b) + 2 / (tau * m)) - 1e-12
  assert 0 <= value <= math.log(b) + 2 / tau
  if m == 1:
    assert value == pytest.approx(float(upper), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(**CASES)
def test_identity_of_the_pairwise_decomposition(seed, m, b, tau):
  anchors, features = random_case(seed, m, b)
  v = features["m0"]
  x = np.stack([f @ v.T for f in anchors.values()]) / (tau * m)
  rest = logsumexp(x.sum(0), axis=1) - logsumexp(x, axis=2).sum(0)
  pairwise = sum(directed_info_nce(f, v, temperature=tau * m) for f in anchors.values())
  assert abs(directed_info_nce(compiled(centroid)(anchors), v, temperature=tau) - pairwise - rest.mean()) < 1e-10


def test_the_upper_bound_fails_for_a_normalised_centroid():
  def violated(seed):
    rng = np.random.default_rng(seed)
    anchors, v = named(unit(rng.normal(size=(4, 16, 8)))), unit(rng.normal(size=(16, 8)))
    upper = sum(directed_info_nce(f, v, temperature=0.1) for f in anchors.values()) / 4
    assert directed_info_nce(compiled(centroid)(anchors), v, temperature=0.1) <= upper
    return directed_info_nce(compiled(centroid, normalize=True)(anchors), v, temperature=0.1) > upper

  assert 5 < sum(violated(seed) for seed in range(40)) < 35


def both(anchors, features, weights=None, **options):
  return float(compiled(centroid_info_nce, temperature=0.2, weights=weights)(anchors, features, **options))


def fixed_anchor(anchors, features, temperature=0.2, mask=None, groups=None, **options):
  """Fixed anchors with the rest of the options static."""
  loss = compiled(fixed_anchor_info_nce, temperature=temperature, **options)
  return loss(anchors, features, mask=mask, groups=groups)


def test_symmetries_of_the_centroid_loss():
  rng = np.random.default_rng(0)
  anchors, features = random_case(1, 3, 7)
  value = both(anchors, features)
  turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
  order = rng.permutation(7)
  shuffle = lambda x: {name: x[name] for name in ("m2", "m0", "m1")}
  # A jitted function would see the modalities sorted.
  shuffled = centroid_info_nce(shuffle(anchors), shuffle(features), temperature=0.2)
  assert float(shuffled) == pytest.approx(value, abs=1e-12)
  for change in (lambda x: x @ turn, lambda x: x[order]):
    assert both(*({name: change(x) for name, x in y.items()} for y in (anchors, features))) == pytest.approx(value)
  # One modality is self-supervised InfoNCE between two views.
  one = {"m0": anchors["m0"]}, {"m0": features["m0"]}
  assert both(*one) == pytest.approx(
    float(directed_info_nce(one[0]["m0"], one[1]["m0"], temperature=0.2)
          + directed_info_nce(one[1]["m0"], one[0]["m0"], temperature=0.2))
  )  # fmt: skip


def test_one_hot_weights_are_a_fixed_anchor():
  anchors, features = random_case(2, 3, 7)
  value = both(anchors, features, weights=(0.0, 1.0, 0.0))
  without = fixed_anchor(anchors, features, anchor="m1", stop_anchor=False)
  own = both({"m1": anchors["m1"]}, {"m1": features["m1"]})
  assert value - own == pytest.approx(float(without), abs=1e-12)


def test_an_instance_with_nothing_that_has_weight_has_no_anchor():
  anchors, features = random_case(2, 3, 7)
  here = np.array([1, 1, 0, 1, 0, 1, 1], bool)
  mask = {"m0": np.ones(7, bool), "m1": here, "m2": np.array([1, 0, 1, 1, 1, 1, 0], bool)}
  value = both(anchors, features, weights=(0.0, 1.0, 0.0), mask=mask)
  without = fixed_anchor(anchors, features, anchor="m1", stop_anchor=False, mask=mask)
  own = both({"m1": anchors["m1"]}, {"m1": features["m1"]}, mask={"m1": here})
  assert value - own == pytest.approx(float(without), abs=1e-12)


def test_queries_and_keys_may_be_exchanged():
  anchors, features = random_case(5, 3, 7)
  anchor = compiled(centroid)(anchors)
  turned = sum(
    directed_info_nce(*pair, temperature=0.2)
    for x in features.values() for pair in ((x, anchor), (anchor, x))
  )  # fmt: skip
  assert both(anchors, features) == pytest.approx(float(turned), abs=1e-12)


def test_equal_embeddings_and_equal_modalities():
  x = unit(np.random.default_rng(3).normal(size=(7, 6)))
  same = {name: x for name in NAMES[:3]}
  pair = directed_info_nce(x, x, temperature=0.2)
  assert both(same, same) == pytest.approx(3 * 2 * float(pair), abs=1e-12)
  flat = {name: np.tile(x[:1], (7, 1)) for name in NAMES[:3]}
  assert both(flat, flat) == pytest.approx(2 * 3 * math.log(7), abs=1e-12)
  assert float(directed_info_nce(x, x, temperature=1e9)) == pytest.approx(math.log(7), abs=1e-6)
  # MI estimate log B - L reaches its bound for separated embeddings.
  assert math.log(6) - float(directed_info_nce(np.eye(6), np.eye(6), temperature=0.01)) == pytest.approx(math.log(6))


def test_every_anchor_gets_an_equal_share_of_the_gradient_and_stopping_it_takes_it_away():
  anchors, features = random_case(4, 3, 7)
  slopes = lambda loss, x: jax.jit(jax.grad(loss))(x)
  grads = slopes(lambda a: centroid_info_nce(a, features, temperature=0.2), anchors)
  close(grads["m0"], grads["m1"], 1e-12)
  close(grads["m0"], grads["m2"], 1e-12)
  assert np.any(grads["m0"])
  stopped = slopes(lambda a: centroid_info_nce(a, features, temperature=0.2, stop_anchor=True), anchors)
  assert not np.any(stopped["m0"])
  fixed = slopes(lambda f: fixed_anchor_info_nce(f, f, temperature=0.2, anchor="m1"), features)
  assert not np.any(fixed["m1"]) and np.any(fixed["m0"])


def test_missing_modalities_per_instance():
  """Rows without a modality are as if it were not there: two groups of rows, each on its own, agree with hand sums."""
  anchors, features = random_case(5, 3, 6)
  here = {"m0": np.ones(6, bool), "m1": np.ones(6, bool), "m2": np.array([1, 1, 1, 0, 0, 0], bool)}
  broken = {name: np.where(here[name][:, None], x, np.nan) for name, x in anchors.items()}
  mean = np.array((anchors["m0"] + anchors["m1"]) / 2)
  mean[:3] = (anchors["m0"] + anchors["m1"] + anchors["m2"])[:3] / 3
  close(compiled(centroid)(broken, mask=here), mean, 1e-12)
  want = sum(
    directed_info_nce(u, v, temperature=0.2)
    for name, rows in (("m0", slice(6)), ("m1", slice(6)), ("m2", slice(3)))
    for u, v in ((mean[rows], features[name][rows]), (features[name][rows], mean[rows]))
  )
  assert both(anchors, features, mask=here) == pytest.approx(float(want), abs=1e-12)


def test_a_noise_anchor_tells_nothing():
  """Held out, the loss to an independent anchor is log B or more in expectation, whatever the other encoder."""
  rng = np.random.default_rng(6)
  losses = [
    float(directed_info_nce(*(unit(rng.normal(size=(32, 4))) for _ in range(2)), temperature=0.3)) for _ in range(50)
  ]
  assert np.mean(losses) > math.log(32)


def test_rows_of_one_group_are_not_each_other_s_negatives():
  rng = np.random.default_rng(5)
  u, v = (unit(rng.normal(size=(4, 3))) for _ in range(2))
  groups, logits = np.array([7, 2, 7, 1]), u @ v.T / 0.3
  keys = {0: [0, 1, 3], 1: [0, 1, 2, 3], 2: [1, 2, 3], 3: [0, 1, 2, 3]}
  want = {b: np.log(np.exp(logits[b, kept]).sum()) - logits[b, b] for b, kept in keys.items()}
  found = directed_info_nce(u, v, temperature=0.3, groups=groups)
  assert float(found) == pytest.approx(np.mean(list(want.values())), rel=1e-6)
  mask = np.array([True, True, True, False])
  want = {b: np.log(np.exp(logits[b, [k for k in kept if k != 3]]).sum()) - logits[b, b]
          for b, kept in keys.items() if b != 3}
  found = directed_info_nce(u, v, temperature=0.3, groups=groups, mask=mask)
  assert float(found) == pytest.approx(np.mean(list(want.values())), rel=1e-6)
  both = lambda groups: float(directed_info_nce(u, v, temperature=0.3, groups=groups)
                              + directed_info_nce(v, u, temperature=0.3, groups=groups))
  both_sides = {"a": u, "b": v}
  fixed = fixed_anchor(both_sides, both_sides, temperature=0.3, anchor="a", groups={"b": groups})
  assert float(fixed) == pytest.approx(both(groups), rel=1e-6) and both(groups) < both(None)
  alone = {"a": u}
  one = compiled(centroid_info_nce, temperature=0.3)(alone, alone, groups=groups)
  assert float(one) == pytest.approx(2 * float(directed_info_nce(u, u, temperature=0.3, groups=groups)), rel=1e-6)


def test_errors():
  x = {"image": np.ones((2, 3))}
  with pytest.raises(ValueError, match="'audio'.*'image'"):
    fixed_anchor_info_nce(x, x, temperature=1.0, anchor="audio")
  with pytest.raises(ValueError, match="same modalities"):
    centroid_info_nce(x, {}, temperature=1.0)

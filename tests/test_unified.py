"""The quantiser of DCID and FCID: recorded numbers of the release, and the paper's form by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax.codebook import unified
from codebind_jax.losses import unified as unified_losses
from tests.golden_fixtures import close, load


@pytest.fixture(autouse=True, scope="module")
def double():
  jax.config.update("jax_disable_most_optimizations", True)
  with jax.enable_x64(True):
    yield
  jax.config.update("jax_disable_most_optimizations", False)


def release_state(data, prefix, modalities):
  idle = {m: jnp.asarray(data[f"{prefix}/unactivated_count"], jnp.int32) for m in modalities}
  arrays = (jnp.asarray(data[f"{prefix}/{name}"]) for name in ("embedding", "ema_count", "ema_weight"))
  return unified.UnifiedState(*arrays, idle)


def check_state(state, data, prefix, tolerance=1e-9):
  close(state.codes, data[f"{prefix}/embedding"], tolerance)
  close(state.ema_count, data[f"{prefix}/ema_count"], tolerance)
  close(state.ema_sum, data[f"{prefix}/ema_weight"], tolerance)
  assert np.array_equal(np.min(list(state.idle.values()), axis=0), data[f"{prefix}/unactivated_count"].astype(int))


def release_commitment(features, quantized, modalities):
  # AV: 2 beta own + beta partner; AVT: 2 beta own + beta / 2 for each of two: in both, partners have half together.
  return unified_losses.unified_commitment(features, quantized, beta=0.5, partner=0.5, reduce="mean")


def release_matching(features, codes):
  p = {m: unified_losses.code_distribution(z, codes) for m, z in features.items()}
  names = list(p)
  pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
  return 0.5 * sum(unified_losses.distribution_matching(p[a], p[b]) for a, b in pairs)


@pytest.mark.parametrize("name, start", [("cmg_vq_av", "rand"), ("cmg_vq_av", "default"), ("cmg_vq_avt", "rand")])
def test_recorded_steps_of_the_release(name, start):
  data = load(name)
  modalities = [str(m) for m in data["meta/modalities"]]
  state = release_state(data, f"{start}/init", modalities)

  def losses(features, cotangents, codes):
    quantized = unified.quantize_unified(features, codes)
    commit = release_commitment(features, {m: q.codes for m, q in quantized.items()}, len(modalities))
    matching = release_matching(features, codes)
    moved = sum(jnp.sum(q.vectors * cotangents[m]) for m, q in quantized.items())
    return sum(commit.values()) + matching + moved, (quantized, commit, matching)

  step_losses = jax.jit(jax.grad(losses, has_aux=True))
  for step in range(6):
    prefix = f"{start}/step{step}"
    features = {m: data[f"{prefix}/{m}/z"] for m in modalities}
    cotangents = {m: data[f"{prefix}/{m}/cot"] for m in modalities}
    grads, (quantized, commit, matching) = step_losses(features, cotangents, state.codes)
    for m in modalities:
      assert np.array_equal(quantized[m].indices, data[f"{prefix}/{m}/indices"])
      close(quantized[m].vectors, data[f"{prefix}/{m}/quantized"], 1e-9)
      close(commit[m], data[f"{prefix}/{m}/commit"], 1e-9)
      close(grads[m], data[f"{prefix}/{m}/grad_all"], 1e-8)
    close(matching, data[f"{prefix}/cmcm"], 1e-9)
    if step < 5:
      state = unified.update_unified(state, features, {m: q.indices for m, q in quantized.items()}, form="sequential",
                                     order=tuple(modalities))  # fmt: skip
    else:
      counts = {m: np.bincount(np.asarray(q.indices).ravel(), minlength=24) for m, q in quantized.items()}
      state = state.replace(idle=unified.tick(state.idle, counts))
    check_state(state, data, f"{prefix}/after")


def test_recorded_resets_of_the_release():
  data = load("cmg_vq_reset")
  state = release_state(data, "dcid/init", "avt")
  for step in range(3):
    prefix = f"dcid/step{step}"
    features = {m: data[f"{prefix}/{m}/z"] for m in ("a", "v", "t")}
    quantized = unified.quantize_unified(features, state.codes)
    indices = {m: q.indices for m, q in quantized.items()}
    for m in indices:
      assert np.array_equal(np.ravel(indices[m]), data[f"{prefix}/{m}/indices"])
    state = unified.update_unified(state, features, indices, form="sequential", order=("a", "v", "t"))
    anyone = np.min(list(state.idle.values()), axis=0)
    expired = anyone > 300
    assert expired.sum() == data[f"{prefix}/n_reset"]
    if expired.any():
      # The draws are torch's: what they were is put in, and that ours would replace the same codes is checked.
      ours = unified.reset_unified(state, jax.random.key(0), used_by="any", keep="codes_only")
      assert np.array_equal(np.any(ours.codes != state.codes, axis=1), expired)
      active = np.flatnonzero((anyone >= 0) & (anyone < 100))
      new = np.array(state.codes)
      new[expired] = new[active[data[f"{prefix}/reset_pick"]]] + data[f"{prefix}/reset_noise"]
      distance = np.abs(np.asarray(ours.codes)[expired][:, None] - np.asarray(state.codes)[active][None]).max(-1)
      assert np.all(distance.min(1) <= 1 / 1024)
      state = unified.put_codes(state, jnp.asarray(expired), new, keep="codes_only")
    check_state(state, data, f"{prefix}/after")


@pytest.mark.parametrize("case", ["seq", "t1", "sharp"])
def test_recorded_code_matching(case):
  data = load("cmg_cmcm")
  codes = data[f"{case}/embedding"]
  features = {m: data[f"{case}/z/{m}"] for m in ("a", "v", "t")}
  pair = lambda f: release_matching({m: f[m] for m in ("a", "v")}, codes)
  close(pair(features), data[f"{case}/av"], 1e-9)
  close(release_matching({m: features[m] for m in ("v", "a")}, codes), data[f"{case}/av_swapped"], 1e-9)
  close(release_matching(features, codes), data[f"{case}/avt"], 1e-9)
  for name, loss in (("av", pair), ("avt", lambda f: release_matching(f, codes))):
    grads = jax.jit(jax.grad(loss))(features)
    for m in features:
      if (key := f"{case}/grad_{name}/{m}") in data:
        close(grads[m], data[key], 1e-7)


def random_features(seed=0, b=5, t=3, d=4, names=("a", "v")):
  rng = np.random.default_rng(seed)
  return {m: rng.normal(size=(b, t, d)) for m in names}


def assigned(features, codes):
  return {m: q.indices for m, q in unified.quantize_unified(features, codes).items()}


def test_joint_form_without_memory_is_the_mean_of_vectors_and_partners():
  features, rng = random_features(), np.random.default_rng(1)
  state = unified.new_unified(rng.normal(size=(6, 4)), "av")
  indices = assigned(features, state.codes)
  new = unified.update_unified(state, features, indices, decay=0.0)
  mixed = (features["a"] + features["v"]) / 2
  for code in range(6):
    mine = np.concatenate([mixed[np.asarray(indices[m]) == code] for m in features])
    close(new.codes[code], mine.mean(0) if len(mine) else state.codes[code], 1e-12)


def test_one_modality_is_ordinary_ema():
  features, rng = random_features(names=("a",)), np.random.default_rng(1)
  state = unified.new_unified(rng.normal(size=(6, 4)), "a")
  index = np.asarray(assigned(features, state.codes)["a"]).ravel()
  new = unified.update_unified(state, features, {"a": index.reshape(5, 3)}, decay=0.9)
  onehot = np.eye(6)[index]
  count = 0.9 + 0.1 * onehot.sum(0)
  total = 0.9 * np.asarray(state.codes) + 0.1 * onehot.T @ features["a"].reshape(-1, 4)
  close(new.ema_count, count, 1e-12)
  close(new.codes, total / count[:, None], 1e-12)


def test_joint_form_is_symmetric_and_the_sequential_one_is_not():
  features, rng = random_features(), np.random.default_rng(1)
  state = unified.new_unified(rng.normal(size=(6, 4)), "av")
  swapped = {"a": features["v"], "v": features["a"]}
  after = lambda f, form: np.asarray(unified.update_unified(state, f, assigned(f, state.codes), form=form).codes)
  close(after(features, "joint"), after(swapped, "joint"), 1e-12)
  gap = np.max(np.abs(after(features, "sequential") - after(swapped, "sequential")))
  assert 1e-6 < gap < 0.02 * np.max(np.abs(state.codes))
  other = unified.update_unified(state, features, assigned(features, state.codes), form="sequential", order=("v", "a"))
  close(other.codes, after(swapped, "sequential"), 1e-12)


def test_count_after_sequential_updates():
  features = random_features(b=4, t=2)
  state = unified.new_unified(np.random.default_rng(1).normal(size=(6, 4)), "av", count=0.0)
  for _ in range(3):
    state = unified.update_unified(state, features, assigned(features, state.codes), form="sequential")
  # Smoothing keeps the sum; every one of two modalities a batch is an update.
  assert float(np.sum(state.ema_count)) == pytest.approx(8 * (1 - 0.99**6))


def test_codes_never_used_stay_where_they_are_and_with_the_release_s_start_are_thrown_out():
  features = random_features()
  codes = np.concatenate([np.random.default_rng(1).normal(size=(5, 4)), np.full((1, 4), 50.0)])
  steps = lambda count, form: unified.update_unified(
    (s := unified.new_unified(codes, "av", count=count)), features, assigned(features, s.codes), form=form
  )
  close(steps(1.0, "joint").codes[5], codes[5], 1e-12)
  assert np.all(steps(0.0, "sequential").codes[5] > 1000 * codes[5])


def test_partners_by_attention():
  features = random_features(t=1)
  same, attention = (unified.partners(features, how=how) for how in ("same", "attention"))
  close(same["a"], features["v"], 1e-12)
  close(attention["a"], features["v"], 1e-12)
  longer = random_features(t=3)
  weights = np.exp(np.einsum("btd,bud->btu", longer["a"], longer["v"]) / 2)
  weights /= weights.sum(-1, keepdims=True)
  close(unified.partners(longer, how="attention")["a"], weights @ longer["v"], 1e-12)


def test_missing_modalities_have_no_part():
  features, rng = random_features(names=("a", "v", "t")), np.random.default_rng(1)
  masks = {"a": np.ones(5, bool), "v": np.array([1, 1, 1, 0, 0], bool), "t": np.zeros(5, bool)}
  features["t"][:] = np.nan
  features["v"][3:] = np.nan
  state = unified.new_unified(rng.normal(size=(6, 4)), "avt")
  indices = assigned(features, state.codes)
  new = unified.update_unified(state, features, indices, decay=0.0, masks=masks)
  values = {m: np.array(features[m]) for m in "av"}
  values["a"][:3] = values["v"][:3] = (features["a"] + features["v"])[:3] / 2
  for code in range(6):
    mine = [values[m][rows][np.asarray(indices[m])[rows] == code] for m, rows in (("a", slice(5)), ("v", slice(3)))]
    mine = np.concatenate(mine)
    close(new.codes[code], mine.mean(0) if len(mine) else state.codes[code], 1e-12)
  commit = unified_losses.unified_commitment(features, {m: jnp.zeros((5, 3, 4)) for m in features}, masks=masks)
  assert np.isfinite(list(commit.values())).all() and commit["t"] == 0


def test_commitment_forms_and_straight_through():
  features = random_features()
  codes = np.random.default_rng(1).normal(size=(6, 4))
  same = {"a": features["a"], "v": features["a"]}
  quantized = {m: q.codes for m, q in unified.quantize_unified(same, codes).items()}
  square = np.mean(np.sum((features["a"] - quantized["a"]) ** 2, -1))
  assert float(unified_losses.unified_commitment(same, quantized)["a"]) == pytest.approx(1.5 * 0.25 * square)
  assert float(release_commitment(same, quantized, 2)["a"]) == pytest.approx(3 * 0.25 * square / 4)
  quantized = {m: q.codes for m, q in unified.quantize_unified(features, codes).items()}
  grad = jax.grad(lambda z: unified_losses.unified_commitment({"a": z}, {"a": quantized["a"]}, reduce="mean")["a"])
  z = features["a"]
  close(grad(z), 2 * 0.25 * (z - quantized["a"]) / z.size, 1e-12)
  through = jax.grad(lambda z, e: jnp.sum(unified.quantize_unified({"a": z}, e)["a"].vectors * z), (0, 1))
  to_z, to_codes = through(z, codes)
  close(to_z, z + quantized["a"], 1e-12)
  assert not np.any(to_codes)


@pytest.mark.parametrize("used_by, replaced", [("all", True), ("any", False)])
def test_a_code_only_one_modality_uses_is_reset_in_the_paper_s_sense(used_by, replaced):
  state = unified.new_unified(np.arange(12.0).reshape(3, 4), "av")
  state = state.replace(idle={"a": jnp.array([0, 0, 500]), "v": jnp.array([0, 500, 500])})
  for seed in range(5):
    new = unified.reset_unified(state, jax.random.key(seed), used_by=used_by)
    assert bool(np.any(new.codes[1] != state.codes[1])) == replaced
    assert np.any(new.codes[2] != state.codes[2]) and np.array_equal(new.codes[0], state.codes[0])
    assert np.all(np.min(np.abs(new.codes[2] - state.codes[:2]), axis=0) <= 1 / 1024)


def test_modalities_that_never_meet_need_not_share_a_code():
  state = unified.new_unified(np.arange(12.0).reshape(3, 4), "avt")
  state = state.replace(idle={"a": jnp.array([0, 500, 500]), "v": jnp.array([500, 0, 0]), "t": jnp.array([0, 0, 500])})
  replaced = lambda **o: np.any(unified.reset_unified(state, jax.random.key(0), **o).codes != state.codes, 1).tolist()
  assert replaced() == [True, True, True]
  # One source has sounds and names, one pictures and names: code 0 is in use in the first, 1 in the second.
  assert replaced(together=(("a", "t"), ("t", "v"))) == [False, False, True]
  assert replaced(together=(("a", "t"), ("t", "v")), used_by="any") == [False, False, False]
  assert replaced(together=(("a", "t", "v"), ("x",))) == [True, True, True]  # no code is asked of what has none


def test_the_sequential_form_adds_up_every_modality():
  features = random_features()
  state = unified.new_unified(np.random.default_rng(1).normal(size=(6, 4)), "av")
  indices = assigned(features, state.codes)
  update = lambda order: unified.update_unified(state, features, indices, form="sequential", order=order)
  whole = update(("v", "a"))
  for order in (("v",), ("text", "v")):
    np.testing.assert_array_equal(update(order).ema_sum, whole.ema_sum)
  np.testing.assert_array_equal(update(()).ema_sum, update(("a", "v")).ema_sum)
  # 15 vectors of each modality; the smoothing keeps the mass.
  mass = 0.99 * (0.99 * float(jnp.sum(state.ema_count)) + 0.01 * 15) + 0.01 * 15
  assert float(jnp.sum(whole.ema_count)) == pytest.approx(mass)


def test_a_never_used_code_is_first_replaced_at_forward_302_and_survives_the_next_update():
  features = {m: np.zeros((1, 2, 4)) for m in ("a", "v")}
  codes = np.stack([np.zeros(4), np.full(4, 9.0)])
  state = unified.new_unified(codes, "av")
  indices = assigned(features, codes)

  @jax.jit
  def forward(state):
    return unified.reset_unified(unified.update_unified(state, features, indices), jax.random.key(0))

  for _ in range(301):
    state = forward(state)
  close(state.codes[1], codes[1], 1e-9)
  state = forward(state)
  assert np.max(np.abs(state.codes[1])) <= 1 / 1024
  kept = unified.update_unified(state, features, indices)
  close(kept.codes[1], state.codes[1], 1e-9)


def test_the_release_s_reset_is_undone_by_the_next_update():
  features = random_features()
  codes = np.concatenate([np.random.default_rng(1).normal(size=(5, 4)), np.full((1, 4), 9.0)])
  state = unified.new_unified(codes, "av")
  state = state.replace(idle=dict.fromkeys("av", jnp.array([0] * 5 + [400])))
  reset = unified.reset_unified(state, jax.random.key(0), keep="codes_only")
  assert np.max(np.abs(reset.codes[5] - 9.0)) > 1
  back = unified.update_unified(reset, features, {m: jnp.zeros((5, 3), int) for m in features})
  close(back.codes[5], state.codes[5], 1e-9)


def test_code_matching_limits_and_symmetry():
  sharp = np.eye(4) * (1 - 4e-9) + 1e-9
  match = lambda p, q, **o: float(unified_losses.distribution_matching(p, q, **o))
  assert match(sharp, sharp) == pytest.approx(0.0, abs=1e-6)
  flat = np.tile(np.array([[0.5, 0.3, 0.2]]), (5, 1))
  assert match(flat, flat) == pytest.approx(np.log(5), abs=1e-5)
  # Three groups of five equal rows: a row is told from those of the other groups alone (3, 3, 3, 3 and 4 of them).
  want = (4 * np.log(1 + 3) + np.log(1 + 4)) / 5
  assert match(flat, flat, groups=np.array([0, 0, 1, 1, 2])) == pytest.approx(want, abs=1e-5)
  rng = np.random.default_rng(0)
  p, q = (rng.dirichlet(np.ones(6), 5) for _ in range(2))
  assert match(p, q) == pytest.approx(match(q, p), abs=1e-12)
  assert np.allclose(unified_losses.code_distribution(rng.normal(size=(5, 3, 4)), rng.normal(size=(7, 4))).sum(1), 1)
  rows = np.array([1, 1, 0, 1, 0], bool)
  assert match(p, q, mask=rows) == pytest.approx(match(p[rows], q[rows]))
  # With equal modalities the release's form is largest on the diagonal of a row; the symmetric one need not be.
  two = np.array([[0.6, 0.4], [0.7, 0.3]])
  assert match(two, two) != pytest.approx(match(two, two, symmetric=True), abs=1e-6)
  for same in (two, p, q, rng.dirichlet(0.1 * np.ones(6), 5)):  # so that no row costs more than log of their number
    assert match(same, same) <= np.log(len(same)) + 1e-9


def test_errors():
  state = unified.new_unified(np.ones((2, 3)), "a")
  z = {"a": np.ones((1, 1, 3))}
  for call in (
    lambda: unified.update_unified(state, z, {"a": np.zeros((1, 1), int)}, form="both"),
    lambda: unified.reset_unified(state, jax.random.key(0), used_by="none"),
    lambda: unified_losses.unified_commitment(z, z, reduce="max"),
    lambda: unified.partners(z, how="near"),
  ):
    with pytest.raises(ValueError, match="must be"):
      call()

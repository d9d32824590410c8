"""Transport plans: recorded ones, POT's, and what a plan must satisfy."""

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest

from codebind_jax import transport
from codebind_jax.losses import prototypes
from tests.golden_fixtures import close, load

DATA = load("codis_ot")
CASES = [str(case) for case in DATA["meta/cases"]]


@pytest.fixture(autouse=True, scope="module")
def double():
  jax.config.update("jax_disable_most_optimizations", True)
  with jax.enable_x64(True):
    yield
  jax.config.update("jax_disable_most_optimizations", False)


def problem(case, marginals):
  return DATA[f"{case}/cost"], DATA[f"{case}/{marginals}/mu"], DATA[f"{case}/{marginals}/nu"]


@pytest.mark.parametrize("case, marginals", [("wide", "uniform"), *((case, "random") for case in CASES)])
def test_recorded_plans(case, marginals):
  cost, a, b = problem(case, marginals)
  if marginals == "uniform":
    a = b = None
  prefix = f"{case}/{marginals}"
  for beta, outer in ((0.5, 1), (0.5, 50), (0.1, 1000)):
    plan = transport.ipot(cost, a, b, beta=beta, outer=outer)
    close(plan, DATA[f"{prefix}/ipot_{beta}/it{outer}/plan"], 1e-9)
  plan = transport.ipot(cost, a, b, beta=0.1, outer=5, inner=20)
  close(plan, DATA[f"{prefix}/ipot_0.1/inner20_it5/plan"], 1e-9)
  for reg in (0.5, 0.03):
    plan = transport.sinkhorn(cost, a, b, reg=reg, iterations=10)
    close(plan, DATA[f"{prefix}/sinkhorn_{reg}/plan_10iters"], 1e-9)


@pytest.mark.parametrize("case", CASES)
def test_many_steps_reach_pot_s_exact_plan(case):
  cost, a, b = problem(case, "random")
  exact = float(np.sum(cost * ot.emd(a, b, cost)))
  plan = np.asarray(transport.ipot(cost, a, b, beta=0.05, outer=3000))
  assert float(np.sum(cost * plan)) == pytest.approx(exact, abs=2e-4)
  close(plan, DATA[f"{case}/random/emd_plan"], 0.05)
  gaps = [
    abs(np.sum(cost * np.asarray(transport.ipot(cost, a, b, outer=outer))) - exact) for outer in (5, 50, 500, 2000)
  ]
  assert gaps == sorted(gaps, reverse=True)


@pytest.mark.parametrize("outer", [1, 3, 8])
def test_outer_steps_with_a_converged_inner_loop_are_sinkhorn(outer):
  cost, a, b = problem("wide", "random")
  plan = transport.ipot(cost, a, b, beta=0.5, outer=outer, inner=400)
  close(plan, ot.sinkhorn(a, b, cost, 0.5 / outer, method="sinkhorn_log", numItermax=5000, stopThr=1e-13), 1e-9)
  close(plan, transport.sinkhorn(cost, a, b, reg=0.5 / outer, iterations=2000), 1e-9)


def test_marginals():
  cost, a, b = problem("tall", "random")
  violations = []
  for outer in (1, 10, 100, 1000):
    plan = np.asarray(transport.ipot(cost, a, b, outer=outer))
    assert np.all(plan >= 0) and abs(plan.sum() - 1) < 1e-12
    assert np.max(np.abs(plan.sum(0) - b)) < 1e-12
    violations.append(np.max(np.abs(plan.sum(1) - a)))
  assert violations[-1] < 1e-4 < violations[0]


def test_symmetries():
  cost, a, b = problem("wide", "random")
  rng = np.random.default_rng(0)
  rows, columns = rng.permutation(cost.shape[0]), rng.permutation(cost.shape[1])
  plan = np.asarray(transport.ipot(cost, a, b))
  close(transport.ipot(cost[rows][:, columns], a[rows], b[columns]), plan[rows][:, columns], 1e-12)
  close(transport.ipot(np.full_like(cost, 0.7), a, b), np.outer(a, b), 1e-12)
  # A constant a row is absorbed by its scaling; one a column only by a converged inner loop.
  close(transport.ipot(cost + rng.normal(size=(len(a), 1)), a, b), plan, 1e-10)
  tilted = cost + rng.normal(size=(1, len(b)))
  assert np.max(np.abs(transport.ipot(tilted, a, b, outer=5) - transport.ipot(cost, a, b, outer=5))) > 1e-4
  close(transport.ipot(tilted, a, b, outer=3, inner=600), transport.ipot(cost, a, b, outer=3, inner=600), 1e-8)


def test_separated_clusters_are_matched():
  order = np.random.default_rng(1).permutation(6)
  close(transport.ipot(1.0 - np.eye(6)[order]), np.eye(6)[order] / 6, 1e-12)


def test_rows_without_mass_are_as_if_absent_and_huge_costs_are_finite():
  cost, _, b = problem("wide", "random")
  mass = np.where(np.arange(16) < 10, 0.1, 0.0)
  plan = np.asarray(transport.ipot(cost, mass, b))
  close(plan[:10], transport.ipot(cost[:10], None, b), 1e-12)
  assert not np.any(plan[10:])
  for solve in (
    lambda c: transport.ipot(c, mass, b, beta=0.01),
    lambda c: transport.sinkhorn(c, mass, b, reg=0.01, iterations=50),
  ):
    assert np.isfinite(solve(1000.0 * cost)).all()


def test_float32_is_close_to_float64():
  cost, a, b = problem("sq", "random")
  with jax.enable_x64(False):
    single = np.asarray(transport.ipot(cost, a, b))
  assert single.dtype == np.float32
  close(single, DATA["sq/random/ipot_0.5/it50/plan"], 1e-4)


def test_errors():
  for bad in ({"beta": 0.0}, {"outer": 0}, {"inner": 0}):
    with pytest.raises(ValueError, match="positive"):
      transport.ipot(np.ones((2, 3)), **bad)
  with pytest.raises(ValueError, match="marginal b must have length 3"):
    transport.sinkhorn(np.ones((2, 3)), None, np.ones(2) / 2, reg=1.0, iterations=1)


@jax.jit
def code_losses(inputs):
  plans = [prototypes.assign(inputs[m], inputs["codebook"]) for m in ("zmv", "zmt")]
  gamma = float(DATA["codeloss/gamma"])
  return {
    "ot": sum(prototypes.transport_loss(p, inputs[m], inputs["codebook"]) for p, m in zip(plans, ("zmv", "zmt"))),
    "t2p": prototypes.swapped_prediction(plans[0], inputs["zt"], inputs["codebook"], temperature=gamma),
    "i2p": prototypes.swapped_prediction(plans[1], inputs["zv"], inputs["codebook"], temperature=gamma),
  }


INPUTS = {name: DATA[f"codeloss/{name}"] for name in ("zv", "zt", "zmv", "zmt", "codebook")}


def test_recorded_code_losses_and_gradients():
  close(prototypes.assign(INPUTS["zmv"], INPUTS["codebook"]), DATA["codeloss/Tv"], 1e-9)
  close(prototypes.assign(INPUTS["zmt"], INPUTS["codebook"]), DATA["codeloss/Tt"], 1e-9)
  values, jacobian = code_losses(INPUTS), jax.jit(jax.jacrev(code_losses))(INPUTS)
  for name, value in values.items():
    close(value, DATA[f"codeloss/loss_{name}"], 1e-9)
    grads = jacobian[name]
    for given in ("zv", "zt", "codebook"):
      want = DATA[f"codeloss/grad_{name}/{given}"]
      close(grads[given], np.zeros_like(INPUTS[given]) if want.size == 1 else want, 1e-8)
    assert not np.any(grads["zmv"]) and not np.any(grads["zmt"])


def test_symmetries_of_the_code_losses():
  value = {name: float(x) for name, x in code_losses(INPUTS).items()}
  swapped = code_losses({"zv": INPUTS["zt"], "zt": INPUTS["zv"], "zmv": INPUTS["zmt"], "zmt": INPUTS["zmv"],
                         "codebook": INPUTS["codebook"]})  # fmt: skip
  assert swapped["t2p"] == pytest.approx(value["i2p"]) and swapped["i2p"] == pytest.approx(value["t2p"])
  assert swapped["ot"] == pytest.approx(value["ot"])
  rng = np.random.default_rng(2)
  turn = np.linalg.qr(rng.normal(size=(12, 12)))[0]
  for other in (
    {name: x @ turn for name, x in INPUTS.items()}, INPUTS | {"codebook": rng.permutation(INPUTS["codebook"])}
  ):
    for name, x in code_losses(other).items():
      assert float(x) == pytest.approx(value[name], rel=1e-9)
  same = code_losses(dict.fromkeys(("zv", "zt", "zmv", "zmt"), INPUTS["zv"]) | {"codebook": INPUTS["codebook"]})
  assert float(same["t2p"]) == pytest.approx(float(same["i2p"]))


def test_a_uniform_prediction_costs_log_k_and_the_entropy_of_the_target_is_a_lower_bound():
  plan = prototypes.assign(INPUTS["zmv"], INPUTS["codebook"], plan=lambda c, a: transport.ipot(c, a, outer=3000))
  target = np.asarray(plan) * 16
  predict = lambda student, t: float(prototypes.swapped_prediction(plan, student, INPUTS["codebook"], temperature=t))
  assert predict(INPUTS["zt"], 1e6) == pytest.approx(np.log(24), abs=1e-4)
  entropy = -np.sum(target * np.log(np.where(target > 0, target, 1.0)), axis=1)
  assert predict(INPUTS["zmv"], 0.1) >= entropy.mean() - 1e-9
  # Each of 24 codes takes 1/24, so a row of mass 1/16 needs more than one.
  assert entropy.mean() >= np.log(24 / 16) - 1e-3


def test_equal_features_do_not_collapse():
  same = np.ones((16, 12))
  plan = np.asarray(prototypes.assign(same, INPUTS["codebook"]))
  close(plan, np.full((16, 24), 1 / (16 * 24)), 1e-9)
  cost = 1 - np.asarray(prototypes._cosine(same, INPUTS["codebook"]))
  assert len(set(cost.argmin(1))) == 1


def test_a_modality_that_no_row_has_gets_an_empty_plan():
  for plan in (None, lambda cost, mass: transport.sinkhorn(cost, mass, reg=0.1, iterations=20)):
    found = prototypes.assign(INPUTS["zmv"], INPUTS["codebook"], mask=np.zeros(16, bool), plan=plan)
    assert np.array_equal(found, np.zeros((16, 24)))


def test_the_entropy_is_reached_where_the_prediction_is_the_target():
  z, codes = INPUTS["zv"], INPUTS["codebook"]
  told = np.asarray(jax.nn.softmax(prototypes._cosine(z, codes) / 0.1, axis=1))
  loss = float(prototypes.swapped_prediction(told / 16, z, codes, temperature=0.1))
  assert loss == pytest.approx(-np.mean(np.sum(told * np.log(told), axis=1)), rel=1e-9)


def test_teachers_and_queues_get_no_gradient():
  rng = np.random.default_rng(4)
  a, b, c, old = (rng.normal(size=(5, 4)) for _ in range(4))
  queue = prototypes.enqueue(prototypes.new_queue(5, 4), old)

  def loss(student, query, key, kept):
    queued = queue.replace(features=kept)
    return prototypes.momentum_contrast(student, query, key, queued, temperature=0.3, alpha=0.4)

  to_student, *others = jax.grad(loss, (0, 1, 2, 3))(a, b, c, jnp.asarray(queue.features, jnp.float64))
  assert np.any(to_student) and not any(np.any(x) for x in others)


def test_teacher_and_queue():
  student, start = {"w": np.arange(3.0)}, {"w": np.ones(3)}
  assert np.array_equal(prototypes.teacher_update(start, student, 1.0)["w"], start["w"])
  assert np.array_equal(prototypes.teacher_update(start, student, 0.0)["w"], student["w"])
  teacher = start
  for _ in range(5):
    teacher = prototypes.teacher_update(teacher, student, 0.9)
  close(teacher["w"] - student["w"], 0.9**5 * (start["w"] - student["w"]), 1e-12)

  queue = prototypes.new_queue(6, 2)
  batches = np.arange(40.0).reshape(5, 4, 2).astype(np.float32)
  seen = []
  for batch in batches:
    queue = prototypes.enqueue(queue, batch)
    seen = [*seen, *batch.tolist()][-6:]
    assert sorted(np.asarray(queue.features)[np.asarray(queue.valid)].tolist()) == sorted(seen)
  assert int(queue.pointer) == 20 % 6
  masked = prototypes.enqueue(prototypes.new_queue(6, 2), batches[0], np.array([1, 0, 0, 1], bool))
  assert np.asarray(masked.valid).tolist() == [True, False, False, True, False, False]
  with pytest.raises(ValueError, match="cannot take"):
    prototypes.enqueue(queue, np.zeros((7, 2)))


def test_momentum_contrast():
  from codebind_jax.losses import directed_info_nce

  rng = np.random.default_rng(3)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  a, b, c = (unit(rng.normal(size=(5, 4))) for _ in range(3))
  contrast = lambda s, q, k, queue=None, **o: float(prototypes.momentum_contrast(s, q, k, queue, temperature=0.3, **o))
  # Without soft targets and queue it is InfoNCE; with one row and no queue there is nothing to contrast.
  assert contrast(a, b, c) == pytest.approx(float(directed_info_nce(a, c, temperature=0.3)))
  assert contrast(a[:1], b[:1], c[:1]) == pytest.approx(0.0, abs=1e-12)
  assert contrast(a, b, c, prototypes.new_queue(6, 4)) == pytest.approx(contrast(a, b, c))
  queue = prototypes.enqueue(prototypes.new_queue(6, 4), b)
  scores = np.concatenate([a @ c.T, a @ b.T], 1) / 0.3
  logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
  assert contrast(a, b, c, queue) == pytest.approx(-np.mean(np.diagonal(logs)), rel=1e-6)
  soft = np.exp(np.concatenate([b @ c.T, b @ b.T], 1) / 0.3)
  target = 0.6 * np.eye(5, 10) + 0.4 * soft / soft.sum(1, keepdims=True)
  assert contrast(a, b, c, queue, alpha=0.4) == pytest.approx(-np.mean((target * logs).sum(1)), rel=1e-6)
  # Rows of one group, in the batch or in the queue, are no negatives.
  groups, older = np.array([3, 1, 3, 0, 8]), np.array([0, 5, 3, 9, 1])
  queue = prototypes.enqueue(prototypes.new_queue(6, 4), b, groups=older)
  apart = np.concatenate([(groups[:, None] != groups) | np.eye(5, dtype=bool), groups[:, None] != older], 1)
  logs = scores - np.log((np.exp(scores) * apart).sum(1, keepdims=True))
  assert contrast(a, b, c, queue, groups=groups) == pytest.approx(-np.mean(np.diagonal(logs)), rel=1e-6)
  rows = np.array([1, 1, 0, 1, 0], bool)
  assert contrast(a, b, c, mask=rows) == pytest.approx(contrast(a[rows], b[rows], c[rows]))
  four = prototypes.pair_loss({"x": a, "y": b}, {"x": a, "y": b}, None, ("x", "y"), temperature=0.3)
  each = [contrast(s, s, k) for s in (a, b) for k in (a, b)]
  assert float(four) == pytest.approx(np.mean(each))

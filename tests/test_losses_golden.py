"""Losses and loss balancer against numbers recorded from the public PyTorch release."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax import losses

PATH = pathlib.Path(__file__).parent / "golden" / "codebind_losses.npz"


@pytest.fixture(autouse=True, scope="module")
def quick_compiler():
  """Compile time is what these tests cost."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def data():
  with np.load(PATH) as data:
    return dict(data)


def close(got, want, tolerance=2e-5):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  error = np.max(np.abs(got - want)) / max(np.max(np.abs(want)), 1e-30)
  assert error < tolerance, error


def check_gradients(function, inputs, wanted):
  """Values of `wanted` are the gradients of function(inputs) by name."""
  gradients = jax.grad(function)(inputs)
  for name, gradient in wanted.items():
    close(gradients[name], gradient)


def pair_loss(features, pairs, temperature, scales=None):
  scales = scales or {}
  return sum(
    losses.info_nce(
      features[a], features[b], temperature=temperature, logit_scale_a=scales.get(a, 1.0),
      logit_scale_b=scales.get(b, 1.0), scale_inside_cosine=bool(scales),
    )
    for a, b in pairs
  ) / len(pairs)  # fmt: skip


@pytest.mark.parametrize(
  "case, pairs",
  [
    ("intra_inter", [("vision", "audio"), ("text", "audio"), ("vision", "text")]),
    ("inter_only", [("vision", "audio"), ("text", "audio")]),
    ("text_inter_plus_intra", [("text", "audio"), ("vision", "text")]),
    ("vision_only", [("vision", "audio")]),
  ],
)
def test_info_nce(data, case, pairs):
  features = {m: data[f"info_nce/feat/{m}"] for m in ("vision", "text", "audio")}
  loss = lambda f: pair_loss(f, pairs, float(data["meta/temperature"]))
  close(loss(features), data[f"info_nce/{case}"])
  prefix = f"info_nce/{case}_grad/"
  check_gradients(loss, features, {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)})


def test_info_nce_of_two_views(data):
  features = {"two": data["info_nce/feat/vision_two_views"], "audio": data["info_nce/feat/audio"]}

  def loss(f):
    half = f["two"].shape[0] // 2
    views = f["two"][:half], f["two"][half:]
    within = losses.info_nce(*views, temperature=1.0)
    across = losses.info_nce(views[0], f["audio"], temperature=float(data["meta/temperature"]))
    return (within + across) / 2

  close(loss(features), data["info_nce/self_contrast"])
  wanted = {"two": data["info_nce/self_contrast_grad/vision_two_views"]}
  wanted["audio"] = data["info_nce/self_contrast_grad/audio"]
  check_gradients(loss, features, wanted)


def test_release_order_of_the_logit_scale_gives_it_no_gradient_and_ours_does(data):
  features = {m: data[f"info_nce/feat/{m}"] for m in ("vision", "text", "audio")}
  pairs = [("vision", "audio"), ("text", "audio"), ("vision", "text")]
  scales = {"text": 14.3, "audio": 20.0}
  close(pair_loss(features, pairs, 0.07, scales), data["info_nce/with_postprocessors"])

  def ours(scale, inside):
    return losses.info_nce(
      features["text"], features["audio"], temperature=0.07, logit_scale_a=scale, scale_inside_cosine=inside
    )

  assert jax.grad(ours)(1.3, True) == 0.0
  assert abs(jax.grad(ours)(1.3, False)) > 0.1


@pytest.mark.parametrize("case", ["mixed", "mixed_no_intra", "nonneg", "one_negative", "tokens"])
def test_code_matching(data, case):
  inputs = {m: data[f"cmcm/{case}/dist/{m}"] for m in ("vision", "text", "audio")}
  pairs = [("vision", "audio"), ("text", "audio")] + ([] if case == "mixed_no_intra" else [("vision", "text")])
  first = lambda x: x[:, 0] if x.ndim == 4 else x

  def loss(f):
    return sum(losses.code_matching(first(f[a]), first(f[b]), release_axis=True) for a, b in pairs) / len(pairs)

  close(loss(inputs), data[f"cmcm/{case}/loss"])
  check_gradients(loss, inputs, {m: data[f"cmcm/{case}/loss_grad/{m}"] for m in inputs})


def test_code_matching_always_over_codes_by_default(data):
  a, b = (jnp.asarray(data[f"cmcm/nonneg/dist/{m}"]) for m in ("vision", "audio"))
  # The softmax over codes does not notice a constant, so the sign cannot matter.
  close(losses.code_matching(a, b), losses.code_matching(a - 10.0, b - 10.0))
  assert abs(losses.code_matching(a, b) - losses.code_matching(a, b, release_axis=True)) > 1e-3


@pytest.mark.parametrize("case", ["decomp_norm", "decomp_raw"])
def test_decomposition_and_specific_uniform(data, case):
  names = ("vision", "audio")
  inputs = {f"{m}/{part}": data[f"{case}/{m}/{part}"] for m in names for part in ("common", "specific")}
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True) if case == "decomp_raw" else x
  decomposition = lambda f: sum(
    losses.decomposition(unit(f[f"{m}/common"]), unit(f[f"{m}/specific"])) for m in names
  ) / 2
  close(decomposition(inputs), data[f"{case}/modal_decomp"])
  check_gradients(decomposition, inputs, {k: data[f"{case}/modal_decomp_grad/{k}"] for k in inputs})
  uniform = lambda f: sum(losses.specific_uniform(unit(f[f"{m}/specific"][:, 0])) for m in names) / 2
  close(uniform(inputs), data[f"{case}/uniform"])
  check_gradients(uniform, inputs, {k: data[f"{case}/uniform_grad/{k}"] for k in inputs if "specific" in k})


@pytest.mark.parametrize("case", ["cos", "nonneg", "l2", "fewcodes"])
def test_code_contrast(data, case):
  similarity = {"dist": data[f"codebook/{case}/dist"]}
  loss = lambda f: losses.code_contrast(f["dist"], double_softmax=True)
  close(loss(similarity), data[f"codebook/{case}/contrastive"])
  check_gradients(loss, similarity, {"dist": data[f"codebook/{case}/contrastive_grad/dist"]})


def test_code_uniform(data):
  codes = {"weight": data["codebook/weight"]}
  loss = lambda f: losses.code_uniform(f["weight"])
  close(loss(codes), data["codebook/uniform"])
  check_gradients(loss, codes, {"weight": data["codebook/uniform_grad/weight"]})


@pytest.mark.parametrize("case", ["default", "fast"])
def test_balancer(data, case):
  names = [str(name) for name in data["balancer/names"]]
  factors = {
    "loss_vq": 0.01, "loss_cmcm": 0.1, "loss_vq_reg": 0.1, "loss_modal_decomp": 0.1, "loss_uniform": 1.0
  }  # fmt: skip
  state = losses.balance_init(
    names, fixed=("info_nce", "loss_rec"), factors=factors, **json.loads(str(data[f"balancer/{case}/kwargs"]))
  )
  update = jax.jit(losses.balance_update)
  columns = ("raw", "present", "is_training", "weights", "total", "interval")
  rows = zip(*(data[f"balancer/{case}/{column}"] for column in columns))
  for raw, present, training, weights, total, interval in rows:
    given = {name: float(value) for name, value, here in zip(names, raw, present) if here}
    state = update(state, given) if training else state
    close([state.weight[name] for name in names], weights, 1e-5)
    close(sum(float(state.weight[name]) * value for name, value in given.items()), total, 2e-4)
    assert int(state.interval) == interval

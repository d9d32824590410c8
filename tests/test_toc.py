"""Channel selection: recorded numbers, the closed form against its definition, and planted codebooks."""

import jax
import numpy as np
import pytest

from codebind_jax.methods import toc
from codebind_jax.methods.toc import codes_of, keep_channels
from tests.golden_fixtures import close, load

DATA = load("cmg_toc")


@pytest.fixture(autouse=True, scope="module")
def double():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize("prefix, weights", [("", {}), ("simonly/", {"variance": 0.0})])
def test_recorded_scores_and_selections(prefix, weights):
  close(toc.channel_scores(DATA["codebook"], **weights), DATA[f"{prefix}criterion"], 1e-5)
  for case in DATA["cases"]:
    q, ratio = str(case)[1:].split("_")
    p, r = map(int, ratio.split("to"))
    got = toc.select_channels(DATA["codebook"], int(q), (p, r), **weights)
    assert np.array_equal(got, DATA[f"{prefix}{case}/indices"]), case


def test_the_closed_form_is_the_double_sum():
  codes = np.random.default_rng(0).normal(0.3, 1.0, (17, 5))
  pairs = sum(codes[i] * codes[j] for i in range(17) for j in range(17) if i != j) / (17 * 16)
  close(toc.channel_scores(codes), -0.7 * pairs + 0.3 * codes.var(0, ddof=1), 1e-12)


def test_invariances():
  rng = np.random.default_rng(1)
  codes = rng.normal(0.2, 1.0, (17, 6))
  scores = np.asarray(toc.channel_scores(codes))
  close(toc.channel_scores(rng.permutation(codes)), scores, 1e-12)
  close(toc.channel_scores(codes * rng.choice([-1, 1], 6)), scores, 1e-12)
  close(toc.channel_scores(3 * codes), 9 * scores, 1e-12)
  order = rng.permutation(6)
  close(toc.channel_scores(codes[:, order]), scores[order], 1e-12)
  assert np.all(toc.channel_scores(np.sign(codes.mean(0)) * codes + 1.0) < scores)


def test_selection_of_everything_is_a_permutation_and_ties_go_to_the_lowest():
  codes = np.random.default_rng(2).normal(size=(9, 6))
  assert sorted(np.asarray(toc.select_channels(codes, 6))) == list(range(6))
  hadamard = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1.0]])
  codes = np.concatenate([hadamard, -hadamard])
  assert np.asarray(toc.select_channels(codes, 3)).tolist() == [0, 1, 2]
  assert np.asarray(toc.select_channels(codes, 4, (1, 1))).tolist() == [0, 1, 0, 1]


def test_planted_redundant_channels_are_left_out():
  rng = np.random.default_rng(3)
  codes = np.concatenate([rng.normal(size=(400, 8)), 2.0 + 0.1 * rng.normal(size=(400, 8))], axis=1)
  order = rng.permutation(16)
  kept = np.asarray(toc.select_channels(codes[:, order], 8))
  assert set(order[kept]) == set(range(8))
  assert toc.redundancy(codes[:, order][:, kept]) < toc.redundancy(codes) - 0.5


def test_redundancy_by_hand():
  codes = np.random.default_rng(4).normal(size=(5, 3))
  unit = codes / np.linalg.norm(codes, axis=1, keepdims=True)
  cosines = unit @ unit.T
  assert float(toc.redundancy(codes)) == pytest.approx((cosines.sum() - 5) / 20)
  # A code without a direction: one of three pairs has cosine 1, two have none.
  assert float(toc.redundancy(np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))) == pytest.approx(1 / 3)


def test_channels_of_compositional_codes_are_those_of_every_segment():
  x = np.arange(1.0, 13).reshape(2, 6)
  kept = keep_channels(x, np.array([2, 0]), 3)
  want = x[:, [2, 0, 5, 3]]
  np.testing.assert_allclose(kept, want / np.linalg.norm(want, axis=1, keepdims=True))
  np.testing.assert_allclose(keep_channels(x, np.arange(6), 6), x / np.linalg.norm(x, axis=1, keepdims=True))
  with pytest.raises(ValueError, match="width 6 are not made of codes of width 4"):
    keep_channels(x, np.array([0]), 4)


def test_a_method_without_codebook_is_named():
  class Fake:
    codebooks, params = {}, {}
    config = type("Config", (), {"method": "centrobind"})

  with pytest.raises(ValueError, match="'centrobind' has no shared codebook"):
    codes_of(Fake)


def test_errors():
  codes = np.ones((4, 3))
  for q, ratio in ((0, (1, 0)), (4, (1, 0)), (2, (0, 0)), (2, (2, 1)), (2, (-1, 2))):
    with pytest.raises(ValueError, match="q must be 1 to 3"):
      toc.select_channels(codes, q, ratio)
  with pytest.raises(ValueError, match="at least two"):
    toc.channel_scores(codes[:1])

"""The beam that looks for codes of several stages, and their start, against all sums there are and against faiss."""

import dataclasses
import itertools

import faiss
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax import codebook, compositional
from codebind_jax.codebook import residual
from codebind_jax.codebook.clustering import kmeans
from codebind_jax.codebook.residual import beam_codes, progressive_kmeans, start_stages
from codebind_jax.codebook.segments import THROUGH
from codebind_jax.codebook.spec import Codebook
from codebind_jax.compositional import CompositionalSpec
from tests.arrays import compiled, normal

pytestmark = pytest.mark.usefixtures("quick_compiler")

SPEC = CompositionalSpec(
  shared_dim=16, specific_dim=0, code_dims=(8, 8), num_codes=(4, 0), stages=3, distance="l2", normalize=False,
  revive="none",
)  # fmt: skip


def sums_of(codes, indices):
  """What codes stand for: codes [m, k, d] or [m, s, k, d], indices [m, s, n] -> [s, d, n]."""
  book = lambda stage, position: stage if stage.ndim == 2 else stage[position]
  parts = [[book(stage, p)[of].T for p, of in enumerate(found)] for stage, found in zip(codes, indices)]
  return np.sum(np.asarray(parts), axis=0)


def error(z, codes, indices):
  return ((z - sums_of(codes, np.asarray(indices))) ** 2).sum(axis=1)


@pytest.mark.parametrize("own", [False, True])
def test_a_beam_of_all_sums_finds_the_best_one(own):
  z, codes = normal(0, 2, 8, 50), normal(1, 3, *([2] * own), 4, 8)
  found = beam_codes(z, codes, beam=64)
  assert found.shape == (3, 2, 50) and found.dtype == jnp.int32
  for position in range(2):
    book = codes[:, position] if own else codes
    every = np.array(list(itertools.product(range(4), repeat=3)))
    sums = sum(book[stage][every[:, stage]] for stage in range(3))
    best = every[np.argmin(((z[position].T[:, None] - sums) ** 2).sum(-1), axis=1)]
    np.testing.assert_array_equal(found[:, position].T, best)


def test_a_beam_of_one_takes_each_stage_s_nearest_code_and_wider_ones_lose_less():
  z, codes = normal(0, 2, 8, 200), normal(1, 4, 16, 8) * 0.5 ** np.arange(4, dtype=np.float32)[:, None, None]
  rest, nearest = z, []
  for book in codes:
    _, index = codebook.state.quantize_segments(jnp.asarray(rest), jnp.asarray(book), distance="l2")
    rest = rest - sums_of(book[None], np.asarray(index)[None])
    nearest.append(index)
  np.testing.assert_array_equal(beam_codes(z, codes, beam=1), np.stack(nearest))
  lost = [error(z, codes, beam_codes(z, codes, beam=beam)).mean() for beam in (1, 2, 8, 32)]
  assert all(after < before for before, after in itertools.pairwise(lost)) and lost[-1] < 0.95 * lost[0], lost


def test_the_beam_is_faiss_s():
  x, beam = normal(0, 300, 12), 6
  peer = faiss.ResidualQuantizer(12, 4, 4)
  peer.max_beam_size = beam
  peer.train(x)
  codes = faiss.vector_to_array(peer.codebooks).reshape(4, 16, 12)
  theirs = ((x - peer.decode(peer.compute_codes(x))) ** 2).sum(1)
  ours = error(x.T[None], codes, beam_codes(x.T[None], codes, beam=beam))[0]
  np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_blocks_of_any_length_and_masked_rows_change_nothing(monkeypatch):
  z, codes = normal(0, 2, 8, 61), normal(1, 3, 5, 8)
  whole = beam_codes(z, codes, beam=4)
  z_bad = z.copy()
  z_bad[:, 3, 7] = np.nan
  found = np.asarray(beam_codes(z_bad, codes, beam=4))
  assert not found[..., 7].any()
  np.testing.assert_array_equal(np.delete(found, 7, axis=-1), np.delete(whole, 7, axis=-1))
  assert beam_codes(z[..., :0], codes, beam=4).shape == (3, 2, 0)
  for rows in (1, 7, 16):
    monkeypatch.setattr(residual, "_SCORES", rows * 2 * 4 * 5)
    for length in (61, 48):
      again = jax.jit(lambda z: beam_codes.__wrapped__(z, jnp.asarray(codes), beam=4))(z[..., :length])
      np.testing.assert_array_equal(again, whole[..., :length])


def few_and_wide(rows):
  """Few rows of many dimensions, most of whose variance lies in some of them."""
  return (np.random.default_rng(0).normal(size=(rows, 64)) * 0.9 ** np.arange(64)).astype(np.float32)


@pytest.mark.parametrize("beam", [1, 5])
def test_a_start_of_stages_loses_as_little_of_other_rows_as_faiss_does(beam):
  x = few_and_wide(2400)
  seen, other = x[:800], x[800:]
  start = jax.jit(start_stages, static_argnames=("num_codes", "stages", "beam", "iterations"))
  codes, counts = start(jax.random.key(0), seen, None, 64, 4, beam=beam, iterations=8)
  np.testing.assert_allclose(counts.sum(axis=1), 800, rtol=1e-5)
  assert np.all(np.asarray(counts) > 0)
  lost = lambda codes: error(other.T[None], codes, beam_codes(other.T[None], codes, beam=beam)).mean()
  peer = faiss.ResidualQuantizer(64, 4, 6)
  peer.max_beam_size = beam
  peer.train(seen)
  theirs = ((other - peer.decode(peer.compute_codes(other))) ** 2).sum(1).mean()
  # Stage by stage by itself, from rows far from one another.
  rest, alone = seen, []
  for stage in range(4):
    means, _ = kmeans(jax.random.key(stage), rest, 64, iterations=25, distance="l2", normalize=False)
    rest = rest - np.asarray(means)[np.asarray(codebook.nearest_code(rest, means, distance="l2"))]
    alone.append(np.asarray(means))
  ours, plain = lost(np.asarray(codes)), lost(np.stack(alone))
  assert ours < 1.03 * theirs and ours < 0.97 * plain, (ours, theirs, plain)


def test_masked_rows_leave_no_trace_in_a_start():
  x, weights = few_and_wide(60), np.r_[np.ones(40), np.zeros(20)].astype(np.float32)
  start = jax.jit(start_stages, static_argnames=("num_codes", "stages", "beam", "iterations"))
  found = []
  for fill in (np.nan, 1e6):
    x[40:] = fill
    found.append(start(jax.random.key(0), x, weights, 8, 2, beam=8, iterations=3))
  np.testing.assert_array_equal(found[0][0], found[1][0])
  assert np.isfinite(found[0][0]).all()
  np.testing.assert_allclose(found[0][1].sum(axis=1), 40, rtol=1e-5)


def test_fewer_rows_than_codes_give_every_code_a_place():
  x = few_and_wide(5)
  codes, counts = progressive_kmeans(jax.random.key(0), x, np.ones(5, np.float32), 12, iterations=4)
  assert np.isfinite(codes).all() and counts.sum() == 5
  nearest = ((x[:, None] - np.asarray(codes)) ** 2).sum(-1).min(axis=1)
  np.testing.assert_allclose(nearest, 0.0, atol=1e-4)


def test_a_start_takes_so_many_rows_a_code(monkeypatch):
  monkeypatch.setattr(residual, "_ROWS", 4)
  start = jax.jit(start_stages, static_argnames=("num_codes", "stages", "beam", "iterations"))
  weights = np.r_[np.zeros(100), np.ones(500)].astype(np.float32)
  _, counts = start(jax.random.key(0), few_and_wide(600), weights, 8, 2, beam=8, iterations=2)
  np.testing.assert_allclose(counts.sum(axis=1), 32, rtol=1e-5)


@pytest.mark.parametrize("positions", ["shared", "own"])
def test_a_quantiser_with_a_beam_adds_its_codes_up_and_loses_less(positions):
  spec = dataclasses.replace(SPEC, positions=positions)
  x = {"text": normal(0, 200, 16)}
  new = compositional.new_codebooks(jax.random.key(1), spec, ("text",))
  began = lambda beam: compiled(compositional.init_codebooks, spec=dataclasses.replace(spec, beam=beam))(
    jax.random.key(0), x, new
  )
  # A start takes the search of its own spec: fitted to the nearest codes' sums, codes lose less by them.
  nearest = compiled(compositional.quantize_modalities, spec=dataclasses.replace(spec, beam=1))
  of_one, of_more = (nearest(x, began(beam), rng=None, masks=None, rotations=None)[0]["text"] for beam in (1, 8))
  assert of_one.commitment < 0.99 * of_more.commitment
  states, lost = began(8), []
  for beam in (1, 8):
    run = compiled(compositional.quantize_modalities, spec=dataclasses.replace(spec, beam=beam))
    outputs, new = run(x, states, rng=None, masks=None, rotations=None)
    out, codes = outputs["text"], np.asarray(states["shared"].codes)
    indices = np.asarray(out.indices_shared).T.reshape(3, 2, 200)
    z = x["text"].T.reshape(2, 8, 200)
    total = sums_of(codes, indices).reshape(16, 200).T
    np.testing.assert_allclose(out.shared, total / np.linalg.norm(total, axis=1, keepdims=True), atol=1e-5)
    rest, want = z, 0.0
    for stage in range(3):
      rest = rest - sums_of(codes[stage : stage + 1], indices[stage : stage + 1])
      want += 0.25 * np.mean(rest**2)
    np.testing.assert_allclose(out.commitment, want, rtol=1e-4)
    lost.append(np.mean(rest**2))
    # The averages of the last stage follow what the codes before it leave.
    before = np.moveaxis(z - sums_of(codes[:2], indices[:2]), 1, 2)
    counts = np.stack([np.bincount(of, minlength=4) for of in indices[2]])
    sums = np.stack([[part[of == code].sum(axis=0) for code in range(4)] for part, of in zip(before, indices[2])])
    if positions == "shared":
      counts, sums = counts.sum(axis=0), sums.sum(axis=0)
    old = states["shared"]
    np.testing.assert_allclose(new["shared"].ema_count[2], 0.99 * old.ema_count[2] + 0.01 * counts, rtol=1e-4)
    np.testing.assert_allclose(new["shared"].ema_sum[2], 0.99 * old.ema_sum[2] + 0.01 * sums, rtol=1e-3, atol=1e-4)
  assert lost[1] < 0.97 * lost[0], lost


def test_gradient_through_both_reaches_codes_by_their_items():
  spec = dataclasses.replace(SPEC, shared_dim=8, ema=False, beta=0.0, gradient="both", beam=4)
  x, books = normal(0, 6, 8), compositional.new_codebooks(jax.random.key(1), SPEC, ("text",))
  weight = normal(2, 6, 8)

  def value(x, codes, spec):
    states = {"shared": books["shared"].replace(codes=codes)}
    out = compositional.quantize_modalities({"text": x}, states, spec, update="none")[0]["text"]
    return jnp.sum(weight * out.shared), out

  grad = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True), static_argnums=2)
  codes = books["shared"].codes
  (of_x, of_codes), out = grad(x, codes, spec)
  indices = np.asarray(out.indices_shared).T  # [3, 6]
  total = sums_of(np.asarray(codes), indices[:, None])[0].T
  length = np.linalg.norm(total, axis=1, keepdims=True)
  unit = total / length
  of_total = (weight - unit * np.sum(weight * unit, axis=1, keepdims=True)) / length  # of the scaling to unit length
  np.testing.assert_allclose(of_x, of_total, atol=1e-5)
  want = np.zeros_like(codes)
  for stage in range(3):
    np.add.at(want[stage], indices[stage], of_total)
  # Beside it the codebook loss of codes that are parameters.
  (_, plain), _ = grad(x, codes, dataclasses.replace(spec, gradient="straight_through"))
  assert not np.asarray(plain).any()
  np.testing.assert_allclose(of_codes, want, atol=1e-5)
  np.testing.assert_array_equal(THROUGH["both"](jnp.asarray(x), jnp.asarray(weight)), weight)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"stages": 2, "distance": "cosine"}, "codebook.stages: got 2"),
    ({"beam": 2, "distance": "l2"}, "codebook.beam: got 2"),
    ({"gradient": "both"}, "codebook.gradient: got 'both'"),
  ],
)
def test_options_that_do_not_go_together_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    Codebook(**options).check("codebook")
  with pytest.raises(ValueError, match=next(iter(options))):
    dataclasses.replace(CompositionalSpec(), **options)

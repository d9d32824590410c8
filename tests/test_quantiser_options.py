"""Codebooks by position, residual stages, rotations, the rotation trick, and the bits of an item."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax import codebook, compositional
from codebind_jax import config as config_lib
from codebind_jax.codebook import nearest
from codebind_jax.codebook.nearest_triton import nearest_by_triton
from codebind_jax.codebook.revival import draw_candidates
from codebind_jax.codebook.rotation import balanced, opq, orthogonal, reflections
from codebind_jax.codebook.segments import Segments, rotation_trick, statistics, straight_through
from codebind_jax.codebook.spec import Codebook
from codebind_jax.compositional import CompositionalSpec
from configs import compare
from tests.arrays import compiled, normal

pytestmark = pytest.mark.usefixtures("quick_compiler")

SPEC = CompositionalSpec(shared_dim=32, specific_dim=16, num_codes=(12, 6), revive="none")
OWN = dataclasses.replace(SPEC, positions="own")
EUCLID = dataclasses.replace(SPEC, distance="l2", normalize=False)


def features(seed=0):
  return {"text": normal(seed, 6, 32), "image": normal(seed + 1, 6, 3, 48)}


def quantised(x, states, spec, *, masks=None, rng=None, rotations=None, **options):
  run = compiled(compositional.quantize_modalities, spec=spec, **options)
  return run(x, states, rng=rng, masks=masks, rotations=rotations)


def books(spec):
  states = compiled(compositional.new_codebooks, spec=spec, modalities=("text", "image"))(jax.random.key(0))
  fill = lambda s: s.replace(ema_count=jnp.ones_like(s.ema_count), usage=jnp.full_like(s.usage, 1 / s.usage.shape[-1]))
  return {name: fill(s) for name, s in states.items()}


def repeated(states, positions):
  """The same codebook for each position."""
  tile = lambda s, n: jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)) if x.ndim else x, s)
  return {name: tile(s, positions[name]) for name, s in states.items()}


def turn(seed, n):
  return np.linalg.qr(normal(seed, n, n))[0].astype(np.float32)


def assert_close(a, b, atol=2e-6):
  chex.assert_trees_all_close(a, b, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("width", [3, 40])
def test_the_search_of_each_position_is_that_in_its_own_codebook(width, distance):
  z, codes = jnp.asarray(normal(0, 4, width, 50)), jnp.asarray(normal(1, 4, 9, width))
  found = compiled(nearest.nearest_segments, distance=distance)(z, codes)
  for position in range(4):
    want = codebook.nearest_code(z[position].T, codes[position], distance=distance)
    np.testing.assert_array_equal(found[position], want)
  with pytest.raises(ValueError, match=r"\(3, 9, .*4 positions"):
    nearest.nearest_segments(z, codes[:3])


def test_every_platform_s_search_by_position_agrees():
  z, codes, bias = jnp.asarray(normal(0, 3, 8, 700)), jnp.asarray(normal(1, 3, 21, 8)), jnp.asarray(normal(2, 3, 21))
  want = np.argmax(np.einsum("skd,sdn->skn", codes, z) - np.asarray(bias)[..., None], axis=1)
  for search in (nearest._scan_codes, nearest._argmax_lanes, nearest._lane_blocks):
    np.testing.assert_array_equal(search(z, codes, bias), want)
  np.testing.assert_array_equal(nearest_by_triton(z, codes, bias, interpret=True), want)


def test_statistics_and_candidates_of_a_position_are_of_its_segments():
  z, indices = normal(0, 3, 4, 40), np.random.default_rng(1).integers(0, 5, (3, 40)).astype(np.int32)
  weights = jnp.asarray(np.random.default_rng(2).random(40) < 0.7, jnp.float32)
  part = Segments(jnp.asarray(z), jnp.asarray(indices), weights)
  counts, sums = statistics([part, part], 5, True)
  drawn = draw_candidates("random", jax.random.key(0), [part], jnp.zeros((3, 5, 4)))
  for p in range(3):
    alone = statistics([Segments(part.vectors[p : p + 1], part.indices[p : p + 1], weights)] * 2, 5)
    assert_close((counts[p], sums[p]), alone, atol=1e-5)
    rows = {tuple(row) for row in z[p].T[np.asarray(weights) > 0]}
    assert {tuple(row) for row in np.asarray(drawn[p])} <= rows


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_equal_codebooks_at_all_positions_quantise_as_one_and_their_statistics_add_up(ema, distance):
  shared = dataclasses.replace(SPEC, ema=ema, distance=distance, decay=0.0, eps=1e-9)
  own = dataclasses.replace(shared, positions="own")
  x, one = features(), books(shared)
  many = repeated(one, {"shared": 4, "image": 2})
  masks = {"image": np.random.default_rng(0).random((6, 3)) < 0.7}

  def run(spec, states):
    def loss(x, codes):
      given = {name: states[name].replace(codes=codes[name]) for name in states}
      outputs, new = compositional.quantize_modalities(x, given, spec, masks=masks)
      total = sum(jnp.sum(out.full**3) + jnp.sum(out.similarity_shared**2) + out.commitment for out in outputs.values())
      return total, (outputs, new)

    codes = {name: s.codes for name, s in states.items()}
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, codes)

  (value, (outputs, new)), (of_x, of_codes) = run(shared, one)
  (own_value, (own_outputs, own_new)), (own_of_x, own_of_codes) = run(own, many)
  assert_close(outputs, own_outputs)
  np.testing.assert_allclose(value, own_value, rtol=1e-6)
  assert_close(of_x, own_of_x, atol=1e-5)
  summed = jax.tree.map(lambda g: g.sum(0), own_of_codes)
  assert_close(of_codes, summed, atol=1e-4)
  assert ema == (not np.any(of_codes["shared"]))
  if ema:  # with a decay of 0 the averages are the batch's numbers
    for name in one:
      assert_close(own_new[name].ema_count.sum(0), new[name].ema_count, atol=1e-4)
      assert_close(own_new[name].ema_sum.sum(0), new[name].ema_sum, atol=1e-4)
    assert np.ptp(np.asarray(own_new["shared"].ema_count), axis=0).any()


@pytest.mark.parametrize("revive", ["random", "closest"])
def test_a_position_is_updated_and_revived_by_itself(revive):
  """An own codebook's state after a batch is that of an update of its position alone; a dead position comes back."""
  x = {"text": normal(0, 64, 32)}
  spec = dataclasses.replace(EUCLID, positions="own", revive=revive)
  states = books(spec)
  dead = states["shared"].codes.at[2].set(50.0 + jnp.arange(12.0)[:, None])  # far from every segment
  states["shared"] = states["shared"].replace(
    codes=dead, ema_sum=dead, usage=states["shared"].usage.at[2].set(jnp.eye(12)[0])
  )
  outputs, new = quantised(x, states, spec, rng=jax.random.key(3))
  segments = x["text"].reshape(64, 4, 8)
  for p in range(4):
    alone = jax.tree.map(lambda a, p=p: a[p] if a.ndim else a, states["shared"])
    options = {"revive": revive, "distance": "l2"}
    want = codebook.update(alone, segments[:, p], outputs["text"].indices_shared[:, p], **options)
    if p != 2:  # no code of these is dead: no candidate counts
      assert_close(jax.tree.map(lambda a, p=p: a[p] if a.ndim else a, new["shared"]), want, atol=1e-4)
  moved = np.asarray(new["shared"].codes[2])
  assert np.sum(np.abs(moved).max(axis=1) < 6) >= 11, moved


def test_one_stage_is_the_plain_form_and_more_stages_quantise_what_is_left():
  x, spec = features(), dataclasses.replace(EUCLID, stages=3)
  states = books(spec)
  outputs, new = quantised(x, states, spec)
  first = {name: jax.tree.map(lambda a: a[0] if a.ndim else a, s) for name, s in states.items()}
  plain, plain_new = quantised(x, first, EUCLID)
  np.testing.assert_array_equal(outputs["text"].indices_shared[:, :4], plain["text"].indices_shared)
  for name, s in plain_new.items():
    assert_close(jax.tree.map(lambda a: a[0] if a.ndim else a, new[name]), s)
  assert_close(outputs["image"].similarity_shared, plain["image"].similarity_shared)
  # By hand: the codes add up, and each is the nearest to what the ones before left.
  rest, total, loss = x["text"].reshape(-1, 8), 0.0, 0.0
  for stage in range(3):
    codes = np.asarray(states["shared"].codes[stage])
    index = np.argmin(((rest[:, None] - codes) ** 2).sum(-1), axis=1)
    np.testing.assert_array_equal(outputs["text"].indices_shared[:, 4 * stage : 4 * stage + 4].reshape(-1), index)
    rest, total = rest - codes[index], total + codes[index]
    loss += 0.25 * np.mean(rest**2)
  total = total.reshape(6, 32)
  assert_close(outputs["text"].shared, total / np.linalg.norm(total, axis=1, keepdims=True))
  np.testing.assert_allclose(outputs["text"].commitment, loss, rtol=1e-5)
  # A stage's statistics are those of its residuals.
  assert new["shared"].codes.shape == (3, 12, 8) and np.any(new["shared"].codes[1] != states["shared"].codes[1])


@pytest.mark.parametrize("positions", ["shared", "own"])
def test_each_stage_of_a_start_by_kmeans_loses_less(positions):
  spec = dataclasses.replace(EUCLID, stages=3, positions=positions)
  x = {"text": normal(0, 400, 32)}
  start = compiled(compositional.init_codebooks, spec=spec)
  states = start(jax.random.key(0), x, books(spec))
  assert states["shared"].codes.shape[:-2] == spec.lead(4) and bool(states["shared"].initialised)
  np.testing.assert_allclose(states["shared"].usage.sum(-1), 1.0, rtol=1e-5)
  losses = []
  for stages in (1, 2, 3):
    less = dataclasses.replace(spec, stages=stages)
    pick = lambda a, stages=stages: a if not a.ndim else a[0] if stages == 1 else a[:stages]
    out = quantised(x, {"shared": jax.tree.map(pick, states["shared"])}, less, update="none")[0]["text"]
    losses.append(1.0 - float(np.mean(np.sum(np.asarray(out.shared * out.query), axis=1))))
  assert losses[1] < 0.8 * losses[0] and losses[2] < 0.8 * losses[1], losses


def test_unit_parts_keep_the_segments_shares():
  spec = dataclasses.replace(EUCLID, unit_parts=True)
  x, states = features(), books(EUCLID)
  found, _ = quantised(x, states, spec)
  text = x["text"] / np.linalg.norm(x["text"], axis=1, keepdims=True)
  want, _ = quantised({"text": text}, states, EUCLID)
  assert_close(found["text"], want["text"])
  assert_close(found["text"].query, text)


def test_the_query_is_what_the_codes_stand_for():
  x = features()
  found, _ = quantised(x, books(SPEC), SPEC)
  segments = x["text"].reshape(6, 4, 8)
  segments = (segments / np.linalg.norm(segments, axis=2, keepdims=True)).reshape(6, 32)
  assert_close(found["text"].query, segments / np.linalg.norm(segments, axis=1, keepdims=True))
  # With a code for every segment nothing is lost.
  every = codebook.CodebookState(*(jnp.zeros(s) for s in ((24, 8), 24, (24, 8), 24, ())))
  exact = {"shared": every.replace(codes=jnp.asarray(segments.reshape(24, 8) * 0.5 * 2))}
  exact = {"shared": exact["shared"].replace(ema_sum=exact["shared"].codes)}
  out, _ = quantised({"text": x["text"]}, exact, SPEC, update="none")
  assert_close(out["text"].shared, out["text"].query)


def test_reflections_make_any_orthogonal_matrix_but_for_signs():
  np.testing.assert_allclose(orthogonal(jnp.eye(6)), np.eye(6), atol=1e-7)
  np.testing.assert_allclose(orthogonal(reflections(np.eye(6))), np.eye(6), atol=1e-6)
  vectors = normal(0, 24, 24)
  made = np.asarray(orthogonal(jnp.asarray(vectors)))
  want = -np.eye(24)
  for v in vectors.T:
    want = want @ (np.eye(24) - 2 * np.outer(v, v) / (v @ v))
  np.testing.assert_allclose(made, want, atol=2e-5)
  np.testing.assert_allclose(orthogonal(jnp.asarray(3.0 * vectors)), made, atol=2e-5)
  matrix = turn(1, 24)
  signs = np.asarray(orthogonal(reflections(matrix))) @ matrix.T
  np.testing.assert_allclose(np.abs(signs), np.eye(24), atol=1e-5)


def test_a_rotation_turns_before_and_back_after():
  x, states = features(), books(EUCLID)
  plain, plain_new = quantised(x, states, EUCLID)
  identity = {"shared": jnp.eye(32), "image": jnp.eye(16)}
  same, same_new = quantised(x, states, EUCLID, rotations=identity)
  assert_close(plain, same)
  assert_close(plain_new, same_new)
  matrices = {"shared": turn(0, 32), "image": turn(1, 16)}
  found, new = quantised(x, states, EUCLID, rotations=matrices)
  turned = {"text": x["text"] @ matrices["shared"].T,
            "image": np.concatenate([x["image"][..., :32] @ matrices["shared"].T,
                                     x["image"][..., 32:] @ matrices["image"].T], axis=-1)}  # fmt: skip
  want, want_new = quantised(turned, states, EUCLID)
  assert_close(new, want_new)
  np.testing.assert_array_equal(found["image"].indices_specific, want["image"].indices_specific)
  assert_close(found["image"].shared, np.asarray(want["image"].shared) @ matrices["shared"], atol=1e-5)
  assert_close(found["image"].specific, np.asarray(want["image"].specific) @ matrices["image"], atol=1e-5)
  assert_close(found["text"].query, plain["text"].query, atol=1e-5)  # in the features' own space


def test_gradient_reaches_a_rotation_and_leaves_it_orthogonal():
  x, states = {"text": normal(0, 64, 32)}, books(EUCLID)
  vectors = reflections(turn(2, 32))

  def loss(vectors):
    out, _ = compositional.quantize_modalities(
      x, states, EUCLID, update="none", rotations={"shared": orthogonal(vectors)}
    )
    return out["text"].commitment

  step = jax.jit(jax.value_and_grad(loss))
  before, _ = step(vectors)
  for _ in range(30):
    _, gradient = step(vectors)
    vectors = vectors - 3.0 * gradient
  after, _ = step(vectors)
  assert after < before - 1e-3
  matrix = np.asarray(orthogonal(vectors))
  np.testing.assert_allclose(matrix @ matrix.T, np.eye(32), atol=1e-5)


def lost(rows, rotation, codes, width, own=True):
  """Mean squared error of k-means codes of the turned segments."""
  spec = CompositionalSpec(
    shared_dim=rows.shape[1], specific_dim=0, code_dims=(width, width), num_codes=(codes, 0), distance="l2",
    normalize=False, positions="own" if own else "shared",
  )  # fmt: skip
  turned = {"text": rows @ np.asarray(rotation).T}
  states = compositional.init_codebooks(
    jax.random.key(0), turned, compositional.new_codebooks(jax.random.key(0), spec, ["text"]), spec, iterations=25
  )
  out = compositional.quantize_modalities(turned, states, spec, update="none")[0]["text"]
  return float(out.commitment) / spec.beta * 1.0


def test_opq_loses_less_than_no_rotation_and_no_more_than_faiss():
  faiss = pytest.importorskip("faiss")
  rng = np.random.default_rng(0)
  # Correlated rows of falling variance, in a random basis.
  rows = (rng.normal(size=(2000, 32)) * 0.85 ** np.arange(32) @ turn(0, 32)).astype(np.float32)
  ours = opq(jax.random.key(0), jnp.asarray(rows), 16, 8, iterations=20)
  np.testing.assert_allclose(np.asarray(ours) @ np.asarray(ours).T, np.eye(32), atol=1e-4)
  theirs = faiss.OPQMatrix(32, 4)
  theirs.pq = faiss.ProductQuantizer(32, 4, 4)
  theirs.niter = 20
  theirs.train(rows)
  matrix = faiss.vector_to_array(theirs.A).reshape(32, 32)
  plain, own, other = (lost(rows, m, 16, 8) for m in (np.eye(32, dtype=np.float32), ours, matrix))
  assert own < 0.9 * plain and own < 1.03 * other, (plain, own, other)
  # Masked rows have no effect.
  spoilt = np.concatenate([rows, np.full((50, 32), np.nan, np.float32)])
  again = opq(
    jax.random.key(0), jnp.asarray(spoilt), 16, 8, iterations=20, weights=jnp.asarray([1.0] * 2000 + [0.0] * 50)
  )
  assert lost(rows, again, 16, 8) < 1.03 * own


def test_balanced_axes_share_the_variance_out():
  rng = np.random.default_rng(0)
  rows = (rng.normal(size=(4000, 8)) * 2.0 ** -np.arange(8)).astype(np.float32)
  turned = rows @ np.asarray(balanced(jnp.asarray(rows), None, 2)).T
  products = np.var(turned, axis=0).reshape(4, 2).prod(axis=1)
  assert products.max() / products.min() < 1.3, products


def test_the_rotation_trick_by_hand():
  z, q = normal(0, 3, 4, 5), normal(1, 3, 4, 5)
  q[0, :, 0] = 2.5 * z[0, :, 0]  # the same direction
  q[1, :, 1] = -z[1, :, 1]  # the opposite one
  cotangent = normal(2, 3, 4, 5)
  value, back = jax.vjp(lambda z: rotation_trick(z, jnp.asarray(q)), jnp.asarray(z))
  np.testing.assert_array_equal(value, q)
  (found,) = back(jnp.asarray(cotangent))
  for s in range(3):
    for n in range(5):
      a, b, g = z[s, :, n].astype(np.float64), q[s, :, n].astype(np.float64), cotangent[s, :, n]
      u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
      middle = u + v
      middle = middle / max(np.linalg.norm(middle), 1e-12) if np.linalg.norm(middle) > 1e-6 else 0 * middle
      matrix = np.eye(4) - 2 * np.outer(middle, middle) + 2 * np.outer(v, u)
      np.testing.assert_allclose(np.linalg.norm(b) / np.linalg.norm(a) * matrix @ a, b, atol=1e-6)
      np.testing.assert_allclose(found[s, :, n], np.linalg.norm(b) / np.linalg.norm(a) * matrix.T @ g, atol=1e-5)
  np.testing.assert_allclose(found[0, :, 0], 2.5 * cotangent[0, :, 0], rtol=1e-4)
  # The angle between a gradient and a code's direction is that between its image and the segment's.
  assert np.all(np.isfinite(jax.grad(lambda z: jnp.sum(rotation_trick(z, jnp.asarray(q))))(jnp.zeros((3, 4, 5)))))


def test_the_rotation_trick_changes_the_gradient_and_nothing_else():
  x, states = features(), books(EUCLID)

  def run(gradient):
    spec = dataclasses.replace(EUCLID, gradient=gradient)
    total = lambda x: compositional.quantize_modalities(x, states, spec)[0]["image"].full.sum()
    return jax.jit(jax.value_and_grad(total))(x)

  (straight, straight_gradient), (turned, turned_gradient) = run("straight_through"), run("rotation_trick")
  np.testing.assert_allclose(straight, turned, rtol=1e-6)
  assert np.any(np.abs(straight_gradient["image"] - turned_gradient["image"]) > 1e-4)


@pytest.mark.parametrize(
  "codes, positions, stages, bits", [(256, 4, 1, 32), (257, 4, 1, 36), (4096, 2, 3, 72), (1, 4, 1, 0)]
)
def test_bits_of_an_item_by_hand(codes, positions, stages, bits):
  spec = CompositionalSpec(
    shared_dim=8 * positions, specific_dims={"image": 16, "text": 0}, specific_dim=0, num_codes=(codes, 0),
    num_specific_codes={"image": 32}, stages=stages, distance="l2",
  )  # fmt: skip
  assert spec.bits("text") == bits and spec.item_bytes("text") == -(-bits // 8)
  assert spec.bits("image", "specific") == 2 * 5 * stages and spec.bits("image", "full") == bits + 10 * stages
  assert spec.bits("text", "specific") == 0


def test_a_config_tells_the_bytes_of_an_item():
  config = compare.get_config("runlocal").unlock()
  config.update_from_flattened_dict({"codebook.stages": 2, "codebook.shared_codes": 100})
  found = config_lib.read(config).item_bytes
  # 32 / 4 positions of 7 bits and two stages; the specific part's 64 codes have 6 bits.
  assert found["image"] == (14, 14 + 12) and found.keys() == dict(config.model.towers).keys()
  config.model.quantize = False
  assert config_lib.read(config).item_bytes == {}


@pytest.mark.parametrize(
  "options, message",
  [
    ({"start": "opq"}, "codebook.start.*'opq'"),
  ],
)
def test_options_that_do_not_go_together_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    Codebook(**options).check("codebook")


def test_bad_specs_are_named():
  with pytest.raises(ValueError, match="positions"):
    dataclasses.replace(SPEC, positions="both")
  with pytest.raises(ValueError, match="own.*separate"):
    dataclasses.replace(SPEC, positions="own", sharing="separate")
  with pytest.raises(ValueError, match=r"\(12, 8\).*\[4, k, 8\]"):
    compositional.quantize_modalities({"text": features()["text"]}, books(SPEC), OWN)


def test_contrast_of_all_tokens_by_position_is_the_mean_over_positions():
  x, one = features(), books(SPEC)
  shared = compiled(compositional.contrast_all_tokens, spec=SPEC)(x, one)
  own = compiled(compositional.contrast_all_tokens, spec=OWN)(x, repeated(one, {"shared": 4, "image": 2}))
  assert_close(shared, own, atol=1e-5)


def test_straight_through_is_exact():
  z, q = jnp.asarray(normal(0, 2, 3, 4)), jnp.asarray(normal(1, 2, 3, 4))
  np.testing.assert_array_equal(straight_through(z, q), q)

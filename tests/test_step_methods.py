"""What the step does for every method alike: mixup, micro-batches, the balancer, dropout, frozen parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

from codebind_jax.codebook import unified
from codebind_jax.compositional import CompositionalSpec
from codebind_jax.losses.balance import FACTORS
from codebind_jax.methods import centrobind, codebind, codis, dcid, fcid, fixed_anchor
from codebind_jax.methods.base import EXTRA, Forward, method_names
from codebind_jax.models.towers import CodeBind, TowerSpec
from codebind_jax.runtime.optim import Optim, make_optimizer, param_paths
from codebind_jax.runtime.optim import frozen as frozen_of
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.step import forward, make_start_codebooks
from tests.step_fixtures import GROUPS, MASKS, SHARED, SOURCES, SPECIFIC, batch_of, model, setting, stage_of

pytestmark = pytest.mark.usefixtures("quick_compiler")
SPEC = CompositionalSpec(SHARED, specific_dims=SPECIFIC, code_dims=(4, 4), num_codes=(6, 4), revive="none")
UNIFIED = {"codes": 6, "club_steps": 1, "club_hidden": 4}
METHODS = {
  "centrobind": centrobind.Method(model(), noise=0.1),
  "codebind": codebind.Method(model(decoder=True), SPEC),
  "codis": codis.Method(model(), codes=5, queue=16, iterations=4),
  "dcid": dcid.Method(model(own=("audio",)), **UNIFIED),  # every specific part is a network to compile
  "fcid": fcid.Method(model(own=("audio",)), **UNIFIED),
  "fixed_anchor": fixed_anchor.Method(model(), frozen=False),
}
LOSSES = {"info_nce": 1.0, "commitment": 1.0, "reconstruction": 1.0}


def blended(batch, share=0.75):
  """The batch after a mixup by hand: each row with the one before it, unless that lacks one of the row's modalities."""
  out = {}
  for source, names in SOURCES.items():
    alone = np.any([np.array(MASKS[source, m], bool) & ~np.roll(np.array(MASKS[source, m], bool), 1) for m in names], 0)
    weight = np.where(alone, 1.0, share)[:, None, None].astype(np.float32)
    mixed = {m: weight * x + (1 - weight) * np.roll(x, 1, axis=0) for m, x in batch[source].items() if m in names}
    out[source] = {**batch[source], **mixed}
  return out


@pytest.mark.parametrize("name", [
  # FCID shares DCID's networks, and takes twice as long to compile.
  pytest.param(name, marks=[pytest.mark.slow] * (name == "fcid")) for name in method_names()
])
def test_every_method_takes_mixup_micro_batches_and_the_balancer(name, monkeypatch):
  monkeypatch.setattr(jax.random, "beta", lambda rng, a, b, shape: jnp.full(shape, 0.25))  # 0.75 of the row itself
  method, losses = METHODS[name], LOSSES if name == "codebind" else {}
  stage = stage_of(balance=True, losses=losses)
  mixing = setting(method, dataclasses.replace(stage, mixup=1.0), tx=optax.sgd(0.01))
  parting = setting(method, dataclasses.replace(stage, parts=2), tx=optax.sgd(0.01))
  batch = batch_of()
  (mixed, found), (by_hand, expected) = mixing.step(mixing.state, batch), parting.step(parting.state, blended(batch))
  # One mixes and sees the batch whole, the other takes the mixed batch in two parts: all is equal.
  compare = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-5)
  jax.tree.map(compare, found, expected)
  jax.tree.map(compare, (mixed.params, mixed.codebooks, mixed.aux), (by_hand.params, by_hand.codebooks, by_hand.aux))
  plain = parting.step(parting.state, batch)[1]
  assert abs(plain["train/total"] - found["train/total"]) > 1e-3

  terms, given = {key: float(found[f"train/{key}"]) for key in method.terms(stage)}, method.weights(stage)
  factors, total = FACTORS | method.FACTORS, 0.0
  for key, value in terms.items():
    if not given[key]:
      assert f"train/weight/{key}" not in found, "it is only watched"
      continue
    follows = key not in (method.BASE, "reconstruction")
    weight = factors[key] * abs(terms[method.BASE]) / (abs(value) + 1e-8) if follows else 1.0
    np.testing.assert_allclose(found[f"train/weight/{key}"], min(weight, 1e4), rtol=1e-4)
    total += min(weight, 1e4) * value
  np.testing.assert_allclose(found["train/total"], total, rtol=1e-4)


def twins():
  """A batch whose sources and rows are all the same."""
  batch = batch_of(masks={key: [1] * len(value) for key, value in MASKS.items()})
  same = lambda source: {m: np.repeat(batch["far"][m][:1], len(GROUPS[source]), axis=0) for m in ("image", "text")}
  return jax.tree.map(jnp.asarray, {source: content | same(source) for source, content in batch.items()})


def test_dropout_differs_between_steps_sources_and_micro_batches():
  stage = stage_of(losses={"info_nce": 1.0})
  method = codebind.Method(model(dropout=0.5), None)
  start = setting(method, stage, tx=optax.sgd(0.0))
  after, first = start.step(start.state, twins())
  _, second = start.step(after, twins())
  _, again = start.step(start.state, twins())
  assert first["train/total"] == again["train/total"] != second["train/total"]
  for parts in (1, 2):
    out = forward(method, start.state.params, twins(), jax.random.key(0), dataclasses.replace(stage, parts=parts))
    x = np.asarray(out.features["image"])
    assert len(np.unique(x.round(5), axis=0)) == len(x), "no two rows lose the same columns"
    for source in SOURCES:
      np.testing.assert_array_equal(out.of(source, out.features)["image"], x[out.owners[source, "image"]])
  still = forward(codebind.Method(model(), None), start.state.params, twins(), jax.random.key(0), stage)
  assert np.ptp(np.asarray(still.features["image"]), axis=0).max() < 1e-5


def test_frozen_paths_get_no_gradient_and_stay():
  method, batch = METHODS["fixed_anchor"], batch_of()
  free = setting(method, stage_of())
  paths = param_paths(free.state.params)
  held = frozenset(path for path in paths if path.startswith(("text/", "audio/")))
  bound = setting(method, stage_of(), frozen=held, tx=optax.sgd(0.1, momentum=0.9))
  (moved, loose), (kept, fixed) = free.step(free.state, batch), bound.step(bound.state, batch)
  np.testing.assert_allclose(fixed["train/total"], loose["train/total"], rtol=1e-6)
  changed = lambda state: {
    path for path, x in param_paths(state.params).items() if np.any(np.asarray(x) != np.asarray(paths[path]))
  }
  assert "text/shared/proj/kernel" in changed(moved) and "audio/shared/norm/bias" in changed(moved)
  assert changed(kept) == changed(moved) - held
  step = jax.tree.map(lambda a, b: (a - b) / 0.1, free.state.params, moved.params)
  rest = [x for path, x in param_paths(step).items() if path not in held]
  np.testing.assert_allclose(fixed["train/gradient_norm"], optax.global_norm(rest), rtol=1e-4)
  assert fixed["train/gradient_norm"] < loose["train/gradient_norm"]
  # The optimizer remembers the gradient.
  np.testing.assert_allclose(optax.global_norm(kept.opt_state), fixed["train/gradient_norm"], rtol=1e-4)


def test_a_fixed_anchor_s_tower_is_frozen_and_its_logit_scale_is_not():
  towers = {"image": {"shared": {"kernel": jnp.ones(2)}}, "images": {"shared": {"kernel": jnp.ones(2)}},
            "image_log_logit_scale": jnp.ones(())}  # fmt: skip
  settings = Optim(rules=((".*", 1.0, 1.0),))
  found = {}
  for frozen in (True, False):
    method = fixed_anchor.Method(model(), anchor="image", frozen=frozen)
    found[frozen] = frozen_of(make_optimizer(towers, (".*",), settings, 2, frozen=method.frozen_paths(stage_of()))[1])
  assert found == {True: {"image/shared/kernel"}, False: frozenset()}


@pytest.mark.parametrize("name", ["codebind", "hdcid", "fcid"])
def test_a_start_reads_no_row_that_lacks_the_modality(name):
  method = dcid.Method(model(), **UNIFIED, levels=2) if name == "hdcid" else METHODS[name]
  start = setting(method, stage_of(losses=LOSSES if name == "codebind" else {}))
  begin = jax.jit(make_start_codebooks(method))
  one, other = (begin(start.state, batch_of(hidden=hidden)) for hidden in (30.0, -5.0))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), one, other)
  for book, before in start.state.codebooks.items():
    assert (one[book].codes != before.codes).any(), book
  # A later stage goes on with what there is.
  later = begin(start.state.replace(step=jnp.ones((), jnp.int32), codebooks=one), batch_of())
  jax.tree.map(np.testing.assert_array_equal, later, one)


def test_h_dcid_s_levels_start_from_keys_of_their_own():
  spec = TowerSpec(shared_dim=SHARED, specific_dim=SHARED)
  method = dcid.Method(CodeBind(FrozenDict({"audio": spec, "image": spec})), levels=2, codes=4)
  rng, names = np.random.default_rng(0), ("audio", "image")
  z = {m: jnp.asarray(rng.uniform(size=(12, 1, SHARED)), jnp.float32) for m in names}  # as they are under a ReLU
  masks, same = {m: jnp.ones(12, bool) for m in names}, {"kernel": jnp.eye(SHARED), "bias": jnp.zeros(SHARED)}
  params = {EXTRA: {f"second_{m}": {"general": same} for m in names}}
  features = {m: jnp.concatenate([x, x], -1) for m, x in z.items()}
  out = Forward(params, {}, features, {}, masks, {}, {}, lambda *_: ({}, {}))
  books = {name: method.new_codebook(jax.random.key(1), SHARED, names) for name in ("shared", "second")}
  key = jax.random.key(0)
  found = method.start_codebooks(out, TrainState(jnp.zeros((), jnp.int32), params, books, (), {}, key), key)
  # Both levels have the same vectors: one key would give both the same codes.
  alike = method.after_kmeans(books["second"], z, masks, key)
  np.testing.assert_allclose(alike.codes, found["shared"].codes, rtol=1e-5)
  assert np.abs(found["shared"].codes - found["second"].codes).max() > 0.01


@pytest.mark.parametrize("name, resets, shuffles, starts", [("dcid", 4, 6, 4), ("fcid", 2, 7, 2)])
def test_every_source_and_level_draws_with_a_key_of_its_own(name, resets, shuffles, starts, monkeypatch):
  kind, levels = {"dcid": (dcid, {"levels": 2}), "fcid": (fcid, {})}[name]
  method, stage, drawn = kind.Method(model(), **UNIFIED, **levels), stage_of(), {"reset": [], "shuffle": []}
  monkeypatch.setattr(unified, "reset_unified", lambda book, rng, **_: drawn["reset"].append(rng) or book)
  monkeypatch.setattr(jax.random, "permutation", lambda rng, n: drawn["shuffle"].append(rng) or jnp.arange(n))
  start = setting(method, stage)

  @jax.jit
  def keys(state, batch):
    for made in drawn.values():
      made.clear()
    rng = jax.random.fold_in(state.rng, state.step)
    rows = method.observe(forward(method, state.params, batch, rng, stage), state, rng, stage)[0]
    for part in rows.values():
      method.terms(stage)["club"](part)
    made = [level for part in rows.values() for level in (part.made if name == "dcid" else [part.made])]
    return jax.tree.map(jax.random.key_data, drawn | {"start": [level.start_rng for level in made]})

  found = keys(start.state, batch_of())
  assert {what: len(of) for what, of in found.items()} == {"reset": resets, "shuffle": shuffles, "start": starts}
  found = [tuple(np.asarray(key)) for of in found.values() for key in of]
  assert len(set(found)) == len(found)

"""Every term that a shipped config lists with a weight changes what its stage trains."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax import config as config_lib
from codebind_jax.compare.runs import run_config
from codebind_jax.config import validation
from codebind_jax.methods.base import make_init
from codebind_jax.models.towers import DecoderSpec, TowerSpec
from codebind_jax.runtime import optim
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.schema import Frozen
from codebind_jax.step import term_values
from codebind_jax.train import optimizer_of

ROWS, INPUTS = 6, 5
SHIPPED = {
  "stage1": "", "progressive": "full", "synthetic": "", "imagebind_huge": "decoder", "compare": "", "paper.image": "",
  "paper.audio": "", "paper.tactile": "", "paper.eeg": "",
}  # fmt: skip
SHRUNK = {"codes": 8, "queue": 12, "club_hidden": 4, "iterations": 3}


def shrunk(config):
  """The config with its methods, stages, losses and forms of codes, on cached tokens and narrow towers."""
  width = 4 * config.codebook.dim
  own = lambda tower: width * bool(tower.specific_dim)
  towers = {
    name: TowerSpec(trunk="vectors", specific_dim=own(tower), dropout=tower.dropout, logit_scale=tower.logit_scale)
    for name, tower in config.model.towers.items()
  }
  model = dataclasses.replace(
    config.model, towers=Frozen(towers), shared_dim=width, half=(), decoder=DecoderSpec(8, 1, 2)
  )
  codes = Frozen({name: 6 for name, tower in towers.items() if tower.specific_dim})
  options = {key: min(value, SHRUNK[key]) if key in SHRUNK else value for key, value in config.method_options.items()}
  stages = {name: dataclasses.replace(stage, sources=Frozen()) for name, stage in config.stages.items()}
  return dataclasses.replace(
    config, model=model, method_options=Frozen(options), stages=Frozen(stages),
    codebook=dataclasses.replace(config.codebook, shared_codes=12, codes=codes),
  )  # fmt: skip


def settings(name, form):
  """The runs of a shipped config: itself, or the variants that it compares."""
  config = config_lib.read(importlib.import_module(f"configs.{name}").get_config(*[form] if form else []))
  if config.compare is None:
    return [("", config)]
  return [(one, run_config(config, variant, 1e-3, 0, False)) for one, variant in config.compare.variants.items()]


def forms(found):
  """Those of the runs that differ in method, terms, or form of the codes."""
  key = lambda config: (
    config.method, config.method_options, config.model.quantize, config.codebook.distance, config.codebook.normalize,
    config.codebook.ema, config.codebook.detach_similarity,
    frozenset(frozenset(k for k, v in stage.losses.items() if v) for stage in config.ordered),
  )  # fmt: skip
  kept = {}
  for id_, config in found:
    kept.setdefault(key(config), (id_, config))
  return [pytest.param(config, id=id_) for id_, config in kept.values()]


RUNS = forms([(f"{name}:{one}", config) for name, form in SHIPPED.items() for one, config in settings(name, form)])


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("config", RUNS)
def test_every_listed_term_has_a_gradient(config):
  config = shrunk(config)
  method, stage = config_lib.method_of(config), config.ordered[0]
  shapes = {name: jax.ShapeDtypeStruct((2, INPUTS), jnp.float32) for name in config.model.towers}
  params, books, aux = make_init(method, shapes, stages=[stage])(jax.random.key(3))
  frozen = optim.frozen(optimizer_of(config, method, stage, params)[1])
  state = TrainState(jnp.zeros((), jnp.int32), params, books, (), aux, jax.random.key(5))
  rng, has = np.random.default_rng(0), np.ones(ROWS, bool)
  batch = {"all": {m: rng.normal(size=(ROWS, 2, INPUTS)).astype(np.float32) for m in stage.modalities}}
  batch["all"]["_mask"] = dict.fromkeys(stage.modalities, has)
  batch = jax.tree.map(jnp.asarray, batch)
  terms = jax.jacrev(
    lambda p: term_values(method, stage, optim.stop_frozen(p, frozen), state, batch, jax.random.key(1))[0]
  )
  found = jax.jit(terms)(params)
  weights = method.weights(stage)
  norms = {name: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(found[name])) for name in weights}
  dead = {name for name, weight in weights.items() if weight and not norms[name] > 1e-9}
  assert weights and dead == set(), norms


def test_a_term_that_would_have_none_is_refused():
  stage1 = importlib.import_module("configs.stage1").get_config()
  stage1.unlock().stages.bridges.losses.code_uniform = 0.01
  with pytest.raises(ValueError, match="bridges.losses.code_uniform: got 0.01, but codes that follow moving averages"):
    validation.validate(stage1.lock())
  stage1.codebook.ema = False
  validation.validate(stage1)

"""A method and a loss from outside the package: one file each, named in the config, trained by the same trainer."""

import json
import sys

import pytest

from codebind_jax.api import load
from codebind_jax.methods import codebind_terms
from codebind_jax.train import train_and_evaluate
from tests.test_methods import small_config

METHOD = '''
"""Pulls pairs together and pushes the batch apart."""

import dataclasses

import jax.numpy as jnp

from codebind_jax.methods import base


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Attributes: push: weight of the spread."""

  BASE = "pull"
  push: float = 1.0

  def observe(self, forward, state, rng, stage):
    return forward.rows(rng, stage, state), state.codebooks, state.aux

  def terms(self, stage):
    return {"pull": self._pull, "push": self._push}

  def weights(self, stage):
    return {"pull": 1.0, "push": self.push}

  def _pull(self, rows):
    z = self.embeddings(rows.features)
    return sum(jnp.mean(jnp.where(rows.both(a, b), jnp.sum((z[a] - z[b]) ** 2, -1), 0.0)) for a, b in rows.pairs)

  def _push(self, rows):
    return sum(jnp.mean(x @ x.T) for x in self.embeddings(rows.features).values())
'''
LOSS = '''
"""Squared length of the class tokens."""

import jax.numpy as jnp


def length(rows):
  return sum(jnp.mean(jnp.sum(x[:, 0] ** 2, -1) * rows.masks[m]) for m, x in rows.features.items())
'''


def trained(config, folder):
  """The run's lines of metrics."""
  config.data.root, config.baseline, config.test, config.tasks = str(folder / "data"), False, False, ("retrieval",)
  config.log_steps = 1
  train_and_evaluate(config.lock(), folder / "run")
  return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def outside(tmp_path, monkeypatch):
  """A folder of modules that Python finds."""
  (tmp_path / "elsewhere").mkdir()
  monkeypatch.syspath_prepend(tmp_path)
  return tmp_path / "elsewhere"


def test_a_method_is_one_file_and_its_dotted_name(outside, tmp_path, monkeypatch, quick_compiler):
  (outside / "pulling.py").write_text(METHOD)
  config = small_config("fixed_anchor", steps=2)
  config.method, config.method_options = "elsewhere.pulling", {"push": 0.5}
  lines = [line for line in trained(config, tmp_path) if "train/pull" in line]
  assert len(lines) == 2
  for line in lines:
    assert line["train/total"] == pytest.approx(line["train/pull"] + 0.5 * line["train/push"], rel=1e-4)

  assert load(tmp_path / "run").config.method == "elsewhere.pulling"  # this process has it
  monkeypatch.delitem(sys.modules, "elsewhere.pulling")
  (outside / "pulling.py").write_text("raise RuntimeError('a folder of others runs nothing')")
  with pytest.raises(ValueError, match=r"config.method: got 'elsewhere.pulling', a module that a saved"):
    load(tmp_path / "run")


def test_a_loss_is_one_file_and_one_entry(outside, tmp_path, monkeypatch, quick_compiler):
  (outside / "short.py").write_text(LOSS)
  from elsewhere.short import length

  monkeypatch.setitem(codebind_terms.TERMS, "length", length)
  config = small_config("codebind", steps=2)
  config.model.quantize = False
  config.stages.only.losses = {"info_nce": 1.0, "length": 0.25}
  lines = [line for line in trained(config, tmp_path) if "train/length" in line]
  assert len(lines) == 2
  for line in lines:
    assert line["train/total"] == pytest.approx(line["train/info_nce"] + 0.25 * line["train/length"], rel=1e-4)

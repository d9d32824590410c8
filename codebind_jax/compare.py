"""Mode `compare`: methods side by side, on the same towers, data and steps, each with its own learning rate.

The rate is chosen for every method on the validation set, with seed 0; the other seeds are then trained with it and
read the test set once. Finished runs are not run again, so a stopped comparison goes on where it was, and several
processes or machines can share one: each names its variants in `config.compare.only`, and a last call without it
collects what they left in the folder. A variant belongs to one process at a time.
"""

from __future__ import annotations

import logging as standard_logging
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import tqdm
from absl import logging

from codebind_jax import config as config_lib
from codebind_jax.api import Model, load
from codebind_jax.checkpoint import Checkpoints
from codebind_jax.compare_evaluation import CrossModal, finished, transfers_of
from codebind_jax.compare_report import write_comparison
from codebind_jax.data.featurize import Featurizer
from codebind_jax.data.synthetic import NAME, Factors, SyntheticSource
from codebind_jax.data.task import EvalSet, Task, open_task
from codebind_jax.methods.base import EXTRA
from codebind_jax.metrics import read_metrics
from codebind_jax.train import claim_workdir, run_stages

SCORE = "eval/val/label/cross"  # what learning rates are chosen by, unless config.compare.score says


def graded_task(world: Any, modalities: Sequence[str]) -> Task:
  """The synthetic world with modalities of graded quality, as `config.compare.world` describes it."""
  factors = Factors(
    classes=world.classes, styles=world.styles, noise=world.noise, quality=world.quality.to_dict(),
    style_quality=world.style_quality.to_dict(), seed=world.seed,
  )  # fmt: skip
  rows = {"train": world.rows, "val": world.rows // 4, "test": world.rows // 2}
  sources = {split: SyntheticSource(factors, split, count, modalities) for split, count in rows.items()}
  evals = tuple(EvalSet(f"{NAME}_{role}", NAME, role, sources[role], ()) for role in ("val", "test"))
  summary = f"synthetic, graded: {world.rows} training rows of {', '.join(modalities)}"
  return Task(NAME, summary, {NAME: sources["train"]}, {NAME: "id"}, evals)


def chosen(settings: Any) -> list[str]:
  """The variants that this call trains: all, or those that `config.compare.only` names.

  Raises:
    ValueError: if one of those is no variant.
  """
  names = [name for name in settings.get("only", "").split(",") if name]
  config_lib.check_keys(names, settings.variants, "compare.only")
  return names or list(settings.variants)


def whole(config: Any) -> Any:
  """The config of the comparison that a call is a part of: `only` does not tell comparisons apart."""
  joined = ml_collections.ConfigDict(config.to_dict())
  if "only" in joined.compare:
    del joined.compare["only"]
  return joined.lock()


def run_config(config: Any, variant: Any, rate: float, seed: int, test: bool) -> Any:
  """The config of one run."""
  run = ml_collections.ConfigDict(config.to_dict())
  run.mode, run.baseline, run.test, run.seed = "train", False, test, seed
  run.method, run.method_options = variant.method, ml_collections.ConfigDict(variant.options.to_dict())
  run.optim.learning_rate = rate
  run.model.quantize = variant.quantize
  for entry in run.stages.values():
    entry.losses = ml_collections.ConfigDict(variant.losses.to_dict())
  del run["compare"]
  return run.lock()


def compare(config: Any, workdir: str | pathlib.Path) -> dict[str, Any]:
  """Tunes, trains and evaluates the variants of `config.compare`, and writes comparison.md, .json and .svg files.

  With `config.compare.only` it trains what that names and, unless that is all, writes nothing but the runs themselves.

  Returns:
    What comparison.json holds.

  Raises:
    ValueError: for a bad config, before any work.
  """
  settings = config.compare
  if jax.process_count() > 1:
    raise ValueError(f"mode 'compare' runs in one process, got {jax.process_count()}; divide it by config.compare.only")
  for variant in settings.variants.values():
    config_lib.validate(run_config(config, variant, settings.learning_rates[0], 0, False))
  names = chosen(settings)
  folder = claim_workdir(whole(config), workdir)
  task = graded_task(settings.world, sorted(config.model.towers)) if settings.world else open_task(config.data)
  featurizer = Featurizer(config)
  transfers, tokens = transfers_of(settings, task), {}
  tables, labels = featurizer.train_tables(task.train, task.unique)
  evaluations = {
    test: CrossModal(
      run_config(config, settings.variants[names[0]], settings.learning_rates[0], 0, test), task, featurizer,
      transfers, stages=settings.get("stages", False), tokens=tokens,
    ) for test in (False, True)
  }  # fmt: skip
  tuned, score = len(settings.learning_rates) > 1, settings.get("score", SCORE)
  bar = tqdm.tqdm(total=len(names) * (len(settings.learning_rates) * tuned + settings.seeds), unit="run", disable=None)

  def train(name: str, rate: float, seed: int, test: bool) -> dict[str, Any]:
    bar.set_description(f"{name} {rate:g} seed {seed}")
    run = run_config(config, settings.variants[name], rate, seed, test)
    inner = claim_workdir(run, folder / name / (f"rate{rate:g}" if not test else f"seed{seed}"))
    final, evaluation = finished(inner), evaluations[test]
    if final is None:
      level = standard_logging.getLogger("absl").level
      logging.set_verbosity(logging.WARNING)
      try:
        final, _ = run_stages(run, inner, tables, labels, evaluation)
      finally:
        logging.set_verbosity(logging.converter.standard_to_absl(level))
    bar.update()
    if not test:
      return {"metrics": final}
    model = load(inner)
    model.trunks = featurizer.trunks
    return {"metrics": final, "cost": cost(inner, model), "probe": evaluation.probe(model, inner)}

  results: dict[str, Any] = {}
  for name in names:
    rates = {}
    if tuned:
      rates = {rate: train(name, rate, 0, False)["metrics"][score] for rate in settings.learning_rates}
    rate = max(rates, key=rates.get) if rates else settings.learning_rates[0]
    runs = [train(name, rate, seed, True) for seed in range(1, settings.seeds + 1)]
    speed = float(np.median([run["cost"]["examples_per_second"] for run in runs]))
    results[name] = {
      "method": settings.variants[name].method, "learning_rate": rate,
      "tuning": {f"{key:g}": value for key, value in rates.items()}, "runs": [run["metrics"] for run in runs],
      "cost": runs[-1]["cost"] | {"examples_per_second": speed}, "probes": [run["probe"] for run in runs],
    }  # fmt: skip
  bar.close()
  found = {"summary": task.summary, "config": config_lib.to_plain(whole(config)), "results": results}
  if len(results) == len(settings.variants):
    sys.stdout.write(write_comparison(folder, found))
  else:
    sys.stdout.write(f"trained {', '.join(results)} of {len(settings.variants)} variants in {folder}; the same command "
                     "without --config.compare.only collects all and writes comparison.md\n")  # fmt: skip
  return found


def cost(workdir: pathlib.Path, model: Model) -> dict[str, float]:
  """What a run took beside its towers.

  Returns:
    `examples_per_second`: rows of all sources a second, waiting for data included, compilation and checkpoints not;
    median over the run's log. `compiled_megabytes`: temporaries of the compiled step, as XLA counts them. Numbers kept:
    `towers`, `extra_parameters` (the method's own, trained), `codebooks` (codes and their statistics), `aux` (teacher,
    queue, CLUB's networks).
  """
  lines = read_metrics(workdir / "metrics.jsonl")
  speeds = [line["examples_per_second"] for line in lines if "examples_per_second" in line]
  memory = [line["compiled_megabytes"] for line in lines if "compiled_megabytes" in line]
  size = lambda tree: int(sum(np.size(x) for x in jax.tree.leaves(tree)))
  store = Checkpoints(workdir)
  try:
    aux = store.read_arrays(("aux",))["aux"]
  finally:
    store.close()
  return {
    "examples_per_second": float(np.median(speeds)) if speeds else float("nan"),
    "compiled_megabytes": memory[-1] if memory else float("nan"),
    "towers": size({name: value for name, value in model.params.items() if name != EXTRA}),
    "extra_parameters": size(model.params.get(EXTRA, {})), "codebooks": size(model.codebooks), "aux": size(aux),
  }  # fmt: skip

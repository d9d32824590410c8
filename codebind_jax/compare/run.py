"""Mode `compare`: methods side by side, on the same towers, data and steps, each with its own learning rate.

The rate of every method is chosen on the validation set with seed 0; runs with the other seeds are then trained with
it, and read the test set once. Finished runs are not repeated, so that a stopped comparison can be continued. Several
processes or machines can share one: each names its variants in `config.compare.only`, and a last call without it
collects the runs' metrics.jsonl, and run.json of those that read the test set, without needing their checkpoints. A
variant's run that another process is at is refused.
"""

from __future__ import annotations

import dataclasses
import logging as standard_logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging

from codebind_jax import config as config_lib
from codebind_jax import files, schema
from codebind_jax.api import load
from codebind_jax.compare.cost import FILE as SPEED
from codebind_jax.compare.cost import cost, speeds
from codebind_jax.compare.evaluation import CrossModal, finished, transfers_of
from codebind_jax.compare.table import write_comparison
from codebind_jax.config import Config, GradedWorld, Variant
from codebind_jax.data.batches import Batches
from codebind_jax.data.synthetic import NAME, Factors, SyntheticSource
from codebind_jax.data.task import EvalSet, Task, open_task
from codebind_jax.methods.base import unheeded
from codebind_jax.runtime.compile import Programs
from codebind_jax.stages import Stage
from codebind_jax.train import batches_of, open_run, run_folder, run_stages
from codebind_jax.trunks.feeds import Feeder

RESULT = "run.json"  # results of a run on the test set, in its folder
DIVERGED = "diverged.txt"  # error of a run whose learning rate diverged, in its folder


def graded_task(world: GradedWorld, modalities: Sequence[str]) -> Task:
  """The task of `config.compare.world`, the synthetic world with modalities of graded quality."""
  factors = Factors(
    classes=world.classes, styles=world.styles, noise=world.noise, quality=dict(world.quality),
    style_quality=dict(world.style_quality), seed=world.seed,
  )  # fmt: skip
  rows = {"train": world.rows, "val": world.rows // 4, "test": world.rows // 2}
  sources = {split: SyntheticSource(factors, split, count, modalities) for split, count in rows.items()}
  evals = tuple(EvalSet(f"{NAME}_{role}", NAME, role, sources[role], ()) for role in ("val", "test"))
  summary = f"synthetic, graded: {world.rows} training rows of {', '.join(modalities)}"
  return Task(NAME, summary, {NAME: sources["train"].grouped("id")}, evals)


def comparison_config(config: Config) -> Config:
  """The comparison's config without the keys in which its calls may differ."""
  free = dataclasses.replace(config.compare, only="", against="", timing=0)
  return dataclasses.replace(config, compare=free)


def rate_beyond(tried: Mapping[float, float | None]) -> float | None:
  """The next candidate beyond an end of the rates tried, in their ratio there; None if the best is not at an end.

  Args:
    tried: at least two learning rates -> their score; None where the run diverged.
  """
  scores = {rate: value for rate, value in tried.items() if value is not None}
  ordered = sorted(tried)
  best = max(scores, key=scores.get) if scores else None
  if best == ordered[-1]:
    return float(f"{ordered[-1] ** 2 / ordered[-2]:.2g}")
  return float(f"{ordered[0] ** 2 / ordered[1]:.2g}") if best == ordered[0] else None


def run_config(config: Config, variant: Variant, rate: float, seed: int, test: bool) -> Config:
  """The config of one run."""
  own = {"losses": variant.losses} | unheeded(variant.method)  # stage keys for other methods get their defaults
  chosen = lambda **values: {name: value for name, value in values.items() if value is not None}
  own |= chosen(mixup=variant.mixup)
  towers = {name: dataclasses.replace(tower, **chosen(dropout=variant.dropout))
            for name, tower in config.model.towers.items()}  # fmt: skip
  return config_lib.filled(dataclasses.replace(
    config, mode="train", baseline=False, test=test, seed=seed, compare=None, method=variant.method,
    method_options=variant.options,
    optim=dataclasses.replace(config.optim, learning_rate=rate, **chosen(weight_decay=variant.weight_decay)),
    model=dataclasses.replace(config.model, quantize=variant.quantize, towers=schema.Frozen(towers)),
    stages=schema.Frozen({name: dataclasses.replace(stage, **own) for name, stage in config.stages.items()}),
  ))  # fmt: skip


def compare(config: Any, workdir: str | files.Path) -> dict[str, Any]:
  """Tunes, trains and evaluates the variants of `config.compare`, and writes comparison.md, .json and .svg files.

  With `config.compare.only` it trains the named variants and, unless these are all, writes nothing but their runs. With
  `config.compare.timing` it also times the steps of all variants after training, and saves the result.

  Returns:
    The content of comparison.json.

  Raises:
    ValueError: for a bad config, before any work.
    OSError: if `config.compare.against` cannot be read, before any work.
    FloatingPointError: if a run on a chosen rate diverges, or all rates of a variant do; a single one is left out.
  """
  config = config_lib.validate(config)
  settings = config.compare
  if jax.process_count() > 1:
    raise ValueError(f"mode 'compare' runs in one process, got {jax.process_count()}; divide it by config.compare.only")
  for variant in settings.variants.values():
    config_lib.validate(run_config(config, variant, settings.learning_rates[0], 0, False))
  names = settings.names
  against = files.read_sealed(files.path(settings.against)) if settings.against else None
  folder = open_run(comparison_config(config), workdir, strict=True)
  task = graded_task(settings.world, sorted(config.model.towers)) if settings.world else open_task(config.data)
  task = dataclasses.replace(task, extra={})
  feeder = Feeder(config.data, config.model.towers)
  transfers, shared = transfers_of(settings, task), {}
  feeds = feeder.train_feeds(task.train, config.data.templates_of)
  evaluations = {
    test: CrossModal(
      run_config(config, settings.variants[names[0]], settings.learning_rates[0], 0, test), task, feeder,
      transfers, stages=settings.stages, feeds=shared,
    ) for test in (False, True)
  }  # fmt: skip
  batches: dict[tuple[int, str], Batches] = {}

  def make_batches(config: Config, stage: Stage, *rest: Any) -> Batches:
    """A stage's batches for a seed, which all variants share, so that each batch is read once."""
    if (config.seed, stage.name) not in batches:
      batches[config.seed, stage.name] = batches_of(config, stage, *rest, keep=True)
    return batches[config.seed, stage.name]

  tuned, score = len(settings.learning_rates) > 1, settings.score
  bar = tqdm.tqdm(total=len(names) * (len(settings.learning_rates) * tuned + settings.seeds), unit="run", disable=None)

  def train(name: str, rate: float, seed: int, test: bool, programs: Programs) -> dict[str, Any]:
    bar.set_description(f"{name} {rate:g} seed {seed}")
    inner = run_folder(folder / name / (f"rate{rate:g}" if not test else f"seed{seed}"))
    with files.held(inner, "trains"):
      return train_in(inner, name, rate, seed, test, programs)

  def train_in(
    inner: files.Path, name: str, rate: float, seed: int, test: bool, programs: Programs
  ) -> dict[str, Any]:
    run = run_config(config, settings.variants[name], rate, seed, test)
    open_run(run, inner)
    if test and files.is_file(inner / RESULT):
      bar.update()
      return files.read_sealed(inner / RESULT)
    final, evaluation, model = finished(inner), evaluations[test], None
    if final is None and not files.is_file(inner / DIVERGED):
      level = standard_logging.getLogger("absl").level
      logging.set_verbosity(logging.WARNING)
      try:
        final, models = run_stages(run, inner, feeds, evaluation, programs, make_batches)
        model = models["after"]
      except FloatingPointError as error:
        if test:
          raise
        files.write_whole(inner / DIVERGED, f"{error}\n")
      finally:
        logging.set_verbosity(logging.converter.standard_to_absl(level))
    bar.update()
    if not test:
      return {"metrics": final}
    if model is None:
      model = load(inner)
      model.trunks = feeder.trunks
    result = {"metrics": final, "cost": cost(inner, model), "probe": evaluation.probe(model, inner)}
    files.write_sealed(inner / RESULT, result)
    return result

  results: dict[str, Any] = {}
  for name in names:
    tried: dict[float, Any] = {}
    programs, further = Programs(), list(settings.learning_rates) if tuned else []
    while further:
      for rate in further:
        metrics = train(name, rate, 0, False, programs)["metrics"]
        tried[rate] = None if metrics is None else metrics[score]
      beyond = rate_beyond(tried) if len(tried) < len(settings.learning_rates) + settings.widen else None
      further = [] if beyond is None else [beyond]
      bar.total += len(further)
    rates = {rate: value for rate, value in tried.items() if value is not None}
    if tuned:
      if not rates:
        raise FloatingPointError(f"config.compare.learning_rates: {name!r} diverged with every one of them; see "
                                 f"{folder / name}/*/{DIVERGED}")  # fmt: skip
    rate = max(rates, key=rates.get) if rates else settings.learning_rates[0]
    runs = [train(name, rate, seed, True, programs) for seed in range(1, settings.seeds + 1)]
    speed = float(np.median([run["cost"]["examples_per_second"] for run in runs]))
    results[name] = {
      "method": settings.variants[name].method, "learning_rate": rate,
      "tuning": {f"{key:g}": tried[key] for key in sorted(tried)}, "runs": [run["metrics"] for run in runs],
      "cost": runs[-1]["cost"] | {"examples_per_second": speed}, "probes": [run["probe"] for run in runs],
    }  # fmt: skip
  bar.close()
  comparison = {"summary": task.summary, "config": schema.to_plain(comparison_config(config)), "results": results}
  if len(results) == len(settings.variants):
    if settings.timing:
      best = {name: run_config(config, settings.variants[name], r["learning_rate"], 0, False)
              for name, r in results.items()}  # fmt: skip
      timed = speeds(best, feeds, task, evaluations[False].trunks, settings.timing)
      files.write_sealed(folder / SPEED, timed)
    if files.is_file(folder / SPEED):
      comparison["speed"] = files.read_sealed(folder / SPEED)
    sys.stdout.write(write_comparison(folder, comparison, against))
  else:
    sys.stdout.write(f"trained {', '.join(results)} of {len(settings.variants)} variants in {folder}; the same command "
                     "without --config.compare.only collects all and writes comparison.md\n")  # fmt: skip
  return comparison


"""Mode `compare`: methods side by side, on the same towers, data and steps, each with its own learning rate.

The rate of every method is chosen on the validation set with seed 0; runs with the other seeds are then trained with
it, and read the test set once. Finished runs are not repeated, so that a stopped comparison can be continued. Several
processes or machines can share one: each names its variants in `config.compare.only`, and a last call without it
collects the runs' metrics.jsonl, and run.json of those that read the test set, without needing their checkpoints. A
variant's run that another process is at is refused.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from codebind_jax import files, schema
from codebind_jax.api import Model
from codebind_jax.compare.cost import FILE as SPEED
from codebind_jax.compare.cost import cost, speeds
from codebind_jax.compare.evaluation import CrossModal, transfers_of
from codebind_jax.compare.runs import Runs, run_config
from codebind_jax.compare.sizes import compare_sizes
from codebind_jax.compare.table import sections, with_claims, write_comparison
from codebind_jax.config import FITS, QUANTISERS, Config, GradedWorld, validation
from codebind_jax.data.records import Source
from codebind_jax.data.synthetic import NAME, Factors, SyntheticSource
from codebind_jax.data.task import EvalSet, Task, open_task
from codebind_jax.train import open_run
from codebind_jax.trunks.feeds import Feeder


def graded_task(world: GradedWorld, modalities: Sequence[str]) -> Task:
  """The task of `config.compare.world`, the synthetic world with modalities of graded quality.

  Its evaluation sets are `synthetic_ROLE` and, where the world has them, `synthetic_ROLE_noisy` and
  `synthetic_ROLE_hidden`, the same items seen less well.
  """
  factors = Factors(
    classes=world.classes, styles=world.styles, noise=world.noise, quality=dict(world.quality),
    style_quality=dict(world.style_quality), seed=world.seed,
  )  # fmt: skip
  rows = {"train": world.rows, "val": world.rows // 4, "test": world.rows // 2}
  train = first_of_each(SyntheticSource(factors, "train", rows["train"], modalities), world.per_class)
  seen = {"": factors} | ({"_noisy": dataclasses.replace(factors, noise=world.noisy)} if world.noisy else {})
  seen |= {"_hidden": dataclasses.replace(factors, hidden=world.hidden)} if world.hidden else {}
  evals = tuple(
    EvalSet(f"{NAME}_{role}{how}", NAME, role, SyntheticSource(of, role, rows[role], modalities), ())
    for role in ("val", "test") for how, of in seen.items()
  )  # fmt: skip
  summary = f"synthetic, graded: {len(train)} training rows of {', '.join(modalities)}"
  return Task(NAME, summary, {NAME: train.grouped("id")}, evals)


def first_of_each(source: Source, count: int) -> Source:
  """The first `count` records of each label; all for 0."""
  if not count:
    return source
  labels = np.asarray(list(source.column("label")))
  return source.select(np.sort(np.concatenate([np.flatnonzero(labels == one)[:count] for one in np.unique(labels)])))


def comparison_config(config: Config) -> Config:
  """The comparison's config without the keys in which its calls may differ."""
  free = dataclasses.replace(config.compare, only="", against="", timing=0)
  if free.bytes:  # quantisers are fitted to finished runs
    free = dataclasses.replace(free, bytes=dataclasses.replace(free.bytes, quantisers=QUANTISERS, fits=FITS))
  return dataclasses.replace(config, compare=free, test=False)


def compare(config: Any, workdir: str | files.Path) -> dict[str, Any]:
  """Tunes, trains and evaluates the variants of `config.compare`, and writes comparison.md, .json and .svg files.

  With `config.compare.only` it trains the named variants and, unless these are all, prints their tables and writes
  nothing but their runs. With `config.compare.timing` it also times the steps of all variants after training, and saves
  the result.

  Returns:
    The content of comparison.json.

  Raises:
    ValueError: for a bad config, before any work.
    OSError: if `config.compare.against` cannot be read, before any work.
    FloatingPointError: if a run on a chosen rate diverges, or all rates of a variant do; a single one is left out.
  """
  config = validation.validate(config)
  settings = config.compare
  if jax.process_count() > 1:
    raise ValueError(f"mode 'compare' runs in one process, got {jax.process_count()}; divide it by config.compare.only")
  for variant in settings.variants.values():
    validation.validate(run_config(config, variant, settings.learning_rates[0], 0, False))
  names = settings.names
  against = files.read_sealed(files.path(settings.against)) if settings.against else None
  folder = open_run(comparison_config(config), workdir, strict=True)
  task = graded_task(settings.world, sorted(config.model.towers)) if settings.world else open_task(config.data)
  task = dataclasses.replace(task, extra={})
  feeder = Feeder(config.data, config.model.towers)
  transfers, shared = transfers_of(settings, task), {}
  feeds = feeder.train_feeds(task.train, config.data.templates_of)
  if settings.bytes:
    return compare_sizes(config, folder, task, feeder, feeds)
  first = settings.variants[names[0]]
  evaluations = {
    test: CrossModal(
      run_config(config, first, settings.learning_rates[0], 0, test), task, feeder, transfers, stages=settings.stages,
      feeds=shared,
    ) for test in (False, True)
  }  # fmt: skip

  def result(inner: files.Path, model: Model, metrics: dict[str, float]) -> dict[str, Any]:
    return {"cost": cost(inner, model), "probe": evaluations[True].probe(model, inner)}

  trains, results = Runs(config, folder, feeds, evaluations, result), {}
  for name in names:
    rate, tried = trains.chosen(name)
    runs = [trains.seed(name, seed) for seed in range(1, settings.seeds + 1)]
    speed = float(np.median([run["cost"]["examples_per_second"] for run in runs]))
    results[name] = {
      "method": settings.variants[name].method, "learning_rate": rate,
      "tuning": {f"{key:g}": tried[key] for key in sorted(tried)}, "runs": [run["metrics"] for run in runs],
      "cost": runs[-1]["cost"] | {"examples_per_second": speed}, "probes": [run["probe"] for run in runs],
    }  # fmt: skip
  trains.bar.close()
  comparison = {"summary": task.summary, "config": schema.to_plain(comparison_config(config)), "results": results}
  if len(results) == len(settings.variants):
    if settings.timing:
      best = {name: run_config(config, settings.variants[name], r["learning_rate"], 0, False)
              for name, r in results.items()}  # fmt: skip
      timed = speeds(best, feeds, task, feeder.trunks, settings.timing)
      files.write_sealed(folder / SPEED, timed)
    if files.is_file(folder / SPEED):
      comparison["speed"] = files.read_sealed(folder / SPEED)
    sys.stdout.write(write_comparison(folder, comparison, against))
  else:
    sys.stdout.write("\n".join([
      *sections(with_claims(comparison, against)),
      f"trained {', '.join(results)} of {len(settings.variants)} variants in {folder}; the same command without "
      "--config.compare.only collects all and writes comparison.md\n",
    ]))  # fmt: skip
  return comparison


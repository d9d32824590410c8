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
from collections.abc import Collection, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import tqdm
from absl import logging

from codebind_jax import config as config_lib
from codebind_jax.api import Model, load
from codebind_jax.checkpoint import Checkpoints
from codebind_jax.compare_report import write_comparison
from codebind_jax.data.featurize import Featurizer
from codebind_jax.data.synthetic import NAME, Factors, SyntheticSource
from codebind_jax.data.task import EvalSet, Task, open_task
from codebind_jax.evaluate import FINAL
from codebind_jax.evaluators.crossmodal import code_sharing, fit_head, recall_at_one, transfer
from codebind_jax.methods.base import EXTRA
from codebind_jax.methods.toc import redundancy, select_channels
from codebind_jax.metrics import FILE, read_metrics
from codebind_jax.train import claim_workdir, run_stages

SCORE = "eval/val/label/cross"  # what learning rates are chosen by


class CrossModal:
  """Evaluates a model by heads learned on one modality and tested on the others; what `train.run_stages` asks for.

  Metrics, for every role r of the task's sets and every field f: `eval/r/f/A>B`, accuracy on B of a head of A;
  `eval/r/f/within`, `cross` and `all`, means over A = B and A != B, and that of one head on all modalities together;
  `eval/r/recall`, mean over pairs of recall at 1; `codes/shared` and `codes/single`, means over pairs.
  """

  def __init__(self, config: Any, task: Task, featurizer: Featurizer, fields: Sequence[str]):
    self.config, self.task, self.trunks, self.fields = config, task, featurizer.trunks, tuple(fields)
    self._featurizer, self._tables = featurizer, {}

  def validate(self, model: Model, worlds: Collection[str]) -> dict[str, float]:
    """On the validation sets."""
    return self._measure(model, ("val",))

  def after_stage(self, model: Model, step: int, stage: str, writer: Any, worlds: Collection[str]) -> None:
    """Nothing: comparisons have one stage."""

  def finish(self, model: Model, step: int, writer: Any) -> dict[str, float]:
    """All metrics of a finished run, measured once."""
    if (done := finished(writer.path.parent)) is not None:
      return done
    found = self._measure(model, ("val", "test") if self.config.test else ("val",))
    writer.write(step, FINAL, found)
    writer.flush()
    return found

  def _embed(self, model: Model, name: str, source: Any) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """Embeddings and fields of every modality's rows."""
    embedded, fields = {}, {}
    for m in model.modalities:
      key = (name, m)
      if key not in self._tables:
        rows = [i for i in range(len(source)) if source.has(i, m)]
        self._tables[key] = rows, self._tokens(source, m, rows)
      rows, tokens = self._tables[key]
      embedded[m] = model.embed_tokens(m, tokens)
      fields[m] = {f: np.array([str(source.rows[i].get(f)) for i in rows]) for f in self.fields}
      fields[m]["id"] = np.array([source.rows[i]["id"] for i in rows])
    return embedded, fields

  def _tokens(self, source: Any, m: str, rows: Sequence[int]) -> np.ndarray:
    if m == "text":
      return self._featurizer.texts([source.rows[i]["text"][0] for i in rows])
    return np.asarray(self._featurizer.table(source, m).features[:, 0], np.float32)

  def _measure(self, model: Model, roles: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    train = {world: self._embed(model, f"{world}/train", source) for world, source in self.task.train.items()}
    for role in roles:
      for test in (s for s in self.task.evals if s.role == role):
        name = f"eval/{role}" if sum(s.role == role for s in self.task.evals) == 1 else f"eval/{role}/{test.name}"
        found |= self._of_set(name, train[test.world], self._embed(model, test.name, test.source))
    size = model.method.codebook_sizes.get("shared", 0)
    embedded = next(iter(train.values()))[0]
    if size:
      names = sorted(embedded)
      pairs = [code_sharing(embedded[a].codes_shared, embedded[b].codes_shared, size)
               for i, a in enumerate(names) for b in names[i + 1 :]]  # fmt: skip
      found |= {"codes/shared": float(np.mean([p[0] for p in pairs])),
                "codes/single": float(np.mean([p[1] for p in pairs]))}  # fmt: skip
    return found

  def _of_set(self, name: str, train: Any, test: Any) -> dict[str, float]:
    found, shared = {}, lambda part: {m: e.shared for m, e in part[0].items()}
    ids = {m: list(f["id"]) for m, f in test[1].items()}
    for field in self.fields:
      labels = lambda part, field=field: {m: f[field] for m, f in part[1].items()}
      accuracy = transfer(shared(train), shared(test), labels(train), labels(test))
      found |= {f"{name}/{field}/{a}>{b}": value for (a, b), value in accuracy.items()}
      found[f"{name}/{field}/within"] = float(np.mean([v for (a, b), v in accuracy.items() if a == b]))
      found[f"{name}/{field}/cross"] = float(np.mean([v for (a, b), v in accuracy.items() if a != b]))
      if len({len(rows) for rows in ids.values()}) == 1:
        join = lambda part: np.concatenate([shared(part)[m] for m in sorted(part[0])], axis=1)
        first = sorted(test[0])[0]
        head = fit_head(join(train), labels(train)[first])
        found[f"{name}/{field}/all"] = 100.0 * float(np.mean(head.predict(join(test)) == labels(test)[first]))
    recalls = []
    names = sorted(ids)
    for i, a in enumerate(names):
      for b in names[i + 1 :]:
        both = [key for key in ids[a] if key in set(ids[b])]
        pick = lambda m, both=both: test[0][m].shared[[ids[m].index(key) for key in both]]
        recalls.append(recall_at_one(pick(a), pick(b)))
    return found | {f"{name}/recall": float(np.mean(recalls))}


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


def finished(folder: pathlib.Path) -> dict[str, float] | None:
  """The final metrics of a run; None where it has not come to them."""
  for line in read_metrics(folder) if (folder / FILE).exists() else []:
    if line["stage"] == FINAL:
      return {name: value for name, value in line.items() if name not in ("step", "stage", "warning")}
  return None


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

  With `config.compare.only` it trains what that names and writes nothing but the runs themselves.

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
  tables, labels = featurizer.train_tables(task.train, task.unique)
  tuned = len(settings.learning_rates) > 1
  bar = tqdm.tqdm(total=len(names) * (len(settings.learning_rates) * tuned + settings.seeds), unit="run", disable=None)

  def train(name: str, rate: float, seed: int, test: bool) -> tuple[dict[str, float], pathlib.Path]:
    bar.set_description(f"{name} {rate:g} seed {seed}")
    run = run_config(config, settings.variants[name], rate, seed, test)
    inner = claim_workdir(run, folder / name / (f"rate{rate:g}" if not test else f"seed{seed}"))
    final = finished(inner)
    if final is None:
      evaluation = CrossModal(run, task, featurizer, settings.fields)
      level = standard_logging.getLogger("absl").level
      logging.set_verbosity(logging.WARNING)
      try:
        final, _ = run_stages(run, inner, tables, labels, evaluation)
      finally:
        logging.set_verbosity(logging.converter.standard_to_absl(level))
    bar.update()
    return final, inner

  results: dict[str, Any] = {}
  for name in names:
    rates = {}
    if tuned:
      rates = {rate: train(name, rate, 0, False)[0][SCORE] for rate in settings.learning_rates}
    rate = max(rates, key=rates.get) if rates else settings.learning_rates[0]
    runs = [train(name, rate, seed, True) for seed in range(1, settings.seeds + 1)]
    results[name] = {
      "method": settings.variants[name].method, "learning_rate": rate,
      "tuning": {f"{key:g}": value for key, value in rates.items()}, "runs": [run[0] for run in runs],
    } | measured(runs[-1][1])  # fmt: skip
  bar.close()
  found = {"summary": task.summary, "config": config_lib.to_plain(whole(config)), "results": results}
  if len(results) == len(settings.variants):
    sys.stdout.write(write_comparison(folder, found))
  else:
    sys.stdout.write(f"trained {', '.join(results)} of {len(settings.variants)} variants in {folder}; the same command "
                     "without --config.compare.only collects all and writes comparison.md\n")  # fmt: skip
  return found


def measured(workdir: pathlib.Path) -> dict[str, Any]:
  """What a finished run's checkpoint tells beside its metrics."""
  model = load(workdir)
  return {"cost": cost(workdir, model), "toc": channels(model)}


def cost(workdir: pathlib.Path, model: Model) -> dict[str, float]:
  """Examples a second (median of the log), temporaries of the compiled step, and what is kept beside the towers."""
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


def channels(model: Model) -> dict[str, float]:
  """Redundancy (mean cosine) of the shared codes before and after TOC has kept three quarters of the channels."""
  if "shared" not in model.codebooks:
    return {}
  codes = np.asarray(model.codebooks["shared"].codes)
  kept = np.asarray(select_channels(codes, max(1, codes.shape[1] * 3 // 4)))
  return {"before": float(redundancy(codes)), "after": float(redundancy(codes[:, kept]))}

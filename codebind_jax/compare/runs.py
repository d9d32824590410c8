"""The runs of a comparison: each variant's learning rate chosen on the validation sets, then one run a seed with it.

Finished runs are not repeated, so that a stopped comparison can be continued; a run that another process is at is
refused.
"""

from __future__ import annotations

import dataclasses
import logging as standard_logging
from collections.abc import Callable, Mapping
from typing import Any

import tqdm
from absl import logging

from codebind_jax import config as config_lib
from codebind_jax import files, schema
from codebind_jax.api import Model, load
from codebind_jax.codebook.spec import Codebook
from codebind_jax.compare.evaluation import finished
from codebind_jax.config import Config, Variant
from codebind_jax.data.batches import Batches
from codebind_jax.evaluate import StageEvaluation
from codebind_jax.methods.base import unheeded
from codebind_jax.runtime.compile import Programs
from codebind_jax.stages import Stage
from codebind_jax.train import batches_of, open_run, run_folder, run_stages

RESULT = "run.json"  # what is measured of a seed's run, in its folder
DIVERGED = "diverged.txt"  # error of a run whose learning rate diverged, in its folder
REGULARISED = ("mixup", "dropout", "weight_decay")  # settings that a variant may leave to the one that it follows


def run_config(config: Config, variant: Variant, rate: float, seed: int, test: bool, start: str = "") -> Config:
  """The config of one run.

  Args:
    config: of the comparison.
    variant: whose run it is.
    rate: learning rate.
    seed: of the run.
    test: whether the test sets are read after it.
    start: folder of the run from whose parameters it starts.
  """
  own = {"losses": variant.losses} | unheeded(variant.method)  # stage keys for other methods get their defaults
  chosen = lambda **values: {name: value for name, value in values.items() if value is not None}
  own |= chosen(mixup=variant.mixup, steps=variant.steps)
  towers = {name: dataclasses.replace(tower, **chosen(dropout=variant.dropout))
            for name, tower in config.model.towers.items()}  # fmt: skip
  codebook = schema.to_plain(config.codebook) | schema.to_plain(variant.codebook)
  return config_lib.filled(dataclasses.replace(
    config, mode="train", baseline=False, test=test, seed=seed, compare=None, method=variant.method,
    method_options=variant.options, init_from=start, stage_order=variant.stage_order or config.stage_order,
    codebook=schema.read(Codebook, codebook, "codebook"),
    optim=dataclasses.replace(config.optim, learning_rate=rate, **chosen(weight_decay=variant.weight_decay)),
    model=dataclasses.replace(config.model, quantize=variant.quantize, towers=schema.Frozen(towers)),
    stages=schema.Frozen({name: dataclasses.replace(stage, **own) for name, stage in config.stages.items()}),
  ))  # fmt: skip


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


class Runs:
  """Trains and measures the runs of a comparison.

  Args:
    config: of the comparison.
    folder: its folder; a run's is NAME/rateRATE while rates are chosen, and NAME/seedSEED after that.
    feeds: source -> modality -> what the training items are read from.
    evaluations: of runs while rates are chosen (False), and of those after that (True).
    result: (folder of a run after that, its model, its metrics) -> what is kept of it, beside `metrics`.
    test: whether runs after that read the test sets when they are finished.
  """

  def __init__(
    self, config: Config, folder: files.Path, feeds: Any, evaluations: Mapping[bool, StageEvaluation],
    result: Callable[[files.Path, Model, dict[str, float]], dict[str, Any]] | None = None, *, test: bool = True,
  ):
    self.config, self.folder, self.settings = config, folder, config.compare
    self._feeds, self._evaluations, self._result, self._test = feeds, evaluations, result, test
    self._batches: dict[tuple[int, str], Batches] = {}
    self._programs: dict[str, Programs] = {}
    self._chosen: dict[str, tuple[float, dict[float, Any]]] = {}
    names, tuned = self.settings.names, len(self.settings.learning_rates) > 1
    count = len(names) * (len(self.settings.learning_rates) * tuned + self.settings.seeds)
    self.bar = tqdm.tqdm(total=count, unit="run", disable=None)

  def chosen(self, name: str) -> tuple[float, dict[float, Any]]:
    """A variant's learning rate, and the rates tried with their scores; trains what is not trained yet.

    Raises:
      FloatingPointError: if all rates diverge.
    """
    if name in self._chosen:
      return self._chosen[name]
    settings, tried, own = self.settings, {}, self.settings.variants[name].learning_rate
    if own is not None:
      self._chosen[name] = own, tried
      return self._chosen[name]
    further = list(settings.learning_rates) if len(settings.learning_rates) > 1 or self._leads(name) else []
    while further:
      for rate in further:
        metrics = self.train(name, rate, 0, False)["metrics"]
        tried[rate] = None if metrics is None else metrics[settings.score]
      widens = len(settings.learning_rates) > 1 and len(tried) < len(settings.learning_rates) + settings.widen
      beyond = rate_beyond(tried) if widens else None
      further = [] if beyond is None else [beyond]
      self.bar.total += len(further)
    rates = {rate: value for rate, value in tried.items() if value is not None}
    if tried and not rates:
      raise FloatingPointError(f"config.compare.learning_rates: {name!r} diverged with every one of them; see "
                               f"{self.folder / name}/*/{DIVERGED}")  # fmt: skip
    rate = max(rates, key=rates.get) if rates else settings.learning_rates[0]
    self._chosen[name] = rate, tried
    return self._chosen[name]

  def best(self, names: tuple[str, ...]) -> str:
    """The one of some variants that the validation sets choose."""
    return max(names, key=lambda name: self.chosen(name)[1][self.chosen(name)[0]])

  def variant(self, name: str) -> Variant:
    """A variant with what it leaves to the one that it follows."""
    own = self.settings.variants[name]
    if not own.follows:
      return own
    led = self.settings.variants[self.best(own.follows)]
    return dataclasses.replace(own, **{key: getattr(led, key) for key in REGULARISED if getattr(own, key) is None})

  def config_of(self, name: str, rate: float, seed: int, final: bool) -> Config:
    """The config of a variant's run, whose start is trained if it is not trained yet."""
    own, start = self.settings.variants[name], ""
    if own.warm:
      led = self.best(own.follows)
      self.train(led, self.chosen(led)[0], seed, final)
      start = str(self.place(led, self.chosen(led)[0], seed, final))
    return run_config(self.config, self.variant(name), rate, seed, final and self._test, start)

  def place(self, name: str, rate: float, seed: int, final: bool) -> files.Path:
    """The folder of a run."""
    return self.folder / name / (f"seed{seed}" if final else f"rate{rate:g}")

  def seed(self, name: str, seed: int) -> dict[str, Any]:
    """The results of a variant's run with its rate; it is trained if it is not trained yet."""
    return self.train(name, self.chosen(name)[0], seed, True)

  def train(self, name: str, rate: float, seed: int, final: bool) -> dict[str, Any]:
    """The results of a run; its `metrics` are None if it diverged while rates are chosen.

    Raises:
      FloatingPointError: if it diverges with a chosen rate.
      ValueError: if another process is at it.
    """
    config = self.config_of(name, rate, seed, final)
    self.bar.set_description(f"{name} {rate:g} seed {seed}")
    inner = run_folder(self.place(name, rate, seed, final))
    with files.held(inner, "trains"):
      return self._train(inner, name, config, final)

  def _leads(self, name: str) -> bool:
    """Whether others follow a variant, which then has to be measured also where it has one rate."""
    return any(name in variant.follows for variant in self.settings.variants.values())

  def _train(self, inner: files.Path, name: str, config: Config, final: bool) -> dict[str, Any]:
    open_run(config, inner)
    if final and files.is_file(inner / RESULT):
      self.bar.update()
      return files.read_sealed(inner / RESULT)
    metrics, evaluation, model = finished(inner), self._evaluations[final], None
    if metrics is None and not files.is_file(inner / DIVERGED):
      level = standard_logging.getLogger("absl").level
      logging.set_verbosity(logging.WARNING)
      programs = self._programs.setdefault(name, Programs())
      try:
        metrics, models = run_stages(config, inner, self._feeds, evaluation, programs, self._make_batches)
        model = models["after"]
      except FloatingPointError as error:
        if final:
          raise
        files.write_whole(inner / DIVERGED, f"{error}\n")
      finally:
        logging.set_verbosity(logging.converter.standard_to_absl(level))
    self.bar.update()
    if not final:
      return {"metrics": metrics}
    result = {"metrics": metrics}
    if self._result:
      result |= self._result(inner, model or loaded(inner, evaluation), metrics)
    files.write_sealed(inner / RESULT, result)
    return result

  def _make_batches(self, config: Config, stage: Stage, *rest: Any) -> Batches:
    """A stage's batches for a seed, which all variants share, so that each batch is read once."""
    if (config.seed, stage.name) not in self._batches:
      self._batches[config.seed, stage.name] = batches_of(config, stage, *rest, keep=True)
    return self._batches[config.seed, stage.name]


def loaded(folder: files.Path, evaluation: StageEvaluation) -> Model:
  """The model of a finished run, with the trunks that are there already."""
  model = load(folder)
  model.trunks = evaluation.trunks
  return model

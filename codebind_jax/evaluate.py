"""Evaluation of a model on the sets of a task, while training, at its end, and on a user's manifest (mode `eval`)."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from absl import logging

from codebind_jax import config as config_lib
from codebind_jax.api import Model, load
from codebind_jax.config import MEASURES, Config
from codebind_jax.data.task import EvalSet, Task, open_task
from codebind_jax.evaluators import base
from codebind_jax.evaluators.class_mean import NearestClassMean
from codebind_jax.evaluators.codes import CodebookUsage, shared_counts, table_counts
from codebind_jax.evaluators.decomposition import decomposition
from codebind_jax.evaluators.probe import LinearProbe
from codebind_jax.evaluators.retrieval import Emergent, Retrieval
from codebind_jax.evaluators.zeroshot import ZeroShot
from codebind_jax.runtime.metrics import MetricsWriter, read_metrics
from codebind_jax.trunks.featurize import Featurizer

FINAL = "final"  # the stage under which the last evaluation is written to metrics.jsonl
STAGE_DONE = "eval/stage_done"  # marks the line that a finished stage's evaluation wrote
NEEDS = {
  "zeroshot": "it needs labels, and a model with a text tower",
  "retrieval": "it needs records with a text and another modality",
  "probe": "it needs labels, on records of split train as well",
}


@runtime_checkable
class StageEvaluation(Protocol):
  """What `train.run_stages` asks of an evaluation; `Evaluation` is the usual one.

  Attributes:
    task: the data.
    trunks: modality -> Trunk.
  """

  task: Task
  trunks: Mapping[str, Any]

  def validate(self, model: Model, worlds: Collection[str]) -> dict[str, float]:
    """Metrics to choose by, while training."""

  def after_stage(self, model: Model, step: int, stage: str, writer: Any, worlds: Collection[str]) -> None:
    """Writes what a finished stage, not the last, has reached."""

  def finish(self, model: Model, step: int, writer: Any) -> dict[str, float]:
    """Evaluates a finished run once, and writes it."""


class Evaluation:
  """The evaluators of a config over the sets of a task; trunk features are taken from the cache.

  Attributes:
    trunks: modality -> Trunk.
  """

  def __init__(self, config: Config, task: Task, featurizer: Featurizer, tasks: Sequence[str] = MEASURES):
    self.config, self.task, self.trunks = config, task, featurizer.trunks
    self._featurizer, self._tasks = featurizer, tasks
    self._tokens: dict[tuple[int, str], tuple[np.ndarray, dict[int, int]]] = {}

  def validate(self, model: Model, worlds: Collection[str]) -> dict[str, float]:
    """Zero-shot and retrieval on the worlds' validation sets, and their mean top-1: cheap enough while training."""
    sets = [s for s in self.task.evals if s.role == "val" and s.world in worlds]
    return self._run(model, sets, [t for t in self._tasks if t in ("zeroshot", "retrieval")], intervals=False)

  def everything(self, model: Model) -> dict[str, float]:
    """All evaluators on the validation sets and, where `config.test` says so, the test sets."""
    return self._run(model, self._sets(), self._tasks, means="probe" in self._tasks)

  def after_stage(self, model: Model, step: int, stage: str, writer: Any, worlds: Collection[str]) -> None:
    """Writes zero-shot, retrieval and class means of the worlds once a stage is done: what later ones must not harm.

    A run that was stopped after its last step and before this gets it when it goes on.
    """
    done = read_metrics(writer.path) if writer.path.exists() else []
    if any(line["stage"] == stage and line["step"] == step and STAGE_DONE in line for line in done):
      return
    logging.info("---- evaluation after stage %s ----", stage)
    sets = [s for s in self._sets() if s.world in worlds]
    found = self._run(model, sets, [t for t in self._tasks if t != "probe"], means=True)
    writer.write(step, stage, found | {STAGE_DONE: 1.0})
    writer.flush()

  def _sets(self) -> list[EvalSet]:
    return [s for s in self.task.evals if s.role == "val" or self.config.test]

  def table(self, model: Model, test: EvalSet) -> base.Table:
    """Embeddings of one set: one row an item for every modality but text, one row a distinct caption for text."""
    whole, picked = (test.source, range(len(test.source))) if test.whole is None else (test.whole, test.picked)
    return self._embed(model, test.source, whole, picked)

  def train_table(self, model: Model, world: str) -> base.Table:
    """Embeddings of a source's training rows (clean views)."""
    train = self.task.train[world]
    return self._embed(model, train, train, range(len(train)), augmented=True)

  def embed_text(self, model: Model, texts: Sequence[str]) -> np.ndarray:
    """`shared` embeddings of strings."""
    return model.embed_tokens("text", self._featurizer.texts(texts)).shared

  def _run(
    self, model: Model, sets: Sequence[EvalSet], tasks: Sequence[str], means: bool = False, intervals: bool = True
  ) -> dict[str, float]:
    found: dict[str, float] = {}
    fitted = means or "codes" in tasks
    worlds = {test.world for test in sets} if sets else self.task.train
    train = {world: self.train_table(model, world) for world in self.task.train if world in worlds} if fitted else {}
    tables = {test.name: self.table(model, test) for test in sets}
    linear: dict[tuple[str, str, str], LinearProbe] = {}  # fitted once for all sets of a world
    for test in sets:
      table, prefix = tables[test.name], f"eval/{test.name}"
      found |= base.run_evaluators(self._evaluators(model, test, table, tasks, intervals), table, prefix=prefix)
      for a, b, field, by in named_pairs(test, table) if "retrieval" in tasks else ():
        if (both := paired(table, a, b, field)) is not None:
          found |= base.run_evaluators([Retrieval(a, b, match=field, by=by)], both, prefix=prefix)
      for probe, field in self._probes(test, table, train.get(test.world) or {}, means, "probe" in tasks, linear):
        told = _told(table, train[test.world], probe.modality, field)
        found |= base.run_evaluators([probe], told, prefix=prefix)
      if any("{modality}" in field for field in test.probes):
        mine = {name.removeprefix(f"{prefix}/"): value for name, value in found.items() if name.startswith(prefix)}
        found |= {f"{prefix}/{name}": value for name, value in decomposition(mine, table, test.probes)}
    if model.method.codebook_sizes and "codes" in tasks and train:
      found |= base.run_evaluators([self._usage(model, train)], _stacked(train.values()), prefix="eval/train")
    if "retrieval" in tasks:
      found |= self._emergent(sets, tables)
    return found | dict(self._means_over_validation(model, sets, found))

  def code_counts(self, model: Model) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """How often each code is used by the training rows of all sources: by codebook, and the shared ones by modality."""
    train = {world: self.train_table(model, world) for world in self.task.train}
    table, sizes = _stacked(train.values()), self._usage(model, train).sizes
    return table_counts(table, sizes), shared_counts(table, sizes["shared"]) if "shared" in sizes else {}

  def _usage(self, model: Model, train: Mapping[str, base.Table]) -> CodebookUsage:
    held = {"shared", *(m for table in train.values() for m in table)}
    return CodebookUsage({name: size for name, size in model.method.codebook_sizes.items() if name in held})

  def _emergent(self, sets: Sequence[EvalSet], tables: Mapping[str, base.Table]) -> dict[str, float]:
    """Pairs of modalities that no stage binds, joined by concept over all sets of one role."""
    found: dict[str, float] = {}
    for role in dict.fromkeys(test.role for test in sets):
      whole = _stacked(tables[test.name] for test in sets if test.role == role)
      pairs = [pair for pair in self.config.emergent if all(m in whole for m in pair)]
      evaluators = [evaluator for a, b in pairs if (evaluator := Emergent(a, b)).overlap(whole)]
      found |= base.run_evaluators(evaluators, whole, prefix=f"eval/{role}")
    return found

  def _means_over_validation(
    self, model: Model, sets: Sequence[EvalSet], found: Mapping[str, float]
  ) -> Iterator[tuple[str, float]]:
    for world in self.task.train or [self.task.name]:
      val = [s.name for s in sets if s.role == "val" and s.world == world]
      for metric in ("top1", "top5", "balanced"):
        for modality in model.modalities:
          values = [found[key] for s in val if (key := f"eval/{s}/zeroshot/{modality}/{metric}") in found]
          if values:
            yield f"eval/{world}/zeroshot/{modality}/{metric}", float(np.mean(values))

  def _evaluators(
    self, model: Model, test: EvalSet, table: base.Table, tasks: Sequence[str], intervals: bool
  ) -> Iterator[base.Evaluator]:
    """Zero-shot classification of every modality, where there are labels and texts."""
    items = [name for name in table if name != "text"]
    templates = self.config.data.templates_of.get(test.world, self.config.data.eval_templates)
    if "zeroshot" in tasks and test.candidates and "text" in model.modalities:
      for name in items:
        slices = tuple(field for field in test.slices if field in table[name] and test.role == "test")
        yield ZeroShot(
          name, test.candidates, lambda texts: self.embed_text(model, texts), templates, slices=slices,
          intervals=intervals,
        )

  def _probes(
    self,
    test: EvalSet,
    table: base.Table,
    train: base.Table,
    means: bool,
    probes: bool,
    linear: dict[tuple[str, str, str], LinearProbe],
  ) -> Iterator[tuple[base.Evaluator, str]]:
    """Probes that are fitted on the training rows, and the field each tells."""
    for name in table:
      if name != "text" and name in train:
        for field in _told_apart(test.means, name, train[name]) if means else ():
          yield NearestClassMean(name, train, field=field), field
        for field in _told_apart(test.probes, name, train[name]) if probes else ():
          group = test.probe_group if field != "label" else None
          yield linear.setdefault((test.world, name, field), LinearProbe(name, train, field=field, group=group)), field

  def _embed(
    self, model: Model, source: Any, whole: Any, picked: Sequence[int], augmented: bool = False
  ) -> dict[str, dict[str, np.ndarray]]:
    """Embeddings and fields of a source's rows, which are those `picked` of `whole`."""
    table = {}
    for modality in model.modalities:
      rows = [i for i in range(len(source)) if source.has(i, modality)]
      if not rows:
        continue
      fields = _fields([source.rows[i] for i in rows])
      if modality == "text":
        keep = np.sort(np.unique(fields["caption"], return_index=True)[1])
        fields = {field: values[keep] for field, values in fields.items()}
        tokens = self._featurizer.texts(list(fields["caption"]))
      else:
        tokens, item = self._class_tokens(whole, modality, model.tokens_seen(modality), augmented)
        tokens = tokens[[item[picked[row]] for row in rows]]
      table[modality] = model.embed_tokens(modality, tokens).asdict() | fields
    return table

  def _class_tokens(
    self, source: Any, modality: str, seen: int | None, augmented: bool
  ) -> tuple[np.ndarray, dict[int, int]]:
    """The first tokens of the clean view, [N, seen, C], and row -> item; read once from the feature cache."""
    key = id(source), modality  # the task holds its sources as long as this lives
    if key not in self._tokens:
      table = self._featurizer.table(source, modality, augmented=augmented)
      item = {row: items[0] for row, items in enumerate(table.choices) if items}
      self._tokens[key] = np.asarray(table.features[:, 0, :seen]), item
    return self._tokens[key]

  def finish(self, model: Model, step: int, writer: Any) -> dict[str, float]:
    """Evaluates a finished run once: a run that is opened again gets the numbers that were written."""
    for line in read_metrics(writer.path) if writer.path.exists() else []:
      if line["stage"] == FINAL and line["step"] == step:
        logging.info("the final evaluation was done before; its numbers are in %s", writer.path)
        return {name: value for name, value in line.items() if name not in ("step", "stage", "warning")}
    found = self.everything(model)
    found |= retention(found, read_metrics(writer.path) if writer.path.exists() else [])
    writer.write(step, FINAL, found)
    writer.flush()
    return found


def retention(final: Mapping[str, float], lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """`retention/<metric>`: zero-shot top-1 now minus what it was at the end of the stage that brought the modality in.

  Args:
    final: metrics of the finished run.
    lines: of metrics.jsonl, in order.
  """
  first: dict[str, float] = {}
  for line in (line for line in lines if STAGE_DONE in line):
    for name, value in line.items():
      if name.endswith("/top1") and name.startswith("eval/") and "=" not in name:
        first.setdefault(name, value)
  return {f"retention/{name.removeprefix('eval/')}": final[name] - first[name] for name in first if name in final}


def _told_apart(fields: Sequence[str], modality: str, columns: base.Columns) -> list[str]:
  """Those fields that a modality's training rows have with several values: one value (a sound's sense) asks nothing."""
  named = [field.format(modality=modality) for field in fields]
  return [field for field in named if field in columns and len(np.unique(columns[field])) > 1]


def named_pairs(test: EvalSet, modalities: Iterable[str]) -> list[tuple[str, str, str, str]]:
  """(modality, modality, field, name): every modality with its text, then the set's own pairs.

  The name is empty for the first field by which two modalities are compared, the field for any further one (touch to
  the photograph of the same crop, and to one of the same texture).
  """
  first: dict[frozenset[str], str] = {}
  by_text = [("text", name, "caption") for name in modalities if name != "text"]
  return [
    (a, b, field, "" if first.setdefault(frozenset((a, b)), field) == field else field)
    for a, b, field in [*by_text, *test.pairs]
  ]


def paired(table: base.Table, a: str, b: str, field: str) -> base.Table | None:
  """The rows of two modalities whose field has a value that both have, by `_mask`; None where there are none."""
  if a not in table or b not in table:
    return None
  both = np.intersect1d(table[a][field], table[b][field])
  both = both[both != ""] if both.dtype.kind in "US" else both
  keep = {m: dict(table[m]) | {"_mask": np.isin(table[m][field], both)} for m in (a, b)}
  return keep if len(both) else None


def _stacked(tables: Iterable[base.Table]) -> base.Table:
  """Rows of several tables under one another, by modality; columns that not all have are left out."""
  parts: dict[str, list[base.Columns]] = {}
  for table in tables:
    for modality, columns in table.items():
      parts.setdefault(modality, []).append(columns)
  return {
    modality: {field: np.concatenate([c[field] for c in found]) for field in found[0] if all(field in c for c in found)}
    for modality, found in parts.items()
  }


def _fields(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
  """Columns of the rows' plain fields, and `caption`, the main text."""
  names = {key for row in rows for key, value in row.items() if isinstance(value, str | bool | int) or value is None}
  columns = {name: np.array([_plain(row.get(name)) for row in rows]) for name in sorted(names)}
  return columns | {"caption": np.array([row["text"][0] if row.get("text") else row["id"] for row in rows])}


def _plain(value: Any) -> Any:
  return "" if value is None else value


def _told(table: base.Table, train: base.Table, modality: str, field: str) -> base.Table:
  """The table with rows masked whose value of `field` no training row has: a probe can only name what it has seen."""
  known = np.isin(table[modality][field], train[modality][field])
  if not known.all():
    logging.info("%s of %s: %d of %d rows have a value that was trained on", field, modality, known.sum(), len(known))
  return {modality: dict(table[modality]) | {"_mask": known}}


def evaluate(config: Any, workdir: str | pathlib.Path) -> dict[str, float]:
  """Mode `eval`: one task on a user's manifest with a trained model; writes `workdir/metrics.jsonl`.

  Args:
    config: `configs/eval.py`: `init_from`, `task` (zeroshot, retrieval or probe) and `data`.
    workdir: where the metrics go.

  Returns:
    Metrics by name.

  Raises:
    ValueError: naming what is wrong with the checkpoint, the manifest, or what the task lacks in it.
  """
  config = config_lib.read(config)
  model = load(config.init_from)
  task = open_task(config.data, default_split="test")
  data = dataclasses.replace(
    model.config.data, root=config.data.root, eval_templates=config.data.eval_templates, templates_of={}
  )
  settings = dataclasses.replace(model.config, test=True, emergent=(), data=data)
  evaluation = Evaluation(settings, task, Featurizer(data, settings.model.towers, model.trunks), (config.task,))
  model.trunks = evaluation.trunks
  found = evaluation.everything(model)
  if not found:
    raise ValueError(f"task {config.task!r}: {task.name} has nothing to measure; {NEEDS[config.task]}")
  folder = pathlib.Path(workdir).expanduser().absolute()
  with MetricsWriter(folder) as writer:
    writer.truncate(-1)
    writer.write(0, "eval", found)
  width = max(map(len, found))
  sys.stdout.write("".join(f"{name:{width}} {value:8.2f}\n" for name, value in found.items()))
  return found

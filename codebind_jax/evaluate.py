"""Evaluation of a model on the sets of a task, while training, at its end, and on a user's manifest (mode `eval`)."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from codebind_jax.api import Model, load
from codebind_jax.data.featurize import Featurizer
from codebind_jax.data.task import EvalSet, Task, open_task
from codebind_jax.evaluators import base
from codebind_jax.evaluators.codes import CodebookUsage
from codebind_jax.evaluators.probe import LinearProbe, NearestClassMean
from codebind_jax.evaluators.retrieval import Retrieval
from codebind_jax.evaluators.zeroshot import ZeroShot
from codebind_jax.metrics import MetricsWriter, read_metrics

FINAL = "final"  # the stage under which the last evaluation is written to metrics.jsonl
TASKS = ("zeroshot", "retrieval", "probe", "codes")
NEEDS = {
  "zeroshot": "it needs labels, and a model with a text tower",
  "retrieval": "it needs records with a text and another modality",
  "probe": "it needs labels, on records of split train as well",
}


class Evaluation:
  """The evaluators of a config over the sets of a task; trunk features are taken from the cache.

  Attributes:
    trunks: modality -> Trunk.
  """

  def __init__(self, config: Any, task: Task, featurizer: Featurizer, tasks: Sequence[str] = TASKS):
    self.config, self.task, self.trunks = config, task, featurizer.trunks
    self._featurizer, self._tasks = featurizer, tasks
    self._tokens: dict[tuple[str, str], np.ndarray] = {}

  def validate(self, model: Model) -> dict[str, float]:
    """Zero-shot and retrieval on the validation sets, and their mean top-1: cheap enough to run while training."""
    sets = [s for s in self.task.evals if s.role == "val"]
    return self._run(model, sets, [t for t in self._tasks if t in ("zeroshot", "retrieval")])

  def everything(self, model: Model) -> dict[str, float]:
    """All evaluators on the validation sets and, where `config.test` says so, the test sets."""
    return self._run(model, [s for s in self.task.evals if s.role == "val" or self.config.test], self._tasks)

  def table(self, model: Model, test: EvalSet) -> base.Table:
    """Embeddings of one set: one row an item for every modality but text, one row a distinct caption for text."""
    return self._embed(model, test.name, test.source)

  def train_table(self, model: Model) -> base.Table:
    """Embeddings of the training rows (clean views)."""
    return self._embed(model, "train", self.task.train)

  def embed_text(self, model: Model, texts: Sequence[str]) -> np.ndarray:
    """`shared` embeddings of strings."""
    return model.embed_tokens("text", self._featurizer.texts(texts)).shared

  def _run(self, model: Model, sets: Sequence[EvalSet], tasks: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    train = self.train_table(model) if self.task.train and "probe" in tasks else None
    for test in sets:
      table = self.table(model, test)
      found |= base.run_evaluators(self._evaluators(model, test, table, tasks), table, prefix=f"eval/{test.name}")
      for probe, field in self._probes(test, train):
        found |= base.run_evaluators([probe], _told(table, train, probe.modality, field), prefix=f"eval/{test.name}")
    if self.config.model.quantize and "codes" in tasks and train is not None:
      book = self.config.codebook
      sizes = {"shared": book.shared_codes} | {m: book.codes[m] for m in book.codes if m in train}
      found |= base.run_evaluators([CodebookUsage(sizes)], train, prefix="eval/train")
    val = [s.name for s in sets if s.role == "val"]
    for metric in ("top1", "top5"):
      for modality in model.modalities:
        values = [found[key] for s in val if (key := f"eval/{s}/zeroshot/{modality}/{metric}") in found]
        if values:
          found[f"eval/{self.task.name}/zeroshot/{modality}/{metric}"] = float(np.mean(values))
    return found

  def _evaluators(
    self, model: Model, test: EvalSet, table: base.Table, tasks: Sequence[str]
  ) -> Iterator[base.Evaluator]:
    """What can be asked of a set: zero-shot where there are labels and texts, retrieval where there are captions."""
    items = [name for name in table if name != "text"]
    if "zeroshot" in tasks and test.candidates and "text" in model.modalities:
      for name in items:
        slices = tuple(field for field in ("style", "kind", "imagenet") if field in table[name] and test.role == "test")
        yield ZeroShot(
          name, test.candidates, lambda texts: self.embed_text(model, texts), self.config.data.eval_templates,
          slices=slices,
        )  # fmt: skip
    if "retrieval" in tasks and "text" in table:
      for name in items:
        yield Retrieval("text", name, match="caption")

  def _probes(self, test: EvalSet, train: base.Table | None) -> Iterator[tuple[base.Evaluator, str]]:
    """Probes that are fitted on the training rows, and the field each tells."""
    for name in train or ():
      if name != "text":
        for field in test.means:
          yield NearestClassMean(name, train, field=field), field
        for field in test.probes:
          yield LinearProbe(name, train, field=field, group="label" if field != "label" else None), field

  def _embed(self, model: Model, name: str, source: Any) -> dict[str, dict[str, np.ndarray]]:
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
        tokens = self._class_tokens(name, source, modality)
      table[modality] = model.embed_tokens(modality, tokens).asdict() | fields
    return table

  def _class_tokens(self, name: str, source: Any, modality: str) -> np.ndarray:
    """Token 0 of the clean view, [N, 1, C]; read once from the feature cache."""
    if (name, modality) not in self._tokens:
      features = self._featurizer.table(source, modality, augmented=name == "train").features
      self._tokens[name, modality] = np.asarray(features[:, 0, :1])
    return self._tokens[name, modality]


  def finish(self, model: Model, step: int, writer: Any) -> dict[str, float]:
    """Evaluates a finished run once: a run that is opened again gets the numbers that were written."""
    for line in read_metrics(writer.path) if writer.path.exists() else []:
      if line["stage"] == FINAL and line["step"] == step:
        logging.info("the final evaluation was done before; its numbers are in %s", writer.path)
        return {name: value for name, value in line.items() if name not in ("step", "stage", "warning")}
    found = self.everything(model)
    writer.write(step, FINAL, found)
    writer.flush()
    return found


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
  model = load(config.init_from)
  task = open_task(config.data, default_split="test")
  settings = model.config.unlock()
  settings.test = True
  settings.data.root, settings.data.eval_templates = config.data.root, config.data.eval_templates
  evaluation = Evaluation(settings, task, Featurizer(settings, model.trunks), (config.task,))
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

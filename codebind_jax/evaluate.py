"""Evaluation of a model on a task's sets, during and after training, and on a user's own data (mode `eval`)."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Int, Shaped

from codebind_jax import config as config_lib
from codebind_jax import files, schema
from codebind_jax.api import Embedded, Embeddings, Model, load
from codebind_jax.config import MEASURES, Config
from codebind_jax.data.examples import Feed, Tokens, number_of
from codebind_jax.data.records import Source
from codebind_jax.data.task import EvalSet, Task, open_task
from codebind_jax.evaluators import base, contents
from codebind_jax.evaluators.answers import Answers, Keep
from codebind_jax.evaluators.class_mean import NearestClassMean
from codebind_jax.evaluators.codes import CodebookUsage, CodeReading, shared_counts, table_counts
from codebind_jax.evaluators.decomposition import decomposition
from codebind_jax.evaluators.pairs import keys_of, named_pairs
from codebind_jax.evaluators.probe import LinearProbe
from codebind_jax.evaluators.retrieval import Emergent, Retrieval
from codebind_jax.evaluators.zeroshot import TIE, ZeroShot
from codebind_jax.report import summary
from codebind_jax.report.answers import text_of, write_answers
from codebind_jax.report.page import write_report
from codebind_jax.runtime import agreement, distributed
from codebind_jax.runtime.guard import BadRecords
from codebind_jax.runtime.metrics import FILE, MetricsWriter, read_metrics
from codebind_jax.trunks.feeds import Feeder

FINAL = "final"  # stage name of the final evaluation in metrics.jsonl
STAGE_DONE = "eval/stage_done"  # metric that marks the line of a finished stage's evaluation
NEEDS = {
  "zeroshot": "it needs labels of two classes and more, and a model with a text tower",
  "retrieval": "it needs records with a text and another modality, two of each and more",
  "probe": "it needs labels, on records of split train as well",
}


@runtime_checkable
class StageEvaluation(Protocol):
  """The evaluation that `train.run_stages` calls; `Evaluation` is the usual one.

  Attributes:
    task: the data.
    trunks: modality -> Trunk.
  """

  task: Task
  trunks: Mapping[str, Any]

  def validate(self, model: Model, worlds: Collection[str]) -> dict[str, float]:
    """Validation metrics during training."""

  def after_stage(self, model: Model, step: int, stage: str, writer: Any, worlds: Collection[str]) -> None:
    """Writes the metrics after a stage that is not the last."""

  def finish(self, model: Model, step: int, writer: Any) -> dict[str, float]:
    """Evaluates a finished run once, and writes its metrics."""


class Evaluation:
  """The evaluators of a config on the sets of a task.

  All processes embed, each a part of every batch; process 0 evaluates, and the others get no metrics.

  Args:
    config: of the run.
    task: the data.
    feeder: of the towers.
    tasks: evaluators to run.
    keep: takes the answers of zero-shot classification, retrieval and probes on each set.

  Attributes:
    trunks: modality -> Trunk.
  """

  def __init__(
    self, config: Config, task: Task, feeder: Feeder, tasks: Sequence[str] = MEASURES,
    keep: Callable[[EvalSet, Answers], None] | None = None,
  ):  # fmt: skip
    self.config, self.task, self.trunks, self._keep = config, task, feeder.trunks, keep
    self._said: set[str] = set()
    self._on: EvalSet | None = None  # the set that is being measured
    self._feeder, self._tasks = feeder, tasks
    self._bad = BadRecords(config.data.max_bad_records, "left out")

  def alone(self) -> None:
    """From now on this process alone embeds and evaluates, with models on its own devices."""
    self._feeder.process = 0, 1

  def validate(self, model: Model, worlds: Collection[str]) -> dict[str, float]:
    """Zero-shot and retrieval on the worlds' validation sets, which are cheap enough during training."""
    sets = [s for s in self.task.evals if s.role == "val" and s.world in worlds]
    return self._run(model, sets, [t for t in self._tasks if t in ("zeroshot", "retrieval")], intervals=False)

  def everything(self, model: Model) -> dict[str, float]:
    """All evaluators on the validation sets and, if `config.test` is set, the test sets."""
    return self._run(model, self._sets(), self._tasks, means="probe" in self._tasks)

  def after_stage(self, model: Model, step: int, stage: str, writer: Any, worlds: Collection[str]) -> None:
    """Writes the worlds' metrics, but for probes, after a stage, unless they are written already.

    A run that was stopped between a stage's last step and its evaluation does the evaluation when it is continued.
    """
    lines = read_metrics(writer.path) if files.is_file(writer.path) else []
    done = any(line["stage"] == stage and line["step"] == step and STAGE_DONE in line for line in lines)
    if distributed.agreed(done):
      return
    logging.info("---- evaluation after stage %s ----", stage)
    sets = [s for s in self._sets() if s.world in worlds]
    metrics = self._run(model, sets, [t for t in self._tasks if t != "probe"], means=True)
    writer.write(step, stage, metrics | {STAGE_DONE: 1.0})
    writer.flush()
    distributed.wait_for_all("evaluation after a stage")

  def _sets(self) -> list[EvalSet]:
    return [s for s in self.task.evals if s.role == "val" or self.config.test]

  def log_unread(self) -> None:
    """Says which test sets this run leaves unread."""
    unread = [s.name for s in self.task.evals if s.role == "test" and not self.config.test]
    if unread:
      logging.info("the test sets are not read (%s): for the final run, --config.test=True", ", ".join(unread))

  def table(self, model: Model, test: EvalSet) -> base.Captioned:
    """Embeddings of one set: a row for every item, and in text a row for every distinct caption.

    The column `_content` numbers the items' contents: rows of one file, or of equal bytes, have one number. Items that
    a source gives as arrays have one number where their records' ids are equal too.
    """
    return self._embed(model, test.source, test.texts, test.spellings)

  def train_table(self, model: Model, world: str) -> base.Captioned:
    """Embeddings of a source's training rows as they are."""
    own = next((test for test in self.task.evals if test.world == world), None)
    return self._embed(model, self.task.train[world], spellings=own.spellings if own else schema.Frozen())

  @property
  def _query(self) -> str:
    """The column of what is looked for."""
    return "query" if self.config.queries == "uncoded" else "shared"

  def embed_text(self, model: Model, texts: Sequence[str]) -> np.ndarray:
    """Embeddings of strings as queries."""
    found = self._rows(model, "text", self._feeder.texts(texts), range(len(texts)))
    return getattr(found.embeddings, self._query)

  def _run(
    self, model: Model, sets: Sequence[EvalSet], tasks: Sequence[str], means: bool = False, intervals: bool = True
  ) -> dict[str, float]:
    metrics: dict[str, float] = {}
    worlds = {test.world for test in sets} if sets else self.task.train
    needed = [world for world in self.task.train if world in worlds] if means or "codes" in tasks else []
    train = {world: self.train_table(model, world) for world in needed}
    tables = {test.name: self.table(model, test) for test in sets}
    prompts = self._prompts(model, sets) if "zeroshot" in tasks else {}
    if jax.process_index():
      return {}
    linear: dict[tuple[str, str, str], LinearProbe] = {}  # fitted once for all sets of a world
    for test in sets:
      self._on, table, prefix = test, tables[test.name], f"eval/{test.name}"
      metrics |= self._of_table(test, table, tasks, intervals, prompts)
      if "codes" in tasks and "shared" in model.method.codebook_sizes:
        metrics |= self._measured(CodeReading(), table, prefix)
      for probe, field in self._probes(test, table, train.get(test.world) or {}, means, "probe" in tasks, linear):
        try:
          known = _known_values(table, train[test.world], probe.modality, field)
        except base.LeftOutError as error:
          self._leave_out(f"{prefix}/{probe.name}/{probe.modality}", error)
          continue
        metrics |= self._measured(probe, known, prefix)
      if any("{modality}" in field for field in test.probes):
        of_set = {name.removeprefix(f"{prefix}/"): value for name, value in metrics.items() if name.startswith(prefix)}
        metrics |= {f"{prefix}/{name}": value for name, value in decomposition(of_set, table, test.probes)}
    if model.method.codebook_sizes and "codes" in tasks and train:
      metrics |= base.run_evaluators([self._usage(model, train)], _stacked(train.values()), prefix="eval/train")
    if "retrieval" in tasks:
      metrics |= self._emergent(sets, tables, intervals)
    return metrics | dict(self._means_over_validation(model, sets, metrics))

  def of_tables(
    self, sets: Sequence[EvalSet], tables: Mapping[str, base.Captioned], prompts: Mapping[str, np.ndarray]
  ) -> dict[str, float]:
    """Zero-shot classification, retrieval and emergent retrieval of embeddings that are there already.

    Args:
      sets: to measure on.
      tables: name of a set -> its rows, as `table` gives them.
      prompts: prompt -> its embedding as a query, see `prompts_of`.
    """
    metrics: dict[str, float] = {}
    for test in sets:
      metrics |= self._of_table(test, tables[test.name], ("zeroshot", "retrieval"), False, prompts)
    return metrics | self._emergent(sets, tables, False)

  def prompts_of(self, model: Model, sets: Sequence[EvalSet]) -> tuple[list[str], Embeddings | None]:
    """(All candidates in all templates, their embeddings); nothing for a model without text."""
    texts = dict.fromkeys(
      template.format(label) for test in sets for template in self._templates(test) for label in test.candidates
    )  # fmt: skip
    if "text" not in model.modalities or not texts:
      return [], None
    return list(texts), self._rows(model, "text", self._feeder.texts(list(texts)), range(len(texts))).embeddings

  def code_counts(self, model: Model) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Use counts of each code over all training rows: (by codebook, of the shared codebook by modality)."""
    train = {world: self.train_table(model, world) for world in self.task.train}
    table, sizes = _stacked(train.values()), self._usage(model, train).sizes
    return table_counts(table, sizes), shared_counts(table, sizes["shared"]) if "shared" in sizes else {}

  def _usage(self, model: Model, train: Mapping[str, base.Table]) -> CodebookUsage:
    names = {"shared", *(m for table in train.values() for m in table)}
    return CodebookUsage({name: size for name, size in model.method.codebook_sizes.items() if name in names})

  def _emergent(self, sets: Sequence[EvalSet], tables: Mapping[str, base.Table], intervals: bool) -> dict[str, float]:
    """Retrieval by concept between modalities that no stage binds, over all sets of one role."""
    metrics: dict[str, float] = {}
    of_pair = lambda a, b: Emergent(a, b, query=self._query, intervals=intervals)
    for role in dict.fromkeys(test.role for test in sets):
      table = _stacked(tables[test.name] for test in sets if test.role == role)
      pairs = [pair for pair in self.config.emergent if all(m in table for m in pair)]
      evaluators = [evaluator for a, b in pairs if (evaluator := of_pair(a, b)).overlap(table)]
      metrics |= base.run_evaluators(evaluators, table, prefix=f"eval/{role}")
    return metrics

  def _means_over_validation(
    self, model: Model, sets: Sequence[EvalSet], metrics: Mapping[str, float]
  ) -> Iterator[tuple[str, float]]:
    for world in self.task.train or [self.task.name]:
      val = [s.name for s in sets if s.role == "val" and s.world == world]
      for metric in ("top1", "top5", "balanced"):
        for modality in model.modalities:
          values = [metrics[key] for s in val if (key := f"eval/{s}/zeroshot/{modality}/{metric}") in metrics]
          if values:
            yield f"eval/{world}/zeroshot/{modality}/{metric}", float(np.mean(values))

  def _prompts(self, model: Model, sets: Sequence[EvalSet]) -> dict[str, np.ndarray]:
    """Prompt -> its embedding as a query."""
    texts, found = self.prompts_of(model, sets)
    return dict(zip(texts, getattr(found, self._query))) if found else {}

  def _templates(self, test: EvalSet) -> tuple[str, ...]:
    return self.config.data.templates_of.get(test.world, self.config.data.eval_templates)

  def _of_table(
    self, test: EvalSet, table: base.Captioned, tasks: Sequence[str], intervals: bool, prompts: Mapping[str, np.ndarray]
  ) -> dict[str, float]:
    """Zero-shot classification and retrieval on one set."""
    metrics: dict[str, float] = {}
    for evaluator, part in self._evaluators(test, table, tasks, intervals, prompts):
      metrics |= self._measured(evaluator, part, f"eval/{test.name}")
    return metrics

  def _measured(self, evaluator: base.Evaluator, table: base.Table, prefix: str) -> dict[str, float]:
    """The metrics of an evaluator; none, and one line in the log, where the data lacks what it needs."""
    try:
      return dict(base.run_evaluators([evaluator], table, prefix=prefix))
    except base.LeftOutError as error:
      self._leave_out(prefix, error)
      return {}

  def _leave_out(self, what: str, why: Any) -> None:
    """Says once that a number is not measured, and why."""
    line = f"{what.removeprefix('eval/')} is left out: {why}"
    if line not in self._said:
      self._said.add(line)
      logging.info("%s", line)

  def _name_alike(self, test: EvalSet, prompts: Mapping[str, np.ndarray]) -> None:
    """Warns once of classes that have one embedding: ties count against the model, so that rows of both are wrong."""
    template = self._templates(test)[0]
    same = _alike(test.candidates, np.stack([prompts[template.format(label)] for label in test.candidates]))
    if same and test.name not in self._said:
      self._said.add(test.name)
      logging.warning("%s: classes %r and %r (%d such pairs) have one embedding: the model cannot tell them apart, and "
                      "their rows count as wrong; name one otherwise", test.name, *same[0], len(same))  # fmt: skip

  def _kept(self) -> Keep | None:
    """Takes the answers on the set that is being measured."""
    return (lambda answers: self._keep(self._on, answers)) if self._keep else None

  def _evaluators(
    self, test: EvalSet, table: base.Captioned, tasks: Sequence[str], intervals: bool, prompts: Mapping[str, np.ndarray]
  ) -> Iterator[tuple[base.Evaluator, base.Table]]:
    """(evaluator, its rows) of zero-shot classification of every modality, and of retrieval between modalities."""
    if "zeroshot" in tasks:
      embed = lambda texts: np.stack([prompts[text] for text in texts])
      if not test.candidates:
        self._leave_out(f"{test.name}/zeroshot", "no record of it has a label")
      elif not prompts:
        self._leave_out(f"{test.name}/zeroshot", NEEDS["zeroshot"])
      elif len(test.candidates) < 2:
        self._leave_out(f"{test.name}/zeroshot", f"{test.candidates[0]!r} is the only class, nothing to choose among")
      else:
        if intervals:
          self._name_alike(test, prompts)
        for name in (name for name in table if name != "text"):
          if (known := self._labelled(test, table, name)) is not None:
            slices = tuple(field for field in test.slices if field in table[name] and test.role == "test")
            yield ZeroShot(name, test.candidates, embed, self._templates(test), slices=slices, intervals=intervals,
                           keep=self._kept()), known  # fmt: skip
    if "retrieval" in tasks:
      pairs = [(pair, keys) for pair in named_pairs(test, table) if (keys := keys_of(table, *pair[:3]))]
      if not pairs:
        self._leave_out(f"{test.name}/retrieval", NEEDS["retrieval"])
      for (a, b, field, by), keys in pairs:
        yield Retrieval(a, b, match=field, keys=keys, query=self._query, by=by, intervals=intervals,
                        keep=self._kept()), table  # fmt: skip

  def _labelled(self, test: EvalSet, table: base.Table, modality: str) -> base.Table | None:
    """A modality with a `_mask` of the rows that have a label; None if there are none."""
    there = _has_value(table[modality], "label")
    if not there.all():
      self._leave_out(f"{test.name}/zeroshot/{modality} of {(~there).sum()} of {len(there)} rows", "they have no label")
    return {modality: dict(table[modality]) | {"_mask": there}} if there.any() else None

  def _probes(
    self, test: EvalSet, table: base.Table, train: base.Table, means: bool, probes: bool,
    linear: dict[tuple[str, str, str], LinearProbe],
  ) -> Iterator[tuple[base.Evaluator, str]]:
    """(probe fitted on the training rows, field that it predicts)."""
    if probes and test.probes and not any(name != "text" for name in train):
      self._leave_out(f"{test.name}/probe", NEEDS["probe"])
    for name in table:
      if name != "text" and name in train:
        for field in _varying_fields(test.means, name, train[name]) if means else ():
          known = {name: _with_values(train[name], field)}
          yield NearestClassMean(name, known, field=field, intervals=True), field
        varying = _varying_fields(test.probes, name, train[name]) if probes else []
        if probes and test.probes and not varying:
          self._leave_out(f"{test.name}/probe/{name}", "the training rows have no two values of what it predicts")
        for field in varying:
          group = test.probe_group if field != "label" else None
          known = {name: _with_values(train[name], field)}
          probe = LinearProbe(name, known, field=field, group=group, intervals=True, keep=self._kept())
          yield linear.setdefault((test.world, name, field), probe), field

  def _embed(
    self, model: Model, source: Source, texts: str = "main", spellings: Mapping[str, str] = schema.Frozen()
  ) -> base.Captioned:
    """Embeddings and fields of a source's rows, and which captions they have; arguments as `EvalSet`'s."""
    table, captions, row_of = {}, {}, {}
    for modality in sorted(model.modalities, key=lambda name: name != "text"):  # captions are numbered first
      rows = source.rows_with(modality)
      if not len(rows):
        continue
      records = [source.fields(int(row)) for row in rows]
      own = [record.get("text", ())[: None if texts == "all" else 1] for record in records]
      fields, told_of = _fields(records, spellings), rows
      if modality == "text":
        first = {text: n for n, each in reversed([*enumerate(own)]) for text in reversed(each)}
        strings = list(dict.fromkeys(text for each in own for text in each))
        of = np.array([first[text] for text in strings])
        fields = {field: values[of] for field, values in fields.items()} | {"caption": np.array(strings)}
        feed, rows, told_of = self._feeder.texts(strings), np.arange(len(strings)), rows[of]
      else:
        feed = self._feeder.clean(source, modality)
      # Cached tokens of one content have one place; of what is read anew the model tells it.
      known = modality == "text" or isinstance(feed, Tokens)
      found = self._rows(model, modality, feed, rows, **({} if known else {"content": True}))
      told = dict(found.bad)
      # What no cache has, the feeder counts.
      for row in () if isinstance(feed, Tokens) else np.flatnonzero(~found.good).tolist():
        at, message = int(told_of[row]), told.get(int(rows[row]), "another process could not read it")
        where = source.where(at)
        self._bad.add(source.name, at, modality, message if where in message else f"{where}: {modality}: {message}")
      self._bad.check(alike=True)
      good = np.flatnonzero(found.good)
      if not len(good):
        continue
      columns = found.embeddings.asdict() | {field: values[good] for field, values in fields.items()}
      for name, book in (("codes_shared", "shared"), ("codes_specific", modality)):
        columns[name] = model.method.numbered(book, columns[name])
      if modality == "text":
        kept, place = _spelt_once(columns["caption"], columns["shared"])
        row_of = {text: int(at) for text, at in zip(columns["caption"].tolist(), place)}
        columns = {field: values[kept] for field, values in columns.items()}
        content = np.array([number_of(text) for text in columns["caption"].tolist()], np.int64)
        captions[modality] = np.arange(len(kept)), np.arange(len(kept))
      else:
        content = feed.places_of(rows)[good] if known else found.content
        several = len(np.unique(content)) < len(content)
        if several and isinstance(source.read(int(rows[good[0]]), modality), np.ndarray):  # of no file: may be chance
          ids = columns["id"].tolist()
          content = np.array([number_of(f"{one} {name}") for one, name in zip(content.tolist(), ids)], np.int64)
        pairs = [(n, row_of[text]) for n, at in enumerate(good) for text in own[at] if text in row_of]
        captions[modality] = tuple(np.array(pairs, np.int64).reshape(-1, 2).T)
      table[modality] = columns | {contents.COLUMN: content}
    return base.Captioned({m: table[m] for m in model.modalities if m in table}, captions)

  def _rows(self, model: Model, modality: str, feed: Feed, rows: np.ndarray | range, **more: bool) -> Embedded:
    data = self.config.data
    return model.embed_rows(modality, feed, rows, workers=data.workers, threads=data.threads, **more)

  def finish(self, model: Model, step: int, writer: Any) -> dict[str, float]:
    """Evaluates a finished run and writes the metrics; a run that is evaluated already gets the written ones."""
    lines = read_metrics(writer.path) if files.is_file(writer.path) else []
    done = next((line for line in lines if line["stage"] == FINAL and line["step"] == step), None)
    if distributed.agreed(done is not None):
      logging.info("the final evaluation was done before; its numbers are in %s", writer.path)
      return {name: value for name, value in (done or {}).items() if name not in ("step", "stage", "warning")}
    metrics = self.everything(model)
    metrics |= retention(metrics, lines)
    writer.write(step, FINAL, metrics)
    writer.flush()
    return metrics


def retention(final: Mapping[str, float], lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """`retention/<metric>`: final zero-shot top-1 minus the value after the stage that trained the modality first.

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


def _varying_fields(fields: Sequence[str], modality: str, columns: base.Columns) -> list[str]:
  """Those fields that have several values among a modality's training rows; a field with one value tests nothing."""
  named = [field.format(modality=modality) for field in fields]
  several = lambda field: len(np.unique(columns[field][_has_value(columns, field)])) > 1
  return [field for field in named if field in columns and several(field)]


def _alike(names: Sequence[str], embeddings: Float[np.ndarray, "n d"]) -> list[tuple[str, str]]:
  """Pairs of names whose embeddings are equal, of each such group its neighbours."""
  order = np.lexsort(np.round(embeddings, 4).T[:16])
  near = np.abs(np.diff(embeddings[order], axis=0)).max(axis=1, initial=0.0) <= 1e-5
  return [(names[order[n]], names[order[n + 1]]) for n in np.flatnonzero(near)]


def _spelt_once(
  texts: Shaped[np.ndarray, "n"], embeddings: Float[np.ndarray, "n d"]
) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "n"]]:
  """(The first of texts that are one, which one each is): they differ in case and blanks alone, and have one embedding.

  Otherwise each would be a wrong answer where another is right, and as near to every query.
  """
  firsts: dict[str, list[int]] = {}
  kept, place = [], np.zeros(len(texts), np.int64)
  for n, text in enumerate(texts.tolist()):
    own = firsts.setdefault(base.plain_text(text), [])
    same = next((at for at in own if np.abs(embeddings[kept[at]] - embeddings[n]).max(initial=0.0) <= TIE), None)
    if same is None:
      same = len(kept)
      own.append(same)
      kept.append(n)
    place[n] = same
  return np.array(kept, np.int64), place


def _stacked(tables: Iterable[base.Table]) -> base.Table:
  """The rows of several tables, concatenated by modality, with the columns that all tables have."""
  parts: dict[str, list[base.Columns]] = {}
  for table in tables:
    for modality, columns in table.items():
      parts.setdefault(modality, []).append(columns)
  return {
    modality: {field: np.concatenate([c[field] for c in each]) for field in each[0] if all(field in c for c in each)}
    for modality, each in parts.items()
  }


def _fields(rows: Sequence[Mapping[str, Any]], spellings: Mapping[str, str]) -> dict[str, np.ndarray]:
  """Columns of the rows' plain fields, labels as the candidates are written, and `caption`, the main text."""
  names = {key for row in rows for key, value in row.items() if isinstance(value, str | bool | int) or value is None}
  plain = lambda value: "" if value is None else value
  columns = {name: np.array([plain(row.get(name)) for row in rows]) for name in sorted(names)}
  if spellings and "label" in columns:
    columns["label"] = np.array([spellings.get(label, label) for label in columns["label"].tolist()])
  return columns | {"caption": np.array([row["text"][0] if row.get("text") else row["id"] for row in rows])}


def _has_value(columns: base.Columns, field: str) -> Bool[np.ndarray, "n"]:
  """Which rows have a value of a field; "" is none where it is a label, and a value of other fields."""
  return columns[field] != "" if field == "label" else np.ones(len(columns[field]), bool)


def _with_values(columns: base.Columns, field: str) -> base.Columns:
  """A modality with a `_mask` of the rows that have a value of the field, unless all have."""
  there = _has_value(columns, field)
  return columns if there.all() else dict(columns) | {"_mask": there}


def _known_values(table: base.Table, train: base.Table, modality: str, field: str) -> base.Table:
  """A modality with a `_mask` of the rows that a probe can be scored on.

  These are those whose value of `field` occurs in training, as a probe knows no others, and whose content does not. If
  all contents do, they are scored, and the log says what the number is.

  Raises:
    LeftOutError: if no value was trained on.
  """
  columns, values = table[modality], table[modality][field]
  known = np.isin(values, train[modality][field]) & _has_value(columns, field)
  seen = np.isin(columns[contents.COLUMN], train[modality][contents.COLUMN])
  if not known.all():
    logging.info("%s of %s: %d of %d rows have a value that was trained on", field, modality, known.sum(), len(known))
  if not known.any():
    raise base.LeftOutError(f"no value of {field!r} is one of the training rows")
  if not (known & ~seen).any():
    logging.warning("%s of %s: every item is one of a training row too, so that the number says what was learned by "
                    "heart; give other items for testing", field, modality)  # fmt: skip
  elif seen.any():
    logging.info("%s of %s: %d of %d rows are items of training rows too, and are not scored",
                 field, modality, seen.sum(), len(seen))  # fmt: skip
    known = known & ~seen
  return {modality: dict(columns) | {"_mask": known}}


def evaluate(config: Any, workdir: str | files.Path) -> dict[str, float]:
  """Mode `eval`: evaluates a trained model on a user's data by one task, and adds what it finds to a folder.

  `metrics.jsonl` gets a line more. `predictions.jsonl` has an object for every row: `id`, `set`, `metric`, `modality`,
  `truth`, `top5` and `right`. `top5` lists [label, score], of retrieval [id or text, score, whether right]; the scores
  are cosines, of a probe probabilities. `confusion.csv` counts how often rows of a class were answered another. In both
  what the same task found on the same set before is replaced. The page is `report.html`, in a training run's folder,
  whose page stays, `report_eval.html`.

  Args:
    config: `configs/eval.py`: `init_from`, `task` (zeroshot, retrieval or probe) and `data`.
    workdir: folder of what is written; also one that holds a run or earlier evaluations, of which nothing is removed.

  Returns:
    Metrics by name; {} on processes other than 0.

  Raises:
    ValueError: naming the fault of the checkpoint or the manifest, or what the task needs and the manifest lacks.
  """
  config = config_lib.read(config)
  folder = files.path(workdir)
  files.probe(folder, write=True)
  model = load(config.init_from)
  with distributed.process_0_first():  # worlds are fetched and built where not there yet
    task = open_task(config.data, default_split="test")
  agreement.check_sources({**task.train, **{test.name: test.source for test in task.evals}})
  data = dataclasses.replace(
    model.config.data, root=config.data.root, workers=config.data.workers, threads=config.data.threads,
    max_bad_records=config.data.max_bad_records, eval_templates=config.data.eval_templates,
    templates_of=schema.Frozen(),
  )  # fmt: skip
  settings = dataclasses.replace(model.config, test=True, emergent=(), queries=config.queries, data=data)
  with distributed.process_0_first():  # published trunks are fetched
    feeder = Feeder(data, settings.model.towers, model.trunks)
  found: list[tuple[EvalSet, Answers]] = []
  evaluation = Evaluation(settings, task, feeder, (config.task,), lambda test, answers: found.append((test, answers)))
  model.trunks = evaluation.trunks
  metrics = evaluation.everything(model.on(jax.devices()) if jax.device_count() > 1 else model)
  if jax.process_index():
    return {}
  if not metrics:
    raise ValueError(f"task {config.task!r}: {task.name} has nothing to measure; {NEEDS[config.task]}")
  with MetricsWriter(folder) as writer:
    lines = read_metrics(folder) if files.is_file(folder / FILE) else []
    # At the step of the run that the folder may hold, so that its curves have no point at 0.
    writer.write(max((line["step"] for line in lines), default=0), "eval", metrics)
  write_answers(folder, config.task, task.evals, found)
  evaluation.alone()
  page = folder / ("report_eval.html" if files.is_file(folder / "config.json") else "report.html")
  report = summary.report_data(settings, folder, task, evaluation, metrics, {"after": model}, {})
  write_report(page, report)
  sys.stdout.write(f"{text_of(metrics)}\nreport: {page}\n")
  return metrics

"""The records of a finished run's report, and the table printed at its end."""

from __future__ import annotations

import functools
import platform
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata

import numpy as np

from codebind_jax import files, schema
from codebind_jax.api import Model
from codebind_jax.config import Config
from codebind_jax.data.task import EvalSet, Task
from codebind_jax.evaluators import base, contents
from codebind_jax.evaluators.decomposition import PRIVATE
from codebind_jax.evaluators.pairs import Evaluation, named_pairs
from codebind_jax.report.data import (
  Attribution,
  EmbeddingMap,
  ReportData,
  Run,
  Score,
  embedding_map,
  evenly,
  scores_from_metrics,
)
from codebind_jax.report.galleries import galleries, pairs_of, shown_sets, sides_of
from codebind_jax.report.paired import differences
from codebind_jax.report.verdict import verdict
from codebind_jax.runtime.metrics import read_metrics

PACKAGES = ("codebind_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
MAP_POINTS = 150
FEW = 25  # contents searched, below which recall@5 is left out for recall@1
WIDTH = 110  # of the sentences above the printed table


def reported_sets(config: Config, task: Task) -> list[EvalSet]:
  """Of every source its test sets, if they were read and it has some, else all of its sets."""
  tested = {s.world for s in task.evals if s.role == "test" and config.test}
  return [s for s in task.evals if s.role == "test" and config.test or s.world not in tested]


def headline(
  config: Config, task: Task, final: Mapping[str, float],
  compared: Mapping[str, tuple[float, float]] | None = None,
) -> list[Score]:  # fmt: skip
  """The headline rows, each beside the baseline: zero-shot, retrieval, linear probes and decomposition of every set.

  Args:
    config, task: of the run.
    final: its final metrics, the baseline's under `baseline/...`.
    compared: intervals of run minus baseline on the same rows, by metric.
  """
  own = _telling({name: value for name, value in final.items() if not name.startswith("baseline/")})
  plain = {name.removeprefix("baseline/"): value for name, value in final.items() if name.startswith("baseline/")}
  sets = reported_sets(config, task)
  titles = {s.name: s.title or s.name for s in sets} | {s.role: f"all {s.role} sets" for s in sets}
  return scores_from_metrics(own, plain, metrics=_titles(config, sets), sets=titles, differences=compared)


def _telling(metrics: Mapping[str, float]) -> dict[str, float]:
  """The metrics without recall@5 where few contents are searched, of which a guess finds many, or else recall@1.

  Where one content alone is searched there is neither.
  """
  ways = {name.removesuffix("/r5/ways"): value for name, value in metrics.items()
          if "/retrieval/" in name and name.endswith("/r5/ways")}
  left = {f"{name}/r{k}" for name, count in ways.items() for k in (1, 5) if count < 2 or (k == 5) == (count < FEW)}
  return {name: value for name, value in metrics.items() if name not in left}


def _titles(config: Config, sets: Sequence[EvalSet]) -> dict[str, str]:
  """Metric -> title of the headline rows, in their order."""
  titles = {}
  for modality in config.model.towers:
    if modality != "text":
      for metric, title in (("top1", "top-1"), ("top5", "top-5"), ("balanced", "balanced over classes")):
        titles[f"zeroshot/{modality}/{metric}"] = f"Zero-shot {modality}, {title}"
      for k in (1, 5):  # of which `_telling` leaves one
        titles[f"retrieval/text_to_{modality}/r{k}"] = f"Text to {modality}, recall@{k}"
        titles[f"retrieval/{modality}_to_text/r{k}"] = f"{modality.capitalize()} to text, recall@{k}"
  named = {(a, b, by) for s in sets for a, b, _, by in named_pairs(s, ()) if {a, b} <= set(config.model.towers)}
  for a, b, by in sorted(named):
    for first, second in ((a, b), (b, a)):
      for k in (1, 5):
        metric = f"retrieval/{first}_to_{second}/{f'{by}/' if by else ''}r{k}"
        titles[metric] = f"{first.capitalize()} to {second}{f' of the same {by}' if by else ''}, recall@{k}"
  for a, b in config.emergent:
    for first, second in ((a, b), (b, a)):
      titles[f"emergent/{first}_to_{second}/r5"] = f"{first.capitalize()} to {second}, bound by no stage, recall@5"
  for modality in config.model.towers:
    for field in sorted({field.format(modality=modality) for s in sets for field in s.probes}):
      for part in ("shared", "specific", "full"):
        titles[f"probe/{field}/{modality}/{part}"] = f"Linear probe of {field}, {modality}, {part}"
  for field in dict.fromkeys(field for s in sets if any("{modality}" in f for f in s.probes) for field in s.probes):
    factor, right, wrong = (
      (PRIVATE, "specific", "shared") if "{modality}" in field else (field, "shared", "specific")
    )
    titles[f"decomposition/{factor}/kept"] = f"Decomposition: {factor} in {right}, % of what full has"
    titles[f"decomposition/{factor}/leaked"] = f"Decomposition: {factor} in {wrong}, points above chance"
  return titles


def report_data(
  config: Config, folder: files.Path, task: Task, evaluation: Evaluation, final: Mapping[str, float],
  models: Mapping[str, Model], seconds: Mapping[str, float] = schema.Frozen(),
) -> ReportData:
  """The records of the report of a finished run, or of an evaluation of one (mode `eval`).

  Args:
    config, folder, task, evaluation: of the run.
    final: its final metrics, the baseline's under `baseline/...`.
    models: "before" and "after" training, and "baseline" where there is one; "after" alone in mode `eval`.
    seconds: time by phase.
  """
  plain, training = folder / "baseline", "before" in models
  table = functools.cache(lambda when, place: evaluation.table(models[when], sets[place]))
  sets = shown_sets(task)
  sizes = dict(models["after"].method.codebook_sizes)
  counted = sizes and task.train and training
  code_counts, shared_counts = evaluation.code_counts(models["after"]) if counted else ({}, {})
  compared = {}
  if "baseline" in models:
    numbers = {"run": final, "baseline": {name.removeprefix("baseline/"): value for name, value in final.items()
                                          if name.startswith("baseline/")}}  # fmt: skip
    both = {"run": models["after"], "baseline": models["baseline"]}
    compared = differences(evaluation, both, reported_sets(config, task), numbers)
  scores = headline(config, task, final, compared)
  return ReportData(
    title=f"{' + '.join(sorted(config.model.towers))}: {', '.join(config.stage_order) if training else task.name}",
    run=Run(title_of(config), read_metrics(folder)),
    verdict=verdict(scores, code_counts, alarm_share=config.codebook.alarm_share),
    trained=trained(config, task, "baseline" in models) if training else evaluated(config, task),
    command=f"python -m codebind_jax.main {' '.join(sys.argv[1:])}" if len(sys.argv) > 1 else "train_and_evaluate(...)",
    config=schema.to_plain(config),
    environment=_environment(),
    seconds=dict(seconds),
    data_profile=task.name,
    data_counts={f"{name}, training rows": len(rows) for name, rows in task.train.items()}
    | {f"{name}, further training rows": len(rows) - len(task.train[name]) for name, rows in task.extra.items()}
    | {s.title or s.name: len(s.source) for s in task.evals},
    baseline=Run("InfoNCE without codebooks", read_metrics(plain))
    if training and files.is_file(plain / "metrics.jsonl") else None,
    scores=scores,
    codebook_sizes=sizes,
    code_counts={name: counts for name, counts in code_counts.items() if np.sum(counts) > 0},
    shared_counts={name: counts for name, counts in shared_counts.items() if np.sum(counts) > 0},
    galleries=list(galleries(config, sets, functools.partial(table, "after"))),
    maps=_maps(config, sets, table) if training else (),
    attributions=[Attribution(*credit) for credit in task.attributions],
  )


def title_of(config: Config) -> str:
  """Name of a run's method in tables and figures."""
  if config.method != "codebind":
    return config.method
  return "CodeBind" if config.model.quantize else "InfoNCE"


def trained(config: Config, task: Task, baseline: bool) -> str:
  """Plain sentences: what was trained on what, and what the baseline is."""
  stages = [f"{_joined(stage.modalities)} in {stage.steps:,} steps" for stage in config.ordered]
  rows = {name: f"{len(source):,} rows of {name}" for name, source in task.train.items()}
  text = f"{title_of(config)} learned to bind {_joined(stages)}, from {_joined(list(rows.values())) or 'no rows'}."
  learning = sorted(m for m, spec in config.model.towers.items() if not spec.cache)
  still = sorted(m for m in config.model.towers if m not in learning)
  if still:
    text += f" The pretrained encoders of {_joined(still)} stayed as they were; the heads after them were trained."
  if config.init_from:
    text += f" Training began from {config.init_from}."
  if sizes := config.item_bytes:
    text += f" The codes of an item's shared part take {min(shared for shared, _ in sizes.values()):,} bytes"
    whole = [f"{total:,} of {m}" for m, (shared, total) in sorted(sizes.items()) if total > shared]
    text += f", with its specific part {_joined(whole)}." if whole else "."
  if baseline:
    text += " The baseline is the same heads, data and steps by plain InfoNCE, without codebooks."
  return text


def evaluated(config: Config, task: Task) -> str:
  """A plain sentence: what model was evaluated on what, in mode `eval`."""
  sets = _joined([f"{len(s.source):,} rows of {s.title or s.name}" for s in task.evals])
  return f"{title_of(config)} of {_joined(sorted(config.model.towers))}, trained before, was evaluated on {sets}."


def _joined(words: Sequence[str]) -> str:
  return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def text_table(data: ReportData) -> str:
  """The verdict, and the headline rows as plain text, one a line."""
  lines = [line for text in (*data.verdict, data.trained) if text for line in textwrap.wrap(text, WIDTH)]
  if not data.scores:
    return "\n".join(lines)
  number = lambda value: "" if value is None else f"{value:.1f}" if np.isfinite(value) else "not finite"
  count = lambda value: "" if value is None else f"{value:,}"
  interval = lambda ends: "" if ends is None else f"{ends[0]:.1f}-{ends[1]:.1f}"
  head = ("", "set", "rows", "ways", data.run.name, "95 %", "baseline", "chance")
  rows = [
    (s.metric, s.on, count(s.n), count(s.ways), number(s.value), interval(s.interval), number(s.baseline),
     number(s.chance))
    for s in data.scores
  ]  # fmt: skip
  used = [i for i, name in enumerate(head) if i in (0, 1, 4) or any(row[i] for row in rows)]
  widths = {i: max(len(row[i]) for row in (head, *rows)) for i in used}
  line = lambda row: "  ".join(f"{row[i]:{'<' if i < 2 else '>'}{widths[i]}}" for i in used).rstrip()
  return "\n".join([*lines, "", *map(line, (head, *rows))])


def _environment() -> dict[str, str]:
  import jax

  versions = {name: metadata.version(name) for name in PACKAGES}
  device = jax.devices()[0]
  machine = f"{platform.system()} {platform.machine()}, {jax.device_count()} x {device.device_kind}"
  return {"Python": platform.python_version(), "machine": machine} | versions


def _maps(config: Config, sets: Sequence[EvalSet], table: Callable[[str, int], base.Captioned]) -> list[EmbeddingMap]:
  """The first pair of modalities of the first set that has one, before and after training."""
  for place, test in enumerate(sets):
    for a, b, field in pairs_of(config, test, table("after", place)):
      maps = []
      for when in ("before", "after"):
        rows, sides = table(when, place), sides_of(table(when, place), a, b, field)
        if not sides:
          break
        some = evenly(np.arange(len(sides[b].rows)), MAP_POINTS)
        answers = contents.shared_values(sides[b], sides[a])[some]
        partner = [int(right.min()) for right in np.split(answers.indices, answers.indptr[1:-1])]  # each has one
        used = sorted(set(partner))
        number = {row: n for n, row in enumerate(used)}
        if len(used) < 2:
          break
        points = {b: rows[b]["shared"][sides[b].rows[some]], a: rows[a]["shared"][sides[a].rows[used]]}
        joined = [(n, number[row]) for n, row in enumerate(partner)]
        maps.append(embedding_map(f"{when.capitalize()} training: {test.title or test.name}", points, joined))
      if len(maps) == 2:
        return maps
  return []

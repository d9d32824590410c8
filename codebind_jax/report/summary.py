"""The records of a finished run's report, and the table printed at its end."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from codebind_jax import files, schema
from codebind_jax.api import Model
from codebind_jax.config import Config
from codebind_jax.data.task import EvalSet, Task
from codebind_jax.data.transforms import image
from codebind_jax.evaluators.decomposition import PRIVATE
from codebind_jax.evaluators.pairs import Evaluation, named_pairs
from codebind_jax.report.data import (
  Attribution,
  EmbeddingMap,
  Item,
  Query,
  ReportData,
  Run,
  Score,
  build_queries,
  embedding_map,
  scores_from_metrics,
)
from codebind_jax.runtime.metrics import read_metrics

PACKAGES = ("codebind_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
GALLERY = 8
MAP_POINTS = 150


def headline(config: Config, task: Task, final: Mapping[str, float]) -> list[Score]:
  """The headline rows, each beside the baseline: zero-shot, retrieval, linear probes and decomposition of every set."""
  own = {name: value for name, value in final.items() if not name.startswith("baseline/")}
  base = {name.removeprefix("baseline/"): value for name, value in final.items() if name.startswith("baseline/")}
  sets = [s for s in task.evals if s.role == "test" and config.test] or list(task.evals)
  titles = {s.name: f"{s.name} ({len(s.source)} of {len(s.candidates)} ways)" for s in sets}
  metrics, chance = {}, {}
  test_rows = {s.name: _test_rows(s, config.model.towers) for s in sets}
  for modality in config.model.towers:
    if modality != "text":
      for metric, title, k in (("top1", "top-1", 1), ("top5", "top-5", 5), ("balanced", "balanced over classes", 1)):
        metrics[f"zeroshot/{modality}/{metric}"] = f"Zero-shot {modality}, {title}"
        chance |= {f"{s.name}/zeroshot/{modality}/{metric}": 100.0 * k / max(len(s.candidates), k) for s in sets}
      metrics[f"retrieval/text_to_{modality}/r5"] = f"Text to {modality}, recall@5"
      metrics[f"retrieval/{modality}_to_text/r5"] = f"{modality.capitalize()} to text, recall@5"
      named = {(a, b, by) for s in sets for a, b, _, by in named_pairs(s, ()) if a == modality}
      for a, b, by in sorted(named):
        title = f"{a.capitalize()} to {b}{f' of the same {by}' if by else ''}, recall@10"
        metrics[f"retrieval/{a}_to_{b}/{f'{by}/' if by else ''}r10"] = title
      for field in sorted({field for s in sets for field in s.probes}):
        for part in ("shared", "specific", "full"):
          metrics[f"probe/{field}/{modality}/{part}"] = f"Linear probe of {field}, {part}"
  for field in dict.fromkeys(field for s in sets if any("{modality}" in f for f in s.probes) for field in s.probes):
    factor, right, wrong = (
      (PRIVATE, "specific", "shared") if "{modality}" in field else (field, "shared", "specific")
    )
    metrics[f"decomposition/{factor}/kept"] = f"Decomposition: {factor} in {right}, % of what full has"
    metrics[f"decomposition/{factor}/leaked"] = f"Decomposition: {factor} in {wrong}, points above chance"
  counts = {f"{name}/{metric}": rows[_modality_of(metric)] for name, rows in test_rows.items() for metric in metrics
            if not metric.startswith("decomposition/")}
  return scores_from_metrics(own, base or None, metrics=metrics, sets=titles, counts=counts, chance=chance)


def _modality_of(metric: str) -> str:
  """The modality whose rows a metric counts: depth for `zeroshot/depth/top1`, `retrieval/depth_to_text/r5`, ..."""
  kind, first, second, *_ = metric.split("/")
  return {"zeroshot": first, "retrieval": first.split("_to_")[0], "probe": second}[kind]


def _test_rows(test: EvalSet, modalities: Iterable[str]) -> dict[str, int]:
  """Number of test rows of each modality; of text, the number of distinct main texts."""
  counts = {m: len(test.source.rows_with(m)) for m in modalities}
  return counts | {"text": len({test.source.fields(int(i))["text"][0] for i in test.source.rows_with("text")})}


def report_data(
  config: Config, folder: files.Path, task: Task, evaluation: Evaluation, final: Mapping[str, float],
  models: Mapping[str, Model], seconds: Mapping[str, float],
) -> ReportData:
  """The records of a finished run's report."""
  plain = folder / "baseline"
  shown = next((s for s in sorted(task.evals, key=lambda s: s.role != "val") if s.candidates), None)
  gallery = _gallery(evaluation, models["after"], shown) if shown else ((), ())
  sizes = dict(models["after"].method.codebook_sizes)
  trained = "before" in models  # else the task is one of mode eval
  code_counts, shared_counts = evaluation.code_counts(models["after"]) if sizes and task.train and trained else ({}, {})
  return ReportData(
    title=f"{' + '.join(sorted(config.model.towers))}: {', '.join(config.stage_order) if trained else task.name}",
    run=Run(title_of(config), read_metrics(folder)),
    summary=task.summary,
    command=f"python -m codebind_jax.main {' '.join(sys.argv[1:])}" if len(sys.argv) > 1 else "train_and_evaluate(...)",
    config=schema.to_plain(config),
    environment=_environment(),
    seconds=dict(seconds),
    data_profile=task.name,
    data_counts={f"{name} train": len(rows) for name, rows in task.train.items()}
    | {f"{name} extra": len(rows) - len(task.train[name]) for name, rows in task.extra.items()}
    | {s.name: len(s.source) for s in task.evals},
    baseline=Run("InfoNCE without codebooks", read_metrics(plain)) if files.is_file(plain / "metrics.jsonl") else None,
    scores=headline(config, task, final),
    codebook_sizes=sizes,
    code_counts=code_counts,
    shared_counts=shared_counts,
    text_queries=gallery[0],
    image_queries=gallery[1],
    maps=_maps(evaluation, models, shown) if shown and trained else (),
    attributions=[Attribution(*credit) for credit in task.attributions],
  )


def title_of(config: Config) -> str:
  """Name of a run's method in tables and figures."""
  if config.method != "codebind":
    return config.method
  return "CodeBind" if config.model.quantize else "InfoNCE"


def text_table(data: ReportData) -> str:
  """The headline rows as plain text, one a line."""
  lines = [f"{'':44} {'set':38} {data.run.name:>10} {'95 %':>11} {'baseline':>10} {'chance':>8}"]
  number = lambda value: "" if value is None else f"{value:.1f}"
  for s in data.scores:
    interval = "" if s.interval is None else f"{s.interval[0]:.1f}-{s.interval[1]:.1f}"
    numbers = f"{number(s.value):>10} {interval:>11} {number(s.baseline):>10} {number(s.chance):>8}"
    lines.append(f"{s.metric:44} {s.on:38} {numbers}")
  return "\n".join(lines)


def _environment() -> dict[str, str]:
  import jax

  versions = {name: metadata.version(name) for name in PACKAGES}
  device = jax.devices()[0]
  machine = f"{platform.system()} {platform.machine()}, {jax.device_count()} x {device.device_kind}"
  return {"Python": platform.python_version(), "machine": machine} | versions


def _gallery(evaluation: Evaluation, model: Model, shown: EvalSet) -> tuple[list[Query], list[Query]]:
  """Queries spread evenly over a validation set, both directions."""
  table = evaluation.table(model, shown)
  modality = next((m for m in table if m == "image"), None)
  if modality is None or "text" not in table:
    return [], []
  images, texts = table[modality], table["text"]
  number = {name: row for row, name in enumerate(shown.source.column("id"))}
  rows = [number[name] for name in images["id"]]
  first = shown.source.read(rows[0], modality)
  if isinstance(first, np.ndarray) and first.ndim != 3:  # vectors of the synthetic world
    return [], []
  pictures = _Pictures(shown.source, rows, images["caption"])
  captions = [Item(text=str(caption)) for caption in texts["caption"]]
  pick = lambda n: np.unique(np.linspace(0, n - 1, min(GALLERY, n)).round().astype(int))
  t, i = pick(len(captions)), pick(len(rows))
  by_text = build_queries(
    [captions[int(k)] for k in t], texts["caption"][t], texts["shared"][t],
    pictures, images["caption"], images["shared"],
  )
  by_image = build_queries(
    [pictures[int(k)] for k in i], images["caption"][i], images["shared"][i],
    captions, texts["caption"], texts["shared"],
  )
  return by_text, by_image


class _Pictures(Sequence):
  """Gallery items of an image source, decoded when asked for."""

  def __init__(self, source: Any, rows: list[int], captions: np.ndarray):
    self._source, self._rows, self._captions = source, rows, captions

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Item:
    return Item(text=str(self._captions[index]), image=image.read(self._source.read(self._rows[index], "image")))


def _maps(evaluation: Evaluation, models: Mapping[str, Model], shown: EvalSet) -> list[EmbeddingMap]:
  maps = []
  for when in ("before", "after"):
    table = evaluation.table(models[when], shown)
    if "text" not in table or len(table) < 2:
      return []
    modality = next(m for m in table if m != "text")
    items, texts = table[modality], table["text"]
    some = np.unique(np.linspace(0, len(items["caption"]) - 1, min(MAP_POINTS, len(items["caption"]))).astype(int))
    where = {caption: row for row, caption in enumerate(texts["caption"])}
    used = sorted({where[items["caption"][row]] for row in some if items["caption"][row] in where})
    number = {row: n for n, row in enumerate(used)}
    pairs = [(n, number[where[items["caption"][row]]]) for n, row in enumerate(some) if items["caption"][row] in where]
    if len(used) < 2:
      return []
    points = {modality: items["shared"][some], "text": texts["shared"][used]}
    maps.append(embedding_map(f"{when.capitalize()} training", points, pairs))
  return maps

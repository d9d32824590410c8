"""What mode `eval` writes of single answers: predictions, a confusion table, and the numbers as text."""

from __future__ import annotations

import collections
import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from codebind_jax import files
from codebind_jax.data.task import EvalSet
from codebind_jax.evaluators.answers import Answers
from codebind_jax.evaluators.intervals import is_about

PREDICTIONS, CONFUSION = "predictions.jsonl", "confusion.csv"
HEAD = ("set", "metric", "truth", "answer", "count")


def text_of(metrics: Mapping[str, float]) -> str:
  """A line a metric: its name, value, 95 % interval, rows and candidates, where they are known."""
  names = [name for name in metrics if not is_about(name)]
  width, lines = max(map(len, names)), []
  for name in names:
    low, high, rows, ways = (metrics.get(f"{name}/{end}") for end in ("low", "high", "n", "ways"))
    about = "" if rows is None else f"  {low:6.2f} to {high:6.2f}  {rows:.0f} rows, {ways:.0f} ways"
    lines.append(f"{name:{width}} {metrics[name]:8.2f}{about}")
  return "\n".join(lines) + "\n"


def write_answers(
  folder: files.Path, task: str, sets: Sequence[EvalSet], found: Sequence[tuple[EvalSet, Answers]]
) -> None:
  """Writes `predictions.jsonl` and `confusion.csv`, with what other tasks and sets have in them."""
  names = {test.name for test in sets}
  own = lambda line: line["set"] in names and line["metric"].partition("/")[0] == task
  path = folder / PREDICTIONS
  kept = [line for line in _earlier(path) if not own(line)]
  kept += [line for test, answers in found for line in predictions(test, answers)]
  files.write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
  path = folder / CONFUSION
  rows = [row for row in _earlier(path) if not own(row)]
  rows += [row for test, answers in found for row in confusion(test, answers)]
  if rows:
    text = io.StringIO()
    writer = csv.DictWriter(text, HEAD, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_whole(path, text.getvalue())


def _earlier(path: files.Path) -> list[dict[str, Any]]:
  """The lines of a file that an earlier evaluation wrote."""
  if not files.is_file(path):
    return []
  text = files.read_text(path)
  try:
    rows = list(csv.DictReader(io.StringIO(text))) if path.suffix == ".csv" else [
      files.from_json(line, path) for line in text.split("\n") if line]  # fmt: skip
    if all(isinstance(row["set"], str) and isinstance(row["metric"], str) for row in rows):
      return rows
  except (ValueError, KeyError, TypeError, csv.Error):
    pass
  raise ValueError(f"{path}: was not written by an evaluation, or is damaged; move it, or use another workdir")


def predictions(test: EvalSet, answers: Answers) -> Iterator[dict[str, Any]]:
  """The lines of `predictions.jsonl` of one metric, in the order of the rows."""
  for n, name in enumerate(answers.ids):
    top = [[answers.names[at], round(float(score), 6)] for at, score in zip(answers.found[n], answers.scores[n])]
    if answers.to_items:
      top = [[*one, bool(right)] for one, right in zip(top, answers.right[n])]
    line = {"id": name, "set": test.name, "metric": answers.name, "modality": answers.modality}
    line |= {"text": answers.texts[n]} if answers.texts else {}
    yield line | {"truth": answers.truth[n], "top5": top, "right": bool(answers.right[n, 0])}


def confusion(test: EvalSet, answers: Answers) -> Iterator[dict[str, Any]]:
  """The rows of `confusion.csv` of one metric: pairs of classes that occur, by truth and then by number."""
  if answers.to_items:
    return
  pairs = collections.Counter(zip(answers.truth, (answers.names[at] for at in answers.found[:, 0])))
  for (truth, answer), count in sorted(pairs.items(), key=lambda pair: (pair[0][0], -pair[1], pair[0][1])):
    yield dict(zip(HEAD, (test.name, answers.name, truth, answer, count)))

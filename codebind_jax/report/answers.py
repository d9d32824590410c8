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
  kept = [line for line in read_predictions(path) if not own(line)]
  kept += [line for test, answers in found for line in predictions(test, answers)]
  rows = confusion(kept)  # before anything is written
  write = lambda line: files.sealed_line(json.dumps(line, ensure_ascii=False)) + "\n"
  files.write_whole(path, "".join(map(write, kept)))
  if rows:
    text = io.StringIO()
    writer = csv.DictWriter(text, HEAD, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_whole(folder / CONFUSION, text.getvalue())


def read_predictions(path: files.Path) -> list[dict[str, Any]]:
  """The lines of `predictions.jsonl`, verified by the checksums in the blanks at their ends; none where it is not.

  Raises:
    ValueError: naming the file, if it is damaged.
  """
  if not files.is_file(path):
    return []
  try:
    lines = files.read_bytes(path).split(b"\n")
    named = ((f"line {number}", line) for number, line in enumerate(lines, 1) if line)
    rows = [files.from_json(files.unsealed_line(line, name), name) for name, line in named]
    if lines[-1] or not all(isinstance(row["set"], str) and isinstance(row["metric"], str) for row in rows):
      raise ValueError("no whole lines with `set` and `metric`")
    return rows
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path}: was not written by an evaluation, or is damaged ({error}); move it, or use another "
                     "workdir") from error  # fmt: skip


def predictions(test: EvalSet, answers: Answers) -> Iterator[dict[str, Any]]:
  """The lines of `predictions.jsonl` of one metric, in the order of the rows."""
  for n, name in enumerate(answers.ids):
    top = [[answers.names[at], round(float(score), 6)] for at, score in zip(answers.found[n], answers.scores[n])]
    if answers.to_items:
      top = [[*one, bool(right)] for one, right in zip(top, answers.right[n])]
    line = {"id": name, "set": test.name, "metric": answers.name, "modality": answers.modality}
    line |= {"text": answers.texts[n]} if answers.texts else {}
    yield line | {"truth": answers.truth[n], "top5": top, "right": bool(answers.right[n, 0])}


def confusion(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """The rows of `confusion.csv`: of each set and metric the pairs of classes that occur, by truth and then by number.

  Args:
    lines: of `predictions.jsonl`; those whose answers are items, not classes, have none.

  Raises:
    ValueError: if a line is not one of `predictions`.
  """
  pairs: dict[tuple[str, str], collections.Counter] = {}
  try:
    for line in lines:
      if len(line["top5"][0]) == 2:  # a class and its score
        pairs.setdefault((line["set"], line["metric"]), collections.Counter())[line["truth"], line["top5"][0][0]] += 1
  except (KeyError, IndexError, TypeError) as error:
    raise ValueError(f"a line of {PREDICTIONS} is not as an evaluation writes it: {error!r}") from error
  ordered = lambda counts: sorted(counts.items(), key=lambda pair: (pair[0][0], -pair[1], pair[0][1]))
  return [dict(zip(HEAD, (*where, *pair, count))) for where, counts in pairs.items() for pair, count in ordered(counts)]

"""A run beside its baseline on the same rows: intervals of the difference, narrower than those of the two apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Shaped

from codebind_jax.api import Model
from codebind_jax.data.task import EvalSet
from codebind_jax.evaluators import base, contents
from codebind_jax.evaluators.intervals import bootstrap_interval
from codebind_jax.evaluators.pairs import Evaluation
from codebind_jax.evaluators.retrieval import first_ranks
from codebind_jax.evaluators.zeroshot import class_embeddings, class_ranks, label_indices
from codebind_jax.report.galleries import sides_of

ROWS = 5000  # rows of a set up to which both models embed it once more
KS = (1, 5)  # of the recalls that are compared


def difference_interval(
  own: Bool[np.ndarray, "n"], other: Bool[np.ndarray, "n"], groups: Shaped[np.ndarray, "n"] | None = None
) -> tuple[float, float]:
  """95 % interval, in points, of the difference of two percentages of the same rows.

  The adjusted Wald interval, which adds one row to either kind that only one model has right (Bonett and Price, 2012,
  equation 10); where rows share a group, each end is that of the bootstrap over whole groups if it lies further out.

  Args:
    own, other: which rows each model has right.
    groups: rows that are no independent trials share one; None for none.

  Example: 30 rows that one model alone has right and 10 that the other has, of 200.
    >>> tuple(round(end, 1) for end in difference_interval(np.arange(200) < 30, np.arange(200) >= 190))
    (3.8, 16.0)
  """
  count = len(own) + 2
  won, lost = (float(np.sum(a & ~b) + 1) / count for a, b in ((own, other), (other, own)))
  half = 1.96 * np.sqrt((won + lost - (won - lost) ** 2) / count)
  low, high = 100.0 * (won - lost - half), 100.0 * (won - lost + half)
  if groups is not None and len(np.unique(groups)) < len(groups):
    ends = bootstrap_interval(100.0 * (own.astype(float) - other.astype(float)), groups=groups)
    low, high = min(low, ends[0]), max(high, ends[1])
  return max(float(low), -100.0), min(float(high), 100.0)


def differences(
  evaluation: Evaluation,
  models: Mapping[str, Model],
  sets: Sequence[EvalSet],
  measured: Mapping[str, Mapping[str, float]],
) -> dict[str, tuple[float, float]]:
  """Intervals of run minus baseline, by metric `eval/<set>/zeroshot/<modality>/top1` and `.../retrieval/.../r1`, `r5`.

  A set with more than `ROWS` rows is left out, as is a metric that the rows found here do not reproduce.

  Args:
    evaluation: embeds the sets.
    models, measured: "run" and "baseline": the model, and its metrics.
    sets: the sets to compare on.
  """
  found: dict[str, tuple[float, float]] = {}
  for test in sets:
    if len(test.source) > ROWS:
      continue
    rows = {of: dict(_right(evaluation, model, test)) for of, model in models.items()}
    for name in rows["run"].keys() & rows["baseline"].keys():
      key, same = f"eval/{test.name}/{name}", True
      for of, by_metric in rows.items():
        right, _ = by_metric[name]
        value, count = 100.0 * float(np.mean(right)), measured[of].get(f"{key}/n", len(right))
        same &= count == len(right) and abs(measured[of].get(key, np.nan) - value) < 1e-3
      (own, groups), (other, _) = rows["run"][name], rows["baseline"][name]
      if same and len(own) == len(other):
        found[key] = difference_interval(own, other, groups)
  return found


def _right(
  evaluation: Evaluation, model: Model, test: EvalSet
) -> Iterator[tuple[str, tuple[Bool[np.ndarray, "n"], np.ndarray]]]:
  """(metric, (which rows are right, their groups)) of zero-shot classification and of retrieval with texts."""
  table = evaluation.table(model, test)
  if "text" not in model.modalities:
    return
  items = [name for name in table if name != "text"]
  if len(test.candidates) > 1 and items:
    data = evaluation.config.data
    templates = data.templates_of.get(test.world, data.eval_templates)
    classes = class_embeddings(lambda texts: evaluation.embed_text(model, texts), test.candidates, templates)
    for modality in items:
      there = np.isin(table[modality]["label"], test.candidates)
      if there.any():
        labels, content = table[modality]["label"][there], contents.contents_of(table, modality)[there]
        cosines = base.unit_rows(modality, table[modality]["shared"][there]) @ classes.T
        ranks = class_ranks(cosines, label_indices(labels, test.candidates))
        # Each content counts once, and is right where one of its rows is.
        _, first, of_row = np.unique(content, return_index=True, return_inverse=True)
        right = np.zeros(len(first), bool)
        np.logical_or.at(right, of_row.reshape(-1), ranks < 1)
        yield f"zeroshot/{modality}/top1", (right, labels[first])
  for modality in items:
    sides = sides_of(table, "text", modality, "caption")
    for a, b in (("text", modality), (modality, "text")) if sides else ():
      query, gallery = sides[a], sides[b]
      ranks = first_ranks(table[a]["shared"][query.rows], table[b]["shared"][gallery.rows], (query, gallery))
      for k in KS:
        yield f"retrieval/{a}_to_{b}/r{k}", (ranks <= k, contents.groups_of(query, gallery))

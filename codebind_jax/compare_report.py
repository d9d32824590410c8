"""comparison.md, comparison.json and the figures of a comparison of methods."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLUMNS = ("label/cross", "label/within", "label/all", "style/cross", "recall")


def spread(runs: Sequence[Mapping[str, float]], name: str) -> tuple[float, float] | None:
  """Mean and sample standard deviation over runs; None where no run has the metric."""
  values = [run[name] for run in runs if name in run]
  return (float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0) if values else None


def cell(runs: Sequence[Mapping[str, float]], name: str) -> str:
  """`mean ± deviation` for a table."""
  found = spread(runs, name)
  return "" if found is None else f"{found[0]:.1f} ± {found[1]:.1f}" if len(runs) > 1 else f"{found[0]:.1f}"


def claims(results: Mapping[str, Any], quality: Mapping[str, float], prefix: str) -> list[dict[str, Any]]:
  """The papers' claims that a comparison on modalities of graded quality can test, each with numbers.

  A difference counts where it is larger than two standard errors; with one seed there are none, and nothing is decided.

  Args:
    results: variant -> its runs.
    quality: modality -> share of the class it shows.
    prefix: of the metrics, `eval/test`.
  """
  anchors = {m: f"fixed_anchor_{m}" for m in quality if f"fixed_anchor_{m}" in results}
  told = lambda name, metric: [run[f"{prefix}/{metric}"] for run in results[name]["runs"]]
  found = []

  def record(claim: str, better: Sequence[float], worse: Sequence[float], text: str) -> None:
    error = np.sqrt(sum(np.var(x, ddof=1) / len(x) if len(x) > 1 else 0.0 for x in (better, worse)))
    gap = float(np.mean(better) - np.mean(worse))
    certain = min(len(better), len(worse)) > 1 and abs(gap) > 2 * error
    verdict = "undecided" if not certain else "held" if gap > 0 else "did not hold"
    found.append({"claim": claim, "verdict": verdict, "difference": gap, "error": float(error), "numbers": text})

  number = lambda x: f"{np.mean(x):.1f}"
  if len(anchors) > 1:
    ranked = sorted(anchors, key=quality.get)
    worst, best = anchors[ranked[0]], anchors[ranked[-1]]
    record(
      "fixed anchor: accuracy depends on the anchor's quality", told(best, "label/all"), told(worst, "label/all"),
      ", ".join(f"anchor {m} (quality {quality[m]:g}) {number(told(anchors[m], 'label/all'))}" for m in ranked),
    )
    if "centrobind" in results:
      top = max(anchors.values(), key=lambda name: np.mean(told(name, "label/all")))
      for claim, metric, other in (
        ("CentroBind is better than the worst anchor", "label/all", worst),
        ("CentroBind is better than the best anchor", "label/all", top),
        ("a factor that the anchor lacks: CentroBind learns it better", "style/cross", worst),
      ):
        mine, theirs = told("centrobind", metric), told(other, metric)
        record(claim, mine, theirs, f"{metric}: centrobind {number(mine)}, {other} {number(theirs)}")
  if "dcid" in results:
    for name, what in (
      ("dcid_no_coding", "the cross-modal contrast"), ("dcid_no_ema_no_reset", "MM-EMA and reset"),
      ("dcid_no_club", "CLUB"), ("dcid_no_matching", "code matching"),
    ):  # fmt: skip
      if name in results:
        mine, theirs = told("dcid", "label/cross"), told(name, "label/cross")
        record(f"DCID: leaving out {what} hurts cross-modal generalisation", mine, theirs,
               f"label/cross: dcid {number(mine)}, without {number(theirs)}")  # fmt: skip
  reduced = {name: result["toc"] for name, result in results.items() if result.get("toc")}
  if reduced:
    lower = [toc["after"] < toc["before"] for toc in reduced.values()]
    text = ", ".join(f"{name} {toc['before']:.3f} -> {toc['after']:.3f}" for name, toc in reduced.items())
    found.append({"claim": "TOC lowers the redundancy of the codes", "numbers": text,
                  "verdict": "held" if all(lower) else "did not hold" if not any(lower) else "undecided"})  # fmt: skip
  return found


def write_comparison(folder: pathlib.Path, found: Mapping[str, Any]) -> str:
  """Writes all files; returns the text of comparison.md."""
  results, config = found["results"], found["config"]
  prefix, settings = "eval/test", config["compare"]
  seeds = settings["seeds"]
  columns = [c for c in COLUMNS if any(f"{prefix}/{c}" in r["runs"][0] for r in results.values())]
  lines = [
    "# Methods side by side", "", f"{found['summary']}. {config['steps']} steps of {config['batch_size']} rows, "
    f"{seeds} seeds, test set, %; learning rate chosen on the validation set for each method.", "",
    "`A/cross`: head learned on one modality, tested on another, mean over ordered pairs; `within`: tested on its own; "
    "`all`: one head on all modalities together; `recall`: at 1, mean over pairs.", "",
    f"| variant | {' | '.join(columns)} | codes shared / single | rate |", "|---" * (len(columns) + 3) + "|",
  ]  # fmt: skip
  for name, result in results.items():
    runs = result["runs"]
    codes = f"{cell(runs, 'codes/shared')} / {cell(runs, 'codes/single')}" if "codes/shared" in runs[0] else ""
    values = " | ".join(cell(runs, f"{prefix}/{column}") for column in columns)
    lines.append(f"| {name} | {values} | {codes} | {result['learning_rate']:g} |")
  lines += ["", "## Cost", "", "| variant | examples/s | temporaries, MB | extra parameters | codebooks | aux |",
            "|---|---|---|---|---|---|"]  # fmt: skip
  for name, result in results.items():
    c = result["cost"]
    lines.append(f"| {name} | {c['examples_per_second']:.0f} | {c['compiled_megabytes']:.1f} | "
                 f"{c['extra_parameters']:,} | {c['codebooks']:,} | {c['aux']:,} |")  # fmt: skip
  first = next(iter(results.values()))["cost"]
  lines += ["", f"The towers have {first['towers']:,} parameters in every variant."]
  quality = (settings["world"] or {}).get("quality", {})
  tested = claims(results, quality, prefix)
  lines += ["", "## Claims of the papers", ""]
  lines += [f"- **{c['verdict']}**: {c['claim']} ({c['numbers']})" for c in tested]
  lines += ["", "![accuracy](bars.svg)", "", "![anchors](anchors.svg)" if quality else "", ""]
  text = "\n".join(lines)
  (folder / "comparison.md").write_text(text, encoding="utf-8")
  whole = dict(found) | {"claims": tested}
  (folder / "comparison.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
  bars(folder / "bars.svg", results, [f"{prefix}/{c}" for c in columns])
  if quality:
    anchor_curve(folder / "anchors.svg", results, quality, f"{prefix}/label/all")
  return text


def bars(path: pathlib.Path, results: Mapping[str, Any], metrics: Sequence[str]) -> None:
  """Every variant's mean with its spread, one panel a metric."""
  figure, axes = plt.subplots(1, len(metrics), figsize=(2.6 * len(metrics), 0.35 * len(results) + 1.2), sharey=True)
  for axis, metric in zip(np.atleast_1d(axes), metrics):
    values = [spread(result["runs"], metric) or (0.0, 0.0) for result in results.values()]
    axis.barh(list(results), [v[0] for v in values], xerr=[v[1] for v in values], color="#4c78a8")
    axis.set_title(metric.split("/", 2)[-1], fontsize=9)
    axis.invert_yaxis() if axis is np.atleast_1d(axes)[0] else None
  figure.tight_layout()
  figure.savefig(path)
  plt.close(figure)


def anchor_curve(
  path: pathlib.Path, results: Mapping[str, Any], quality: Mapping[str, float], metric: str
) -> None:
  """Accuracy of fixed-anchor binding against the anchor's quality, with the other methods as lines."""
  figure, axis = plt.subplots(figsize=(5, 3.2))
  anchors = [m for m in sorted(quality, key=quality.get) if f"fixed_anchor_{m}" in results]
  points = [spread(results[f"fixed_anchor_{m}"]["runs"], metric) for m in anchors]
  axis.errorbar([quality[m] for m in anchors], [p[0] for p in points], yerr=[p[1] for p in points], marker="o",
                label="fixed anchor")  # fmt: skip
  others = [name for name in results if not name.startswith(("fixed_anchor", "dcid_"))]
  for number, name in enumerate(others):
    found = spread(results[name]["runs"], metric)
    if found:
      axis.axhline(found[0], linestyle="--", color=f"C{number + 1}", label=name)
  axis.set_xlabel("quality of the anchor")
  axis.set_ylabel(metric.split("/", 2)[-1])
  axis.legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(path)
  plt.close(figure)

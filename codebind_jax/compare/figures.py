"""The figures of a comparison; the numbers in each come from a function of their own, so that they can be tested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float

from codebind_jax import files

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def mean_and_deviation(runs: Sequence[Mapping[str, float]], name: str) -> tuple[float, float] | None:
  """Mean and sample standard deviation over runs; None where no run has the metric."""
  values = [run[name] for run in runs if name in run]
  return (float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0) if values else None


def bars(path: files.Path, results: Mapping[str, Any], metrics: Sequence[str]) -> None:
  """Mean and standard deviation of every variant, one panel a metric."""
  figure, axes = plt.subplots(
    1, len(metrics), figsize=(2.6 * len(metrics), 0.35 * len(results) + 1.2), sharey=True, squeeze=False
  )
  for axis, metric in zip(axes[0], metrics):
    values = [mean_and_deviation(result["runs"], metric) or (0.0, 0.0) for result in results.values()]
    axis.barh(list(results), [v[0] for v in values], xerr=[v[1] for v in values], color="#4c78a8")
    axis.set_title(metric.split("/", 2)[-1], fontsize=9)
  axes[0, 0].invert_yaxis()
  _save(figure, path)


def anchor_points(
  results: Mapping[str, Any], quality: Mapping[str, float], metric: str
) -> tuple[list[tuple[float, float, float]], dict[str, float]]:
  """(quality, mean, deviation) of each fixed anchor, worst first, and the mean of all others but DCID's parts."""
  anchors = [m for m in sorted(quality, key=quality.get) if f"fixed_anchor_{m}" in results]
  points = [(quality[m], *mean_and_deviation(results[f"fixed_anchor_{m}"]["runs"], metric)) for m in anchors]
  others = {name: mean_and_deviation(result["runs"], metric) for name, result in results.items()
            if not name.startswith(("fixed_anchor", "dcid_"))}  # fmt: skip
  return points, {name: values[0] for name, values in others.items() if values}


def anchor_curve(path: files.Path, results: Mapping[str, Any], quality: Mapping[str, float], metric: str) -> None:
  """Accuracy of fixed-anchor binding against the anchor's quality, with the other methods as lines."""
  figure, axis = plt.subplots(figsize=(5, 3.2))
  points, others = anchor_points(results, quality, metric)
  x, y, error = zip(*points) if points else ((), (), ())
  axis.errorbar(x, y, yerr=error, marker="o", label="fixed anchor")
  for number, (name, mean) in enumerate(others.items()):
    axis.axhline(mean, linestyle="--", color=f"C{number + 1}", label=name)
  axis.set_xlabel("quality of the anchor")
  axis.set_ylabel(metric.split("/", 2)[-1])
  axis.legend(fontsize=7)
  _save(figure, path)


def with_probe(results: Mapping[str, Any], name: str) -> dict[str, list[Any]]:
  """Variant -> one probe's results over its runs, for variants that have it."""
  by_variant = {variant: [p[name] for p in result["probes"] if name in p] for variant, result in results.items()}
  return {variant: probes for variant, probes in by_variant.items() if probes}


def sharing_by_count(results: Mapping[str, Any]) -> tuple[list[str], Float[np.ndarray, "v m"]]:
  """Variants, and the share in % of their codes that 1, 2, ... modalities use (mean over seeds)."""
  probes = with_probe(results, "sharing")
  sets = {name: [one["sets"] for one in found] for name, found in probes.items()}
  most = max((key.count("+") + 1 for found in sets.values() for one in found for key in one), default=0)
  table = np.zeros((len(sets), most))
  for row, found in enumerate(sets.values()):
    for one in found:
      for key, share in one.items():
        table[row, key.count("+")] += share / len(found)
  return list(sets), table


def sharing_pairs(probes: Sequence[Mapping[str, Any]]) -> tuple[list[str], Float[np.ndarray, "m m"]]:
  """Modalities, and for each two the share in % of the codes they use that both use (mean over seeds); NaN for one."""
  names = sorted({m for one in probes for key in one["pairs"] for m in key.split("+")})
  table = np.full((len(names), len(names)), np.nan)
  for key in probes[0]["pairs"]:
    a, b = (names.index(m) for m in key.split("+"))
    table[a, b] = table[b, a] = np.mean([one["pairs"][key][0] for one in probes])
  return names, table


def sharing(path: files.Path, results: Mapping[str, Any]) -> None:
  """Codes by the number of modalities that use them, and below, per variant, what each two share (DCID, figure 4)."""
  names, table = sharing_by_count(results)
  probes = with_probe(results, "sharing")
  across = min(4, len(names))
  down = -(-len(names) // across)
  figure = plt.figure(figsize=(2.4 * across + 1, 0.35 * len(names) + 1.5 + 2.8 * down))
  above, below = figure.subfigures(2, 1, height_ratios=(0.35 * len(names) + 1.5, 2.8 * down))
  axis, left = above.subplots(), np.zeros(len(names))
  for count in range(table.shape[1]):
    axis.barh(names, table[:, count], left=left, label=str(count + 1), color=plt.cm.viridis(count / table.shape[1]))
    left += table[:, count]
  axis.invert_yaxis()
  axis.set_xlabel("% of the codes in use, by how many modalities use them")
  axis.legend(fontsize=7, ncols=table.shape[1], loc="lower left", bbox_to_anchor=(0, 1))
  grid = below.subplots(down, across, squeeze=False, gridspec_kw={"hspace": 0.6})
  for axis in grid.flat:
    axis.axis("off")
  for axis, (name, found) in zip(grid.flat, probes.items()):
    modalities, pairs = sharing_pairs(found)
    axis.axis("on")
    axis.imshow(pairs, vmin=0, vmax=100, cmap="viridis")
    axis.set_xticks(range(len(modalities)), modalities, fontsize=6, rotation=90)
    axis.set_yticks(range(len(modalities)), modalities, fontsize=6)
    axis.set_title(f"{name}: shared, %", fontsize=7)
    for a in range(len(modalities)):
      for b in range(len(modalities)):
        if a != b:
          axis.text(b, a, f"{pairs[a, b]:.0f}", ha="center", va="center", fontsize=6, color="white")
  _write(figure, path)


def redundancy_table(results: Mapping[str, Any]) -> dict[str, tuple[tuple[float, float], tuple[float, float]]]:
  """Variant -> (mean, deviation) over seeds of the mean cosine between codes before TOC, and after it."""
  probes = with_probe(results, "toc")
  return {name: tuple(mean_and_deviation(runs, when) for when in ("before", "after")) for name, runs in probes.items()}


def redundancy(path: files.Path, results: Mapping[str, Any]) -> None:
  """Mean cosine between codes before and after TOC."""
  table = redundancy_table(results)
  figure, axis = plt.subplots(figsize=(5, 0.45 * len(table) + 1.2))
  for offset, which, label in ((-0.2, 0, "all channels"), (0.2, 1, "three quarters of them, by TOC")):
    values = [pair[which] for pair in table.values()]
    axis.barh(np.arange(len(table)) + offset, [v[0] for v in values], xerr=[v[1] for v in values], height=0.38,
              label=label)  # fmt: skip
  axis.set_yticks(range(len(table)), list(table))
  axis.invert_yaxis()
  axis.set_xlabel("mean cosine between different codes")
  axis.legend(fontsize=7)
  _save(figure, path)


def plan_columns(plan: Float[np.ndarray, "n k"]) -> list[int]:
  """Codes ordered by the mean row of their mass, so that a plan that follows the rows is a diagonal."""
  mass = plan.sum(0)
  centre = (np.arange(len(plan))[:, None] * plan).sum(0) / np.where(mass > 0, mass, 1.0)
  return np.argsort(centre, kind="stable").tolist()


def transport_plan(path: files.Path, probe: Mapping[str, Any], title: str) -> None:
  """Transport plans from a batch's features of two modalities to the codes, both in the order of the first."""
  plans = {m: np.asarray(probe["plans"][m], np.float64) for m in probe["modalities"]}
  order = plan_columns(plans[probe["modalities"][0]])
  figure, axes = plt.subplots(1, len(plans), figsize=(4.2 * len(plans), 4.2), sharey=True)
  for axis, (m, plan) in zip(axes, plans.items()):
    axis.imshow(plan[:, order], aspect="auto", cmap="magma", vmin=0)
    axis.set_title(f"{title}: {m}", fontsize=9)
    axis.set_xlabel("code")
  axes[0].set_yticks(range(len(probe["rows"])), probe["rows"], fontsize=4)
  _save(figure, path)


def _save(figure: Any, path: files.Path) -> None:
  figure.tight_layout()
  _write(figure, path)


def _write(figure: Any, path: files.Path) -> None:
  with files.replacing(path) as temporary:
    figure.savefig(temporary, format=path.suffix[1:])
  plt.close(figure)

"""The figures of a comparison; what each shows is made by a function of its own, so that it can be checked."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def spread(runs: Sequence[Mapping[str, float]], name: str) -> tuple[float, float] | None:
  """Mean and sample standard deviation over runs; None where no run has the metric."""
  values = [run[name] for run in runs if name in run]
  return (float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0) if values else None


def bars(path: pathlib.Path, results: Mapping[str, Any], metrics: Sequence[str]) -> None:
  """Every variant's mean with its spread, one panel a metric."""
  figure, axes = plt.subplots(
    1, len(metrics), figsize=(2.6 * len(metrics), 0.35 * len(results) + 1.2), sharey=True, squeeze=False
  )
  for axis, metric in zip(axes[0], metrics):
    values = [spread(result["runs"], metric) or (0.0, 0.0) for result in results.values()]
    axis.barh(list(results), [v[0] for v in values], xerr=[v[1] for v in values], color="#4c78a8")
    axis.set_title(metric.split("/", 2)[-1], fontsize=9)
  axes[0, 0].invert_yaxis()
  _save(figure, path)


def anchor_points(
  results: Mapping[str, Any], quality: Mapping[str, float], metric: str
) -> tuple[list[tuple[float, float, float]], dict[str, float]]:
  """(quality, mean, spread) of each fixed anchor, worst first, and the mean of every other method that has no parts."""
  anchors = [m for m in sorted(quality, key=quality.get) if f"fixed_anchor_{m}" in results]
  points = [(quality[m], *spread(results[f"fixed_anchor_{m}"]["runs"], metric)) for m in anchors]
  others = {name: spread(result["runs"], metric) for name, result in results.items()
            if not name.startswith(("fixed_anchor", "dcid_"))}  # fmt: skip
  return points, {name: found[0] for name, found in others.items() if found}


def anchor_curve(path: pathlib.Path, results: Mapping[str, Any], quality: Mapping[str, float], metric: str) -> None:
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
  """Variant -> what the probes of its runs found, for those that have it."""
  found = {variant: [p[name] for p in result["probes"] if name in p] for variant, result in results.items()}
  return {variant: probes for variant, probes in found.items() if probes}


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


def sharing_pairs(found: Sequence[Mapping[str, Any]]) -> tuple[list[str], Float[np.ndarray, "m m"]]:
  """Modalities, and for each two the share in % of the codes they use that both use (mean over seeds); NaN for one."""
  names = sorted({m for one in found for key in one["pairs"] for m in key.split("+")})
  table = np.full((len(names), len(names)), np.nan)
  for key in found[0]["pairs"]:
    a, b = (names.index(m) for m in key.split("+"))
    table[a, b] = table[b, a] = np.mean([one["pairs"][key][0] for one in found])
  return names, table


def sharing(path: pathlib.Path, results: Mapping[str, Any]) -> None:
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
  figure.savefig(path)
  plt.close(figure)


def redundancy_table(results: Mapping[str, Any]) -> dict[str, tuple[tuple[float, float], tuple[float, float]]]:
  """Variant -> (mean, spread) over seeds of the mean cosine between codes before TOC, and after it."""
  probes = with_probe(results, "toc")
  return {name: (spread(found, "before"), spread(found, "after")) for name, found in probes.items()}


def redundancy(path: pathlib.Path, results: Mapping[str, Any]) -> None:
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
  """Codes in the order of the mean row that sends mass to them, so that a plan which follows the rows is a diagonal."""
  mass = plan.sum(0)
  centre = (np.arange(len(plan))[:, None] * plan).sum(0) / np.where(mass > 0, mass, 1.0)
  return np.argsort(centre, kind="stable").tolist()


def transport_plan(path: pathlib.Path, found: Mapping[str, Any], title: str) -> None:
  """Where a batch's features of two modalities send their mass among the codes, both in the first one's order."""
  plans = {m: np.asarray(found["plans"][m], np.float64) for m in found["modalities"]}
  order = plan_columns(plans[found["modalities"][0]])
  figure, axes = plt.subplots(1, len(plans), figsize=(4.2 * len(plans), 4.2), sharey=True)
  for axis, (m, plan) in zip(axes, plans.items()):
    axis.imshow(plan[:, order], aspect="auto", cmap="magma", vmin=0)
    axis.set_title(f"{title}: {m}", fontsize=9)
    axis.set_xlabel("code")
  axes[0].set_yticks(range(len(found["rows"])), found["rows"], fontsize=4)
  _save(figure, path)


def _save(figure: Any, path: pathlib.Path) -> None:
  figure.tight_layout()
  figure.savefig(path)
  plt.close(figure)

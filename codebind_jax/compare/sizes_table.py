"""comparison.md and comparison.json of items of so many bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from codebind_jax import files
from codebind_jax.compare.search import KINDS, QUERIES, SCORE
from codebind_jax.compare.table import EDGE, at_edge, cell, markdown, written

POINTS = 3.0  # that codes are wanted above the best quantiser of as many bytes
WITHIN = 0.5  # points of float32 that codes are wanted within
NAMES = {"val": "validation sets", "test": "test sets"}


def best_quantiser(rows: Sequence[Mapping[str, Any]], size: int, queries: str) -> Mapping[str, Any] | None:
  """The quantiser of at most `size` bytes an item that the validation sets choose, by its mean score over seeds."""
  key = f"eval/val/{queries}/{SCORE}"
  fitting = [row for row in rows if row["kind"] == "quantiser" and row["bytes"] <= size]
  return max(fitting, key=lambda row: np.mean([run[key] for run in row["runs"]])) if fitting else None


def difference(row: Mapping[str, Any], other: Mapping[str, Any], key: str) -> tuple[float, float]:
  """Mean and sample standard deviation of a row's metric less another row's, paired by seed; deviation 0 of one run."""
  found = [a[key] - b[key] for a, b in zip(row["runs"], other["runs"], strict=True)]
  return float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else 0.0


def differences(rows: Sequence[Mapping[str, Any]], roles: Sequence[str]) -> list[dict[str, Any]]:
  """What every row of codes is above the best quantiser of as many bytes and above float32, by role and queries."""
  found, whole = [], next((row for row in rows if row["name"] == "float32"), None)
  for row in (row for row in rows if row["kind"] != "quantiser"):
    for queries in QUERIES:
      best = best_quantiser(rows, row["bytes"], queries)
      for role in roles:
        above = lambda other, key=f"eval/{role}/{queries}/{SCORE}", row=row: other and difference(row, other, key)
        found.append({
          "name": row["name"], "bytes": row["bytes"], "kind": row["kind"], "queries": queries, "role": role,
          "quantiser": best and best["name"], "quantiser_bytes": best and best["bytes"],
          "above_quantiser": above(best), "above_float32": above(whole),
        })  # fmt: skip
  return found


def write_sizes(folder: files.Path, comparison: Mapping[str, Any]) -> str:
  """Writes both files and returns the text of comparison.md."""
  whole = dict(comparison) | {"differences": differences(comparison["results"], comparison["roles"])}
  return written(folder, whole, ["# Bytes an item", "", *sections(whole)])


def sections(whole: Mapping[str, Any], heading: str = "##") -> list[str]:
  """Lines of the tables.

  Args:
    whole: content of comparison.json.
    heading: mark of the headings.
  """
  lines = [*_head(whole), ""]
  for role in whole["roles"]:
    lines += [f"{heading} {NAMES[role].capitalize()}", "", *_scores(whole["results"], role), ""]
    lines += [*_differences(whole["differences"], role), ""]
  return lines


def _head(whole: Mapping[str, Any]) -> list[str]:
  config, settings = whole["config"], whole["config"]["compare"]
  tried = "; ".join(f"{name} {_tuned(found)}" for name, found in whole["baselines"].items())
  return [
    f"{whole['summary']}.", "",
    f"{settings['seeds']} seeds, %, mean ± standard deviation. The baseline is continuous, `{whole['baseline']}`, of "
    f"these by the validation sets, seed 0 (rate, score; {EDGE} at an end of the rates tried): {tried}.", "",
    "Quantisers are faiss', fitted to the baseline's training embeddings seed by seed (`joint`: all modalities "
    "together; `modality`: each by itself). Rates were chosen like the baseline's, but where a variant has one of its "
    "own. `warm` ones start from the seed's run of the baseline, `cold` ones from scratch.", "",
    "Items are coded; queries are not, but in the column `score, coded queries`. `score`: mean of `zeroshot` (top-1 by "
    "name) and `r1`; `r1`, `r10`: recall, means over sets, pairs and both directions; `emergent`: recall at 5 of pairs "
    "that no stage binds; `probe`: linear, of coded items.",
    *(["", f"These test sets had been read before: {settings['read_before']}."]
      if settings["read_before"] and config["test"] else []),
  ]  # fmt: skip


def _tuned(found: Mapping[str, Any]) -> str:
  rate = f"{found['learning_rate']:g}"
  score = found["tuning"].get(rate)
  return f"{rate}{EDGE * bool(at_edge(found))}" + (f" {score:.1f}" if score is not None else "")


def _scores(rows: Sequence[Mapping[str, Any]], role: str) -> list[str]:
  keys = [f"eval/{role}/uncoded/{kind}" for kind in (SCORE, *KINDS)] + [f"eval/{role}/coded/{SCORE}"]
  heads = [SCORE, *KINDS, f"{SCORE}, coded queries"]
  there = [n for n, key in enumerate(keys) if any(key in row["runs"][0] for row in rows)]
  lines = []
  for row in sorted(rows, key=lambda row: (row["bytes"], row["kind"] == "quantiser", row["name"])):
    rate = "" if row["learning_rate"] is None else f"{row['learning_rate']:g}{EDGE * bool(at_edge(row))}"
    kind = "" if row["kind"] == "quantiser" else f" ({row['kind']})"
    lines.append([str(row["bytes"]), row["name"] + kind, *(cell(row["runs"], keys[n]) for n in there), rate])
  return markdown(["bytes", "items", *(heads[n] for n in there), "rate"], lines)


def _differences(found: Sequence[Mapping[str, Any]], role: str) -> list[str]:
  """The table of score above the best quantiser and above float32, with the goals that it is measured by."""
  show = lambda pair: "" if pair is None else f"{pair[0]:+.1f} ± {pair[1]:.1f}"
  rows = [
    [str(one["bytes"]), f"{one['name']} ({one['kind']})", one["queries"], show(one["above_quantiser"]),
     f"{one['quantiser']} ({one['quantiser_bytes']})" if one["quantiser"] else "", show(one["above_float32"])]
    for one in sorted(found, key=lambda one: (one["bytes"], one["name"])) if one["role"] == role
  ]  # fmt: skip
  return [
    "Score above the best quantiser of at most as many bytes (of those that the validation sets choose), and above "
    f"float32, paired by seed. Wanted: {POINTS:g} points at 12, 24 and 48 bytes; at 48 within {WITHIN:g} of float32.",
    "",
    *markdown(["bytes", "items", "queries", "above the quantiser", "quantiser (bytes)", "above float32"], rows),
  ]  # fmt: skip

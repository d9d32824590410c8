"""comparison.md, comparison.json and the figures of a comparison of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from codebind_jax import files
from codebind_jax.compare import figures
from codebind_jax.compare.claims import RULE, claims

COLUMNS = ("label/cross", "label/within", "label/all", "style/cross", "recall")
PREFIX = "eval/test"
EDGE = "†"
OVER_LABELS = " In brackets the standard error over the field's values (the concepts), which more seeds do not lessen."


def cell(runs: Sequence[Mapping[str, float]], name: str) -> str:
  """`mean ± deviation` for a table, and `(error)` over the labels where it was measured."""
  values = figures.mean_and_deviation(runs, name)
  if values is None:
    return ""
  shown = f"{values[0]:.1f} ± {values[1]:.1f}" if len(runs) > 1 else f"{values[0]:.1f}"
  over_labels = figures.mean_and_deviation(runs, f"{name}_error")
  return shown if over_labels is None else f"{shown} ({over_labels[0]:.1f})"


def write_comparison(
  folder: files.Path, comparison: Mapping[str, Any], against: Mapping[str, Any] | None = None
) -> str:
  """Writes all files and returns the text of comparison.md; `against` is another comparison, see `claims`."""
  results, settings, whole = comparison["results"], comparison["config"]["compare"], with_claims(comparison, against)
  drawn = draw(folder, results, settings, _columns(results, settings))
  return written(folder, whole, ["# Methods side by side", "", *sections(whole),
                                 *(f"![{name}]({name}.svg)\n" for name in drawn)])  # fmt: skip


def with_claims(comparison: Mapping[str, Any], against: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Content of comparison.json: a comparison, and what its results say of the papers' claims."""
  of_results = claims(comparison["results"], comparison["config"]["compare"].get("world"), PREFIX, against)
  return dict(comparison) | {"rule": RULE, "claims": of_results}


def written(folder: files.Path, whole: Mapping[str, Any], lines: Sequence[str]) -> str:
  """Writes comparison.json and the lines as comparison.md, whose text it returns."""
  text = "\n".join(lines)
  files.write_whole(folder / "comparison.md", text)
  files.write_sealed(folder / "comparison.json", whole)
  return text


def sections(whole: Mapping[str, Any], heading: str = "##") -> list[str]:
  """Lines of the tables: scores, cost and claims.

  Args:
    whole: content of comparison.json.
    heading: mark of the headings.
  """
  results, settings = whole["results"], whole["config"]["compare"]
  return [
    *_head(whole), "", *_scores(results, _columns(results, settings)), "",
    f"{heading} Cost", "", *_costs(results, whole.get("speed")), "",
    f"{heading} Claims of the papers", "", whole["rule"], "", *_claims(whole["claims"]), "",
  ]  # fmt: skip


def _columns(results: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
  measured = {key for result in results.values() for key in result["runs"][0]}
  return [c for c in settings.get("columns") or COLUMNS if f"{PREFIX}/{c}" in measured]


def _head(whole: Mapping[str, Any]) -> list[str]:
  config = whole["config"]
  settings = config["compare"]
  rates = settings["learning_rates"]
  tuned = (
    "learning rate chosen on the validation set for each method among as many as the row says, with seed 0; a rate "
    f"marked {EDGE} is the highest or lowest of them"
  ) if len(rates) > 1 else f"learning rate {rates[0]:g} for all, not tuned"
  sources = {name: rows for stage in config["stages"].values() for name, rows in stage["sources"].items()}
  rows = " + ".join(f"{rows} ({name})" for name, rows in sources.items()) or str(config["batch_size"])
  return [
    f"{whole['summary']}.", "",
    f"{config['steps']} steps of {rows} rows, {settings['seeds']} seeds, test set, %, mean ± standard deviation; "
    f"{tuned}.", "",
    "`F/cross`: head that tells field F, learned on one modality's training rows, tested on another's test rows, mean "
    "over ordered pairs; `within`: tested on its own; `all`: one head on all modalities together; `recall`: at 1, mean "
    "over pairs; `zeroshot`: top-1 by name, `retrieval`: recall at 1, means over test sets, modalities and directions."
    + OVER_LABELS * any(key.endswith("/cross_error") for key in next(iter(whole["results"].values()))["runs"][0]), "",
    f"These test sets had been read before: {settings['read_before']}." if settings.get("read_before") else
    "Nothing is known to have read these test sets before.",
  ]  # fmt: skip


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of a table."""
  line = lambda cells: f"| {' | '.join(cells)} |"
  return [line(head), "|---" * len(head) + "|", *map(line, rows)]


def at_edge(result: Mapping[str, Any]) -> str:
  """Which end of the rates tried a variant's rate is, "highest" or "lowest"; "" for none, or if it is the only one."""
  tried, rate = sorted(map(float, result.get("tuning", {}))), float(f"{result['learning_rate']:g}")
  return "" if len(tried) < 2 else "highest" if rate == tried[-1] else "lowest" if rate == tried[0] else ""


def _edges(results: Mapping[str, Any]) -> list[str]:
  """The footnote that names the variants whose rate is an end of those tried."""
  ends = {name: edge for name, result in results.items() if (edge := at_edge(result))}
  if not ends:
    return []
  named = ", ".join(f"{name} ({edge} of {len(results[name]['tuning'])})" for name, edge in ends.items())
  return ["", f"{EDGE} At an end of the rates tried, so that a further one might do better: {named}."]


def _scores(results: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
  rows = []
  for name, result in results.items():
    runs, rate = result["runs"], result["learning_rate"]
    codes = f"{cell(runs, 'codes/shared')} / {cell(runs, 'codes/single')}" if "codes/shared" in runs[0] else ""
    values = [cell(runs, f"{PREFIX}/{column}") for column in columns]
    mark = f" {EDGE}" if at_edge(result) else ""
    rows.append([name, *values, codes, f"{rate:g}{mark}", str(max(1, len(result.get("tuning", {}))))])
  return [*markdown(["variant", *columns, "codes shared / single", "rate", "rates tried"], rows), *_edges(results)]


def _costs(results: Mapping[str, Any], speed: Mapping[str, Any] | None) -> list[str]:
  rows = []
  pace = speed["examples_per_second"] if speed else {n: r["cost"]["examples_per_second"] for n, r in results.items()}
  for name, result in results.items():
    c = result["cost"]
    numbers = [f"{c[part]:,}" for part in ("extra_parameters", "codebooks", "aux")]
    rows.append([name, f"{pace[name]:.0f}", f"{c['compiled_megabytes']:.1f}", *numbers])
  towers = sorted({result["cost"]["towers"] for result in results.values()})
  how = (
    f"Examples a second are of the compiled step alone on one batch, the fastest of {speed['rounds']} turns of "
    f"{speed['steps']} steps that all variants took one after the other ({speed['device']}, {speed['cores']} cores, "
    f"load average {speed['load']:.1f} before): compare them with one another."
  ) if speed else "Examples a second are of the machine that trained the variant, with whatever ran beside it."
  return [
    *markdown(["variant", "examples/s", "temporaries, MB", "extra parameters", "codebooks", "aux"], rows), "",
    f"The towers have {' or '.join(f'{count:,}' for count in towers)} parameters in every variant. "
    f"{how} Temporaries are those of the compiled step; "
    "`extra parameters` are the method's own that gradient trains, `codebooks` codes and their statistics, `aux` "
    "teacher, queue and CLUB's networks, all in numbers of 4 bytes.",
  ]  # fmt: skip


def _claims(tested: Sequence[Mapping[str, Any]]) -> list[str]:
  if not tested:
    return ["The variants of this comparison test none."]
  show = lambda c: f"{c['difference']:.2f}" + ("" if c["error"] is None else f" ± {c['error']:.2f}")
  rows = [[c["claim"], f"**{c['verdict']}**", show(c), str(c["seeds"]), c["numbers"]] for c in tested]
  return markdown(["claim", "", "difference ± standard error", "seeds", "numbers (mean ± standard deviation)"], rows)


def draw(
  folder: files.Path, results: Mapping[str, Any], settings: Mapping[str, Any], columns: Sequence[str]
) -> list[str]:
  """Draws the figures that the results allow; returns the names of the files without .svg."""
  drawn = ["bars"]
  figures.bars(folder / "bars.svg", results, [f"{PREFIX}/{c}" for c in columns])
  quality = (settings.get("world") or {}).get("quality", {})
  if any(f"fixed_anchor_{m}" in results for m in quality):
    figures.anchor_curve(folder / "anchors.svg", results, quality, f"{PREFIX}/label/all")
    drawn.append("anchors")
  if figures.with_probe(results, "sharing"):
    figures.sharing(folder / "sharing.svg", results)
    figures.redundancy(folder / "redundancy.svg", results)
    drawn += ["sharing", "redundancy"]
  for name, plans in figures.with_probe(results, "plan").items():
    figures.transport_plan(folder / f"plan_{name}.svg", plans[0], name)
    drawn.append(f"plan_{name}")
  return drawn

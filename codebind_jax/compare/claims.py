"""The papers' claims, tested on a comparison: each held, did not hold or is undecided, by one rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

HELD, NOT, OPEN = "held", "did not hold", "undecided"
TITLES = {name.lower(): name for name in ("CodeBind", "CentroBind", "CODIS", "DCID", "FCID")}
PARTS = {  # DCID's: NeurIPS 2023, tables 2 and 3
  "dcid": {
    "no_coding": "the cross-modal prediction or contrast (CPC)", "no_ema_no_reset": "MM-EMA and reset",
    "no_ema": "MM-EMA", "no_reset": "the reset", "no_club": "CLUB", "no_matching": "code matching",
  },
  "codebind": {
    "no_codes": "the codes (continuous embeddings)", "no_code_terms": "the losses of the codes",
    "no_decomposition": "the losses that keep specific parts apart",
  },
}  # fmt: skip
SEEN = ("plain", "noisy", "hidden")  # transfers to the graded world's sets, by how their items are seen
MARGIN = 1.0  # points of loss that "does not hurt" and "no worse" allow
BLIND = 5.0  # points above chance up to which a factor counts as not learned
RULE = (
  "Two variants' runs of one seed share data order and start, so they are compared seed by seed. A claim that one is "
  "larger holds if the 95 % interval of the mean difference (Student's t over the seeds) lies above 0, does not hold "
  "if it lies below 0, and is undecided otherwise. `no worse` and `does not hurt` allow "
  f"{MARGIN:g} point: they hold if the interval lies above -{MARGIN:g} and do not if it lies below. With one seed "
  "nothing is decided. A claim about several methods holds if it does for each, and does not if it does not for one."
)


def verdict(differences: Sequence[float], allowed: float = 0.0) -> dict[str, Any]:
  """Verdict on "larger than minus `allowed`" from the differences of paired runs.

  Returns:
    `verdict`, the mean `difference`, its standard `error` and half the width of its 95 % `interval` (None for one run),
    and the number of `seeds`.
  """
  mean, count = float(np.mean(differences)), len(differences)
  if count < 2:
    return {"verdict": OPEN, "difference": mean, "error": None, "interval": None, "seeds": count}
  error = float(np.std(differences, ddof=1) / np.sqrt(count))
  half = float(stats.t.ppf(0.975, count - 1) * error)
  outcome = HELD if mean - half > -allowed else NOT if mean + half < -allowed else OPEN
  return {"verdict": outcome, "difference": mean, "error": error, "interval": half, "seeds": count}


def claims(
  results: Mapping[str, Any], world: Mapping[str, Any] | None = None, prefix: str = "eval/test",
  against: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
  """The claims that a comparison can test, each with its numbers.

  Args:
    results: variant -> `runs`, the metrics of each seed in order, and `probes`, the results of `CrossModal.probe`.
    world: `config.compare.world` of a comparison on modalities of graded quality; None for another.
    prefix: prefix of the metrics' names.
    against: comparison.json of the same world with graded qualities, where those of `world` are equal.

  Returns:
    Per claim `claim`, `verdict`, `difference`, `error`, `interval`, `seeds` (see `verdict`) and `numbers`, a sentence;
    a claim about several methods has their verdicts in `parts`.
  """
  found = [*_anchors(results, world, prefix)] if world else []
  found += _narrowed(against, results, prefix) if against else []
  found += _over_pairs(results, prefix)
  found += _levels(results, prefix)
  found += _regularised(results, prefix)
  return [*found, *_ablations(results, prefix), *_channels(results, prefix)]


def _values(results: Mapping[str, Any], name: str, metric: str | Callable[[Mapping[str, float]], float]) -> list[float]:
  return [metric(run) if callable(metric) else run[metric] for run in results[name]["runs"]]


def _paired(better: Sequence[float], worse: Sequence[float]) -> list[float]:
  return [a - b for a, b in zip(better, worse, strict=True)]


def _as_text(values: Sequence[float]) -> str:
  return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{np.mean(values):.1f}"


def _anchors(results: Mapping[str, Any], world: Mapping[str, Any], prefix: str) -> list[dict[str, Any]]:
  """Fixed anchors against each other and against CentroBind (arXiv 2410.02086)."""
  quality, whole = world["quality"], f"{prefix}/label/all"
  anchors = {m: f"fixed_anchor_{m}" for m in sorted(quality, key=quality.get) if f"fixed_anchor_{m}" in results}
  if len(anchors) < 2:
    return []
  by_anchor = {m: _values(results, name, whole) for m, name in anchors.items()}
  text = ", ".join(f"anchor {m} (quality {quality[m]:g}) {_as_text(values)}" for m, values in by_anchor.items())
  worst, best = list(anchors)[0], list(anchors)[-1]
  graded = quality[best] > quality[worst]
  found = [{"claim": "Fixed anchor: accuracy depends on the anchor's quality (best less worst anchor)",
            "numbers": f"label/all: {text}"} | verdict(_paired(by_anchor[best], by_anchor[worst]))]  # fmt: skip
  found = found if graded else []
  if "centrobind" not in results:
    return found
  centrobind = _values(results, "centrobind", whole)
  top = max(by_anchor, key=lambda m: np.mean(by_anchor[m]))
  asked = [("CentroBind, which has no anchor to choose, is no worse than the anchor that came out best", top, MARGIN)]
  if graded:
    asked.append(("CentroBind is better than binding to the anchor of lowest quality", worst, 0.0))
  for claim, other, allowed in asked:
    numbers = f"label/all: centrobind {_as_text(centrobind)}, anchor {other} {_as_text(by_anchor[other])}"
    found.append({"claim": claim, "numbers": numbers} | verdict(_paired(centrobind, by_anchor[other]), allowed))
  for lacking in (m for m in anchors if world["style_quality"].get(m, 1.0) == 0):
    seen = [m for m in quality if world["style_quality"].get(m, 1.0) > 0]
    across = lambda run, seen=seen: float(
      np.mean([run[f"{prefix}/style/{a}>{b}"] for a in seen for b in seen if a != b])
    )
    centrobind, anchor = _values(results, "centrobind", across), _values(results, anchors[lacking], across)
    chance = 100.0 / world["styles"]
    text = (f"style/cross among {', '.join(seen)}: centrobind {_as_text(centrobind)}, anchor {lacking} "
            f"{_as_text(anchor)}, chance {chance:.1f}")  # fmt: skip
    found.append({"claim": f"A factor that {lacking} lacks: CentroBind binds the others by it better than anchor "
                           f"{lacking} does", "numbers": text} | verdict(_paired(centrobind, anchor)))  # fmt: skip
    found.append({"claim": f"A factor that {lacking} lacks: anchor {lacking} does not bind the others by it (at most "
                           f"{BLIND:g} points above chance)", "numbers": text}
                 | verdict([chance + BLIND - value for value in anchor]))  # fmt: skip
  return found


def _narrowed(against: Mapping[str, Any], equal: Mapping[str, Any], prefix: str) -> list[dict[str, Any]]:
  """Gaps to the worst anchor in a world of graded qualities, less the same gaps where all qualities are equal."""
  graded, quality = against["results"], against["config"]["compare"]["world"]["quality"]
  both = sorted((m for m in quality if {f"fixed_anchor_{m}"} <= graded.keys() & equal.keys()), key=quality.get)
  if len(both) < 2:
    return []
  worst, best, found = f"fixed_anchor_{both[0]}", f"fixed_anchor_{both[-1]}", []
  for name, who in ((best, f"anchor {both[-1]}"), ("centrobind", "CentroBind")):
    if name not in graded or name not in equal:
      continue
    gap = lambda results, name=name: [
      abs(g) for g in _paired(*(_values(results, one, f"{prefix}/label/all") for one in (name, worst)))
    ]
    gaps = [gap(graded), gap(equal)]
    found.append({"claim": f"With all qualities equal the gap between {who} and anchor {both[0]}, the worst of the "
                           "graded world, shrinks",
                  "numbers": f"label/all, the gap: graded {_as_text(gaps[0])}, equal {_as_text(gaps[1])}"}
                 | verdict(_paired(*gaps)))  # fmt: skip
  return found


def _crossing(prefix: str) -> Callable[[Mapping[str, float]], float]:
  """A metric: mean accuracy of heads tested on another modality, on labels or else on the fields there are."""

  def mean(metrics: Mapping[str, float]) -> float:
    cross = [key for key in metrics if key.startswith(f"{prefix}/") and key.endswith("/label/cross")]
    cross = cross or [key for key in metrics if key.startswith(f"{prefix}/") and key.endswith("/cross")]
    return float(np.mean([metrics[key] for key in cross]))

  return mean


def _over_pairs(results: Mapping[str, Any], prefix: str) -> list[dict[str, Any]]:
  """Each method against InfoNCE of the same pairs on the same towers."""
  found = []
  for name, title in TITLES.items():
    if name in results and "info_nce" in results:
      own, plain = (_values(results, one, _crossing(prefix)) for one in (name, "info_nce"))
      found.append({"claim": f"{title} generalises across modalities better than plain InfoNCE of the pairs",
                    "numbers": f"mean of */cross: {name} {_as_text(own)}, info_nce {_as_text(plain)}"}
                   | verdict(_paired(own, plain)))  # fmt: skip
  return found


def _levels(results: Mapping[str, Any], prefix: str) -> list[dict[str, Any]]:
  """FCID and its variants against DCID; those without CLUB against DCID without it, where that is there."""
  found = []
  for name in (name for name in results if "dcid" in results and name.split("_")[0] == "fcid"):
    beside = "dcid_no_club" if name.endswith("no_club") and "dcid_no_club" in results else "dcid"
    own, other = (_values(results, one, _crossing(prefix)) for one in (name, beside))
    found.append({"claim": f"FCID is no worse than DCID ({name} than {beside})",
                  "numbers": f"mean of */cross: {name} {_as_text(own)}, {beside} {_as_text(other)}"}
                 | verdict(_paired(own, other), MARGIN))  # fmt: skip
  return found


def _regularised(results: Mapping[str, Any], prefix: str) -> list[dict[str, Any]]:
  """CodeBind against InfoNCE under the same regularisation, and each under that which validation chooses for it."""
  found, ways = [], [name.removeprefix("info_nce_") for name in results if name.startswith("info_nce_")]
  both = [way for way in ways if f"codebind_{way}" in results]
  named = {way: (f"codebind_{way}", f"info_nce_{way}") for way in both}
  better = "CodeBind generalises across modalities better than plain InfoNCE"
  asked = [(f"{better}, both with {way.replace('_', ' ')}", *pair) for way, pair in named.items()]
  if both and {"codebind", "info_nce"} <= results.keys():
    score = lambda name: max((v for v in results[name].get("tuning", {}).values() if v is not None), default=-np.inf)
    best = (max((one, *(f"{one}_{way}" for way in both)), key=score) for one in ("codebind", "info_nce"))
    asked.append((f"{better}, each with the regularisation that validation chooses for it", *best))
    of_runs = results["info_nce"]["runs"][0]
    sets = [key.split("/")[2] for key in of_runs if key.startswith(f"{prefix}/") and key.endswith("/label/cross")]
    asked += [(f"{asked[-1][0]}, on {name} inputs", *asked[-1][1:], name) for name in sets if name in SEEN]
  for claim, one, other, *on in asked:
    where = "/".join((prefix, *on))
    own, plain = (_values(results, name, _crossing(where)) for name in (one, other))
    what = f"{on[0]}/label/cross" if on else "mean of */cross"
    found.append({"claim": claim, "numbers": f"{what}: {one} {_as_text(own)}, {other} {_as_text(plain)}"}
                 | verdict(_paired(own, plain)))  # fmt: skip
  return found


def _ablations(results: Mapping[str, Any], prefix: str) -> list[dict[str, Any]]:
  """Each method against itself without one of its parts."""
  found = []
  for method, parts in PARTS.items():
    for name, what in parts.items():
      if method in results and f"{method}_{name}" in results:
        own, ablated = (_values(results, one, _crossing(prefix)) for one in (method, f"{method}_{name}"))
        found.append({"claim": f"{TITLES[method]}: leaving out {what} hurts cross-modal generalisation",
                      "numbers": f"mean of */cross: {method} {_as_text(own)}, without {_as_text(ablated)}"}
                     | verdict(_paired(own, ablated)))  # fmt: skip
  return found


def _channels(results: Mapping[str, Any], prefix: str) -> list[dict[str, Any]]:
  """TOC on every method that has a shared codebook (arXiv 2403.05168)."""
  probed = {name: result for name, result in results.items() if result["probes"] and "toc" in result["probes"][0]}
  if not probed:
    return []
  redundancy, accuracy = {}, {}
  for name, result in probed.items():
    chosen = [probe["toc"] for probe in result["probes"]]
    kept = f"{chosen[0]['kept']} of {chosen[0]['of']}"
    before, after = ([one[key] for one in chosen] for key in ("before", "after"))
    redundancy[name] = verdict(_paired(before, after)) | {
      "numbers": f"{name} ({kept}) {np.mean(before):.3f} -> {np.mean(after):.3f}"
    }
    before, after = _values(results, name, _crossing(prefix)), [_crossing(prefix)(one["metrics"]) for one in chosen]
    accuracy[name] = verdict(_paired(after, before), MARGIN) | {
      "numbers": f"{name} ({kept}) {_as_text(before)} -> {_as_text(after)}"
    }
  lower = "TOC with three quarters of the channels lowers the mean cosine between codes"
  kept = "TOC with three quarters of the channels does not hurt cross-modal generalisation"
  return [_joined(lower, redundancy), _joined(kept, accuracy)]


def _joined(claim: str, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  verdicts = {part["verdict"] for part in parts.values()}
  whole = NOT if NOT in verdicts else HELD if verdicts == {HELD} else OPEN
  gap = float(np.mean([part["difference"] for part in parts.values()]))
  seeds = min(part["seeds"] for part in parts.values())
  return {"claim": claim, "verdict": whole, "difference": gap, "error": None, "interval": None, "seeds": seeds,
          "numbers": ", ".join(f"{part['numbers']} {part['verdict']}" for part in parts.values()),
          "parts": {name: dict(part) for name, part in parts.items()}}  # fmt: skip

"""The verdict of a report: sentences on what was found, by rules that look at intervals and not at numbers alone.

A run is above or below its baseline on a row where the 95 % interval of the difference lies wholly on that side of
zero, and level with it where the interval holds zero; one that holds zero and reaches further than `TELLING` points to
a side tells nothing, as there are too few rows. Where both models were scored on the same rows the interval is that of
the paired difference (`report.paired`), else it is joined from the intervals of both (`joined_interval`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from codebind_jax.evaluators.codes import usage
from codebind_jax.report.data import Score

TELLING = 15.0  # points: a wider interval around zero, to either side, tells nothing
ABOVE, BELOW, LEVEL, UNTOLD = "above", "below", "level", "untold"
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NAMED = 3  # rows named in a sentence before "and n more"


def joined_interval(
  value: float, interval: tuple[float, float], other: float, others: tuple[float, float] | None
) -> tuple[float, float]:
  """95 % interval of value - other from the intervals of both, as of independent rows.

  The distances to the ends are joined as root of the sum of squares (Newcombe, 1998, method 10; Zou and Donner, 2008).
  Of two models on the same rows it is too wide rather than too narrow.

  Args:
    value, interval: of one number.
    other, others: of the other; None takes it as exact.
  """
  low, high = others or (other, other)
  below = math.hypot(value - interval[0], high - other)
  above = math.hypot(interval[1] - value, other - low)
  return value - other - below, value - other + above


def gap(score: Score) -> tuple[float, float] | None:
  """95 % interval of a row's difference to its baseline; None where it has no baseline or no interval."""
  if score.baseline is None or not np.isfinite(score.value - score.baseline):
    return None
  if score.difference is not None:
    return score.difference
  if score.interval is None:
    return None
  return joined_interval(score.value, score.interval, score.baseline, score.baseline_interval)


def judged(score: Score) -> str | None:
  """`ABOVE` (better), `BELOW` (worse), `LEVEL` or `UNTOLD`; None where there is nothing to compare."""
  ends = gap(score)
  if ends is None:
    return None
  return _side(ends, score.higher_is_better)


def _side(ends: tuple[float, float], higher_is_better: bool = True) -> str:
  if ends[0] > 0:
    return ABOVE if higher_is_better else BELOW
  if ends[1] < 0:
    return BELOW if higher_is_better else ABOVE
  return LEVEL if max(-ends[0], ends[1]) <= TELLING else UNTOLD


def against_chance(score: Score) -> str | None:
  """As `judged`, against what a guess would score."""
  if score.chance is None or score.interval is None or not np.isfinite(score.value):
    return None
  return _side((score.interval[0] - score.chance, score.interval[1] - score.chance), score.higher_is_better)


def verdict(
  scores: Sequence[Score],
  code_counts: Mapping[str, np.ndarray] | None = None,
  *,
  alarm_share: float = 0.1,
) -> list[str]:
  """The sentences: first each family's comparison, then what is bad or cannot be told.

  Args:
    scores: rows of the report; those with a family count.
    code_counts: how often each code was used, [K] by codebook.
    alarm_share: a codebook whose perplexity is under this share of its size has collapsed.
  """
  families: dict[str, list[Score]] = {}
  for score in scores:
    if score.family:
      families.setdefault(score.family, []).append(score)
  lines = [line for family, rows in families.items() for line in _compared(family, rows)]
  if not scores:
    lines.append("Nothing was measured: there is no evaluation set, or none has what zero-shot classification (labels "
                 "and a text tower), retrieval (two modalities) or probes (labels in training too) need.")  # fmt: skip
  return [*lines, *_bad(families), *_codes(code_counts or {}, alarm_share)]


def _compared(family: str, rows: Sequence[Score]) -> list[str]:
  """A family's sentence: against the baseline where there is one, else against chance."""
  by = {id(row): judged(row) for row in rows}
  told = [row for row in rows if by[id(row)]]
  if not told:
    return _beside_chance(family, rows)
  sides = {side: [row for row in told if by[id(row)] == side] for side in (ABOVE, BELOW, LEVEL, UNTOLD)}
  every = _every(told)
  if len(sides[LEVEL]) == len(told):
    most = max(abs(row.value - row.baseline) for row in told)
    size = "largest difference" if len(told) > 1 else "difference"
    return [f"{family}: level with the baseline on {every} ({size} {most:.1f} points, within the 95 % interval)."]
  if len(sides[UNTOLD]) == len(told):
    return [f"{family}: too few rows to tell it from the baseline on {every}."]
  for side in (ABOVE, BELOW):
    if len(sides[side]) == len(told):
      return [f"{family}: {side} the baseline on {every} (by {_range(told)} points)."]
  parts = [f"{side} the baseline on {_listed(sides[side])}" for side in (ABOVE, BELOW) if sides[side]]
  if sides[LEVEL]:
    parts.append(f"level on {_rest(sides[LEVEL])}")
  if sides[UNTOLD]:
    parts.append(f"too few rows to tell on {_rest(sides[UNTOLD])}")
  outside = len(sides[ABOVE]) + len(sides[BELOW])
  luck = len(told) >= 10 and outside <= max(1, round(len(told) / 20))
  note = f" Of {len(told)} comparisons about one in 20 lies outside its interval by chance alone." if luck else ""
  return [f"{family}: {'; '.join(parts)}.{note}"]


def _beside_chance(family: str, rows: Sequence[Score]) -> list[str]:
  above = [row for row in rows if against_chance(row) == ABOVE]
  if not above or any(against_chance(row) not in (ABOVE, None) for row in rows):
    return [f"{family}: above chance on {_rest(above)}."] if above else []
  if len(above) == 1:
    return [f"{family}: {above[0].value:.1f} % on {_every(above)}, where a guess has {above[0].chance:.1f} %."]
  return [f"{family}: above chance on {_every(above)} ({_span(r.value for r in above)} %, where a guess has "
          f"{_span(r.chance for r in above)} %)."]  # fmt: skip


def _bad(families: Mapping[str, Sequence[Score]]) -> list[str]:
  """Rows that are no better than a guess, that cannot be told from one, and that are not finite."""
  lines = []
  for family, rows in families.items():
    under = [r for r in rows if against_chance(r) == BELOW]
    level = [r for r in rows if against_chance(r) == LEVEL]
    few = [r for r in rows if against_chance(r) == UNTOLD]
    lost = [r for r in rows if not np.isfinite(r.value)]
    if under:
      lines.append(f"{family}: worse than chance on {_listed(under, 'chance')}.")
    if level:
      lines.append(f"{family}: no better than chance on {_listed(level, 'chance')}.")
    if few:
      lines.append(f"{family}: too few rows to tell it from chance on {_listed(few, 'chance')}.")
    if lost:
      lines.append(f"{family}: the value is not finite on {_rest(lost)}.")
  return lines


def _codes(counts: Mapping[str, np.ndarray], alarm_share: float) -> list[str]:
  lines = []
  for name, each in counts.items():
    effect = usage(each)["perplexity"] if np.sum(each) > 0 else 0.0
    if not np.sum(each) > 0:
      lines.append(f"Codes: no code of codebook {name} was used on the training data.")
    elif effect < alarm_share * len(each):
      lines.append(f"Codes: codebook {name} has collapsed: {effect:.1f} of its {len(each):,} codes are in effect on "
                   "the training data.")  # fmt: skip
  return lines


def _number(count: int) -> str:
  return _NUMBERS[count] if count < len(_NUMBERS) else f"{count:,}"


def _every(rows: Sequence[Score]) -> str:
  """What all rows of a family are called: "icons, unseen artists", "both sets", "all six rows"."""
  if len(rows) == 1:
    return _name(rows[0])
  sets, subjects = ({getattr(row, field) for row in rows} for field in ("on", "subject"))
  noun = "sets" if len(subjects) == 1 and len(sets) == len(rows) else "rows"
  return f"both {noun}" if len(rows) == 2 else f"all {_number(len(rows))} {noun}"


def _rest(rows: Sequence[Score]) -> str:
  return " and ".join(map(_name, rows)) if len(rows) <= 2 else f"{_number(len(rows))} rows"


def _name(row: Score) -> str:
  return f"{row.subject} ({row.on})" if row.subject else row.on


def _listed(rows: Sequence[Score], against: str = "baseline") -> str:
  """Names with their differences, the largest first, or with rows and value where chance is what they are against."""
  if against == "baseline":
    rows = sorted(rows, key=lambda row: -abs(row.value - row.baseline))
    shown = [f"{_name(r)} by {abs(r.value - r.baseline):.1f} points" for r in rows[:_NAMED]]
  else:
    shown = [f"{_name(r)}: {r.value:.1f} %{f' of {r.n:,} rows' if r.n else ''}, a guess has {r.chance:.1f} %"
             for r in rows[:_NAMED]]  # fmt: skip
  return "; ".join(shown) + (f"; and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")


def _range(rows: Sequence[Score]) -> str:
  return _span(abs(row.value - row.baseline) for row in rows)


def _span(values: Iterable[float]) -> str:
  ends = sorted(values)
  low, high = f"{ends[0]:.1f}", f"{ends[-1]:.1f}"
  return low if low == high else f"{low} to {high}"

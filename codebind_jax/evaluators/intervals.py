"""Confidence intervals for the numbers that are reported, and the names under which they are."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Num, Shaped

# Ends of names of numbers about another one: NAME/n rows scored, NAME/ways candidates, NAME/low and NAME/high.
ABOUT = ("n", "ways", "low", "high")


def is_about(name: str) -> bool:
  """Whether a metric's name is one of `measured` beside the value itself.

  >>> is_about("eval/x/zeroshot/image/top1/low"), is_about("eval/x/zeroshot/image/top1")
  (True, False)
  """
  return name.rpartition("/")[2] in ABOUT


def wilson_interval(percent: float, count: int | float, *, z: float = 1.96) -> tuple[float, float]:
  """Wilson score interval of a percentage of independent trials; sensible near 0 and 100 and for small counts.

  Args:
    percent: the share observed, 0 ... 100.
    count: number of trials, or the number that would tell as much (`percentage_interval`).
    z: normal quantile, 1.96 for 95 %.

  Returns:
    Lower and upper end, 0 ... 100.

  Raises:
    ValueError: if `percent` is outside 0 ... 100 or `count` is below 1.

  Example: 50 % of 100 trials.
    >>> tuple(round(end, 1) for end in wilson_interval(50.0, 100))
    (40.4, 59.6)
  """
  if not 0 <= percent <= 100:
    raise ValueError(f"percent: must be 0 ... 100, got {percent}")
  if count < 1:
    raise ValueError(f"count: must be at least 1, got {count}")
  p = percent / 100
  centre = p + z * z / (2 * count)
  half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
  low, high = ((centre + sign * half) / (1 + z * z / count) for sign in (-1, 1))
  return 100 * max(0.0, low), 100 * min(1.0, high)


def bootstrap_interval(
  values: Num[np.ndarray, "..."],
  *,
  groups: Shaped[np.ndarray, "..."] | Sequence | None = None,
  weights: Num[np.ndarray, "..."] | None = None,
  level: float = 0.95,
  samples: int = 1000,
  seed: int = 0,
) -> tuple[float, float]:
  """Percentile bootstrap interval of a mean; whole groups are drawn where rows of a group are not independent.

  Args:
    values: [N] per-row scores, such as 100 where right and 0 where wrong; or differences between two models.
    groups: [N], rows drawn together (icons of one concept); None draws rows.
    weights: [N], above 0: weights of the mean, also in every sample; None weighs all rows alike.
    level: coverage.
    samples: bootstrap samples.
    seed: seed of the draws.

  Returns:
    Lower and upper end, in the unit of `values`.

  Raises:
    ValueError: if `values` is empty, not a vector or not finite, lengths differ, or a weight is not above 0.
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
    raise ValueError(f"values: expected a non-empty finite vector, got shape {values.shape}")
  counts = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
  if counts.shape != values.shape or not (counts > 0).all():
    raise ValueError(f"weights: expected {len(values)} numbers above 0, got shape {counts.shape}")
  sums = values * counts
  if groups is not None:
    if len(groups) != len(values):
      raise ValueError(f"lengths must be equal, got {len(values)} values and {len(groups)} groups")
    _, numbers = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(numbers, weights=sums), np.bincount(numbers, weights=counts)
  # Groups of one sum and weight are alike, so that a sample is the number of draws of each kind.
  kinds, alike = np.unique(np.stack([sums, counts]), axis=1, return_counts=True)
  drawn = np.random.default_rng(seed).multinomial(len(sums), alike / len(sums), size=samples)
  low, high = np.quantile((drawn @ kinds[0]) / (drawn @ kinds[1]), [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def percentage_interval(
  values: Num[np.ndarray, "n"],
  *,
  groups: Shaped[np.ndarray, "n"] | None = None,
  weights: Num[np.ndarray, "n"] | None = None,
) -> tuple[float, float]:
  """95 % interval of the mean of rows that are right (100) or wrong (0).

  Wilson's of independent rows; of weighted rows, with Kish's effective number (sum w)^2 / sum w^2. Where rows share a
  group, each end is that of the bootstrap over whole groups if it lies further out: a few groups can agree by chance,
  which tells nothing, and rows of one group never tell more than independent ones.

  Args:
    values: each row's score.
    groups: group of each row; None for rows that are independent.
    weights: of the mean; None weighs all rows alike.

  Returns:
    Lower and upper end, 0 ... 100.

  Raises:
    ValueError: as `bootstrap_interval` and `wilson_interval`.
  """
  mean = float(np.average(values, weights=weights))
  count = len(values) if weights is None else float(weights.sum() ** 2 / (weights**2).sum())
  low, high = wilson_interval(min(max(mean, 0.0), 100.0), max(count, 1.0))
  if groups is not None and len(np.unique(groups)) < len(groups):
    ends = bootstrap_interval(values, groups=groups, weights=weights)
    low, high = min(low, ends[0]), max(high, ends[1])
  return low, high


def measured(
  name: str,
  values: Num[np.ndarray, "n"],
  *,
  ways: int,
  groups: Shaped[np.ndarray, "n"] | None = None,
  weights: Num[np.ndarray, "n"] | None = None,
  intervals: bool = True,
) -> Iterator[tuple[str, float]]:
  """A percentage and, with `intervals`, `name/n`, `name/ways`, `name/low` and `name/high`.

  Args:
    name: of the metric.
    values: 100 where a row is right and 0 where it is wrong.
    ways: number of candidates among which each row's answer was chosen.
    groups, weights: of `percentage_interval`.
    intervals: False yields the percentage alone.
  """
  yield name, float(np.average(values, weights=weights))
  if intervals:
    low, high = percentage_interval(values, groups=groups, weights=weights)
    yield from about(name, len(values), ways, low, high)


def about(name: str, rows: int, ways: int, low: float, high: float) -> Iterator[tuple[str, float]]:
  """The numbers about a percentage, under their names."""
  yield from zip((f"{name}/{end}" for end in ABOUT), (float(rows), float(ways), low, high))


def groups_by(values: Shaped[np.ndarray, "n"]) -> Shaped[np.ndarray, "n"]:
  """Groups of equal values; a row whose value is "" is its own.

  >>> groups_by(np.array(["cow", "", "cow", ""])).tolist()
  [1, -2, 1, -4]
  """
  values = np.asarray(values)
  _, numbers = np.unique(values, return_inverse=True)
  return np.where(values == "", -1 - np.arange(len(values)), numbers) if values.dtype.kind in "US" else numbers

"""Confidence intervals for the numbers that are reported."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Num, Shaped


def wilson_interval(percent: float, count: int, *, z: float = 1.96) -> tuple[float, float]:
  """Wilson score interval of a percentage of independent trials; sensible near 0 and 100 and for small counts.

  Args:
    percent: the share observed, 0 ... 100.
    count: number of trials.
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
  rng = np.random.default_rng(seed)
  means = np.empty(samples)
  for i in range(samples):
    drawn = rng.integers(0, len(sums), len(sums))
    means[i] = sums[drawn].sum() / counts[drawn].sum()
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)

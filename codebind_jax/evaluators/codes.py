"""How much of a codebook is used: active share, perplexity, dead codes, largest share."""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Bool, Int, Num

from codebind_jax.evaluators import base


def count_codes(
  indices: Int[np.ndarray, "..."], num_codes: int, mask: Bool[np.ndarray, "n"] | None = None
) -> Int[np.ndarray, "k"]:
  """How often each code occurs.

  Args:
    indices: code indices of any shape, rows first.
    num_codes: K, the size of the codebook.
    mask: [N], False on padding rows.

  Raises:
    ValueError: if there are no indices, or one is not in 0 ... K - 1.
  """
  (indices,) = base.apply_mask(mask, indices)
  if not indices.size:
    raise ValueError(f"codes: no indices to count, got shape {indices.shape}")
  low, high = int(indices.min()), int(indices.max())
  if low < 0 or high >= num_codes:
    raise ValueError(f"codes: index {low if low < 0 else high} is outside the codebook of {num_codes}")
  return np.bincount(indices.ravel(), minlength=num_codes)


def usage(counts: Num[np.ndarray, "..."]) -> dict[str, float]:
  """Usage of a codebook from the number of times each code was chosen.

  Args:
    counts: [K], not negative, not all zero; shares do as well.

  Returns:
    `active_share` (0-1, codes used at least once), `perplexity` (exp of the entropy in nats: 1 ... K, the number of
    codes in effect), `dead` (number of codes never used), `max_share` (0-1, share of the most used code).

  Raises:
    ValueError: if `counts` is not a vector, is negative or not finite somewhere, or sums to zero.
  """
  counts = np.asarray(counts, np.float64)
  if counts.ndim != 1 or not len(counts):
    raise ValueError(f"counts: expected one number a code, got shape {counts.shape}")
  if not np.isfinite(counts).all() or (counts < 0).any():
    raise ValueError("counts: must be finite and not negative")
  if not counts.sum():
    raise ValueError("counts: all zero, no code was ever chosen")
  p = counts / counts.sum()
  used = p[p > 0]
  return {
    "active_share": len(used) / len(p),
    "perplexity": float(np.exp(-(used * np.log(used)).sum())),
    "dead": float(len(p) - len(used)),
    "max_share": float(p.max()),
  }


def table_counts(table: base.Table, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
  """Counts of every codebook over an evaluation set.

  Args:
    table: the set; `codes_shared` of all modalities are counted together, `codes_specific` for each modality.
    sizes: number of codes by codebook: `shared` and names of modalities.

  Raises:
    ValueError: if a codebook named in `sizes` has no codes in the table.
  """
  counts = {}
  for book, size in sizes.items():
    field = "codes_shared" if book == "shared" else "codes_specific"
    members = [m for m in table if field in table[m]] if book == "shared" else [book]
    if not members:
      raise ValueError(f"codebook {book!r}: no modality has a column {field!r}; modalities are {sorted(table)}")
    counts[book] = sum(count_codes(base.columns(table, m, [field])[0], size) for m in members)
  return counts


@dataclasses.dataclass(frozen=True)
class CodebookUsage:
  """Usage of the shared codebook and of each modality's own: `codebook/<codebook>/perplexity` and so on.

  Attributes:
    sizes: number of codes by codebook: `shared` and names of modalities.
  """

  sizes: Mapping[str, int]
  name: str = "codebook"

  def __call__(self, table: base.Table) -> Iterator[tuple[str, float]]:
    """Yields active share, perplexity, dead codes and largest share of each codebook."""
    for book, counts in table_counts(table, self.sizes).items():
      for metric, value in usage(counts).items():
        yield f"{self.name}/{book}/{metric}", value

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
    counts: [K], not negative, not all zero; shares are allowed.

  Returns:
    `active_share` (0-1, codes used at least once), `perplexity` (exp of the entropy in nats: 1 ... K, the
    effective number of codes), `dead` (number of codes never used), `max_share` (0-1, share of the most used code).

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
  return {
    book: sum(shared_counts(table, size).values()) if book == "shared" else _counts(table, book, "codes_specific", size)
    for book, size in sizes.items()
  }


def shared_counts(table: base.Table, size: int) -> dict[str, Int[np.ndarray, "k"]]:
  """Modality -> how often it uses each of the `size` shared codes.

  Raises:
    ValueError: if no modality has shared codes in the table.
  """
  counts = {m: _counts(table, m, "codes_shared", size) for m in table if "codes_shared" in table[m]}
  if not counts:
    raise ValueError(f"codebook 'shared': no modality has a column 'codes_shared'; modalities are {sorted(table)}")
  return counts


def _counts(table: base.Table, modality: str, field: str, size: int) -> Int[np.ndarray, "k"]:
  return count_codes(base.columns(table, modality, [field])[0], size)


def overlap(counts: Mapping[str, Num[np.ndarray, "..."]]) -> dict[str, float]:
  """Degree to which modalities use the same codes.

  Args:
    counts: modality -> [K] how often it uses each code.

  Returns:
    `several_share` (0-1, share of the codes in use that at least two modalities use) and `modalities_per_code` (1 ...
    M, mean over the codes in use of the effective number of modalities: exp of the entropy of their shares of the code,
    each modality's uses summing to 1, so that a modality with many rows does not decide). A single use counts for the
    first, which therefore comes near to 1 on large data, but hardly for the second.

  Raises:
    ValueError: if a modality uses no code.
  """
  for modality, uses in counts.items():
    if not np.sum(uses):
      raise ValueError(f"counts: {modality}: no code was ever chosen")
  shares = np.stack([np.asarray(uses, np.float64) / np.sum(uses) for uses in counts.values()])
  shares = shares[:, shares.any(axis=0)]
  of_code = shares / shares.sum(axis=0)
  entropy = -(of_code * np.log(np.where(of_code > 0, of_code, 1.0))).sum(axis=0)
  return {
    "several_share": float(np.mean((shares > 0).sum(axis=0) > 1)),
    "modalities_per_code": float(np.exp(entropy).mean()),
  }


@dataclasses.dataclass(frozen=True)
class CodebookUsage:
  """Usage of the shared codebook and of each modality's own: `codebook/<codebook>/perplexity` and so on.

  The shared codebook's usage also comes by modality, `codebook/shared/<modality>/perplexity`, with the `overlap` of
  modalities, `codebook/shared/several_share` and `codebook/shared/modalities_per_code`.

  Attributes:
    sizes: number of codes by codebook: `shared` and names of modalities.
  """

  sizes: Mapping[str, int]
  name: str = "codebook"

  def __call__(self, table: base.Table) -> Iterator[tuple[str, float]]:
    """Yields active share, perplexity, dead codes and largest share of each codebook, and of its modalities' part."""
    for book, counts in table_counts(table, self.sizes).items():
      for metric, value in usage(counts).items():
        yield f"{self.name}/{book}/{metric}", value
    if "shared" in self.sizes:
      by_modality = shared_counts(table, self.sizes["shared"])
      for modality, counts in by_modality.items():
        for metric, value in usage(counts).items():
          yield f"{self.name}/shared/{modality}/{metric}", value
      for metric, value in overlap(by_modality).items():
        yield f"{self.name}/shared/{metric}", value

"""How much of a codebook is used, and what can be read off shared codes: labels and captions that share them."""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Bool, Int, Num

from codebind_jax.evaluators import base, contents


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


def label_pairs(codes: Int[np.ndarray, "n s"], labels: Num[np.ndarray, "n"]) -> tuple[float, float]:
  """Share of pairs of items with one label, among the pairs that share a code and among all pairs, 0-1.

  Args:
    codes: of each item, one a position; two items share a code if they have it at the same position.
    labels: numbers of their labels.

  Returns:
    (among pairs that share a code, a pair counted at every position where it does; among all pairs); nan for the first
    if no two items share a code, and for both if there are no two items.
  """
  pairs = lambda counts: float((counts * (counts - 1)).sum() / 2)
  counts = lambda *columns: np.unique(np.stack(columns, axis=1), axis=0, return_counts=True)[1].astype(np.float64)
  share = lambda some, all_pairs: some / all_pairs if all_pairs else float("nan")
  both = sum(pairs(counts(column, labels)) for column in codes.T)
  one = sum(pairs(counts(column)) for column in codes.T)
  return share(both, one), share(pairs(counts(labels)), pairs(np.array([len(labels)], np.float64)))


def agreement(codes: Int[np.ndarray, "n s"], others: Int[np.ndarray, "n s"]) -> tuple[float, float]:
  """Share of positions at which the two codes of a pair are equal, and its expectation for shuffled pairs, 0-1.

  Args:
    codes: of the first item of each pair, one a position.
    others: of the second.
  """
  by_chance = []
  for one, other in zip(codes.T, others.T):
    size = max(one.max(), other.max()) + 1
    by_chance.append(np.bincount(one, minlength=size) @ np.bincount(other, minlength=size) / len(one) / len(other))
  return float(np.mean(codes == others)), float(np.mean(by_chance))


@dataclasses.dataclass(frozen=True)
class CodeReading:
  """Labels and captions that share shared codes on an evaluation set, in percent, each beside its chance.

  `codes/M/same_label` and `same_label_chance` are those of `label_pairs`, of M's items that have a label, each content
  once; `codes/M/text/same` and `same_chance` those of `agreement`, of M's items and their captions.
  """

  name: str = "codes"

  def __call__(self, table: base.Table) -> Iterator[tuple[str, float]]:
    """Yields the numbers of every modality with shared codes that has labels or captions."""
    captions = table.captions if isinstance(table, base.Captioned) else {}
    flat = lambda codes: codes.reshape(len(codes), -1)
    for m in sorted(table):
      if m == "text" or "codes_shared" not in table[m]:
        continue
      codes, found = flat(base.columns(table, m, ["codes_shared"])[0]), {}
      if "label" in table[m]:
        (labels,) = base.columns(table, m, ["label"])
        rows = contents.once(contents.contents_of(table, m))
        rows = rows[labels[rows] != ""]
        numbers = np.unique(labels[rows], return_inverse=True)[1]
        found |= dict(zip(("same_label", "same_label_chance"), label_pairs(codes[rows], numbers)))
      if m in captions and len(captions[m][0]) and "codes_shared" in table.get("text", {}):
        rows, texts = captions[m]
        of_text = flat(np.asarray(table["text"]["codes_shared"]))[texts]
        pairs = flat(np.asarray(table[m]["codes_shared"]))[rows]
        found |= dict(zip(("text/same", "text/same_chance"), agreement(pairs, of_text)))
      yield from ((f"{self.name}/{m}/{name}", 100.0 * value) for name, value in found.items() if not np.isnan(value))

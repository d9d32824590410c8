"""The table that evaluators read, the numbers they yield, and the checks they share.

A table holds the embeddings of one evaluation set: `table[modality]` is a dict of columns with one row an item.
Embedding columns are `shared` [N, d_s], `specific` [N, d_p] and `full` [N, d_s + d_p]; code columns `codes_shared` [N,
S_s] and `codes_specific` [N, S_p]; every other column is a field of the row (`id`, `label`, `family`, ...). `_mask` [N]
is False on rows that only pad a batch. Modalities may have different numbers of rows (several captions an item, say);
columns of one modality may not.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Shaped

from codebind_jax.evaluators.intervals import groups_by

Columns = Mapping[str, np.ndarray]
Table = Mapping[str, Columns]

PARTS = ("shared", "specific", "full")


class Captioned(dict):
  """A table whose texts are the distinct captions of its items.

  Attributes:
    captions: modality -> (row, row of its caption in `text`), as many pairs as its rows have captions; rows of `text`
      themselves are paired with themselves.
  """

  def __init__(self, table: Table, captions: Mapping[str, tuple[np.ndarray, np.ndarray]]):
    super().__init__(table)
    self.captions = dict(captions)


class LeftOutError(ValueError):
  """What an evaluator needs and the data has not: it is left out, and the message says why."""


@runtime_checkable
class Evaluator(Protocol):
  """Anything with a name that turns a table into named numbers."""

  name: str

  def __call__(self, table: Table) -> Iterator[tuple[str, float]]:
    """Yields `(metric name, value)`; names are relative, such as `zeroshot/image/top1`."""
    ...


def run_evaluators(evaluators: Iterable[Evaluator], table: Table, *, prefix: str = "") -> Iterator[tuple[str, float]]:
  """Runs evaluators one after the other on one set.

  Args:
    evaluators: the evaluators to run.
    table: embeddings of one evaluation set (see the top of this file).
    prefix: put before every name, such as `eval/test_artist`.

  Yields:
    `(prefix/name, value)`.

  Raises:
    ValueError: from an evaluator, with its name and the prefix before the message; or if two evaluators yield one name.
  """
  seen = {}
  for evaluator in evaluators:
    try:
      for name, value in evaluator(table):
        if name in seen:
          raise ValueError(f"metric {name!r} was already yielded by evaluator {seen[name]!r}")
        seen[name] = evaluator.name
        yield f"{prefix}/{name}" if prefix else name, float(value)
    except LeftOutError as error:
      raise LeftOutError(f"{evaluator.name}: {error}") from error
    except ValueError as error:
      raise ValueError(f"evaluator {evaluator.name!r}{f' on {prefix!r}' if prefix else ''}: {error}") from error


def columns(table: Table, modality: str, fields: Sequence[str]) -> list[np.ndarray]:
  """Columns of one modality without the padding rows.

  Args:
    table: embeddings of one evaluation set.
    modality: which modality.
    fields: names of the columns.

  Returns:
    One array a field, all with the same number of rows (at least one).

  Raises:
    ValueError: if the modality or a field is missing, lengths differ, `_mask` is not boolean, or no row is left.
  """
  if modality not in table:
    raise ValueError(f"modality {modality!r} is not in the table; it has {sorted(table)}")
  rows = table[modality]
  missing = [field for field in fields if field not in rows]
  if missing:
    raise ValueError(f"{modality}: no column {missing[0]!r}; it has {sorted(rows)}")
  arrays = [np.asarray(rows[field]) for field in fields]
  lengths = {field: len(array) for field, array in zip(fields, arrays)}
  if "_mask" in rows:
    lengths["_mask"] = len(rows["_mask"])
  if len(set(lengths.values())) > 1:
    raise ValueError(f"{modality}: columns must have equally many rows, got {lengths}")
  if "_mask" in rows:
    mask = np.asarray(rows["_mask"])
    if mask.dtype != bool:
      raise ValueError(f"{modality}: _mask must be boolean, got {mask.dtype}")
    arrays = [array[mask] for array in arrays]
  if arrays and not len(arrays[0]):
    raise ValueError(f"{modality}: no rows to evaluate{' (all are masked)' if '_mask' in rows else ''}")
  return arrays


def plain_text(text: str) -> str:
  """A text without differences of case, blanks and Unicode composition.

  >>> plain_text(" Polar  BEAR")
  'polar bear'
  """
  return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def concepts(table: Table, modality: str, field: str) -> Int[np.ndarray, "n"] | None:
  """Numbers of the groups of rows of equal `field`, a row without it being its own; None where no row has the field."""
  if field not in table.get(modality, {}):
    return None
  (values,) = columns(table, modality, [field])
  return groups_by(values)


def parts_of(table: Table, modality: str, parts: Sequence[str] | None = None) -> tuple[str, ...]:
  """Embedding columns to evaluate: `parts` if given, else those of `PARTS` with a width (text has no specific part)."""
  if parts is not None:
    return tuple(parts)
  if modality not in table:
    raise ValueError(f"modality {modality!r} is not in the table; it has {sorted(table)}")
  rows = table[modality]
  present = tuple(part for part in PARTS if part in rows and np.asarray(rows[part]).shape[-1])
  if not present:
    raise ValueError(f"{modality}: none of the columns {PARTS}; it has {sorted(rows)}")
  return present


def unique_rows(rows: Columns, field: str) -> dict[str, np.ndarray]:
  """The first row of each distinct value of a field, in order, without padding: rows of images become rows of captions.

  Raises:
    ValueError: if the field is missing or lengths differ.
  """
  names = [name for name in rows if name != "_mask"]
  if field not in names:
    raise ValueError(f"no column {field!r} to make rows unique by; there are {sorted(names)}")
  unpadded = dict(zip(names, columns({"rows": rows}, "rows", names)))
  _, first = np.unique(unpadded[field], return_index=True)
  first.sort()
  return {name: array[first] for name, array in unpadded.items()}


def finite_rows(name: str, x: Float[np.ndarray, "..."]) -> Float32[np.ndarray, "n d"]:
  """Checks a matrix of embeddings and returns it as float32.

  Args:
    name: name of the array in the message.
    x: [N, D], any float type.

  Raises:
    ValueError: if it is not a matrix, has no rows or no width, or holds a value that is not finite.
  """
  x = np.asarray(x, np.float32)
  if x.ndim != 2 or 0 in x.shape:
    raise ValueError(f"{name}: expected a non-empty [rows, width] matrix, got shape {x.shape}")
  finite = np.isfinite(x).all(axis=1)
  if not finite.all():
    raise ValueError(
      f"{name}: {int((~finite).sum())} of {len(x)} rows are not finite, first row {int(np.argmin(finite))}"
    )
  return x


def unit_rows(name: str, x: Float[np.ndarray, "..."]) -> Float32[np.ndarray, "n d"]:
  """As `finite_rows`, each row divided by its norm; a zero row stays zero and matches everything equally."""
  x = finite_rows(name, x)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(1e-12))


def check_widths(**named: np.ndarray) -> None:
  """Raises ValueError unless all matrices have the same width."""
  widths = {name: x.shape[1] for name, x in named.items()}
  if len(set(widths.values())) > 1:
    raise ValueError(f"embeddings must have one width, got {widths}")


def check_lengths(**named) -> None:
  """Raises ValueError unless all arguments have the same number of rows."""
  lengths = {name: len(x) for name, x in named.items() if x is not None}
  if len(set(lengths.values())) > 1:
    raise ValueError(f"lengths must be equal, got {lengths}")


def class_weights(targets: Shaped[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
  """Weight of each row, summing to 1: every class that occurs has the same total weight."""
  _, numbers, counts = np.unique(targets, return_inverse=True, return_counts=True)
  return 1.0 / (len(counts) * counts[numbers])


def apply_mask(mask: Bool[np.ndarray, "n"] | None, *arrays: np.ndarray) -> list[np.ndarray]:
  """Rows of each array where `mask` is True; all rows when it is None.

  Raises:
    ValueError: if lengths differ, or nothing is left.
  """
  if mask is None:
    return list(arrays)
  for array in arrays:
    check_lengths(mask=mask, array=array)
  if not mask.any():
    raise ValueError("mask leaves no rows to evaluate")
  return [array[mask] for array in arrays]

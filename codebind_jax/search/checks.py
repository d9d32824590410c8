"""What an index takes and what it refuses, the same for vectors and codes."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from codebind_jax import files
from codebind_jax.embedding import tables

BACKENDS = ("auto", "faiss", "numpy")


def backend_of(wanted: str) -> str:
  """The backend in use: faiss or numpy.

  Raises:
    ValueError: for another name, or if faiss is wanted and not installed.
  """
  if wanted not in BACKENDS:
    raise ValueError(f"backend: got {wanted!r}; allowed: {list(BACKENDS)}")
  installed = importlib.util.find_spec("faiss") is not None
  if wanted == "faiss" and not installed:
    raise ValueError("backend: 'faiss' is not installed (pip install codebind_jax[search]); allowed: 'numpy'")
  return "numpy" if wanted == "numpy" or not installed else "faiss"


def neighbours(k: Any) -> int:
  """A number of neighbours.

  Raises:
    ValueError: if it is no whole number from 1 on.
  """
  if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
    raise ValueError(f"k: got {k!r}; allowed: whole numbers, 1 and up")
  return int(k)


def matrix(vectors: Any, name: str) -> np.ndarray:
  """Rows of numbers.

  Raises:
    ValueError: if it is something else: one vector, ragged lists, words.
  """
  try:
    array = np.asarray(vectors)
  except ValueError as error:
    raise ValueError(f"{name}: rows of different lengths; allowed: [rows, width]") from error
  if array.ndim != 2 or not array.shape[1]:
    raise ValueError(f"{name}: got shape {array.shape}; allowed: [rows, width]")
  if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
    try:
      array = array.astype(np.float32) if array.dtype.kind == "V" else None  # bfloat16 and its like
    except (TypeError, ValueError):
      array = None
    if array is None:
      raise ValueError(f"{name}: got values of type {np.asarray(vectors).dtype}; allowed: numbers")
  return array.astype(np.float32, copy=False) if array.dtype != np.float64 else array


def unit(vectors: Any, width: int | None, names: Sequence[Any], first: int | None = None) -> np.ndarray:
  """Rows of norm 1, float32; `first` is the row of a file that the first one is in, for errors."""
  array = np.asarray(vectors)
  if width is not None and array.shape[1] != width:
    raise ValueError(f"vectors: got width {array.shape[1]}; this index has width {width}")
  with np.errstate(invalid="ignore"):  # a signalling NaN, which is refused here
    length = np.linalg.norm(array.astype(np.float64), axis=1, keepdims=True)
  wrong = np.flatnonzero(~np.isfinite(length[:, 0]) | (length[:, 0] == 0))
  if len(wrong):
    row = "" if first is None else f"row {first + wrong[0]}: "
    raise ValueError(f"{row}vectors: that of {names[wrong[0]]!r} is zero or not finite; a cosine needs a direction")
  return np.ascontiguousarray(array / length, np.float32)


def unit_queries(queries: Any, width: int) -> np.ndarray:
  """Queries of norm 1, float32.

  Raises:
    ValueError: if they are no rows of numbers, of another width, zero or not finite.
  """
  rows = matrix(queries, "queries")
  return unit(rows, width, [f"query {number}" for number in range(len(rows))])


@contextlib.contextmanager
def opened(path: str | files.Path, kind: str, what: str, foreign: bool) -> Iterator[tables.Table]:
  """Opens a file that `save` wrote; what is raised meanwhile because it is damaged names it.

  Args:
    path: of the file.
    kind: that its metadata name.
    what: it is, for errors.
    foreign: whether a file without our metadata is read as well.

  Raises:
    ValueError: if there is no such file, or it is another kind of file, or damaged.
  """
  file = files.path(path)
  if not files.is_file(file):
    raise ValueError(f"{str(path)!r}: there is no such file")
  local = file
  try:
    local = files.fetched(file)
    with tables.open_table(local, f"a readable {what}") as table:
      if table.about.get("kind", kind if foreign else None) != kind or table.about and "kind" not in table.about:
        raise ValueError(f"columns {table.names} of kind {table.about.get('kind')!r}")
      if not table.about:
        logging.warning("%s: another program wrote it, without checksums: its values are not verified", file)
      yield table
  except ValueError as error:
    why = str(error).removeprefix(f"{local}: ")
    raise ValueError(f"{str(path)!r} is not an {what} that was saved, or it is damaged ({why})") from error

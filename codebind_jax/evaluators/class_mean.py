"""Nearest class mean: how well the embeddings of one modality form classes, without anything fitted."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging
from jaxtyping import Float, Shaped

from codebind_jax.evaluators import base, contents
from codebind_jax.evaluators.probe import ProbeResult, check_rows, measured_result, result_of


def nearest_class_mean(
  train_x: Float[np.ndarray, "..."],
  train_y: Shaped[np.ndarray, "..."],
  test_x: Float[np.ndarray, "..."],
  test_y: Shaped[np.ndarray, "..."],
) -> ProbeResult:
  """Gives each test row the class whose mean training embedding has the largest cosine.

  Args:
    train_x: [N, D]; rows are normalised first.
    train_y: [N] labels of any type that can be sorted.
    test_x: [M, D].
    test_y: [M].

  Raises:
    ValueError: on empty or non-finite embeddings, differing lengths or widths, or a test label without training rows.
  """
  train_x, train_y, test_x, test_y = check_rows(train_x, train_y, test_x, test_y)
  classes, numbers = np.unique(train_y, return_inverse=True)
  means = np.zeros((len(classes), train_x.shape[1]), np.float32)
  np.add.at(means, numbers, base.unit_rows("train embeddings", train_x))
  scores = base.unit_rows("test embeddings", test_x) @ base.unit_rows("class means", means).T
  return result_of(classes[scores.argmax(axis=1)], test_y, len(classes))


def nearest_other_mean(x: Float[np.ndarray, "..."], y: Shaped[np.ndarray, "..."]) -> ProbeResult:
  """Nearest class mean inside one set, each row left out of its own class's mean (for classes never trained on).

  A row that is alone in its class is not scored, because no mean is left; its class stays a candidate for the others.

  Raises:
    ValueError: on empty or non-finite embeddings, differing lengths, or if every row is alone in its class.
  """
  x, y = base.unit_rows("embeddings", x), np.asarray(y)
  base.check_lengths(x=x, y=y)
  classes, numbers, counts = np.unique(y, return_inverse=True, return_counts=True)
  scored = np.flatnonzero(counts[numbers] > 1)
  if not len(scored):
    raise ValueError("every row is alone in its class, so no class mean can be formed without it")
  if len(scored) < len(x):
    logging.info(
      "nearest class mean: %d of %d rows are alone in their class and not scored", len(x) - len(scored), len(x)
    )
  sums = np.zeros((len(classes), x.shape[1]), np.float32)
  np.add.at(sums, numbers, x)
  scores = x[scored] @ base.unit_rows("class means", sums).T
  others = base.unit_rows("class means", sums[numbers[scored]] - x[scored])
  scores[np.arange(len(scored)), numbers[scored]] = (x[scored] * others).sum(axis=1)
  return result_of(classes[scores.argmax(axis=1)], y[scored], len(classes), scored)


@dataclasses.dataclass(frozen=True)
class NearestClassMean:
  """Nearest class mean of each part: `ncm/<modality>/<part>`, percent; each content counts once.

  Attributes:
    modality: which modality.
    train: table whose rows form the class means; None leaves each row out of the evaluated set itself
      (`nearest_other_mean`).
    field: column of the label.
    parts: embedding columns; None takes all that the table has.
    concept: column whose equal values intervals draw together, where the table has it.
    intervals: also yield `n`, `ways`, `low` and `high` of each accuracy (`intervals.measured`).
  """

  modality: str
  train: base.Table | None = None
  field: str = "label"
  parts: Sequence[str] | None = None
  concept: str = "label"
  intervals: bool = False
  name: str = "ncm"

  def __call__(self, table: base.Table) -> Iterator[tuple[str, float]]:
    """Yields one accuracy a part."""
    concepts = base.concepts(table, self.modality, self.concept)
    content = contents.contents_of(table, self.modality)
    for part in base.parts_of(table, self.modality, self.parts):
      x, y = base.columns(table, self.modality, [part, self.field])
      if self.train is None:
        kept = contents.once_each(content, y)
        result = nearest_other_mean(x[kept], y[kept])
        result = dataclasses.replace(result, rows=kept[result.rows])
      else:
        train_x, train_y = base.columns(self.train, self.modality, [part, self.field])
        kept = contents.once_each(contents.contents_of(self.train, self.modality), train_y)
        result = nearest_class_mean(train_x[kept], train_y[kept], x, y)
      name = f"{self.name}/{self.modality}/{part}"
      yield from measured_result(name, result, content, concepts, balanced=False, intervals=self.intervals)

"""Linear probe: what logistic regression reads out of the frozen embeddings of one modality.

Speed: float32 throughout; values of C are tried from small to large, each fit starting where the last one ended (L-BFGS
then needs few steps), and the search stops when validation has not improved twice. 3,500 x 1,024 takes about 0.5 s with
9 classes and 15 s with 550, on one core.
"""

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Int, Shaped
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from codebind_jax.evaluators import base, contents
from codebind_jax.evaluators.answers import Answers, Keep, ids_of, top
from codebind_jax.evaluators.intervals import measured

C_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclasses.dataclass(frozen=True)
class ProbeResult:
  """Outcome of a probe on the test rows.

  Attributes:
    accuracy: percent.
    balanced_accuracy: mean over classes of the percentage right, so that big classes do not decide.
    predictions: [N] predicted labels of the scored rows.
    targets: [N] their right labels.
    rows: [N] which of the given rows they are.
    ways: number of classes among which was chosen.
    probabilities: [N, K] of the classes; None where a probe has none.
    c: the chosen inverse strength of the penalty; NaN where there is none.
    val_accuracy: percent on the validation part at that strength; NaN where there is none.
  """

  accuracy: float
  balanced_accuracy: float
  predictions: np.ndarray
  targets: np.ndarray
  rows: np.ndarray
  ways: int
  probabilities: np.ndarray | None = None
  c: float = float("nan")
  val_accuracy: float = float("nan")


def balanced_accuracy(predictions: Shaped[np.ndarray, "n"], targets: Shaped[np.ndarray, "n"]) -> float:
  """Mean over the classes among `targets` of the percentage predicted right."""
  return 100.0 * float(np.sum(base.class_weights(targets) * (predictions == targets)))


def result_of(
  predictions: Shaped[np.ndarray, "n"], targets: Shaped[np.ndarray, "n"], ways: int,
  rows: Int[np.ndarray, "n"] | None = None, **rest: Any,
) -> ProbeResult:  # fmt: skip
  """The outcome of predictions; without `rows` all rows are scored, `rest` are further attributes."""
  rows = np.arange(len(targets)) if rows is None else rows
  accuracy = 100.0 * float(np.mean(predictions == targets))
  return ProbeResult(accuracy, balanced_accuracy(predictions, targets), predictions, targets, rows, ways, **rest)


def measured_result(
  name: str, result: ProbeResult, content: Int[np.ndarray, "n"], groups: np.ndarray | None, *, balanced: bool,
  intervals: bool,
) -> Iterator[tuple[str, float]]:  # fmt: skip
  """Accuracy `name` and, with `balanced`, `name/balanced`, of a result; with `intervals` the numbers about them.

  A content that is in several rows counts once, and is right if any of them is.

  Args:
    name: of the metric.
    result: of the probe.
    content: [N], number of the content of all given rows.
    groups: [N], groups of all given rows, which intervals draw whole; None for independent rows.
    balanced: also the mean over classes.
    intervals: as of `intervals.measured`.
  """
  wrong = result.predictions != result.targets
  kept = contents.once(content[result.rows], wrong.astype(np.int8))
  values, groups = 100.0 * ~wrong[kept], None if groups is None else groups[result.rows[kept]]
  numbers = functools.partial(measured, values=values, ways=result.ways, groups=groups, intervals=intervals)
  yield from numbers(name)
  if balanced:
    yield from numbers(f"{name}/balanced", weights=base.class_weights(result.targets[kept]))


def check_rows(
  train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray
) -> tuple[np.ndarray, ...]:
  """The arguments as float32 matrices [n, d] and label arrays [n]; errors as in `linear_probe`."""
  train_x, test_x = base.finite_rows("train embeddings", train_x), base.finite_rows("test embeddings", test_x)
  base.check_widths(train=train_x, test=test_x)
  train_y, test_y = np.asarray(train_y), np.asarray(test_y)
  base.check_lengths(train_x=train_x, train_y=train_y)
  base.check_lengths(test_x=test_x, test_y=test_y)
  _check_known(test_y, np.unique(train_y))
  return train_x, train_y, test_x, test_y


def _check_known(test_y, classes):
  unknown = np.setdiff1d(test_y, classes)
  if len(unknown):
    raise ValueError(f"test label {str(unknown[0])!r} is not among the {len(classes)} classes of the training rows")


def grouped_split(groups: Shaped[np.ndarray, "n"], fraction: float, *, salt: str = "probe") -> Bool[np.ndarray, "n"]:
  """Marks rows whose group is held out: whole groups, chosen by hash, so that adding rows moves no other group.

  Args:
    groups: the group of each row, a concept for example.
    fraction: of the groups to hold out, between 0 and 1; exactly round(fraction * groups), at least one and not all.
    salt: another salt gives another choice.

  Raises:
    ValueError: if `fraction` is not between 0 and 1 or there are fewer than two groups.
  """
  if not 0 < fraction < 1:
    raise ValueError(f"fraction: must be between 0 and 1, got {fraction}")
  names = np.unique(groups)
  if len(names) < 2:
    raise ValueError(f"groups: at least two are needed to hold one out, got {len(names)}")
  count = min(max(1, round(fraction * len(names))), len(names) - 1)
  order = sorted(names, key=lambda name: hashlib.sha256(f"{salt}:{name}".encode()).digest())
  return np.isin(groups, order[:count])


def _stratified_split(y, fraction):
  """Marks about `fraction` of the rows of each class, evenly spaced; a class with one row stays in the fitting part."""
  held_out = np.zeros(len(y), bool)
  for label in np.unique(y):
    rows = np.flatnonzero(y == label)
    count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    held_out[rows[np.linspace(0, len(rows) - 1, count + 2).round().astype(int)[1:-1]] if count else []] = True
  return held_out


@dataclasses.dataclass(frozen=True)
class FittedProbe:
  """A linear classifier of embeddings, which can be tested on any number of sets.

  Attributes:
    logits: [M, D] -> [M, K], of which the softmax are probabilities.
    classes: [K] labels it can name.
    width: D.
    groups: the groups of the training rows, which no test row may share; None for no groups.
    c: the chosen inverse strength of the penalty.
    val_accuracy: percent on the validation part at that strength; NaN for a single strength.
  """

  logits: Callable[[np.ndarray], np.ndarray] = dataclasses.field(repr=False)
  classes: np.ndarray
  width: int
  groups: np.ndarray | None
  c: float
  val_accuracy: float

  def test(
    self,
    x: Float[np.ndarray, "..."],
    y: Shaped[np.ndarray, "..."],
    *,
    groups: Shaped[np.ndarray, "..."] | None = None,
  ) -> ProbeResult:
    """The result on rows that took no part in fitting.

    Args:
      x: [M, D].
      y: [M].
      groups: [M]; if given, none may be a group of the training rows.

    Raises:
      ValueError: on empty or non-finite embeddings, another length or width, a label without training rows, or a group
        on both sides.
    """
    x, y = base.finite_rows("test embeddings", x), np.asarray(y)
    base.check_lengths(test_x=x, test_y=y, test_groups=groups)
    if x.shape[1] != self.width:
      raise ValueError(f"embeddings must have one width, got {{'train': {self.width}, 'test': {x.shape[1]}}}")
    _check_known(y, self.classes)
    if groups is not None:
      if self.groups is None:
        raise ValueError("test_groups needs groups of the training rows to be compared with")
      both = np.intersect1d(self.groups, groups)
      if len(both):
        raise ValueError(f"groups: {len(both)} are in training and test, first {str(both[0])!r}")
    logits = self.logits(x)
    predictions = self.classes[logits.argmax(axis=1)]
    return result_of(predictions, y, len(self.classes), probabilities=softmax(logits, axis=1), c=self.c,
                     val_accuracy=self.val_accuracy)  # fmt: skip


def fit_probe(
  train_x: Float[np.ndarray, "..."],
  train_y: Shaped[np.ndarray, "..."],
  *,
  c_grid: Sequence[float] = C_GRID,
  groups: Shaped[np.ndarray, "..."] | None = None,
  content: Int[np.ndarray, "n"] | None = None,
  val: tuple[np.ndarray, np.ndarray] | None = None,
  val_fraction: float = 0.2,
  max_iter: int = 300,
) -> FittedProbe:
  """Multinomial logistic regression on frozen embeddings, standardised by the training rows' mean and deviation.

  The penalty is chosen on a validation part: `val` if given, else `val_fraction` of the training rows (whole groups
  when `groups` are given, by class otherwise), after which the classifier is fitted once more on all training rows.
  Test rows take no part in the choice.

  Args:
    train_x: [N, D].
    train_y: [N] labels.
    c_grid: inverse strengths of the penalty to try; one value skips the choice.
    groups: [N], rows of one group stay on one side of the validation split (concepts, when the artist is predicted).
    content: [N], rows of one content (of several labels) stay on one side too; None for rows of their own.
    val: validation rows and labels, instead of a part of the training rows.
    val_fraction: of the training rows or groups.
    max_iter: iterations of L-BFGS.

  Raises:
    ValueError: on empty or non-finite embeddings, differing lengths or widths, fewer than two classes, an empty grid or
      one not above zero, or a validation part none of whose classes is left to fit.
  """
  train_x, train_y = base.finite_rows("train embeddings", train_x), np.asarray(train_y)
  base.check_lengths(train_x=train_x, train_y=train_y, groups=groups)
  grid, classes = sorted(float(c) for c in c_grid), np.unique(train_y)
  if not grid or not grid[0] > 0:
    raise ValueError(f"c_grid: values above zero are needed, got {tuple(c_grid)}")
  if len(classes) < 2:
    raise ValueError(f"train labels: a probe needs at least two classes, got only {str(train_y[0])!r}")
  groups = None if groups is None else np.asarray(groups)
  c, val_accuracy = grid[0], float("nan")
  if len(grid) > 1:
    c, val_accuracy = _choose_c(train_x, train_y, grid, groups, content, val, val_fraction, max_iter)
  scale, fitted = _fitted(train_x, train_y, [c], max_iter)
  model = next(fitted)


  def logits(rows):
    decided = model.decision_function(scale(rows))
    return decided if decided.ndim == 2 else np.stack([np.zeros_like(decided), decided], axis=1)  # of two classes

  return FittedProbe(logits, classes, train_x.shape[1], groups, c, val_accuracy)


def linear_probe(
  train_x: Float[np.ndarray, "..."],
  train_y: Shaped[np.ndarray, "..."],
  test_x: Float[np.ndarray, "..."],
  test_y: Shaped[np.ndarray, "..."],
  *,
  test_groups: Shaped[np.ndarray, "..."] | None = None,
  **options: Any,
) -> ProbeResult:
  """`fit_probe` and the result on one set.

  Args:
    train_x: [N, D].
    train_y: [N] labels.
    test_x: [M, D].
    test_y: [M].
    test_groups: [M]; if given, none may occur among the option `groups`.
    **options: of `fit_probe`.

  Raises:
    ValueError: as `fit_probe` and `FittedProbe.test`.
  """
  train_x, train_y, test_x, test_y = check_rows(train_x, train_y, test_x, test_y)
  return fit_probe(train_x, train_y, **options).test(test_x, test_y, groups=test_groups)


def _choose_c(x, y, grid, groups, content, val, fraction, max_iter):
  if val is not None:
    fit_x, fit_y, val_x, val_y = x, y, base.finite_rows("validation embeddings", val[0]), np.asarray(val[1])
    base.check_widths(train=x, validation=val_x)
    base.check_lengths(val_x=val_x, val_y=val_y)
  else:
    held_out = grouped_split(groups, fraction) if groups is not None else _stratified_split(y, fraction)
    held_out = held_out if content is None else np.isin(content, content[held_out])
    fit_x, fit_y, val_x, val_y = x[~held_out], y[~held_out], x[held_out], y[held_out]
  if not len(val_y):
    raise base.LeftOutError("validation: each label has one training row alone, so that none can be held out")
  known = np.isin(val_y, fit_y)
  if not known.any() or len(np.unique(fit_y)) < 2:
    raise base.LeftOutError(
      f"validation: none of its {len(np.unique(val_y))} labels can be told by the {len(np.unique(fit_y))} left to fit"
      + (" (each label lies in one group)" if groups is not None else "")
    )
  scale, fitted = _fitted(fit_x, fit_y, grid, max_iter)
  val_x, val_y = scale(val_x[known]), val_y[known]
  best, best_c, worse = -1.0, grid[0], 0
  for c, model in zip(grid, fitted):
    accuracy = 100.0 * float(np.mean(model.predict(val_x) == val_y))
    best, best_c, worse = (accuracy, c, 0) if accuracy > best else (best, best_c, worse + 1)
    if worse == 2:
      break
  if best_c in (grid[0], grid[-1]):
    logging.debug("linear probe: C=%g, at the end of the grid, was best on validation; the best may lie beyond", best_c)
  return best_c, best


def _fitted(x, y, grid, max_iter):
  """The standardisation of `x`, and an iterator over classifiers, one a value of C, each started from the last."""
  mean, deviation = x.mean(axis=0), x.std(axis=0)
  deviation = np.where(deviation > 1e-6 * max(float(deviation.max()), 1e-30), deviation, 1.0).astype(np.float32)
  standard = (x - mean) / deviation

  def fits():
    model = LogisticRegression(max_iter=max_iter, warm_start=True, tol=1e-4)
    for c in grid:
      model.set_params(C=c)
      # The products are small: BLAS threads cost more by waiting than they save (12 times, on a busy machine).
      with threadpool_limits(1, user_api="blas"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%")
        model.fit(standard, y)
      if model.n_iter_.max() >= max_iter:
        logging.info("linear probe: C=%g stopped after %d iterations, before it converged", c, max_iter)
      yield model

  return lambda rows: (rows - mean) / deviation, fits()


@dataclasses.dataclass(frozen=True)
class LinearProbe:
  """Linear probe of each part: `probe/<field>/<modality>/<part>` and `.../<part>/balanced`, percent.

  Each content (column `_content`) counts once, and its copies lie on one side of every split.

  Attributes:
    modality: which modality.
    train: table the probe is fitted on, once for all evaluated sets; None holds out `test_fraction` of the groups of
      the evaluated set and fits on the rest.
    field: column of the label, `family` for example.
    group: column of the groups held out together (`label`: concepts); needed without `train`. With `train`, groups
      decide the validation split and may not occur on both sides.
    parts: embedding columns; None takes all that the table has.
    c_grid: inverse strengths of the penalty.
    test_fraction: of the groups, without `train`.
    concept: column whose equal values intervals draw together, where the table has it.
    intervals: also yield `n`, `ways`, `low` and `high` of each accuracy (`intervals.measured`).
    keep: takes the answers of each scored item.
  """

  modality: str
  train: base.Table | None = None
  field: str = "family"
  group: str | None = "label"
  parts: Sequence[str] | None = None
  c_grid: Sequence[float] = C_GRID
  test_fraction: float = 0.4
  concept: str = "label"
  intervals: bool = False
  keep: Keep | None = dataclasses.field(default=None, compare=False)
  name: str = "probe"
  _fitted: dict[str, FittedProbe] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

  def __call__(self, table: base.Table) -> Iterator[tuple[str, float]]:
    """Yields accuracy and balanced accuracy of each part."""
    if self.train is None and self.group is None:
      raise ValueError("group: needed to hold rows out of the evaluated set; or give train")
    extra = [] if self.group is None else [self.group]
    concepts, content = base.concepts(table, self.modality, self.concept), contents.contents_of(table, self.modality)
    for part in base.parts_of(table, self.modality, self.parts):
      x, y, *groups = base.columns(table, self.modality, [part, self.field, *extra])
      if self.train is None:
        test = grouped_split(groups[0], self.test_fraction, salt="probe-test")
        test = np.isin(content, content[test])
        fitted = _fit_once(x[~test], y[~test], content[~test], groups[0][~test], self.c_grid)
        rows = np.flatnonzero(test)
        rows = rows[~np.isin(groups[0][rows], groups[0][~test])]
      else:
        fitted, rows = self._on_training_rows(part, extra), np.arange(len(x))
      result = fitted.test(x[rows], y[rows], groups=groups[0][rows] if extra else None)
      result = dataclasses.replace(result, rows=rows)
      name = f"{self.name}/{self.field}/{self.modality}/{part}"
      if self.keep:
        self.keep(self._answers(name, table, result, content, fitted.classes))
      yield from measured_result(name, result, content, concepts, balanced=True, intervals=self.intervals)

  def _answers(
    self, name: str, table: base.Table, result: ProbeResult, content: np.ndarray, classes: np.ndarray
  ) -> Answers:
    kept = contents.once(content[result.rows], (result.predictions != result.targets).astype(np.int8))
    found, scores = top(result.probabilities[kept])
    names = list(map(str, classes))
    truth = list(map(str, result.targets[kept]))
    right = classes[found] == result.targets[kept][:, None]
    ids = ids_of(table, self.modality, result.rows[kept])
    return Answers(name, self.modality, ids, (), truth, found, names, scores, right)

  def _on_training_rows(self, part: str, extra: Sequence[str]) -> FittedProbe:
    """The probe of a part of the training rows, fitted once for all evaluated sets."""
    if part not in self._fitted:
      x, y, *groups = base.columns(self.train, self.modality, [part, self.field, *extra])
      content = contents.contents_of(self.train, self.modality)
      self._fitted[part] = _fit_once(x, y, content, groups[0] if extra else None, self.c_grid)
    return self._fitted[part]


def _fit_once(x, y, content, groups, c_grid):
  """A probe of rows of which each content counts once for each of its labels."""
  kept = contents.once_each(content, y)
  groups, content = None if groups is None else groups[kept], content[kept]
  content = content if len(contents.once(content)) < len(content) else None
  return fit_probe(x[kept], y[kept], c_grid=c_grid, groups=groups, content=content)

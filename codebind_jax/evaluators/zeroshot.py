"""Zero-shot classification: an item takes the class whose text embedding is nearest."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Float32, Int

from codebind_jax.evaluators import base, contents
from codebind_jax.evaluators.answers import Answers, Keep, best, ids_of
from codebind_jax.evaluators.intervals import about, bootstrap_interval, measured

# Cosines closer than this count as equal: float32 sums of the same products differ by about 1e-7 with their order.
TIE = 1e-6

EmbedText = Callable[[list[str]], np.ndarray]


def class_embeddings(
  embed_text: EmbedText, labels: Sequence[str], templates: Sequence[str]
) -> Float32[np.ndarray, "k d"]:
  """One embedding a class: templates filled with its label, embedded, normalised, averaged, normalised again (CLIP).

  Args:
    embed_text: list of texts -> their `shared` embeddings [number of texts, D]; called once a template.
    labels: K distinct class names.
    templates: strings with one `{}` each, such as `"an image of {}"`.

  Returns:
    [K, D], rows of unit length.

  Raises:
    ValueError: if there is no class or template, a class is empty or named twice (also
      where case or blanks differ), a template has no `{}`, or an
      embedding is not finite.
  """
  if not len(labels):
    raise ValueError("labels: the class list is empty")
  if not len(templates):
    raise ValueError('templates: the list is empty; use ("{}",) for the bare label')
  for what, texts in (("labels", labels), ("templates", templates)):
    for text in texts:
      if not isinstance(text, str):
        raise ValueError(f"{what}: got {text!r:.60}; allowed: texts")
  for label in labels:
    if not label.strip():
      raise ValueError(f"labels: a class name is empty, got {list(labels)!r}")
  name, count = collections.Counter(labels).most_common(1)[0]
  if count > 1:
    raise ValueError(f"labels: {name!r} is named {count} times; every class once")
  first: dict[str, str] = {}
  for label in labels:
    if (other := first.setdefault(base.plain_text(label), label)) != label:
      raise ValueError(f"labels: {other!r} and {label!r} are one class but for case and blanks; every class once")
  for template in templates:
    if "{}" not in template:
      raise ValueError(f"templates: {template!r} has no {{}} for the label")
  total = None
  for template in templates:
    embedded = base.unit_rows(
      f"text embeddings of template {template!r}", embed_text([template.replace("{}", label) for label in labels])
    )
    if len(embedded) != len(labels):
      raise ValueError(f"embed_text gave {len(embedded)} rows for {len(labels)} texts (template {template!r})")
    total = embedded if total is None else total + embedded
  return base.unit_rows("mean text embeddings", total)


def class_ranks(
  scores: Float[np.ndarray, "n k"], targets: Int[np.ndarray, "n"], *, tie: float = TIE
) -> Int[np.ndarray, "n"]:
  """How many other classes score at least as high as the right one: 0 is best, and ties count against the model.

  Args:
    scores: one score a class.
    targets: index of the right class.
    tie: scores closer than this are equal.

  Returns:
    Ranks from 0 to K - 1. A model that gives all classes one score gets K - 1 everywhere.
  """
  right = np.take_along_axis(scores, targets[:, None], axis=1)
  return (scores >= right - tie).sum(axis=1) - 1


def topk_accuracy(
  image_emb: Float[np.ndarray, "..."],
  class_emb: Float[np.ndarray, "..."],
  targets: Int[np.ndarray, "..."],
  ks: Sequence[int] = (1, 5),
  mask: Bool[np.ndarray, "n"] | None = None,
) -> dict[str, float]:
  """Share of items whose right class is among the k most similar, in percent; ties count as wrong (`class_ranks`).

  Args:
    image_emb: items [N, D] of any modality, any length of vector.
    class_emb: classes [K, D].
    targets: index [N] of the right class, in 0 ... K - 1.
    ks: the k; with k >= K the result is 100.
    mask: [N], False on padding rows.

  Returns:
    `{"top1": ..., "top5": ...}`, 0 ... 100.

  Raises:
    ValueError: on empty or non-finite embeddings, differing lengths or widths, a target that is no class, or k below 1.
  """
  ranks = _ranks(image_emb, class_emb, targets, mask)
  for k in ks:
    if k < 1:
      raise ValueError(f"ks: every k must be at least 1, got {k}")
  return {f"top{k}": 100.0 * float(np.mean(ranks < k)) for k in ks}


def _ranks(image_emb, class_emb, targets, mask):
  base.check_lengths(embeddings=image_emb, targets=targets)
  image_emb, targets = base.apply_mask(mask, image_emb, targets)
  image_emb, class_emb = base.unit_rows("embeddings", image_emb), base.unit_rows("class embeddings", class_emb)
  base.check_widths(embeddings=image_emb, classes=class_emb)
  wrong = (targets < 0) | (targets >= len(class_emb))
  if wrong.any():
    raise ValueError(
      f"targets: {int(targets[wrong][0])} at row {int(np.argmax(wrong))} is not one of the {len(class_emb)} classes"
    )
  block = max(1, (1 << 24) // len(class_emb))
  starts = range(0, len(image_emb), block)
  return np.concatenate([class_ranks(image_emb[i : i + block] @ class_emb.T, targets[i : i + block]) for i in starts])


def label_indices(values: Sequence[str] | np.ndarray, labels: Sequence[str]) -> Int[np.ndarray, "n"]:
  """Index of each value in the list of classes.

  Raises:
    ValueError: if the list is empty or a value is not in it, naming the value and the row.
  """
  if not len(labels):
    raise ValueError("labels: the class list is empty")
  index = {label: i for i, label in enumerate(labels)}
  for row, value in enumerate(values):
    if value not in index:
      shown = ", ".join(repr(str(label)) for label in list(labels)[:8]) + (", ..." if len(labels) > 8 else "")
      raise ValueError(f"label {str(value)!r} (row {row}) is not among the {len(labels)} classes: {shown}")
  return np.array([index[value] for value in values], np.int64)


def average_precision(
  scores: Float[np.ndarray, "..."], targets: Bool[np.ndarray, "..."], mask: Bool[np.ndarray, "n"] | None = None
) -> Float[np.ndarray, "k"]:
  """Average precision of each class, in percent: precision times the step in recall, summed; ties share a threshold.

  Args:
    scores: [N, K], higher is more likely.
    targets: [N, K], True where the class applies; several may.
    mask: [N], False on padding rows.

  Returns:
    [K]; NaN for a class without any positive.

  Raises:
    ValueError: if shapes differ, scores are not finite, or no class has a positive.
  """
  base.check_lengths(scores=scores, targets=targets)
  scores, targets = base.apply_mask(mask, scores, targets)
  scores = base.finite_rows("scores", scores)
  if scores.shape != targets.shape:
    raise ValueError(f"scores and targets must have one shape, got {scores.shape} and {targets.shape}")
  if not targets.any():
    raise ValueError("targets: no class has a positive item")
  return 100.0 * np.array([_average_precision(scores[:, k], targets[:, k]) for k in range(scores.shape[1])])


def _average_precision(scores, targets):
  positives = targets.sum()
  if not positives:
    return np.nan
  order = np.argsort(-scores, kind="stable")
  scores, hits = scores[order], np.cumsum(targets[order])
  last = np.append(scores[1:] != scores[:-1], True)
  precision, recall = hits[last] / (np.flatnonzero(last) + 1), hits[last] / positives
  return float(np.sum(precision * np.diff(recall, prepend=0.0)))


def mean_average_precision(
  scores: Float[np.ndarray, "..."], targets: Bool[np.ndarray, "..."], mask: Bool[np.ndarray, "n"] | None = None
) -> float:
  """Mean over classes of `average_precision`, in percent; classes without a positive item are left out and logged."""
  per_class = average_precision(scores, targets, mask)
  empty = np.flatnonzero(np.isnan(per_class))
  if len(empty):
    logging.warning("mAP: %d of %d classes have no positive item (first %d)", len(empty), len(per_class), empty[0])
  return float(np.nanmean(per_class))


@dataclasses.dataclass(frozen=True)
class ZeroShot:
  """Classifies one modality by text: `zeroshot/<modality>/top1`, `top5`, or `map` where rows have several labels.

  `.../balanced` is the mean accuracy over the classes that occur, so that big classes do not decide. A content that is
  in several rows (column `_content`) counts once, and is right if it is given any of their labels.

  Attributes:
    modality: the modality to classify.
    labels: the candidate classes, K names.
    embed_text: list of texts -> `shared` embeddings, with the parameters being evaluated.
    templates: prompt templates with one `{}` each.
    ks: the k of top-k; those at or above K are left out, except k = 1.
    field: column with the right class of each row: its name, or for several labels boolean [N, K] in the order of
      `labels`.
    slices: columns (`style`, `family`) each of whose values also gets its accuracy:
      `zeroshot/<modality>/<column>=<value>/top1`.
    intervals: also yield `.../top1/n`, `ways`, `low` and `high` and so on: rows, classes, and the ends of a 95 %
      interval that draws whole classes, since rows of one class meet the same prompt (`intervals.percentage_interval`).
    keep: takes the answers of each item with one label.
  """

  modality: str
  labels: Sequence[str]
  embed_text: EmbedText
  templates: Sequence[str] = ("{}",)
  ks: Sequence[int] = (1, 5)
  field: str = "label"
  slices: Sequence[str] = ()
  intervals: bool = False
  keep: Keep | None = dataclasses.field(default=None, compare=False)
  name: str = "zeroshot"

  def __call__(self, table: base.Table) -> Iterator[tuple[str, float]]:
    """Yields the accuracies, or the mean average precision."""
    shared, right, *slices = base.columns(table, self.modality, ["shared", self.field, *self.slices])
    classes = class_embeddings(self.embed_text, self.labels, self.templates)
    start = f"{self.name}/{self.modality}"
    if right.ndim == 2:
      shared = base.unit_rows(f"{self.modality} shared", shared)
      base.check_widths(embeddings=shared, classes=classes)
      kept = contents.once(contents.contents_of(table, self.modality))
      scores, right = shared[kept] @ classes.T, right[kept].astype(bool)
      yield f"{start}/map", mean_average_precision(scores, right)
      if self.intervals:
        per_class = average_precision(scores, right)
        low, high = bootstrap_interval(per_class[~np.isnan(per_class)])
        yield from about(f"{start}/map", len(scores), len(classes), low, high)
      return
    ranks = _ranks(shared, classes, label_indices(right, self.labels), None)
    kept = contents.once(contents.contents_of(table, self.modality), ranks)
    if self.keep:
      units = base.unit_rows(f"{self.modality} shared", shared[kept])
      found, scores = best(units, classes)
      names, own = list(map(str, self.labels)), label_indices(right[kept], self.labels)
      truth = [names[n] for n in own]
      ids = ids_of(table, self.modality, kept)
      self.keep(Answers(start, self.modality, ids, (), truth, found, names, scores, found == own[:, None]))
    ranks, right, slices = ranks[kept], right[kept], [values[kept] for values in slices]
    ks = [k for k in self.ks if k == 1 or k < len(classes)]
    numbers = functools.partial(measured, ways=len(classes), intervals=self.intervals)
    for k in ks:
      yield from numbers(f"{start}/top{k}", 100.0 * (ranks < k), groups=right)
    yield from numbers(f"{start}/balanced", 100.0 * (ranks < 1), groups=right, weights=base.class_weights(right))
    for column, values in zip(self.slices, slices):
      for value in np.unique(values):
        of = values == value
        yield from numbers(f"{start}/{column}={value}/top1", 100.0 * (ranks[of] < 1), groups=right[of])

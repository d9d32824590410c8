"""Cross-modal generalisation: a linear head learned on one modality's embeddings, tested on another's (CMG)."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import RidgeClassifier


def fit_head(x: Float[np.ndarray, "n d"], labels: np.ndarray) -> RidgeClassifier:
  """A linear head by regularised least squares, which has a closed form: no seed, no learning rate."""
  return RidgeClassifier(alpha=1.0).fit(x, labels)


def transfer(
  train: Mapping[str, Float[np.ndarray, "n _"]], test: Mapping[str, Float[np.ndarray, "m _"]],
  train_labels: Mapping[str, np.ndarray], test_labels: Mapping[str, np.ndarray],
) -> dict[tuple[str, str], float]:
  """Accuracy in % of a head fitted on modality a's training rows, on modality b's test rows, for all (a, b).

  Arguments are those of `transfer_answers`.
  """
  answers = transfer_answers(train, test, train_labels, test_labels)
  return {pair: 100.0 * float(np.mean(right)) for pair, (_, right) in answers.items()}


def transfer_answers(
  train: Mapping[str, Float[np.ndarray, "n _"]], test: Mapping[str, Float[np.ndarray, "m _"]],
  train_labels: Mapping[str, np.ndarray], test_labels: Mapping[str, np.ndarray],
) -> dict[tuple[str, str], tuple[np.ndarray, Bool[np.ndarray, "_"]]]:
  """(a, b) -> (label, whether the head of modality a names it rightly) of each tested row of modality b.

  A head is fitted and tested on the labels that a's training rows and b's test rows share; pairs that share fewer than
  two are left out.

  Args:
    train: modality -> embeddings, of one width for modalities that are compared.
    test: likewise.
    train_labels: modality -> label of each row.
    test_labels: likewise.
  """
  answers: dict[tuple[str, str], tuple[np.ndarray, Bool[np.ndarray, "_"]]] = {}
  for a, x in train.items():
    heads: dict[tuple[str, ...], RidgeClassifier] = {}
    for b, y in test.items():
      common = np.intersect1d(train_labels[a], test_labels[b])
      if len(common) < 2:
        continue
      fit_rows, test_rows = np.isin(train_labels[a], common), np.isin(test_labels[b], common)
      if (key := tuple(common)) not in heads:
        heads[key] = fit_head(x[fit_rows], train_labels[a][fit_rows])
      labels = test_labels[b][test_rows]
      answers[a, b] = labels, heads[key].predict(y[test_rows]) == labels
  return answers


def error_over_labels(answers: Collection[tuple[np.ndarray, Bool[np.ndarray, "_"]]]) -> float:
  """Standard error in points of a mean accuracy, over its labels: what other labels of the kind might have given.

  Args:
    answers: (label, whether it was named rightly) of the rows of each pair; a label counts with its mean over them.
  """
  by_label: dict[Any, list[float]] = {}
  for labels, right in answers:
    for label in np.unique(labels):
      by_label.setdefault(label, []).append(100.0 * float(np.mean(right[labels == label])))
  means = [float(np.mean(values)) for values in by_label.values()]
  return float(np.std(means, ddof=1) / np.sqrt(len(means)))


def recall_at_one(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "n d"]) -> float:
  """Share in % of rows of `a` whose nearest row of `b`, by cosine, is their partner; mean of both directions."""
  scores = a @ b.T
  own = np.arange(len(a))
  return 50.0 * float(np.mean(scores.argmax(1) == own) + np.mean(scores.argmax(0) == own))


def code_users(codes: Mapping[str, Int[np.ndarray, "..."]], size: int) -> Float[np.ndarray, "m _k"]:
  """Share of each modality in the uses of every used code, as if all modalities had equally many rows.

  Args:
    codes: modality -> codes that it chose.
    size: of the codebook.
  """
  counts = np.stack([np.bincount(np.ravel(x), minlength=size) / max(np.size(x), 1) for x in codes.values()])
  total = counts.sum(0)
  return counts[:, total > 0] / total[total > 0]


def code_sharing(a: Int[np.ndarray, "..."], b: Int[np.ndarray, "..."], codes: int) -> tuple[float, float]:
  """(shared, single): shares in % of the codes in use that both modalities use, or only one (DCID, figure 4).

  A code is shared if either modality makes more than 20 % of its assignments, single if one makes more than 80 %.

  Args:
    a: codes that one modality chose.
    b: codes of the other.
    codes: size of the codebook.
  """
  share = code_users({"a": a, "b": b}, codes)
  if not share.size:
    return 0.0, 0.0
  return 100.0 * float(np.mean(share.min(0) > 0.2)), 100.0 * float(np.mean(share.max(0) > 0.8))


def sharing_sets(codes: Mapping[str, Int[np.ndarray, "..."]], size: int) -> dict[str, float]:
  """`a+b` -> share in % of the codes in use that exactly these modalities use.

  A modality uses a code if it makes more than 0.4 / m of its assignments, m the number of modalities: with two, the
  20 % of DCID's figure 4.

  Args:
    codes: modality -> codes that it chose.
    size: of the codebook.
  """
  share = code_users(codes, size)
  users = share > 0.4 / len(codes)
  names = list(codes)
  shares = {}
  for count in range(1, len(names) + 1):
    for group in itertools.combinations(range(len(names)), count):
      exactly = np.all(users == np.isin(np.arange(len(names)), group)[:, None], axis=0)
      if exactly.any():
        shares["+".join(names[i] for i in group)] = 100.0 * float(np.mean(exactly))
  return shares

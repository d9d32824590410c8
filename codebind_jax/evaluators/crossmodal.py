"""Cross-modal generalisation: a linear head learned on one modality's embeddings, tested on another's (CMG)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from sklearn.linear_model import RidgeClassifier


def fit_head(x: Float[np.ndarray, "n d"], labels: np.ndarray) -> RidgeClassifier:
  """A linear head by regularised least squares, which has a closed form: no seed, no learning rate."""
  return RidgeClassifier(alpha=1.0).fit(x, labels)


def transfer(
  train: Mapping[str, Float[np.ndarray, "n _"]], test: Mapping[str, Float[np.ndarray, "m _"]],
  train_labels: Mapping[str, np.ndarray], test_labels: Mapping[str, np.ndarray],
) -> dict[tuple[str, str], float]:
  """Accuracy in % of a head fitted on modality a's training rows, on modality b's test rows, for all (a, b).

  Args:
    train: modality -> embeddings, of one width wherever they are to be compared.
    test: likewise.
    train_labels: modality -> label of each row.
    test_labels: likewise.
  """
  found = {}
  for a, x in train.items():
    head = fit_head(x, train_labels[a])
    for b, y in test.items():
      found[a, b] = 100.0 * float(np.mean(head.predict(y) == test_labels[b]))
  return found


def recall_at_one(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "n d"]) -> float:
  """Share in % of rows of `a` whose nearest row of `b`, by cosine, is their own; mean of both directions."""
  scores = a @ b.T
  own = np.arange(len(a))
  return 50.0 * float(np.mean(scores.argmax(1) == own) + np.mean(scores.argmax(0) == own))


def code_sharing(a: Int[np.ndarray, "..."], b: Int[np.ndarray, "..."], codes: int) -> tuple[float, float]:
  """(shared, single): shares in % of the codes in use that both modalities use, or one alone (DCID, figure 4).

  A code is shared if either modality makes more than 20 % of its assignments, single if one makes more than 80 %.

  Args:
    a: codes that one modality chose, as many as `b`.
    b: codes of the other.
    codes: size of the codebook.
  """
  counts = np.stack([np.bincount(np.ravel(x), minlength=codes) for x in (a, b)]).astype(float)
  total = counts.sum(0)
  used = total > 0
  if not used.any():
    return 0.0, 0.0
  share = counts[:, used] / total[used]
  return 100.0 * float(np.mean(share.min(0) > 0.2)), 100.0 * float(np.mean(share.max(0) > 0.8))

"""Decomposition into shared and specific parts, judged by probes where the factors of the data are known."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from codebind_jax.evaluators import base

PRIVATE = "private"


def chance(values: Shaped[np.ndarray, "n"]) -> float:
  """Accuracy in % of always naming the most frequent value."""
  return 100.0 * float(np.unique(values, return_counts=True)[1].max()) / len(values)


def fields_of(probes: Sequence[str], modality: str) -> dict[str, str]:
  """Factor -> field of the row: shared factors under their own name, the modality's private factor as `PRIVATE`.

  Args:
    probes: fields; one with `{modality}` in its name is a factor that only this modality shows.
    modality: the modality.
  """
  return {PRIVATE if "{modality}" in field else field: field.format(modality=modality) for field in probes}


def decomposition(scores: Mapping[str, float], table: base.Table, probes: Sequence[str]) -> Iterator[tuple[str, float]]:
  """How much of a factor its own part keeps, and how much leaks into the other part.

  A shared factor belongs into `shared`, a modality's private one into `specific`. The reference is the same probe on
  `full`, all latents of the modality.

  Args:
    scores: accuracies of linear probes, percent, `probe/<field>/<modality>/<part>` (`evaluators.probe.LinearProbe`).
    table: the set they were measured on, for the chance of each factor.
    probes: fields of the factors; those with `{modality}` are private.

  Yields:
    `decomposition/<modality>/<factor>/kept`, points above chance that the right part reaches, in percent of those that
    `full` reaches (of one point at least), and `.../leaked`, points above chance that the wrong part reaches; then over
    all modalities the means `decomposition/<factor>/kept` and `leaked`, and the worst of each, `kept_least` and
    `leaked_most`.
  """
  kept: dict[str, list[float]] = {}
  leaked: dict[str, list[float]] = {}
  for modality, columns in table.items():
    for factor, field in fields_of(probes, modality).items():
      name = f"probe/{field}/{modality}"
      right, wrong = ("specific", "shared") if factor == PRIVATE else ("shared", "specific")
      if not all(f"{name}/{part}" in scores for part in base.PARTS):
        continue
      own, other, whole = (scores[f"{name}/{part}"] - chance(columns[field]) for part in (right, wrong, "full"))
      kept.setdefault(factor, []).append(100.0 * own / max(whole, 1.0))
      leaked.setdefault(factor, []).append(other)
      yield f"decomposition/{modality}/{factor}/kept", kept[factor][-1]
      yield f"decomposition/{modality}/{factor}/leaked", leaked[factor][-1]
  for factor in kept:
    yield f"decomposition/{factor}/kept", float(np.mean(kept[factor]))
    yield f"decomposition/{factor}/kept_least", min(kept[factor])
    yield f"decomposition/{factor}/leaked", float(np.mean(leaked[factor]))
    yield f"decomposition/{factor}/leaked_most", max(leaked[factor])

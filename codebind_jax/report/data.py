"""What a report is made of: plain records that a trainer fills in, and builders for the parts that need computing."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

from codebind_jax.evaluators import base
from codebind_jax.evaluators.intervals import wilson_interval


@dataclasses.dataclass(frozen=True)
class Run:
  """A training run whose curves are drawn.

  Attributes:
    name: shown in legends.
    records: lines of its metrics file (`metrics.read_metrics`).
  """

  name: str
  records: Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Score:
  """One headline number beside its baseline.

  Attributes:
    metric: rows of one metric form a group: "Zero-shot top-1".
    on: the evaluation set: "unseen artists (550 ways)".
    value: of the run reported, in `unit`.
    baseline: the baseline's number.
    chance: the number of a model that guesses.
    interval: lower and upper end of the 95 % confidence interval.
    spread: standard deviation over seeds, if `value` is their mean.
    unit: "%" or "".
    higher_is_better: which sign of the difference is good.
    averaged: whether the row counts in the mean of its group.
  """

  metric: str
  on: str
  value: float
  baseline: float | None = None
  chance: float | None = None
  interval: tuple[float, float] | None = None
  spread: float | None = None
  unit: str = "%"
  higher_is_better: bool = True
  averaged: bool = True


@dataclasses.dataclass(frozen=True)
class Item:
  """A query or an answer of the gallery: a text, an image, or an image with a caption.

  Attributes:
    text: what is written; the caption of an image.
    image: [h, w, 3] uint8.
    right: whether it answers the query; None for queries.
    score: cosine to the query.
  """

  text: str = ""
  image: UInt8[np.ndarray, "h w c"] | None = None
  right: bool | None = None
  score: float | None = None


@dataclasses.dataclass(frozen=True)
class Query:
  """A query and its nearest answers, best first."""

  asked: Item
  answers: Sequence[Item]


@dataclasses.dataclass(frozen=True)
class EmbeddingMap:
  """Embeddings of several modalities in the plane.

  Attributes:
    title: "Before training".
    points: modality -> [N, 2].
    pairs: [P, 2], rows of the first and second modality joined by a line.
    note: how the plane was made, how far apart pairs are.
  """

  title: str
  points: Mapping[str, Float[np.ndarray, "_ 2"]]
  pairs: Int[np.ndarray, "p 2"]
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Attribution:
  """Credit for data or pretrained weights."""

  source: str
  licence: str
  credit: str


@dataclasses.dataclass(frozen=True)
class ReportData:
  """Everything on the page; empty parts are left out, which the page says.

  Attributes:
    title: heading of the page.
    summary: a sentence or two on what was run and found.
    command: the line that repeats it.
    config: settings, nested or flat.
    environment: versions and machine, by name.
    seconds: time taken by phase, in order.
    data_profile: name of the data profile and why it was chosen.
    data_counts: number of items by split, in order.
    run: the run reported.
    baseline: the run it is compared with.
    scores: headline numbers.
    codebook_sizes: number of codes by codebook.
    code_counts: how often each code was used on the training data, [K] by codebook.
    shared_counts: how often each modality used each shared code, [K] by modality.
    text_queries: texts and the images found.
    image_queries: images and the texts found.
    maps: embedding maps, first before and then after training.
    attributions: of the data and of pretrained weights.
    notes: further paragraphs (what is rendered, what to be careful about).
  """

  title: str
  run: Run
  summary: str = ""
  command: str = ""
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
  seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
  data_profile: str = ""
  data_counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
  baseline: Run | None = None
  scores: Sequence[Score] = ()
  codebook_sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  code_counts: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  shared_counts: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  text_queries: Sequence[Query] = ()
  image_queries: Sequence[Query] = ()
  maps: Sequence[EmbeddingMap] = ()
  attributions: Sequence[Attribution] = ()
  notes: Sequence[str] = ()


def scores_from_metrics(
  measured: Mapping[str, float],
  baseline: Mapping[str, float] | None = None,
  *,
  metrics: Mapping[str, str],
  sets: Mapping[str, str],
  counts: Mapping[str, int] | None = None,
  chance: Mapping[str, float] | None = None,
) -> list[Score]:
  """Headline rows out of metrics named `eval/<set>/<metric>`; pairs that were not measured are left out.

  Args:
    measured: metrics of the run.
    baseline: metrics of the baseline under the same names.
    metrics: title by metric, such as `{"zeroshot/image/top1": "Zero-shot top-1"}`; percentages.
    sets: title by set, such as `{"test_artist": "unseen artists"}`.
    counts: test items by `<set>/<metric>`, for the Wilson intervals of metrics that come without `<name>/low` and
      `<name>/high` of their own.
    chance: percentage of a guess, by `<set>/<metric>`.
  """
  rows = []
  for metric, title in metrics.items():
    for name, on in sets.items():
      key = f"eval/{name}/{metric}"
      if key not in measured:
        continue
      interval, count = None, (counts or {}).get(f"{name}/{metric}")
      if f"{key}/low" in measured:
        interval = float(measured[f"{key}/low"]), float(measured[f"{key}/high"])
      elif count:
        interval = wilson_interval(float(measured[key]), count)
      other = None if baseline is None or key not in baseline else float(baseline[key])
      rows.append(Score(title, on, float(measured[key]), other, (chance or {}).get(f"{name}/{metric}"), interval))
  return rows


def nearest(
  query: Float[np.ndarray, "..."], gallery: Float[np.ndarray, "..."], k: int = 5
) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
  """Rows of the gallery nearest to each query by cosine, best first (ties in order), and the cosines."""
  query, gallery = base.unit_rows("query", query), base.unit_rows("gallery", gallery)
  base.check_widths(query=query, gallery=gallery)
  scores = query @ gallery.T
  order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  return order, np.take_along_axis(scores, order, axis=1)


def build_queries(
  asked: Sequence[Item],
  asked_labels: Sequence | Shaped[np.ndarray, "..."],
  asked_embeddings: Float[np.ndarray, "..."],
  found: Sequence[Item],
  found_labels: Sequence | Shaped[np.ndarray, "..."],
  found_embeddings: Float[np.ndarray, "..."],
  *,
  k: int = 5,
) -> list[Query]:
  """Each query with its k nearest answers, which are right where labels are equal.

  Args:
    asked: N queries.
    asked_labels: [N].
    asked_embeddings: [N, D].
    found: M candidate answers; a sequence may make item i when it is read.
    found_labels: [M].
    found_embeddings: [M, D].
    k: answers shown.

  Raises:
    ValueError: if lengths or widths differ, or embeddings are empty or not finite.
  """
  base.check_lengths(asked=asked, asked_labels=asked_labels, asked_embeddings=asked_embeddings)
  base.check_lengths(found=found, found_labels=found_labels, found_embeddings=found_embeddings)
  order, scores = nearest(asked_embeddings, found_embeddings, k)
  return [
    Query(
      item,
      [
        dataclasses.replace(found[int(j)], right=bool(found_labels[j] == label), score=float(score))
        for j, score in zip(rows, row_scores)
      ],
    )
    for item, label, rows, row_scores in zip(asked, asked_labels, order, scores)
  ]


def embedding_map(
  title: str,
  embeddings: Mapping[str, Float[np.ndarray, "..."]],
  pairs: Int[np.ndarray, "..."] | Iterable = (),
  *,
  method: str = "pca",
  seed: int = 0,
) -> EmbeddingMap:
  """Projects embeddings of several modalities into one plane.

  Args:
    title: "Before training".
    embeddings: modality -> [N, D]; rows are normalised first. A few hundred rows each are enough.
    pairs: [P, 2], rows of the first and of the second modality that belong together.
    method: "pca" (straight projection: distances between far groups mean something) or "tsne" (neighbourhoods by
      cosine).
    seed: of t-SNE.

  Returns:
    The map; its note names the method and the mean cosines of the pairs and of all combinations.

  Raises:
    ValueError: on an unknown method, differing widths, or rows that are empty or not finite.
  """
  if method not in ("pca", "tsne"):
    raise ValueError(f"method: 'pca' or 'tsne', got {method!r}")
  units = {modality: base.unit_rows(modality, x) for modality, x in embeddings.items()}
  base.check_widths(**units)
  joined = np.concatenate(list(units.values()))
  # Imported here: scikit-learn's projections take a while to load and only a report needs them.
  from sklearn.decomposition import PCA

  fit = PCA(2, random_state=seed).fit(joined)
  plane, note = fit.transform(joined), f"PCA, {100 * fit.explained_variance_ratio_.sum():.0f} % of the variance."
  if method == "tsne":
    from sklearn.manifold import TSNE

    perplexity = min(30.0, max(2.0, (len(joined) - 1) / 3))
    start = (1e-4 * plane / max(float(plane[:, 0].std()), 1e-12)).astype(np.float32)
    plane = TSNE(2, perplexity=perplexity, metric="cosine", init=start, random_state=seed).fit_transform(joined)
    note = "t-SNE on cosines: who is near whom matters, distances between groups do not."
  pairs = np.asarray(list(pairs), np.int64).reshape(-1, 2)
  if len(pairs):
    first, second = list(units.values())[:2]
    cosines = first @ second.T
    own = cosines[pairs[:, 0], pairs[:, 1]]
    note += f" Mean cosine of joined pairs {own.mean():.2f}, of all combinations {cosines.mean():.2f}.".replace(
      "-", "−"
    )
  ends = np.cumsum([len(x) for x in units.values()])[:-1]
  parts = np.split(plane.astype(np.float32), ends)
  return EmbeddingMap(title, dict(zip(units, parts)), pairs, note)

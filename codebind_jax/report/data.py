"""What a report is made of: plain records that a trainer fills in, and builders for the parts that need computing."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from codebind_jax.evaluators import base, contents


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
    metric: rows of one metric form a group: "Zero-shot image, top-1".
    on: the evaluation set: "icons, unseen artists".
    value: of the run reported, in `unit`.
    baseline: the baseline's number.
    chance: the number of a model that guesses.
    interval: lower and upper end of the 95 % confidence interval.
    spread: standard deviation over seeds, if `value` is their mean.
    unit: "%" or "".
    higher_is_better: which sign of the difference is good.
    averaged: whether the row counts in the mean of its group, with those of as many ways.
    n: number of rows scored.
    ways: number of candidates among which each row's answer was chosen.
    baseline_interval: the baseline's 95 % interval.
    difference: 95 % interval of `value` minus `baseline`, of both models on the same rows.
    family: what a verdict joins, such as "Zero-shot"; "" for rows that no verdict counts.
    subject: what of the family it is, such as "image".
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
  n: int | None = None
  ways: int | None = None
  baseline_interval: tuple[float, float] | None = None
  difference: tuple[float, float] | None = None
  family: str = ""
  subject: str = ""


@dataclasses.dataclass(frozen=True)
class Item:
  """A query or an answer of the gallery: a text, a picture, or a picture with a caption.

  Attributes:
    text: what is written; the caption of a picture.
    image: [h, w, 3] uint8: an image, or the drawing of another modality (`report.pictures`).
    right: whether it answers the query; None for queries.
    score: cosine to the query.
    kind: what the picture shows, such as "spectrogram of a sound": part of its text alternative.
  """

  text: str = ""
  image: UInt8[np.ndarray, "h w c"] | None = None
  right: bool | None = None
  score: float | None = None
  kind: str = ""


@dataclasses.dataclass(frozen=True)
class Query:
  """A query and its nearest answers, best first."""

  asked: Item
  answers: Sequence[Item]


@dataclasses.dataclass(frozen=True)
class Gallery:
  """Queries of one modality and what was found in another.

  Attributes:
    title: "Text to image".
    on: the set they are of.
    queries: those shown, with and without a right first answer.
    asked, found: number of all queries, and of the candidates.
    first: number of all queries whose first answer is right.
    kind: what the answers are, "pictures" or "texts".
  """

  title: str
  on: str
  queries: Sequence[Query]
  asked: int
  found: int
  first: int
  kind: Literal["pictures", "texts"] = "pictures"


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
    verdict: sentences on what was found, the most important first (`report.verdict`).
    trained: a sentence or two on what was trained on what.
    command: the line that repeats it.
    config: settings, nested or flat.
    environment: versions and machine, by name.
    seconds: time that the command took, by phase, in order.
    data_profile: name of the data profile and why it was chosen.
    data_counts: number of items by split, in order.
    run: the run reported.
    baseline: the run it is compared with.
    scores: headline numbers.
    codebook_sizes: number of codes by codebook.
    code_counts: how often each code was used on the training data, [K] by codebook.
    shared_counts: how often each modality used each shared code, [K] by modality.
    galleries: queries and what was found; the first of them are shown near the top.
    maps: embedding maps, first before and then after training.
    attributions: of the data and of pretrained weights.
    notes: further paragraphs (what is rendered, what to be careful about).
  """

  title: str
  run: Run
  verdict: Sequence[str] = ()
  trained: str = ""
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
  galleries: Sequence[Gallery] = ()
  maps: Sequence[EmbeddingMap] = ()
  attributions: Sequence[Attribution] = ()
  notes: Sequence[str] = ()


def scores_from_metrics(
  measured: Mapping[str, float],
  baseline: Mapping[str, float] | None = None,
  *,
  metrics: Mapping[str, str],
  sets: Mapping[str, str],
  differences: Mapping[str, tuple[float, float]] | None = None,
) -> list[Score]:
  """Headline rows out of metrics named `eval/<set>/<metric>`; pairs that were not measured are left out.

  Rows, candidates and interval of a metric NAME are the metrics `NAME/n`, `NAME/ways`, `NAME/low` and `NAME/high`,
  where they are there. Chance is that of a guess among the candidates, see `chance_of`.

  Args:
    measured: metrics of the run.
    baseline: metrics of the baseline under the same names.
    metrics: title by metric, such as `{"zeroshot/image/top1": "Zero-shot top-1"}`; percentages.
    sets: title by set, such as `{"test_artist": "unseen artists"}`.
    differences: 95 % interval of run minus baseline on the same rows, by `eval/<set>/<metric>`.
  """
  rows, base = [], baseline or {}
  for metric, title in metrics.items():
    for name, on in sets.items():
      key = f"eval/{name}/{metric}"
      if key not in measured:
        continue
      count = lambda end, key=key: int(measured[f"{key}/{end}"]) if f"{key}/{end}" in measured else None
      other = float(base[key]) if key in base else None
      rows.append(Score(
        title, on, float(measured[key]), other, chance_of(key, measured), _interval(key, measured), n=count("n"),
        ways=count("ways"), baseline_interval=_interval(key, base), difference=(differences or {}).get(key),
        family=FAMILIES.get(_kind(metric), ""), subject=_subject(metric),
      ))  # fmt: skip
  return rows


# Metric's kind -> family of the verdict. Of an item's several numbers one counts.
FAMILIES = {
  "zeroshot/top1": "Zero-shot", "retrieval/r1": "Retrieval", "retrieval/r5": "Retrieval", "probe/full": "Linear probes"
}  # fmt: skip


def _kind(metric: str) -> str:
  """Beginning and end of a metric's name."""
  return f"{metric.partition('/')[0]}/{metric.rpartition('/')[2]}"


def _subject(metric: str) -> str:
  """What a metric is of: "image" of `zeroshot/image/top1`, "text to image", "family of image"."""
  first, *rest = metric.split("/")
  if first == "probe":
    return f"{rest[0]} of {rest[1]}"
  return rest[0].replace("_to_", " to ") + (f" by {rest[1]}" if first == "retrieval" and len(rest) > 2 else "")


def _interval(key: str, metrics: Mapping[str, float]) -> tuple[float, float] | None:
  """The ends `key/low` and `key/high`; None unless both are there and finite."""
  ends = float(metrics.get(f"{key}/low", np.nan)), float(metrics.get(f"{key}/high", np.nan))
  return ends if np.isfinite(ends).all() else None


def chance_of(key: str, measured: Mapping[str, float]) -> float | None:
  """What a guess would score, percent: 100 k of the `ways` candidates; None where it is not known.

  k is that of `top5` and `r5`, and 1 of an accuracy. With fewer queries than candidates, several candidates answer a
  query of retrieval, and how many is not measured; emergent retrieval measures its chance itself.
  """
  end = key.rpartition("/")[2]
  k = int(end.lstrip("topr")) if end.lstrip("topr").isdigit() else 1
  if f"{key.rpartition('/')[0]}/chance{k}" in measured:
    return float(measured[f"{key.rpartition('/')[0]}/chance{k}"])
  ways = measured.get(f"{key}/ways")
  if not ways or "/retrieval/" in key and measured.get(f"{key}/n", 0) < ways:
    return None
  return 100.0 * min(k, ways) / ways


COUNTED = 2000  # queries of a gallery that are counted, fewer where there are very many answers
_CELLS = 1 << 26  # similarities held at once


def nearest(
  query: Float[np.ndarray, "..."], gallery: Float[np.ndarray, "..."], k: int = 5
) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
  """Rows of the gallery nearest to each query by cosine, best first (ties in order), and the cosines."""
  query, gallery = base.unit_rows("query", query), base.unit_rows("gallery", gallery)
  base.check_widths(query=query, gallery=gallery)
  scores = query @ gallery.T
  order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  return order, np.take_along_axis(scores, order, axis=1)


def build_gallery(
  title: str,
  on: str,
  asked: Sequence[Item],
  asked_embeddings: Float[np.ndarray, "..."],
  found: Sequence[Item],
  found_embeddings: Float[np.ndarray, "..."],
  *,
  relevant: tuple[contents.Side, contents.Side],
  shown: int = 4,
  k: int = 5,
  kind: Literal["pictures", "texts"] = "pictures",
) -> Gallery:
  """Queries with their k nearest answers, which are right where the two share a value.

  Half of the queries shown have a right first answer and half a wrong one, as far as there are; they are spread evenly
  over the set. Of a set with more than `COUNTED` queries as many are counted, spread evenly too.

  Args:
    title, on: of the gallery.
    asked: N queries; a sequence may make item i when it is read.
    asked_embeddings: [N, D].
    found: M candidate answers, likewise.
    found_embeddings: [M, D].
    relevant: the values of the queries and of the answers.
    shown: number of queries shown.
    k: answers shown of each.
    kind: what the answers are.

  Raises:
    ValueError: if lengths or widths differ, or embeddings are empty or not finite.
  """
  base.check_lengths(asked=asked, values=relevant[0].rows, asked_embeddings=asked_embeddings)
  base.check_lengths(found=found, values=relevant[1].rows, found_embeddings=found_embeddings)
  counted = evenly(np.arange(len(asked)), min(COUNTED, max(shown, _CELLS // len(found))))
  order, scores = nearest(np.asarray(asked_embeddings)[counted], found_embeddings, k)
  answers_of = contents.shared_values(*relevant)[counted]
  right = np.take_along_axis(answers_of.toarray() > 0, order, axis=1)
  queries = []
  for row in balanced(right[:, 0], shown):
    answers = [
      dataclasses.replace(found[int(j)], right=bool(hit), score=float(score))
      for j, hit, score in zip(order[row], right[row], scores[row])
    ]
    queries.append(Query(asked[int(counted[row])], answers))
  return Gallery(title, on, queries, len(counted), len(found), int(right[:, 0].sum()), kind)


def evenly(rows: Int[np.ndarray, "n"], count: int) -> Int[np.ndarray, "m"]:
  """Up to `count` of the rows, spread evenly, the first and the last among them."""
  if len(rows) <= count:
    return rows
  return rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]


def balanced(right: Bool[np.ndarray, "n"], count: int) -> list[int]:
  """Rows to show: half of those that are right and half of those that are wrong, in order; more of one for lack of the
  other."""
  hits, misses = np.flatnonzero(right), np.flatnonzero(~right)
  some = min(len(hits), max(count - count // 2, count - len(misses)))
  return sorted([*evenly(hits, some).tolist(), *evenly(misses, min(len(misses), count - some)).tolist()])


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

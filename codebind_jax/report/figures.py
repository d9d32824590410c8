"""The parts of a report that show pictures: curves, codebook usage, retrieval gallery, embedding maps."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from codebind_jax.report import charts
from codebind_jax.report.data import EmbeddingMap, Gallery, Item, ReportData, Run

_THUMBNAIL = 96
_CODEBOOK = {"perplexity": "Perplexity", "active_share": "Active codes, %", "dead": "Dead codes"}
_SHAPES = {
  "o": "M10.5 6a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
  "^": "M15 1l5 10h-10z",
  "s": "M11 2h8v8h-8z",
  "D": "M15 0l6 6-6 6-6-6z",
  "P": "M13 1h4v3h3v4h-3v3h-4v-3h-3v-4h3z",
  "X": "M10 1h3l2 3 2-3h3l-3 5 3 5h-3l-2-3-2 3h-3l3-5z",
}


def look(text: str) -> str:
  """The sentence under a heading that says what to look for; `text` is HTML."""
  return f'<p class="look">{text}</p>'


# Curves.


def _line(run: Run, name: str, series: int, scale: float = 1.0) -> charts.Line | None:
  """One metric of a run over the step; None if the run has not logged it."""
  points = [(record["step"], record[name]) for record in run.records if name in record]
  if not points:
    return None
  steps, values = np.array(points, float).T
  return charts.Line(run.name, steps, scale * values, series)


def _names(run: Run) -> list[str]:
  return list(dict.fromkeys(name for record in run.records for name in record))


def _stages(run: Run) -> dict[str, float]:
  """First step of each stage; empty where there is only one."""
  starts: dict[str, float] = {}
  for record in run.records:
    starts.setdefault(str(record.get("stage", "")), float(record["step"]))
  return starts if len(starts) > 1 else {}


def _chart(data: ReportData, name: str, title: str, *, overlay: bool = True, scale: float = 1.0, **options: Any) -> str:
  """A figure of one metric of the run and of the baseline; empty where nothing finite was logged."""
  runs = [data.run, *([data.baseline] if data.baseline and overlay else [])]
  lines = [line for i, run in enumerate(runs) if (line := _line(run, name, i, scale)) is not None]
  finite = [line.y[np.isfinite(line.y)] for line in lines]
  if not any(map(len, finite)):
    return ""
  not_finite = sum(len(line.y) for line in lines) - sum(map(len, finite))
  last = " · ".join(f"{y[-1]:,.0f}" if abs(y[-1]) >= 1000 else f"{y[-1]:.3g}" for y in finite if len(y)).replace(
    "-", "−"
  )
  drawn = charts.line_chart(name.replace("/", "-"), lines, breaks=_stages(data.run), **options)
  caption = (
    f"<figcaption>{not_finite} of {sum(len(line.y) for line in lines)} values not finite: a gap.</figcaption>"
    if not_finite
    else ""
  )
  return f'<figure><p class="name">{escape(title)} <span class="small">last {last}</span></p>{drawn}{caption}</figure>'


def _key(data: ReportData) -> str:
  """Legend of the curves; empty where there is only one run."""
  if not data.baseline:
    return ""
  parts = []
  for run, series, dashes in ((data.run, 1, "none"), (data.baseline, 2, "7 3")):
    path = f'<path d="M0 6H30" fill="none" stroke="var(--c{series})" stroke-width="2.4" stroke-dasharray="{dashes}"/>'
    parts.append(f'<li><svg viewBox="0 0 30 12" aria-hidden="true">{path}</svg>{escape(run.name)}</li>')
  return f'<ul class="key">{"".join(parts)}</ul>'


def curves(data: ReportData) -> str:
  """Every training term over the step."""
  first = {"train/total": 0, "train/loss": 0, "train/info_nce": 1}
  terms = sorted((n for n in _names(data.run) if n.startswith("train/")), key=lambda name: first.get(name, 2))
  drawn = "".join(_chart(data, name, name.removeprefix("train/").replace("_", " ")) for name in terms)
  if not drawn:
    return ""
  text = look(
    "Each term before its weight, over the step; the baseline is drawn where it has the term. Look for curves that "
    "have levelled off; a jump that stays, or a gap, is worth a look at the log. Axes that cover more than two "
    "decades are logarithmic."
  )
  return f'{text}{_key(data)}<div class="charts">{drawn}</div>'


def validation(data: ReportData) -> str:
  """Accuracy and recall on the sets evaluated more than once."""
  drawn = ""
  for name in _names(data.run):
    line = _line(data.run, name, 0) if name.startswith("eval/") and name.endswith(("/top1", "/r1", "/map")) else None
    if line is not None and len(np.unique(line.x)) > 1:
      drawn += _chart(data, name, name.removeprefix("eval/").replace("/", " · ").replace("_", " "))
  if not drawn:
    return ""
  text = look(
    "Accuracy and recall (%) on the sets that were evaluated more than once. A curve that turns down while the loss "
    "still falls means the run overfits."
  )
  return f'{text}{_key(data)}<div class="charts">{drawn}</div>'


# Codebooks.


def codebooks(data: ReportData) -> str:
  """Perplexity, active share and dead codes of each codebook over the step."""
  parts = []
  training = [name for name in _names(data.run) if name.startswith("codebook/") and name.count("/") == 2]
  for book in dict.fromkeys(name.split("/")[1] for name in training):
    size = data.codebook_sizes.get(book)
    dead = [r[f"codebook/{book}/dead"] for r in data.run.records if f"codebook/{book}/dead" in r]
    most = max([1.0, *(count for count in dead if np.isfinite(count))])
    options: dict[str, dict[str, Any]] = {
      "perplexity": dict(limits=(0.0, 1.05 * size), marks={"half the codes": size / 2}) if size else {},
      "active_share": dict(scale=100.0, limits=(0.0, 104.0)),
      "dead": dict(limits=(-0.02 * most, 1.1 * most)),
    }
    drawn = "".join(
      _chart(data, f"codebook/{book}/{metric}", title, overlay=False, **options[metric])
      for metric, title in _CODEBOOK.items()
    )
    if drawn:
      title = escape(book) + (f" ({size:,} codes)" if size else "")
      parts.append(f'<h3>{title}</h3><div class="charts">{drawn}</div>')
  if not parts:
    return ""
  text = look(
    "Perplexity is the number of codes in effect: it should end above half of the codebook. Active codes should "
    "stay near 100 %, dead codes at 0; a slow fall is a codebook that collapses."
  )
  return text + "".join(parts)


def codes(data: ReportData) -> str:
  """Share of uses of each code on the training data, by codebook."""
  drawn = []
  for book, counts in data.code_counts.items():
    counts = np.asarray(counts)
    if counts.ndim != 1 or not counts.sum() > 0:
      raise ValueError(f"code_counts[{book!r}]: expected one count a code, not all zero, got shape {counts.shape}")
    note = f"{len(counts):,} codes, {int((counts == 0).sum())} never used"
    drawn.append(
      f'<figure><p class="name">{escape(book)} <span class="small">{note}</span></p>'
      f"{charts.usage_chart(f'codes-{book}', counts)}</figure>"
    )
  if not drawn:
    return ""
  text = look(
    "Share of all assignments on the training data that fall to each code, codes sorted by use. The dashed line "
    "is equal use; a high left end means few codes carry most of the load."
  )
  return f'{text}<div class="charts">{"".join(drawn)}</div>'


# Gallery.


def thumbnail(image: np.ndarray, text: str) -> tuple[str, tuple[int, int]]:
  """A picture [h, w, 3], made small, as a data URI, PNG or JPEG, whichever is smaller; and its width and height.

  Raises:
    ValueError: naming the picture by its text, if it is not uint8 RGB.
  """
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
    raise ValueError(f"gallery image {text!r}: expected uint8 [h, w, 3], got {image.dtype} {list(image.shape)}")
  picture = Image.fromarray(image)
  picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
  files = []
  for kind, options in (("png", dict(optimize=True)), ("jpeg", dict(quality=88, optimize=True))):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    files.append((buffer.getvalue(), kind))
  data, kind = min(files, key=lambda pair: len(pair[0]))
  return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", picture.size


def alternative(item: Item) -> str:
  """Text alternative of an item's picture: "spectrogram of a sound: dog barking"."""
  return ": ".join(filter(None, (item.kind, item.text))) or "picture without a caption"


def _item(item: Item) -> str:
  picture = ""
  if item.image is not None:
    source, (width, height) = thumbnail(item.image, item.text)
    picture = f'<img src="{source}" alt="{escape(alternative(item))}" width="{width}" height="{height}">'
  return picture + (f"<span>{escape(item.text)}</span>" if item.text else "")


def _answer(answer: Item) -> str:
  kind, verdict = ("right", "✓ right") if answer.right else ("wrong", "✗ wrong")
  score = "" if answer.score is None else f"<span>{answer.score:.2f}</span>".replace("-", "−")
  return f'<li class="{kind}"><div class="verdict"><b>{verdict}</b>{score}</div>{_item(answer)}</li>'


def galleries(shown: Sequence[Gallery], explained: bool = True) -> str:
  """Queries with their nearest answers, by gallery; `explained` puts before them how to read one."""
  text = look(
    "A query, then what the model found nearest to it, from best to worst, with the cosines. ✓ in a full frame is "
    "right, ✗ in a dashed frame is wrong. Queries with a right and with a wrong first answer are shown alike, "
    "whatever their shares, which stand above them. Look at the wrong ones: near in meaning, or only in looks?"
  )
  return (text if explained and shown else "") + "".join(map(_gallery, shown))


def _gallery(gallery: Gallery) -> str:
  rows = [
    f'<div class="query"><div class="asked">{_item(query.asked)}</div>'
    f'<ol class="answers">{"".join(map(_answer, query.answers))}</ol></div>'
    for query in gallery.queries
  ]
  share = f"{gallery.first:,} of {gallery.asked:,} queries ({100 * gallery.first / max(gallery.asked, 1):.0f} %)"
  of = f"{escape(gallery.on)}. {share} have a right first answer among {gallery.found:,} {gallery.kind}."
  return f'<h3>{escape(gallery.title)}</h3><p class="small">{of}</p><div class="{gallery.kind}">{"".join(rows)}</div>'


# Maps.


def maps(shown: Sequence[EmbeddingMap]) -> str:
  """Embeddings of the modalities in the plane, before and after training."""
  if not shown:
    return ""
  modalities = list(dict.fromkeys(modality for each in shown for modality in each.points))
  key = "".join(
    f'<li><svg viewBox="0 0 30 12" aria-hidden="true"><path fill="var(--c{i % 6 + 1})" '
    f'd="{_SHAPES[charts.MARKERS[i % 6]]}"/></svg>{escape(name)}</li>'
    for i, name in enumerate(modalities)
  )
  drawn = ""
  for i, each in enumerate(shown):
    for modality, xy in each.points.items():
      if xy.ndim != 2 or xy.shape[1] != 2 or not np.isfinite(xy).all():
        raise ValueError(f"map {each.title!r}, {modality}: expected finite [n, 2] points, got {list(xy.shape)}")
    ordered = {name: each.points.get(name, np.zeros((0, 2), np.float32)) for name in modalities}
    drawn += (
      f'<figure><p class="name">{escape(each.title)}</p>{charts.map_chart(f"map-{i}", ordered, each.pairs)}'
      f"<figcaption>{escape(each.note)}</figcaption></figure>"
    )
  text = look(
    "Every mark is one item; a thin line joins an item of one modality with its partner in the other. Before "
    "training the modalities lie apart and lines are long; a bridge that holds has them mixed and lines short."
  )
  return f'{text}<ul class="key">{key}</ul><div class="pairs">{drawn}</div>'

"""The report of a run: one self-contained HTML page to read, send and print."""

import importlib.resources
import os
import string
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from absl import logging

from codebind_jax import files
from codebind_jax.evaluators import codes
from codebind_jax.report import figures as report_figures
from codebind_jax.report.data import ReportData, Score

_LARGE = 3_000_000


def write_report(path: str | os.PathLike, data: ReportData) -> files.Path:
  """Writes the page.

  Parts for which `data` holds nothing are left out; a line near the top names them.

  Args:
    path: the file, replaced whole; its folder must exist.
    data: what to show.

  Returns:
    The path.

  Raises:
    ValueError: if a part is malformed (an image that is not uint8 RGB, say), naming it.
  """
  sections = {
    "results": ("Results", _results(data)),
    "curves": ("Training curves", report_figures.curves(data)),
    "validation": ("Validation during training", report_figures.validation(data)),
    "codebooks": ("Codebook usage over time", report_figures.codebooks(data)),
    "codes": ("Use of single codes", report_figures.codes(data) + _shared_codes(data)),
    "text-queries": ("Text to image", report_figures.gallery(data.text_queries, "images")),
    "image-queries": ("Image to text", report_figures.gallery(data.image_queries, "texts")),
    "maps": ("Map of the embeddings", report_figures.maps(data.maps)),
    "setup": ("What was run", _setup(data)),
    "credits": ("Whose work the data is", _credits(data)),
  }
  shown = {key: part for key, part in sections.items() if part[1]}
  left_out = [title for key, (title, body) in sections.items() if not body]
  body = [_head(data, shown, left_out)]
  body += [
    f'<section id="{key}" aria-labelledby="{key}-h"><h2 id="{key}-h">{title}</h2>\n{text}</section>'
    for key, (title, text) in shown.items()
  ]
  body.append(
    "<footer>Written by codebind_jax. This page is complete in itself: it loads nothing from elsewhere.</footer>"
  )
  template = importlib.resources.files("codebind_jax.report").joinpath("template.html").read_text(encoding="utf-8")
  page = string.Template(template).substitute(title=escape(data.title), body="\n".join(body))
  path = files.path(path)
  files.write_whole(path, page)
  if len(page) > _LARGE:
    logging.warning("%s has %.1f MB; fewer gallery rows or map points make it smaller", path, len(page) / 1e6)
  return path


def _table(head, rows, caption, kind=""):
  """A table in a box that scrolls sideways; cells are HTML, the first of a row is its heading."""
  columns = "".join(f'<th scope="col"{cls}>{text}</th>' for text, cls in head)
  return (
    f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="{kind}"><thead><tr>'
    f"{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
  )


# Head and results.


def _head(data, shown, left_out):
  parts = [f"<header><h1>{escape(data.title)}</h1>"]
  if data.summary:
    parts.append(f'<p class="lead">{escape(data.summary)}</p>')
  parts += [f"<p>{escape(note)}</p>" for note in data.notes]
  cards = [_card(name, rows) for name, rows in _groups(data.scores).items() if _mean(rows) or len(rows) == 1]
  if cards:
    parts.append(f'<ul class="cards">{"".join(cards)}</ul>')
  links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, (title, _) in shown.items())
  parts.append(f'<nav aria-label="Contents"><ol>{links}</ol></nav>')
  if left_out:
    parts.append(f'<p class="small left-out">Left out for lack of data: {", ".join(left_out)}.</p>')
  return "".join(parts) + "</header>"


def _groups(scores: Sequence[Score]) -> dict[str, list[Score]]:
  groups: dict[str, list[Score]] = {}
  for score in scores:
    groups.setdefault(score.metric, []).append(score)
  return groups


def _mean(rows: Sequence[Score]) -> Score | None:
  """The mean row of a group, None if fewer than two rows take part.

  It has a baseline, chance and interval only where every row has one; the interval assumes independent sets.
  """
  rows = [row for row in rows if row.averaged]
  if len(rows) < 2:
    return None

  def mean(name):
    values = [getattr(row, name) for row in rows]
    return None if None in values else float(np.mean(values))

  value, interval = mean("value"), None
  if all(row.interval is not None for row in rows):
    below, above = (np.array([abs(row.value - row.interval[end]) for row in rows]) for end in (0, 1))
    half = lambda sides: float(np.sqrt(np.sum(sides**2)) / len(rows))
    interval = (value - half(below), value + half(above))
  return Score(
    rows[0].metric,
    f"mean of {len(rows)} sets",
    value,
    mean("baseline"),
    mean("chance"),
    interval,
    unit=rows[0].unit,
    higher_is_better=rows[0].higher_is_better,
  )


def _card(name, rows):
  row = _mean(rows) or rows[0]
  unit = f'<span class="unit"> {escape(row.unit)}</span>' if row.unit else ""
  against = f"{_difference(row)} against the baseline" if row.baseline is not None else ""
  return (
    f'<li>{escape(name)}<b>{_number(row.value)}{unit}</b><span class="small">{escape(row.on)}</span>'
    f'<span class="under">{against}</span></li>'
  )


def _number(value):
  if value is None or not np.isfinite(value):
    return "–"
  return f"{value:,.1f}" if abs(value) < 10_000 else f"{value:,.0f}"


def _difference(row):
  """Signed and with an arrow, so that nothing rests on colour alone; ≈ where the baseline lies in the interval."""
  if row.baseline is None or not np.isfinite(row.value - row.baseline):
    return "–"
  change = row.value - row.baseline
  unclear = row.interval is not None and row.interval[0] <= row.baseline <= row.interval[1]
  if abs(change) < 0.05 or unclear:
    kind, arrow = "even", "≈"
  else:
    kind = "up" if (change > 0) == row.higher_is_better else "down"
    arrow = "▲" if change > 0 else "▼"
  sign = "−" if change < 0 else "+"
  return f'<span class="{kind}">{sign}{_number(abs(change))} {arrow}</span>'


def _results(data):
  if not data.scores:
    return ""
  run, baseline = escape(data.run.name), escape(data.baseline.name) if data.baseline else "baseline"
  optional = ("baseline", "chance", "interval", "spread")
  given = {name for name in optional if any(getattr(score, name) is not None for score in data.scores)}
  text = {
    "baseline": f"{run} beside {baseline}: green ▲ is better and red ▼ worse (for ranks the other way round), ≈ means "
    "that the baseline lies inside the 95 % interval or that the two are equal. Look for gains well above the width of "
    "the interval on every set.",
    "interval": "The 95 % interval is written small.",
    "spread": "± is the standard deviation over seeds.",
    "chance": "Chance is what a guess would score.",
  }
  parts = [report_figures.look(" ".join(sentence for name, sentence in text.items() if name in given))]
  for name, rows in _groups(data.scores).items():
    unit = escape(rows[0].unit)
    values = [v for r in rows for v in (r.value, r.baseline, r.chance) if v is not None and np.isfinite(v)]
    top = 100.0 if unit == "%" else 1.05 * max(values, default=0.0) or 1.0
    head = [("Set", ""), (run, ' class="n"')]
    if "baseline" in given:
      head += [(baseline, ' class="n"'), ("Difference", ' class="n"')]
    if "chance" in given:
      head += [("Chance", ' class="n chance"')]
    head += [(f"0 to {_number(top).removesuffix('.0')} {unit}", ' class="bar"')]
    lines = [_score_row(row, top, given) for row in rows]
    mean = _mean(rows)
    if mean:
      lines.append(_score_row(mean, top, given, "mean"))
    parts.append(f"<h3>{escape(name)}{f' ({unit})' if unit else ''}</h3>")
    parts.append(_table(head, lines, name, "wide scores"))
  key = {"own": run, "baseline": baseline, "interval": "95 % interval", "chance": "chance"}
  marks = "".join(
    f'<li><span class="scale"><i class="{kind}"></i></span>{title}</li>'
    for kind, title in key.items()
    if kind in given | {"own"}
  )
  return "".join(parts) + f'<ul class="key bar">{marks}</ul>'


def _score_row(row, top, given, kind=""):
  own = _number(row.value) + (f" ± {row.spread:.1f}" if row.spread is not None else "")
  if row.interval:
    own += f'<span class="under">{_number(row.interval[0])}–{_number(row.interval[1])}</span>'
  cells = [own]
  if "baseline" in given:
    cells += [_number(row.baseline), _difference(row)]
  if "chance" in given:
    cells += [_number(row.chance)]
  numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
  bar = f'<td class="bar"><div class="scale" aria-hidden="true">{_marks(row, top)}</div></td>'
  return f'<tr class="{kind}"><th scope="row">{escape(row.on)}</th>{numbers}{bar}</tr>'


def _marks(row, top):
  """Value, baseline, chance and interval on a line from 0 to `top`."""
  place = lambda value: 100 * min(max(value / top, 0.0), 1.0)
  marks = ['<i class="track"></i>']
  if row.interval:
    left, right = place(row.interval[0]), 100 - place(row.interval[1])
    marks.append(f'<i class="interval" style="left:{left:.1f}%;right:{right:.1f}%"></i>')
  for kind, value in (("chance", row.chance), ("baseline", row.baseline), ("own", row.value)):
    if value is not None and np.isfinite(value):
      marks.append(f'<i class="{kind}" style="left:{place(value):.1f}%"></i>')
  return "".join(marks)


def _shared_codes(data):
  """Use of the shared codes by each modality."""
  if not data.shared_counts:
    return ""
  rows = []
  for modality, counts in data.shared_counts.items():
    use = codes.usage(counts)
    rows.append(
      f'<tr><th scope="row">{escape(modality)}</th><td class="n">{100 * use["active_share"]:.1f}</td>'
      f'<td class="n">{use["perplexity"]:,.0f}</td></tr>'
    )
  both = codes.overlap(data.shared_counts)
  head = [("Modality", ""), ("Shared codes used, %", ' class="n"'), ("In effect (perplexity)", ' class="n"')]
  return (
    "<h3>Shared codes by modality</h3>"
    + report_figures.look(
      f"{100 * both['several_share']:.1f} % of the shared codes in use are used by several modalities; a code serves "
      f"{both['modalities_per_code']:.1f} of {len(data.shared_counts)} in effect. Near 1, each modality has codes of "
      "its own, and nothing is shared."
    )
    + _table(head, rows, "Shared codes by modality")
  )


# Setup and credits.


def _flat(config: Mapping[str, Any], prefix="") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in config.items():
    if isinstance(value, Mapping) and value:
      flat |= _flat(value, f"{prefix}{name}.")
    else:
      flat[f"{prefix}{name}"] = value
  return flat


def _time(seconds):
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _list(title, pairs):
  rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in pairs)
  return f"<div><h3>{title}</h3><dl>{rows}</dl></div>" if rows else ""


def _setup(data):
  parts = []
  if data.command:
    parts.append(f"<h3>Command</h3><pre>{escape(data.command)}</pre>")
  counts = [(name, f"{count:,}") for name, count in data.data_counts.items()]
  profile = [("profile", data.data_profile)] if data.data_profile else []
  times = [(name, _time(seconds)) for name, seconds in data.seconds.items()]
  if len(times) > 1:
    times.append(("in all", _time(sum(data.seconds.values()))))
  lists = [_list("Data", profile + counts), _list("Time", times), _list("Environment", data.environment.items())]
  if any(lists):
    parts.append(f'<div class="facts">{"".join(lists)}</div>')
  if data.config:
    flat = _flat(data.config)
    rows = [
      f'<tr><th scope="row"><code>{escape(name)}</code></th><td><code>{escape(str(value))}</code></td></tr>'
      for name, value in flat.items()
    ]
    table = _table([("Setting", ""), ("Value", "")], rows, "Settings")
    parts.append(f"<details><summary>All {len(flat)} settings</summary>{table}</details>")
  return "".join(parts)


def _credits(data):
  if not data.attributions:
    return ""
  rows = [
    f'<tr><th scope="row">{escape(each.source)}</th><td>{escape(each.licence)}</td><td>{escape(each.credit)}</td></tr>'
    for each in data.attributions
  ]
  table = _table([("Source", ""), ("Licence", ""), ("Credit", "")], rows, "Attributions")
  return report_figures.look("Pictures on this page are thumbnails of these works; keep the credits with them.") + table

"""The report of a run: one self-contained HTML page to read, send and print."""

import dataclasses
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
from codebind_jax.report.verdict import ABOVE, BELOW, gap, judged

_LARGE = 3_000_000
STRIPS = 2  # galleries near the top
CARDS = 6
KINDS = {ABOVE: "up", BELOW: "down"}


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
  first, more = data.galleries[:STRIPS], data.galleries[STRIPS:]
  sections = {
    "found": ("Queries and what was found", report_figures.galleries(first)),
    "results": ("Results", _results(data)),
    "curves": ("Training curves", report_figures.curves(data)),
    "validation": ("Validation during training", report_figures.validation(data)),
    "codebooks": ("Codebook usage over time", report_figures.codebooks(data)),
    "codes": ("Use of single codes", report_figures.codes(data) + _shared_codes(data)),
    "maps": ("Map of the embeddings", report_figures.maps(data.maps)),
    "more-found": ("More queries", report_figures.galleries(more, explained=not first)),
    "setup": ("What was run", _setup(data)),
    "credits": ("Whose work the data is", _credits(data)),
  }
  shown = {key: part for key, part in sections.items() if part[1]}
  left_out = [title for key, (title, body) in sections.items() if not body and key != "more-found"]
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
  if data.verdict:
    parts.append(f'<ul class="found">{"".join(f"<li>{_words(line)}</li>" for line in data.verdict)}</ul>')
  if data.trained:
    parts.append(f"<p>{_words(data.trained)}</p>")
  if data.scores:
    parts.append(f'<p class="small">{_words(_reading(data.scores))}</p>')
  parts += [f"<p>{escape(note)}</p>" for note in data.notes]
  if cards := _cards(data.scores):
    parts.append(f'<ul class="cards">{"".join(cards)}</ul>')
  links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, (title, _) in shown.items())
  parts.append(f'<nav aria-label="Contents"><ol>{links}</ol></nav>')
  if left_out:
    parts.append(f'<p class="small left-out">Left out for lack of data: {", ".join(left_out)}.</p>')
  return "".join(parts) + "</header>"


def _words(text: str) -> str:
  """A sentence as HTML, in which no line ends before a percent sign."""
  return escape(text).replace(" %", "\u00a0%")


def _cards(scores: Sequence[Score]) -> list[str]:
  """Of the rows that a verdict counts, the mean of each group, or its rows where they have none; at most `CARDS`."""
  counted = [score for score in scores if score.family] or scores
  means = [(mean_of(group), group) for group in _groups(counted).values()]
  return [_card(row) for mean, group in means for row in ([mean] if mean else group)][:CARDS]


def _reading(scores: Sequence[Score]) -> str:
  """How to read the numbers, in plain words."""
  text = ("How to read it: a percentage is the share of rows whose right answer was ranked first among the candidates "
          "(ways), or among the first five at top-5 and recall@5.")  # fmt: skip
  if any(score.interval is not None for score in scores):
    text += " With other rows of the same kind the number would mostly lie within its 95 % interval."
  if any(score.baseline is not None for score in scores):
    text += (" Level means that the 95 % interval of the difference holds zero, so that no difference was shown; above "
             "and below, that it does not.")  # fmt: skip
  return text


def _groups(scores: Sequence[Score]) -> dict[str, list[Score]]:
  groups: dict[str, list[Score]] = {}
  for score in scores:
    groups.setdefault(score.metric, []).append(score)
  return groups


def mean_of(rows: Sequence[Score]) -> Score | None:
  """The mean row of a group; None where fewer than two rows can be averaged.

  Rows are averaged where they are of one metric and unit and have as many ways: a percentage of 550 ways and one of 120
  have no common mean. It has a baseline, chance and interval only where every row has one; the interval assumes that
  no row is in two sets.
  """
  rows = [row for row in rows if row.averaged and np.isfinite(row.value)]
  if len(rows) < 2 or len({(row.metric, row.unit, row.ways) for row in rows}) > 1:
    return None

  def mean(name):
    values = [getattr(row, name) for row in rows]
    return None if None in values else float(np.mean(values))

  value, interval = mean("value"), None
  if all(row.interval is not None for row in rows):
    below, above = (np.array([abs(row.value - row.interval[end]) for row in rows]) for end in (0, 1))
    half = lambda sides: float(np.sqrt(np.sum(sides**2)) / len(rows))
    interval = (value - half(below), value + half(above))
  return dataclasses.replace(
    rows[0], on=f"mean of {len(rows)} sets", value=value, baseline=mean("baseline"), chance=mean("chance"),
    interval=interval, spread=None, n=None, baseline_interval=None, difference=_joined_difference(rows),
  )  # fmt: skip


def _joined_difference(rows: Sequence[Score]) -> tuple[float, float] | None:
  """95 % interval of the mean difference, of rows that are independent; None where a row has none."""
  ends = [gap(row) for row in rows]
  if None in ends:
    return None
  changes = np.array([row.value - row.baseline for row in rows])
  below, above = (float(np.sqrt(np.sum((changes - np.array(ends)[:, end]) ** 2)) / len(rows)) for end in (0, 1))
  return float(changes.mean()) - below, float(changes.mean()) + above


def _card(row):
  unit = f'<span class="unit"> {escape(row.unit)}</span>' if row.unit else ""
  against = f"{_difference(row)} against the baseline" if row.baseline is not None else ""
  return (
    f'<li>{escape(row.metric)}<b>{_number(row.value)}{unit}</b><span class="small">{escape(row.on)}</span>'
    f'<span class="under">{against}</span></li>'
  )


def _number(value):
  if value is None or not np.isfinite(value):
    return "–"
  return f"{value:,.1f}" if abs(value) < 10_000 else f"{value:,.0f}"


def _difference(row):
  """Signed and with an arrow, so that nothing rests on colour alone; ≈ where the interval of the difference holds 0."""
  if row.baseline is None or not np.isfinite(row.value - row.baseline):
    return "–"
  change, side = row.value - row.baseline, judged(row)
  if side is None and abs(change) >= 0.05:  # without an interval the number alone decides
    side = ABOVE if (change > 0) == row.higher_is_better else BELOW
  arrow = ("▲" if change > 0 else "▼") if side in (ABOVE, BELOW) else "≈"
  sign = "−" if change < 0 else "+"
  return f'<span class="{KINDS.get(side, "even")}">{sign}{_number(abs(change))} {arrow}</span>'


def _results(data):
  if not data.scores:
    return ""
  run, baseline = escape(data.run.name), escape(data.baseline.name) if data.baseline else "baseline"
  optional = ("baseline", "chance", "interval", "spread")
  given = {name for name in optional if any(getattr(score, name) is not None for score in data.scores)}
  text = {
    "baseline": f"{run} beside {baseline}: ▲ higher and ▼ lower by more than the 95 % interval of the difference, "
    "green where that is better and red where it is worse; ≈ means that this interval holds zero.",
    "interval": "The 95 % interval is written small.",
    "spread": "± is the standard deviation over seeds.",
    "chance": "Chance is what a guess would score: k of the ways. Retrieval with several right answers to a query has "
    "none here.",
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
    mean = mean_of(rows)
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
  facts = [f"{row.n:,} rows" if row.n else "", f"{row.ways:,} ways" if row.ways else ""]
  under = f'<span class="under">{", ".join(filter(None, facts))}</span>' if any(facts) else ""
  return f'<tr class="{kind}"><th scope="row">{escape(row.on)}{under}</th>{numbers}{bar}</tr>'


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
  time = _list("Time of this command", times)
  lists = [_list("Data", profile + counts), time, _list("Environment", data.environment.items())]
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

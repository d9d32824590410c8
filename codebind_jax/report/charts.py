"""Charts of the report, as small inline SVG that takes its colours and type from the page (light, dark, print)."""

import dataclasses
import html
import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, Int, Num
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Charts are drawn in colours that occur nowhere else, which are then replaced by the page's CSS variables.
_INK, _MUTED, _GRID, _PAGE = "#010203", "#010204", "#010205", "#010206"
_SERIES = tuple(f"#0102{16 + i:02x}" for i in range(6))
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--line", _PAGE: "--page"} | {
  c: f"--c{i + 1}" for i, c in enumerate(_SERIES)
}
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = ("o", "^", "s", "D", "P", "X")
_SMALL, _POINTS = 9.5, 400


@dataclasses.dataclass(frozen=True)
class Line:
  """One line of a chart.

  Attributes:
    name: used in the text alternative.
    x: [N], growing.
    y: [N]; NaN leaves a gap.
    series: which colour and dash, from 0; equal numbers look alike in all charts.
  """

  name: str
  x: Num[np.ndarray, "n"]
  y: Num[np.ndarray, "n"]
  series: int = 0


def _axes(width, height):
  figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
  figure.patch.set_visible(False)
  axes = figure.add_subplot()
  axes.patch.set_visible(False)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
  for side in ("left", "bottom"):
    axes.spines[side].set(color=_GRID, linewidth=0.8)
  axes.tick_params(colors=_GRID, labelcolor=_MUTED, labelsize=_SMALL, length=3, width=0.8, which="major")
  axes.tick_params(length=0, labelsize=0, which="minor")
  axes.grid(axis="y", color=_GRID, linewidth=0.6)
  axes.set_axisbelow(True)
  return figure, axes


def _svg(figure, name, alternative):
  """The figure as SVG text for the page: its own ids, no fixed size, colours and type from CSS."""
  with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "path.simplify": True}):
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
  text = buffer.getvalue()
  text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.S)
  text = re.sub(r'<g id="[^"]+"', "<g", text).replace("<defs>\n </defs>", "")
  slug = re.sub(r"\W+", "-", name).strip("-")
  text = re.sub(r'\bid="([^"]+)"', rf'id="{slug}-\1"', text)
  text = re.sub(r"url\(#([^)]+)\)", rf"url(#{slug}-\1)", text)
  text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{slug}-\1"', text)
  text = re.sub(r"font: ([\d.]+px)[^;\"]*|font-family:[^;\"]*;", lambda m: f"font-size: {m[1]}" if m[1] else "", text)
  text = re.sub(r' transform="rotate\(-0[^"]*"', "", text)
  for colour, variable in _VARIABLES.items():
    text = text.replace(colour, f"var({variable})")
  box = re.search(r'viewBox="[^"]+"', text)[0]
  head = f'<svg {box} role="img" aria-label="{html.escape(alternative)}" focusable="false">'
  text = re.sub(r"^<svg[^>]*>", lambda _: head, text)
  places = re.compile(r' (?:d|x|y|transform)="[^"]*"')
  text = places.sub(lambda place: re.sub(r"(\d\.\d\d)\d+", r"\1", place[0]), text)
  return re.sub(r"\n\s*", "\n", text)


def _thin(x, y):
  """At most `_POINTS` points: means of equal bins, NaN where a bin holds nothing finite."""
  if len(x) <= _POINTS:
    return x, y
  edges = np.linspace(0, len(x), _POINTS + 1).astype(int)
  finite = np.isfinite(y)
  counts = np.add.reduceat(finite.astype(float), edges[:-1])
  sums = np.add.reduceat(np.where(finite, y, 0.0), edges[:-1])
  return np.add.reduceat(x, edges[:-1]) / np.diff(edges), np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _short(value, _=None):
  if abs(value) >= 1e4 or 0 < abs(value) < 1e-3:
    return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
  return f"{value:g}".replace("-", "−")


def line_chart(
  name: str,
  lines: Sequence[Line],
  *,
  marks: Mapping[str, float] | None = None,
  breaks: Mapping[str, float] | None = None,
  limits: tuple[float, float] | None = None,
) -> str:
  """Lines over the training step.

  A positive quantity that covers more than two decades gets a logarithmic axis.

  Args:
    name: unique in the page; also the text alternative's subject.
    lines: what to draw; at least one finite value among them.
    marks: values by label, drawn as dotted level lines (half of a codebook's size, say).
    breaks: steps by label, drawn as upright lines (where a stage begins).
    limits: of the value axis; None fits them.

  Returns:
    An `<svg>` element.

  Raises:
    ValueError: if no line has a finite value.
  """
  values = np.concatenate([line.y[np.isfinite(line.y)] for line in lines]) if lines else np.zeros(0)
  if not len(values):
    raise ValueError(f"chart {name!r}: no finite value to draw")
  figure, axes = _axes(300, 165)
  for line in lines:
    x, y = _thin(np.asarray(line.x, float), np.asarray(line.y, float))
    style = dict(color=_SERIES[line.series % 6], linestyle=_DASHES[line.series % 4], linewidth=1.5)
    axes.plot(x, y, marker="o" if len(x) < 13 else None, markersize=3.2, solid_joinstyle="round", **style)
  if values.min() > 0 and values.max() / values.min() > 100 and limits is None:
    axes.set_yscale("log")
  else:
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
  if limits:
    axes.set_ylim(*limits)
  axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
  axes.set_xlabel("step", loc="right", color=_MUTED, fontsize=_SMALL, labelpad=1)
  for label, level in (marks or {}).items():
    axes.axhline(level, color=_MUTED, linewidth=1, linestyle=(0, (1, 2)))
    axes.annotate(
      label, (1, level), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points",
      ha="right", va="bottom", color=_MUTED, fontsize=_SMALL,
    )  # fmt: skip
  for label, step in (breaks or {}).items():
    axes.axvline(step, color=_MUTED, linewidth=0.8)
    axes.annotate(
      label, (step, 1), xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points",
      ha="left", va="top", color=_MUTED, fontsize=_SMALL,
    )  # fmt: skip
  return _svg(figure, name, "; ".join([name.replace("-", " "), *(_summary(line) for line in lines)]))


def _summary(line):
  finite = line.y[np.isfinite(line.y)]
  if not len(finite):
    return f"{line.name}: no finite value"
  return f"{line.name} from {finite[0]:.4g} to {finite[-1]:.4g} at step {line.x[np.isfinite(line.y)][-1]:,.0f}"


def usage_chart(name: str, counts: Num[np.ndarray, "k"]) -> str:
  """Share of uses of each code, codes sorted by use, against equal use.

  Args:
    name: unique in the page.
    counts: how often each code was chosen; not all zero.

  Returns:
    An `<svg>` element.
  """
  figure, axes = _axes(300, 165)
  share = 100 * np.sort(np.asarray(counts, float))[::-1] / np.sum(counts)
  codes, height = _thin(np.arange(len(share)) + 0.5, share)
  axes.fill_between(codes, height, color=_SERIES[0], alpha=0.85, linewidth=0)
  equal = 100 / len(share)
  axes.axhline(equal, color=_INK, linewidth=1, linestyle=(0, (4, 2)))
  axes.set_xlim(0, len(share))
  axes.set_ylim(0, None)
  axes.set_xlabel("codes, most used first", loc="right", color=_MUTED, fontsize=_SMALL, labelpad=1)
  axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
  axes.yaxis.set_major_locator(MaxNLocator(4))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
  most = f"{name.replace('-', ' ')}: most used code {share[0]:.2f} % of uses, equal use would be {equal:.2f} %"
  return _svg(figure, name, f"{most}, {int((share == 0).sum())} of {len(share)} codes unused")


def map_chart(name: str, points: Mapping[str, Float[np.ndarray, "..."]], pairs: Int[np.ndarray, "..."]) -> str:
  """Points of several modalities in the plane, with lines between some that belong together.

  Args:
    name: unique in the page.
    points: modality -> [N, 2]; each gets its colour and its shape.
    pairs: [P, 2], rows of the first and of the second modality to join; may be empty.

  Returns:
    An `<svg>` element.
  """
  figure, axes = _axes(380, 330)
  axes.set(xticks=[], yticks=[])
  axes.grid(False)
  for side in ("left", "bottom", "top", "right"):
    axes.spines[side].set(visible=True, color=_GRID)
  if len(pairs):
    first, second = list(points.values())[:2]
    segments = np.stack([first[pairs[:, 0]], second[pairs[:, 1]]], axis=1)
    axes.add_collection(LineCollection(segments, colors=_MUTED, linewidths=0.7, alpha=0.7, zorder=1))
  for i, xy in enumerate(points.values()):
    # A rim in the page's colour keeps marks that overlap apart; later modalities, on top, are drawn larger.
    style = dict(marker=MARKERS[i % 6], markersize=4.6 + 0.9 * min(i, 2), color=_SERIES[i % 6], zorder=2 + i)
    axes.plot(*xy.T, linestyle="none", markeredgecolor=_PAGE, markeredgewidth=0.5, alpha=0.9, **style)
  axes.margins(0.03)
  counts = ", ".join(f"{len(xy)} {modality}" for modality, xy in points.items())
  return _svg(figure, name, f"{name.replace('-', ' ')}: {counts} points, {len(pairs)} pairs joined")

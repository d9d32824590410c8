"""A run's gallery strip as one SVG file, for a README or a talk: queries, and what was found, right and wrong.

Command: python -m codebind_jax.tools.gallery --workdir=RUN --out=FILE.svg [--gallery="Text to image"] [--queries=4]
The pictures are those of the run's data: mind their licences. With `--shapes` and a config the run is made first, on
coloured shapes that the command draws itself (a minute or two):
         python -m codebind_jax.tools.gallery --shapes --config=configs/stage1.py:runlocal --workdir=DIR --out=FILE.svg
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from PIL import Image, ImageDraw

from codebind_jax import files
from codebind_jax.api import load
from codebind_jax.command_line import define_config, parse
from codebind_jax.data.task import open_task
from codebind_jax.evaluate import Evaluation
from codebind_jax.report import galleries
from codebind_jax.report.data import Gallery, Item
from codebind_jax.report.figures import alternative, thumbnail
from codebind_jax.runtime import signals
from codebind_jax.train import read_config
from codebind_jax.trunks.feeds import Feeder

COLOURS = {
  "red": "#d62728", "orange": "#ff8c1a", "yellow": "#f2c80f", "green": "#2ca02c", "blue": "#1f5fae",
  "purple": "#7b3fa0", "pink": "#f48fb1", "brown": "#7a4a21", "grey": "#8a8a8a", "black": "#111111",
}  # fmt: skip
SHAPES = ("circle", "ring", "square", "triangle", "star", "cross", "diamond", "crescent")
COPIES = 3  # drawings of each shape in each colour, of several sizes and places
_SIDE, _ASKED, _CELL, _ROW, _TOP = 96, 150, 112, 128, 62


def gallery_of(workdir: str | files.Path, title: str = "", queries: int = 4) -> Gallery:
  """A gallery of a finished run.

  Args:
    workdir: folder of the run.
    title: of the gallery, such as "Image to text"; "" for the first.
    queries: number of queries shown.

  Raises:
    ValueError: if the run's data has no gallery, or none of this title, naming those there are.
  """
  folder = files.path(workdir)
  model = load(str(folder))
  config = read_config(folder)
  task = open_task(config.data)
  evaluation = Evaluation(config, task, Feeder(config.data, config.model.towers, model.trunks), config.tasks)
  model.trunks = evaluation.trunks
  sets = galleries.shown_sets(task)
  made = galleries.galleries(config, sets, lambda place: evaluation.table(model, sets[place]), shown=queries)
  found = {gallery.title: gallery for gallery in made}
  if not found or title and title not in found:
    raise ValueError(f"{folder}: gallery {title!r} is not there; there are {list(found)}")
  return found[title] if title else next(iter(found.values()))


def strip(gallery: Gallery, answers: int = 4) -> str:
  """The gallery as an SVG image: a row a query, its best answers with ✓ in a full or ✗ in a dashed frame."""
  rows = [_row(number, query.asked, query.answers[:answers]) for number, query in enumerate(gallery.queries)]
  width, height = _ASKED + answers * _CELL + 16, _TOP + len(rows) * _ROW
  share = f"{gallery.first:,} of {gallery.asked:,} queries have a right first answer among {gallery.found:,}"
  said = "; ".join(f"{q.asked.text or alternative(q.asked)}: " + ", ".join(
    f"{a.text} ({'right' if a.right else 'wrong'})" for a in q.answers[:answers]) for q in gallery.queries)
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
    f'role="img" font-family="system-ui, sans-serif" font-size="12">'
    f"<title>{escape(f'{gallery.title}, {gallery.on}. {said}')}</title>"
    f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>'
    f'<text x="16" y="26" font-size="15" font-weight="600" fill="#1b1f24">{escape(gallery.title)}: '
    f"{escape(gallery.on)}</text>"
    f'<text x="16" y="46" fill="#59616c">{escape(share)}</text>{"".join(rows)}</svg>\n'
  )


def _row(number: int, asked: Item, answers: Sequence[Item]) -> str:
  top = _TOP + number * _ROW
  parts = [_picture(asked, 16, top + 8, 72)] if asked.image is not None else []
  at = top + (96 if parts else _ROW // 2)
  parts.append(f'<text x="16" y="{at}" font-size="13" font-weight="600" fill="#1b1f24">{_cut(asked.text, 20)}</text>')
  for place, answer in enumerate(answers):
    left = _ASKED + place * _CELL
    colour, mark, dashes = ("#17703a", "✓", "") if answer.right else ("#8b3a34", "✗", ' stroke-dasharray="4 3"')
    parts.append(f'<g class="{"right" if answer.right else "wrong"}"><rect x="{left}" y="{top + 4}" '
                 f'width="{_CELL - 8}" height="{_ROW - 12}" rx="6" fill="none" stroke="{colour}"{dashes}/>'
                 f'<text x="{left + 8}" y="{top + 19}" font-weight="700" fill="{colour}">{mark}</text>')  # fmt: skip
    if answer.image is not None:
      parts.append(_picture(answer, left + 16, top + 22, 72))
    at = top + (108 if answer.image is not None else _ROW // 2)
    parts.append(f'<text x="{left + 8}" y="{at}" font-size="11" fill="#1b1f24">{_cut(answer.text, 16)}</text></g>')
  return "".join(parts)


def _picture(item: Item, left: int, top: int, side: int) -> str:
  source, (width, height) = thumbnail(np.asarray(item.image), item.text)
  scale = side / max(width, height)
  x, y = left + (side - scale * width) / 2, top + (side - scale * height) / 2
  return (f'<image x="{x:.1f}" y="{y:.1f}" width="{scale * width:.1f}" height="{scale * height:.1f}" href="{source}">'
          f"<title>{escape(alternative(item))}</title></image>")  # fmt: skip


def _cut(text: str, most: int) -> str:
  return escape(text if len(text) <= most else f"{text[: most - 1].rstrip()}…")


def draw_shapes(folder: Path) -> Path:
  """Draws `SHAPES` in `COLOURS` and writes a manifest; every fourth pair of shape and colour is held out as val.

  Returns:
    The manifest, `folder/drawn shapes.jsonl`.
  """
  folder.mkdir(parents=True, exist_ok=True)
  lines = []
  for s, shape in enumerate(SHAPES):
    for c, colour in enumerate(COLOURS):
      held_out = (3 * s + c) % 4 == 0  # every shape and every colour is seen, this pair is not
      for copy in range(1 if held_out else COPIES):
        name = f"{colour}-{shape}-{copy}.png"
        _drawn(shape, COLOURS[colour], 0.30 + 0.06 * ((s + c + copy) % 3), copy).save(folder / name)
        text = f"{colour} {shape}"
        lines.append({"id": name, "image": name, "text": text, "split": "val" if held_out else "train"})
  path = folder / "drawn shapes.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
  return path


def _drawn(shape: str, colour: str, size: float, copy: int) -> Image.Image:
  """A shape of radius `size` of the side, drawn at four times the size and made smaller."""
  side = 4 * _SIDE
  picture = Image.new("RGB", (side, side), "white")
  draw, radius = ImageDraw.Draw(picture), size * side
  x, y = side / 2 + (copy - 1) * 0.04 * side, side / 2 + (copy % 2) * 0.04 * side
  round_, inner = (x - radius, y - radius, x + radius, y + radius), 0.55 * radius
  turned = lambda count, radii, start=-90: [
    (x + radii[i % len(radii)] * math.cos(math.radians(start + 360 * i / count)),
     y + radii[i % len(radii)] * math.sin(math.radians(start + 360 * i / count))) for i in range(count)
  ]  # fmt: skip
  if shape in ("circle", "ring", "crescent"):
    draw.ellipse(round_, fill=colour)
    if shape == "ring":
      draw.ellipse((x - inner, y - inner, x + inner, y + inner), fill="white")
    if shape == "crescent":
      draw.ellipse((x - 0.45 * radius, y - 1.05 * radius, x + 1.4 * radius, y + 0.8 * radius), fill="white")
  elif shape == "cross":
    arm = 0.36 * radius
    draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
    draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
  else:
    points = {"square": (4, (radius,), -45), "diamond": (4, (radius, 0.62 * radius), -90),
              "triangle": (3, (radius,), -90), "star": (10, (radius, 0.42 * radius), -90)}  # fmt: skip
    count, radii, start = points[shape]
    draw.polygon(turned(count, radii, start), fill=colour)
  return picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)


def main(_: Sequence[str]) -> None:
  """Makes the run where asked for, and writes the strip."""
  settings = flags.FLAGS
  if not settings.workdir or not settings.out or settings.shapes and settings.config is None:
    sys.exit("error: --workdir=DIR and --out=FILE.svg are both needed, and --config=FILE.py with --shapes")
  try:
    if settings.shapes:
      from codebind_jax.train import train_and_evaluate

      config = settings.config.copy_and_resolve_references().unlock()
      config.data.files = (str(draw_shapes(Path(settings.workdir) / "shapes")),)
      config.batch_size, config.baseline = min(config.batch_size, 48), False  # of 180 rows
      for stage in config.stages.values():
        stage.batch_size = config.batch_size
      train_and_evaluate(config.lock(), settings.workdir)
    files.write_whole(files.path(settings.out), strip(gallery_of(settings.workdir, settings.gallery, settings.queries)))
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":  # flags of its own: importing it defines none
  define_config()
  flags.DEFINE_string("workdir", None, "Folder of the run.")
  flags.DEFINE_string("out", None, "The SVG file to write.")
  flags.DEFINE_string("gallery", "", 'Title of the gallery, such as "Image to text"; the first one unless set.')
  flags.DEFINE_integer("queries", 4, "Number of queries shown.", lower_bound=1)
  flags.DEFINE_bool("shapes", False, "Draw coloured shapes, and make the run on them first.")
  logging.set_verbosity(logging.WARNING)
  signals.command(app.run, main, flags_parser=parse)

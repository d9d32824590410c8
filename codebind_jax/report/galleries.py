"""Galleries of a run: queries of one modality and what a model finds in another, of any set and any two modalities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from codebind_jax.config import Config
from codebind_jax.data.records import Source
from codebind_jax.data.task import EvalSet, Task
from codebind_jax.evaluators import base, contents
from codebind_jax.evaluators.pairs import keys_of
from codebind_jax.report import pictures
from codebind_jax.report.data import Gallery, Item, build_gallery

Pair = tuple[str, str, str]  # modality, modality, field whose equal values answer each other
FIELDS = {"id": "of one item", "caption": "", "label": "of one label"}


def shown_sets(task: Task) -> list[EvalSet]:
  """Sets to show items of, best first: validation sets, test sets, and the training rows where there is no other."""
  sets = sorted(task.evals, key=lambda test: test.role != "val")
  return sets or [EvalSet(f"{world}_train", world, "train", source, title=f"{world}, training rows (seen in training)")
                  for world, source in task.train.items()]  # fmt: skip


def sides_of(table: base.Captioned, a: str, b: str, field: str) -> dict[str, contents.Side]:
  """Modality -> its contents, each once, and their values of a field that both have; {} where they share none."""
  keys = keys_of(table, a, b, field)
  if not keys:
    return {}
  return dict(zip((a, b), contents.sides(tuple(contents.contents_of(table, m) for m in (a, b)), (keys[a], keys[b]))))


def pairs_of(config: Config, test: EvalSet, table: base.Captioned) -> list[Pair]:
  """Pairs of modalities that a set can show: each with text by caption, then the set's own, then those that were bound.

  Two modalities make one pair, by the first field that both have values of in common.
  """
  named = [("text", m, "caption") for m in sorted(table, key=lambda m: m != "image") if m != "text"]
  bound = [(a, b, "id") for stage in config.ordered for a, b in stage.pairs if "text" not in (a, b)]
  pairs: dict[frozenset[str], Pair] = {}
  for a, b, field in (*named, *test.pairs, *bound):
    if all(m in table and field in table[m] for m in (a, b)) and keys_of(table, a, b, field):
      pairs.setdefault(frozenset((a, b)), (a, b, field))
  return list(pairs.values())


def galleries(
  config: Config, sets: Sequence[EvalSet], table_of: Callable[[int], base.Captioned], *, most: int = 12, shown: int = 4
) -> Iterator[Gallery]:
  """Both directions of every pair of modalities whose items can be drawn, each on the first set that has it.

  A set is embedded only where it has a modality that no set before it has shown.

  Args:
    config: of the run.
    sets: best first.
    table_of: place of a set -> its embeddings.
    most: number of galleries.
    shown: queries of each.
  """
  done: set[frozenset[str]] = set()
  for place, test in enumerate(sets):
    if {*test.source.modalities} & {*config.model.towers} <= {m for pair in done for m in pair}:
      continue
    table = table_of(place)
    for a, b, field in pairs_of(config, test, table):
      sides = sides_of(table, a, b, field)
      items = {m: _Items(test.source, m, table[m], side.rows) for m, side in sides.items()}
      if frozenset((a, b)) in done or not any(item.drawn for item in items.values()):
        continue
      done.add(frozenset((a, b)))
      if len(done) > most // 2:
        return
      for asked, found in ((a, b), (b, a)):
        how = f" {FIELDS.get(field, f'of one {field}')}".rstrip()
        x = {m: table[m]["shared"][sides[m].rows] for m in (a, b)}
        yield build_gallery(
          f"{asked.capitalize()} to {found}{how}", test.title or test.name, items[asked], x[asked], items[found],
          x[found], relevant=(sides[asked], sides[found]), shown=shown,
          kind="texts" if found == "text" else "pictures",
        )  # fmt: skip


class _Items(Sequence):
  """Items of one modality in a set, read and drawn when asked for.

  Attributes:
    drawn: whether they are drawn; texts and vectors are not.
  """

  def __init__(self, source: Source, modality: str, columns: base.Columns, rows: np.ndarray):
    self._columns = {f: columns[f][rows] for f in ("id", "caption", "label") if f in columns}
    self._source, self._modality = source, modality
    self._rows: Mapping[str, int] = {}
    if modality != "text":
      self._rows = {str(name): row for row, name in enumerate(source.column("id"))}
    self.drawn = modality != "text" and pictures.drawable(modality, self._item(0))

  def __len__(self) -> int:
    return len(next(iter(self._columns.values())))

  def __getitem__(self, index: int) -> Item:
    name = next((str(self._columns[f][index]) for f in ("caption", "label", "id")
                 if f in self._columns and str(self._columns[f][index])), "")  # fmt: skip
    if not self.drawn:
      return Item(name)
    kind = pictures.DRAWN[self._modality].kind
    return Item(name, np.asarray(pictures.draw(self._modality, self._item(index))), kind=kind)

  def _item(self, index: int):
    return self._source.read(self._rows[str(self._columns["id"][index])], self._modality)

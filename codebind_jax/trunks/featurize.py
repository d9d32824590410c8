"""Token features of a source's rows by the frozen trunks of a config, cached on disk."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from codebind_jax.data.batches import FeatureTable
from codebind_jax.data.task import Data
from codebind_jax.data.transforms.augment import Augment
from codebind_jax.data.worlds import fetch
from codebind_jax.models.towers import TowerSpec
from codebind_jax.trunks import load_trunk
from codebind_jax.trunks.cache import cached_features, content_hash


def captions(texts: Sequence[str], templates: Sequence[str], mode: str = "each") -> list[str]:
  """Training captions of a row without repeats: every template with the main text, and further texts by `mode`.

  Args:
    texts: of one row, the main text first.
    templates: strings with one `{}` each.
    mode: "main" omits the further texts, "each" makes every one a caption, "joined" adds one caption that lists all
      texts (a further text alone, such as "animal", may fit many other rows).

  >>> captions(["cow", "calf", "ox"], ["{}", "an icon of a {}"])
  ['cow', 'an icon of a cow', 'calf', 'ox']
  >>> captions(["cow", "calf", "ox"], ["{}", "an icon of a {}"], "joined")
  ['cow', 'an icon of a cow', 'cow, calf, ox']
  """
  main = [template.format(texts[0]) for template in templates]
  rest = {"main": [], "each": texts[1:], "joined": [", ".join(texts)]}[mode]
  return list(dict.fromkeys([*main, *rest]))


def joined(tables: Sequence[FeatureTable]) -> FeatureTable:
  """The rows of several tables of one modality, concatenated."""
  if len(tables) == 1:
    return tables[0]
  starts = [0, *itertools.accumulate(len(table.features) for table in tables)]
  choices = [tuple(start + item for item in own) for start, table in zip(starts, tables) for own in table.choices]
  made_from = content_hash(" ".join(table.fingerprint for table in tables))[:16]
  return FeatureTable(np.concatenate([table.features for table in tables]), choices, tables[0].augmented, made_from)


class Featurizer:
  """The trunks of a model's towers and their feature cache.

  Args:
    data: `root` of the cache, templates and captions.
    towers: by modality.
    trunks: modality -> Trunk, those already loaded.

  Attributes:
    trunks: modality -> Trunk.
  """

  def __init__(self, data: Data, towers: Mapping[str, TowerSpec], trunks: Mapping[str, Any] | None = None):
    self._data, self._towers = data, towers
    self._cache = fetch.features_dir(data.root or None)
    self._texts: dict[str, np.ndarray] = {}
    self.trunks = dict(trunks or {})
    for name, tower in towers.items():
      if name not in self.trunks:
        self.trunks[name] = load_trunk(tower.trunk, **tower.options)

  def table(
    self, source: Any, modality: str, augmented: bool = False, templates: Sequence[str] = ()
  ) -> FeatureTable:
    """Features of one modality for all rows of a source; rows without it have no items.

    Args:
      source: the rows.
      modality: one of the towers'.
      augmented: adds the tower's augmented views to the clean one, for training.
      templates: of captions; `config.data.templates` unless given.
    """
    rows = [i for i in range(len(source)) if source.has(i, modality)]
    if not rows:
      raise ValueError(f"{source.name}: no row has modality {modality!r}")
    if modality == "text":
      return self._text_table(source, rows, templates or self._data.templates)
    tower = self._towers[modality]
    views = tower.views if augmented else 1
    hashes = {row: source.content_hash(row, modality) for row in rows}
    # Rows of equal content (a cloud paired with six pictures) share a clean view; augmented views differ by row.
    content = hashes if views == 1 else dict(zip(rows, rows))
    first = {content[row]: row for row in reversed(rows)}
    distinct = sorted(first.values())
    present = source if len(distinct) == len(source) else source.select(distinct)
    features = cached_features(
      self.trunks[modality], present.keys, self._reader(present, modality), cache_dir=self._cache, views=views,
      augment=Augment() if views > 1 else None, hashes=[hashes[row] for row in distinct], encode=tower.cache,
    )  # fmt: skip
    number = {row: item for item, row in enumerate(distinct)}
    item = {row: number[first[content[row]]] for row in rows}
    choices = [(item[i],) if i in item else () for i in range(len(source))]
    made_from = pathlib.Path(features.filename).parent.name  # the folder's name has a hash of all that decides it
    return FeatureTable(features, choices, tower.augmented if views > 1 else 0.0, made_from)

  def train_tables(
    self, train: Mapping[str, Any], unique: Mapping[str, str], extra: Mapping[str, Any] | None = None
  ) -> tuple[dict[str, dict[str, FeatureTable]], dict[str, list[str | None]]]:
    """Features of each source's modalities with augmented views, and labels of its rows.

    Args:
      train: source name -> training rows.
      unique: source name -> the field that is the rows' label.
      extra: source name -> further rows, appended to those of `train`.

    Returns:
      (source -> modality -> table, source -> value of the field per row).

    Raises:
      ValueError: if there are no training rows.
    """
    if not train or not all(map(len, train.values())):
      raise ValueError("data: there are no training rows (split 'train')")
    parts = {name: [source, *([extra[name]] if extra and name in extra else [])] for name, source in train.items()}
    table = lambda name, part, m: self.table(part, m, augmented=True, templates=self._data.templates_of.get(name, ()))
    tables = {
      name: {m: joined([table(name, part, m) for part in own]) for m in self._towers if m in own[0].modalities}
      for name, own in parts.items()
    }
    labels = {
      name: [row.get(unique[name]) or None for part in own for row in part.rows] for name, own in parts.items()
    }
    return tables, labels

  def _reader(self, source: Any, modality: str) -> Callable[[int], Any]:
    """Row -> its decoded value: by the trunk's own reading of the file, where it has one and the source has files."""
    trunk = self.trunks[modality]
    if trunk.input.read and hasattr(source, "item"):
      return lambda i: trunk.read(source.item(i, modality))
    return lambda i: source.read(i, modality)

  def texts(self, strings: Sequence[str]) -> np.ndarray:
    """Tokens float16 [N, T, C] of strings, or prepared ids, kept in memory and on disk."""
    new = [text for text in dict.fromkeys(strings) if text not in self._texts]
    if new:
      features = cached_features(
        self.trunks["text"], new, new.__getitem__, cache_dir=self._cache, hashes=new,
        encode=self._towers["text"].cache,
      )  # fmt: skip
      self._texts.update(zip(new, np.asarray(features[:, 0])))
    return np.stack([self._texts[text] for text in strings])

  def _text_table(self, source: Any, rows: Sequence[int], templates: Sequence[str]) -> FeatureTable:
    mode = self._data.captions
    by_row = {row: captions(source.rows[row]["text"], templates, mode) for row in rows}
    strings = sorted({caption for own in by_row.values() for caption in own})
    number = {caption: n for n, caption in enumerate(strings)}
    logging.info("%s: %d distinct captions of %d rows", source.name, len(strings), len(rows))
    choices = [tuple(number[caption] for caption in by_row.get(row, ())) for row in range(len(source))]
    made_from = content_hash("\0".join([self.trunks["text"].fingerprint, *strings]))[:16]
    return FeatureTable(self.texts(strings)[:, None], choices, made_from=made_from)

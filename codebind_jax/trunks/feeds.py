"""What the batches of a config's towers are read from: items prepared anew each time, or cached tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Float

from codebind_jax.data import augment
from codebind_jax.data.examples import Feed, Items, Texts, Tokens, Values, captions, digest
from codebind_jax.data.records import Source
from codebind_jax.data.task import Data
from codebind_jax.data.units import Strings, Units, Views
from codebind_jax.data.worlds import fetch
from codebind_jax.models.towers import TowerSpec
from codebind_jax.runtime import distributed
from codebind_jax.trunks import load_trunk
from codebind_jax.trunks.cache import REVISION, Contents, TokenCache, key_of, string_keys


class Feeder:
  """The trunks of a model's towers, and what their items are read from.

  Tokens of towers with `cache` are computed where they are not cached yet: by all processes, each on its devices, so
  that all must make the same feeds in the same order.

  Args:
    data: section: `root` of the cache, templates and captions.
    towers: by modality.
    trunks: modality -> Trunk, those already loaded.

  Attributes:
    trunks: modality -> Trunk.
    bad: messages of items that could not be read for the cache.
    process: (number of this process, number of processes that make the same feeds).
  """

  def __init__(self, data: Data, towers: Mapping[str, TowerSpec], trunks: Mapping[str, Any] | None = None):
    self._data, self._towers = data, towers
    self._folder = fetch.features_dir(data.root or None)
    self._caches: dict[str, TokenCache] = {}
    self._made: dict[tuple[int, str], tuple[Source, Feed]] = {}
    self.bad: list[str] = []
    self.process = jax.process_index(), jax.process_count()
    self.trunks = dict(trunks or {})
    for name, tower in towers.items():
      if name not in self.trunks:
        self.trunks[name] = load_trunk(tower.trunk, **tower.options)

  def train(self, source: Source, modality: str, templates: Sequence[str] = ()) -> Feed:
    """Training items of a source's rows: augmented, and with all captions.

    Args:
      source: the rows.
      modality: one of the towers'.
      templates: of captions; `config.data.templates` unless given.

    Raises:
      ValueError: if no row has the modality, or more items than allowed cannot be read for the cache.
    """
    tower, trunk = self._towers[modality], self.trunks[modality]
    templates = tuple(templates) or self._data.templates
    if modality == "text":
      if tower.cache:
        return self._captions(source, templates)
      return Texts(source, trunk.input, templates, self._data.captions)
    own = augment.make(modality, tower.augment) if tower.augment else None
    if not tower.cache:
      return Items(source, modality, trunk.input, own)
    return self._cached(source, modality, tower.views, own)

  def clean(self, source: Source, modality: str) -> Feed:
    """Items of a source's rows as they are, for evaluation; of cached tokens the pooled one alone."""
    key = id(source), modality
    if key not in self._made:  # with its source, which keeps the id of the source its own
      if self._towers[modality].cache and modality != "text":
        feed = dataclasses.replace(self._cached(source, modality, 1, None), pooled=True)
      else:
        feed = self.train(source, modality) if modality == "text" else Items(
          source, modality, self.trunks[modality].input)  # fmt: skip
      self._made[key] = source, feed
    return self._made[key][1]

  def texts(self, strings: Sequence[str]) -> Feed:
    """Texts for evaluation; row i is string i."""
    trunk = self.trunks["text"]
    if not self._towers["text"].cache:
      return Values(list(strings), "text", trunk.input)
    distinct = list(dict.fromkeys(strings))
    places, keys = self._string_places(distinct)
    number = {text: n for n, text in enumerate(distinct)}
    rows = np.array([number[text] for text in strings], np.int64)
    return Tokens(self._cache("text").reader, np.arange(len(strings) + 1), places[rows][:, None],
                  made_from=digest(keys), pooled=True)  # fmt: skip

  def train_feeds(
    self, train: Mapping[str, Source], templates: Mapping[str, Sequence[str]]
  ) -> dict[str, dict[str, Feed]]:
    """Source -> modality -> training feed, of the modalities that both the source and the towers have.

    Raises:
      ValueError: if there are no training rows.
    """
    if not train or not all(map(len, train.values())):
      raise ValueError("data: there are no training rows (split 'train')")
    return {
      name: {m: self.train(source, m, templates.get(name, ())) for m in self._towers if m in source.modalities}
      for name, source in train.items()
    }

  def _cache(self, modality: str) -> TokenCache:
    if modality not in self._caches:
      self._caches[modality] = TokenCache(self._folder, self.trunks[modality])
    return self._caches[modality]

  def _cached(self, source: Source, modality: str, views: int, change: Any) -> Tokens:
    rows = source.rows_with(modality)
    if not len(rows):
      raise ValueError(f"{source.name}: no row has modality {modality!r}")
    own = rows[self.process[0] :: self.process[1]]
    contents = Contents(fetch.data_dir(self._data.root or None) / "contents.sqlite")
    hashes = contents.hashes(
      [source.identity(int(row), modality) for row in own], lambda n: self._content(source, int(own[n]), modality)
    )  # fmt: skip
    # An item that cannot be read is its place, so that the cache names it.
    hashes = [content or f"unreadable {source.where(int(row))}" for row, content in zip(own, hashes)]
    keys = np.array([
      key_of(REVISION, content) if not view else
      key_of(REVISION, content, str(view), repr(change), source.fields(int(row))["id"])
      for row, content in zip(own, hashes) for view in range(views)
    ], np.uint64).reshape(len(own), views * 2)  # fmt: skip
    keys = distributed.interleaved(keys, len(rows), self.process[1]).reshape(-1, 2)
    feed = Items(source, modality, self.trunks[modality].input)
    places = self._filled(modality, keys, Views(source, rows, feed, views, change))
    starts = np.zeros(len(source) + 1, np.int64)
    starts[rows + 1] = 1
    share = self._towers[modality].augmented if views > 1 else 0.0
    return Tokens(self._cache(modality).reader, np.cumsum(starts), places.reshape(-1, views), share, digest(keys))

  @staticmethod
  def _content(source: Source, row: int, modality: str) -> str:
    """An item's content hash; "" of one that cannot be read, of which the fill of the cache says why."""
    try:
      return source.content_hash(row, modality)
    except (ValueError, OSError):
      return ""

  def _captions(self, source: Source, templates: Sequence[str]) -> Tokens:
    rows = source.rows_with("text")
    if not len(rows):
      raise ValueError(f"{source.name}: no row has modality 'text'")
    by_row = [captions(source.fields(int(row))["text"], templates, self._data.captions) for row in rows]
    strings = sorted({caption for own in by_row for caption in own})
    logging.info("%s: %d distinct captions of %d rows", source.name, len(strings), len(rows))
    places, keys = self._string_places(strings)
    number = {caption: n for n, caption in enumerate(strings)}
    starts = np.zeros(len(source) + 1, np.int64)
    starts[rows + 1] = [len(own) for own in by_row]
    choices = np.array([number[caption] for own in by_row for caption in own], np.int64)
    return Tokens(self._cache("text").reader, np.cumsum(starts), places[choices][:, None],
                  made_from=digest(np.concatenate([keys[choices].reshape(-1), starts.astype(np.uint64)])))  # fmt: skip

  def _string_places(self, strings: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    keys = string_keys(strings)
    return self._filled("text", keys, Strings(strings, self.trunks["text"].input.prepare)), keys

  def _filled(self, modality: str, keys: np.ndarray, prepared: Units) -> np.ndarray:
    places, bad = self._cache(modality).fill(
      keys, prepared, process=self.process[0], processes=self.process[1],
      wait=distributed.wait_for_all if self.process[1] > 1 else lambda name: None, workers=self._data.workers,
      threads=self._data.threads,
    )  # fmt: skip
    self._refuse(bad, int((places.reshape(len(prepared), -1) < 0).any(axis=1).sum()))
    return places

  def _refuse(self, bad: Iterable[str], count: int) -> None:
    """Counts items that cannot be read, and refuses more than are allowed."""
    for message in bad:
      logging.warning("left out %s", message)
      self.bad.append(message)
    allowed = self._data.max_bad_records
    if count > allowed:
      first = self.bad[0] if self.bad else "items that another process could not read"
      raise ValueError(f"{first} ({count} bad records, {allowed} allowed by config.data.max_bad_records)")


def whitening_tokens(feed: Tokens) -> Float[np.ndarray, "n c"]:
  """The pooled token of the clean view of all distinct items of a feed."""
  places = feed.places[:, 0]
  distinct = places[np.sort(np.unique(places, return_index=True)[1])]
  return np.stack([feed.reader(int(place), pooled=True)[0] for place in distinct if place >= 0]).astype(np.float32)

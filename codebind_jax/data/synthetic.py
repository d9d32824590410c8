"""A nine-modality world with known latent factors: instant, of any size, for tests and smoke runs.

Every item has a class and a style that all modalities show, and for each modality a private factor that only it shows.
A sensor's vector is a fixed random two-layer network of the factors' codes plus noise; text names class and style in
words. World "synthetic" has all modalities in every row; "synthetic-image-depth" has those named, and text where named.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from codebind_jax.data.index import MODALITIES, index_of
from codebind_jax.data.records import Source
from codebind_jax.data.worlds.evalset import EvalSet

NAME = "synthetic"
SENSORS = tuple(m for m in MODALITIES if m != "text")
_CODE = 8  # width of a factor's code


@dataclasses.dataclass(frozen=True)
class Factors:
  """Latent factors of the world.

  Attributes:
    classes, styles, private: how many values each factor has.
    width: of a sensor's vector.
    noise: standard deviation of the noise added to a vector, whose own is 1.
    quality: sensor -> weight of the class's code in its vector; 1 where not named, 0 for a sensor blind to the class.
    style_quality: likewise of the style's code.
    missing: sensor -> share of rows that lack it; 0 where not named.
    hidden: share of the values of every vector that are set to 0, drawn by item and sensor.
    seed: of the mixing networks and of all draws.
  """

  classes: int = 32
  styles: int = 4
  private: int = 6
  width: int = 64
  noise: float = 0.15
  quality: Mapping[str, float] = dataclasses.field(default_factory=dict)
  style_quality: Mapping[str, float] = dataclasses.field(default_factory=dict)
  missing: Mapping[str, float] = dataclasses.field(default_factory=dict)
  hidden: float = 0.0
  seed: int = 0


def _rng(*key: Any) -> np.random.Generator:
  return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little"))


@dataclasses.dataclass(frozen=True)
class Draw:
  """n drawn items.

  Attributes:
    label, style: values of the shared factors.
    private: sensor -> values of its private factor.
    arrays: sensor -> vectors [n, width].
    held: sensor -> whether each item has it.
  """

  label: Int[np.ndarray, "n"]
  style: Int[np.ndarray, "n"]
  private: Mapping[str, Int[np.ndarray, "n"]]
  arrays: Mapping[str, Float[np.ndarray, "n d"]]
  held: Mapping[str, Any]


def draw(factors: Factors, split: str, count: int, sensors: Sequence[str] = SENSORS) -> Draw:
  """Items of a split; they depend on `count`, so that a larger draw does not continue a smaller one.

  Args:
    factors: the world.
    split: items of different splits are independent.
    count: n.
    sensors: which modalities, of `SENSORS`.
  """
  codes = {name: _rng(factors.seed, name).standard_normal((size, _CODE)) for name, size in (
    ("class", factors.classes), ("style", factors.styles), *((f"private {m}", factors.private) for m in sensors))}
  pick = lambda name, size: _rng(factors.seed, split, name).integers(size, size=count)
  label, style = pick("class", factors.classes), pick("style", factors.styles)
  private, arrays, held = {}, {}, {}
  for sensor in sensors:
    private[sensor] = pick(f"private {sensor}", factors.private)
    quality, style_quality = (weight.get(sensor, 1.0) for weight in (factors.quality, factors.style_quality))
    own = codes[f"private {sensor}"][private[sensor]]
    shown = [quality * codes["class"][label], style_quality * codes["style"][style], own]
    weights = _rng(factors.seed, "mixing", sensor)
    first = weights.standard_normal((3 * _CODE, 4 * factors.width)) / np.sqrt(3 * _CODE)
    second = weights.standard_normal((4 * factors.width, factors.width)) / np.sqrt(2 * factors.width)
    clean = np.tanh(np.concatenate(shown, axis=1) @ first) @ second
    noise = _rng(factors.seed, split, "noise", sensor)
    arrays[sensor] = (clean / clean.std() + factors.noise * noise.standard_normal(clean.shape)).astype(np.float32)
    held[sensor] = noise.random(count) >= factors.missing.get(sensor, 0.0)
    if factors.hidden:
      arrays[sensor] *= _rng(factors.seed, split, "hidden", sensor).random(clean.shape) >= factors.hidden
  return Draw(label, style, private, arrays, held)


def label_name(number: int | np.integer) -> str:
  """Class 7 is called "kind7"."""
  return f"kind{number}"


class SyntheticSource(Source):
  """Rows of one split; a sensor's array is a float32 vector [width]."""

  def __init__(self, factors: Factors, split: str, count: int, modalities: Sequence[str]):
    sensors = tuple(m for m in modalities if m != "text")
    self._factors, self._split = factors, split
    self._draw = d = draw(factors, split, count, sensors)
    texts = lambda i: {"text": [label_name(d.label[i]), f"{label_name(d.label[i])} style{d.style[i]}"]}
    self._rows = [
      {"id": f"{split}{i}", "label": label_name(d.label[i]), "concept": label_name(d.label[i]),
       "style": f"style{d.style[i]}", "kind": f"{label_name(d.label[i])} style{d.style[i]}"}
      | {f"private_{m}": f"p{d.private[m][i]}" for m in sensors} | (texts(i) if "text" in modalities else {})
      for i in range(count)
    ]  # fmt: skip
    has = ([m for m in modalities if m == "text" or d.held[m][i]] for i in range(count))
    super().__init__(f"{NAME}/{split}", index_of(self._rows, has))

  def _fields(self, number: int) -> dict[str, Any]:
    return self._rows[number]

  def _hash(self, number: int, modality: str) -> str:
    """From the world's factors, the split and the row's number."""
    key = (self._factors, self._split, number, modality)
    return hashlib.sha256(repr(key).encode()).hexdigest()

  def _read(self, number: int, modality: str) -> np.ndarray:
    return self._draw.arrays[modality][number]


@dataclasses.dataclass(frozen=True)
class World:
  """The world as `data.worlds.registry` describes it.

  Attributes:
    modalities: of its rows.
    factors: its latent factors.
  """

  modalities: tuple[str, ...] = MODALITIES
  factors: Factors = Factors()

  PROFILES = ("tiny", "small", "full")
  UNIQUE = "kind"  # rows of one class and style are not each other's negatives
  ROWS = {"tiny": 512, "small": 4096, "full": 32768}

  @classmethod
  def named(cls, world: str) -> World:
    """The world that "synthetic" or "synthetic-image-depth" names.

    Raises:
      ValueError: for a modality that does not exist.
    """
    asked = tuple(world.split("-")[1:])
    for modality in asked:
      if modality not in MODALITIES:
        raise ValueError(f"world {world!r}: unknown modality {modality!r}; allowed: {list(MODALITIES)}")
    return cls(asked or MODALITIES)

  def open_split(self, profile: str, split: str) -> SyntheticSource:
    """Rows of a split: as many as the profile says for train, a quarter of that for val and test."""
    if profile not in self.PROFILES:
      raise ValueError(f"unknown profile {profile!r} of world {NAME!r}; allowed: {list(self.PROFILES)}")
    rows = self.ROWS[profile] if split == "train" else min(self.ROWS[profile] // 4, 2048)
    return SyntheticSource(self.factors, split, rows, self.modalities)

  def eval_sets(self, profile: str) -> dict[str, EvalSet]:
    """Validation and test; linear probes, which take long, on test alone, of every modality's private factor too."""
    labels = tuple(label_name(k) for k in range(self.factors.classes)) if "text" in self.modalities else ()
    probes = {"val": (), "test": ("label", "style", "private_{modality}")}
    return {
      split: EvalSet(split=split, role=split, candidates=labels, probes=fields, means=("label",))
      for split, fields in probes.items()
    }

  def package_ids(self, profile: str) -> list[str]:
    """None, since it is drawn in memory."""
    return []

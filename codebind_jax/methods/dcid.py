"""DCID (Uni-Code, NeurIPS 2023) and H-DCID (arXiv 2403.05168 v1): one codebook shared by all modalities.

A modality's shared head gives its general features, its specific head (through a ReLU) its specific features;
`codebook.unified` has the quantiser, `losses` the terms. The towers are those of every method, so that the papers'
encoders are not ported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from codebind_jax.codebook import unified
from codebind_jax.compositional import ModalityOutput
from codebind_jax.methods.base import EXTRA, Forward, Rows, Term, output
from codebind_jax.methods.unified import Unified, chosen_codes, masked_mse, modalities_together, same_steps
from codebind_jax.models.critics import ConditionalGaussian, club_start
from codebind_jax.models.levels import TokenDecoder
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.schema import Weight, at_least
from codebind_jax.stages import Stage

# The released code's choices, as options (`config.method_options = dcid.RELEASE`).
RELEASE = {
  "first_codes": "uniform", "start_count": 0.0, "form": "sequential", "beta": 0.5, "reduce": "mean", "reset_by": "any",
  "reset_keep": "codes_only", "club_input": "quantized", "club_per_step": False, "cpc_layers": 2,
  "cpc_over": "predictions", "cpc_self": 0.1, "matching": 0.5, "order": ("audio", "video", "text"),
}


@dataclasses.dataclass(frozen=True)
class Level:
  """One level of one source's rows.

  Attributes:
    book: name of its codebook.
    prefix: of its CLUB networks' names; "" for the first level.
    weight: of its terms.
    z: modality -> general vectors [b, t, d].
    specific: modality -> specific vectors [b, t, p].
    targets: modality -> vectors to be reconstructed [b, t, c].
    codes: [k, d], before the batch.
    quantized: modality -> quantised vectors.
    general: modality -> general vectors that CLUB compares with the specific ones.
    club: name -> fitted networks.
    start_rng, club_rng: keys of CPC's start and of CLUB's shuffle.
  """

  book: str
  prefix: str
  weight: Any
  z: Mapping[str, Array]
  specific: Mapping[str, Array]
  targets: Mapping[str, Array]
  codes: Array
  quantized: Mapping[str, unified.UnifiedQuantized]
  general: Mapping[str, Array]
  club: Mapping[str, Any]
  start_rng: Any
  club_rng: Any

  def named(self, what: str) -> str:
    """Prefix of the level's parameter names: `predict_` or `predict2_`, for example."""
    return f"{what}2_" if self.prefix else f"{what}_"


@dataclasses.dataclass(frozen=True)
class Method(Unified):
  """L = reconstruction + commitment + CPC + code matching + CLUB, unweighted; an embedding is the quantised vector.

  Attributes:
    levels: 2 adds H-DCID's second level, which splits the specific features into general and specific ones again, with
      a codebook of its own; `specific` of an embedding is then the second level's code.
    second_weight: weight of the second level's terms (release: 0.3).
    second_after: number of steps before the second level's terms count (release: three epochs).
  """

  BASE = "coding"

  levels: Literal[1, 2] = 1
  second_weight: Weight = 0.3
  second_after: Annotated[int, at_least(0)] = 100

  def init(self, rng: Any, features: Mapping[str, Array], inputs: Mapping[str, Array], towers: Any) -> tuple:
    """Parameters of decoders and predictors; the codebooks; CLUB's networks in aux."""
    keys = iter(jax.random.split(rng, 6 * len(features) + 5))
    features = same_steps(features)
    z = {m: self.shared(m, x) for m, x in features.items()}
    own = {m: self.specific_features(m, x) for m, x in features.items()}
    params = self.predictors(next(keys), z)
    aux: dict[str, Any] = {"club": {}, "step": jnp.zeros((), jnp.int32)}
    for m in sorted(z):
      decoder = TokenDecoder(inputs[m].shape[-1], z[m].shape[-1])
      params[f"decode_{m}"] = decoder.init(next(keys), z[m], own[m])["params"]
      if self.has_specific(m):
        aux["club"][m] = club_start(ConditionalGaussian(own[m].shape[-1], self.club_hidden), next(keys), z[m])
    books = {"shared": self.new_codebook(next(keys), z[sorted(z)[0]].shape[-1], z)}
    if self.levels > 1:
      second = {m: own[m] for m in sorted(own) if self.has_specific(m)}
      width = z[sorted(z)[0]].shape[-1]
      books["second"] = self.new_codebook(next(keys), width, second)
      steps = {m: jnp.zeros((*x.shape[:2], width)) for m, x in second.items()}
      params |= self.predictors(next(keys), steps, "predict2_")
      for m, x in second.items():
        level = {part: nn.Dense(width).init(next(keys), x)["params"] for part in ("general", "specific")}
        params[f"second_{m}"] = level
        deeper = nn.Dense(width).apply({"params": level["general"]}, x)
        params[f"decode2_{m}"] = TokenDecoder(x.shape[-1], width).init(next(keys), deeper, deeper)["params"]
        aux["club"][f"second_{m}"] = club_start(ConditionalGaussian(width, self.club_hidden), next(keys), deeper)
    return params, books, aux

  def started_codebooks(self, forward: Forward, codebooks: Any, rng: Any) -> Any:
    """The codebooks of all levels after k-means of the first batch."""
    features = same_steps(forward.features)
    z = {m: self.shared(m, x) for m, x in features.items()}
    books = codebooks | {"shared": self.after_kmeans(codebooks["shared"], z, forward.masks, rng)}
    if self.levels > 1:
      own = {m: self.specific_features(m, x) for m, x in features.items() if self.has_specific(m)}
      z2 = {m: self._second(forward.params[EXTRA], "general", m, x) for m, x in own.items()}
      books["second"] = self.after_kmeans(codebooks["second"], z2, forward.masks, jax.random.fold_in(rng, 1))
    return books

  def observe(self, forward: Forward, state: TrainState, rng: Any, stage: Stage) -> tuple[dict[str, Rows], Any, Any]:
    """Quantises each level, updates its codebook and takes CLUB's inner steps, one source after the other."""
    books, aux = state.codebooks, state.aux | {"step": state.aux["step"] + 1}
    rows, together = forward.rows(rng, stage, state), modalities_together(forward)
    for source, part in rows.items():
      features, levels, extra = same_steps(part.features), [], part.params[EXTRA]
      z = {m: self.shared(m, x) for m, x in features.items()}
      own = {m: self.specific_features(m, x) for m, x in features.items()}
      targets = {m: x[:, : z[m].shape[1]].astype(jnp.float32) for m, x in part.inputs.items()}
      level, books, aux = self._level("shared", "", 1.0, z, own, targets, part, books, aux, together, part.rng)
      levels.append(level)
      if self.levels > 1:
        z2 = {m: self._second(extra, "general", m, x) for m, x in own.items() if self.has_specific(m)}
        own2 = {m: nn.relu(self._second(extra, "specific", m, own[m])) for m in z2}
        weight = jnp.where(aux["step"] > self.second_after, self.second_weight, 0.0)
        level, books, aux = self._level(
          "second", "second_", weight, z2, own2, {m: own[m] for m in z2}, part, books, aux, together,
          jax.random.fold_in(part.rng, 9),
        )  # fmt: skip
        levels.append(level)
      codes = {level.book: chosen_codes(level.quantized, part) for level in levels}
      rows[source] = dataclasses.replace(part, made=tuple(levels), codes=codes)
    return rows, books, aux

  def terms(self, stage: Stage) -> dict[str, Term]:
    """Each term is the weighted sum over the levels; the second level has no code matching, as in the release."""
    def summed(of_level: Callable[[Rows, Level], Array]) -> Term:
      return lambda rows: sum(level.weight * of_level(rows, level) for level in rows.made)

    return {
      "commitment": summed(lambda rows, level: self.commitment_of(level.z, level.quantized, rows)),
      "matching": lambda rows: self.matching_of(rows.made[0].z, rows.made[0].codes, rows),
      "coding": summed(lambda rows, level: self.cross_coding(level.z, rows, level.start_rng, level.named("predict"))),
      "club": summed(self._club),
      "reconstruction": summed(_reconstruction),
    }

  def _level(
    self, book: str, prefix: str, weight: Any, z: Any, own: Any, targets: Any, rows: Rows, books: Any, aux: Any,
    together: tuple[tuple[str, ...], ...], rng: Any,
  ) -> tuple[Level, Any, Any]:
    reset_rng, start_rng, club_rng = jax.random.split(rng, 3)
    before = books[book]
    quantized, after = self.quantise(z, before, rows, together, reset_rng)
    general = {m: quantized[m].vectors if self.club_input == "quantized" else x for m, x in z.items()}
    for m in (m for m in sorted(z) if self.has_specific(m)):
      aux = self.club_fitted(f"{prefix}{m}", general[m], own[m], aux, rows.masks[m])
    level = Level(
      book, prefix, weight, z, own, targets, before.codes, quantized, general, aux["club"], start_rng, club_rng
    )
    return level, books | {book: after}, aux

  def _club(self, rows: Rows, level: Level) -> Array:
    total = jnp.zeros((), jnp.float32)
    for number, m in enumerate(sorted(level.z)):
      if self.has_specific(m):
        key, fitted = jax.random.fold_in(level.club_rng, number), level.club[f"{level.prefix}{m}"]
        total += self.club_of(fitted, level.general[m], level.specific[m], key, rows.masks[m])
    return total

  def _second(self, extra: Any, part: str, name: str, x: Array) -> Array:
    kernel = extra[f"second_{name}"][part]
    return nn.Dense(kernel["bias"].shape[0]).apply({"params": kernel}, x)

  def embed(self, params: Any, codebooks: Any, features: Mapping[str, Array]) -> dict[str, ModalityOutput]:
    """`shared` is the code of the general features; `specific` the specific features, or the second level's code."""
    outputs = {}
    for m, x in features.items():
      first = unified.quantize_unified({m: self.shared(m, x)}, codebooks["shared"].codes)[m]
      own, second = self.specific_features(m, x), None
      if self.levels > 1 and self.has_specific(m):
        deeper = self._second(params[EXTRA], "general", m, own)
        second = unified.quantize_unified({m: deeper}, codebooks["second"].codes)[m]
        own, second = second.codes, second.indices[..., None]
      outputs[m] = output(first.codes, own, first.indices[..., None], second)
    return outputs


def _reconstruction(rows: Rows, level: Level) -> Array:
  total = jnp.zeros((), jnp.float32)
  for m, target in sorted(level.targets.items()):
    decoder = TokenDecoder(target.shape[-1], level.z[m].shape[-1])
    params = rows.params[EXTRA][f"{level.named('decode')}{m}"]
    decoded = decoder.apply({"params": params}, level.quantized[m].vectors, level.specific[m])
    total += masked_mse(decoded, target, rows.masks[m])
  return total

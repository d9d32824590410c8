"""DCID (Uni-Code, NeurIPS 2023) and H-DCID (arXiv 2403.05168 v1): one codebook in which all modalities meet.

A modality's shared head gives what is general, its specific head (through a ReLU) what is its own; `unified` has the
quantiser, `losses` the terms. Towers are those of every method here, so the papers' encoders are not ported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from codebind_jax.codebook import unified
from codebind_jax.compositional import ModalityOutput
from codebind_jax.methods.base import EXTRA, Loss, Rows, output
from codebind_jax.methods.unified import Unified, masked_mse, same_steps
from codebind_jax.models.critics import ConditionalGaussian, club_start
from codebind_jax.models.levels import TokenDecoder

# The released code's choices, as options (`config.method_options = dcid.RELEASE`).
RELEASE = {
  "first_codes": "uniform", "start_count": 0.0, "form": "sequential", "beta": 0.5, "reduce": "mean", "reset_by": "any",
  "reset_keep": "codes_only", "club_input": "quantized", "club_per_step": False, "cpc_layers": 2,
  "cpc_over": "predictions", "cpc_self": 0.1, "matching": 0.5, "order": ("audio", "video", "text"),
}
@dataclasses.dataclass(frozen=True)
class Method(Unified):
  """L = reconstruction + commitment + CPC + code matching + CLUB, unweighted; an embedding is the quantised vector.

  Attributes:
    levels: 2 adds H-DCID's: the specific features are split once more into general and specific, with a second
      codebook; its terms count 0.3 after `second_after` steps. `specific` of an embedding is then its code.
    second_weight: 0.3 in the release.
    second_after: steps before the second level counts (the release: three epochs).
  """

  levels: int = 1
  second_weight: float = 0.3
  second_after: int = 100

  def init(self, rng: Any, features: Mapping[str, Array], tokens: Mapping[str, Array], towers: Any) -> tuple:
    """Decoders and predictors; the codebook; CLUB's networks."""
    keys = iter(jax.random.split(rng, 6 * len(features) + 5))
    features = same_steps(features)
    z = {m: self.shared(m, x) for m, x in features.items()}
    own = {m: self.own_part(m, x) for m, x in features.items()}
    params = self.predictors(next(keys), z)
    aux: dict[str, Any] = {"club": {}, "step": jnp.zeros((), jnp.int32)}
    for m in sorted(z):
      decoder = TokenDecoder(tokens[m].shape[-1], z[m].shape[-1])
      params[f"decode_{m}"] = decoder.init(next(keys), z[m], own[m])["params"]
      if self.has_own(m):
        aux["club"][m] = club_start(ConditionalGaussian(own[m].shape[-1], self.club_hidden), next(keys), z[m])
    books = {"shared": self.new_codebook(next(keys), z[sorted(z)[0]].shape[-1], z)}
    if self.levels > 1:
      second = {m: own[m] for m in sorted(own) if self.has_own(m)}
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

  def first(
    self, params: Any, codebooks: Any, features: Mapping[str, Array], masks: Mapping[str, Array], rng: Any
  ) -> Any:
    """k-means of the first batch, at every level."""
    features = same_steps(features)
    z = {m: self.shared(m, x) for m, x in features.items()}
    books = codebooks | {"shared": self.started(codebooks["shared"], z, masks, rng)}
    if self.levels > 1:
      own = {m: self.own_part(m, x) for m, x in features.items() if self.has_own(m)}
      z2 = {m: self._second(params[EXTRA], "general", m, x) for m, x in own.items()}
      books["second"] = self.started(codebooks["second"], z2, masks, rng)
    return books

  def before(self, params: Any, aux: Any) -> Any:
    """Counts the steps."""
    return aux | {"step": aux["step"] + 1}

  def loss(self, rows: Rows, codebooks: Any, aux: Any) -> Loss:
    """The terms of the first level, and of the second where there is one."""
    features = same_steps(rows.features)
    z = {m: self.shared(m, x) for m, x in features.items()}
    own = {m: self.own_part(m, x) for m, x in features.items()}
    targets = {m: x[:, : z[m].shape[1]].astype(jnp.float32) for m, x in rows.tokens.items()}
    terms, book, aux, chosen = self._level(rows, z, own, targets, codebooks["shared"], aux, "", rows.rng)
    books, indices = codebooks | {"shared": book}, {"shared": chosen}
    if self.levels > 1:
      z2 = {m: self._second(rows.params[EXTRA], "general", m, x) for m, x in own.items() if self.has_own(m)}
      own2 = {m: nn.relu(self._second(rows.params[EXTRA], "specific", m, own[m])) for m in z2}
      more, books["second"], aux, indices["second"] = self._level(
        rows, z2, own2, {m: own[m] for m in z2}, codebooks["second"], aux, "second_", jax.random.fold_in(rows.rng, 9)
      )
      weight = jnp.where(aux["step"] > self.second_after, self.second_weight, 0.0)
      # The release has no code matching at the second level.
      terms |= {name: terms[name] + weight * value for name, value in more.items() if name != "matching"}
    return Loss(terms, books, aux, indices)

  def _second(self, extra: Any, part: str, name: str, x: Array) -> Array:
    kernel = extra[f"second_{name}"][part]
    return nn.Dense(kernel["bias"].shape[0]).apply({"params": kernel}, x)

  def _level(
    self, rows: Rows, z: Any, own: Any, targets: Any, book: Any, aux: Any, prefix: str, rng: Any
  ) -> tuple[dict[str, Array], Any, Any, Array]:
    masks, extra = {m: rows.masks[m] for m in z}, rows.params[EXTRA]
    reset_rng, start_rng, club_rng = jax.random.split(rng, 3)
    quantized, terms, book = self.code_losses(z, book, rows, reset_rng)
    terms["coding"] = self.cross_coding(z, rows, start_rng, f"predict{'2' if prefix else ''}_")
    terms["club"] = terms["reconstruction"] = jnp.zeros((), jnp.float32)
    for number, m in enumerate(sorted(z)):
      if self.has_own(m):
        x = quantized[m].vectors if self.club_input == "quantized" else z[m]
        key = jax.random.fold_in(club_rng, number)
        value, aux = self.club_loss(f"{prefix}{m}", x, own[m], aux, key, masks[m])
        terms["club"] += value
      decoder = TokenDecoder(targets[m].shape[-1], z[m].shape[-1])
      made = decoder.apply({"params": extra[f"decode{'2' if prefix else ''}_{m}"]}, quantized[m].vectors, own[m])
      terms["reconstruction"] += masked_mse(made, targets[m], masks[m])
    return terms, book, aux, jnp.concatenate([q.indices.reshape(-1) for q in quantized.values()])

  def embed(self, params: Any, codebooks: Any, features: Mapping[str, Array]) -> dict[str, ModalityOutput]:
    """`shared` is the code of the general part; `specific` the own part, or the second level's code."""
    found = {}
    for m, x in features.items():
      first = unified.quantize_unified({m: self.shared(m, x)}, codebooks["shared"].codes)[m]
      own, second = self.own_part(m, x), None
      if self.levels > 1 and self.has_own(m):
        deeper = self._second(params[EXTRA], "general", m, own)
        second = unified.quantize_unified({m: deeper}, codebooks["second"].codes)[m]
        own, second = second.codes, second.indices[..., None]
      found[m] = output(first.codes, own, first.indices[..., None], second)
    return found

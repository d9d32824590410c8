"""FCID (arXiv 2403.05168 v3): sensors are disentangled finely, then bound with text in a coarse codebook.

The body of the paper was not read: structure and losses follow the released code. The fine level has no codebook (the
release dropped it); text enters at the coarse level, through a projector of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array

from codebind_jax import losses
from codebind_jax.codebook import unified
from codebind_jax.compositional import ModalityOutput
from codebind_jax.methods.base import EXTRA, Loss, Rows, output, present
from codebind_jax.methods.unified import Unified, masked_mse
from codebind_jax.models.critics import ConditionalGaussian, club_start
from codebind_jax.models.levels import CoarseLevel, TokenDecoder
from codebind_jax.norm import unit

# The released code's choices; its codebook visits video, audio, text in this order.
RELEASE = {
  "first_codes": "uniform", "start_count": 0.0, "form": "sequential", "beta": 0.5, "reduce": "mean", "reset_by": "any",
  "reset_keep": "codes_only", "club_per_step": False, "cpc_layers": 2, "cpc_over": "predictions", "cpc_self": 0.1,
  "matching": 0.5, "order": ("video", "audio", "text"),
}


@dataclasses.dataclass(frozen=True)
class Method(Unified):
  """L = both levels' reconstruction and CLUB + fine CPC + coarse commitment and code matching + InfoNCE to the hub.

  Attributes:
    hub: the modality that the coarse level binds the others to; it has its own compressor, they share one.
    contrast: weight of that InfoNCE, in one direction (sensor -> hub), as the release has it.
  """

  hub: str = "text"
  contrast: float = 1.0

  @property
  def weights(self) -> dict[str, float]:
    """Of the terms."""
    return super().weights | {"contrast": self.contrast}

  def _coarse(self, names: Any, width: int) -> CoarseLevel:
    return CoarseLevel(FrozenDict({m: "hub" if m == self.hub else "sensors" for m in names}), width)

  def init(self, rng: Any, features: Mapping[str, Array], tokens: Mapping[str, Array], towers: Any) -> tuple:
    """Decoders of both levels, predictors, the compressors; the coarse codebook; CLUB's networks."""
    keys = iter(jax.random.split(rng, 6 * len(features) + 6))
    z = {m: self.shared(m, x) for m, x in features.items()}
    fine = {m: x for m, x in z.items() if m != self.hub}
    width = next(iter(z.values())).shape[-1]
    params, aux = self.predictors(next(keys), fine), {"club": {}}
    params["coarse"] = self._coarse(z, width).init(next(keys), z)["params"]
    for m in sorted(z):
      params[f"coarse_decode_{m}"] = TokenDecoder(width, width).init(next(keys), z[m], z[m])["params"]
      if m in fine:
        own = self.own_part(m, features[m])
        params[f"decode_{m}"] = TokenDecoder(tokens[m].shape[-1], width).init(next(keys), z[m], own)["params"]
        if self.has_own(m):
          aux["club"][m] = club_start(ConditionalGaussian(own.shape[-1], self.club_hidden), next(keys), z[m])
    for group in ("sensors", "hub"):
      aux["club"][f"coarse_{group}"] = club_start(
        ConditionalGaussian(width, self.club_hidden), next(keys), next(iter(z.values()))
      )
    return params, {"shared": self.new_codebook(next(keys), width, z)}, aux

  def first(
    self, params: Any, codebooks: Any, features: Mapping[str, Array], masks: Mapping[str, Array], rng: Any
  ) -> Any:
    """k-means of the first batch's coarse features, every token by itself."""
    coarse = self._levels(params, {m: self.shared(m, x) for m, x in features.items()}, per_step=True)
    general = {m: c.general for m, c in coarse.items()}
    return codebooks | {"shared": self.started(codebooks["shared"], general, masks, rng)}

  def _levels(self, params: Any, z: Mapping[str, Array], per_step: bool = False) -> dict[str, Any]:
    names = [m for m in self.model.towers if f"coarse_decode_{m}" in params[EXTRA]]
    level = self._coarse(names, next(iter(z.values())).shape[-1])
    return level.apply({"params": params[EXTRA]["coarse"]}, dict(z), per_step)

  def loss(self, rows: Rows, codebooks: Any, aux: Any) -> Loss:
    """The terms of both levels."""
    z = {m: self.shared(m, x) for m, x in rows.features.items()}
    if self.hub not in z or len(z) < 2:
      raise ValueError(f"config.method_options.hub: needs {self.hub!r} and another modality; this source has "
                       f"{sorted(z)}")  # fmt: skip
    fine, extra = {m: x for m, x in z.items() if m != self.hub}, rows.params[EXTRA]
    reset_rng, start_rng, club_rng = jax.random.split(rows.rng, 3)
    coarse = self._levels(rows.params, z)
    general = {m: c.general for m, c in coarse.items()}
    quantized, terms, book = self.code_losses(general, codebooks["shared"], rows, reset_rng)
    terms["coding"] = self.cross_coding(fine, rows, start_rng)
    terms["contrast"] = sum(
      losses.directed_info_nce(
        unit(general[m][:, 0]), unit(general[self.hub][:, 0]), temperature=self.contrast_temperature,
        mask=present(rows.masks, m, self.hub), groups=rows.groups_of(m, self.hub),
      )
      for m in fine
    )  # fmt: skip
    terms["club"] = terms["reconstruction"] = jnp.zeros((), jnp.float32)
    for number, m in enumerate(sorted(z)):
      width = z[m].shape[-1]
      made = TokenDecoder(width, width).apply(
        {"params": extra[f"coarse_decode_{m}"]}, quantized[m].vectors, coarse[m].specific
      )
      terms["reconstruction"] += masked_mse(made, coarse[m].compressed, rows.masks[m])
      if m not in fine:
        continue
      own, target = self.own_part(m, rows.features[m]), rows.tokens[m].astype(jnp.float32)
      made = TokenDecoder(target.shape[-1], width).apply({"params": extra[f"decode_{m}"]}, z[m], own)
      terms["reconstruction"] += masked_mse(made, target, rows.masks[m])
      if self.has_own(m):
        value, aux = self.club_loss(m, z[m], own, aux, jax.random.fold_in(club_rng, number), rows.masks[m])
        terms["club"] += value
    for group, names in (("sensors", sorted(fine)), ("hub", [self.hub])):
      x, y = (jnp.concatenate([getattr(coarse[m], part) for m in names]) for part in ("general", "specific"))
      mask = jnp.concatenate([rows.masks[m] for m in names])
      value, aux = self.club_loss(f"coarse_{group}", x, y, aux, jax.random.fold_in(club_rng, len(group) + 99), mask)
      terms["club"] += value
    chosen = jnp.concatenate([q.indices.reshape(-1) for q in quantized.values()])
    return Loss(terms, codebooks | {"shared": book}, aux, {"shared": chosen})

  def embed(self, params: Any, codebooks: Any, features: Mapping[str, Array]) -> dict[str, ModalityOutput]:
    """Every token is compressed by itself and quantised, as in the release's inference; `specific` is the fine one."""
    found = {}
    for m, x in features.items():
      general = self._levels(params, {m: self.shared(m, x)}, per_step=True)[m].general
      code = unified.quantize_unified({m: general}, codebooks["shared"].codes)[m]
      found[m] = output(code.codes, self.own_part(m, x), code.indices[..., None])
    return found

"""FCID (arXiv 2403.05168 v3): a fine level disentangles the sensors, a coarse codebook binds them with text.

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
from codebind_jax.methods.base import EXTRA, Forward, Rows, Term, output
from codebind_jax.methods.unified import Unified, chosen_codes, masked_mse, modalities_together
from codebind_jax.models.critics import ConditionalGaussian, club_start
from codebind_jax.models.levels import CoarseLevel, TokenDecoder
from codebind_jax.norm import unit
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.schema import Name, Weight
from codebind_jax.stages import Stage

# The released code's choices; its codebook visits video, audio, text in this order.
RELEASE = {
  "first_codes": "uniform", "start_count": 0.0, "form": "sequential", "beta": 0.5, "reduce": "mean", "reset_by": "any",
  "reset_keep": "codes_only", "club_per_step": False, "cpc_layers": 2, "cpc_over": "predictions", "cpc_self": 0.1,
  "matching": 0.5, "order": ("video", "audio", "text"),
}


GROUPS = ("coarse_sensors", "coarse_hub")  # CLUB networks of the coarse level


@dataclasses.dataclass(frozen=True)
class Levels:
  """Both levels' outputs for FCID's terms (`Rows.made`).

  Attributes:
    z: modality -> fine general vectors [b, t, d].
    coarse: modality -> the coarse level's outputs.
    codes: [k, d], before the batch.
    quantized: modality -> quantised coarse vectors.
    compared: name of a CLUB network -> (general vectors, specific vectors, mask) that it compares.
    club: name -> fitted network.
    start_rng: key of CPC's start.
    keys: name of a CLUB network -> key of its shuffle.
  """

  z: Mapping[str, Array]
  coarse: Mapping[str, Any]
  codes: Array
  quantized: Mapping[str, unified.UnifiedQuantized]
  compared: Mapping[str, tuple[Array, Array, Array]]
  club: Mapping[str, Any]
  start_rng: Any
  keys: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Method(Unified):
  """L = both levels' reconstruction and CLUB + fine CPC + coarse commitment and code matching + InfoNCE to the hub.

  Attributes:
    hub: the modality to which the coarse level binds the others; it has its own compressor, they share one.
    contrast: weight of the InfoNCE to the hub, in one direction (sensor -> hub), as in the release.
    both_ways: whether it is taken from the hub to the sensors too.
  """

  BASE = "contrast"

  hub: Name = "text"
  contrast: Weight = 1.0
  both_ways: bool = False

  def _coarse(self, names: Any, width: int) -> CoarseLevel:
    return CoarseLevel(FrozenDict({m: "hub" if m == self.hub else "sensors" for m in names}), width)

  def init(self, rng: Any, features: Mapping[str, Array], inputs: Mapping[str, Array], towers: Any) -> tuple:
    """Parameters of decoders, predictors and compressors; the coarse codebook; CLUB's networks in aux."""
    keys = iter(jax.random.split(rng, 6 * len(features) + 6))
    z = {m: self.shared(m, x) for m, x in features.items()}
    fine = {m: x for m, x in z.items() if m != self.hub}
    width = next(iter(z.values())).shape[-1]
    params, aux = self.predictors(next(keys), fine), {"club": {}}
    params["coarse"] = self._coarse(z, width).init(next(keys), z)["params"]
    for m in sorted(z):
      params[f"coarse_decode_{m}"] = TokenDecoder(width, width).init(next(keys), z[m], z[m])["params"]
      if m in fine:
        own = self.specific_features(m, features[m])
        params[f"decode_{m}"] = TokenDecoder(inputs[m].shape[-1], width).init(next(keys), z[m], own)["params"]
        if self.has_specific(m):
          aux["club"][m] = club_start(ConditionalGaussian(own.shape[-1], self.club_hidden), next(keys), z[m])
    for group in ("sensors", "hub"):
      aux["club"][f"coarse_{group}"] = club_start(
        ConditionalGaussian(width, self.club_hidden), next(keys), next(iter(z.values()))
      )
    return params, {"shared": self.new_codebook(next(keys), width, z)}, aux

  def started_codebooks(self, forward: Forward, codebooks: Any, rng: Any) -> Any:
    """The coarse codebook after k-means of the first batch, each of whose tokens is compressed by itself."""
    coarse = self._levels(forward.params, {m: self.shared(m, x) for m, x in forward.features.items()}, per_step=True)
    general = {m: c.general for m, c in coarse.items()}
    return codebooks | {"shared": self.after_kmeans(codebooks["shared"], general, forward.masks, rng)}

  def _levels(self, params: Any, z: Mapping[str, Array], per_step: bool = False) -> dict[str, Any]:
    names = [m for m in self.model.towers if f"coarse_decode_{m}" in params[EXTRA]]
    level = self._coarse(names, next(iter(z.values())).shape[-1])
    return level.apply({"params": params[EXTRA]["coarse"]}, dict(z), per_step)

  def observe(self, forward: Forward, state: TrainState, rng: Any, stage: Stage) -> tuple[dict[str, Rows], Any, Any]:
    """Quantises the coarse features, updates the codebook and takes CLUB's inner steps, one source after the other.

    Raises:
      ValueError: if a source lacks the hub or has nothing else.
    """
    book, aux = state.codebooks["shared"], state.aux
    rows, together = forward.rows(rng, stage, state), modalities_together(forward)
    for source, part in rows.items():
      z = {m: self.shared(m, x) for m, x in part.features.items()}
      if self.hub not in z or len(z) < 2:
        raise ValueError(f"config.method_options.hub: needs {self.hub!r} and another modality; source {source!r} has "
                         f"{sorted(z)}")  # fmt: skip
      reset_rng, start_rng, club_rng = jax.random.split(part.rng, 3)
      coarse, before = self._levels(part.params, z), book.codes
      quantized, book = self.quantise({m: c.general for m, c in coarse.items()}, book, part, together, reset_rng)
      compared = self._compared(z, coarse, part)
      for name, (x, y, mask) in compared.items():
        aux = self.club_fitted(name, x, y, aux, mask)
      keys = {m: jax.random.fold_in(club_rng, number) for number, m in enumerate(sorted(z))}
      keys |= {name: jax.random.fold_in(club_rng, len(name.removeprefix("coarse_")) + 99) for name in GROUPS}
      made = Levels(z, coarse, before, quantized, compared, aux["club"], start_rng, keys)
      rows[source] = dataclasses.replace(part, made=made, codes={"shared": chosen_codes(quantized, part)})
    return rows, state.codebooks | {"shared": book}, aux

  def _compared(self, z: Any, coarse: Any, rows: Rows) -> dict[str, tuple[Array, Array, Array]]:
    """Name of a CLUB network -> (general vectors, specific vectors, mask) that it compares."""
    fine = [m for m in sorted(z) if m != self.hub]
    own = lambda m: self.specific_features(m, rows.features[m])
    compared = {m: (z[m], own(m), rows.masks[m]) for m in fine if self.has_specific(m)}
    for name, members in zip(GROUPS, (fine, [self.hub])):
      general, specific = (jnp.concatenate([getattr(coarse[m], part) for m in members]) for part in
                           ("general", "specific"))  # fmt: skip
      compared[name] = general, specific, jnp.concatenate([rows.masks[m] for m in members])
    return compared

  def terms(self, stage: Stage) -> dict[str, Term]:
    """The terms over both levels."""
    general = lambda rows: {m: c.general for m, c in rows.made.coarse.items()}
    fine = lambda rows: {m: x for m, x in rows.made.z.items() if m != self.hub}
    return {
      "commitment": lambda rows: self.commitment_of(general(rows), rows.made.quantized, rows),
      "matching": lambda rows: self.matching_of(general(rows), rows.made.codes, rows),
      "coding": lambda rows: self.cross_coding(fine(rows), rows, rows.made.start_rng),
      "contrast": self._contrast,
      "club": lambda rows: sum(
        self.club_of(rows.made.club[name], x, y, rows.made.keys[name], mask)
        for name, (x, y, mask) in rows.made.compared.items()
      ),
      "reconstruction": self._reconstruction,
    }  # fmt: skip

  def _contrast(self, rows: Rows) -> Array:
    head = lambda m: unit(rows.made.coarse[m].general[:, 0])
    to_hub = [(m, self.hub) for m in rows.made.z if m != self.hub]
    return sum(
      losses.directed_info_nce(
        head(a), head(b), temperature=rows.stage.temperature, mask=rows.both(a, b), groups=rows.groups_of(a, b)
      )
      for a, b in (*to_hub, *((b, a) for a, b in to_hub if self.both_ways))
    )  # fmt: skip

  def _reconstruction(self, rows: Rows) -> Array:
    made, extra, total = rows.made, rows.params[EXTRA], jnp.zeros((), jnp.float32)
    for m in sorted(made.z):
      width = made.z[m].shape[-1]
      coarse = TokenDecoder(width, width).apply(
        {"params": extra[f"coarse_decode_{m}"]}, made.quantized[m].vectors, made.coarse[m].specific
      )
      total += masked_mse(coarse, made.coarse[m].compressed, rows.masks[m])
      if m != self.hub:
        own, target = self.specific_features(m, rows.features[m]), rows.inputs[m].astype(jnp.float32)
        fine = TokenDecoder(target.shape[-1], width).apply({"params": extra[f"decode_{m}"]}, made.z[m], own)
        total += masked_mse(fine, target, rows.masks[m])
    return total

  def embed(self, params: Any, codebooks: Any, features: Mapping[str, Array]) -> dict[str, ModalityOutput]:
    """Each token is compressed and quantised by itself (the release's inference); `specific` is the fine level's."""
    outputs = {}
    for m, x in features.items():
      general = self._levels(params, {m: self.shared(m, x)}, per_step=True)[m].general
      code = unified.quantize_unified({m: general}, codebooks["shared"].codes)[m]
      outputs[m] = output(code.codes, self.specific_features(m, x), code.indices[..., None])
    return outputs

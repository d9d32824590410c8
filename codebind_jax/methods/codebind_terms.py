"""The terms of CodeBind's loss (spec section 3): pure functions of one source's rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from codebind_jax import losses
from codebind_jax.methods.base import Rows, Term
from codebind_jax.runtime.sharding import row_axes


@dataclasses.dataclass(frozen=True)
class Quantised:
  """Results of the quantiser for CodeBind's terms (`Rows.made`).

  Attributes:
    outputs: modality -> quantiser's outputs.
    plain: modality -> outputs of the features before quantisation.
    segment: width of the codes; 0 without a quantiser.
    decode: (modality, `full` of all its tokens, width, the trunk's tokens or None) -> the tower's input as its decoder
      reconstructs it.
    target: (modality, input) -> what the decoder is to give back.
  """

  outputs: Mapping[str, Any]
  plain: Mapping[str, Any]
  segment: int
  decode: Callable[..., Float[Array, "b ..."]]
  target: Callable[[str, Array], Array]

  @property
  def with_specific(self) -> list[str]:
    """Modalities that have a specific part."""
    return [m for m, out in self.outputs.items() if out.specific.shape[-1]]


def _mean(values: list[Float[Array, ""]]) -> Float[Array, ""]:
  return sum(values) / len(values) if values else jnp.zeros((), jnp.float32)


def _info_nce(r: Rows) -> Float[Array, ""]:
  """InfoNCE of each pair's shared parts after quantisation, both directions."""
  return _align(r, r.made.outputs)


def _info_nce_plain(r: Rows) -> Float[Array, ""]:
  """InfoNCE of the shared parts before quantisation, whose gradient needs no straight-through estimate."""
  return _align(r, r.made.plain)


def _info_nce_asymmetric(r: Rows) -> Float[Array, ""]:
  """InfoNCE of each modality's queries, which are not quantised, and the other's items, which are: what a search does.

  The mean of both choices of the side that is quantised.
  """
  items = {m: out.shared for m, out in r.made.outputs.items()}
  queries = {m: out.query for m, out in r.made.outputs.items()}
  return 0.5 * (_align_pairs(r, queries, items) + _align_pairs(r, items, queries))


def _align(r: Rows, outputs: Mapping[str, Any]) -> Float[Array, ""]:
  shared = {m: out.shared for m, out in outputs.items()}
  return _align_pairs(r, shared, shared)


def _align_pairs(r: Rows, of_a: Mapping[str, Array], of_b: Mapping[str, Array]) -> Float[Array, ""]:
  """The mean InfoNCE of the pairs (a, b), by the class tokens of `of_a` and `of_b`."""
  stage = r.stage
  tiled = stage.ring or stage.chunk  # devices pass tiles around; without `axes` each tile would gather all rows anew
  return _mean([
    losses.info_nce(
      of_a[a][:, 0], of_b[b][:, 0], temperature=stage.temperature, logit_scale_a=r.scales[a],
      logit_scale_b=r.scales[b], scale_inside_cosine=stage.scale_inside_cosine, mask=r.both(a, b), chunk=stage.chunk,
      axes=row_axes(len(r.masks[a])) if tiled else (), groups=r.groups_of(a, b),
    )
    for a, b in r.pairs
  ])


def _commitment(r: Rows) -> Float[Array, ""]:
  """Distance of the features to their codes, which keeps them near."""
  return sum((out.commitment for out in r.made.outputs.values()), start=jnp.zeros((), jnp.float32))


def _code_contrast(r: Rows) -> Float[Array, ""]:
  """Every segment is near one code and far from the others."""
  total, rows = jnp.zeros((), jnp.float32), r.stage.code_rows or None
  for name, out in r.made.outputs.items():
    for similarity in (out.similarity_shared[:rows], out.similarity_specific[:rows]):
      if similarity.size:
        mask = jnp.tile(r.masks[name][:rows], similarity.shape[1])  # segments first: devices may share them out
        total += losses.code_contrast(
          jnp.swapaxes(similarity, 0, 1).reshape(-1, similarity.shape[-1]), mask=mask,
          double_softmax=r.stage.double_softmax,
        )  # fmt: skip
  return total


def _code_uniform(r: Rows) -> Float[Array, ""]:
  """Codes of a codebook lie apart, where they are parameters; codes that follow moving averages get no gradient."""
  used = ["shared", *r.made.with_specific]
  def of_book(codes: Array) -> Array:
    if codes.ndim == 2:
      return losses.code_uniform(codes)
    return jnp.mean(jax.lax.map(losses.code_uniform, codes.reshape(-1, *codes.shape[-2:])))  # stages and positions

  return sum((of_book(r.codebooks[name].codes) for name in used), start=jnp.zeros((), jnp.float32))


def _code_matching(r: Rows) -> Float[Array, ""]:
  """Both modalities of a pair have the same similarities to the shared codes."""
  rows, outputs = r.stage.code_rows or None, r.made.outputs
  return _mean([
    losses.code_matching(
      outputs[a].similarity_shared[:rows], outputs[b].similarity_shared[:rows],
      temperature=r.stage.matching_temperature, mask=r.both(a, b)[:rows],
    )
    for a, b in r.pairs
  ])


def _decomposition(r: Rows) -> Float[Array, ""]:
  """Shared and specific part of an item are orthogonal."""
  return _mean([
    losses.decomposition(
      (out := r.made.outputs[m]).shared, out.specific, mask=r.masks[m],
      segment=0 if out.shared.shape == out.specific.shape else math.gcd(r.made.segment, out.specific.shape[-1]),
    )
    for m in r.made.with_specific
  ])


def _decorrelation(r: Rows) -> Float[Array, ""]:
  """Over the batch no feature of the shared part correlates with one of the specific part (ours)."""
  return _mean([
    losses.decorrelation((out := r.made.outputs[m]).shared[:, 0], out.specific[:, 0], mask=r.masks[m])
    for m in r.made.with_specific
  ])


def _specific_uniform(r: Rows) -> Float[Array, ""]:
  """Specific parts of different items lie apart."""
  return _mean([
    losses.specific_uniform(r.made.outputs[m].specific[:, 0], mask=r.masks[m]) for m in r.made.with_specific
  ])


def _reconstruction(r: Rows) -> Float[Array, ""]:
  """A decoder gives back the tower's input from all of an item's features; a sum over the modalities.

  `models.towers.target_of` says what that input is.
  """
  total = jnp.zeros((), jnp.float32)
  for name in (m for m in r.made.outputs if m != "text"):
    target, trunk = r.made.target(name, r.inputs[name]), r.trunks.get(name)
    width = target.shape[-1] if trunk is None else 0
    decoded = r.made.decode(name, r.made.outputs[name].full, width, trunk)
    target = target.mean(1) if target.ndim > decoded.ndim else target  # over clips
    total += losses.reconstruction(decoded, target, mask=r.masks[name])
  return total


# Name in config.stages.*.losses -> term.
TERMS: dict[str, Term] = {
  "info_nce": _info_nce,
  "info_nce_plain": _info_nce_plain,
  "info_nce_asymmetric": _info_nce_asymmetric,
  "commitment": _commitment,
  "code_contrast": _code_contrast,
  "code_uniform": _code_uniform,
  "code_matching": _code_matching,
  "decomposition": _decomposition,
  "decorrelation": _decorrelation,
  "specific_uniform": _specific_uniform,
  "reconstruction": _reconstruction,
}

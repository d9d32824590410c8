"""Binding several modalities at once: to a fixed anchor modality, or to the centroid of all of them.

The objectives are those of Jeong et al., "Anchors Aweigh!" (arXiv 2410.02086): FABind and CentroBind. From its abstract
and public reviews: the anchor is the plain mean of the embeddings of all modalities, and InfoNCE aligns it with each in
both directions. Reconstructed, because the method section was not read: the mean is not normalised again (the paper's
bounds need that), gradient passes through it, and the choice of its view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from codebind_jax.losses.contrastive import diagonal_cross_entropy
from codebind_jax.losses.masks import masked_mean
from codebind_jax.norm import unit, wide

Embeddings = Mapping[str, Float[Array | np.ndarray, "b d"]]
Masks = Mapping[str, Bool[Array | np.ndarray, "b"] | bool] | Bool[Array | np.ndarray, "b"]
Groups = Int[Array | np.ndarray, "b"] | None
Weights = Mapping[str, float] | Sequence[float] | Float[Array | np.ndarray, "m"]


@jax.jit
def directed_info_nce(
  query: Float[Array | np.ndarray, "b d"],
  key: Float[Array | np.ndarray, "b d"],
  *,
  temperature: float | jax.Array,
  mask: Bool[Array | np.ndarray, "b"] | None = None,
  groups: Groups = None,
) -> Float[Array, ""]:
  """L(U -> V) = mean_b [log sum_k exp(<u_b, v_k> / tau) - <u_b, v_b> / tau]: one direction, inner products as they are.

  log B - L is a lower bound of the mutual information (van den Oord et al., 2018).

  Args:
    query: u; row b belongs to row b of `key`.
    key: v, the candidates.
    temperature: tau.
    mask: True for rows that count, as queries and as keys.
    groups: rows of one group are not each other's negatives (several items of one caption in a batch).
  """
  query, key = wide(query), wide(key)
  logits = jnp.einsum("bd,kd->bk", query, key, precision=jax.lax.Precision.HIGHEST) / temperature
  return masked_mean(diagonal_cross_entropy(logits, mask, groups), mask)


def centroid(
  anchors: Embeddings, *, weights: Weights | None = None, mask: Masks | None = None, normalize: bool = False
) -> Float[Array, "b d"]:
  """The anchor of every instance: the weighted mean of the embeddings of the modalities it has.

  Its norm is 1 exactly where these coincide: 1 - |A|^2 is their mean squared distance to A, the alignment gap.

  Args:
    anchors: modality -> unit vectors.
    weights: modality -> weight, or one for each in order, relative to the sum over the modalities present.
    mask: modality -> rows that have it, or the rows that count for all; None for all rows.
    normalize: L2-normalise the mean; the paper's bounds then no longer hold.
  """
  return _centroid(anchors, weights, mask, normalize)[0]


def _centroid(anchors, weights, mask, normalize):
  """(means, bool [b] of the instances that have one: some modality present must have weight)."""
  total, mass, masks = 0.0, 0.0, _masks(anchors, mask)
  weights = 1.0 if weights is None else weights
  for i, (name, x) in enumerate(anchors.items()):
    weight = weights[name] if isinstance(weights, Mapping) else weights if np.isscalar(weights) else weights[i]
    share = masks[name] * weight
    total += share[:, None] * jnp.where(masks[name][:, None], wide(x), 0.0)
    mass += share
  mean = total / jnp.where(mass > 0, mass, 1.0)[:, None]
  return unit(mean) if normalize else mean, mass > 0


def centroid_info_nce(
  anchors: Embeddings,
  features: Embeddings,
  *,
  temperature: float | jax.Array,
  weights: Weights | None = None,
  mask: Masks | None = None,
  groups: Groups = None,
  normalize_anchor: bool = False,
  stop_anchor: bool = False,
) -> Float[Array, ""]:
  """CentroBind: sum over modalities i of L(A -> F_i) + L(F_i -> A), A the centroid of `anchors`.

  Args:
    anchors: modality -> unit embeddings [b, d] of one view of the instances; their mean is the anchor.
    features: modality -> unit embeddings [b, d] of another view (the same one is allowed), aligned with the anchor.
    temperature: of InfoNCE.
    weights: of the mean; None for equal ones. An instance without weight has no anchor and takes no part.
    mask: modality -> bool [b], which instances have it (or one for all modalities): the mean and the terms of a
      modality leave out the others.
    groups: as for `directed_info_nce`.
    normalize_anchor: L2-normalise the centroid.
    stop_anchor: no gradient through the centroid.

  Returns:
    Sum over modalities and both directions, mean over the batch.

  Raises:
    ValueError: if there is no modality, or the two views do not have the same ones.
  """
  _check(anchors, features)
  anchor, bound = _centroid(anchors, weights, mask, normalize_anchor)
  if stop_anchor:
    anchor = jax.lax.stop_gradient(anchor)
  masks = _masks(features, mask)
  return sum(_both_directions(anchor, x, temperature, masks[name] & bound, groups) for name, x in features.items())


def fixed_anchor_info_nce(
  anchors: Embeddings,
  features: Embeddings,
  *,
  temperature: float | jax.Array,
  anchor: str = "image",
  mask: Masks | None = None,
  groups: Mapping[str, Groups] | None = None,
  stop_anchor: bool = True,
) -> Float[Array, ""]:
  """FABind: every other modality is aligned with one anchor modality, as in ImageBind; sum of both directions.

  Args:
    anchors: modality -> unit embeddings [b, d]; only the anchor modality's are used.
    features: modality -> unit embeddings [b, d] to align.
    temperature: of InfoNCE.
    anchor: the anchor modality.
    mask: modality -> bool [b], which instances have it.
    groups: modality -> groups in its terms, as for `directed_info_nce`.
    stop_anchor: the anchor's encoder is frozen and gets no gradient.

  Raises:
    ValueError: if the anchor is not among the modalities.
  """
  _check(anchors, features)
  if anchor not in anchors:
    raise ValueError(f"anchor: {anchor!r} is not a modality given; allowed: {sorted(anchors)}")
  fixed = jax.lax.stop_gradient(wide(anchors[anchor])) if stop_anchor else anchors[anchor]
  masks, groups = _masks(features, mask), groups or {}
  return sum(
    (
      _both_directions(fixed, x, temperature, masks[name] & masks[anchor], groups.get(name))
      for name, x in features.items() if name != anchor
    ),
    start=jnp.zeros((), jnp.float32),
  )


def _check(anchors, features):
  if not features or set(anchors) != set(features):
    raise ValueError(f"anchors and features must have the same modalities, got {sorted(anchors)}, {sorted(features)}")


def _masks(features, mask):
  """Modality -> bool [b]."""
  pick = lambda name: True if mask is None else mask[name] if isinstance(mask, Mapping) else mask
  return {name: jnp.broadcast_to(jnp.asarray(pick(name), jnp.bool_), x.shape[:1]) for name, x in features.items()}


def _both_directions(a, b, temperature, mask, groups):
  directions = ((a, b), (b, a))
  return sum(directed_info_nce(u, v, temperature=temperature, mask=mask, groups=groups) for u, v in directions)

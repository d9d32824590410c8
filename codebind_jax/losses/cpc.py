"""Cross-modal contrastive predictive coding: one modality's past predicts the other's future (DCID eq. 6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from codebind_jax.losses.contrastive import diagonal_cross_entropy
from codebind_jax.losses.masks import masked_mean
from codebind_jax.norm import wide


def cpc(
  predictions: Float[Array | np.ndarray, "b k d"],
  futures: Float[Array | np.ndarray, "b k d"],
  *,
  over: str = "futures",
  mask: Bool[Array | np.ndarray, "b"] | None = None,
  groups: Int[Array | np.ndarray, "b"] | None = None,
) -> Float[Array, ""]:
  """-mean_{b, k} log softmax(<prediction_k, future_k>) of the sequence's own future among the batch's.

  Args:
    predictions: of the next k steps, W_k c_t.
    futures: features of these k steps.
    over: "futures" compares candidate futures for a prediction, as the paper; "predictions" compares predictions for a
      future, as the release.
    mask: True for rows that count.
    groups: rows of one group are not each other's negatives.

  Raises:
    ValueError: for an unknown `over`.
  """
  if over not in ("futures", "predictions"):
    raise ValueError(f"over must be 'futures' or 'predictions', got {over!r}")
  predictions, futures = wide(predictions), wide(futures)
  scores = jnp.einsum("ikd,jkd->kij", futures, predictions, precision=jax.lax.Precision.HIGHEST)
  if over == "futures":
    scores = scores.swapaxes(1, 2)
  return masked_mean(jnp.mean(diagonal_cross_entropy(scores, mask, groups), axis=0), mask)


def cross_cpc(
  predictions: Mapping[str, Float[Array | np.ndarray, "b _t k d"]],
  features: Mapping[str, Float[Array | np.ndarray, "b _t d"]],
  start: Int[Array | np.ndarray, ""] | int,
  *,
  self_weight: float = 0.0,
  over: str = "futures",
  masks: Mapping[str, Bool[Array | np.ndarray, "b"]] | None = None,
  groups_of: Callable[..., Int[Array | np.ndarray, "b"] | None] = lambda *_: None,
) -> Float[Array, ""]:
  """Sum of `cpc` over ordered pairs of modalities: the context of one, up to `start`, predicts the other's next steps.

  Args:
    predictions: modality -> predictions of the k next steps from the context at every step.
    features: modality -> features of the steps, as wide as the predictions.
    start: last step of the context, in [1, T - k - 1]; drawn once a batch.
    self_weight: weight of a modality's prediction of itself (paper: 0; release: 0.1).
    over: as for `cpc`.
    masks: modality -> rows that have it.
    groups_of: (modality, modality) -> groups of the rows in the term of this pair, as for `cpc`.
  """
  steps = next(iter(predictions.values())).shape[2]
  total = jnp.zeros((), jnp.float32)
  for source, prediction in predictions.items():
    ahead = jax.lax.dynamic_index_in_dim(jnp.asarray(prediction), start, axis=1, keepdims=False)
    for target, x in features.items():
      weight = self_weight if source == target else 1.0
      if weight:
        future = jax.lax.dynamic_slice_in_dim(jnp.asarray(x), start + 1, steps, axis=1)
        mask = None if masks is None else masks[source] & masks[target]
        total += weight * cpc(ahead, future, over=over, mask=mask, groups=groups_of(source, target))
  return total

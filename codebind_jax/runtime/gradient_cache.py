"""Batches larger than memory (GradCache): towers run in micro-batches, losses and codebooks see the whole batch.

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021, arXiv 2101.06983: a first
pass computes all features and keeps none of the activations, the loss of the whole batch gives the features'
gradients, and a second pass computes the activations again part by part. Here the two passes come from differentiating
a checkpointed map; negatives, codes and statistics are exactly those of the undivided batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array


def in_parts(
  apply: Callable[[Any, Mapping[str, Array], Array], tuple[dict[str, Array], dict[str, Array]]],
  params: Any, tokens: Mapping[str, Array], rng: Array, parts: int,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """`apply(params, tokens, rng)` on `parts` equal parts of the rows, one after the other in both passes.

  Part i takes rows i, i + parts, i + 2 * parts and so on, so that a batch that is split over devices stays split.

  Args:
    apply: (params, modality -> [b, n, c], key) -> (modality -> features [b, n, d], modality -> logit scale).
    params: parameters of the towers.
    tokens: modality -> [b, n, c].
    rng: key; each part gets its own.
    parts: number of parts; 1 applies to all rows at once.

  Raises:
    ValueError: if the rows of a modality do not divide into the parts.
  """
  if parts == 1:
    return apply(params, tokens, rng)
  for name, x in tokens.items():
    if x.shape[0] % parts:
      raise ValueError(f"stages.*.parts: {x.shape[0]} rows of {name!r} do not divide into {parts} parts")
  split = {name: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for name, x in tokens.items()}
  apply_part = jax.checkpoint(lambda part: apply(params, *part))
  features, scales = jax.lax.map(apply_part, (split, jax.random.split(rng, parts)))
  join = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
  return jax.tree.map(join, features), jax.tree.map(lambda x: x[0], scales)

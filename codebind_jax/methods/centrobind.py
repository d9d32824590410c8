"""CentroBind (arXiv 2410.02086): every modality is aligned with the centroid of all of an instance's embeddings.

What is the paper's and what is reconstructed says `losses.centroid`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from codebind_jax.losses import centroid_info_nce
from codebind_jax.losses.centroid import centroid
from codebind_jax.methods.base import Loss, Rows, SourceRecipe
from codebind_jax.norm import unit


@dataclasses.dataclass(frozen=True)
class Method(SourceRecipe):
  """L = sum over modalities i of L(A -> F_i) + L(F_i -> A), A the mean over modalities of the other view.

  Attributes:
    noise: the view that makes the centroid is a second pass of the towers over tokens with so much Gaussian noise,
      relative to each token's standard deviation; 0 takes the same view (reconstructed: how the paper augments was
      not read).
    weights_of: (modality, weight) pairs of a weighted centroid; equal weights where empty.
    normalize_anchor: L2-normalise the centroid.
    stop_anchor: no gradient through the centroid.
  """

  noise: float = 0.0
  weights_of: tuple[tuple[str, float], ...] = ()
  normalize_anchor: bool = False
  stop_anchor: bool = False

  def loss(self, rows: Rows, codebooks: Any, aux: Any) -> Loss:
    """The sum over the rows' modalities."""
    z = anchors = self.embeddings(rows)
    if self.noise:
      anchors = self._second_view(rows)
    weights = {m: dict(self.weights_of).get(m, 1.0) for m in z} if self.weights_of else None
    value = centroid_info_nce(
      anchors, z, temperature=rows.temperature, weights=weights, mask=dict(rows.masks), groups=rows.groups_of(*z),
      normalize_anchor=self.normalize_anchor, stop_anchor=self.stop_anchor,
    )  # fmt: skip
    # Not weighted: how far the modalities are from agreeing.
    middle = jax.lax.stop_gradient(centroid(anchors, mask=dict(rows.masks)))
    return Loss({"centrobind": value, "alignment_gap": 1.0 - jnp.mean(jnp.sum(middle**2, -1))}, codebooks, aux)

  @property
  def weights(self) -> dict[str, float]:
    """The gap is only watched."""
    return {"alignment_gap": 0.0}

  def _second_view(self, rows: Rows) -> dict[str, Any]:
    noisy = {}
    for number, (name, x) in enumerate(rows.tokens.items()):
      x = x.astype(jnp.float32)
      draw = jax.random.normal(jax.random.fold_in(rows.rng, number), x.shape)
      noisy[name] = x + self.noise * jnp.std(x, axis=-1, keepdims=True) * draw
    drop = {"dropout": jax.random.fold_in(rows.rng, len(noisy))}
    features, _ = self.model.apply({"params": rows.params}, noisy, train=True, rngs=drop)
    return {name: unit(self.shared(name, x)[:, 0]) for name, x in features.items()}

"""CentroBind (arXiv 2410.02086): every modality is aligned with the centroid of all of an instance's embeddings.

The docstring of `losses.centroid` says which parts are the paper's and which are reconstructed.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from codebind_jax.losses import centroid_info_nce
from codebind_jax.losses.centroid import centroid
from codebind_jax.losses.masks import masked_mean
from codebind_jax.methods import base
from codebind_jax.methods.base import Forward, Rows, Term, joined
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.schema import Name, at_least, at_most
from codebind_jax.stages import Stage


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """L = sum over modalities i of L(A -> F_i) + L(F_i -> A), with A the mean over modalities of the second view.

  Attributes:
    noise: standard deviation of the Gaussian noise, relative to each token's, added to the inputs for the second view;
      0 uses the first view twice (reconstructed: how the paper augments was not read).
    weights_of: (modality, weight) pairs of a weighted centroid; empty for equal weights.
    normalize_anchor: L2-normalise the centroid.
    stop_anchor: no gradient through the centroid.
  """

  BASE = "centrobind"

  noise: Annotated[float, at_least(0, "the same view"), at_most(1000)] = 0.0
  weights_of: tuple[tuple[Name, Annotated[float, at_least(0), at_most(1e6)]], ...] = ()
  normalize_anchor: bool = False
  stop_anchor: bool = False

  @property
  def needs_tokens(self) -> str:
    """Noise is added to tokens alone."""
    return f"config.method_options.noise is {self.noise}" if self.noise else ""

  def observe(self, forward: Forward, state: TrainState, rng: Any, stage: Stage) -> tuple[dict[str, Rows], Any, Any]:
    """Puts the embeddings for the centroids into `made`: of a second, noisy view if `noise` is set."""
    rows = forward.rows(rng, stage, state)
    features = self._second_view(forward, rows) if self.noise else forward.features
    for source, part in rows.items():
      rows[source] = dataclasses.replace(part, made=self.embeddings(forward.of(source, features)))
    return rows, state.codebooks, state.aux

  def terms(self, stage: Stage) -> dict[str, Term]:
    """The alignment, and as `alignment_gap` 1 minus the centroids' mean squared norm: 0 if all modalities agree."""
    return {"centrobind": self._alignment, "alignment_gap": _alignment_gap}

  def weights(self, stage: Stage) -> dict[str, float]:
    """The gap is only logged."""
    return {"centrobind": 1.0, "alignment_gap": 0.0}

  def _alignment(self, rows: Rows) -> Float[Array, ""]:
    z = self.embeddings(rows.features)
    weights = {m: dict(self.weights_of).get(m, 1.0) for m in z} if self.weights_of else None
    return centroid_info_nce(
      rows.made, z, temperature=rows.temperature, weights=weights, mask=dict(rows.masks), groups=rows.groups_of(*z),
      normalize_anchor=self.normalize_anchor, stop_anchor=self.stop_anchor,
    )  # fmt: skip

  def _second_view(self, forward: Forward, rows: dict[str, Rows]) -> dict[str, Array]:
    noisy: dict[str, list[Array]] = {}
    for part in rows.values():
      for number, (name, x) in enumerate(part.inputs.items()):
        x = x.astype(jnp.float32)
        draw = jax.random.normal(jax.random.fold_in(part.rng, number), x.shape)
        noisy.setdefault(name, []).append(x + self.noise * jnp.std(x, axis=-1, keepdims=True) * draw)
    key = jax.random.fold_in(next(iter(rows.values())).rng, len(noisy))
    return forward.apply(forward.params, {m: joined(parts) for m, parts in noisy.items()}, key)[0]


def _alignment_gap(rows: Rows) -> Float[Array, ""]:
  """1 - |centroid|^2, mean over the rows that have a modality at all."""
  centroids = jax.lax.stop_gradient(centroid(rows.made, mask=dict(rows.masks)))
  return 1.0 - masked_mean(jnp.sum(centroids**2, -1), jnp.any(jnp.stack(list(rows.masks.values())), axis=0))

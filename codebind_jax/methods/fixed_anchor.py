"""Fixed-anchor binding (ImageBind; FABind in arXiv 2410.02086): every modality is aligned with one anchor modality."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from codebind_jax.losses import fixed_anchor_info_nce
from codebind_jax.methods.base import Loss, Rows, SourceRecipe


@dataclasses.dataclass(frozen=True)
class Method(SourceRecipe):
  """L = sum over modalities i other than the anchor of L(A -> F_i) + L(F_i -> A).

  Attributes:
    anchor: the modality that the others are aligned with; every source must have it.
    frozen: the anchor's tower stays as it is (its logit scale does not), as in the papers, where it is pre-trained; a
      tower that starts at random should not be frozen.
  """

  anchor: str = "image"
  frozen: bool = True

  def kept(self, updates: Any) -> Any:
    """Not even decayed is a frozen anchor."""
    if not self.frozen or self.anchor not in updates:
      return updates
    return {**updates, self.anchor: jax.tree.map(jnp.zeros_like, updates[self.anchor])}

  def loss(self, rows: Rows, codebooks: Any, aux: Any) -> Loss:
    """The sum over the rows' modalities."""
    z = self.embeddings(rows)
    if self.anchor not in z:
      raise ValueError(f"config.method_options.anchor: {self.anchor!r} is not in this source; it has {sorted(z)}")
    value = fixed_anchor_info_nce(
      z, z, temperature=rows.temperature, anchor=self.anchor, mask=dict(rows.masks),
      groups={m: rows.groups_of(self.anchor, m) for m in z}, stop_anchor=self.frozen,
    )  # fmt: skip
    return Loss({"fixed_anchor": value}, codebooks, aux)

"""Fixed-anchor binding (ImageBind; FABind in arXiv 2410.02086): every modality is aligned with one anchor modality."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from jaxtyping import Array, Float

from codebind_jax.losses import fixed_anchor_info_nce
from codebind_jax.methods import base
from codebind_jax.methods.base import Forward, Rows, Term
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.schema import Name
from codebind_jax.stages import Stage


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """L = sum over modalities i other than the anchor A of L(A -> F_i) + L(F_i -> A).

  Attributes:
    anchor: the modality that the others are aligned with; every source must have it.
    frozen: the anchor's tower does not train (its logit scale does), as in the papers, where it is pretrained; set it
      to False for a randomly initialised tower.
  """

  BASE = "fixed_anchor"

  anchor: Name = "image"
  frozen: bool = True

  def frozen_paths(self, stage: Stage) -> tuple[str, ...]:
    """The anchor's tower if it is frozen; it gets no weight decay either."""
    return (rf"{re.escape(self.anchor)}/.*",) if self.frozen else ()

  def observe(self, forward: Forward, state: TrainState, rng: Any, stage: Stage) -> tuple[dict[str, Rows], Any, Any]:
    """The rows unchanged: the method has no state.

    Raises:
      ValueError: if a source lacks the anchor.
    """
    rows = forward.rows(rng, stage, state)
    for source, part in rows.items():
      if self.anchor not in part.features:
        raise ValueError(f"config.method_options.anchor: {self.anchor!r} is not in source {source!r}; it has "
                         f"{sorted(part.features)}")  # fmt: skip
    return rows, state.codebooks, state.aux

  def terms(self, stage: Stage) -> dict[str, Term]:
    """The alignment with the anchor, summed over the rows' modalities."""
    return {"fixed_anchor": self._alignment}

  def _alignment(self, rows: Rows) -> Float[Array, ""]:
    z = self.embeddings(rows.features)
    return fixed_anchor_info_nce(
      z, z, temperature=rows.temperature, anchor=self.anchor, mask=dict(rows.masks),
      groups={m: rows.groups_of(self.anchor, m) for m in z}, stop_anchor=self.frozen,
    )  # fmt: skip

"""CODIS (arXiv 2203.00048): modalities are bound through their assignments to one learnable codebook.

What was read and what is reconstructed says `losses.prototypes`; of the method, the fusion encoder with its matching
and masked-word losses is left out, because the towers here end before it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from codebind_jax import transport
from codebind_jax.compositional import ModalityOutput
from codebind_jax.losses import prototypes
from codebind_jax.methods.base import EXTRA, Loss, Rows, SourceRecipe, output, present
from codebind_jax.norm import unit


@dataclasses.dataclass(frozen=True)
class Method(SourceRecipe):
  """For each pair: <T, cost> for both views + swapped prediction both ways + four-term momentum contrast.

  Attributes:
    codes: size K of the codebook, a parameter that gradient trains.
    queue: older teacher embeddings of a modality that serve as negatives; 0 for none.
    decay: of the teacher (ALBEF, TCL: 0.995).
    alpha: share of the teacher's soft targets in the contrast (ALBEF, TCL: 0.4).
    gamma: temperature of the softmax over codes.
    solver: "ipot" or "sinkhorn".
    step: size of a proximal step, or the weight of Sinkhorn's entropy, in units of 1 - cosine.
    iterations: of the solver.
    code_weight: weight of the three code losses together.
  """

  codes: int = 256
  queue: int = 1024
  decay: float = 0.995
  alpha: float = 0.4
  gamma: float = 0.1
  solver: str = "ipot"
  step: float = 0.5
  iterations: int = 50
  code_weight: float = 1.0

  def __post_init__(self):
    if self.solver not in ("ipot", "sinkhorn"):
      raise ValueError(f"config.method_options.solver: got {self.solver!r}; allowed: ['ipot', 'sinkhorn']")

  @property
  def codebook_sizes(self) -> dict[str, int]:
    """The one codebook, a parameter."""
    return {"shared": self.codes}

  @property
  def weights(self) -> dict[str, float]:
    """Of the code losses; the contrast has 1."""
    return dict.fromkeys(("transport", "swapped"), self.code_weight)

  def init(self, rng: Any, features: Mapping[str, Array], tokens: Mapping[str, Array], towers: Any) -> tuple:
    """Random unit codes; a teacher equal to the student; empty queues."""
    width = self.model.towers[next(iter(features))].shared_dim
    codes = unit(jax.random.normal(rng, (self.codes, width), jnp.float32))
    aux = {"teacher": jax.tree.map(lambda x: jnp.array(x, copy=True), towers)}
    if self.queue:
      aux["queue"] = {m: prototypes.new_queue(self.queue, width) for m in features}
    return {"codes": codes}, {}, aux

  def plan(
    self, teacher: Float[Array | np.ndarray, "b d"], codes: Float[Array, "k d"],
    mask: Bool[Array, "b"] | None = None,
  ) -> Float[Array, "b k"]:
    """The transport plan of a batch of teacher features to the codes."""
    solve = {
      "ipot": functools.partial(transport.ipot, beta=self.step, outer=self.iterations),
      "sinkhorn": functools.partial(transport.sinkhorn, reg=self.step, iterations=self.iterations),
    }[self.solver]
    return prototypes.assign(teacher, codes, plan=solve, mask=mask)

  def before(self, params: Any, aux: Any) -> Any:
    """The teacher follows the student."""
    student = {name: value for name, value in params.items() if name != EXTRA}
    return aux | {"teacher": prototypes.teacher_update(aux["teacher"], student, self.decay)}

  def loss(self, rows: Rows, codebooks: Any, aux: Any) -> Loss:
    """Sums over the stage's pairs that the rows have."""
    z, codes = self.embeddings(rows), rows.params[EXTRA]["codes"]
    features, _ = self.model.apply({"params": jax.lax.stop_gradient(aux["teacher"])}, rows.tokens)
    teacher = {m: jax.lax.stop_gradient(unit(self.shared(m, x)[:, 0])) for m, x in features.items()}
    plans = {m: self.plan(x, codes, rows.masks[m]) for m, x in teacher.items()}
    pairs = [(a, b) for a, b in rows.stage.pairs if a in z and b in z]
    terms = dict.fromkeys(("contrast", "transport", "swapped"), jnp.zeros((), jnp.float32))
    for a, b in pairs:
      both = present(rows.masks, a, b)
      terms["contrast"] += prototypes.pair_loss(
        z, teacher, aux.get("queue"), (a, b), temperature=rows.temperature, alpha=self.alpha, mask=both,
        groups_of=rows.groups_of,
      ) / len(pairs)  # fmt: skip
      for own, other in ((a, b), (b, a)):
        terms["transport"] += prototypes.transport_loss(plans[own], teacher[own], codes) / len(pairs)
        # A plan's row has mass 1 / (rows with the modality); times that number it is a distribution.
        terms["swapped"] += prototypes.swapped_prediction(
          plans[own], z[other], codes, temperature=self.gamma, mask=both, rows=jnp.sum(rows.masks[own])
        ) / len(pairs)  # fmt: skip
    if self.queue:
      queues = {m: prototypes.enqueue(aux["queue"][m], x, rows.masks[m], rows.groups) for m, x in teacher.items()}
      aux = aux | {"queue": aux["queue"] | queues}
    chosen = jnp.concatenate([jnp.argmax(plan, axis=1) for plan in plans.values()])
    return Loss(terms, codebooks, aux, {"shared": chosen})

  def embed(self, params: Any, codebooks: Any, features: Mapping[str, Array]) -> dict[str, ModalityOutput]:
    """The student's embeddings, and the code nearest to each by cosine."""
    codes, found = unit(params[EXTRA]["codes"]), {}
    for name, x in features.items():
      z = self.shared(name, x)
      nearest = jnp.argmax(jnp.einsum("bnd,kd->bnk", unit(z), codes, precision=jax.lax.Precision.HIGHEST), axis=-1)
      found[name] = output(z, self.specific(name, x), nearest[..., None].astype(jnp.int32))
    return found

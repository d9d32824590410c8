"""CODIS (arXiv 2203.00048): modalities are bound through their assignments to one learnable codebook.

The docstring of `losses.prototypes` says what was read and what is reconstructed. The paper's fusion encoder, with its
matching and masked-word losses, is left out, because the towers here end before it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from codebind_jax import transport
from codebind_jax.codebook.spec import Codes
from codebind_jax.compositional import ModalityOutput
from codebind_jax.losses import prototypes
from codebind_jax.methods import base
from codebind_jax.methods.base import EXTRA, Forward, Rows, Term, output
from codebind_jax.norm import unit
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.schema import Decay, Share, Temperature, Weight, above, at_least, at_most
from codebind_jax.stages import Stage


@dataclasses.dataclass(frozen=True)
class Assigned:
  """The teacher's embeddings and their assignments to codes, for CODIS's terms (`Rows.made`).

  Attributes:
    teacher: modality -> the teacher's unit embeddings [b, d].
    plans: modality -> their transport plan to the codes [b, k].
    queue: modality -> older teacher embeddings; None without queues.
  """

  teacher: Mapping[str, Float[Array, "b d"]]
  plans: Mapping[str, Float[Array, "b k"]]
  queue: Mapping[str, prototypes.Queue] | None


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """For each pair: <T, cost> of both modalities + swapped prediction both ways + four-term momentum contrast.

  Attributes:
    codes: size K of the codebook, a parameter trained by gradient.
    queue: number of older teacher embeddings of a modality that serve as negatives; 0 for none.
    decay: decay of the teacher's moving average (ALBEF, TCL: 0.995).
    alpha: share of the teacher's soft targets in the contrast (ALBEF, TCL: 0.4).
    gamma: temperature of the softmax over codes.
    solver: how the transport plan is found: "ipot" (proximal point) or "sinkhorn" (entropy).
    step: size of a proximal step, or the weight of Sinkhorn's entropy, in units of 1 - cosine.
    iterations: number of iterations of the solver.
    code_weight: weight of the three code losses together.
  """

  BASE = "contrast"
  FACTORS = {"transport": 0.1, "swapped": 0.1}

  codes: Codes = 256
  queue: Annotated[int, at_least(0, "none"), at_most(1 << 24)] = 1024
  decay: Decay = 0.995
  alpha: Share = 0.4
  gamma: Temperature = 0.1
  solver: Literal["ipot", "sinkhorn"] = "ipot"
  step: Annotated[float, above(0), at_most(1e6)] = 0.5
  iterations: Annotated[int, above(0), at_most(100_000)] = 50
  code_weight: Weight = 1.0

  @property
  def codebook_sizes(self) -> dict[str, int]:
    """The shared codebook alone, which is a parameter."""
    return {"shared": self.codes}

  def init(self, rng: Any, features: Mapping[str, Array], inputs: Mapping[str, Array], towers: Any) -> tuple:
    """Random unit codes as parameters; in aux a teacher equal to the student, and empty queues."""
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

  def observe(self, forward: Forward, state: TrainState, rng: Any, stage: Stage) -> tuple[dict[str, Rows], Any, Any]:
    """Updates the teacher, embeds the batch with it, assigns each source's rows to codes, then enqueues them."""
    student = {name: value for name, value in forward.params.items() if name != EXTRA}
    aux = state.aux | {"teacher": prototypes.teacher_update(state.aux["teacher"], student, self.decay)}
    features, _ = forward.apply(jax.lax.stop_gradient(aux["teacher"]), forward.inputs, None)
    rows = forward.rows(rng, stage, state)
    for source, part in rows.items():
      teacher = jax.lax.stop_gradient(self.embeddings(forward.of(source, features)))
      codes = part.params[EXTRA]["codes"]
      plans = {m: self.plan(x, codes, part.masks[m]) for m, x in teacher.items()}
      chosen = tuple((jnp.argmax(plan, axis=1), part.masks[m]) for m, plan in plans.items())
      made = Assigned(teacher, plans, aux.get("queue"))
      rows[source] = dataclasses.replace(part, made=made, codes={"shared": chosen})
      if self.queue:
        queues = {m: prototypes.enqueue(aux["queue"][m], x, part.masks[m], part.groups) for m, x in teacher.items()}
        aux = aux | {"queue": aux["queue"] | queues}
    return rows, state.codebooks, aux

  def terms(self, stage: Stage) -> dict[str, Term]:
    """Contrast and the two code losses, each the mean over the stage's pairs that the rows have."""
    return {"contrast": self._contrast, "transport": _transport, "swapped": self._swapped}

  def weights(self, stage: Stage) -> dict[str, float]:
    """1 for the contrast, `code_weight` for the code losses."""
    return {"contrast": 1.0} | dict.fromkeys(("transport", "swapped"), self.code_weight)

  def _contrast(self, rows: Rows) -> Float[Array, ""]:
    z = self.embeddings(rows.features)
    return _over_pairs(rows, lambda a, b: prototypes.pair_loss(
      z, rows.made.teacher, rows.made.queue, (a, b), temperature=rows.temperature, alpha=self.alpha,
      mask=rows.both(a, b), groups_of=rows.groups_of,
    ))  # fmt: skip

  def _swapped(self, rows: Rows) -> Float[Array, ""]:
    z, plans, codes = self.embeddings(rows.features), rows.made.plans, rows.params[EXTRA]["codes"]
    # A plan's row has mass 1 / (rows with the modality), so that times `rows` it is a distribution.
    one_way = lambda own, other: prototypes.swapped_prediction(
      plans[own], z[other], codes, temperature=self.gamma, mask=rows.both(own, other), rows=jnp.sum(rows.masks[own])
    )
    return _over_pairs(rows, lambda a, b: one_way(a, b) + one_way(b, a))

  def embed(self, params: Any, codebooks: Any, features: Mapping[str, Array]) -> dict[str, ModalityOutput]:
    """The student's embeddings, and the code nearest to each by cosine."""
    codes, outputs = unit(params[EXTRA]["codes"]), {}
    for name, x in features.items():
      z = self.shared(name, x)
      nearest = jnp.argmax(jnp.einsum("bnd,kd->bnk", unit(z), codes, precision=jax.lax.Precision.HIGHEST), axis=-1)
      outputs[name] = output(z, self.specific(name, x), nearest[..., None].astype(jnp.int32))
    return outputs


def _transport(rows: Rows) -> Float[Array, ""]:
  made, codes = rows.made, rows.params[EXTRA]["codes"]
  cost = {m: prototypes.transport_loss(plan, made.teacher[m], codes) for m, plan in made.plans.items()}
  return _over_pairs(rows, lambda a, b: cost[a] + cost[b])


def _over_pairs(rows: Rows, loss: Callable[[str, str], Float[Array, ""]]) -> Float[Array, ""]:
  values = [loss(a, b) for a, b in rows.pairs]
  return sum(values) / len(values) if values else jnp.zeros((), jnp.float32)

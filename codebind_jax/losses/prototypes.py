"""Contrast through cluster assignments, with a momentum teacher and a queue: the parts of CODIS.

CODIS (Duan et al., arXiv 2203.00048). Read in the paper: image and text are two views coded by one learnable dictionary
of cluster centres, optimal transport assigns features to them, a momentum teacher of each view guides the student of
the other, and there are queues. **Reconstructed, not read:** every equation below (no code is public); the momentum
contrast follows ALBEF's and TCL's public code, four terms as Jiang et al. (CVPR 2023) attribute to CODIS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from codebind_jax.losses.masks import MASKED_LOGIT, distinct, masked_mean
from codebind_jax.norm import unit, wide
from codebind_jax.transport import ipot

_HIGH = jax.lax.Precision.HIGHEST
Plan = Callable[[Float[Array, "n k"], Float[Array, "n"] | None], Float[Array, "n k"]]


@flax.struct.dataclass
class Queue:
  """A ring of the last q embeddings of a modality, oldest overwritten first.

  Attributes:
    features: [q, d].
    valid: bool [q], slots that hold an embedding. (ALBEF's queue starts with random directions instead.)
    groups: int32 [q], rows of one group are not each other's negatives; -1 for rows without a group.
    pointer: int32 [], the next slot to write.
  """

  features: Any
  valid: Any
  groups: Any
  pointer: Any


def new_queue(size: int, width: int) -> Queue:
  """An empty queue."""
  zero = jnp.zeros((), jnp.int32)
  no_groups = jnp.full(size, -1, jnp.int32)
  return Queue(jnp.zeros((size, width), jnp.float32), jnp.zeros(size, jnp.bool_), no_groups, zero)


def enqueue(
  queue: Queue, features: Float[Array | np.ndarray, "b d"], mask: Bool[Array | np.ndarray, "b"] | None = None,
  groups: Int[Array | np.ndarray, "b"] | None = None,
) -> Queue:
  """Writes a batch over the oldest slots; a masked row takes a slot that counts as empty.

  Raises:
    ValueError: if the batch is longer than the queue or of another width.
  """
  size, width = queue.features.shape
  if features.shape[0] > size or features.shape[1] != width:
    raise ValueError(f"a queue of shape {(size, width)} cannot take a batch of shape {features.shape}")
  slots = (queue.pointer + jnp.arange(features.shape[0])) % size
  valid = jnp.ones(features.shape[0], jnp.bool_) if mask is None else jnp.asarray(mask, jnp.bool_)
  groups = jnp.full(features.shape[0], -1, jnp.int32) if groups is None else jnp.asarray(groups, jnp.int32)
  return Queue(
    queue.features.at[slots].set(jax.lax.stop_gradient(jnp.asarray(features, queue.features.dtype))),
    queue.valid.at[slots].set(valid),
    queue.groups.at[slots].set(groups),
    (queue.pointer + features.shape[0]) % size,
  )


def teacher_update(teacher: Any, student: Any, decay: float = 0.995) -> Any:
  """The moving average: decay * teacher + (1 - decay) * student, leaf by leaf."""
  return jax.tree.map(lambda t, s: decay * t + (1.0 - decay) * jax.lax.stop_gradient(s), teacher, student)


def assign(
  teacher: Float[Array | np.ndarray, "n d"],
  codes: Float[Array | np.ndarray, "k d"],
  *,
  plan: Plan | None = None,
  mask: Bool[Array | np.ndarray, "n"] | None = None,
) -> Float[Array, "n k"]:
  """Transport plan of teacher features to codes: rows have mass 1/n, codes 1/k, cost 1 - cosine; no gradient.

  Args:
    teacher: features, normalised here.
    codes: cluster centres, normalised here.
    plan: (cost, row masses or None) -> plan; None for `ipot` with its defaults.
    mask: True for rows that count; the others have mass 0.
  """
  cost = 1.0 - _cosine(teacher, codes)
  mass = None if mask is None else mask / jnp.maximum(jnp.sum(mask), 1)
  return jax.lax.stop_gradient(ipot(cost, mass) if plan is None else plan(cost, mass))


def transport_loss(
  plan: Float[Array | np.ndarray, "n k"],
  teacher: Float[Array | np.ndarray, "n d"],
  codes: Float[Array | np.ndarray, "k d"],
) -> Float[Array, ""]:
  """<T, 1 - cosine>: moves the centres to the features the plan gives them; only `codes` gets a gradient."""
  cost = 1.0 - _cosine(jax.lax.stop_gradient(teacher), codes)
  return jnp.sum(jax.lax.stop_gradient(wide(plan)) * cost)


def swapped_prediction(
  plan: Float[Array | np.ndarray, "n k"],
  student: Float[Array | np.ndarray, "n d"],
  codes: Float[Array | np.ndarray, "k d"],
  *,
  temperature: float,
  mask: Bool[Array | np.ndarray, "n"] | None = None,
  rows: Float[Array, ""] | Int[Array, ""] | None = None,
) -> Float[Array, ""]:
  """Cross-entropy of a student's code distribution against the *other* view's plan, times n so that rows sum to 1.

  Args:
    plan: transport plan of the other view.
    student: features, normalised here; row i belongs to row i of the plan.
    codes: cluster centres.
    temperature: gamma of the softmax over codes.
    mask: True for rows that count.
    rows: number of rows of the plan that have mass, if it is not the number of those that count.
  """
  plan = jax.lax.stop_gradient(wide(plan))
  counts = jnp.ones(plan.shape[0], jnp.bool_) if mask is None else jnp.asarray(mask, jnp.bool_)
  target = plan * (jnp.sum(counts) if rows is None else rows)
  logs = jax.nn.log_softmax(_cosine(student, codes) / temperature, axis=1)
  return masked_mean(-jnp.sum(target * logs, axis=1), counts)


def momentum_contrast(
  student: Float[Array | np.ndarray, "b d"],
  query_teacher: Float[Array | np.ndarray, "b d"],
  key_teacher: Float[Array | np.ndarray, "b d"],
  queue: Queue | None,
  *,
  temperature: float | jax.Array,
  alpha: float = 0.0,
  mask: Bool[Array | np.ndarray, "b"] | None = None,
  groups: Int[Array | np.ndarray, "b"] | None = None,
) -> Float[Array, ""]:
  """Cross-entropy of the student's similarities to teacher keys, of the batch and the queue.

  Targets are (1 - alpha) onehot + alpha softmax of the teacher's own similarities (ALBEF's momentum distillation).

  Args:
    student: unit features of one view.
    query_teacher: features of the same view from its teacher, for the soft targets.
    key_teacher: features of the other view (or the same one) from its teacher.
    queue: older keys of the view of `key_teacher`; None for in-batch negatives only.
    temperature: divides the cosines.
    alpha: share of the soft targets.
    mask: True for rows that count, as queries and as keys.
    groups: rows and queued keys of one group are not each other's negatives.
  """
  student, query_teacher, keys = wide(student), wide(query_teacher), wide(key_teacher)
  query_teacher, keys = jax.lax.stop_gradient((query_teacher, keys))
  rows = jnp.ones(student.shape[0], jnp.bool_) if mask is None else jnp.asarray(mask, jnp.bool_)
  valid = rows[None]
  if groups is not None:
    valid = valid & distinct(groups)
  if queue is not None:
    queued = jax.lax.stop_gradient(queue.features.astype(keys.dtype))
    keys, valid_queued = jnp.concatenate([keys, queued]), queue.valid[None]
    if groups is not None:
      valid_queued = valid_queued & (jnp.asarray(groups)[:, None] != queue.groups)
    by_row = lambda x: jnp.broadcast_to(x, (student.shape[0], x.shape[1]))
    valid = jnp.concatenate([by_row(valid), by_row(valid_queued)], axis=1)
  scores = lambda q: jnp.where(valid, jnp.einsum("bd,kd->bk", q, keys, precision=_HIGH) / temperature, MASKED_LOGIT)
  target = (1.0 - alpha) * jnp.eye(student.shape[0], keys.shape[0], dtype=keys.dtype)
  if alpha:
    target += alpha * jax.lax.stop_gradient(jax.nn.softmax(scores(query_teacher), axis=1))
  terms = -jnp.sum(target * jax.nn.log_softmax(scores(student), axis=1), axis=1)
  return masked_mean(terms, rows)


def pair_loss(
  students: Mapping[str, Float[Array | np.ndarray, "b d"]],
  teachers: Mapping[str, Float[Array | np.ndarray, "b d"]],
  queues: Mapping[str, Queue] | None,
  pair: tuple[str, str],
  *,
  temperature: float | jax.Array,
  alpha: float = 0.0,
  mask: Bool[Array | np.ndarray, "b"] | None = None,
  groups_of: Callable[..., Int[Array | np.ndarray, "b"] | None] = lambda *_: None,
) -> Float[Array, ""]:
  """Mean of the four terms a -> b, b -> a, a -> a, b -> b of `momentum_contrast`, with groups_of(query, key)."""
  return sum(
    momentum_contrast(
      students[query], teachers[query], teachers[key], None if queues is None else queues[key],
      temperature=temperature, alpha=alpha, mask=mask, groups=groups_of(query, key),
    )
    for query in pair for key in pair
  ) / 4  # fmt: skip


def _cosine(features, codes):
  return jnp.einsum("nd,kd->nk", unit(features), unit(codes), precision=_HIGH)

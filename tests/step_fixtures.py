"""One batch of two sources, small towers, and the step on them: shared by the tests of the step and of its terms."""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import FrozenDict

from codebind_jax.methods.base import make_init
from codebind_jax.models.towers import CodeBind, DecoderSpec, TowerSpec
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.stages import Stage
from codebind_jax.step import make_train_step

# jit sorts the keys of a batch, so that they stand in this order here as well.
SOURCES = {"far": ("image", "text"), "near": ("audio", "image", "text")}
ROWS = {"far": 6, "near": 8}
WIDTHS = {"audio": 5, "image": 6, "text": 4}
SPECIFIC = {"audio": 4, "image": 8, "text": 0}
SCALES = {"audio": 0.8, "image": 1.5, "text": 2.0}
DECODER = {"width": 8, "depth": 1, "heads": 2}
# Rows of one label in each source, and labels that occur in both.
GROUPS = {"far": [0, 1, 0, 2, 3, 4], "near": [0, 5, 5, 1, 5, 3, 4, 6]}
# One row that has nothing, rows that lack one modality, and different ones in different sources.
MASKS = {
  ("far", "image"): [1, 1, 1, 1, 0, 0], ("far", "text"): [1, 1, 1, 0, 1, 0],
  ("near", "audio"): [1, 1, 0, 1, 1, 1, 0, 1], ("near", "image"): [1, 1, 1, 0, 1, 1, 1, 1],
  ("near", "text"): [0, 1, 1, 1, 1, 1, 0, 1],
}  # fmt: skip
SHARED = 8


def model(decoder: bool = False, dropout: float = 0.0, own: Container[str] = SPECIFIC) -> CodeBind:
  """Towers of three modalities without bodies; those of `own` have their specific parts."""
  spec = lambda name: TowerSpec(
    shared_dim=SHARED, specific_dim=SPECIFIC[name] if name in own else 0, logit_scale=SCALES[name], dropout=dropout,
    decoder=DecoderSpec(**DECODER) if decoder and name != "text" else None,
  )  # fmt: skip
  return CodeBind(FrozenDict({name: spec(name) for name in WIDTHS}))


def batch_of(tokens: int = 1, masks: Any = None, hidden: float = 30.0) -> dict[str, dict[str, Any]]:
  """The batch; rows that lack a modality hold numbers of the size `hidden` there, which nothing may read."""
  rng, masks, batch = np.random.default_rng(0), MASKS if masks is None else masks, {}
  for source, names in SOURCES.items():
    masks_of = {name: np.array(masks[source, name], bool) for name in names}
    content = {name: rng.normal(size=(ROWS[source], tokens, WIDTHS[name])).astype(np.float32) for name in names}
    for name, x in content.items():
      x[~masks_of[name]] = hidden * rng.normal(size=x[~masks_of[name]].shape)
    batch[source] = content | {"_mask": masks_of, "_group": np.array(GROUPS[source])}
  return batch


def stage_of(**changes: Any) -> Stage:
  """A stage of all pairs, with no key at its default that a term looks at."""
  return dataclasses.replace(
    Stage(
      name="only", pairs=(("image", "text"), ("audio", "image"), ("audio", "text")), steps=2, batch_size=8,
      sources=ROWS, weights={"near": 3.0, "far": 1.0}, unique_labels=False, temperature=0.3,
    ),
    **changes,
  )  # fmt: skip


class Setting(NamedTuple):
  """A method at the start of a stage and its compiled step."""

  method: Any
  stage: Stage
  state: TrainState
  step: Any


def setting(
  method: Any, stage: Stage, tokens: int = 1, change: Any = lambda state: state, frozen: frozenset[str] = frozenset(),
  tx: Any = None,
) -> Setting:
  """The method's random start, after `change`, and its step."""
  tx = optax.sgd(0.1) if tx is None else tx
  shapes = {name: jax.ShapeDtypeStruct((tokens, width), jnp.float32) for name, width in WIDTHS.items()}
  params, books, aux = jax.jit(make_init(method, shapes, stages=[stage]))(jax.random.key(3))
  state = TrainState(jnp.zeros((), jnp.int32), params, books, tx.init(params), aux, jax.random.key(5))
  return Setting(method, stage, change(state), jax.jit(make_train_step(method, stage, tx, frozen=frozen)))


def features_of(method: Any, params: Any, batch: Any) -> dict[str, dict[str, np.ndarray]]:
  """Source -> modality -> heads' output, from the model itself and one source at a time."""
  apply = jax.jit(method.model.apply)
  return {
    source: {
      name: np.asarray(x)
      for name, x in apply({"params": params}, {m: jnp.asarray(batch[source][m]) for m in names})[0].items()
    }
    for source, names in SOURCES.items()
  }


def mean_over_sources(values: dict[str, float], stage: Stage) -> float:
  """The sources' values, weighted as the stage says."""
  return sum(stage.weights[s] * float(value) for s, value in values.items()) / sum(stage.weights[s] for s in values)


def unit(x: np.ndarray) -> np.ndarray:
  """Rows of norm 1, in float64."""
  x = np.asarray(x, np.float64)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def directed(
  query: np.ndarray, key: np.ndarray, temperature: float, has: np.ndarray, groups: np.ndarray | None = None
) -> float:
  """InfoNCE in one direction in float64: rows without `has` are left out, rows of one group are no negatives."""
  logits = np.asarray(query, np.float64)[has] @ np.asarray(key, np.float64)[has].T / temperature
  if groups is not None:
    same = groups[has][:, None] == groups[has]
    logits = np.where(same & ~np.eye(len(logits), dtype=bool), -np.inf, logits)
  return float(np.mean(np.log(np.exp(logits).sum(1)) - np.diag(logits)))

"""The training step of all methods, a pure function that is the same on one device and on many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from codebind_jax import losses
from codebind_jax.codebook import usage_stats
from codebind_jax.codebook.segments import code_counts
from codebind_jax.methods.base import Forward, Method, Rows, merge_sources
from codebind_jax.models.towers import TRUNK
from codebind_jax.runtime import optim
from codebind_jax.runtime.gradient_cache import in_parts
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.stages import Stage

Batch = Mapping[str, Mapping[str, Any]]


def make_train_step(
  method: Method, stage: Stage, tx: optax.GradientTransformation, *, frozen: frozenset[str] = frozenset()
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
  """The step of a stage: (state, batch) -> (state, metrics), to be jitted with the state donated.

  A batch is `{source: {modality: [b, n, d], "_mask": {modality: bool [b]}, "_group": int [b]}}`. The towers and the
  method's `observe` take the rows of all sources at once; each term is computed per source, and averaged by the
  sources' weights.

  Args:
    method: gives `observe`, the terms and their weights.
    stage: of the run.
    tx: optimizer of the stage.
    frozen: paths of parameters that do not train; no gradient is computed for them.
  """
  constant = method.weights(stage)
  weighted = [name for name in method.terms(stage) if constant[name]]

  def loss_fn(params: Any, state: TrainState, batch: Batch, rng: Any):
    values, rows, codebooks, aux = term_values(method, stage, optim.stop_frozen(params, frozen), state, batch, rng)
    weights = constant
    if stage.balance:
      balance = losses.balance_update(aux["balance"], {name: values[name] for name in weighted})
      weights, aux = constant | balance.weight, aux | {"balance": balance}
    total = sum(weights[name] * value for name, value in values.items())
    sizes = method.codebook_sizes | {name: book.usage.size for name, book in codebooks.items()}
    return total, jax.lax.stop_gradient((values, usage_metrics(rows, sizes), codebooks, aux))

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    rng = jax.random.fold_in(state.rng, state.step)
    (total, (values, usage, codebooks, aux)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params, state, batch, rng
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics = {f"train/{name}": value for name, value in values.items()} | usage
    metrics |= {"train/total": total, "train/gradient_norm": optax.global_norm(grads)}
    if stage.balance:
      metrics |= {f"train/weight/{name}": aux["balance"].weight[name] for name in weighted}
    params, codebooks = method.settled(optax.apply_updates(state.params, updates), codebooks)
    state = state.replace(
      step=state.step + 1, params=params, codebooks=codebooks, opt_state=opt_state, aux=aux
    )
    return state, metrics

  return step


def term_values(
  method: Method, stage: Stage, params: Any, state: TrainState, batch: Batch, rng: Any
) -> tuple[dict[str, Array], dict[str, Rows], Any, Any]:
  """(term -> its mean over the sources, source -> rows, codebooks after the batch, aux after the batch).

  Args:
    method, stage: of the run.
    params: all parameters, those of the state or others in their place.
    state: before the step.
    batch: see `make_train_step`.
    rng: key of the step.
  """
  rows, codebooks, aux = method.observe(forward(method, params, batch, rng, stage), state, rng, stage)
  shares = {source: stage.weights.get(source, 1.0) for source in rows}
  values = {
    name: sum(term(rows[source]) * (share / sum(shares.values())) for source, share in shares.items())
    for name, term in method.terms(stage).items()
  }  # fmt: skip
  return values, rows, codebooks, aux


def forward(method: Method, params: Any, batch: Batch, rng: Any, stage: Stage) -> Forward:
  """The towers' outputs for a training batch: mixup, then the towers with dropout in the stage's micro-batches."""
  inputs, masks, owners = merge_sources(batch)
  shares = mixup_shares(jax.random.fold_in(rng, 1), masks, owners, stage.mixup) if stage.mixup else {}
  ids = {name for name, x in inputs.items() if x.dtype == jnp.int32}
  inputs = inputs | {name: mixed(inputs[name], w, owners, name) for name, w in shares.items() if name not in ids}

  def apply(
    params: Any, inputs: Mapping[str, Array], rng: Any, trunks: bool = False
  ) -> tuple[dict[str, Array], dict[str, Array]]:
    train = rng is not None
    run = lambda params, x, key: method.model.apply(
      {"params": params}, x, train=train, trunks=trunks, rngs={"dropout": key}
    )
    features, scales = in_parts(run, params, inputs, rng if train else jax.random.key(0), stage.parts)
    # Ids cannot be blended; the embeddings of their texts are.
    return features | {name: mixed(features[name], shares[name], owners, name) for name in ids & set(shares)}, scales

  outputs, scales = apply(params, inputs, jax.random.split(rng)[0], trunks=True)
  features = {name: x for name, x in outputs.items() if not name.startswith(TRUNK)}
  trunks = {name.removeprefix(TRUNK): x for name, x in outputs.items() if name.startswith(TRUNK)}
  groups = {
    source: content["_group"] * len(batch) + number if "_group" in content else None
    for number, (source, content) in enumerate(batch.items())
  }  # fmt: skip
  return Forward(params, inputs, features, scales, masks, owners, groups, apply, trunks)


def mixup_shares(
  rng: Array, masks: Mapping[str, Array], owners: Mapping[tuple[str, str], slice], alpha: float
) -> dict[str, Array]:
  """Modality -> each row's own share w in [1/2, 1] of its mixture, one draw for all modalities of a row; float [n].

  A row whose neighbour lacks one of its modalities is not mixed (w = 1).

  Args:
    rng: key of the draws of w.
    masks: modality -> bool [n], the sources' rows concatenated.
    owners: (source, modality) -> slice of the modality's rows.
    alpha: w is drawn from Beta(alpha, alpha), and 1 - w taken if it is larger.
  """
  out = {name: jnp.ones(mask.shape, jnp.float32) for name, mask in masks.items()}
  for number, source in enumerate(dict.fromkeys(source for source, _ in owners)):
    rows_of = {name: rows for (owner, name), rows in owners.items() if owner == source}
    count = next(rows.stop - rows.start for rows in rows_of.values())
    weight = jax.random.beta(jax.random.fold_in(rng, number), alpha, alpha, (count,))
    weight = jnp.maximum(weight, 1.0 - weight)
    for name, rows in rows_of.items():
      mask = masks[name][rows]
      weight = jnp.where(mask & ~jnp.roll(mask, 1), 1.0, weight)
    for name, rows in rows_of.items():
      whole = rows == slice(0, out[name].shape[0])
      out[name] = weight if whole else out[name].at[rows].set(weight)
  return out


def mixed(x: Array, shares: Array, owners: Mapping[tuple[str, str], slice], modality: str) -> Array:
  """Mixup of a modality's rows: row i of a source becomes w x_i + (1 - w) x_(i-1), with its own share w.

  Mixup favours heads that are linear between training concepts (Zhang et al., 2018, arXiv 1710.09412).

  Args:
    x: tokens, features or pixels [n, ...], the sources' rows concatenated; uint8 pixels stay uint8.
    shares: [n], from `mixup_shares`.
    owners: (source, modality) -> slice of the modality's rows.
    modality: of x.
  """
  out = x
  for rows in (rows for (_, name), rows in owners.items() if name == modality):
    own, w = x[rows].astype(jnp.float32), shares[rows].reshape(-1, *[1] * (x.ndim - 1))
    blend = w * own + (1.0 - w) * jnp.roll(own, 1, axis=0)
    if x.dtype == jnp.uint8:
      blend = jnp.round(blend).astype(jnp.uint8)
    out = blend if rows == slice(0, x.shape[0]) else out.astype(blend.dtype).at[rows].set(blend)
  return out


def usage_metrics(rows: Mapping[str, Rows], sizes: Mapping[str, int]) -> dict[str, Array]:
  """Usage statistics of every codebook over a batch's unmasked rows: `codebook/<name>/perplexity` and so on.

  Args:
    rows: source -> rows with their `codes`.
    sizes: codebook name -> number of codes.
  """
  metrics = {}
  for name in dict.fromkeys(name for part in rows.values() for name in part.codes):
    chosen = [pair for part in rows.values() for pair in part.codes.get(name, ())]
    size = sizes[name]
    # Masked rows are counted as an extra code after the last, which is then dropped.
    codes = [jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, size).reshape(-1) for x, mask in chosen]
    counts = code_counts(jnp.concatenate(codes), size + 1)[:size]
    metrics |= {f"codebook/{name}/{key}": value for key, value in usage_stats(counts).items()}
  return metrics


def make_start_codebooks(method: Method) -> Callable[[TrainState, Batch], Any]:
  """A function (state, first batch of a stage) -> the codebooks with which the stage starts."""

  def start(state: TrainState, batch: Batch) -> Any:
    inputs, masks, owners = merge_sources(batch)
    apply = lambda params, inputs, _: method.model.apply({"params": params}, inputs)
    features, scales = apply(state.params, inputs, None)
    out = Forward(state.params, inputs, features, scales, masks, owners, dict.fromkeys(batch), apply)
    return method.start_codebooks(out, state, jax.random.fold_in(state.rng, 2**31 - 1))

  return start


def make_start_features(method: Method) -> Callable[[Any, Batch], tuple[dict[str, Array], dict[str, Array]]]:
  """A function (params, batch) -> (modality -> heads' output [n, t, d], modality -> mask [n]), for `Method.start`."""

  def features(params: Any, batch: Batch) -> tuple[dict[str, Array], dict[str, Array]]:
    inputs, masks, _ = merge_sources(batch)
    return method.model.apply({"params": params}, inputs)[0], masks

  return features


def make_embed_step(method: Method) -> Callable[..., dict[str, Any]]:
  """A function (params, codebooks, modality -> inputs) -> modality -> embeddings of pooled tokens; it has no state."""

  def embed(params: Any, codebooks: Any, inputs: Mapping[str, Array]) -> dict[str, Any]:
    features, _ = method.model.apply({"params": params}, inputs, pooled=True)
    return method.embed(params, codebooks, features)

  return embed

"""The pure training and embedding steps: no I/O, no Python state, the same on one device and on many."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from codebind_jax import losses
from codebind_jax.codebook import CodebookState, usage_stats
from codebind_jax.codebook.segments import code_counts
from codebind_jax.compositional import CompositionalSpec, ModalityOutput, quantize_modalities
from codebind_jax.models.towers import CodeBind, decode
from codebind_jax.norm import unit
from codebind_jax.runtime import optim
from codebind_jax.runtime.gradient_cache import in_parts
from codebind_jax.runtime.sharding import row_axes
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.stages import Stage


@dataclasses.dataclass(frozen=True)
class Context:
  """What a loss term may look at: the outputs of one source's rows.

  Attributes:
    outputs: modality -> quantiser outputs.
    plain: modality -> the same of the features as they were before the quantiser.
    masks: modality -> rows that have it, bool [b].
    scales: modality -> logit scale.
    codebooks: name -> state before the step's update.
    stage: the stage.
    segment: width of the codes.
    groups: int [b], equal for rows of one label; None where no two rows of a batch share a label.
    tokens: modality -> the trunk's tokens [b, n, c].
    decode: (modality, `full` of all its tokens, width) -> the trunk's tokens as its decoder has them; None: no decoder.
  """

  outputs: Mapping[str, Any]
  plain: Mapping[str, Any]
  masks: Mapping[str, Bool[Array, "b"]]
  scales: Mapping[str, Float[Array, ""]]
  codebooks: Mapping[str, CodebookState]
  stage: Stage
  segment: int
  groups: Any = None
  tokens: Mapping[str, Float[Array, "b n c"]] = dataclasses.field(default_factory=dict)
  decode: Callable[[str, Float[Array, "b m d"], int], Float[Array, "b m c"]] | None = None

  @property
  def pairs(self) -> list[tuple[str, str]]:
    """Active pairs of which both modalities are in this source."""
    return [(a, b) for a, b in self.stage.pairs if a in self.outputs and b in self.outputs]

  @property
  def with_specific(self) -> list[str]:
    """Modalities that have a specific part."""
    return [m for m, out in self.outputs.items() if out.specific.shape[-1]]


def _mean(values: list[Float[Array, ""]]) -> Float[Array, ""]:
  return sum(values) / len(values) if values else jnp.zeros((), jnp.float32)


def _info_nce(c: Context) -> Float[Array, ""]:
  return _align(c, c.outputs)


def _info_nce_plain(c: Context) -> Float[Array, ""]:
  """InfoNCE before the quantiser, whose gradient does not pass straight through it."""
  return _align(c, c.plain)


def _align(c: Context, outputs: Mapping[str, Any]) -> Float[Array, ""]:
  tiled = c.stage.ring or c.stage.chunk  # over several devices tiles go around: gathered, each would be gathered anew
  return _mean([
    losses.info_nce(
      outputs[a].shared[:, 0], outputs[b].shared[:, 0], temperature=c.stage.temperature,
      logit_scale_a=c.scales[a], logit_scale_b=c.scales[b], mask=c.masks[a] & c.masks[b],
      chunk=c.stage.chunk, axes=row_axes(len(c.masks[a])) if tiled else (),
      groups=c.groups if "text" in (a, b) else None,
    )
    for a, b in c.pairs
  ])


def _commitment(c: Context) -> Float[Array, ""]:
  return sum((out.commitment for out in c.outputs.values()), start=jnp.zeros((), jnp.float32))


def _code_contrast(c: Context) -> Float[Array, ""]:
  total, rows = jnp.zeros((), jnp.float32), c.stage.code_rows or None
  for name, out in c.outputs.items():
    for similarity in (out.similarity_shared[:rows], out.similarity_specific[:rows]):
      if similarity.size:
        mask = jnp.tile(c.masks[name][:rows], similarity.shape[1])  # segments first: devices may share them out
        total += losses.code_contrast(jnp.swapaxes(similarity, 0, 1).reshape(-1, similarity.shape[-1]), mask=mask)
  return total


def _code_uniform(c: Context) -> Float[Array, ""]:
  used = ["shared", *c.with_specific]
  return sum((losses.code_uniform(c.codebooks[name].codes) for name in used), start=jnp.zeros((), jnp.float32))


def _code_matching(c: Context) -> Float[Array, ""]:
  rows = c.stage.code_rows or None
  return _mean([
    losses.code_matching(
      c.outputs[a].similarity_shared[:rows], c.outputs[b].similarity_shared[:rows],
      temperature=c.stage.matching_temperature, mask=(c.masks[a] & c.masks[b])[:rows],
    )
    for a, b in c.pairs
  ])


def _decomposition(c: Context) -> Float[Array, ""]:
  return _mean([
    losses.decomposition(
      (out := c.outputs[m]).shared, out.specific, mask=c.masks[m],
      segment=0 if out.shared.shape == out.specific.shape else c.segment,
    )
    for m in c.with_specific
  ])


def _decorrelation(c: Context) -> Float[Array, ""]:
  return _mean([
    losses.decorrelation((out := c.outputs[m]).shared[:, 0], out.specific[:, 0], mask=c.masks[m])
    for m in c.with_specific
  ])


def _specific_uniform(c: Context) -> Float[Array, ""]:
  return _mean([losses.specific_uniform(c.outputs[m].specific[:, 0], mask=c.masks[m]) for m in c.with_specific])


def _reconstruction(c: Context) -> Float[Array, ""]:
  """Sum over the modalities (spec section 3); tokens are standardised, so that 1 is the error of a constant."""
  total = jnp.zeros((), jnp.float32)
  for name in (m for m in c.outputs if m != "text"):
    target = jax.nn.standardize(c.tokens[name].astype(jnp.float32), epsilon=1e-6)
    decoded = c.decode(name, c.outputs[name].full, target.shape[-1])
    total += losses.reconstruction(decoded, target, mask=c.masks[name])
  return total


# Name in config.stages.*.losses -> pure function of a Context (spec section 3).
TERMS: dict[str, Callable[[Context], Float[Array, ""]]] = {
  "info_nce": _info_nce,
  "info_nce_plain": _info_nce_plain,
  "commitment": _commitment,
  "code_contrast": _code_contrast,
  "code_uniform": _code_uniform,
  "code_matching": _code_matching,
  "decomposition": _decomposition,
  "decorrelation": _decorrelation,
  "specific_uniform": _specific_uniform,
  "reconstruction": _reconstruction,
}


def balanced_terms(stages: Sequence[Stage]) -> tuple[str, ...]:
  """Terms of all stages that ask for the loss balancer: they share one."""
  return tuple(sorted({name for s in stages if s.balance for name, weight in s.losses.items() if weight}))


def make_train_step(
  model: CodeBind, spec: CompositionalSpec | None, stage: Stage, tx: optax.GradientTransformation, *,
  update: str = "snapshot", frozen: frozenset[str] = frozenset(),
) -> Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, dict[str, Array]]]:
  """The step of a stage: (state, batch) -> (state, metrics), to be jitted with the state donated.

  Args:
    model: towers.
    spec: quantiser; None trains the same heads without codebooks (the hard-alignment baseline).
    stage: pairs and weighted terms.
    tx: optimizer of the stage.
    update: how the codebooks are updated, `snapshot` or `sequential` (the release).
    frozen: paths of parameters that do not train; no gradient is computed for them.

  A batch is `{source: {modality: [b, n, d], "_mask": {modality: bool [b]}, "_group": int [b]}}`; modalities of several
  sources are quantised together against one snapshot of the codebooks; the terms are taken per source and averaged by
  the sources' weights.
  """
  active = {name: weight for name, weight in stage.losses.items() if weight}
  code_rows = stage.code_rows if {"code_contrast", "code_matching"} & set(active) else 1

  def loss_fn(params: Any, state: TrainState, batch: Mapping[str, Any], rng: Any):
    params = optim.stop_frozen(params, frozen)
    tokens, masks, owners = merge_sources(batch)
    drop_rng, code_rng = jax.random.split(rng)
    if stage.mixup:
      tokens = mixed(jax.random.fold_in(rng, 1), tokens, masks, owners, stage.mixup)
    apply = lambda params, tokens, rng: model.apply({"params": params}, tokens, train=True, rngs={"dropout": rng})
    features, scales = in_parts(apply, params, tokens, drop_rng, stage.parts)
    plain = plain_outputs(features, model)
    if spec is None:
      outputs, codebooks = plain, state.codebooks
    else:
      outputs, codebooks = quantize_modalities(
        features, state.codebooks, spec, update=update, rng=code_rng, masks=masks,
        similarity_rows=_looked_at(owners, code_rows),
      )  # fmt: skip
      learns = lambda name: any(re.fullmatch(pattern, name) for pattern in stage.codes)
      codebooks = {name: book if learns(name) else state.codebooks[name] for name, book in codebooks.items()}
    terms = {name: jnp.zeros((), jnp.float32) for name in active}
    shares = {source: stage.weights.get(source, 1.0) for source in batch}
    for source, content in batch.items():
      mine, mine_plain = (_of_source(out, owners, source, code_rows) for out in (outputs, plain))
      mine_masks = {m: masks[m][rows] for (s, m), rows in owners.items() if s == source}
      context = Context(
        mine, mine_plain, mine_masks, scales, state.codebooks, stage, spec.code_dims[0] if spec else 0,
        None if stage.unique_labels else content["_group"],
        {m: tokens[m][rows] for (s, m), rows in owners.items() if s == source},
        lambda name, full, width: decode(model, params, name, full, width),
      )  # fmt: skip
      for name in active:
        terms[name] += TERMS[name](context) * (shares[source] / sum(shares.values()))
    weights, aux = active, state.aux
    if stage.balance:
      balance = losses.balance_update(aux["balance"], terms)
      weights, aux = balance.weight, {**aux, "balance": balance}
    total = sum(weights[name] * terms[name] for name in active)
    return total, (terms, outputs, codebooks, aux)

  def step(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, dict[str, Array]]:
    rng = jax.random.fold_in(state.rng, state.step)
    (total, (terms, outputs, codebooks, aux)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params, state, batch, rng
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics = {f"train/{name}": value for name, value in terms.items()}
    metrics |= {"train/total": total, "train/gradient_norm": optax.global_norm(grads)}
    if stage.balance:
      metrics |= {f"train/weight/{name}": aux["balance"].weight[name] for name in active}
    if spec is not None:
      metrics |= usage_metrics(outputs, codebooks)
    state = state.replace(
      step=state.step + 1, params=optax.apply_updates(state.params, updates), codebooks=codebooks,
      opt_state=opt_state, aux=aux,
    )  # fmt: skip
    return state, metrics

  return step


def mixed(
  rng: Array, tokens: Mapping[str, Array], masks: Mapping[str, Array], owners: Mapping[tuple[str, str], slice],
  alpha: float,
) -> dict[str, Array]:
  """Mixup of trunk tokens: row i becomes w x_i + (1 - w) x_(i-1), with one w in [1/2, 1] for all of its modalities.

  What lies between two items is bound to what lies between their captions, which asks the heads to be linear between
  the concepts they were trained on. A row whose neighbour lacks one of its modalities stays as it is.

  Args:
    rng: key of the shares.
    tokens: modality -> [n, t, c], the sources one after the other.
    masks: modality -> bool [n].
    owners: (source, modality) -> its rows.
    alpha: shares are drawn from Beta(alpha, alpha).
  """
  out = dict(tokens)
  for number, source in enumerate(dict.fromkeys(source for source, _ in owners)):
    mine = {name: rows for (owner, name), rows in owners.items() if owner == source}
    count = next(rows.stop - rows.start for rows in mine.values())
    weight = jax.random.beta(jax.random.fold_in(rng, number), alpha, alpha, (count,))
    weight = jnp.maximum(weight, 1.0 - weight)
    for name, rows in mine.items():
      has = masks[name][rows]
      weight = jnp.where(has & ~jnp.roll(has, 1), 1.0, weight)
    for name, rows in mine.items():
      x, share = tokens[name][rows].astype(jnp.float32), weight[:, None, None]
      blend = share * x + (1.0 - share) * jnp.roll(x, 1, axis=0)
      whole = rows == slice(0, out[name].shape[0])
      out[name] = blend if whole else out[name].astype(jnp.float32).at[rows].set(blend)
  return out


def plain_outputs(features: Mapping[str, Float[Array, "b n d"]], model: CodeBind) -> dict[str, ModalityOutput]:
  """The outputs of a model without codebooks: its features, split and normalised as after quantisation."""
  outputs = {}
  for name, x in features.items():
    width, lead = model.towers[name].shared_dim, x.shape[:-1]
    no_codes, no_similarity = jnp.zeros((*lead, 0), jnp.int32), jnp.zeros((lead[0], 0, 0), jnp.float32)
    outputs[name] = ModalityOutput(
      shared=unit(x[..., :width]), specific=unit(x[..., width:]), full=unit(x), indices_shared=no_codes,
      indices_specific=no_codes, similarity_shared=no_similarity, similarity_specific=no_similarity,
      commitment=jnp.zeros((), jnp.float32),
    )  # fmt: skip
  return outputs


def usage_metrics(outputs: Mapping[str, Any], codebooks: Mapping[str, CodebookState]) -> dict[str, Array]:
  """Usage of every codebook by one batch's codes (all tokens): `codebook/<name>/perplexity` and so on."""
  indices: dict[str, list[Array]] = {"shared": [out.indices_shared for out in outputs.values()]}
  for name, out in outputs.items():
    if out.indices_specific.size:
      indices[name] = [out.indices_specific]
  metrics = {}
  for name, parts in indices.items():
    flat = jnp.concatenate([part.reshape(-1) for part in parts])
    counts = code_counts(flat, codebooks[name].codes.shape[0])
    metrics |= {f"codebook/{name}/{key}": value for key, value in usage_stats(counts).items()}
  return metrics


def make_embed_step(model: CodeBind, spec: CompositionalSpec | None) -> Callable[..., dict[str, Any]]:
  """(params, codebooks, tokens) -> modality -> outputs, without similarities to the codes; changes no state."""

  def embed(params: Any, codebooks: Mapping[str, CodebookState], tokens: Mapping[str, Array]) -> dict[str, Any]:
    features, _ = model.apply({"params": params}, tokens)
    if spec is None:
      return plain_outputs(features, model)
    # Similarities to all codes are for losses; here they would be most of the work and of the memory.
    nobody = dict.fromkeys(features, ((0, 0),))
    return quantize_modalities(features, codebooks, spec, update="none", similarity_rows=nobody)[0]

  return embed


def merge_sources(batch: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Array], dict[tuple[str, str], slice]]:
  """Concatenates each modality over the sources that have it; says which rows are whose."""
  tokens: dict[str, list[Array]] = {}
  masks: dict[str, list[Array]] = {}
  owners: dict[tuple[str, str], slice] = {}
  for source, content in batch.items():
    for name, mask in content["_mask"].items():
      start = sum(part.shape[0] for part in tokens.get(name, []))
      tokens.setdefault(name, []).append(content[name])
      masks.setdefault(name, []).append(mask)
      owners[source, name] = slice(start, start + mask.shape[0])
  join = lambda parts: parts[0] if len(parts) == 1 else jnp.concatenate(parts)
  return {m: join(p) for m, p in tokens.items()}, {m: join(p) for m, p in masks.items()}, owners


def _looked_at(owners: Mapping[tuple[str, str], slice], code_rows: int) -> dict[str, tuple[tuple[int, int], ...]]:
  """By modality the rows whose similarities to the codes are computed: the first `code_rows` of each source, 0: all."""
  found: dict[str, tuple[tuple[int, int], ...]] = {}
  for (_, name), rows in owners.items():
    stop = min(rows.start + code_rows, rows.stop) if code_rows else rows.stop
    found[name] = (*found.get(name, ()), (rows.start, stop))
  return found


def _of_source(
  outputs: Mapping[str, ModalityOutput], owners: Mapping[tuple[str, str], slice], source: str, code_rows: int
) -> dict[str, ModalityOutput]:
  """The rows of one source; scalars (commitment) stay as they are, similarities are those of its looked-at rows."""
  found, passed = {}, dict.fromkeys(outputs, 0)
  for (owner, name), rows in owners.items():
    count = min(code_rows or rows.stop, rows.stop - rows.start)
    at = slice(passed[name], passed[name] + count)
    passed[name] += count
    if owner == source:
      whole = outputs[name]
      part = jax.tree.map(lambda x, rows=rows: x[rows] if x.ndim else x, whole)
      found[name] = part.replace(
        similarity_shared=whole.similarity_shared[at], similarity_specific=whole.similarity_specific[at]
      )
  return found

"""The base class of DCID and FCID: one codebook for all modalities, its losses, CLUB, and cross-modal prediction."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from codebind_jax import losses
from codebind_jax.codebook import kmeans, unified
from codebind_jax.codebook.spec import Codes
from codebind_jax.codebook.state import REVIVE_MODES
from codebind_jax.losses.unified import code_distribution, distribution_matching, unified_commitment
from codebind_jax.methods import base
from codebind_jax.methods.base import EXTRA, Forward, Rows
from codebind_jax.models.critics import ConditionalGaussian, FuturePredictor, club_fit
from codebind_jax.models.towers import MaybeSide
from codebind_jax.norm import unit
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.schema import DISTINCT, Decay, Name, Rate, Share, Side, Weight, above, at_least, at_most
from codebind_jax.stages import Stage

MIN_STEPS = 3  # shortest sequence for CPC: a context of two steps, and a future


@dataclasses.dataclass(frozen=True)
class Unified(base.Method):
  """Options and parts that DCID and FCID share.

  Attributes:
    codes: size L of the codebook.
    first_codes: initial codes: "kmeans" of the first batch's vectors, or "uniform" U(-1/L, 1/L) (the release).
    start_count: initial count of every code's moving average (release: 0).
    form: form of the update, "joint" (paper) or "sequential" (release).
    order: order of the modalities in the sequential form; the others follow in alphabetical order.
    decay: decay of the codes' moving averages.
    own: weight of a vector's own value in the update; 1 turns the multi-modal part off.
    partner: a vector's partners: the "same" step, or "attention" over all steps (paper; the authors see no difference).
    beta: weight inside the commitment.
    reduce: how the commitment is reduced over the width, "sum" (paper) or "mean" (release).
    reset_after: idle batches before a code is reset; 0 for no reset.
    reset_by: a code is in use if "all" modalities use it (paper), all of one "source" (ours, where sources lack
      modalities), or "any" (release).
    reset_keep: "survive" also gives a reset code a mean code's count; "codes_only" does not (release).
    commitment: weight of the commitment.
    matching: weight of code matching.
    club: weight of CLUB, which keeps general and specific features independent.
    coding: weight of CPC, the prediction of later steps.
    reconstruction: weight of the reconstruction.
    club_input: "continuous" features (paper), or "quantized" ones (DCID's release).
    club_per_step: mean over steps of the likelihood (eq. 5), or its parts' means (release).
    club_steps: inner Adam steps a batch.
    club_rate: learning rate of the inner steps.
    club_hidden: hidden width of CLUB's networks.
    cpc_layers: LSTM layers (paper 1, release 2).
    cpc_context: width of CPC's context; 0 for that of the general features (release).
    cpc_over: softmax over "futures" (paper) or "predictions" (release).
    cpc_self: weight of a modality's prediction of its own future (release 0.1).

  InfoNCE replaces CPC for sequences of fewer than three steps, with the stage's temperature; logit scales have no
  effect.
  """

  FACTORS = {"matching": 0.1, "club": 0.1, "coding": 1.0}

  codes: Codes = 400
  first_codes: Literal["kmeans", "uniform"] = "kmeans"
  start_count: Annotated[float, at_least(0), at_most(1e6)] = 1.0
  form: Literal[unified.FORMS] = "joint"
  order: Annotated[tuple[Name, ...], DISTINCT] = ()
  decay: Decay = 0.99
  own: Share = 0.5
  partner: Literal[unified.PARTNERS] = "same"
  beta: Annotated[float, at_least(0), at_most(1e6)] = 0.25
  reduce: Literal["sum", "mean"] = "sum"
  reset_after: Annotated[int, at_least(0, "no reset")] = 300
  reset_by: Literal["all", "source", "any"] = "all"
  reset_keep: Literal[REVIVE_MODES] = "survive"
  commitment: Weight = 1.0
  matching: Weight = 1.0
  club: Weight = 1.0
  coding: Weight = 1.0
  reconstruction: Weight = 1.0
  club_input: Literal["continuous", "quantized"] = "continuous"
  club_per_step: bool = True
  club_steps: Annotated[int, at_least(0), at_most(10_000)] = 5
  club_rate: Rate = 1e-3
  club_hidden: Side = 128
  cpc_layers: Annotated[int, above(0), at_most(1000)] = 1
  cpc_context: MaybeSide = 0
  cpc_over: Literal["futures", "predictions"] = "futures"
  cpc_self: Weight = 0.0

  @property
  def needs_tokens(self) -> str:
    """Each level reconstructs the tokens it was given."""
    return "this method reconstructs its towers' inputs token by token"

  @property
  def codebook_sizes(self) -> dict[str, int]:
    """The shared codebook alone."""
    return {"shared": self.codes}

  def weights(self, stage: Stage) -> dict[str, float]:
    """Every term's weight, which is the option of its name."""
    return {name: getattr(self, name) for name in self.terms(stage)}

  def new_codebook(self, rng: Any, width: int, modalities: Any) -> unified.UnifiedState:
    """A codebook of small uniform codes; `after_kmeans` replaces them."""
    limit = 1.0 / self.codes
    codes = jax.random.uniform(rng, (self.codes, width), jnp.float32, -limit, limit)
    return unified.new_unified(codes, sorted(modalities), count=self.start_count)

  def after_kmeans(
    self, book: unified.UnifiedState, z: Mapping[str, Array], masks: Any, rng: Any
  ) -> unified.UnifiedState:
    """The codebook with the k-means centres of the unmasked vectors as its codes; unchanged for "uniform" codes."""
    if self.first_codes != "kmeans":
      return book
    flat = jnp.concatenate([jnp.where(masks[m][:, None, None], x, 0.0).reshape(-1, x.shape[-1]) for m, x in z.items()])
    weights = jnp.concatenate([jnp.repeat(masks[m], x.shape[1]) for m, x in z.items()]).astype(jnp.float32)
    means, _ = kmeans(rng, flat, self.codes, distance="l2", normalize=False, weights=weights)
    return unified.new_unified(means, sorted(book.idle), count=self.start_count)

  def start_codebooks(self, forward: Forward, state: TrainState, rng: Any) -> Any:
    """`started_codebooks` of a run's first batch; the codebooks are unchanged at the start of later stages."""
    started = self.started_codebooks(forward, state.codebooks, rng)
    return jax.tree.map(lambda old, new: jnp.where(state.step == 0, new, old), state.codebooks, started)

  def quantise(
    self, z: Mapping[str, Array], book: unified.UnifiedState, rows: Rows, together: tuple[tuple[str, ...], ...],
    rng: Any,
  ) -> tuple[dict[str, unified.UnifiedQuantized], unified.UnifiedState]:
    """(quantised vectors by modality, the codebook after the batch).

    Args:
      z: modality -> vectors [b, t, d].
      book: the codebook before the batch.
      rows: the vectors' rows, for their masks.
      together: the modalities of each source of the batch.
      rng: key of the reset.
    """
    quantized, masks = unified.quantize_unified(z, book.codes), {m: rows.masks[m] for m in z}
    new = unified.update_unified(
      book, z, {m: q.indices for m, q in quantized.items()}, form=self.form,
      order=self.order, decay=self.decay, own=self.own, how=self.partner, masks=masks,
    )  # fmt: skip
    if self.reset_after:
      new = unified.reset_unified(
        new, rng, after=self.reset_after, used_by="any" if self.reset_by == "any" else "all",
        together=together if self.reset_by == "source" else (), keep=self.reset_keep,
      )  # fmt: skip
    return quantized, new

  def commitment_of(
    self, z: Mapping[str, Array], quantized: Mapping[str, unified.UnifiedQuantized], rows: Rows
  ) -> Array:
    """The commitment of all modalities to their own and their partners' codes."""
    codes, masks = {m: q.codes for m, q in quantized.items()}, {m: rows.masks[m] for m in z}
    return sum(unified_commitment(z, codes, beta=self.beta, reduce=self.reduce, masks=masks).values())

  def matching_of(self, z: Mapping[str, Array], codes: Array, rows: Rows) -> Array:
    """Code matching, summed over all pairs of modalities."""
    distributions = {m: code_distribution(x, codes) for m, x in z.items()}
    return sum(
      distribution_matching(distributions[a], distributions[b], mask=rows.both(a, b), groups=rows.groups_of(a, b))
      for a, b in itertools.combinations(sorted(z), 2)
    )

  def club_fitted(self, name: str, x: Array, y: Array, aux: Any, mask: Array) -> Any:
    """`aux` after the inner steps of CLUB's network `name`."""
    net = ConditionalGaussian(y.shape[-1], self.club_hidden)
    fitted = club_fit(net, aux["club"][name], x, y, steps=self.club_steps, learning_rate=self.club_rate, mask=mask)
    return aux | {"club": aux["club"] | {name: fitted}}

  def club_of(self, fitted: Any, x: Array, y: Array, rng: Any, mask: Array) -> Array:
    """CLUB's estimate of the mutual information between x and y under a fitted network."""
    mu, logvar = ConditionalGaussian(y.shape[-1], self.club_hidden).apply({"params": fitted["params"]}, x)
    shuffle = jax.random.permutation(rng, x.shape[0])
    return losses.club_estimate(mu, logvar, y, shuffle, per_step=self.club_per_step, mask=mask)

  def cross_coding(self, z: Mapping[str, Array], rows: Rows, rng: Any, prefix: str = "predict_") -> Array:
    """Cross-modal CPC; InfoNCE between all modalities for sequences that are too short for it."""
    z, masks = same_steps(z), {m: rows.masks[m] for m in z}
    first = next(iter(z.values()))
    if first.shape[1] < MIN_STEPS:
      heads = {m: unit(x[:, 0]) for m, x in z.items()}
      return sum((
        losses.directed_info_nce(heads[a], heads[b], temperature=rows.stage.temperature,
                                 mask=rows.both(a, b), groups=rows.groups_of(a, b))
        for a, b in itertools.permutations(sorted(z), 2)
      ), start=jnp.zeros((), jnp.float32))  # fmt: skip
    net = FuturePredictor(first.shape[-1], 1, self.cpc_layers, self.cpc_context)
    ahead = {m: net.apply({"params": rows.params[EXTRA][f"{prefix}{m}"]}, x) for m, x in z.items()}
    at = jax.random.randint(rng, (), 1, first.shape[1] - 1)
    return losses.cross_cpc(ahead, z, at, self_weight=self.cpc_self, over=self.cpc_over, masks=masks,
                            groups_of=rows.groups_of)  # fmt: skip

  def predictors(self, rng: Any, z: Mapping[str, Array], prefix: str = "predict_") -> dict[str, Any]:
    """Parameters of the CPC networks, for sequences that are long enough."""
    z = same_steps(z)
    net = FuturePredictor(next(iter(z.values())).shape[-1], 1, self.cpc_layers, self.cpc_context)
    return {
      f"{prefix}{m}": net.init(jax.random.fold_in(rng, i), x)["params"]
      for i, (m, x) in enumerate(sorted(z.items())) if x.shape[1] >= MIN_STEPS
    }  # fmt: skip

  def specific_features(self, name: str, x: Array) -> Array:
    """The specific head's output through a ReLU."""
    return nn.relu(self.specific(name, x))

  def has_specific(self, name: str) -> bool:
    """Whether a modality has a specific part."""
    return self.model.towers[name].specific_dim > 0

  def restore(self, codebooks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`UnifiedState`s from the nested arrays of a checkpoint."""
    return {name: unified.UnifiedState(**state) for name, state in codebooks.items()}


def same_steps(x: Mapping[str, Array]) -> dict[str, Array]:
  """Sequences [b, t, d] if all have the same length; else the first token of each, the class token.

  Step i of one modality is the partner of step i of another; 32 point groups have no such partners in one caption.
  """
  lengths = {value.shape[1] for value in x.values()}
  return {name: value if len(lengths) == 1 else value[:, :1] for name, value in x.items()}


def masked_mse(decoded: Array, target: Array, mask: Array) -> Array:
  """Mean squared error over the unmasked rows."""
  square = jnp.mean((decoded - target) ** 2, axis=(1, 2))
  return jnp.sum(jnp.where(mask, square, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def chosen_codes(quantized: Mapping[str, unified.UnifiedQuantized], rows: Rows) -> list[tuple[Array, Array]]:
  """(code indices, mask) of every modality, for the usage statistics."""
  return [(q.indices, rows.masks[m]) for m, q in quantized.items()]


def modalities_together(forward: Forward) -> tuple[tuple[str, ...], ...]:
  """The modalities of each source."""
  return tuple(tuple(sorted(forward.of(source, forward.masks))) for source in forward.sources)

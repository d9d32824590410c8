"""One codebook for all modalities, step by step: the quantiser of DCID (Uni-Code), FCID and H-DCID.

Xia et al., "Achieving Cross Modal Generalization with Multimodal Unified Representation" (NeurIPS 2023): a code moves
towards the vectors that every modality assigns to it, each averaged with its partner in the other modality at the same
step (multi-modal EMA, eq. 7). The paper's form is the default; the release's is named where it differs. Codes are
compared by Euclidean distance and nothing is normalised.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from codebind_jax.codebook.nearest import nearest_code
from codebind_jax.codebook.state import REVIVE_MODES
from codebind_jax.norm import wide

Features = Mapping[str, Float[Array | np.ndarray, "b t d"]]
Masks = Mapping[str, Bool[Array | np.ndarray, "b"]]
FORMS, PARTNERS = ("joint", "sequential"), ("same", "attention")
_HIGH = jax.lax.Precision.HIGHEST


@flax.struct.dataclass
class UnifiedState:
  """A codebook of k codes of width d for m modalities.

  Attributes:
    codes: [k, d].
    ema_count: [k], moving average of how many vectors a code gets in a batch.
    ema_sum: [k, d], moving average of their sum.
    idle: modality -> int32 [k], batches since it last used a code; -1 at the start, as in the release.
  """

  codes: Any
  ema_count: Any
  ema_sum: Any
  idle: Any

  @property
  def usage(self) -> Any:
    """How much each code is used; the unit is vectors a batch."""
    return self.ema_count

  @property
  def initialised(self) -> bool:
    """Always True."""
    return True


class UnifiedQuantized(NamedTuple):
  """Quantised vectors with a straight-through gradient, the plain codes, and their indices."""

  vectors: Float[Array, "b t d"]
  codes: Float[Array, "b t d"]
  indices: Int[Array, "b t"]


def new_unified(
  codes: Float[Array | np.ndarray, "k d"], modalities: Sequence[str], *, count: float = 1.0
) -> UnifiedState:
  """A state that starts from given codes.

  Args:
    codes: e.g. U(-1/k, 1/k), as the release starts, or k-means means.
    modalities: their names.
    count: initial `ema_count`; `ema_sum` is count * codes. 0 starts as the release does, with `ema_sum` = codes: its
      first updates move unused codes far away.
  """
  codes = wide(codes)
  total = codes * (count if count else 1.0)
  idle = {name: jnp.full(codes.shape[0], -1, jnp.int32) for name in modalities}
  return UnifiedState(codes, jnp.full(codes.shape[0], count, codes.dtype), jnp.array(total, copy=True), idle)


def quantize_unified(features: Features, codes: Float[Array | np.ndarray, "k d"]) -> dict[str, UnifiedQuantized]:
  """Nearest code of every step of every modality (eq. 2), with z + sg(e - z)."""
  quantized, codes = {}, jax.lax.stop_gradient(wide(codes))
  for name, z in features.items():
    z = wide(z)
    indices = nearest_code(jax.lax.stop_gradient(z).reshape(-1, z.shape[-1]), codes, distance="l2")
    chosen = codes[indices].reshape(z.shape)
    quantized[name] = UnifiedQuantized(z + jax.lax.stop_gradient(chosen - z), chosen, indices.reshape(z.shape[:-1]))
  return quantized


def partners(features: Features, *, how: str = "same", masks: Masks | None = None) -> dict[str, Float[Array, "b t d"]]:
  """Partner of every vector: the mean of the other modalities' present at its step, or itself where there is none.

  Args:
    features: modality -> vectors.
    how: "same" takes the vector at the same step (the release); "attention" takes softmax(z_a z_b^T / sqrt d) z_b, as
      the paper's cross-attention without projections (reconstructed; with one step both are the same).
    masks: modality -> rows that have it.

  Raises:
    ValueError: for an unknown `how`.
  """
  if how not in PARTNERS:
    raise ValueError(f"how must be {' or '.join(map(repr, PARTNERS))}, got {how!r}")

  def aligned(z, other):
    if how == "same":
      return other
    scores = jnp.einsum("btd,bud->btu", z, other, precision=_HIGH) / np.sqrt(z.shape[-1])
    return jnp.einsum("btu,bud->btd", jax.nn.softmax(scores, axis=-1), other, precision=_HIGH)

  out = {}
  for name, z in features.items():
    total, count = jnp.zeros_like(wide(z)), jnp.zeros((z.shape[0], 1, 1), jnp.float32)
    for other, x in features.items():
      if other != name:
        here = jnp.ones(z.shape[0], jnp.bool_) if masks is None else jnp.asarray(masks[other], jnp.bool_)
        total += jnp.where(here[:, None, None], aligned(wide(z), wide(x)), 0.0)
        count += here[:, None, None]
    out[name] = jnp.where(count > 0, total / jnp.maximum(count, 1), wide(z))
  return out


@functools.partial(jax.jit, static_argnames=("form", "order", "decay", "eps", "own", "how"))
def update_unified(
  state: UnifiedState,
  features: Features,
  indices: Mapping[str, Int[Array | np.ndarray, "b t"]],
  *,
  form: str = "joint",
  order: tuple[str, ...] | None = None,
  decay: float = 0.99,
  eps: float = 1e-5,
  own: float = 0.5,
  how: str = "same",
  masks: Masks | None = None,
) -> UnifiedState:
  """Multi-modal EMA (eq. 7): N <- g N + (1-g) n, o <- g o + (1-g) sum (own z + (1-own) partner), e = o / N.

  Args:
    state: before the batch.
    features: modality -> vectors; rows of all modalities belong together.
    indices: modality -> code of each vector.
    form: "joint" adds all modalities up and updates once, without smoothing, as in the paper; "sequential" goes through
      them one after the other, with Laplace smoothing of the counts after each (the release).
    order: of the modalities in the sequential form; others follow in alphabetical order. (DCID's
      release: audio, video, text; FCID's: video, audio, text.)
    decay: g.
    eps: of the smoothing.
    own: weight of a vector's own value; 1 is plain EMA without partners.
    how: as for `partners`.
    masks: modality -> rows that have it.

  Returns:
    The new state; `idle` is counted too (see `reset_unified`).

  Raises:
    ValueError: for an unknown `form`.
  """
  if form not in FORMS:
    raise ValueError(f"form must be {' or '.join(map(repr, FORMS))}, got {form!r}")
  features = {name: jax.lax.stop_gradient(wide(z)) for name, z in features.items()}
  other = partners(features, how=how, masks=masks)
  k = state.codes.shape[0]
  counts, sums = {}, {}
  for name, z in features.items():
    weight = jnp.ones(z.shape[:2], z.dtype)
    if masks is not None:
      weight = weight * jnp.asarray(masks[name])[:, None]
    flat, weight = indices[name].reshape(-1), weight.reshape(-1)
    value = (own * z + (1 - own) * other[name]).reshape(-1, z.shape[-1])
    counts[name] = jnp.zeros(k, z.dtype).at[flat].add(weight)
    # A masked row may hold NaN.
    value = jnp.where(weight[:, None] > 0, value, 0.0)
    sums[name] = jnp.zeros_like(state.ema_sum).at[flat].add(value)

  count, total = state.ema_count, state.ema_sum
  if form == "joint":
    count = decay * count + (1 - decay) * sum(counts.values())
    total = decay * total + (1 - decay) * sum(sums.values())
  else:
    named = [name for name in order or () if name in features]
    for name in (*named, *sorted(set(features) - set(named))):
      count = decay * count + (1 - decay) * counts[name]
      mass = jnp.sum(count)
      count = (count + eps) / (mass + k * eps) * mass
      total = decay * total + (1 - decay) * sums[name]
  # A code that has never had any weight stays where it is.
  codes = jnp.where((count > 0)[:, None], total / jnp.where(count > 0, count, 1.0)[:, None], state.codes)
  return UnifiedState(codes, count, total, state.idle | tick(state.idle, counts))


def tick(
  idle: Mapping[str, Int[Array, "k"]], counts: Mapping[str, Float[Array, "k"] | Int[np.ndarray, "k"]]
) -> dict[str, Int[Array, "k"]]:
  """`idle` after a batch: 0 for codes used, one more for the others (the release counts evaluation batches too)."""
  return {name: jnp.where(jnp.asarray(count) > 0, 0, idle[name] + 1) for name, count in counts.items()}


@functools.partial(jax.jit, static_argnames=("after", "used_by", "together", "keep", "noise", "active_within"))
def reset_unified(
  state: UnifiedState,
  rng: jax.Array,
  *,
  after: int = 300,
  used_by: str = "all",
  together: tuple[tuple[str, ...], ...] = (),
  keep: str = "survive",
  noise: float = 1 / 1024,
  active_within: int = 100,
) -> UnifiedState:
  """Puts unused codes on a randomly drawn active one plus uniform noise.

  The paper re-initialises a code that not *both* modalities have used for a number of batches. The number and the new
  value stand in its appendix, which was not read: both are the release's here.

  Args:
    state: after `update_unified`.
    rng: key of the draws.
    after: batches of idleness a code may have.
    used_by: "all" modalities must have used a code (paper), or "any" (release).
    together: groups of modalities that occur in the same rows; "all" then means all of one group, because modalities
      that never meet need not share a code (ours; the paper has one group). () for one group of all.
    keep: "survive" also gives the new code a mean code's count, and a sum to match, so that the next update does not
      undo it (ours); "codes_only" does not, as the release.
    noise: half width of the uniform noise.
    active_within: a code used within so many batches, by any modality, can be drawn.

  Raises:
    ValueError: for an unknown `used_by` or `keep`.
  """
  if used_by not in ("all", "any") or keep not in REVIVE_MODES:
    raise ValueError(f"used_by must be 'all' or 'any', keep 'survive' or 'codes_only', got {used_by!r}, {keep!r}")
  k, d = state.codes.shape
  anyone = jnp.min(jnp.stack(list(state.idle.values())), axis=0)
  known = [[state.idle[m] for m in group if m in state.idle] for group in together or (tuple(state.idle),)]
  everyone = jnp.min(jnp.stack([jnp.max(jnp.stack(group), axis=0) for group in known if group]), axis=0)
  expired = (anyone if used_by == "any" else everyone) > after
  active = (anyone >= 0) & (anyone < active_within)
  pick_rng, noise_rng = jax.random.split(rng)
  picks = jax.random.categorical(pick_rng, jnp.where(active, 0.0, -jnp.inf), shape=(k,))
  new = state.codes[picks] + jax.random.uniform(noise_rng, (k, d), state.codes.dtype, -noise, noise)
  return put_codes(state, expired & jnp.any(active), new, keep=keep)


def put_codes(
  state: UnifiedState, which: Bool[Array, "k"], new: Float[Array | np.ndarray, "k d"], *, keep: str = "survive"
) -> UnifiedState:
  """Replaces the codes marked in `which` and clears their idleness; `keep` as for `reset_unified`."""
  codes = jnp.where(which[:, None], new, state.codes)
  idle = {name: jnp.where(which, 0, batches) for name, batches in state.idle.items()}
  if keep == "codes_only":
    return state.replace(codes=codes, idle=idle)
  count = jnp.where(which, jnp.mean(state.ema_count), state.ema_count)
  total = jnp.where(which[:, None], count[:, None] * codes, state.ema_sum)
  return UnifiedState(codes, count, total, idle)

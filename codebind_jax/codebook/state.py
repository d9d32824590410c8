"""Codebooks as explicit state: search, quantisation, EMA update with revival, k-means start and usage.

Equations follow section 2 of the method's description (CodeBind, arXiv 2605.18257, after VQ-VAE's EMA codebook and
the online clustering of CVQ-VAE). Everything is a pure function and every batch statistic a plain sum, so that the
same code gives the same state on one device and under jit over a mesh whose `data` axis splits the batch.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from codebind_jax.codebook.clustering import kmeans as kmeans
from codebind_jax.codebook.nearest import Distance, check_distance, nearest_segments
from codebind_jax.codebook.nearest import nearest_code as nearest_code
from codebind_jax.codebook.revival import Revive, draw_candidates
from codebind_jax.codebook.segments import Segments, look_up, statistics, straight_through
from codebind_jax.norm import unit

ReviveMode = str
REVIVE_MODES = ("survive", "codes_only")

# How "survive" recovers from a collapse; usage in units of a mean code's. While more than _DEAD_SHARE of the codes are
# used less than _DEAD_USAGE, a code below _STALE_USAGE that the batch does not use is revived: the paper's rate alone
# waits until a code's usage has fallen a thousandfold, some 600 updates at a decay of 0.99.
_DEAD_SHARE = 0.02
_DEAD_USAGE = 0.3
_STALE_USAGE = 0.45
# A revived code starts with the usage of a mean one, or with this while the averages are young: either keeps
# the next updates from reviving it again.
_REVIVED_FLOOR = 0.02


@struct.dataclass
class CodebookState:
  """All that changes in a codebook of k codes of width d.

  A codebook that is one for each residual stage, or for each position, holds them on leading axes of all its arrays:
  [stages, k, d], [positions, k, d] or [stages, positions, k, d]. Every one of them is updated and revived by itself.

  Attributes:
    codes: [k, d] float32, the code vectors as stored.
    ema_count: [k] float32, moving average N of the number of segments assigned to each code.
    ema_sum: [k, d] float32, moving average M of the sum of those segments.
    usage: [k] float32, moving average p of each code's share of the batch.
    initialised: [] bool, whether k-means has set the codes.
  """

  # `Any`, because trees of shardings, shapes and gradients take this form too.
  codes: Any
  ema_count: Any
  ema_sum: Any
  usage: Any
  initialised: Any


class Quantized(NamedTuple):
  """Quantised vectors with a straight-through gradient, and the code of each."""

  vectors: Float[Array, "*lead d"]
  indices: Int[Array, "*lead"]


def init_codebook(rng: jax.Array, num_codes: int, dim: int, lead: tuple[int, ...] = ()) -> CodebookState:
  """A codebook of normalised Gaussian rows with empty statistics.

  Start from k-means (`compositional.init_codebooks`) before training: with counts of zero the Laplace smoothing of
  the first updates inflates codes that were not used.

  Args:
    rng: key of the rows.
    num_codes: k.
    dim: width d of a code.
    lead: leading axes: the numbers of residual stages and of positions that have codebooks of their own.

  Raises:
    ValueError: if a size is not positive.
  """
  if num_codes < 1 or dim < 1 or min(lead, default=1) < 1:
    raise ValueError(f"num_codes, dim and lead must be positive, got {num_codes}, {dim} and {lead}")
  codes = unit(jax.random.normal(rng, (*lead, num_codes, dim), jnp.float32))
  return CodebookState(
    codes=codes,
    ema_count=jnp.zeros(codes.shape[:-1], jnp.float32),
    # A copy, because a donated state must not hold one buffer twice.
    ema_sum=jnp.array(codes, copy=True),
    usage=jnp.zeros(codes.shape[:-1], jnp.float32),
    initialised=jnp.zeros((), jnp.bool_),
  )


def check_codes(state: CodebookState, width: int, name: str = "", lead: tuple[int, ...] = ()) -> None:
  """Raises ValueError unless a codebook has codes, and sums of segments, of one width.

  Args:
    state: the codebook.
    width: of the segments that it is to quantise.
    name: of the codebook, for the message.
    lead: leading axes, as in `init_codebook`.
  """
  shape, sums = state.codes.shape, state.ema_sum.shape
  book = f"codebook {name!r}" if name else "the codebook"
  if len(shape) != len(lead) + 2 or shape[:-2] != lead or shape[-1] != width:
    needed = ", ".join([*map(str, lead), "k", str(width)])
    raise ValueError(f"{book} has codes of shape {shape}; segments of width {width} need [{needed}]")
  if sums != shape:
    raise ValueError(f"{book} has codes of shape {shape}, but ema_sum of shape {sums}; they must be equal")


def quantize(
  z: Float[Array | np.ndarray, "*lead d"],
  codes: Float[Array | np.ndarray, "k _d"],
  *,
  distance: Distance = "cosine",
  normalize: bool = True,
) -> Quantized:
  """Replaces each vector by its nearest code, with a straight-through gradient z + sg(q - z).

  Args:
    z: vectors of any float type.
    codes: the codebook; it gets no gradient.
    distance: "cosine" or "l2".
    normalize: L2-normalise z first; the gradient passes through the normalisation.

  Returns:
    `vectors`, the code vectors as stored (float32), and their int32 `indices`.

  Raises:
    ValueError: if widths differ or `distance` is unknown.
  """
  check_distance(distance)
  if codes.ndim != 2 or z.ndim < 1 or z.shape[-1] != codes.shape[1]:
    raise ValueError(f"z and codes must be [..., d] and [k, d] with one width, got {z.shape} and {codes.shape}")
  lead, d = z.shape[:-1], z.shape[-1]
  lanes = jnp.asarray(z, jnp.float32).reshape(-1, d).T[None]
  lanes = unit(lanes, axis=1) if normalize else lanes
  vectors, indices = quantize_segments(lanes, jax.lax.stop_gradient(jnp.asarray(codes, jnp.float32)), distance=distance)
  return Quantized(straight_through(lanes, vectors)[0].T.reshape(*lead, d), indices.reshape(lead))


def quantize_segments(
  z: Float[Array, "s d n"], codes: Float[Array, "*own k d"], *, distance: Distance = "cosine"
) -> tuple[Float[Array, "s d n"], Int[Array, "s n"]]:
  """The nearest code vector of each segment, and its index; the vectors carry the gradient of `codes`.

  Codes are [k, d], or [s, k, d] where each position has a codebook of its own.
  """
  indices = nearest_segments(z, codes, distance=distance)
  return look_up(codes, indices), indices


def update(
  state: CodebookState,
  z: Float[Array | np.ndarray, "n d"],
  indices: Int[Array | np.ndarray, "n"],
  *,
  decay: float = 0.99,
  eps: float = 1e-5,
  revive: Revive = "random",
  revive_mode: ReviveMode = "survive",
  rng: jax.Array | None = None,
  weights: Float[Array | np.ndarray, "n"] | Bool[Array | np.ndarray, "n"] | Int[Array | np.ndarray, "n"] | None = None,
  distance: Distance = "cosine",
  candidates: Float[Array | np.ndarray, "k d"] | None = None,
) -> CodebookState:
  """One EMA step with Laplace smoothing, then revival of unused codes (`advance` has the equations).

  Args:
    state: the codebook.
    z: segments as quantised, i.e. already normalised when `normalize` was used.
    indices: the code of each segment.
    decay: g, the decay of all moving averages.
    eps: of the Laplace smoothing.
    revive: where the candidates for unused codes come from: `random` segments of the batch; for each code its `closest`
      segment; `probrandom`, drawn with the softmax of the similarity; `disturbance`, random with noise of U(-1, 1);
      or `none`.
    revive_mode: "survive", or "codes_only", which the next update overwrites as the release does.
    rng: key of the candidates; without one, a fixed key is used.
    weights: how often each row counts; 0 masks padding, which then has no effect whatever it holds.
    distance: the similarity that `closest` and `probrandom` use.
    candidates: vectors for unused codes, instead of drawn ones.

  Returns:
    The new state. If all weights are 0 it is the old one.

  Raises:
    ValueError: for an unknown `revive`, `revive_mode` or `distance`, or a codebook of another width than z's.
  """
  check_codes(state, z.shape[-1])
  weights = None if weights is None else jnp.asarray(weights, jnp.float32)
  part = Segments(jnp.asarray(z, jnp.float32).T[None], jnp.asarray(indices)[None], weights)
  counts, sums = statistics([part], state.codes.shape[0])
  if candidates is None:
    candidates = draw_candidates(revive, rng, [part], state.codes, distance=distance)
  return advance(state, counts, sums, candidates, decay=decay, eps=eps, revive_mode=revive_mode)


@functools.partial(jax.jit, static_argnames=("decay", "eps", "revive_mode", "ema"))
def advance(
  state: CodebookState,
  counts: Float[Array, "*lead k"],
  sums: Float[Array, "*lead k d"],
  candidates: Float[Array | np.ndarray, "*lead k d"] | None,
  *,
  decay: float = 0.99,
  eps: float = 1e-5,
  revive_mode: ReviveMode = "survive",
  ema: bool = True,
) -> CodebookState:
  """The state after a batch with the given statistics (section 2 of the method's description).

  EMA: N <- g N + (1-g) n, M <- g M + (1-g) s, code <- M / Nhat with Nhat_k = (N_k + eps) / (sum N + K eps) sum N.
  Revival: p <- g p + (1-g) n / sum n, a = exp(-10 K p / (1-g) - 1e-3), code <- (1 - a) code + a candidate.
  With "survive" a revived code also takes a mean code's count (N is then rescaled to keep its total), M = N code, and a
  mean code's usage, so that the next update leaves it in place; and in a collapse (many codes hardly used) a is
  exp(-1e-3) for every code that is neither used by the batch nor much used before it.

  Args:
    state: the codebook before the batch.
    counts: n_k, segments assigned to each code.
    sums: s_k, their sum.
    candidates: vectors that unused codes move to; None for no revival.
    decay: g.
    eps: of the Laplace smoothing.
    revive_mode: "survive" or "codes_only".
    ema: False leaves codes and their averages to the optimizer and only revives.

  Raises:
    ValueError: for an unknown `revive_mode`, or a decay that is not in [0, 1).
  """
  if not 0 <= decay < 1:
    raise ValueError(f"decay must be in [0, 1), got {decay}")
  if revive_mode not in REVIVE_MODES:
    raise ValueError(f"revive_mode must be {' or '.join(map(repr, REVIVE_MODES))}, got {revive_mode!r}")
  if state.codes.ndim > 2:
    one = functools.partial(advance, decay=decay, eps=eps, revive_mode=revive_mode, ema=ema)
    every = jax.tree.map(lambda x: jnp.broadcast_to(x, state.codes.shape[:1]) if x is state.initialised else x, state)
    return jax.vmap(one)(every, counts, sums, candidates).replace(initialised=state.initialised)
  survive = revive_mode == "survive"
  k = state.codes.shape[0]
  total = jnp.sum(counts)
  usage = decay * state.usage + (1 - decay) * counts / jnp.maximum(total, 1e-30)
  codes, count, ema_sum = state.codes, state.ema_count, state.ema_sum
  if ema:
    count = decay * count + (1 - decay) * counts
    ema_sum = decay * ema_sum + (1 - decay) * sums
    mass = jnp.sum(count)
    smoothed = (count + eps) / (mass + k * eps) * mass
    codes = ema_sum / jnp.maximum(smoothed, 1e-30)[:, None]
  if candidates is not None:
    rate = jnp.exp(-10.0 * k * usage / (1 - decay) - 1e-3)
    if survive:
      relative = usage * (k / jnp.maximum(jnp.sum(usage), 1e-30))
      collapse = jnp.mean(relative < _DEAD_USAGE) > _DEAD_SHARE
      stale = (relative < _STALE_USAGE) & (counts == 0) & collapse
      rate = jnp.where(stale, math.exp(-1e-3), rate)
    if survive and ema:
      # A code without a count has no mean: the smoothing would inflate it, so the blend starts from the old code.
      codes = jnp.where((count < eps)[:, None], state.codes, codes)
    codes = codes * (1 - rate)[:, None] + candidates * rate[:, None]
    if survive:
      usage = usage + rate * jnp.maximum(jnp.sum(usage), _REVIVED_FLOOR) / k
    if survive and ema:
      mean = jnp.sum(count) / k
      blended = count + rate * (mean - count)
      blended = blended * (jnp.sum(count) / jnp.maximum(jnp.sum(blended), 1e-30))
      rescaled = ema_sum * (blended / jnp.maximum(count, 1e-30))[:, None]
      ema_sum = jnp.where((rate > 0)[:, None], blended[:, None] * codes, rescaled)
      count = blended
  new = CodebookState(codes, count, ema_sum, usage, state.initialised)
  return jax.tree.map(lambda a, b: jnp.where(total > 0, a, b), new, state)


def usage_stats(
  counts: Float[Array | np.ndarray, "*lead k"] | Int[Array | np.ndarray, "*lead k"],
) -> dict[str, jax.Array]:
  """How evenly the codes are used.

  Args:
    counts: how often each code was used (any positive unit, e.g. `state.usage`), of stages and positions together.

  Returns:
    `active_share` (0-1) of codes used at all, `perplexity` (exponential of the entropy of use, 1 to k), the number of
    `dead` codes, and `max_share` (0-1), the share of the most used code. All 0 (`dead` k) if nothing was
    counted.
  """
  counts = jnp.asarray(counts, jnp.float32).reshape(-1)
  total = jnp.sum(counts)
  share = counts / jnp.maximum(total, 1e-30)
  entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0))
  active = jnp.sum(counts > 0)
  return {
    "active_share": active / counts.shape[0],
    "perplexity": jnp.where(total > 0, jnp.exp(entropy), 0.0),
    "dead": counts.shape[0] - active,
    "max_share": jnp.max(share),
  }


def collapsed(usage: Float[Array | np.ndarray, "*lead k"], share: float = 0.2) -> Bool[Array, ""]:
  """Whether the perplexity of a codebook's use is below `share` of its size: the alarm for the log.

  Args:
    usage: counts of a batch, or `state.usage`.
    share: of k, 0-1.

  Raises:
    ValueError: if `share` is not between 0 and 1.
  """
  if not 0 <= share <= 1:
    raise ValueError(f"share must be between 0 and 1, got {share}")
  return usage_stats(usage)["perplexity"] < share * usage.size

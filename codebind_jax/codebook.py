"""Codebooks as explicit state: search, quantisation, EMA update with revival, k-means start and usage.

Equations follow section 2 of the method's description (CodeBind, arXiv 2605.18257, after VQ-VAE's EMA codebook and
the online clustering of CVQ-VAE). Everything is a pure function and every batch statistic a plain sum, so that the
same code gives the same state on one device and under jit over a mesh whose `data` axis splits the batch.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from codebind_jax.nearest import Distance, check_distance, nearest_code, nearest_segments
from codebind_jax.norm import unit

__all__ = [
  "CodebookState", "Quantized", "Segments", "advance", "collapsed", "draw_anchors", "init_codebook", "kmeans",
  "look_up",  "nearest_code", "quantize", "quantize_segments", "sample_rows", "similarity", "statistics", "straight_through",
  "update", "usage_stats",
]  # fmt: skip

Revive = Literal["random", "closest", "probrandom", "disturbance", "none"]
ReviveMode = Literal["survive", "codes_only"]


@struct.dataclass
class CodebookState:
  """All that changes in a codebook of k codes of width d.

  Attributes:
    codes: [k, d] float32, the code vectors as stored.
    ema_count: [k] float32, moving average N of the number of segments assigned to each code.
    ema_sum: [k, d] float32, moving average M of the sum of those segments.
    usage: [k] float32, moving average p of each code's share of the batch.
    initialised: [] bool, whether k-means has set the codes.
  """

  codes: jax.Array
  ema_count: jax.Array
  ema_sum: jax.Array
  usage: jax.Array
  initialised: jax.Array


class Quantized(NamedTuple):
  """Quantised vectors with a straight-through gradient, and the code of each."""

  vectors: Float[Array, "*lead d"]
  indices: Int[Array, "*lead"]


class Segments(NamedTuple):
  """Segments that one codebook has quantised, with vectors on the last axis (`nearest.py` says why).

  Attributes:
    vectors: [s, d, n] float32, s segments of each of n tokens.
    indices: [s, n] int32 codes.
    weights: [n] float32 weights of the tokens, or None for ones; a weight of 0 marks padding.
  """

  vectors: jax.Array
  indices: jax.Array
  weights: jax.Array | None = None


def init_codebook(rng: jax.Array, num_codes: int, dim: int) -> CodebookState:
  """A codebook of normalised Gaussian rows with empty statistics.

  Start from k-means (`compositional.init_codebooks`) before training: with counts of zero the Laplace smoothing of
  the first updates inflates codes that were not used.

  Args:
    rng: key of the rows.
    num_codes: k.
    dim: width d of a code.

  Raises:
    ValueError: if a size is not positive.
  """
  if num_codes < 1 or dim < 1:
    raise ValueError(f"num_codes and dim must be positive, got {num_codes} and {dim}")
  codes = unit(jax.random.normal(rng, (num_codes, dim), jnp.float32))
  return CodebookState(
    codes=codes,
    ema_count=jnp.zeros(num_codes, jnp.float32),
    # A copy, because a donated state must not hold one buffer twice.
    ema_sum=jnp.array(codes, copy=True),
    usage=jnp.zeros(num_codes, jnp.float32),
    initialised=jnp.zeros((), jnp.bool_),
  )


def quantize(
  z: Float[Array | np.ndarray, "*lead d"],
  codes: Float[Array | np.ndarray, "k d"],
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
  z: Float[Array, "s d n"], codes: Float[Array, "k d"], *, distance: Distance = "cosine"
) -> tuple[Float[Array, "s d n"], Int[Array, "s n"]]:
  """The nearest code vector of each segment, and its index; the vectors carry the gradient of `codes`."""
  indices = nearest_segments(z, codes, distance=distance)
  return look_up(codes, indices), indices


def look_up(codes: Float[Array, "k d"], indices: Int[Array, "s n"]) -> Float[Array, "s d n"]:
  """Code vectors by index, with vectors on lanes."""
  return jnp.moveaxis(jnp.take(codes.T, indices, axis=1, mode="clip"), 0, 1)


def straight_through(z: Float[Array, "..."], q: Float[Array, "..."]) -> Float[Array, "..."]:
  """The value of q with the gradient of z."""
  # q + (z - sg(z)) rather than z + sg(q - z): the value is q to the last bit.
  return jax.lax.stop_gradient(q) + (z - jax.lax.stop_gradient(z))


def statistics(parts: Sequence[Segments], num_codes: int) -> tuple[Float[Array, "k"], Float[Array, "k d"]]:
  """Number n_k and sum s_k of the segments assigned to each code, over all parts and all devices.

  Args:
    parts: what the codebook has quantised in this step.
    num_codes: k.
  """
  counts, sums = zip(*(_part_statistics(part, num_codes) for part in parts))
  return sum(counts), sum(sums)


def _part_statistics(part, num_codes):
  vectors, indices, weights = part
  s, _, n = vectors.shape
  ones = jnp.ones((s, 1, n), jnp.float32)
  if weights is not None:
    # `where` and not a product alone, because padding may hold NaN.
    vectors = jnp.where(weights > 0, vectors * weights, 0.0)
    ones = ones * jnp.maximum(weights, 0.0)
  sums = jax.lax.platform_dependent(
    jax.lax.stop_gradient(jnp.concatenate([vectors, ones], axis=1)),
    indices,
    cpu=lambda v, i: _scatter_sums(v, i, num_codes),
    default=lambda v, i: _one_hot_sums(v, i, num_codes),
  )
  return sums[:, -1], sums[:, :-1]


def _scatter_sums(vectors, indices, num_codes):
  rows = jnp.transpose(vectors, (0, 2, 1)).reshape(-1, vectors.shape[1])
  return jax.ops.segment_sum(rows, indices.reshape(-1), num_codes)


def _one_hot_sums(vectors, indices, num_codes, block=128):
  """Sums by products with one-hot blocks of codes: scatters are slow on TPU and not reproducible on GPU."""

  def sums(codes):
    one_hot = (indices[None] == codes[:, None, None]).astype(jnp.float32)
    return jnp.einsum("ksn,sdn->kd", one_hot, vectors, precision=jax.lax.Precision.HIGHEST)

  blocks = jnp.arange(num_codes + -num_codes % block, dtype=jnp.int32).reshape(-1, block)
  return jax.lax.map(sums, blocks).reshape(-1, vectors.shape[1])[:num_codes]


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
  anchors: Float[Array | np.ndarray, "k d"] | None = None,
) -> CodebookState:
  """One EMA step with Laplace smoothing, then revival of unused codes (`advance` has the equations).

  Args:
    state: the codebook.
    z: segments as quantised, i.e. already normalised when `normalize` was used.
    indices: the code of each segment.
    decay: g, the decay of all moving averages.
    eps: of the Laplace smoothing.
    revive: where the anchors of unused codes come from: `random` segments of the batch; for each code its `closest`
      segment; `probrandom`, drawn with the softmax of the similarity; `disturbance`, random with noise of U(-1, 1);
      or `none`.
    revive_mode: "survive", or "codes_only", which the next update overwrites as the release does.
    rng: key of the anchors; without one, a fixed key is used.
    weights: how often each row counts; 0 masks padding, which then has no effect whatever it holds.
    distance: the similarity that `closest` and `probrandom` use.
    anchors: overrides the choice of anchors.

  Returns:
    The new state. If all weights are 0 it is the old one.

  Raises:
    ValueError: for an unknown `revive`, `revive_mode` or `distance`, or a width that differs.
  """
  if z.shape[-1] != state.codes.shape[-1]:
    raise ValueError(f"z must have the codebook's width {state.codes.shape[-1]}, got {z.shape}")
  weights = None if weights is None else jnp.asarray(weights, jnp.float32)
  part = Segments(jnp.asarray(z, jnp.float32).T[None], jnp.asarray(indices)[None], weights)
  counts, sums = statistics([part], state.codes.shape[0])
  if anchors is None:
    anchors = draw_anchors(revive, rng, [part], state.codes, distance=distance)
  return advance(state, counts, sums, anchors, decay=decay, eps=eps, revive_mode=revive_mode)


def advance(
  state: CodebookState,
  counts: Float[Array, "k"],
  sums: Float[Array, "k d"],
  anchors: Float[Array | np.ndarray, "k d"] | None,
  *,
  decay: float = 0.99,
  eps: float = 1e-5,
  revive_mode: ReviveMode = "survive",
  ema: bool = True,
) -> CodebookState:
  """The state after a batch with the given statistics (section 2 of the method's description).

  EMA: N <- g N + (1-g) n, M <- g M + (1-g) s, code <- M / Nhat with Nhat_k = (N_k + eps) / (sum N + K eps) sum N.
  Revival: p <- g p + (1-g) n / sum n, a = exp(-10 K p / (1-g) - 1e-3), code <- (1 - a) code + a anchor.
  With "survive" a revived code also takes a mean code's share of the count (N is then rescaled, so that its total is
  what the EMA made it), M = N code, and a little usage, so that it is still in place after the next update.

  Args:
    state: the codebook before the batch.
    counts: n_k, segments assigned to each code.
    sums: s_k, their sum.
    anchors: what unused codes move to; None for no revival.
    decay: g.
    eps: of the Laplace smoothing.
    revive_mode: "survive" or "codes_only".
    ema: False leaves codes and their averages to the optimizer and only revives.
  """
  if revive_mode not in ("survive", "codes_only"):
    raise ValueError(f"revive_mode must be 'survive' or 'codes_only', got {revive_mode!r}")
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
  if anchors is not None:
    rate = jnp.exp(-10.0 * k * usage / (1 - decay) - 1e-3)
    if survive and ema:
      # A code without a count has no mean: the smoothing would inflate it, so it blends from where it was.
      codes = jnp.where((count < eps)[:, None], state.codes, codes)
    codes = codes + rate[:, None] * (anchors - codes)
    if survive:
      usage = usage + rate * _REVIVED_USAGE / k
    if survive and ema:
      mean = jnp.sum(count) / k
      blended = count + rate * (mean - count)
      blended = blended * (jnp.sum(count) / jnp.maximum(jnp.sum(blended), 1e-30))
      kept = ema_sum * (blended / jnp.maximum(count, 1e-30))[:, None]
      ema_sum = jnp.where((rate > 0)[:, None], blended[:, None] * codes, kept)
      count = blended
  new = CodebookState(codes, count, ema_sum, usage, state.initialised)
  return jax.tree.map(lambda a, b: jnp.where(total > 0, a, b), new, state)


# Usage, in units of a mean code's, that a revived code starts with: it keeps the next update from reviving it again.
_REVIVED_USAGE = 0.3


def draw_anchors(
  revive: Revive,
  rng: jax.Array | None,
  parts: Sequence[Segments],
  codes: Float[Array, "k d"],
  *,
  distance: Distance = "cosine",
) -> Float[Array, "k d"] | None:
  """The segment of the batch that each code would be revived at; None for `revive="none"`.

  Args:
    revive: as in `update`.
    rng: key; a fixed one is used if it is None.
    parts: what the codebook has quantised in this step; segments of tokens with weight 0 are never drawn.
    codes: the codes before the update.
    distance: the similarity that `closest` and `probrandom` use.
  """
  check_distance(distance)
  if revive == "none":
    return None
  if revive not in ("random", "closest", "probrandom", "disturbance"):
    raise ValueError(f"revive must be random, closest, probrandom, disturbance or none, got {revive!r}")
  rng = jax.random.key(0) if rng is None else rng
  parts = [part._replace(vectors=jax.lax.stop_gradient(part.vectors)) for part in parts]
  if revive in ("closest", "probrandom"):
    return _best_segments(parts, codes, distance, rng if revive == "probrandom" else None)
  draw, noise = jax.random.split(rng)
  anchors = _random_segments(draw, parts, codes.shape[0])
  if revive == "disturbance":
    # The noise turns the segment and leaves its length, so that anchors are unit vectors when segments are.
    length = jnp.linalg.norm(anchors, axis=1, keepdims=True)
    anchors = length * unit(anchors + jax.random.uniform(noise, anchors.shape, minval=-1.0, maxval=1.0))
  return anchors


def _random_segments(rng, parts, k):
  """k segments drawn from all parts with probability proportional to their weight."""
  place, which = jax.random.split(rng)
  cumulated = [None if part.weights is None else jnp.cumsum(jnp.maximum(part.weights, 0.0)) for part in parts]
  sizes = [part.vectors.shape[0] * (part.vectors.shape[2] if c is None else c[-1]) for part, c in zip(parts, cumulated)]
  position = jax.random.uniform(place, (k,)) * sum(sizes)
  anchors = jnp.zeros((k, parts[0].vectors.shape[1]), jnp.float32)
  first = 0.0
  for part, size, cumulative in zip(parts, sizes, cumulated):
    s, _, n = part.vectors.shape
    token = jnp.floor((position - first) / s)
    if cumulative is not None:
      token = jnp.searchsorted(cumulative, token, side="right")
    token = jnp.clip(token.astype(jnp.int32), 0, n - 1)
    segment = jax.random.randint(which, (k,), 0, s)
    here = (position >= first) & (position < first + size)
    if part is parts[-1]:
      here = position >= first
    anchors = jnp.where(here[:, None], part.vectors[segment, :, token], anchors)
    first = first + size
  return anchors


def sample_rows(
  rng: jax.Array, parts: Sequence[Segments], limit: int
) -> tuple[Float[Array, "n d"], Float[Array, "n"] | None]:
  """All segments of the parts as rows with their weights; beyond `limit`, that many drawn at random."""
  size = sum(part.vectors.shape[0] * part.vectors.shape[2] for part in parts)
  if size > limit:
    return _random_segments(rng, parts, limit), None
  rows = jnp.concatenate([jnp.moveaxis(part.vectors, 1, 2).reshape(-1, part.vectors.shape[1]) for part in parts])
  if all(part.weights is None for part in parts):
    return rows, None
  shapes = [(part.vectors.shape[0], part.vectors.shape[2]) for part in parts]
  weights = [jnp.ones(shape[1]) if part.weights is None else part.weights for part, shape in zip(parts, shapes)]
  return rows, jnp.concatenate([jnp.broadcast_to(w, shape).reshape(-1) for w, shape in zip(weights, shapes)])


def _best_segments(parts, codes, distance, rng):
  """For each code the segment of highest similarity; with a key, of similarity plus Gumbel noise (a softmax draw)."""
  best, anchors = jnp.full(codes.shape[0], -jnp.inf), jnp.zeros_like(codes)
  for number, part in enumerate(parts):
    key = None if rng is None else jax.random.fold_in(rng, number)
    score, segment = _best_of_part(part, codes, distance, key)
    anchors = jnp.where((score > best)[:, None], segment, anchors)
    best = jnp.maximum(best, score)
  return anchors


def _best_of_part(part, codes, distance, rng):
  vectors, _, weights = part
  s, d, n = vectors.shape
  places = jnp.arange(s * n, dtype=jnp.int32).reshape(s, n)

  def best(args):
    code, number = args
    score = similarity(vectors, code[None], distance=distance)[:, 0]
    if rng is not None:
      score = score + jax.random.gumbel(jax.random.fold_in(rng, number), (s, n))
    if weights is not None:
      score = jnp.where(weights > 0, score + (0.0 if rng is None else jnp.log(weights)), -jnp.inf)
    highest = jnp.max(score)
    return highest, jnp.min(jnp.where(score == highest, places, s * n - 1))

  score, place = jax.lax.map(best, (codes, jnp.arange(codes.shape[0])))
  return score, vectors[place // n, :, place % n]


def similarity(
  z: Float[Array, "s d n"], codes: Float[Array, "k d"], *, distance: Distance = "cosine"
) -> Float[Array, "s k n"]:
  """Similarity of segments and codes: z . unit(code) for "cosine" (z as given), minus the squared distance for "l2"."""
  if distance == "cosine":
    return jnp.einsum("kd,sdn->skn", unit(codes), z, precision=jax.lax.Precision.HIGHEST)
  product = jnp.einsum("kd,sdn->skn", codes, z, precision=jax.lax.Precision.HIGHEST)
  return 2 * product - jnp.sum(codes * codes, axis=1)[:, None] - jnp.sum(z * z, axis=1)[:, None]


def kmeans(
  rng: jax.Array,
  z: Float[Array | np.ndarray, "n d"],
  num_codes: int,
  *,
  iterations: int = 10,
  distance: Distance = "cosine",
  init: Float[Array | np.ndarray, "k d"] | None = None,
  normalize: bool | None = None,
  weights: Float[Array | np.ndarray, "n"] | None = None,
) -> tuple[Float[Array, "k d"], Float[Array, "k"]]:
  """Lloyd's algorithm; empty clusters keep their mean.

  Args:
    rng: key of the first means, drawn far from each other as in k-means++ (Arthur and Vassilvitskii, 2007).
    z: vectors.
    num_codes: k.
    iterations: rounds of assignment and mean.
    distance: "cosine" or "l2".
    init: first means, instead of drawn ones.
    normalize: L2-normalise the means after each round. None: if all vectors are unit vectors.
    weights: how often each row counts; 0 masks padding.

  Returns:
    The means, and the counts of the last assignment (made with the means before the last round's).

  Raises:
    ValueError: if a size is not positive, `init` has another shape or `distance` is unknown.
  """
  check_distance(distance)
  if num_codes < 1 or iterations < 1 or z.shape[0] < 1:
    raise ValueError(f"num_codes, iterations and rows of z must be positive, got {num_codes}, {iterations}, {z.shape}")
  if init is not None and init.shape != (num_codes, z.shape[1]):
    raise ValueError(f"init must be {(num_codes, z.shape[1])}, got {init.shape}")
  lanes = jnp.asarray(z, jnp.float32).T[None]
  weights = None if weights is None else jnp.asarray(weights, jnp.float32)
  if normalize is None:
    off = jnp.abs(jnp.sum(lanes * lanes, axis=1) - 1.0)
    on_sphere = jnp.max(off if weights is None else jnp.where(weights > 0, off, 0.0)) < 1e-3
  else:
    on_sphere = jnp.asarray(normalize)
  if init is None:
    means = _distant_rows(rng, unit(lanes, axis=1) if distance == "cosine" else lanes, weights, num_codes)
  else:
    means = jnp.asarray(init, jnp.float32)

  def iterate(_, carry):
    means, _ = carry
    indices = nearest_segments(lanes, means, distance=distance)
    counts, sums = statistics([Segments(lanes, indices, weights)], num_codes)
    new = sums / jnp.maximum(counts, 1e-30)[:, None]
    new = jnp.where(on_sphere, unit(new), new)
    return jnp.where((counts > 0)[:, None], new, means), counts

  return jax.lax.fori_loop(0, iterations, iterate, (means, jnp.zeros(num_codes, jnp.float32)))


def _distant_rows(rng, z, weights, k):
  """k rows of z [1, d, n], each drawn with probability proportional to its squared distance to those before it."""
  z = z[0]
  weights = jnp.ones(z.shape[1]) if weights is None else weights

  def draw(i, carry):
    rows, nearest = carry
    mass = jnp.where(weights > 0, nearest * weights, 0.0)
    # With no row left that differs from the chosen ones, any will do.
    cumulative = jnp.cumsum(jnp.where(jnp.sum(mass) > 0, mass, weights))
    position = (1.0 - jax.random.uniform(jax.random.fold_in(rng, i))) * cumulative[-1]
    row = z[:, jnp.searchsorted(cumulative, position, side="left")]
    distance = jnp.sum((z - row[:, None]) ** 2, axis=0)
    return rows.at[i].set(row), jnp.minimum(nearest, distance)

  rows, _ = jax.lax.fori_loop(0, k, draw, (jnp.zeros((k, z.shape[0])), jnp.full(z.shape[1], 1e30)))
  return rows


def usage_stats(counts: Float[Array | np.ndarray, "k"] | Int[Array | np.ndarray, "k"]) -> dict[str, jax.Array]:
  """How evenly the codes are used.

  Args:
    counts: how often each code was used (any positive unit, e.g. `state.usage`).

  Returns:
    `active_share` (0-1) of codes used at all, `perplexity` (exponential of the entropy of use, 1 to k), the number of
    `dead` codes, and `max_share` (0-1), the part that the most used code takes. All 0 (`dead` k) if nothing was
    counted.
  """
  counts = jnp.asarray(counts, jnp.float32)
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


def collapsed(usage: Float[Array | np.ndarray, "k"], share: float = 0.2) -> Bool[Array, ""]:
  """Whether the perplexity of a codebook's use is below `share` of its size: the alarm for the log.

  Args:
    usage: counts of a batch, or `state.usage`.
    share: of k, 0-1.

  Raises:
    ValueError: if `share` is not between 0 and 1.
  """
  if not 0 <= share <= 1:
    raise ValueError(f"share must be between 0 and 1, got {share}")
  return usage_stats(usage)["perplexity"] < share * usage.shape[0]

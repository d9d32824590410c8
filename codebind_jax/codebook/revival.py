"""Revival candidates: the segments of a batch that replace unused codes (CVQ-VAE, Zheng and Vedaldi, 2023)."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from codebind_jax.codebook.nearest import Distance, check_distance
from codebind_jax.codebook.segments import Segments, similarity
from codebind_jax.norm import unit

_COMPARE_ALL = 2**25

Revive = str
REVIVALS = ("random", "closest", "probrandom", "disturbance", "none")


@functools.partial(jax.jit, static_argnames=("revive", "distance"))
def draw_candidates(
  revive: Revive,
  rng: jax.Array | None,
  parts: Sequence[Segments],
  codes: Float[Array, "*own k d"],
  *,
  distance: Distance = "cosine",
) -> Float[Array, "*own k d"] | None:
  """The segment of the batch that would replace each code; None for `revive="none"`.

  A position with a codebook of its own gets segments of that position.

  Args:
    revive: as in `update`.
    rng: key; a fixed one is used if it is None.
    parts: segments that the codebook has quantised in this step; those of tokens with weight 0 are never drawn.
    codes: the codes before the update, [k, d] or [s, k, d].
    distance: the similarity that `closest` and `probrandom` use.
  """
  check_distance(distance)
  if revive not in REVIVALS:
    raise ValueError(f"revive must be one of {REVIVALS}, got {revive!r}")
  if revive == "none":
    return None
  rng = jax.random.key(0) if rng is None else rng
  parts = [part._replace(vectors=jax.lax.stop_gradient(part.vectors)) for part in parts]
  if codes.ndim == 3:
    keys, weights = jax.random.split(rng, len(codes)), [part.weights for part in parts]

    def of_position(key, vectors, codes):
      own = [Segments(v[None], jnp.zeros((1, v.shape[1]), jnp.int32), w) for v, w in zip(vectors, weights)]
      return draw_candidates(revive, key, own, codes, distance=distance)

    return jax.vmap(of_position)(keys, [part.vectors for part in parts], codes)
  if revive in ("closest", "probrandom"):
    return _best_segments(parts, codes, distance, rng if revive == "probrandom" else None)
  draw, noise = jax.random.split(rng)
  candidates = _random_segments(draw, parts, codes.shape[0])
  if revive == "disturbance":
    # The noise changes a segment's direction and not its length, so that unit segments give unit candidates.
    length = jnp.linalg.norm(candidates, axis=1, keepdims=True)
    candidates = length * unit(candidates + jax.random.uniform(noise, candidates.shape, minval=-1.0, maxval=1.0))
  return candidates


def _random_segments(rng, parts, k):
  """k segments drawn from all parts with probability proportional to their weight.

  Each of k equal strata of the batch gives one draw, in random order: a segment is as likely as in independent draws,
  but no two codes get the same one, of which the second would never be used.
  """
  place, order = jax.random.split(rng)
  cumulated = [None if part.weights is None else jnp.cumsum(jnp.maximum(part.weights, 0.0)) for part in parts]
  sizes = [part.vectors.shape[0] * (part.vectors.shape[2] if c is None else c[-1]) for part, c in zip(parts, cumulated)]
  stratum = jax.random.permutation(order, k)
  position = (stratum + jax.random.uniform(place, (k,))) / k * sum(sizes)
  candidates = jnp.zeros((k, parts[0].vectors.shape[1]), jnp.float32)
  first = 0.0
  for part, size, cumulative in zip(parts, sizes, cumulated):
    s, _, n = part.vectors.shape
    token = (position - first) / s
    segment = jnp.floor((token - jnp.floor(token)) * s)
    if cumulative is not None:
      # Comparing with every entry is a plain sum over devices; a large search scans instead.
      method = "compare_all" if k * n <= _COMPARE_ALL else "scan"
      token = jnp.searchsorted(cumulative, token, side="right", method=method)
    token = jnp.clip(token.astype(jnp.int32), 0, n - 1)
    segment = jnp.clip(segment.astype(jnp.int32), 0, s - 1)
    here = (position >= first) & (position < first + size)
    if part is parts[-1]:
      here = position >= first
    drawn = jax.lax.platform_dependent(part.vectors, segment, token, tpu=_rows_by_lanes, default=_rows)
    candidates = jnp.where(here[:, None], drawn, candidates)
    first = first + size
  return candidates


def _rows(vectors, segment, token):
  return vectors[segment, :, token]


def _rows_by_lanes(vectors, segment, token):
  """`_rows` by way of whole tokens: for a gather of rows of 8, TPU's compiler would copy all segments to such rows."""
  s, d, n = vectors.shape
  lanes = jnp.take(vectors.reshape(s * d, n), token, axis=1, mode="clip").reshape(s, d, -1)
  here = segment == jnp.arange(s, dtype=segment.dtype)[:, None]
  return jnp.sum(jnp.where(here[:, None], lanes, 0.0), axis=0).T


def sample_rows(
  rng: jax.Array, parts: Sequence[Segments], limit: int
) -> tuple[Float[Array, "n d"], Float[Array, "n"] | None]:
  """All segments of the parts as rows with their weights; `limit` of them drawn at random if there are more."""
  size = sum(part.vectors.shape[0] * part.vectors.shape[2] for part in parts)
  if size > limit:
    return _random_segments(rng, parts, limit), None
  # Tokens first, as in `segments.statistics`.
  rows = jnp.concatenate([jnp.moveaxis(part.vectors, 2, 0).reshape(-1, part.vectors.shape[1]) for part in parts])
  if all(part.weights is None for part in parts):
    return rows, None
  shapes = [(part.vectors.shape[2], part.vectors.shape[0]) for part in parts]
  weights = [jnp.ones(shape[0]) if part.weights is None else part.weights for part, shape in zip(parts, shapes)]
  return rows, jnp.concatenate([jnp.broadcast_to(w[:, None], s).reshape(-1) for w, s in zip(weights, shapes)])


def _best_segments(parts, codes, distance, rng):
  """The most similar segment of each code; with a key, Gumbel noise is added to the similarity (a softmax draw)."""
  best, candidates = jnp.full(codes.shape[0], -jnp.inf), jnp.zeros_like(codes)
  for number, part in enumerate(parts):
    key = None if rng is None else jax.random.fold_in(rng, number)
    score, segment = _best_of_part(part, codes, distance, key)
    candidates = jnp.where((score > best)[:, None], segment, candidates)
    best = jnp.maximum(best, score)
  return candidates


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

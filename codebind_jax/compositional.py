"""Shared + specific compositional quantisation of all modalities in one call (CodeBind, section "Compositional VQ").

The features of a modality are a shared part, cut into segments that the one shared codebook quantises, and a specific
part, cut into segments that the modality's own codebook quantises. Many codes of small codebooks describe one vector.
"""

import dataclasses
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from codebind_jax import codebook as cb
from codebind_jax.codebook import CodebookState, rotation
from codebind_jax.codebook.clustering import kmeans
from codebind_jax.codebook.residual import beam_codes, start_stages
from codebind_jax.codebook.revival import draw_candidates, sample_rows
from codebind_jax.codebook.segments import THROUGH, Segments, look_up, statistics, transposed
from codebind_jax.codebook.segments import similarity as similarities
from codebind_jax.codebook.spec import LAYOUTS, UPDATES, Layout
from codebind_jax.codebook.spec import CompositionalSpec as CompositionalSpec
from codebind_jax.losses.code_contrast import code_contrast_segments
from codebind_jax.norm import unit
from codebind_jax.runtime.sharding import split_over_devices

Update = str
_PROGRESSIVE = 3  # a round over all axes counts as so many, beside those over a few


@struct.dataclass
class ModalityOutput:
  """One modality after quantisation; `*lead` is [b, t], or [b] where the features had no token axis.

  Attributes:
    shared: [*lead, shared_dim], L2-normalised over its width.
    specific: [*lead, specific_dim], likewise.
    full: [*lead, shared_dim + specific_dim], likewise.
    query: [*lead, shared_dim], likewise: the shared part as the quantiser gets it, before its codes replace it; what a
      search compares with the `shared` of items.
    indices_shared: [*lead, s] int32 codes; of several residual stages one after the other, s for each stage.
    indices_specific: [*lead, s'] int32 codes.
    similarity_shared: [b, s, k] similarities of the class token's shared segments to the codes (of the first stage),
      for the rows that `similarity_rows` selects.
    similarity_specific: [b, s', k'] likewise.
    commitment: commitment loss, shared and specific parts added (with the codebook loss where codes are parameters).
  """

  shared: Any
  specific: Any
  full: Any
  query: Any
  indices_shared: Any
  indices_specific: Any
  similarity_shared: Any
  similarity_specific: Any
  commitment: Any


def split_segments(x: Float[Array | np.ndarray, "*lead c"], dim: int) -> Float[Array, "*lead s d"]:
  """Cuts the last axis into segments of width `dim`.

  Raises:
    ValueError: if the width is no multiple of `dim`.
  """
  if dim < 1 or x.shape[-1] % dim:
    raise ValueError(f"the width {x.shape[-1]} is not a multiple of the segment width {dim}")
  return jnp.asarray(x).reshape(*x.shape[:-1], x.shape[-1] // dim, dim)


def merge_segments(x: Float[Array | np.ndarray, "*lead s d"]) -> Float[Array, "*lead c"]:
  """Inverse of `split_segments`."""
  return jnp.asarray(x).reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def split_parts(
  x: Float[Array | np.ndarray, "*lead c"],
  shared_dim: int,
  specific_dim: int,
  *,
  layout: Layout = "parts",
  code_dims: tuple[int, int] = (8, 8),
) -> tuple[Float[Array, "*lead cs"], Float[Array, "*lead cp"]]:
  """Cuts features into the shared and the specific part.

  Args:
    x: features of width shared_dim + specific_dim.
    shared_dim: width of the shared part.
    specific_dim: width of the specific part, 0 for none.
    layout: "parts" takes the first shared_dim features; "interleaved" takes chunks of Ds + Dp features, each a shared
      segment followed by a specific one.
    code_dims: (Ds, Dp), needed for "interleaved".

  Raises:
    ValueError: if widths do not fit or `layout` is unknown.
  """
  if x.shape[-1] != shared_dim + specific_dim:
    raise ValueError(f"features must have width {shared_dim} + {specific_dim}, got {x.shape}")
  x = jnp.asarray(x)
  if layout not in LAYOUTS:
    raise ValueError(f"layout must be {' or '.join(map(repr, LAYOUTS))}, got {layout!r}")
  if layout == "parts":
    return x[..., :shared_dim], x[..., shared_dim:]
  ds, dp = code_dims[0], code_dims[1] if specific_dim else 0
  if shared_dim % ds or (dp and specific_dim * ds != shared_dim * dp):
    raise ValueError(f"widths {shared_dim}, {specific_dim} are not equally many segments of {code_dims}")
  chunks = split_segments(x, ds + dp)
  return merge_segments(chunks[..., :ds]), merge_segments(chunks[..., ds:])


def new_codebooks(rng: jax.Array, spec: CompositionalSpec, modalities: Iterable[str]) -> dict[str, CodebookState]:
  """Random codebooks under the names that `quantize_modalities` expects; initialise them with `init_codebooks`."""
  books = {name: book for modality in modalities for name, book in spec.books(modality).items()}
  return {
    name: cb.init_codebook(_fold(rng, name), codes, width, spec.lead(positions))
    for name, (codes, width, positions) in sorted(books.items())
  }


def quantize_modalities(
  features: Mapping[str, Float[Array | np.ndarray, "..."]],
  codebooks: Mapping[str, CodebookState],
  spec: CompositionalSpec,
  *,
  update: Update = "snapshot",
  rng: jax.Array | None = None,
  masks: Mapping[str, Bool[Array | np.ndarray, "..."]] | None = None,
  similarity_rows: int | Mapping[str, tuple[tuple[int, int], ...]] = 0,
  rotations: Mapping[str, Float[Array | np.ndarray, "w _w"]] | None = None,
) -> tuple[dict[str, ModalityOutput], dict[str, CodebookState]]:
  """Quantises all modalities and updates the codebooks.

  Args:
    features: by modality, [b, t, c] (token 0 is the class token) or [b, c], any float type; c is the shared width
      plus the modality's specific one. Modalities may differ in b and t.
    codebooks: `shared` and one for each modality with a specific part; others stay as they are.
    spec: how to cut and quantise.
    update: "snapshot" quantises every modality against the codebooks as they came and updates each once with the summed
      statistics; "sequential" updates after each call, as the release does; "none" leaves the codebooks alone.
    rng: key of the revival; a fixed one is used if it is None.
    masks: by modality, [b] or [b, t], True for real rows; masked ones touch neither the state nor the losses.
    similarity_rows: number of leading rows whose similarities are computed, 0 for all; or by modality the ranges
      [start, stop) of rows, joined in that order. Similarities are [b, s, k] and with their gradient cost many times
      the search.
    rotations: codebook name -> orthogonal matrix that turns its part before it is cut into segments, and whose
      transpose turns the codes back; parts without one are not turned.

  Returns:
    Outputs by modality, and the codebooks after the update.

  Raises:
    ValueError: for a missing codebook or one of another width than its segments, features of a wrong width, a wrong
      mask, or an unknown `update`.
  """
  if update not in (*UPDATES, "none"):
    raise ValueError(f"update must be one of {(*UPDATES, 'none')}, got {update!r}")
  codebooks, masks = dict(codebooks), dict(masks or {})
  rng = jax.random.key(0) if rng is None else rng
  rotations = dict(rotations or {})
  collected: dict[str, list[tuple[Segments, ...]]] = {}
  outputs = {}
  for modality in _ordered(features, spec):
    x, weights = _check(modality, features[modality], masks.get(modality), spec)
    quantised = []
    for part, (name, segments) in enumerate(zip(spec.codebook_names(modality), _segments(x, modality, spec))):
      if segments is None:
        quantised.append(None)
        continue
      _check_book(name, codebooks, modality, segments, spec)
      ranges = similarity_rows if isinstance(similarity_rows, Mapping) else {modality: ((0, similarity_rows),)}
      row_ranges = ranges.get(modality) if similarity_rows else None
      result, assigned = _quantize_part(segments, codebooks[name], weights, x, spec, row_ranges, rotations.get(name))
      quantised.append(result)
      if update == "sequential":
        key = _fold(rng, f"{modality}/{part}")
        codebooks[name] = _advance(codebooks[name], [assigned], key, spec)
      elif update == "snapshot":
        collected.setdefault(name, []).append(assigned)
    outputs[modality] = _output(x, quantised, spec)
  for name, parts in collected.items():
    codebooks[name] = _advance(codebooks[name], parts, _fold(rng, name), spec)
  return outputs, codebooks


def contrast_all_tokens(
  features: Mapping[str, Float[Array | np.ndarray, "..."]],
  codebooks: Mapping[str, CodebookState],
  spec: CompositionalSpec,
  *,
  double_softmax: bool = False,
  masks: Mapping[str, Bool[Array | np.ndarray, "..."]] | None = None,
  rotations: Mapping[str, Float[Array | np.ndarray, "w _w"]] | None = None,
) -> dict[str, Float[Array, ""]]:
  """`code_contrast` over every segment of every token, shared and specific parts added, by modality.

  The release's form of the loss. It costs more than quantising, so do not call it where its weight is 0; for the class
  token alone, `losses.code_contrast` of the outputs' similarities is nearly free.

  Args:
    features: as in `quantize_modalities`.
    codebooks: those that quantise the features; they get a gradient only where `spec.ema` is off.
    spec: how to cut.
    double_softmax: as in `losses.code_contrast`.
    masks: as in `quantize_modalities`.
    rotations: as in `quantize_modalities`.

  Raises:
    ValueError: as `quantize_modalities`.
  """
  masks, losses, rotations = dict(masks or {}), {}, dict(rotations or {})
  for modality in features:
    x, weights = _check(modality, features[modality], masks.get(modality), spec)
    total = jnp.zeros((), jnp.float32)
    for name, segments in zip(spec.codebook_names(modality), _segments(x, modality, spec)):
      if segments is not None:
        _check_book(name, codebooks, modality, segments, spec)
        segments, _ = _turned(segments, spec, rotations.get(name))
        segments = jax.lax.stop_gradient(segments) if spec.detach_similarity else segments
        codes = jax.lax.stop_gradient(codebooks[name].codes) if spec.ema else codebooks[name].codes
        contrast = lambda z, codes, weights=weights: code_contrast_segments(
          z, codes, distance=spec.distance, double_softmax=double_softmax, weights=weights
        )
        codes = codes[0] if spec.stages > 1 else codes
        if spec.positions == "own":
          total += jnp.mean(jax.lax.map(lambda of, contrast=contrast: contrast(of[0][None], of[1]), (segments, codes)))
        else:
          total += contrast(segments, codes)
    losses[modality] = total
  return losses


def init_codebooks(
  rng: jax.Array,
  features: Mapping[str, Float[Array | np.ndarray, "..."]],
  codebooks: Mapping[str, CodebookState],
  spec: CompositionalSpec,
  *,
  first_token: bool = False,
  iterations: int = 10,
  max_segments: int = 65536,
  masks: Mapping[str, Bool[Array | np.ndarray, "..."]] | None = None,
  rotations: Mapping[str, Float[Array | np.ndarray, "w _w"]] | None = None,
) -> dict[str, CodebookState]:
  """Initialises the codebooks that the given features use by k-means over a batch.

  Codes become the means, with their counts in the k-means (at least one, so that no code is inflated or lost in the
  first updates). Every codebook that the features use is replaced; pass only those not yet `initialised`.

  Args:
    rng: key of the sample and of the first means.
    features: as in `quantize_modalities`.
    codebooks: the codebooks; those that the features do not use stay as they are.
    spec: how to cut.
    first_token: use class tokens only, as the release does.
    iterations: rounds of k-means.
    max_segments: a larger batch is sampled down to this many segments per codebook.
    masks: as in `quantize_modalities`.
    rotations: as in `quantize_modalities`.

  Raises:
    ValueError: as `quantize_modalities`.
  """
  codebooks, masks, rotations = dict(codebooks), dict(masks or {}), dict(rotations or {})
  collected: dict[str, list[Segments]] = {}
  for modality in _ordered(features, spec):
    x, weights = features[modality], masks.get(modality)
    if first_token and x.ndim == 3:
      x, weights = x[:, :1], weights if weights is None or weights.ndim == 1 else weights[:, :1]
    x, weights = _check(modality, x, weights, spec)
    for name, segments in zip(spec.codebook_names(modality), _segments(x, modality, spec)):
      if segments is not None:
        _check_book(name, codebooks, modality, segments, spec)
        segments, _ = _turned(segments, spec, rotations.get(name))
        indices = jnp.zeros((segments.shape[0], segments.shape[2]), jnp.int32)
        collected.setdefault(name, []).append(Segments(segments, indices, weights))
  for name, parts in collected.items():
    means, counts = _start_codes(
      _fold(rng, name), parts, codebooks[name].codes.shape[-2], spec, iterations, max_segments
    )
    counts = jnp.maximum(counts, 1.0)
    codebooks[name] = CodebookState(
      codes=means,
      ema_count=counts,
      ema_sum=means * counts[..., None],
      usage=counts / jnp.sum(counts, axis=-1, keepdims=True),
      initialised=jnp.ones((), jnp.bool_),
    )
  return codebooks


def start_rotations(
  rng: jax.Array,
  features: Mapping[str, Float[Array | np.ndarray, "..."]],
  codebooks: Mapping[str, CodebookState],
  spec: CompositionalSpec,
  *,
  iterations: int = 30,
  masks: Mapping[str, Bool[Array | np.ndarray, "..."]] | None = None,
) -> dict[str, Float[Array, "w _w"]]:
  """Codebook name -> the rotation by which product quantisation of the features loses least (`rotation.opq`).

  Args:
    rng: key.
    features: as in `quantize_modalities`; all tokens count.
    codebooks: those that the features use, for their sizes.
    spec: how to cut and quantise.
    iterations: rounds.
    masks: as in `quantize_modalities`.

  Raises:
    ValueError: as `quantize_modalities`.
  """
  masks = dict(masks or {})
  collected: dict[str, list[tuple[Any, Any]]] = {}
  for modality in _ordered(features, spec):
    x, weights = _check(modality, features[modality], masks.get(modality), spec)
    weights = jnp.ones(int(np.prod(x.shape[:-1]))) if weights is None else weights
    for name, segments in zip(spec.codebook_names(modality), _segments(x, modality, spec)):
      if segments is not None:
        _check_book(name, codebooks, modality, segments, spec)
        rows = segments.reshape(-1, segments.shape[2]).T
        collected.setdefault(name, []).append((unit(rows) if spec.unit_parts else rows, weights))
  found = {}
  for name, parts in collected.items():
    rows, weights = (jnp.concatenate(column) for column in zip(*parts))
    codes, width = codebooks[name].codes.shape[-2:]
    found[name] = rotation.opq(
      _fold(rng, name), rows, codes, width, own=spec.positions == "own", distance=spec.distance,
      normalize=spec.normalize, iterations=iterations, weights=weights,
    )  # fmt: skip
  return found


def _start_codes(rng, parts, num_codes, spec, iterations, max_segments):
  """Means and counts of k-means over segments: of each position by itself where it has its own codebook, and of each
  stage's residuals."""
  if spec.positions == "own":
    vectors, weights = [part.vectors for part in parts], [part.weights for part in parts]
    shared = dataclasses.replace(spec, positions="shared")

    def of_position(of):
      key, vectors = of
      own = [Segments(v[None], jnp.zeros((1, v.shape[1]), jnp.int32), w) for v, w in zip(vectors, weights)]
      return _start_codes(key, own, num_codes, shared, iterations, max_segments)

    found = jax.lax.map(of_position, (jax.random.split(rng, len(vectors[0])), vectors))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found) if spec.stages > 1 else found
  sample_key, means_key = jax.random.split(rng)
  rows, weights = sample_rows(sample_key, parts, max_segments)
  if spec.stages > 1:
    rounds = max(1, iterations // _PROGRESSIVE)
    return start_stages(means_key, rows, weights, num_codes, spec.stages, beam=spec.beam, iterations=rounds)
  return kmeans(
    means_key, rows, num_codes, iterations=iterations, distance=spec.distance, normalize=spec.normalize, weights=weights
  )


def _ordered(features, spec):
  return [m for m in spec.first if m in features] + [m for m in features if m not in spec.first]


def _fold(rng, name):
  return jax.random.fold_in(rng, zlib.crc32(name.encode()))


def _check(modality, x, mask, spec):
  """Float32 features, and the weights [n] of their tokens."""
  width = spec.shared_dim + spec.specific_width(modality)
  if x.ndim not in (2, 3) or x.shape[-1] != width:
    raise ValueError(f"features of {modality!r} must be [b, {width}] or [b, t, {width}], got {x.shape}")
  x = jnp.asarray(x, jnp.float32)
  if mask is None:
    return x, None
  if mask.shape not in (x.shape[:1], x.shape[:-1]):
    raise ValueError(f"the mask of {modality!r} must be {x.shape[:1]} or {x.shape[:-1]}, got {mask.shape}")
  mask = jnp.reshape(jnp.asarray(mask, jnp.float32), mask.shape + (1,) * (x.ndim - 1 - mask.ndim))
  return x, jnp.broadcast_to(mask, x.shape[:-1]).reshape(-1)


def _check_book(name, codebooks, modality, segments, spec):
  """Raises ValueError unless there is a codebook of that name whose codes are as wide as the segments [s, d, n]."""
  if name not in codebooks:
    raise ValueError(f"codebooks lack {name!r}, which {modality!r} needs; they are {sorted(codebooks)}")
  cb.check_codes(codebooks[name], segments.shape[1], name, spec.lead(len(segments)))


def _segments(x, modality, spec):
  """Shared and specific segments [s, d, n] with tokens on lanes; None for a part without width."""
  lanes = transposed(x.reshape(-1, x.shape[-1]))
  ds, dp = spec.code_dims[0], spec.specific_code_dim(modality)
  specific = spec.specific_width(modality)
  if not specific:
    return lanes.reshape(-1, ds, lanes.shape[1]), None
  if spec.layout == "interleaved":
    chunks = lanes.reshape(-1, ds + dp, lanes.shape[1])
    return chunks[:, :ds], chunks[:, ds:]
  parts = lanes[: spec.shared_dim], lanes[spec.shared_dim :]
  return parts[0].reshape(-1, ds, lanes.shape[1]), parts[1].reshape(-1, dp, lanes.shape[1])


def _rotated(z, matrix):
  """The part whose segments are z [s, d, n], turned by a matrix [s d, s d]."""
  if matrix is None:
    return z
  return jnp.dot(matrix, z.reshape(-1, z.shape[-1]), precision=jax.lax.Precision.HIGHEST).reshape(z.shape)


def _turned(z, spec, matrix):
  """Segments z [s, d, n] as they are compared with codes, and as codes replace them: scaled and turned by the spec."""
  if spec.unit_parts:
    z = unit(z.reshape(-1, z.shape[-1]), axis=0).reshape(z.shape)
  z = _rotated(z, matrix)
  direction = unit(z, axis=1) if spec.normalize or spec.distance == "cosine" else z
  return direction, direction if spec.normalize else z


def _quantize_part(z, state, weights, x, spec, row_ranges, matrix):
  """Quantises segments z of features x with one codebook.

  Returns:
    ((vectors, segments before quantisation, indices, class-token similarity, loss), the segments with their codes for
    the codebook's update, by stage).
  """
  direction, z = _turned(z, spec, matrix)
  codes = jax.lax.stop_gradient(state.codes) if spec.ema else state.codes
  books = list(codes) if spec.stages > 1 else [codes]
  best = beam_codes(z, codes, beam=spec.beam) if spec.beam > 1 else [None] * len(books)
  rest, compared, quantised, assigned = z, direction, [], []
  for book, indices in zip(books, best):
    if indices is None:
      vectors, indices = cb.quantize_segments(compared, book, distance=spec.distance)
    else:
      vectors = look_up(book, indices)
    of_stage = spec.beta * _mean_square(jax.lax.stop_gradient(vectors) - rest, weights)
    if not spec.ema:
      of_stage = of_stage + _mean_square(vectors - jax.lax.stop_gradient(rest), weights)
    quantised.append((vectors, indices, of_stage))
    assigned.append(Segments(jax.lax.stop_gradient(compared), indices, weights))
    compared = rest = rest - jax.lax.stop_gradient(vectors)
  vectors, indices, loss = quantised[0]
  for more, _, of_stage in quantised[1:]:
    vectors, loss = vectors + more, loss + of_stage
  if len(books) > 1:
    indices = jnp.concatenate([found for _, found, _ in quantised])
  codes = books[0]
  class_token = direction.reshape(*direction.shape[:2], *x.shape[:-1])
  class_token = class_token[..., 0] if x.ndim == 3 else class_token
  if row_ranges is not None:
    parts = [class_token[..., start:stop] for start, stop in row_ranges]
    class_token = split_over_devices(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1))
  if spec.detach_similarity:
    class_token = jax.lax.stop_gradient(class_token)
  similarity = jnp.moveaxis(similarities(class_token, codes, distance=spec.distance), 2, 0)
  through = THROUGH[spec.gradient]
  back = None if matrix is None else matrix.T
  return (_rotated(through(z, vectors), back), _rotated(z, back), indices, similarity, loss), tuple(assigned)


def _mean_square(x, weights):
  if weights is None:
    return jnp.mean(x * x)
  total = jnp.sum(weights) * x.shape[0] * x.shape[1]
  x = jnp.where(weights > 0, x, 0.0)
  return jnp.sum(x * x) / jnp.maximum(total, 1.0)


def _advance(state, parts, rng, spec):
  """The codebook after a batch. parts: of each modality, its segments by stage."""
  codes, found = jax.lax.stop_gradient(state.codes), []
  for stage, book in enumerate(codes if spec.stages > 1 else [codes]):
    of_stage, key = [part[stage] for part in parts], jax.random.fold_in(rng, stage) if stage else rng
    counts, sums = statistics(of_stage, book.shape[-2], spec.positions == "own")
    found.append((counts, sums, draw_candidates(spec.revive, key, of_stage, book, distance=spec.distance)))
  counts, sums, candidates = jax.tree.map(lambda *x: jnp.stack(x), *found) if spec.stages > 1 else found[0]
  frozen = jax.tree.map(jax.lax.stop_gradient, state)
  return cb.advance(
    frozen, counts, sums, candidates, decay=spec.decay, eps=spec.eps, revive_mode=spec.revive_mode, ema=spec.ema
  )


def _output(x, quantised, spec):
  """Puts the quantised parts of one modality back together."""
  lead, n = x.shape[:-1], np.prod(x.shape[:-1], dtype=int)
  (shared, query, indices_shared, similarity_shared, loss), specific_part = quantised
  if specific_part is None:
    specific = jnp.zeros((0, 1, n), jnp.float32)
    indices_specific, similarity_specific = jnp.zeros((0, n), jnp.int32), jnp.zeros((x.shape[0], 0, 0), jnp.float32)
  else:
    specific, _, indices_specific, similarity_specific, specific_loss = specific_part
    loss = loss + specific_loss

  def rows(segments):
    if not segments.size:
      return jnp.zeros((*lead, 0), jnp.float32)
    return transposed(segments.reshape(-1, n)).reshape(*lead, -1)

  shared_rows, specific_rows = rows(shared), rows(specific)
  if spec.layout == "interleaved" and specific_part is not None:
    full = rows(jnp.concatenate([shared, specific], axis=1))
  else:
    full = jnp.concatenate([shared_rows, specific_rows], axis=-1)
  return ModalityOutput(
    shared=unit(shared_rows),
    specific=unit(specific_rows),
    full=unit(full),
    query=unit(rows(query)),
    indices_shared=indices_shared.T.reshape(*lead, -1),
    indices_specific=indices_specific.T.reshape(*lead, indices_specific.shape[0]),
    similarity_shared=similarity_shared,
    similarity_specific=similarity_specific,
    commitment=loss,
  )

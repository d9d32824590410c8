"""CodeBind (arXiv 2605.18257): a shared and modality-specific compositional codebooks; the stage chooses the terms."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from codebind_jax.codebook import CodebookState
from codebind_jax.codebook.rotation import orthogonal, reflections
from codebind_jax.codebook.spec import SHARED, Codebook
from codebind_jax.compositional import (
  CompositionalSpec,
  ModalityOutput,
  init_codebooks,
  new_codebooks,
  quantize_modalities,
  start_rotations,
)
from codebind_jax.methods import base
from codebind_jax.methods.base import EXTRA, Forward, Rows, Term, output
from codebind_jax.methods.codebind_terms import TERMS, Quantised
from codebind_jax.models.towers import CodeBind, ModelSpec, decode, target_of
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.schema import DERIVED
from codebind_jax.stages import Stage

START_ITERATIONS, START_SEGMENTS = 25, 1 << 20  # of k-means over `config.codebook.start_rows` training rows

@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Losses of `config.stages.*.losses` on the quantiser's outputs, with the codebooks of `config.codebook`.

  Attributes:
    spec: of the quantiser; None compares the features without quantisation.
    update: of the codebooks, `snapshot` or `sequential` (the release).
    rotated: every part is turned by a learned rotation (parameters `method/rotation/CODEBOOK`).
    begins: how codes start, `config.codebook.start`.
    rows: training rows for that, `config.codebook.start_rows`.
    first_token: a start from the first batch sees class tokens alone.

  Codes that are parameters (`spec.ema` off) stay in the codebooks. The parameters `method/codes/NAME` are what the
  optimizer adds to them in a step, and are 0 between steps.
  """

  STAGE_KEYS = frozenset((
    "losses", "codes", "code_rows", "matching_temperature", "scale_inside_cosine", "double_softmax", "chunk", "ring",
  ))  # fmt: skip

  spec: CompositionalSpec | None = dataclasses.field(default=None, metadata=DERIVED)
  update: str = dataclasses.field(default="snapshot", metadata=DERIVED)
  rotated: bool = dataclasses.field(default=False, metadata=DERIVED)
  begins: str = dataclasses.field(default="batch", metadata=DERIVED)
  rows: int = dataclasses.field(default=0, metadata=DERIVED)
  first_token: bool = dataclasses.field(default=False, metadata=DERIVED)

  @classmethod
  def build(
    cls, options: Mapping[str, Any], model: CodeBind, towers: ModelSpec, codebook: Codebook, stages: Sequence[Stage]
  ) -> Method:
    """The method with the quantiser of the section `codebook`; it has no options of its own."""
    spec = codebook.spec(towers.shared_dim, towers.specific_dims) if towers.quantize else None
    rotated = spec is not None and codebook.rotation == "learned"
    return cls(
      model, spec, codebook.update_mode, rotated, codebook.start, codebook.start_rows, codebook.first_token
    )

  @property
  def codebook_sizes(self) -> dict[str, int]:
    """The shared codebook, and one for every modality with a specific part."""
    if self.spec is None:
      return {}
    sizes = {"shared": self.spec.num_codes[0]} | dict(self.spec.num_specific_codes)
    return {name: size * math.prod(self._lead(name)) for name, size in sizes.items()}

  def _lead(self, book: str) -> tuple[int, ...]:
    """Leading axes of a codebook's arrays."""
    if book == SHARED:
      return self.spec.lead(self.spec.shared_dim // self.spec.code_dims[0])
    return self.spec.lead(max(self.spec.specific_width(book) // self.spec.specific_code_dim(book), 1))

  def numbered(self, book: str, indices: Int[Any, "*lead _"]) -> Int[Any, "*lead _"]:
    """Codes by number among those of all stages and positions that have codebooks of their own."""
    tables = math.prod(self._lead(book)) if self.spec else 1
    if tables == 1 or not indices.shape[-1]:
      return indices
    table = np.arange(indices.shape[-1], dtype=np.int32) * tables // indices.shape[-1]
    return indices + table * np.int32(self.codebook_sizes[book] // tables)

  def init(self, rng: Any, features: Mapping[str, Array], inputs: Mapping[str, Array], towers: Any) -> tuple:
    """Random codebooks, rotations that turn nothing, steps of codes that are parameters, if any, and no aux."""
    if self.spec is None:
      return {}, {}, {}
    codebooks, extra = new_codebooks(rng, self.spec, self.model.towers), {}
    if self.rotated:
      books = {name: book for m in self.model.towers for name, book in self.spec.books(m).items()}
      extra["rotation"] = {name: jnp.eye(dim * count) for name, (_, dim, count) in books.items()}
    if not self.spec.ema:
      extra["codes"] = {name: jnp.zeros_like(book.codes) for name, book in codebooks.items()}
    return extra, codebooks, {}

  def frozen_paths(self, stage: Stage) -> tuple[str, ...]:
    """The rotations of codebooks that the stage does not train."""
    if not self.rotated:
      return ()
    return tuple(f"{base.EXTRA}/rotation/{re.escape(name)}" for name in self.codebook_sizes if not _trains(stage, name))

  def rotations(self, params: Any) -> dict[str, Float[Array, "w _w"]]:
    """Codebook name -> its rotation."""
    return {name: orthogonal(x) for name, x in params[base.EXTRA]["rotation"].items()} if self.rotated else {}

  def trained_paths(self, stage: Stage) -> tuple[str, ...]:
    """The codes that the stage trains, where they are parameters."""
    if self.spec is None or self.spec.ema:
      return ()
    return tuple(f"{EXTRA}/codes/(?:{pattern})" for pattern in stage.codes)

  def settled(self, params: Any, codebooks: Any) -> tuple[Any, Any]:
    """The optimizer's steps of the codes go into the codebooks."""
    if self.spec is None or self.spec.ema:
      return params, codebooks
    steps = params[EXTRA]["codes"]
    moved = {name: book.replace(codes=book.codes + steps[name]) for name, book in codebooks.items()}
    return params | {EXTRA: params[EXTRA] | {"codes": jax.tree.map(jnp.zeros_like, steps)}}, moved

  def start_codebooks(self, forward: Forward, state: TrainState, rng: Any) -> Any:
    """k-means of all tokens of the batch for those codebooks that no earlier stage has initialised."""
    if self.spec is None:
      return state.codebooks
    started = init_codebooks(
      rng, forward.features, state.codebooks, self.spec, first_token=self.first_token, masks=forward.masks,
      rotations=self.rotations(state.params),
    )  # fmt: skip
    return {name: _unless_started(old, old, started[name]) for name, old in state.codebooks.items()}

  @property
  def start_rows(self) -> int:
    """`config.codebook.start_rows`, unless codes start from the first batch."""
    return self.rows if self.spec and self.begins != "batch" else 0

  def start(
    self, extra: Any, codebooks: Any, features: Mapping[str, Array], masks: Mapping[str, Array], rng: Any
  ) -> tuple[Any, Any]:
    """k-means of all rows' tokens, after a rotation by OPQ if so set, for codebooks that are not yet initialised."""
    if self.begins == "opq":
      found = start_rotations(jax.random.fold_in(rng, 1), features, codebooks, self.spec, masks=masks)
      old = extra["rotation"]
      turned = {name: _unless_started(codebooks[name], old[name], reflections(x)) for name, x in found.items()}
      extra = extra | {"rotation": old | turned}
    started = init_codebooks(
      rng, features, codebooks, self.spec, iterations=START_ITERATIONS, max_segments=START_SEGMENTS, masks=masks,
      rotations=self.rotations({base.EXTRA: extra}),
    )  # fmt: skip
    return extra, {name: _unless_started(old, old, started[name]) for name, old in codebooks.items()}

  def weights(self, stage: Stage) -> dict[str, float]:
    """The stage's weights that are not 0."""
    return {name: weight for name, weight in stage.losses.items() if weight}

  def terms(self, stage: Stage) -> dict[str, Term]:
    """The stage's terms whose weight is not 0."""
    return {name: TERMS[name] for name in self.weights(stage)}

  def observe(self, forward: Forward, state: TrainState, rng: Any, stage: Stage) -> tuple[dict[str, Rows], Any, Any]:
    """Quantises all modalities of all sources, and updates those codebooks that the stage trains."""
    outputs = plain = self.plain_outputs(forward.features)
    before, ranges = state.codebooks, {}
    if self.spec is not None and not self.spec.ema:
      steps = forward.params[EXTRA]["codes"]
      before = {name: book.replace(codes=book.codes + steps[name]) for name, book in before.items()}
    codebooks = before
    if self.spec is not None:
      code_rows = stage.code_rows if {"code_contrast", "code_matching"} & set(self.weights(stage)) else 1
      ranges = similarity_ranges(forward, code_rows)
      outputs, codebooks = quantize_modalities(
        forward.features, codebooks, self.spec, update=self.update, rng=jax.random.split(rng)[1], masks=forward.masks,
        similarity_rows={m: tuple(ranges[owner] for owner in ranges if owner[1] == m) for m in forward.features},
        rotations=self.rotations(forward.params),
      )  # fmt: skip
      codebooks = {name: book if _trains(stage, name) else state.codebooks[name] for name, book in codebooks.items()}
    rows, segment = forward.rows(rng, stage, state), self.spec.code_dims[0] if self.spec else 0
    decoded = functools.partial(decode, self.model, forward.params)
    target = functools.partial(target_of, self.model)
    for source, part in rows.items():
      own, own_plain = (outputs_of(source, x, forward, ranges) for x in (outputs, plain))
      codes: dict[str, list[Any]] = {}
      for m, out in own.items() if self.spec else ():
        codes.setdefault("shared", []).append((self.numbered("shared", out.indices_shared), part.masks[m]))
        if out.indices_specific.size:
          codes[m] = [(self.numbered(m, out.indices_specific), part.masks[m])]
      rows[source] = dataclasses.replace(
        part, made=Quantised(own, own_plain, segment, decoded, target), codes=codes,
        groups=None if stage.unique_labels else part.groups,
        codebooks=before,
      )  # fmt: skip
    return rows, codebooks, state.aux

  def embed(self, params: Any, codebooks: Any, features: Mapping[str, Array]) -> dict[str, ModalityOutput]:
    """The quantiser's outputs without similarities, which only losses use and which would cost the most."""
    if self.spec is None:
      return self.plain_outputs(features)
    no_rows = dict.fromkeys(features, ((0, 0),))
    return quantize_modalities(
      features, codebooks, self.spec, update="none", similarity_rows=no_rows, rotations=self.rotations(params)
    )[0]

  def plain_outputs(self, features: Mapping[str, Float[Array, "b n d"]]) -> dict[str, ModalityOutput]:
    """The features, split and normalised as the quantiser's outputs are."""
    return {m: output(self.shared(m, x), self.specific(m, x)) for m, x in features.items()}

  def restore(self, codebooks: Mapping[str, Mapping[str, Any]]) -> dict[str, CodebookState]:
    """`CodebookState`s."""
    return {name: CodebookState(**state) for name, state in codebooks.items()}


def _trains(stage: Stage, book: str) -> bool:
  """Whether a stage trains a codebook."""
  return any(re.fullmatch(pattern, book) for pattern in stage.codes)


def _unless_started(book: CodebookState, old: Any, new: Any) -> Any:
  """The old arrays of what belongs to a codebook that an earlier stage or run has initialised, else the new ones."""
  return jax.tree.map(lambda a, b: jnp.where(book.initialised, a, b), old, new)


def similarity_ranges(forward: Forward, code_rows: int) -> dict[tuple[str, str], tuple[int, int]]:
  """(source, modality) -> range of rows whose similarities to the codes are computed: the first `code_rows`, or all."""
  return {
    owner: (rows.start, min(rows.start + code_rows, rows.stop) if code_rows else rows.stop)
    for owner, rows in forward.owners.items()
  }  # fmt: skip


def outputs_of(
  source: str, outputs: Mapping[str, ModalityOutput], forward: Forward,
  ranges: Mapping[tuple[str, str], tuple[int, int]],
) -> dict[str, ModalityOutput]:
  """One source's rows of outputs, and the similarities of its range; scalars (commitment) are common to all sources."""
  selected, offsets = {}, dict.fromkeys(outputs, 0)
  for (owner, name), rows in forward.owners.items():
    start, stop = ranges.get((owner, name), (0, 0))
    at = slice(offsets[name], offsets[name] + stop - start)
    offsets[name] = at.stop
    if owner == source:
      part = jax.tree.map(lambda x, rows=rows: x[rows] if x.ndim else x, outputs[name])
      selected[name] = part.replace(
        similarity_shared=outputs[name].similarity_shared[at], similarity_specific=outputs[name].similarity_specific[at]
      )
  return selected

"""CodeBind (arXiv 2605.18257): a shared and modality-specific compositional codebooks; the stage chooses the terms."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from codebind_jax.codebook import CodebookState
from codebind_jax.codebook.spec import Codebook
from codebind_jax.compositional import (
  CompositionalSpec,
  ModalityOutput,
  init_codebooks,
  new_codebooks,
  quantize_modalities,
)
from codebind_jax.methods import base
from codebind_jax.methods.base import EXTRA, Forward, Rows, Term, output
from codebind_jax.methods.codebind_terms import TERMS, Quantised
from codebind_jax.models.encoder import normalised
from codebind_jax.models.towers import CodeBind, ModelSpec, decode
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.schema import DERIVED
from codebind_jax.stages import Stage


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Losses of `config.stages.*.losses` on the quantiser's outputs, with the codebooks of `config.codebook`.

  Attributes:
    spec: of the quantiser; None compares the features without quantisation.
    update: of the codebooks, `snapshot` or `sequential` (the release).
    first_token: the first k-means sees class tokens alone.

  Codes that are parameters (`spec.ema` off) stay in the codebooks. The parameters `method/codes/NAME` are what the
  optimizer adds to them in a step, and are 0 between steps.
  """

  STAGE_KEYS = frozenset((
    "losses", "codes", "code_rows", "matching_temperature", "scale_inside_cosine", "double_softmax", "chunk", "ring",
  ))  # fmt: skip

  spec: CompositionalSpec | None = dataclasses.field(default=None, metadata=DERIVED)
  update: str = dataclasses.field(default="snapshot", metadata=DERIVED)
  first_token: bool = dataclasses.field(default=False, metadata=DERIVED)

  @classmethod
  def build(
    cls, options: Mapping[str, Any], model: CodeBind, towers: ModelSpec, codebook: Codebook, stages: Sequence[Stage]
  ) -> Method:
    """The method with the quantiser of the section `codebook`; it has no options of its own."""
    spec = codebook.spec(towers.shared_dim, towers.specific_dims) if towers.quantize else None
    return cls(model, spec, codebook.update_mode, codebook.first_token)

  @property
  def codebook_sizes(self) -> dict[str, int]:
    """The shared codebook, and one for every modality with a specific part."""
    if self.spec is None:
      return {}
    return {"shared": self.spec.num_codes[0]} | dict(self.spec.num_specific_codes)

  def init(self, rng: Any, features: Mapping[str, Array], inputs: Mapping[str, Array], towers: Any) -> tuple:
    """Random codebooks, and the steps of those codes that are parameters; no aux."""
    books = new_codebooks(rng, self.spec, self.model.towers) if self.spec else {}
    trained = {"codes": {name: jnp.zeros_like(book.codes) for name, book in books.items()}}
    return trained if books and not self.spec.ema else {}, books, {}

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
      rng, forward.features, state.codebooks, self.spec, first_token=self.first_token, masks=forward.masks
    )
    choose = lambda old, new: jax.tree.map(lambda a, b: jnp.where(old.initialised, a, b), old, new)
    return {name: choose(old, started[name]) for name, old in state.codebooks.items()}

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
      )  # fmt: skip
      trains = lambda name: any(re.fullmatch(pattern, name) for pattern in stage.codes)
      codebooks = {name: book if trains(name) else state.codebooks[name] for name, book in codebooks.items()}
    rows, segment = forward.rows(rng, stage, state), self.spec.code_dims[0] if self.spec else 0
    decoded = functools.partial(decode, self.model, forward.params)
    target = lambda name, x: normalised(self.model.trunk_of(name).spec, x)
    for source, part in rows.items():
      own, own_plain = (outputs_of(source, x, forward, ranges) for x in (outputs, plain))
      codes: dict[str, list[Any]] = {}
      for m, out in own.items() if self.spec else ():
        codes.setdefault("shared", []).append((out.indices_shared, part.masks[m]))
        if out.indices_specific.size:
          codes[m] = [(out.indices_specific, part.masks[m])]
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
    return quantize_modalities(features, codebooks, self.spec, update="none", similarity_rows=no_rows)[0]

  def plain_outputs(self, features: Mapping[str, Float[Array, "b n d"]]) -> dict[str, ModalityOutput]:
    """The features, split and normalised as the quantiser's outputs are."""
    return {m: output(self.shared(m, x), self.specific(m, x)) for m, x in features.items()}

  def restore(self, codebooks: Mapping[str, Mapping[str, Any]]) -> dict[str, CodebookState]:
    """`CodebookState`s."""
    return {name: CodebookState(**state) for name, state in codebooks.items()}


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

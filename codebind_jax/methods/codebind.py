"""CodeBind (arXiv 2605.18257): shared and modality-specific compositional codebooks, terms chosen by the stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from codebind_jax import build
from codebind_jax.codebook import CodebookState
from codebind_jax.compositional import CompositionalSpec, init_codebooks, new_codebooks
from codebind_jax.losses import balance_init
from codebind_jax.methods.base import Recipe
from codebind_jax.models.towers import CodeBind
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.stages import Stage, stages_of
from codebind_jax.step import balanced_terms, make_embed_step, make_train_step, merge_sources


@dataclasses.dataclass(frozen=True)
class Method(Recipe):
  """The loss is `config.stages.*.losses`, the codebooks `config.codebook`; without quantiser it is plain InfoNCE.

  Attributes:
    spec: of the quantiser; None for none.
    update: of the codebooks, `snapshot` or `sequential`.
    balanced: terms whose weights the loss balancer sets in some stage.
  """

  spec: CompositionalSpec | None = None
  update: str = "snapshot"
  balanced: tuple[str, ...] = ()

  @classmethod
  def build(cls, config: Any, model: CodeBind, options: Mapping[str, Any]) -> Method:
    """From `config.codebook`; it has no options of its own.

    Raises:
      ValueError: if options are given.
    """
    if options:
      raise ValueError(f"config.method_options: 'codebind' has none, got {sorted(options)}; see config.codebook")
    terms = balanced_terms(stages_of(config))
    return cls(model, build.make_spec(config), config.codebook.update_mode, terms)

  @property
  def codebook_sizes(self) -> dict[str, int]:
    """Shared, and of every modality with a specific part."""
    if self.spec is None:
      return {}
    return {"shared": self.spec.num_codes[0]} | dict(self.spec.num_specific_codes)

  def init(self, rng: Any, features: Any, tokens: Any, towers: Any) -> tuple:
    """Codebooks of random codes, and the loss balancer where a stage has it."""
    aux = {"balance": balance_init(list(self.balanced))} if self.balanced else {}
    return {}, new_codebooks(rng, self.spec, self.model.towers) if self.spec else {}, aux

  def start(self, state: TrainState, batch: Mapping[str, Any]) -> Any:
    """k-means start, from all tokens of the batch, of the codebooks that no earlier stage has filled."""
    if self.spec is None:
      return state.codebooks
    tokens, masks, _ = merge_sources(batch)
    features, _ = self.model.apply({"params": state.params}, tokens)
    rng = jax.random.fold_in(state.rng, 2**31 - 1)
    started = init_codebooks(rng, features, state.codebooks, self.spec, masks=masks)
    keep = lambda old, new: jax.tree.map(lambda a, b: jnp.where(old.initialised, a, b), old, new)
    return {name: keep(old, started[name]) for name, old in state.codebooks.items()}

  def train_step(self, stage: Stage, tx: Any, frozen: frozenset[str] = frozenset()) -> Callable[..., Any]:
    """`step.make_train_step`."""
    return make_train_step(self.model, self.spec, stage, tx, update=self.update, frozen=frozen)

  def embed_step(self) -> Callable[..., Any]:
    """`step.make_embed_step`."""
    return make_embed_step(self.model, self.spec)

  def restore(self, codebooks: Mapping[str, Mapping[str, Any]]) -> dict[str, CodebookState]:
    """`CodebookState`s."""
    return {name: CodebookState(**state) for name, state in codebooks.items()}

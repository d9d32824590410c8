"""What a method is: how its state begins, its loss on a batch, and what it gives as an embedding.

A method is a frozen dataclass in a module of its own here, called `Method`; its fields are its options, and
`config.method` names the module. Most are a `SourceRecipe`, which asks for a loss
alone. Towers, data, optimizer, trainer, checkpoints and evaluation are everyone's.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from codebind_jax import methods
from codebind_jax.build import make_model
from codebind_jax.codebook import usage_stats
from codebind_jax.codebook.segments import code_counts
from codebind_jax.compositional import ModalityOutput
from codebind_jax.models.towers import CodeBind
from codebind_jax.norm import unit
from codebind_jax.runtime import optim
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.stages import Stage
from codebind_jax.step import merge_sources

_NOT_METHODS = ("base", "toc", "unified")
EXTRA = "method"  # where parameters that only the method has live, beside the towers'


def method_names() -> list[str]:
  """Values that `config.method` can have."""
  return sorted(m.name for m in pkgutil.iter_modules(methods.__path__) if m.name not in _NOT_METHODS)


def make_method(config: Any) -> Recipe:
  """The method that `config.method` names, with `config.method_options`.

  Raises:
    ValueError: if there is none, or it has no such option.
  """
  if config.method not in method_names():
    raise ValueError(f"config.method: got {config.method!r}; allowed: {method_names()}")
  kind = importlib.import_module(f"codebind_jax.methods.{config.method}").Method
  return kind.build(config, make_model(config), _hashable(config.method_options.to_dict()))


def make_init(
  method: Recipe, shapes: Mapping[str, tuple[int, int]], half: Sequence[str] = ()
) -> Callable[[Any], tuple]:
  """Key -> (params, codebooks, aux), pure: the random start of a run, for `state.create`.

  Args:
    method: of the run.
    shapes: modality -> (tokens, width) of one item.
    half: regexes of paths of parameters that are kept in bfloat16 (frozen encoders).
  """

  def keep(path: Any, x: Any) -> Any:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return x.astype(jnp.bfloat16) if any(re.fullmatch(pattern, name) for pattern in half) else x

  def init(rng: Any) -> tuple[Any, Any, Any]:
    head_rng, code_rng = jax.random.split(rng)
    dummy = {name: jnp.zeros((1, *shape), jnp.float32) for name, shape in shapes.items()}
    towers = method.model.init(head_rng, dummy)["params"]
    features, _ = method.model.apply({"params": towers}, dummy)
    extra, codebooks, aux = method.init(code_rng, features, dummy, towers)
    params = towers | ({EXTRA: extra} if extra else {})
    return jax.tree_util.tree_map_with_path(keep, params), codebooks, aux

  return init


def _hashable(value: Any) -> Any:
  """Lists as tuples, also within; a config read from JSON has lists."""
  if isinstance(value, Mapping):
    return {key: _hashable(item) for key, item in value.items()}
  return tuple(_hashable(item) for item in value) if isinstance(value, list | tuple) else value


@dataclasses.dataclass(frozen=True)
class Rows:
  """One source's rows of a batch, as a loss sees them.

  Attributes:
    tokens: modality -> trunk tokens [b, n, c].
    features: modality -> heads' output [b, n, d]; the shared part first.
    masks: modality -> rows that have it.
    groups: int [b], equal for rows of one label, in this and any other batch; different in every source.
    temperature: of InfoNCE, after the logit scales.
    params: all parameters; the method's own under `EXTRA`.
    stage: the stage.
    rng: key of this source's draws in this step.
    together: the modalities of each source of the batch.
  """

  tokens: Mapping[str, Float[Array, "b n _"]]
  features: Mapping[str, Float[Array, "b n _"]]
  masks: Mapping[str, Bool[Array, "b"]]
  groups: Int[Array, "b"]
  temperature: Float[Array, ""]
  params: Any
  stage: Stage
  rng: Any
  together: tuple[tuple[str, ...], ...] = ()

  def groups_of(self, *modalities: str) -> Int[Array, "b"] | None:
    """The rows' groups where text is among the modalities, for one caption fits every row of a label; else None.

    Two items of a label are told apart by their sensors, so that there they are each other's negatives.
    """
    return self.groups if "text" in modalities else None


@dataclasses.dataclass(frozen=True)
class Loss:
  """What a method makes of one source's rows.

  Attributes:
    terms: name -> value; the loss is their sum, weighted by `Recipe.weights`.
    codebooks: after the rows.
    aux: likewise.
    indices: codebook name -> codes the rows chose, for the usage statistics.
  """

  terms: Mapping[str, Float[Array, ""]]
  codebooks: Any
  aux: Any
  indices: Mapping[str, Int[Array, "..."]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Recipe(abc.ABC):
  """What the trainer asks of a method over the towers of `model`; hashable, so that compiled steps can be shared."""

  model: CodeBind

  @classmethod
  def build(cls, config: Any, model: CodeBind, options: Mapping[str, Any]) -> Recipe:
    """The method of a config; options are its fields.

    Raises:
      ValueError: for an option there is not.
    """
    allowed = sorted(f.name for f in dataclasses.fields(cls) if f.name != "model")
    for option in options:
      if option not in allowed:
        raise ValueError(f"config.method_options: {config.method!r} has no option {option!r}; allowed: {allowed}")
    return cls(model=model, **options)

  @property
  def codebook_sizes(self) -> Mapping[str, int]:
    """Codebook name -> codes, for the usage statistics; the shared one is called `shared`."""
    return {}

  def init(self, rng: Any, features: Mapping[str, Array], tokens: Mapping[str, Array], towers: Any) -> tuple:
    """(extra parameters, codebooks, aux) at the start.

    Args:
      rng: typed key.
      features: one row of every modality's heads' output.
      tokens: one row of every modality's tokens.
      towers: the towers' parameters.
    """
    return {}, {}, {}

  @abc.abstractmethod
  def start(self, state: TrainState, batch: Mapping[str, Any]) -> Any:
    """The codebooks as a stage begins, given its first batch."""

  @abc.abstractmethod
  def train_step(
    self, stage: Stage, tx: optax.GradientTransformation, frozen: frozenset[str] = frozenset()
  ) -> Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, dict[str, Array]]]:
    """The step of a stage: (state, batch) -> (state, metrics), with batches as `step.make_train_step` has them."""

  @abc.abstractmethod
  def embed_step(self) -> Callable[..., dict[str, ModalityOutput]]:
    """(params, codebooks, tokens) -> modality -> outputs; changes no state."""

  def restore(self, codebooks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Codebook states from the nested arrays of a checkpoint."""
    return dict(codebooks)


@dataclasses.dataclass(frozen=True)
class SourceRecipe(Recipe):
  """A method whose loss is taken of each source's rows by themselves; what it says is that loss."""

  @property
  def weights(self) -> Mapping[str, float]:
    """Weight of each term; 1 where not named."""
    return {}

  def start(self, state: TrainState, batch: Mapping[str, Any]) -> Any:
    """The codebooks as a stage begins, given its first batch: at the start of a run those that `first` makes."""
    tokens, masks, _ = merge_sources(batch)
    features, _ = self.model.apply({"params": state.params}, tokens)
    made = self.first(state.params, state.codebooks, features, masks, jax.random.fold_in(state.rng, 2**31 - 1))
    return jax.tree.map(lambda old, new: jnp.where(state.step == 0, new, old), state.codebooks, made)

  def first(
    self, params: Any, codebooks: Any, features: Mapping[str, Array], masks: Mapping[str, Array], rng: Any
  ) -> Any:
    """The codebooks after having seen the features of the first batch (k-means, say)."""
    return codebooks

  def before(self, params: Any, aux: Any) -> Any:
    """`aux` at the beginning of a step, before any loss (a teacher's update)."""
    return aux

  def kept(self, updates: Any) -> Any:
    """The updates of the parameters, without those of what the method leaves as it is."""
    return updates

  @abc.abstractmethod
  def loss(self, rows: Rows, codebooks: Any, aux: Any) -> Loss:
    """The terms of one source's rows."""

  def embed(self, params: Any, codebooks: Any, features: Mapping[str, Array]) -> dict[str, ModalityOutput]:
    """What the method gives as embeddings: by default the heads' output, split and normalised."""
    return {m: output(self.shared(m, x), self.specific(m, x)) for m, x in features.items()}

  def shared(self, modality: str, x: Float[Array, "b n d"]) -> Float[Array, "b n s"]:
    """The shared part of a modality's heads' output."""
    return x[..., : self.model.towers[modality].shared_dim]

  def specific(self, modality: str, x: Float[Array, "b n d"]) -> Float[Array, "b n p"]:
    """The specific part."""
    return x[..., self.model.towers[modality].shared_dim :]

  def embeddings(self, rows: Rows) -> dict[str, Float[Array, "b s"]]:
    """Unit vectors of the class tokens' shared parts."""
    return {m: unit(self.shared(m, x)[:, 0]) for m, x in rows.features.items()}

  def train_step(
    self, stage: Stage, tx: optax.GradientTransformation, frozen: frozenset[str] = frozenset()
  ) -> Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, dict[str, Array]]]:
    """The step of a stage: (state, batch) -> (state, metrics), with batches as `step.make_train_step` has them.

    Each source is a batch of its own; their losses are averaged by the sources' weights, and what a source changes in
    codebooks and aux is what the next one finds. No gradient is computed for parameters at the `frozen` paths.

    Raises:
      ValueError: if the stage asks for a batch in parts or a ring, which only `codebind` has.
    """
    if stage.parts != 1 or stage.ring or stage.chunk:
      raise ValueError(f"config.stages.{stage.name}: parts, ring and chunk are for method 'codebind' alone")

    def loss_fn(params: Any, state: TrainState, batch: Mapping[str, Any], rng: Any):
      params = optim.stop_frozen(params, frozen)
      codebooks, aux = state.codebooks, self.before(params, state.aux)
      share = {source: stage.weights.get(source, 1.0) for source in batch}
      together = tuple(tuple(sorted(content["_mask"])) for content in batch.values())
      terms: dict[str, Array] = {}
      indices: dict[str, list[Array]] = {}
      for number, (source, content) in enumerate(batch.items()):
        drop_rng, rows_rng = jax.random.split(jax.random.fold_in(rng, number))
        tokens = {m: content[m] for m in content["_mask"]}
        features, scales = self.model.apply({"params": params}, tokens, train=True, rngs={"dropout": drop_rng})
        scale = jnp.exp(2 * sum(jnp.log(scales[m]) for m in tokens) / len(tokens))
        groups = content["_group"] * len(batch) + number
        rows = Rows(tokens, features, content["_mask"], groups, stage.temperature / scale, params, stage, rows_rng,
                    together)  # fmt: skip
        found = self.loss(rows, codebooks, aux)
        codebooks, aux = found.codebooks, found.aux
        for name, value in found.terms.items():
          terms[name] = terms.get(name, 0.0) + value * (share[source] / sum(share.values()))
        for name, codes in found.indices.items():
          indices.setdefault(name, []).append(codes.reshape(-1))
      total = sum(self.weights.get(name, 1.0) * value for name, value in terms.items())
      return total, jax.lax.stop_gradient((terms, indices, codebooks, aux))

    def step(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, dict[str, Array]]:
      rng = jax.random.fold_in(state.rng, state.step)
      (total, (terms, indices, codebooks, aux)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params, state, batch, rng
      )
      updates, opt_state = tx.update(grads, state.opt_state, state.params)
      updates = self.kept(updates)
      metrics = {f"train/{name}": value for name, value in terms.items()}
      metrics |= {"train/total": total, "train/gradient_norm": optax.global_norm(grads)}
      for name, parts in indices.items():
        size = codebooks[name].codes.shape[0] if name in codebooks else state.params[EXTRA]["codes"].shape[0]
        counts = code_counts(jnp.concatenate(parts), size)
        metrics |= {f"codebook/{name}/{key}": value for key, value in usage_stats(counts).items()}
      state = state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates),
                            codebooks=codebooks, opt_state=opt_state, aux=aux)  # fmt: skip
      return state, metrics

    return step

  def embed_step(self) -> Callable[..., dict[str, ModalityOutput]]:
    """(params, codebooks, tokens) -> modality -> outputs; changes no state."""

    def embed(params: Any, codebooks: Any, tokens: Mapping[str, Array]) -> dict[str, ModalityOutput]:
      features, _ = self.model.apply({"params": params}, tokens)
      return self.embed(params, codebooks, features)

    return embed


def output(
  shared: Float[Array, "b n s"], specific: Float[Array, "b n p"], indices: Int[Array, "b n q"] | None = None,
  indices_specific: Int[Array, "b n r"] | None = None,
) -> ModalityOutput:
  """A modality's output from plain vectors and the codes, if any, of each token."""
  none = jnp.zeros((*shared.shape[:-1], 0), jnp.int32)
  no_similarity = jnp.zeros((shared.shape[0], 0, 0), jnp.float32)
  return ModalityOutput(
    shared=unit(shared), specific=unit(specific), full=unit(jnp.concatenate([shared, specific], axis=-1)),
    indices_shared=none if indices is None else indices,
    indices_specific=none if indices_specific is None else indices_specific, similarity_shared=no_similarity,
    similarity_specific=no_similarity, commitment=jnp.zeros((), jnp.float32),
  )  # fmt: skip


def present(masks: Mapping[str, Bool[Array, "b"]], a: str, b: str) -> Bool[Array, "b"]:
  """Rows that have both modalities."""
  return masks[a] & masks[b]

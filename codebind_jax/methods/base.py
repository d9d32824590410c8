"""The interface of a training method: its initial state, what it computes from a batch, its loss terms, its embeddings.

A method is a frozen dataclass called `Method` in a module of its own; its fields are its options. `config.method` names
a module of this package, or any importable module by its dotted path. `step.make_train_step` trains every method.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from codebind_jax import methods, schema
from codebind_jax.codebook.spec import Codebook
from codebind_jax.compositional import ModalityOutput
from codebind_jax.losses import balance_init
from codebind_jax.models.towers import CodeBind, ModelSpec, TowerTrunk, make_model
from codebind_jax.norm import unit
from codebind_jax.runtime.train_state import TrainState
from codebind_jax.stages import DEFAULTS, Stage

_NOT_METHODS = ("base", "codebind_terms", "toc", "unified")
EXTRA = "method"  # the key of a method's own parameters, beside the towers'
# Keys of a stage that every method heeds; a method adds its own in `Method.STAGE_KEYS`.
COMMON_KEYS = frozenset((
  "name", "pairs", "sources", "weights", "unique_labels", "train", "tune", "steps", "batch_size", "learning_rate",
  "temperature", "mixup", "parts", "balance", "first_step",
))  # fmt: skip
T = TypeVar("T")
Term = Callable[["Rows"], Float[Array, ""]]


def method_names() -> list[str]:
  """Names of this package's methods."""
  return sorted(m.name for m in pkgutil.iter_modules(methods.__path__) if m.name not in _NOT_METHODS)


def method_class(name: str, path: str = "method") -> type[Method]:
  """The class of the method that `config.method` names.

  Args:
    name: a module of this package, or a dotted path of a module with a class `Method`.
    path: of the key, for the error.

  Raises:
    ValueError: if there is no such module, or it has no method.
  """
  if name in method_names():
    return importlib.import_module(f"{methods.__name__}.{name}").Method
  try:
    kind = importlib.import_module(name).Method if "." in name else None
  except (ImportError, AttributeError):
    kind = None
  if kind is None:
    raise ValueError(f"config.{path}: got {name!r}; allowed: {method_names()}, or a.module.path with a class Method")
  return kind


def method_options(name: str, options: Mapping[str, Any], at: str = "") -> dict[str, Any]:
  """All options of the method `name`: those of `options`, read by their types, and defaults for the others.

  Args:
    name: of the method.
    options: the options that are set.
    at: what comes before the keys of the method and its options in the config: "" or `compare.variants.NAME.`.

  Raises:
    ValueError: for an unknown method or option, or a value that the option does not allow.
  """
  kind, path = method_class(name, f"{at}method"), f"{at}options" if at else "method_options"
  allowed = sorted(schema.keys_of(kind))
  for option in options:
    if option not in allowed:
      more = "" if allowed else "; see config.codebook"
      raise ValueError(f"config.{path}: {name!r} has no option {option!r}; allowed: {allowed}{more}")
  return schema.arguments(kind, options, path)


def make_method(
  name: str, options: Mapping[str, Any], model: ModelSpec, codebook: Codebook, stages: Sequence[Stage],
  trunks: Mapping[str, TowerTrunk] | None = None,
) -> Method:
  """The method `name` over the towers of a model.

  Args:
    name: `config.method`.
    options: `config.method_options`.
    model: section of the towers; all but text have decoders if a stage has the loss `reconstruction`.
    codebook: section of the codebooks, for methods without options of their own for them.
    stages: of the run.
    trunks: of towers whose trunk runs in the model or whose head is published.

  Raises:
    ValueError: as `method_options`.
  """
  decoded = any(stage.losses.get("reconstruction") for stage in stages)
  return method_class(name).build(
    method_options(name, options), make_model(model, trunks, decoded=decoded), model, codebook, stages
  )


def unheeded(name: str) -> dict[str, Any]:
  """Key of a stage that the method `name` does not heed -> its default, which is the only value allowed."""
  heeded = COMMON_KEYS | method_class(name).STAGE_KEYS
  return {key: default for key, default in DEFAULTS.items() if key not in heeded}


def check_stage(name: str, stage: Stage) -> None:
  """Refuses a stage that sets a key which the method `name` does not heed.

  Raises:
    ValueError: naming the method and the key.
  """
  for key, default in unheeded(name).items():
    value = getattr(stage, key)
    if value != default:
      where = f"config.stages.{stage.name}.{key}"
      raise ValueError(f"{where}: got {value!r}, which method {name!r} does not heed; allowed: {default!r}")


def make_init(
  method: Method, shapes: Mapping[str, jax.ShapeDtypeStruct], half: Sequence[str] = (), stages: Sequence[Stage] = ()
) -> Callable[[Any], tuple]:
  """A pure function, key -> (params, codebooks, aux) at the start of a run, for `train_state.create`.

  Args:
    method: of the run.
    shapes: modality -> shape and type of one item, the tower's input.
    half: regexes of the paths of parameters stored in bfloat16 (frozen encoders).
    stages: of the run; those that balance their terms share one balancer in `aux`.
  """

  def stored(path: Any, x: Any) -> Any:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return x.astype(jnp.bfloat16) if any(re.fullmatch(pattern, name) for pattern in half) else x

  def init(rng: Any) -> tuple[Any, Any, Any]:
    head_rng, code_rng = jax.random.split(rng)
    dummy = {name: jnp.zeros((1, *item.shape), item.dtype) for name, item in shapes.items()}
    towers = method.model.init(head_rng, dummy)["params"]
    features, _ = method.model.apply({"params": towers}, dummy)
    extra, codebooks, aux = method.init(code_rng, features, dummy, towers)
    balanced = sorted({name for s in stages if s.balance for name, weight in method.weights(s).items() if weight})
    if balanced:
      fixed = (method.BASE, "reconstruction")
      aux = aux | {"balance": balance_init(balanced, base=method.BASE, fixed=fixed, factors=method.FACTORS)}
    params = towers | ({EXTRA: extra} if extra else {})
    return jax.tree_util.tree_map_with_path(stored, params), codebooks, aux

  return init


@dataclasses.dataclass(frozen=True)
class Forward:
  """The towers' inputs and outputs for a batch, the rows of all sources concatenated by modality.

  Attributes:
    params: all parameters; the method's own under `EXTRA`.
    inputs: modality -> its tower's input, after mixup: tokens [b, n, c], or prepared items.
    features: modality -> heads' output [b, n, d]; the shared part first.
    scales: modality -> logit scale [].
    masks: modality -> rows that have it, bool [b].
    owners: (source, modality) -> the source's slice of the modality's rows.
    groups: source -> int [b], equal for rows of one label, different in every source; None without labels.
    apply: (parameters of the towers, inputs, key or None) -> (features, scales), in the stage's micro-batches; a key
      turns dropout on.
    trunks: modality -> the trunk's tokens [b, n, c], where a decoder needs them.
  """

  params: Any
  inputs: Mapping[str, Shaped[Array, "..."]]
  features: Mapping[str, Float[Array, "..."]]
  scales: Mapping[str, Float[Array, ""]]
  masks: Mapping[str, Bool[Array, "_"]]
  owners: Mapping[tuple[str, str], slice]
  groups: Mapping[str, Int[Array, "_"] | None]
  apply: Callable[[Any, Mapping[str, Array], Any], tuple[dict[str, Array], dict[str, Array]]]
  trunks: Mapping[str, Float[Array, "..."]] = dataclasses.field(default_factory=dict)

  @property
  def sources(self) -> tuple[str, ...]:
    """Names of the batch's sources, in order."""
    return tuple(self.groups)

  def of(self, source: str, values: Mapping[str, T]) -> dict[str, T]:
    """One source's rows of `values`, by modality."""
    return {m: values[m][rows] for (owner, m), rows in self.owners.items() if owner == source and m in values}

  def rows(self, rng: Any, stage: Stage, state: TrainState) -> dict[str, Rows]:
    """Source -> its rows, each with a key of its own."""
    return {
      source: Rows(
        params=self.params, inputs=self.of(source, self.inputs), features=self.of(source, self.features),
        masks=self.of(source, self.masks), scales=self.scales, groups=self.groups[source], stage=stage,
        codebooks=state.codebooks, rng=jax.random.split(jax.random.fold_in(rng, number))[1],
        trunks=self.of(source, self.trunks),
      )
      for number, source in enumerate(self.sources)
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rows:
  """One source's rows of a batch, the argument of a loss term.

  Attributes:
    params: all parameters; the method's own under `EXTRA`.
    inputs: modality -> its tower's input: tokens [b, n, c], or prepared items.
    features: modality -> heads' output [b, n, d]; the shared part first.
    masks: modality -> rows that have it, bool [b].
    scales: modality -> logit scale [].
    groups: int [b], equal for rows of one label; None where no two rows of a batch share a label.
    stage: the current stage.
    codebooks: name -> state before the step's update.
    rng: key of this source's draws in this step.
    made: results of the method's `observe` that its terms need.
    codes: codebook name -> (indices [b, ...] that the rows chose, mask [b]) pairs, for the usage statistics.
    trunks: modality -> the trunk's tokens [b, n, c], where a decoder needs them.
  """

  params: Any
  inputs: Mapping[str, Shaped[Array, "b ..."]]
  features: Mapping[str, Float[Array, "b _ _"]]
  masks: Mapping[str, Bool[Array, "b"]]
  scales: Mapping[str, Float[Array, ""]]
  groups: Int[Array, "b"] | None
  stage: Stage
  codebooks: Any
  rng: Any
  made: Any = None
  codes: Mapping[str, Sequence[tuple[Int[Array, "b ..."], Bool[Array, "b"]]]] = dataclasses.field(default_factory=dict)
  trunks: Mapping[str, Float[Array, "b _ _"]] = dataclasses.field(default_factory=dict)

  @property
  def pairs(self) -> list[tuple[str, str]]:
    """The stage's pairs of which this source has both modalities."""
    return [(a, b) for a, b in self.stage.pairs if a in self.features and b in self.features]

  @property
  def temperature(self) -> Float[Array, ""]:
    """The stage's temperature, divided by the square of the modalities' geometric mean logit scale."""
    scale = jnp.exp(2 * sum(jnp.log(self.scales[m]) for m in self.features) / len(self.features))
    return self.stage.temperature / scale

  def groups_of(self, *modalities: str) -> Int[Array, "b"] | None:
    """The rows' groups if text is among the modalities, because one caption fits every row of a label; else None.

    Between sensors two items of one label differ, so that they are each other's negatives.
    """
    return self.groups if "text" in modalities else None

  def both(self, a: str, b: str) -> Bool[Array, "b"]:
    """Rows that have both modalities."""
    return self.masks[a] & self.masks[b]


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
  """Base class of the methods, over the towers of `model`; hashable, so that runs share compiled steps.

  A step calls `observe` once and each of `terms` once a source; the loss is the terms' weighted sum, averaged over the
  sources.
  """

  STAGE_KEYS = frozenset()  # keys of a stage that the method heeds beyond `COMMON_KEYS`
  BASE = "info_nce"  # the loss balancer scales the other terms relative to this one
  FACTORS = {}  # term -> magnitude relative to `BASE`, beside those of `losses.balance`

  model: CodeBind = dataclasses.field(metadata=schema.DERIVED)

  @classmethod
  def build(
    cls, options: Mapping[str, Any], model: CodeBind, towers: ModelSpec, codebook: Codebook, stages: Sequence[Stage]
  ) -> Method:
    """The method with `options` as its fields; a subclass may also use the sections of the config."""
    return cls(model=model, **options)

  @property
  def codebook_sizes(self) -> Mapping[str, int]:
    """Codebook name -> number of codes, for the usage statistics; the shared codebook's name is `shared`."""
    return {}

  @property
  def needs_tokens(self) -> str:
    """Why the towers' inputs must be tokens, not pixels or ids; "" if they need not."""
    return ""

  def frozen_paths(self, stage: Stage) -> tuple[str, ...]:
    """Regexes of parameter paths that the method does not train in a stage."""
    return ()

  def trained_paths(self, stage: Stage) -> tuple[str, ...]:
    """Regexes of parameter paths that a stage trains beside those of its `train`."""
    return ()

  def settled(self, params: Any, codebooks: Any) -> tuple[Any, Any]:
    """(params, codebooks) after the optimizer's step, where the one holds what belongs into the other."""
    return params, codebooks
  @property
  def start_rows(self) -> int:
    """Training rows whose features `start` needs; 0 if a stage's first batch is enough (`start_codebooks`)."""
    return 0

  def start(
    self, extra: Any, codebooks: Any, features: Mapping[str, Array], masks: Mapping[str, Array], rng: Any
  ) -> tuple[Any, Any]:
    """(the method's own parameters, codebooks) at a stage's start, from the features of `start_rows` training rows."""
    return extra, codebooks

  def numbered(self, book: str, indices: Int[Any, "*lead _"]) -> Int[Any, "*lead _"]:
    """The codes of a codebook by number among all that it has, 0 to `codebook_sizes[book]` - 1, for counts of use.

    Args:
      book: name of the codebook.
      indices: codes as `embed` gives them.
    """
    return indices

  def init(self, rng: Any, features: Mapping[str, Array], inputs: Mapping[str, Array], towers: Any) -> tuple:
    """(the method's own parameters, codebooks, aux) at the start of a run.

    Args:
      rng: typed key.
      features: modality -> one row of its heads' output.
      inputs: modality -> one row of its tower's input.
      towers: the towers' parameters.
    """
    return {}, {}, {}

  def start_codebooks(self, forward: Forward, state: TrainState, rng: Any) -> Any:
    """The codebooks at a stage's start, computed from its first batch (by k-means, for example)."""
    return state.codebooks

  @abc.abstractmethod
  def observe(self, forward: Forward, state: TrainState, rng: Any, stage: Stage) -> tuple[dict[str, Rows], Any, Any]:
    """The part of a step that reads or changes state: quantisation, teacher, queues, update of the codebooks.

    Returns:
      (source -> rows, whose `made` holds what the terms need; codebooks after the batch; aux after the batch).
    """

  @abc.abstractmethod
  def terms(self, stage: Stage) -> Mapping[str, Term]:
    """Name of a loss term -> pure function of one source's rows."""

  def weights(self, stage: Stage) -> Mapping[str, float]:
    """Name of a term -> its weight; a term of weight 0 is only logged."""
    return dict.fromkeys(self.terms(stage), 1.0)

  def embed(self, params: Any, codebooks: Any, features: Mapping[str, Array]) -> dict[str, ModalityOutput]:
    """Modality -> embeddings: by default the heads' output, split and normalised."""
    return {m: output(self.shared(m, x), self.specific(m, x)) for m, x in features.items()}

  def shared(self, modality: str, x: Float[Array, "b n d"]) -> Float[Array, "b n s"]:
    """The shared part of a modality's heads' output."""
    return x[..., : self.model.towers[modality].shared_dim]

  def specific(self, modality: str, x: Float[Array, "b n d"]) -> Float[Array, "b n p"]:
    """The specific part of a modality's heads' output."""
    return x[..., self.model.towers[modality].shared_dim :]

  def embeddings(self, features: Mapping[str, Float[Array, "b n _"]]) -> dict[str, Float[Array, "b s"]]:
    """Unit vectors of the class tokens' shared parts."""
    return {m: unit(self.shared(m, x)[:, 0]) for m, x in features.items()}

  def restore(self, codebooks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Codebook states from the nested arrays of a checkpoint."""
    return dict(codebooks)


def output(
  shared: Float[Array, "b n s"], specific: Float[Array, "b n p"], indices: Int[Array, "b n q"] | None = None,
  indices_specific: Int[Array, "b n r"] | None = None,
) -> ModalityOutput:
  """A modality's output with each token's vectors, normalised, and its codes, if any; without similarities."""
  none = jnp.zeros((*shared.shape[:-1], 0), jnp.int32)
  no_similarity = jnp.zeros((shared.shape[0], 0, 0), jnp.float32)
  return ModalityOutput(
    shared=unit(shared), specific=unit(specific), full=unit(jnp.concatenate([shared, specific], axis=-1)),
    query=unit(shared),
    indices_shared=none if indices is None else indices,
    indices_specific=none if indices_specific is None else indices_specific, similarity_shared=no_similarity,
    similarity_specific=no_similarity, commitment=jnp.zeros((), jnp.float32),
  )  # fmt: skip


def merge_sources(
  batch: Mapping[str, Any],
) -> tuple[dict[str, Array], dict[str, Array], dict[tuple[str, str], slice]]:
  """(modality -> tokens, modality -> mask, (source, modality) -> slice of rows), the sources' rows concatenated."""
  inputs: dict[str, list[Array]] = {}
  masks: dict[str, list[Array]] = {}
  owners: dict[tuple[str, str], slice] = {}
  for source, content in batch.items():
    for name, mask in content["_mask"].items():
      start = sum(part.shape[0] for part in inputs.get(name, []))
      inputs.setdefault(name, []).append(content[name])
      masks.setdefault(name, []).append(mask)
      owners[source, name] = slice(start, start + mask.shape[0])
  return {m: joined(p) for m, p in inputs.items()}, {m: joined(p) for m, p in masks.items()}, owners


def joined(parts: Sequence[Array | np.ndarray]) -> Array | np.ndarray:
  """The rows of several arrays, concatenated."""
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

"""The type of a whole config: its sections, its reading, and the checks of one section against another."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from codebind_jax import schema
from codebind_jax.codebook.spec import SHARED, Codebook
from codebind_jax.data.task import Data
from codebind_jax.data.worlds.registry import WORLDS
from codebind_jax.methods.base import Method, check_stage, make_method, method_options
from codebind_jax.methods.codebind_terms import TERMS
from codebind_jax.models.towers import ModelSpec
from codebind_jax.runtime.optim import Optim
from codebind_jax.runtime.sharding import MeshShape, Sharding
from codebind_jax.schema import Frozen, above, at_least, check_keys
from codebind_jax.stages import Stage, stages_of
from codebind_jax.trunks import Trunk, load_trunk, tower_trunks, trunk_maker, trunk_names

MODES = ("train", "eval", "embed", "compare", "compile")
TASKS = ("zeroshot", "retrieval", "probe")
MEASURES = (*TASKS, "codes")

@dataclasses.dataclass(frozen=True)
class Embed:
  """Section `embed` of mode `embed`.

  Attributes:
    shard_rows: records of the manifest a shard.
    dtype: of the vectors.
    parts: fields of the embeddings to write, for every modality.
    modalities: those to write; all of the run's unless given.
    batch_size: decoded records of a batch, of which two are in memory, since the next one is read ahead.
    threads: number of threads that read and decode, in each process.
  """

  shard_rows: Annotated[int, above(0)] = 16384
  dtype: Literal["float16", "float32"] = "float16"
  parts: tuple[Literal["shared", "specific", "full", "codes"], ...] = ("shared", "specific", "full", "codes")
  modalities: tuple[str, ...] = ()
  batch_size: Annotated[int, above(0)] = 256
  threads: Annotated[int, above(0)] = 4


@dataclasses.dataclass(frozen=True)
class Variant:
  """Section `compare.variants.NAME`: the settings in which one variant of a comparison differs.

  Attributes:
    method: as `config.method`.
    options: as `config.method_options`.
    losses: as `config.stages.*.losses`, of every stage.
    quantize: as `config.model.quantize`.
  """

  method: str = "codebind"
  options: Mapping[str, Any] = Frozen()
  losses: Mapping[str, Annotated[float, at_least(0, "off")]] = Frozen({"info_nce": 1.0})
  quantize: bool = True


@dataclasses.dataclass(frozen=True)
class GradedWorld:
  """Section `compare.world`: the synthetic world with modalities of graded quality (`data.synthetic.Factors`).

  Attributes:
    classes, styles: number of values of each factor.
    noise: standard deviation of the noise added to a vector.
    rows: number of training rows.
    seed: of the world.
    quality: modality -> share of the class's code that it shows; 1 where not named.
    style_quality: likewise of the style's code.
  """

  classes: Annotated[int, above(0)] = 10
  styles: Annotated[int, above(0)] = 4
  noise: Annotated[float, at_least(0)] = 0.8
  rows: Annotated[int, above(0)] = 2048
  seed: Annotated[int, at_least(0)] = 0
  quality: Mapping[str, Annotated[float, at_least(0)]] = Frozen()
  style_quality: Mapping[str, Annotated[float, at_least(0)]] = Frozen()


@dataclasses.dataclass(frozen=True)
class HeadSets:
  """Section `compare.transfers.NAME`: training and test rows of the classifier heads that a comparison measures.

  Attributes:
    worlds: whose training rows train the heads.
    fields: those that the heads predict.
    val, test: names of the sets that test the heads; those that a profile lacks are left out.
  """

  worlds: tuple[str, ...]
  fields: tuple[str, ...]
  val: tuple[str, ...]
  test: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Compare:
  """Section `compare` of mode `compare`.

  Attributes:
    variants: by name.
    only: comma-separated names of variants: this call trains these alone.
    timing: number of steps of each variant to time, in turns, after all are trained; 0 for none.
    against: path of the graded world's comparison.json, for the claims that compare an equal world with it.
    seeds: runs of each variant on the test sets.
    learning_rates: candidates for each variant, chosen among on the validation sets.
    fields: those that the heads predict, if there are no transfers.
    transfers: by name; empty for a single one over all sets.
    world: the synthetic world of the comparison; None for the worlds of `data`.
    stages: also measures zero-shot and retrieval, as after a training stage.
    score: validation metric that chooses the learning rate.
    columns: of the table of scores; empty for the usual ones.
  """

  variants: Mapping[str, Variant] = Frozen()
  only: str = ""
  timing: Annotated[int, at_least(0, "none")] = 0
  against: str = ""
  seeds: Annotated[int, above(0)] = 3
  learning_rates: tuple[Annotated[float, above(0)], ...] = (1e-3,)
  fields: tuple[str, ...] = ("label",)
  transfers: Mapping[str, HeadSets] = Frozen()
  world: GradedWorld | None = None
  stages: bool = False
  score: str = "eval/val/label/cross"
  columns: tuple[str, ...] = ()

  @property
  def names(self) -> list[str]:
    """The variants that this call trains: all, or those that `only` names."""
    return [name for name in self.only.split(",") if name] or list(self.variants)

  def check(self, path: str) -> None:
    """Refuses unknown variants in `only`, and an empty list of learning rates."""
    check_keys(self.names, self.variants, f"{path}.only")
    if not self.learning_rates:
      raise ValueError(f"config.{path}.learning_rates: is empty; allowed: one and more")


@dataclasses.dataclass(frozen=True)
class Config:
  """The config of a run.

  Attributes:
    mode: the command: train, eval, embed, compare or compile.
    task: evaluation of mode `eval`.
    topology: in mode `compile`, the TPU slice to compile for, such as v5e:16x16.
    method: a module of `codebind_jax.methods`, or the dotted path of another module with a class `Method`.
    method_options: fields of the method.
    seed: of parameters, batches and all random draws.
    steps, batch_size: of the stages that set none of their own.
    log_steps: steps between two lines of metrics.
    eval_steps: steps between two evaluations on the validation sets; the end of the run is always evaluated.
    checkpoint_steps: steps between two checkpoints.
    keep_checkpoints: number of checkpoints kept, the newest.
    init_from: workdir of a finished run from whose parameters this one starts; in modes `eval` and `embed`, the run.
    baseline: also train the same heads by plain InfoNCE, without codebooks, and report both.
    test: read the test sets once, at the end.
    tasks: evaluators of the final evaluation; probes take the longest.
    emergent: pairs of modalities that no stage binds, evaluated by retrieval of the same concept.
    mesh, sharding, data, model, codebook, optim: sections.
    stages: sections by name.
    stage_order: names of the stages to train, in order.
    embed, compare: sections of these modes; None in others.
  """

  mode: Literal[MODES] = "train"
  task: Literal[TASKS] = "zeroshot"
  topology: str = ""
  method: str = "codebind"
  method_options: Mapping[str, Any] = Frozen()
  seed: Annotated[int, at_least(0)] = 0
  steps: Annotated[int, above(0)] = 500
  batch_size: Annotated[int, above(0)] = 256
  log_steps: Annotated[int, above(0)] = 20
  eval_steps: Annotated[int, above(0)] = 250
  checkpoint_steps: Annotated[int, above(0)] = 100
  keep_checkpoints: Annotated[int, above(0)] = 2
  init_from: str = ""
  baseline: bool = True
  test: bool = True
  tasks: tuple[Literal[MEASURES], ...] = MEASURES
  emergent: tuple[tuple[str, str], ...] = ()
  mesh: MeshShape = MeshShape()
  sharding: Sharding = Sharding()
  data: Data = Data()
  model: ModelSpec = ModelSpec()
  codebook: Codebook = Codebook()
  optim: Optim = Optim()
  stages: Mapping[str, Stage] = Frozen()
  stage_order: tuple[str, ...] = ()
  embed: Embed | None = None
  compare: Compare | None = None

  @property
  def ordered(self) -> list[Stage]:
    """The stages to train, in order, with their names and global steps."""
    return stages_of(self.stages, self.stage_order)


def read(config: Any) -> Config:
  """A ConfigDict or dict as a `Config` with all options filled in, each section checked by itself.

  Raises:
    ValueError: naming the key, the value got, and what is allowed.
  """
  return config if isinstance(config, Config) else filled(schema.read(Config, config))


def filled(config: Config) -> Config:
  """The config with all options of its trunks and methods: those set, and the defaults of the others.

  Raises:
    ValueError: for an unknown trunk, method or option, or a value that an option does not allow.
  """
  towers = {}
  for name, tower in config.model.towers.items():
    where = f"model.towers.{name}"
    check_keys([tower.trunk], trunk_names(), f"{where}.trunk")
    options = schema.arguments(trunk_maker(tower.trunk), tower.options, f"{where}.options")
    towers[name] = dataclasses.replace(tower, options=Frozen(options))
  compare = config.compare
  if compare:
    variants = {name: dataclasses.replace(v, options=Frozen(method_options(v.method, v.options)))
                for name, v in compare.variants.items()}  # fmt: skip
    compare = dataclasses.replace(compare, variants=Frozen(variants))
  return dataclasses.replace(
    config, model=dataclasses.replace(config.model, towers=Frozen(towers)), compare=compare,
    method_options=Frozen(method_options(config.method, config.method_options)),
  )  # fmt: skip


def method_of(config: Config, loaded: Mapping[str, Trunk] = Frozen()) -> Method:
  """The config's method, with its towers.

  Args:
    config: of the run.
    loaded: modality -> trunk, of those that are there already.

  Raises:
    ValueError: naming the tower whose trunk cannot be made, or whose published head does not fit.
  """
  stages, trunks = config.ordered, tower_trunks(config.model, config.ordered, loaded)
  return make_method(config.method, config.method_options, config.model, config.codebook, stages, trunks)


def validate(config: Any) -> Config:
  """Reads a config and checks its sections against one another.

  Raises:
    ValueError: naming the key, the value got, and what is allowed.
  """
  config = read(config)
  of_run = {"init_from": config.init_from, "data.files": config.data.sources}
  needed = {"eval": of_run, "embed": of_run | {"embed": config.embed}, "compare": {"compare": config.compare}}
  for path, value in needed.get(config.mode, {}).items():
    if not value:
      raise ValueError(f"config.{path}: must be set for mode {config.mode!r}")
  if config.mode in ("eval", "embed"):
    return config
  if config.mode != "compile" and not config.data.used_worlds and not config.data.sources:
    raise ValueError(f"config.data.worlds: is empty; allowed: some of {sorted(WORLDS)}, or data.files set")
  if not config.stage_order:
    raise ValueError(f"config.stage_order: is empty; allowed: some of {list(config.stages)}")
  check_keys(config.stage_order, config.stages, "stage_order")
  _check_widths(config)
  method = method_of(config)
  _check_inputs(config, method)
  for stage in config.ordered:
    _check_stage(config, stage)
    check_stage(config.method, stage)
    if stage.balance and not method.weights(stage).get(method.BASE):
      where = f"config.stages.{stage.name}.balance"
      raise ValueError(f"{where}: got True without the loss {method.BASE!r}, which others are held to")
  return config


def _check_inputs(config: Config, method: Method) -> None:
  """Checks that a method that changes or reconstructs its towers' inputs gets tokens."""
  for name, tower in config.model.towers.items():
    if tower.cache or not method.needs_tokens:
      continue
    item = load_trunk(tower.trunk, **tower.options).input
    if len(item.shape) != 2 or item.dtype != "float32":
      raise ValueError(f"config.model.towers.{name}.cache: got False, but {method.needs_tokens}, and this trunk's "
                       f"items are {item.dtype} {list(item.shape)}; allowed: True, or a trunk that takes tokens")


def _check_widths(config: Config) -> None:
  """Checks that every part's width is a multiple of the code's, and that every specific part has a codebook."""
  towers, codes, dim = config.model.towers, config.codebook.codes, config.codebook.dim
  check_keys(codes, towers, "codebook.codes")
  if config.model.shared_dim % dim:
    raise ValueError(
      f"config.model.shared_dim: got {config.model.shared_dim}; allowed: a multiple of codebook.dim ({dim})"
    )
  for name, tower in towers.items():
    if tower.specific_dim % dim:
      raise ValueError(
        f"config.model.towers.{name}.specific_dim: got {tower.specific_dim}; allowed: 0 or a multiple of "
        f"codebook.dim ({dim})"
      )
    if tower.specific_dim and name not in codes:
      raise ValueError(f"config.codebook.codes: no entry for {name!r}, which has a specific part")


def _check_stage(config: Config, stage: Stage) -> None:
  """Checks that all names in a stage exist, and that no trunk is tuned whose tokens are cached."""
  towers, where = config.model.towers, f"stages.{stage.name}"
  check_keys([m for pair in stage.pairs for m in pair], towers, f"{where}.pairs")
  check_keys(stage.losses, TERMS, f"{where}.losses")
  for pattern in stage.codes:
    if not any(re.fullmatch(pattern, name) for name in (SHARED, *towers)):
      raise ValueError(f"config.{where}.codes: {pattern!r} matches none of {[SHARED, *sorted(towers)]}")
  if "" not in config.data.sources and config.mode != "compile":
    check_keys([*stage.sources, *stage.weights], [*config.data.worlds, *config.data.named_files], f"{where}.sources")
  check_keys(stage.tune, towers, f"{where}.tune")
  for name, tune in stage.tune.items():
    if towers[name].cache and tune != "frozen":
      raise ValueError(f"config.{where}.tune.{name}: got {tune!r}, but the tokens of its trunk are cached; allowed: "
                       f"'frozen', or config.model.towers.{name}.cache False")

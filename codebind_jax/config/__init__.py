"""The type of a whole config: its sections, and its reading. `validation` checks one section against another."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from codebind_jax import schema
from codebind_jax.codebook.spec import Codebook
from codebind_jax.data.task import Data
from codebind_jax.methods.base import Method, make_method, method_options
from codebind_jax.models.towers import Dropout, ModelSpec
from codebind_jax.runtime.optim import Optim, WeightDecay
from codebind_jax.runtime.sharding import MeshShape, Sharding
from codebind_jax.schema import (
  DISTINCT,
  NONEMPTY,
  Frozen,
  Line,
  Name,
  NonemptyLine,
  Place,
  Rate,
  Seed,
  Share,
  Threads,
  Weight,
  above,
  at_least,
  at_most,
  check_keys,
  shaped,
)  # fmt: skip
from codebind_jax.stages import Mixup, Pair, Stage, stages_of
from codebind_jax.trunks import Trunk, tower_trunks, trunk_maker, trunk_names

MODES = ("train", "eval", "embed", "compare", "compile")
TASKS = ("zeroshot", "retrieval", "probe")
MEASURES = (*TASKS, "codes")
PARTS = ("shared", "specific", "full", "codes", "query")
QUANTISERS = ("float32", "float16", "sq8", "sq4", "pq", "opq", "rq", "rq10", "lsq")
FITS = ("joint", "modality")
Module = Annotated[str, shaped(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", "a module's name")]


@dataclasses.dataclass(frozen=True)
class Embed:
  """Section `embed`: the files that mode `embed` writes.

  Attributes:
    shard_rows: number of records in one output file.
    dtype: type of the numbers of the written vectors.
    parts: what to write of every embedding: the vectors `shared`, `specific` and `full`, the packed codes, and `query`
      (the shared part before its codes replaced it, by which a search may re-rank).
    modalities: modalities to write; empty for all that the run was trained on.
    batch_size: records decoded at once; memory holds two such batches, since the next one is read ahead.
    threads: number of threads that read and decode, in each process.
  """

  shard_rows: Annotated[int, above(0), at_most(1 << 26)] = 16384
  dtype: Literal["float16", "float32"] = "float16"
  parts: Annotated[tuple[Literal[PARTS], ...], NONEMPTY, DISTINCT] = PARTS[:4]
  modalities: Annotated[tuple[Name, ...], DISTINCT] = ()
  batch_size: Annotated[int, above(0), at_most(1 << 20)] = 256
  threads: Threads = 4


@dataclasses.dataclass(frozen=True)
class Variant:
  """Section `compare.variants.NAME`: the settings in which one variant of a comparison differs.

  Attributes:
    method: the variant's `config.method`.
    options: the variant's `config.method_options`.
    losses: the variant's `config.stages.NAME.losses`, the same for every stage.
    quantize: the variant's `config.model.quantize`.
    mixup: the variant's `config.stages.NAME.mixup`, the same for every stage; None for that of each stage.
    dropout: the variant's `config.model.towers.NAME.dropout`, the same for every tower; None for that of each tower.
    weight_decay: the variant's `config.optim.weight_decay`; None for that of the config.
    steps: the variant's `config.stages.NAME.steps`, the same for every stage; None for those of each stage.
    learning_rate: the variant's rate where it is not chosen on the validation sets; None for the best candidate.
    codebook: keys of `config.codebook` that differ, with their values.
    follows: other variants; the one of them that validation chooses gives `mixup`, `dropout` and `weight_decay` where
      they are None.
    warm: whether runs start from the run of that one with the same seed (`config.init_from`); with `follows`.
    stage_order: the variant's `config.stage_order`; empty for that of the config.
  """

  method: Module = "codebind"
  options: Mapping[str, Any] = Frozen()
  losses: Mapping[Name, Weight] = Frozen({"info_nce": 1.0})
  quantize: bool = True
  mixup: Mixup | None = None
  dropout: Dropout | None = None
  weight_decay: WeightDecay | None = None
  steps: Annotated[int, above(0)] | None = None
  learning_rate: Rate | None = None
  codebook: Mapping[Name, Any] = Frozen()
  follows: Annotated[tuple[Name, ...], DISTINCT] = ()
  warm: bool = False
  stage_order: Annotated[tuple[Name, ...], DISTINCT] = ()

  def check(self, path: str) -> None:
    """Refuses a start from nothing."""
    if self.warm and not self.follows:
      raise ValueError(f"config.{path}.warm: got True, but config.{path}.follows is empty; allowed: False, or variants "
                       "in follows")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GradedWorld:
  """Section `compare.world`: the synthetic world with modalities of graded quality (`data.synthetic.Factors`).

  Attributes:
    classes: number of classes.
    styles: number of styles, a second factor that is independent of the class.
    noise: standard deviation of the noise added to a vector.
    rows: number of training rows.
    per_class: number of training rows of each class that are kept, the first ones; 0 for all.
    noisy: standard deviation of the noise of further evaluation sets, the same items otherwise; 0 for none.
    hidden: share of the values of a vector that are 0 in further evaluation sets; 0 for none.
    seed: seed of the world's random draws.
    quality: modality -> how much of the class it shows, 0 to 1; 1 where not named.
    style_quality: modality -> how much of the style it shows, 0 to 1; 1 where not named.
  """

  classes: Annotated[int, above(0), at_most(1 << 16)] = 10
  styles: Annotated[int, above(0), at_most(1 << 16)] = 4
  noise: Annotated[float, at_least(0), at_most(1000)] = 0.8
  rows: Annotated[int, above(0), at_most(1 << 24)] = 2048
  per_class: Annotated[int, at_least(0, "all"), at_most(1 << 24)] = 0
  noisy: Annotated[float, at_least(0, "none"), at_most(1000)] = 0.0
  hidden: Share = 0.0
  seed: Seed = 0
  quality: Mapping[Name, Share] = Frozen()
  style_quality: Mapping[Name, Share] = Frozen()


@dataclasses.dataclass(frozen=True)
class HeadSets:
  """Section `compare.transfers.NAME`: training and test rows of the classifier heads that a comparison measures.

  Attributes:
    worlds: worlds whose training rows train the heads.
    fields: fields of the records that the heads predict.
    val, test: names of the evaluation sets that test the heads; sets that the world's profile lacks are left out.
  """

  worlds: Annotated[tuple[Name, ...], NONEMPTY, DISTINCT]
  fields: Annotated[tuple[NonemptyLine, ...], NONEMPTY, DISTINCT]
  val: Annotated[tuple[NonemptyLine, ...], NONEMPTY, DISTINCT]
  test: Annotated[tuple[NonemptyLine, ...], DISTINCT]


@dataclasses.dataclass(frozen=True)
class Bytes:
  """Section `compare.bytes`: how small an index of the variants' items is, beside quantisers of a continuous model.

  Attributes:
    baselines: continuous variants; the one that validation chooses is the baseline, whose embeddings are quantised.
    sizes: bytes an item.
    quantisers: of faiss, fitted to the baseline's training embeddings at each size; float32 and float16 have a size of
      their own.
    fits: rows that quantisers are fitted to: those of all modalities together (joint), or of each by itself (modality);
      validation chooses.
  """

  baselines: Annotated[tuple[Name, ...], NONEMPTY, DISTINCT]
  sizes: Annotated[tuple[Annotated[int, above(0), at_most(1 << 20)], ...], NONEMPTY, DISTINCT] = (12, 24, 48)
  quantisers: Annotated[tuple[Literal[QUANTISERS], ...], NONEMPTY, DISTINCT] = QUANTISERS
  fits: Annotated[tuple[Literal[FITS], ...], NONEMPTY, DISTINCT] = FITS


@dataclasses.dataclass(frozen=True)
class Compare:
  """Section `compare`: the variants that mode `compare` trains, and how they are measured.

  Attributes:
    variants: name -> settings of one variant.
    only: comma-separated names of variants; this call trains these alone.
    timing: number of steps of each variant to time, in turns, after all are trained; 0 for none.
    against: path of the graded world's comparison.json, for the claims that compare an equal world with it.
    seeds: number of runs of each variant that are read on the test sets.
    learning_rates: candidates; every variant gets the best of them on the validation sets.
    widen: number of further candidates that a variant gets beyond the lowest or highest one, one at a time, as long as
      validation chooses that end.
    fields: fields of the records that the classifier heads predict, if there are no transfers.
    transfers: name -> the heads' training and test sets; empty for one over all sets.
    world: the synthetic world of the comparison; None for the worlds of `data`.
    bytes: the sizes at which items are compared; None for a comparison of methods.
    stages: whether zero-shot and retrieval are measured too, as after a training stage.
    score: validation metric that chooses the learning rate.
    columns: columns of the table of scores; empty for the usual ones.
    read_before: what had read the test sets before this comparison; the table says so. Empty if nothing had.
  """

  variants: Mapping[Name, Variant] = Frozen()
  only: Line = ""
  timing: Annotated[int, at_least(0, "none"), at_most(1_000_000)] = 0
  against: Place = ""
  seeds: Annotated[int, above(0), at_most(1000)] = 3
  learning_rates: Annotated[tuple[Rate, ...], NONEMPTY, DISTINCT] = (1e-3,)
  widen: Annotated[int, at_least(0, "none"), at_most(100)] = 0
  fields: Annotated[tuple[NonemptyLine, ...], NONEMPTY, DISTINCT] = ("label",)
  transfers: Mapping[Name, HeadSets] = Frozen()
  world: GradedWorld | None = None
  bytes: Bytes | None = None
  stages: bool = False
  score: NonemptyLine = "eval/val/label/cross"
  columns: Annotated[tuple[NonemptyLine, ...], DISTINCT] = ()
  read_before: Line = ""

  @property
  def names(self) -> list[str]:
    """The variants that this call trains: all, or those that `only` names."""
    return [name for name in self.only.split(",") if name] or list(self.variants)

  def check(self, path: str) -> None:
    """Refuses variants in `only` that are unknown, or there twice."""
    check_keys(self.names, self.variants, f"{path}.only")
    for name, variant in self.variants.items():
      earlier = [other for other, led in self.variants.items() if not led.follows]
      check_keys(variant.follows, earlier, f"{path}.variants.{name}.follows")
    check_keys(self.bytes.baselines if self.bytes else (), self.variants, f"{path}.bytes.baselines")
    schema.read(Annotated[tuple[str, ...], DISTINCT], self.names, f"{path}.only")


@dataclasses.dataclass(frozen=True)
class Config:
  """The config of a run.

  Attributes:
    mode: what the command does: train; evaluate a finished run on other data (eval); write embeddings (embed); train
      methods side by side (compare); or compile for a TPU slice that need not be there (compile).
    task: what mode `eval` measures.
    topology: in mode `compile`, the TPU slice to compile for, such as v5e:16x16.
    method: a module of `codebind_jax.methods`, or the dotted path of another module with a class `Method`.
    method_options: options of the method.
    seed: seed of parameters, batches and all random draws.
    steps: number of optimizer steps of every stage that sets none of its own.
    batch_size: rows of a batch, over all devices, of every stage that sets none of its own.
    log_steps: steps between two lines of metrics.
    eval_steps: steps between two evaluations on the validation sets; the end of the run is always evaluated.
    checkpoint_steps: steps between two checkpoints.
    keep_checkpoints: number of checkpoints that are kept, the newest ones.
    init_from: folder of a finished run from whose parameters this one starts; in modes `eval` and `embed`, the run that
      is evaluated or that embeds.
    baseline: also train the same heads by plain InfoNCE, without codebooks, and report both.
    test: also measure on the test sets, once, at the end; for the final command alone, once all settings are chosen.
    tasks: what the final evaluation measures; probes take the longest.
    queries: what is looked for in evaluations: `coded` as the items are, or `uncoded`, before quantisation, as a search
      among stored codes can; items are coded either way. Where nothing is quantised both are the same.
    emergent: pairs of modalities that no stage binds, evaluated by retrieval of the same concept.
    mesh: the devices.
    sharding: how arrays are split over the devices.
    data: training and evaluation data.
    model: the towers.
    codebook: the codebooks.
    optim: the optimizer.
    stages: name -> what one stage of training binds, and how.
    stage_order: names of the stages to train, in order.
    embed: settings of mode `embed`.
    compare: settings of mode `compare`.
  """

  mode: Literal[MODES] = "train"
  task: Literal[TASKS] = "zeroshot"
  topology: Annotated[str, shaped(r"(\w+:\d+(x\d+)*)?", "a TPU slice such as v5e:16x16, or ''")] = ""
  method: Module = "codebind"
  method_options: Mapping[str, Any] = Frozen()
  seed: Seed = 0
  steps: Annotated[int, above(0)] = 500
  batch_size: Annotated[int, above(0)] = 256
  log_steps: Annotated[int, above(0)] = 20
  eval_steps: Annotated[int, above(0)] = 250
  checkpoint_steps: Annotated[int, above(0)] = 100
  keep_checkpoints: Annotated[int, above(0)] = 2
  init_from: Place = ""
  baseline: bool = True
  test: bool = False
  tasks: Annotated[tuple[Literal[MEASURES], ...], DISTINCT] = MEASURES
  queries: Literal["coded", "uncoded"] = "coded"
  emergent: Annotated[tuple[Pair, ...], DISTINCT] = ()
  mesh: MeshShape = MeshShape()
  sharding: Sharding = Sharding()
  data: Data = Data()
  model: ModelSpec = ModelSpec()
  codebook: Codebook = Codebook()
  optim: Optim = Optim()
  stages: Mapping[Name, Stage] = Frozen()
  stage_order: Annotated[tuple[Name, ...], DISTINCT] = ()
  embed: Embed | None = None
  compare: Compare | None = None

  @property
  def ordered(self) -> list[Stage]:
    """The stages to train, in order, with their names and global steps."""
    return stages_of(self.stages, self.stage_order)

  @property
  def item_bytes(self) -> dict[str, tuple[int, int]]:
    """Modality -> bytes of an item's packed codes, of its shared part and of all; {} where CodeBind codes nothing."""
    if self.method != "codebind" or not self.model.quantize:
      return {}
    spec = self.codebook.spec(self.model.shared_dim, self.model.specific_dims)
    return {m: (spec.item_bytes(m), spec.item_bytes(m, "full")) for m in self.model.towers}


def read(config: Any) -> Config:
  """A ConfigDict or dict as a `Config` with all options filled in, each section checked by itself.

  Raises:
    ValueError: naming the key, the value got, and what is allowed.
  """
  return config if isinstance(config, Config) else filled(schema.read(Config, config))


def read_saved(plain: Any) -> Config:
  """The config that a file of a run or a saved model holds, as `read`; no module that the file names is imported.

  Raises:
    ValueError: as `read`; also for a method outside this package that the process has not imported.
  """
  config = plain if isinstance(plain, Config) else schema.read(Config, plain)
  named = {"method": config.method}
  if config.compare:
    named |= {f"compare.variants.{name}.method": variant.method for name, variant in config.compare.variants.items()}
  for key, method in named.items():
    if "." in method and method not in sys.modules:
      raise ValueError(f"config.{key}: got {method!r}, a module that a saved config does not import by itself; "
                       f"if you trust it, import it before, or name it by --config.method={method}")  # fmt: skip
  return filled(config)


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
    variants = {name: dataclasses.replace(v, options=Frozen(_options(name, v)))
                for name, v in compare.variants.items()}  # fmt: skip
    compare = dataclasses.replace(compare, variants=Frozen(variants))
  return dataclasses.replace(
    config, model=dataclasses.replace(config.model, towers=Frozen(towers)), compare=compare,
    method_options=Frozen(method_options(config.method, config.method_options)),
  )  # fmt: skip


def _options(name: str, variant: Variant) -> dict[str, Any]:
  """All options of a variant's method."""
  return method_options(variant.method, variant.options, f"compare.variants.{name}.")


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

"""The type of a whole config: its sections, its reading, and the checks of one section against another."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import pathlib
import pkgutil
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, Literal

from codebind_jax import files, schema
from codebind_jax.codebook.spec import SHARED, Codebook
from codebind_jax.data import augment, formats
from codebind_jax.data.index import known_modalities
from codebind_jax.data.task import Data
from codebind_jax.data.worlds.registry import WORLDS
from codebind_jax.methods.base import EXTRA, Method, check_stage, make_method, method_options
from codebind_jax.methods.codebind_terms import TERMS
from codebind_jax.models.towers import Dropout, ModelSpec, TowerSpec
from codebind_jax.runtime.optim import Optim, WeightDecay
from codebind_jax.runtime.sharding import MeshShape, Sharding
from codebind_jax.schema import (
  DISTINCT,
  INT32,
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
from codebind_jax.trunks import Trunk, load_trunk, tower_trunks, trunk_maker, trunk_names
from codebind_jax.trunks.families import families

MODES = ("train", "eval", "embed", "compare", "compile")
TASKS = ("zeroshot", "retrieval", "probe")
MEASURES = (*TASKS, "codes")
FETCHED = ("aisfx", "efficientnet_lite0", "minilm", "point_views", "video_mean")  # trunks with packaged weights
SCALE = "_log_logit_scale"  # how the name of a tower's own factor ends
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


def validate(config: Any) -> Config:
  """Reads a config and checks its sections against one another, before any data is opened.

  Raises:
    ValueError: naming the key, the value got, and what is allowed.
  """
  config = read(config)
  of_run = {"init_from": config.init_from, "data.files": config.data.sources}
  compared = {"compare": config.compare, "compare.variants": config.compare and config.compare.variants}
  needed = {"eval": of_run, "embed": of_run | {"embed": config.embed}, "compare": compared}
  for path, value in needed.get(config.mode, {}).items():
    if not value:
      raise ValueError(f"config.{path}: must be set for mode {config.mode!r}")
  _check_data(config.data)
  if config.mode in ("eval", "embed"):
    return config
  if config.mode != "compile" and not config.data.used_worlds and not config.data.sources:
    raise ValueError(f"config.data.worlds: is empty; allowed: some of {sorted(WORLDS)}, or data.files set")
  if not config.stage_order:
    raise ValueError(f"config.stage_order: is empty; allowed: some of {list(config.stages)}")
  check_keys(config.stage_order, config.stages, "stage_order")
  _check_widths(config)
  _check_towers(config)
  _check_steps(config)
  if config.mode != "compile":
    _check_memory(config)
  method = method_of(config)
  _check_inputs(config, method)
  _check_method(config)
  for stage in config.ordered:
    _check_stage(config, stage)
    check_stage(config.method, stage)
    if stage.balance and not method.weights(stage).get(method.BASE):
      where = f"config.stages.{stage.name}.balance"
      raise ValueError(f"{where}: got True without the loss {method.BASE!r}, which others are held to")
  if config.compare:
    _check_compare(config, config.compare)
  return config


def check_folder(config: Config, workdir: str | files.Path) -> None:
  """Refuses to write into what is read: the run that this one starts from, or a folder of the data.

  Args:
    config: valid.
    workdir: where the run, the embeddings or the evaluation go.

  Raises:
    ValueError: naming the key and the folder.
  """
  place = files.path(workdir)
  if files.is_far(place):
    same = config.init_from.rstrip("/") == str(place).rstrip("/")
  else:
    place = place.expanduser().resolve()
    own = not config.init_from or files.is_far(files.path(config.init_from))
    same = not own and files.path(config.init_from).expanduser().resolve() == place
  if same and config.mode != "eval":  # an evaluation adds to the folder of a run
    raise ValueError(f"config.init_from: got {config.init_from!r}, which is the workdir; allowed: another run's folder")
  for name in [] if files.is_far(place) else [one for of in config.data.sources.values() for one in of]:
    if "://" in name or not (folder := pathlib.Path(name).expanduser()).is_dir():
      continue
    if place.is_relative_to(folder.resolve()):
      raise ValueError(f"config.data.files: got {name!r}, in which the workdir {str(workdir)!r} lies; allowed: a "
                       "workdir elsewhere, since what is written would be read as data")  # fmt: skip


def _check_data(data: Data) -> None:
  """Checks the formats' options, and that every source has a name of its own."""
  known: dict[str, list[Any]] = {}
  for one in pkgutil.iter_modules(formats.__path__):
    opener = getattr(importlib.import_module(f"{formats.__name__}.{one.name}"), "open_files", None)
    for key, (kind, _) in schema.keys_of(opener, ("paths", "cache", "max_bad_records")).items() if opener else ():
      known.setdefault(key, []).append(kind)
  for key, value in data.options.items():
    check_keys([key], known, "data.options")
    schema.read_any(known[key], value, f"data.options.{key}")
  for name in data.named_files:
    if name in data.used_worlds:
      raise ValueError(f"config.data.named_files: {name!r} is also one of config.data.worlds; allowed: another name")
  if "" not in data.sources:
    drawn = [name for name in data.templates_of if name.startswith("synthetic-")]  # worlds of whatever modalities
    check_keys(data.templates_of, [*WORLDS, *data.worlds, *data.named_files, *drawn], "data.templates_of")


def _check_towers(config: Config) -> None:
  """Checks names, options and augmentations of the towers, also of those whose trunk is not needed before the data."""
  for name, tower in config.model.towers.items():
    where = f"model.towers.{name}"
    if name in (SHARED, EXTRA) or name.endswith(SCALE):
      raise ValueError(f"config.model.towers: got {name!r}; allowed: a name other than {SHARED!r} (the shared "
                       f"codebook) and {EXTRA!r} (a method's parameters), which does not end with {SCALE!r}")
    if tower.augment:
      augment.make(name, tower.augment)
    if tower.options.get("class_names"):
      check_keys([tower.options["class_names"]], trunk_names(), f"{where}.options.class_names")
    if tower.cache and config.mode != "compile":  # others are loaded by `method_of`
      _check_cached(tower, f"config.{where}.options")


def _check_cached(tower: TowerSpec, where: str) -> None:
  """Makes a trunk whose tokens are cached without its weights, which may have to be fetched."""
  options = dict(tower.options)
  weights = str(options.get("weights", ""))
  if weights in ("", "random") and (tower.trunk not in families() or tower.trunk == "imagebind"):
    if tower.trunk in FETCHED:
      options |= {"weights": "random"} | ({"class_names": ""} if "class_names" in options else {})
    try:
      load_trunk(tower.trunk, **options)
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from error
  elif not weights:
    raise ValueError(f"{where}.weights: must be set for the trunk {tower.trunk!r}")
  elif "://" not in weights and not pathlib.Path(weights).expanduser().exists():
    raise ValueError(f"{where}.weights: got {weights!r}, which does not exist; allowed: a file or folder")


def _check_steps(config: Config) -> None:
  """Checks that steps can be counted, and that the warm-up ends within a stage."""
  total, longest = sum(stage.steps for stage in config.ordered), max(stage.steps for stage in config.ordered)
  if total > INT32:
    raise ValueError(f"config.stages.*.steps: got {total:,} in all; allowed: up to {INT32:,}")
  most = max(longest, Optim().warmup)  # the default is for runs of any length: a short stage takes as many as it has
  if config.optim.warmup > most:
    raise ValueError(f"config.optim.warmup: got {config.optim.warmup}; allowed: 0 to {most}, for a longest stage of "
                     f"{longest} steps")  # fmt: skip


def _memory() -> float:
  """Bytes of this machine's memory; infinity where the system does not say."""
  try:
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
  except (AttributeError, ValueError, OSError):
    return math.inf


def _check_memory(config: Config) -> None:
  """Refuses what alone cannot fit: an estimate from below, by the sizes that the config names."""
  model, books, there = config.model, config.codebook, _memory()
  number, shared = 4, model.shared_dim  # bytes of float32
  sizes: list[tuple[str, int, int, str]] = []
  if model.quantize and not config.sharding.codes and not config.method_options.get("codes"):
    of_part = [("codebook.shared_codes", books.shared_codes, model.shared_dim, books.dim)]
    of_part += [(f"codebook.codes.{name}", count, model.towers[name].specific_dim, books.width_of(name))
                for name, count in books.codes.items()]  # fmt: skip
    for key, count, width, dim in of_part:
      tables = books.stages * (width // dim if books.positions == "own" else 1)
      sizes.append((key, count, 2 * count * tables * (dim + 1) * number, "codes and their averages"))
  if count := config.method_options.get("codes"):
    sizes.append(("method_options.codes", count, 3 * count * shared * number, "codes and their averages"))
  if count := config.method_options.get("queue"):
    sizes.append(("method_options.queue", count, count * shared * number * len(model.towers), "queues"))
  for name, tower in model.towers.items():
    for key, count in (("hidden", tower.hidden), ("specific_dim", tower.specific_dim)):
      sizes.append((f"model.towers.{name}.{key}", count, 3 * count * shared * number, "weights and their averages"))
  for stage in config.ordered:
    rows = sum(stage.sources.values()) or stage.batch_size
    width = sum(shared + model.towers[m].specific_dim for m in stage.modalities if m in model.towers)
    key = f"stages.{stage.name}.{'sources' if stage.sources else 'batch_size'}"
    sizes.append((key, rows, 2 * rows * width * number, "a batch's embeddings and their gradients"))
    if rows > INT32:
      raise ValueError(f"config.{key}: got {rows:,} rows; allowed: up to {INT32:,}")
  for key, count, needed, what in sizes:
    if needed > there:
      raise ValueError(f"config.{key}: got {count:,}, whose {what} take at least {needed / 1e9:,.0f} GB; allowed: what "
                       f"fits into this machine's {there / 1e9:,.0f} GB")  # fmt: skip


def _check_method(config: Config) -> None:
  """Checks that the modalities that a method's options name have towers."""
  options, towers = config.method_options, config.model.towers
  for key in ("anchor", "hub"):
    check_keys([options[key]] if key in options else [], towers, f"method_options.{key}")
  weighted = [name for name, _ in options.get("weights_of", ())]
  check_keys(weighted, towers, "method_options.weights_of")
  check_keys(options.get("order", ()), {*towers, *known_modalities()}, "method_options.order")


def _check_compare(config: Config, compare: Compare) -> None:
  """Checks the names in a comparison: of worlds, of modalities, and the file that it is compared with."""
  if not compare.world and "" not in config.data.sources:
    for name, of in compare.transfers.items():
      check_keys(of.worlds, [*config.data.worlds, *config.data.named_files], f"compare.transfers.{name}.worlds")
  for name, variant in compare.variants.items():
    check_keys(variant.stage_order, config.stages, f"compare.variants.{name}.stage_order")
    for stage in stages_of(config.stages, variant.stage_order):
      _check_stage(config, stage)
  if compare.world and (compare.world.noisy or compare.world.hidden) and not compare.transfers:
    raise ValueError("config.compare.transfers: got none, but compare.world.noisy or hidden gives sets that are not to "
                     "be pooled; allowed: transfers that name the sets of each")  # fmt: skip
  for key in ("quality", "style_quality") if compare.world else ():
    check_keys(getattr(compare.world, key), {*config.model.towers, *known_modalities()}, f"compare.world.{key}")
  if compare.against and not files.is_far(files.path(compare.against)) and not pathlib.Path(compare.against).is_file():
    raise ValueError(f"config.compare.against: got {compare.against!r}; allowed: '' or an existing comparison.json")


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
  check_keys(config.codebook.dims, codes, "codebook.dims")
  if config.model.shared_dim % dim:
    raise ValueError(
      f"config.model.shared_dim: got {config.model.shared_dim}; allowed: a multiple of codebook.dim ({dim})"
    )
  for name, tower in towers.items():
    width, key = config.codebook.width_of(name), f"dims.{name}" if name in config.codebook.dims else "dim"
    if tower.specific_dim % width:
      raise ValueError(
        f"config.model.towers.{name}.specific_dim: got {tower.specific_dim}; allowed: 0 or a multiple of "
        f"codebook.{key} ({width})"
      )
    if tower.specific_dim and name not in codes:
      raise ValueError(f"config.codebook.codes: no entry for {name!r}, which has a specific part")


def _check_stage(config: Config, stage: Stage) -> None:
  """Checks that all names in a stage exist, and that no trunk is tuned whose tokens are cached."""
  towers, where = config.model.towers, f"stages.{stage.name}"
  check_keys([m for pair in stage.pairs for m in pair], towers, f"{where}.pairs")
  check_keys(stage.losses, TERMS, f"{where}.losses")
  if stage.losses.get("code_uniform") and (config.codebook.ema or not config.model.quantize):
    raise ValueError(f"config.{where}.losses.code_uniform: got {stage.losses['code_uniform']}, but codes that follow "
                     "moving averages, or that are not there, get no gradient from it; allowed: 0, or "
                     "config.codebook.ema False with config.model.quantize True")  # fmt: skip
  _check_paths(stage.train, towers, f"{where}.train")
  rows = sum(stage.sources.values()) or stage.batch_size
  if stage.parts > rows or len(stage.sources) < 2 and rows % stage.parts:
    raise ValueError(f"config.{where}.parts: got {stage.parts}; allowed: a number that divides a batch's {rows} rows")
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


def _check_paths(patterns: Iterable[str], towers: Collection[str], where: str) -> None:
  """Refuses a pattern of parameters' paths that begins with what no path begins with: each has a tower's name first."""
  for pattern in patterns:
    first, slash, _ = pattern.partition("/")
    if re.fullmatch(r"[\w-]+", first) and (first not in (*towers, EXTRA) if slash else not first.endswith(SCALE)):
      raise ValueError(f"config.{where}: got {pattern!r}, which no parameter's path matches; allowed: patterns of "
                       f"whole paths, such as 'NAME/.*', NAME one of {[*towers, EXTRA]}")  # fmt: skip

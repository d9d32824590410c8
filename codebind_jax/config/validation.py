"""Checks of a whole config before any data is opened: of one section against another, and of what it names."""

from __future__ import annotations

import importlib
import math
import os
import pathlib
import pkgutil
import re
from collections.abc import Collection, Iterable
from typing import Any

from codebind_jax import files, schema
from codebind_jax.codebook.spec import SHARED
from codebind_jax.config import Compare, Config, method_of, read
from codebind_jax.data import augment, formats
from codebind_jax.data.index import known_modalities
from codebind_jax.data.task import Data
from codebind_jax.data.worlds.registry import WORLDS
from codebind_jax.methods.base import EXTRA, Method, check_stage
from codebind_jax.methods.codebind_terms import TERMS
from codebind_jax.models.towers import TowerSpec
from codebind_jax.runtime.optim import Optim
from codebind_jax.schema import INT32, check_keys
from codebind_jax.stages import Stage
from codebind_jax.trunks import load_trunk, trunk_names
from codebind_jax.trunks.families import families

FETCHED = ("aisfx", "efficientnet_lite0", "minilm", "point_views", "video_mean")  # trunks with packaged weights
SCALE = "_log_logit_scale"  # how the name of a tower's own factor ends


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

"""Mode `bind`: what `configs/bind.py` leaves open, chosen by looking at the data.

The towers are those of the modalities that occur, the pairs those that enough records have, and the batch, the number
of steps and the codebooks follow from the counts. The choice is printed as the flags that would give it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from codebind_jax import files, schema
from codebind_jax.api import config_of
from codebind_jax.command_line.towers import BRIDGES, publish, tower_of
from codebind_jax.config import Config, validation
from codebind_jax.data.records import Source
from codebind_jax.data.task import Data, Task, open_task
from codebind_jax.runtime import checkpoint
from codebind_jax.schema import DISTINCT, MaybeName, Name, Place
from codebind_jax.trunks import trunk_names

MODE, STAGE = "bind", "bind"
ALL_PAIRS = 4  # modalities up to which all are bound to one another, where there is no bridge
FEWEST = 8  # training records that a pair needs: each is told from the others of its batch
BATCH = 256
EPOCHS = {True: 20, False: 10}  # by whether all trunks are frozen and their tokens cached
STEPS = {True: (60, 3000), False: (100, 10000)}  # fewest and most


@dataclasses.dataclass(frozen=True)
class Choice:
  """What to bind.

  Attributes:
    modalities: those to bind; empty for all that the training records have.
    bridges: those that all others are bound to; empty for text and image, or those of the model of `init_from`.
  """

  modalities: Annotated[tuple[Name, ...], DISTINCT] = ()
  bridges: Annotated[tuple[Name, ...], DISTINCT] = ()


@dataclasses.dataclass(frozen=True)
class Keys:
  """Keys that `configs/bind.py` has beside those of a run; what they leave open is chosen by the data.

  Attributes:
    bind: what to bind.
    trunks: modality -> its trunk; "" for the packaged one, or the family of its weights.
    weights: modality -> a published checkpoint, as `codebind_jax.load` takes it, or "random".
    tune: modality -> how its trunk trains, `frozen`, `lora` or `full`; "" for frozen, or full without a checkpoint.
  """

  bind: Choice = Choice()
  trunks: Mapping[Name, MaybeName] = schema.Frozen()
  weights: Mapping[Name, Place] = schema.Frozen()
  tune: Mapping[Name, Literal["", "frozen", "lora", "full"]] = schema.Frozen()

  def check(self, path: str) -> None:
    """Refuses unknown trunks."""
    for modality, name in self.trunks.items():
      schema.check_keys([name] if name else [], trunk_names(), f"trunks.{modality}")

  def of(self, section: str) -> dict[str, str]:
    """Modality -> what is set for it in `trunks`, `weights` or `tune`."""
    return {modality: value for modality, value in getattr(self, section).items() if value}


class Counts:
  """How many training records have which modalities.

  Args:
    sources: of the training records.
  """

  def __init__(self, sources: Sequence[Source]):
    self.rows = sum(map(len, sources))
    self.unlabelled = sum(int((source.index.label < 0).sum()) for source in sources)
    self.labels = len({source.index.labels[n] for source in sources for n in np.unique(source.index.label) if n >= 0})
    self.modalities = tuple(dict.fromkeys(m for source in sources for m in source.modalities))
    self._sets: Counter[tuple[str, ...]] = Counter()
    for source in sources:
      for bits, count in zip(*np.unique(source.index.has, return_counts=True)):
        self._sets[tuple(m for m in source.modalities if int(bits) & source.index.bit(m))] += int(count)

  def with_all(self, *modalities: str) -> int:
    """Number of records that have all of these."""
    return sum(count for there, count in self._sets.items() if set(modalities) <= set(there))

  def with_a_pair(self, pairs: Sequence[tuple[str, str]]) -> int:
    """Number of records that have both modalities of at least one pair."""
    return sum(count for there, count in self._sets.items() if any({a, b} <= set(there) for a, b in pairs))


def is_open(config: Any) -> bool:
  """Whether a config leaves choices to the data."""
  return isinstance(config, ConfigDict) and config.get("mode") == MODE


def opened(config: ConfigDict) -> tuple[Config, Task]:
  """`resolved`, with the data that it was made by."""
  task = open_task(data_of(config))
  return resolved(config, task), task


def data_of(config: ConfigDict) -> Data:
  """The section `data`.

  Raises:
    ValueError: as `schema.read`, or if no data is named.
  """
  data = schema.read(Data, config.data, "data")
  if not data.sources and not data.worlds:
    raise ValueError("config.data.files: must be set: a path, a pattern, or several (docs/data.md)")
  return data


def resolved(config: ConfigDict, task: Task) -> Config:
  """The config of a run: what the command set, and for the rest what fits the data.

  Args:
    config: of `configs/bind.py`.
    task: its data.

  Raises:
    ValueError: naming the key to set, or what the data lacks.
  """
  config = ConfigDict(config.to_dict())  # unlocked, and without references: what is chosen here changes nothing else
  keys = schema.read(Keys, {field.name: config[field.name] for field in dataclasses.fields(Keys)})
  asked = {name: keys.of(name) for name in ("trunks", "weights", "tune")}
  counts = Counts(list(task.train.values()))
  start = _start(config.init_from)
  modalities = _modalities(config, keys.bind.modalities, counts, asked, start)
  known = [m for m in modalities if start and m in start.model.towers]
  pairs = _pairs(config, keys.bind.bridges, counts, modalities, known, start)
  used = tuple(dict.fromkeys(m for pair in pairs for m in pair))
  for modality in [m for m in modalities if m not in used]:
    logging.warning("%s: left out, fewer than %d training records have it and another modality", modality, FEWEST)

  there = schema.to_plain(start.model.towers) if start else {}
  towers = {m: there[m] if m in known else tower_of(config, m, asked, task, used) for m in used}
  new = [m for m in used if m not in known]
  for tower in [towers[m] for m in used if m in known]:  # what the towers of the model lean on comes with them
    towers |= {m: there[m] for m in [tower["meaning"]] if m in there}
  stage = config.stages[STAGE]
  stage.pairs = pairs
  if start:
    _continue(config, start, new)
  else:
    publish(config, towers, asked, used)
  config.model.towers, codes = ConfigDict(towers), config.codebook.codes.to_dict()
  config.codebook.codes = ConfigDict({m: codes.get(m, 256) for m, tower in towers.items() if tower["specific_dim"]})
  stage.tune = ConfigDict({m: asked["tune"].get(m) or ("frozen" if towers[m]["cache"] else "full") for m in new})
  cached = all(tower["cache"] for tower in towers.values())
  _sizes(config, counts, pairs, cached, task)
  if config.baseline is None:
    config.baseline = cached and (not start or _has_baseline(config.init_from))
  config.stage_order, config.mode = (STAGE,), "train"
  for field in dataclasses.fields(Keys):
    del config[field.name]
  chosen = validation.validate(config)
  for line in describe(chosen, counts, task, asked, [m for m in towers if m not in new]):
    logging.info("%s", line)
  return chosen


def describe(
  config: Config, counts: Counts, task: Task, asked: Mapping[str, Mapping[str, str]], known: Sequence[str] = ()
) -> Iterator[str]:
  """What was found in the data, and the choice as flags; `known` are modalities of the model it starts from."""
  stage, start = config.stages[STAGE], config.init_from
  found = ", ".join(f"{m} {counts.with_all(m):,}" for m in counts.modalities)
  held = ", ".join(f"{len(test.source):,} {test.role}" for test in task.evals) or "none to evaluate on"
  yield f"found: {counts.rows:,} training records ({found}), {counts.labels:,} labels; {held}"
  yield "chosen, as the flags that would give it:"
  yield f"  --config=configs/bind.py:{','.join(config.model.towers)}" + f" --config.init_from={start}" * bool(start)
  for modality, tower in config.model.towers.items():
    if modality in known:  # the trunks are those of `init_from`
      continue
    flags = {"trunks": tower.trunk, "weights": asked["weights"].get(modality), "tune": stage.tune[modality]}
    yield "  " + " ".join(f"--config.{section}.{modality}={value}" for section, value in flags.items() if value)
  values = {
    **{f"stages.bind.{key}": getattr(stage, key) for key in ("pairs", "unique_labels", "mixup")},
    "batch_size": config.batch_size, "steps": config.steps,
    "eval_steps": config.eval_steps, "log_steps": config.log_steps, "checkpoint_steps": config.checkpoint_steps,
    "optim.learning_rate": config.optim.learning_rate, "optim.warmup": config.optim.warmup,
    "model.shared_dim": config.model.shared_dim, "baseline": config.baseline,
  }  # fmt: skip
  for key, value in values.items():
    yield f"  --config.{key}={_flag(value)}"


def _flag(value: Any) -> str:
  if isinstance(value, tuple):
    return json.dumps(repr(value))
  return f"{value:g}" if isinstance(value, float) else str(value)


def _start(source: str) -> Config | None:
  """The config of the model that the run starts from, with the modalities it has; None for a run from scratch."""
  try:
    return config_of(source) if source else None
  except ValueError as error:
    raise ValueError(f"config.init_from: {error}") from error


def _has_baseline(source: str) -> bool:
  return files.is_folder(files.path(source) / "baseline" / checkpoint.FOLDER)


def _modalities(
  config: ConfigDict, wanted: Sequence[str], counts: Counts, asked: Mapping[str, Mapping[str, str]],
  start: Config | None,
) -> list[str]:  # fmt: skip
  """Modalities to bind: those asked for, or all that the data and a tower know."""
  lacking = [m for m in wanted if m not in counts.modalities]
  there = ", ".join(f"{m} {counts.with_all(m)}" for m in counts.modalities) or "none"
  if lacking:
    raise ValueError(f"configs/bind.py:{','.join(wanted)}: no training record has {lacking[0]!r}; the data has {there}")
  for section, values in asked.items():
    if unknown := [m for m in values if m not in counts.modalities]:
      raise ValueError(f"config.{section}.{unknown[0]}: no training record has {unknown[0]!r}; the data has {there}")
  found = [m for m in wanted or counts.modalities if m in config.model.towers or m in asked["trunks"] or m in
           asked["weights"] or (start and m in start.model.towers)]  # fmt: skip
  for modality in [m for m in counts.modalities if m not in found and m not in wanted]:
    if not wanted:
      logging.warning("%s: left out, no trunk is packaged for it; config.trunks.%s names one", modality, modality)
  if len(found) < 2:
    raise ValueError(
      f"config.data.files: the training records have the modalities {there}, and two are needed to bind one to another"
      + ("; labels are taken as captions with config.data.label_captions" if counts.labels else
         "; a text (key text or caption), a label or another modality of the same records makes a pair")
    )  # fmt: skip
  return found


def _pairs(
  config: ConfigDict, asked: Sequence[str], counts: Counts, modalities: Sequence[str], known: Sequence[str],
  start: Config | None,
) -> tuple[tuple[str, str], ...]:
  """Pairs of a modality and a bridge that enough records have.

  Bridges are text and image, or the modalities of the model that the run starts from. Where there are none of them, all
  are bound to one another, or, if they are many, to the one that shares most records with the others.
  """
  if config.stages[STAGE].pairs:
    return tuple(map(tuple, config.stages[STAGE].pairs))
  enough = lambda a, b: counts.with_all(a, b) >= FEWEST
  shared = lambda m: sum(counts.with_all(m, other) for other in modalities if other != m)
  if unknown := [m for m in asked if m not in modalities]:
    raise ValueError(f"config.bind.bridges: {unknown[0]!r} is not allowed; allowed: some of {list(modalities)}")
  bridges = list(asked or known) or [m for m in BRIDGES if m in modalities]
  if not bridges:
    bridges = list(modalities) if len(modalities) <= ALL_PAIRS else [max(modalities, key=shared)]
  if start and not known:
    raise ValueError(f"config.init_from: {config.init_from!r} has {', '.join(start.model.towers)}, and the training "
                     f"records have {', '.join(modalities)}: nothing ties them together; allowed: records with one of "
                     "its modalities and a new one")  # fmt: skip
  pairs = [(a, b) for b, a in itertools.combinations(bridges, 2) if enough(a, b)]
  if known and set(known) != set(modalities):
    pairs = []  # the model that the run starts from has them bound already
  others = [m for m in modalities if m not in bridges]
  pairs += [(m, b) for m in others for b in bridges if enough(m, b)]
  bound = {m for pair in pairs for m in pair}
  for modality in sorted((m for m in others if m not in bound), key=shared, reverse=True):
    partner = max((m for m in modalities if m != modality), key=lambda m: (m in bound, counts.with_all(m, modality)))
    if enough(modality, partner):
      pairs.append((modality, partner))
      bound |= {modality, partner}
  if not pairs:
    most = max(itertools.combinations(modalities, 2), key=lambda pair: counts.with_all(*pair))
    raise ValueError(f"config.data.files: {counts.with_all(*most)} training records have both {most[0]} and {most[1]}, "
                     f"and no two modalities more; at least {FEWEST} are needed, as each is told from the others of "
                     "its batch")  # fmt: skip
  return tuple(pairs)


def _continue(config: ConfigDict, start: Config, new: Sequence[str]) -> None:
  """Takes widths and codebooks of the model that the run starts from; what it has stays as it is."""
  stage = config.stages[STAGE]
  config.model.shared_dim = start.model.shared_dim
  if start.model.quantize:
    own = config.codebook.codes.to_dict()
    config.codebook = ConfigDict(schema.to_plain(start.codebook))
    config.codebook.codes = ConfigDict({m: own.get(m, 256) for m in new} | dict(start.codebook.codes))
  if new:
    stage.train = tuple(rf"{name}(/.*|_log_logit_scale)" for name in new)
    stage.codes = tuple(new) if start.model.quantize else (".*",)


def _sizes(
  config: ConfigDict, counts: Counts, pairs: Sequence[tuple[str, str]], cached: bool, task: Task
) -> None:
  """Batch, steps and what follows from them, where the command set none."""
  stage, rows = config.stages[STAGE], counts.with_a_pair(pairs)
  for key, value in (("batch_size", config.batch_size), ("steps", config.steps)):
    if value is not None and value < 1:
      raise ValueError(f"config.{key}: got {value!r}; allowed: any number above 0")
  power = lambda n: 1 << (max(n, 1).bit_length() - 1)
  whole, given = min(BATCH, power(rows)), config.batch_size is not None
  if stage.unique_labels is None:
    labelled = counts.labels and not counts.unlabelled  # contents that records share are known later
    stage.unique_labels = bool(labelled) and counts.labels >= (stage.batch_size or config.batch_size or whole)
  if config.batch_size is None:
    config.batch_size = whole
  if stage.batch_size is None:
    stage.batch_size = config.batch_size
  few, many = STEPS[cached]
  usual = int(np.clip(round(EPOCHS[cached] * rows / config.batch_size), few, many))
  if config.steps is None:
    config.steps = usual
  if stage.steps is None:
    stage.steps = config.steps
  if stage.mixup is None:
    images = any(m != "text" and not tower["cache"] for m, tower in config.model.towers.items())
    stage.mixup = 1.0 if rows < 5000 and not images else 0.0
  if config.optim.learning_rate is None:
    config.optim.learning_rate = 1e-3 if cached else 5e-4
  for section, key, value in (
    (config, "eval_steps", config.steps // 2), (config, "checkpoint_steps", min(100, config.steps // 3)),
    (config, "log_steps", min(20, config.steps // 5)),
    # Not of `steps` where these suffice for it: a run may go on to more of them.
    (config.optim, "warmup", usual // 10 if usual // 10 <= max(stage.steps, 50) else stage.steps // 2),
  ):  # fmt: skip
    if section[key] is None:
      section[key] = max(1, value)
  if not stage.sources and len(task.train) > 1:
    each, names = config.batch_size // len(task.train), list(task.train)
    if not each:
      raise ValueError(f"config.batch_size: got {config.batch_size} for {len(names)} sources; allowed: one row of each")
    of = {name: each if given else min(each, power(len(task.train[name]))) for name in names}
    stage.sources = ConfigDict(of)
    config.batch_size = stage.batch_size = sum(of.values())

"""The data of a run, as `config.data` names it: training rows and evaluation sets."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from absl import logging

from codebind_jax.data.opening import class_names, open_source
from codebind_jax.data.worlds import names, registry
from codebind_jax.data.worlds.evalset import EvalSet
from codebind_jax.schema import Frozen, Rule, above, at_least, check_keys, within

PROFILES = ("auto", "tiny", "tiny-plus", "small", "full")
CAPTIONS = ("main", "each", "joined")


def _one_gap(text: str) -> bool:
  return text.count("{}") == 1 and not set("{}") & set(text.replace("{}", ""))


Template = Annotated[str, Rule(_one_gap, "a text with one {}")]


@dataclasses.dataclass(frozen=True)
class Data:
  """Section `data`: the training and evaluation data of a run.

  Attributes:
    root: folder of worlds and features; "" for $CODEBIND_DATA, else the user's cache folder.
    worlds: packaged worlds (`data.worlds.registry`), each a source of its own.
    profile: size of the worlds; auto is small where npm and apt-get answer, else tiny.
    manifest: a user's JSONL manifest instead of the worlds.
    classes: a text file with one class name a line; "" for the labels that occur.
    max_bad_records: number of the manifest's bad records that are skipped before it is an error; the log names each.
    workers: processes that read batches ahead; 0 for threads of this process.
    threads: threads that read batches ahead if there are no workers.
    extra: share of a batch drawn from a world's further named pictures; 0 leaves them out.
    captions: use of a row's further texts: main (not used), each (captions of their own) or joined (one list).
    templates: of training captions.
    templates_of: source -> templates of its captions and classes, in place of the common ones.
    eval_templates: of class names in zero-shot classification.
  """

  root: str = ""
  worlds: tuple[str, ...] = ("icons",)
  profile: Literal[PROFILES] = "auto"
  manifest: str = ""
  classes: str = ""
  max_bad_records: Annotated[int, at_least(0)] = 0
  workers: Annotated[int, at_least(0)] = 0
  threads: Annotated[int, above(0)] = 2
  extra: Annotated[float, within(0, 1, "none", below=True)] = 0.0
  captions: Literal[CAPTIONS] = "each"
  templates: tuple[Template, ...] = ("{}",)
  templates_of: Mapping[str, tuple[Template, ...]] = Frozen()
  eval_templates: tuple[Template, ...] = ("{}",)

  def check(self, path: str) -> None:
    """Refuses unknown worlds."""
    check_keys([world.split("-")[0] for world in self.worlds], registry.WORLDS, f"{path}.worlds")


@dataclasses.dataclass(frozen=True)
class Task:
  """The data of a run.

  Attributes:
    name: of the worlds or the manifest.
    summary: a readable line for each source, with its name and size.
    train: source name -> training rows; empty for evaluation only.
    unique: source name -> the field whose values are the rows' labels: rows of one label are no negatives.
    evals: evaluation sets.
    attributions: (package, licence, credit) of the data, for reports.
    extra: source name -> further training rows, which probes and class means do not use.
  """

  name: str
  summary: str
  train: Mapping[str, Any]
  unique: Mapping[str, str]
  evals: tuple[EvalSet, ...]
  attributions: tuple[tuple[str, str, str], ...] = ()
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def open_task(data: Data, *, default_split: str = "train") -> Task:
  """Opens the worlds or the manifest of `config.data`; builds a world that is not built yet.

  Args:
    data: section of the config.
    default_split: of a manifest's rows that name no split.

  Raises:
    ValueError: naming the fault of the manifest or profile.
    OSError: if the data cannot be fetched or written.
  """
  parts = [_manifest_task(data, default_split)] if data.manifest else [_world_task(w, data) for w in data.worlds]
  for part in parts:
    logging.info("%s", part.summary)
  join = lambda maps: {key: value for one in maps for key, value in one.items()}
  return Task(
    "+".join(p.name for p in parts), "\n".join(p.summary for p in parts), join(p.train for p in parts),
    join(p.unique for p in parts), tuple(e for p in parts for e in p.evals),
    tuple(dict.fromkeys(credit for p in parts for credit in p.attributions)), join(p.extra for p in parts),
  )  # fmt: skip


def _world_task(world: str, data: Data) -> Task:
  module = registry.world_module(world)
  profile = registry.resolve(world, data.profile, data.root or None)
  opened_split = lambda split: open_source(f"world:{world}", split=split, profile=profile, data_dir=data.root or None)
  train = opened_split("train")
  annotate = getattr(module, "annotate", lambda row: row)
  opened, evals = {}, []
  for name, test in module.eval_sets(profile).items():
    if test.split not in opened:
      opened[test.split] = opened_split(test.split)
    whole = opened[test.split]
    picked = [i for i, row in enumerate(whole.rows) if test.keep(row)]
    source = whole.select(picked)
    if not len(source):
      continue
    source.rows = [annotate(row) for row in source.rows]
    evals.append(
      dataclasses.replace(test, name=f"{world}_{name}", world=world, source=source, whole=whole, picked=picked)
    )
  extra = {world: opened_split("extra")} if data.extra and hasattr(module, "EXTRA") else {}
  more = f" and {len(extra[world])} further named pictures" if extra else ""
  summary = f"{world}, profile {profile}: {len(train)} training rows{more}; " + ", ".join(
    f"{e.name} {len(e.source)} of {len(e.candidates)}" for e in evals
  )
  used = set(module.package_ids(profile))
  packages = [p for p in names.table("packages")["packages"] if p["id"] in used]
  credits = tuple((f"{p['name']} {p['version']}", p["licence"], p["attribution"]) for p in packages)
  return Task(world, summary, {world: train}, {world: getattr(module, "UNIQUE", "label")}, tuple(evals), credits, extra)


def _manifest_task(data: Data, default_split: str) -> Task:
  path = pathlib.Path(data.manifest)
  whole = open_source(data.manifest, max_bad_records=data.max_bad_records)
  splits = [row.get("split") or default_split for row in whole.rows]
  pick = lambda wanted: whole.select([i for i, split in enumerate(splits) if split == wanted])
  evals = []
  for split in dict.fromkeys(splits):
    if split.startswith(("val", "test")):
      source = pick(split)
      labels = _labels(data, source)
      fields = ("label",) if labels else ()
      role = split[: 3 + split.startswith("test")]
      evals.append(EvalSet(f"{path.stem}_{split}", path.stem, role, source, labels, fields, fields))
  if not evals and default_split != "train":
    raise ValueError(f"{path}: nothing to evaluate, every record is of split 'train'; allowed: val, test, or no splits")
  train = {path.stem: pick("train")} if "train" in splits else {}
  rows = sum(map(len, train.values()))
  summary = f"{path.name}: {rows} training rows; " + ", ".join(f"{e.name} {len(e.source)}" for e in evals)
  return Task(path.stem, summary, train, dict.fromkeys(train, "label"), tuple(evals))


def _labels(data: Data, source: Any) -> list[str]:
  """Candidate labels: the class list of `config.data.classes`, else all labels of the rows."""
  if data.classes:
    return list(class_names(source, pathlib.Path(data.classes)))
  return list(class_names(source)) if any(row.get("label") for row in source.rows) else []

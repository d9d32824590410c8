"""The data of a run, as `config.data` names it: training rows and evaluation sets."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from absl import logging

from codebind_jax.data import index_cache
from codebind_jax.data.index import SPLITS, of_labels
from codebind_jax.data.joined import joined
from codebind_jax.data.label_captions import LabelCaptions
from codebind_jax.data.opening import class_lines, class_names, held_out, open_source
from codebind_jax.data.records import Source
from codebind_jax.data.worlds import fetch, names, registry
from codebind_jax.data.worlds.evalset import EvalSet
from codebind_jax.evaluators.base import plain_text
from codebind_jax.schema import (
  DISTINCT,
  NONEMPTY,
  Frozen,
  Name,
  NonemptyPlace,
  Place,
  Rule,
  Threads,
  at_least,
  at_most,
  check_keys,
  within,
)  # fmt: skip

SHARED = 100_000  # records from which on the index of a split lies in a file, so that worker processes share it
PROFILES = ("auto", "tiny", "tiny-plus", "small", "full")
CAPTIONS = ("main", "each", "joined")
ROLES = {"val": "validation rows", "test": "test rows"}


def _one_gap(text: str) -> bool:
  return text.count("{}") == 1 and not set("{}") & set(text.replace("{}", ""))


Template = Annotated[str, Rule(_one_gap, "a text with one {}")]
Templates = Annotated[tuple[Template, ...], NONEMPTY]


@dataclasses.dataclass(frozen=True)
class Data:
  """Section `data`: the training and evaluation data of a run.

  Attributes:
    root: folder of worlds and features; "" for $CODEBIND_DATA, else the user's cache folder.
    worlds: packaged data sets, built on your machine; each is a source of its own.
    profile: size of the worlds; auto is small where npm and apt-get answer, else tiny.
    files: a user's files (a path, or several; patterns `*` and `{000..127}`), one source in place of the worlds.
    manifest: another name of `files`.
    named_files: source name -> files, further sources beside the worlds or `files`.
    options: options of the files' format (`data.formats`).
    holdout: share of the training records of files that is held out as val, by hash of the id, where no record is of
      split val or test; 0 for none.
    label_captions: a record with a label and without a text gets the label as its text.
    checked: which records' files are opened before any work: all, some (1,000), none, or auto: all of up to 10,000.
    classes: a text file with one class name a line; "" for the labels that occur.
    max_bad_records: number of unreadable records that may be left out, each named in the log; one more is an error.
    workers: processes that read batches ahead; 0 for threads of this process.
    threads: threads that read and decode, in each process.
    extra: share of a batch drawn from a world's further named pictures; 0 leaves them out.
    captions: use of a row's further texts: main (not used), each (captions of their own) or joined (one list).
    templates: sentences that a training caption is put into, in place of `{}`; one is drawn for every item.
    templates_of: source -> sentences for its captions and its classes, in place of the common ones.
    eval_templates: sentences that a class name is put into for zero-shot classification; their embeddings are averaged.
  """

  root: Place = ""
  worlds: Annotated[tuple[Name, ...], DISTINCT] = ("icons",)
  profile: Literal[PROFILES] = "auto"
  files: Place | tuple[NonemptyPlace, ...] = ()
  manifest: Place = ""
  named_files: Mapping[Name, Annotated[tuple[NonemptyPlace, ...], NONEMPTY]] = Frozen()
  options: Mapping[str, Any] = Frozen()
  holdout: Annotated[float, within(0, 1, "none", below=True)] = 0.1
  label_captions: bool = False
  checked: Literal["auto", "all", "some", "none"] = "auto"
  classes: Place = ""
  max_bad_records: Annotated[int, at_least(0)] = 0
  workers: Annotated[int, at_least(0), at_most(1024)] = 0
  threads: Threads = 2
  extra: Annotated[float, within(0, 1, "none", below=True)] = 0.0
  captions: Literal[CAPTIONS] = "each"
  templates: Templates = ("{}",)
  templates_of: Mapping[Name, Templates] = Frozen()
  eval_templates: Templates = ("{}",)

  @property
  def sources(self) -> dict[str, list[Any]]:
    """Name ("" for the files' own) -> files of every source that is no world."""
    own = [self.files] if isinstance(self.files, str) and self.files else list(self.files)
    own += [self.manifest] if self.manifest else []
    return ({"": own} if own else {}) | {name: list(names) for name, names in self.named_files.items()}

  @property
  def used_worlds(self) -> tuple[str, ...]:
    """The worlds, unless files take their place."""
    return () if "" in self.sources else self.worlds

  def check(self, path: str) -> None:
    """Refuses unknown worlds, and files that are no texts."""
    if not all(isinstance(name, str) and name for names in self.sources.values() for name in names):
      raise ValueError(f"config.{path}.files: got {self.files!r}; allowed: a path or pattern, or several")
    check_keys([world.split("-")[0] for world in self.worlds], registry.WORLDS, f"{path}.worlds")


@dataclasses.dataclass(frozen=True)
class Task:
  """The data of a run.

  Attributes:
    name: of the worlds or the manifest.
    summary: a readable line for each source, with its name and size.
    train: source name -> training rows; empty for evaluation only.
    evals: evaluation sets.
    attributions: (package, licence, credit) of the data, for reports.
    extra: source name -> its training rows and further ones after them, which probes and class means do not use.
  """

  name: str
  summary: str
  train: Mapping[str, Source]
  evals: tuple[EvalSet, ...]
  attributions: tuple[tuple[str, str, str], ...] = ()
  extra: Mapping[str, Source] = dataclasses.field(default_factory=dict)

  @property
  def drawn(self) -> dict[str, Source]:
    """Source name -> all rows that batches are drawn from."""
    return {**self.train, **self.extra}

  def close(self) -> None:
    """Closes what reading the sources has opened; a later read opens it anew."""
    for source in (*self.drawn.values(), *self.train.values(), *(test.source for test in self.evals)):
      source.close()


def open_task(data: Data, *, default_split: str = "train") -> Task:
  """Opens the worlds and files of `config.data`; builds a world that is not built yet.

  Args:
    data: section of the config.
    default_split: of records of files that name no split.

  Raises:
    ValueError: naming the fault of the files or the profile.
    OSError: if the data cannot be fetched or written.
  """
  parts = [_file_task(data, name, names, default_split) for name, names in data.sources.items()]
  parts += [_world_task(world, data) for world in data.used_worlds]
  for part in parts:
    logging.info("%s", part.summary)
  join = lambda maps: {key: value for one in maps for key, value in one.items()}
  return Task(
    "+".join(p.name for p in parts), "\n".join(p.summary for p in parts), join(p.train for p in parts),
    tuple(e for p in parts for e in p.evals),
    tuple(dict.fromkeys(credit for p in parts for credit in p.attributions)), join(p.extra for p in parts),
  )  # fmt: skip


def _world_task(world: str, data: Data) -> Task:
  module = registry.world_module(world)
  profile = registry.resolve(world, data.profile, data.root or None)
  opened_split = lambda split: open_source(f"world:{world}", split=split, profile=profile, data_dir=data.root or None)
  train, unique = opened_split("train"), getattr(module, "UNIQUE", "label")
  opened, evals = {}, []
  for name, test in module.eval_sets(profile).items():
    if test.split not in opened:
      opened[test.split] = opened_split(test.split)
    whole = opened[test.split]
    source = whole.select(i for i in range(len(whole)) if test.keep(whole.fields(i)))
    if len(source):
      title = f"{_world_title(world)}, {test.title or ROLES[test.role]}"
      title += " (validation)" if test.title and test.role == "val" else ""
      evals.append(dataclasses.replace(test, name=f"{world}_{name}", world=world, source=source, title=title))
  extra = opened_split("extra") if data.extra and hasattr(module, "EXTRA") else None
  more = f" and {len(extra)} further named pictures" if extra else ""
  summary = f"{world}, profile {profile}: {len(train)} training rows{more}; " + ", ".join(
    f"{e.name} {len(e.source)} of {len(e.candidates)}" for e in evals
  )
  used = set(module.package_ids(profile))
  packages = [p for p in names.table("packages")["packages"] if p["id"] in used]
  credits = tuple((f"{p['name']} {p['version']}", p["licence"], p["attribution"]) for p in packages)
  return Task(
    world, summary, {world: train.grouped(unique)}, tuple(evals), credits,
    {world: joined([train, extra], field=unique, unique=False)} if extra else {},
  )  # fmt: skip


def _world_title(world: str) -> str:
  """A world's name with the modalities it lists: "synthetic-audio-text" is called "synthetic (audio, text)"."""
  name, *modalities = world.split("-")
  return f"{name} ({', '.join(modalities)})" if modalities else name


def _file_task(data: Data, name: str, names: Sequence[str], default_split: str) -> Task:
  """The records of one source of files, and its evaluation sets."""
  opened = functools.partial(
    open_source, data_dir=data.root or None, max_bad_records=data.max_bad_records, check=data.checked, **data.options
  )  # fmt: skip
  try:
    whole = opened(names)
  except FileNotFoundError as error:
    key = f"named_files.{name}" if name else "manifest" if error.filename == data.manifest else "files"
    raise FileNotFoundError(2, f"config.data.{key}: {error.strerror}", error.filename) from error
  spellings = _spellings(data, whole)
  if spellings:
    whole = copy.copy(whole)
    whole.index = of_labels(whole.index, spellings)
  name = name or whole.name
  if data.label_captions and (lacking := _labels_alone(whole)):
    logging.info("%s: %d records without text have their label as caption", name, lacking)
    whole = LabelCaptions(whole)
    if all(re.fullmatch(r"[-+.\d]+", label) for label in whole.index.labels):
      logging.warning("%s: the labels are numbers, such as %r, which say nothing as captions; give names, or "
                      "--config.data.label_captions=False", name, whole.index.labels[0])  # fmt: skip
  split = np.where(whole.index.split < 0, SPLITS.index(default_split), whole.index.split)
  parts = {s: whole.select(np.flatnonzero(split == n)) for n, s in enumerate(SPLITS) if (split == n).any()}
  held = bool(data.holdout) and list(parts) == ["train"]
  if held:
    out = held_out(parts["train"], data.holdout)
    logging.info("%s: no record is of split val or test, so %d of %d are held out as val, by hash of the id "
                 "(config.data.holdout=%g; 0 for none)", name, out.sum(), len(out), data.holdout)  # fmt: skip
    classes = np.unique(parts["train"].index.label[out])
    if len(classes) == 1 and classes[0] >= 0 and (parts["train"].index.label != classes[0]).any():
      logging.warning("%s: all rows held out have the label %r; mark others by split val, or raise "
                      "config.data.holdout", name, whole.index.labels[classes[0]])  # fmt: skip
    kept = {"train": np.flatnonzero(~out), "val": np.flatnonzero(out)}
    parts = {split: parts["train"].select(rows) for split, rows in kept.items() if len(rows)}
  for part in parts.values():
    if len(part) >= SHARED:
      part.index = index_cache.on_disk(part.index, fetch.data_dir(data.root or None) / "index")
  evals = []
  for role in ("val", "test"):
    if role in parts:
      found = _labels(data, parts[role], parts.get("train"))
      labels = list(dict.fromkeys(spellings.get(label, label) for label in found))
      fields = ("label",) if labels else ()
      title = f"{name}, {ROLES[role]}" + (" held out" if role == "val" and held else "")
      texts = "main" if data.captions == "main" else "all"
      evals.append(EvalSet(f"{name}_{role}", name, role, parts[role], labels, fields, fields, _pairs(parts[role]),
                           texts=texts, spellings=spellings, title=title))  # fmt: skip
  if not evals and default_split != "train":
    raise ValueError(f"{whole.name}: nothing to evaluate, every record is of split 'train'; allowed: val, test, or "
                     "no splits")  # fmt: skip
  train = {name: parts["train"]} if "train" in parts else {}
  rows = sum(map(len, train.values()))
  summary = f"{name}: {rows} training rows; " + ", ".join(f"{e.name} {len(e.source)}" for e in evals)
  return Task(name, summary, train, tuple(evals))


def _labels_alone(source: Source) -> int:
  """Number of records with a label and without a text."""
  return int(((source.index.label >= 0) & ((source.index.has & np.uint32(source.index.bit("text"))) == 0)).sum())


def _pairs(source: Source) -> tuple[tuple[str, str, str], ...]:
  """Retrieval between modalities other than text that at least two records have both."""
  items = [m for m in source.modalities if m != "text"]
  both = lambda a, b: len(np.intersect1d(source.rows_with(a), source.rows_with(b)))
  return tuple((a, b, "id") for n, a in enumerate(items) for b in items[n + 1 :] if both(a, b) > 1)


def _spellings(data: Data, source: Source) -> dict[str, str]:
  """Label -> the class that it is, of labels that differ from it in case and blanks alone; the log names them.

  The class is the line of `config.data.classes`, else the spelling of the most rows.
  """
  index = source.index
  rows = np.bincount(index.label[index.label >= 0], minlength=len(index.labels))
  order = [index.labels[n] for n in np.argsort(-rows, kind="stable")]
  listed = class_lines(pathlib.Path(data.classes)) if data.classes else ()
  chosen: dict[str, str] = {}
  for label in (*listed, *order):
    chosen.setdefault(plain_text(label), label)
  found = {label: name for label in index.labels if (name := chosen[plain_text(label)]) != label}
  if found:
    said = ", ".join(f"{label!r} is taken as {name!r}" for label, name in found.items())
    logging.warning("%s: labels that differ in case and blanks alone are one class: %s", source.name, said)
  return found


def _labels(data: Data, source: Source, train: Source | None) -> list[str]:
  """Candidate labels: the class list of `config.data.classes`, else the labels that occur.

  Those of the training rows count as well if the set has some of them; a set of unseen labels alone has its own.
  """
  if data.classes:
    return list(class_names(source, pathlib.Path(data.classes)))
  if not (source.index.label >= 0).any():
    return []
  own = class_names(source)
  trained = class_names(train) if train and (train.index.label >= 0).any() else ()
  return sorted({*own, *trained}) if set(own) & set(trained) else list(own)

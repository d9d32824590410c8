"""What `config.data` names: rows to train on, sets to evaluate on, and what each is for."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import logging

from codebind_jax.data.sources import class_names, open_source


@dataclasses.dataclass(frozen=True)
class EvalSet:
  """A set to evaluate on.

  Attributes:
    name: metrics are called `eval/<name>/...`.
    role: "val" to choose by, "test" to read once per reported model.
    source: its rows.
    candidates: labels to choose among in zero-shot classification; empty where rows have no labels.
    probes: fields that a linear probe tells, learned on the training rows and tested here.
    means: fields told by the nearest class mean of the training rows.
  """

  name: str
  role: str
  source: Any
  candidates: Sequence[str]
  probes: tuple[str, ...] = ()
  means: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
  """Everything a run needs to know of its data.

  Attributes:
    name: of the world or manifest; metrics over all validation sets are called `eval/<name>/...`.
    summary: one line a person can read: what it is and how much.
    train: rows to train on; None when only evaluating.
    evals: sets to evaluate on.
    attributions: whose work the data is: (package, licence, credit), to be shown in reports.
    extra: further rows to train on, that no probe or class mean looks at; None for none.
  """

  name: str
  summary: str
  train: Any
  evals: tuple[EvalSet, ...]
  attributions: tuple[tuple[str, str, str], ...] = ()
  extra: Any = None


def open_task(data: Any, *, default_split: str = "train") -> Task:
  """Opens the world or the manifest of `config.data`; builds the world where it is not built yet.

  Args:
    data: `config.data`.
    default_split: of the rows of a manifest that names no splits.

  Raises:
    ValueError: naming what is wrong with the manifest or profile.
    OSError: if the data cannot be fetched or written.
  """
  return _manifest_task(data, default_split) if data.manifest else _icons_task(data)


def _icons_task(data: Any) -> Task:
  from codebind_jax.data.worlds import icons, names, registry
  from codebind_jax.pretrained.class_names import imagenet_names

  folder = registry.ensure(data.world, data.profile, data.root or None)
  profile = folder.parent.name
  spec = {"name": data.world, "profile": profile, "data_dir": data.root or None}
  train = open_source(spec | {"split": "train"})
  # The image trunk knows ImageNet's classes by name; numbers on concepts it knows and does not know are kept apart.
  in_imagenet = {names.to_concept(lemma) for name in imagenet_names() for lemma in name.split(", ")}
  evals = []
  for name, test in icons.eval_sets(profile).items():
    source = open_source(spec | {"split": test.split})
    source = source.select([i for i, row in enumerate(source.rows) if test.keep(row)])
    for row in source.rows:
      row["imagenet"] = "yes" if row["concept"] in in_imagenet else "no"
    # The artist family is asked of unseen concepts, so that it cannot be told from the subject; the concept's mean is
    # asked of unseen artists.
    probes = ("family",) if name.endswith("_concept") else ()
    means = ("label",) if name.endswith("_artist") else ()
    evals.append(EvalSet(f"{data.world}_{name}", test.role, source, list(test.candidates), probes, means))
  extra = open_source(spec | {"split": "extra"}) if data.extra else None
  more = f" and {len(extra)} further named pictures" if extra else ""
  summary = f"{data.world}, profile {profile}: {len(train)} training rows{more}; " + ", ".join(
    f"{e.name} {len(e.source)} of {len(e.candidates)}" for e in evals
  )
  logging.info("%s", summary)
  packages = [p for p in names.table("packages")["packages"] if p["id"] in icons.package_ids(profile)]
  credits = tuple((f"{p['name']} {p['version']}", p["licence"], p["attribution"]) for p in packages)
  return Task(data.world, summary, train, tuple(evals), credits, extra)


def _manifest_task(data: Any, default_split: str) -> Task:
  path = pathlib.Path(data.manifest)
  whole = open_source({"manifest": data.manifest, "max_bad_records": data.max_bad_records})
  splits = [row.get("split") or default_split for row in whole.rows]
  pick = lambda wanted: whole.select([i for i, split in enumerate(splits) if split == wanted])
  evals = []
  for split in dict.fromkeys(splits):
    if split.startswith(("val", "test")):
      source = pick(split)
      labels = _labels(data, source)
      evals.append(EvalSet(f"{path.stem}_{split}", split[: 3 + split.startswith("test")], source, labels,
                           ("label",) if labels else (), ("label",) if labels else ()))
  if not evals and default_split != "train":
    raise ValueError(f"{path}: nothing to evaluate, every record is of split 'train'; allowed: val, test, or no splits")
  train = pick("train") if "train" in splits else None
  summary = f"{path.name}: {len(train) if train else 0} training rows; " + ", ".join(
    f"{e.name} {len(e.source)}" for e in evals
  )
  logging.info("%s", summary)
  return Task(path.stem, summary, train, tuple(evals))


def _labels(data: Any, source: Any) -> list[str]:
  """Candidate labels: the class list of `config.data.classes`, else every label the rows have; none without labels."""
  if data.classes:
    return list(class_names(source, pathlib.Path(data.classes)))
  return list(class_names(source)) if any(row.get("label") for row in source.rows) else []

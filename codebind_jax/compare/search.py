"""How well items are found whose vectors are coded: zero-shot, retrieval, emergent pairs and a linear probe.

Items are always coded; what is looked for is coded as they are, or not, as a search among stored codes can.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from codebind_jax.api import Model
from codebind_jax.compare.evaluation import finished
from codebind_jax.config import Config
from codebind_jax.data.task import EvalSet, Task
from codebind_jax.evaluate import FINAL, Evaluation
from codebind_jax.evaluators import base
from codebind_jax.evaluators.crossmodal import transfer
from codebind_jax.norm import unit
from codebind_jax.trunks.feeds import Feeder

QUERIES = ("uncoded", "coded")
KINDS = ("zeroshot", "r1", "r10", "emergent", "probe")
SCORE = "score"  # mean of zeroshot and r1
COLUMNS = ("shared", "query", "label", "caption")
Decode = Callable[[str, Float[np.ndarray, "n d"]], Float[np.ndarray, "n d"]]


@dataclasses.dataclass(frozen=True)
class Vectors:
  """Embeddings of one model on the sets of some roles.

  Attributes:
    sets: the sets, in order.
    tables: name of a set -> its rows.
    prompts: texts of the candidate classes.
    coded: [n, d], their embeddings as items are coded.
    uncoded: [n, d], before that.
    train: source -> modality -> `shared`, `query` and `label` of its training rows.
  """

  sets: tuple[EvalSet, ...]
  tables: Mapping[str, base.Captioned]
  prompts: Sequence[str]
  coded: Float[np.ndarray, "n d"]
  uncoded: Float[np.ndarray, "n d"]
  train: Mapping[str, base.Table]

  def by(self, decode: Decode) -> Vectors:
    """The vectors with `decode(modality, uncoded)` as what is coded."""
    of = lambda m, columns: dict(columns) | {"shared": units(decode(m, columns["query"]))}
    tables = {name: base.Captioned({m: of(m, columns) for m, columns in table.items()}, table.captions)
              for name, table in self.tables.items()}  # fmt: skip
    train = {name: {m: of(m, columns) for m, columns in table.items()} for name, table in self.train.items()}
    coded = units(decode("text", self.uncoded)) if len(self.prompts) else self.coded
    return dataclasses.replace(self, tables=tables, coded=coded, train=train)

  def rows_of(self, modality: str) -> Float[np.ndarray, "n d"]:
    """The distinct training vectors of a modality, before they are coded."""
    found = [table[modality]["query"] for table in self.train.values() if modality in table]
    return np.unique(np.concatenate(found), axis=0) if found else np.zeros((0, 0), np.float32)

  @property
  def modalities(self) -> tuple[str, ...]:
    """Those that have training rows."""
    return tuple(dict.fromkeys(m for table in self.train.values() for m in table))


def units(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
  """Rows at unit length."""
  return np.asarray(unit(np.asarray(x, np.float32)))


class Search:
  """Measures the search of a model; a `StageEvaluation` of the trainer.

  Metrics of a role r (`val`, `test`) and of queries q (`uncoded`, `coded`): `eval/r/q/zeroshot`, `r1`, `r10`,
  `emergent` (recall at 5), `probe`, means over sets, modalities and directions; and `eval/r/q/score`, the mean of
  zeroshot and r1. The probe (ridge regression of the label, for rows whose label occurs in training) has coded rows on
  both sides, whatever the queries are.

  Args:
    config: of a run; only `data`, `emergent` and `test`, whether the test sets are read, are used.
    task: the data.
    feeder: of the towers.
  """

  def __init__(self, config: Config, task: Task, feeder: Feeder):
    self.config, self.task, self.trunks = config, task, feeder.trunks
    self._by_query = {
      q: Evaluation(dataclasses.replace(config, queries=q), task, feeder, ("zeroshot", "retrieval")) for q in QUERIES
    }

  @property
  def roles(self) -> tuple[str, ...]:
    """Roles of the sets that are read."""
    return ("val", "test") if self.config.test else ("val",)

  def validate(self, model: Model, worlds: Collection[str]) -> dict[str, float]:
    """Nothing during training: runs are short, and the rate is chosen by the end."""
    return {}

  def after_stage(self, model: Model, step: int, stage: str, writer: Any, worlds: Collection[str]) -> None:
    """Nothing between stages."""

  def finish(self, model: Model, step: int, writer: Any) -> dict[str, float]:
    """The metrics of a finished run on the validation sets, measured once."""
    if (done := finished(writer.path.parent)) is not None:
      return done
    found = self.measured(self.vectors(model, ("val",)))
    writer.write(step, FINAL, found)
    writer.flush()
    return found

  def vectors(self, model: Model, roles: Sequence[str]) -> Vectors:
    """A model's embeddings on the sets of `roles`, and of the training rows.

    Raises:
      ValueError: for the test sets, unless `config.test` is set.
    """
    if unread := [role for role in roles if role not in self.roles]:
      raise ValueError(f"config.test: got False, but the sets of role {unread[0]!r} are asked for; allowed: True")
    one = self._by_query["uncoded"]
    sets = tuple(test for test in self.task.evals if test.role in roles)
    prompts, found = one.prompts_of(model, sets)
    train = {}
    for world in self.task.train:
      rows = one.train_table(model, world)
      train[world] = {m: {name: columns[name] for name in COLUMNS if name in columns} for m, columns in rows.items()}
    none = np.zeros((0, model.config.model.shared_dim), np.float32)
    return Vectors(
      sets, {test.name: one.table(model, test) for test in sets}, prompts, found.shared if found else none,
      found.query if found else none, train,
    )  # fmt: skip

  def measured(self, vectors: Vectors) -> dict[str, float]:
    """The metrics of embeddings."""
    metrics: dict[str, float] = {}
    probes = {role: self._probe(vectors, role) for role in dict.fromkeys(test.role for test in vectors.sets)}
    for q, evaluation in self._by_query.items():
      prompts = dict(zip(vectors.prompts, vectors.uncoded if q == "uncoded" else vectors.coded))
      found = evaluation.of_tables(vectors.sets, vectors.tables, prompts)
      for role, probe in probes.items():
        names = tuple(f"eval/{test.name}/" for test in vectors.sets if test.role == role)
        means = {
          "zeroshot": _mean(found, names, "/zeroshot/", "/top1"), "r1": _mean(found, names, "/retrieval/", "/r1"),
          "r10": _mean(found, names, "/retrieval/", "/r10"), "probe": probe,
          "emergent": _mean(found, (f"eval/{role}/emergent/",), "/", "/r5"),
        }  # fmt: skip
        scored = [means[kind] for kind in ("zeroshot", "r1") if means[kind] is not None]
        means[SCORE] = float(np.mean(scored)) if scored else None
        metrics |= {f"eval/{role}/{q}/{kind}": value for kind, value in means.items() if value is not None}
    return metrics

  def _probe(self, vectors: Vectors, role: str) -> float | None:
    """Mean accuracy over sets and modalities; None where no set has labels of the training rows."""
    values = []
    for test in (test for test in vectors.sets if test.role == role):
      train, table = vectors.train.get(test.world, {}), vectors.tables[test.name]
      for m in table:
        if m == "text" or m not in train or "label" not in train[m] or "label" not in table[m]:
          continue
        sides = [{name: rows[m][name][rows[m]["label"] != ""] for name in ("shared", "label")}
                 for rows in (train, table)]  # fmt: skip
        column = lambda name, sides=sides, m=m: [{m: side[name]} for side in sides]
        values += transfer(*column("shared"), *column("label")).values()
    return float(np.mean(values)) if values else None


def _mean(found: Mapping[str, float], starts: tuple[str, ...], part: str, ending: str) -> float | None:
  values = [value for key, value in found.items()
            if key.startswith(starts) and part in key and key.endswith(ending) and "=" not in key]  # fmt: skip
  return float(np.mean(values)) if values else None

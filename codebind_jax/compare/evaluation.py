"""Metrics of a comparison: heads trained on one modality and tested on others, and the use of codes by modality."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from codebind_jax import files
from codebind_jax.api import Model
from codebind_jax.compare.channels import Sliced
from codebind_jax.config import Compare, Config
from codebind_jax.data.task import EvalSet, Task
from codebind_jax.evaluate import FINAL, Evaluation
from codebind_jax.evaluators.crossmodal import (
  code_sharing,
  error_over_labels,
  fit_head,
  recall_at_one,
  sharing_sets,
  transfer_answers,
)
from codebind_jax.methods import toc
from codebind_jax.methods.base import EXTRA
from codebind_jax.runtime.checkpoint import SavedRun
from codebind_jax.runtime.metrics import FILE, read_metrics
from codebind_jax.trunks.feeds import Feeder

Table = dict[str, dict[str, np.ndarray]]  # modality -> column -> one value a row
PLAN_ROWS = 48  # rows of the transport plan shown


@dataclasses.dataclass(frozen=True)
class Transfer:
  """Training and test rows of heads.

  Attributes:
    name: in the metrics; "" if there is only one transfer.
    worlds: whose training rows train the heads.
    sets: role ("val", "test") -> names of the sets that test the heads.
    fields: those that the heads predict.
  """

  name: str
  worlds: tuple[str, ...]
  sets: Mapping[str, tuple[str, ...]]
  fields: tuple[str, ...]


def transfers_of(settings: Compare, task: Task) -> tuple[Transfer, ...]:
  """The transfers of `config.compare.transfers` with those of their sets that the data has; else one of all sets.

  Raises:
    ValueError: if the profile has none of the sets of a transfer.
  """
  available = {role: [e.name for e in task.evals if e.role == role] for role in ("val", "test")}
  if not settings.transfers:
    every = {role: tuple(names) for role, names in available.items()}
    return (Transfer("", tuple(task.train), every, settings.fields),)
  transfers = []
  for name, entry in settings.transfers.items():
    sets = {role: tuple(s for s in getattr(entry, role) if s in names) for role, names in available.items()}
    for role, chosen in sets.items():
      if not chosen:
        raise ValueError(f"config.compare.transfers.{name}.{role}: the data has none of {list(getattr(entry, role))}; "
                         f"allowed: {available[role]}")
    transfers.append(Transfer(name, entry.worlds, sets, entry.fields))
  return tuple(transfers)


def finished(folder: files.Path) -> dict[str, float] | None:
  """The final metrics of a run; None if it is not finished."""
  for line in read_metrics(folder) if files.is_file(folder / FILE) else []:
    if line["stage"] == FINAL:
      return {name: value for name, value in line.items() if name not in ("step", "stage", "warning")}
  return None


class CrossModal:
  """Evaluates a model by heads trained on one modality and tested on the others; a `StageEvaluation` of the trainer.

  Metrics of every role r and field f (`eval/r/NAME/f` where there are several transfers, whose means are `eval/r/cross`
  and `within`): `eval/r/f/A>B`, accuracy on B of a head of A; `within`, `cross` and `all`, means over A = B and A != B,
  and that of one head on all modalities together; `cross_error`, the standard error of `cross` over the field's values;
  `eval/r/recall`, mean over pairs of recall at 1; `codes/shared` and
  `codes/single`, means over pairs. With `stages` also the usual zero-shot and retrieval metrics, and their means
  `eval/r/zeroshot` (top-1) and `eval/r/retrieval` (recall at 1).

  Args:
    config: of a run; only `data` and `test`, whether the test sets are read, are used.
    task: the data.
    feeder: of the towers.
    transfers: see `Transfer`.
    stages: also measures zero-shot and retrieval as a training run does, in place of `recall`.
    feeds: those made, shared between evaluations of one task.
  """

  def __init__(
    self, config: Config, task: Task, feeder: Feeder, transfers: Sequence[Transfer], *, stages: bool = False,
    feeds: dict[tuple[str, str], Any] | None = None,
  ):
    self.config, self.task, self.trunks, self.transfers = config, task, feeder.trunks, tuple(transfers)
    self._feeder, self._feeds = feeder, {} if feeds is None else feeds
    self._stages = Evaluation(config, task, feeder, ("zeroshot", "retrieval")) if stages else None

  def validate(self, model: Model, worlds: Collection[str]) -> dict[str, float]:
    """On the validation sets."""
    return self.heads(model, ("val",))

  def after_stage(self, model: Model, step: int, stage: str, writer: Any, worlds: Collection[str]) -> None:
    """Does nothing, because comparisons have one stage."""

  def finish(self, model: Model, step: int, writer: Any) -> dict[str, float]:
    """All metrics of a finished run, measured once."""
    if (done := finished(writer.path.parent)) is not None:
      return done
    roles = ("val", "test") if self.config.test else ("val",)
    found = self.heads(model, roles) | self._codes(model)
    if self._stages:
      found |= self._usual(model, roles)
    writer.write(step, FINAL, found)
    writer.flush()
    return found

  def heads(self, model: Model, roles: Sequence[str]) -> dict[str, float]:
    """Accuracies of heads, for all transfers."""
    found: dict[str, float] = {}
    train = {world: self._embed(model, f"{world}/train", source) for world, source in self.task.train.items()}
    for role in roles:
      for one in self.transfers:
        name = f"eval/{role}/{one.name}" if len(self.transfers) > 1 else f"eval/{role}"
        test = pooled(self._embed(model, e.name, e.source) for e in self._sets(one, role))
        found |= self._of_tables(name, pooled(train[world] for world in one.worlds), test, one.fields)
      for kind in ("cross", "within") if len(self.transfers) > 1 else ():
        values = [v for key, v in found.items() if key.startswith(f"eval/{role}/") and key.endswith(f"/{kind}")]
        found |= {f"eval/{role}/{kind}": float(np.mean(values))} if values else {}
    return found

  def probe(self, model: Model, folder: files.Path) -> dict[str, Any]:
    """The use of the codes of a finished run, whose folder holds the checkpoint.

    Returns:
      `sharing` of the codes between modalities, `toc` (redundancy before and after the choice of three quarters of the
      channels, and the test metrics after it) and, for a method that has one, the transport `plan` of a batch; empty
      for a method without a shared codebook.
    """
    found: dict[str, Any] = {}
    if "shared" in model.method.codebook_sizes:
      codes = toc.codes_of(model)
      chosen = toc.choose(codes, 0, (1, 0))
      after = self.heads(Sliced(model, np.asarray(chosen["channels"]), chosen["of"]), ("test",))
      found["toc"] = {"before": chosen["redundancy_before"], "after": chosen["redundancy_after"],
                      "kept": len(chosen["channels"]), "of": chosen["of"], "metrics": after}  # fmt: skip
      by_modality = self._codes_of_rows(model)
      size = model.method.codebook_sizes["shared"]
      pairs = {f"{a}+{b}": code_sharing(by_modality[a], by_modality[b], size)
               for a, b in itertools.combinations(sorted(by_modality), 2)}  # fmt: skip
      found["sharing"] = {"pairs": pairs, "sets": sharing_sets(by_modality, size)}
    if hasattr(model.method, "plan"):
      found["plan"] = self._plan(model, folder)
    return found

  def _sets(self, one: Transfer, role: str) -> list[EvalSet]:
    return [e for e in self.task.evals if e.name in one.sets[role]]

  def _embed(self, model: Model, name: str, source: Any) -> Table:
    """Embeddings, codes and fields of every modality's rows; in text a row for every distinct string."""
    fields, table = {f for one in self.transfers for f in one.fields}, {}
    for m in model.modalities:
      if (name, m) not in self._feeds:
        self._feeds[name, m] = self._feed(source, m)
      rows, feed, columns = self._feeds[name, m]
      if len(rows):
        out = model.embed_rows(m, feed, rows).embeddings
        table[m] = {"shared": out.shared, "codes": model.method.numbered("shared", out.codes_shared)}
        table[m] |= {f: columns[f] for f in (*fields, "id")}
    return table

  def _feed(self, source: Any, m: str) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """(rows, their feed, their fields) of a modality."""
    rows, fields = source.rows_with(m), {f for one in self.transfers for f in one.fields}
    found = [source.fields(int(row)) for row in rows]
    if m == "text" and len(rows):
      found = list({row["text"][0]: row for row in reversed(found)}.values())[::-1]
      feed, rows = self._feeder.texts([row["text"][0] for row in found]), np.arange(len(found))
    else:
      feed = self._feeder.clean(source, m) if len(rows) else None
    return rows, feed, {f: np.array([str(row.get(f) or "") for row in found]) for f in (*fields, "id")}

  def _of_tables(self, name: str, train: Table, test: Table, fields: Sequence[str]) -> dict[str, float]:
    found = {}
    for field in fields:
      a, b = (
        {m: rows(c, c[field] != "") for m, c in table.items() if (c[field] != "").any()} for table in (train, test)
      )
      column = lambda table, name: {m: c[name] for m, c in table.items()}
      answers = transfer_answers(column(a, "shared"), column(b, "shared"), column(a, field), column(b, field))
      accuracy = {pair: 100.0 * float(np.mean(right)) for pair, (_, right) in answers.items()}
      found |= {f"{name}/{field}/{one}>{other}": value for (one, other), value in accuracy.items()}
      for kind, same in (("within", True), ("cross", False)):
        values = [value for (one, other), value in accuracy.items() if (one == other) == same]
        found |= {f"{name}/{field}/{kind}": float(np.mean(values))} if values else {}
      across = [answer for (one, other), answer in answers.items() if one != other]
      found |= {f"{name}/{field}/cross_error": error_over_labels(across)} if across else {}
      if aligned(a) and aligned(b):
        join = lambda table: np.concatenate([table[m]["shared"] for m in sorted(table)], axis=1)
        labels = lambda table, field=field: table[sorted(table)[0]][field]
        head = fit_head(join(a), labels(a))
        found[f"{name}/{field}/all"] = 100.0 * float(np.mean(head.predict(join(b)) == labels(b)))
    if not self._stages and aligned(test):
      recalls = [recall_at_one(test[a]["shared"], test[b]["shared"])
                 for a, b in itertools.combinations(sorted(test), 2)]  # fmt: skip
      found[f"{name}/recall"] = float(np.mean(recalls))
    return found

  def _codes_of_rows(self, model: Model) -> dict[str, np.ndarray]:
    """Shared codes that each modality's training rows chose."""
    train = pooled(self._embed(model, f"{world}/train", source) for world, source in self.task.train.items())
    return {m: columns["codes"] for m, columns in sorted(train.items())}

  def _codes(self, model: Model) -> dict[str, float]:
    if "shared" not in model.method.codebook_sizes:
      return {}
    codes, size = self._codes_of_rows(model), model.method.codebook_sizes["shared"]
    pairs = [code_sharing(codes[a], codes[b], size) for a, b in itertools.combinations(codes, 2)]
    return {f"codes/{kind}": float(np.mean([p[i] for p in pairs])) for i, kind in enumerate(("shared", "single"))}

  def _usual(self, model: Model, roles: Sequence[str]) -> dict[str, float]:
    found = self._stages.everything(model)
    for role in roles:
      starts = tuple(f"eval/{e.name}/" for e in self.task.evals if e.role == role)
      for kind, ending in (("zeroshot", "/top1"), ("retrieval", "/r1")):
        values = [v for key, v in found.items()
                  if key.startswith(starts) and f"/{kind}/" in key and key.endswith(ending) and "=" not in key]
        found |= {f"eval/{role}/{kind}": float(np.mean(values))} if values else {}
    return found

  def _plan(self, model: Model, folder: files.Path) -> dict[str, Any]:
    """The transport plans of the first bound pair's validation rows, from the teacher as in training.

    Rows are ordered by their first field's value and sum to 1.
    """
    with contextlib.closing(SavedRun(folder)) as run:
      teacher = run.read_arrays(("aux",))["aux"]["teacher"]
    guide = Model(model.config, teacher | {EXTRA: model.params[EXTRA]}, {}, self.trunks, modalities=model.modalities)
    pair = model.config.ordered[0].pairs[0]
    one = self.transfers[0]
    table = pooled(self._embed(guide, e.name, e.source) for e in self._sets(one, "val"))
    ids = [i for i in table[pair[0]]["id"] if i in set(table[pair[1]]["id"])][:PLAN_ROWS]
    at = {m: {i: n for n, i in enumerate(table[m]["id"])} for m in pair}
    shown = [str(table[pair[0]][one.fields[0]][at[pair[0]][i]]) for i in ids]
    order = np.argsort(shown, kind="stable")
    codes = jnp.asarray(toc.codes_of(model))
    plans = {}
    for m in pair:
      features = table[m]["shared"][[at[m][ids[n]] for n in order]]
      plans[m] = np.round(len(ids) * np.asarray(model.method.plan(features, codes)), 5).tolist()
    return {"modalities": list(pair), "rows": [shown[n] for n in order], "plans": plans}


def rows(columns: Mapping[str, np.ndarray], keep: np.ndarray) -> dict[str, np.ndarray]:
  """Some rows of a modality's columns."""
  return {name: values[keep] for name, values in columns.items()}


def pooled(tables: Iterable[Table]) -> Table:
  """The rows of several tables, concatenated by modality."""
  parts: dict[str, list[Mapping[str, np.ndarray]]] = {}
  for table in tables:
    for m, columns in table.items():
      parts.setdefault(m, []).append(columns)
  return {m: {name: np.concatenate([c[name] for c in found]) for name in found[0]} for m, found in parts.items()}


def aligned(table: Table) -> bool:
  """Whether all modalities have the same rows in the same order."""
  return len({tuple(columns["id"]) for columns in table.values()}) == 1

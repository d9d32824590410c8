"""What the specific part adds to the shared one, beside a random projection and a second head of plain InfoNCE.

Command: python -m codebind_jax.tools.seeds --config=configs/stage1.py --workdir=DIR --seeds=3
         python -m benchmarks.specific_part --runs=DIR [--baselines=DIR] [--set=icons_val_concept] [--modality=image]
             [--field=family]
Linear probes, fitted on the training rows, predict a field of the records of an evaluation set, whose concepts or
objects are new. They are given the run's parts; the shared part of its continuous baseline; beside that the
baseline's specific head, which no term trains (a random projection of the same tokens), or the shared part of the
next seed's baseline (a second head of equal width). Balanced accuracy, mean and sample standard deviation over the
seeds. Runs with further terms are trained by ... --workdir=MORE --config.baseline=False
--config.stages.bridges.losses.reconstruction=1.0, and measured beside the same baselines by --runs=MORE
--baselines=DIR.
"""

import dataclasses
import pathlib

import numpy as np
from absl import app, flags, logging

from codebind_jax.api import load
from codebind_jax.data.task import open_task
from codebind_jax.evaluate import Evaluation
from codebind_jax.evaluators.probe import LinearProbe
from codebind_jax.norm import unit
from codebind_jax.trunks.feeds import Feeder

_RUNS = flags.DEFINE_string("runs", None, "Folder of the runs seed0, seed1, ...")
_BASELINES = flags.DEFINE_string("baselines", None, "Folder of the runs whose baselines are taken; default --runs.")
_SET = flags.DEFINE_string("set", "icons_val_concept", "Evaluation set.")
_MODALITY = flags.DEFINE_string("modality", "image", "Modality that is probed.")
_FIELD = flags.DEFINE_string("field", "family", "Field of the records that is told.")


def beside(one, other):
  """Two embeddings of the same rows as one vector of length 1."""
  return np.asarray(unit(np.concatenate([one, other], axis=1)))


def parts(run, baseline, second):
  """Name -> vectors, of the columns of one modality's rows in three models."""
  return {
    "shared": run["shared"], "specific": run["specific"], "full": run["full"], "baseline": baseline["shared"],
    "random projection": baseline["specific"],
    "baseline and random projection": beside(baseline["shared"], baseline["specific"]),
    "baseline and second head": beside(baseline["shared"], second["shared"]),
  }  # fmt: skip


def told(ours, plain, modality, field, group):
  """Name of the vectors -> balanced accuracy of their probe by seed.

  Args:
    ours: by seed, the columns of the training rows and of the unseen ones.
    plain: likewise, of the baselines; with one seed there is no second head.
    modality, field: what is probed.
    group: column whose values no training row shares with an unseen one; None where any may.
  """
  found = {}
  for number, (own, base) in enumerate(zip(ours, plain, strict=True)):
    second = plain[(number + 1) % len(plain)]
    train, unseen = (dict(own[at]) | parts(own[at], base[at], second[at]) for at in (0, 1))
    known = np.isin(unseen[field], train[field])  # a probe knows no other values
    unseen = {name: column[known] for name, column in unseen.items()}
    names = [*parts(unseen, unseen, unseen)][: None if len(plain) > 1 else -1]
    for name, value in LinearProbe(modality, {modality: train}, field, group=group, parts=names)({modality: unseen}):
      if name.endswith("/balanced"):
        found.setdefault(name.split("/")[3], []).append(value)
  return found


def main(_):
  """Prints the table."""
  logging.set_verbosity(logging.WARNING)
  folders = sorted(pathlib.Path(_RUNS.value).glob("seed[0-9]*"), key=lambda path: int(path.name.removeprefix("seed")))
  if not folders:
    raise app.UsageError(f"--runs={_RUNS.value}: no folders seed0, seed1, ...")
  config = load(folders[0]).config
  task = open_task(config.data)
  feeder = Feeder(config.data, config.model.towers)
  evaluation = Evaluation(dataclasses.replace(config, test=False), task, feeder)
  test = next((one for one in task.evals if one.name == _SET.value), None)
  if test is None:
    raise app.UsageError(f"--set={_SET.value}: allowed are {', '.join(one.name for one in task.evals)}")
  if test.role == "test":
    raise app.UsageError(f"--set={_SET.value}: a test set; validation sets alone choose")
  tables = lambda model: [table[_MODALITY.value] for table in (
    evaluation.train_table(model, test.world), evaluation.table(model, test))]  # fmt: skip
  read = lambda folder: tables(load(folder))
  of_plain = pathlib.Path(_BASELINES.value or _RUNS.value)
  ours = [read(folder) for folder in folders]
  plain = [read(of_plain / folder.name / "baseline") for folder in folders]
  found = told(ours, plain, _MODALITY.value, _FIELD.value, test.probe_group)
  for name, values in found.items():
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    print(f"{name:32} {np.mean(values):5.1f}{spread}")


if __name__ == "__main__":
  flags.mark_flag_as_required("runs")
  app.run(main)

"""One of several processes that evaluate a finished run; writes what it measured and which items it read.

`python -m tests.evaluate_worker PORT PROCESS PROCESSES MANIFEST ROOT RUN OUT`
"""

import collections
import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
from absl import flags

from codebind_jax import evaluate as evaluate_lib
from codebind_jax.api import load
from codebind_jax.data.records import Source
from codebind_jax.data.task import open_task
from codebind_jax.runtime import agreement, distributed
from codebind_jax.trunks.feeds import Feeder
from configs import eval as eval_config
from tests.model_towers import uncached


def counted(name, counts):
  """Counts the calls of a method of `Source` by id and modality."""
  real = getattr(Source, name)

  def method(self, row, modality):
    counts[f"{self.fields(row)['id']} {modality}"] += 1
    return real(self, row, modality)

  setattr(Source, name, method)


def with_a_bad_picture(settings, evaluation, model):
  """By the number of bad records allowed: ids of the rows that are left, or the error."""
  real, told = Source.read, {}

  def read(self, row, modality):
    if self.fields(row)["id"] == "blue4":
      raise ValueError("a hole")
    return real(self, row, modality)

  Source.read = read
  for allowed in (0, 1):
    data = dataclasses.replace(settings.data, max_bad_records=allowed)
    feeder = Feeder(data, settings.model.towers, evaluation.trunks)
    other = evaluate_lib.Evaluation(dataclasses.replace(settings, data=data), evaluation.task, feeder)
    try:
      told[allowed] = [*map(str, other.table(model, evaluation.task.evals[1])["image"]["id"])]
    except ValueError as error:
      told[allowed] = str(error)
  return told


def main(port, process, processes, manifest, root, run, out):
  """Mode `eval` with cached tokens, then all evaluators with the image trunk in the model."""
  if int(processes) > 1:
    agreement.SAMPLE = 0  # every process compares the content of some rows, beside those that it reads
    distributed.start(f"127.0.0.1:{port}", int(processes), int(process))
  reads, hashes, streamed = (collections.Counter() for _ in range(3))
  counted("read", reads)
  counted("content_hash", hashes)
  config = eval_config.get_config().unlock()
  config.update_from_flattened_dict({
    "init_from": run, "data.manifest": manifest, "data.root": root, "data.checked": "none", "task": "zeroshot"
  })  # fmt: skip
  evaluate_lib.summary.report_data = evaluate_lib.write_report = lambda *_: None  # the page reads pictures again
  cached = evaluate_lib.evaluate(config.lock(), pathlib.Path(out) / "eval")
  first = dict(reads)

  model = uncached(load(run), "image")
  data = dataclasses.replace(model.config.data, root=root, checked="none")
  settings = dataclasses.replace(model.config, test=True, data=data)
  evaluation = evaluate_lib.Evaluation(settings, open_task(data), Feeder(data, settings.model.towers, model.trunks))
  on_all = model.on(jax.devices())
  reads.clear()
  metrics = evaluation.everything(on_all)
  streamed.update(reads)
  table = evaluation.table(on_all, evaluation.task.evals[0])
  np.savez(pathlib.Path(out) / f"{process}.npz", **{m: columns["full"] for m, columns in table.items()})
  told = {"cached": cached, "metrics": metrics, "reads": first, "hashes": dict(hashes), "streamed": dict(streamed)}
  told["bad"] = with_a_bad_picture(settings, evaluation, on_all)
  (pathlib.Path(out) / f"{process}.json").write_text(json.dumps(told))


if __name__ == "__main__":
  flags.FLAGS.mark_as_parsed()
  main(*sys.argv[1:])

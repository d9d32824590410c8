"""Runs the tiny config in a process of its own.

`python -m tests.run_tiny MANIFEST ROOT WORKDIR [KEY=VALUE ...] [kill_at=EVENT]`: with `kill_at` the process kills
itself at that event of training. Events are what Python audits: files opened, renamed, listed, modules imported. With
`kill_at=-1` it prints how many there were.
"""

import itertools
import json
import os
import pathlib
import signal
import sys

from absl import flags

from codebind_jax.train import train_and_evaluate
from tests.train_fixtures import tiny_config


def kill_self(at: int) -> itertools.count:
  """Counts audited events from here on, and at one of them ends the process as nothing can prevent."""
  events = itertools.count()

  def hook(*_):
    if next(events) == at:
      os.kill(os.getpid(), signal.SIGKILL)

  sys.addaudithook(hook)
  return events


if __name__ == "__main__":
  flags.FLAGS.mark_as_parsed()
  manifest, root, workdir, *overrides = sys.argv[1:]
  values = {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in overrides)}
  at = values.pop("kill_at", None)
  config = tiny_config(pathlib.Path(manifest), pathlib.Path(root), **values)
  events = kill_self(at) if at is not None else None
  train_and_evaluate(config, workdir)
  if events is not None:
    sys.stdout.write(f"{next(events)} events\n")

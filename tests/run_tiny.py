"""Runs the tiny config in a process of its own: `python tests/run_tiny.py MANIFEST ROOT WORKDIR [KEY=VALUE ...]`."""

import json
import pathlib
import sys

from absl import flags

from codebind_jax.train import train_and_evaluate
from tests.train_fixtures import tiny_config

if __name__ == "__main__":
  flags.FLAGS.mark_as_parsed()
  manifest, root, workdir, *overrides = sys.argv[1:]
  values = {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in overrides)}
  train_and_evaluate(tiny_config(pathlib.Path(manifest), pathlib.Path(root), **values), workdir)

"""Entry point: `python -m codebind_jax.main --config=configs/stage1.py --workdir=DIR [--config.KEY=VALUE ...]`."""

from __future__ import annotations

import logging as standard_logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging

from codebind_jax.command_line import define_config, parse

_CONFIG = define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run: checkpoints, metrics, report; local, gs:// or s3://.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0; unset on one host and on clusters.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Number of this process, with --coordinator.")
_STOPPED = flags.DEFINE_integer("stopped_exit_code", 0, "Exit code of a run that SIGTERM ended, its state saved.")


def main(_: Sequence[str]) -> None:
  """Checks the config and runs its mode."""
  from codebind_jax import config as config_lib
  from codebind_jax.command_line import bind
  from codebind_jax.runtime import distributed
  from codebind_jax.runtime.guard import Preempted

  config = _CONFIG.value
  if config is None or not (_WORKDIR.value or config.mode == "compile"):
    sys.exit("error: --config=FILE.py and --workdir=DIR are both needed")
  try:
    if not bind.is_open(config):
      config = config_lib.validate(config)
    if config.mode != "compile":
      distributed.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    if config.mode in ("train", bind.MODE):
      from codebind_jax.train import train_and_evaluate

      train_and_evaluate(config, _WORKDIR.value)
    elif config.mode == "compile":
      from codebind_jax.compile_ahead.report import compile_mode

      method, settings = config_lib.method_of(config), config.optim
      every = compile_mode(
        config.topology, config.mesh, config.sharding, method, config.model, settings, config.ordered
      )
      sys.exit(0 if every else 1)
    elif config.mode == "compare":
      from codebind_jax.compare.run import compare

      compare(config, _WORKDIR.value)
    elif config.mode == "embed":
      from codebind_jax.embedding.job import embed

      embed(config, _WORKDIR.value)
    else:
      from codebind_jax.evaluate import evaluate

      evaluate(config, _WORKDIR.value)
  except Preempted as stopped:
    logging.info("%s", stopped)
    sys.exit(_STOPPED.value)
  except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
    logging.debug("traceback", exc_info=True)
    plain = isinstance(error, OSError) and error.strerror and error.filename
    sys.exit(f"error: {error.strerror}: {error.filename}" if plain else f"error: {error}")


def _own_or_serious(record: Any) -> bool:
  """Keeps this package's log lines, and others' warnings."""
  return record.levelno >= standard_logging.WARNING or f"{os.sep}codebind_jax{os.sep}" in record.pathname


if __name__ == "__main__":
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(_own_or_serious)
  app.run(main, flags_parser=parse)

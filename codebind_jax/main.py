"""Entry point: `python -m codebind_jax.main --config=configs/stage1.py --workdir=DIR [--config.KEY=VALUE ...]`."""

from __future__ import annotations

import contextlib

from codebind_jax.runtime import signals

# Signals are heard from here on, also during the imports.
_heard = contextlib.ExitStack()
if __name__ == "__main__":
  _heard.enter_context(signals.handled(held=True))

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
_START = flags.DEFINE_float("start_seconds", 45.0, "Seconds that a process waits for the others at the start.")
_STOPPED = flags.DEFINE_integer("stopped_exit_code", 0, "Exit code of a run that SIGTERM ended, its state saved.")


def main(_: Sequence[str]) -> None:
  """Checks the config and runs its mode."""
  from codebind_jax.runtime import distributed

  try:
    run(_CONFIG.value, _WORKDIR.value)
    distributed.finish()
  except signals.Preempted as stopped:
    code = signals.exit_code() if signals.told() else _STOPPED.value
    distributed.part(f"{stopped}", code)
    sys.stderr.write(f"{stopped}\n")
    sys.exit(code)
  except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
    if signals.told():  # what broke off did so because of it, here or on another process
      signals.end(f"stopped by {signals.told()}; the same command goes on", signals.exit_code())
    logging.debug("traceback", exc_info=True)
    line = _said(error) if not distributed.lost(error) else (
      f"error: another process has died or cannot be reached; the same command goes on ({error})"
    )  # fmt: skip
    distributed.leave(line)
    sys.exit(line)


def _said(error: Exception) -> str:
  """One line for an error."""
  plain = isinstance(error, OSError) and error.strerror and error.filename
  return f"error: {error.strerror}: {error.filename}" if plain else f"error: {error}"


def run(config: Any, workdir: str | None) -> None:
  """Runs the mode of a config.

  Raises:
    Preempted: if the process was told to end.
  """
  from codebind_jax import config as config_lib
  from codebind_jax.command_line import bind
  from codebind_jax.config import validation
  from codebind_jax.runtime import agreement, distributed
  from codebind_jax.train import train_and_evaluate

  signals.release(_STOPPED.value)
  if config is None or not (workdir or config.mode == "compile"):
    sys.exit("error: --config=FILE.py and --workdir=DIR are both needed")
  if not bind.is_open(config):
    config = validation.validate(config)
  if config.mode != "compile":
    distributed.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _START.value)
    agreement.check_command(_CONFIG.value, workdir)
  if config.mode in ("train", bind.MODE):
    train_and_evaluate(config, workdir)
  elif config.mode == "compile":
    from codebind_jax.compile_ahead.report import compile_mode

    method, settings = config_lib.method_of(config), config.optim
    every = compile_mode(config.topology, config.mesh, config.sharding, method, config.model, settings, config.ordered)
    sys.exit(0 if every else 1)
  elif config.mode == "compare":
    from codebind_jax.compare.run import compare

    compare(config, workdir)
  elif config.mode == "embed":
    from codebind_jax.embedding.job import embed

    embed(config, workdir)
  else:
    from codebind_jax.evaluate import evaluate

    evaluate(config, workdir)


def _own_or_serious(record: Any) -> bool:
  """Keeps this package's log lines, and others' warnings."""
  return record.levelno >= standard_logging.WARNING or f"{os.sep}codebind_jax{os.sep}" in record.pathname


if __name__ == "__main__":
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(_own_or_serious)
  with _heard:
    app.run(main, flags_parser=parse)

"""Entry point: `python -m codebind_jax.main --config=configs/stage1.py --workdir=DIR [--config.KEY=VALUE ...]`."""

from __future__ import annotations

import importlib.util
import logging as standard_logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, optionally with an argument: FILE.py:runlocal.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run: checkpoints, metrics, report.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0; unset on one host and on clusters.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Number of this process, with --coordinator.")
_STOPPED = flags.DEFINE_integer("stopped_exit_code", 0, "Exit code of a run that SIGTERM ended, its state saved.")


def _read_config(path: str) -> Any:
  """The config of FILE.py or FILE.py:ARGUMENT as the file makes it, without overrides."""
  file, _, argument = path.partition(":")
  spec = importlib.util.spec_from_file_location("_config", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(argument) if argument else module.get_config()


def _parse(argv: Sequence[str]) -> list[str]:
  """absl's parsing, with one clear line where a config key is unknown or a value has the wrong type."""
  from codebind_jax.schema import get

  path = ([arg.removeprefix("--config=") for arg in argv if arg.startswith("--config=")] or [""])[-1]
  if path and not os.path.isfile(path.partition(":")[0]):
    sys.exit(f"error: --config={path}: there is no such file")
  try:
    return flags.FLAGS(list(argv))
  except (AttributeError, KeyError) as error:
    try:
      for key in (arg.removeprefix("--config.").split("=")[0] for arg in argv if arg.startswith("--config.")):
        get(_read_config(path), key)
    except ValueError as unknown:
      sys.exit(f"error: {unknown}")
    sys.exit(f"error: {error}")
  except flags.Error as error:
    sys.exit(f"error: {error}")


def main(_: Sequence[str]) -> None:
  """Checks the config and runs its mode."""
  from codebind_jax import config as config_lib
  from codebind_jax.runtime import distributed
  from codebind_jax.runtime.guard import Preempted

  config = _CONFIG.value
  if config is None or not (_WORKDIR.value or config.mode == "compile"):
    sys.exit("error: --config=FILE.py and --workdir=DIR are both needed")
  try:
    config_lib.validate(config)
    if config.mode != "compile":
      distributed.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    if config.mode == "train":
      from codebind_jax.train import train_and_evaluate

      train_and_evaluate(config, _WORKDIR.value)
    elif config.mode == "compile":
      from codebind_jax.compile_ahead.report import compile_mode

      sys.exit(0 if compile_mode(config) else 1)
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
    sys.exit(f"error: {error}")


def _own_or_serious(record: Any) -> bool:
  """Keeps this package's log lines, and others' warnings."""
  return record.levelno >= standard_logging.WARNING or f"{os.sep}codebind_jax{os.sep}" in record.pathname


if __name__ == "__main__":
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(_own_or_serious)
  app.run(main, flags_parser=_parse)

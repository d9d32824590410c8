"""Several training runs of one command, each in a folder of its own: what `tools.seeds` and `tools.sweep` share.

A process takes a run by a lock on a file, which the system frees if the process is killed: several processes, also on
hosts that share a disk, take different runs if each is given the command, which also continues what was stopped.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import sys
from collections.abc import Iterator, Mapping
from multiprocessing import connection
from typing import Any

from absl import flags, logging

from codebind_jax import files
from codebind_jax.command_line import bind
from codebind_jax.config import Config, validation
from codebind_jax.data.ahead import ended
from codebind_jax.evaluate import FINAL
from codebind_jax.runtime import signals
from codebind_jax.runtime.metrics import FILE, read_metrics

try:
  import fcntl
except ImportError:  # not on Windows
  fcntl = None

LOCKS = ".locks"  # folder of the lock files, in the folder of all runs
DIVERGED = "diverged.txt"  # error of a run whose loss was not finite, in its folder
BASELINE = "baseline/"


def define_flags() -> None:
  """Defines the flags that both commands have."""
  flags.DEFINE_string("workdir", None, "Folder of all runs; hosts that share it take different runs.")
  flags.DEFINE_integer("parallel", 1, "Number of processes of this machine that train, a run each.", lower_bound=1)


def checked(configs: Mapping[str, Any], folder: files.Path) -> dict[str, Config]:
  """Name -> the valid config of every run, each with a folder that holds it and no other.

  Raises:
    ValueError: for a bad config, one that does not train, or a folder of another run, before any is trained.
  """
  from codebind_jax.train import open_run

  valid = {name: bind.opened(config)[0] if bind.is_open(config) else validation.validate(config)
           for name, config in configs.items()}  # fmt: skip
  for name, config in valid.items():
    if config.mode != "train":
      raise ValueError(f"config.mode: got {config.mode!r}; allowed: 'train'")
    open_run(config, folder / name)
  return valid


def outcome(folder: files.Path, config: Config) -> dict[str, float] | None:
  """The final metrics of a run, its baseline's under `baseline/...`; {} if it diverged, None if it is not finished."""
  if files.is_file(folder / DIVERGED):
    return {}
  last = config.ordered[-1].last_step
  final = _final(folder, last) if files.is_file(folder / "report.html") else None
  baseline = _final(folder / "baseline", last) if config.baseline and final is not None else {}
  return None if final is None or baseline is None else final | {BASELINE + key: baseline[key] for key in baseline}


def _final(folder: files.Path, step: int) -> dict[str, float] | None:
  """The metrics of the final evaluation after that step."""
  for line in read_metrics(folder) if files.is_file(folder / FILE) else []:
    if line["stage"] == FINAL and line["step"] == step:
      return {name: value for name, value in line.items() if name not in ("step", "stage", "warning")}
  return None


def train(configs: Mapping[str, Config], folder: files.Path) -> None:
  """Trains, one after the other, all runs that are neither finished nor taken by another process.

  A run that diverges is noted in its folder, and the others go on.

  Args:
    configs: name -> config, as `checked` gives them.
    folder: of all runs.

  Raises:
    ValueError: naming the run, also for what `train_and_evaluate` raises.
  """
  from codebind_jax.train import train_and_evaluate

  trained = True
  while trained:  # again, since a process that had taken a run may have been killed meanwhile
    trained = False
    for number, (name, config) in enumerate(configs.items()):
      if outcome(folder / name, config) is not None:
        continue
      with _taken(folder, name) as mine:
        if not mine or outcome(folder / name, config) is not None:
          continue
        trained = True
        logging.warning("run %d of %d: %s", number + 1, len(configs), name)
        try:
          with contextlib.redirect_stdout(io.StringIO()):  # its table is in its report
            train_and_evaluate(config, folder / name)
        except FloatingPointError as error:
          logging.warning("%s: %s", name, error)
          files.write_whole(folder / name / DIVERGED, f"{error}\n")
        except (ValueError, OSError, RuntimeError) as error:
          raise ValueError(f"{name}: {error}") from error


@contextlib.contextmanager
def _taken(folder: files.Path, name: str) -> Iterator[bool]:
  """Whether this process has taken the run, until the end of the block."""
  if files.is_far(folder) or not fcntl:  # where there are no locks, and `train_all` refuses several processes
    yield True
    return
  files.make_folder(folder / LOCKS)
  with open(folder / LOCKS / name, "w") as handle:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      yield False
      return
    yield True


def train_all(configs: Mapping[str, Config], folder: files.Path, parallel: int = 1) -> dict[str, dict[str, float]]:
  """Trains the runs, in so many processes, and gives the outcome of those that are finished.

  Args:
    configs: name -> config, as `checked` gives them.
    folder: of all runs.
    parallel: number of processes.

  Raises:
    ValueError: naming the run that failed, or if processes cannot share the folder.
  """
  if parallel > 1 and (files.is_far(folder) or not fcntl):
    raise ValueError(f"--parallel: got {parallel} for {str(folder)!r}, where there are no locks; allowed: 1")
  if parallel == 1:
    train(configs, folder)
  else:
    _in_processes(configs, folder, parallel)
  found = {name: outcome(folder / name, config) for name, config in configs.items()}
  return {name: metrics for name, metrics in found.items() if metrics is not None}


def _in_processes(configs: Mapping[str, Config], folder: files.Path, parallel: int) -> None:
  """`train` in so many processes, which end with this one.

  Raises:
    ValueError: if one of them ended with an error, after all have ended.
  """
  context = multiprocessing.get_context("spawn")
  processes = [context.Process(target=_work, args=(configs, folder)) for _ in range(parallel)]
  with signals.saving():
    try:
      for process in processes:
        process.start()
      while any(process.is_alive() for process in processes) and not signals.reached():
        connection.wait([process.sentinel for process in processes if process.is_alive()], timeout=0.1)
    finally:
      for process in processes:
        process.terminate()  # which saves its run
      for process in processes:
        process.join()
  killed = [process.exitcode for process in processes if process.exitcode < 0]
  if killed:
    raise ValueError(f"{len(killed)} of {parallel} processes did not end by themselves: one {ended(killed[0])}; free "
                     "memory or lower --parallel, and run the same command again, which goes on")  # fmt: skip
  failed = sum(process.exitcode != 0 for process in processes)
  if failed:
    raise ValueError(f"{failed} of {parallel} processes ended with an error, which they have said above")


def _work(configs: Mapping[str, Config], folder: files.Path) -> None:
  """A process of `_in_processes`."""
  flags.FLAGS.mark_as_parsed()
  logging.set_verbosity(logging.WARNING)
  try:
    signals.command(train, configs, folder)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")

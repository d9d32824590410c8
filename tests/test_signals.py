"""SIGTERM and Ctrl-C in every phase of a run: one line, the exit code, and the same command goes on bit for bit."""

import signal
import subprocess
import sys

import pytest

from codebind_jax.runtime import signals
from codebind_jax.train import train_and_evaluate
from tests.processes import REPOSITORY, assert_same_run, environment, wait_for
from tests.train_fixtures import tiny_config

OVERRIDES = {"steps": 12, "eval_steps": 4, "checkpoint_steps": 5, "baseline": True}
STOPPED = 75


def rows(number, folder="."):
  """Whether a run has so many lines of metrics."""

  def ready(_, workdir):
    path = workdir / folder / "metrics.jsonl"
    return path.exists() and path.read_bytes().count(b"\n") >= number

  return ready


def said(text, times=1):
  return lambda log, _: log.read_text(errors="replace").count(text) >= times


# Phase -> when it has begun, by the log and the run's folder.
PHASES = {
  "start": said("begun"), "data": said("---- data ----"), "features": said("distinct captions"),
  "model": said("---- model ----"), "compile": said("---- stage bridges"), "training": rows(3),
  "validation": rows(4), "last steps": rows(14), "evaluation": said("---- evaluation ----"),
  "baseline": said("---- baseline"), "baseline's training": rows(3, "baseline"),
  "baseline's evaluation": said("---- evaluation ----", 2), "report": said("---- report ----"),
}  # fmt: skip
RUN = """
import runpy, sys
hook = lambda event, found: event == "import" and found[0] == "absl" and sys.stderr.write("begun\\n")
sys.addaudithook(hook)
runpy.run_module("codebind_jax.main", run_name="__main__", alter_sys=True)
"""


def command(data, workdir):
  """The tiny run as a command that says when its imports begin."""
  overrides = [f"--config.{key}={value}" for key, value in OVERRIDES.items()]
  return [sys.executable, "-c", RUN, f"--config=tests/tiny.py:{data[0]},{data[1]}", f"--workdir={workdir}",
          f"--stopped_exit_code={STOPPED}", *overrides]  # fmt: skip


def told(arguments, log, ready, *numbers):
  """(exit code, what it wrote) of a command that gets signals once it is ready."""
  with open(log, "wb") as out:
    process = subprocess.Popen(arguments, cwd=REPOSITORY, env=environment(1), stdout=out, stderr=out)
  wait_for(process, ready)
  for number in numbers:
    process.send_signal(number)
  process.wait(timeout=300)
  return process.returncode, log.read_text(errors="replace")


@pytest.fixture(scope="module")
def never_stopped(data, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("never_stopped")
  train_and_evaluate(tiny_config(*data, **OVERRIDES), workdir)
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "interrupt"])
@pytest.mark.parametrize("phase", PHASES)
def test_told_in_any_phase_a_run_ends_with_one_line_and_goes_on(data, never_stopped, tmp_path, phase, number):
  workdir, log = tmp_path / "run", tmp_path / "log"
  code, text = told(command(data, workdir), log, lambda: PHASES[phase](log, workdir), number)
  ended = code == 0 and phase == "report"  # it may be over by then
  assert ended or code == (STOPPED if number == signal.SIGTERM else signals.INTERRUPTED), text[-3000:]
  assert "Traceback" not in text and (ended or "the same command goes on" in text.splitlines()[-1])
  if "baseline" not in phase and phase != "report":
    assert not rows(1, "baseline")(log, workdir), "a run that was told to end trained its baseline"
  train_and_evaluate(tiny_config(*data, **OVERRIDES), workdir)
  for part in (".", "baseline"):
    assert_same_run(workdir / part, never_stopped / part)


ASLEEP = """
import os, sys, threading, time
from codebind_jax.runtime import signals
signals.GRACE = 0.5
def run():
  sys.stderr.write("asleep\\n")
  {}
signals.command(run)
"""
SAVING = """
  with signals.saving():
    while not signals.reached(): time.sleep(0.01)
    """


@pytest.mark.parametrize(
  ("numbers", "body", "code", "line"),
  [
    ((signal.SIGTERM,), "time.sleep(100)", 143, "stopped by SIGTERM; the same command goes on"),
    ((signal.SIGINT,), "time.sleep(100)", 130, "stopped by Ctrl-C; the same command goes on"),
    # As in a compiler: Python's handler has no turn in the main thread.
    ((signal.SIGTERM,), "import ctypes; pause = ctypes.CDLL(None).sleep; [pause(100) for _ in iter(int, 1)]", 143,
     "stopped by SIGTERM; the same command goes on"),
    ((signal.SIGTERM,), SAVING + "time.sleep(1); sys.stderr.write('saved\\n')", 143,
     "saved\nstopped by SIGTERM; the same command goes on"),
    ((signal.SIGINT,), SAVING + "signals.REPEATED.update({2: 0.0}); os.kill(os.getpid(), 2); time.sleep(100)", 130,
     "stopped at once, told twice (by Ctrl-C); the same command goes on"),
  ],
  ids=["term", "interrupt", "compiled", "saving", "twice"],
)
def test_a_command_ends_at_once_where_nothing_is_to_be_saved(tmp_path, numbers, body, code, line):
  log = tmp_path / "log"
  arguments = [sys.executable, "-c", ASLEEP.format(body)]
  assert told(arguments, log, lambda: said("asleep")(log, None), *numbers) == (code, f"asleep\n{line}\n")

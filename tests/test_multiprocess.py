"""The trainer as several processes: the same run as one, continued by one, and ended in order when one dies."""

import shutil
import signal

import pytest

from codebind_jax import files
from codebind_jax.runtime import distributed
from codebind_jax.train import train_and_evaluate
from tests.processes import assert_close, finish, launch
from tests.train_fixtures import lines_of, tiny_config


@pytest.fixture(scope="module")
def both(data, tmp_path_factory):
  """A run by two processes with two devices each."""
  workdir = tmp_path_factory.mktemp("both")
  finish(*launch(data, workdir))
  return workdir


def test_two_processes_train_like_one(whole_run, both):
  assert_close(whole_run[0], both)
  assert (both / "report.html").exists()


@pytest.mark.parametrize("processes", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_checkpoint_of_two_processes_goes_on_with_another_number(data, whole_run, both, tmp_path, processes):
  workdir = tmp_path / "taken_over"
  shutil.copytree(both, workdir)
  shutil.rmtree(workdir / "checkpoints" / "6")
  if processes == 1:
    train_and_evaluate(tiny_config(*data), workdir)
  else:
    finish(*launch(data, workdir, processes=processes, devices=1))
  assert_close(whole_run[0], workdir)


@pytest.mark.slow
def test_when_one_process_dies_the_others_stop_with_an_error_and_a_restart_goes_on(data, tmp_path):
  overrides = ("steps=400", "eval_steps=1000", "checkpoint_steps=10")
  first, second = launch(data, tmp_path / "run", *overrides)
  metrics = tmp_path / "run" / "metrics.jsonl"
  while first.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 25):
    pass
  second.send_signal(signal.SIGKILL)
  second.communicate()
  _, err = first.communicate(timeout=60)
  assert first.returncode != 0
  assert "error: " in err or "heartbeat" in err, err[-3000:]
  reached = metrics.read_bytes().count(b"\n")
  assert reached < 400
  finish(*launch(data, tmp_path / "run", *overrides))
  train_and_evaluate(tiny_config(*data, steps=400, eval_steps=1000, checkpoint_steps=10), tmp_path / "alone")
  steps = lambda name: [line["step"] for line in lines_of(tmp_path / name)]
  assert steps("run") == steps("alone")


def test_some_of_the_three_flags_are_not_enough(monkeypatch):
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  with pytest.raises(ValueError, match="--process_id: not given; allowed: --coordinator, --num_processes and"):
    distributed.start("127.0.0.1:1")


FAILS_AT_3 = """
import itertools, os, runpy, sys
from codebind_jax.runtime import signals
asked, steps = signals.reached, itertools.count(1)
def reached():
  if next(steps) == 3 and "--process_id=1" in sys.argv:
    {}
  return asked()
signals.reached = reached
runpy.run_module("codebind_jax.main", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ("fault", "codes", "first", "second"),
  [
    ("raise OSError('no more room')", (1, 1), "process 1 ended: error: no more room", "error: no more room"),
    ("raise KeyError('a bug')", (1, 1), "process 1 ended: error: KeyError: 'a bug'", "error: KeyError: 'a bug'"),
    ("os.kill(os.getpid(), 15)", (0, 0), "of stage 'bridges', state saved", "of stage 'bridges', state saved"),
    ("os.kill(os.getpid(), 2)", (1, 130), "of stage 'bridges', state saved", "of stage 'bridges', state saved"),
  ],
  ids=["error", "bug", "term", "interrupt"],
)
def test_what_ends_one_process_ends_all(data, tmp_path, fault, codes, first, second):
  running = launch(data, tmp_path / "run", "steps=400", "eval_steps=1000", program=["-c", FAILS_AT_3.format(fault)])
  told = [process.communicate(timeout=120)[1] for process in running]
  assert tuple(process.returncode for process in running) == codes, told[0][-3000:] + told[1][-3000:]
  assert first in told[0].splitlines()[-1] and second in told[1].splitlines()[-1]


@pytest.mark.slow
def test_a_second_training_in_the_same_folder_ends_all_its_processes(data, tmp_path):
  workdir = tmp_path / "run"
  with files.held(workdir, "trains"):
    running = launch(data, workdir)
    told = [process.communicate(timeout=120)[1] for process in running]
  assert [process.returncode for process in running] == [1, 1], told[0][-3000:] + told[1][-3000:]
  for text in told:
    assert str(workdir) in text.splitlines()[-1] and "trains" in text.splitlines()[-1], text[-3000:]
  assert not (workdir / "metrics.jsonl").exists() and not (workdir / "checkpoints").exists()

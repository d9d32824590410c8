"""The trainer as several processes: the same run as one, continued by one, and ended in order when one dies."""

import shutil
import signal

import pytest

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

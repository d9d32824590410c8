"""The trainer as several processes: the same run as one, continued by one, and ended in order when one dies."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from codebind_jax import distributed
from codebind_jax.train import train_and_evaluate
from tests.train_fixtures import arrays_of, lines_of, tiny_config, write_manifest

REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  return write_manifest(folder / "squares"), folder / "root"


def launch(data, workdir, *overrides, processes=2, devices=2):
  """`main` as so many processes on the loopback device."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "codebind_jax.main", f"--config=tests/tiny.py:{data[0]},{data[1]}",
             f"--workdir={workdir}", f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}",
             *(f"--config.{pair}" for pair in overrides)]  # fmt: skip
  return [
    subprocess.Popen([*command, f"--process_id={i}"], cwd=REPOSITORY, env=env, stdout=subprocess.PIPE,
                     stderr=subprocess.PIPE, text=True)
    for i in range(processes)
  ]  # fmt: skip


def assert_close(one, other):
  first, second = arrays_of(one), arrays_of(other)
  assert first.keys() == second.keys()
  for path in first:
    np.testing.assert_allclose(first[path], second[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_two_processes_train_like_one_and_one_goes_on_from_theirs(data, tmp_path):
  alone, both, taken_over = (tmp_path / name for name in ("alone", "both", "taken_over"))
  train_and_evaluate(tiny_config(*data), alone)
  running = launch(data, both)
  for process in running:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out[-2000:] + err[-4000:]
  assert_close(alone, both)
  assert [line["step"] for line in lines_of(both)] == [line["step"] for line in lines_of(alone)]
  assert (both / "report.html").exists()

  shutil.copytree(both, taken_over)
  shutil.rmtree(taken_over / "checkpoints" / "6")
  train_and_evaluate(tiny_config(*data), taken_over)
  assert_close(alone, taken_over)


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
  for process in launch(data, tmp_path / "run", *overrides):
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
  train_and_evaluate(tiny_config(*data, steps=400, eval_steps=1000, checkpoint_steps=10), tmp_path / "alone")
  steps = lambda name: [line["step"] for line in lines_of(tmp_path / name)]
  assert steps("run") == steps("alone")


def test_some_of_the_three_flags_are_not_enough(monkeypatch):
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  with pytest.raises(ValueError, match="--process_id: not given; allowed: --coordinator, --num_processes and"):
    distributed.start("127.0.0.1:1")

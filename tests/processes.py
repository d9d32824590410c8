"""The tiny config in processes of their own that can be killed, and what is the same about two runs."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

from tests.train_fixtures import arrays_of, lines_of

REPOSITORY = pathlib.Path(__file__).parents[1]


def environment(devices):
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
  return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def started(command, devices=1):
  """A process of this repository with its output in pipes."""
  return subprocess.Popen(
    command, cwd=REPOSITORY, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


def start(data, workdir, *overrides, devices=1, largest_file=None, kill_at=None):
  """The tiny run: perhaps one that may not write a file beyond a size, or that kills itself at a point."""
  bytecode = ["-B"] if largest_file else []  # or it leaves half a .pyc
  command = [sys.executable, *bytecode, "-m", "tests.run_tiny", *map(str, data), str(workdir), *overrides]
  if kill_at is not None:
    command.append(f"kill_at={kill_at}")
  if largest_file:
    command = ["bash", "-c", 'ulimit -f "$0" && exec "$@"', str(largest_file // 1024), *command]
  return started(command, devices)


def launch(data, workdir, *overrides, processes=2, devices=2, program=("-m", "codebind_jax.main")):
  """`main` as so many processes on the loopback device."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  command = [sys.executable, *program, f"--config=tests/tiny.py:{data[0]},{data[1]}",
             f"--workdir={workdir}", f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}",
             *(f"--config.{pair}" for pair in overrides)]  # fmt: skip
  return [started([*command, f"--process_id={i}"], devices) for i in range(processes)]


def wait_for(process, ready):
  """Waits until `ready` says so or the process has ended."""
  while process.poll() is None and not ready():
    pass


def finish(*running):
  for process in running:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out[-2000:] + err[-4000:]


def assert_same_run(a, b):
  """Bit for bit: what was learnt and what was logged."""
  first, second = arrays_of(a), arrays_of(b)
  assert first.keys() == second.keys()
  for path in first:
    np.testing.assert_array_equal(first[path], second[path], err_msg=path)
  assert lines_of(a) == lines_of(b)


def assert_close(a, b):
  """Up to the order of sums: what was learnt, and which steps were logged."""
  first, second = arrays_of(a), arrays_of(b)
  assert first.keys() == second.keys()
  for path in first:
    np.testing.assert_allclose(first[path], second[path], rtol=1e-4, atol=1e-5, err_msg=path)
  assert [line["step"] for line in lines_of(a)] == [line["step"] for line in lines_of(b)]

"""State and losses over 8 devices and over 2 processes equal those of one; only statistics cross devices."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import codebook_worker

WORKER = pathlib.Path(codebook_worker.__file__)


def launch(directory, devices, processes):
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  output = directory / f"{processes}x{devices}"
  environment = os.environ | {"PYTHONPATH": str(WORKER.parents[1])}
  running = [
    subprocess.Popen(
      [sys.executable, str(WORKER), str(devices), str(processes), str(i), str(port), str(output)],
      env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    for i in range(processes)
  ]  # fmt: skip
  for process in running:
    text, _ = process.communicate(timeout=500)
    assert process.returncode == 0, text
  return output


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
  return launch(tmp_path_factory.mktemp("eight"), devices=8, processes=1)


@pytest.fixture(scope="module")
def alone():
  jax.config.update("jax_disable_most_optimizations", True)
  yield {case: codebook_worker.run(*case)[0] for case in codebook_worker.CASES}
  jax.config.update("jax_disable_most_optimizations", False)


def check(alone, path):
  with np.load(path) as file:
    many = dict(file)
  assert many.keys() == alone.keys()
  for name, want in alone.items():
    if want.dtype.kind in "ib":
      np.testing.assert_array_equal(many[name], want, err_msg=name)
    elif want.size:
      scale = max(1.0, np.max(np.abs(want)))
      assert np.max(np.abs(many[name] - want)) < 1e-6 * scale, name


@pytest.mark.parametrize("case", codebook_worker.CASES)
def test_eight_devices_equal_one(alone, eight, case):
  check(alone[case], f"{eight}.{case[0]}.{case[1]}.0.npz")


@pytest.mark.parametrize("case", sorted(codebook_worker.SPECS))
def test_only_statistics_cross_devices(eight, case):
  """A device holds `segments` numbers of one modality's shared segments; no collective moves nearly as many."""
  spec = codebook_worker.SPECS[case]
  with open(f"{eight}.json") as file:
    found = json.load(file)[f"{case}.False"]
  tokens = codebook_worker.B * codebook_worker.T
  statistics = max(x.size + x.size // x.shape[-1] for x in (s.codes for s in codebook_worker.start(spec).values()))
  segments = tokens * spec.shared_dim // 8
  assert max(tokens, statistics) < segments
  assert any(operation == "all-reduce" for operation, _ in found)
  assert max(size for _, size in found) <= max(tokens, statistics), found


def test_the_program_of_nvidia_searches_where_the_segments_are(eight):
  """The compiler cannot split a program that it does not know: the package says how."""
  with np.load(f"{eight}.triton.npz") as file:
    np.testing.assert_array_equal(file["found"], file["best"])
  with open(f"{eight}.json") as file:
    assert json.load(file)["triton"] == []


def test_two_processes_equal_one(alone, tmp_path):
  output = launch(tmp_path, devices=2, processes=2)
  for process in range(2):
    check(alone[codebook_worker.CASES[0]], f"{output}.random.True.{process}.npz")

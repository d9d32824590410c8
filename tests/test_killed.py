"""kill -9 at random points of a run, and going on from what it left: nothing of the result may tell."""

import re
import signal

import numpy as np
import pytest

from codebind_jax.train import train_and_evaluate
from tests.processes import assert_same_run, start
from tests.train_fixtures import tiny_config

POINTS = 20


@pytest.fixture(scope="module")
def events(data, whole_run, tmp_path_factory):
  """How many points a run has at which it can be killed."""
  workdir = tmp_path_factory.mktemp("counted")
  process = start(data, workdir, kill_at=-1)
  out, err = process.communicate(timeout=1200)
  assert process.returncode == 0, err[-4000:]
  assert_same_run(whole_run[0], workdir)
  return int(re.search(r"^(\d+) events$", out, re.MULTILINE)[1])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(POINTS))
def test_killed_anywhere_a_run_goes_on_bit_for_bit(data, whole_run, events, tmp_path, request, number):
  """Saves, logs and evaluations are in flight at most points; every other run is killed once more as it goes on."""
  rng = np.random.default_rng((request.config.getoption("--kill-seed"), number))
  # The end of a run may come a little earlier than in the one that was counted: threads open files too.
  points = rng.integers(0, int(0.95 * events), 2)[: 1 + number % 2]
  for nth, at in enumerate(points):
    process = start(data, tmp_path, kill_at=at)
    _, err = process.communicate(timeout=1200)
    assert process.returncode == -signal.SIGKILL or (nth and not process.returncode), f"{at} of {events}: {err[-4000:]}"
  train_and_evaluate(tiny_config(*data), tmp_path)
  assert_same_run(whole_run[0], tmp_path)

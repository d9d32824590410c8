"""InfoNCE of a batch that is split over eight devices equals that of one, in a fraction of the memory."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests import contrastive_worker


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
  folder = tmp_path_factory.mktemp("ring")
  command = [sys.executable, "-m", "tests.contrastive_worker", str(folder)]
  done = subprocess.run(command, cwd=pathlib.Path(__file__).parents[1], env=os.environ, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return folder


@pytest.mark.parametrize("chunk", contrastive_worker.CHUNKS)
@pytest.mark.parametrize("name", ["alone", "grouped"])
def test_the_ring_has_the_value_and_gradients_of_the_whole_matrix(eight, chunk, name):
  with np.load(eight / f"{chunk}.{name}.npz") as file:
    value, *grads = file.values()
  a, b, mask, groups = contrastive_worker.rows(0)
  whole = contrastive_worker.loss_and_gradients(0, ())
  want, want_grads = whole(a, b, 1.5, mask, groups if name == "grouped" else None)
  if name == "grouped":
    assert want < whole(a, b, 1.5, mask, None)[0]
  np.testing.assert_allclose(value, want, rtol=1e-6)
  for got, expected in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
  assert not grads[0][~mask].any() and not grads[1][~mask].any()


def test_the_ring_takes_a_twentieth_of_the_memory_and_gathers_nothing(eight):
  """32,768 x 1,024 on eight devices: plain holds rows/8 x rows logits more than once."""
  (plain, gathers), (ring, ring_gathers) = json.loads((eight / "memory.json").read_text()).values()
  assert plain > 2 * 32_768**2 / 8 * 4
  assert gathers and not ring_gathers
  assert 20 * ring <= plain, (ring, plain)

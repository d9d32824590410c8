"""Training is the same however the state is split over eight devices; where arrays live is what the rules say."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from codebind_jax import config as config_lib
from codebind_jax.runtime.sharding import AXES, MeshShape, make_layout, make_mesh
from tests import layout_worker


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
  folder = tmp_path_factory.mktemp("layouts")
  command = [sys.executable, "-m", "tests.layout_worker", str(folder)]
  done = subprocess.run(command, cwd=pathlib.Path(__file__).parents[1], env=os.environ, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return folder


@pytest.mark.parametrize("name", [*layout_worker.LAYOUTS, "8x1x1 in tiles"])
def test_ten_steps_in_every_layout_equal_one_device(eight, name):
  with np.load(eight / "one.npz") as one, np.load(eight / f"{name}.npz") as many:
    assert set(one.files) == set(many.files)
    for path in one.files:
      np.testing.assert_allclose(many[path], one[path], atol=1e-5, rtol=0, err_msg=path)


@pytest.mark.parametrize(
  ("name", "kernel", "codes", "bias"), [("8x1x1", 1, 1, 1), ("1x8x1", 8, 8, 1), ("2x2x2", 4, 1, 1), ("1x1x8", 8, 8, 1)]
)
def test_state_is_split_as_the_rules_say(eight, name, kernel, codes, bias):
  splits = json.loads((eight / "found.json").read_text())[name]["splits"]
  of = lambda ending: {n for path, n in splits.items() if path.endswith(ending)}
  assert of("image/shared/proj/kernel") == {kernel}
  assert sum(path.endswith("image/shared/proj/kernel") for path in splits) == 3, "parameter and both moments"
  assert of("codebooks/shared/codes") == of("codebooks/shared/ema_count") == {codes}
  assert of("text/shared/norm/bias") == {bias}


@pytest.mark.parametrize("scan", ["False", "True"])
def test_weights_are_gathered_and_activations_stay_where_they_are(eight, scan):
  found = json.loads((eight / "found.json").read_text())["trunk"][scan]
  kernels = {32 * 96, 32 * 32, 32 * 128}
  assert {size for operation, size in found if operation == "all-gather"} == kernels
  assert all(operation in ("all-gather", "all-reduce") for operation, _ in found)
  assert max(size for operation, size in found if operation == "all-reduce") <= 32, "the loss and a gradient [32]"


def test_tiles_of_the_logits_go_around_and_no_rows_are_gathered(eight):
  found = json.loads((eight / "found.json").read_text())
  operations = {chunk: {operation for operation, _ in told} for chunk, told in found["baseline"].items()}
  assert "all-gather" in operations["0"]
  assert "all-gather" not in operations["2"] and "collective-permute" in operations["2"]


def test_devices_share_out_the_segments_of_the_few_rows_that_are_compared_with_all_codes(eight):
  """Similarities of 2 rows, 8 segments and 512 codes stay where they are computed; only less than half of it moves."""
  told = json.loads((eight / "found.json").read_text())["similarity"]
  assert max(size for _, size in told) < 2 * 8 * 512 / 2


def test_the_table_adds_up(eight):
  table = json.loads((eight / "found.json").read_text())["2x2x2"]["table"]
  numbers = lambda line: [float(x) for x in line[33:].split()[:3]]
  parts = [numbers(line) for line in table[1:-1]]
  np.testing.assert_allclose(np.sum(parts, axis=0), numbers(table[-1]), atol=0.01 * len(parts))
  assert any("('fsdp', 'tensor')" in line and "kernel" in line for line in table)


def test_what_does_not_divide_stays_whole_and_rules_come_first():
  rules = {"sharding.rules": ((r"params/text/.*", ("fsdp", "")),)}
  config = config_lib.read(layout_worker.config_of("1x1x1", **rules))
  layout = make_layout(config.mesh, config.sharding)
  layout = dataclasses.replace(layout, mesh=AbstractMesh((1, 4, 2), AXES))
  spec = lambda path, *shape: tuple(layout.spec(path, shape))
  assert spec("params/image/shared/proj/kernel", 8, 6) == ("fsdp", "tensor")
  assert spec("params/image/shared/proj/kernel", 6, 6) == (None, "tensor")
  assert spec("params/image/blocks/mlp/fc2/kernel", 12, 8, 8) == (None, "tensor", "fsdp")
  assert spec("opt_state/0/mu/image/blocks_1/attn/out/kernel", 8, 8) == ("tensor", "fsdp")
  assert spec("params/text/anything", 8, 8) == ("fsdp",)
  assert spec("params/image/norm/scale", 8) == spec("step") == ()


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("sharding.codes", "model", "config.sharding.codes: got 'model'; allowed: '' .whole. or ..data', 'fsdp', 'tensor'"),
    ("sharding.rules", ((".*", ("rows",)),), "config.sharding.rules: got 'rows'; allowed: an axis, one of "),
    ("mesh.tensor", 3, "mesh: .* does not fit 1 devices"),
  ],
)
def test_bad_layouts_are_named(key, value, message):
  with pytest.raises(ValueError, match=message):
    config = config_lib.read(layout_worker.config_of("1x1x1", **{key: value}))
    make_layout(config.mesh, config.sharding)


def test_a_mesh_of_some_devices():
  assert dict(make_mesh(MeshShape(), jax.devices()[:1]).shape) == dict.fromkeys(
    ("data", "fsdp", "tensor"), 1
  )

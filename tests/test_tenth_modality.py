"""docs/add_a_modality.md, word for word: its transform, trunk and config bind a sensor this project does not know."""

import importlib.util
import json
import pathlib
import re
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

import codebind_jax
from codebind_jax import trunks as pretrained
from codebind_jax.data import transforms
from codebind_jax.data.opening import open_source
from codebind_jax.train import train_and_evaluate
from tests.train_fixtures import arrays_of, lines_of, tiny_config

DOC = pathlib.Path(__file__).parent.parent / "docs" / "add_a_modality.md"


@pytest.fixture(scope="module")
def snippets(tmp_path_factory):
  """The document's transform and trunk as modules of their packages, and its config as a module."""
  folder = tmp_path_factory.mktemp("imu")
  transform, trunk, config = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.S)
  for package, name, code in ((transforms, "imu", transform), (pretrained, "imu_series", trunk)):
    home = folder / package.__name__.rsplit(".", 1)[1]
    home.mkdir()
    (home / f"{name}.py").write_text(code)
    package.__path__.append(str(home))
  (folder / "motion.py").write_text(config)
  spec = importlib.util.spec_from_file_location("motion", folder / "motion.py")
  motion = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(motion)
  yield folder, motion
  for package, name in ((transforms, "imu"), (pretrained, "imu_series")):
    package.__path__.pop()
    sys.modules.pop(f"{package.__name__}.{name}", None)


def walks(folder):
  """Two gaits as sine waves of two frequencies."""
  rng, lines = np.random.default_rng(0), []
  for number in range(24):
    gait = ("walking", "running")[number % 2]
    time = np.arange(100) / 50
    wave = np.sin(2 * np.pi * (1 + 3 * (gait == "running")) * time + rng.uniform(0, 6))
    np.save(folder / f"{number}.npy", (wave + 0.1 * rng.standard_normal((6, 100))).astype(np.float32))
    split = ("train", "train", "val", "test")[number // 6]
    lines.append({"id": str(number), "imu": f"{number}.npy", "text": gait, "label": gait, "split": split})
  path = folder / "walks.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def test_the_document_binds_a_sensor_to_a_finished_run_and_leaves_it_as_it_was(snippets, data, whole_run, tmp_path):
  folder, motion = snippets

  # The document's tower and stage on the tiny run's trunks.
  added, config = motion.get_config(), tiny_config(*data).copy_and_resolve_references().unlock()
  config.model.towers.imu, config.codebook.codes.imu = added.model.towers.imu, added.codebook.codes.imu
  config.stages = ConfigDict({"motion": added.stages.motion.to_dict()})
  config.stage_order = added.stage_order
  config.update_from_flattened_dict({
    "data.manifest": str(walks(folder)), "init_from": str(whole_run[0]), "stages.motion.steps": 4,
    "stages.motion.batch_size": 12, "stages.motion.unique_labels": False,
  })
  final = train_and_evaluate(config.lock(), tmp_path / "motion")
  assert "eval/walks_test/zeroshot/imu/top1" in final
  assert lines_of(tmp_path / "motion")[0]["stage"] == "motion"

  before, after = arrays_of(whole_run[0]), arrays_of(tmp_path / "motion")
  for name, value in before.items():
    if name.startswith(("params/image", "params/text", "codebooks/image")):
      np.testing.assert_array_equal(after[name], value, err_msg=name)
  assert not np.array_equal(before["codebooks/shared/codes"], after["codebooks/shared/codes"])
  model = codebind_jax.load(tmp_path / "motion")
  assert set(model.modalities) == {"image", "text", "imu"}
  assert model.embed({"imu": [str(folder / "0.npy")]})["imu"].shared.shape == (1, 16)


def test_what_the_transform_refuses_is_named_with_its_line(snippets, tmp_path):
  np.save(tmp_path / "bad.npy", np.zeros((3, 10), np.float32))
  (tmp_path / "m.jsonl").write_text('{"imu": "bad.npy", "text": "walking"}\n')
  with pytest.raises(ValueError, match=r"m.jsonl:1: imu: .*bad.npy: shape \(3, 10\)"):
    open_source(str(tmp_path / "m.jsonl"))

"""The configs on ImageBind's encoders train: the publication's stages and `imagebind_huge`, shrunk, on raw files."""

import importlib
import json
import re

import numpy as np
import pytest
import soundfile
from PIL import Image

import codebind_jax
from codebind_jax.runtime import optim
from codebind_jax.train import train_and_evaluate
from codebind_jax.trunks import load_trunk
from configs import imagebind_huge
from tests.model_fixtures import spec, state_dict
from tests.torch_files import torch_zip
from tests.train_fixtures import arrays_of, lines_of

ROWS = 4


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  """A manifest whose rows have a picture, a text and a file of every sensor."""
  folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
  lines = []
  for row in range(ROWS + 2):
    for name in ("image", "tactile", "thermal"):
      pixels = np.kron(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), np.ones((40, 40, 1), np.uint8))
      Image.fromarray(pixels if name != "thermal" else pixels[..., 0]).save(folder / f"{name}{row}.png")
    soundfile.write(folder / f"audio{row}.wav", 0.1 * rng.standard_normal((22_050, 2)), 22_050)
    np.save(folder / f"depth{row}.npy", rng.uniform(0.5, 5, (240, 320)).astype(np.float32))
    np.save(folder / f"eeg{row}.npy", rng.normal(0, 20, (128, 512)).astype(np.float32))
    files = {"image": "png", "tactile": "png", "thermal": "png", "audio": "wav", "depth": "npy", "eeg": "npy"}
    split = "train" if row < ROWS else ("val", "test")[row - ROWS]
    lines.append({"id": str(row), "text": f"thing {row}", "split": split}
                 | {name: f"{name}{row}.{ending}" for name, ending in files.items()})  # fmt: skip
  path = folder / "pairs.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def shrunk(config, pairs, losses=("info_nce", "commitment", "reconstruction")):
  """Narrow encoders of two blocks, two steps, small codebooks; inputs, pairs and what trains stay."""
  config = config.unlock()
  config.update_from_flattened_dict({
    "steps": 2, "batch_size": ROWS, "log_steps": 1, "eval_steps": 100, "checkpoint_steps": 1, "optim.warmup": 0,
    "tasks": ("retrieval",), "data.manifest": str(pairs), "data.root": str(pairs.parent / "data"),
    "codebook.shared_codes": 8, "model.decoder": {"width": 8, "depth": 1, "heads": 2}, "mesh.fsdp": 1,
  })  # fmt: skip
  for name, tower in config.model.towers.items():
    if not tower.options.weights:
      tower.options.update({"width": 16, "depth": 2, "heads": 2})
    if name in config.codebook.codes:
      config.codebook.codes[name] = 8
  for stage in config.stages.values():
    stage.steps, stage.batch_size, stage.unique_labels, stage.code_rows = 2, ROWS, False, 2
    stage.losses = {name: weight for name, weight in stage.losses.items() if name in losses}
  return config.lock()


@pytest.mark.parametrize("name", [
  "tactile", "eeg", *(pytest.param(name, marks=pytest.mark.slow) for name in ("image", "depth", "audio", "thermal"))
])  # fmt: skip
def test_a_stage_of_the_publication_trains(name, pairs, tmp_path):
  config = shrunk(importlib.import_module(f"configs.paper.{name}").get_config(), pairs)
  train_and_evaluate(config, tmp_path / "run")
  lines = [line for line in lines_of(tmp_path / "run") if "train/total" in line]
  assert [line["step"] for line in lines] == [1, 2]
  assert all(line[f"train/{loss}"] > 0 for line in lines for loss in ("info_nce", "commitment", "reconstruction"))
  assert lines[0]["train/reconstruction"] != lines[1]["train/reconstruction"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """A tiny checkpoint under ImageBind's names, all encoders with as many heads."""
  path = tmp_path_factory.mktemp("imagebind") / "imagebind_tiny.pth"
  path.write_bytes(torch_zip({n: x for n, x in state_dict().items() if n.startswith("modality_")}))
  return path


def test_imagebind_huge_trains_audio_by_lora_from_a_checkpoint(pairs, weights, tmp_path):
  config = imagebind_huge.get_config(f"decoder,{weights}").unlock()
  for name, tower in config.model.towers.items():
    tower.options.heads, tower.options.dtype = spec(name).heads, ""
    tower.specific_dim = 8 * (name != "text")
  width = load_trunk("imagebind", **config.model.towers.audio.options).head.module.width
  config.model.shared_dim, config.codebook.dim, config.model.half = width, 4, ()
  config = shrunk(config.lock(), pairs)
  train_and_evaluate(config, tmp_path / "run")

  lines = [line for line in lines_of(tmp_path / "run") if "train/total" in line]
  assert len(lines) == 2 and {f"train/{loss}" for loss in config.stages.audio.losses} <= set(lines[0])
  after, before = arrays_of(tmp_path / "run"), {}
  for name, tower in config.model.towers.items():
    trunk = load_trunk(tower.trunk, **tower.options)
    own = optim.param_paths({name: {"trunk": trunk.params, "shared": trunk.head_params}})
    before |= {f"params/{path}": np.asarray(value) for path, value in own.items()}
  moved = {path for path, value in before.items() if not np.array_equal(after[path], value)}
  assert moved == {path for path in before if re.match("params/audio/(shared/|trunk/stem/cls_token)", path)}
  adapters = {path: value for path, value in after.items() if re.search("lora_[ab]$", path)}
  assert {path.split("/")[-2] for path in adapters} == {"qkv", "out", "fc1", "fc2"}
  assert all(path.startswith("params/audio/trunk/trunk/blocks/") for path in adapters)
  assert all(np.abs(x).max() > 0 for x in adapters.values())

  model = codebind_jax.load(tmp_path / "run")
  found = model.embed({"audio": [pairs.parent / "audio0.wav"], "image": [pairs.parent / "image0.png"]})
  assert found["audio"].shared.shape == (1, width) and found["audio"].specific.shape == (1, 8)

"""A checkpoint is read straight into its place: peak of memory, measured on 500 MB of a CLIP-like encoder."""

import json
import math
import sys

import numpy as np
import pytest

from tests import family_fixtures
from tests.processes import started

WIDTH, HIDDEN, PATCH, SIDE = 2048, 12288, 14, 224
LARGEST = WIDTH * HIDDEN * 4


def shapes():
  """Official name -> shape of a large image encoder of two layers."""
  layer, out = "vision_model.encoder.layers.{}.", {}
  for i in range(2):
    at = layer.format(i)
    for name, (rows, columns) in {
      **{f"self_attn.{part}_proj": (WIDTH, WIDTH) for part in ("q", "k", "v", "out")},
      "mlp.fc1": (HIDDEN, WIDTH), "mlp.fc2": (WIDTH, HIDDEN),
    }.items():  # fmt: skip
      out |= {f"{at}{name}.weight": (rows, columns), f"{at}{name}.bias": (rows,)}
    out |= {f"{at}layer_norm{n}.{part}": (WIDTH,) for n in (1, 2) for part in ("weight", "bias")}
  for norm in ("pre_layrnorm", "post_layernorm"):
    out |= {f"vision_model.{norm}.{part}": (WIDTH,) for part in ("weight", "bias")}
  return out | {
    "vision_model.embeddings.class_embedding": (WIDTH,),
    "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
    "vision_model.embeddings.position_embedding.weight": ((SIDE // PATCH) ** 2 + 1, WIDTH),
    "visual_projection.weight": (1024, WIDTH),
  }


def value(name):
  """The one array that is not zeros."""
  rows, columns = shapes()[name]
  return (np.arange(rows)[:, None] * 0.5 + np.arange(columns)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A sparse file: zeros take no room on the disk."""
  folder, header, start = tmp_path_factory.mktemp("memory") / "clip", {}, 0
  folder.mkdir()
  for name, shape in shapes().items():
    stop = start + 4 * math.prod(shape)
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}
    start = stop
  text, known = json.dumps(header).encode(), "vision_model.encoder.layers.1.mlp.fc1.weight"
  with open(folder / "model.safetensors", "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + start)
    file.seek(8 + len(text) + header[known]["data_offsets"][0])
    file.write(value(known))
  vision = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 16,
            "image_size": SIDE, "patch_size": PATCH}  # fmt: skip
  (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
  (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": SIDE}, "crop_size": SIDE}))
  assert start > 480e6
  family_fixtures.unpack("clip_hf", folder.parent / "small")
  return folder


@pytest.mark.parametrize(("how", "devices"), [
  ("load", 1), ("fsdp scan", 8), pytest.param("fsdp", 8, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_peak_is_one_array_above_what_stays(folder, how, devices):
  # One arena: what glibc keeps for each thread is not the loader's.
  worker = [sys.executable, "-m", "tests.memory_worker", str(folder), str(folder.parent / "small"), how]
  command = ["env", "MALLOC_ARENA_MAX=1", *worker]
  process = started(command, devices)
  out, errors = process.communicate(timeout=300)
  assert not process.returncode, errors[-3000:]
  found = json.loads(out.splitlines()[-1])
  np.testing.assert_array_equal(found["sample"], value("vision_model.encoder.layers.1.mlp.fc1.weight").T[:3, :4])
  assert found["stays"] > 470e6 and found["devices"] == devices
  assert found["above"] <= 1.3 * LARGEST, f"{found['above'] / LARGEST:.2f} of the largest array above what stays"
  assert found["above"] > 0.3 * LARGEST  # else this measures something else

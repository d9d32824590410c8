"""A tiny data set of one's own, a tiny config, and a way to run them: shared by the tests of the trainer."""

import json
import pathlib

import numpy as np
from PIL import Image

from codebind_jax import files
from configs import stage1

COLOURS = ("red", "green", "blue", "black", "orange", "purple", "brown", "gray")


def write_manifest(folder: pathlib.Path, rows_per_label: int = 3) -> pathlib.Path:
  """Coloured squares of several sizes with the colour's name as label and caption; splits train, val and test."""
  folder.mkdir(parents=True, exist_ok=True)
  lines = []
  for number, colour in enumerate(COLOURS):
    for row in range(rows_per_label + 2):
      image = Image.new("RGB", (32, 32), "white")
      side = 10 + 4 * row
      image.paste(Image.new("RGB", (side, side), colour), (row, number))
      image.save(folder / f"{colour}{row}.png")
      split = "train" if row < rows_per_label else ("val", "test")[row - rows_per_label]
      lines.append({"id": f"{colour}{row}", "image": f"{colour}{row}.png", "text": [colour, f"{colour} square"],
                    "label": colour, "split": split})
  path = folder / "squares.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def tiny_config(manifest: pathlib.Path, root: pathlib.Path, **overrides):
  """The shipped stage 1 config, shrunk: random trunks, eight rows a batch, six steps."""
  config = stage1.get_config("runlocal").unlock()
  config.update_from_flattened_dict({
    "steps": 6, "batch_size": 8, "data.captions": "each", "log_steps": 1, "eval_steps": 3, "checkpoint_steps": 2,
    "baseline": False, "test": True, "data.manifest": str(manifest), "data.root": str(root), "model.shared_dim": 16,
    "codebook.shared_codes": 16, "codebook.codes.image": 8, "optim.warmup": 2,
    "model.towers.image.views": 2, "model.towers.image.specific_dim": 16, "model.towers.image.hidden": 16,
    "model.towers.image.meaning": "", "model.towers.image.meaning_dim": 0,
  })
  config.model.towers.image.options = {
    "weights": "random", "size": 32, "grid": 2, "stages": ((1, 3, 1, 1, 8), (1, 3, 2, 2, 16)), "head_width": 32
  }
  config.model.towers.image.augment = {"kind": "drawing"}
  config.model.towers.text.options = {"weights": "random", "layers": 1, "width": 32, "heads": 4}
  config.update_from_flattened_dict(overrides)
  return config.lock()


def arrays_of(workdir: files.Path) -> dict[str, np.ndarray]:
  """All parameters and codebooks of the newest checkpoint by path."""
  from codebind_jax.runtime.checkpoint import Checkpoints
  from codebind_jax.runtime.optim import param_paths

  store = Checkpoints(workdir)
  try:
    return {path: np.asarray(leaf) for path, leaf in param_paths(store.read_arrays()).items()}
  finally:
    store.close()


def lines_of(workdir: files.Path) -> list[dict]:
  """Lines of metrics.jsonl without the names that are wall-clock."""
  timed = ("examples_per_second", "data_wait_share", "data/")
  lines = [json.loads(line) for line in files.read_text(files.path(workdir) / "metrics.jsonl").splitlines()]
  return [{name: value for name, value in line.items() if not name.startswith(timed)} for line in lines]

"""Writes a model or published checkpoint as a folder that loads by itself, and lists the official checkpoints.

Command: python -m codebind_jax.tools.convert IN OUT [--modalities=image,text] [--check]
         [--recorded=FILE] [--record=FILE]
         python -m codebind_jax.tools.convert --list

IN is whatever `codebind_jax.load` takes. The licence of the weights stays theirs, whatever their form.

`--check` compares embeddings of bundled inputs with recorded ones, of the packaged table `trunks/recorded.json` and of
`--recorded`; `--record` writes the model's own. Such a file is JSON: SHA-256 of a trunk's checkpoint (of several files,
joined by "+"), or of the saved `model.safetensors` for a model with heads of its own -> modality -> the shared
embeddings of that modality's inputs, a list of lists of numbers.
"""

from __future__ import annotations

import importlib.resources
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags

from codebind_jax import files
from codebind_jax.api import Model, load
from codebind_jax.runtime import signals
from codebind_jax.saving import folder as saved_folder
from codebind_jax.trunks.checkpoint_files import file_hash
from codebind_jax.trunks.families import list_pretrained

_LIST = flags.DEFINE_bool("list", False, "Print the table of official checkpoints.")
_CHECK = flags.DEFINE_bool("check", False, "Compare embeddings of bundled inputs with recorded ones.")
_RECORD = flags.DEFINE_string("record", None, "JSON file to which the model's embeddings of bundled inputs are added.")
_RECORDED = flags.DEFINE_string("recorded", None, "JSON file of further recorded embeddings.")
_MODALITIES = flags.DEFINE_list("modalities", None, "Those to load; all unless given.")
SAME = 0.999  # smallest cosine of an embedding to the recorded one; bfloat16 costs about 1e-4


def table() -> list[str]:
  """The official checkpoints as lines of a Markdown table."""
  lines = ["| name | family | modalities | width | licence |", "|---|---|---|---|---|"]
  return lines + [f"| `{row.name}` | {row.family} | {', '.join(row.modalities)} | {row.width} | {row.licence} |"
                  for row in list_pretrained()]  # fmt: skip


def bundled(modality: str) -> list[Any]:
  """Two items of a modality, the same on every machine."""
  rng = np.random.default_rng(16)
  down, across = np.mgrid[:180, :240]
  waves = [np.sin(2 * np.pi * hertz * np.arange(2 * 44100) / 44100) * 0.3 for hertz in (440, 1200)]
  picture = np.stack([down, across, 255 - down], axis=-1).astype(np.uint8)
  ball = rng.normal(size=(2, 2000, 3))
  items = {
    "text": ["a photo of a dog", "Rain falls on a tin roof, far away."],
    "image": [picture, np.ascontiguousarray(picture[:, ::-1, ::-1])],
    "video": [np.stack([picture] * 4), np.stack([picture[:, ::-1]] * 4)],
    "audio": [wave.astype(np.float32) for wave in waves],
    "depth": [(1 + value / 200).astype(np.float32) for value in (down, across)],
    "thermal": [(15 + value / 10).astype(np.float32) for value in (down, across)],
    "tactile": [picture, np.ascontiguousarray(picture[::-1])],
    "points": [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in ball],
  }
  return items.get(modality, [])


def keys_of(folder: pathlib.Path) -> dict[str, str]:
  """Modality -> its key among recorded embeddings, for a saved model."""
  content = json.loads((folder / saved_folder.CONFIG).read_text(encoding="utf-8"))
  model, trunks = content["config"]["model"], content["trunks"]
  if model["quantize"] or any(tower["head"] != "published" for tower in model["towers"].values()):
    return dict.fromkeys(trunks, file_hash(folder / saved_folder.ARRAYS))
  return {m: "+".join(sorted(trunk["checkpoints"].values())) for m, trunk in trunks.items()}


def embedded(model: Model) -> dict[str, list[list[float]]]:
  """Modality -> shared embeddings of its bundled inputs, for modalities that have some."""
  items = {m: bundled(m) for m in model.modalities}
  return {m: model.embed({m: inputs})[m].shared.tolist() for m, inputs in items.items() if inputs}


def report(model: Model, folder: pathlib.Path) -> list[str]:
  """Lines on a saved model: of each modality its trunk, sizes, licence and checkpoint; the hash of its arrays."""
  content = json.loads((folder / saved_folder.CONFIG).read_text(encoding="utf-8"))
  lines = []
  for m in model.modalities:
    record, trunk = content["trunks"][m], model.trunk(m)
    lines.append(f"{m}: {record['family']}, {record['parameters']:,} parameters, {trunk.num_tokens} tokens of width "
                 f"{trunk.width}, shared embedding of width {model.widths(m)['shared']}")  # fmt: skip
    lines.append(f"  licence: {record['licence'] or 'not stated'}")
    lines += [f"  from {name}, SHA-256 {value}" for name, value in record["checkpoints"].items()]
  return [*lines, f"{folder / saved_folder.ARRAYS}: SHA-256 {file_hash(folder / saved_folder.ARRAYS)}"]


def compared(model: Model, keys: Mapping[str, str], recorded: Mapping[str, Any]) -> tuple[list[str], bool]:
  """Lines that compare a model's embeddings with recorded ones, and whether all agree."""
  there = {m: recorded[key][m] for m, key in keys.items() if m in recorded.get(key, {})}
  lines, agree, own = [], True, embedded(model) if there else {}
  for m in model.modalities:
    if m not in there:
      lines.append(f"check: {m}: no recorded embeddings of this checkpoint (record some with --record)")
      continue
    a, b = np.asarray(own[m]), np.asarray(there[m])
    cosine = float((a * b).sum(1).min()) if a.shape == b.shape else float("nan")
    good = cosine >= SAME
    agree &= good
    verdict = "equal" if good else "DIFFERS"
    lines.append(f"check: {m}: smallest cosine to the recorded embeddings {cosine:.6f}: {verdict}")
  return lines, agree


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = files.read_json(path)
  except (OSError, ValueError) as error:
    raise ValueError(f"{path}: no readable table of recorded embeddings ({error})") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path}: an object is needed, got {type(content).__name__}")
  return content


def convert(source: str, out: str) -> bool:
  """Loads, saves and reports; whether the embeddings agree with the recorded ones, as far as these are asked for."""
  model = load(source, modalities=_MODALITIES.value)
  folder = model.save(out)
  lines = report(model, folder)
  agree, again, keys = True, load(folder), keys_of(folder)
  if _CHECK.value:
    packaged = importlib.resources.files("codebind_jax.trunks") / "recorded.json"
    recorded = json.loads(packaged.read_text(encoding="utf-8"))
    recorded |= _read(pathlib.Path(_RECORDED.value)) if _RECORDED.value else {}
    more, agree = compared(again, keys, recorded)
    lines += more
  if _RECORD.value:
    path = pathlib.Path(_RECORD.value)
    recorded = _read(path) if path.exists() else {}
    for m, vectors in embedded(again).items():
      recorded.setdefault(keys[m], {})[m] = vectors
    path.write_text(json.dumps(recorded, sort_keys=True) + "\n", encoding="utf-8")
    lines.append(f"{path}: recorded {', '.join(model.modalities)}")
  sys.stdout.write("\n".join(lines) + "\n")
  return agree


def main(argv: Sequence[str]) -> None:
  """Reads the command line."""
  if _LIST.value:
    sys.stdout.write("\n".join(table()) + "\n")
    return
  if len(argv) != 3:
    sys.exit("error: needed are IN and OUT, or --list")
  try:
    agree = convert(argv[1], argv[2])
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  if not agree:
    sys.exit(1)


if __name__ == "__main__":
  signals.command(app.run, main)

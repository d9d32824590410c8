"""Towers of mode `bind`: a packaged trunk or a published encoder for each modality, fitted to the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from codebind_jax import files, schema
from codebind_jax.data import transforms
from codebind_jax.data.task import Task
from codebind_jax.data.worlds import fetch
from codebind_jax.models.towers import TowerSpec
from codebind_jax.saving import hub
from codebind_jax.trunks import eeg_patches, load_trunk, trunk_maker, trunk_names
from codebind_jax.trunks.base import fingerprint
from codebind_jax.trunks.families import family_of

BRIDGES = ("text", "image")  # modalities that others are bound to, where the data has them
EEG_SAMPLE = 256  # recordings that are read for the shape and the statistics of EEG


def tower_of(
  config: ConfigDict, modality: str, asked: Mapping[str, Mapping[str, str]], task: Task, used: Sequence[str]
) -> dict[str, Any]:
  """The tower of a modality that the model does not have yet, as a plain section.

  Args:
    config: of `configs/bind.py`, with the packaged towers.
    modality: of the tower.
    asked: section (`trunks`, `weights`, `tune`) -> modality -> what the command set.
    task: the data.
    used: modalities that are bound.

  Raises:
    ValueError: naming the key to set.
  """
  packaged = config.model.towers[modality].to_dict() if modality in config.model.towers else {}
  weights, name = asked["weights"].get(modality, ""), asked["trunks"].get(modality, "")
  local = weights
  if weights and weights != "random":
    try:
      local = hub.fetch(weights) if weights.startswith(hub.PREFIX) else files.fetched(files.path(weights))
      if not Path(local).expanduser().exists():
        raise ValueError(f"{weights!r}: no such file or folder")
      name = name or family_of(Path(local).expanduser())
    except ValueError as error:
      raise ValueError(f"config.weights.{modality}: {error}") from error
  if not name and not packaged:
    raise ValueError(f"config.trunks.{modality}: must be set, no trunk is packaged for {modality!r}; allowed: one of "
                     f"{trunk_names()}")  # fmt: skip
  if name and name != packaged.get("trunk"):
    keep = {key: packaged[key] for key in ("specific_dim", "augment", "lora_rank", "lora_layers") if key in packaged}
    options = schema.defaults(trunk_maker(name))
    tower = schema.defaults(TowerSpec) | keep | {"trunk": name, "options": options}
  else:
    tower = packaged
  if weights:
    tower["options"]["weights"] = str(local)
  if "modality" in tower["options"]:
    tower["options"]["modality"] = modality
  if tower["meaning"] and tower["meaning"] not in used:
    tower |= {"meaning": "", "meaning_dim": 0}
    tower["options"] |= {"class_names": ""}
  if tower["trunk"] in ("eeg", "eeg_patches"):
    _fit_eeg(config, tower, task)
  tune = asked["tune"].get(modality, "")
  try:
    trunk = load_trunk(tower["trunk"], **tower["options"])
  except ValueError as error:
    raise ValueError(f"config.model.towers.{modality}: {error}") from error
  if trunk.modality != modality:
    raise ValueError(f"config.trunks.{modality}: {tower['trunk']!r} is a trunk of {trunk.modality}")
  drawn = tower["options"].get("weights") == "random"  # asked for
  learns = trunk.load is None and bool(trunk.shapes) and not drawn  # there is nothing to read it from
  if tune == "frozen" and learns and tower["trunk"] not in ("eeg", "eeg_patches"):
    raise ValueError(f"config.tune.{modality}: got 'frozen', but the trunk {tower['trunk']!r} has no checkpoint and "
                     "would stay as drawn; allowed: full")  # fmt: skip
  tower["cache"] = tune in ("", "frozen") and not (learns and tower["trunk"] != "eeg_patches")
  if not tower["cache"]:
    tower |= {"whiten": 0.0, "views": 1}
  elif tower["whiten"] and not _many_texts(task):
    tower["whiten"] = 0.0
  return tower


def _many_texts(task: Task) -> bool:
  """Whether the texts suffice for the covariance of the text trunk's tokens."""
  return sum(len(source.rows_with("text")) for source in task.train.values()) >= 500


def _fit_eeg(config: ConfigDict, tower: dict[str, Any], task: Task) -> None:
  """Sets channels, samples and statistics of an EEG trunk to those of the training recordings, most of which agree."""
  if tower["options"]["statistics"] != "evoked" or config.data.to_dict().get("worlds"):
    return
  recordings = []
  for source in task.train.values():
    rows = source.rows_with("eeg")
    for row in rows[np.unique(np.linspace(0, len(rows) - 1, min(EEG_SAMPLE, len(rows))).astype(int))]:
      try:
        recordings.append(transforms.of("eeg").read(source.read(int(row), "eeg")))
      except ValueError:
        continue  # a bad record, which the run itself counts
  if not recordings:
    raise ValueError("config.data.files: none of the EEG recordings tried could be read")
  (channels, samples), count = Counter(x.shape for x in recordings).most_common(1)[0]
  alike = [x for x in recordings if x.shape == (channels, samples)]
  if count < len(recordings):
    logging.warning("eeg: %d of %d recordings tried have %d channels and %d samples; others count as bad records",
                    count, len(recordings), channels, samples)  # fmt: skip
  width = tower["options"].get("width" if tower["trunk"] == "eeg_patches" else "patch")
  found = eeg_patches.statistics(np.stack(alike), width)
  found["deviation"] = np.maximum(found["deviation"], 1e-6 * max(float(found["deviation"].max()), 1e-6))
  digest = fingerprint(found, {}, "eeg")[:16]
  path = fetch.data_dir(config.data.root or None) / "statistics" / f"eeg-{digest}.npz"
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
      np.savez(file, **found)
  tower["options"] |= {"channels": int(channels), "samples": int(samples), "statistics": str(path)}


def publish(
  config: ConfigDict, towers: Mapping[str, dict[str, Any]], asked: Mapping[str, Mapping[str, str]], used: Sequence[str]
) -> None:
  """Starts the shared heads of published encoders that have one embedding from the checkpoints' own heads.

  Args:
    config: changed in width and rates.
    towers: modality -> plain section, changed.
    asked, used: as of `tower_of`.
  """
  heads = {}
  for modality in used:
    if modality in asked["weights"]:
      head = load_trunk(towers[modality]["trunk"], **towers[modality]["options"]).head
      if head is not None:
        heads[modality] = head.module.width
  anchors = [m for m in BRIDGES if m in used]
  widths = {heads.get(m) for m in anchors}
  if not anchors or None in widths or len(widths) > 1:
    return
  (width,) = widths
  config.model.shared_dim = width
  for modality in [m for m in used if heads.get(m) == width]:
    towers[modality] |= {"head": "published", "whiten": 0.0, "hidden": 0, "meaning": "", "meaning_dim": 0}
    # Published heads keep their place at first.
    own = ((rf"{modality}/shared/.*(bias|scale)", 0.02, 0.0), (rf"{modality}/shared/.*", 0.02, 1.0))
    config.optim.rules = (*own, *map(tuple, config.optim.rules))

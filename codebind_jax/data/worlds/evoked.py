"""World "Evoked": one person's EEG after tones and checkerboards, each stimulus named and reconstructed.

288 epochs of 10 channels, 0.6 s at 150 Hz, from MNE's sample recording, which the table splits in the order of
recording. The pictures and tones are reconstructions from the description, not the ones that were shown.
"""

import csv
import functools
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from jaxtyping import Float32, UInt8
from PIL import Image

from codebind_jax.data.worlds import archives, fetch, names, store
from codebind_jax.data.worlds.evalset import EvalSet
from codebind_jax.data.worlds.tally import Tally, features

VERSION = "1.0.0"
TABLES = ("eeg", "packages")
PROFILES = ("tiny", "small", "full")  # the same recording in all of them
PACKAGE = "neurokit2"
SENSES = {"audio": "a tone", "visual": "a checkerboard"}
_SPLITS = ("train", "val", "test")
_SIDE = 192
_RATE = 44_100


def package_ids(profile: str) -> list[str]:
  """The package that every profile is built from."""
  store.check_profile("evoked", profile, PROFILES)
  return [PACKAGE]


def eval_sets(profile: str) -> dict[str, EvalSet]:
  """Naming one of four stimuli; and naming tone or checkerboard, on the same epochs with the sense as label."""
  store.check_profile("evoked", profile, PROFILES)
  conditions = tuple(names.table("eeg")["conditions"].values())
  sets = {}
  for role in ("val", "test"):
    pairs = (("eeg", "image", "label"),)
    sets[f"{role}_condition"] = EvalSet(
      split=role, role=role, candidates=conditions, probes=("condition", "sense"), pairs=pairs,
        title="stimuli",
    )  # fmt: skip
    sets[f"{role}_sense"] = EvalSet(split=f"{role}_sense", role=role, candidates=tuple(SENSES.values()), title="senses")
  return sets


def build(profile: str, root: Path) -> Path:
  """The world's folder, fetched and built where it is not there yet; see `registry` for arguments and errors."""
  store.check_profile("evoked", profile, PROFILES)
  folder = store.world_dir(root, "evoked", profile, VERSION)
  if store.read_manifest(folder) is not None:
    return folder
  path = fetch.fetch(PACKAGE, root=root)
  epochs = read_epochs(path)
  table = names.table("eeg")
  tally = Tally("evoked", profile, VERSION, {PACKAGE: path}, TABLES)

  def rows(split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for epoch in table["epochs"]:
      if epoch["split"] == split.removesuffix("_sense"):
        row = _row(epoch, epochs[epoch["label"]], by_sense=split.endswith("_sense"))
        tally.keep(split, row["id"].encode(), row["eeg"])
        yield row["id"], row

  splits = [*_SPLITS, *(f"{split}_sense" for split in ("val", "test"))]
  return store.build(
      root, "evoked", profile, VERSION, arrays=("eeg", "image", "audio"), features=_features,
      finish=functools.partial(tally.finish, reconstructed=["image", "audio"]),
      splits={split: lambda split=split: rows(split) for split in splits}, need_bytes=20_000_000)


def read_epochs(path: Path) -> dict[int, Float32[np.ndarray, "channels samples"]]:
  """Epochs by number, in microvolts, from the package's table of samples.

  Raises:
    ValueError: if the archive lacks the table or it is not the one recorded.
  """
  table = names.table("eeg")
  content = archives.read_members(path, [table["inner"]]).get(table["inner"])
  if content is None:
    raise ValueError(f"{path}: {table['inner']} is not in it")
  digest = hashlib.sha1(content).hexdigest()
  if digest != table["sha1"]:
    raise ValueError(f"{path}: {table['inner']}: expected SHA-1 {table['sha1']}, got {digest}")
  lines = csv.reader(io.StringIO(content.decode()))
  head = next(lines)
  number, columns = head.index("Label"), [head.index(channel) for channel in table["channels"]]
  samples: dict[int, list[list[float]]] = {}
  for line in lines:
    samples.setdefault(int(float(line[number])), []).append([float(line[column]) for column in columns])
  return {label: (1e6 * np.array(rows).T).astype(np.float32) for label, rows in samples.items()}


def checkerboard(side: str, size: int = _SIDE) -> UInt8[np.ndarray, "h w 3"]:
  """A black and white checkerboard in the left or right half of a grey field."""
  y, x = np.mgrid[:size, :size] * 12 // size
  half = (x < 6) if side == "left" else (x >= 6)
  grey = np.where(half, 255 * ((x + y) % 2), 128).astype(np.uint8)
  return np.repeat(grey[..., None], 3, axis=-1)


def tone(side: str) -> Float32[np.ndarray, "n 2"]:
  """A beep of 0.5 s in one of two channels; a mono reader, such as this library's, loses the side."""
  t = np.arange(_RATE // 2) / _RATE
  beep = 0.5 * np.sin(2 * np.pi * 1000 * t) * np.minimum(1, np.minimum(t, t[::-1]) / 0.01)
  silence = np.zeros_like(beep)
  return np.stack((beep, silence) if side == "left" else (silence, beep), axis=1).astype(np.float32)


def _row(epoch: dict[str, Any], eeg: np.ndarray, by_sense: bool) -> dict[str, Any]:
  condition = epoch["condition"]
  sense, side = condition.split("/")
  stimulus = names.table("eeg")["conditions"][condition]
  image = sound = b""
  if sense == "visual":
    out = io.BytesIO()
    Image.fromarray(checkerboard(side)).save(out, "png")
    image = out.getvalue()
  else:
    out = io.BytesIO()
    soundfile.write(out, tone(side), _RATE, format="FLAC", subtype="PCM_16")
    sound = out.getvalue()
  main = SENSES[sense] if by_sense else stimulus
  return {
      "id": f"evoked:{epoch['label']:03d}", "label": main,
      "texts": list(dict.fromkeys([main, stimulus, SENSES[sense]])),
      "concept": "", "group": f"evoked:{epoch['label']:03d}", "condition": condition, "sense": sense, "side": side,
      "source": PACKAGE, "eeg": store.encode(eeg), "image": image, "audio": sound,
  }


def _features() -> dict[str, Any]:
  words = ("id", "label", "concept", "group", "condition", "sense", "side", "source")
  return features(("eeg", "image", "audio"), words)

"""World "Household": depth, simulated infrared, colour and points of 905 catalogued objects, and their names.

One row is one view of one object. Geometry and real size are the catalogues'; pictures and points are rendered from
them, and the infrared is simulated (`infrared.py`). The tables give the splits; all objects of one shape share one.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from codebind_jax import files
from codebind_jax.data.ahead import ahead
from codebind_jax.data.worlds import fetch, furniture, names, store, views
from codebind_jax.data.worlds.evalset import EvalSet
from codebind_jax.data.worlds.tally import Tally, features

VERSION = "1.0.0"
TABLES = ("aliases", "concepts", "mesh_rules", "meshes", "packages", "thermal")
PROFILES = ("tiny", "small", "full")
SPLITS = ("train", "val", "test")
ARRAYS = ("image", "depth", "thermal", "points")
UNIQUE = "object"
PROBES = ("label", "library", "view")  # what the text names; whose catalogue; from where (points have no view)
_ROW_BYTES = 80_000
_MANY = 8  # objects of a split, from which on worker processes render


@functools.cache
def plan(profile: str) -> tuple[dict[str, Any], ...]:
  """Objects of a profile as `tables/meshes.json` lists them; profile tiny has only those of the default library.

  Raises:
    ValueError: for an unknown profile.
  """
  store.check_profile("household", profile, PROFILES)
  return tuple(o for o in names.table("meshes")["objects"] if profile != "tiny" or o["lib"] == "default")


def package_ids(profile: str) -> list[str]:
  """Packages that a profile is built from."""
  return sorted({furniture.DEFAULT if o["lib"] == "default" else furniture.MORE for o in plan(profile)})


def label(entry: dict[str, Any]) -> str:
  """Class of an object if that class has enough objects, else ""."""
  return entry["cls"] if entry["cls"] in {c["cls"] for c in names.table("mesh_rules")["classes"]} else ""


@functools.cache
def _concepts() -> dict[str, str]:
  return {key: name for name, concept in names.concepts().items() for key in concept["meshes"]}


def texts(entry: dict[str, Any]) -> list[str]:
  """Captions of an object without repeats: its catalogue name, its class, its concept's label."""
  concept = names.concepts().get(_concepts().get(entry["key"], ""), {})
  captions: dict[str, str] = {}
  for text in (entry["name"], entry["cls"], concept.get("label")):
    if text:
      captions.setdefault(text.lower(), text)
  return list(captions.values())


def eval_sets(profile: str) -> dict[str, EvalSet]:
  """Classes by name on labelled objects, and retrieval among the modalities on all objects.

  The candidates are the classes that the profile holds: 32, but 20 in tiny, most of them with one to three objects.
  """
  ways = tuple(sorted({label(entry) for entry in plan(profile)} - {""}))
  pairs = (("depth", "points", "object"), ("thermal", "depth", "object"), ("image", "depth", "object"))
  sets = {}
  for split in ("val", "test"):
    asked = {"labelled": True, "candidates": ways, "probes": PROBES, "means": ("label",)}
    sets[split] = EvalSet(split=split, role=split, title="objects of named classes", **asked)
    sets[f"{split}_objects"] = EvalSet(split=split, role=split, pairs=pairs, title="all objects")
  return sets


def build(profile: str, root: Path) -> Path:
  """The world's folder, fetched and built where it is not there yet; see `registry` for arguments and errors."""
  store.check_profile("household", profile, PROFILES)
  folder = store.world_dir(root, "household", profile, VERSION)
  if store.read_manifest(folder) is not None:
    return folder
  paths = fetch.fetch_all(package_ids(profile), root=root)
  tally = Tally("household", profile, VERSION, paths, TABLES)
  bar = tqdm.tqdm(total=len(plan(profile)), unit="object", desc=f"rendering household ({profile})", disable=None)
  fetch.make_folder(folder.parent)
  files.remove_left(folder.parent)
  scratch = contextlib.ExitStack()
  place = folder.parent / files.temporary_name(".unpacked")
  scratch.callback(shutil.rmtree, place, ignore_errors=True)

  @functools.cache
  def unpacked() -> list[tuple[dict[str, Any], Path]]:
    return unpack(plan(profile), paths, place, tally.dropped)

  def rows(split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    ready = [(entry, path) for entry, path in unpacked() if entry["split"] == split]
    workers = min(2, os.cpu_count() or 1) if len(ready) >= _MANY else 0
    with contextlib.closing(ahead(_Sensed(ready), workers=workers, threads=1, stop=len(ready))) as rendered:
      for (entry, _), sensed in zip(ready, rendered, strict=True):
        bar.update()
        if isinstance(sensed, str):
          tally.dropped[entry["key"]] = sensed
          continue
        for view, fields in zip(views.AZIMUTHS, sensed, strict=True):
          tally.keep(split, *(fields[name] for name in ARRAYS))
          yield f"{entry['key']}:{view}", _row(entry, view) | fields
    tally.check(split, "object")

  def finish() -> tuple[dict[str, Any], str]:
    return tally.finish(_creators(profile), simulated=["thermal"], rendered=["image", "depth", "points"])

  with bar, scratch:
    return store.build(
      root, "household", profile, VERSION, arrays=ARRAYS, features=_features, finish=finish,
      splits={split: functools.partial(rows, split) for split in SPLITS},
      need_bytes=_ROW_BYTES * len(views.AZIMUTHS) * len(plan(profile)),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Sensed:
  """Number of an object -> what `views.sense` gives of it."""

  ready: list[tuple[dict[str, Any], Path]]

  def __getitem__(self, number: int) -> list[dict[str, bytes]] | str:
    entry, path = self.ready[number]
    return views.sense(path, entry["key"], entry["name"], entry["cls"], metres(entry))


def unpack(
  objects: tuple[dict[str, Any], ...], paths: dict[str, Path], folder: Path, dropped: dict[str, str]
) -> list[tuple[dict[str, Any], Path]]:
  """Writes the folders of the objects' models to disk and compares each OBJ file with its recorded SHA-1.

  Args:
    objects: rows of `tables/meshes.json`.
    paths: archive of each package.
    folder: where to unpack.
    dropped: filled with the reason for each object of the Debian package whose file is missing or differs, as another
      release may have other files.

  Returns:
    Objects and their OBJ files.

  Raises:
    ValueError: if a file of the package from PyPI is missing or differs, or no object of a package is as recorded.
  """
  boxes = furniture.open_models(paths, {_stem(entry) for entry in objects if entry["lib"] == "default"})
  boxes |= furniture.open_libraries(paths, sorted({entry["lib"] for entry in objects} - {"default"}))
  unpacked = []
  for entry in objects:
    default = entry["lib"] == "default"
    box = boxes.get(_stem(entry) if default else entry["lib"])
    inner = entry["model"].split("/", 1)[1] if default else entry["model"]
    target = folder / hashlib.sha256(entry["key"].encode()).hexdigest()[:16]
    reason = "no such archive" if box is None else _extract(box, inner, entry["sha1"], target)
    if not reason:
      unpacked.append((entry, target / inner))
    elif default:
      raise ValueError(f"{paths[furniture.DEFAULT]}: {entry['key']}: {reason}")
    else:
      dropped[entry["key"]] = reason
  for package in paths:
    keys = [e["key"] for e in objects if (e["lib"] == "default") == (package == furniture.DEFAULT)]
    if keys and all(key in dropped for key in keys):
      raise ValueError(f"{paths[package]}: none of its {len(keys)} objects is as recorded; first: {dropped[keys[0]]}")
  return unpacked


def _stem(entry: dict[str, Any]) -> str:
  return entry["model"].split("/", 1)[0]


def _extract(box: zipfile.ZipFile, inner: str, sha1: str, target: Path) -> str:
  """Unpacks the folder of a model; returns the reason if it cannot be used, else ""."""
  try:
    got = hashlib.sha1(box.read(inner)).hexdigest()
  except (KeyError, zipfile.BadZipFile) as error:
    return f"{inner}: {error}"
  if got != sha1:
    return f"{inner}: expected SHA-1 {sha1}, got {got}"
  above = inner.rpartition("/")[0]
  box.extractall(target, [name for name in box.namelist() if name.startswith(f"{above}/" if above else "")])
  return ""


def metres(entry: dict[str, Any]) -> float:
  """Real length of half the diagonal of an object's box, which is 1 in its mesh."""
  return float(np.linalg.norm([float(side) for side in entry["cm"]])) / 200.0


def _features() -> dict[str, Any]:
  return features(ARRAYS, ("id", "label", "concept", "name", "group", "object", "library", "view", "source"))


def _row(entry: dict[str, Any], view: int) -> dict[str, Any]:
  package = furniture.DEFAULT if entry["lib"] == "default" else furniture.MORE
  return {
    "id": f"{entry['key']}:{view}", "label": label(entry), "texts": texts(entry), "name": entry["name"],
    "concept": _concepts().get(entry["key"], ""), "group": entry["group"], "object": entry["key"],
    "library": entry["lib"], "view": str(view), "source": package,
  }  # fmt: skip


def _creators(profile: str) -> list[str]:
  """Credits of the models, a line for each library, creator and licence: some licences ask for the artists' names."""
  counts: dict[tuple[str, str, str], int] = {}
  for entry in plan(profile):
    by = (entry["lib"], entry["creator"], entry["licence"])
    counts[by] = counts.get(by, 0) + 1
  return [f"{lib}: {count} models by {creator} ({terms})" for (lib, creator, terms), count in sorted(counts.items())]

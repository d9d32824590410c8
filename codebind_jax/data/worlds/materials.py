"""World "Materials": photographs of surfaces of 12 materials, simulated touch of the same places, and their names.

One row is one crop: a photograph and what a touch sensor would see there (`touch.py`, simulated). The
tables give the splits; all crops of a texture and of its near-copies share one.
"""

import functools
import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from jaxtyping import UInt8

from codebind_jax.data.transforms import image as image_transforms
from codebind_jax.data.worlds import archives, fetch, furniture, icons, names, store, touch
from codebind_jax.data.worlds.evalset import EvalSet
from codebind_jax.data.worlds.infrared import generator
from codebind_jax.data.worlds.tally import Tally, features

VERSION = "1.0.0"
TABLES = ("aliases", "concepts", "materials", "packages")
PROFILES = ("tiny", "small", "full")
SPLITS = ("train", "val", "test")
ARRAYS = ("image", "tactile")
UNIQUE = "texture"
CROPS = {"train": 24, "val": 12, "test": 12}
_PACKAGES = {
  "tiny": ("sh3d-pip",), "small": ("gimp-data", "sh3d-furniture", "sh3d-pip"),
  "full": ("gimp-data", "metaworld", "sh3d-furniture", "sh3d-pip"),
}  # fmt: skip
_ROW_BYTES = 50_000


def _package(entry: dict[str, Any]) -> str:
  return entry["package"].partition(":")[0]


def _key(entry: dict[str, Any]) -> str:
  return f"{_package(entry)}:{entry['inner']}"


def package_ids(profile: str) -> list[str]:
  """Packages that a profile is built from.

  Raises:
    ValueError: for an unknown profile.
  """
  store.check_profile("materials", profile, PROFILES)
  return list(_PACKAGES[profile])


def leaks(entry: dict[str, Any]) -> bool:
  """Whether a training texture is of a material whose concept is unseen in training, as brick is (leakage rule 2)."""
  return entry["split"] == "train" and names.to_concept(entry["cls"]) in icons.unseen()


@functools.cache
def plan(profile: str) -> tuple[dict[str, Any], ...]:
  """Textures of a profile as `tables/materials.json` lists them: those of the 12 materials that do not leak."""
  packages, table = package_ids(profile), names.table("materials")
  classes = {c["cls"] for c in table["classes"]}
  return tuple(
    t for t in table["textures"] if _package(t) in packages and t["cls"] in classes and not leaks(t)
  )  # fmt: skip


def eval_sets(profile: str) -> dict[str, EvalSet]:
  """Materials by name and by probe; retrieval between touch and photographs of the same crop or the same texture."""
  ways = tuple(sorted({entry["cls"] for entry in plan(profile)}))
  pairs = (("tactile", "image", "id"), ("tactile", "image", "texture"))
  asked = {"candidates": ways, "probes": ("label", "roughness"), "means": ("label",), "pairs": pairs}
  return {split: EvalSet(split=split, role=split, title="unseen textures", **asked) for split in ("val", "test")}


def build(profile: str, root: Path) -> Path:
  """The world's folder, fetched and built where it is not there yet; see `registry` for arguments and errors."""
  textures = plan(profile)
  folder = store.world_dir(root, "materials", profile, VERSION)
  if store.read_manifest(folder) is not None:
    return folder
  paths = fetch.fetch_all(package_ids(profile), root=root)
  tally = Tally("materials", profile, VERSION, paths, TABLES)
  total = sum(CROPS[entry["split"]] for entry in textures)
  bar = tqdm.tqdm(total=total, unit="crop", desc=f"touching materials ({profile})", disable=None)
  photos = functools.cache(lambda: read_photos(textures, paths, tally.dropped))

  def rows(split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in textures:
      photo = photos().get(_key(entry))
      if entry["split"] != split or photo is None:
        continue
      for number in range(CROPS[split]):
        row = _row(entry, photo, number)
        tally.keep(split, row["image"], row["tactile"])
        bar.update()
        yield row["id"], row
    tally.check(split, "texture")

  with bar:
    return store.build(
      root, "materials", profile, VERSION, arrays=ARRAYS, features=_features,
      finish=functools.partial(tally.finish, simulated=["tactile"]),
      splits={split: functools.partial(rows, split) for split in SPLITS}, need_bytes=_ROW_BYTES * total,
    )  # fmt: skip


def read_photos(
  textures: tuple[dict[str, Any], ...], paths: dict[str, Path], dropped: dict[str, str]
) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
  """Pixels of each texture by "package:inner path", compared with its SHA-1.

  Args:
    textures: rows of `tables/materials.json`.
    paths: archive of each package.
    dropped: filled with the reason for each texture of a Debian package that is missing or differs, as another
      release may have other files.

  Raises:
    ValueError: if a texture of a package from PyPI is missing or differs, or no texture of a package is as recorded.
  """
  photos: dict[str, np.ndarray] = {}
  for package in sorted({_package(entry) for entry in textures}):
    group = [entry for entry in textures if _package(entry) == package]
    contents = _contents(package, group, paths)
    for entry in group:
      content = contents.get(entry["inner"])
      got = None if content is None else hashlib.sha1(content).hexdigest()
      if got == entry["sha1"]:
        photos[_key(entry)] = read_photo(content, entry["inner"])
      elif fetch.packages()[package].kind == "apt":
        dropped[_key(entry)] = f"expected SHA-1 {entry['sha1']}, got {got or 'no such file'}"
      else:
        raise ValueError(f"{paths[package]}: {entry['inner']}: expected SHA-1 {entry['sha1']}, got "
                         f"{got or 'no such file'}")
    if not any(_key(entry) in photos for entry in group):
      raise ValueError(f"{paths[package]}: none of its {len(group)} textures is as recorded; first: "
                       f"{dropped[_key(group[0])]}")
  return photos


def _contents(package: str, textures: list[dict[str, Any]], paths: dict[str, Path]) -> dict[str, bytes]:
  if package == furniture.DEFAULT:
    return furniture.read_default(paths, [entry["inner"] for entry in textures])
  if package != furniture.MORE:
    return archives.read_members(paths[package], [entry["inner"] for entry in textures])
  libraries = {entry["package"].partition(":")[2].removesuffix(".sh3f") for entry in textures}
  boxes = furniture.open_libraries(paths, sorted(libraries))
  box_of = {name: box for box in boxes.values() for name in box.namelist()}
  return {entry["inner"]: box_of[entry["inner"]].read(entry["inner"]) for entry in textures if entry["inner"] in box_of}


def read_photo(content: bytes, name: str) -> UInt8[np.ndarray, "h w 3"]:
  """Pixels of a bitmap or of a GIMP pattern: five big-endian u32 (header size, version, sides, bytes a pixel), a name.

  Raises:
    ValueError: naming the file, if it cannot be read.
  """
  if not name.endswith(".pat"):
    return image_transforms.read(content)
  if len(content) < 20:
    raise ValueError(f"{name}: not a GIMP pattern: {len(content)} bytes")
  head, _, width, height, channels = struct.unpack(">5I", content[:20])
  if channels not in (1, 3, 4) or len(content) < head + width * height * channels:
    raise ValueError(f"{name}: not a GIMP pattern of {width} x {height} pixels with 1, 3 or 4 bytes")
  pixels = np.frombuffer(content, np.uint8, width * height * channels, head)
  return image_transforms.read(pixels.reshape(height, width, channels))


def _features() -> dict[str, Any]:
  return features(ARRAYS, ("id", "label", "concept", "group", "texture", "roughness", "source"))


def _row(entry: dict[str, Any], photo: np.ndarray, number: int) -> dict[str, Any]:
  rng = generator("touch", _key(entry), number)
  piece = touch.crop(photo, rng)
  concept = names.to_concept(entry["cls"])
  rough = {c["cls"]: c["roughness"] for c in names.table("materials")["classes"]}
  felt = touch.touch(piece, rng)
  return {
    "id": f"{_key(entry)}:{number}", "image": store.encode_png(piece), "tactile": store.encode_png(felt),
    "label": entry["cls"], "texts": [entry["cls"]], "concept": concept if concept in names.concepts() else "",
    "group": entry["group"], "texture": _key(entry), "roughness": rough[entry["cls"]], "source": _package(entry),
  }  # fmt: skip

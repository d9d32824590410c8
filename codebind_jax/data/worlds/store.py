"""Built worlds on disk: `<data folder>/worlds/<world>/<profile>/<version>`, a tfds data set in array_record files.

Beside the records lie `manifest.json` (hashes of packages and tables, counts), `index.json` (all fields but the arrays,
in record order) and `ATTRIBUTION.md`. A world appears whole, by one rename, or not at all.

The manifest carries a checksum of itself and of each of the small files, the index and tfds's descriptions, which are
verified whenever a world is opened. The records are not: their files are large and read in parts, and array_record
verifies a hash of each record when that is read.
"""

import contextlib
import errno
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from codebind_jax import files
from codebind_jax.data.worlds import fetch, names

_DESCRIPTIONS = ("dataset_info.json", "features.json")  # tfds's, of the records
_FILES = "files"  # key of a manifest: name -> checksum of each small file
_TYPED = {"text": [str], "texts": [str], "has": [str], "label": str, "split": str, "group": str}  # of an index's rows


def world_dir(root: Path, world: str, profile: str, version: str) -> Path:
  """Folder of one built world."""
  return root / "worlds" / world / profile / version


def check_profile(world: str, profile: str, profiles: Sequence[str]) -> None:
  """Raises a ValueError unless a profile is one of the world's."""
  if profile not in profiles:
    raise ValueError(f"unknown profile {profile!r} of world {world!r}; allowed: {list(profiles)}")


def read_manifest(folder: Path) -> dict[str, Any] | None:
  """The manifest of a built world, verified; None where nothing is built or the tables have changed since.

  Raises:
    ValueError: naming it, if it is damaged.
  """
  path = folder / "manifest.json"
  if not path.is_file():
    return None
  try:
    manifest = _verified(files.read_json(path), path)
    files.check_form(manifest, {"tables": {str: str}}, path)
    if "modalities" in manifest:
      files.check_form(manifest, {"modalities": [str]}, path)
    current = all(names.table_hash(name) == digest for name, digest in manifest["tables"].items())
  except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.EISDIR, errno.ENAMETOOLONG):
      raise
    raise ValueError(f"{path}: damaged ({error}); remove {folder} and run prepare again") from error
  return manifest if current else None


def _verified(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
  """A manifest whose checksum is that of its values; one of a world that was built without is taken as it is."""
  files.check_form(manifest, {}, path)
  found = files.unsealed(manifest, path) if files.SEAL in manifest or _FILES in manifest else manifest
  if _FILES in found:
    files.check_form(found, {_FILES: {str: str}}, path)
  return found


def fingerprint(folder: Path) -> str:
  """A hash of what a world was built of and holds: of its manifest, but for tfds's descriptions and the layout."""
  manifest = _manifest(folder)
  manifest[_FILES] = {name: value for name, value in manifest.get(_FILES, {}).items() if name not in _DESCRIPTIONS}
  return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def array_modalities(folder: Path) -> tuple[str, ...]:
  """The array modalities of a built world's records."""
  return tuple(_manifest(folder).get("modalities", ("image",)))


def _manifest(folder: Path) -> dict[str, Any]:
  """The manifest of a built world, of whatever tables; verified."""
  path = folder / "manifest.json"
  try:
    return _verified(files.read_json(path), path)
  except ValueError as error:
    raise ValueError(f"{path}: damaged ({error}); remove {folder} and run prepare again") from error


def _read_verified(folder: Path, name: str) -> bytes:
  """A small file of a built world, whose checksum is the one that its manifest has, if it has one.

  Raises:
    ValueError: naming the file, if it is missing or another one than was built.
  """
  path = folder / name
  expected = _manifest(folder).get(_FILES, {}).get(name) if (folder / "manifest.json").is_file() else None
  try:
    content = path.read_bytes()
    found = files.checksum(content)
    if expected not in (None, found):
      raise ValueError(f"it has checksum {found}, its manifest says {expected}")
  except (FileNotFoundError, ValueError) as error:
    raise ValueError(f"{path}: damaged ({error}); remove {folder} and run prepare again") from error
  return content


def read_index(folder: Path) -> dict[str, list[dict[str, Any]]]:
  """Split name -> rows without their arrays, in record order; verified.

  Raises:
    ValueError: naming the file, if it is missing, damaged, or not the one that was built.
  """
  content = _read_verified(folder, "index.json")
  try:
    index = files.from_json(content, folder / "index.json")
    files.check_form(index, {str: [{"id": str}]}, folder / "index.json")
    for split, rows in index.items():
      for number, row in enumerate(rows):
        for key in _TYPED.keys() & row.keys():
          if row[key] is not None or key == "has":
            files.check_form(row[key], _TYPED[key], f"row {number} of {split!a:.80}: {key}")
  except ValueError as error:
    raise ValueError(f"{folder / 'index.json'}: damaged ({error}); remove {folder} and run prepare again") from error
  return index


def open_records(folder: Path, split: str, encoded: Iterable[str]) -> Sequence:
  """Random access to a split's records; the fields in `encoded` stay the bytes of their file format.

  Raises:
    ValueError: naming the file, if a description of the records is missing or damaged.
  """
  import tensorflow_datasets as tfds

  for name in _DESCRIPTIONS:
    _read_verified(folder, name)
  raw = {key: tfds.decode.SkipDecoding() for key in encoded}
  with _verbosity(logging.WARNING):
    return tfds.builder_from_directory(folder).as_data_source(split, decoders=raw)


def blob() -> Any:
  """The tfds feature of an array modality that not every row has: an encoded file's bytes, b"" where it is missing."""
  import tensorflow_datasets as tfds

  return tfds.features.Text()


def encode(array: np.ndarray) -> bytes:
  """An array as the bytes of an .npy file."""
  out = io.BytesIO()
  np.save(out, array, allow_pickle=False)
  return out.getvalue()


def encode_png(image: np.ndarray) -> bytes:
  """Pixels uint8 [h, w, 3] as the bytes of a PNG file."""
  out = io.BytesIO()
  Image.fromarray(image).save(out, "png", compress_level=3)
  return out.getvalue()


def item(content: bytes) -> bytes | np.ndarray:
  """A record's field: the array of an .npy file, any other file's bytes."""
  return np.load(io.BytesIO(content), allow_pickle=False) if content[:6] == b"\x93NUMPY" else content


def build(
    root: Path,
    world: str,
    profile: str,
    version: str,
    *,
    splits: Mapping[str, Callable[[], Iterable[tuple[str, dict[str, Any]]]]],
    features: Callable[[], Mapping[str, Any]],
    arrays: Iterable[str],
    finish: Callable[[], tuple[dict[str, Any], str]],
    need_bytes: int,
) -> Path:
  """Writes a world and moves it to its place.

  Args:
    root: the data folder.
    world: name of the world.
    profile: name of the profile.
    version: version of the builder, such as "1.0.0".
    splits: split name -> generator of (id, row).
    features: returns the tfds features of a row.
    arrays: the array modalities: fields kept out of the index, which says under `has` which of them a row has.
    finish: called when all rows are written; returns the manifest and the text of ATTRIBUTION.md.
    need_bytes: free space needed before the work starts.

  Returns:
    The folder of the built world.

  Raises:
    OSError: if the folder cannot be written or has too little space.
  """
  final = world_dir(root, world, profile, version)
  fetch.make_folder(final.parent, need_bytes)
  with files.lock(final.parent / ".lock", f"is working in {final.parent}"):
    if read_manifest(final) is not None:
      return final
    for stale in final.parent.glob(".building-*"):
      shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".building-") as scratch, files.writing(
      final, Path(scratch)
    ):
      built = _write_records(Path(scratch), world, profile, version, splits, features)
      _write_index(built, splits, arrays)
      manifest, attribution = finish()
      small = {name: files.file_checksum(built / name) for name in ("index.json", *_DESCRIPTIONS)}
      manifest |= {"modalities": list(arrays), _FILES: small}
      (built / "ATTRIBUTION.md").write_text(attribution)
      (built / "manifest.json").write_text(json.dumps(files.sealed(manifest), indent=1, sort_keys=True) + "\n")
      files.replace_folder(built, final)
  logging.info("built world %s, profile %s, in %s", world, profile, final)
  return final


def _write_records(scratch, world, profile, version, splits, features) -> Path:
  import tensorflow_datasets as tfds

  with tfds.core.registered.skip_registration():

    class _World(tfds.core.GeneratorBasedBuilder):
      """The packaged world."""

      name = world
      VERSION = tfds.core.Version(version)
      url_infos = {}  # tfds downloads nothing; without this it looks for a checksum file beside this module
      BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=profile)]

      def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features()))

      def _split_generators(self, dl_manager):
        return {split: self._generate_examples(generate) for split, generate in splits.items()}

      def _generate_examples(self, generate):
        return generate()

  with _quiet(tfds.core.utils.tqdm_utils):
    builder = _World(data_dir=scratch, config=profile, file_format="array_record")
    builder.download_and_prepare()
  return Path(builder.data_dir)


@contextlib.contextmanager
def _quiet(progress) -> Iterator[None]:
  """Hides tfds's bars and messages of every split; the world's builder shows one bar of its own."""
  active = progress._active
  progress.disable_progress_bar()
  try:
    with _verbosity(logging.WARNING), contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    progress._active = active


@contextlib.contextmanager
def _verbosity(limit: int) -> Iterator[None]:
  level = logging.get_verbosity()
  logging.set_verbosity(min(level, limit))
  try:
    yield
  finally:
    logging.set_verbosity(level)


def _write_index(folder: Path, splits: Iterable[str], arrays: Iterable[str]) -> None:
  """Writes the small fields of every record, so that rows can be listed and chosen without decoding."""
  arrays, index = tuple(arrays), {}
  for split in splits:
    records = open_records(folder, split, arrays)
    index[split] = [_index_row(records[i], arrays) for i in range(len(records))]
  (folder / "index.json").write_text(json.dumps(index, ensure_ascii=False))


def _index_row(record: dict[str, Any], arrays: tuple[str, ...]) -> dict[str, Any]:
  fields = {key: _plain(value) for key, value in record.items() if key not in arrays}
  return fields | {"has": [name for name in arrays if len(record[name])]}


def _plain(value: Any) -> Any:
  """tfds values as JSON values: bytes as text, arrays as lists."""
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, bytes):
    return value.decode()
  if hasattr(value, "tolist"):
    return _plain(value.tolist())
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  return value

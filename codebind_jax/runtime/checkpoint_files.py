"""What makes a checkpoint whole: checksums of its files, and which version of this package wrote it."""

from __future__ import annotations

import concurrent.futures
import errno
import functools
import hashlib
import os
import pathlib
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from codebind_jax import files

CHECKSUMS = "checksums.json"  # in a near checkpoint's folder
VERSIONS = "versions.json"  # in a run's folder, once a checkpoint is there
_BLOCK = 64 << 20  # bytes with a checksum of their own
_PIECE = 1 << 20  # bytes read at once
_SMALL = 1 << 20  # bytes of files that are verified before any of them is opened
_MOST = 64  # steps that processes tell each other
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
THREADS = min(8, os.cpu_count() or 1)


_FORM = {"files": {str: {"bytes": int, "crc32": [int]}}}


class Damaged(ValueError):
  """A file of a checkpoint is missing, or is not what was written; what, in the message."""


def write_checksums(folder: pathlib.Path, below: Sequence[str]) -> None:
  """Writes CHECKSUMS of all files in some folders of a checkpoint."""
  found = sorted(file for name in below for file in (folder / name).rglob("*") if file.is_file())
  sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in found}
  blocks = [(name, start) for name, size in sizes.items() for start in range(0, size, _BLOCK)]
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    values = list(pool.map(lambda block: _crc(folder / block[0], block[1]), blocks))
  content = {name: {"bytes": size, "crc32": []} for name, size in sizes.items()}
  for (name, _), value in zip(blocks, values, strict=True):
    content[name]["crc32"].append(value)
  files.write_sealed(folder / CHECKSUMS, {"files": content})


def verify_checksums(folder: pathlib.Path, process: int = 0, processes: int = 1, large: bool | None = None) -> None:
  """Compares a checkpoint's files with its CHECKSUMS.

  Args:
    folder: of the checkpoint.
    process: number of this one.
    processes: that share the work.
    large: only files above 1 MiB, or only those up to it; all for None.

  Raises:
    Damaged: naming the file.
    OSError: if a file that is there cannot be read.
  """
  try:
    content = files.read_sealed(folder / CHECKSUMS)
  except FileNotFoundError as error:
    raise Damaged(f"{CHECKSUMS} is missing") from error
  except ValueError as error:
    raise Damaged(str(error).replace(f"{folder}{os.sep}", "")) from error
  files.check_form(content, _FORM, folder / CHECKSUMS)
  content = content["files"]
  items = [(name, item) for name, item in content.items() if large is None or (item["bytes"] > _SMALL) == large]
  for name, item in items:
    size = _existing(name, lambda name=name: (folder / name).stat().st_size)
    if size != item["bytes"]:
      raise Damaged(f"{name} has {size} of {item['bytes']} bytes")
  blocks = [(name, number * _BLOCK, value) for name, item in items for number, value in enumerate(item["crc32"])]
  check = functools.partial(_check, folder)
  own = blocks[process::processes]
  if len(own) < 2 or THREADS == 1 or not any(content[name]["bytes"] > _SMALL for name, _, _ in own):
    for block in own:
      check(block)
    return
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    list(pool.map(check, own))


def _check(folder: pathlib.Path, block: tuple[str, int, int]) -> None:
  name, start, value = block
  if _existing(name, lambda: _crc(folder / name, start)) != value:
    raise Damaged(f"{name} is not what was written: its checksum differs (bytes {start} and on)")


def _existing(name: str, read: Any) -> int:
  try:
    return read()
  except (OSError, ValueError) as error:  # a ValueError of a name that no file has
    if isinstance(error, OSError) and error.errno not in _ABSENT:
      raise
    raise Damaged(f"{name!a} is missing") from error


def _crc(path: pathlib.Path, start: int) -> int:
  """CRC-32 of a block of a file."""
  value, left = 0, _BLOCK
  with open(path, "rb", buffering=0) as file:
    file.seek(start)
    buffer = bytearray(_PIECE)
    while left and (count := file.readinto(memoryview(buffer)[: min(left, _PIECE)])):
      value, left = zlib.crc32(memoryview(buffer)[:count], value), left - count
  return value


@functools.cache
def this_version() -> Mapping[str, str]:
  """Version of this package, a hash of its source, and the Git commit of the checkout it lies in, if it does."""
  package = sys.modules[__name__.partition(".")[0]]
  root = pathlib.Path(package.__file__).parent
  source = hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    source.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
  commit = _commit(root.parent)
  own = {"version": package.__version__, "source": source.hexdigest()[:12]}
  return own | ({"commit": commit} if commit else {})


def _commit(checkout: pathlib.Path) -> str:
  """The commit that a checkout's HEAD names; empty where it is none, or Git's files are not as they use to be."""
  try:
    folder = checkout / ".git"
    if folder.is_file():  # a worktree
      folder = checkout / folder.read_text().partition("gitdir:")[2].strip()
    head = (folder / "HEAD").read_text().strip()
    name = head.partition("ref:")[2].strip()
    if not name:
      return head[:12]
    common = folder / "commondir"
    folder = folder / common.read_text().strip() if common.is_file() else folder
    if (folder / name).is_file():
      return (folder / name).read_text().strip()[:12]
    lines = (folder / "packed-refs").read_text().splitlines()
    return next((line.split()[0][:12] for line in lines if line.endswith(f" {name}")), "")
  except (OSError, ValueError):
    return ""


def said(version: Any) -> str:
  """A version in words."""
  if not isinstance(version, Mapping) or not version:
    return "an unknown version"
  rest = [f"{key} {version[key]}" for key in ("source", "commit") if key in version]
  return f"version {version.get('version')}" + (f" ({', '.join(rest)})" if rest else "")


def versions_of(folder: files.Path) -> list[Mapping[str, Any]]:
  """The versions that wrote checkpoints of a run, each with the step from which on it did; none before the first."""
  try:
    content = files.read_sealed(folder / VERSIONS).get("versions")
  except FileNotFoundError:
    return []
  except ValueError:
    content = None
  good = isinstance(content, list) and all(isinstance(x, dict) and isinstance(x.get("step"), int) for x in content)
  return content if good and content else [{"version": "unknown", "step": 0}]


def note_version(folder: files.Path, step: int) -> None:
  """Notes in a run's folder that this version wrote a checkpoint, unless the last one to do so is this one."""
  there, own = versions_of(folder), this_version()
  if there and {key: value for key, value in there[-1].items() if key != "step"} == own:
    return
  files.write_sealed(folder / VERSIONS, {"versions": [*there, own | {"step": step}]})
  logging.debug("%s: checkpoints are written by %s from step %d on", folder, said(own), step)


def newest_first(names: Iterable[str]) -> list[int]:
  """The steps that names of folders are, newest first."""
  return sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True)


def same_on_all(steps: Sequence[int]) -> list[int]:
  """The newest steps that process 0 has."""
  if jax.process_count() == 1:
    return list(steps)
  own = np.full(_MOST, -1, np.int32)
  own[: len(steps[:_MOST])] = steps[:_MOST]
  return [int(step) for step in multihost_utils.broadcast_one_to_all(own) if step >= 0]


def kinds_of(tree: Any) -> dict[str, str]:
  """Path -> type and shape of a tree's arrays."""
  kinds = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    if hasattr(leaf, "shape"):
      if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # saved as the key's integers
        leaf = jax.eval_shape(jax.random.key_data, leaf)
      kinds[jax.tree_util.keystr(path, simple=True, separator="/")] = f"{leaf.dtype}{list(leaf.shape)}"
  return kinds

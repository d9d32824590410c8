"""Local copies of far files, and the folder that keeps them."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil

from absl import logging

from codebind_jax.files import far
from codebind_jax.files.far import Path
from codebind_jax.files.locks import lock
from codebind_jax.files.places import contents, download
from codebind_jax.files.temporary import look_once, temporary_name

_LARGEST_FETCH = 1000  # objects of one folder


def cache_folder() -> pathlib.Path:
  """Where copies of far files are kept: `$CODEBIND_CACHE`, else `codebind_jax` in the cache folder."""
  if os.environ.get("CODEBIND_CACHE"):
    return pathlib.Path(os.environ["CODEBIND_CACHE"]).expanduser().absolute()
  return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache").absolute() / "codebind_jax"


def fetched(place: Path) -> pathlib.Path:
  """A local path with the content of a file or folder: its own, or a copy of the far one in `cache_folder`.

  A copy is kept under a hash of the address, and the sizes and tags of its objects: once these change, it is made anew.

  Raises:
    FileNotFoundError: if there is nothing.
    ValueError: if a far folder has too many objects to be a model.
  """
  if not far.is_far(place):
    return place
  about = far.found(place)
  items = {"": about} if about else contents(place)
  if not items:
    raise FileNotFoundError(f"{place}: there is no such file or folder")
  if len(items) > _LARGEST_FETCH:
    raise ValueError(f"{place}: has {len(items)} objects; allowed: a folder of at most {_LARGEST_FETCH}")
  recipe = [os.fspath(place), sorted((name, item.size, item.tag) for name, item in items.items())]
  home = cache_folder() / "far" / hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:24]
  local = home / place.name
  if home.is_dir():  # also in a folder that cannot be written
    return local
  home.parent.mkdir(parents=True, exist_ok=True)
  look_once(home.parent)
  with lock(home.with_name(f".{home.name}.lock"), f"copies {place}"):
    if not home.is_dir():
      logging.info("%s: copying %d objects, %.1f MB, to %s", place, len(items),
                   sum(item.size for item in items.values()) / 1e6, local)  # fmt: skip
      part = home.with_name(temporary_name(f".{home.name}"))
      try:
        for name in items:
          file = part / place.name / name
          file.parent.mkdir(parents=True, exist_ok=True)
          download(place / name if name else place, file)
        os.replace(part, home)
      finally:
        shutil.rmtree(part, ignore_errors=True)
  return local

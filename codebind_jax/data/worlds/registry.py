"""Which worlds there are, and how one is found built or gets built.

A world is a module with `VERSION`, `PROFILES`, `package_ids(profile)`, `eval_sets(profile)` (name -> `EvalSet`) and
`build(profile, root)`, which returns the folder of the built world below the data folder `root`. It raises a ValueError
for an unknown profile or an archive whose content is not what the tables name, and what `fetch.fetch_all` raises.
Optional are `annotate(row, split) -> row`, which changes rows at reading time, `UNIQUE`, the field whose values tell
training rows apart ("label" unless set), and `EXTRA`, a further split to train on. Split `train` is trained on. A
module with a class `World` instead of these functions is drawn in memory and not built.
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

from absl import logging

from codebind_jax.data.worlds import fetch, store

PACKAGED = ("icons", "household", "materials", "menagerie", "evoked")
WORLDS = {name: f"codebind_jax.data.worlds.{name}" for name in PACKAGED}
WORLDS["synthetic"] = "codebind_jax.data.synthetic"


def world_module(world: str) -> Any:
  """The builder of a world; the name of a world that is drawn may list its modalities.

  Raises:
    ValueError: for an unknown world.
  """
  base, *options = world.split("-")
  if base not in WORLDS:
    raise ValueError(f"unknown world {world!r}; allowed: {sorted(WORLDS)}")
  module = importlib.import_module(WORLDS[base])
  if hasattr(module, "World"):
    return module.World.named(world)
  if options:
    raise ValueError(f"unknown world {world!r}; allowed: {sorted(WORLDS)}")
  return module


def ensure(
  world: str = "icons", profile: str = "auto", data_dir: str | Path | None = None, *, again: bool = False
) -> Path:
  """Folder of a built world, which is built first where needed.

  Profile "auto" is `small` where npm and apt-get answer, else `tiny`. A choice of `tiny` is remembered with its reason,
  so that a machine without those clients is not asked every time.

  Args:
    world: a key of `WORLDS`.
    profile: "auto" or a profile of the world.
    data_dir: the data folder, see `fetch.data_dir`.
    again: with "auto", try `small` again although an earlier run settled for `tiny`.

  Returns:
    `<data folder>/worlds/<world>/<profile>/<version>`.

  Raises:
    ValueError: for an unknown world or profile, or an archive that is not as recorded.
    FetchError: if a client fails for a profile that was named.
    OSError: if the data folder cannot be written or has too little space.
  """
  module = world_module(world)
  if profile != "auto" and profile not in module.PROFILES:
    raise ValueError(f"unknown profile {profile!r} of world {world!r}; allowed: {['auto', *module.PROFILES]}")
  root = fetch.data_dir(data_dir)
  if profile != "auto":
    return module.build(profile, root)
  return _ensure_auto(world, module, root, again)


def resolve(world: str, profile: str, data_dir: str | Path | None = None) -> str:
  """The profile that "auto" stands for, built where needed; the smallest of a world that is drawn."""
  module = world_module(world)
  if hasattr(module, "open_split"):
    return module.PROFILES[0] if profile == "auto" else profile
  return ensure(world, profile, data_dir).parent.name


def _ensure_auto(world: str, module: Any, root: Path, again: bool) -> Path:
  small, tiny = (store.world_dir(root, world, profile, module.VERSION) for profile in ("small", "tiny"))
  note = root / "worlds" / world / "auto.json"
  if store.read_manifest(small) is not None:
    logging.info("%s: profile small, built in %s", world, small)
    return small
  if not again and note.is_file() and store.read_manifest(tiny) is not None:
    logging.info("%s: profile tiny, as before: %s", world, json.loads(note.read_text())["reason"])
    return tiny
  absent = [client for client in ("npm", "apt-get") if shutil.which(client) is None]
  reason = f"no {' and no '.join(absent)} on this machine" if absent else ""
  if not reason:
    try:
      logging.info("%s: profile small, as npm and apt-get are there", world)
      return module.build("small", root)
    except fetch.FetchError as error:
      if error.client not in ("npm", "apt-get"):
        raise
      reason = str(error)
  first, *more = reason.splitlines()
  logging.warning("%s: profile tiny, as small cannot be fetched: %s", world, first)
  for line in more:
    logging.warning("  %s", line)
  folder = module.build("tiny", root)
  note.write_text(json.dumps({"profile": "tiny", "reason": first}))
  return folder

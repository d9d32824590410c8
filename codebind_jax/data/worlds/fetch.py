"""Fetches pinned packages through the machine's own clients (pip, npm, apt-get) and checks them by SHA-256.

Archives live in `<data folder>/archives/<sha256>/<file>`; one that is there is never fetched again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import tqdm
from absl import logging

from codebind_jax import files
from codebind_jax.data.worlds import names, pip_files

CLIENT = {"pip": "pip", "pip-sdist": "pip", "npm": "npm", "apt": "apt-get"}
_PYTHON = sys.executable


class FetchError(RuntimeError):
  """A client is missing or failed; `client` is its name, and the message quotes it."""

  def __init__(self, message: str, client: str = ""):
    super().__init__(message)
    self.client = client


class ChecksumError(ValueError):
  """An archive differs in size or hash from the one that the tables name."""


@dataclasses.dataclass(frozen=True)
class Package:
  """One pinned archive: `kind` is the client (npm, apt, pip, pip-sdist), `name` what that client calls the package."""

  id: str
  kind: str
  name: str
  version: str
  file: str
  bytes: int
  sha256: str
  profiles: tuple[str, ...]
  world: str
  licence: str
  attribution: str


@functools.cache
def packages() -> dict[str, Package]:
  """All packages by id, as `tables/packages.json` lists them."""
  fields = [f.name for f in dataclasses.fields(Package)]
  rows = names.table("packages")["packages"]
  return {r["id"]: Package(**{k: tuple(r[k]) if k == "profiles" else r[k] for k in fields}) for r in rows}


def data_dir(path: str | os.PathLike | None = None) -> Path:
  """Folder of archives and built worlds: `path`, else $CODEBIND_DATA, else `codebind_jax` in the cache folder.

  These are local; a far `path` or $CODEBIND_DATA is the place of features alone, see `features_dir`.
  """
  named = files.path(path or os.environ.get("CODEBIND_DATA") or files.cache_folder())
  return files.cache_folder() if files.is_far(named) else named


def features_dir(path: str | os.PathLike | None = None) -> files.Path:
  """Folder of cached features: in `path`, else in $CODEBIND_DATA, else in the cache folder; near or far."""
  return files.path(path or os.environ.get("CODEBIND_DATA") or files.cache_folder()) / "features"


def fetch(package_id: str, *, root: str | os.PathLike | None = None) -> Path:
  """Path of one package's archive, fetched if needed. See `fetch_all`."""
  return fetch_all([package_id], root=root)[package_id]


def fetch_all(package_ids: Iterable[str], *, root: str | os.PathLike | None = None) -> dict[str, Path]:
  """Paths of the packages' archives; those not yet cached are fetched, with the clients side by side.

  A Debian archive with another hash than recorded is kept too (a release updates its packages) and logged: its
  reader must compare the SHA-1 of each inner file.

  Args:
    package_ids: ids of `packages()`.
    root: the data folder, see `data_dir`.

  Raises:
    ValueError: for an unknown id.
    ChecksumError: if an archive differs in size or hash; the archive is removed.
    FetchError: if a client is missing or fails; archives that did arrive are kept.
    OSError: if the data folder cannot be written or has too little space.
  """
  ids = list(dict.fromkeys(package_ids))
  unknown = [i for i in ids if i not in packages()]
  if unknown:
    raise ValueError(f"unknown package {unknown[0]!r}; known: {sorted(packages())}")
  archives = data_dir(root) / "archives"
  paths = {i: path for i in ids if (path := _cached(packages()[i], archives))}
  missing = [packages()[i] for i in ids if i not in paths]
  if missing:
    make_folder(archives, sum(p.bytes for p in missing))
    with files.lock(archives / ".lock", f"is working in {archives}"):
      _fetch_missing([p for p in missing if not _cached(p, archives)], archives)
    paths |= {p.id: _cached(p, archives) for p in missing}
  return {i: paths[i] for i in ids}


def make_folder(path: Path, need_bytes: int = 0) -> None:
  """Makes a folder and checks that it can be written and has `need_bytes` free.

  Raises:
    OSError: naming the folder, what is wrong and how to choose another.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except OSError as error:
    raise OSError(error.errno, f"cannot write to the data folder ({error.strerror}); set CODEBIND_DATA to a folder "
                  "that can be written", str(path)) from error
  free = shutil.disk_usage(path).free
  if free < need_bytes:
    raise OSError(28, f"no space: {need_bytes / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free; make room or set "
                  "CODEBIND_DATA to another disk", str(path))


def sha256_file(path: Path) -> str:
  """SHA-256 of a file, in hex."""
  with open(path, "rb") as handle:
    return hashlib.file_digest(handle, "sha256").hexdigest()


def _cached(package: Package, archives: Path) -> Path | None:
  """The cached archive, verified; None where there is none."""
  folder = archives / package.sha256
  if (folder / package.file).exists():
    _verify(folder / package.file, package.bytes, package.sha256)
    return folder / package.file
  if package.kind == "apt" and (folder / "other.json").exists():
    other = json.loads((folder / "other.json").read_text())
    path = archives / other["sha256"] / other["file"]
    if path.exists():
      _verify(path, other["bytes"], other["sha256"])
      return path
  return None


def _verify(path: Path, size: int, sha256: str) -> None:
  got = path.stat().st_size
  if got != size:
    path.unlink()
    raise ChecksumError(f"{path}: expected {size} bytes, got {got}; file removed, run again to fetch it anew")
  digest = sha256_file(path)
  if digest != sha256:
    path.unlink()
    raise ChecksumError(f"{path}: expected SHA-256 {sha256}, got {digest}; file removed, run again to fetch it anew")


def _fetch_missing(missing: Sequence[Package], archives: Path) -> None:
  """Runs the clients in `archives/incoming` and moves each archive with the right hash to its place."""
  incoming = archives / "incoming"
  groups: dict[str, list[Package]] = {}
  for package in missing:
    groups.setdefault(package.kind, []).append(package)
  stop = threading.Event()
  try:
    # A run that was killed may have left whole archives here: they are kept, anything else is removed.
    todo = {kind: [p for p in group if not _adopt(p, incoming / kind, archives, leftovers=True)]
            for kind, group in groups.items()}
    shutil.rmtree(incoming, ignore_errors=True)
    todo = {kind: group for kind, group in todo.items() if group}
    with ThreadPoolExecutor(max(1, len(todo))) as pool:
      runs = {kind: pool.submit(_run_client, kind, group, incoming / kind, stop) for kind, group in todo.items()}
      try:
        _show_progress(list(runs.values()), incoming, sum(p.bytes for g in todo.values() for p in g))
      except BaseException:
        stop.set()
        raise
    errors: list[BaseException] = []
    wrong: list[ChecksumError] = []
    for kind, group in todo.items():
      failed = runs[kind].exception()
      for package in group:
        try:
          if not _adopt(package, incoming / kind, archives) and not failed:
            failed = FetchError(f"{CLIENT[kind]} finished but left no {package.file}", CLIENT[kind])
        except ChecksumError as error:
          wrong.append(error)
      if failed:
        errors.append(failed)
    if wrong:
      raise ChecksumError("\n".join(str(e) for e in wrong))
    for error in errors:
      if not isinstance(error, FetchError):
        raise error
    if errors:
      raise FetchError("\n".join(str(e) for e in errors), errors[0].client)
  finally:
    shutil.rmtree(incoming, ignore_errors=True)


def _adopt(package: Package, folder: Path, archives: Path, *, leftovers: bool = False) -> bool:
  """Moves a package's archive from a client's folder to the cache. False if it is not there."""
  name = re.escape(package.name)
  pattern = re.compile(rf"{name}_.*\.deb" if package.kind == "apt" else rf"{re.escape(package.file)}(\.other)?")
  for path in sorted(folder.iterdir()) if folder.is_dir() else []:
    if not pattern.fullmatch(path.name):
      continue
    size, digest = path.stat().st_size, sha256_file(path)
    if digest == package.sha256:
      _place(path, archives / digest / package.file)
      return True
    if leftovers:
      return False
    if package.kind == "apt":
      logging.warning("%s: this Debian release has %s, not %s; its files are compared one by one", package.id,
                      path.name, package.file)
      _place(path, archives / digest / path.name)
      note = archives / package.sha256 / "other.json"
      note.parent.mkdir(exist_ok=True)
      files.write_whole(note, json.dumps({"file": path.name, "bytes": size, "sha256": digest}))
      return True
    path.unlink()
    raise ChecksumError(f"{package.file} of {CLIENT[package.kind]} package {package.name}=={package.version}: expected "
                        f"{package.bytes} bytes with SHA-256 {package.sha256}, got {size} bytes with {digest}; "
                        "file removed")
  return False


def _place(path: Path, target: Path) -> None:
  target.parent.mkdir(exist_ok=True)
  path.replace(target)


def _show_progress(runs: list[Future], incoming: Path, total: int) -> None:
  with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="fetching packages", disable=None) as bar:
    while wait(runs, timeout=0.5).not_done:
      bar.update(min(_arrived(incoming), total) - bar.n)
    bar.update(min(_arrived(incoming), total) - bar.n)


def _arrived(incoming: Path) -> int:
  total = 0
  for path in incoming.glob("*/*"):
    with contextlib.suppress(OSError):
      total += path.stat().st_size if path.is_file() else 0
  return total


def _run_client(kind: str, group: list[Package], folder: Path, stop: threading.Event) -> None:
  """Fetches a group of packages with one client, into a folder of its own.

  Raises:
    FetchError: with the client's output.
  """
  client = CLIENT[kind]
  folder.mkdir(parents=True, exist_ok=True)
  if client != "pip" and shutil.which(client) is None:
    raise FetchError(f"no {client} on this machine, needed for {_listed(group)}", client)
  output = ""
  with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{kind}-state-") as state:
    for command in _commands(kind, group, folder, Path(state)):
      process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, text=True, errors="replace",
                                 env=os.environ | {"TMPDIR": state})
      output += _wait(process, stop)
      if process.returncode:
        hint = ""
        if re.search("No module named '?pip", output):
          hint = f"; {_PYTHON} has no pip: run `{_PYTHON} -m ensurepip`"
        raise FetchError(f"{client} could not fetch {_listed(group)}{hint}; it said: {_excerpt(output)}", client)


def _excerpt(output: str) -> str:
  """A client's output: its first line with an error, then all lines, shortened in the middle."""
  lines = output.strip().splitlines() or ["nothing"]
  error = next((line for line in lines if re.match("(npm )?error|E:", line, re.IGNORECASE)), lines[0])
  if len(lines) > 14:
    lines[8:-5] = ["[...]"]
  return "\n".join([error] + (lines if len(lines) > 1 else []))


def _listed(group: list[Package]) -> str:
  return f"{group[0].name}{f' and {len(group) - 1} more' if len(group) > 1 else ''}"


def _wait(process: subprocess.Popen, stop: threading.Event) -> str:
  while True:
    try:
      return process.communicate(timeout=0.5)[0]
    except subprocess.TimeoutExpired:
      if stop.is_set():
        process.terminate()
        return process.communicate()[0]


def _commands(kind: str, group: list[Package], folder: Path, state: Path) -> list[list[str]]:
  """A client's command lines, with caches and lists in `state`, so that neither root nor a home folder is needed."""
  pinned = [f"{p.name}{'@' if kind == 'npm' else '=='}{p.version}" for p in group]
  if kind == "npm":
    return [["npm", "pack", "--loglevel=error", "--ignore-scripts", "--fetch-retries=2", "--fetch-timeout=60000",
             "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=5000", "--cache", str(state), *pinned]]
  if kind == "apt":
    # A Debian release keeps one version of a package, so no version is asked for.
    for part in ("lists/partial", "cache/archives/partial"):
      (state / part).mkdir(parents=True)
    options = [f"Dir::State::lists={state}/lists", f"Dir::Cache={state}/cache", "Debug::NoLocking=1",
               "Acquire::Retries=2", "APT::Sandbox::User=root"]
    base = ["apt-get", "-q", *(part for option in options for part in ("-o", option))]
    return [[*base, "update"], [*base, "download", *(p.name for p in group)]]
  # `pip download` runs setup.py of a source archive, or fetches and runs its build backend; this only brings the files.
  asked = [part for package, name in zip(group, pinned) for part in (name, package.file, f"sha256:{package.sha256}")]
  return [[_PYTHON, "-P", pip_files.__file__, str(folder), *asked]]

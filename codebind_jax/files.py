"""Files near and far: paths, files and folders that are replaced whole, and locks between processes.

Far are objects at `gs://BUCKET/NAME` and `s3://BUCKET/NAME` (extras `gcs` and `s3`): no folders, no appending, no
renaming, no locks, but an upload is seen whole or not at all. All reads and writes of them are here, with a limit to
how long and how often they are tried. Near, paths are `pathlib.Path`. On the lowest floor, since all rooms have files.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import os
import pathlib
import random
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import logging
from etils import epath

try:
  import fcntl
except ImportError:  # not a POSIX system: nothing is locked
  fcntl = None

Path = pathlib.Path | epath.Path

# Scheme -> (module, extra that brings it, what says who asks, what says which server).
SCHEMES = {
  "gs": ("gcsfs", "gcs", "GOOGLE_APPLICATION_CREDENTIALS (the key file of a service account; or `gcloud auth "
         "application-default login`)", "STORAGE_EMULATOR_HOST for another server than Google's"),
  "s3": ("s3fs", "s3", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)",
         "AWS_ENDPOINT_URL for another server than Amazon's"),
}  # fmt: skip
ALLOWED = "a local path, gs://BUCKET/NAME or s3://BUCKET/NAME"
# Environment variables that decide which server is asked, and as whom.
_ENVIRONMENT = re.compile(r"AWS_|GOOGLE_|STORAGE_EMULATOR_HOST|FSSPEC_|GCSFS_|GCE_|HTTPS?_PROXY")
_LARGEST_FETCH = 1000  # objects of one folder


@dataclasses.dataclass(frozen=True)
class Patience:
  """How long and how often a far disk is asked.

  Attributes:
    attempts: of an operation that fails for a reason that may pass: a server's 5xx, a lost connection, no answer.
    wait: seconds before the second attempt, twice as long before each further one, and up to half as much by chance.
    quiet: seconds without a byte after which a connection counts as lost.
    limit: seconds of an operation, and one more for each `pace` bytes that it moves.
    pace: bytes a second.
    sleep: waits that many seconds.
  """

  attempts: int = 4
  wait: float = 1.0
  quiet: float = 30.0
  limit: float = 60.0
  pace: int = 1 << 18
  sleep: Callable[[float], Any] = time.sleep


patience = Patience()


@dataclasses.dataclass(frozen=True)
class Found:
  """An object at a far disk, or a file of a folder: its size in bytes, and what changes with its content."""

  size: int
  tag: str


def path(text: str | os.PathLike) -> Path:
  """The path that a user's text means: near ones expanded (`~`) and absolute, far ones as they are.

  Raises:
    ValueError: for another scheme, an address without a bucket, or a package that is not installed.
  """
  name = os.fspath(text)
  scheme, _, rest = name.partition(":/")
  if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+", scheme) or not rest and not name.endswith(":/"):
    return pathlib.Path(name).expanduser().absolute()
  if scheme not in SCHEMES:
    raise ValueError(f"{name!r}: unknown scheme {scheme + '://'!r}; allowed: {ALLOWED}")
  if not re.match(r"/[^/]", rest):
    raise ValueError(f"{name!r}: has no bucket after {scheme}://; allowed: {ALLOWED}")
  module, extra = SCHEMES[scheme][:2]
  if importlib.util.find_spec(module) is None:
    raise ValueError(f"{name!r}: {module} is not installed: pip install codebind_jax[{extra}]")
  return epath.Path(name)


def is_far(place: str | os.PathLike) -> bool:
  """Whether a path, or its text, is that of an object at a far disk."""
  return os.fspath(place).startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


# Objects at far disks.


def _split(place: Path) -> tuple[str, str, str]:
  """Scheme, bucket and name."""
  scheme, _, rest = os.fspath(place).partition("://")
  bucket, _, name = rest.partition("/")
  return scheme, bucket, name


_systems: dict[Any, Any] = {}
_systems_lock = threading.Lock()


def _system(scheme: str) -> Any:
  """The client of a far disk; another one after the environment has changed, and in a forked process."""
  settings = tuple(sorted((key, value) for key, value in os.environ.items() if _ENVIRONMENT.match(key.upper())))
  key = scheme, os.getpid(), settings, patience.quiet
  system = _systems.get(key)
  if system is None:
    made = (_google if scheme == "gs" else _amazon)()  # outside the lock: it may ask a cloud who this machine is
    with _systems_lock:
      system = _systems.setdefault(key, made)
  return system


def _google() -> Any:
  import aiohttp
  from gcsfs.core import GCSFileSystem  # that of the package also asks by gRPC what kind a bucket is

  # `_ask` tries again; gcsfs would do so six times itself, in half a minute that no limit knows.
  once = lambda name: getattr(getattr(GCSFileSystem, name), "__wrapped__", getattr(GCSFileSystem, name))

  class Storage(GCSFileSystem):
    _get_file_request = once("_get_file_request")

    async def _request(self, *args: Any, data: Any = None, **kwargs: Any) -> Any:
      data = io.BytesIO(data) if isinstance(data, bytes) else data  # as aiohttp wants a large body
      return await once("_request")(self, *args, data=data, **kwargs)

  quiet = aiohttp.ClientTimeout(total=None, sock_connect=patience.quiet, sock_read=patience.quiet)
  emulated = os.environ.get("STORAGE_EMULATOR_HOST") and not os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
  return Storage(
    token="anon" if emulated else None, requests_timeout=quiet, use_listings_cache=False, skip_instance_cache=True,
  )  # fmt: skip


def _amazon() -> Any:
  from s3fs import S3FileSystem

  times = {"connect_timeout": patience.quiet, "read_timeout": patience.quiet, "retries": {"total_max_attempts": 1}}
  system = S3FileSystem(config_kwargs=times, use_listings_cache=False, skip_instance_cache=True)
  system.retries = 1  # those of `_ask` are enough
  return system


def close() -> None:
  """Closes the connections to far disks; the next operation opens them again."""
  with _systems_lock:
    own = [(key[0], system) for key, system in _systems.items() if key[1] == os.getpid()]
    _systems.clear()
  for scheme, system in own:
    from fsspec.asyn import sync

    with contextlib.suppress(TimeoutError):
      if scheme == "gs" and system._session is not None:
        sync(system.loop, system._session.close, timeout=5)
      elif scheme == "s3" and system._s3 is not None:
        sync(system.loop, system._s3.__aexit__, None, None, None, timeout=5)


@functools.cache
def _close_at_exit() -> None:
  """Has connections closed at the end: registered after they were made, before the packages' own ways to do so."""
  atexit.register(close)


_here = threading.local()  # `attempts`, of the threads that probe


def _ask(place: Path, work: str, do: Callable[[Any], Any], size: int = 0) -> Any:
  """Result of a coroutine function of the client, tried again after a failure that may pass.

  Args:
    place: for messages.
    work: what is done with it, for messages: "read".
    do: client -> coroutine.
    size: bytes that it moves.

  Raises:
    FileNotFoundError, PermissionError, TimeoutError, OSError: naming the address, what failed and what to set.
  """
  from fsspec.asyn import sync

  scheme, limit = _split(place)[0], patience.limit + size / patience.pace
  attempts = min(patience.attempts, getattr(_here, "attempts", patience.attempts))
  for attempt in range(1, attempts + 1):
    try:
      system = _system(scheme)
      try:
        return sync(system.loop, do, system, timeout=limit)
      finally:
        _close_at_exit()
    except Exception as error:
      kind, reason, may_pass = _judged(error)
      if not may_pass or attempt == attempts:
        tries = f" ({attempt} attempts)" if attempt > 1 else ""
        raise kind(f"{place}: cannot be {work}: {reason}{tries}; {_advice(scheme, kind)}") from error
      logging.warning("%s: cannot be %s, trying again: %s", place, work, reason)
      patience.sleep(patience.wait * 2 ** (attempt - 1) * (1 + random.random() / 2))


def _advice(scheme: str, kind: type[OSError]) -> str:
  """What to set after an error of a kind."""
  _, _, who, server = SCHEMES[scheme]
  if kind is FileNotFoundError:
    return f"a bucket must be there before a run; set {server}"
  return f"set {who}" if kind is PermissionError else f"set {who}, and {server}"


def _judged(error: Exception) -> tuple[type[OSError], str, bool]:
  """The kind of an error, its reason in one line, and whether it may pass."""
  names = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
  reason = (str(error).strip().splitlines() or [""])[0][:300] or type(error).__name__
  response = getattr(error.__cause__ or error, "response", None)
  code = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, Mapping) else None
  code = code or getattr(error, "code", None)
  status = int(code) if str(code).isdigit() else 0
  if isinstance(error, FileNotFoundError) or status == 404:
    return FileNotFoundError, f"there is no such bucket or object ({reason})", False
  refused = names & {"botocore.NoCredentialsError", "botocore.PartialCredentialsError", "google.GoogleAuthError"}
  if isinstance(error, PermissionError) or status in (401, 403) or reason.startswith("Forbidden") or refused:
    return PermissionError, f"not allowed ({reason})", "google.TransportError" in names
  if isinstance(error, TimeoutError) or "botocore.ReadTimeoutError" in names:
    return TimeoutError, "no answer" + (f" ({reason})" if " " in reason else ""), True
  lost = {"aiohttp.ClientError", "botocore.HTTPClientError", "botocore.ConnectionError", "requests.ConnectionError",
          "requests.Timeout", "botocore.ResponseStreamingError", "gcsfs.ChecksumError"}  # fmt: skip
  may_pass = isinstance(error, ConnectionError) or bool(names & lost) or status in (408, 429) or status >= 500
  return OSError, reason, may_pass


def _pages(place: Path, whole: bool, limit: int = 1000) -> Iterator[tuple[dict[str, Found], list[str]]]:
  """The objects (by name) and, unless `whole`, the folders below a far folder, up to `limit` a page."""
  scheme, bucket, name = _split(place)
  prefix, token = f"{name}/" if name else "", None
  delimiter = "" if whole else "/"
  while True:
    if scheme == "gs":
      more = {"pageToken": token} if token else {}
      more |= {"delimiter": delimiter} if delimiter else {}
      page = _ask(place, "listed", lambda system, more=more: system._call(
        "GET", "b/{}/o", bucket, prefix=prefix, maxResults=limit, json_out=True, **more))
      objects = {item["name"]: Found(int(item["size"]), str(item.get("generation") or item.get("etag")))
                 for item in page.get("items", ())}  # fmt: skip
      folders, token = list(page.get("prefixes", ())), page.get("nextPageToken")
    else:
      more = {"ContinuationToken": token} if token else {}
      page = _ask(place, "listed", lambda system, more=more: system._call_s3(
        "list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter=delimiter, MaxKeys=limit, **more))
      objects = {item["Key"]: Found(item["Size"], item["ETag"]) for item in page.get("Contents", ())}
      folders, token = [item["Prefix"] for item in page.get("CommonPrefixes", ())], page.get("NextContinuationToken")
    yield objects, folders
    if not token:
      return


def found(place: Path) -> Found | None:
  """The object of that name at a far disk, if there is one."""
  try:
    info = _ask(place, "looked for", lambda system: system._info(os.fspath(place)))
  except FileNotFoundError:
    return None
  if info.get("type") == "directory":
    return None
  return Found(int(info["size"]), str(info.get("generation") or info.get("ETag") or info.get("etag")))


# Files, near and far.


def exists(place: Path) -> bool:
  """Whether there is a file or a folder; a far folder is there as long as there is an object in it."""
  return is_file(place) or is_folder(place)


def is_file(place: Path) -> bool:
  """Whether there is a file."""
  return found(place) is not None if is_far(place) else place.is_file()


def is_folder(place: Path) -> bool:
  """Whether there is a folder; a far one is there as long as there is an object in it."""
  return any(any(page) for page in _pages(place, whole=True, limit=1)) if is_far(place) else place.is_dir()


def children(folder: Path, pattern: str = "*") -> list[Path]:
  """Files and folders in a folder, by name; none where there is no folder."""
  if not is_far(folder):
    there = os.listdir(folder) if folder.is_dir() else []
  else:
    full = [name for objects, folders in _pages(folder, whole=False) for name in (*objects, *folders)]
    there = {name.rstrip("/").rpartition("/")[2] for name in full}
  return [folder / name for name in sorted(there) if fnmatch.fnmatchcase(name, pattern)]


def contents(folder: Path) -> dict[str, Found]:
  """All files below a folder, by their path in it."""
  if is_far(folder):
    cut = len(_split(folder)[2]) + 1 if _split(folder)[2] else 0
    found = {name[cut:]: item for objects, _ in _pages(folder, whole=True) for name, item in objects.items()}
    return {name: item for name, item in sorted(found.items()) if name and not name.endswith("/")}
  below = sorted(one for one in folder.rglob("*") if one.is_file())
  stats = {one.relative_to(folder).as_posix(): one.stat() for one in below}
  return {name: Found(stat.st_size, str(stat.st_mtime_ns)) for name, stat in stats.items()}


def read_bytes(place: Path, start: int | None = None, stop: int | None = None) -> bytes:
  """A file's bytes from `start` up to `stop`, all of them unless given.

  Raises:
    FileNotFoundError: if there is none.
    OSError: if it cannot be read.
  """
  if is_far(place):
    if start is not None and start == stop:
      return b""
    size = (stop or 0) - (start or 0) if stop else 0
    do = lambda system: system._cat_file(os.fspath(place), start=start, end=stop)
    return bytes(_ask(place, "read", do, max(size, 0) or 1 << 26))
  with open(place, "rb") as file:
    file.seek(start or 0)
    return file.read() if stop is None else file.read(stop - (start or 0))


def open_far(place: Path) -> Any:
  """A far object as a file object that reads it by ranges of a megabyte and more, for readers that seek."""
  about = found(place)
  if about is None:
    raise FileNotFoundError(f"{place}: there is no such object")
  return io.BufferedReader(_Ranges(place, about.size), 1 << 20)


class _Ranges(io.RawIOBase):
  """A far object's bytes."""

  def __init__(self, place: Path, size: int):
    super().__init__()
    self._place, self._size, self._at = place, size, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._at

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
    return self._at

  def readinto(self, buffer: Any) -> int:
    stop = min(self._at + len(buffer), self._size)
    data = read_bytes(self._place, self._at, stop) if stop > self._at else b""
    buffer[: len(data)] = data
    self._at += len(data)
    return len(data)


def read_text(place: Path) -> str:
  """A file's text, UTF-8."""
  return read_bytes(place).decode()


def check_space(folder: Path, need: int, what: str) -> None:
  """Checks that a near disk has room for what will be written; nobody says it of far ones.

  Args:
    folder: on the disk, or a folder that is made there later.
    need: bytes.
    what: will be written, and which key chooses where, for the error.

  Raises:
    OSError: naming the folder, the bytes needed and those free.
  """
  if is_far(folder):
    return
  there = pathlib.Path(folder)
  while not there.exists() and there != there.parent:
    there = there.parent
  free = shutil.disk_usage(there).free
  if need > free:
    raise OSError(28, f"no space: {what} need {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free", str(folder))


def make_folder(folder: Path) -> None:
  """Makes a folder and those above it; a far one is there once an object is."""
  if not is_far(folder):
    folder.mkdir(parents=True, exist_ok=True)


def upload(file: pathlib.Path, place: Path) -> None:
  """Puts a local file at a far place, whole or not at all: after an error what was there before is there still."""
  do = lambda system: system._put_file(os.fspath(file), os.fspath(place))
  _ask(place, "written", do, file.stat().st_size)


def download(place: Path, file: pathlib.Path) -> None:
  """Puts a far object at a local path, whole or not at all."""
  about = found(place)
  with replacing(file) as part:
    _ask(place, "read", lambda system: system._get_file(os.fspath(place), os.fspath(part)), about.size if about else 0)
    if about and part.stat().st_size != about.size:
      raise OSError(f"{place}: got {part.stat().st_size} of {about.size} bytes")


def remove(place: Path) -> None:
  """Removes a file that is or is not there."""
  if not is_far(place):
    place.unlink(missing_ok=True)
    return
  with contextlib.suppress(FileNotFoundError):
    _ask(place, "removed", lambda system: system._rm_file(os.fspath(place)))


def remove_folder(folder: Path, first: str = "") -> None:
  """Removes a folder that is or is not there; far, the object `first`, whose lack says so, before the others."""
  if not is_far(folder):
    shutil.rmtree(folder, ignore_errors=True)
    return
  for name in sorted(contents(folder), key=lambda name: (name != first, name)):
    remove(folder / name)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[pathlib.Path]:
  """Yields the path of a temporary file that takes the place of `path` at the end, or is removed after an error.

  The temporary file is local, beside a local path. A reader, or a kill at any time, sees the old file or the new one.
  Several processes may write one path at once.
  """
  if is_far(path):
    with tempfile.TemporaryDirectory(prefix="codebind_jax-") as scratch:
      temporary = pathlib.Path(scratch) / path.name
      yield temporary
      upload(temporary, path)
    return
  temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
  try:
    yield temporary
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)
  finally:
    temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
  """Writes a UTF-8 text file as `replacing` does."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def replace_folder(new: pathlib.Path, folder: Path, last: str = "") -> None:
  """Puts a local folder in the place of another one, or of none.

  Near, a kill between leaves the old one as `.NAME.HEX.old`. Far, all is uploaded beside the old folder first, so that
  an error leaves that as it was; then copied there by the far disk itself. A kill in that moment leaves a folder
  without `last`, so that it is not taken for whole.

  Args:
    new: moved near, removed by the caller far.
    folder: where it goes.
    last: far, the file in it whose lack says that a folder is not whole: removed first, copied last.
  """
  if is_far(folder):
    _replace_far(new, folder, last)
    return
  old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
  if folder.exists():
    os.replace(folder, old)
  os.replace(new, folder)
  _flush(folder.parent)
  shutil.rmtree(old, ignore_errors=True)


def _replace_far(new: pathlib.Path, folder: Path, last: str) -> None:
  part, old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.part"), contents(folder)
  names = sorted(contents(new), key=lambda name: (name == last, name))
  try:
    for name in names:
      upload(new / name, part / name)
    if last in old:
      remove(folder / last)
    for name in names:
      _copy(part / name, folder / name, (new / name).stat().st_size)
    for name in set(old) - set(names):
      remove(folder / name)
  finally:
    for name in names:
      with contextlib.suppress(OSError):  # what failed is named; these remain under a name of their own
        remove(part / name)


def _copy(source: Path, target: Path, size: int) -> None:
  """Copies an object within a far disk."""
  _ask(target, "written", lambda system: system._cp_file(os.fspath(source), os.fspath(target)), size)


def _flush(path: pathlib.Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


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
  if not is_far(place):
    return place
  about = found(place)
  items = {"": about} if about else contents(place)
  if not items:
    raise FileNotFoundError(f"{place}: there is no such file or folder")
  if len(items) > _LARGEST_FETCH:
    raise ValueError(f"{place}: has {len(items)} objects; allowed: a folder of at most {_LARGEST_FETCH}")
  recipe = [os.fspath(place), sorted((name, item.size, item.tag) for name, item in items.items())]
  home = cache_folder() / "far" / hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:24]
  home.parent.mkdir(parents=True, exist_ok=True)
  local = home / place.name
  with lock(home.with_name(f".{home.name}.lock"), f"copies {place}"):
    if not home.is_dir():
      logging.info("%s: copying %d objects, %.1f MB, to %s", place, len(items),
                   sum(item.size for item in items.values()) / 1e6, local)  # fmt: skip
      part = home.with_name(f".{home.name}.{uuid.uuid4().hex[:8]}.part")
      try:
        for name in items:
          file = part / place.name / name
          file.parent.mkdir(parents=True, exist_ok=True)
          download(place / name if name else place, file)
        os.replace(part, home)
      finally:
        shutil.rmtree(part, ignore_errors=True)
  return local


def probe(place: Path, seconds: float = 10.0, write: bool = False) -> None:
  """Asks a far disk whether a run can use it, before anything is built; near paths are not asked.

  Args:
    place: folder or file of the run.
    seconds: after which a server counts as one that does not answer.
    write: also writes an object `.probe-HEX` in this folder, reads it and removes it.

  Raises:
    ValueError: in one line: the address, what failed (no such bucket, no credentials or wrong ones, no answer) and
      what to set.
  """
  if not is_far(place):
    return
  importlib.import_module(SCHEMES[_split(place)[0]][0])  # seconds on a busy machine, which are not the server's
  failure: list[Exception] = []

  def look() -> None:
    _here.attempts = 2  # so that the reason is there in time
    try:
      next(_pages(place, whole=True, limit=1))
      if write:
        mark, text = place / f".probe-{uuid.uuid4().hex[:8]}", uuid.uuid4().hex
        write_whole(mark, text)
        read = read_text(mark)
        remove(mark)
        if read != text:
          raise OSError(f"{place}: what was written is not what is read")
    except Exception as error:
      failure.append(error)

  thread = threading.Thread(target=look, daemon=True, name="probe")  # left behind where nothing answers
  thread.start()
  thread.join(seconds)
  advice = _advice(_split(place)[0], TimeoutError)
  if thread.is_alive():
    raise ValueError(f"{place}: no answer in {seconds:g} s; {advice}")
  if isinstance(failure[0] if failure else None, OSError):
    raise ValueError(str(failure[0])) from failure[0]
  if failure:
    raise ValueError(f"{place}: cannot be used: {_judged(failure[0])[1]}; {advice}") from failure[0]


@contextlib.contextmanager
def lock(path: Path, work: str) -> Iterator[None]:
  """Holds a lock file that only one process has at a time; the system frees that of a process that was killed.

  Far disks have no locks, and nothing is held there: of a run, process 0 alone replaces shared objects, and what others
  write (their shards, their parts of a checkpoint) has names of its own.

  Args:
    path: the lock file, made where it is not there.
    work: what another process may be doing, for the line in the log before a wait: "fetches into DIR".
  """
  if is_far(path):
    yield
    return
  with open(path, "w") as handle:
    if fcntl:
      try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError:
        logging.info("waiting for another process that %s", work)
        fcntl.flock(handle, fcntl.LOCK_EX)
    yield

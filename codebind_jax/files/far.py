"""Objects at `gs://BUCKET/NAME` and `s3://BUCKET/NAME` (extras `gcs` and `s3`): clients, attempts, what an error means.

Far disks have no folders, no appending, no renaming and no locks, but an upload is seen whole or not at all. Every
request is made here, with a limit to how long and how often it is tried.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import logging
from etils import epath

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


def is_far(place: str | os.PathLike) -> bool:
  """Whether a path, or its text, is that of an object at a far disk."""
  return os.fspath(place).startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def split(place: Path) -> tuple[str, str, str]:
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

  # `ask` tries again; gcsfs would do so six times itself, in half a minute that no limit knows.
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
  system.retries = 1  # those of `ask` are enough
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
here = threading.local()  # `attempts`, of the threads that probe


def ask(place: Path, work: str, do: Callable[[Any], Any], size: int = 0) -> Any:
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

  scheme, limit = split(place)[0], patience.limit + size / patience.pace
  attempts = min(patience.attempts, getattr(here, "attempts", patience.attempts))
  for attempt in range(1, attempts + 1):
    try:
      system = _system(scheme)
      try:
        return sync(system.loop, do, system, timeout=limit)
      finally:
        _close_at_exit()
    except Exception as error:
      kind, reason, may_pass = judged(error)
      if not may_pass or attempt == attempts:
        tries = f" ({attempt} attempts)" if attempt > 1 else ""
        raise kind(f"{place}: cannot be {work}: {reason}{tries}; {advice(scheme, kind)}") from error
      logging.warning("%s: cannot be %s, trying again: %s", place, work, reason)
      patience.sleep(patience.wait * 2 ** (attempt - 1) * (1 + random.random() / 2))


def advice(scheme: str, kind: type[OSError]) -> str:
  """What to set after an error of a kind."""
  _, _, who, server = SCHEMES[scheme]
  if kind is FileNotFoundError:
    return f"a bucket must be there before a run; set {server}"
  return f"set {who}" if kind is PermissionError else f"set {who}, and {server}"


def judged(error: Exception) -> tuple[type[OSError], str, bool]:
  """The kind of an error, its reason in one line, and whether it may pass."""
  names = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
  reason = (str(error).strip().splitlines() or [""])[0][:300] or type(error).__name__
  status = _status(error)
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


def _status(error: BaseException) -> int:
  """The HTTP status that an error of a client is about; 0 if of none."""
  response = getattr(error.__cause__ or error, "response", None)
  code = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, Mapping) else None
  code = code or getattr(error, "code", None)
  return int(code) if str(code).isdigit() else 0


def pages(place: Path, whole: bool, limit: int = 1000) -> Iterator[tuple[dict[str, Found], list[str]]]:
  """The objects (by name) and, unless `whole`, the folders below a far folder, up to `limit` a page."""
  scheme, bucket, name = split(place)
  prefix, token = f"{name}/" if name else "", None
  delimiter = "" if whole else "/"
  while True:
    if scheme == "gs":
      more = {"pageToken": token} if token else {}
      more |= {"delimiter": delimiter} if delimiter else {}
      page = ask(place, "listed", lambda system, more=more: system._call(
        "GET", "b/{}/o", bucket, prefix=prefix, maxResults=limit, json_out=True, **more))
      objects = {item["name"]: Found(int(item["size"]), str(item.get("generation") or item.get("etag")))
                 for item in page.get("items", ())}  # fmt: skip
      folders, token = list(page.get("prefixes", ())), page.get("nextPageToken")
    else:
      more = {"ContinuationToken": token} if token else {}
      page = ask(place, "listed", lambda system, more=more: system._call_s3(
        "list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter=delimiter, MaxKeys=limit, **more))
      objects = {item["Key"]: Found(item["Size"], item["ETag"]) for item in page.get("Contents", ())}
      folders, token = [item["Prefix"] for item in page.get("CommonPrefixes", ())], page.get("NextContinuationToken")
    yield objects, folders
    if not token:
      return


def found(place: Path) -> Found | None:
  """The object of that name at a far disk, if there is one."""
  try:
    info = ask(place, "looked for", lambda system: system._info(os.fspath(place)))
  except FileNotFoundError:
    return None
  if info.get("type") == "directory":
    return None
  return Found(int(info["size"]), str(info.get("generation") or info.get("ETag") or info.get("etag")))


def read(place: Path, start: int | None = None, stop: int | None = None) -> bytes:
  """An object's bytes from `start` up to `stop`, all of them unless given."""
  if start is not None and start == stop:
    return b""
  size = (stop or 0) - (start or 0) if stop else 0
  do = lambda system: system._cat_file(os.fspath(place), start=start, end=stop)
  return bytes(ask(place, "read", do, max(size, 0) or 1 << 26))


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
    data = read(self._place, self._at, stop) if stop > self._at else b""
    buffer[: len(data)] = data
    self._at += len(data)
    return len(data)


def copy(source: Path, target: Path, size: int) -> None:
  """Copies an object within a far disk."""
  ask(target, "written", lambda system: system._cp_file(os.fspath(source), os.fspath(target)), size)


def put_if(place: Path, data: bytes, tag: str | None) -> bool:
  """Writes an object if the one that is there has that tag, or for None if there is none; whether it did.

  Servers that know no conditions write it anyway.

  Args:
    place: of the object.
    data: its bytes.
    tag: as `found` gives it.
  """
  scheme, bucket, name = split(place)
  if scheme == "gs":
    condition = {"ifGenerationMatch": "0" if tag is None else tag}
    head = "--==0==\nContent-Type: application/json; charset=UTF-8\n\n" + json.dumps({"name": name})
    body = f"{head}\n--==0==\nContent-Type: application/octet-stream\n\n".encode() + data + b"\n--==0==--"
    do = lambda system: system._call(
      "POST", f"{system._location}/upload/storage/v1/b/{urllib.parse.quote(bucket)}/o", uploadType="multipart",
      headers={"Content-Type": 'multipart/related; boundary="==0=="'}, data=body, json_out=True, **condition)
  else:
    condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
    do = lambda system: system._call_s3("put_object", Bucket=bucket, Key=name, Body=data, **condition)
  try:
    ask(place, "written", do, len(data))
    return True
  except FileNotFoundError:
    if tag is None:  # no such bucket
      raise
    return False
  except OSError as error:
    code = _status(error.__cause__) if error.__cause__ else 0
    if code in (409, 412):  # S3 answers two at once with the first
      return False
    if code != 501:
      raise
    do = lambda system: system._pipe_file(os.fspath(place), data)
    ask(place, "written", do, len(data))
    return True

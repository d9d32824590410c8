"""Writes the records of a source as ArrayRecord shards of raw media, planned from what is known before any is written.

A shard is a function of the plan and its number: shards are written by any number of processes or machines, in any
order, and again after a kill. Each is read back and compared with the input before it gets its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Int64, UInt64

from codebind_jax.data.ahead import WorkerKilled, ahead
from codebind_jax.data.formats.array_record import Shard, close, decode, encode, encode_index
from codebind_jax.data.index import IndexBuilder, twice
from codebind_jax.data.opening import CHECKED, SOME, check_item
from codebind_jax.data.records import Source
from codebind_jax.files import lock, read_sealed, replacing, write_sealed

PLAN, SUMMARY = "plan.json", "shards.json"
_OPTIONS = "group_size:1,uncompressed"  # media are compressed already; a group is what one read reads
_VERSION = 1  # of the plan and of what a record's bytes are: another one gives other shards
_SURVEY = 4096  # records that a process looks at for one answer
_OVERHEAD = 256  # bytes of a shard beside its content, a record; measured 64 to 90
_ROOM = 1 << 17  # bytes of a shard's head and end
_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclasses.dataclass(frozen=True)
class Part:
  """A planned shard.

  Attributes:
    first: its first record, of those that are not left out.
    records: how many it has.
    bytes: of their fields and media.
    digest: hex SHA-256 of fields and sizes of its records.
  """

  first: int
  records: int
  bytes: int
  digest: str


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is to be written.

  Attributes:
    name: how the shards' names begin.
    split: of the input that is taken; "" takes all.
    size: bytes of a shard that were asked for.
    left_out: numbers of records of the input that are bad.
    parts: the shards.
    version: of the code that the bytes depend on.
  """

  name: str
  split: str
  size: int
  left_out: tuple[int, ...]
  parts: tuple[Part, ...]
  version: int = _VERSION

  @functools.cached_property
  def digest(self) -> str:
    """Hex SHA-256 of the plan."""
    return hashlib.sha256(self.text().encode()).hexdigest()

  @property
  def records(self) -> int:
    """Those of all shards."""
    return sum(part.records for part in self.parts)

  @property
  def bytes(self) -> int:
    """Fields and media of all shards."""
    return sum(part.bytes for part in self.parts)

  def text(self) -> str:
    """The plan as JSON."""
    return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

  def path(self, folder: Path, number: int) -> Path:
    """Where a shard is, once finished."""
    return folder / f"{self.name}-{number:05d}-of-{len(self.parts):05d}.array_record"


def read_plan(folder: Path) -> Plan:
  """The plan of a folder.

  Raises:
    ValueError: if it is damaged.
    FileNotFoundError: if there is none.
  """
  path = folder / PLAN
  try:
    content = read_sealed(path)
    parts = tuple(Part(**part) for part in content.pop("parts"))
    return Plan(**content | {"left_out": tuple(content["left_out"]), "parts": parts})
  except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
    raise ValueError(f"{path}: not a readable plan of shards ({error})") from error


def parse_size(text: str) -> int:
  """Bytes of a size such as 1GB, 500MB, 64MiB or 1000000.

  Raises:
    ValueError: if it is none, or zero.
  """
  match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
  unit = match and next((factor for name, factor in _UNITS.items() if name.lower() == match[2].lower()), None)
  size = int(float(match[1]) * unit) if unit else 0
  if size < 1:
    raise ValueError(f"size: got {text!r}; allowed: a number above 0, alone or with one of {[*_UNITS][1:]}")
  return size


def shown(size: int) -> str:
  """A number of bytes to read."""
  unit = next((name for name in ("TB", "GB", "MB", "kB") if size >= _UNITS[name]), "B")
  return f"{size:,} bytes" if unit == "B" else f"{size / _UNITS[unit]:.1f} {unit}"


def make_plan(
  source: Source, size: int, *, name: str = "", split: str = "", max_bad_records: int = 0, check: str = "auto",
  workers: int = 1,
) -> Plan:  # fmt: skip
  """Plans shards of about equal size, each of records that follow one another.

  Every file is looked up for its size; items that are no files are read for theirs.

  Args:
    source: the records, as `open_source` gives them.
    size: bytes of fields and media of a shard, about.
    name: how the shards' names begin; the source's and the split's unless given.
    split: that the source is opened with, which is written into records that name none.
    max_bad_records: bad records that are left out, each named in the log, before it is an error.
    check: as of `open_source`; bad records that are found by it are left out.
    workers: processes.

  Raises:
    ValueError: naming the first bad record if there are more, both records of one id, or a modality whose files cannot
      be read from their bytes.
  """
  _refuse_twice(source)
  bad = _checked(source, check)
  tasks = [(first, min(first + _SURVEY, len(source))) for first in range(0, len(source), _SURVEY)]
  sizes, hashes = np.zeros(len(source), np.int64), np.zeros(len(source), np.uint64)
  for (first, last), found in _each(functools.partial(_survey, source, split), tasks, workers, "planning"):
    sizes[first:last], hashes[first:last], more = found
    bad = more | bad
    _refuse_bad(bad, max_bad_records)
  _refuse_bad(bad, max_bad_records)
  for row in sorted(bad):
    logging.warning("left out %s", bad[row])
  kept = np.setdiff1d(np.arange(len(source)), list(bad))
  if not len(kept):
    raise ValueError(f"{source.name}: no records that are not bad")
  sizes, hashes = sizes[kept], hashes[kept]
  bounds = balanced(sizes, size)
  parts = tuple(
    Part(int(a), int(b - a), int(sizes[a:b].sum()), _digest(hashes[a:b])) for a, b in zip(bounds[:-1], bounds[1:])
  )
  name = name or re.sub(r"[^\w.-]+", "-", source.name) + (f"-{split}" if split else "")
  return Plan(name, split, size, tuple(sorted(bad)), parts)


def balanced(sizes: Int64[np.ndarray, "n"], size: int) -> Int64[np.ndarray, "m"]:
  """Bounds of runs of about equal sums, none empty and each about `size` at most.

  >>> balanced(np.array([4, 4, 4, 4, 4]), 10).tolist()
  [0, 3, 5]
  """
  ends = np.cumsum(sizes)
  total = int(ends[-1])
  count = min(-(-total // size), len(sizes))
  targets = np.array([2 * total * k // count for k in range(1, count)], np.int64)
  inner = np.searchsorted(2 * ends - sizes, targets, "right")  # a record belongs where its middle is
  return np.unique(np.concatenate([[0], inner, [len(sizes)]])).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Job:
  """Shards to be written.

  Attributes:
    source: the records without those that the plan leaves out.
    plan: of the shards.
    folder: of the shards.
  """

  source: Source
  plan: Plan
  folder: Path

  @classmethod
  def of(cls, source: Source, plan: Plan, folder: Path) -> Job:
    """The job of a plan that was made of a source."""
    if plan.left_out:
      source = source.select(np.setdiff1d(np.arange(len(source)), plan.left_out))
    if len(source) != plan.records:
      raise ValueError(f"{source.name}: has {len(source)} records, the plan of {folder} is of {plan.records}")
    return cls(source, plan, folder)

  def begin(self) -> None:
    """Makes the folder, removes half-written files of a run before, and writes the plan.

    Raises:
      ValueError: naming what has changed since, if the folder has the shards of another plan.
      OSError: if there is too little room on the disk.
    """
    self.folder.mkdir(parents=True, exist_ok=True)
    there = self.folder / PLAN
    if there.exists():
      if changed := _changed(read_plan(self.folder), self.plan):
        raise ValueError(f"{self.folder} has shards of another plan: {'; '.join(changed)}; use another folder, or "
                         "remove what is in it")  # fmt: skip
    ours = {self.plan.path(self.folder, number): part for number, part in enumerate(self.plan.parts)}
    others = sorted(path for path in self.folder.glob("*.array_record") if path not in ours or not there.exists())
    if others:
      raise ValueError(f"{others[0]} is there, but is none of the shards of this plan; use another folder")
    for name in (f"{self.plan.name}-*.array_record", PLAN, SUMMARY):
      for path in self.folder.glob(f"{name}.*.part"):
        path.unlink()
    missing = [part for path, part in ours.items() if not path.exists()]
    needed = sum(part.bytes + _OVERHEAD * part.records + _ROOM for part in missing)
    free = shutil.disk_usage(self.folder).free
    if needed > free:
      raise OSError(f"{self.folder}: {shown(needed)} are needed, {shown(free)} are free")
    write_sealed(there, dataclasses.asdict(self.plan))

  def write(self, number: int) -> dict[str, Any]:
    """Writes a shard, or compares one that is finished with the input; one that is damaged is written again.

    Returns:
      `file`, `records`, `bytes` and `sha256` of the file, and whether it was `kept`.

    Raises:
      ValueError: naming the record that has changed since the plan was made or the shard written.
      OSError: if an item cannot be read, or the shard not be written.
    """
    try:
      return self._finished(self.plan.path(self.folder, number), number)
    finally:
      close()

  def _finished(self, path: Path, number: int) -> dict[str, Any]:
    if path.exists():
      try:
        shard = Shard(path)
        damaged = [content for _, content in shard if isinstance(content, ValueError)]
        if damaged:
          raise damaged[0]
        known = shard.index()
      except ValueError as error:
        logging.warning("%s; it is written again", error)
      else:
        if known is None or known[1] != self.plan.digest:
          raise ValueError(f"{path}: belongs to another plan; use another folder, or remove it")
        self._compare(shard, number, self._inputs(number), "is not what was written of it: the input has changed since")
        return self._report(path, number, kept=True)
    with replacing(path) as temporary:
      digests = self._written(temporary, number)
      self._compare(Shard(temporary), number, digests, f"was not written as it is to {path}")
    return self._report(path, number, kept=False)

  def _rows(self, number: int) -> range:
    part = self.plan.parts[number]
    return range(part.first, part.first + part.records)

  def _inputs(self, number: int) -> Iterator[list[tuple[str, str]]]:
    """`_digests` of the input's records of a shard."""
    modalities = _media(self.source)
    return (_digests(*_record(self.source, self.plan.split, modalities, row)) for row in self._rows(number))

  def _written(self, path: Path, number: int) -> list[list[tuple[str, str]]]:
    """Writes a shard; the digests of what was read for it."""
    rows, modalities, digests, hashes = self._rows(number), _media(self.source), [], []
    builder = IndexBuilder()
    writer = ArrayRecordWriter(str(path), _OPTIONS)
    try:
      for row in rows:
        fields, items = _record(self.source, self.plan.split, modalities, row)
        digests.append(_digests(fields, items))
        hashes.append(_hash(fields, {m: len(content) for m, content in items.items()}))
        content = encode(fields, items)
        record = decode(content)
        own = record.fields
        builder.add(own["id"], record.modalities, own["label"], own.get("split"))
        writer.write(content)
        if not writer.ok():  # it says what is wrong when it is closed
          break
      else:
        if _digest(np.array(hashes, np.uint64)) != self.plan.parts[number].digest:
          raise ValueError(f"{self.source.where(rows[0])} to {self.source.where(rows[-1])}: fields or sizes of records "
                           "have changed since the plan was made")  # fmt: skip
        writer.write(encode_index(builder.build(), self.plan.digest))
    finally:
      _close(writer, path)
    return digests

  def _compare(self, shard: Shard, number: int, digests: Sequence | Iterator, fault: str) -> None:
    """Compares a shard with the input.

    Raises:
      ValueError: naming the first record and item that differs.
    """
    rows = self._rows(number)
    if len(shard) != len(rows) + 1:
      raise ValueError(f"{shard.path}: has {len(shard) - 1} records; the plan has {len(rows)}")
    for row, expected, (_, content) in zip(rows, digests, shard):
      if isinstance(content, ValueError):
        raise content
      record = decode(content)
      own, there = dict(expected), dict(_digests(record.fields, record.items))
      if differ := [name for name in own | there if own.get(name) != there.get(name)]:
        raise ValueError(f"{self.source.where(row)} (id {record.fields['id']!r}): its {differ[0]} {fault}")

  def _report(self, path: Path, number: int, kept: bool) -> dict[str, Any]:
    with open(path, "rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
    about = {"file": path.name, "records": self.plan.parts[number].records, "bytes": path.stat().st_size}
    return about | {"sha256": digest, "kept": kept}


def write_summary(plan: Plan, folder: Path, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Writes the summary of all shards, when all are finished.

  Raises:
    ValueError: if the reports are not of all shards.
  """
  reports = sorted(reports, key=lambda report: report["file"])
  files = sorted(plan.path(folder, number).name for number in range(len(plan.parts)))
  if [report["file"] for report in reports] != files:
    raise ValueError(f"{folder}: {len(reports)} of {len(files)} shards are finished; run the same command again")
  shards = [{key: value for key, value in report.items() if key != "kept"} for report in reports]
  summary = {
    "plan": plan.digest, "records": plan.records, "bytes": plan.bytes, "left_out": len(plan.left_out), "shards": shards
  }  # fmt: skip
  write_sealed(folder / SUMMARY, summary)
  return summary


def write_all(job: Job, workers: int = 1) -> tuple[dict[str, Any], int]:
  """Writes all shards and the summary.

  Args:
    job: the shards.
    workers: processes.

  Returns:
    The summary, and how many shards were there already.

  Raises:
    ValueError, OSError: as of `Job`.
    RuntimeError: if a worker process was killed.
  """
  job.folder.mkdir(parents=True, exist_ok=True)
  with lock(job.folder / ".lock", f"writes shards into {job.folder}"):
    job.begin()
    reports = [report for _, report in _each(job.write, range(len(job.plan.parts)), workers, "writing")]
    return write_summary(job.plan, job.folder, reports), sum(report["kept"] for report in reports)


def _each(work: Callable[[Any], Any], tasks: Sequence[Any], workers: int, title: str) -> Iterator[tuple[Any, Any]]:
  """Each task and its answer, in order; by this process if one is enough."""
  workers = 0 if workers == 1 or len(tasks) == 1 else min(workers, len(tasks))
  answers = ahead(_Answers(work, tasks), workers=workers, threads=1, stop=len(tasks))
  try:
    with contextlib.closing(answers):
      yield from zip(tasks, tqdm.tqdm(answers, total=len(tasks), desc=title, unit="part", disable=None))
  except WorkerKilled as error:
    raise WorkerKilled(f"{error}; what is finished is kept: run the same command again") from error


@dataclasses.dataclass(frozen=True)
class _Answers:
  """Number of a task -> what the work gives for it."""

  work: Callable[[Any], Any]
  tasks: Sequence[Any]

  def __getitem__(self, number: int) -> Any:
    return self.work(self.tasks[number])


def _media(source: Source) -> list[tuple[str, int]]:
  """Modalities of a source but text, each with its bit."""
  return [(m, source.index.bit(m)) for m in source.modalities if m != "text"]


def _fields_of(source: Source, split: str, row: int) -> dict[str, Any]:
  fields = source.fields(row)
  return fields if fields.get("split") or not split else fields | {"split": split}


def _record(source: Source, split: str, media: Sequence[tuple[str, int]], row: int) -> tuple[dict, dict[str, bytes]]:
  """Fields and media of a record.

  Raises:
    ValueError: naming the record, if an item cannot be read.
  """
  bits = int(source.index.has[row])
  try:
    return _fields_of(source, split, row), {m: content_of(source.read(row, m)) for m, bit in media if bits & bit}
  except (OSError, ValueError) as error:
    raise type(error)(f"{source.where(row)}: {error}") from error


def content_of(item: str | bytes | Path | np.ndarray) -> bytes:
  """The bytes of an item as a file has them: an array is those of a .npy file."""
  if isinstance(item, bytes):
    return item
  if isinstance(item, np.ndarray):
    buffer = io.BytesIO()
    np.save(buffer, item, allow_pickle=False)
    return buffer.getvalue()
  return Path(item).read_bytes()


def _size_of(item: str | bytes | Path | np.ndarray) -> int:
  """Bytes of an item; ValueError if it is no file, or empty."""
  if not isinstance(item, str | Path):
    return len(content_of(item))
  try:
    about = os.stat(item)
  except OSError as error:
    raise ValueError(f"{item}: {error.strerror}") from error
  if not stat.S_ISREG(about.st_mode) or not about.st_size:
    kind = "an empty file" if stat.S_ISREG(about.st_mode) else "a folder" if stat.S_ISDIR(about.st_mode) else "no file"
    raise ValueError(f"{item}: {kind}; a file is needed")
  return about.st_size


def _hash(fields: dict[str, Any], sizes: dict[str, int]) -> int:
  """8 bytes of the hash of a record's fields and the sizes of its items."""
  content = encode(fields, {}) + json.dumps(sizes).encode()
  return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _digest(hashes: UInt64[np.ndarray, "n"]) -> str:
  return hashlib.sha256(hashes.astype("<u8").tobytes()).hexdigest()


def _digests(fields: dict[str, Any], items: dict[str, Any]) -> list[tuple[str, str]]:
  """Names and hex SHA-256 of what a record has: its fields and each item."""
  contents = {"fields": encode(fields, {})} | {m: items[m] for m in sorted(items)}
  return [(name, hashlib.sha256(content).hexdigest()) for name, content in contents.items()]


def _survey(source: Source, split: str, task: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
  """Sizes and hashes of some records, and what is wrong with bad ones."""
  media, rows = _media(source), range(*task)
  sizes, hashes, bad = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.uint64), {}
  for at, row in enumerate(rows):
    bits, m = int(source.index.has[row]), "fields"
    try:
      fields, lengths = _fields_of(source, split, row), {}
      for m in (m for m, bit in media if bits & bit):
        lengths[m] = _size_of(source.read(row, m))
      m = "fields"
      sizes[at], hashes[at] = len(encode(fields, {})) + sum(lengths.values()), _hash(fields, lengths)
    except ValueError as error:
      bad[row] = f"{source.where(row)}: {m}: {error}"
  return sizes, hashes, bad


def _checked(source: Source, check: str) -> dict[int, str]:
  """What is wrong with bad records, as far as `check` looks.

  Raises:
    ValueError: if a kind of file is read by its path alone, so that its bytes in a shard would be of no use.
  """
  if check == "auto":
    check = "all" if len(source) <= CHECKED else "some"
  rows = {"all": range(len(source)), "some": np.linspace(0, len(source) - 1, SOME).astype(int), "none": ()}[check]
  media, bad, kinds = _media(source), {}, set()
  for row in tqdm.tqdm(rows, desc=f"checking {source.name}", unit="record", disable=None):
    for m in (m for m, bit in media if int(source.index.has[row]) & bit):
      try:
        item = source.read(int(row), m)
        check_item(m, item)
      except ValueError as error:
        bad[int(row)] = f"{source.where(int(row))}: {error}"
        break
      kind = (m, Path(item).suffix.lower() if isinstance(item, str | Path) else "")
      if kind not in kinds and kind[1] and not os.path.isdir(item):
        kinds.add(kind)
        try:
          check_item(m, content_of(item))
        except ValueError as error:
          raise ValueError(f"{source.where(int(row))}: {m}: {item}: {kind[1]} files are read from their path, not from "
                           f"bytes; shards cannot hold them ({error})") from error  # fmt: skip
  return bad


def _refuse_bad(bad: dict[int, str], allowed: int) -> None:
  if len(bad) > allowed:
    raise ValueError(bad[min(bad)] + (f" ({len(bad)} bad records, {allowed} allowed)" if allowed else ""))


def _refuse_twice(source: Source) -> None:
  if pair := twice(source.index):
    a, b = pair
    name = source.fields(b)["id"]
    if source.fields(a)["id"] == name:  # else only the hashes are equal
      raise ValueError(f"id {name!r} is there twice: {source.where(a)} and {source.where(b)}")


def _changed(old: Plan, new: Plan) -> list[str]:
  """What differs between two plans, in words."""
  found = [f"{key} was {getattr(old, key)!r}, is {getattr(new, key)!r}" for key in ("version", "name", "split", "size")
           if getattr(old, key) != getattr(new, key)]  # fmt: skip
  for key, there in (("records", "records"), ("bytes", "bytes of fields and media")):
    if getattr(old, key) != getattr(new, key):
      found.append(f"the input had {getattr(old, key):,} {there}, has {getattr(new, key):,}")
  if old.left_out != new.left_out:
    found.append(f"{len(old.left_out)} bad records were left out, now {len(new.left_out)}")
  same = [(a.first, a.records) for a in old.parts] == [(b.first, b.records) for b in new.parts]
  for number, (a, b) in enumerate(zip(old.parts, new.parts)):
    if same and a.digest != b.digest:
      found.append(f"fields or sizes of records {a.first} to {a.first + a.records - 1} (shard {number}) have changed")
      break
  return found or ([] if old == new else ["bounds of the shards have changed"])


def _close(writer: ArrayRecordWriter, path: Path) -> None:
  """Closes a writer, which raises what went wrong before."""
  try:
    writer.close()
  except RuntimeError as error:
    raise OSError(f"{path}: cannot be written ({error})") from error

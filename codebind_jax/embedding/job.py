"""Mode `embed`: embeddings and codes of a manifest of any size, as Parquet shards with ids.

A shard is a run of `config.embed.shard_rows` records of the manifest. It is a pure function of the plan, its number and
the model, so that processes, restarts and other runners (`tools.embed_beam`) may divide the shards as they like. Memory
holds one shard at a time: an id that occurs twice is an error within a shard, and across shards only when an index is
made of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import tqdm
from absl import logging

from codebind_jax import config as config_lib
from codebind_jax import files
from codebind_jax.api import Embeddings, Model, load
from codebind_jax.config import Embed
from codebind_jax.data.manifest import parse_record
from codebind_jax.data.task import Data
from codebind_jax.embedding import shards
from codebind_jax.embedding.shards import ShardReport
from codebind_jax.runtime import distributed
from codebind_jax.schema import check_keys

PARTS = (*shards.PARTS, "codes")
_FORMAT = "embed-1"


@dataclasses.dataclass(frozen=True)
class Plan:
  """A whole job, small and picklable; every process makes an equal one.

  Attributes:
    manifest: the file to embed.
    folder: where the shards go.
    digest: of the run, the manifest's bytes and what decides a shard's content.
    starts: per shard, the offset in bytes and the number of its first line.
    records: number of records in the manifest.
    shard_rows: number of records of every shard but the last.
    widths: modality -> field of `Embeddings` to write -> width.
    dtype: of the vectors.
    batch_size: records decoded and embedded at once.
    threads: number of threads that decode.
    max_bad_records: bad records that the whole job may leave out.
  """

  manifest: pathlib.Path
  folder: files.Path
  digest: str
  starts: tuple[tuple[int, int], ...]
  records: int
  shard_rows: int
  widths: dict[str, dict[str, int]]
  dtype: str
  batch_size: int
  threads: int
  max_bad_records: int

  def path(self, number: int) -> files.Path:
    """Where a shard is, once finished."""
    return shards.shard_path(self.folder, number, len(self.starts))

  def rows(self, number: int) -> int:
    """Number of records that a shard covers."""
    return min(self.shard_rows, self.records - number * self.shard_rows)

  def finished(self) -> dict[int, ShardReport]:
    """Reports of the finished shards, see `shards.finished_shards`."""
    return shards.finished_shards(self.folder, self.digest, len(self.starts))

  def missing(self) -> list[int]:
    """Numbers of the shards that are not finished."""
    return sorted(set(range(len(self.starts))) - set(self.finished()))

  @property
  def schema(self) -> pa.Schema:
    """Columns of a shard."""
    columns = [shards.column_name(m, part) for m, parts in self.widths.items() for part in parts]
    return shards.make_schema(columns, self.dtype)


def make_plan(settings: Embed, data: Data, workdir: str | files.Path, model: Model) -> Plan:
  """The job of the two sections; reads the manifest once, without keeping it.

  Raises:
    ValueError: for a modality or part that is not there, or a manifest without records.
    OSError: if the manifest cannot be read.
  """
  modalities = settings.modalities or model.modalities
  check_keys(modalities, model.modalities, "embed.modalities")
  wanted = [part for name in PARTS if name in settings.parts for part in (shards.CODES if name == "codes" else (name,))]
  widths = {m: {part: w for part, w in model.widths(m).items() if w and part in wanted} for m in modalities}
  manifest = pathlib.Path(data.manifest).expanduser().absolute()
  starts, records, content = _scan(manifest, settings.shard_rows)
  if not records:
    raise ValueError(f"{manifest}: no records")
  recipe = [_FORMAT, model.fingerprint(modalities), content, settings.shard_rows, settings.dtype, widths]
  return Plan(
    manifest, files.path(workdir), hashlib.sha256(json.dumps(recipe).encode()).hexdigest(),
    starts, records, settings.shard_rows, widths, settings.dtype, settings.batch_size, settings.threads,
    data.max_bad_records,
  )  # fmt: skip


def _scan(manifest: pathlib.Path, shard_rows: int) -> tuple[tuple[tuple[int, int], ...], int, str]:
  """Where each shard begins, how many records there are, and the hash of the manifest's bytes."""
  starts, records, offset, digest = [], 0, 0, hashlib.sha256()
  with open(manifest, "rb") as file:
    for number, line in enumerate(file, 1):
      digest.update(line)
      if line.strip():
        if records % shard_rows == 0:
          starts.append((offset, number))
        records += 1
      offset += len(line)
  return tuple(starts), records, digest.hexdigest()


def _lines(plan: Plan, number: int) -> Iterator[tuple[int, bytes]]:
  """Line number and text of a shard's records."""
  offset, first = plan.starts[number]
  with open(plan.manifest, "rb") as file:
    file.seek(offset)
    lines = ((line_number, line) for line_number, line in enumerate(file, first) if line.strip())
    yield from itertools.islice(lines, plan.rows(number))


def embed_shard(
  plan: Plan, number: int, model: Model, *, allowed: int | None = None, advance: Callable[[int], Any] = lambda n: None
) -> ShardReport:
  """Computes and writes one shard.

  Args:
    plan: of the job.
    number: of the shard.
    model: the run's.
    allowed: bad records left out before it is an error; None for the whole job's number.
    advance: called after each batch with its number of records.

  Raises:
    ValueError: naming file and line of the first bad record, if there are more than `allowed`; nothing is written.
  """
  allowed = plan.max_bad_records if allowed is None else allowed
  for m in plan.widths:
    model.trunk(m)  # loaded here, before threads ask for it
  read = lambda line: _read(plan, model, *line)
  bad, ignored, seen, batches, lines = [], Counter(), {}, [], _lines(plan, number)
  with ThreadPoolExecutor(plan.threads) as pool:
    submit = lambda: [pool.submit(read, line) for line in itertools.islice(lines, plan.batch_size)]
    waiting = submit()
    while waiting:
      current, waiting = [future.result() for future in waiting], submit()
      good = []
      for record in current:
        first = seen.setdefault(record.row["id"], record.line) if not record.error else record.line
        if first != record.line:
          record.error = f"id {record.row['id']!r} is there twice, first in line {first}"
        if not record.error:
          good.append(record)
          ignored.update(record.ignored)
      batches += _batch(plan, model, good)
      bad += [f"{plan.manifest}:{record.line}: {record.error}" for record in current if record.error]
      if len(bad) > allowed:
        for future in waiting:
          future.cancel()
        more = f" ({len(bad)} bad records in shard {number}, {allowed} allowed)" if plan.max_bad_records else ""
        raise ValueError(bad[0] + more)
      advance(len(current))
  for message in bad:
    logging.warning("left out %s", message)
  report = ShardReport(plan.digest, len(plan.starts), sum(b.num_rows for b in batches), tuple(bad), dict(ignored))
  shards.write_shard(plan.path(number), plan.schema, batches, report)
  return report


@dataclasses.dataclass
class _Record:
  """A line of the manifest: its row and prepared modalities, or what is wrong with it."""

  line: int
  row: dict[str, Any] = dataclasses.field(default_factory=dict)
  prepared: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  ignored: Sequence[str] = ()
  error: str = ""


def _read(plan: Plan, model: Model, number: int, line: bytes) -> _Record:
  try:
    row, paths = parse_record(line, plan.manifest, number)
    items = paths | ({"text": row["text"][0]} if "text" in row else {})
    ignored = [m for m in items if m not in plan.widths]
    if len(ignored) == len(items):
      raise ValueError(f"it has {ignored} alone; allowed: {list(plan.widths)}")
    prepared = {}
    for m in plan.widths:
      if m in items:
        try:
          prepared[m] = model.prepare(m, items[m])
        except ValueError as error:
          raise ValueError(f"{m}: {error}") from error
    return _Record(number, row, prepared, ignored)
  except ValueError as error:
    return _Record(number, error=str(error))


def _batch(plan: Plan, model: Model, records: Sequence[_Record]) -> list[pa.RecordBatch]:
  """Rows of some records as one batch or none; a record whose embedding is not finite gets an error instead."""
  by_modality: dict[str, tuple[list[_Record], Embeddings]] = {}
  for m in plan.widths:
    have = [record for record in records if m in record.prepared]
    if have:
      by_modality[m] = have, model.embed_prepared(m, [record.prepared[m] for record in have])
      for record, finite in zip(have, np.isfinite(by_modality[m][1].full).all(axis=1)):
        if not finite:
          record.error = f"{m}: its embedding is not finite"
  records = [record for record in records if not record.error]
  if not records:
    return []
  row_of = {record.line: row for row, record in enumerate(records)}
  columns = [pa.array([record.row.get(name) for record in records], pa.string()) for name in shards.FIELDS]
  for m, parts in plan.widths.items():
    have, embedded = by_modality.get(m, ((), None))
    good = [i for i, record in enumerate(have) if not record.error]
    at = [row_of[have[i].line] for i in good]
    for part, width in parts.items():
      values = getattr(embedded, part)[good] if embedded is not None else np.zeros((0, width))
      columns.append(shards.with_nulls(values, at, len(records), np.int32 if part in shards.CODES else plan.dtype))
  return [pa.RecordBatch.from_arrays(columns, schema=plan.schema)]


def embed_shards(plan: Plan, model: Model, *, process: int = 0, processes: int = 1) -> None:
  """Computes the unfinished shards of one process, whose shards are every `processes`-th.

  Raises:
    ValueError: for a shard of another job in the folder, or more bad records than allowed.
  """
  files.make_folder(plan.folder)
  done = plan.finished()
  own = range(process, len(plan.starts), processes)
  missing = [number for number in own if number not in done]
  bad = sum(len(done[number].bad) for number in own if number in done)
  logging.info("%d of %d shards of %d records are this process's, %d of them finished", len(own), len(plan.starts),
               plan.records, len(own) - len(missing))  # fmt: skip
  total, left = (sum(map(plan.rows, numbers)) for numbers in (own, missing))
  with tqdm.tqdm(total=total, initial=total - left, desc="embed", unit="record", disable=None) as bar:
    for number in missing:
      report = embed_shard(plan, number, model, allowed=max(plan.max_bad_records - bad, 0), advance=bar.update)
      bad += len(report.bad)


def summarise(plan: Plan, run: str) -> dict[str, Any]:
  """Writes and returns `summary.json` of a finished job.

  Args:
    plan: of the job.
    run: the folder of the model's run, for the summary.

  Raises:
    ValueError: if shards are missing, or there are more bad records than allowed.
  """
  done = plan.finished()
  missing = plan.missing()
  if missing:
    raise ValueError(f"{plan.folder}: {len(missing)} of {len(plan.starts)} shards are missing, first {missing[:8]}; "
                     "run the same command again")  # fmt: skip
  reports = [done[number] for number in range(len(plan.starts))]
  bad = [message for report in reports for message in report.bad]
  if len(bad) > plan.max_bad_records:
    raise ValueError(f"{bad[0]} ({len(bad)} bad records in all shards, {plan.max_bad_records} allowed)")
  ignored = sum((Counter(report.ignored) for report in reports), Counter())
  summary = {
    "run": run, "manifest": str(plan.manifest), "digest": plan.digest, "rows": sum(report.rows for report in reports),
    "bad_records": bad, "ignored_modalities": dict(ignored), "dtype": plan.dtype, "columns": plan.widths,
    "shards": [{"file": plan.path(number).name, "rows": report.rows} for number, report in enumerate(reports)],
  }  # fmt: skip
  files.write_whole(plan.folder / shards.SUMMARY, json.dumps(summary, indent=1) + "\n")
  for left in files.children(plan.folder, "*.part"):  # of processes that were killed
    files.remove(left)
  if ignored:
    logging.warning("modalities that were not embedded, and how many records have them: %s", dict(ignored))
  logging.info("%s: %d rows, %d bad records left out", plan.folder, summary["rows"], len(bad))
  return summary


def embed(config: Any, workdir: str | files.Path) -> dict[str, Any]:
  """Mode `embed`: this process's shards of the job, and on process 0 the summary once all are done.

  Args:
    config: `configs/embed.py`.
    workdir: where the shards go; one disk for all processes.

  Returns:
    The summary; {} on processes other than 0.

  Raises:
    ValueError: naming what is wrong with the run, the manifest or the folder.
  """
  config = config_lib.validate(config)
  files.probe(files.path(workdir), write=True)
  model = load(config.init_from)
  plan = make_plan(config.embed, config.data, workdir, model)
  embed_shards(plan, model.on(jax.local_devices()), process=jax.process_index(), processes=jax.process_count())
  distributed.wait_for_all("embed")
  return summarise(plan, config.init_from) if jax.process_index() == 0 else {}

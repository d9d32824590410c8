"""Mode `embed`: embeddings and codes of records of any number, as Parquet shards with ids.

A shard is a run of `config.embed.shard_rows` records of the source. It is a pure function of the plan, its number and
the model, so that processes, restarts and other runners (`tools.embed_beam`) may divide the shards as they like. Memory
holds the source's index and one shard at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import tqdm
from absl import logging

from codebind_jax import files
from codebind_jax.api import Embeddings, Model, load
from codebind_jax.config import Embed, validation
from codebind_jax.data.examples import Items, Texts, Values
from codebind_jax.data.opening import open_source
from codebind_jax.data.records import Source
from codebind_jax.data.task import Data
from codebind_jax.embedding import packing, shards
from codebind_jax.embedding.shards import ShardReport
from codebind_jax.runtime import agreement, distributed
from codebind_jax.schema import check_keys

PARTS = (*shards.PARTS, "codes")
_FORMAT = "embed-4"


@dataclasses.dataclass(frozen=True)
class Plan:
  """A whole job, picklable; every process makes an equal one.

  Attributes:
    source: what to embed; of files far larger than memory it holds the index.
    folder: where the shards go.
    digest: of the run, the source and what decides a shard's content.
    shard_rows: number of records of every shard but the last.
    widths: modality -> field of `Embeddings` to write -> width.
    dtype: of the vectors.
    batch_size: records decoded and embedded at once.
    workers: processes that read and decode; 0 for threads.
    threads: number of threads that read and decode.
    max_bad_records: bad records that the whole job may leave out.
    files: names of the source's files, for the summary.
    captions: also writes all texts of a record, and the vector of each (`shards.CAPTIONS`).
    codes: column of codes -> how many there are to choose from at each position, by which they are packed.
  """

  source: Source
  folder: files.Path
  digest: str
  shard_rows: int
  widths: dict[str, dict[str, int]]
  dtype: str
  batch_size: int
  workers: int
  threads: int
  max_bad_records: int
  files: str
  captions: bool = False
  codes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

  @property
  def shards(self) -> int:
    """Number of shards."""
    return -(-len(self.source) // self.shard_rows)

  def path(self, number: int) -> files.Path:
    """Where a shard is, once finished."""
    return shards.shard_path(self.folder, number, self.shards)

  def rows(self, number: int) -> int:
    """Number of records that a shard covers."""
    return min(self.shard_rows, len(self.source) - number * self.shard_rows)

  def finished(self) -> dict[int, ShardReport]:
    """Reports of the finished shards, see `shards.finished_shards`."""
    return shards.finished_shards(self.folder, self.digest, self.shards)

  def missing(self) -> list[int]:
    """Numbers of the shards that are not finished."""
    return sorted(set(range(self.shards)) - set(self.finished()))

  @property
  def schema(self) -> pa.Schema:
    """Columns of a shard."""
    columns = [shards.column_name(m, part) for m, parts in self.widths.items() for part in parts]
    return shards.make_schema(columns, self.dtype, self.captions, self.codes)


def make_plan(settings: Embed, data: Data, workdir: str | files.Path, model: Model) -> Plan:
  """The job of the two sections; indexes the source, and keeps no record.

  Raises:
    ValueError: for a modality or part that is not there, or a source without records.
    OSError: if the source cannot be read.
  """
  modalities = settings.modalities or model.modalities
  check_keys(modalities, model.modalities, "embed.modalities")
  wanted = [part for name in PARTS if name in settings.parts for part in (shards.CODES if name == "codes" else (name,))]
  widths = {m: {part: w for part, w in model.widths(m).items() if w and part in wanted} for m in modalities}
  names = [name for names in data.sources.values() for name in names]
  source = open_source(
    names, data_dir=data.root or None, max_bad_records=data.max_bad_records, check="none", **data.options
  )  # fmt: skip
  captions = "shared" in widths.get("text", ()) and data.captions != "main"
  recipe = [_FORMAT, model.fingerprint(modalities), source.fingerprint(), settings.shard_rows, settings.dtype, widths,
            captions]  # fmt: skip
  return Plan(
    source, files.path(workdir), hashlib.sha256(json.dumps(recipe).encode()).hexdigest(),
    settings.shard_rows, widths, settings.dtype, settings.batch_size, data.workers, settings.threads,
    data.max_bad_records, ", ".join(names), captions, _codes(model, widths),
  )  # fmt: skip


def _codes(model: Model, widths: Mapping[str, Mapping[str, int]]) -> dict[str, tuple[int, ...]]:
  """Column of codes -> how many there are to choose from at each position."""
  sizes = {}
  for m, parts in widths.items():
    for part in (part for part in parts if part in shards.CODES):
      codes = getattr(model.codebooks.get("shared" if part == shards.CODES[0] else m), "codes", None)
      size = packing.UNKNOWN if codes is None else codes.shape[-2]
      sizes[shards.column_name(m, part)] = (size,) * parts[part]
  return sizes


def embed_shard(
  plan: Plan, number: int, model: Model, *, allowed: int | None = None, advance: Callable[[int], Any] = lambda n: None
) -> ShardReport:
  """Computes and writes one shard.

  Args:
    plan: of the job.
    number: of the shard.
    model: the run's.
    allowed: bad records left out before it is an error; None for the whole job's number.
    advance: called at the end with the number of records.

  Raises:
    ValueError: naming the first bad record, if there are more than `allowed`; nothing is written.
  """
  allowed = plan.max_bad_records if allowed is None else allowed
  first = number * plan.shard_rows
  rows, bad, ignored = np.arange(first, first + plan.rows(number)), {}, Counter()
  batches = _batch(plan, model, rows, bad, ignored)
  if len(bad) > allowed:
    more = f" ({len(bad)} bad records in shard {number}, {allowed} allowed)" if plan.max_bad_records else ""
    raise ValueError(bad[min(bad)] + more)
  advance(len(rows))
  for row in sorted(bad):
    logging.warning("left out %s", bad[row])
  messages = tuple(bad[row] for row in sorted(bad))
  report = ShardReport(plan.digest, plan.shards, sum(b.num_rows for b in batches), messages, dict(ignored), plan.codes)
  shards.write_shard(plan.path(number), plan.schema, batches, report)
  return report


def _batch(
  plan: Plan, model: Model, rows: np.ndarray, bad: dict[int, str], ignored: Counter[str]
) -> list[pa.RecordBatch]:
  """Some records as one batch or none; adds to the bad records and to the modalities that are not embedded."""
  source, by_modality = plan.source, {}
  for row in rows:
    if not any(source.has(int(row), m) for m in plan.widths):
      have = [m for m in source.modalities if source.has(int(row), m)]
      bad[int(row)] = f"{source.where(int(row))}: it has {have} alone; allowed: {list(plan.widths)}"
  for m in plan.widths:
    have = np.array([row for row in rows if source.has(int(row), m)])
    if not len(have):
      continue
    item = model.trunk(m).input
    feed = Texts(source, item) if m == "text" else Items(source, m, item)
    found = model.embed_rows(m, feed, have, workers=plan.workers, threads=plan.threads, batch=plan.batch_size)
    for row, message in found.bad:
      bad[row] = f"{source.where(row)}: {m}: {message}"
    good = have[found.good]
    finite = np.isfinite(found.embeddings.full).all(axis=1)
    bad |= {int(row): f"{source.where(int(row))}: {m}: its embedding is not finite" for row in good[~finite]}
    by_modality[m] = good, found.embeddings
  vectors = _caption_vectors(plan, model, bad, *by_modality["text"]) if "text" in by_modality else {}
  rows = [int(row) for row in rows if int(row) not in bad]
  if not rows:
    return []
  ignored.update(m for m in source.modalities if m not in plan.widths for row in rows if source.has(row, m))
  fields, place = [source.fields(row) for row in rows], {row: n for n, row in enumerate(rows)}
  columns = [pa.array([record.get(name) for record in fields], pa.string()) for name in shards.FIELDS]
  for m, parts in plan.widths.items():
    have, embedded = by_modality.get(m, (np.zeros(0, np.int64), None))
    keep = [n for n, row in enumerate(have) if int(row) in place]
    at = [place[int(have[n])] for n in keep]
    for part, width in parts.items():
      values = getattr(embedded, part)[keep] if embedded is not None else np.zeros((0, width))
      name = shards.column_name(m, part)
      columns.append(shards.packed(values, at, len(rows), plan.codes[name]) if name in plan.codes else
                     shards.with_nulls(values, at, len(rows), plan.dtype))  # fmt: skip
  if plan.captions:
    texts = [record["text"] if source.has(row, "text") else None for row, record in zip(rows, fields)]
    columns += shards.nested(texts, vectors, plan.dtype)
  return [pa.RecordBatch.from_arrays(columns, schema=plan.schema)]


def _caption_vectors(
  plan: Plan, model: Model, bad: dict[int, str], embedded: np.ndarray, main: Embeddings
) -> dict[str, np.ndarray]:
  """Text -> its vector, of all texts of the rows that are good; adds to the bad records.

  Args:
    plan, model: of the job.
    bad: message of each row that is left out.
    embedded, main: the rows whose main texts are embedded, and their embeddings.
  """
  if not plan.captions:
    return {}
  texts = {int(row): plan.source.fields(int(row))["text"] for row in embedded if int(row) not in bad}
  vectors = {texts[row][0]: vector for row, vector in zip(embedded.tolist(), main.shared) if row in texts}
  strings = list(dict.fromkeys(text for own in texts.values() for text in own if text not in vectors))
  if not strings:
    return vectors
  feed = Values(strings, "text", model.trunk("text").input)
  found = model.embed_rows("text", feed, np.arange(len(strings)), workers=plan.workers, threads=plan.threads,
                           batch=plan.batch_size)  # fmt: skip
  told = dict(found.bad)
  finite = np.isfinite(found.embeddings.shared).all(axis=1)
  good = np.flatnonzero(found.good)
  vectors |= {strings[n]: vector for n, vector, well in zip(good, found.embeddings.shared, finite) if well}
  for row, own in texts.items():
    if lost := [text for text in own if text not in vectors]:
      why = told.get(strings.index(lost[0]), f"text: the embedding of {lost[0]!r} is not finite")
      bad[row] = f"{plan.source.where(row)}: {why}"
  return vectors


def embed_shards(plan: Plan, model: Model, *, process: int = 0, processes: int = 1) -> None:
  """Computes the unfinished shards of one process, whose shards are every `processes`-th.

  Its finished shards are read and verified; of far ones the metadata alone, since all would be fetched anew at every
  start: their columns are verified when they are used.

  Raises:
    ValueError: for a shard of another job or a damaged one in the folder, or more bad records than allowed.
  """
  files.make_folder(plan.folder)
  done = plan.finished()
  own = range(process, plan.shards, processes)
  missing = [number for number in own if number not in done]
  for number in sorted(set(own) & set(done)) if not files.is_far(plan.folder) else ():
    shards.verify_shard(plan.path(number))
  bad = len(plan.source.left_out) + sum(len(done[number].bad) for number in own if number in done)
  logging.info("%d of %d shards of %d records are this process's, %d of them finished", len(own), plan.shards,
               len(plan.source), len(own) - len(missing))  # fmt: skip
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
    raise ValueError(f"{plan.folder}: {len(missing)} of {plan.shards} shards are missing, first {missing[:8]}; "
                     "run the same command again")  # fmt: skip
  reports = [done[number] for number in range(plan.shards)]
  bad = [*plan.source.left_out, *(message for report in reports for message in report.bad)]
  if len(bad) > plan.max_bad_records:
    raise ValueError(f"{bad[0]} ({len(bad)} bad records in all, {plan.max_bad_records} allowed)")
  ignored = sum((Counter(report.ignored) for report in reports), Counter())
  summary = {
    "run": run, "files": plan.files, "digest": plan.digest, "rows": sum(report.rows for report in reports),
    "bad_records": bad, "ignored_modalities": dict(ignored), "dtype": plan.dtype, "columns": plan.widths,
    "shards": [{"file": plan.path(number).name, "rows": report.rows, "checksum": report.checksum}
               for number, report in enumerate(reports)],
  }  # fmt: skip
  summary = files.sealed(summary)
  files.write_sealed(plan.folder / shards.SUMMARY, summary)
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
  config = validation.validate(config)
  validation.check_folder(config, workdir)
  files.probe(files.path(workdir), write=True)
  model = load(config.init_from)
  plan = make_plan(config.embed, config.data, workdir, model)
  agreement.check("embed", {"digest of model and data": plan.digest})
  agreement.check_sources({plan.source.name: plan.source})
  embed_shards(plan, model.on(jax.local_devices()), process=jax.process_index(), processes=jax.process_count())
  distributed.wait_for_all("embed")
  return summarise(plan, config.init_from) if jax.process_index() == 0 else {}

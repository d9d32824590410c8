"""The Parquet files of mode `embed`: names, columns and metadata, without JAX or a model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Num

from codebind_jax import files
from codebind_jax.data.reading import arrow_errors

FIELDS = ("id", "label", "split")
PARTS = ("shared", "specific", "full")
CODES = ("codes_shared", "codes_specific")
CAPTIONS = ("text_captions", "text_captions_shared")  # all texts of a record, and the vector of each
SUMMARY = "summary.json"
_PATTERN = "shard-*.parquet"
_KEY = b"codebind_jax"


@dataclasses.dataclass(frozen=True)
class ShardReport:
  """The report on a finished shard, kept in its file's metadata.

  Attributes:
    digest: of the job it belongs to.
    shards: how many that job has.
    rows: records in it.
    bad: a message for each record that was left out.
    ignored: modality that was not asked for -> how many records had it.
  """

  digest: str
  shards: int
  rows: int
  bad: Sequence[str] = ()
  ignored: Mapping[str, int] = dataclasses.field(default_factory=dict)


def shard_path(folder: files.Path, number: int, count: int) -> files.Path:
  """Where shard `number` of `count` is, once finished."""
  return folder / f"shard-{number:06d}-of-{count:06d}.parquet"


def shard_files(folder: files.Path) -> list[files.Path]:
  """All finished shards in a folder, in order."""
  return files.children(folder, _PATTERN)


def column_name(modality: str, part: str) -> str:
  """Such as `image_shared`, `text_codes_shared`."""
  return f"{modality}_{part}"


def make_schema(columns: Sequence[str], dtype: str, captions: bool = False) -> pa.Schema:
  """Columns of a shard: id, label and split (null where not given), then vectors and codes as lists.

  All lists of a column have one length, but not Arrow's fixed-size type: before version 26 Arrow could not read such a
  column back if a row was null.

  Args:
    columns: names; those that end in one of `CODES` hold int32, others floats.
    dtype: of the floats, float16 or float32.
    captions: adds the columns `CAPTIONS`.
  """
  kind = lambda name: pa.int32() if name.endswith(CODES) else pa.from_numpy_dtype(np.dtype(dtype))
  fields = [pa.field("id", pa.string(), nullable=False), pa.field("label", pa.string()), pa.field("split", pa.string())]
  fields += [pa.field(name, pa.list_(kind(name))) for name in columns]
  texts, vectors = CAPTIONS
  vector = pa.list_(kind(vectors))
  return pa.schema(fields + ([pa.field(texts, pa.list_(pa.string())), pa.field(vectors, pa.list_(vector))] * captions))


def with_nulls(values: Num[np.ndarray, "n w"], at: Sequence[int], rows: int, dtype: Any) -> pa.ListArray:
  """A column of `rows` rows with `values` in the rows `at`, which ascend, and null in the others."""
  length, missing = np.zeros(rows, np.int32), np.ones(rows, bool)
  length[at], missing[at] = values.shape[1], False
  offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
  return pa.ListArray.from_arrays(offsets, values.astype(dtype).reshape(-1), mask=pa.array(missing))


def nested(
  texts: Sequence[Sequence[str] | None], vectors: Mapping[str, Num[np.ndarray, "w"]], dtype: Any
) -> tuple[pa.ListArray, pa.ListArray]:
  """The columns `CAPTIONS`: each row's texts, and the vector of each; null where a row has None."""
  width = len(next(iter(vectors.values()))) if vectors else 0
  every = [vectors[text] for own in texts if own is not None for text in own]
  flat = np.stack(every).astype(dtype).reshape(-1) if every else np.zeros(0, dtype)
  inner = pa.ListArray.from_arrays(np.arange(len(every) + 1, dtype=np.int32) * width, flat)
  ends = np.cumsum([0, *(len(own or ()) for own in texts)]).astype(np.int32)
  missing = pa.array([own is None for own in texts])
  return pa.array(texts, pa.list_(pa.string())), pa.ListArray.from_arrays(ends, inner, mask=missing)


def write_shard(path: files.Path, schema: pa.Schema, batches: Sequence[pa.RecordBatch], report: ShardReport) -> None:
  """Writes a shard whole, with its report in the metadata."""
  metadata = {_KEY: json.dumps(dataclasses.asdict(report)).encode()}
  table = pa.Table.from_batches(batches, schema).replace_schema_metadata(metadata)
  write_table(table, path)


def write_table(table: pa.Table, path: files.Path, row_group: int | None = None) -> None:
  """Writes a Parquet file whole, see `files.replacing`."""
  with files.replacing(path) as temporary:
    pq.write_table(table, temporary, compression="zstd", row_group_size=row_group)


def read_report(path: files.Path) -> ShardReport:
  """The report in a shard's metadata.

  Raises:
    ValueError: if the file is not a shard of mode `embed`, or damaged.
  """
  try:
    return ShardReport(**json.loads(_read_schema(path).metadata[_KEY]))
  except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} is not a shard written by mode 'embed', or it is damaged ({error}); remove it") from error


def finished_shards(folder: files.Path, digest: str, count: int) -> dict[int, ShardReport]:
  """Reports of the shards of a job that are finished, by number.

  Raises:
    ValueError: naming a file of another job: another run, manifest or setting.
  """
  names = {shard_path(folder, number, count): number for number in range(count)}
  reports = {}
  for path in shard_files(folder):
    report = read_report(path)
    if report.digest != digest or path not in names:
      raise ValueError(f"{path} belongs to another job (digest {report.digest[:12]}, {report.shards} shards; this one "
                       f"is {digest[:12]}, {count} shards): the run, the manifest or a setting has changed since; use "
                       "another workdir, or remove the old shards")  # fmt: skip
    reports[names[path]] = report
  return reports


def read_column(folder: files.Path, column: str) -> Iterator[tuple[list[str], Num[np.ndarray, "n w"]]]:
  """Ids and vectors of a column of a finished job, batch by batch; rows without the modality are left out.

  Raises:
    ValueError: if shards are missing or belong to several jobs, one lacks the column, or is damaged.
  """
  paths = shard_files(folder)
  if not paths:
    raise ValueError(f"{folder}: no shards ({_PATTERN}) in it; write some with mode 'embed'")
  reports = [read_report(path) for path in paths]
  first = reports[0]
  finished_shards(folder, first.digest, first.shards)
  if len(paths) < first.shards:
    raise ValueError(f"{folder}: {len(paths)} of {first.shards} shards are finished; run the same command again")
  names = _read_schema(paths[0]).names
  if column not in names:
    raise ValueError(f"{folder}: no column {column!r}; allowed: {[n for n in names if n.endswith(PARTS)]}")
  for path in paths:
    with arrow_errors(f"{path}: not a readable shard"), _opened(path) as file:
      for batch in pq.ParquetFile(file).iter_batches(columns=["id", column]):
        valid = batch.filter(batch.column(column).is_valid())
        if valid.num_rows:
          yield valid.column("id").to_pylist(), vectors_of(valid.column(column))


@contextlib.contextmanager
def _opened(path: files.Path) -> Iterator[Any]:
  """What pyarrow reads: a local path, or a far object by ranges."""
  if not files.is_far(path):
    yield path
    return
  with files.open_far(path) as file:
    yield file


def _read_schema(path: files.Path) -> pa.Schema:
  with _opened(path) as file:
    return pq.read_schema(file)


def vectors_of(column: pa.ListArray | pa.FixedSizeListArray) -> Num[np.ndarray, "n w"]:
  """The lists of a column as rows; there must be at least one, no null, and one length."""
  return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


"""The Parquet files of mode `embed`: names, columns and metadata, without JAX or a model."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Num, UInt8

from codebind_jax import files
from codebind_jax.embedding import packing, tables

FIELDS = ("id", "label", "split")
PARTS = ("shared", "specific", "full", "query")
CODES = ("codes_shared", "codes_specific")
CAPTIONS = ("text_captions", "text_captions_shared")  # all texts of a record, and the vector of each
SUMMARY = "summary.json"
_PATTERN = "shard-*.parquet"


@dataclasses.dataclass(frozen=True)
class ShardReport:
  """The report on a finished shard, kept in its file's metadata.

  Attributes:
    digest: of the job it belongs to.
    shards: how many that job has.
    rows: records in it.
    bad: a message for each record that was left out.
    ignored: modality that was not asked for -> how many records had it.
    codes: column of codes -> how many there are to choose from at each position, by which they are packed.
    checksum: of all that was written, as it is read back; "" before.
  """

  digest: str
  shards: int
  rows: int
  bad: Sequence[str] = ()
  ignored: Mapping[str, int] = dataclasses.field(default_factory=dict)
  codes: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
  checksum: str = ""


def shard_path(folder: files.Path, number: int, count: int) -> files.Path:
  """Where shard `number` of `count` is, once finished."""
  return folder / f"shard-{number:06d}-of-{count:06d}.parquet"


def shard_files(folder: files.Path) -> list[files.Path]:
  """All finished shards in a folder, in order."""
  return files.children(folder, _PATTERN)


def column_name(modality: str, part: str) -> str:
  """Such as `image_shared`, `text_codes_shared`."""
  return f"{modality}_{part}"


def make_schema(
  columns: Sequence[str], dtype: str, captions: bool = False, codes: Mapping[str, Sequence[int]] | None = None
) -> pa.Schema:
  """Columns of a shard: id, label and split (null where not given), then vectors as lists, and codes as bytes.

  All lists of a column have one length, but not Arrow's fixed-size type: before version 26 Arrow could not read such a
  column back if a row was null.

  Args:
    columns: names; those of `codes` hold packed codes, others floats.
    dtype: of the floats, float16 or float32.
    captions: adds the columns `CAPTIONS`.
    codes: as in `ShardReport`.
  """
  codes, number = codes or {}, pa.from_numpy_dtype(np.dtype(dtype))
  kind = lambda name: pa.binary(packing.bytes_of(codes[name])) if name in codes else pa.list_(number)
  fields = [pa.field("id", pa.string(), nullable=False), pa.field("label", pa.string()), pa.field("split", pa.string())]
  fields += [pa.field(name, kind(name)) for name in columns]
  texts, vectors = CAPTIONS
  vector = pa.list_(number)
  return pa.schema(fields + ([pa.field(texts, pa.list_(pa.string())), pa.field(vectors, pa.list_(vector))] * captions))


def with_nulls(values: Num[np.ndarray, "n w"], at: Sequence[int], rows: int, dtype: Any) -> pa.ListArray:
  """A column of `rows` rows with `values` in the rows `at`, which ascend, and null in the others."""
  length, missing = np.zeros(rows, np.int32), np.ones(rows, bool)
  length[at], missing[at] = values.shape[1], False
  offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
  return pa.ListArray.from_arrays(offsets, values.astype(dtype).reshape(-1), mask=pa.array(missing))


def packed(
  values: Num[np.ndarray, "n s"], at: Sequence[int], rows: int, sizes: Sequence[int]
) -> pa.FixedSizeBinaryArray:
  """A column of codes, packed: of `rows` rows with `values` in the rows `at`, and null in the others."""
  everything = np.zeros((rows, packing.bytes_of(sizes)), np.uint8)
  everything[at] = packing.pack(values.astype(np.int64), sizes)
  missing = np.ones(rows, bool)
  missing[at] = False
  there = pa.py_buffer(np.packbits(~missing, bitorder="little"))
  return pa.FixedSizeBinaryArray.from_buffers(
    pa.binary(everything.shape[1]), rows, [there, pa.py_buffer(everything)], int(missing.sum())
  )


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
  """Writes a shard whole, with its report, name and checksums in the metadata, see `tables`.

  Raises:
    ValueError: if the report is of another number of rows.
  """
  table = pa.Table.from_batches(batches, schema)
  if table.num_rows != report.rows:
    raise ValueError(f"{path}: the report says {report.rows} rows, there are {table.num_rows}")
  about = dataclasses.asdict(report) | {"file": path.name}
  del about["checksum"]
  tables.write_table(table, path, about)


def read_report(path: files.Path) -> ShardReport:
  """The report in a shard's metadata, which are verified; its columns are verified when they are read.

  Raises:
    ValueError: if the file is not a shard of mode `embed`, damaged, or that of another name.
  """
  try:
    with _opened(path) as table:
      return _report_of(table)
  except ValueError as error:
    raise ValueError(f"{path} is not a shard written by mode 'embed', or it is damaged ({error}); remove it") from error


def _report_of(table: tables.Table) -> ShardReport:
  about, path = table.about, table.path
  fields = {field.name for field in dataclasses.fields(ShardReport)} - {"checksum"}
  if not fields <= set(about):
    raise ValueError(f"{path}: it has no report")
  report = ShardReport(**{name: about[name] for name in fields}, checksum=table.checksum)
  if about.get("file") != path.name:
    raise ValueError(f"{path}: was written as {about.get('file')!r}, and is another shard than its name says")
  return report


def verify_shard(path: files.Path) -> None:
  """Reads a whole shard and verifies all columns.

  Raises:
    ValueError: naming the file, and what is damaged.
  """
  with _opened(path) as table:
    _report_of(table)
    table.verify()


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
  """Ids and vectors, or codes, of a column of a finished job, group by group; rows without the modality are left out.

  What is read is verified: the metadata of all shards, then the ids and this column; of other columns nothing is read.

  Raises:
    ValueError: if shards are missing or belong to several jobs, or `summary.json` speaks of others; if one lacks the
      column or is damaged; for a null, a width or a value that cannot be, naming the file and the first bad row.
  """
  for _, ids, values, _ in read_parts(folder, column):
    yield ids, values


def read_parts(
  folder: files.Path, column: str, fields: Sequence[str] = ()
) -> Iterator[tuple[files.Path, list[str], Num[np.ndarray, "n w"], dict[str, list[str | None]]]]:
  """As `read_column`, each with the file that it is of, and the values of `fields`."""
  reports = _finished_job(folder)
  width: int | None = None
  for path, report in reports.items():
    with _opened(path) as table:
      if column not in table.names:
        allowed = [name for name in table.names if name.endswith((*PARTS, *CODES))]
        raise ValueError(f"{path}: no column {column!r}; allowed: {allowed}")
      sizes = report.codes.get(column)
      for group in table.groups(["id", *fields, column]):
        ids, values = group.columns["id"], group.columns[column]
        if not pa.types.is_string(ids.type):
          raise ValueError(f"{path}: column 'id' is of type {ids.type}; allowed: string")
        names = checked_ids(ids, group)
        there = np.flatnonzero(values.is_valid().to_numpy(zero_copy_only=False))
        if len(there):
          rows = (checked_codes(values, group, column, sizes)[1] if sizes else
                  checked_rows(values, group, column, width))  # fmt: skip
          if rows.dtype.kind == "f" and not _finite(rows):
            row = there[np.flatnonzero(~np.isfinite(rows).all(axis=1))[0]]
            raise ValueError(f"{path}: row {group.first + row}: column {column!r}: that of {names[row]!r} is not "
                             "finite")  # fmt: skip
        group.verify()
        if len(there):
          width = rows.shape[1]
          of_rows = {name: [group.columns[name][int(n)].as_py() for n in there] for name in fields}
          yield path, [names[n] for n in there], rows, of_rows


def codes_of(folder: files.Path, column: str) -> tuple[int, ...]:
  """How many codes there are to choose from at each position of a column of codes of a finished job.

  Raises:
    ValueError: as `read_column`.
  """
  path, report = next(iter(_finished_job(folder).items()))
  if column not in report.codes:
    raise ValueError(f"{path}: no column of codes {column!r}; allowed: {sorted(report.codes)}")
  return tuple(report.codes[column])


def checked_codes(
  values: pa.Array, group: tables.Group, column: str, sizes: Sequence[int]
) -> tuple[UInt8[np.ndarray, "n b"], Num[np.ndarray, "n s"]]:
  """The codes of those rows of a column that have some, packed and not.

  Raises:
    ValueError: naming the file and the first row with codes that are not there, or the column's type.
  """
  wanted = pa.binary(packing.bytes_of(sizes))
  if values.type != wanted:
    raise ValueError(f"{group.path}: column {column!r} is of type {values.type}; allowed: {wanted}")
  there = np.flatnonzero(values.is_valid().to_numpy(zero_copy_only=False))
  rows = tables.fixed_bytes(values)[there]
  try:
    return rows, packing.unpack(rows, sizes)
  except ValueError as error:
    row, what = re.fullmatch(r"row (\d+): (.*)", str(error)).groups()
    raise ValueError(f"{group.path}: row {group.first + there[int(row)]}: column {column!r}: {what}") from error


def checked_ids(ids: pa.Array, group: tables.Group) -> list[Any]:
  """The ids of a group: strings, in shards; also integers, in an index.

  Raises:
    ValueError: naming the file and the first row whose id is null, or the column's type.
  """
  if ids.null_count:
    row = int(np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0])
    raise ValueError(f"{group.path}: row {group.first + row}: column 'id' has {ids.null_count} nulls; allowed: none")
  return ids.to_pylist()


def checked_rows(
  values: pa.Array, group: tables.Group, column: str, width: int | None = None
) -> Num[np.ndarray, "n w"]:
  """The lists of a column that are not null as rows.

  Args:
    values: of a group.
    group: for errors.
    column: its name, for errors.
    width: that of the groups before; None if this is the first.

  Raises:
    ValueError: naming the file and the first row of another width or with a null, or the column's type.
  """
  kind, name = values.type, f"column {column!r}"
  if not (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)) or not (
    pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)
  ):
    raise ValueError(f"{group.path}: {name} is of type {kind}; allowed: lists of numbers")
  at = group.first + np.flatnonzero(values.is_valid().to_numpy(zero_copy_only=False))
  values = values.drop_null()
  lengths = np.diff(values.offsets.to_numpy()) if pa.types.is_list(kind) else np.full(len(values), kind.list_size)
  wanted = int(lengths[0]) if width is None else width
  if len(other := np.flatnonzero(lengths != wanted)):
    widths = sorted({wanted, *lengths.tolist()})[:4]
    raise ValueError(f"{group.path}: row {at[other[0]]}: {name} has vectors of widths {widths}; allowed: one width")
  flat = values.flatten()
  if flat.null_count:
    row = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0]) // wanted
    raise ValueError(f"{group.path}: row {at[row]}: {name} has vectors with nulls; allowed: numbers")
  return flat.to_numpy(zero_copy_only=False).reshape(len(values), wanted)


def _finite(rows: np.ndarray) -> bool:
  """Whether all values are finite: their sum is, but for sums beyond the type, of which each value is looked at."""
  with np.errstate(over="ignore", invalid="ignore"):
    return bool(np.isfinite(rows.sum(dtype=np.float64))) or bool(np.isfinite(rows).all())


def _finished_job(folder: files.Path) -> dict[files.Path, ShardReport]:
  """The shards of the one job in a folder, in order, with their reports.

  Raises:
    ValueError: if some are missing, or belong to another job or other files than `summary.json` says.
  """
  paths, about = shard_files(folder), folder / SUMMARY
  summary = files.read_sealed(about) if files.is_file(about) else None
  if not paths:
    lost = f"; {about} says that there were some" if summary else "; write some with mode 'embed'"
    raise ValueError(f"{folder}: no shards ({_PATTERN}) in it{lost}")
  first = read_report(paths[0])
  reports = finished_shards(folder, first.digest, first.shards)
  if len(reports) < first.shards:
    lost = [shard_path(folder, n, first.shards).name for n in range(first.shards) if n not in reports]
    raise ValueError(f"{folder}: {len(reports)} of {first.shards} shards are finished, {', '.join(lost[:4])} "
                     "and so on are missing; run the same command again")  # fmt: skip
  if summary:
    try:
      expected = {row["file"]: (row["rows"], row["checksum"]) for row in summary["shards"]}
    except (KeyError, TypeError) as error:
      raise ValueError(f"{about}: not the summary of a job of mode 'embed' ({error!r}); remove it") from error
    for number, report in sorted(reports.items()):
      path = shard_path(folder, number, first.shards)
      if len(expected) != len(reports) or expected.get(path.name) != (report.rows, report.checksum):
        raise ValueError(f"{path}: is not the file of which {about} speaks, but of another job or written since; run "
                         "the same command again")  # fmt: skip
  return {shard_path(folder, number, first.shards): reports[number] for number in sorted(reports)}


def _opened(path: files.Path) -> contextlib.AbstractContextManager[tables.Table]:
  return tables.open_table(path, "a readable shard")

"""ArrayRecord: a record is a msgpack map of fields and of media as they were stored.

`{"id": str, "label": str, "split": str, "text": [str], "<modality>": bytes, ...}` is what `data.shards` writes; that of
others, `{"__key__": str, "<ending>": bytes}` with the endings of a WebDataset, is read as well.

Shards of `data.shards` end with one record more, `{"__index__": {...}}`: what `Index` knows of the others, and the plan
that they belong to. It is inside, since a shard that is copied, renamed or fetched alone keeps it, and the two cannot
differ in age as a file beside it could; it is the last, since readers of others then see the same numbers, and one map
more whose only key says what it is. Files without it are indexed by reading each record once.
"""

from __future__ import annotations

import datetime
import decimal
import functools
import io
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from codebind_jax import files
from codebind_jax.data import ranges
from codebind_jax.data.formats.record import Record, parse
from codebind_jax.data.index import Index, IndexBuilder, groups_of, twice
from codebind_jax.data.index_cache import Bad, Scan, scanned
from codebind_jax.data.records import Source

ENDINGS = (".array_record", ".arrayrecord")
_INDEX = "__index__"
_HEAD = b"\x81" + msgpack.packb(_INDEX)  # how a map with this key alone begins
_COLUMNS = {"has": "<u4", "label": "<i4", "split": "<i1", "ids": "<u8"}
_FIRST = ("id", "label", "split", "text")
_AT_ONCE = 8 << 20  # bytes read at once in a pass over a file
_OPEN = 256  # files that a process keeps open, each with 8 bytes a record
_ENDINGS_OF = {
  "image": ("jpg", "jpeg", "png", "webp", "bmp", "gif"), "text": ("txt", "caption"), "label": ("cls",),
  "audio": ("wav", "flac", "mp3", "ogg"), "video": ("mp4", "webm", "mov", "avi", "mkv"),
  "points": ("ply", "obj", "off"),
}  # fmt: skip
_KIND = {ending: kind for kind, endings in _ENDINGS_OF.items() for ending in endings}


def encode(fields: Mapping[str, Any], items: Mapping[str, bytes]) -> bytes:
  """A record as msgpack: fields first, then media; the same bytes for the same content.

  Args:
    fields: those of a `Source`; a None is left out, as an empty list of texts is.
    items: modality -> a file's bytes.

  Raises:
    ValueError: naming a field that is also a modality, or whose value is no plain one.
  """
  kept = {key: value for key, value in fields.items() if value is not None and not (key == "text" and not value)}
  order = [*(key for key in _FIRST if key in kept), *sorted(set(kept) - set(_FIRST))]
  if both := sorted(set(kept) & set(items)):
    raise ValueError(f"{both[0]}: is both a field and a modality of record {fields.get('id')!r}")
  record = {key: kept[key] for key in order} | dict(items)
  try:
    return msgpack.packb(record, default=_plain, unicode_errors="surrogatepass")
  except (TypeError, ValueError, OverflowError) as error:
    raise ValueError(f"record {fields.get('id')!r}: cannot be written ({error})") from error


def decode(content: bytes, default_id: str = "") -> Record:
  """The record of msgpack bytes, of `encode` or of others with `__key__`.

  Raises:
    ValueError: if they are no map, or naming the key that is wrong.
  """
  try:
    record = msgpack.unpackb(content, unicode_errors="surrogatepass")
  except (ValueError, msgpack.UnpackException) as error:  # of which msgpack has several kinds
    raise ValueError(f"not msgpack ({type(error).__name__}: {error})") from error
  if not isinstance(record, dict) or not all(isinstance(key, str) for key in record):
    raise ValueError(f"a msgpack map with string keys is needed, got {type(record).__name__}")
  return parse(_by_modality(record) if "__key__" in record else record, default_id)


def _plain(value: Any) -> Any:
  """A value that msgpack has no type for, as one that it has."""
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, np.ndarray):
    return value.tolist()
  if isinstance(value, datetime.date | datetime.time):
    return value.isoformat()
  if isinstance(value, decimal.Decimal | Path):
    return str(value)
  raise TypeError(f"type {type(value).__name__}")


def _by_modality(record: Mapping[str, Any]) -> dict[str, Any]:
  """Keys of endings (`jpg`, `depth.png`) as fields and modalities."""
  found: dict[str, Any] = {"id": record["__key__"]}
  for ending, value in record.items():
    if ending == "json" and isinstance(value, bytes):
      more = json.loads(value)
      found |= {k: v for k, v in more.items() if k not in ("id", "label")} if isinstance(more, dict) else {}
    elif not ending.startswith("__"):
      head, _, last = ending.rpartition(".")
      key = head or _KIND.get(last.lower(), ending)
      text = key in ("text", "label") and isinstance(value, bytes)
      found[key] = value.decode("utf-8").strip() if text else value
  return found


def encode_index(index: Index, plan: str) -> bytes:
  """The last record of a shard: what is known of all records before it.

  Args:
    index: of them, in their order.
    plan: digest of the plan that the shard belongs to.
  """
  columns = {name: getattr(index, name).astype(kind).tobytes() for name, kind in _COLUMNS.items()}
  about = {"version": 1, "plan": plan, "records": len(index), "modalities": index.modalities, "labels": index.labels}
  return msgpack.packb({_INDEX: about | columns}, unicode_errors="surrogatepass")


def _decode_index(content: bytes) -> tuple[Index, str]:
  """The index of a shard, and the digest of its plan."""
  about = msgpack.unpackb(content, unicode_errors="surrogatepass")[_INDEX]
  if about["version"] != 1:
    raise ValueError(f"its index has version {about['version']!r}; allowed: 1")
  count = about["records"]
  columns = {name: np.frombuffer(about[name], kind).astype(kind[1:]) for name, kind in _COLUMNS.items()}
  where = np.stack([np.arange(count, dtype=np.int64), np.zeros(count, np.int64)], axis=1)
  index = Index(
    tuple(about["modalities"]), labels=tuple(about["labels"]), group=groups_of(columns["label"]), where=where, **columns
  )  # fmt: skip
  return index, about["plan"]


class Shard:
  """A file's records by number, read from any number of threads; picklable.

  A process opens it at the first read. It keeps the `_OPEN` files that were used last open, and closes others.
  """

  def __init__(self, path: Path):
    stat = path.stat()
    self.path, self._size = path, stat.st_size
    self.key = (str(path), (stat.st_ino, stat.st_size, stat.st_mtime_ns))

  def __len__(self) -> int:
    return _reader(*self.key).num_records()

  def read(self, number: int) -> bytes:
    """The bytes of a record.

    Raises:
      ValueError: naming file and number, if it is damaged.
      OSError: if the file cannot be read.
    """
    try:  # the reader of a file is safe from several threads, as array_record's own data source shares it
      return _reader(*self.key).read([number])[0]
    except (RuntimeError, IndexError) as error:
      raise ValueError(f"{self.path}: record {number}: damaged ({error})") from error

  def __iter__(self) -> Iterator[tuple[int, bytes | ValueError]]:
    """Numbers and records, some megabytes at once; for a damaged record its error."""
    count = len(self)
    step = max(1, min(1024, _AT_ONCE * count // max(self._size, 1)))
    for first in range(0, count, step):
      numbers = range(first, min(first + step, count))
      try:
        yield from zip(numbers, _reader(*self.key).read(list(numbers)))
      except RuntimeError:
        yield from ((number, self._tried(number)) for number in numbers)

  def _tried(self, number: int) -> bytes | ValueError:
    try:
      return self.read(number)
    except ValueError as error:
      return error

  @property
  def group(self) -> int:
    """How many records the file stores together, all of which are read for one of them."""
    found = re.search(r"group_size:(\d+)", _reader(*self.key).writer_options_string())
    return int(found[1]) if found else 1

  def index(self) -> tuple[Index, str] | None:
    """The index that the shard ends with and the digest of its plan; None where it has none.

    Raises:
      ValueError: naming the file, if it is damaged.
    """
    count = len(self)
    last = self.read(count - 1) if count else b""
    if not last.startswith(_HEAD):
      return None
    try:
      index, plan = _decode_index(last)
    except (KeyError, TypeError, ValueError, msgpack.UnpackException) as error:
      raise ValueError(f"{self.path}: its index cannot be read ({error})") from error
    if len(index) != count - 1 or any(len(getattr(index, name)) != count - 1 for name in _COLUMNS):
      raise ValueError(f"{self.path}: its index is of {len(index)} records, and {count - 1} are before it")
    return index, plan


@functools.lru_cache(_OPEN)
def _reader(path: str, age: tuple[int, int, int]) -> ArrayRecordReader:
  """The reader of a file, which closes it when no thread has it any more."""
  del age  # so that a file of the same name in its place is opened anew
  reader = ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=32768)
  if not reader.ok():  # which is all that it says of a file that it cannot open
    with open(path, "rb"):
      pass
    raise ValueError(f"{path}: not an ArrayRecord file, or its end is missing")
  return reader


def close() -> None:
  """Closes the files that this process keeps open, but those that a thread is reading; a later read opens them anew."""
  _reader.cache_clear()


_last = threading.local()  # the record that a thread read last, since its items are asked for one by one


class ArrayRecordSource(Source):
  """Records of one file; memory holds the index alone, and the last record of each thread."""

  def __init__(self, shard: Shard, index: Index):
    super().__init__(shard.path.stem, index)
    self._shard, self._places, self.block = shard, index.where, shard.group

  def close(self) -> None:
    """See `Source.close`."""
    close()

  def _record(self, number: int) -> Record:
    at = int(self._places[number, 0])
    key = (self._shard.key, at)
    if getattr(_last, "key", None) != key:
      try:
        record = decode(self._shard.read(at), f"{self._shard.path.name}:{at}")
      except ValueError as error:
        raise _named(error, self._shard.path, at) from error
      _last.key, _last.record = key, record
    return _last.record

  def _fields(self, number: int) -> dict[str, Any]:
    return dict(self._record(number).fields)

  def _item(self, number: int, modality: str) -> bytes | Path:
    item = self._record(number).items[modality]
    return self._shard.path.parent / item if isinstance(item, str) else item

  def _read(self, number: int, modality: str) -> bytes | Path | np.ndarray:
    """An .npy file's bytes are its array, since arrays of other sources are kept so, also of pictures and sounds."""
    item = self._item(number, modality)
    if not isinstance(item, bytes) or item[:6] != b"\x93NUMPY":
      return item
    try:
      return np.load(io.BytesIO(item), allow_pickle=False)
    except (ValueError, EOFError) as error:
      raise ValueError(f"{self._where(number)}: {modality}: not a readable .npy file ({error})") from error

  def _identity(self, number: int, modality: str) -> str:
    return f"{modality} {ranges.identity(self._shard.path)} {self._places[number, 0]}"

  def _where(self, number: int) -> str:
    return f"{self._shard.path}: record {self._places[number, 0]}"


def _named(error: ValueError, path: Path, number: int) -> ValueError:
  """An error that names file and record, once."""
  return error if str(error).startswith(str(path)) else ValueError(f"{path}: record {number}: {error}")


def open_files(paths: Sequence[Path], *, cache: Path | None = None, max_bad_records: int = 0) -> list[Source]:
  """The records of each file: its index is read, or made by reading each record once, of which none is kept.

  Args:
    paths: the files; far ones are copied to `files.cache_folder`, since the reader knows no s3:// and does not give up.
    cache: folder of kept indices, of files without one.
    max_bad_records: of all files together.

  Raises:
    ValueError: naming file and record, for the first that is damaged or no record if there are more than
      `max_bad_records`; for two records of one id; for a file that is no ArrayRecord.
    OSError: if a file cannot be read.
  """
  bad = Bad(max_bad_records)
  return [_open(files.fetched(path) if files.is_far(path) else path, bad, cache) for path in paths]


def _open(path: Path, bad: Bad, cache: Path | None) -> Source:
  shard = Shard(path)
  known = shard.index()
  if known:
    source = ArrayRecordSource(shard, known[0])
  else:
    scan = scanned([path], lambda bad: _scan(shard, bad), bad, revision="array_record-1", cache=cache)
    source = ArrayRecordSource(shard, scan.index)
    source.left_out = scan.bad
  if pair := twice(source.index):
    first, second = pair
    raise ValueError(f"{source.where(second)}: id {source.fields(second)['id']!r} is there twice, first in record "
                     f"{source.index.where[first][0]}")  # fmt: skip
  return source


def _scan(shard: Shard, bad: Bad) -> Scan:
  """The index of a file without one."""
  builder, further = IndexBuilder(), {}
  for number, content in shard:
    try:
      if isinstance(content, ValueError):
        raise content
      record = decode(content, f"{shard.path.name}:{number}")
      fields = record.fields
      builder.add(fields["id"], record.modalities, fields["label"], fields.get("split"), (number, 0))
      further |= dict.fromkeys(record.further)
    except ValueError as error:
      bad.add(str(_named(error, shard.path, number)))
  return Scan(builder.build(), further=tuple(further))

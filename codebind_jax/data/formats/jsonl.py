"""JSON lines: one object a line, with paths relative to the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging

from codebind_jax.data.formats.record import Record, parse
from codebind_jax.data.ranges import File
from codebind_jax.data.records import Index, IndexBuilder, Source, identity_of, twice

ENDINGS = (".jsonl",)
_GUESS = 1024  # bytes read at first of a line, whose length is not kept


class JsonlSource(Source):
  """Records of one file, of which memory holds the offsets alone."""

  def __init__(self, path: Path, index: Index):
    super().__init__(path.stem, index)
    self._file, self._places = File(path), index.where

  def _record(self, number: int) -> Record:
    offset, line = (int(value) for value in self._places[number])
    content, length = b"", _GUESS
    while b"\n" not in content:
      content, before = self._file.read(offset, length), len(content)
      if len(content) < length or len(content) == before:
        break
      length *= 4
    return parse(_object(content.partition(b"\n")[0]), f"{self._file.path.name}:{line}")

  def _fields(self, number: int) -> dict[str, Any]:
    return self._record(number).fields

  def _read(self, number: int, modality: str) -> Path:
    return self._file.path.parent / self._record(number).items[modality]

  def _hash(self, number: int, modality: str) -> str:
    record = self._record(number)
    if modality == "text":
      content = json.dumps(record.fields["text"]).encode()
    else:
      content = (self._file.path.parent / record.items[modality]).read_bytes()
    return hashlib.sha256(modality.encode() + content).hexdigest()

  def _identity(self, number: int, modality: str) -> str:
    path = self._file.path.parent / self._record(number).items[modality]
    return f"{modality} {identity_of(path)}"

  def _where(self, number: int) -> str:
    return f"{self._file.path}:{self._places[number][1]}"


def _object(line: bytes) -> dict[str, Any]:
  """The object of a line.

  Raises:
    ValueError: if it is none.
  """
  try:
    record = json.loads(line.decode("utf-8-sig"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"not JSON ({error})") from error
  if not isinstance(record, dict):
    raise ValueError(f"an object is needed, got {type(record).__name__}")
  return record


def open_files(paths: Sequence[Path], *, max_bad_records: int = 0) -> list[Source]:
  """The records of each file; each line is parsed once, and none is kept.

  Raises:
    ValueError: naming file and line, for the first line that is no record if there are more than `max_bad_records`; for
      two records of one id.
    OSError: if a file cannot be read.
  """
  return [_open(path, max_bad_records) for path in paths]


def _open(path: Path, max_bad_records: int) -> Source:
  builder, bad, further, offset = IndexBuilder(), [], {}, 0
  with open(path, "rb") as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        try:
          record = parse(_object(line), f"{path.name}:{number}")
          fields = record.fields
          builder.add(fields["id"], record.modalities, fields["label"], fields.get("split"), (offset, number))
          further |= dict.fromkeys(record.further)
        except ValueError as error:
          bad.append(f"{path}:{number}: {error}")
          if len(bad) > max_bad_records:
            more = f" ({len(bad)} bad records, {max_bad_records} allowed)" if max_bad_records else ""
            raise ValueError(bad[0] + more) from error
      offset += len(line)
  for message in bad:
    logging.warning("left out %s", message)
  if further:
    logging.info("%s: keys that are no modality are kept aside: %s", path, ", ".join(further))
  source = JsonlSource(path, builder.build())
  if pair := twice(source.index):
    first, second = pair
    line = source.index.where[first][1]
    raise ValueError(f"{source.where(second)}: id {source.fields(second)['id']!r} is there twice, first in line {line}")
  return source

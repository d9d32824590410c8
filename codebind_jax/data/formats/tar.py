"""WebDataset: tar files whose members of one key make a record, read in place by their offsets.

A member's key is its path up to the first dot of the base name. What follows says what it is: a plain ending
(`jpg`, `wav`, ...; `txt` text; `cls` label; `json` fields), or `<modality>.<ending>`, which comes first (`depth.png`,
`points.npy`). Other members are kept aside.
"""

from __future__ import annotations

import functools
import itertools
import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from codebind_jax.data import ranges
from codebind_jax.data.formats import record
from codebind_jax.data.formats.record import BY_ENDING, TEXT, add_rows, modality_keys, parse, short_names
from codebind_jax.data.index import IndexBuilder, known_modalities, twice
from codebind_jax.data.index_cache import Bad, Scan, scanned
from codebind_jax.data.joined import joined
from codebind_jax.data.ranges import ChangedError, File
from codebind_jax.data.records import Source

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_COMPRESSED = ENDINGS[1:]
_CHUNK = 256  # records added together
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_PACKED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")  # how gzip, zstd, bzip2 and xz files begin
_REFUSED = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
            b"S": "a sparse file", b"M": "part of a file on several volumes"}  # fmt: skip
_ASIDE = "aside"


class Member(NamedTuple):
  """A file in a tar: its name, where its first header begins, where its content begins, and the content's length."""

  name: str
  start: int
  offset: int
  size: int


_member = functools.partial(tuple.__new__, Member)


def members(file: BinaryIO, size: int, name: str) -> Iterator[Member]:
  """The files of a tar, in order: a walk over the headers that seeks over their contents.

  GNU's long names and pax headers (path, size) are followed, folders and comments left out, tars that were joined by
  `cat` read to their end.

  Args:
    file: at its beginning.
    size: of the file, bytes.
    name: of the file, for errors.

  Raises:
    ValueError: naming tar and member, for one that is cut short or no plain file.
  """
  at, start, last, ended = 0, 0, "its beginning", False
  long_name: str | None = None
  pax: dict[str, str] = {}
  cut = lambda after: ValueError(f"{name}: is cut short after {after}; fetch or make it anew")
  while True:
    header = file.read(_BLOCK)
    if not at and header.startswith(_PACKED):
      raise ValueError(compressed(name))
    if header == _ZEROS:
      at, ended = at + _BLOCK, True
      start = at
      continue
    if len(header) < _BLOCK:
      if ended and not header.strip(b"\0"):
        return
      raise cut(last)
    kind, ended = header[156:157], False
    try:  # what nearly all headers are, at once
      length = int(header[124:135], 8)
      # The sum of all bytes but for multiples of 255, as 256 = 1 modulo 255: a fifth of the time.
      own = int(header[148:154], 8) + sum(header[148:156]) - 256
      plain = header[257:262] == b"ustar" and header[135] in b"\0 " and header[154] in b"\0 "
      sound = plain and (int.from_bytes(header, "big") - own) % 255 == 0
    except ValueError:
      sound = False
    if not sound:
      length = _number(header[124:136])
      sound = length is not None and _sound(header)
    if not sound:
      raise ValueError(f"{name}: no tar header at byte {at}, after {last}; the file is damaged, or no tar")
    at += _BLOCK
    if kind in b"0\0" or kind == b"7":
      path = long_name if long_name is not None else pax["path"] if "path" in pax else _path(header)
      if pax:
        length = _pax_size(pax, length, name, path)
      end = at + length
      if end > size:
        raise ValueError(f"{name}: is cut short in member {path}: {end} bytes are needed, it has {size}; "
                         "fetch or make it anew")  # fmt: skip
      if path[-1:] != "/":
        yield _member((path, start, at, length))
      last = f"member {path}"
    elif kind in b"LKxg":
      if at + length > size:
        raise cut(last)
      content = file.read(length)
      if kind == b"L":
        long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
      elif kind == b"x":
        pax = _pax(content, name)
      at += -(-length // _BLOCK) * _BLOCK
      if length % _BLOCK:
        file.seek(at)
      continue
    elif kind == b"5" or kind == b"V":
      length = 0 if kind == b"5" else length
    else:
      path = long_name or pax.get("path") or _path(header)
      what = _REFUSED.get(kind, f"of the unknown type {kind!r}")
      raise ValueError(f"{name}: member {path} is {what}; plain files are needed: pack it anew "
                       "(tar --dereference --hard-dereference)")  # fmt: skip
    at += -(-length // _BLOCK) * _BLOCK
    if length:
      file.seek(at)
    start, long_name = at, None
    if pax:
      pax = {}


def compressed(name: str) -> str:
  """What is wrong with a compressed tar."""
  return (f"{name}: a compressed tar, whose members cannot be read in place; unpack it to .tar (gunzip, zstd -d, "
          "bunzip2, xz -d): media are compressed already")  # fmt: skip


def _sound(header: bytes) -> bool:
  """Whether the checksum is right: the sum of all bytes, its own field taken as blanks."""
  total, whole = _octal(header[148:156]), sum(header) - sum(header[148:156]) + 256
  return total == whole or total == whole - 256 * sum(byte > 127 for byte in header[:148] + header[156:])


def _octal(field: bytes) -> int | None:
  try:
    return int(field.rstrip(b"\0 ") or b"0", 8)
  except ValueError:
    return None


def _number(field: bytes) -> int | None:
  """A number in octal digits, or, for those beyond 8 GB, in base 256."""
  return int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field.partition(b"\0")[0])


def _path(header: bytes) -> str:
  path = header[:100].partition(b"\0")[0]
  if header[257:263] == b"ustar\0" and header[345]:
    path = header[345:500].partition(b"\0")[0] + b"/" + path
  return path.decode("utf-8", "surrogateescape")


def _pax(content: bytes, name: str) -> dict[str, str]:
  """The entries `LENGTH KEY=VALUE` and a newline, of which the length counts all bytes."""
  entries, at = {}, 0
  while at < len(content):
    length, blank, _ = content[at : at + 24].partition(b" ")
    if not blank or not length.isdigit() or not int(length):
      raise ValueError(f"{name}: a damaged pax header")
    key, _, value = content[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
    entries[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
    at += int(length)
  return entries


def _pax_size(pax: dict[str, str], length: int, name: str, path: str) -> int:
  if any(key.startswith("GNU.sparse.") for key in pax):
    path = pax.get("GNU.sparse.name", path)
    raise ValueError(f"{name}: member {path} is a sparse file; plain files are needed: pack it anew without --sparse")
  try:
    return int(pax.get("size", length))
  except ValueError as error:
    raise ValueError(f"{name}: member {path}: a damaged pax header (size {pax['size']!r})") from error


def split_name(path: str) -> tuple[str, str]:
  """Key and ending of a member: its path up to the first dot of the base name, and what follows, in lower case.

  >>> split_name("./a.b/000.Depth.PNG")
  ('a.b/000', 'depth.png')
  """
  folder, slash, base = path.removeprefix("./").rpartition("/")
  stem, _, ending = base.partition(".")
  return folder + slash + stem, ending.lower()


def role(ending: str, modalities: frozenset[str]) -> str:
  """What a member is: a modality, "text", "label", "fields", or "aside"."""
  first, dot, _ = ending.partition(".")
  if dot:
    return first if first in modalities else "text" if first in TEXT else _ASIDE
  return {"txt": "text", "text": "text", "cls": "label", "json": "fields"}.get(ending) or BY_ENDING.get(ending, _ASIDE)


class TarSource(Source):
  """Records of one tar; memory holds where the members are, 17 bytes of each."""

  def __init__(self, path: PurePath, scan: Scan, prefix: str = ""):
    super().__init__(path.stem, scan.index, scan.mark)
    self.left_out = scan.bad
    self._prefix = prefix
    self._places, self._endings = scan.index.where, tuple(scan.notes["endings"])
    self._offsets, self._sizes = scan.columns["offsets"], scan.columns["sizes"]
    self._heads, self._kinds = scan.columns["heads"], scan.columns["kinds"]
    self._file = File(path, scan.stamps[0] if scan.stamps else None)
    known = frozenset(known_modalities())
    self._roles = tuple(role(ending, known) for ending in self._endings)

  def _members(self, number: int) -> dict[str, int]:
    """Role -> number of the member."""
    first, count = map(int, self._places[number])
    roles = {self._roles[kind]: first + at for at, kind in enumerate(self._kinds[first : first + count].tolist())}
    roles.pop(_ASIDE, None)
    return roles

  def _content(self, member: int) -> bytes:
    size = int(self._sizes[member])
    content = self._file.read(int(self._offsets[member]), size)
    if len(content) < size:
      raise ChangedError(f"{self._file.path}: ends in a member, has changed since it was indexed; start again")
    return content

  def key(self, row: int) -> str:
    """The key of a record's members."""
    return self._key(self._number(row))

  def _key(self, number: int) -> str:
    member = int(self._places[number, 0])
    end, head = int(self._offsets[member]), int(self._heads[member]) * _BLOCK
    content = self._file.read(end - head, head)
    long_name, pax, at = None, {}, 0
    while at < head - _BLOCK:  # the long names before the header itself
      kind, length = content[at + 156 : at + 157], _number(content[at + 124 : at + 136]) or 0
      value = content[at + _BLOCK : at + _BLOCK + length]
      if kind == b"L":
        long_name = value.rstrip(b"\0").decode("utf-8", "surrogateescape")
      elif kind == b"x":
        pax = _pax(value, str(self._file.path))
      at += _BLOCK - (-length // _BLOCK) * _BLOCK
    return split_name(long_name or pax.get("path") or _path(content[at : at + _BLOCK]))[0]

  def _fields(self, number: int) -> dict[str, Any]:
    roles = self._members(number)
    parts = {name: self._content(roles.pop(name)) for name in ("fields", "text", "label") if name in roles}
    return parse(_row(parts, roles), self._prefix + self._key(number)).fields

  def _read(self, number: int, modality: str) -> bytes:
    return self._content(self._members(number)[modality])

  def _identity(self, number: int, modality: str) -> str:
    return f"{modality} {ranges.identity(self._file.path)} {number}"

  def _where(self, number: int) -> str:
    return f"{self._file.path}: {self._key(number)}"


def _row(parts: dict[str, bytes], modalities: Any) -> dict[str, Any]:
  """Keys and values of a record, as `record.parse` takes them; its items are not read, only named.

  Args:
    parts: content of its members "fields", "text" and "label".
    modalities: of its other members.

  Raises:
    ValueError: for JSON or text that is none.
  """
  row: dict[str, Any] = dict.fromkeys(modalities, "there")
  if "fields" in parts:
    try:
      text = parts["fields"].decode("utf-8-sig")
      fields = json.loads(text)
    except (ValueError, RecursionError) as error:
      raise ValueError(f"json: not JSON ({error})") from error
    if not isinstance(fields, dict):
      raise ValueError(f"json: an object is needed, got {type(fields).__name__}")
    try:
      record.refuse_repeated(text, fields)
    except ValueError as error:
      raise ValueError(f"json: {error}") from error
    for key, value in fields.items():
      # A modality's key is a path or an address here: the member is what counts, as it is for text and label.
      aside = key in parts if key == "label" else "text" in parts if key in TEXT else key in modality_keys()
      row[f"json {key}" if aside else key] = value
  for name in ("text", "label"):
    if name in parts:
      try:
        row[name] = parts[name].decode("utf-8-sig").strip()
      except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 ({error})") from error
  return row


def open_files(
  paths: Sequence[PurePath], *, cache: Path | None = None, max_bad_records: int = 0, shard_ids: bool = False
) -> list[Source]:
  """The records of each tar, indexed in one pass over its headers; texts, labels and JSON are parsed in the same pass.

  Args:
    paths: the tars, not compressed.
    cache: folder of kept indices.
    max_bad_records: of all files together.
    shard_ids: a record's id is its key after the tar's name, for tars that each count from 0; its key alone if not.

  Raises:
    ValueError: naming tar and member: for a compressed tar, one that is cut short, members of one key apart, members
      that are no plain files, two records of one id; for members without a key and what cannot be parsed, if there are
      more of them than `max_bad_records`.
    OSError: if a file cannot be read.
  """
  for path in paths:
    if path.name.lower().endswith(_COMPRESSED):
      raise ValueError(compressed(str(path)))
  bad = Bad(max_bad_records)
  sources: list[Source] = []
  for path, name in zip(paths, short_names(paths)):
    prefix = f"{name.removesuffix('.tar')}/" if shard_ids else ""
    scan = scanned([path], lambda bad, path=path, prefix=prefix: _scan(path, prefix, bad), bad, revision="tar-2",
                   options={"prefix": prefix}, cache=cache)  # fmt: skip
    sources.append(TarSource(path, scan, prefix))
  if len(sources) > 1 and (pair := twice((whole := joined(sources, unique=False)).index)):
    first, second = pair
    hint = "" if shard_ids else "; shard_ids=True puts the tar's name before its keys"
    raise ValueError(f"id {whole.fields(first)['id']!r} is there twice: {whole.where(first)} and "
                     f"{whole.where(second)}{hint}")  # fmt: skip
  return sources


def _scan(path: PurePath, prefix: str, bad: Bad) -> Scan:
  builder, known = IndexBuilder(), frozenset(known_modalities())
  offsets, sizes, heads, kinds = array("q"), array("q"), array("I"), array("H")
  numbers: dict[str, tuple[int, str]] = {}  # ending -> its number and role
  further: dict[str, None] = {}
  rows: list[dict[str, Any]] = []
  keys: list[str] = []
  where: list[tuple[int, int]] = []

  def flush() -> None:
    places = np.array(where, np.int64).reshape(-1, 2)
    unfit, others = add_rows(builder, rows, lambda at: prefix + keys[at], places)
    further.update(dict.fromkeys(others))
    for at, message in unfit.items():
      bad.add(f"{path}: {keys[at]}: {message}")
    rows.clear(), keys.clear(), where.clear()

  size = ranges.stamp(path)[0]
  with ranges.open_binary(path, 1 << 15) as file:
    key, first, parts, roles, wrong, begin = None, 0, {}, set(), "", "."
    for member in itertools.chain(members(file, size, str(path)), [None]):
      if member and member.name.startswith(begin) and "/" not in (ending := member.name[len(begin) :]):
        name, ending = key, ending.lower()
      else:
        name, ending = split_name(member.name) if member else (None, "")
      if member and name.rpartition("/")[2] == "":
        further["hidden files"] = None  # .DS_Store, ._000.jpg
        continue
      if member and not ending:
        bad.add(f"{path}: member {member.name}: no ending, so no key; KEY.ENDING is needed, such as 000.jpg")
        continue
      if name != key:
        if key is not None:
          try:
            if wrong:
              raise ValueError(wrong)
            rows.append(_row(parts, roles))
            keys.append(key)
            where.append((first, len(offsets) - first))
          except ValueError as error:
            bad.add(f"{path}: {key}: {error}")
          if len(rows) == _CHUNK:
            flush()
        key, first, parts, roles, wrong = name, len(offsets), {}, set(), ""
        begin = member.name[: -len(ending)] if member and ending else "."
      if member is None:
        break
      if ending not in numbers:
        numbers[ending] = len(numbers), role(ending, known)
      kind, what = numbers[ending]
      if what == _ASIDE:
        further[f".{ending}"] = None
      elif what in roles or what in parts:
        wrong = f"{what}: two members, {member.name} is the second"
      elif what in ("fields", "text", "label"):
        parts[what] = file.read(member.size)
      elif member.size:
        roles.add(what)
      else:
        wrong = f"{what}: member {member.name} is empty"
      offsets.append(member.offset)
      sizes.append(member.size)
      heads.append((member.offset - member.start) // _BLOCK)
      kinds.append(kind)
  flush()
  column = lambda values, kind: np.array(values, kind)
  columns = {"offsets": column(offsets, np.int64), "sizes": column(sizes, np.int64),
             "heads": column(heads, np.uint32), "kinds": column(kinds, np.uint16)}  # fmt: skip
  scan = Scan(builder.build(), further=tuple(further), columns=columns, notes={"endings": list(numbers)})
  source = TarSource(path, scan, prefix)
  if pair := twice(source.index):
    a, b = pair
    if source.key(a) == source.key(b):
      raise ValueError(f"{path}: members of key {source.key(b)!r} are apart; those of one key must follow one another: "
                       "sort them when packing (tar --sort=name)")  # fmt: skip
    name = source.fields(b)["id"]
    raise ValueError(f"{path}: id {name!r} is there twice: {source.key(a)} and {source.key(b)}")
  return scan

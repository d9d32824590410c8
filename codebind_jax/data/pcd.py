"""PCD files (the Point Cloud Library's format 0.7), and clouds as tables of numbers: .xyz, .txt, .csv, .pts, .asc."""

from __future__ import annotations

import io
import re

import numpy as np
from jaxtyping import Float

from codebind_jax.data.reading import remark

_FIELDS = ("fields", "size", "type", "width", "height", "points", "data")
_NAMES = {"x", "y", "z", "r", "g", "b", "red", "green", "blue", "i", "intensity", "nx", "ny", "nz"}
_COLOURS = (("r", "g", "b"), ("red", "green", "blue"))
_UNIT = 0.01  # normals are as long as 1, but for their rounding
_COMMENT = re.compile(r"^\s*(?:#|//).*$", re.MULTILINE)


def is_pcd(content: bytes) -> bool:
  """Whether a file begins as a PCD file does."""
  return re.match(rb"\s*(?:#[^\n]*\n\s*)*VERSION\s+\.?\d[^\n]*\n(?:#[^\n]*\n)*\s*FIELDS\s", content[:4096]) is not None


def read(content: bytes, name: str) -> Float[np.ndarray, "n c"]:
  """Coordinates, or coordinates and RGB from 0 to 1; points without a return (NaN) are left out, and said.

  Args:
    content: ascii, binary or binary_compressed.
    name: for errors and the log.

  Raises:
    ValueError: naming the file, if it is damaged or cut off, or has no x, y and z.
  """
  head, start = _header(content, name)
  try:
    sizes, counts = (list(map(int, head[key])) for key in ("size", "count"))
    points = int(head["points"][0]) if "points" in head else int(head["width"][0]) * int(head["height"][0])
    kind = head["data"][0]
    columns = [
      (field if count == 1 else f"{field} of {i}", f"<{code.lower()}{size}", (count,) if count > 1 else ())
      for i, (field, code, size, count) in enumerate(zip(head["fields"], head["type"], sizes, counts, strict=True))
    ]
    record = np.dtype(columns)
  except (KeyError, ValueError, TypeError, IndexError) as error:
    raise ValueError(f"{name}: a damaged header ({type(error).__name__}: {error})") from error
  if kind == "ascii":
    table = _table(content[start:].decode("latin-1"), None)
    if table.shape != (points, sum(counts)):
      raise ValueError(f"{name}: cut off or damaged, its header says {points} points of {sum(counts)} values and there "
                       f"are {table.shape[0]} of {table.shape[1]}")  # fmt: skip
    data = {f: table[:, sum(counts[:i])].astype(record[i]) for i, f in enumerate(record.names) if counts[i] == 1}
  else:
    data = _binary(content[start:], kind, record, points, name)
  if missing := [axis for axis in "xyz" if axis not in data]:
    raise ValueError(f"{name}: has no field {missing[0]!r}; its fields are {', '.join(head['fields'])}")
  out = np.stack([data[axis].astype(np.float64) for axis in "xyz"], axis=1)
  packed = data.get("rgb", data.get("rgba"))
  if packed is not None and packed.dtype.itemsize == 4:
    numbers = packed.view("<u4")
    out = np.concatenate([out, np.stack([numbers >> shift & 255 for shift in (16, 8, 0)], axis=1) / 255.0], axis=1)
  elif packed is None and (names := next((names for names in _COLOURS if set(names) <= data.keys()), None)):
    out = np.concatenate([out, _colours([data[colour] for colour in names])], axis=1)
  taken = {"x", "y", "z", "_", *(("rgb", "rgba", *sum(_COLOURS, ())) if out.shape[1] == 6 else ())}
  if left := [field for field in dict.fromkeys(head["fields"]) if field not in taken]:
    remark("columns of clouds", f"{name}: fields {', '.join(left)} are left out")
  there = np.isfinite(out).all(axis=1)
  if len(out) and not there.any():
    raise ValueError(f"{name}: all {len(out)} points are NaN, without a return")
  if not there.all():
    remark("points without a return", f"{name}: {int((~there).sum())} of {len(out)} points are NaN and left out")
  return out[there]


def _colours(columns: list[np.ndarray]) -> np.ndarray:
  """RGB from 0 to 1: 1 is the largest value of integers of 8 and 16 bits, and of others 1 or 255."""
  values = np.stack(columns, axis=1)
  if values.dtype.kind == "u" and values.dtype.itemsize <= 2:
    return values / float(np.iinfo(values.dtype).max)
  return values / (1.0 if values.dtype.kind == "f" and not np.nanmax(values) > 1 else 255.0)


def _header(content: bytes, name: str) -> tuple[dict[str, list[str]], int]:
  head: dict[str, list[str]] = {}
  start = 0
  while "data" not in head:
    end = content.find(b"\n", start)
    if end < 0 or end > 1 << 16:
      raise ValueError(f"{name}: cut off or damaged in its header, which ends with DATA")
    words = content[start:end].decode("latin-1").split()
    if words and not words[0].startswith("#"):
      head[words[0].lower()] = words[1:]
    start = end + 1
  if lacking := [key for key in _FIELDS if not head.get(key) and key != "points"]:
    raise ValueError(f"{name}: its header has no {lacking[0].upper()}")
  return head | {"count": head.get("count") or ["1"] * len(head["fields"])}, start


def _binary(content: bytes, kind: str, record: np.dtype, points: int, name: str) -> dict[str, np.ndarray]:
  if kind == "binary_compressed":
    sizes = np.frombuffer(content[:8].ljust(8, b"\0"), "<u4")
    packed, whole = int(sizes[0]), int(sizes[1])
    if whole != points * record.itemsize or packed > len(content) - 8:
      raise ValueError(f"{name}: cut off or damaged, {len(content) - 8} bytes of {packed} compressed ones")
    content = _unpacked(content[8 : 8 + packed], whole, name)
  elif kind != "binary":
    raise ValueError(f"{name}: DATA {kind!r}; allowed: ascii, binary, binary_compressed")
  if points * record.itemsize > len(content):
    raise ValueError(f"{name}: cut off, its header says {points} points of {record.itemsize} bytes and there are "
                     f"{len(content)} bytes")  # fmt: skip
  if kind == "binary":
    rows = np.frombuffer(content, record, points)
    return {field: np.ascontiguousarray(rows[field]) for field in record.names}
  out, at = {}, 0
  for field in record.names:  # compressed files hold field by field
    kind, values = record[field].base, points * (record[field].itemsize // record[field].base.itemsize)
    out[field] = np.frombuffer(content, kind, values, at)
    at += points * record[field].itemsize
  return out


def _unpacked(packed: bytes, whole: int, name: str) -> bytes:
  """Marc Lehmann's LZF: runs of literals, and copies of what was there before."""
  out, at = bytearray(), 0
  try:
    while at < len(packed) and len(out) <= whole:
      control, at = packed[at], at + 1
      if control < 32:
        out += packed[at : at + control + 1]
        at += control + 1
        continue
      length = control >> 5
      if length == 7:
        length, at = length + packed[at], at + 1
      back = len(out) - ((control & 31) << 8 | packed[at]) - 1
      at += 1
      if back < 0:
        raise IndexError
      for place in range(back, back + length + 2):
        out.append(out[place])
  except IndexError:
    raise ValueError(f"{name}: its compressed data are damaged") from None
  if len(out) != whole:
    raise ValueError(f"{name}: its compressed data are {len(out)} bytes, {whole} are needed")
  return bytes(out)


def is_table(content: bytes) -> bool:
  """Whether the first line that is no comment has numbers alone, or names of columns."""
  text = _COMMENT.sub("", content[:4096].decode("latin-1")).strip()
  words = re.split(r"[\s,;]+", text.splitlines()[0].strip().lower()) if text else []
  return bool(words) and (all(map(_is_number, words)) or {"x", "y", "z"} <= set(words) <= _NAMES)


def read_table(content: bytes, name: str) -> Float[np.ndarray, "n c"]:
  """Coordinates, or coordinates and RGB from 0 to 1, of lines of numbers.

  Lines of 3 numbers are coordinates, of 4 with an intensity, of 6 with colours (from 0 to 255 or from 0 to 1) or, where
  some are negative or all have length 1, normals, and of 7 with an intensity and colours. Intensities and normals are
  left out, and said. A first line that names the columns, or counts the points (.pts), is understood.

  Args:
    content: of the file, separated by blanks, commas or semicolons; # and // begin comments.
    name: for errors and the log.

  Raises:
    ValueError: naming the file, if it is no such table.
  """
  text = _COMMENT.sub("", content.decode("latin-1")).strip()
  first, _, rest = text.partition("\n")
  words = re.split(r"[\s,;]+", first.strip().lower())
  mark = next((mark for mark in ",;" if mark in first), None)
  names = [] if _is_number(words[0]) else words
  counted = len(words) == 1 and words[0].isdigit()
  try:
    table = _table(rest if names or counted else text, mark)
  except ValueError as error:
    raise ValueError(f"{name}: not a table of numbers ({error})") from error
  if counted and len(table) != int(words[0]):
    raise ValueError(f"{name}: cut off, its first line says {words[0]} points and there are {len(table)}")
  if names:
    if len(names) != table.shape[1]:
      raise ValueError(f"{name}: names {len(names)} columns and has {table.shape[1]}")
    short = [{"red": "r", "green": "g", "blue": "b"}.get(word, word) for word in names]
    chosen = [short.index(axis) for axis in "xyz"]
    chosen += [short.index(colour) for colour in "rgb"] if {"r", "g", "b"} <= set(short) else []
  else:
    known = {3: [0, 1, 2], 4: [0, 1, 2], 6: [0, 1, 2, 3, 4, 5], 7: [0, 1, 2, 4, 5, 6]}
    if table.shape[1] not in known:
      raise ValueError(f"{name}: lines of {table.shape[1]} numbers; allowed: 3 (x y z), 4, 6 or 7, or a first line "
                       "that names the columns")  # fmt: skip
    chosen = known[table.shape[1]]
    if len(chosen) == 6:
      last = table[:, chosen[3:]]
      if (last < 0).any() or (np.abs(np.linalg.norm(last, axis=1) - 1) < _UNIT).all():
        chosen = chosen[:3]
  if len(chosen) < table.shape[1]:
    left = [names[i] if names else f"{i + 1}" for i in range(table.shape[1]) if i not in chosen]
    remark("columns of clouds", f"{name}: columns {', '.join(left)} (intensities or normals) are left out")
  out = table[:, chosen]
  if len(chosen) == 6 and out[:, 3:].max() > 1:
    out[:, 3:] /= 255.0
  return out


def _table(text: str, mark: str | None) -> np.ndarray:
  if not text.strip():
    return np.zeros((0, 3))
  return np.loadtxt(io.StringIO(text), delimiter=mark, ndmin=2, comments=None)


def _is_number(word: str) -> bool:
  try:
    float(word)
  except ValueError:
    return False
  return True

"""The length of MP3 files that do not tell it, or not rightly: libsndfile goes by their beginning alone."""

from __future__ import annotations

import dataclasses
import re

_RATES = (44_100, 48_000, 32_000)
_KILOBITS = {  # MPEG version 1, and 2 and 2.5
  True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
  False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_SEARCHED = 1 << 16  # bytes for the first frame


@dataclasses.dataclass(frozen=True)
class Frames:
  """The frames of a file.

  Attributes:
    start: where the first one lies.
    parts: (start, stop) of the frames of sound; several where files were put one behind another. Of a last frame that
      is cut off, its beginning belongs to none.
    count: of whole frames of sound.
    samples: a frame.
    tells: the first frame tells the length, in a header by Xing, LAME or Fraunhofer.
    cut: the last frame is not whole.
    kinds: of how many rates and channels the parts are.
    ends: nothing but tags is behind the last frame, or a part of one.
  """

  start: int
  parts: tuple[tuple[int, int], ...]
  count: int
  samples: int
  tells: bool
  cut: bool
  kinds: int
  ends: bool


def frames(content: bytes) -> Frames | None:
  """The frames of layer III; None if there are none."""
  start = first = _first(content, _behind_tag(content, 0))
  if first is None:
    return None
  parts, count, cut, kinds = [], 0, False, set()
  while start is not None:
    at = start
    while (size := _size(content, at)) and at + size <= len(content):
      if _is_head(content, at):
        if at > start:
          parts.append((start, at))
        start = at + size
      else:
        count += 1
      kinds.add((content[at + 1] & 0x18, content[at + 2] & 0b1100, content[at + 3] >> 6 == 3))
      at += size
    cut = bool(size)
    if at > start:
      parts.append((start, at))
    after = _behind_tag(content, at)  # the tags between two files, and zeros
    start = _first(content, after, 1) if after > at else None
  per_frame = 1152 if content[first + 1] & 8 else 576
  ends = cut or after >= len(content)
  return Frames(first, tuple(parts), count, per_frame, _is_head(content, first), cut, len(kinds), ends)


def with_length(content: bytes, found: Frames) -> bytes:
  """The frames behind one more that tells their number, as Xing's encoder writes it."""
  version_1, mono = bool(content[found.start + 1] & 8), content[found.start + 3] >> 6 == 3
  rate = content[found.start + 2] & 0b1100
  head = bytes([0xFF, content[found.start + 1] | 1, 9 << 4 | rate, content[found.start + 3]])
  frame = bytearray(_size(head, 0))
  frame[:4] = head
  side = (17 if mono else 32) if version_1 else (9 if mono else 17)
  tag = b"Xing" + (1).to_bytes(4, "big") + found.count.to_bytes(4, "big")
  frame[4 + side : 4 + side + len(tag)] = tag
  return bytes(frame) + b"".join(content[start:stop] for start, stop in found.parts)


def _is_head(content: bytes, at: int) -> bool:
  """Whether the frame that begins here holds the length and no sound."""
  version_1, mono = bool(content[at + 1] & 8), content[at + 3] >> 6 == 3
  side = at + 4 + ((17 if mono else 32) if version_1 else (9 if mono else 17))
  return any(content[place : place + 4] in (b"Xing", b"Info") for place in (side, side + 2)) or (
    content[at + 36 : at + 40] == b"VBRI")  # fmt: skip


def _first(content: bytes, at: int, within: int = _SEARCHED) -> int | None:
  """The first of two frames in a row that begins in so many bytes from here."""
  for place in range(at, min(at + within, len(content))):
    if (size := _size(content, place)) and _size(content, place + size):
      return place
  return None


def _behind_tag(content: bytes, at: int) -> int:
  """Where tags (ID3 in both versions, APE) that begin here end."""
  while True:
    if content[at : at + 3] == b"ID3" and len(content) > at + 10:
      at += 10 + sum((byte & 127) << (7 * place) for place, byte in enumerate(content[at + 9 : at + 5 : -1]))
    elif content[at : at + 3] == b"TAG":
      at += 128
    elif content[at : at + 8] == b"APETAGEX" and content[at + 23 : at + 24] and content[at + 23] & 0x20:
      at += 32 + int.from_bytes(content[at + 12 : at + 16], "little")
    elif zeros := re.match(rb"\0+", content[at : at + _SEARCHED]):
      at += zeros.end()
    else:
      return at


def _size(content: bytes, at: int) -> int:
  """Bytes of the frame that begins here; 0 if none does."""
  if at + 4 > len(content) or content[at] != 0xFF or content[at + 1] & 0xE6 != 0xE2:
    return 0
  version, kilobits, rate = content[at + 1] >> 3 & 3, content[at + 2] >> 4, content[at + 2] >> 2 & 3
  if version == 1 or kilobits in (0, 15) or rate == 3:
    return 0
  hertz = _RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
  return (144 if version == 3 else 72) * 1000 * _KILOBITS[version == 3][kilobits] // hertz + (content[at + 2] >> 1 & 1)

"""The length of MP3 files that do not tell it: libsndfile guesses it by the first frames, and reads no more."""

from __future__ import annotations

import dataclasses

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
    start, stop: where they lie; of a last frame that is cut off, its beginning.
    count: of whole frames.
    samples: a frame.
    tells: the first frame tells the length, in a header by Xing, LAME or Fraunhofer.
    cut: the last frame is not whole.
  """

  start: int
  stop: int
  count: int
  samples: int
  tells: bool
  cut: bool


def frames(content: bytes) -> Frames | None:
  """The frames of layer III; None if there are none."""
  at = 0
  if content[:3] == b"ID3" and len(content) > 10:
    at = 10 + sum((byte & 127) << (7 * place) for place, byte in enumerate(content[9:5:-1]))
  end = min(at + _SEARCHED, len(content))
  while at < end and not (_size(content, at) and _size(content, at + _size(content, at))):
    at += 1
  if at >= end:
    return None
  start, count = at, 0
  tells = any(mark in content[at : at + 256] for mark in (b"Xing", b"Info", b"VBRI"))
  while (size := _size(content, at)) and at + size <= len(content):
    at, count = at + size, count + 1
    if tells:
      break
  return Frames(start, at, count, 1152 if content[start + 1] & 8 else 576, tells, bool(size) and not tells)


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
  return bytes(frame) + content[found.start : found.stop]


def _size(content: bytes, at: int) -> int:
  """Bytes of the frame that begins here; 0 if none does."""
  if at + 4 > len(content) or content[at] != 0xFF or content[at + 1] & 0xE6 != 0xE2:
    return 0
  version, kilobits, rate = content[at + 1] >> 3 & 3, content[at + 2] >> 4, content[at + 2] >> 2 & 3
  if version == 1 or kilobits in (0, 15) or rate == 3:
    return 0
  hertz = _RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
  return (144 if version == 3 else 72) * 1000 * _KILOBITS[version == 3][kilobits] // hertz + (content[at + 2] >> 1 & 1)

"""Files of pictures, made chunk by chunk where no library writes them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

TURN = 6  # EXIF: the camera was held so that the picture is to be turned clockwise by a quarter


def encoded(picture, kind, **options):
  """The bytes of an array or PIL picture."""
  out = io.BytesIO()
  (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(out, kind, **options)
  return out.getvalue()


def turned(array, kind, turn=TURN):
  """A file that says how the camera was held."""
  exif = Image.Exif()
  exif[0x0112] = turn
  return encoded(array, kind, **({"tiffinfo": {0x0112: turn}} if kind == "TIFF" else {"exif": exif}))


def png(width, height, bits, colour, rows, *chunks):
  """A PNG of packed rows, with further chunks before them."""
  part = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
  header = part(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
  content = part(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
  middle = b"".join(part(*chunk) for chunk in chunks)
  return b"\x89PNG\r\n\x1a\n" + header + middle + content + part(b"IEND", b"")


def grey16(values, *chunks):
  """A PNG of 16-bit grey."""
  values = np.asarray(values)
  return png(values.shape[1], values.shape[0], 16, 0, [row.astype(">u2").tobytes() for row in values], *chunks)


def tiff(values, bits, sample_format, photometric=1, order="<", turn=1, pages=1, preview=False):
  """A TIFF of these values in one strip, as programs write it; `preview` makes its first page black and a preview."""
  values = np.asarray(values)
  height, width, *channels = values.shape
  count = channels[0] if channels else 1
  kind = {1: "u", 2: "i", 3: "f"}[sample_format]
  data = values.astype(f"{order}{kind}{bits // 8}").tobytes()
  word = order
  out = (b"II" if order == "<" else b"MM") + struct.pack(f"{word}HI", 42, 8)
  at = 8
  for page in range(pages):
    tags = [
      (254, 4, (int(preview and not page),)), (256, 4, (width,)), (257, 4, (height,)), (258, 3, (bits,) * count),
      (259, 3, (1,)), (262, 3, (photometric,)), (273, 4, (0,)), (274, 3, (turn,)), (277, 3, (count,)),
      (278, 4, (height,)), (279, 4, (len(data),)), (339, 3, (sample_format,) * count),
    ]  # fmt: skip
    size = 2 + 12 * len(tags) + 4
    extra, entries = b"", b""
    begin = at + size
    strip = begin + 2 * 2 * count * (count > 2)
    for tag, kind, content in tags:
      content = (strip,) if tag == 273 else content
      packed = struct.pack(f"{word}{len(content)}{'HI'[kind == 4]}", *content)
      if len(packed) > 4:
        packed, extra = struct.pack(f"{word}I", begin + len(extra)), extra + packed
      entries += struct.pack(f"{word}HHI", tag, kind, len(content)) + packed.ljust(4, b"\0")
    after = strip + len(data)
    out += struct.pack(f"{word}H", len(tags)) + entries + struct.pack(f"{word}I", after * (page < pages - 1)) + extra
    out += bytes(len(data)) if preview and not page else data
    at = after
  return out


def twelve_bits(values):
  """A TIFF of 12-bit grey, two values in three bytes."""
  values = np.asarray(values)
  pairs = values.reshape(-1, 2).tolist()
  packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
  whole = bytearray(tiff(values, 16, 1))
  for tag, kind, content in ((258, 3, 12), (279, 4, len(packed))):
    at = whole.find(struct.pack("<HHI", tag, kind, 1)) + 8
    whole[at : at + 4] = struct.pack("<I", content)
  return bytes(whole[: len(whole) - 2 * values.size]) + packed

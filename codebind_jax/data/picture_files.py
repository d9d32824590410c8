"""Picture files through Pillow: the formats named here and no others, of a bounded size, as the camera was held."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageOps

from codebind_jax.data.reading import file_errors, name_of, opened_file, refuse_special, remark

# Others that Pillow knows start programs (EPS), are no pictures (HDF5, MPEG) or are read wrongly or not at all.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "PPM", "JPEG2000")
# Beginnings of files that are often taken for pictures, for the message.
_OTHERS = {b"%!PS": "PostScript", b"\xc5\xd0\xd3\xc6": "PostScript", b"%PDF": "PDF", b"8BPS": "Photoshop",
           b"v/1\x01": "OpenEXR", b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL", b"\x00\x00\x01\x00": "an icon",
           b"<svg": "SVG", b"<?xml": "XML or SVG", b"<!DOCTYPE": "HTML", b"<html": "HTML", b"II\x2b\0": "BigTIFF",
           b"#?RADIANCE": "Radiance HDR", b"\x89HDF": "HDF5", b"version https://": "a Git LFS pointer"}  # fmt: skip
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_PAGE_TAG, _REDUCED = 254, 5  # of TIFF; a smaller copy, or a mask, of another page
PIXELS = 89_478_485  # as many as Pillow opens without a warning; as RGB they take a gigabyte while they are read
_MOST = {"WEBP": 1 << 25, "AVIF": 1 << 25, "JPEG2000": 25_000_000}  # whose decoders take more of it
SIDE = 2**16  # longest side, for tables of resize weights; JPEG and AVIF end there as well
_TURNS = frozenset(("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"))  # keys of `info` that can tell a turn


@functools.cache
def _known(formats: Sequence[str]) -> tuple[str, ...]:
  """Those of the formats that this Pillow reads."""
  Image.init()
  return tuple(kind for kind in formats if kind in Image.OPEN)


def head_of(value: str | Path | bytes) -> bytes:
  """The first 32 bytes."""
  if isinstance(value, bytes):
    return value[:32]
  with opened_file(value) as file:
    return file.read(32)


def kind_of(value: str | Path | bytes) -> str:
  """What a file is that is none of `FORMATS`, as far as its beginning tells; "" otherwise."""
  head = head_of(value)
  if head[4:8] == b"ftyp" and head[8:12] in _HEIF:
    return "HEIC"
  fits = lambda magic: head.startswith(magic) or head.lstrip().startswith(magic)
  return next((kind for magic, kind in _OTHERS.items() if fits(magic)), "")


@contextlib.contextmanager
def opened(
  value: str | Path | bytes, kind: str = "image", what: str = "a readable image", formats: tuple[str, ...] = FORMATS,
  pixels: int = PIXELS,
) -> Iterator[Image.Image]:  # fmt: skip
  """A picture file, of which the header is read; what is raised while it is open is a ValueError with its name.

  Args:
    value: a path or the file's bytes.
    kind: what errors call bytes.
    what: what the file should be, for errors.
    formats: allowed, of `FORMATS`.
    pixels: largest number allowed, of one picture.

  Raises:
    ValueError: naming the file, if it is no picture of these formats, damaged, or larger.
  """
  name = name_of(value, kind)
  with file_errors(name, what):
    if not isinstance(value, bytes):
      refuse_special(value)
    try:
      picture = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value, formats=_known(formats))
    except Image.UnidentifiedImageError as error:
      other = kind_of(value)
      allowed = f"allowed are {', '.join(formats)}"
      raise ValueError(f"it is {other}; {allowed}" if other else f"{error}; {allowed}") from error
    with picture:
      if picture.format == "GIF" and (extent := _gif_extent(value)) > pixels:
        raise ValueError(f"frames that reach over {extent} pixels, allowed are {pixels}")
      allowed = min(pixels, _MOST.get(str(picture.format), pixels))
      if picture.width * picture.height > allowed:
        raise ValueError(f"{picture.width} x {picture.height} pixels, allowed are {allowed}")
      if max(picture.size) > SIDE:
        raise ValueError(f"{picture.width} x {picture.height} pixels, allowed are sides of up to {SIDE}")
      yield picture


def _gif_extent(value: str | Path | bytes) -> int:
  """Pixels to which a GIF's frames reach, as Pillow makes its canvas larger for one that lies beyond it."""
  with opened_file(value) as file:
    head = file.read(13)
    width, height = int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")
    file.seek(3 << (head[10] & 7) + 1 if head[10:11] and head[10] & 0x80 else 0, os.SEEK_CUR)
    while kind := file.read(1):
      if kind == b"\x2c":
        place = file.read(9)
        if len(place) < 9:
          break
        left, top, wide, high = (int.from_bytes(place[at : at + 2], "little") for at in (0, 2, 4, 6))
        width, height = max(width, left + wide), max(height, top + high)
        file.seek((3 << (place[8] & 7) + 1 if place[8] & 0x80 else 0) + 1, os.SEEK_CUR)
      elif kind == b"\x21":
        file.seek(1, os.SEEK_CUR)
      else:  # Pillow looks for the next mark behind what it does not know
        continue
      while (length := file.read(1)) and length[0]:
        file.seek(length[0], os.SEEK_CUR)
  return width * height


def is_picture(value: str | Path | bytes) -> bool:
  """Whether a file is a picture of `FORMATS`, also one that is too large to be read."""
  try:
    if not isinstance(value, bytes):
      refuse_special(value)
    with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value, formats=_known(FORMATS)):
      return True
  except (Image.DecompressionBombError, Image.DecompressionBombWarning):
    return True
  except Exception:
    return False


def upright(picture: Image.Image, name: str = "image") -> Image.Image:
  """With the camera's turn (EXIF or XMP) applied; a turn that cannot be read is said and taken as none.

  Args:
    picture: loaded, as PNG may tell the turn after the pixels; TIFF is turned by Pillow when it is loaded.
    name: for the log.
  """
  if picture.format == "JPEG" and not picture.info.keys() & _TURNS:
    return picture
  try:
    return ImageOps.exif_transpose(picture)
  except Exception as error:
    remark("unreadable EXIF data", f"{name}: its EXIF data cannot be read ({error}); it is taken as not turned")
    return picture


def pages(picture: Image.Image) -> list[int]:
  """Numbers of the pictures that a file holds; not of previews that a camera's JPEG or a TIFF has beside its picture.

  The picture that is no part of a PNG's animation, for programs that know none, does not count either. A TIFF is left
  at the first of its pages.
  """
  count = getattr(picture, "n_frames", 1)
  if count == 1 or picture.format in ("JPEG", "MPO"):
    return [0]
  if picture.format == "TIFF":
    whole = []
    for number in range(count):
      picture.seek(number)
      if not picture.tag_v2.get(_PAGE_TAG, 0) & _REDUCED:
        whole.append(number)
    picture.seek(whole[0] if whole else 0)
    return whole or [0]
  return list(range(int(getattr(picture, "default_image", False)), count))


def gif_ends(value: str | Path | bytes) -> bool:
  """Whether a GIF has its end mark, perhaps before zeros and line ends; one that is cut has none."""
  with opened_file(value) as file:
    file.seek(max(0, file.seek(0, os.SEEK_END) - 1024))
    tail = file.read()
  return tail.rstrip(b"\0\r\n ").endswith(b";")


def packing(picture: Image.Image) -> str:
  """Pillow's name of how a file that is not loaded packs its values, such as "RGB;16B"; "" where it has none."""
  args = picture.tile[0][3] if getattr(picture, "tile", None) else ""
  first = args[0] if isinstance(args, tuple) and args else args
  return first if isinstance(first, str) else ""


def unscaled(picture: Image.Image) -> bool:
  """Whether a PPM's numbers are as in the file: Pillow scales them to 16 bits where white is not 65535; not of PFM."""
  return picture.mode != "F" and all(tile[0] == "raw" for tile in picture.tile)

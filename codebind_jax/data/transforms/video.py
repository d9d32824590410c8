"""Video: 16 frames, evenly spaced in time, of a film, an animated picture, a folder of frames or an array."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from codebind_jax.data import films, picture_files
from codebind_jax.data.reading import file_errors, name_of, remark, unmasked
from codebind_jax.data.transforms import image

# Changes whenever the same input would give other pixels: it is part of the key of cached features.
REVISION = f"video-2 {image.REVISION}"
FRAMES = 16
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2")
_ALL = 2**33  # pixels of all frames of an animation, which are decoded one after the other
_CANVAS = 2**25  # pixels of an animation, of which several copies are held
_UNTIMED = 0.1  # seconds that a browser shows a picture of an animation that says 0
_Choose = Callable[[int, float | None], list[list[int]]]


def spaced(count: int, wanted: int) -> list[int]:
  """Up to `wanted` of `count` frames, at the middles of equal parts.

  >>> spaced(72, 4)
  [9, 27, 45, 63]
  """
  return sorted({int((k + 0.5) * count / wanted) for k in range(wanted)})


def read(value: Any, frames: int = FRAMES) -> UInt8[np.ndarray, "t h w 3"]:
  """RGB frames of a video, at most `frames` of them, evenly spaced in time; transparency is laid on white.

  A film is turned as its display matrix says, and has square pixels. A frame that is shown longer than others is there
  as often as its time asks for; otherwise none is there twice.

  Args:
    value: a path or the bytes of a film (mp4, webm, mov, ... through PyAV) or of an animated WebP, GIF, PNG or AVIF; a
      folder of pictures, taken by name (2.png before 10.png); or an array [t, h, w, 3] (uint8, or float in 0 to 1).
    frames: the largest number returned.

  Raises:
    ValueError: naming the file, if it cannot be read, has no frames, or frames differ in size.
    ImportError: for a film, where PyAV is not installed.
  """
  name, wanted, found = _frames(value, lambda count, rate: [spaced(count, frames)], "[t, h, w, 3]")
  return _stack([found[i] for i in wanted[0]], name)


def clip_frames(
  count: int, rate: float | None, clips: int, seconds: float = 2.0, frames: int = 2
) -> list[list[int]]:
  """Frames of clips that begin evenly spaced, the last one at the video's end: the first, the last and, between, even.

  Args:
    count: frames of the video.
    rate: frames a second; None for a sequence without a rate, which is cut into equal parts.
    clips: how many; a video shorter than one is taken whole, as often.
    seconds: length of a clip; infinity for the whole video.
    frames: of each clip.

  >>> clip_frames(90, 30.0, 3)
  [[0, 59], [15, 74], [30, 89]]
  """
  out = []
  for k in range(clips):
    if rate:
      start = k * max(count / rate - seconds, 0.0) / max(clips - 1, 1)
      first, stop = math.ceil(rate * start), math.ceil(min(rate * (start + seconds), count))
    else:
      first, stop = k * count // clips, (k + 1) * count // clips
    first = min(first, count - 1)
    length = max(stop - first, 1)
    out.append([first + int(at) for at in np.linspace(0, length - 1, frames)])
  return out


def read_clips(value: Any, clips: int = 5, seconds: float = 2.0, frames: int = 2) -> UInt8[np.ndarray, "s n h w 3"]:
  """RGB frames of evenly spaced clips of a video, see `clip_frames`.

  Args:
    value: as of `read`; a folder or an array [t, h, w, 3] has no rate. An array [s, n, h, w, 3] is returned as it is.
    clips: s, how many.
    seconds: length of a clip; infinity for the whole video.
    frames: n, of each clip.

  Raises:
    ValueError, ImportError: as `read` does.
  """
  if hasattr(value, "__array__"):
    array = unmasked(value, "video")
    if array.ndim == 5 and array.dtype == np.uint8 and array.shape[-1] == 3 and 0 not in array.shape:
      return array
  choose = lambda count, rate: clip_frames(count, rate, clips, seconds, frames)
  name, wanted, found = _frames(value, choose, "[t, h, w, 3] or uint8 [s, n, h, w, 3]")
  return np.stack([_stack([found[i] for i in clip], name) for clip in wanted])


def check(path: Path) -> None:
  """Raises a ValueError naming the file if it is no video; no frame is decoded."""
  name = name_of(path, "video")
  with file_errors(name, "a readable video"):
    if Path(path).is_dir():
      image.check(_pictures(Path(path))[0])
    elif not Path(path).is_file():
      raise ValueError(f"{name}: no such file or folder")
    elif picture_files.is_picture(path):
      image.check(path)
    else:
      films.check(path)


def _frames(value: Any, choose: _Choose, shapes: str) -> tuple[str, list[list[int]], dict[int, np.ndarray]]:
  """Name, numbers of the wanted frames, and these frames.

  Args:
    value: as of `read`.
    choose: (number of frames, frames a second or None) -> numbers of the wanted ones.
    shapes: of arrays that are allowed, for errors.
  """
  if isinstance(value, (str, Path, bytes)):
    name = name_of(value, "video")
    with file_errors(name, "a readable video"):
      if not isinstance(value, bytes) and Path(value).is_dir():
        return name, *_from_folder(Path(value), choose)
      if not isinstance(value, bytes) and not Path(value).is_file():
        raise ValueError(f"{name}: no such file or folder")
      if picture_files.is_picture(value):
        return name, *_from_picture(value, name, choose)
      return name, *films.frames(value, choose)
  if not hasattr(value, "__array__"):
    raise ValueError(f"video: got {type(value).__name__}, allowed are a path, bytes or an array")
  array = unmasked(value, "video")
  if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
    raise ValueError(f"video: got an array of shape {array.shape}, allowed is {shapes} that is not empty")
  wanted = choose(len(array), None)
  return "video", wanted, {i: image.read(array[i]) for part in wanted for i in part}


def _natural(path: Path) -> list[tuple[int, int | str]]:
  """Sorts names by the numbers in them: 2.png before 10.png."""
  return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", path.name) if part]


def _pictures(folder: Path) -> list[Path]:
  there = [path for path in folder.iterdir() if path.suffix.lower() in _PICTURES and not path.name.startswith(".")]
  pictures = sorted((path for path in there if path.is_file()), key=lambda path: (_natural(path), path.name))
  if not pictures:
    raise ValueError(f"{folder}: no frames; allowed are files ending in {', '.join(_PICTURES)}")
  series = sorted({re.sub(r"\d+", "#", path.name) for path in pictures})
  if len(series) > 1:
    remark("folders of frames", f"{folder}: all {len(pictures)} pictures are taken as frames, though their names are "
           f"of {len(series)} kinds: {', '.join(series[:4])}")  # fmt: skip
  return pictures


def _stack(pictures: Sequence[np.ndarray], name: str) -> np.ndarray:
  sizes = {picture.shape for picture in pictures}
  if len(sizes) != 1:
    raise ValueError(f"{name}: frames differ in size: {sorted(sizes)}")
  out = np.empty((len(pictures), *pictures[0].shape), np.uint8)
  for i, picture in enumerate(pictures):
    out[i] = picture
  return out


def _from_folder(folder: Path, choose: _Choose) -> tuple[list[list[int]], dict[int, np.ndarray]]:
  pictures = _pictures(folder)
  wanted = choose(len(pictures), None)
  found: dict[int, np.ndarray] = {}
  for i in sorted({i for part in wanted for i in part}):
    found[i] = image.read(pictures[i])
    height, width = found[i].shape[:2]
    films.check_size(width, height, sum(map(len, wanted)), str(folder))
  return wanted, found


def _from_picture(
  value: str | Path | bytes, name: str, choose: _Choose
) -> tuple[list[list[int]], dict[int, np.ndarray]]:
  """Frames of an animation, a still picture being one; what is shown unequally long is read a second time, by time."""
  with picture_files.opened(value, "video", "a readable animation") as picture:
    films.check_size(picture.width, picture.height, 1, name)
    numbers = picture_files.pages(picture)
    if picture.width * picture.height * len(numbers) > _ALL:
      raise ValueError(f"{name}: {len(numbers)} frames of {picture.width} x {picture.height} pixels, allowed are "
                       f"{_ALL} pixels of all together")  # fmt: skip
    if len(numbers) > 1 and picture.width * picture.height > _CANVAS:
      raise ValueError(f"{name}: an animation of {picture.width} x {picture.height} pixels, allowed are {_CANVAS}")
    if len(numbers) == 1:
      return choose(1, None), {0: image.read(value)}
    if picture.format == "GIF" and not picture_files.gif_ends(value):
      remark("damaged films", f"{name}: has no end mark, as if it were cut; the {len(numbers)} frames that are there "
             "are taken")  # fmt: skip
    picture.seek(numbers[0])
    picture.load()  # only then some kinds tell how long a frame is shown
    rate = 1000.0 / duration if (duration := picture.info.get("duration")) else None
    wanted = choose(len(numbers), rate)
    needed = {i for part in wanted for i in part}
    films.check_size(picture.width, picture.height, sum(map(len, wanted)), name)
    found, seconds = {}, np.zeros(len(numbers))
    for i, number in enumerate(numbers):
      picture.seek(number)
      picture.load()
      seconds[i] = (picture.info.get("duration") or 0) / 1e3 or _UNTIMED
      if i in needed:
        found[i] = image.read(picture)
    steps, counted = films.clock(seconds)
    if len(steps) == len(numbers):
      return wanted, found
    wanted = [[int(steps[i]) for i in part] for part in choose(len(steps), counted)]
    for i in sorted({i for part in wanted for i in part} - set(found)):
      picture.seek(numbers[i])
      found[i] = image.read(picture)
    return wanted, found


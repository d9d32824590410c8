"""Video: 16 evenly spaced frames of a film, an animated picture, a folder of frames or an array."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from codebind_jax.data.transforms import image

# Changes whenever the same input would give other pixels: it is part of the key of cached features.
REVISION = f"video-1 {image.REVISION}"
FRAMES = 16
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_NEEDS_AV = "needs the package av (PyAV): pip install av"


def spaced(count: int, wanted: int) -> list[int]:
  """Up to `wanted` of `count` frames, at the middles of equal parts.

  >>> spaced(72, 4)
  [9, 27, 45, 63]
  """
  return sorted({int((k + 0.5) * count / wanted) for k in range(wanted)})


def read(value: Any, frames: int = FRAMES) -> UInt8[np.ndarray, "t h w 3"]:
  """RGB frames of a video, at most `frames` of them, evenly spaced; transparency is laid on white.

  Args:
    value: a path or the bytes of a film (mp4, webm, mov, ... through PyAV) or of an animated WebP, GIF or PNG; a folder
      of pictures, taken by name; or an array [t, h, w, 3] (uint8, or float in 0 to 1).
    frames: the largest number returned.

  Raises:
    ValueError: naming the file, if it cannot be read, has no frames, or frames differ in size.
    ImportError: for a film, where PyAV is not installed.
  """
  if isinstance(value, (str, Path)) and Path(value).is_dir():
    return _from_folder(Path(value), frames)
  if isinstance(value, (str, Path, bytes)):
    name = "video bytes" if isinstance(value, bytes) else str(value)
    if not isinstance(value, bytes) and not Path(value).is_file():
      raise ValueError(f"{name}: no such file or folder")
    source = io.BytesIO(value) if isinstance(value, bytes) else value
    if _is_picture(source):
      return _from_picture(source, name, frames)
    return _from_film(source, name, frames)
  if not hasattr(value, "__array__"):
    raise ValueError(f"video: got {type(value).__name__}, allowed are a path, bytes or an array")
  array = np.asarray(value)
  if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
    raise ValueError(f"video: got an array of shape {array.shape}, allowed is [t, h, w, 3] that is not empty")
  return np.stack([image.read(array[i]) for i in spaced(len(array), frames)])


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
  if isinstance(value, (str, Path)) and Path(value).is_dir():
    pictures = _pictures(Path(value))
    wanted = clip_frames(len(pictures), None, clips, seconds, frames)
    found = {i: image.read(pictures[i]) for i in {i for clip in wanted for i in clip}}
    name = str(value)
  elif isinstance(value, (str, Path, bytes)):
    name = "video bytes" if isinstance(value, bytes) else str(value)
    if not isinstance(value, bytes) and not Path(value).is_file():
      raise ValueError(f"{name}: no such file or folder")
    source = io.BytesIO(value) if isinstance(value, bytes) else value
    choose = lambda count, rate: clip_frames(count, rate, clips, seconds, frames)
    wanted, found = (_picture_clips if _is_picture(source) else _film_clips)(source, name, choose)
  else:
    array, name = np.asarray(value), "video"
    if array.ndim == 5 and array.dtype == np.uint8 and array.shape[-1] == 3 and 0 not in array.shape:
      return array
    if not hasattr(value, "__array__") or array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
      raise ValueError(f"video: got {type(value).__name__} of shape {array.shape}, allowed are a path, bytes, or an "
                       "array [t, h, w, 3] that is not empty")  # fmt: skip
    wanted = clip_frames(len(array), None, clips, seconds, frames)
    found = {i: image.read(array[i]) for i in {i for clip in wanted for i in clip}}
  return np.stack([_stack([found[i] for i in clip], name) for clip in wanted])


def _picture_clips(source: Any, name: str, choose: Any) -> tuple[list[list[int]], dict[int, np.ndarray]]:
  try:
    with Image.open(source) as picture:
      count = getattr(picture, "n_frames", 1)
      picture.load()  # only then some kinds tell how long a frame is shown
      rate = 1000.0 / duration if (duration := picture.info.get("duration")) else None
      wanted, found = choose(count, rate), {}
      for index in sorted({i for clip in wanted for i in clip}):
        picture.seek(index)
        found[index] = image.read(picture.convert("RGBA"))
      return wanted, found
  except (OSError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(f"{name}: not a readable animation ({error})") from error


def _film_clips(source: Any, name: str, choose: Any) -> tuple[list[list[int]], dict[int, np.ndarray]]:
  with _open_film(source, name) as film:
    stream = film.streams.video[0]
    count, rate = stream.frames, float(stream.average_rate or 0)
  count = count or sum(1 for _ in _decoded(source, name))
  if not count:
    raise ValueError(f"{name}: has no frames")
  wanted, found, last = choose(count, rate or None), {}, None
  needed = {i for clip in wanted for i in clip}
  for index, frame in enumerate(_decoded(source, name)):
    if index in needed:
      found[index] = last = frame.to_ndarray(format="rgb24")
    if len(found) == len(needed):
      break
  if last is None:
    raise ValueError(f"{name}: has no frames")
  # A header may promise a few frames more than there are.
  return wanted, {index: found.get(index, last) for index in needed}


def check(path: Path) -> None:
  """Raises a ValueError naming the file if it is no video; one frame is decoded at most."""
  if Path(path).is_dir():
    _pictures(Path(path))
  elif not Path(path).is_file():
    raise ValueError(f"{path}: no such file or folder")
  elif not _is_picture(path):
    with _open_film(path, str(path)):
      pass


def _is_picture(source: Any) -> bool:
  try:
    with Image.open(source):
      return True
  except (UnidentifiedImageError, OSError, SyntaxError):
    return False
  finally:
    if isinstance(source, io.BytesIO):
      source.seek(0)


def _pictures(folder: Path) -> list[Path]:
  pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURES)
  if not pictures:
    raise ValueError(f"{folder}: no frames; allowed are files ending in {', '.join(_PICTURES)}")
  return pictures


def _stack(pictures: Sequence[np.ndarray], name: str) -> np.ndarray:
  sizes = {picture.shape for picture in pictures}
  if len(sizes) != 1:
    raise ValueError(f"{name}: frames differ in size: {sorted(sizes)}")
  return np.stack(pictures)


def _from_folder(folder: Path, frames: int) -> np.ndarray:
  pictures = _pictures(folder)
  return _stack([image.read(pictures[i]) for i in spaced(len(pictures), frames)], str(folder))


def _from_picture(source: Any, name: str, frames: int) -> np.ndarray:
  try:
    with Image.open(source) as picture:
      kept = []
      for index in spaced(getattr(picture, "n_frames", 1), frames):
        picture.seek(index)
        kept.append(image.read(picture.convert("RGBA")))
      return _stack(kept, name)
  except (OSError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(f"{name}: not a readable animation ({error})") from error


def _open_film(source: Any, name: str) -> Any:
  try:
    import av
  except ImportError as error:
    raise ImportError(f"{name}: reading films {_NEEDS_AV}") from error
  try:
    film = av.open(source)
  except (av.error.FFmpegError, OSError) as error:
    raise ValueError(f"{name}: not a readable video ({error})") from error
  if not film.streams.video:
    film.close()
    raise ValueError(f"{name}: has no video stream")
  return film


def _from_film(source: Any, name: str, frames: int) -> np.ndarray:
  """Evenly spaced frames of a film; one whose header does not give the count is decoded twice, first to count them."""
  with _open_film(source, name) as film:
    count = film.streams.video[0].frames
  count = count or sum(1 for _ in _decoded(source, name))
  if not count:
    raise ValueError(f"{name}: has no frames")
  wanted, kept = set(spaced(count, frames)), []
  for index, frame in enumerate(_decoded(source, name)):
    if index in wanted:
      kept.append(frame.to_ndarray(format="rgb24"))
    if len(kept) == len(wanted):
      break
  if not kept:
    raise ValueError(f"{name}: has no frames")
  return _stack(kept, name)


def _decoded(source: Any, name: str) -> Any:
  import av

  if isinstance(source, io.BytesIO):
    source.seek(0)
  with _open_film(source, name) as film:
    try:
      yield from film.decode(video=0)
    except av.error.FFmpegError as error:
      raise ValueError(f"{name}: damaged video ({error})") from error

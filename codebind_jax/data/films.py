"""Frames of films through PyAV: of the film and not its cover, by their times, in square pixels, as it was held.

No header is believed: the number of frames and their times are those of the packets that are there and are shown (an
mp4's edit list hides others), and a decoder takes no larger picture than is allowed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from codebind_jax.data import picture_files
from codebind_jax.data.reading import file_errors, name_of, refuse_special, remark

PIXELS = 2**26  # of a frame: 8192 x 8192
TOGETHER = 2**28  # of all frames that are asked for: 16 of 16 million
_NEEDS_AV = "needs the package av (PyAV): pip install av"
_WHAT = "a readable video"
# FFmpeg's names; others read text as pictures, follow addresses, or open devices.
_FORMATS = (
  "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,mpegts,mpeg,mpegvideo,m4v,ogg,asf,asf_o,mxf,nut,rm,wtv,dv,"
  "ivf,h264,hevc,obu,av1,vc1,yuv4mpegpipe,mp3,wav,flac,aac"
)
_FROM_ZERO = ("matroska,webm", "asf", "asf_o", "nut")  # FFmpeg's formats whose duration is not from the first frame
_STILL = ("mjpeg", "png", "bmp", "webp", "tiff")  # codecs of covers that are stored as if they were films
_LEAST_MISSING, _SHARE_MISSING = 1.5, 0.05  # frames, and share of the time, from which a film is said to be cut
_UNEVEN = 32  # a frame may be off its even place by this part of the whole time
_MOST_STEPS = 16  # of a clock, to each frame
_HDR = {16: "PQ", 18: "HLG"}  # FFmpeg's numbers of transfer functions
_ASPECT = 8  # largest ratio of a pixel's sides


def clock(seconds: Float[np.ndarray, "n"]) -> tuple[Int[np.ndarray, "m"], float]:
  """Which frame is shown at each step of an even clock, and its steps a second.

  Frames that are shown about equally long, each less than one frame off its even place, are the steps. Otherwise a step
  is as long as the shortest frame (but there are at most 16 to each frame), so that a long one is there several times.

  Args:
    seconds: how long each frame is shown, above 0.

  >>> clock(np.array([1.0, 3.0, 1.0]))[0].tolist()
  [0, 1, 1, 1, 2]
  """
  total, starts = float(seconds.sum()), np.cumsum(seconds) - seconds
  even = total / len(seconds)
  if np.abs(starts - even * np.arange(len(seconds))).max() <= min(even, total / _UNEVEN):
    return np.arange(len(seconds)), 1.0 / even
  steps = min(round(total / float(seconds.min())), _MOST_STEPS * max(len(seconds), 64))
  middles = (np.arange(steps) + 0.5) * total / steps
  return np.searchsorted(starts, middles, side="right") - 1, steps / total


@dataclasses.dataclass(frozen=True)
class _Times:
  """When the frames of a film are shown.

  Attributes:
    shown: their times in the stream's own unit, or their numbers where the film has no times.
    seconds: how long each is shown; empty where that is not known.
    rate: frames a second that the film says to have; 0 where it does not.
    timed: whether `shown` are times.
    aspect: width of a pixel divided by its height.
  """

  shown: np.ndarray
  seconds: np.ndarray
  rate: float
  timed: bool
  aspect: float = 1.0


def frames(
  value: str | Path | bytes, choose: Callable[[int, float | None], Sequence[Sequence[int]]]
) -> tuple[list[list[int]], dict[int, UInt8[np.ndarray, "h w 3"]]]:
  """Chosen frames of a film, RGB.

  Args:
    value: a path or the film's bytes.
    choose: (number of frames, frames a second or None) -> numbers of the wanted ones; both of an even clock where
      frames are shown unequally long.

  Returns:
    The wanted frames' numbers, and those frames.

  Raises:
    ValueError: naming the film, if it cannot be read or has no frames.
    ImportError: where PyAV is not installed.
  """
  name = name_of(value, "video")
  with file_errors(name, _WHAT):
    times = _times(value, name)
    if not len(times.shown):
      raise ValueError(f"{name}: has no frames")
    steps, rate = np.arange(len(times.shown)), times.rate
    if len(times.seconds):
      steps, counted = clock(times.seconds)
      rate = rate if rate and len(steps) == len(times.shown) else counted
    wanted = [[int(steps[i]) for i in part] for part in choose(len(steps), rate or None)]
    return wanted, _found(value, name, times, sorted({i for part in wanted for i in part}))


def check(value: str | Path | bytes) -> None:
  """Raises a ValueError naming the file if it is no film; no frame is decoded."""
  name = name_of(value, "video")
  with file_errors(name, _WHAT), _opened(value, name):
    pass


@contextlib.contextmanager
def _opened(value: str | Path | bytes, name: str) -> Iterator[tuple[Any, Any]]:
  """A film and its stream of pictures."""
  try:
    import av
  except ImportError as error:
    raise ImportError(f"{name}: reading films {_NEEDS_AV}") from error
  if (kind := picture_files.kind_of(value)) == "HEIC":
    raise ValueError(f"{name}: a {kind} picture is not read; export it as JPEG or PNG")
  if not isinstance(value, bytes):
    refuse_special(value)
  # With "file:" no part of a name is taken for a protocol.
  source = io.BytesIO(value) if isinstance(value, bytes) else f"file:{value}"
  limit = {"max_pixels": str(PIXELS)}
  try:
    with av.open(source, options=limit | {"format_whitelist": _FORMATS}, metadata_errors="replace") as film:
      stream = _of_pictures(film)
      if stream is None:
        raise ValueError(f"{name}: has no video stream")
      stream.codec_context.options = limit
      yield film, stream
  except av.error.FFmpegError as error:  # its "input/output error" is a damaged film's, not the machine's
    raise ValueError(f"{name}: not {_WHAT} ({error})") from error


def _of_pictures(film: Any) -> Any:
  """The stream that is the film: no cover, and where there are several the one to be shown by default, or the first."""
  from av.stream import Disposition

  no_film = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
  own = [stream for stream in film.streams.video if not stream.disposition & no_film]
  rank = lambda stream: (stream.codec_context.name not in _STILL, bool(stream.disposition & Disposition.default))
  return max(own, key=rank, default=None)


def _times(value: str | Path | bytes, name: str) -> _Times:
  """Of the packets, without decoding; of the decoded frames where packets have no times."""
  with _opened(value, name) as (film, stream):
    shown, lengths, end, broken = [], [], 0.0, 0
    for packet in film.demux():
      if not packet.size:
        continue
      if packet.pts is not None and packet.time_base is not None:
        end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
      if packet.stream_index == stream.index:
        broken += packet.is_corrupt
        if not (packet.is_corrupt or packet.is_discard):
          shown.append(packet.pts)
          lengths.append(packet.duration or 0)
    rate, unit = float(stream.average_rate or 0), float(stream.time_base or 1)
    aspect = float(stream.sample_aspect_ratio or 1)
    begin = (film.start_time or 0) / 1e6
    said = film.duration / 1e6 if film.duration else 0.0
    said -= begin if film.format.name in _FROM_ZERO else 0.0
  timed = None not in shown
  if not timed:
    shown = [frame.pts for frame in _decoded(value, name)]
    timed, lengths = None not in shown, [0] * len(shown)
  if not timed:
    return _Times(np.arange(len(shown)), np.zeros(0), rate, False, aspect)
  order = np.argsort(np.array(shown, np.int64), kind="stable")
  keys, first = np.unique(np.array(shown, np.int64)[order], return_index=True)
  seconds = np.diff(keys) * unit
  last = float(np.array(lengths)[order][first][-1] * unit) if len(keys) else 0.0
  usual = float(np.median(seconds)) if len(seconds) else 0.0
  seconds = np.append(seconds, last or usual or 1.0) if len(keys) else seconds
  missing = said - (end - begin)
  if broken or len(keys) and missing > max(_LEAST_MISSING * usual, _SHARE_MISSING * said):
    remark("damaged films", f"{name}: cut or damaged: {end - begin:.6g} of the {said:.6g} s that its header says are "
           f"there, {broken} packets are broken; frames are of what is there")  # fmt: skip
  return _Times(keys, seconds, rate, True, aspect)


def _decoded(value: str | Path | bytes, name: str) -> Iterator[Any]:
  """All frames that are shown; what is left of a packet that is cut is not decoded."""
  with _opened(value, name) as (film, stream):
    for packet in film.demux(stream):
      if not packet.is_corrupt:
        yield from packet.decode()


def _found(value: str | Path | bytes, name: str, times: _Times, wanted: list[int]) -> dict[int, np.ndarray]:
  """Frames by number: each is the last one that begins no later than its time."""
  waiting, found, before, number = list(wanted), {}, None, -1
  decoded = _decoded(value, name)
  with contextlib.closing(decoded):
    for number, frame in enumerate(decoded):
      check_size(frame.width, frame.height, len(wanted), name)
      at = frame.pts if times.timed and frame.pts is not None else times.shown[min(number, len(times.shown) - 1)]
      while waiting and times.shown[waiting[0]] < at:
        found[waiting.pop(0)] = _pixels(frame if before is None else before, name, times.aspect)
      if not waiting:
        return found
      before = frame
  if before is None:
    raise ValueError(f"{name}: has no frames")
  if len(waiting) > 1 or times.shown[waiting[0]] > at:
    remark("damaged films", f"{name}: {number + 1} of {len(times.shown)} frames can be decoded; the last one stands "
           "for those at its end")  # fmt: skip
  last = _pixels(before, name, times.aspect)
  return found | dict.fromkeys(waiting, last)


def check_size(width: int, height: int, frames: int, name: str) -> None:
  """Raises a ValueError naming the film, if frames are too large, or all that are wanted together."""
  if width * height > PIXELS:
    raise ValueError(f"{name}: frames of {width} x {height} pixels, allowed are {PIXELS}")
  if width * height * frames > TOGETHER:
    raise ValueError(f"{name}: {frames} frames of {width} x {height} pixels, allowed are {TOGETHER} pixels together")


def _pixels(frame: Any, name: str, aspect: float) -> UInt8[np.ndarray, "h w 3"]:
  """RGB of a frame in square pixels, turned as its display matrix says."""
  if frame.is_corrupt:
    remark("damaged films", f"{name}: the frame at {frame.time or 0.0:.6g} s is damaged")
  if getattr(frame, "color_trc", 0) in _HDR:
    remark("films in HDR", f"{name}: is in HDR ({_HDR[frame.color_trc]}); its values are taken as those of common "
           "video, which is paler")  # fmt: skip
  return _turned(squared(frame.to_ndarray(format="rgb24"), aspect, name), frame, name)


def squared(pixels: UInt8[np.ndarray, "h w 3"], aspect: float, name: str) -> UInt8[np.ndarray, "i j 3"]:
  """Pixels that are `aspect` times as wide as high as square ones: the side that is too short is enlarged."""
  h, w = pixels.shape[:2]
  if not 1 / _ASPECT <= aspect <= _ASPECT:
    remark("pixel aspects", f"{name}: says that its pixels are {aspect:.4g} times as wide as high; they are taken as "
           "square")  # fmt: skip
    return pixels
  new = (round(w * aspect), h) if aspect >= 1 else (w, round(h / aspect))
  if new == (w, h) or new[0] * new[1] > PIXELS:
    return pixels
  return np.asarray(Image.fromarray(pixels).resize(new, Image.Resampling.BICUBIC))


def _turned(pixels: np.ndarray, frame: Any, name: str) -> np.ndarray:
  """By the display matrix, which takes a pixel (x, y) to (a x + c y, b x + d y)."""
  data = frame.side_data
  if "DISPLAYMATRIX" not in data:
    return pixels
  a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data["DISPLAYMATRIX"])[:36])
  across = abs(b) + abs(c) > abs(a) + abs(d)
  small, large = sorted((abs(b) + abs(c), abs(a) + abs(d)))
  if small > large / 50:
    remark("turned films", f"{name}: is not held by quarter turns; it is turned to the nearest one")
  if across:
    pixels, flip_x, flip_y = pixels.swapaxes(0, 1), c < 0, b < 0
  else:
    flip_x, flip_y = a < 0, d < 0
  return np.ascontiguousarray(pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1])

"""Sounds that are too long to be held: read by windows, so that memory is that of the windows.

A recording of two hours at 16 kHz is 1.3 GB at 44,100 Hz, of which a trunk hears some seconds. What the judgements on a
sound need (channels that cancel, offsets, values that are none) one pass over the file gathers in blocks; windows are
decoded where they are asked for, from a second before on; tests compare them in every format.
"""

from __future__ import annotations

import functools
import io
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from jaxtyping import Float32

from codebind_jax.data.reading import file_errors, name_of, opened_file, remark
from codebind_jax.data.transforms import audio

_MARGIN = 0.25  # seconds around a window that the resampler's filter sees
_LONGEST = 86_400  # seconds; what says more is damaged


class LongSound:
  """The samples [n, channels] of a file at its own rate, by slices.

  Args:
    value: path or bytes.
    name: for errors.

  Attributes:
    rate: Hz.
    shape: (n, channels).
  """

  def __init__(self, value: str | Path | bytes, name: str):
    self._value, self.name = value, name
    with self._opened() as sound:
      self.rate, self.shape = sound.samplerate, (sound.frames, sound.channels)
    self._order = 0

  def _opened(self) -> soundfile.SoundFile:
    value = self._value
    return soundfile.SoundFile(io.BytesIO(value) if isinstance(value, bytes) else value)

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, part: slice) -> Float32[np.ndarray, "m channels"]:
    """Some samples.

    Raises:
      ValueError: for more than can be held, or as `sums`.
    """
    start, stop, _ = part.indices(len(self))
    size = max(stop - start, 0)
    if size * self.shape[1] > audio.LARGEST:
      raise ValueError(f"{self.name}: {size:,} samples of {self.shape[1]} channels at once; allowed are "
                       f"{audio.LARGEST:,} of all channels; cut it into parts, or take shorter windows")  # fmt: skip
    with file_errors(self.name, "a readable sound"), self._opened() as sound:
      before = min(start, self.rate)  # the frames of an MP3 need those before them
      sound.seek(start - before)
      found = sound.read(before + size, dtype="float32", always_2d=True)[before:]
    if len(found) < size:
      raise ValueError(f"{self.name}: cut off, its header says {len(self)} samples and {start + len(found)} are there")
    self._check(found)
    return np.roll(found, -self._order, axis=1) if self._order else found

  def _check(self, found: np.ndarray) -> None:
    if found.size and not max(-found.min(), found.max()) <= audio.LOUDEST:  # nor is NaN
      raise ValueError(f"{self.name}: samples must be finite with full scale 1 (up to {audio.LOUDEST:g} is let pass), "
                       f"got {found.min():g} to {found.max():g}")  # fmt: skip

  @functools.cached_property
  def sums(self) -> _Sums:
    """What one pass gathers.

    Raises:
      ValueError: if the file is cut off, or samples are not finite or far beyond 1.
    """
    step = self.rate // 2
    windows = max(1, len(self) // step)
    block = max(1, (1 << 22) // (step * self.shape[1])) * step
    first, second = np.zeros((windows, self.shape[1])), np.zeros((windows, self.shape[1]))
    of_sum, counts = np.zeros(windows), np.zeros(windows)
    low, high, at = math.inf, -math.inf, 0
    with file_errors(self.name, "a readable sound"), self._opened() as sound:
      while len(found := sound.read(block, dtype="float32", always_2d=True)):
        self._check(found)
        low, high = min(low, float(found.min())), max(high, float(found.max()))
        wide, starts = found.astype(np.float64), np.arange(0, len(found), step)
        rows = np.minimum(at // step + np.arange(len(starts)), windows - 1)
        np.add.at(first, rows, np.add.reduceat(wide, starts))
        np.add.at(second, rows, np.add.reduceat(np.square(wide), starts))
        np.add.at(of_sum, rows, np.add.reduceat(np.square(wide.sum(axis=1)), starts))
        np.add.at(counts, rows, np.diff([*starts, len(found)]))
        at += len(found)
    if at < len(self):
      raise ValueError(f"{self.name}: cut off, its header says {len(self)} samples and there are {at}")
    if low == high:
      remark("sounds of silence", f"{self.name}: is silent, all its samples are {low:g}")
    return _Sums(first, second, of_sum, counts)

  def first_channel(self) -> LongSound:
    """As `audio.first_channel`."""
    if self.shape[1] > 1:
      energy = self.sums.energy.sum(axis=0)
      loudest = int(np.argmax(energy))
      if energy[0] < audio.SILENT * energy[loudest]:
        remark("silent first channels", f"{self.name}: its first channel is silent; channel {loudest} is taken")
        self._order = loudest
    return self


class _Sums:
  """Sums over windows of half a second: of samples and their squares [windows, channels], of the squares of all
  channels' sum, and the number of samples of each."""

  def __init__(self, first: np.ndarray, second: np.ndarray, of_sum: np.ndarray, counts: np.ndarray):
    self.mean = first.sum(axis=0) / counts.sum()
    self.energy = second - 2 * self.mean * first + self.mean**2 * counts[:, None]
    total = self.mean.sum()
    self.energy_of_sum = of_sum - 2 * total * first.sum(axis=1) + total**2 * counts
    self.count = counts.sum()


class LongMono:
  """The samples of a long sound as one channel at another rate, by slices; see `audio.mono` for the channel.

  A slice differs from that of the whole sound, resampled, by the rounding of float32.

  Attributes:
    rate: Hz.
  """

  def __init__(self, sound: LongSound, rate: int):
    self._sound, self.rate = sound, rate
    sums, name, self._channel = sound.sums, sound.name, -1
    if sound.shape[1] > 1:
      self._channel = audio.channel_of(sums.energy_of_sum, sums.energy, name)
    mixed = self._channel < 0
    offset = float(sums.mean.mean() if mixed else sums.mean[self._channel])
    energy = sums.energy_of_sum.sum() / sound.shape[1] ** 2 if mixed else sums.energy[:, self._channel].sum()
    deviation = math.sqrt(max(float(energy), 0.0) / sums.count)
    self._offset = audio.offset_of(offset, deviation, name)

  def __len__(self) -> int:
    return round(len(self._sound) * self.rate / self._sound.rate)

  def __getitem__(self, part: slice) -> Float32[np.ndarray, " m"]:
    start, stop, _ = part.indices(len(self))
    old, new = (rate // math.gcd(self._sound.rate, self.rate) for rate in (self._sound.rate, self.rate))
    if old == new:
      return self._mixed(start, stop)
    periods = math.ceil(_MARGIN * self._sound.rate / old)
    first, last = max(start // new - periods, 0), stop // new + 1 + periods
    found = audio.resample(self._mixed(first * old, last * old), self._sound.rate, self.rate, self._sound.name)
    return found[start - first * new : stop - first * new]

  def _mixed(self, start: int, stop: int) -> np.ndarray:
    found = self._sound[start:stop]
    found = found.mean(axis=1) if self._channel < 0 else found[:, self._channel]
    return np.ascontiguousarray(found - np.float32(self._offset) if self._offset else found)

  @functools.cached_property
  def peak(self) -> float:
    """The largest size of a sample, before it is resampled."""
    block, largest = max(1, (audio.LARGEST >> 6) // self._sound.shape[1]), 1e-9
    for start in range(0, len(self._sound), block):
      largest = max(largest, float(np.abs(self._mixed(start, start + block)).max()))
    return largest


def long_sound(value: Any, new_rate: int = audio.RATE) -> LongSound | None:
  """The sound of a path or of bytes, if it is too long to be held, at its own or at the new rate; else None.

  Raises:
    ValueError: naming the file, if it is no sound, or several one behind another.
  """
  if not isinstance(value, str | bytes | Path):
    return None
  name = name_of(value, "audio")
  with file_errors(name, "a readable sound"):
    with opened_file(value) as file:
      audio.check_beginning(file, name)
    with soundfile.SoundFile(io.BytesIO(value) if isinstance(value, bytes) else value) as sound:
      size, seconds = sound.frames, sound.frames / sound.samplerate
      if size * sound.channels <= audio.LARGEST and seconds * new_rate <= audio.LARGEST:
        return None
      if seconds > _LONGEST:
        raise ValueError(f"{name}: its header says {size:,} samples at {sound.samplerate} Hz; allowed is a day")
      audio.check_head(sound, name, windows=True)
      audio.check_rate(sound.samplerate, name)
    with opened_file(value) as file:
      content = value if isinstance(value, bytes) else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
      if len(audio.starts_of(content)) > 1:
        raise ValueError(f"{name}: is several sounds one behind another, and longer than can be held; cut it")
      if content is not value:
        content.close()
  return LongSound(value, name)

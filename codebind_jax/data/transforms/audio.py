"""Audio: anything libsndfile reads, or an array, to mono at 44,100 Hz or another rate."""

import io
import math
import mmap
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from jaxtyping import Float, Float32

from codebind_jax.data import mp3
from codebind_jax.data.reading import file_errors, name_of, opened_file, remark, unmasked

# Changes whenever the same input would give other samples: it is part of the key of cached features.
REVISION = "audio-3"
RATE = 44_100
RATES = (1_000, 768_000)
LARGEST = 1 << 27  # samples of all channels, and of one at the new rate: 512 MB, 50 minutes at 44,100 Hz
LONG_SOUND = 1 << 24  # samples from which no second array of a sound's length is made
CANCELLED, SILENT = 0.2, 1e-6  # shares of energy
WINDOWS, WINDOW = 8, (0.05, 0.5)  # parts in which channels cancel or do not: at least so many, of so many seconds
LONG, SHARE = 4, 0.25  # windows after one another, or share of all that are heard, in which channels cancel
EQUAL = 0.999  # energies that differ by rounding and offsets alone
HEARD = 1e-4  # of the loudest window's energy
LOUDEST = 8.0  # full scale is 1; lossy decoders overshoot a little, integer samples that were not scaled do a lot

_FULL_SCALE = {  # as wav files have them: type -> (middle, full scale)
  np.dtype(np.int16): (0, 2**15), np.dtype(np.int32): (0, 2**31), np.dtype(np.uint8): (128, 2**7),
}  # fmt: skip
_UNKNOWN = 1 << 62  # libsndfile's count where a stream does not say it
_UNKNOWN_SIZE = 0x7FFF0000  # programs that write into pipes give sizes from here on
_MP3_DELAY = 2 * 1152  # samples of an encoder's delay and padding, which some count
_CHAINED = (b"OggS", b"fLaC")
_FLAC = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")  # with the first block's head, which is never another
_CHUNKED = ((b"RIFF", "little", "wav"), (b"FORM", "big", "aiff"))
ALLOWED = "wav, aiff, flac, ogg, opus, mp3, au, caf, w64 and whatever else libsndfile reads"
_WHAT = f"a readable sound, or of a format that is not supported; allowed: {ALLOWED}"
# Formats that are not read: where their mark is, the mark, what they are.
_OTHER = (
  (4, b"ftyp", "MPEG-4 (.m4a, .mp4 or .3gp)"), (0, b"\x1aE\xdf\xa3", "Matroska (.webm or .mkv)"),
  (0, b"0&\xb2u\x8ef\xcf\x11", "Windows Media (.wma or .asf)"), (0, b"#!AMR", "AMR"), (0, b"MAC ", "Monkey's Audio"),
  (0, b"wvpk", "WavPack"), (0, b"ADIF", "AAC"), (0, b"\xff\xf1", "AAC"), (0, b"\xff\xf9", "AAC"), (0, b"MThd", "MIDI"),
  (0, b"FLV\x01", "Flash video"),
)  # fmt: skip
# libsndfile's log of a header, in the formats whose samples are one chunk.
_SIZES = re.compile(r"^ *(?:data|SSND|riff|Data Size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
_COUNTS = re.compile(r"Calculated frame count (\d+) does not match value from 'ds64' chunk of (\d+)")
BLOCK = 1 << 22  # samples


def read(value: Any) -> Float32[np.ndarray, " n"]:
  """Mono samples at 44,100 Hz of a path, encoded bytes or an array; channels are mixed, other rates resampled.

  Args:
    value: wav, ogg, flac, mp3 or whatever else libsndfile reads; or an array [n] or [n, channels] at 44,100 Hz, float
      with full scale 1, int16, int32 or uint8 (bring other rates to it with `resample`).

  Raises:
    ValueError: naming the file, if it cannot be read, is cut off or empty, has a rate out of range, or has samples that
      are not finite or far beyond 1.
  """
  samples, rate = read_channels(value)
  return resample(mono(samples, _name(value), rate), rate, RATE, _name(value))


def read_channels(value: Any) -> tuple[Float32[np.ndarray, "n channels"], int]:
  """Samples of each channel at the sound's own rate, and that rate in Hz; arguments and errors as of `read`."""
  name = _name(value)
  if isinstance(value, (str, Path, bytes)):
    with file_errors(name, _WHAT):
      samples, rate = _decoded(value, name)
    check_rate(rate, name)
    return _checked(samples, name), rate
  if not hasattr(value, "__array__"):
    raise ValueError(f"audio: got {type(value).__name__}, allowed are a path, bytes or an array")
  return _checked(unmasked(value, name), name), RATE


def mono(
  samples: Float32[np.ndarray, "n channels"], name: str = "audio", rate: int = RATE
) -> Float32[np.ndarray, " n"]:
  """The mean of a sound's channels; of channels that cancel each other the loudest one, the first of equal ones.

  Channels cancel where their sum, without their offsets, has less than a fifth of the energy that unrelated ones'
  would have (of two equally loud ones: a correlation below -0.8), as with a microphone that is wired the wrong way
  round: in the whole sound, in a quarter of its half seconds (of a shorter sound, of its eighths), or in two seconds on
  end. An offset that is larger than
  the sound itself is taken off. Both are said in the log.

  Args:
    samples: of each channel.
    name: of the sound, for the log.
    rate: Hz.
  """
  if samples.shape[1] == 1:
    mixed = samples[:, 0]
  else:
    mixed = samples.mean(axis=1)
    energy = _energy(samples, rate)
    channel = channel_of(samples.shape[1] ** 2 * _energy(mixed[:, None], rate)[:, 0], energy, name)
    mixed = samples[:, channel] if channel >= 0 else mixed
  if offset := offset_of(float(mixed.mean(dtype=np.float64)), _deviation(mixed), name):
    mixed = mixed - np.float32(offset)
  return np.ascontiguousarray(mixed)


def channel_of(of_sum: np.ndarray, energy: np.ndarray, name: str) -> int:
  """The channel that is taken alone where channels cancel each other, which is said; -1 for the mean of all.

  Args:
    of_sum: energy of the channels' sum in each window.
    energy: [windows, channels].
    name: of the sound.
  """
  if not _cancel(of_sum, energy.sum(axis=1)):
    return -1
  loudness = energy.sum(axis=0)
  loudest = int(np.argmax(loudness >= EQUAL * loudness.max()))
  remark("cancelling channels", f"{name}: its channels cancel each other; channel {loudest} is taken alone")
  return loudest


def offset_of(offset: float, deviation: float, name: str) -> float:
  """The offset that is taken off, which is said: one that is larger than the sound itself; else 0."""
  if not abs(offset) > deviation > 0.0:
    return 0.0
  remark("offsets", f"{name}: an offset of {offset:.3g}, larger than the sound itself, is taken off")
  return offset


def first_channel(samples: Float32[np.ndarray, "n channels"], name: str = "audio") -> Float32[np.ndarray, "n channels"]:
  """The channels with the loudest one moved to the front where the first one is silent (60 dB below it); it is said."""
  if samples.shape[1] == 1:
    return samples
  energy = _energy(samples, RATE).sum(axis=0)
  loudest = int(np.argmax(energy))
  if energy[0] >= SILENT * energy[loudest]:
    return samples
  remark("silent first channels", f"{name}: its first channel is silent; channel {loudest} is taken")
  return np.roll(samples, -loudest, axis=1)


def _energy(samples: np.ndarray, rate: int) -> np.ndarray:
  """Sums of squares [windows, channels] without each channel's offset; the last window has what is over as well."""
  step = max(1, int(min(max(len(samples) / WINDOWS, WINDOW[0] * rate), WINDOW[1] * rate)))
  starts = np.arange(max(1, len(samples) // step)) * step
  means = [channel.mean(dtype=np.float64) for channel in samples.T]
  out, most = np.empty((len(starts), samples.shape[1])), max(1, BLOCK // step)
  for low in range(0, len(starts), most):
    high = min(low + most, len(starts))
    part = samples[starts[low] : starts[high] if high < len(starts) else len(samples)]
    for i, mean in enumerate(means):
      out[low:high, i] = np.add.reduceat(np.square(part[:, i] - mean), starts[low:high] - starts[low])
  return out


def _deviation(samples: np.ndarray) -> float:
  if len(samples) < LONG_SOUND:
    return float(samples.std(dtype=np.float64))
  mean = samples.mean(dtype=np.float64)
  blocks = (samples[at : at + BLOCK] - mean for at in range(0, len(samples), BLOCK))
  return math.sqrt(sum(float(np.square(block).sum()) for block in blocks) / len(samples))


def _cancel(of_sum: np.ndarray, of_all: np.ndarray) -> bool:
  """Whether channels cancel, by the energy in each window of their sum and of all of them."""
  if of_sum.sum() < CANCELLED * of_all.sum():
    return True
  heard = of_all > HEARD * of_all.max()
  found = heard & (of_sum < CANCELLED * of_all)
  runs = np.convolve(found, np.ones(LONG), "valid") if len(found) >= LONG else np.zeros(1)
  return bool(found.sum() >= max(1.0, SHARE * heard.sum()) or runs.max() >= LONG)


def _name(value: Any) -> str:
  return name_of(value, "audio")


def _decoded(value: str | Path | bytes, name: str) -> tuple[np.ndarray, int]:
  if not isinstance(value, bytes):
    with opened_file(value) as file:  # libsndfile takes the beginning of a name that has a null in it
      check_beginning(file, name)
      if file.read(4) not in _CHAINED:
        return _samples(value, name)
      file.seek(0)
      value = file.read()
  else:
    check_beginning(io.BytesIO(value), name)
  if len(parts := _parts(value)) > 1:
    read = [_one_part(part, name) for part in parts]
    if len(kinds := sorted({(rate, samples.shape[1]) for samples, rate in read})) > 1:
      raise ValueError(f"{name}: is several sounds one behind another, of {kinds} Hz and channels; allowed are parts "
                       "of one rate and number of channels; cut it")  # fmt: skip
    remark("sounds of several parts", f"{name}: is {len(parts)} sounds one behind another, which are joined")
    return np.concatenate([samples for samples, _ in read]), read[0][1]
  return _one_part(value, name)


def _one_part(value: bytes, name: str) -> tuple[np.ndarray, int]:
  _check_end(value, name)
  try:
    return _samples(io.BytesIO(value), name)
  except soundfile.LibsndfileError:
    if value[:3] != b"ID3":
      raise
    # libsndfile knows some MP3 files, those with an odd tag in front, by the ending of their name alone.
    with tempfile.NamedTemporaryFile(suffix=".mp3") as file:
      file.write(value)
      file.flush()
      return _samples(file.name, name)


def _parts(content: bytes) -> list[bytes]:
  """The sounds of a chained Ogg file, or of FLAC files put one behind another; libsndfile reads the first alone."""
  starts = starts_of(content)
  return [content[start:stop] for start, stop in zip([0, *starts[1:]], [*starts[1:], len(content)])]


def starts_of(content: bytes | mmap.mmap) -> list[int]:
  """Where each of the sounds of `_parts` begins."""
  if content[:4] == b"fLaC":
    return [found.start() for found in _FLAC.finditer(content)] or [0]
  if content[:4] != b"OggS":
    return [0]
  starts, at, opened = [], 0, False
  while content[at : at + 4] == b"OggS" and at + 27 <= len(content):
    begins = bool(content[at + 5] & 2)
    if begins and not opened:  # several streams may begin together
      starts.append(at)
    opened = begins
    segments = content[at + 26]
    at += 27 + segments + sum(content[at + 27 : at + 27 + segments])
  return starts or [0]


def _samples(file: Any, name: str) -> tuple[np.ndarray, int]:
  found, whole = None, True
  with soundfile.SoundFile(file) as sound:
    check_head(sound, name)
    if sound.format == "MP3":
      content = file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
      found = mp3.frames(content)
    if found:
      if found.kinds > 1:
        raise ValueError(f"{name}: its frames have several rates or numbers of channels; cut it into parts of one")
      # A header that tells the length may take off a longer padding than is usual.
      slack = _MP3_DELAY * (2 if found.tells else 1)
      whole = len(found.parts) < 2 and found.count * found.samples <= sound.frames + slack
    if whole:
      samples = sound.read(dtype="float32", always_2d=True)
      told = sound.format != "MP3" or (found is not None and found.tells)
      if told and len(samples) < sound.frames:
        message = f"cut off, its header says {sound.frames} samples and there are {len(samples)}"
        if not found or len(samples) < sound.frames - _MP3_DELAY:
          raise ValueError(f"{name}: {message}")
        remark("cut sounds", f"{name}: {message}; what is there is taken")
  if found and found.cut and not (found.tells and whole):
    remark("cut sounds", f"{name}: its last frame is not whole, so it may be cut off; what is there is taken")
  if whole:
    return samples, sound.samplerate
  if found.tells:
    remark("sounds of several parts", f"{name}: has more frames than its header says, as sounds one behind another "
           "have; all are taken")  # fmt: skip
  with soundfile.SoundFile(io.BytesIO(mp3.with_length(content, found))) as sound:
    check_head(sound, name)
    return sound.read(dtype="float32", always_2d=True), sound.samplerate


def check_beginning(file: Any, name: str) -> None:
  """Refuses an empty file, several in one, and formats that libsndfile does not read; leaves it at its beginning."""
  head = file.read(64)
  for form, order, what in _CHUNKED:
    if head[:4] == form and len(head) == 64:
      size = int.from_bytes(head[4:8], order)
      file.seek(8 + size + size % 2)
      if (next_ := file.read(12))[:4] == form and next_[8:] == head[8:12]:
        raise ValueError(f"{name}: is several {what} files one behind another, the second from byte {8 + size}; "
                         "allowed is one; cut it")  # fmt: skip
  file.seek(0)
  if not head:
    raise ValueError(f"{name}: the file is empty")
  for place, mark, what in _OTHER:
    if head[place : place + len(mark)] == mark:
      raise ValueError(f"{name}: {what}, a format that is not supported; allowed: {ALLOWED}")


def check_head(sound: soundfile.SoundFile, name: str, windows: bool = False) -> None:
  """Refuses a header that asks for more data than there are, or, unless windows of it are read, for too much memory."""
  if sound.frames >= _UNKNOWN:
    raise ValueError(f"{name}: its header does not say how long it is; write it anew into a file, not a pipe")
  if sound.frames * sound.channels > LARGEST and not windows:
    raise ValueError(f"{name}: its header says {sound.frames:,} samples of {sound.channels} channels; allowed are "
                     f"{LARGEST:,} of all channels; cut it into parts")  # fmt: skip
  for said, there in _SIZES.findall(sound.extra_info):
    if int(there) < int(said) < _UNKNOWN_SIZE:
      raise ValueError(f"{name}: cut off, its header says {said} bytes of samples and there are {there}")
  if not sound.frames and sound.format != "MP3":  # whose length may be a guess
    raise ValueError(f"{name}: has no samples")
  for there, said in _COUNTS.findall(sound.extra_info):
    if int(there) < int(said):
      raise ValueError(f"{name}: cut off, its header says {said} samples and there are {there}")


def _check_end(content: bytes, name: str) -> None:
  """Says it of an Ogg file whose last page is not marked as the last one: its length is written nowhere else."""
  if content[:4] != b"OggS":
    return
  last = content.rfind(b"OggS\0")
  if last < 0 or not content[last + 5] & 4:
    remark("cut sounds", f"{name}: has no end mark, so it may be cut off; what is there is taken")


def check(path: Path) -> None:
  """Raises a ValueError naming the file if it is not a sound, or cut off by its header; samples are not decoded."""
  name = str(path)
  with file_errors(name, _WHAT):
    with opened_file(path) as file:
      check_beginning(file, name)
    with soundfile.SoundFile(path) as sound:
      check_head(sound, name, windows=True)
      check_rate(sound.samplerate, name)
      found = mp3.frames(Path(path).read_bytes()) if sound.format == "MP3" else None
      there = found.count * found.samples if found else 0
      if found and found.tells and found.ends and there < sound.frames - _MP3_DELAY:
        raise ValueError(f"{name}: cut off, its header says {sound.frames} samples and there are about {there}")


def check_rate(rate: int | float, name: str) -> None:
  """Raises a ValueError for a rate out of range, in Hz."""
  if not RATES[0] <= rate <= RATES[1]:
    raise ValueError(f"{name}: got a rate of {rate} Hz, allowed are {RATES[0]} to {RATES[1]}")


def _checked(samples: np.ndarray, name: str) -> np.ndarray:
  samples = samples.astype(samples.dtype.newbyteorder("="), copy=False)
  if samples.dtype in _FULL_SCALE:
    largest = float(np.abs(samples, dtype=np.float64).max(initial=0)) if samples.dtype == np.int32 else 0.0
    if 0 < largest < 2**15:
      raise ValueError(f"{name}: int32 samples of {samples.min()} to {samples.max()} look like 16-bit ones, whose full "
                       "scale is 32768; allowed are int32 with full scale 2147483648, int16, or float")  # fmt: skip
    if 0 < largest < 2**23 and (samples & 255).any():  # 24-bit samples that were shifted up have no last 8 bits
      raise ValueError(f"{name}: int32 samples of {samples.min()} to {samples.max()} look like 24-bit ones, whose full "
                       "scale is 8388608; allowed are int32 with full scale 2147483648, int16, or float")  # fmt: skip
    middle, scale = _FULL_SCALE[samples.dtype]
    samples = ((samples - np.float64(middle)) / scale).astype(np.float32)
  if not np.issubdtype(samples.dtype, np.floating) or samples.ndim not in (1, 2) or 0 in samples.shape:
    raise ValueError(
      f"{name}: got samples of type {samples.dtype} and shape {samples.shape}, allowed are float, int16, int32 or uint8"
      " [n] or [n, channels] that are not empty"
    )
  if samples.ndim == 2 and samples.shape[1] > (most := len(samples) if samples.shape[1] <= 32 else 32):
    raise ValueError(f"{name}: got {samples.shape[1]} channels, allowed are 1 to {most}; is the array transposed?")
  samples = samples.reshape(len(samples), -1)
  if not max(-samples.min(), samples.max()) <= LOUDEST or np.isnan(samples.max()):
    raise ValueError(
      f"{name}: samples must be finite with full scale 1 (up to {LOUDEST:g} is let pass), got "
      f"{samples.min():g} to {samples.max():g}"
    )
  if samples.min() == samples.max():
    remark("sounds of silence", f"{name}: is silent, all its samples are {samples.flat[0]:g}")
  return np.ascontiguousarray(samples, np.float32)


def resample(
  samples: Float[np.ndarray, " n"], rate: int | float, new_rate: int | float, name: str = "audio"
) -> Float32[np.ndarray, " m"]:
  """Samples at another rate, by soxr's band-limited resampler.

  Raises:
    ValueError: if a rate is out of range, or so few samples are given that none would be left.
  """
  for hertz in (rate, new_rate):
    check_rate(hertz, name)
  if rate == new_rate:
    return samples.astype(np.float32, copy=False)
  if len(samples) * new_rate / rate > LARGEST:
    raise ValueError(f"{name}: {len(samples):,} samples at {rate} Hz; allowed are {LARGEST:,} at {new_rate} Hz; cut it "
                     "into parts")  # fmt: skip
  resampled = soxr.resample(samples.astype(np.float32, copy=False), rate, new_rate)
  if not resampled.size:
    raise ValueError(f"{name}: {len(samples)} samples at {rate} Hz are none at {new_rate} Hz; a longer sound is needed")
  return resampled


def sinc_resample(
  samples: Float[np.ndarray, " n"], rate: int, new_rate: int, name: str = "audio"
) -> Float32[np.ndarray, " m"]:
  """Samples at another rate, by a sinc filter under a Hann window of six zero crossings, cut off at 0.99 of Nyquist.

  The resampler that ImageBind and other torch models were trained with; `resample` has a longer filter.

  Returns:
    ceil(n new_rate / rate) samples.

  Raises:
    ValueError: if a rate is out of range.
  """
  for hertz in (rate, new_rate):
    check_rate(hertz, name)
  old, new = (hertz // math.gcd(rate, new_rate) for hertz in (rate, new_rate))
  if old == new:
    return samples.astype(np.float32, copy=False)
  cutoff = 0.99 * min(old, new)
  reach = math.ceil(6 * old / cutoff)  # input samples on each side of an output sample that count
  length = -(-len(samples) * new // old)
  periods = -(-length // new)
  phase = np.arange(new) * old
  first = phase // new - reach
  taps = np.arange(2 * reach + 2)
  # Distance of each tap from the output sample, in zero crossings.
  distance = np.clip(((first[:, None] + taps) * new - phase[:, None]) * (cutoff / (old * new)), -6.0, 6.0)
  kernel = np.sinc(distance) * np.cos(distance * (np.pi / 12)) ** 2 * (cutoff / old)
  padded = np.pad(samples.astype(np.float64), (reach, periods * old + reach + 2 - len(samples)))
  out = np.zeros((periods, new))
  start = np.arange(periods)[:, None] * old + first + reach
  for tap in taps:
    out += padded[start + tap] * kernel[:, tap]
  return out.reshape(-1)[:length].astype(np.float32)

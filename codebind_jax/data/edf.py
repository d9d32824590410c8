"""EDF and BDF recordings (Kemp et al. 1992; EDF+, Kemp & Olivan 2003; BioSemi's BDF): the channels of the brain alone.

Read here and not by mne, which takes every channel for EEG, takes a unit that it does not know for volts, brings all
channels to the highest rate, and closes gaps, none of which it says.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import soxr
from jaxtyping import Float

from codebind_jax.data.reading import remark

_UNITS = {"uv": 1.0, "µv": 1.0, "μv": 1.0, "mv": 1e3, "nv": 1e-3, "v": 1e6}  # in microvolts
_FIELDS = (("label", 16), ("", 80), ("unit", 8), ("low", 8), ("high", 8), ("digital_low", 8), ("digital_high", 8),
           ("", 80), ("samples", 8), ("", 32))  # fmt: skip
_FEW = 0.01  # seconds between two records' times that are no gap
# EDF+'s own words for what is no EEG, those of sleep laboratories and amplifiers, and of exports; a number may follow.
_OTHER = re.compile(
  r"eog|e[ck]g|emg|erg|eng|gsr|eda|scr?|meg|mcg|ep|resp\w*|s[ap]o2?|oxi?\w*|etco2?|co2?|pleth\w*|ppg|pulse\w*|hr|heart|"
  r"rr|bp|temp\w*|event\w*|marker\w*|trig\w*|status|stim?\w*|dc|photic|light\w*|sound|mic\w*|snor\w*|flow|air\w*|nasal|"
  r"oral|oro\w*|therm\w*|cpap|press\w*|effort|abd\w*|tho\w*|chest|rip\w*|pos|position|body|acc\w*|gyro\w*|mag\w*|[xyz]|"
  r"batt\w*|button|counter|sync|time\w*|aux\w*|exg?|gnd|ground|chin\w*|submental|legs?|[lr]legs?|leg[lr]|tib\w*|plm[lr]?|"
  r"[lr]plm|[lr]at|loc|roc|[hv]eo[glr]?|eyes?|pg|ibi|bursts|suppr",
  re.IGNORECASE,
)
_PLACE = re.compile(r"[aftcpoi]{1,3}(?:z|\d{1,2}h?)|fp(?:z|[12]h?)|nz|m[12]|cb[12]", re.IGNORECASE)  # 10-5


@dataclasses.dataclass(frozen=True)
class Channel:
  """A signal of a recording.

  Attributes:
    label: as in the file.
    unit: of its physical values, as in the file.
    low, high: physical values of the two digital ones.
    digital_low, digital_high: digital values.
    samples: of a data record.
  """

  label: str
  unit: str
  low: str
  high: str
  digital_low: str
  digital_high: str
  samples: int

  def kind(self) -> str:
    """ "eeg", "other", "annotations", or "unknown": a voltage whose label says nothing."""
    label = self.label.strip()
    if label in ("EDF Annotations", "BDF Annotations"):
      return "annotations"
    words = re.findall(r"[^\W_]+", label)
    said = bool(words) and words[0].lower() == "eeg"
    words = words[said:]
    if words and _PLACE.fullmatch(words[0]):
      return "eeg"
    if any(_OTHER.fullmatch(word.rstrip("0123456789")) for word in words):
      return "other"
    return "eeg" if said else "unknown" if self.unit.strip().lower() in _UNITS else "other"

  def name(self) -> str:
    """The label without regard to case, to "EEG" in front, to blanks and to dots at its ends."""
    return " ".join(re.sub(r"^eeg(?![^\W_])[\s:_-]*", "", self.label.strip().lower()).strip(". ").split())

  def order(self) -> tuple[tuple[str, int], ...]:
    """Sorts channels by name, numbers by value."""
    words = re.findall(r"([^\W\d_]+|(?<![^\W\d_])(?=\d))(\d*)", self.name())
    return tuple((word, int(number or 0)) for word, number in words)


def read(content: bytes, name: str) -> Float[np.ndarray, "channels samples"]:
  """The EEG channels in microvolts, in the order of their names, at the rate of the fastest of them.

  What is no EEG by its label (EOG, ECG, EMG, respiration, temperature, triggers, ...) or has another unit than a
  voltage is left out, and said. A label that says nothing is taken for EEG where its unit is a voltage, and said.

  Args:
    content: of the file.
    name: for errors and the log.

  Raises:
    ValueError: naming the file, if it is damaged, cut off or has gaps, if no channel is EEG, or if one has no unit, an
      unknown one, a scale of zero, or another one's name.
  """
  channels, records, seconds, start, width = _header(content, name)
  offsets = np.cumsum([0, *(channel.samples * width for channel in channels)])
  size = int(offsets[-1])
  records = _count(records, (len(content) - start) // size, name)
  data = np.frombuffer(content, np.uint8, records * size, start).reshape(records, size)
  kinds = _kinds(channels)
  for channel, kind, offset in zip(channels, kinds, offsets):
    if kind == "annotations":
      _check_gaps(data[:, offset : offset + channel.samples * width], float(seconds), name)
      break  # the first such signal has the times of the records
  chosen = sorted((i for i, kind in enumerate(kinds) if kind in ("eeg", "unknown")), key=lambda i: channels[i].order())
  _say(channels, kinds, name)
  if not chosen:
    raise ValueError(f"{name}: has no EEG channel; its channels are {', '.join(c.label for c in channels)}")
  labels = [channels[i].label.strip().lower() for i in chosen]
  names = [channels[i].name() for i in chosen]
  if double := [channels[i].label for i, own in zip(chosen, names) if names.count(own) > 1]:
    raise ValueError(f"{name}: channels {double[0]!r} and {double[1]!r} have one name; each must have its own")
  signals = [_physical(data, channels[i], int(offsets[i]), width, name) for i in chosen]
  if flat := [channels[i].label for i, signal in zip(chosen, signals) if signal.min() == signal.max()]:
    remark("flat channels", f"{name}: channels {', '.join(flat)} are flat, each of them has one value throughout")
  return _one_rate(signals, [Fraction(channels[i].samples) / seconds for i in chosen], labels, name)


def _kinds(channels: Sequence[Channel]) -> list[str]:
  """Of each channel; E1 and E2 are a net's first electrodes where it has an E3, and otherwise the sleeper's eyes."""
  first = [re.match(r"e\d+\b", channel.label.strip().lower()) for channel in channels]
  net = any(found and found[0] not in ("e1", "e2") for found in first)
  return ["other" if found and not net else channel.kind() for channel, found in zip(channels, first)]


def _header(content: bytes, name: str) -> tuple[list[Channel], int, Fraction, int, int]:
  """(channels, number of records or -1, seconds of a record, where the data begin, bytes of a sample)."""
  if len(content) < 256:
    raise ValueError(f"{name}: cut off in its header, {len(content)} bytes of 256")
  text = lambda start, width: content[start : start + width].decode("latin-1").strip("\0 ")

  def number(start: int, width: int, what: str) -> int:
    try:
      return int(text(start, width))
    except ValueError:
      raise ValueError(f"{name}: {what} in its header is {text(start, width)!r}; a whole number is needed") from None

  size, records = number(184, 8, "the header's size"), number(236, 8, "the number of records")
  count = number(252, 4, "the number of signals")
  if count < 1 or size != 256 * (count + 1) or len(content) < size:
    raise ValueError(f"{name}: damaged or cut off in its header: {count} signals, a header of {size} bytes, a file of "
                     f"{len(content)}")  # fmt: skip
  try:
    seconds = Fraction(text(244, 8).replace(",", "."))
  except (ValueError, ZeroDivisionError):
    seconds = Fraction(0)
  columns, at = {}, 256
  for field, width in _FIELDS:
    columns[field] = [text(at + i * width, width) for i in range(count)]
    if field == "samples":
      columns[field] = [number(at + i * width, width, f"samples of signal {i}") for i in range(count)]
    at += width * count
  channels = [Channel(*(columns[field.name][i] for field in dataclasses.fields(Channel))) for i in range(count)]
  if seconds <= 0 and any(channel.kind() != "annotations" for channel in channels):
    raise ValueError(f"{name}: a record of {text(244, 8)!r} seconds; a number above 0 is needed")
  if any(channel.samples < 1 for channel in channels):
    raise ValueError(f"{name}: a signal of no samples a record")
  return channels, records, seconds or Fraction(1), size, 3 if content[0] == 0xFF else 2


def _count(said: int, there: int, name: str) -> int:
  if said > there:
    raise ValueError(f"{name}: cut off, its header says {said} records of data and there are {there}")
  if said < -1 or not there or not said:
    raise ValueError(f"{name}: has {there} records of data, its header says {said}")
  if said == -1:
    remark("recordings without an end", f"{name}: its header has no number of records, so it may be cut off; the "
           f"{there} that are there are taken")  # fmt: skip
    return there
  if said < there:
    remark("recordings with more data", f"{name}: has {there} records of data, its header says {said}; these are taken")
  return said


def _check_gaps(lists: np.ndarray, seconds: float, name: str) -> None:
  """Refuses a recording whose records do not follow on one another, by the time-keeping annotations of EDF+."""
  times = []
  for record in lists:
    found = re.match(rb"([+-]\d+(?:\.\d*)?)\x14\x14", record.tobytes())
    if not found:
      return  # no EDF+, or another signal keeps the times
    times.append(float(found[1]))
  gaps = np.flatnonzero(np.abs(np.diff(times) - seconds) > _FEW)
  if len(gaps):
    first = int(gaps[0])
    end = times[first] + seconds
    raise ValueError(f"{name}: has {len(gaps)} gaps (EDF+D), the first from {end:g} s to {times[first + 1]:g} s; cut "
                     "it into recordings without one")  # fmt: skip


def _say(channels: Sequence[Channel], kinds: Sequence[str], name: str) -> None:
  remarks = {"other": "no EEG by name or unit, left out", "unknown": "taken for EEG, the name says nothing"}
  for kind, done in remarks.items():
    if labels := [channel.label for channel, own in zip(channels, kinds) if own == kind]:
      remark(f"channels that are {done}", f"{name}: channels {', '.join(labels)}: {done}")


def _physical(data: np.ndarray, channel: Channel, offset: int, width: int, name: str) -> np.ndarray:
  """Microvolts of one channel."""
  unit = channel.unit.strip().lower()
  if unit not in _UNITS:
    raise ValueError(f"{name}: channel {channel.label!r} has the unit {channel.unit!r}; allowed: uV, mV, nV, V")
  try:
    low, high, first, last = (
      float(value.replace(",", ".")) for value in (channel.low, channel.high, channel.digital_low, channel.digital_high)
    )
  except ValueError:
    low = high = first = last = 0.0
  if not np.isfinite([low, high, first, last]).all() or low == high or first == last:
    raise ValueError(f"{name}: channel {channel.label!r} has values from {channel.low!r} to {channel.high!r} for "
                     f"digital ones from {channel.digital_low!r} to {channel.digital_high!r}; two numbers each are "
                     "needed")  # fmt: skip
  raw = np.ascontiguousarray(data[:, offset : offset + channel.samples * width])
  if width == 2:
    digital = raw.view("<i2").reshape(-1)
  else:
    bytes_ = raw.reshape(-1, 3).astype(np.int32)
    digital = (bytes_[:, 0] | bytes_[:, 1] << 8 | bytes_[:, 2] << 16) << 8 >> 8  # the sign is the 24th bit
  return ((digital - first) * ((high - low) / (last - first)) + low) * _UNITS[unit]


def _one_rate(signals: list[np.ndarray], rates: list[Fraction], labels: list[str], name: str) -> np.ndarray:
  """Signals at the rate of the fastest; slower ones are resampled by soxr's band-limited resampler."""
  fastest = max(rates)
  slow = [label for label, rate in zip(labels, rates) if rate != fastest]
  if slow:
    remark("resampled channels", f"{name}: channels {', '.join(slow)} are resampled to {float(fastest):g} Hz")
  length = max(map(len, signals))
  out = np.empty((len(signals), length))
  for row, signal, rate in zip(out, signals, rates):
    if rate != fastest:
      signal = soxr.resample(signal, float(rate), float(fastest))[:length]
      signal = np.pad(signal, (0, length - len(signal)), mode="edge")
    row[:] = signal
  return out

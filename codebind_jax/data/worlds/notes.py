"""Instrument notes and short phrases from a soundfont, rendered by tinysoundfont where it is installed."""

import dataclasses
import functools
import importlib.util
import io
import random
import sys
import types
from collections.abc import Iterable, Iterator

import numpy as np
import soundfile
from jaxtyping import Float32

from codebind_jax.data.worlds import names

RATE = 44_100
SECONDS = 2.0
KEYS = 8  # plain notes an instrument, equally spaced over its range; every fourth is held out
HELD_OUT = 3
EXTRA_NOTES, PHRASES = 16, 16
HOW_TO_INSTALL = "pip install --no-deps tinysoundfont==0.3.7 (pyaudio, which it names, is needed to play alone)"
_SILENT = 1e-4
_PEAK = 0.5


@dataclasses.dataclass(frozen=True)
class Note:
  """What is played: `events` are (start in seconds, MIDI key, velocity, length in seconds) on one General MIDI program.

  Attributes:
    name: unique among the notes of one soundfont.
    concept: the instrument.
    program: General MIDI program, from 0.
    events: what is played.
    held_out: whether its key is one of those kept for validation.
  """

  name: str
  concept: str
  program: int
  events: tuple[tuple[float, int, int, float], ...]
  held_out: bool


def available() -> bool:
  """Whether tinysoundfont is installed."""
  return importlib.util.find_spec("tinysoundfont") is not None


def plain_keys(low: int, high: int) -> list[int]:
  """The keys of the plain notes of an instrument with this range."""
  return [round(low + (high - low) * j / (KEYS - 1)) for j in range(KEYS)]


@functools.cache
def plain() -> tuple[Note, ...]:
  """One note of two seconds for each of the 8 keys of each of the 29 instruments."""
  return tuple(
    Note(f"{one['concept']}-{j}", one["concept"], one["programs"][j % len(one["programs"])],
         ((0.0, key, 100, SECONDS),), j % 4 == HELD_OUT)
    for one in names.table("instruments")["instruments"] for j, key in enumerate(plain_keys(one["low"], one["high"]))
  )  # fmt: skip


@functools.cache
def extra() -> tuple[Note, ...]:
  """Further training notes of each instrument: other velocities and lengths, phrases, chords; no held-out key."""
  notes = []
  for one in names.table("instruments")["instruments"]:
    held_out = {key for j, key in enumerate(plain_keys(one["low"], one["high"])) if j % 4 == HELD_OUT}
    keys = [key for key in range(one["low"], one["high"] + 1) if key not in held_out]
    rng = random.Random(f"notes:{one['concept']}")  # a text seed gives the same on every machine
    for j in range(EXTRA_NOTES + PHRASES):
      program = one["programs"][j % len(one["programs"])]
      events = _note(keys, rng) if j < EXTRA_NOTES else _phrase(keys, rng)
      notes.append(Note(f"{one['concept']}-{KEYS + j}", one["concept"], program, events, False))
  return tuple(notes)


def _note(keys: list[int], rng: random.Random) -> tuple[tuple[float, int, int, float], ...]:
  return ((0.0, rng.choice(keys), rng.randint(50, 127), rng.choice((0.3, 0.7, 1.2, SECONDS))),)


def _phrase(keys: list[int], rng: random.Random) -> tuple[tuple[float, int, int, float], ...]:
  """A melody in small steps, with a second voice in one of four cases."""
  step, place = rng.choice((0.2, 0.25, 0.33, 0.5)), rng.randrange(len(keys))
  second = rng.randint(3, 5) if rng.random() < 0.25 else 0
  events = []
  for n in range(int(SECONDS / step)):
    place = min(max(place + rng.randint(-4, 4), 0), len(keys) - 1)
    velocity, length = rng.randint(70, 120), step * rng.uniform(0.6, 1.3)
    events.append((n * step, keys[place], velocity, length))
    if second and place + second < len(keys):
      events.append((n * step, keys[place + second], velocity, length))
  return tuple(events)


def render(soundfont: bytes, notes: Iterable[Note]) -> Iterator[tuple[Note, Float32[np.ndarray, " n"]]]:
  """Renders each note as two seconds of mono sound at 44,100 Hz with peak 0.5; silence where nothing is heard.

  Raises:
    ValueError: if the soundfont cannot be read.
    ImportError: if tinysoundfont is not installed.
  """
  synth = _synth_class()(samplerate=RATE)
  try:
    font = synth.sfload(soundfont)
  except Exception as error:
    raise ValueError(f"not a readable soundfont ({error})") from error
  for note in notes:
    synth.program_select(0, font, 0, note.program)
    yield note, _play(synth, note)
    synth.sounds_off(0)
    synth.generate(RATE // 2)  # what still rings is not part of the next note


def _synth_class():
  """tinysoundfont's synthesizer, with an empty module for pyaudio where that is missing: only playing needs it."""
  missing = importlib.util.find_spec("pyaudio") is None
  if missing:
    sys.modules["pyaudio"] = types.ModuleType("pyaudio")
  try:
    import tinysoundfont

    return tinysoundfont.Synth
  finally:
    if missing:
      del sys.modules["pyaudio"]


def _play(synth, note: Note) -> Float32[np.ndarray, " n"]:
  total = int(SECONDS * RATE)
  changes = []
  for start, key, velocity, length in note.events:
    changes.append((min(int(start * RATE), total), 1, key, velocity))
    changes.append((min(int((start + length) * RATE), total), 0, key, 0))
  parts, now = [], 0
  for when, begins, key, velocity in sorted(changes):
    if when > now:
      parts.append(np.frombuffer(bytes(synth.generate(when - now)), np.float32))
      now = when
    (synth.noteon(0, key, velocity) if begins else synth.noteoff(0, key))
  if now < total:
    parts.append(np.frombuffer(bytes(synth.generate(total - now)), np.float32))
  sound = np.concatenate(parts).reshape(-1, 2).mean(axis=1)
  peak = float(np.abs(sound).max())
  return sound * np.float32(_PEAK / peak) if peak > _SILENT else np.zeros_like(sound)


def flac(samples: Float32[np.ndarray, " n"]) -> bytes:
  """A mono sound at 44,100 Hz as a FLAC file of 16 bits."""
  out = io.BytesIO()
  soundfile.write(out, samples, RATE, format="FLAC", subtype="PCM_16")
  return out.getvalue()

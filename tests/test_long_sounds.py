"""Sounds that are too long to be held: windows of them are those of the whole sound."""

import io

import numpy as np
import pytest
import soundfile

from codebind_jax.data.preparation import audio as preparation
from codebind_jax.data.preparation import imagebind, languagebind, long_sounds
from codebind_jax.data.transforms import audio
from codebind_jax.trunks import aisfx

SECONDS = 40
KINDS = (("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"))


def encoded(samples, rate, kind="WAV", subtype="PCM_16"):
  out = io.BytesIO()
  soundfile.write(out, samples, rate, format=kind, subtype=subtype)
  return out.getvalue()


def sound(rate=16_000, channels=1, seconds=SECONDS):
  rng, t = np.random.default_rng(0), np.arange(seconds * rate) / rate
  tone = 0.3 * np.sin(2 * np.pi * (300 + 20 * t) * t) * np.linspace(0.2, 1, len(t))
  return tone[:, None] * np.linspace(1, 0.5, channels) + 0.05 * rng.normal(size=(len(t), channels))


@pytest.fixture
def short(monkeypatch):
  """Sounds of more than 30 s are long."""
  monkeypatch.setattr(audio, "LARGEST", 30 * audio.RATE)


def of_all(content, prepare):
  """What trunks prepare of a sound."""
  mel = preparation.Mel()
  imagebinds = imagebind._audio(content, clips=3, frames=204)
  return {"aisfx": preparation.Chunks(4)(content), "clap": mel(mel.read(content)), "imagebind": imagebinds,
          "languagebind": prepare(content)}  # fmt: skip


@pytest.mark.parametrize(("kind", "subtype"), KINDS)
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (48_000, 2)])
def test_trunks_hear_the_same_in_windows(kind, subtype, rate, channels, monkeypatch):
  content, prepare = encoded(sound(rate, channels), rate, kind, subtype), languagebind.Prepare("audio", (64, 300))
  whole = of_all(content, prepare)
  monkeypatch.setattr(audio, "LARGEST", 30 * audio.RATE)
  monkeypatch.setattr(audio, "BLOCK", 1000)
  assert long_sounds.long_sound(content) is not None
  for name, found in of_all(content, prepare).items():
    # Of the peak between samples the aisfx's is not divided by.
    np.testing.assert_allclose(found, whole[name], rtol=1e-4, atol=2e-2 if name == "aisfx" else 2e-3, err_msg=name)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_windows_of_one_channel_are_those_of_the_whole(channels, short, monkeypatch, tmp_path):
  path = tmp_path / "long.flac"
  path.write_bytes(encoded(sound(22_050, channels), 22_050, "FLAC"))
  mono = long_sounds.LongMono(long_sounds.long_sound(path), audio.RATE)
  monkeypatch.setattr(audio, "LARGEST", 1 << 27)
  whole = audio.read(path)
  assert len(mono) == len(whole)
  for start in (0, 1, 44_099, 700_001, len(whole) - 5000):
    np.testing.assert_allclose(mono[start : start + 5000], whole[start : start + 5000], atol=1e-5)


@pytest.mark.parametrize("case", ["opposite", "offset", "silent first"])
def test_what_is_judged_of_the_whole_is_judged_of_a_long_sound(case, short, monkeypatch, caplog):
  samples = sound(8_000, 2, 50)
  if case == "opposite":
    samples[:, 1] = -0.8 * samples[:, 0]
  elif case == "offset":
    samples = 0.1 * samples + 0.4
  else:
    samples[:, 0] = 0
  content = encoded(samples, 8_000, "FLAC")
  long = long_sounds.long_sound(content)
  channels = preparation.sound(content).samples[1000:1010]
  mono = long_sounds.LongMono(long, audio.RATE)[100_000:101_000]
  said = [record.message for record in caplog.records]
  monkeypatch.setattr(audio, "LARGEST", 1 << 27)
  np.testing.assert_allclose(mono, audio.read(content)[100_000:101_000], atol=1e-5)
  np.testing.assert_array_equal(channels, preparation.sound(content).samples[1000:1010])
  assert any("taken" in line for line in said), said


def test_long_sounds_that_are_damaged_are_named(short, tmp_path):
  content = encoded(sound(), 16_000, "FLAC")
  (tmp_path / "cut.flac").write_bytes(content[: len(content) // 2])
  with pytest.raises(ValueError, match=r"cut\.flac: "):
    preparation.Chunks(2)(tmp_path / "cut.flac")
  (tmp_path / "two.flac").write_bytes(content + content)
  with pytest.raises(ValueError, match=r"two\.flac: is several sounds"):
    preparation.sound(tmp_path / "two.flac")
  loud = sound()
  loud[-9] = np.nan
  (tmp_path / "nan.wav").write_bytes(encoded(loud, 16_000, subtype="FLOAT"))
  with pytest.raises(ValueError, match=r"nan\.wav: samples must be finite"):
    preparation.Chunks(2)(tmp_path / "nan.wav")
  with pytest.raises(ValueError, match="cut it into parts"):
    audio.read(encoded(sound(), 16_000))
  with pytest.raises(ValueError, match="at once"):
    long_sounds.long_sound(encoded(sound(44_100), 44_100, "FLAC"))[:]


def test_an_augmentation_takes_a_window_of_a_long_sound(short):
  from codebind_jax.data.augment.audio import Waveform

  item = aisfx.make_trunk(weights="random", widths=(2, 2), chunks=2).input
  opened = item.opened("audio", encoded(sound(), 16_000))
  seen = Waveform(seconds=5.0)(opened, np.random.default_rng(0))
  assert seen.shape == (5 * audio.RATE,) and item.prepare(seen).shape == item.shape

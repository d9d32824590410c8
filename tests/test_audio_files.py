"""Sounds as people have them: cut off, with lying headers, wired the wrong way, too short, of other integer types."""

import io
import struct

import numpy as np
import pytest
import soundfile

from codebind_jax.data import mp3
from codebind_jax.data.preparation import spectrograms
from codebind_jax.data.preparation.audio import Mel, sound
from codebind_jax.data.transforms import audio

TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(44100) / 44100)).astype(np.float32)


def encoded(samples, kind, rate=44100, **options):
  out = io.BytesIO()
  soundfile.write(out, samples, rate, format=kind, **options)
  return out.getvalue()


def rms(samples):
  return float(np.sqrt(np.square(samples, dtype=np.float64).mean()))


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "AU", "W64", "RF64", "FLAC", "MP3", "CAF"])
@pytest.mark.parametrize("share", [0.5, 0.85])
def test_a_sound_that_is_cut_off_is_refused_with_its_name(kind, share, tmp_path):
  whole = encoded(TONE, kind)
  assert abs(len(audio.read(whole)) - 44100) <= 1152
  (tmp_path / "cut").write_bytes(whole[: int(share * len(whole))])
  with pytest.raises(ValueError, match=r"cut: (cut off|not a readable sound)"):
    audio.read(tmp_path / "cut")
  with pytest.raises(ValueError, match="audio bytes: (cut off|not a readable sound)"):
    audio.read((tmp_path / "cut").read_bytes())


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "AU", "W64", "RF64"])
def test_where_the_header_tells_the_size_a_look_at_it_is_enough(kind, tmp_path):
  whole = encoded(TONE, kind)
  (tmp_path / "whole").write_bytes(whole)
  audio.check(tmp_path / "whole")
  (tmp_path / "cut").write_bytes(whole[:-2000])
  with pytest.raises(ValueError, match=r"cut: cut off, its header says \d+ (bytes of )?samples and there are \d+"):
    audio.check(tmp_path / "cut")


def test_an_ogg_file_that_is_cut_between_pages_is_said_to_be_once(tmp_path, caplog):
  noise = np.random.default_rng(0).normal(0, 0.1, 4 * 44100)
  whole = encoded(noise, "OGG")
  (tmp_path / "whole.ogg").write_bytes(whole)
  (tmp_path / "cut.ogg").write_bytes(whole[: whole.rfind(b"OggS")])
  assert len(audio.read(tmp_path / "whole.ogg")) == len(noise) and not caplog.messages
  for _ in range(2):
    assert 0 < len(audio.read(tmp_path / "cut.ogg")) < len(noise)
  assert len(caplog.messages) == 1 and "cut.ogg: has no end mark" in caplog.messages[0]


def test_an_mp3_file_that_lacks_a_frame_or_two_is_read_and_it_is_said(tmp_path, caplog):
  whole = encoded(TONE, "MP3")
  audio.read(whole)
  assert not caplog.messages
  (tmp_path / "short.mp3").write_bytes(whole[:-20])
  assert 0 < 44100 - len(audio.read(tmp_path / "short.mp3")) <= 2304
  assert "short.mp3: cut off, its header says 44100 samples and there are 4" in caplog.text


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [44100, 22050, 11025])
def test_an_mp3_file_of_changing_bit_rate_is_read_to_its_end(channels, rate, tmp_path, caplog):
  rng = np.random.default_rng(0)
  loud, quiet = rng.normal(0, 0.2, (2 * rate, channels)), 1e-4 * rng.normal(size=(6 * rate, channels))
  whole = encoded(np.concatenate([loud, quiet]), "MP3", rate)
  found = mp3.frames(whole)
  assert found.tells
  bare = whole[found.parts[0][0] :]  # without the frame that tells the length
  assert not mp3.frames(bare).tells
  with soundfile.SoundFile(io.BytesIO(bare)) as guessed:
    assert guessed.frames < 6 * rate
  (tmp_path / "bare.mp3").write_bytes(bare)
  want, _ = soundfile.read(io.BytesIO(whole), dtype="float32", always_2d=True)
  for value in (tmp_path / "bare.mp3", bare, b"ID3\x03\0\0\0\0\0\x05hello" + bare, bare + b"TAG" + bytes(125)):
    got, _ = audio.read_channels(value)
    assert abs(len(got) - len(want)) <= 4 * 1152
    lag = int(np.argmax(np.correlate(got[: rate // 2, 0], want[2000 : rate // 4, 0], "valid"))) - 2000
    assert np.abs(got[lag + 4000 :][: rate, 0] - want[4000:][: rate, 0]).max() < 0.02
  assert not caplog.messages
  (tmp_path / "cut.mp3").write_bytes(bare[:-10])
  audio.read(tmp_path / "cut.mp3")
  assert "cut.mp3: its last frame is not whole" in caplog.text


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_a_wav_file_that_was_written_into_a_pipe_is_whole(size):
  content = bytearray(encoded(TONE, "WAV"))
  content[40:44] = struct.pack("<I", size)
  np.testing.assert_allclose(audio.read(bytes(content)), TONE, atol=1e-4)


def test_a_header_is_not_believed_before_memory_is_taken():
  flac = bytearray(encoded(TONE, "FLAC"))
  flac[21] = (flac[21] & 0xF0) | 0xF  # 36 bits of a count of samples: 256 GiB as floats
  flac[22:26] = b"\xff" * 4
  with pytest.raises(ValueError, match="audio bytes: its header says 68,71.* samples of 1 channels; allowed"):
    audio.read(bytes(flac))
  mp3 = bytearray(encoded(TONE, "MP3"))
  place = mp3.find(b"Xing") if b"Xing" in mp3 else mp3.find(b"Info")
  mp3[place + 8 : place + 12] = struct.pack(">I", 2**24)
  with pytest.raises(ValueError, match="audio bytes: its header says .* samples of 1 channels"):
    audio.read(bytes(mp3))
  flac[21:26] = bytes([flac[21] & 0xF0, 0, 0, 0, 0])  # a count that is not known
  with pytest.raises(ValueError, match="audio bytes: its header does not say how long it is"):
    audio.read(bytes(flac))


@pytest.mark.parametrize("read", [audio.read, Mel(rate=44100).read])
def test_channels_that_cancel_are_not_silence(read, tmp_path, caplog):
  other = np.random.default_rng(0).normal(size=len(TONE)).astype(np.float32)
  cases = {"inverted": (TONE, -TONE), "nearly": (TONE + 0.001 * other, -TONE), "louder": (-0.5 * TONE, 0.51 * TONE)}
  for name, channels in cases.items():
    soundfile.write(tmp_path / f"{name}.wav", np.stack(channels, axis=1), 44100, subtype="FLOAT")
    got = read(tmp_path / f"{name}.wav")
    assert rms(got) == pytest.approx(max(map(rms, channels)), rel=1e-3), name
    assert sum(f"{name}.wav: its channels cancel each other" in message for message in caplog.messages) == 1
    caplog.clear()
  # Unrelated, equal and empty channels are averaged as ever.
  for channels in ((TONE, 0.1 * other), (TONE, TONE), (TONE, 0 * TONE), (TONE, -0.3 * TONE)):
    np.testing.assert_array_equal(read(np.stack(channels, axis=1)), np.stack(channels, axis=1).mean(axis=1))
  assert not caplog.messages


def test_channels_that_cancel_under_noise_offsets_and_for_a_while(caplog):
  rng = np.random.default_rng(0)
  sound_, one, two = rng.normal(0, 0.1, (3, 3 * 44100)).astype(np.float32)
  quiet = np.float32(10 ** (-15 / 20))
  half = np.where(np.arange(len(one)) < len(one) // 2, 1, -1)
  cases = {
    "noise": (sound_ + quiet * one, -sound_ + quiet * two), "weaker": (sound_, -0.8 * sound_),
    "half": (sound_, half * sound_), "offsets": (sound_ + 0.2, -sound_ + 0.2),
    "unlike offsets": (sound_ + 0.2, -sound_), "pauses": (half * sound_ + quiet * one, -half * sound_ + quiet * two),
  }  # fmt: skip
  for name, channels in cases.items():
    stereo = np.stack(channels, axis=1).astype(np.float32)
    got = audio.mono(stereo, name)
    assert np.corrcoef(got, channels[0])[0, 1] > 0.99 and got.std() == pytest.approx(channels[0].std(), rel=0.01), name
    assert f"{name}: its channels cancel each other; channel 0 is taken alone" in caplog.messages
  brief = sound_[:30000]
  turned = np.concatenate([brief[:15000], -brief[15000:]])
  np.testing.assert_array_equal(audio.mono(np.stack([brief, turned], axis=1)), brief)
  long = rng.normal(0, 0.1, (30 * 8000, 1)).astype(np.float32) * np.ones(2, np.float32)
  long[8000 : 3 * 8000 + 2 * 4000, 1] *= -1  # three seconds of thirty
  np.testing.assert_array_equal(audio.mono(long, "long", 8000), long[:, 0])
  caplog.clear()
  # A second of thirty that cancels is ordinary stereo, as is a correlation of -0.5, and what is not heard.
  brief = long.copy()
  brief[:, 1] = np.where(np.arange(len(brief)) // 8000 == 4, -1, 1) * brief[:, 0]
  for stereo, rate in (
    (np.stack([sound_, -0.5 * sound_ + 0.87 * one], axis=1), 44100), (brief, 8000),
    (np.concatenate([np.stack([sound_, one], axis=1), 1e-3 * np.stack([sound_, -sound_], axis=1)]), 44100),
  ):  # fmt: skip
    np.testing.assert_array_equal(audio.mono(stereo, "ordinary", rate), stereo.mean(axis=1))
  assert not caplog.messages


def test_an_offset_is_no_sound_in_a_first_channel(caplog):
  got = sound(np.stack([0 * TONE + np.float32(0.1), TONE], axis=1)).samples
  np.testing.assert_array_equal(got[:, 0], TONE)


@pytest.mark.parametrize("kind", ["MP3", "OGG", "FLAC"])
@pytest.mark.parametrize("between", [b"", b"ID3\x03\0\0\0\0\0\x05hello", b"TAG" + bytes(125)])
def test_sounds_one_behind_another_are_all_read(kind, between, tmp_path, caplog):
  if between and kind == "OGG":
    return
  first, second = (np.random.default_rng(seed).normal(0, 0.1, (44100, 2)) for seed in (0, 1))
  one, two = encoded(first, kind), encoded(second, kind)
  (tmp_path / "both").write_bytes(one + between + two)
  want = np.concatenate([audio.read_channels(part)[0] for part in (one, two)])
  for value in (tmp_path / "both", (tmp_path / "both").read_bytes()):
    got, rate = audio.read_channels(value)
    assert rate == 44100 and abs(len(got) - 2 * 44100) <= 3 * 1152
    if kind != "MP3":
      np.testing.assert_array_equal(got, want)
    for part in (slice(4000, 40000), slice(50000, 80000)):
      lags = np.fft.irfft(np.fft.rfft(got[:, 0], 1 << 18) * np.conj(np.fft.rfft(want[part, 0], 1 << 18)))
      assert lags.max() / np.square(want[part, 0]).sum() > 0.95
  if kind == "MP3":  # of files that do not tell their length, and with zeros between them
    bare = [content[mp3.frames(content).parts[0][0] :] for content in (one, two)]
    for middle in (between, between + bytes(999)):
      assert abs(len(audio.read(bare[0] + middle + bare[1])) - 2 * 44100) <= 4 * 1152
  audio.check(tmp_path / "both")
  assert "both: " in caplog.text and "one behind another" in caplog.text
  with pytest.raises(ValueError, match="audio bytes: .*several"):
    audio.read(one + encoded(second[:, 0], kind))
  with pytest.raises(ValueError, match="audio bytes: .*several"):
    audio.read(one + encoded(second, kind, 22050))


@pytest.mark.parametrize("kind", ["WAV", "AIFF"])
def test_files_of_one_chunk_one_behind_another_are_refused(kind, tmp_path):
  (tmp_path / "both").write_bytes(2 * encoded(TONE[:999], kind))
  for look in (audio.read, audio.check, lambda path: audio.read(path.read_bytes())):
    with pytest.raises(ValueError, match="(both|bytes): is several (wav|aiff) files one behind another"):
      look(tmp_path / "both")


def test_an_mp3_file_that_is_cut_is_refused_at_a_look(tmp_path):
  whole = encoded(np.random.default_rng(0).normal(0, 0.1, 10 * 44100), "MP3")
  (tmp_path / "whole.mp3").write_bytes(whole + b"TAG" + bytes(125))
  audio.check(tmp_path / "whole.mp3")
  (tmp_path / "cut.mp3").write_bytes(whole[: len(whole) // 2])
  for look in (audio.read, audio.check):
    with pytest.raises(ValueError, match=r"cut\.mp3: cut off, its header says 441000 samples"):
      look(tmp_path / "cut.mp3")


def test_what_is_no_sound_that_is_read_says_what_it_is_and_what_is(tmp_path):
  nothing = bytearray(encoded(TONE, "WAV"))
  nothing[40:44] = bytes(4)
  files = {
    "a.m4a": (b"\0\0\0\x20ftypM4A " + bytes(200), r"MPEG-4 .*not supported; allowed: wav"),
    "a.webm": (b"\x1aE\xdf\xa3" + bytes(200), r"webm.* not supported; allowed: wav"),
    "a.raw": (b"\xd2" * 330, "not supported; allowed: wav"), "empty.mp3": (b"", "the file is empty"),
    "zero.wav": (bytes(nothing), "has no samples"), "head.wav": (bytes(nothing[:44]), "has no samples"),
  }  # fmt: skip
  for name, (content, message) in files.items():
    (tmp_path / name).write_bytes(content)
    for look in (audio.read, audio.check):
      with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        look(tmp_path / name)


def test_silence_is_said(tmp_path, caplog):
  soundfile.write(tmp_path / "zero.wav", 0 * TONE, 44100)
  assert not audio.read(tmp_path / "zero.wav").any()
  audio.read_channels(np.full((9, 2), 0.25))
  assert "zero.wav: is silent, all its samples are 0" in caplog.text and "all its samples are 0.25" in caplog.text


def test_where_the_first_channel_alone_is_taken_it_is_not_a_silent_one(tmp_path, caplog):
  soundfile.write(tmp_path / "right.wav", np.stack([0 * TONE, TONE], axis=1), 44100, subtype="FLOAT")
  np.testing.assert_array_equal(sound(tmp_path / "right.wav").samples[:, 0], TONE)
  assert "right.wav: its first channel is silent; channel 1 is taken" in caplog.text
  caplog.clear()
  np.testing.assert_array_equal(sound(np.stack([0.01 * TONE, TONE], axis=1)).samples[:, 0], np.float32(0.01) * TONE)
  assert not caplog.messages


def test_an_offset_that_drowns_the_sound_is_taken_off(caplog):
  np.testing.assert_allclose(audio.read(TONE + np.float32(0.5)), TONE, atol=1e-4)
  assert "an offset of 0.5" in caplog.text
  np.testing.assert_array_equal(audio.read(TONE + np.float32(0.1)), TONE + np.float32(0.1))


def test_integer_arrays_have_the_full_scale_of_wav_files():
  for kind, middle, scale in ((np.int16, 0, 2**15), (np.int32, 0, 2**31), (np.uint8, 128, 2**7)):
    samples = (np.round(TONE.astype(np.float64) * (scale - 1)) + middle).astype(kind)
    np.testing.assert_allclose(audio.read(samples), TONE, atol=1.0 / scale + 1e-6)
  assert audio.read(np.array([-(2**31), 2**31 - 1], np.int32)).tolist() == [-1.0, 1.0]
  assert audio.read(np.array([0, 128, 255], np.uint8)).tolist() == [-1.0, 0.0, 127 / 128]
  with pytest.raises(ValueError, match="int32 samples of -9830 to 9830 look like 16-bit ones"):
    audio.read(np.round(TONE * 32767).astype(np.int32))
  with pytest.raises(ValueError, match="int32 samples of -2516582 to 2516582 look like 24-bit ones"):
    audio.read(np.round(TONE * 8388607).astype(np.int32))
  quiet = np.round(0.01 * TONE * 8388607).astype(np.int32) * 256  # below 2**23, and rightly so
  np.testing.assert_allclose(audio.read(quiet), 0.01 * TONE, atol=1e-6)
  for kind in (">i2", ">f4", ">i4"):
    samples = TONE if kind == ">f4" else np.round(TONE.astype(np.float64) * (2 ** (8 * int(kind[2]) - 1) - 1))
    np.testing.assert_allclose(audio.read(samples.astype(kind)), TONE, atol=1e-4)
  for kind in (np.int8, np.int64, np.uint16, bool, complex):
    with pytest.raises(ValueError, match="allowed are float, int16, int32 or uint8"):
      audio.read(np.zeros(9, kind))
  with pytest.raises(ValueError, match="9 channels, allowed are 1 to 5; is the array transposed"):
    audio.read(np.zeros((5, 9), np.float32))


@pytest.mark.parametrize("rate", [500, 800_000])
def test_rates_out_of_range_name_the_file(rate, tmp_path):
  soundfile.write(tmp_path / "odd.wav", TONE, rate)
  for read in (audio.read, audio.check, sound, Mel().read):
    with pytest.raises(ValueError, match=rf"odd\.wav: got a rate of {rate} Hz"):
      read(tmp_path / "odd.wav")


def test_sounds_shorter_than_a_frame_are_heard():
  short = [(0.3 * np.sin(2 * np.pi * hertz * np.arange(1014) / 44100)).astype(np.float32) for hertz in (300, 3000)]
  low, high, silent = (spectrograms.imagebind_log_mel(x) for x in (*short, 0 * short[0]))
  assert np.isfinite(low).all() and np.abs(low - high).max() > 1 and np.abs(low - silent).max() > 1
  assert spectrograms.kaldi_log_mel(np.ones(5)).shape == (1, 128)
  # By hand: five samples and zeros are one frame.
  few = np.array([0.1, -0.2, 0.3, -0.1, -0.1])
  np.testing.assert_array_equal(spectrograms.kaldi_log_mel(few), spectrograms.kaldi_log_mel(np.pad(few, (0, 395))))


def test_every_other_way_to_be_no_sound_names_the_file(tmp_path):
  (tmp_path / "a.raw").write_bytes(bytes(100))
  (tmp_path / "empty.wav").write_bytes(b"")
  soundfile.write(tmp_path / "none.wav", np.zeros(0), 44100)
  values = np.array([0.1, np.nan, 0.2])
  soundfile.write(tmp_path / "nan.wav", values, 44100, subtype="FLOAT")
  (tmp_path / "folder.wav").mkdir()
  for name in ("a.raw", "empty.wav", "none.wav", "nan.wav", "folder.wav", "a\0.wav", "x" * 300 + ".wav"):
    with pytest.raises(ValueError, match=name[:4]):
      audio.read(tmp_path / name)
  soundfile.write(tmp_path / "a.wav", TONE, 44100)
  with pytest.raises(ValueError, match="null"):  # libsndfile would take the name up to the null
    audio.read(f"{tmp_path}/a.wav\0.wav")

"""Audio: files and arrays to samples; spectrograms against a second implementation; aiSFX against numpy and torch."""

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from codebind_jax.data.preparation import spectrograms
from codebind_jax.data.preparation.audio import chunks_of
from codebind_jax.data.transforms import audio
from codebind_jax.trunks import aisfx, load_trunk
from codebind_jax.trunks.checkpoint_files import array_weights
from tests.pretrained_fixtures import package

FIXTURES = Path(__file__).parent / "fixtures"
pytestmark = pytest.mark.usefixtures("quick_compiler")


def tone(seconds=0.5, rate=audio.RATE, hertz=440.0):
  return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def encoded(samples, rate, kind="WAV", **options):
  out = io.BytesIO()
  soundfile.write(out, samples, rate, format=kind, **options)
  return out.getvalue()


@pytest.mark.parametrize(("kind", "tolerance"), [("WAV", 1e-4), ("FLAC", 1e-4), ("OGG", 0.05), ("MP3", 0.05)])
def test_every_format_gives_the_same_mono_samples(kind, tolerance, tmp_path):
  stereo = np.stack([tone(), 0.2 * tone(hertz=880.0)], axis=1)
  content = encoded(stereo, audio.RATE, kind)
  (tmp_path / "a").write_bytes(content)
  for value in (content, tmp_path / "a", str(tmp_path / "a")):
    got = audio.read(value)
    assert got.dtype == np.float32 and got.ndim == 1
    lag = 0 if kind != "MP3" else int(np.argmax(np.correlate(got, stereo.mean(axis=1), "valid")))
    middle = slice(2000, 18000)
    np.testing.assert_allclose(got[lag:][middle], stereo.mean(axis=1)[middle], atol=tolerance)
  audio.check(tmp_path / "a")


@pytest.mark.parametrize("rate", [5_000, 16_000, 22_254, 48_000, 96_000])
def test_other_rates_keep_pitch_and_length(rate):
  got = audio.read(encoded(tone(1.0, rate), rate))
  assert abs(len(got) - audio.RATE) <= 9
  np.testing.assert_allclose(got[4000:-4000], tone(1.0)[4000 : len(got) - 4000], atol=0.01)


def test_an_mp3_whose_tag_is_odd_is_read_all_the_same():
  content = encoded(tone(), audio.RATE, "MP3")
  odd = b"ID3\x03" + bytes(20) + content
  with pytest.raises(soundfile.LibsndfileError):
    soundfile.read(io.BytesIO(odd))
  assert len(audio.read(odd)) == len(audio.read(content))


def test_arrays_are_checked_and_passed_on():
  samples = tone()
  np.testing.assert_array_equal(audio.read(samples), samples)
  np.testing.assert_allclose(audio.read((samples * 32768).astype(np.int16)), samples, atol=1e-4)
  np.testing.assert_array_equal(audio.read(np.stack([samples, -samples], axis=1)), samples)  # not their mean, silence


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (np.zeros(0, np.float32), r"shape \(0,\)"),
    (np.zeros((2, 44100), np.float32), "44100 channels, allowed are 1 to 32; is the array transposed"),
    (np.array([0.0, np.nan]), "must be finite"),
    (np.array([0.0, 20000.0]), "full scale 1 .*got 0 to 20000"),
    (np.zeros(9, np.int64), "type int64"),
    (b"RIFFnothing", "audio bytes: not a readable sound"),
    (3, "got int, allowed are a path, bytes or an array"),
  ],
)
def test_bad_sounds_are_named(value, message):
  with pytest.raises(ValueError, match=message):
    audio.read(value)


def test_bad_files_are_named(tmp_path):
  (tmp_path / "text.wav").write_text("hello")
  for look in (audio.read, audio.check):
    with pytest.raises(ValueError, match=r"text\.wav: not a readable sound"):
      look(tmp_path / "text.wav")
    with pytest.raises(ValueError, match=r"none\.wav: no such file"):
      look(tmp_path / "none.wav")
  with pytest.raises(ValueError, match="rate of 10 Hz, allowed are 1000 to 768000"):
    audio.resample(tone(), 10, audio.RATE)


def test_loop_to_repeats_and_never_cuts():
  np.testing.assert_array_equal(spectrograms.loop_to(np.array([1.0, 2.0, 3.0]), 7), [1, 2, 3, 1, 2, 3, 1])
  assert len(spectrograms.loop_to(np.ones(9), 7)) == 9


@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
def test_spectrograms_equal_those_of_transformers():
  other = pytest.importorskip("transformers.audio_utils")
  rng = np.random.default_rng(0)
  x = (rng.normal(0.02, 0.1, 16000) + tone(1.0, 16000)).astype(np.float32)
  bank = other.mel_filter_bank(257, 128, 20, 8000, 16000, None, "kaldi", True)
  want = other.spectrogram(
    x - x.mean(), other.window_function(400, "hann", periodic=False), 400, 160, fft_length=512, power=2.0,
    center=False, preemphasis=0.97, mel_filters=bank, log_mel="log", mel_floor=np.finfo(np.float32).eps,
    remove_dc_offset=True,
  )  # fmt: skip
  np.testing.assert_allclose(spectrograms.kaldi_log_mel(x), want.T, atol=1e-5)
  bank = other.mel_filter_bank(1025, 96, 0, 22050, 44100, None, "htk", True)
  want = other.spectrogram(
    x / np.abs(x).max(), other.window_function(2048, "hann"), 2048, 1024, power=2.0, pad_mode="constant",
    mel_filters=bank / bank.sum(axis=0).clip(1e-10),
  )  # fmt: skip
  np.testing.assert_allclose(spectrograms.sfx_log_mel(x), np.log10(1 + 1e4 * want.T) / 9.457798957824707, atol=1e-5)


def test_sfx_log_mel_does_not_hear_loudness_and_is_finite_in_silence():
  np.testing.assert_allclose(spectrograms.sfx_log_mel(tone()), spectrograms.sfx_log_mel(0.01 * tone()), atol=1e-4)
  assert not spectrograms.sfx_log_mel(np.zeros(5000)).any()
  assert spectrograms.sfx_log_mel(tone(0.01)).shape == (1, 96)


def test_imagebind_clips_lie_evenly_and_short_sounds_are_filled():
  x = tone(7.0)
  clips = spectrograms.imagebind_log_mel(x)
  assert clips.shape == (3, 128, 204, 1) and clips.dtype == np.float32
  sixteen = audio.sinc_resample(x, audio.RATE, 16_000)
  middle = spectrograms.kaldi_log_mel(sixteen[40_000:72_000])
  assert middle.shape == (198, 128)  # 2 s; the release fills the other 6 frames with zeros before it normalises
  np.testing.assert_allclose(clips[1, :, :198, 0], (middle.T + 4.268) / 9.138, atol=1e-5)
  np.testing.assert_allclose(clips[:, :, 198:], 4.268 / 9.138, atol=1e-6)
  short = spectrograms.imagebind_log_mel(tone(0.5))
  np.testing.assert_allclose(short[0], short[2], atol=1e-5)
  with pytest.raises(ValueError, match="clips: got 0"):
    spectrograms.imagebind_log_mel(x, clips=0)


# --- aiSFX


def random_state(widths, rng):
  """A state dictionary as torch would save it, with batch statistics far from the identity."""
  state, inside = {}, 1
  for block, out in enumerate(widths, 1):
    for layer in (1, 2):
      name = f"embedding_net.conv_block{block}."
      state[f"{name}conv{layer}.weight"] = rng.normal(0, 0.5, (out, inside, 3, 3)).astype(np.float32)
      state[f"{name}bn{layer}.weight"] = rng.uniform(0.5, 1.5, out).astype(np.float32)
      state[f"{name}bn{layer}.running_var"] = rng.uniform(0.1, 2.0, out).astype(np.float32)
      for part in ("bias", "running_mean"):
        state[f"{name}bn{layer}.{part}"] = rng.normal(0, 0.5, out).astype(np.float32)
      inside = out
  return state


def plain_aisfx(state, mel, blocks):
  """The network in plain numpy on one chunk [t, f], batch norms not folded; its 512 values."""
  x = mel[..., None].astype(np.float64)
  for block in range(1, blocks + 1):
    for layer in (1, 2):
      name = f"embedding_net.conv_block{block}."
      padded, weight = np.pad(x, ((1, 1), (1, 1), (0, 0))), state[f"{name}conv{layer}.weight"]
      y = sum(padded[i : i + x.shape[0], j : j + x.shape[1]] @ weight[:, :, i, j].T for i in range(3) for j in range(3))
      mean, variance, scale, bias = (
        state[f"{name}bn{layer}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
      x = np.maximum((y - mean) / np.sqrt(variance + 1e-5) * scale + bias, 0.0)
    if block < blocks:
      t, f = x.shape[0] // 2, x.shape[1] // 2
      x = x[: 2 * t, : 2 * f].reshape(t, 2, f, 2, -1).max(axis=(1, 3))
  return x.mean(axis=1).max(axis=0)


def test_aisfx_equals_plain_numpy_and_averages_the_chunks_that_are_there():
  rng = np.random.default_rng(0)
  widths = (3, 5)
  state = random_state(widths, rng)
  trunk = load_trunk("aisfx", weights="random", widths=widths, chunks=3)
  params = aisfx.load(trunk.shapes, array_weights(state, "state"))
  mels = [rng.uniform(0, 1, (frames, 96)).astype(np.float32) for frames in (100, 160)]
  tokens = jax.jit(trunk.apply)(params, trunk.collate([chunks_of(mel, 3) for mel in mels]))
  assert tokens.shape == (2, 1, 5)
  np.testing.assert_allclose(tokens[0, 0], plain_aisfx(state, mels[0], 2), atol=1e-4, rtol=1e-4)
  both = [plain_aisfx(state, mels[1][start : start + 100], 2) for start in (0, 50)]
  np.testing.assert_allclose(tokens[1, 0], np.mean(both, axis=0), atol=1e-4, rtol=1e-4)
  del state["embedding_net.conv_block2.bn1.bias"]
  with pytest.raises(ValueError, match=r"state: missing tensor embedding_net.conv_block2.bn1.bias"):
    aisfx.load(trunk.shapes, array_weights(state, "state"))


def test_chunks_are_thinned_evenly_and_short_sounds_repeated():
  mel = np.arange(450, dtype=np.float32)[:, None] * np.ones(96, np.float32)
  assert chunks_of(mel, 3)[:, 0, 0].tolist() == [0.0, 200.0, 350.0]  # of 0, 50, ..., 350
  some = chunks_of(mel[:100], 2)
  assert some[0, 99, 0] == 99 and (some[1] == -1).all()
  trunk = load_trunk("aisfx", weights="random", widths=(4, 4))
  prepared = trunk.preprocess(tone(0.2))
  assert prepared.shape == (6, 100, 96) and (prepared[0] >= 0).all() and (prepared[1:] == -1).all()
  assert trunk.preprocess(tone(9.0)).min() >= 0


def test_aisfx_options_are_checked_and_change_the_fingerprint(tmp_path):
  with pytest.raises(ValueError, match="chunks: got 0"):
    load_trunk("aisfx", chunks=0)
  with pytest.raises(ValueError, match="does not exist"):
    load_trunk("aisfx", weights=tmp_path / "none.pth")
  one, two = (load_trunk("aisfx", weights="random", widths=(4, 4), chunks=n) for n in (1, 2))
  assert one.fingerprint != two.fingerprint and (one.width, one.num_tokens, one.modality) == (4, 1, "audio")


def test_aisfx_real_weights_equal_torch():
  trunk = load_trunk("aisfx", weights=package("aisfx"))
  mel = np.random.default_rng(0).uniform(0, 1, (2, 1, 100, 96)).astype(np.float32)
  want = np.load(FIXTURES / "pretrained_aisfx.npz")["pooled"]
  got = trunk.compiled(trunk.params, jnp.asarray(mel))[:, 0]
  np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())

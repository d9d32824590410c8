"""EEG: files and arrays to microvolts, patches against hand computation, the network that learns from them."""

import io
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codebind_jax.data.transforms import eeg
from codebind_jax.models.series import Series
from codebind_jax.trunks import eeg_patches, load_trunk

WAVES = (20.0 * np.sin(np.arange(200) / 5.0 + np.arange(3)[:, None])).astype(np.float32)
pytestmark = pytest.mark.usefixtures("quick_compiler")


def edf(path, signals, unit, rate=100):
  """A minimal EDF file: one data record a second, 16-bit samples, physical range -200 to 200."""
  names = [f"EEG {i:03d}" for i in range(len(signals))]
  records = signals.shape[1] // rate
  text = lambda value, width: str(value).ljust(width).encode()
  head = b"".join([
    text("0", 8), text("X X X X", 80), text("Startdate 01-JAN-2000 X X X", 80), b"01.01.00", b"00.00.00",
    text(256 * (len(signals) + 1), 8), text("", 44), text(records, 8), text(1, 8), text(len(signals), 4),
    *(text(name, 16) for name in names), *(text("", 80) for _ in names), *(text(unit, 8) for _ in names),
    *(text(-200, 8) for _ in names), *(text(200, 8) for _ in names), *(text(-32768, 8) for _ in names),
    *(text(32767, 8) for _ in names), *(text("", 80) for _ in names), *(text(rate, 8) for _ in names),
    *(text("", 32) for _ in names),
  ])  # fmt: skip
  digital = np.round((signals + 200) / 400 * 65535 - 32768).astype("<i2")
  body = digital.reshape(len(signals), records, rate).transpose(1, 0, 2).tobytes()
  path.write_bytes(head + body)
  return path


def test_numpy_files_bytes_and_arrays(tmp_path):
  np.save(tmp_path / "a.npy", WAVES.astype(np.float64))
  out = io.BytesIO()
  np.save(out, (WAVES * 10).astype(np.int16))
  for value, want in ((tmp_path / "a.npy", WAVES), (out.getvalue(), np.trunc(WAVES * 10)), (WAVES, WAVES)):
    got = eeg.read(value)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-5)
  assert eeg.read(np.zeros((2, 5))).shape == (2, 5)


@pytest.mark.parametrize(("unit", "factor"), [("uV", 1.0), ("mV", 1000.0)])
def test_edf_is_converted_to_microvolts(unit, factor, tmp_path):
  got = eeg.read(edf(tmp_path / "a.edf", WAVES, unit))
  np.testing.assert_allclose(got, factor * WAVES, atol=0.01 * factor)
  assert (eeg.read((tmp_path / "a.edf").read_bytes()) == got).all()


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (1e-6 * WAVES, "looks like volts: multiply by 1e6"),
    (1e9 * WAVES, "allowed are microvolts up to 100000"),
    (WAVES[0], r"shape \(200,\), allowed are numbers \[channels, samples\]"),
    (np.full((2, 3), np.inf), "not finite"),
    (WAVES.repeat(700, axis=0), "up to 1024 channels"),
    (WAVES.astype(complex), "complex128"),
    (b"nothing", "eeg bytes: not a readable .npy file"),
    (struct.pack("<f", 1.0), "not a readable"),
    (3, "got int"),
  ],
)
def test_bad_recordings_are_named(value, message):
  with pytest.raises(ValueError, match=message):
    eeg.read(value)


def test_patches_are_means_over_time_standardised_by_training_rows(tmp_path):
  rng = np.random.default_rng(0)
  rows = rng.normal(5.0, 20.0, (30, 3, 22)).astype(np.float32)
  found = eeg_patches.statistics(rows, 4)
  np.savez(tmp_path / "s.npz", **found)
  options = {"channels": 3, "samples": 22, "width": 4, "statistics": tmp_path / "s.npz"}
  trunk = load_trunk("eeg_patches", **options)
  tokens = np.asarray(trunk.compiled(trunk.params, trunk.collate([trunk.preprocess(row) for row in rows])))
  assert tokens.shape == (30, 5, 3) and (trunk.num_tokens, trunk.width) == (5, 3)
  np.testing.assert_allclose(tokens.mean(axis=0), 0.0, atol=1e-5)
  np.testing.assert_allclose(tokens.std(axis=0), 1.0, atol=1e-4)
  second = (rows[:, 1, 8:12].mean(axis=1) - rows[:, 1, 8:12].mean()) / rows[:, 1, 8:12].mean(axis=1).std()
  np.testing.assert_allclose(tokens[:, 2, 1], second, atol=1e-4)
  flat = load_trunk("eeg_patches", flat=True, **options)
  one = flat.compiled(flat.params, flat.collate([flat.preprocess(rows[0])]))
  np.testing.assert_allclose(one[0, 0], tokens[0].ravel(), atol=1e-6)
  trained = load_trunk("eeg", **options | {"patch": options["width"], "width": 8})
  tower = Series(8).bind({"params": trained.params})
  seen = trained.compiled(trained.params, trained.collate([trained.preprocess(rows[0])]))
  np.testing.assert_allclose(seen, tower(jnp.asarray(tokens[:1])).tokens, atol=1e-5)
  with pytest.raises(ValueError, match="got 3 channels of 21 samples, allowed: 3 of 22"):
    trunk.preprocess(rows[0, :, 1:])
  with pytest.raises(ValueError, match="got 22 channels of 3 samples, allowed: 3 of 22; is the array transposed?"):
    trunk.preprocess(rows[0].T)
  with pytest.raises(ValueError, match=r"means of shape \(5, 3\).*needed are \(5, 4\)"):
    load_trunk("eeg_patches", **options | {"channels": 4})
  with pytest.raises(ValueError, match="neither 'evoked' nor an .npz"):
    load_trunk("eeg_patches", statistics="mine")
  with pytest.raises(ValueError, match="width 0"):
    load_trunk("eeg_patches", width=0)


@pytest.mark.parametrize(("depth", "tokens"), [(0, 1), (1, 7)])
def test_the_network_gives_a_class_token_that_sees_every_patch(depth, tokens):
  network = Series(width=8, depth=depth, heads=2, dropout=0.5)
  x = jax.random.normal(jax.random.key(0), (2, 6, 3))
  params = jax.jit(network.init)(jax.random.key(1), x)
  apply = jax.jit(lambda params, x: network.apply(params, x).tokens)
  out = apply(params, x)
  assert out.shape == (2, tokens, 8)
  slope = jax.jit(jax.grad(lambda x: (network.apply(params, x).tokens[0, 0] ** 2).sum()))(x)
  assert (abs(slope[0]) > 0).any(axis=-1).all() and not slope[1].any()
  # The order of patches matters.
  assert abs(apply(params, x[:, ::-1])[:, 0] - out[:, 0]).max() > 1e-4
  train = jax.jit(lambda key: network.apply(params, x, train=True, rngs={"dropout": key}).tokens[:, 0])
  noisy = [train(jax.random.key(k)) for k in (0, 1)]
  assert abs(noisy[0] - noisy[1]).max() > 1e-4

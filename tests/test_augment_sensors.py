"""Random views of sounds, clouds, depth, heat and brain waves: what each changes, by hand, and what it keeps."""

import dataclasses

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from codebind_jax.data import transforms
from codebind_jax.data.augment.audio import Spectrogram, Waveform
from codebind_jax.data.augment.depth import Depth
from codebind_jax.data.augment.eeg import Series, moved
from codebind_jax.data.augment.points import Cloud
from codebind_jax.data.augment.thermal import Thermal

RNG = np.random.default_rng(0)
SEEDS = range(40)
WHOLE = {"area": (1.0, 1.0), "flip": 0.0}


def seeded(seed):
  return np.random.default_rng(seed)


class Most(np.random.Generator):
  """A generator whose even draws are the largest ones."""

  def uniform(self, low=0.0, high=1.0, size=None):
    return high if size is None else np.full(size, high)


class Far(np.random.Generator):
  """A generator whose normal draws are seven deviations."""

  def standard_normal(self, size=None, dtype=np.float64, out=None):
    return np.full(size, 7.0, dtype)


def most(seed=0):
  return Most(np.random.PCG64(seed))


# --- sounds

QUIET = {"seconds": 0.0, "gain": 0.0, "noise": 0.0, "polarity": 0.0}
SOUND = RNG.uniform(-0.3, 0.3, 5000).astype(np.float32)


def wave(**settings):
  return Waveform(**QUIET | settings)


def test_a_window_is_another_part_of_the_sound():
  ramp = np.arange(1000, dtype=np.float32) / 1000
  windows = [wave(seconds=0.1, rate=4000)(ramp, seeded(seed)) for seed in range(200)]
  assert {len(window) for window in windows} == {400}
  starts = np.array([round(float(window[0]) * 1000) for window in windows])
  for window, start in zip(windows, starts):
    np.testing.assert_array_equal(window, ramp[start : start + 400])
  assert starts.min() < 20 and 580 < starts.max() <= 600 and len(set(starts)) > 100
  np.testing.assert_array_equal(wave(seconds=1.0, rate=4000)(ramp, seeded(0)), ramp)  # shorter than the window
  assert len(wave(seconds=0.01)(SOUND, seeded(0))) == 441


def test_gain_is_in_decibels():
  # 20 dB are a factor of 10, 6 dB are 10^0.3 = 1.9953.
  np.testing.assert_allclose(wave(gain=20.0)(SOUND, most()), SOUND * 10, rtol=1e-6)
  np.testing.assert_allclose(wave(gain=6.0)(SOUND, most()), SOUND * 1.995262, rtol=1e-6)
  views = [wave(gain=6.0)(SOUND, seeded(seed)) for seed in range(200)]
  decibels = np.array([20 * np.log10(np.abs(view).max() / np.abs(SOUND).max()) for view in views])
  assert -6.001 < decibels.min() < -5.5 and 5.5 < decibels.max() < 6.001 and abs(decibels.mean()) < 1


def test_noise_has_the_power_that_the_ratio_says():
  tone = np.sin(np.arange(200_000) / 7).astype(np.float32)
  for ratio in (10.0, 30.0):
    noise = (wave(noise=1.0, snr=(ratio, ratio))(tone, seeded(1)) - tone).astype(np.float64)
    assert abs(10 * np.log10(np.square(tone).mean() / np.square(noise).mean()) - ratio) < 0.1
  assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.02, "white"
  assert 10 < sum((wave(noise=0.5)(SOUND, seeded(seed)) != SOUND).any() for seed in SEEDS) < 30
  silence = np.zeros(100, np.float32)
  np.testing.assert_array_equal(Waveform(noise=1.0)(silence, seeded(0)), silence)


def test_polarity_changes_the_sign_of_all_samples():
  signs = [np.unique(wave(polarity=0.5)(SOUND, seeded(seed)) / SOUND).tolist() for seed in SEEDS]
  assert 10 < signs.count([-1.0]) < 30 and signs.count([-1.0]) + signs.count([1.0]) == len(SEEDS)


def test_no_view_is_too_loud_to_be_read_again():
  loud = np.array([7.9, -7.9, 1.0], np.float32)
  view = wave(gain=6.0)(loud, most())
  np.testing.assert_allclose(view, [8.0, -8.0, 1.9953], rtol=1e-4)
  transforms.of("audio").read(view)


@dataclasses.dataclass(frozen=True)
class Recorded:
  samples: np.ndarray
  rate: int


def test_a_sound_with_a_rate_of_its_own_and_channels():
  stereo = np.stack([SOUND, -SOUND], axis=1)
  view = wave(seconds=0.25, gain=20.0)(Recorded(stereo, 8000), most())
  assert type(view) is Recorded and view.rate == 8000 and view.samples.shape == (2000, 2)
  np.testing.assert_array_equal(view.samples[:, 0], -view.samples[:, 1])
  assert np.abs(view.samples).max() > 2


# --- spectrograms


def test_masks_cover_at_most_their_share_and_the_rest_stays():
  value, most_frames, most_bands = RNG.normal(3, 1, (2, 200, 80)).astype(np.float32), 0, 0
  one = Spectrogram(times=2, time=0.1, bands=2, band=0.25)
  for seed in SEEDS:
    view = one(value, seeded(seed))
    other = view != value
    frames, bands = other.all(axis=(0, 2)), other.all(axis=(0, 1))
    np.testing.assert_array_equal(other, np.broadcast_to(frames[:, None] | bands, other.shape))
    assert frames.mean() <= 0.2 and bands.mean() <= 0.5 and not frames.all()
    if other.any():
      np.testing.assert_allclose(view[other], value.mean(), rtol=1e-5)
    most_frames, most_bands = max(most_frames, frames.sum()), max(most_bands, bands.sum())
  assert most_frames > 20 and most_bands > 20, "more than one mask"
  alone = Spectrogram(times=1, time=0.1, bands=0)(value, seeded(3)) != value
  assert not alone.all(axis=(0, 1)).any()


# --- clouds

STILL = {"turn": 0.0, "tilt": 0.0, "scale": (1.0, 1.0), "jitter": 0.0, "drop": 0.0}
POINTS = (RNG.normal(0, 1, (80, 3)) * [3, 1, 2] + [10, -4, 7]).astype(np.float32)


def cloud(**settings):
  return Cloud(**STILL | settings)


@pytest.mark.parametrize("up, axis", [("x", 0), ("y", 1), ("z", 2)])
def test_turns_about_the_up_axis_keep_heights_and_distances(up, axis):
  angles = []
  around = [i for i in range(3) if i != axis]
  for seed in SEEDS:
    view = cloud(up=up, turn=180.0)(POINTS, seeded(seed))
    np.testing.assert_allclose(view[:, axis], POINTS[:, axis], atol=1e-5)
    np.testing.assert_allclose(pdist(view), pdist(POINTS), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(view.mean(axis=0), POINTS.mean(axis=0), atol=1e-5)
    assert np.linalg.det(view[:3] - view[3:6]) * np.linalg.det(POINTS[:3] - POINTS[3:6]) > 0, "no mirror image"
    before, after = ((p - p.mean(axis=0))[0, around] @ [1, 1j] for p in (POINTS, view))
    angles.append(np.angle(after / before, deg=True))
  assert min(angles) < -120 and max(angles) > 120
  turned = [cloud(up=up, turn=10.0)(POINTS, seeded(seed)) for seed in SEEDS]
  moved = [np.abs(one - POINTS).max() for one in turned]
  farthest = np.linalg.norm((POINTS - POINTS.mean(axis=0))[:, around], axis=1).max()
  assert max(moved) <= 2 * np.sin(np.deg2rad(5)) * farthest + 1e-4


def test_a_quarter_turn_by_hand():
  # Right-handed about y: z goes to x, x to -z. Mean in the origin.
  points = np.array([[1, 2, 0], [-1, -2, 0], [0, 0, 3], [0, 0, -3]], np.float32)
  view = cloud(turn=90.0)(points, most())
  np.testing.assert_allclose(view, [[0, 2, -1], [0, -2, 1], [3, 0, 0], [-3, 0, 0]], atol=1e-6)


def test_tilts_are_small_turns():
  tilts = []
  for seed in range(200):
    view = cloud(tilt=3.0)(POINTS, seeded(seed))
    np.testing.assert_allclose(pdist(view), pdist(POINTS), rtol=1e-4, atol=1e-5)
    turn = np.linalg.lstsq(POINTS - POINTS.mean(axis=0), view - view.mean(axis=0), rcond=None)[0]
    tilts.append(np.rad2deg(np.arccos(np.clip(turn[1, 1], -1, 1))))  # between the y axes
    assert abs(turn[0, 2] - turn[2, 0]) / 2 <= np.sin(np.deg2rad(9)) ** 2, "none about the up axis"
  assert 2 < np.mean(tilts) < 6 and max(tilts) < 9 * np.sqrt(2) + 0.1


def test_scale_is_about_the_mean_and_jitter_within_five_deviations():
  larger = cloud(scale=(0.5, 2.0))(POINTS, most())
  np.testing.assert_allclose(larger - POINTS.mean(axis=0), 2 * (POINTS - POINTS.mean(axis=0)), atol=1e-4)
  ratios = [pdist(cloud(scale=(0.5, 2.0))(POINTS, seeded(seed))).max() / pdist(POINTS).max() for seed in SEEDS]
  assert 0.5 <= min(ratios) < 0.7 and 1.8 < max(ratios) <= 2.0001
  radius = np.linalg.norm(POINTS - POINTS.mean(axis=0), axis=1).max()
  noise = np.concatenate([cloud(jitter=0.02)(POINTS, seeded(seed)) - POINTS for seed in SEEDS])
  assert np.abs(noise).max() <= 5.01 * 0.02 * radius
  farthest = cloud(jitter=0.02)(POINTS, Far(np.random.PCG64(0))) - POINTS
  np.testing.assert_allclose(farthest, np.full((80, 3), 5 * 0.02 * radius), rtol=1e-4)
  assert abs(noise.std() / (0.02 * radius) - 1) < 0.05 and abs(noise.mean()) < 0.1 * noise.std()


def test_dropped_points_repeat_others_with_their_colours():
  coloured = np.concatenate([POINTS, RNG.uniform(0, 1, (80, 3)).astype(np.float32)], axis=1)
  rows, counts = {row.tobytes() for row in coloured}, []
  for seed in SEEDS:
    view = cloud(drop=0.5)(coloured, seeded(seed))
    assert view.shape == coloured.shape and {row.tobytes() for row in view} <= rows
    dropped = (view != coloured).any(axis=1)
    counts.append(dropped.sum())
    kept = {row.tobytes() for row in coloured[~dropped]}
    assert all(row.tobytes() in kept for row in view[dropped])
  assert max(counts) <= 40 and max(counts) > 30 and min(counts) < 10
  turned = Cloud()(coloured, seeded(0))
  colour_of = {row[3:].tobytes() for row in coloured}
  assert {row[3:].tobytes() for row in turned} <= colour_of and (turned[:, :3] != coloured[:, :3]).any(axis=1).all()


def test_two_points_never_become_one():
  pair = np.array([[0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]], np.float32)
  for seed in SEEDS:
    assert np.ptp(Cloud(drop=0.9, jitter=0.0)(pair, seeded(seed)), axis=0).any()


# --- depth


def test_depth_stays_in_metres_and_mirrored_parts_are_parts():
  metres = RNG.permutation(40 * 50).reshape(40, 50).astype(np.float32) / 100 + 1  # each value once
  mirrored = 0
  for seed in SEEDS:
    view = Depth(area=(0.3, 0.6), holes=0.0)(metres, seeded(seed))
    (top,), (first,) = np.nonzero(metres == view[0, 0])
    (_,), (last,) = np.nonzero(metres == view[0, -1])
    part = metres[top : top + len(view), min(first, last) : max(first, last) + 1]
    np.testing.assert_array_equal(view, part[:, ::-1] if last < first else part)
    assert 0.28 < view.size / metres.size < 0.62
    mirrored += int(last < first)
  assert 10 < mirrored < 30
  np.testing.assert_array_equal(Depth(**WHOLE, holes=0.0, scale=(1.0, 2.0))(metres, most()), metres * 2)
  np.testing.assert_array_equal(Depth(**WHOLE, holes=0.0, scale=(1.0, 100.0))(metres * 30, most()).max(), 1000)


def test_holes_have_no_return_and_cover_at_most_their_share():
  metres, shares = np.full((60, 80), 2.0, np.float32), []
  for seed in SEEDS:
    view = Depth(**WHOLE, holes=0.3)(metres, seeded(seed))
    assert set(np.unique(view)) <= {0.0, 2.0}
    shares.append((view == 0).mean())
  assert max(shares) <= 0.3 and max(shares) > 0.15 and min(shares) < 0.05
  hole = Depth(**WHOLE, holes=0.01, patch=0.1)(metres, most()) == 0
  sides = (hole.any(axis=1).sum(), hole.any(axis=0).sum())
  assert sides == (6, 8) and hole.sum() == 48, "one patch of a tenth of the sides"


def test_a_map_with_one_return_keeps_it():
  metres = np.zeros((30, 30), np.float32)
  metres[3, 4] = 2.0
  for seed in SEEDS:
    view = Depth(area=(0.1, 0.3), holes=1.0, patch=0.5)(metres, seeded(seed))
    assert view.max() == 2.0
    transforms.of("depth").read(view)


# --- heat


def test_gain_and_offset_of_heat_by_hand():
  celsius = np.array([[20.0, 30.0], [22.0, 28.0]], np.float32)  # mean 25
  np.testing.assert_allclose(Thermal(**WHOLE, gain=(1.0, 1.2), offset=0.0)(celsius, most()), [[19, 31], [21.4, 28.6]],
                             rtol=1e-6)  # fmt: skip
  np.testing.assert_allclose(Thermal(**WHOLE, gain=(1.0, 1.0), offset=3.0)(celsius, most()), celsius + 3, rtol=1e-6)
  offsets = [float((Thermal(**WHOLE, gain=(1.0, 1.0))(celsius, seeded(s)) - celsius).mean()) for s in range(200)]
  assert -2.001 < min(offsets) < -1.8 and 1.8 < max(offsets) < 2.001


def test_a_kelvin_of_grey_is_what_the_transform_makes_of_it():
  celsius = RNG.uniform(25, 35, (12, 16)).astype(np.float32)
  one = Thermal(**WHOLE, gain=(1.0, 1.0), offset=2.0)
  picture = transforms.of("thermal").to_picture
  warmer = picture(one(celsius, most()))
  for grey, wanted in ((picture(celsius), warmer), (picture(celsius)[..., 0], warmer[..., 0])):
    view = one(grey, most())
    assert view.dtype == np.uint8 and view.shape == grey.shape
    assert np.abs(view.astype(int) - wanted).max() <= 1 and (view > grey).all()
  white = np.full((4, 4), 250, np.uint8)
  np.testing.assert_array_equal(one(white, most()), np.full((4, 4), 255))


def test_views_of_heat_stay_what_the_transform_reads():
  for celsius in ([[190.0, 190.0, 395.0]], [[-89.0, -80.0]], [[1000.0, 1999.5]]):
    value = np.repeat(np.repeat(np.array(celsius, np.float32), 8, axis=0), 8, axis=1)
    for rng in [most(), *map(seeded, SEEDS)]:
      view = Thermal(gain=(0.5, 2.0), offset=50.0, area=(0.1, 0.9))(value, rng)
      np.testing.assert_array_equal(transforms.of("thermal").read(view), view)


def test_a_part_of_a_frosty_scene_that_looks_scaled_to_1_is_the_whole_scene():
  value = np.repeat([[0.2, 0.9, 0.5, 9.0]], 8, axis=0).repeat(8, axis=1).astype(np.float32)
  view = Thermal(area=(0.05, 0.1), gain=(1.0, 1.0), offset=0.0)
  seen = [view(value, seeded(seed)) for seed in range(20)]
  for one in seen:
    np.testing.assert_array_equal(transforms.of("thermal").read(one), one)
  whole = [one for one in seen if one.shape == value.shape]
  assert 0 < len(whole) < 20 and all(set(np.unique(one)) == set(np.unique(value)) for one in whole)


# --- brain waves

REST = {"shift": 0.0, "scale": (1.0, 1.0), "noise": 0.0, "drop": 0.0, "mask": 0.0}
WAVES = (RNG.normal(0, 1, (6, 500)) * [[5], [10], [20], [40], [1], [100]] + [[0], [3], [50], [0], [0], [9]]).astype(
  np.float32)  # fmt: skip


def eeg(**settings):
  return Series(**REST | settings)


def test_a_shift_moves_all_channels_alike_and_repeats_their_ends():
  shifts = set()
  for seed in range(100):
    view = eeg(shift=0.02)(WAVES, seeded(seed))
    (by,) = (k for k in range(-10, 11) if (view[:, max(k, 0) : 500 + min(k, 0)] ==
                                           WAVES[:, max(-k, 0) : 500 - max(k, 0)]).all())  # fmt: skip
    edge = view[:, :by] == WAVES[:, :1] if by > 0 else view[:, 500 + by :] == WAVES[:, -1:]
    assert edge.all()
    shifts.add(by)
  assert min(shifts) <= -9 and max(shifts) >= 9
  np.testing.assert_array_equal(moved(np.array([[1, 2, 3, 4]]), 1), [[1, 1, 2, 3]])
  np.testing.assert_array_equal(moved(np.array([[1, 2, 3, 4]]), -2), [[3, 4, 4, 4]])


def test_noise_is_relative_to_each_channels_deviation():
  noise = eeg(noise=0.5)(WAVES, most()).astype(np.float64) - WAVES
  np.testing.assert_allclose(noise.std(axis=1) / WAVES.std(axis=1), np.full(6, 0.5), rtol=0.12)
  np.testing.assert_allclose(eeg(scale=(0.5, 1.5))(WAVES, most()), WAVES * 1.5, rtol=1e-6)
  shares = [(eeg(noise=0.5)(WAVES, seeded(s)) - WAVES).std() / WAVES.std() for s in SEEDS]
  assert min(shares) < 0.1 and max(shares) <= 0.55


def test_channels_are_dropped_to_their_mean_but_never_all():
  off = []
  for seed in range(200):
    view = eeg(drop=0.3)(WAVES, seeded(seed))
    flat = np.ptp(view, axis=1) == 0
    np.testing.assert_array_equal(view[~flat], WAVES[~flat])
    np.testing.assert_allclose(view[flat, 0], WAVES[flat].mean(axis=1), atol=1e-4)
    off.append(flat)
  # 0.3 of the five channels that are not kept: 1.5 of 6.
  assert abs(np.mean(off) - 0.25) < 0.04 and np.mean(off, axis=0).min() > 0.15
  assert {int((np.ptp(eeg(drop=1.0)(WAVES, seeded(seed)), axis=1) > 0).sum()) for seed in SEEDS} == {1}


def test_one_stretch_of_time_is_masked_in_all_channels():
  lengths = []
  for seed in range(100):
    view = eeg(mask=0.2)(WAVES, seeded(seed))
    masked = (view != WAVES).all(axis=0)
    np.testing.assert_array_equal((view != WAVES).any(axis=0), masked)
    places = np.flatnonzero(masked)
    assert not len(places) or np.ptp(places) + 1 == len(places)
    np.testing.assert_allclose(view[:, masked], np.broadcast_to(WAVES.mean(axis=1)[:, None], view.shape)[:, masked],
                               atol=1e-4)  # fmt: skip
    lengths.append(len(places))
  assert max(lengths) <= 100 and max(lengths) > 85 and min(lengths) < 15


def test_views_of_brain_waves_stay_microvolts():
  for largest in (0.0101, 99_999.0):
    value = (RNG.uniform(-1, 1, (3, 50)) * largest).astype(np.float32)
    value[0, 0] = largest
    for rng in [most(), *map(seeded, SEEDS)]:
      view = Series(scale=(0.1, 3.0), noise=1.0)(value, rng)
      np.testing.assert_array_equal(transforms.of("eeg").read(view), view)
  assert Series()(WAVES.astype(np.float64), seeded(0)).dtype == np.float64

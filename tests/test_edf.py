"""EDF and BDF as laboratories write them, against mne and by hand: channels, units, rates, gaps, cut files."""

import struct

import numpy as np
import pytest

from codebind_jax.data import edf
from codebind_jax.data.transforms import eeg

RATE = 100
ALPHA = 50 * np.sin(2 * np.pi * 10 * np.arange(400) / RATE)
RNG = np.random.default_rng(0)


def channel(label, samples=ALPHA, unit="uV", reach=500, rate=RATE):
  return label, unit, -reach, reach, rate, np.asarray(samples, float)


def recording(channels, records=4, kind="", starts=None, said=None, bdf=False, seconds=1):
  """Bytes of an EDF or BDF file; `starts` are the times of EDF+ records, `said` the header's number of records."""
  text = lambda value, width: str(value)[:width].encode("latin-1").ljust(width)
  every = [*channels, *([("EDF Annotations", "", -1, 1, 60, None)] if starts else [])]
  lowest, highest, size = (-(2**23), 2**23 - 1, 3) if bdf else (-(2**15), 2**15 - 1, 2)
  out = (b"\xffBIOSEMI" if bdf else text("0", 8)) + text("X X X X", 80) + text("Startdate 01-JAN-2020 X X X", 80)
  out += b"01.01.2000.00.00"[:8] + b"00.00.00" + text(256 * (len(every) + 1), 8) + text(kind, 44)
  out += text(records if said is None else said, 8) + text(seconds, 8) + text(len(every), 4)
  for width, value in ((16, lambda c: c[0]), (80, lambda c: ""), (8, lambda c: c[1]), (8, lambda c: c[2]),
                       (8, lambda c: c[3]), (8, lambda c: lowest), (8, lambda c: highest), (80, lambda c: ""),
                       (8, lambda c: c[4]), (32, lambda c: "")):  # fmt: skip
    out += b"".join(text(value(c), width) for c in every)
  for record in range(records):
    for _, _, low, high, rate, data in every:
      if data is None:
        out += f"{starts[record]:+g}\x14\x14\0".encode().ljust(size * rate, b"\0")
        continue
      part = data[record * rate : (record + 1) * rate]
      digital = np.round((part - low) / (high - low) * (highest - lowest) + lowest).clip(lowest, highest).astype("<i4")
      out += digital.view(np.uint8).reshape(-1, 4)[:, :size].tobytes()
  return out


NIGHT = [
  channel("EEG Fpz-Cz"), channel("EEG Pz-Oz", -ALPHA), channel("EOG horizontal", 4 * ALPHA, reach=1000),
  ("Resp oro-nasal", "", -2048, 2047, 1, np.full(4, 1000.0)), ("EMG submental", "uV", -5, 5, 1, np.ones(4)),
  ("Temp rectal", "DegC", 34, 40, 1, np.full(4, 37.0)), ("Event marker", "", -2047, 2048, 1, np.full(4, 900.0)),
]  # fmt: skip


def test_a_nights_eeg_channels_alone_are_taken_and_the_others_said_once(tmp_path, caplog):
  (tmp_path / "night.edf").write_bytes(recording(NIGHT))
  for _ in range(2):
    got = eeg.read(tmp_path / "night.edf")
  np.testing.assert_allclose(got, [ALPHA, -ALPHA], atol=0.01)
  assert caplog.messages == [
    f"{tmp_path}/night.edf: channels EOG horizontal, Resp oro-nasal, EMG submental, Temp rectal, Event marker: no EEG "
    "by name or unit, left out"
  ]


@pytest.mark.parametrize(
  ("label", "kind"),
  [(label, "eeg") for label in ("EEG C3", "C3-A2", "FP1-REF", "Fc5.", "Cz..", "eeg 001", "AFF5h", "A1", "O2",
                                  "EEG 31-REF")]
  + [(label, "other") for label in ("ECG", "EKG1", "EEG ECG", "EEG EKG1-EKG2", "LOC-A2", "EOG left", "Chin1-Chin2",
                                    "SpO2", "Status", "EXG3", "PHOTIC-REF", "LAT1-LAT2", "HEOG", "STI 014")]
  + [(label, "unknown") for label in ("Ch1", "001", "B13", "POL A12")]
  + [("EDF Annotations", "annotations"), ("BDF Annotations", "annotations")],
)  # fmt: skip
def test_kinds_of_channels_by_their_names(label, kind):
  made = edf.Channel(label, "uV", "-1", "1", "-1", "1", 10)
  assert made.kind() == kind
  if kind == "unknown":
    assert edf.Channel(label, "bpm", "-1", "1", "-1", "1", 10).kind() == "other"


def test_sleepers_eyes_are_no_net_of_electrodes(caplog):
  assert eeg.read(recording([channel("E1-M2"), channel("E2-M2"), channel("C4-M1")])).shape == (1, 400)
  assert eeg.read(recording([channel(f"E{i}") for i in (1, 2, 3, 4)])).shape == (4, 400)
  assert "channels E1, E2, E3, E4: taken for EEG, the name says nothing" in caplog.text


def test_channels_are_in_the_order_of_their_names():
  signals = {name: RNG.normal(0, 20, 400) for name in ("EEG 2", "EEG 10", "EEG 1", "Fp1", "EEG C4-A1", "c3-a2")}
  order = ["EEG 1", "EEG 2", "EEG 10", "c3-a2", "EEG C4-A1", "Fp1"]
  want = np.stack([signals[name] for name in order])
  for names in (list(signals), list(signals)[::-1], sorted(signals)):
    np.testing.assert_allclose(eeg.read(recording([channel(name, signals[name]) for name in names])), want, atol=0.01)
  for names in (("EEG C3", "EEG c3"), ("Fp1", "EEG Fp1"), ("Fc5.", "EEG FC5"), ("EEG_Cz", "Cz")):
    with pytest.raises(ValueError, match=f"eeg bytes: channels '{names[0]}' and '{names[1]}' have one name"):
      eeg.read(recording([channel("O2"), *map(channel, names)]))
  assert eeg.read(recording([channel("A1"), channel("A'1"), channel("A1'"), channel("A1-A2")])).shape == (4, 400)


def test_flat_channels_are_said_and_are_no_volts(caplog):
  # What mid-scale is: a two-hundredth of a microvolt.
  assert np.abs(eeg.read(recording([channel("EEG C3", np.zeros(400), reach=300)]))).max() < 0.01
  assert "eeg bytes: channels EEG C3 are flat" in caplog.text
  with pytest.raises(ValueError, match="eeg bytes: largest value 4.7.*e-05 looks like volts: is the unit"):
    eeg.read(recording([channel("EEG C3", 1e-6 * ALPHA, reach=5e-4)]))


@pytest.mark.parametrize(("unit", "factor"), [("uV", 1), ("µV", 1), ("mV", 1e-3), ("nV", 1e3), ("V", 1e-6), ("UV", 1)])
def test_units(unit, factor):
  got = eeg.read(recording([("EEG C3", unit, -500 * factor, 500 * factor, RATE, factor * ALPHA)]))
  np.testing.assert_allclose(got[0], ALPHA, atol=0.02)


@pytest.mark.parametrize("unit", ["", "mmHg", "%"])
def test_a_channel_without_a_voltage_is_named(unit, tmp_path):
  (tmp_path / "a.edf").write_bytes(recording([channel("EEG C4"), channel("EEG C3", unit=unit)]))
  with pytest.raises(ValueError, match=rf"a\.edf: channel 'EEG C3' has the unit '{unit}'; allowed: uV, mV, nV, V"):
    eeg.read(tmp_path / "a.edf")


def test_slower_channels_are_resampled_and_it_is_said(caplog):
  slow = ALPHA[::2]
  got = eeg.read(recording([channel("EEG C3"), channel("EEG C4", slow, rate=50)]))
  assert got.shape == (2, 400) and "channels eeg c4 are resampled to 100 Hz" in caplog.text
  np.testing.assert_allclose(got[1, 50:-50], ALPHA[50:-50], atol=0.5)
  # Others do not count: the rate is that of the fastest EEG channel.
  other = ("ECG", "mV", -5, 5, 200, np.zeros(800))
  assert eeg.read(recording([channel("EEG C3"), other])).shape == (1, 400)


def test_gaps_are_refused_and_records_that_follow_are_not(tmp_path):
  for kind in ("EDF+C", "EDF+D"):
    assert eeg.read(recording([channel("EEG C3")], kind=kind, starts=[0, 1, 2, 3])).shape == (1, 400)
    assert eeg.read(recording([channel("EEG C3")], kind=kind, starts=[0.25, 1.25, 2.25, 3.25])).shape == (1, 400)
    (tmp_path / "gap.edf").write_bytes(recording([channel("EEG C3")], kind=kind, starts=[0, 1, 7.5, 8.5]))
    with pytest.raises(ValueError, match=r"gap\.edf: has 1 gaps \(EDF\+D\), the first from 2 s to 7\.5 s"):
      eeg.read(tmp_path / "gap.edf")


def test_cut_files_are_refused_and_unknown_lengths_said(tmp_path, caplog):
  whole = recording([channel("EEG C3")])
  for stop, message in ((-1, "cut off, its header says 4 records of data and there are 3"), (600, "and there are 0"),
                        (400, "cut off in its header"), (100, "cut off in its header")):  # fmt: skip
    (tmp_path / "cut.edf").write_bytes(whole[:stop])
    with pytest.raises(ValueError, match=f"cut.edf: .*{message}"):
      eeg.read(tmp_path / "cut.edf")
  np.testing.assert_allclose(eeg.read(recording([channel("EEG C3")], said=-1))[0], ALPHA, atol=0.01)
  assert "its header has no number of records, so it may be cut off; the 4 that are there are taken" in caplog.text
  assert eeg.read(recording([channel("EEG C3")], said=3)).shape == (1, 300)
  assert "has 4 records of data, its header says 3" in caplog.text
  with pytest.raises(ValueError, match="header says 99999999 records of data and there are 4"):
    eeg.read(recording([channel("EEG C3")], said=99999999))


def test_damaged_headers_are_named(tmp_path):
  whole = recording([channel("EEG C3")])
  for place, value, message in (
    (184, b"99999999", "damaged or cut off in its header"),
    (184, b"many    ", "the header's size in its header is 'many'"),
    (252, b"-1  ", "-1 signals"), (244, b"0       ", "a record of '0' seconds"), (244, b"inf     ", "'inf' seconds"),
    (236, b"-7      ", "header says -7"), (256 + 104, b"500     ", "values from '500' to '500'"),
    (256 + 104, b"low     ", "values from 'low'"), (256 + 104, b"nan     ", "values from 'nan'"),
    (256 + 216, b"0       ", "no samples a record"),
  ):  # fmt: skip
    (tmp_path / "bad.edf").write_bytes(whole[:place] + value + whole[place + len(value) :])
    with pytest.raises(ValueError, match=rf"bad\.edf: .*{message}"):
      eeg.read(tmp_path / "bad.edf")
  (tmp_path / "bad.edf").write_bytes(b"0" * 300)
  for path in (tmp_path / "bad.edf", tmp_path / "none.edf", tmp_path):
    with pytest.raises(ValueError, match=f"{path}: "):
      eeg.read(path)
  with pytest.raises(ValueError, match="has no EEG channel; its channels are ECG, EOG left"):
    eeg.read(recording([channel("ECG"), channel("EOG left")]))


@pytest.mark.parametrize("bdf", [False, True])
def test_values_are_those_of_mne(bdf, tmp_path):
  mne = pytest.importorskip("mne")
  names = ["EEG C3", "EEG C4", "EEG Cz"]
  signals = [channel(name, RNG.normal(0, 40, 400), reach=reach) for name, reach in zip(names, (300, 3200, 187.5))]
  path = tmp_path / f"a.{'bdf' if bdf else 'edf'}"
  path.write_bytes(recording(signals, bdf=bdf))
  reader = mne.io.read_raw_bdf if bdf else mne.io.read_raw_edf
  want = reader(path, preload=True, verbose="error").get_data(units="uV")
  np.testing.assert_allclose(eeg.read(path), want, rtol=1e-6, atol=1e-5)
  assert (eeg.read(path.read_bytes()) == eeg.read(path)).all()
  np.testing.assert_allclose(want, [data for *_, data in signals], atol=1e-3 if bdf else 0.1)


def test_npy_files_of_the_wrong_kind_name_the_file(tmp_path):
  np.savez(tmp_path / "a.npz", ALPHA)
  np.save(tmp_path / "object.npy", np.array([{"a": 1}]), allow_pickle=True)
  np.save(tmp_path / "words.npy", np.array([["a"]]))
  header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (2, 137438953472), }".ljust(117) + b"\n"
  (tmp_path / "huge.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(80))
  (tmp_path / "deep.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 8999 + b"\n")
  (tmp_path / "version.npy").write_bytes(b"\x93NUMPY\x09\x00" + bytes(80))
  for name, message in {
    "a.npz": "an .npz archive", "object.npy": "an array of Python objects, which is a pickle", "words.npy": "type <U1",
    "huge.npy": r"its header says shape \(2, 137438953472\)", "deep.npy": "not a readable .npy file",
    "version.npy": "not a readable .npy file",
  }.items():  # fmt: skip
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
      eeg.read(tmp_path / name)
    with pytest.raises(ValueError, match="eeg bytes: "):
      eeg.read((tmp_path / name).read_bytes())

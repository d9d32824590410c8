"""EEG: a numpy file, an EDF or BDF recording, or an array [channels, samples], to microvolts."""

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

# Changes whenever the same input would give other values: it is part of the key of cached features.
REVISION = "eeg-1"
CHANNELS = 1024
# On the scalp brain waves have 1 to some 100 microvolts, artefacts some 1,000: the same in volts is below 0.01.
SMALLEST, LARGEST = 0.01, 1e5
_RECORDINGS = (".edf", ".bdf")
_BEGINNINGS = {b"0       ": ".edf", b"\xffBIOSEMI": ".bdf"}


def read(value: Any) -> Float32[np.ndarray, "channels samples"]:
  """Microvolts [channels, samples] at the recording's own rate.

  EDF and BDF files, or their bytes, name their unit and are converted (needs the package mne). Numbers without a unit -
  a .npy file, its bytes or an array - must be in microvolts: values that can only be volts are refused, not guessed at.

  Raises:
    ValueError: naming the file, if it cannot be read, has another shape or is not in microvolts.
    ImportError: for EDF and BDF, where mne is not installed.
  """
  if isinstance(value, bytes) and value[:8] in _BEGINNINGS:
    with tempfile.NamedTemporaryFile(suffix=_BEGINNINGS[value[:8]]) as file:  # mne reads files alone
      file.write(value)
      file.flush()
      return _checked(_from_recording(Path(file.name)), "eeg bytes")
  if isinstance(value, (str, Path)) and Path(value).suffix.lower() in _RECORDINGS:
    return _checked(_from_recording(Path(value)), str(value))
  if isinstance(value, (str, Path, bytes)):
    name = "eeg bytes" if isinstance(value, bytes) else str(value)
    try:
      array = np.load(io.BytesIO(value) if isinstance(value, bytes) else value, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
      raise ValueError(f"{name}: not a readable .npy file; allowed are .npy, .edf and .bdf ({error})") from error
    return _checked(array, name)
  if not hasattr(value, "__array__"):
    raise ValueError(f"eeg: got {type(value).__name__}, allowed are a path, bytes or an array")
  return _checked(np.asarray(value), "eeg")


def _checked(array: np.ndarray, name: str) -> np.ndarray:
  numbers = isinstance(array, np.ndarray) and np.issubdtype(array.dtype, np.number) and not np.iscomplexobj(array)
  if not numbers or array.ndim != 2 or 0 in array.shape or array.shape[0] > CHANNELS:
    got = f"type {array.dtype} and shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
    raise ValueError(f"{name}: got {got}, allowed are numbers [channels, samples] with up to {CHANNELS} channels")
  if not np.isfinite(array).all():
    raise ValueError(f"{name}: has values that are not finite")
  largest = float(np.abs(array).max())
  if 0.0 < largest < SMALLEST:
    raise ValueError(f"{name}: largest value {largest:g} looks like volts: multiply by 1e6, allowed are microvolts")
  if largest > LARGEST:
    raise ValueError(f"{name}: largest value {largest:g}, allowed are microvolts up to {LARGEST:g}")
  return np.ascontiguousarray(array, np.float32)


def _from_recording(path: Path) -> np.ndarray:
  try:
    import mne
  except ImportError as error:
    raise ImportError(f"{path}: reading EDF and BDF files needs the package mne: pip install mne") from error
  reader = mne.io.read_raw_edf if path.suffix.lower() == ".edf" else mne.io.read_raw_bdf
  try:
    recording = reader(path, preload=True, verbose="error")
  except Exception as error:  # mne raises many kinds for a damaged file
    raise ValueError(f"{path}: not a readable recording ({error})") from error
  picked = mne.pick_types(recording.info, eeg=True)
  if not len(picked):
    raise ValueError(f"{path}: has no EEG channel; its channels are {recording.ch_names[:8]}")
  return recording.get_data(picks=picked, units="uV")

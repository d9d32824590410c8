"""EEG: a numpy file, an EDF or BDF recording, or an array [channels, samples], to microvolts."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from codebind_jax.data import edf
from codebind_jax.data.numpy_files import load_npy
from codebind_jax.data.reading import file_errors, name_of, unmasked, whole_file

# Changes whenever the same input would give other values: it is part of the key of cached features.
REVISION = "eeg-2"
CHANNELS = 1024
# On the scalp brain waves have 1 to some 100 microvolts, artefacts some 1,000: the same in volts is below 0.01.
SMALLEST, LARGEST = 0.01, 1e5
_RECORDINGS = (".edf", ".bdf")
_BEGINNINGS = (b"0       ", b"\xffBIOSEMI")


def read(value: Any) -> Float32[np.ndarray, "channels samples"]:
  """Microvolts [channels, samples] at the recording's own rate.

  EDF and BDF files, or their bytes, name their unit and are converted; their EEG channels are taken in the order of
  their names, see `data.edf.read`. Numbers without a unit - a .npy file, its bytes or an array - must be in microvolts:
  values that can only be volts are refused, not guessed at.

  Raises:
    ValueError: naming the file, if it cannot be read, is cut off or has gaps, has another shape or is not in
      microvolts.
  """
  name = name_of(value, "eeg")
  if isinstance(value, (str, Path, bytes)):
    with file_errors(name, "a readable recording; allowed: .npy, .edf, .bdf"):
      content = whole_file(value)
      recording = isinstance(value, (str, Path)) and Path(value).suffix.lower() in _RECORDINGS
      if recording or content[:8] in _BEGINNINGS:
        return _checked(edf.read(content, name), name, has_unit=True)
    return _checked(load_npy(content, name, ".npy, .edf and .bdf"), name)
  if not hasattr(value, "__array__"):
    raise ValueError(f"eeg: got {type(value).__name__}, allowed are a path, bytes or an array")
  return _checked(unmasked(value, name), name)


def _checked(array: np.ndarray, name: str, has_unit: bool = False) -> np.ndarray:
  numbers = isinstance(array, np.ndarray) and np.issubdtype(array.dtype, np.number) and not np.iscomplexobj(array)
  if not numbers or array.ndim != 2 or 0 in array.shape or array.shape[0] > CHANNELS:
    got = f"type {array.dtype} and shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
    raise ValueError(f"{name}: got {got}, allowed are numbers [channels, samples] with up to {CHANNELS} channels")
  if not np.isfinite(array).all():
    raise ValueError(f"{name}: has values that are not finite")
  largest = float(np.abs(array).max())
  flat = has_unit and (array.max(axis=1) == array.min(axis=1)).all()  # its offset may be any
  if 0.0 < largest < SMALLEST and not flat:
    advice = "is the unit that it names wrong?" if has_unit else "multiply by 1e6, allowed are microvolts"
    raise ValueError(f"{name}: largest value {largest:g} looks like volts: {advice}")
  if largest > LARGEST:
    raise ValueError(f"{name}: largest value {largest:g}, allowed are microvolts up to {LARGEST:g}")
  return np.ascontiguousarray(array, np.float32)

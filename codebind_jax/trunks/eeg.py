"""EEG as patches in time, encoded by a small network that is trained from scratch.

Modality: eeg.
Takes: recordings [channels, samples] in microvolts, all of one form.
Choose it for: EEG with enough recordings to train an encoder, set `channels`, `samples` and `statistics` to yours.
"""

from __future__ import annotations

from pathlib import Path

from codebind_jax.models.series import Series
from codebind_jax.trunks.base import Trunk, fingerprint
from codebind_jax.trunks.eeg_patches import patch_input, read_statistics
from codebind_jax.trunks.options import Count, Dropout, Length, Place, Side


def make_trunk(
  *, channels: Side = 10, samples: Length = 91, patch: Side = 5, statistics: Place | Path = "evoked", width: Side = 64,
  depth: Count = 0, heads: Side = 4, dropout: Dropout = 0.0, weights: Place | Path = "",
) -> Trunk:  # fmt: skip
  """The EEG trunk: with `depth` 0 one token, a linear map of all patches; else a class token and one token a patch.

  Args:
    channels: number of channels of every recording.
    samples: length of every recording; other lengths are refused, because a patch stands for one time.
    patch: number of samples of a patch.
    statistics: mean and deviation of the patches, see `eeg_patches.make_trunk`.
    width, depth, heads, dropout: see `models.series.Series`.
    weights: unused, as the trunk has no checkpoint; every trunk takes it.

  Raises:
    ValueError: if an option is out of its range or the statistics have another shape.
  """
  item = patch_input(channels, samples, patch)
  hashable = lambda array: tuple(map(tuple, array.tolist()))  # as modules must be
  mean, deviation = map(hashable, read_statistics(statistics, *item.shape))
  options = {
    "channels": channels, "samples": samples, "patch": patch, "width": width, "depth": depth, "heads": heads,
    "dropout": dropout,
  }  # fmt: skip
  return Trunk(
    name="eeg", modality="eeg", module=Series(width, depth, heads, dropout, mean, deviation), input=item,
    fingerprint=fingerprint({}, options | {"statistics": [mean, deviation]}, f"eeg-1 {item.revision}"),
    options=options,
  )  # fmt: skip

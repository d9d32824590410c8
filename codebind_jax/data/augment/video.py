"""Random views of videos: `image.Photo` with the same choices for all frames, and another part of the time."""

import dataclasses
from typing import Annotated

import numpy as np
from jaxtyping import UInt8

from codebind_jax.data.augment import image, revision
from codebind_jax.schema import at_least, at_most


@dataclasses.dataclass(frozen=True)
class Clip(image.Photo):
  """A random view of a video: one crop, one mirror image and one change of colours for all of its frames.

  Attributes:
    frames: of the view, successive ones from a random start; 0, or as many as there are, keeps all. Clips that are
      already cut, [s, n, h, w, 3], keep all of theirs.
    revision: of this code; not for setting.

  Further attributes are those of `image.Photo`.
  """

  frames: Annotated[int, at_least(0, "all"), at_most(1 << 16)] = 0
  revision: str = revision("clip-1")

  def __call__(
    self, value: UInt8[np.ndarray, "... h w 3"], rng: np.random.Generator
  ) -> UInt8[np.ndarray, "... i j 3"]:
    """One random view of RGB frames [t, h, w, 3], or of clips of them [s, n, h, w, 3]."""
    if value.ndim == 4 and 0 < self.frames < len(value):
      start = int(rng.integers(0, len(value) - self.frames + 1))
      value = value[start : start + self.frames]
    *time, h, w, _ = value.shape
    view = self.draw(h, w, rng)
    seen = np.stack([view.of(frame) for frame in value.reshape(-1, h, w, 3)])
    return seen.reshape(*time, *seen.shape[1:])

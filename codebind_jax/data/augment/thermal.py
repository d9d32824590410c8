"""Random views of thermal images: another part of them, mirrored, warmer or colder; degrees C, or grey of 8 bits."""

import dataclasses

import numpy as np
from jaxtyping import Float32, UInt8

from codebind_jax.data.augment import Checked, image, revision
from codebind_jax.data.transforms.thermal import COLDEST, HOTTEST, RANGE, like_kelvin, like_shares

_GREY = 255.0 / (RANGE[1] - RANGE[0])  # steps of grey a kelvin, as the transform reads and writes grey


@dataclasses.dataclass(frozen=True)
class Thermal(Checked):
  """A random view of a thermal image.

  The offset's default is the error that makers of uncooled cameras usually state (2 K or 2 % of the value); crop and
  mirror image are those of image training, milder than torchvision's defaults; the gain is ours.

  Attributes:
    area: smallest and largest part of the image's area; (1, 1) takes the whole image.
    aspect: smallest and largest width / height of the part.
    flip: probability of the mirror image.
    gain: smallest and largest factor on differences from the view's mean temperature.
    offset: largest change of all temperatures to either side, kelvin; grey of 8 bits spans 15 to 45 degrees C, as
      `transforms.thermal` has it, so that a kelvin is 8.5 steps.
    revision: of this code; not for setting.
  """

  area: image.Area = (0.7, 1.0)
  aspect: image.Positive = (3 / 4, 4 / 3)
  flip: image.Share = 0.5
  gain: image.Positive = (0.95, 1.05)
  offset: image.Size = 2.0
  revision: str = revision("thermal-1")

  def __call__(
    self, value: Float32[np.ndarray, "h w"] | UInt8[np.ndarray, "h w *rgb"], rng: np.random.Generator
  ) -> Float32[np.ndarray, "i j"] | UInt8[np.ndarray, "i j *rgb"]:
    """One random view of degrees C, or of grey with one channel or three, which stays within what the type allows."""
    box = image.crop_box(*value.shape[:2], self.area, self.aspect, rng)
    flip = bool(rng.random() < self.flip)
    gain, offset = rng.uniform(*self.gain), rng.uniform(-self.offset, self.offset)
    grey = value.dtype == np.uint8
    seen = image.cut(value, box, flip)
    if gain != 1.0 or offset:
      mean = seen.mean(dtype=np.float64)
      changed = (seen - mean) * gain + mean + offset * (_GREY if grey else 1.0)
      seen = np.round(np.clip(changed, 0, 255)) if grey else np.clip(changed, COLDEST, HOTTEST)
    seen = seen.astype(value.dtype, copy=False)
    # What looks like another unit is refused where it is read again, so no view may be the first to look so.
    odd = not grey and (like_kelvin(seen) or like_shares(seen))
    return image.cut(value, (0, 0, *value.shape[:2]), flip) if odd else seen

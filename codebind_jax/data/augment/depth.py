"""Random views of depth maps in metres: another part of them, mirrored, with holes; 0 stays "no return"."""

import dataclasses
from typing import Annotated

import numpy as np
from jaxtyping import Float32

from codebind_jax.data.augment import Checked, image, revision
from codebind_jax.data.transforms.depth import FARTHEST
from codebind_jax.schema import within


@dataclasses.dataclass(frozen=True)
class Depth(Checked):
  """A random view of a depth map.

  Crop and mirror image are those of image training, milder than torchvision's defaults; what a crop shows is as far
  away as before. The holes are what sensors leave where a surface shines or is too near; their share is ours.

  Attributes:
    area: smallest and largest part of the map's area; (1, 1) takes the whole map.
    aspect: smallest and largest width / height of the part.
    flip: probability of the mirror image.
    scale: smallest and largest factor on all distances. (1, 1) keeps metres; other factors are for maps without a unit.
    holes: largest share of the view's area that loses its return; the share is drawn from 0 to it.
    patch: sides of a hole, as a share of the view's sides.
    revision: of this code; not for setting.
  """

  area: image.Area = (0.7, 1.0)
  aspect: image.Positive = (3 / 4, 4 / 3)
  flip: image.Share = 0.5
  scale: image.Positive = (1.0, 1.0)
  holes: image.Share = 0.1
  patch: Annotated[float, within(0, 1)] = 0.1
  revision: str = revision("depth-1")

  def __call__(self, value: Float32[np.ndarray, "h w"], rng: np.random.Generator) -> Float32[np.ndarray, "i j"]:
    """One random view of metres; a crop or holes that would leave no return at all are not made."""
    box, flip = image.crop_box(*value.shape, self.area, self.aspect, rng), bool(rng.random() < self.flip)
    factor = rng.uniform(*self.scale)
    seen = image.cut(value, box, flip)
    seen = seen if seen.any() else image.cut(value, (0, 0, *value.shape), flip)
    if factor != 1.0:
      seen = np.minimum(seen.astype(np.float64) * factor, FARTHEST).astype(np.float32)
    pierced = self._pierced(seen, rng)
    return pierced if pierced.any() else seen

  def _pierced(self, depth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    h, w = depth.shape
    height, width = max(1, int(self.patch * h)), max(1, int(self.patch * w))
    count = int(rng.uniform(0.0, self.holes) * h * w / (height * width))
    depth = depth.copy()
    for top, left in zip(rng.integers(0, h - height + 1, count), rng.integers(0, w - width + 1, count)):
      depth[top : top + height, left : left + width] = 0.0
    return depth

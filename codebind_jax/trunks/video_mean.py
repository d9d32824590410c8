"""A video as the mean of its frames' image trunk tokens, so that its heads can start from those of images.

Modality: video.
Takes: films, animated pictures, folders of frames; 16 frames are read, 8 used.
Choose it for: short clips; its heads can start from those of images (`starts_from`).
"""

from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Num

from codebind_jax.data.inputs import Input
from codebind_jax.data.preparation.pictures import Frames
from codebind_jax.data.transforms import video as video_transforms
from codebind_jax.models.encoder import Encoded
from codebind_jax.trunks import efficientnet_lite0
from codebind_jax.trunks.base import Trunk, fingerprint
from codebind_jax.trunks.options import Count, Fit, Level, MaybeName, MaybeSide, Place, Regex, Side

_REVISION = "frames-1"


class VideoMean(nn.Module):
  """Frames -> the mean of their class tokens, and these tokens where `each`.

  Attributes:
    picture: the network of a frame.
    each: see `make_trunk`.
  """

  picture: efficientnet_lite0.EfficientNetLite0
  each: bool = False

  @nn.compact
  def __call__(self, videos: Num[Array, "b t h w 3"], train: bool = False) -> Encoded:
    """Tokens [b, 1, c] or [b, 1 + t, c]."""
    seen = efficientnet_lite0.one_by_one(self.picture, videos)
    mean = jnp.mean(seen, axis=1, keepdims=True)
    return Encoded(jnp.concatenate([mean, seen], axis=1) if self.each else mean)


def make_trunk(
  *,
  frames: Side = 8,
  each: bool = False,
  weights: Place | Path = "",
  size: Side | Sequence[Side] = (160,),
  levels: Sequence[Level] = (),
  lines: MaybeSide = 0,
  fit: Fit = "pad",
  crop: bool = False,
  flip: bool = False,
  class_names: MaybeName = "",
  grid: Count = 0,
  stages: Sequence[Sequence[Side]] = efficientnet_lite0.STAGES,
  head_width: Side = efficientnet_lite0.HEAD_WIDTH,
  dont_load: Sequence[Regex] = (),
) -> Trunk:
  """The video trunk: token 0 is the mean over frames of the image trunk's token 0.

  Args:
    frames: number of evenly spaced frames; those of a shorter video are repeated.
    each: whether the frames' own tokens follow.
    weights, size, levels, lines, fit, crop, flip, class_names, stages, head_width, dont_load: of the image trunk, see
      `efficientnet_lite0.make_trunk`; with the same values a token has the same meaning.
    grid: must be 0, a video has no cells.

  Raises:
    ValueError: if an option is out of its range or the checkpoint does not fit.
  """
  if not 1 <= frames <= video_transforms.FRAMES:
    raise ValueError(f"frames: got {frames}, allowed are 1 to {video_transforms.FRAMES}")
  if grid:
    raise ValueError(f"grid: got {grid}, a video trunk has no cells; allowed is 0")
  picture = efficientnet_lite0.make_trunk(
    weights=weights, size=size, grid=0, levels=levels, lines=lines, fit=fit, crop=crop, flip=flip,
    class_names=class_names, stages=stages, head_width=head_width, dont_load=dont_load,
  )  # fmt: skip

  revision = f"{_REVISION} {video_transforms.REVISION}"
  options = picture.options | {"frames": frames, "each": each}
  return Trunk(
    name="video_mean", modality="video", module=VideoMean(picture.module, each),
    input=Input((frames, *picture.input.shape), "uint8", Frames(frames, picture.preprocess),
                revision=f"{revision} {frames} {picture.input.revision}"),
    fingerprint=fingerprint({}, options | {"picture": picture.fingerprint}, revision),
    load=picture.load and (lambda shapes: {"picture": picture.load(shapes["picture"])}), options=options,
  )  # fmt: skip

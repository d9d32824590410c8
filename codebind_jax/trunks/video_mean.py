"""A video as the mean of its frames' image trunk tokens, so that its heads can start from those of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codebind_jax.data.transforms import video as video_transforms
from codebind_jax.trunks import efficientnet_lite0
from codebind_jax.trunks.base import Trunk, fingerprint

_REVISION = "frames-1"


def make_trunk(
  *,
  frames: int = 8,
  each: bool = False,
  weights: str | Path = "",
  size: int | Sequence[int] = (160,),
  levels: Sequence[int] = (),
  lines: int = 0,
  fit: str = "pad",
  crop: bool = False,
  flip: bool = False,
  class_names: str = "",
  grid: int = 0,
  stages: Sequence[Sequence[int]] = efficientnet_lite0.STAGES,
  head_width: int = efficientnet_lite0.HEAD_WIDTH,
  dont_load: Sequence[str] = (),
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

  def apply(params: Any, batch: jax.Array | np.ndarray) -> jax.Array:
    # One video after the other, because the maps of a whole batch's frames would take too much memory.
    seen = jax.lax.map(lambda video: picture.apply(params, video)[:, 0], jnp.asarray(batch))
    mean = jnp.mean(seen, axis=1, keepdims=True)
    return jnp.concatenate([mean, seen], axis=1) if each else mean

  def preprocess(value: Any) -> np.ndarray:
    video = video_transforms.read(value)
    chosen = [int((k + 0.5) * len(video) / frames) for k in range(frames)]
    return np.stack([picture.preprocess(video[i]) for i in chosen])

  options = picture.options | {"frames": frames, "each": each}
  return Trunk(
    name="video_mean",
    modality="video",
    width=picture.width,
    num_tokens=1 + frames if each else 1,
    params=picture.params,
    apply=apply,
    preprocess=preprocess,
    fingerprint=fingerprint({}, options | {"picture": picture.fingerprint}, f"{_REVISION} {video_transforms.REVISION}"),
    options=options,
  )

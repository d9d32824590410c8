"""Line drawings of batches of images, on the device."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

_RADIUS = 4


def _filtered(x: jax.Array, weights: np.ndarray, axis: int) -> jax.Array:
  """Correlation with an odd number of weights along one axis, mirrored at the border."""
  radius = len(weights) // 2
  padding = [(0, 0)] * x.ndim
  padding[axis] = (radius, radius)
  # The barrier keeps the padding out of the fused loop, where it would cost a comparison per product.
  padded = jax.lax.optimization_barrier(jnp.pad(x, padding, mode="symmetric"))
  pieces = (jax.lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in range(len(weights)))
  return sum(float(weight) * piece for weight, piece in zip(weights, pieces, strict=True) if weight)


def line_drawing(images: Num[Array | np.ndarray, "b h w 3"]) -> Float[Array, "b h w 3"]:
  """Dark lines on white where colours change, pixel values 0 to 255; `data.augment.image.line_drawing` for a batch.

  The image is blurred (sigma 1), the absolute Sobel responses of both directions (largest channel) are added, thickened
  by one pixel, and taken from white.
  """
  offsets = np.arange(-_RADIUS, _RADIUS + 1)
  gauss = np.exp(-0.5 * offsets**2)
  smooth = jnp.asarray(images, jnp.float32)
  for axis in (1, 2):
    smooth = _filtered(smooth, gauss / gauss.sum(), axis)
  edges = 0.0
  for along, across in ((1, 2), (2, 1)):
    response = _filtered(_filtered(smooth, np.array([-1.0, 0.0, 1.0]), along), np.array([1.0, 2.0, 1.0]), across)
    edges += jnp.max(jnp.abs(response), axis=-1)
  for axis in (1, 2):
    all_but_last = jax.lax.slice_in_dim(edges, 0, edges.shape[axis] - 1, axis=axis)
    first = jax.lax.slice_in_dim(edges, 0, 1, axis=axis)
    edges = jnp.maximum(edges, jnp.concatenate([first, all_but_last], axis=axis))
  grey = 255.0 - jnp.clip(6.0 * edges, 0.0, 255.0)
  return jnp.repeat(grey[..., None], 3, axis=-1)

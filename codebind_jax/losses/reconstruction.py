"""Reconstruction of the raw input: MSE against the input resized to the decoder's resolution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


def resize_target(
  x: Float[Array, "b *size c"], shape: tuple[int, ...], *, antialias: bool | None = None
) -> Float[Array, "b *out c"]:
  """Input at the decoder's resolution: linear along every axis, half-pixel centres.

  Args:
    x: raw input, channels last: series, image or clip.
    shape: the reconstruction's shape. One axis more than `x` is a frame axis: the image is repeated along it.
    antialias: widen the filter when shrinking; None for the release's choice: yes except for clips.

  Raises:
    ValueError: if batch or channels of `shape` differ from the input's, or the ranks do not fit.
  """
  out = shape[:1] + shape[2:] if len(shape) == 5 and x.ndim == 4 else shape
  if len(out) != x.ndim or out[0] != x.shape[0] or out[-1] != x.shape[-1]:
    raise ValueError(f"reconstruction: shape {shape} does not fit the input's {x.shape}")
  antialias = x.ndim != 5 if antialias is None else antialias
  x = jax.image.resize(x.astype(jnp.float32), out, "linear", antialias=antialias)
  return x if x.ndim == len(shape) else jnp.broadcast_to(x[:, None], shape)


def reconstruction(
  prediction: Float[Array, "b ..."],
  x: Float[Array, "b ..."],
  *,
  clips: int = 1,
  mask: Shaped[Array, "b"] | None = None,
) -> Float[Array, ""]:
  """Mean squared error of a decoder against its resized input (CodeBind, spec section 1.8), in float32.

  Args:
    prediction: the decoder's output [b, *out, c].
    x: raw input [b, *size, c], or [b, clips, *size, c], which is averaged over clips first.
    clips: whether there is a clip axis (> 1).
    mask: 0 for rows of padding.

  Raises:
    ValueError: as `resize_target`.
  """
  target = resize_target(x.mean(1) if clips > 1 else x, prediction.shape)
  error = jnp.square(prediction - target).reshape(prediction.shape[0], -1).mean(1)
  if mask is None:
    return error.mean()
  weight = mask.astype(jnp.float32)
  return jnp.sum(error * weight) / jnp.maximum(weight.sum(), 1.0)

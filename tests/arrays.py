"""Arrays that tests draw, and functions of arrays as one program."""

import functools

import jax
import numpy as np


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def compiled(function, **options):
  """The function with its options, jitted once: called as it is, each of its operations is a program of its own."""
  return jax.jit(functools.partial(function, **options))

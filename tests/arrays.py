"""Arrays that tests draw."""

import numpy as np


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)

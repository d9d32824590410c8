"""ConSE: an image's place in a text trunk's space by a classifier (Norouzi et al., 2014, arXiv 1312.5650).

The mean of the thousand ImageNet class names' text embeddings, weighted with the classifier's probabilities, is a first
estimate of the image's place in text space, also for words that no training caption has used. It depends on the frozen
trunks alone.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from codebind_jax.data.worlds import fetch
from codebind_jax.data.worlds.imagenet import imagenet_names
from codebind_jax.trunks import load_trunk
from codebind_jax.trunks.cache import cached_features

TEMPERATURE = 2.0


def named_classes(kernel: np.ndarray, bias: np.ndarray, text_trunk: str) -> dict[str, Any]:
  """Parameters of `class_meaning`: the classifier's, and its class names' embeddings by a text trunk (cached on disk).

  Args:
    kernel: [1000, width] of the classifier.
    bias: [1000].
    text_trunk: name of the text trunk.

  Raises:
    ValueError: if the classifier has another number of classes than there are names.
  """
  names = imagenet_names()
  if kernel.shape[0] != len(names):
    raise ValueError(f"class_names: the classifier has {kernel.shape[0]} classes, there are {len(names)} names")
  keys = [f"{number}: {name}" for number, name in enumerate(names)]  # two classes are called crane, and two maillot
  features = cached_features(
    load_trunk(text_trunk), keys, names.__getitem__, cache_dir=fetch.data_dir() / "features", hashes=names
  )
  return {
    "kernel": np.ascontiguousarray(kernel.T),
    "bias": np.ascontiguousarray(bias),
    "names": np.asarray(features[:, 0, 0], np.float32),
  }


def class_meaning(params: dict[str, Any], tokens: Float[Array, "b n c"]) -> Float[Array, "b n d"]:
  """Unit-length mean of the class names' embeddings under the classifier's softmax at temperature 2.

  Args:
    params: from `named_classes`.
    tokens: pooled features, as the classifier takes them.
  """
  logits = tokens @ params["kernel"] + params["bias"]
  mean = jax.nn.softmax(logits / TEMPERATURE, axis=-1) @ params["names"]
  return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)

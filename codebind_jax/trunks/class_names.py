"""ConSE: an image's place in a text trunk's space by a classifier (Norouzi et al., 2014, arXiv 1312.5650).

The mean of the thousand ImageNet class names' text embeddings, weighted with the classifier's probabilities, is a first
estimate of the image's place in text space, also for words that no training caption has used. It depends on the frozen
trunks alone.
"""

from __future__ import annotations

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from codebind_jax.data.worlds import fetch
from codebind_jax.data.worlds.imagenet import imagenet_names
from codebind_jax.trunks import Trunk, load_trunk
from codebind_jax.trunks.cache import TokenCache

TEMPERATURE = 2.0


def names_trunk(name: str, weights: str | Path) -> Trunk:
  """The packaged text trunk in whose space class names lie; in a saved model its files lie beside the image trunk's.

  Args:
    name: of the text trunk.
    weights: of the image trunk.
  """
  folder = Path(weights) if weights else None
  return load_trunk(name, weights=str(folder) if folder and (folder / "tokenizer.json").is_file() else "")


def class_embeddings(text_trunk: str) -> Float[np.ndarray, "classes d"]:
  """The class names' embeddings by a text trunk (cached on disk)."""
  names, trunk = imagenet_names(), load_trunk(text_trunk)
  cache = TokenCache(fetch.features_dir(), trunk)
  places = cache.strings(names)
  return np.stack([cache.reader(int(place), pooled=True)[0] for place in places]).astype(np.float32)


class ClassMeaning(nn.Module):
  """Unit-length mean of the class names' embeddings under a classifier's softmax at temperature 2.

  Attributes:
    width: of the embeddings.
    classes: of the classifier.
  """

  width: int
  classes: int = 1000

  @nn.compact
  def __call__(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b n d"]:
    """The mean for each pooled feature, as the classifier takes them."""
    normal, zeros = nn.initializers.normal(0.02), nn.initializers.zeros
    kernel = self.param("kernel", normal, (tokens.shape[-1], self.classes))
    bias = self.param("bias", zeros, (self.classes,))
    names = self.param("names", normal, (self.classes, self.width))
    logits = tokens @ kernel + bias
    mean = jax.nn.softmax(logits / TEMPERATURE, axis=-1) @ names
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)

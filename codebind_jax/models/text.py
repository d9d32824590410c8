"""Text stem: CLIP BPE ids -> tokens with positions, and pooling at the end-of-text token."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from codebind_jax.runtime.sharding import keep_rows


class TextStem(nn.Module):
  """Token embedding plus learned positions; the trunk after it is causal.

  Attributes:
    width: token width d.
    context: longest text in tokens; shorter inputs use the first positions.
    vocab: number of token ids.
    dtype: compute type.
  """

  width: int
  context: int = 77
  vocab: int = 49408
  dtype: Any = None

  @nn.compact
  def __call__(self, ids: Int[Array, "b n"]) -> tuple[Float[Array, "b n d"], Float[Array, "n d"]]:
    """Embeds ids.

    Returns:
      tokens (positions added) and the positions alone.

    Raises:
      ValueError: if the texts are longer than `context`.
    """
    if ids.shape[1] > self.context:
      raise ValueError(f"text: {ids.shape[1]} tokens, allowed at most context = {self.context}")
    embed = nn.Embed(self.vocab, self.width, dtype=self.dtype, name="embed")
    positions = self.param("positions", nn.initializers.normal(0.01), (self.context, self.width))
    positions = positions[: ids.shape[1]].astype(self.dtype or jnp.float32)
    return keep_rows(embed(ids)) + positions, positions


def pool_at_end(tokens: Float[Array, "b n d"], ids: Int[Array, "b n"], end_id: int = -1) -> Float[Array, "b 1 d"]:
  """The token at the first end mark.

  Args:
    tokens: of the texts.
    ids: of the tokens.
    end_id: of the end mark; -1 for the largest id in each text, as CLIP's end mark has the largest one of all.
  """
  at = jnp.argmax(ids if end_id < 0 else ids == end_id, axis=1)
  return jnp.take_along_axis(tokens, at[:, None, None], axis=1)

"""Text stems, of CLIP and of BERT: ids -> tokens with positions; pooling at the end-of-text token."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from codebind_jax.models.transformer import layer_norm
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


class BertStem(nn.Module):
  """Token embedding, learned positions and the first type's embedding, summed and normalised (BERT, RoBERTa).

  Attributes:
    width: token width d.
    context: number of positions.
    vocab: number of token ids.
    types: number of types, of which texts have the first.
    pad_id: of padding, which RoBERTa's positions leave out: those of a text start at `pad_id` + 1.
    eps: of the LayerNorm.
    dtype: compute type.
  """

  width: int
  context: int
  vocab: int
  types: int
  pad_id: int
  eps: float
  dtype: Any = None

  @nn.compact
  def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
    """Embeds ids.

    Raises:
      ValueError: if the texts are longer than the positions are.
    """
    if ids.shape[1] + self.pad_id + 1 > self.context:
      raise ValueError(f"text: {ids.shape[1]} tokens, allowed at most {self.context - self.pad_id - 1}")
    embed = lambda n, name: nn.Embed(n, self.width, dtype=self.dtype, name=name)
    real = (ids != self.pad_id).astype(jnp.int32)
    at = jnp.cumsum(real, axis=1) * real + self.pad_id
    summed = keep_rows(embed(self.vocab, "embed")(ids)) + embed(self.context, "positions")(at)
    summed = summed + embed(self.types, "types")(jnp.zeros((1, 1), jnp.int32))
    return layer_norm("norm", dtype=self.dtype, eps=self.eps)(summed)


def pool_at_end(tokens: Float[Array, "b n d"], ids: Int[Array, "b n"], end_id: int = -1) -> Float[Array, "b 1 d"]:
  """The token at the first end mark.

  Args:
    tokens: of the texts.
    ids: of the tokens.
    end_id: of the end mark; -1 for the largest id in each text, as CLIP's end mark has the largest one of all.
  """
  at = jnp.argmax(ids if end_id < 0 else ids == end_id, axis=1)
  return jnp.take_along_axis(tokens, at[:, None, None], axis=1)

